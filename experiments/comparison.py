"""The report of a comparison: comparison.md, comparison.csv, comparison.html and its pictures.

compare.py calls `write_comparison` when its cells are done; the numbers are analysis.py's.
"""
import itertools
import math
from collections.abc import Callable
from pathlib import Path

from experiments.analysis import (
    ArmResults,
    add_significance,
    fit_scaling,
    format_steps_equivalent,
    table_rows,
    verdict,
)
from experiments.plots import draw_mean_curves, draw_pareto_fronts, draw_scaling
from experiments.report import Figure, Table, csv_table, markdown_page, write_page
from runtime.files import atomic_write

HEAD = ("arm", "bits/byte (lower is better)", "difference from the first arm (negative is better)", "p (Holm)",
        "significant", "steps equivalent, relative to the first arm (positive is better)",
        "bits/byte at equal seconds (lower is better)", "learning rate", "parameters", "MFLOP/token, matrix products",
        "MFLOP/token, element-wise", "tokens/s (higher is better)", "seconds (lower is better)",
        "peak memory, MiB (lower is better)", "runs finished")
SIGNIFICANCE_WORDS = {"corrected": "yes", "uncorrected": "only by itself", "none": "no"}  # in the column "significant"
NOTES = """\
Values are means over seeds ± the half-width of the 95 % interval (Student's t); the interval covers seeds, not the choice of
text. Differences are paired by seed; p and "significant" are corrected for all comparisons on this page (Holm). Steps
equivalent: how many more (+) or fewer (-) steps the first arm would need to match the arm, with the interval that follows
from the difference's. Bits/byte at equal seconds: what the arm would have reached in the time that the first arm took. Both
are interpolated between an arm's best run on a part of the budget and its run of the same seed on the whole, each with a
full cooldown, and never extrapolated beyond them. Learning rate: the search starts from the best of the grid on a part of
the budget; lower rates are tried on the full budget with the first seed while they improve. The run at the best one is among
those compared, so it is slightly favoured, in every arm alike. (edge): the best was the lowest or highest of the grid. FLOPs
are per training token, forward and backward: matrix products, and separately activations and the bases of KAN layers. Peak
memory is the process's, on a GPU that of its tensors. Tokens/s are the median of a few steps, timed after all runs, one at a
time with the arms taking turns, and seconds are those of a run at that speed; where the budget is in seconds, both are the
runs' own."""
NULL_NOTE = """\
In a null test the two sides share neither initial weights nor the order of data, so a pair differs by more than two arms of
a comparison do, which share the order."""


def write_comparison(results: list[ArmResults], describe_conditions: Callable[[list[ArmResults]], str], command_line: str,
                     out_path: Path, is_null: bool):
    """Writes the report into `out_path`, and prints it. describe_conditions(arms of a size): the conditions that they were
    compared under. is_null: the second arm is the first again."""
    by_size = [list(group) for _, group in itertools.groupby(results, key=lambda result: result.arm.size)]
    rows_by_size = [table_rows(group) for group in by_size]
    rows = add_significance(list(itertools.chain(*rows_by_size)))
    title = "A null test: an arm against itself" if is_null else "Comparison"
    parts = [("code", command_line)]
    for group, size_rows in zip(by_size, rows_by_size):
        parts += size_section(group, size_rows, describe_conditions(group))
    if len(by_size) > 1:
        parts += scaling_section(by_size)
    parts += [("p", note) for note in ([NOTES, NULL_NOTE] if is_null else [NOTES])]
    for old in out_path.glob("*.svg"):
        old.unlink()
    text = markdown_page(title, parts)
    pictures = {f"{part.name}.svg": part.svg for part in parts if isinstance(part, Figure)}
    for name, content in {"comparison.md": text, "comparison.csv": csv_table(rows), **pictures}.items():
        with atomic_write(out_path / name, "w") as file:
            file.write(content)
    write_page(out_path / "comparison.html", title, parts)
    print(text)
    print(out_path / "comparison.html")


def size_section(results: list[ArmResults], rows: list[dict], conditions: str) -> list:
    """The parts of the page about the arms of one size."""
    parts = [("h2", results[0].arm.size or "Results"), ("p", f"{conditions}."),
             ("ul", [verdict(row, rows[0]) for row in rows[1:]]), Table(HEAD, [format_row(row) for row in rows])]
    if curves := {arm_results.arm.name: arm_results.curves() for arm_results in results if arm_results.finished()}:
        suffix = "".join(c if c.isalnum() else "_" for c in f" {results[0].arm.size}".rstrip())
        parts += [Figure(draw_mean_curves(curves), f"curves{suffix}"),
                  Figure(draw_pareto_fronts({row["arm"]: row for row in rows if "bpb" in row}), f"front{suffix}")]
    if problems := [problem for arm_results in results for problem in arm_results.problems()]:
        parts += [("h3", "Runs left out"), ("ul", problems)]
    return parts


def scaling_section(by_size: list[list[ArmResults]]) -> list:
    fits = fit_scaling(by_size)
    sentences = [f"{name}: bits/byte = {a:.3g} x FLOPs^-{b:.4f}" + (", a line through two sizes" * (len(points) == 2))
                 for name, (points, a, b) in fits.items()]
    if not fits:
        sentences = ["No arm has runs at two sizes whose FLOPs differ enough to show how loss falls with them."]
    pictures = [Figure(draw_scaling(fits), "scaling")] if fits else []
    return [("h2", "Loss against FLOPs"), ("ul", sentences), *pictures]


def format_row(row: dict) -> tuple[str, ...]:
    """A row of the table, as HEAD names its columns."""
    def number(name: str, form: str, scale: float = 1.0) -> str:
        value = row.get(name)
        return "" if value is None or math.isnan(value) else format(value * scale, form)

    def with_margin(name: str, form: str) -> str:
        margin = row.get(f"{name}_margin", math.inf)
        return number(name, form) + (f" ± {margin:.4f}" if margin < math.inf else "")
    return (row["arm"], with_margin("bpb", ".4f"), with_margin("difference", "+.4f"), number("p_holm", ".3f"),
            SIGNIFICANCE_WORDS.get(row.get("significance"), ""),
            format_steps_equivalent(row) if "steps_equivalent" in row else "", number("bpb_equal_seconds", ".4f"),
            number("learning_rate", ".3g") + format_grid_edge(row), f"{row['parameters']:,}",
            number("flops_per_token", ".2f", 1e-6), number("elementwise_flops_per_token", ".2f", 1e-6),
            number("tok_per_sec", ",.0f"), number("seconds", ",.0f"), number("peak_memory", ",.0f", 2**-20),
            f"{row['runs']} of {row['runs_wanted']}")


def format_grid_edge(row: dict) -> str:
    """" (edge)" where the best learning rate was the grid's lowest or highest."""
    if not row["at_grid_edge"]:
        return ""
    return " (edge)" if row["n_rates"] > 1 else " (only one tried)"
