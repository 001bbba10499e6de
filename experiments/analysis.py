"""Statistics of a comparison: the arms' runs, which learning rate to try next, differences paired by seed, verdicts.

compare.py fills an ArmResults for each arm while its cells run; `table_rows` and `add_significance` make the rows of
comparison.csv from them. Numbers and sentences only: experiments/comparison.py writes the report.
"""
import itertools
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from experiments.runner import TrainingJob
from experiments.stats import Estimate, holm, p_value, parabola_minimum, power_law

SPEED_WARMUP = 5      # steps at the start of a speed run that are not timed
SIGNIFICANCE = 0.05   # of corrected p-values


# -- what arms are compared by ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Metric:
    """A number that a run ends with; the lower, the better, and 0 is perfect.

    name: of its columns in comparison.csv. field: of metrics.jsonl; other_fields: what the rows of its validations have
    besides. label: for headings and axes. unit: what follows a value; difference_unit: what follows a difference, where that
    is something else. form: how both are written. is_complement: it is 1 minus the field. effort: what a longer run has more
    of. note: what it means, for the page.
    """
    name: str
    field: str
    label: str
    unit: str
    difference_unit: str = ""
    form: str = ".4f"
    is_complement: bool = False
    effort: str = "steps"
    note: str = ""
    other_fields: tuple[str, ...] = ()

    @property
    def is_of_games(self) -> bool:
        return self.effort == "games"

    def of(self, row: dict) -> float:
        """Its value in a row of metrics.jsonl."""
        return 1 - row[self.field] if self.is_complement else row[self.field]

    def describe(self, value: float) -> str:
        """"1.6312 bits/byte"."""
        return f"{value:{self.form}} {self.unit}"

    def describe_difference(self, value: float, sign: str = "") -> str:
        """"2.31% of all moves", or with the sign "+" "+2.31% of all moves"."""
        return f"{value:{sign}{self.form}} {self.difference_unit or self.unit}"


BPB = Metric("bpb", "val_bpb", "bits per byte", "bits/byte", other_fields=("val_loss",))
WRONG_MOVES = Metric(
    "wrong_moves", "optimal_moves", "fraction of wrong moves", "wrong moves", "of all moves", ".2%", is_complement=True,
    effort="games", note="Wrong moves: the fraction of an exam's positions, the same ones for all arms, in which the move "
                         "that the model finds most probable is not one of the best. Differences are of all moves, not "
                         "relative to the first arm's wrong ones.",
    other_fields=("games",))
EXPLOITABILITY = Metric(
    "exploitability", "exploitability", "exploitability in chips", "chips of exploitability", effort="games",
    note="Exploitability: the chips a game that the model loses, over both seats, to an opponent who knows how it plays and "
         "plays as well as can be; 0 for an equilibrium alone.",
    other_fields=("games",))
WRONG_ANSWERS = Metric(
    "wrong_answers", "exact_match", "fraction of wrong answers", "wrong answers", "of all answers", ".2%",
    is_complement=True, effort="problems",
    note="Wrong answers: the fraction of held-out problems of the largest size, the same ones for all "
         "arms, that the greedy answer gets wrong with the most thought that the arm is trained for. Differences are of all "
         "answers, not relative to the first arm's wrong ones.")


# -- arms, their runs, and what these ended with ----------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Arm:
    """An architecture or recipe at one size, and where a comparison has several budgets, at one of them."""
    name: str
    size: str
    flags: dict                       # flag name -> value, of the script whose runs are compared
    seeds: tuple[int, ...]
    step_tokens: int                  # tokens that an optimizer step sees
    batch_shape: tuple[int, int]      # batch_size, block_size
    base_lr: float                    # the learning rate that the grid's multiples refer to
    n_parameters: int
    flops_per_token: int              # matrix products, forward and backward
    elementwise_flops_per_token: int  # activations and the bases of KAN layers
    embedding_parameters: int = 0     # of n_parameters: of the embedding, and of an untied head
    vocab_size: int = 0
    bytes_per_token: float = math.nan  # of the training text; NaN where it is not known
    vocabulary: str = ""              # differs between arms whose tokens differ
    data_digests: tuple[str, ...] = ()  # of everything that a run reads
    metric: Metric = BPB
    speed_window: int = 1              # steps over which speed is averaged: those from one rollout to the next
    budget: tuple[str, float] | None = None  # unit and amount, where a comparison has several
    epochs: float | None = None        # passes of the whole budget over the text, which is cut to that
    tuned_below: bool = False          # the search for its learning rate goes on from that of the next smaller budget

    @property
    def group(self) -> str:
        """Of the arms that are compared with each other, as text; "" where there is one group."""
        return " ".join(filter(None, (self.size, self.budget and f"{self.budget[0]}={self.budget[1]:g}",
                                      self.epochs and f"epochs={self.epochs:g}")))


@dataclass(frozen=True)
class Cell:
    """One run of an arm: in stage "lr_grid" on `budget_frac` of the budget, to choose the learning rate; in stage "run" on
    the whole budget; in stage "speed" a few steps, which are timed."""
    arm: Arm
    stage: str
    lr_multiple: float
    seed: int             # in stage "speed" the round
    budget_frac: float
    job: TrainingJob
    limit: tuple[str, float] = ("tokens", math.inf)  # the column of its metrics that ends it, and where
    cost: float = 0.0     # how long it takes, relative to other cells

    def progress(self) -> float:
        """The part of it that has run, 0 to 1, from its metrics."""
        rows, (name, limit) = self.job.rows(), self.limit
        return min(1.0, rows[-1].get(name, 0) / limit) if rows else 0.0


@dataclass(frozen=True)
class CellResult:
    """How a cell ended (status and reason as in runner.JobResult), and its metrics."""
    cell: Cell
    status: str
    reason: str
    rows: list[dict]

    @property
    def outcome(self) -> float:
        """The arm's metric at the end; infinite unless the cell finished."""
        return self.cell.arm.metric.of(self.rows[-1]) if self.status == "finished" else math.inf

    def speed(self) -> float:
        """Tokens per second of typical steps; the rows are those of single steps."""
        speeds, n = [row["tok_per_sec"] for row in self.rows if row["step"] > SPEED_WARMUP], self.cell.arm.speed_window
        return statistics.median(statistics.harmonic_mean(speeds[i:i + n]) for i in range(0, len(speeds) - n + 1, n))

    def describe(self) -> str:
        cell = self.cell
        if self.status != "finished":
            end = f"{self.status}: {self.reason}"
        elif cell.stage == "speed":
            end = f"{self.speed():,.0f} tok/s" + " with play" * cell.arm.metric.is_of_games
        else:
            end = f"{cell.arm.metric.describe(self.outcome)}, {self.rows[-1]['seconds']:.0f} s"
        which = {"lr_grid": f"learning rate x {cell.lr_multiple:g} on {cell.budget_frac:.0%} of the budget",
                 "run": f"learning rate x {cell.lr_multiple:g}, seed {cell.seed}",
                 "speed": f"speed, round {cell.seed}"}[cell.stage]
        return f"{cell.arm.group} {cell.arm.name}, {which}: {end}".strip()


def best_result(results: list[CellResult]) -> CellResult | None:
    """The finished one with the lowest outcome. None while any has to be run again: it might be the best."""
    if any(result.status not in ("finished", "diverged") for result in results):
        return None
    return min((result for result in results if result.status == "finished"), key=lambda result: result.outcome,
               default=None)


@dataclass(eq=False)
class ArmResults:
    """All results of an arm."""
    arm: Arm
    timed_budget: bool = False  # the budget is in seconds
    grid: list[CellResult] = field(default_factory=list)  # a part of the budget, every learning rate; or smaller budgets
    full_budget_lr_runs: list[CellResult] = field(default_factory=list)  # the whole budget, first seed, falling rates
    runs: list[CellResult] = field(default_factory=list)                 # the whole budget, best rate, every seed
    speeds: list[CellResult] = field(default_factory=list)

    def best(self) -> CellResult | None:
        """At the best learning rate: on the whole budget where that was tried, else on the part of it."""
        return best_result(self.full_budget_lr_runs or self.grid)

    def next_lr_multiple(self) -> float | None:
        """The learning rate to try next on the whole budget; None when the search is over or a run has to be repeated.

        First the grid's best, then the next lower one for as long as the outcome falls: longer training wants a lower rate
        (Bjorck et al., arXiv:2409.19913), so the best one for a part of the budget may be too high for all of it.
        """
        grid_best, best = best_result(self.grid), best_result(self.full_budget_lr_runs)
        if grid_best is None or not self.full_budget_lr_runs:
            return grid_best and grid_best.cell.lr_multiple
        latest = self.full_budget_lr_runs[-1]
        lower = [result.cell.lr_multiple for result in self.grid if result.cell.lr_multiple < latest.cell.lr_multiple]
        improves = latest.status == "diverged" or best is latest
        was_shorter = grid_best.cell.budget_frac < 1 or self.arm.tuned_below
        return max(lower, default=None) if improves and was_shorter else None

    def finished(self) -> list[CellResult]:
        return [run for run in self.runs if run.status == "finished"]

    def final_values(self, name: str) -> dict[int, float]:
        """The last value of a metric in each finished run that has it, by the number of its seed."""
        return {i: run.rows[-1][name] for i, run in enumerate(self.runs)
                if run.status == "finished" and name in run.rows[-1]}

    def mean_final(self, name: str) -> float:
        """The mean over finished runs of a metric's last value."""
        return statistics.mean(run.rows[-1][name] for run in self.finished())

    def speed(self) -> float:
        """Tokens per second: of the speed runs, or of the runs themselves where seconds are the budget. NaN if unknown."""
        if self.timed_budget:
            return self.mean_final("tokens") / self.mean_final("seconds")
        speeds = [run.speed() for run in self.speeds if run.status == "finished"]
        return statistics.median(speeds) if speeds else math.nan

    def curves(self) -> list[list[dict]]:
        """The rows of each finished run, with seconds at the measured speed and bytes of text; of self-play also
        with 0 games in rows before the first rollout."""
        speed, n_bytes, games = self.speed(), self.arm.bytes_per_token, {"games": 0} if self.arm.metric.is_of_games else {}
        return [[games | row | {"seconds": row["tokens"] / speed, "bytes": row["tokens"] * n_bytes} for row in run.rows]
                for run in self.finished()]

    def slope(self) -> tuple[float, float]:
        """(how much the metric falls by training on e times the tokens, ln of the token ratio it was measured over).

        Between the grid's best run and the whole-budget run of the same seed: each is at its own best learning rate and has
        its full cooldown, which an intermediate loss has not. (NaN, NaN) unless the longer run is better.
        """
        short = best_result(self.grid)
        whole = next((run for run in self.finished() if run.cell.seed == short.cell.seed),
                     best_result(self.full_budget_lr_runs))  # which is that run, where these are of other seeds
        if whole is None or whole.rows[-1]["tokens"] <= short.rows[-1]["tokens"] or whole.outcome >= short.outcome:
            return math.nan, math.nan
        log_ratio = math.log(whole.rows[-1]["tokens"] / short.rows[-1]["tokens"])
        return (short.outcome - whole.outcome) / log_ratio, log_ratio

    def at_grid_edge(self) -> bool:
        """Whether the best learning rate is the grid's lowest or highest, beyond which there may be a better one, unless it
        led to perfect runs."""
        multiples, best = [run.cell.lr_multiple for run in self.grid], self.best()
        return best is not None and best.outcome > 0 and best.cell.lr_multiple in (min(multiples), max(multiples))

    def results(self) -> Iterator[CellResult]:
        return itertools.chain(self.grid, self.full_budget_lr_runs, self.runs, self.speeds)

    def problems(self) -> Iterator[str]:
        yield from dict.fromkeys(result.describe() for result in self.results() if result.status != "finished")


# -- the table --------------------------------------------------------------------------------------------------------

def table_rows(results: list[ArmResults]) -> list[dict]:
    """A row per arm of one size; the first is the reference. Arms without a finished run lack most columns.
    `add_significance` completes the rows of all sizes together."""
    reference, rows, name = results[0], [], results[0].arm.metric.name
    slope = reference.slope() if reference.finished() else (math.nan, math.nan)
    for arm_results in results:
        arm = arm_results.arm
        row = {"size": arm.size} | ({"budget": arm.budget[1]} if arm.budget else {})
        row |= {"epochs": arm.epochs} if arm.epochs else {}
        row |= {"arm": arm.name, "runs": len(arm_results.finished()), "runs_wanted": len(arm.seeds),
                "parameters": arm.n_parameters, "flops_per_token": arm.flops_per_token,
                "elementwise_flops_per_token": arm.elementwise_flops_per_token, "n_hidden": arm.flags.get("n_hidden"),
                "n_rates": len(arm_results.grid), "at_grid_edge": arm_results.at_grid_edge()} | vocabulary_columns(arm)
        rows.append(row)
        if not arm_results.finished():
            continue
        row |= outcome_columns(arm_results)
        if arm_results is not reference:
            row |= difference_columns(arm_results, reference, *slope)
    fastest = min((row["seconds"] for row in rows if "seconds" in row), default=math.nan)
    for row, arm_results in zip(rows, results):
        if "seconds" in row:
            own_slope, log_ratio = arm_results.slope()
            longer = math.log(row["seconds"] / fastest)
            if longer == 0:
                row[f"{name}_equal_seconds"] = row[name]
            elif longer <= log_ratio:  # no further than was measured
                row[f"{name}_equal_seconds"] = row[name] + own_slope * longer
    return rows


def vocabulary_columns(arm: Arm) -> dict:
    """What depends on an arm's vocabulary alone. Empty where it is not known."""
    if math.isnan(arm.bytes_per_token):
        return {}
    return {"vocab_size": arm.vocab_size, "embedding_share": arm.embedding_parameters / arm.n_parameters,
            "bytes_per_token": arm.bytes_per_token, "tokens_per_byte": 1 / arm.bytes_per_token,
            "bytes_per_context": arm.batch_shape[1] * arm.bytes_per_token}


def outcome_columns(arm_results: ArmResults) -> dict:
    """What an arm's finished runs ended with."""
    arm, finished, tokens, speed = (arm_results.arm, arm_results.finished(), arm_results.mean_final("tokens"),
                                    arm_results.speed())
    found, name = Estimate.from_values([run.outcome for run in finished]), arm.metric.name
    if arm.metric.is_of_games:
        games = arm_results.mean_final("games")
        amount, speeds = {"games": games}, {"games_per_sec": games / tokens * speed}
    else:
        amount = {"loss": arm_results.mean_final("val_loss")} if arm.metric == BPB else {}
        speeds = {"tok_per_sec": speed, "bytes_per_sec": speed * arm.bytes_per_token}
    return {name: found.mean, f"{name}_margin": found.margin, **amount,
            "learning_rate": arm.base_lr * arm_results.best().cell.lr_multiple, "tokens": tokens,
            "seconds": tokens / speed, **speeds,
            "peak_memory": max(row.get("peak_memory", 0) for run in finished for row in run.rows)}


def difference_columns(arm_results: ArmResults, reference: ArmResults, slope: float, log_ratio: float) -> dict:
    """The difference in the metric to the reference, paired by seed, and how many steps, or games, more or fewer the
    reference would need to match it. slope, log_ratio: the reference's, see ArmResults.slope."""
    pairs = paired_differences(arm_results, reference)
    if not pairs:
        return {}
    difference = Estimate.from_values(pairs)
    row = {"difference": difference.mean, "difference_margin": difference.margin, "pairs": len(pairs), "p": p_value(pairs)}
    for name, value in (("", difference.mean), ("_low", difference.high), ("_high", difference.low)):
        if abs(value) < math.inf and slope > 0:
            log_steps = min(max(-value / slope, -log_ratio), log_ratio)  # no further than was measured
            row[f"{arm_results.arm.metric.effort}_equivalent{name}"] = math.exp(log_steps) - 1
    return row


def paired_differences(arm_results: ArmResults, reference: ArmResults) -> list[float]:
    """The metric minus the reference's, of each pair of runs that both finished."""
    outcomes = {i: run.outcome for i, run in enumerate(reference.runs) if run.status == "finished"}
    return [run.outcome - outcomes[i] for i, run in enumerate(arm_results.runs)
            if run.status == "finished" and i in outcomes]


def final_columns(arm_results: ArmResults, reference: ArmResults, name: str, column: str) -> dict:
    """The mean over finished runs of what the field `name` ends with, called `column`, and its difference from the
    reference's, paired by seed, each with its interval."""
    own, first = arm_results.final_values(name), reference.final_values(name)
    found = Estimate.from_values(list(own.values()))
    row = {column: found.mean, f"{column}_margin": found.margin, "runs": found.n}
    if arm_results is not reference and (pairs := [own[i] - first[i] for i in own if i in first]):
        difference = Estimate.from_values(pairs)
        row |= {"difference": difference.mean, "difference_margin": difference.margin}
    return row


def add_significance(rows: list[dict]) -> list[dict]:
    """The same rows, with p-values corrected for the number of comparisons, and the significance of each difference:
    "corrected" if it is significant after the correction, "uncorrected" if only without it, else "none"."""
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, holm([row["p"] for row in compared])):
        excludes_0 = abs(row["difference"]) > row["difference_margin"]
        significance = "none" if not excludes_0 else "corrected" if p < SIGNIFICANCE else "uncorrected"
        row |= {"p_holm": p, "comparisons": len(compared), "significance": significance}
    return rows


def screen_rows(screened: list[ArmResults]) -> list[dict]:
    """`table_rows` of the runs that have chosen what is confirmed, which are not tested."""
    rows = table_rows(screened)
    for row in rows:
        if row.pop("p", None) is not None:
            row["significance"] = "screened"
    return rows


# -- what accuracy costs at inference ---------------------------------------------------------------------------------

def thought_rows(results: list[ArmResults]) -> list[dict]:
    """A row for each arm of one size and each amount of thought that it is trained for, at the end of its finished runs;
    differences from the first arm are paired by seed. tokens (generated) and flops are of a problem. [] where runs do not
    think."""
    rows, reference = [], results[0]
    for arm_results in results:
        for name in arm_results.finished()[0].rows[-1] if arm_results.finished() else ():
            kind, _, level = name.partition("/")
            if kind != "exact_match" or not level:
                continue
            row = {"size": arm_results.arm.size, "arm": arm_results.arm.name, "thought": level} | final_columns(
                arm_results, reference, name, "accuracy")
            rows.append(row | {cost: arm_results.mean_final(f"{cost}/{level}") for cost in ("tokens", "flops")})
    return rows


# -- as text ----------------------------------------------------------------------------------------------------------

def verdict(row: dict, reference: dict, metric: Metric = BPB) -> str:
    """One sentence about an arm that claims no more than its interval supports; `short_verdict` is its few words."""
    name, base, number = row["arm"], reference["arm"], f"+{metric.form}"
    missing = "".join(f" {other['arm']} finished only {other['runs']} of {other['runs_wanted']} runs; how the others would "
                      f"have ended is unknown."
                      for other in (row, reference) if 0 < other["runs"] < other["runs_wanted"])
    if "difference" not in row:
        return f"{name}: no comparable run finished."
    if math.isinf(row["difference_margin"]):
        return (f"{name}: {metric.describe_difference(row['difference'], '+')} against {base} with one seed, which shows "
                f"nothing.{missing}")
    interval = (f"95 % interval {row['difference'] - row['difference_margin']:{number}} to "
                f"{row['difference'] + row['difference_margin']:{number}}, {row['pairs']} seeds")
    if row["significance"] == "none":
        return f"{name}: no significant difference from {base} ({interval}).{missing}"
    if row["significance"] == "uncorrected":
        return (f"{name}: the difference from {base} would be significant if it were the only comparison ({interval}; "
                f"p = {row['p']:.3f}), but is not as one of {row['comparisons']} (p = {row['p_holm']:.3f}).{missing}")
    direction = "better" if row["difference"] < 0 else "worse"
    equivalent = format_equivalent(row, metric)
    effort = f"; equivalent to {equivalent} {metric.effort} of {base}" if equivalent else ""
    edges = "".join(f" The best learning rate of {other['arm']} was the lowest or highest tried."
                    for other in (row, reference) if other["at_grid_edge"] and other["n_rates"] > 1)
    return (f"{name}: {direction} than {base} by {metric.describe_difference(abs(row['difference']))} ({interval}){effort}."
            f"{missing}{edges}")


def short_verdict(row: dict) -> str:
    """What `verdict` says, in a few words."""
    if "difference" not in row:
        return "no comparable run finished"
    if math.isinf(row["difference_margin"]):
        return "one seed shows nothing"
    return {"none": "no significant difference", "uncorrected": "significant only by itself", "screened": "screened",
            "corrected": "better" if row["difference"] < 0 else "worse"}[row["significance"]]


def describe_best(results: list[ArmResults]) -> str:
    """One sentence about which arm has the lowest mean, and which others are not shown to be worse; empty where there are
    fewer than three arms, or runs of one seed."""
    finished = [arm_results for arm_results in results if len(arm_results.finished()) > 1]
    if len(finished) < 3:
        return ""
    best = min(finished, key=lambda arm_results: statistics.mean(run.outcome for run in arm_results.finished()))
    others = [arm_results for arm_results in finished if arm_results is not best]
    p_values = holm([p_value(paired_differences(other, best)) for other in others])
    alike = [other.arm.name for other, p in zip(others, p_values) if p >= SIGNIFICANCE]
    rest = f"not shown to be worse than it: {', '.join(alike)}" if alike else "all others are worse"
    return f"Lowest mean: {best.arm.name}; {rest} (paired by seed, p corrected for {len(others)} comparisons)."


def format_equivalent(row: dict, metric: Metric) -> str:
    """ "+19% (+4% to +41%)": the steps or games equivalent and its interval; "" where there is none."""
    name = f"{metric.effort}_equivalent"
    if name not in row:
        return ""
    interval = f" ({row[f'{name}_low']:+.0%} to {row[f'{name}_high']:+.0%})" if f"{name}_low" in row else ""
    return f"{row[name]:+.0%}{interval}"


# -- vocabularies -----------------------------------------------------------------------------------------------------

def share_vocabulary(results: list[ArmResults]) -> bool:
    return len({arm_results.arm.vocabulary for arm_results in results}) == 1


def by_vocabulary(results: list[ArmResults]) -> dict[str, list[ArmResults]]:
    """The finished arms that differ in nothing but vocab_size, and have three or more: their name without it, with the size
    of the models if there is one -> arms, from the smallest vocabulary on."""
    series = {}
    for arm_results in results:
        rest, n = re.subn(r"(^|,)\s*vocab_size=[\d_]+", "", arm_results.arm.name)
        if n and arm_results.finished():
            name = ", ".join(filter(None, (arm_results.arm.group, rest.strip(", ")))) or "vocab_size"
            series.setdefault(name, []).append(arm_results)
    return {name: sorted(arms, key=lambda arm_results: arm_results.arm.vocab_size) for name, arms in series.items()
            if len({arm_results.arm.vocab_size for arm_results in arms}) > 2}


def best_vocabulary(arms: list[ArmResults]) -> str:
    """A sentence about where the lowest bits per byte lie, see `seed_minima`, with the interval over seeds. arms: of
    by_vocabulary."""
    best, minima = seed_minima(arms, [arm_results.arm.vocab_size for arm_results in arms])
    if best in (0, len(arms) - 1):
        return f"lowest at the {'smallest' if best == 0 else 'largest'} vocabulary, {arms[best].arm.vocab_size:,}: the " \
               f"optimum may lie beyond."
    if len(minima) < 2:
        return f"lowest at {arms[best].arm.vocab_size:,}; too few runs, or too noisy ones, to say how sharp the optimum is."
    optimum = Estimate.from_values([x for x, _ in minima.values()])
    return (f"optimum at about {math.exp(optimum.mean):,.0f} tokens (95 % interval {math.exp(optimum.low):,.0f} to "
            f"{math.exp(optimum.high):,.0f}, {optimum.n} seeds).")


def seed_minima(arms: list[ArmResults], sizes: list[int]) -> tuple[int, dict[int, tuple[float, float]]]:
    """Which arm has the lowest mean; and for each seed, by its number from 0, (log(size), outcome) at the minimum of a
    parabola in log(size) through that arm and up to two on each side of it. None at all if that arm is the first or the
    last, or if a seed's parabola has no minimum there. sizes: of the arms, which have finished runs, rising."""
    means = [statistics.mean(run.outcome for run in arm_results.finished()) for arm_results in arms]
    best = means.index(min(means))
    near = slice(max(0, best - 2), best + 3)
    runs = enumerate(zip(*(arm_results.runs for arm_results in arms[near])))
    minima = {i: parabola_minimum([math.log(size) for size in sizes[near]], [run.outcome for run in own]) for i, own in runs
              if all(run.status == "finished" for run in own)} if 0 < best < len(arms) - 1 else {}
    return best, {} if any(math.isnan(x) for x, _ in minima.values()) else minima


# -- several sizes ----------------------------------------------------------------------------------------------------

def fit_scaling(by_size: list[list[ArmResults]]) -> dict[str, tuple[list[tuple[float, float]], float, float]]:
    """name -> (points, a, b): the (FLOPs of a run, bits per byte) at each size, and the power law bpb = a FLOPs^-b through
    them. Only arms that finished at two or more sizes whose FLOPs differ by at least half."""
    points = {}
    for arm_results in itertools.chain(*by_size):
        if arm_results.finished():
            arm, bpb = arm_results.arm, statistics.mean(run.outcome for run in arm_results.finished())
            flops = arm_results.mean_final("tokens") * (arm.flops_per_token + arm.elementwise_flops_per_token)
            points.setdefault(arm.name, []).append((flops, bpb))
    return {name: (sorted(found), *power_law(*zip(*found))) for name, found in points.items()
            if max(found)[0] > 1.5 * min(found)[0]}
