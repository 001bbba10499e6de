"""Which arms of a comparison are confirmed after a screen of all of them, and with how many seeds."""
import dataclasses
import math
import statistics

from experiments.analysis import ArmResults, paired_differences
from experiments.stats import CONFIDENCE, pairs_needed, power

SCREEN_SEEDS = 2  # of each arm
POWER = 0.8       # the probability with which a true difference is to be found


def plan_confirmation(screened: list[ArmResults], n_arms: int, difference: float,
                      most_seeds: int) -> tuple[list[ArmResults], str]:
    """The first arm and the `n_arms` others of one size with the best means, to be run with new seeds, and a sentence about
    them. The seeds are as many as find a true `difference` from the first with a probability of POWER, at most `most_seeds`.
    The spread is that of the screen's paired differences, pooled over all arms."""
    reference, *others = screened
    size = f"{reference.arm.size}: " if reference.arm.size else ""
    finished = [results for results in others if results.finished()] if reference.finished() else []
    if not finished:
        return [], f"{size}no arm can be compared with the first: nothing is confirmed"
    best = sorted(finished, key=lambda results: statistics.mean(run.outcome for run in results.finished()))[:n_arms]
    n, why = choose_seeds([paired_differences(results, reference) for results in finished], difference, len(best),
                          most_seeds, reference.arm.metric.form, reference.arm.metric.unit)
    seeds = tuple(range(SCREEN_SEEDS + 1, SCREEN_SEEDS + 1 + n))
    chosen = [ArmResults(dataclasses.replace(results.arm, seeds=seeds), results.timed_budget, results.grid,
                         results.full_budget_lr_runs) for results in (reference, *best)]
    names = ", ".join(results.arm.name for results in best)
    return chosen, f"{size}confirming {names} against {reference.arm.name} with {n} new seeds{why}"


def choose_seeds(pairs: list[list[float]], difference: float, n_arms: int, most: int, form: str,
                 unit: str) -> tuple[int, str]:
    """How many seeds `n_arms` arms need, and why. pairs: the paired differences of each arm of the screen. form, unit: of
    the spread as text."""
    pairs = [found for found in pairs if len(found) > 1]
    freedom = sum(len(found) - 1 for found in pairs)
    if not freedom:
        return most, ""
    spread = math.sqrt(sum(statistics.variance(found) * (len(found) - 1) for found in pairs) / freedom)
    words = (f": paired differences have a standard deviation of {spread:{form}} {unit} ({freedom} "
             f"degree{'s' * (freedom > 1)} of freedom)")
    if not spread:
        return SCREEN_SEEDS, words
    alpha = (1 - CONFIDENCE) / n_arms  # which the smallest of the p-values has to be below (Holm)
    wanted = pairs_needed(spread, difference, alpha, POWER)
    n = min(wanted, most)
    words += f", so a difference of {difference:g} is found with a probability of {power(n, spread, difference, alpha):.0%}"
    return n, words + f"; {POWER:.0%} would take {wanted} seeds: see --most_seeds" * (wanted > n)
