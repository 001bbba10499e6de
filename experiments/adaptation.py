"""What adapting at inference time gained, from the rows of documents: tables, sentences, the page and its pictures.

adapt.py calls `write_adaptation` with the rows of its documents. A row holds, for each way of reading the document (a key of
READINGS), the summed loss in nats: of every hop in a list for "static" and "adapted", of the whole document for the others.
"""
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from experiments.plots import draw_by_position
from experiments.report import Figure, Table, align_columns, markdown_page, write_page
from experiments.stats import Estimate
from runtime.cli import say
from runtime.files import atomic_write
from runtime.forecast import format_bytes

# key of a row -> what it is called
READINGS = {"static": "static", "adapted": "adapted", "other": "adapted to another document",
            "overlap": "static, longer overlap", "static_kept": "static, state kept", "adapted_kept": "adapted, state kept"}
QUARTERS = "first", "second", "third", "fourth"
NOTES = """\
Bits per byte are means over documents, each counting once; differences are paired by document, ± the half-width of the 95 %
interval over documents (Student's t); lower is better. Static: the weights stay as they are. Adapted: a hop of tokens is
scored, then a step is taken on it; before the next document the weights are put back bit for bit. Adapted to another
document: scored with the weights that the document before it has led to, without steps; were it better, the gain would not
come from the document. Static, longer overlap: windows of a context that lie so close together that a token costs as many
FLOPs as adapting does. State kept: for recurrent models, whose state may run through the whole document instead of starting
anew in each window: the state is a learner of its own. FLOPs are those of matrix products, per scored token."""


@dataclass(frozen=True)
class AdaptationStudy:
    """What the rows have in common. hop: tokens between steps. flops: per scored token, of the readings that it is known
    for. stride: of "overlap", in tokens. extra_bytes: what adapting holds in memory besides the model. left_out: sentences.
    conditions: model, data and machine. command_line: of adapt.py."""
    title: str
    hop: int
    flops: dict[str, float]
    stride: int
    extra_bytes: int
    left_out: list[str]
    conditions: list[str]
    command_line: str


# -- rows -------------------------------------------------------------------------------------------------------------

def bits_per_byte(row: dict, reading: str) -> float:
    nats = row[reading]
    return (sum(nats) if isinstance(nats, list) else nats) / math.log(2) / row["bytes"]


def gains(rows: list[dict], reading: str) -> list[float]:
    """Bits per byte minus those of static reading, of each document that has both."""
    return [bits_per_byte(row, reading) - bits_per_byte(row, "static") for row in rows if row.get(reading) is not None]


def pooled_bits_per_byte(rows: list[dict], reading: str) -> float:
    """Of all text together, as evaluate.py counts."""
    return sum(bits_per_byte(row, reading) * row["bytes"] for row in rows) / sum(row["bytes"] for row in rows)


def gains_by_quarter(rows: list[dict]) -> list[list[float]]:
    """Differences in bits per byte between adapted and static, by quarter of the document's hops, one for each document that
    has text in it."""
    quarters = [[], [], [], []]
    for row in rows:
        n = len(row["static"])
        for i, quarter in enumerate(quarters):
            part = slice(n * i // 4, n * (i + 1) // 4)
            if n_bytes := sum(row["hop_bytes"][part]):
                nats = sum(row["adapted"][part]) - sum(row["static"][part])
                quarter.append(nats / math.log(2) / n_bytes)
    return quarters


def by_position(rows: list[dict], width: int) -> dict[str, list[tuple[float, float]]]:
    """reading -> (position in the document in tokens, bits per byte of the documents that reach it), in steps of `width`
    hops, as far as half of the documents reach. A hop at the end of a window or of a document may be shorter than others."""
    longest = max(rows, key=lambda row: len(row["static"]))
    bounds = [0, *itertools.accumulate(longest["hop_tokens"])]
    n_hops = sorted(len(row["static"]) for row in rows)[len(rows) // 2]
    curves = {"static": [], "adapted": []}
    for start in range(0, max(1, n_hops), width):
        part = slice(start, start + width)
        n_bytes = sum(sum(row["hop_bytes"][part]) for row in rows)
        for reading, curve in curves.items():
            if n_bytes:
                nats = sum(sum(row[reading][part]) for row in rows)
                middle = (bounds[start] + bounds[min(start + width, len(bounds) - 1)]) / 2
                curve.append((middle, nats / math.log(2) / n_bytes))
    return curves


# -- the report -------------------------------------------------------------------------------------------------------

def difference(values: list[float]) -> str:
    estimate = Estimate.from_values(values)
    return f"{estimate.mean:+.4f}" + (f" ± {estimate.margin:.4f}" if estimate.margin < math.inf else "")


def result_table(rows: list[dict], study: AdaptationStudy) -> Table:
    lines = []
    for reading, name in READINGS.items():
        measured = [row for row in rows if row.get(reading) is not None]
        if not measured:
            continue
        own = gains(measured, reading)
        is_static = reading == "static"
        lines.append((name.replace("longer overlap", f"stride {study.stride}"),
                      f"{Estimate.from_values([bits_per_byte(row, reading) for row in measured]).mean:.4f}",
                      "" if is_static else difference(own),
                      "" if is_static else f"{sum(gain < 0 for gain in own)} of {len(own)}",
                      f"{study.flops[reading] / 1e6:.2f}" if reading in study.flops else ""))
    return Table(("reading", "bits/byte", "difference", "better", "MFLOP/token"), lines)


def quarter_table(rows: list[dict]) -> Table:
    cells = tuple(difference(quarter) if quarter else "" for quarter in gains_by_quarter(rows))
    return Table(("adapted minus static, by quarter", *QUARTERS), [("bits/byte", *cells)])


def seconds_ratio(rows: list[dict]) -> float:
    return sum(row["adapted_seconds"] for row in rows) / sum(row["static_seconds"] for row in rows)


def verdict(rows: list[dict]) -> str:
    """One sentence that claims no more than the intervals support."""
    gain = Estimate.from_values(gains(rows, "adapted"))
    text = f"all text together: {pooled_bits_per_byte(rows, 'static'):.4f} bits/byte static, " \
           f"{pooled_bits_per_byte(rows, 'adapted'):.4f} adapted"
    if math.isinf(gain.margin):
        return f"One document shows nothing; {text}."
    if abs(gain.mean) <= gain.margin:
        return f"No significant difference between adapted and static; {text}."
    if gain.mean > 0:
        return f"Adapted is worse than static: lower --adapt_rate; {text}."
    control = [row for row in rows if row.get("other") is not None]
    other = Estimate.from_values(gains(control, "other")) if control else None
    if other and other.high < 0:
        return (f"Adapted is better than static, but so is what another document has led to: a part of the gain comes from "
                f"the kind of text, not from the document; {text}.")
    return f"Adapted is better than static; {text}."


def cost(rows: list[dict], study: AdaptationStudy) -> str:
    flops = study.flops["adapted"] / study.flops["static"]
    return (f"Adapting costs {seconds_ratio(rows):.2f} times the seconds of static reading in the same hops, {flops:.2f} "
            f"times its FLOPs, and {format_bytes(study.extra_bytes)} of memory for a copy of the trained weights, their "
            f"gradients and the optimizer's averages.")


def write_adaptation(rows: list[dict], study: AdaptationStudy, out_path: Path):
    """Writes adaptation.md, adaptation.html and its picture into `out_path`, and prints a short form."""
    table, quarters = result_table(rows, study), quarter_table(rows)
    width = max(1, round(64 / study.hop))
    figure = Figure(draw_by_position(by_position(rows, width), {
        f"{name} quarter": quarter for name, quarter in zip(QUARTERS, gains_by_quarter(rows)) if quarter}), "by_position")
    sentences = [verdict(rows), cost(rows, study), *study.left_out]
    parts = [("code", study.command_line), ("p", "; ".join(study.conditions) + "."), ("ul", sentences), table, quarters,
             figure, ("p", NOTES)]
    for name, content in (("adaptation.md", markdown_page(study.title, parts)), ("by_position.svg", figure.svg)):
        with atomic_write(out_path / name, "w") as file:
            file.write(content)
    write_page(out_path / "adaptation.html", study.title, parts)
    print("\n".join(align_columns([table.head, *table.rows])))
    print("\n" + "\n".join(align_columns([(name, *cells) for name, cells in zip(
        ("quarter of the document", *QUARTERS), [("difference",), *((cell,) for cell in quarters.rows[0][1:])])])) + "\n")
    for sentence in sentences:
        say(sentence)
    print(out_path / "adaptation.html")
