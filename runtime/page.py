"""A page of results that needs nothing beside it, text, tables and pictures in one HTML file; and the tables as Markdown."""
import html
import io
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from runtime.files import whole_file

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
COLORS = ["#3366aa", "#cc6633", "#339966", "#aa3377", "#888888", "#bb9922", "#4499bb", "#774488", "#995544", "#668833"]


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
    with whole_file(path, "w") as file:
        file.write(f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<meta name="viewport" '
                   f'content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
                   f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n")


def table_row(cells: tuple[str, ...], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


# -- pictures ---------------------------------------------------------------------------------------------------------

def axes_of(columns: int, height: float = 4.0):
    """A figure with so many axes side by side."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams["svg.fonttype"] = "none"   # text stays text: small, and found by a search
    plt.rcParams["svg.hashsalt"] = "gpt"    # the same picture is the same file
    figure, axes = plt.subplots(1, columns, figsize=(12, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def as_svg(figure) -> str:
    import matplotlib.pyplot as plt
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


def validations(runs: list[list[dict]]) -> list[list[dict]]:
    """Of every run, the rows of the steps that all were validated at, and last those of their ends, whose steps may
    differ."""
    validated = [{row["step"]: row for row in rows if "val_loss" in row and row["step"] > 0} for rows in runs]
    shared = set.intersection(*(set(rows) - {max(rows, default=0)} for rows in validated))
    ends = [[rows[max(rows)] for rows in validated]] if all(validated) else []
    return [[rows[step] for rows in validated] for step in sorted(shared)] + ends


def draw_lines(curves: dict[str, list[list[dict]]]) -> str:
    """Validation loss of each name's runs, their mean with a band from the lowest to the highest, against tokens, FLOPs and
    seconds. curves: name -> rows of each run. Returns SVG."""
    figure, axes = axes_of(3)
    units = {"tokens": (1e6, "million tokens"), "flops": (1e12, "TFLOP of matrix products"),
             "seconds": (1, "seconds of training")}
    lowest, early = math.inf, []
    for (name, runs), color in zip(curves.items(), COLORS * 9):
        points = validations(runs)
        losses = [[row["val_loss"] for row in at] for at in points]
        means, lows, highs = ([f(values) for values in losses] for f in (statistics.mean, min, max))
        early += [mean for at, mean in zip(points, means) if at[0]["tokens"] >= points[-1][0]["tokens"] / 5]
        lowest = min([lowest, *lows])
        for axis, (over, (unit, _)) in zip(axes, units.items()):
            x = [statistics.mean(row[over] for row in at) / unit for at in points]
            axis.fill_between(x, lows, highs, color=color, alpha=0.2, linewidth=0)
            axis.plot(x, means, ".-", color=color, label=name, linewidth=1.3)
    for axis, (over, (_, label)) in zip(axes, units.items()):
        axis.set(xlabel=label, ylabel="validation loss, nats/token", title=f"Loss against {over.replace('flops', 'FLOPs')}")
        if early:  # the steep beginning would flatten the rest
            axis.set_ylim(lowest - 0.05 * (max(early) - lowest) - 1e-3, max(early) + 1e-3)
    axes[0].legend(fontsize=8, frameon=False)
    return as_svg(figure)


def front_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in one number without losing in the other. [(1, 3), (2, 4), (3, 2)] -> [(1, 3), (3, 2)]"""
    return sorted({p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)})


def draw_front(ends: dict[str, dict]) -> str:
    """Bits per byte of each name against seconds and memory, and the front of those that no other beats in both. ends: name
    -> bpb, bpb_margin, seconds, peak_memory. Returns SVG."""
    figure, axes = axes_of(2)
    for axis, what, unit, label in zip(axes, ("seconds", "peak_memory"), (1, 2**20),
                                       ("seconds of training", "peak memory, MiB")):
        at = {name: (end[what] / unit, end["bpb"]) for name, end in ends.items()}
        axis.plot(*zip(*front_of(list(at.values()))), "--", color="#999999", linewidth=1, zorder=1, label="Pareto front")
        for (name, (x, y)), color in zip(at.items(), COLORS * 9):
            margin = ends[name]["bpb_margin"]
            axis.errorbar(x, y, yerr=margin if math.isfinite(margin) else None, fmt="o", color=color, capsize=3, label=name)
        axis.set(xlabel=label, ylabel="bits per byte", title=f"Bits per byte against {label.split(',')[0]}")
    axes[0].legend(fontsize=8, frameon=False)
    return as_svg(figure)


def draw_scaling(fits: dict[str, tuple]) -> str:
    """Bits per byte against the FLOPs of a run, on logarithmic axes, with the power law through each name's points. fits:
    name -> (points, a, b) of y = a x^-b. Returns SVG."""
    figure, (axis,) = axes_of(1, 5.0)
    for (name, (points, a, b)), color in zip(fits.items(), COLORS * 9):
        x = [x for x, _ in points]
        axis.plot(x, [y for _, y in points], "o", color=color)
        axis.plot(x, [a * value ** -b for value in x], "-", color=color, linewidth=1.2, label=f"{name}: FLOPs^-{b:.4f}")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs of a run, matrix products and element-wise", ylabel="bits per byte",
             title="Loss against FLOPs")
    axis.yaxis.set_major_formatter("{x:.4g}")  # 1.6, where a logarithmic axis says 1.6 x 10^0
    axis.yaxis.set_minor_formatter("{x:.4g}")
    axis.legend(fontsize=8, frameon=False)
    return as_svg(figure)
