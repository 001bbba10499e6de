"""What a comparison has found: runs of arms, the statistics on them, the verdicts, and the page that says it."""
import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from experiments.runner import Run
from experiments.stats import Estimate, holm, p_value, power_law

SPEED_WARMUP = 5  # steps of a run that measures a speed which do not count


@dataclass(frozen=True, eq=False)
class Arm:
    """An architecture at a size, and what a token costs it."""
    name: str
    size: str
    values: dict          # the flags of train.py that make it
    seeds: tuple[int, ...]
    step_tokens: int
    batch: tuple[int, int]  # blocks, and tokens in each, of a batch: of training and of validation
    rate: float           # that the grid's multiples are of
    n_parameters: int
    flops: int            # of matrix products, for a training token
    elementwise_flops: int


@dataclass(frozen=True)
class Cell:
    """One run of train.py."""
    arm: Arm
    what: str             # "rate", "run" or "speed"
    multiple: float       # of the learning rate
    seed: int             # or the round in which a speed is measured
    share: float          # of the budget
    run: Run


@dataclass(frozen=True)
class Result:
    """How a cell ended: finished, diverged, failed or stopped, with the line that says why."""
    cell: Cell
    status: str
    reason: str
    rows: list[dict]

    @property
    def bpb(self) -> float:
        return self.rows[-1]["val_bpb"] if self.status == "finished" else math.inf

    def speed(self) -> float:
        """Tokens per second of a usual step, where a row is logged every step."""
        return statistics.median(row["tok_per_sec"] for row in self.rows if row["step"] > SPEED_WARMUP)


def told(result: Result) -> str:
    cell = result.cell
    if result.status != "finished":
        end = f"{result.status}: {result.reason}"
    elif cell.what == "speed":
        end = f"{result.speed():,.0f} tok/s"
    else:
        end = f"{result.bpb:.4f} bits/byte, {result.rows[-1]['seconds']:.0f} s"
    which = {"rate": f"rate x {cell.multiple:g} on {cell.share:.0%}", "speed": f"speed, round {cell.seed}",
             "run": f"rate x {cell.multiple:g}, seed {cell.seed}"}[cell.what]
    return f"{cell.arm.size} {cell.arm.name}, {which}: {end}".strip()


def best_of(results: list[Result]) -> Result | None:
    """None as long as one of them has yet to be tried again."""
    finished = [result for result in results if result.status == "finished"]
    if any(result.status not in ("finished", "diverged") for result in results):
        return None
    return min(finished, key=lambda result: result.bpb, default=None)


@dataclass(eq=False)
class ArmResults:
    """All runs of an arm."""
    arm: Arm
    rates: list[Result] = field(default_factory=list)   # on a part of the budget, at the rates of the grid
    runs: list[Result] = field(default_factory=list)    # at the best rate, a seed each
    speeds: list[Result] = field(default_factory=list)
    full_budget_lr_runs: list[Result] = field(default_factory=list)  # on the whole budget with the first seed, rates falling

    def best(self) -> Result | None:
        """At the best rate, on the whole budget if that was tried."""
        return best_of(self.full_budget_lr_runs or self.rates)

    def candidate(self) -> float | None:
        """The multiple to try next on the whole budget: the best on a part of it, and as long as it gets better, the next
        lower. Longer training wants a lower rate (Bjorck et al., arXiv:2409.19913), so what is best on a part may be too
        high. None when there is no more to try, or a run has yet to be tried again."""
        start, best = best_of(self.rates), best_of(self.full_budget_lr_runs)
        if start is None or not self.full_budget_lr_runs:
            return start and start.cell.multiple
        lowest = self.full_budget_lr_runs[-1]
        lower = [result.cell.multiple for result in self.rates if result.cell.multiple < lowest.cell.multiple]
        goes_on = lowest.status == "diverged" or best is lowest
        return max(lower, default=None) if goes_on and start.cell.share < 1 else None

    def finished(self) -> list[Result]:
        return [run for run in self.runs if run.status == "finished"]

    def last(self, name: str) -> float:
        """The mean of what the runs ended with."""
        return statistics.mean(run.rows[-1][name] for run in self.finished())

    def speed(self) -> float:
        """Tokens per second: measured apart, or of the runs themselves where seconds were the budget. NaN if not known."""
        if any(text.startswith("--max_seconds=") for text in self.finished()[0].cell.run.flags):
            return self.last("tokens") / self.last("seconds")
        measured = [run.speed() for run in self.speeds if run.status == "finished"]
        return statistics.median(measured) if measured else math.nan

    def rows(self) -> list[list[dict]]:
        """Of each run, with seconds at the speed that was measured."""
        speed = self.speed()
        return [[row | {"seconds": row["tokens"] / speed} for row in run.rows] for run in self.finished()]

    def slope(self) -> tuple[float, float]:
        """Bits per byte that a run of e times the tokens is better by, and how many times e there are between the grid's
        best run and the whole one of the same seed, each at the rate that is best for it and with its full cooldown: an
        intermediate loss would not do. NaN where the larger was not the better one."""
        best = best_of(self.rates)
        whole = next((run for run in self.finished() if run.cell.seed == best.cell.seed), None)
        if whole is None or whole.rows[-1]["tokens"] <= best.rows[-1]["tokens"] or whole.bpb >= best.bpb:
            return math.nan, math.nan
        between = math.log(whole.rows[-1]["tokens"] / best.rows[-1]["tokens"])
        return (best.bpb - whole.bpb) / between, between

    def edge(self) -> str:
        """Whether a rate beyond the grid might have been better."""
        multiples, best = [run.cell.multiple for run in self.rates], self.best()
        if best is None or best.cell.multiple not in (min(multiples), max(multiples)):
            return ""
        return "edge" if len(multiples) > 1 else "only one tried"

    def results(self) -> Iterator[Result]:
        return itertools.chain(self.rates, self.full_budget_lr_runs, self.runs, self.speeds)

    def problems(self) -> Iterator[str]:
        yield from dict.fromkeys(told(run) for run in self.results() if run.status != "finished")


def table_rows(outcomes: list[ArmResults]) -> list[dict]:
    """A row for each arm, the first of which the others of its size are compared with. Arms without a finished run lack what
    others have. `corrected` has yet to see all rows that are reported together."""
    first, rows = outcomes[0], []
    reference = {i: run.bpb for i, run in enumerate(first.runs) if run.status == "finished"}
    slope, between = first.slope() if first.finished() else (math.nan, math.nan)
    for outcome in outcomes:
        arm, finished = outcome.arm, outcome.finished()
        row = {"size": arm.size, "arm": arm.name, "runs": len(finished), "runs_wanted": len(arm.seeds),
               "parameters": arm.n_parameters, "flops_per_token": arm.flops,
               "elementwise_flops_per_token": arm.elementwise_flops, "n_hidden": arm.values.get("n_hidden"),
               "edge": outcome.edge()}
        rows.append(row)
        if not finished:
            continue
        bpb = Estimate.of([run.bpb for run in finished])
        row |= {"bpb": bpb.mean, "bpb_margin": bpb.margin, "loss": outcome.last("val_loss"),
                "learning_rate": arm.rate * outcome.best().cell.multiple, "tokens": outcome.last("tokens"),
                "seconds": outcome.last("tokens") / outcome.speed(), "tok_per_sec": outcome.speed(),
                "peak_memory": max(row.get("peak_memory", 0) for run in finished for row in run.rows)}
        if outcome is first:
            row["bpb_equal_seconds"] = bpb.mean
            continue
        pairs = [run.bpb - reference[i] for i, run in enumerate(outcome.runs) if run.status == "finished" and i in reference]
        if pairs:
            difference = Estimate.of(pairs)
            row |= {"difference": difference.mean, "difference_margin": difference.margin, "pairs": len(pairs),
                    "p": p_value(pairs)}
            for name, value in (("worth", difference.mean), ("worth_low", difference.high), ("worth_high", difference.low)):
                if abs(value) < math.inf and slope > 0:  # no further than was measured
                    row[name] = math.exp(min(max(-value / slope, -between), between)) - 1
        if first.finished():
            own_slope, own_between = outcome.slope()
            longer = math.log(row["seconds"] / rows[0]["seconds"])
            if abs(longer) <= own_between:
                row["bpb_equal_seconds"] = bpb.mean + own_slope * longer
    return rows


def corrected(rows: list[dict]) -> list[dict]:
    """The same rows, with p-values corrected for the number of comparisons, and whether these leave a difference."""
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, holm([row["p"] for row in compared])):
        excludes_0 = abs(row["difference"]) > row["difference_margin"]
        row |= {"p_holm": p, "comparisons": len(compared),
                "significant": "yes" if p < 0.05 and excludes_0 else "only by itself" if excludes_0 else "no"}
    return rows


def verdict(row: dict, first: dict) -> str:
    """One sentence on an arm, which says no more than its interval does."""
    name, base = row["arm"], first["arm"]
    missing = "".join(f" {other['arm']} finished only {other['runs']} of {other['runs_wanted']} runs, and what the others "
                      f"would have been is not known." for other in (row, first) if 0 < other["runs"] < other["runs_wanted"])
    if "difference" not in row:
        return f"{name}: no run that could be compared was finished."
    if math.isinf(row["difference_margin"]):
        return f"{name}: {row['difference']:+.4f} bits/byte against {base} with one seed, of which nothing follows.{missing}"
    interval = (f"95 % interval {row['difference'] - row['difference_margin']:+.4f} to "
                f"{row['difference'] + row['difference_margin']:+.4f}, {row['pairs']} seeds")
    if row["significant"] == "no":
        return f"{name}: no difference to {base} is shown ({interval}).{missing}"
    if row["significant"] == "only by itself":
        return (f"{name}: a difference to {base} would be shown if it were the only comparison ({interval}; "
                f"p = {row['p']:.3f}), but not as one of {row['comparisons']} (p = {row['p_holm']:.3f}).{missing}")
    how = "better" if row["difference"] < 0 else "worse"
    worth = f"; in steps of {base} that is {worth_of(row)}" if "worth" in row else ""
    edges = "".join(f" The best rate of {other['arm']} was the grid's first or last." for other in (row, first)
                    if other["edge"] == "edge")
    return f"{name}: {how} than {base} by {abs(row['difference']):.4f} bits/byte ({interval}){worth}.{missing}{edges}"


def worth_of(row: dict) -> str:
    """ "+19% (+4% to +41%)"."""
    return f"{row['worth']:+.0%} ({row['worth_low']:+.0%} to {row['worth_high']:+.0%})" if "worth_low" in row else \
        f"{row['worth']:+.0%}"


def scaling(by_size: list[list[ArmResults]]) -> dict:
    """name -> ((FLOPs of a run, bits per byte) at each size, a, b), for arms that finished at two sizes or more whose FLOPs
    differ by half at least."""
    points = {}
    for outcome in itertools.chain(*by_size):
        if outcome.finished():
            points.setdefault(outcome.arm.name, []).append(
                (outcome.last("tokens") * (outcome.arm.flops + outcome.arm.elementwise_flops),
                 statistics.mean(run.bpb for run in outcome.finished())))
    return {name: (sorted(found), *power_law(*zip(*found))) for name, found in points.items()
            if max(found)[0] > 1.5 * min(found)[0]}
