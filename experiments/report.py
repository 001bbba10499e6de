"""Tables, Markdown and the page of an experiment."""
import csv
import html
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.analysis import ArmResults, corrected, scaling, table_rows, verdict, worth_of
from experiments.plots import draw_front, draw_lines, draw_scaling
from runtime.files import atomic_write

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --band: #f4f6f9; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1400px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
code { font: 13px ui-monospace, monospace; background: var(--band); padding: .15rem .35rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; color: var(--soft); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tbody tr:hover td { background: var(--band); }
figure { margin: 1.2rem 0; } figure svg { max-width: 1180px; width: 100%; height: auto; }
p, li { max-width: 60rem; }
"""


@dataclass
class Table:
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass
class Figure:
    svg: str
    name: str


def markdown(table: Table) -> str:
    lines = [table.head, ("---",) * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_page(path: Path, title: str, parts: list):
    """parts: tables, figures, and (tag, text), where the text of a ul is a list of items."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for part in parts:
        if isinstance(part, Table):
            body.append('<div class="scroll"><table><thead>' + table_row(part.head, "th") + "</thead><tbody>"
                        + "\n".join(table_row(row, "td") for row in part.rows) + "</tbody></table></div>")
        elif isinstance(part, Figure):
            body.append(f'<figure id="{html.escape(part.name)}">{part.svg[part.svg.index("<svg"):]}</figure>')
        elif part[0] == "ul":
            body.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in part[1]) + "</ul>")
        elif part[0] == "code":
            body.append(f"<p><code>{html.escape(part[1])}</code></p>")
        else:
            body.append(f"<{part[0]}>{html.escape(part[1])}</{part[0]}>")
    with atomic_write(path, "w") as file:
        file.write(f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<meta name="viewport" '
                   f'content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
                   f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n")


def table_row(cells: tuple[str, ...], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


HEAD = ("arm", "bits/byte", "difference to the first", "p (Holm)", "significant", "worth in steps",
        "bits/byte at equal seconds", "learning rate", "parameters", "MFLOP/token: products", "element-wise", "tok/s",
        "seconds", "peak MiB", "runs")


def shown(row: dict) -> tuple[str, ...]:
    """A row of the table for people."""
    def number(name: str, form: str, scale: float = 1.0) -> str:
        value = row.get(name)
        return "" if value is None or math.isnan(value) else format(value * scale, form)

    def with_margin(name: str) -> str:
        margin = row.get(f"{name}_margin", math.inf)
        return number(name, "+.4f" if name == "difference" else ".4f") + (f" ± {margin:.4f}" if margin < math.inf else "")
    return (row["arm"], with_margin("bpb"), with_margin("difference"), number("p_holm", ".3f"), row.get("significant", ""),
            worth_of(row) if "worth" in row else "", number("bpb_equal_seconds", ".4f"),
            number("learning_rate", ".3g") + (f" ({row['edge']})" if row["edge"] else ""), f"{row['parameters']:,}",
            number("flops_per_token", ".2f", 1e-6), number("elementwise_flops_per_token", ".2f", 1e-6),
            number("tok_per_sec", ",.0f"), number("seconds", ",.0f"), number("peak_memory", ",.0f", 2**-20),
            f"{row['runs']} of {row['runs_wanted']}")


NOTES = """\
Means over seeds ± 95 % interval (Student's t), which is of seeds alone, not of the choice of text. Differences are paired
by seed, negative is better; p and "significant" are corrected for all comparisons on this page (Holm). "Worth in steps":
how much longer, or shorter, the first arm would have to train to be as good, and in brackets the same at the ends of the
difference's interval; "at equal seconds": what the arm would have reached in the seconds that the first one took. Both go
by an arm's best run on a part of the budget and that of the same seed on the whole, each with its full cooldown, and reach
no farther than the ratio of the two. Learning rate: from the grid's best on a part of the budget downwards, as long as the
whole budget with the first seed gets better by it (that run is one of those compared, and a little too good for having been
chosen, whatever the arm); (edge): it was the grid's first or last. FLOPs of a training token, forward and backward: matrix
products, and apart from them activations and the bases of KAN layers. Peak memory is that of the process, on a GPU of its
tensors. Tokens per second are the median of a few steps, measured after all runs, the arms in turns and alone, and seconds
are those of a run at that speed; where seconds are the budget, both are the runs' own."""
NULL_NOTE = """\
The two sides share neither initial weights nor the order of data, so a pair differs by more than two arms of a comparison
do, which share the order."""


def report(outcomes: list[ArmResults], regime: Callable[[list[ArmResults]], str], line: str, out_path: Path, null: bool):
    """Writes the tables, the pictures and the page, and prints what they say. regime: says in what circumstances the arms of
    a size were compared; line: the command; null: the second arm is the first."""
    by_size = [list(group) for _, group in itertools.groupby(outcomes, key=lambda outcome: outcome.arm.size)]
    rows_of = [table_rows(group) for group in by_size]
    rows = corrected(list(itertools.chain(*rows_of)))
    parts, lines, pictures = [], [], {}
    for group, size_rows in zip(by_size, rows_of):
        table = Table(HEAD, [shown(row) for row in size_rows])
        verdicts = [verdict(row, size_rows[0]) for row in size_rows[1:]]
        problems = [problem for outcome in group for problem in outcome.problems()]
        heading, where = group[0].arm.size or "Results", regime(group)
        parts += [("h2", heading), ("p", f"{where}."), ("ul", verdicts), table]
        lines += [f"## {heading}", "", f"{where}.", "", *(f"- {sentence}" for sentence in verdicts), "", markdown(table), ""]
        if curves := {outcome.arm.name: outcome.rows() for outcome in group if outcome.finished()}:
            suffix = "".join(c if c.isalnum() else "_" for c in f" {group[0].arm.size}".rstrip())
            own = {f"curves{suffix}": draw_lines(curves),
                   f"front{suffix}": draw_front({row["arm"]: row for row in size_rows if "bpb" in row})}
            parts += [Figure(svg, name) for name, svg in own.items()]
            pictures |= own
        if problems:
            parts += [("h3", "Runs that are left out"), ("ul", problems)]
            lines += ["Runs that are left out:", "", *(f"- {problem}" for problem in problems), ""]
    if len(by_size) > 1:
        fits = scaling(by_size)
        sentences = [f"{name}: bits/byte = {a:.3g} x FLOPs^-{b:.4f}" + (", a line through two sizes" * (len(points) == 2))
                     for name, (points, a, b) in fits.items()]
        if not fits:
            sentences = ["No arm has runs of two sizes whose FLOPs differ enough to tell how loss falls with them."]
        parts += [("h2", "Loss against FLOPs"), ("ul", sentences)]
        lines += ["## Loss against FLOPs", "", *(f"- {sentence}" for sentence in sentences), ""]
        if fits:
            pictures["scaling"] = draw_scaling(fits)
            parts.append(Figure(pictures["scaling"], "scaling"))
    title = "A null test: an arm against itself" if null else "Comparison"
    notes = [NOTES, *([NULL_NOTE] if null else [])]
    text = "\n".join([f"# {title}", "", f"`{line}`", "", *lines, "\n\n".join(notes), ""])
    for old in out_path.glob("*.svg"):
        old.unlink()
    files = {"comparison.md": text, "comparison.csv": as_csv(rows), **{f"{name}.svg": svg for name, svg in pictures.items()}}
    for name, content in files.items():
        with atomic_write(out_path / name, "w") as file:
            file.write(content)
    write_page(out_path / "comparison.html", title, [("code", line), *parts, *(("p", note) for note in notes)])
    print(text)
    print(out_path / "comparison.html")


def as_csv(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
