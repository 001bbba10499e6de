"""What it takes to reach a loss: tokens, FLOPs and seconds of each arm, and their ratios to the first arm's.

A loss in the middle of a cooldown predicts little, so an arm is run on rising budgets, each with its whole schedule, until
every seed ends at the target or below. What a seed needs lies between the first budget at which it does and the one before,
on the power law through the two: nothing is extrapolated.
"""
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.analysis import SIGNIFICANCE, ArmResults, CellResult, share_vocabulary
from experiments.comparison import figure_name
from experiments.report import Figure, Table, align_columns, write_report
from experiments.scaling_plots import draw_to_target
from experiments.stats import Estimate, holm, p_value, power_law, sum_of_means
from experiments.tuning import ArmRunner

N_BUDGETS = 6  # each twice the one before
TARGETS = {"to_loss": ("val_loss", "nats/token"), "to_bpb": ("val_bpb", "bits/byte")}
NOTES = """\
An arm is run on up to {n} budgets, each twice the one before, until every seed ends at the target or below; each run has
its own whole schedule with its cooldown. What a seed needs is read off the power law through two of its runs: on the first
budget with which it ends at the target or below, and on the one before. Losses fall a little slower than a power law, so
that slightly less would do, in every arm alike. The learning rate is chosen on a part of the smallest budget; on each
further one, the best so far and then lower ones are tried with the first seed while they improve. Means over seeds are
geometric, with the 95 % interval (Student's t, of logarithms); ratios to the first arm are paired by seed, and p is
corrected for all comparisons on this page (Holm). Intervals cover seeds, not the choice of text. Seconds are tokens divided
by an arm's speed: the median of a few steps, timed after all runs, one at a time with the arms taking turns. The ratio of
seconds takes the geometric mean over the rounds of timing, which its interval covers too (Welch). An arm of which a seed
does not reach the target has no mean: that of the others would flatter it."""


@dataclass(frozen=True)
class Target:
    """name: of TARGETS."""
    name: str
    value: float

    @property
    def unit(self) -> str:
        return TARGETS[self.name][1]

    def loss(self, run: CellResult) -> float:
        """What a run ends with; infinite unless it has finished."""
        return run.rows[-1][TARGETS[self.name][0]] if run.status == "finished" else math.inf

    def is_reached(self, ladder: list[ArmResults]) -> bool:
        """Whether every seed ends at the target or below on some budget. ladder: one arm on rising budgets."""
        runs = list(zip(*(results.runs for results in ladder if results.runs)))
        return bool(runs) and all(min(map(self.loss, own)) <= self.value for own in runs)


# -- running ----------------------------------------------------------------------------------------------------------

def ladders(results: list[ArmResults]) -> list[list[ArmResults]]:
    """The results of each arm at each size, in the order of the budgets."""
    found = {}
    for arm_results in results:
        found.setdefault((arm_results.arm.size, arm_results.arm.name), []).append(arm_results)
    return list(found.values())


def needed(results: list[ArmResults], target: Target) -> list[ArmResults]:
    """Those that are run, or have been, as far as it is known which budgets reach the target."""
    return [arm_results for ladder in ladders(results) for i, arm_results in enumerate(ladder)
            if not target.is_reached(ladder[:i])]


def run_to_target(results: list[ArmResults], target: Target, runner: ArmRunner, rates: tuple[float, ...], n_rounds: int):
    """Runs every arm on rising budgets until its seeds reach the target, and times its steps. n_rounds: of timing."""
    by_arm = ladders(results)
    for i in range(max(map(len, by_arm))):
        climbing = [ladder[i] for ladder in by_arm if not target.is_reached(ladder[:i])]
        for arm_results, below in ((ladder[i], ladder[i - 1]) for ladder in by_arm if i):
            arm_results.grid = below.grid + below.full_budget_lr_runs
        runner.tune(climbing, rates)
        runner.run_seeds(climbing)
    runner.measure_speed([finished[-1] for ladder in by_arm if (finished := [own for own in ladder if own.finished()])],
                         n_rounds)


# -- what a seed needs ------------------------------------------------------------------------------------------------

def tokens_to_target(points: list[tuple[float, float]], value: float) -> tuple[str, float]:
    """Whether the target is "reached", and with how many tokens; else "not reached", or reached "within" the smallest
    budget, and tokens of the largest or the smallest one. points: (tokens, loss) of the runs of a seed, rising in tokens."""
    first = next((i for i, (_, loss) in enumerate(points) if loss <= value), None)
    if first is None:
        return "not reached", points[-1][0] if points else math.nan
    if first == 0:
        return "within", points[0][0]
    a, b = power_law(*zip(*points[first - 1:first + 1]))
    return "reached", (a / value) ** (1 / b)


def seed_rows(ladder: list[ArmResults], target: Target) -> list[dict]:
    """A row for each seed of an arm: the columns of seeds.csv."""
    arm, speed = ladder[0].arm, measured_speed(ladder)
    rows = []
    for i, seed in enumerate(arm.seeds):
        runs = [results.runs[i] for results in ladder if i < len(results.runs)]
        points = [(run.rows[-1]["tokens"], target.loss(run)) for run in runs if run.status == "finished"]
        status, tokens = tokens_to_target(points, target.value)
        flops = tokens * (arm.flops_per_token + arm.elementwise_flops_per_token)
        rows.append({"size": arm.size, "arm": arm.name, "seed": seed, "status": status, "tokens": tokens,
                     "bytes": tokens * arm.bytes_per_token, "flops": flops, "seconds": tokens / speed,
                     "losses": " ".join(f"{n:.0f}:{loss:.5f}" for n, loss in points)})
    return rows


def speeds_by_round(ladder: list[ArmResults]) -> dict[int, float]:
    """Tokens per second in each round of timing."""
    return {run.cell.seed: run.speed() for results in ladder for run in results.speeds if run.status == "finished"}


def measured_speed(ladder: list[ArmResults]) -> float:
    """Tokens per second; NaN where it has not been measured."""
    return next((speed for results in reversed(ladder) if not math.isnan(speed := results.speed())), math.nan)


# -- the table --------------------------------------------------------------------------------------------------------

COSTS = "tokens", "bytes", "flops", "seconds"
COMPARED = "tokens", "seconds"  # whose ratios are tested: bytes are tokens of one vocabulary, FLOPs a fixed multiple


def summary_rows(ladders: list[list[ArmResults]], by_arm: list[list[dict]]) -> list[dict]:
    """A row per arm of one size; the first is the reference. by_arm: the rows of its seeds. See also `add_significance`."""
    rows, reference = [], by_arm[0]
    for ladder, own in zip(ladders, by_arm):
        reached = [row for row in own if row["status"] == "reached"]
        row = {"size": own[0]["size"], "arm": own[0]["arm"], "seeds": len(own)}
        row |= {status.replace(" ", "_"): sum(seed["status"] == status for seed in own)
                for status in ("reached", "within", "not reached")}
        rows.append(row)
        if len(reached) < len(own):
            missed = "not reached" if row["not_reached"] else "within"
            row["limit_tokens"] = max((seed["tokens"] for seed in own if seed["status"] == missed
                                       and not math.isnan(seed["tokens"])), default=math.nan)
            continue
        for name in COSTS:
            values = [seed[name] for seed in own]
            if not any(map(math.isnan, values)):
                row |= exponentiate(name, Estimate.from_values([math.log(value) for value in values]))
        if own is not reference and rows[0]["reached"] == len(reference):
            row |= ratio_columns(own, reference, speeds_by_round(ladder), speeds_by_round(ladders[0]))
    return rows


def ratio_columns(own: list[dict], reference: list[dict], speeds: dict[int, float], first_speeds: dict[int, float]) -> dict:
    """The ratios to the reference's, paired by seed, those of speed by round of timing. All seeds of both have reached the
    target."""
    row = {}
    for name in ("tokens", "bytes", "flops"):
        logs = [math.log(seed[name] / first[name]) for seed, first in zip(own, reference)]
        if not any(map(math.isnan, logs)):
            row |= exponentiate(f"{name}_ratio", Estimate.from_values(logs))
        if name == "tokens":
            row["tokens_p"], tokens = p_value(logs), logs
    if slower := [math.log(first_speeds[i] / speeds[i]) for i in speeds if i in first_speeds]:
        found, row["seconds_p"] = sum_of_means([tokens, slower])
        row |= exponentiate("seconds_ratio", found)
    return row


def exponentiate(name: str, found: Estimate) -> dict:
    """The columns of a geometric mean and its interval. found: of logarithms."""
    interval = {f"{name}_low": math.exp(found.low), f"{name}_high": math.exp(found.high)} if found.n > 1 else {}
    return {name: math.exp(found.mean)} | interval


def add_significance(rows: list[dict]) -> list[dict]:
    """The same rows, with p-values that are corrected for the number of comparisons."""
    compared = [(row, name) for row in rows for name in COMPARED if f"{name}_p" in row]
    for (row, name), p in zip(compared, holm([row[f"{name}_p"] for row, name in compared])):
        row |= {f"{name}_p_holm": p, "comparisons": len(compared)}
    return rows


# -- as text ----------------------------------------------------------------------------------------------------------

def interval(row: dict, name: str, form: str, scale: float = 1) -> str:
    """"1.24 (1.20 to 1.29)"; "" where there is none."""
    if name not in row:
        return ""
    ends = [f"{row[f'{name}{end}'] * scale:{form}}" for end in ("_low", "_high") if f"{name}{end}" in row]
    return f"{row[name] * scale:{form}}" + (f" ({' to '.join(ends)})" if ends else "")


def describe_misses(row: dict) -> str:
    """Why an arm has no mean: "2 of 3 seeds did not reach it in 10 M tokens, the most tried"."""
    count = lambda n: f"{n} of {row['seeds']} seed{'s' * (row['seeds'] > 1)}"
    if math.isnan(row["limit_tokens"]):
        return "no run has finished"
    limit = f"{row['limit_tokens'] / 1e6:.3g} M tokens"
    if row["not_reached"]:
        return f"{count(row['not_reached'])} did not reach it in {limit}, the most tried"
    return f"{count(row['within'])} reached it within {limit}, the least tried: give fewer --most_tokens"


def describe(row: dict, reference: dict) -> str:
    """A sentence about an arm that claims no more than its intervals support."""
    name, base = row["arm"], reference["arm"]
    if "tokens" not in row:
        return f"{name}: {describe_misses(row)}."
    text = f"{name}: {interval(row, 'tokens', '.4g', 1e-6)} M tokens"
    if "seconds" in row:
        text += f", {interval(row, 'seconds', ',.1f')} s"
    if row is reference:
        return f"{text}."
    if "tokens_ratio" not in row:
        return f"{text}; no ratio to {base}, which has no mean."
    for cost in COMPARED:
        if f"{cost}_p_holm" in row:
            p = row[f"{cost}_p_holm"]
            less = "fewer" if cost == "tokens" else "less"
            verdict = ("one seed shows nothing" if row["seeds"] == 1 else
                       f"no significant difference, p = {p:.3f}" if p >= SIGNIFICANCE else
                       f"{less if row[f'{cost}_ratio'] < 1 else 'more'}, p = {p:.3f}")
            text += f"; {interval(row, f'{cost}_ratio', '.3f')} times the {cost} of {base} ({verdict})"
    return f"{text}."


def make_table(rows: list[dict], is_one_vocabulary: bool) -> Table:
    """The arms of one size."""
    amount = ("tokens", "M tokens") if is_one_vocabulary else ("bytes", "MB of text")
    number = lambda row, name: f"{row[name]:.3f}" if name in row else ""
    return Table(("arm", f"{amount[1]} to the target (lower is better)", "relative to the first arm",
                  "TFLOP (lower is better)", "relative to the first arm", "seconds (lower is better)",
                  "relative to the first arm", "p (Holm), tokens", "p (Holm), seconds", "seeds that reached it"), [
        (row["arm"], interval(row, amount[0], ".4g", 1e-6), interval(row, f"{amount[0]}_ratio", ".3f"),
         interval(row, "flops", ".4g", 1e-12), interval(row, "flops_ratio", ".3f"), interval(row, "seconds", ",.1f"),
         interval(row, "seconds_ratio", ".3f"), number(row, "tokens_p_holm"), number(row, "seconds_p_holm"),
         f"{row['reached'] + row['within']} of {row['seeds']}") for row in rows])


# -- the report -------------------------------------------------------------------------------------------------------

def write_to_loss(results: list[ArmResults], target: Target, describe_conditions: Callable[[list[ArmResults]], str],
                  command_line: str, out_path: Path):
    """Writes comparison.md, .csv and .html, seeds.csv and the pictures, and prints a short table of each size.
    describe_conditions(arms of a size): the conditions that they were compared under."""
    groups = [list(group) for _, group in itertools.groupby(ladders(results), key=lambda ladder: ladder[0].arm.size)]
    seeds_by_size = [[seed_rows(ladder, target) for ladder in group] for group in groups]
    rows_by_size = [summary_rows(group, by_arm) for group, by_arm in zip(groups, seeds_by_size)]
    rows = add_significance(list(itertools.chain(*rows_by_size)))
    parts, lines = [("code", command_line)], []
    for group, size_rows in zip(groups, rows_by_size):
        size, largest = group[0][0].arm.size, [ladder_with_runs(ladder)[-1] for ladder in group]
        sentences = [describe(row, size_rows[0]) for row in size_rows]
        parts += [("h2", size or "Results"), ("p", f"{describe_conditions(largest)}."), ("ul", sentences),
                  make_table(size_rows, share_vocabulary(largest)), Figure(draw_to_target(
                      {ladder[0].arm.name: curve(ladder, target) for ladder in group}, target.value, target.unit),
                      figure_name("to_target", size))]
        if problems := [problem for ladder in group for own in ladder for problem in own.problems()]:
            parts += [("h3", "Runs left out"), ("ul", list(dict.fromkeys(problems)))]
        lines += [size] * bool(size) + short_table(size_rows)
    parts.append(("p", NOTES.format(n=N_BUDGETS)))
    write_report(out_path, f"What it takes to reach {target.value:g} {target.unit}", parts,
                 {"comparison": rows, "seeds": list(itertools.chain(*(own for by_arm in seeds_by_size for own in by_arm)))})
    print("\n".join([*lines, str(out_path / "comparison.html")]))


def ladder_with_runs(ladder: list[ArmResults]) -> list[ArmResults]:
    """The budgets that have a finished run, or the first where none has."""
    return [results for results in ladder if results.finished()] or ladder[:1]


def curve(ladder: list[ArmResults], target: Target) -> list[tuple[float, float, list[float]]]:
    """(tokens, seconds, losses of the finished runs) of each budget."""
    speed = measured_speed(ladder)
    return [(tokens, tokens / speed, [target.loss(run) for run in results.finished()]) for results in ladder
            if results.finished() for tokens in [results.mean_final("tokens")]]


def short_table(rows: list[dict], width: int = 80) -> list[str]:
    """Lines for a terminal: arm, tokens, seconds, and the ratios to the first arm with their intervals."""
    texts = [("arm", "M tokens", "ratio", "seconds", "ratio")] + [
        (row["arm"], f"{row['tokens'] / 1e6:.4g}" if "tokens" in row else "-", interval(row, "tokens_ratio", ".3f"),
         f"{row['seconds']:,.1f}" if "seconds" in row else "-", interval(row, "seconds_ratio", ".3f")) for row in rows]
    misses = [describe(row, rows[0]) for row in rows if "tokens" not in row]
    return [*align_columns(texts, width), *misses, ""]
