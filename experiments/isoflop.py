"""IsoFLOP grids: the best size of each arm for each budget of FLOPs, and what an arm is worth in FLOPs of the first one.

For each arm and budget, a parabola in log(parameters) through the sizes around the best one gives the lowest loss and where
it lies (Hoffmann et al. 2022, arXiv:2203.15556, approach 2), for each seed. A power law through the lowest losses of an arm
says how many FLOPs a loss takes; the ratio of the first arm's to an arm's own, for a loss that both reach within the
budgets, is the arm's multiplier of compute.
"""
import itertools
import math
import statistics
from dataclasses import dataclass

from experiments.analysis import SIGNIFICANCE, ArmResults, seed_minima
from experiments.report import Figure, Table
from experiments.scaling_plots import draw_isoflop
from experiments.stats import Estimate, holm, p_value, power_law

NOTE = """\
IsoFLOP: the lowest bits per byte of each arm for a budget, and the parameters that have it: the minimum of a parabola in
log(parameters), embedding included, through the best size and up to two on each side of it, for each seed. Multiplier of
compute: how many times an arm's FLOPs the first arm needs for the same loss, above 1 if the arm is better; from the power
laws through the lowest losses of either, for each seed, at the middle, in log(loss), of what both reach within the budgets,
so that nothing is extrapolated. Intervals cover seeds (Student's t, of logarithms); p is corrected for all multipliers on
this page (Holm)."""


@dataclass(frozen=True)
class Optimum:
    """The lowest loss of an arm for a budget. arms: its sizes, rising. best, minima: of analysis.seed_minima."""
    flops: float
    arms: list[ArmResults]
    best: int
    minima: dict[int, tuple[float, float]]

    @property
    def problem(self) -> str:
        """Why there is none; "" where there is one."""
        if self.minima:
            return ""
        if self.best not in (0, len(self.arms) - 1):
            return "too few runs, or too noisy ones, for a parabola"
        which = "smallest" if self.best == 0 else "largest"
        return f"lowest at the {which} size, {self.arms[self.best].arm.n_parameters:,} parameters: it may lie beyond"


def find_optima(results: list[ArmResults]) -> dict[str, list[Optimum]]:
    """name -> the optimum of each budget, rising, of arms that finished at three or more sizes. {} where a comparison has
    one budget."""
    found, order = {}, sorted((own for own in results if own.arm.budget and own.finished()),
                              key=lambda own: (own.arm.budget[1], own.arm.n_parameters))
    for arm_results in results:  # in the order of the arms
        found.setdefault(arm_results.arm.name, [])
    for flops, group in itertools.groupby(order, key=lambda own: own.arm.budget[1]):
        by_name = {}
        for arm_results in group:
            by_name.setdefault(arm_results.arm.name, []).append(arm_results)
        for name, arms in by_name.items():
            sizes = [arm_results.arm.n_parameters for arm_results in arms]
            if len(set(sizes)) > 2:
                found[name].append(Optimum(flops, arms, *seed_minima(arms, sizes)))
    return {name: optima for name, optima in found.items() if optima}


# -- multipliers ------------------------------------------------------------------------------------------------------

def fit_lines(optima: list[Optimum]) -> dict[int, tuple[float, float]]:
    """Seed, by its number from 0 -> (a, b) of its lowest loss = a FLOPs^-b, from budgets with an optimum; {} if these are
    fewer than two, or where the loss does not fall."""
    known = [optimum for optimum in optima if optimum.minima]
    if len(known) < 2:
        return {}
    seeds = set.intersection(*(set(optimum.minima) for optimum in known))
    lines = {i: power_law([optimum.flops for optimum in known], [optimum.minima[i][1] for optimum in known])
             for i in sorted(seeds)}
    return lines if all(b > 0 for _, b in lines.values()) else {}


def loss_range(optima: list[Optimum]) -> tuple[float, float]:
    """The lowest and the highest of the lowest losses that the mean line has within the budgets."""
    lines, known = fit_lines(optima), [optimum.flops for optimum in optima if optimum.minima]
    at = lambda flops: math.exp(statistics.mean(math.log(a) - b * math.log(flops) for a, b in lines.values()))
    return at(known[-1]), at(known[0])


def multiplier_row(name: str, optima: list[Optimum], reference: list[Optimum]) -> dict:
    """The multiplier of an arm: its columns of multipliers.csv, or `problem`, why there is none."""
    lines, first, row = fit_lines(optima), fit_lines(reference), {"arm": name}
    if not lines or not first or not (pairs := [i for i in lines if i in first]):
        return row | {"problem": "it needs optima for two budgets, of which the larger has the lower loss, and the first "
                                 "arm too"}
    (low, high), (first_low, first_high) = loss_range(optima), loss_range(reference)
    low, high = max(low, first_low), min(high, first_high)
    if low >= high:
        return row | {"problem": "there is no loss that both it and the first arm reach within the budgets"}
    loss = math.sqrt(low * high)
    flops = lambda line: math.log(line[0] / loss) / line[1]
    logs = [flops(first[i]) - flops(lines[i]) for i in pairs]
    found = Estimate.from_values(logs)
    of_first = math.exp(statistics.mean(map(flops, first.values())))
    return row | {"multiplier": math.exp(found.mean), "loss": loss, "flops": of_first, "pairs": found.n,
                  "p": p_value(logs)} | (
        {"multiplier_low": math.exp(found.low), "multiplier_high": math.exp(found.high)} if found.n > 1 else {})


def multiplier_rows(optima: dict[str, list[Optimum]], first: str) -> list[dict]:
    """A row for each arm but the `first`, with corrected p-values."""
    rows = [multiplier_row(name, own, optima.get(first, [])) for name, own in optima.items() if name != first]
    known = [row for row in rows if "p" in row]
    for row, p in zip(known, holm([row["p"] for row in known])):
        row["p_holm"] = p
    return rows


# -- the report -------------------------------------------------------------------------------------------------------

def optimum_rows(optima: dict[str, list[Optimum]]) -> list[dict]:
    """A row for each arm and budget: the columns of isoflop.csv."""
    rows = []
    for name, own in optima.items():
        for optimum in own:
            row = {"arm": name, "flops": optimum.flops, "sizes": len(optimum.arms), "seeds": len(optimum.minima)}
            if optimum.minima:
                sizes, bpb = (Estimate.from_values(list(values)) for values in zip(*optimum.minima.values()))
                row |= {"parameters": math.exp(sizes.mean), "bpb": bpb.mean, "bpb_margin": bpb.margin}
                if sizes.n > 1:
                    row |= {"parameters_low": math.exp(sizes.low), "parameters_high": math.exp(sizes.high)}
            rows.append(row | {"problem": optimum.problem})
    return rows


def describe_multiplier(row: dict, first: str) -> str:
    """A sentence that claims no more than the interval supports."""
    if "multiplier" not in row:
        return f"{row['arm']}: no multiplier of compute: {row['problem']}."
    text = f"{row['arm']}: multiplier of compute {row['multiplier']:.3f}"
    if "multiplier_low" not in row:
        return f"{text} at {row['loss']:.4f} bits/byte, with one seed, which shows nothing."
    is_shown = row["p_holm"] < SIGNIFICANCE
    return (f"{text} (95 % interval {row['multiplier_low']:.3f} to {row['multiplier_high']:.3f}, {row['pairs']} seeds, p = "
            f"{row['p_holm']:.3f}) at {row['loss']:.4f} bits/byte, which take {first} {row['flops']:.3g} FLOPs: "
            + ("not shown to differ from 1." if not is_shown else "better." if row["multiplier"] > 1 else "worse."))


def isoflop_section(optima: dict[str, list[Optimum]], first: str) -> tuple[list, dict[str, list[dict]], list[str]]:
    """The parts of the page about an IsoFLOP grid, its tables for CSV, and the sentences. optima: of find_optima, not empty.
    first: the name of the reference."""
    rows, multipliers = optimum_rows(optima), multiplier_rows(optima, first)
    sentences = [describe_multiplier(row, first) for row in multipliers]
    interval = lambda row: f" ({row['parameters_low'] / 1e6:.4g} to {row['parameters_high'] / 1e6:.4g})" \
        if "parameters_low" in row else ""
    table = Table(("arm", "FLOPs", "lowest bits/byte (lower is better)", "M parameters that have it"), [
        (row["arm"], f"{row['flops']:.3g}", f"{row['bpb']:.4f}" + (
            f" ± {row['bpb_margin']:.4f}" if math.isfinite(row["bpb_margin"]) else ""),
         f"{row['parameters'] / 1e6:.4g}{interval(row)}") if "bpb" in row else
        (row["arm"], f"{row['flops']:.3g}", "", row["problem"]) for row in rows])
    curve = lambda optimum: [(own.arm.n_parameters, statistics.mean(run.outcome for run in own.finished()))
                             for own in optimum.arms]
    points = {name: [(curve(optimum), optimum.flops) for optimum in own] for name, own in optima.items()}
    lowest = {name: [(row["flops"], row["bpb"], row["parameters"]) for row in rows if row["arm"] == name and "bpb" in row]
              for name in optima}
    parts = [("h2", "IsoFLOP: the best size for each budget"), ("ul", sentences), table,
             Figure(draw_isoflop(points, lowest), "isoflop"), ("p", NOTE)]
    return parts, {"isoflop": rows, "multipliers": multipliers}, sentences
