"""The report of a comparison: comparison.md, comparison.csv, comparison.html and its pictures.

compare.py calls `write_comparison` when its cells are done; the numbers are analysis.py's.
"""
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.analysis import (
    BPB,
    ArmResults,
    Metric,
    add_significance,
    best_vocabulary,
    by_vocabulary,
    describe_best,
    fit_scaling,
    format_equivalent,
    screen_rows,
    share_vocabulary,
    short_verdict,
    table_rows,
    thought_rows,
    verdict,
)
from experiments.budget_plots import draw_budgets
from experiments.context import (
    Contexts,
    by_length,
    context_rows,
    context_section,
    position_rows,
    short_contexts,
)
from experiments.epochs import epochs_section
from experiments.isoflop import find_optima, isoflop_section
from experiments.plots import draw_by_vocabulary, draw_mean_curves, draw_pareto_fronts, draw_scaling, validation_note
from experiments.report import Figure, Table, align_columns, split_columns, write_report
from experiments.stats import Estimate
from runtime.cli import say

# In the column "significant"
SIGNIFICANCE_WORDS = {"corrected": "yes", "uncorrected": "only by itself", "none": "no", "screened": "not tested"}
NOTES = """\
Values are means over seeds ± the half-width of the 95 % interval (Student's t); the interval covers {covered}. Differences
are paired by seed; p and "significant" are corrected for all comparisons on this page (Holm). {Unit} at equal seconds: what
the arm would have reached in the time that the fastest arm took, interpolated between its best run on a part of the budget
and its run of the same seed on the whole, each with a full cooldown; none where that time is less than the first of them
took. {Effort} equivalent: how many more (+) or fewer (-) {effort} the first arm would need to match the arm, from how much
it gains between two such runs, with the interval that follows from the difference's; more {effort} assume that it goes on
gaining as much, and neither goes beyond the ratio of the two. Learning rate: the search starts from the best of the grid on
a part of the budget; lower rates are tried on the full budget with the first seed while they improve. The run at the best
one is among those compared, so it is slightly favoured, in every arm alike. (edge): the best was the lowest or highest of
the grid. FLOPs are per training token, forward and backward: matrix products, and separately activations and the bases of
KAN layers. Peak memory is the process's, on a GPU that of its tensors. {speeds}, timed after all runs, one at a time with
the arms taking turns, and seconds are those of a run at that speed; where the budget is in seconds, both are the runs' own.
A column that would be the same for all arms is left out of the table, and its value stands below it."""
# What it says of runs that are as long as their steps or their games
WORDS = {"steps": {"covered": "seeds, not the choice of text", "speeds": "Tokens/s are the median of a few steps"},
         "games": {"covered": "seeds", "speeds": "Games/s are the median of a few rollouts, each with the steps after it"},
         "problems": {"covered": "seeds, not the choice of problems", "speeds": "Tokens/s are the median of a few steps"}}
VOCABULARY_NOTE = """\
Arms of different vocabularies have steps and contexts of the same number of tokens, which hold different numbers of bytes of
text, see "bytes per context"; losses in nats per token and tokens/s of theirs cannot be compared, bits per byte and bytes/s
can. Bytes per token are those of the training text, with the separators between documents. Their pairs of a seed share the
text, but neither batches nor the embedding's initial weights, so that they differ by more than two arms of one vocabulary
do."""
PLAY_NOTE = """\
Each arm learns from games of its own. FLOPs are those of training steps, without those of play, which seconds and games/s
include."""
THOUGHT_NOTE = """\
The same held-out problems, answered greedily, with each amount of thought that an arm is trained for. Tokens and FLOPs
(matrix products) are of a problem on average, the reading of it included in the FLOPs. Intervals cover seeds, and are not
corrected for the number of comparisons."""
SCREEN_NOTE = """\
Of these seeds alone: they have chosen the arms that were confirmed with new ones, and are not among the runs above."""
PAIRED_NOTE = "A pair of a seed shares the seed of the generators, not the games."
NULL_NOTE = """\
In a null test the two sides share neither initial weights nor the order of data, so a pair differs by more than two arms of
a comparison do, which share the order."""


def write_comparison(results: list[ArmResults], describe_conditions: Callable[[list[ArmResults]], str], command_line: str,
                     out_path: Path, is_null: bool, screened: list[ArmResults] = (), contexts: Contexts | None = None):
    """Writes the report into `out_path`, and prints short tables of it. describe_conditions(arms of a size): the conditions
    that they were compared under. is_null: the second arm is the first again. screened: the runs of all arms that have
    chosen those of `results`. contexts: where lengths of context are compared, what decoding costs at each."""
    by_size = group_by_size(results)
    rows_by_size = [table_rows(group) for group in by_size]
    rows, thoughts = add_significance(list(itertools.chain(*rows_by_size))), [thought_rows(group) for group in by_size]
    metric, title = results[0].arm.metric, "A null test: an arm against itself" if is_null else "Comparison"
    parts = [("code", command_line)]
    for group, size_rows, size_thoughts in zip(by_size, rows_by_size, thoughts):
        parts += size_section(group, size_rows, describe_conditions(group)) + thought_section(size_thoughts)
    screens = [(group, screen_rows(group)) for group in group_by_size(screened)]
    for group, size_rows in screens:
        parts += screen_section(group, size_rows)
    lengths, positions = [], []
    if contexts:
        lengths = context_rows(rows_by_size, by_size, contexts)
        positions = list(itertools.chain(*map(position_rows, by_size)))
        parts += context_section(lengths, positions, contexts)
    parts += vocabulary_section(by_vocabulary(results))
    optima, axis_tables, sentences = find_optima(results), {}, []
    if optima:
        section, axis_tables, sentences = isoflop_section(optima, results[0].arm.name)
        parts[1:1] = section
    elif any(own.arm.epochs for own in results):
        section, axis_tables, sentences = epochs_section(results)
        parts[1:1] = section
    else:
        for length, same_length in by_length(by_size).items() if contexts else [("", by_size)]:
            if len(same_length) > 1 and metric == BPB:  # others reach 0, which no power law does
                parts += scaling_section(same_length, length)
    parts += [("p", note) for note in make_notes(metric, is_null, share_vocabulary(results))]
    if screens:
        rows = [row | {"stage": stage} for stage, found in (
            ("confirm", rows), ("screen", list(itertools.chain(*(found for _, found in screens))))) for row in found]
    tables = {"comparison": rows, "thoughts": list(itertools.chain(*thoughts)), "context": lengths, "positions": positions,
              "isoflop": [], "multipliers": [], "epochs": []}
    write_report(out_path, title, parts, tables | axis_tables)
    for group, size_rows in screens:
        print("\n".join(short_table(group, size_rows)))
    for group, size_rows, size_thoughts in zip(by_size, rows_by_size, thoughts):
        print("\n".join(short_table(group, size_rows) + short_thoughts(size_thoughts)))
    if lengths:
        print("\n".join(short_contexts(lengths)))
    for name, arms in by_vocabulary(results).items():
        say(f"{name}: {best_vocabulary(arms)}")
    for sentence in sentences:
        say(sentence)
    print(out_path / "comparison.html")


def group_by_size(results: list[ArmResults]) -> list[list[ArmResults]]:
    return [list(group) for _, group in itertools.groupby(results, key=lambda result: result.arm.group)]


def screen_section(results: list[ArmResults], rows: list[dict]) -> list:
    """The parts of the page about the arms of one size before those were chosen that are confirmed."""
    table, _ = table_of_columns(rows, results[0].arm.metric)
    parts = [("h3", f"Screen{': ' + results[0].arm.size if results[0].arm.size else ''}"), ("p", SCREEN_NOTE), table]
    if problems := [problem for arm_results in results for problem in arm_results.problems()]:
        parts.append(("ul", problems))
    return parts


def make_notes(metric: Metric, is_null: bool, is_one_vocabulary: bool) -> list[str]:
    """How to read the page."""
    notes = [NOTES.format(Unit=metric.unit[0].upper() + metric.unit[1:], effort=metric.effort,
                          Effort=metric.effort.capitalize(), **WORDS[metric.effort])]
    if metric.is_of_games:
        return [*notes, f"{metric.note} {PLAY_NOTE}" + f" {PAIRED_NOTE}" * (not is_null)]
    notes += [metric.note] * bool(metric.note)
    return notes + [NULL_NOTE] * is_null + [VOCABULARY_NOTE] * (not is_one_vocabulary)


def size_section(results: list[ArmResults], rows: list[dict], conditions: str) -> list:
    """The parts of the page about the arms of one size."""
    best, metric = describe_best(results), results[0].arm.metric
    table, same = table_of_columns(rows, metric)
    parts = [("h2", results[0].arm.group or "Results"), ("p", f"{conditions}."),
             ("ul", [verdict(row, rows[0], metric) for row in rows[1:]] + [best] * bool(best)), table]
    if same:
        parts.append(("p", f"The same for all arms: {'; '.join(same)}."))
    if note := validation_note({result.arm.name: result.finished()[-1].rows for result in results if result.finished()}):
        parts.append(("p", note))
    if curves := {arm_results.arm.name: arm_results.curves() for arm_results in results if arm_results.finished()}:
        size = results[0].arm.group
        by_bytes = not share_vocabulary(results) and not math.isnan(results[0].arm.bytes_per_token)
        fronts = draw_pareto_fronts({row["arm"]: row for row in rows if metric.name in row}, metric)
        parts += [Figure(draw_mean_curves(curves, by_bytes, metric), figure_name("curves", size)),
                  Figure(fronts, figure_name("front", size))]
    if problems := [problem for arm_results in results for problem in arm_results.problems()]:
        parts += [("h3", "Runs left out"), ("ul", problems)]
    return parts


def vocabulary_section(series: dict[str, list[ArmResults]]) -> list:
    """series: of by_vocabulary."""
    if not series:
        return []
    points = {name: [(arm_results.arm.vocab_size, estimate.mean, estimate.margin) for arm_results in arms
                     for estimate in [Estimate.from_values([run.outcome for run in arm_results.finished()])]]
              for name, arms in series.items()}
    return [("h2", "Bits per byte against the size of the vocabulary"),
            ("ul", [f"{name}: {best_vocabulary(arms)}" for name, arms in series.items()]),
            Figure(draw_by_vocabulary(points), "vocabulary")]


def scaling_section(by_size: list[list[ArmResults]], length: int | str = "") -> list:
    """length: of the context, where several are compared."""
    fits = fit_scaling(by_size)
    sentences = [f"{name}: bits/byte = {a:.3g} x FLOPs^-{b:.4f}" + (", a line through two sizes" * (len(points) == 2))
                 for name, (points, a, b) in fits.items()]
    if not fits:
        sentences = ["No arm has runs at two sizes whose FLOPs differ enough to show how loss falls with them."]
    pictures = [Figure(draw_scaling(fits), figure_name("scaling", str(length)))] if fits else []
    where = f", contexts of {length:,} tokens" if length else ""
    return [("h2", f"Loss against FLOPs{where}"), ("ul", sentences), *pictures]


def thought_section(rows: list[dict]) -> list:
    """What accuracy costs at inference. rows: of thought_rows."""
    if not rows:
        return []
    table = Table(("arm", "thinking", "right answers (higher is better)",
                   "difference from the first arm (positive is better)", "tokens generated", "MFLOP"), [
        (row["arm"], row["thought"], with_margin(row, "accuracy", ".1%"), with_margin(row, "difference", "+.1%"),
         f"{row['tokens']:,.1f}", f"{row['flops'] / 1e6:,.2f}") for row in rows])
    curves = draw_budgets([row | {"way": row["arm"]} for row in rows])
    return [("h3", "What accuracy costs at inference"), ("p", THOUGHT_NOTE), table,
            Figure(curves, figure_name("thoughts", rows[0]["size"]))]


def figure_name(name: str, size: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in f"{name} {size}".rstrip())


# -- the table --------------------------------------------------------------------------------------------------------

def number(row: dict, name: str, form: str, scale: float = 1) -> str:
    value = row.get(name)
    return "" if value is None or math.isnan(value) else format(value * scale, form)


def with_margin(row: dict, name: str, form: str) -> str:
    margin = row.get(f"{name}_margin", math.inf)
    return number(row, name, form) + (f" ± {margin:{form.removeprefix('+')}}" if margin < math.inf else "")


def format_grid_edge(row: dict) -> str:
    """" (edge)" where the best learning rate was the grid's lowest or highest."""
    if not row["at_grid_edge"]:
        return ""
    return " (edge)" if row["n_rates"] > 1 else " (only one tried)"


@dataclass(frozen=True)
class Column:
    """head: its name, unit and which direction is better. cell(row): its text. always: also in a table where it is the same
    for all arms. of_vocabulary: only where vocabularies differ."""
    head: str
    cell: Callable[[dict], str]
    always: bool = False
    of_vocabulary: bool = False


def make_columns(metric: Metric) -> tuple[Column, ...]:
    """All that a table may have; those that are empty for every arm are not shown."""
    return (
        Column("arm", lambda row: row["arm"], always=True),
        Column(f"{metric.unit} (lower is better)", lambda row: with_margin(row, metric.name, metric.form), always=True),
        Column("difference from the first arm (negative is better)",
               lambda row: with_margin(row, "difference", f"+{metric.form}"), always=True),
        Column("p (Holm)", lambda row: number(row, "p_holm", ".3f"), always=True),
        Column("significant", lambda row: SIGNIFICANCE_WORDS.get(row.get("significance"), ""), always=True),
        Column(f"{metric.effort} equivalent, relative to the first arm (positive is better)",
               lambda row: format_equivalent(row, metric)),
        Column(f"{metric.unit} at equal seconds (lower is better)",
               lambda row: number(row, f"{metric.name}_equal_seconds", metric.form)),
        Column("learning rate", lambda row: number(row, "learning_rate", ".3g") + format_grid_edge(row)),
        Column("vocabulary", lambda row: number(row, "vocab_size", ","), of_vocabulary=True),
        Column("bytes per token", lambda row: number(row, "bytes_per_token", ".3f"), of_vocabulary=True),
        Column("tokens per byte", lambda row: number(row, "tokens_per_byte", ".4f"), of_vocabulary=True),
        Column("bytes per context", lambda row: number(row, "bytes_per_context", ",.0f"), of_vocabulary=True),
        Column("parameters", lambda row: f"{row['parameters']:,}"),
        Column("embedding's share of parameters", lambda row: number(row, "embedding_share", ".1%"), of_vocabulary=True),
        Column("MFLOP/token, matrix products", lambda row: number(row, "flops_per_token", ".2f", 1e-6)),
        Column("MFLOP/token, element-wise", lambda row: number(row, "elementwise_flops_per_token", ".2f", 1e-6)),
        Column("games", lambda row: number(row, "games", ",.0f")),
        Column("games/s (higher is better)", lambda row: number(row, "games_per_sec", ",.0f")),
        Column("tokens/s (higher is better)", lambda row: number(row, "tok_per_sec", ",.0f")),
        Column("bytes/s (higher is better)", lambda row: number(row, "bytes_per_sec", ",.0f"), of_vocabulary=True),
        Column("seconds (lower is better)", lambda row: number(row, "seconds", ",.0f")),
        Column("peak memory, MiB (lower is better)", lambda row: number(row, "peak_memory", ",.0f", 2**-20)),
        Column("runs finished", lambda row: f"{row['runs']} of {row['runs_wanted']}"))


def table_of_columns(rows: list[dict], metric: Metric = BPB) -> tuple[Table, list[str]]:
    """The table of the arms of one size, without columns that would be the same for all, and the contents of these."""
    with_vocabularies = len({(row.get("vocab_size"), row.get("bytes_per_token")) for row in rows}) > 1
    columns = [column for column in make_columns(metric) if with_vocabularies or not column.of_vocabulary]
    cells = {column: [column.cell(row) for row in rows] for column in columns}
    shown = [column for column in columns if column.always or len(set(cells[column])) > 1]
    same = [f"{column.head.split(' (')[0]} {cells[column][0]}" for column in columns
            if column not in shown and cells[column][0]]
    return Table(tuple(column.head for column in shown), list(zip(*(cells[column] for column in shown)))), same


def short_table(results: list[ArmResults], rows: list[dict], width: int = 80) -> list[str]:
    """Lines for a terminal: arm, metric, difference and verdict; then the runs left out. An arm's name is shortened where
    the line would be longer than `width`."""
    metric = results[0].arm.metric
    texts = [("arm", metric.unit, "difference", "verdict")] + [
        (row["arm"], with_margin(row, metric.name, metric.form), with_margin(row, "difference", f"+{metric.form}"),
         "" if row is rows[0] else short_verdict(row)) for row in rows]
    lines = [results[0].arm.group] * bool(results[0].arm.group) + align_columns(texts, width)
    return lines + [f"left out: {problem}" for arm_results in results for problem in arm_results.problems()] + [""]


def short_thoughts(rows: list[dict], width: int = 80) -> list[str]:
    """Lines for a terminal: the right answers of each arm, in percent, with each amount of thought. rows: of
    thought_rows."""
    if not rows:
        return []
    levels, arms = dict.fromkeys(row["thought"] for row in rows), {}
    for row in rows:
        percent = {name: 100 * row[name] for name in ("accuracy", "accuracy_margin")}
        arms.setdefault(row["arm"], {})[row["thought"]] = with_margin(percent, "accuracy", ".1f")
    texts = [("right answers, %", *levels), *((arm, *(own.get(level, "") for level in levels)) for arm, own in arms.items())]
    return [line for part in split_columns(texts, width) for line in [*align_columns(part, width), ""]]
