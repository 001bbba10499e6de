"""The report of needles in haystacks: scores, and tables and pictures of length against depth.

`evaluate.py --task=needle` calls `needle_scores` for each model and `write_needle_report` with the rows of all, see
evaluate.score_needles.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from experiments.plots import import_pyplot, make_panels, to_svgs
from experiments.report import Table, markdown, write_results
from experiments.scores import Score, count, mean_score
from experiments.stats import Estimate, proportion_interval

CHOICE, EXACT, GAIN = "choice accuracy", "exact match", "gain of the right answer, nats"
KEYS = {CHOICE: "correct", EXACT: "exact", GAIN: "gain"}  # of a row


@dataclass(frozen=True)
class NeedleGrid:
    """The rows of one model by length and depth, None for the questions whose text lacks the fact."""
    rows: list[dict]

    @property
    def lengths(self) -> list[int]:
        return sorted({row["length"] for row in self.rows})

    @property
    def depths(self) -> list[float | None]:
        return sorted({row["depth"] for row in self.rows}, key=lambda depth: -1.0 if depth is None else depth)

    @property
    def depth_names(self) -> list[str]:
        return ["absent" if depth is None else f"{depth:.0%}" for depth in self.depths]

    def values(self, measure: str, length: int, depth: float | None) -> list[float]:
        """Of each question; empty for what is not measured there."""
        return [row[KEYS[measure]] for row in self.rows
                if (row["length"], row["depth"]) == (length, depth) and row[KEYS[measure]] is not None]


def chance_of(rows: list[dict]) -> float:
    return 1 / len(rows[0]["choices"])


def needle_scores(rows: list[dict]) -> dict[str, Score]:
    """Over all lengths and depths. Questions about the same fact are not independent of each other, so that standard errors
    are those of a mean over facts."""
    facts = sorted({row["fact"] for row in rows})
    present, absent = ([[row for row in rows if row["fact"] == fact and (row["depth"] is None) == is_absent]
                        for fact in facts] for is_absent in (False, True))
    mean_of = lambda measure, by_fact, better="higher", form=".1%": mean_score(
        [fmean(row[KEYS[measure]] for row in own) for own in by_fact], better, form)
    return {CHOICE: mean_of(CHOICE, present), f"{CHOICE}, fact absent": mean_of(CHOICE, absent, ""),
            "chance": Score(chance_of(rows), format=".1%"),
            EXACT: mean_of(EXACT, present), f"{EXACT}, fact absent": mean_of(EXACT, absent, ""),
            GAIN: mean_of(GAIN, present, form="+.3f"), "questions of each length and depth": count(len(facts))}


def needle_tables(rows: list[dict]) -> dict[str, Table]:
    """measure -> its values with 95 % intervals, a row for each length and a column for each depth."""
    grid = NeedleGrid(rows)
    return {measure: Table(("tokens", *grid.depth_names), [
        (f"{length:,}", *(show_cell(measure, grid.values(measure, length, depth)) for depth in grid.depths))
        for length in grid.lengths]) for measure in KEYS}


def show_cell(measure: str, values: list[float]) -> str:
    if not values:
        return ""
    if measure == GAIN:
        estimate = Estimate.from_values(values)
        return f"{estimate.mean:+.2f} ± {estimate.margin:.2f}"
    low, high = proportion_interval(sum(values), len(values))
    return f"{fmean(values):.0%} ({low:.0%} to {high:.0%})"


def draw_needles(rows: list[dict], whose: str = "") -> list[str]:
    """A heat map of each measure, coloured from chance, or from 0, to all correct, or to the largest gain. rows: of one
    model; whose: what titles end with. Returns panels."""
    chance = chance_of(rows)
    grid, axes = NeedleGrid(rows), make_panels(len(KEYS))
    for axis, measure in zip(axes, KEYS):
        means = [[fmean(values) if (values := grid.values(measure, length, depth)) else math.nan
                  for depth in grid.depths] for length in grid.lengths]
        low, high = {CHOICE: (chance, 1.0), EXACT: (0.0, 1.0)}.get(
            measure, (0.0, max(1e-9, *(mean for row in means for mean in row if mean == mean))))
        draw_heat_map(axis, means, low, high, "{:+.2f}" if measure == GAIN else "{:.0%}")
        axis.set_xticks(range(len(grid.depths)), grid.depth_names)
        axis.set_yticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths])
        note = f", chance {chance:.0%}" if measure == CHOICE else ""
        axis.set(xlabel="text before the fact", ylabel="tokens", title=f"{measure.capitalize()}{note}{whose}")
    return to_svgs(axes)


def draw_heat_map(axis, means: list[list[float]], low: float, high: float, form: str):
    """A box for each number with the number in it; none for nan."""
    import numpy as np
    shades = np.ma.masked_invalid((np.array(means) - low) / (high - low))
    n_rows, n_columns = shades.shape
    axis.grid(False)
    axis.pcolormesh(np.arange(n_columns + 1) - 0.5, np.arange(n_rows + 1) - 0.5, shades, vmin=0, vmax=1, edgecolors="white",
                    cmap=import_pyplot().get_cmap("Blues").with_extremes(bad="#dddddd"))
    axis.invert_yaxis()  # short ones on top
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for y, row in enumerate(means):
        for x, mean in enumerate(row):
            if not math.isnan(mean):
                axis.text(x, y, form.format(mean), ha="center", va="center", fontsize=9,
                          color="white" if shades[y, x] > 0.6 else "black")


def write_needle_report(rows: list[dict], path: Path, about: str) -> str:
    """Writes the rows of all models to `path`, and a page and a picture beside it. about: the text, and the machine. Returns
    the tables as text."""
    by_model, sections, lines = {}, {}, []
    for row in rows:
        by_model.setdefault(row["checkpoint"], []).append(row)
    for name, own in by_model.items():
        tables = needle_tables(own)
        lines += [f"{name}: {measure}\n\n{markdown(table)}\n" for measure, table in tables.items()]
        sections[name] = (draw_needles(own, f": {name}" if len(by_model) > 1 else ""),
                          [part for measure, table in tables.items() for part in (("h3", measure), table)])
    write_results(path, rows, "A needle in a haystack", (
        f"A fact is put into {about}, and asked for at the end of the text. Rows: tokens of text; columns: the part of it "
        f"that precedes the fact, and absent, the same questions without it. Chance is {chance_of(rows):.1%}. With 95 % "
        f"intervals."), sections, "needles")
    return "\n".join(lines)
