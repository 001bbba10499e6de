"""Pictures of runs and of prepared text, by matplotlib, which is imported when the first one is drawn.

    draw_curves({"gpt": read_rows(path)}, Path("curves.png"))       the curves of runs, as train.py --plot draws them
    svg = draw_mean_curves({"mlp=gelu": [rows, rows]})              mean and range over the runs of each name

Rows are those of metrics.jsonl.
"""
import io
import itertools
import math
import statistics
import textwrap
import warnings
from pathlib import Path

from runtime.config import shorten
from runtime.files import atomic_write

COLORS = ["#3366aa", "#cc6633", "#339966", "#aa3377", "#888888", "#bb9922", "#4499bb", "#774488", "#995544", "#668833"]
AXIS_LABELS = {"tokens": "million tokens", "seconds": "seconds of training, without compiling, validation and writing"}


# -- training curves of a few runs ------------------------------------------------------------------------------------

def draw_curves(runs: dict[str, list[dict]], path: Path):
    """Writes a PNG: loss (training faint, validation strong) and bits per byte of each run, against tokens and seconds.
    runs: name -> rows."""
    plt = import_pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for name, rows in runs.items():
        rows = [row for row in rows if {"tokens", "seconds"} <= row.keys()]
        for (loss_axis, bpb_axis), x_name, unit in zip(axes.T, ("tokens", "seconds"), (1e6, 1)):
            train = [(row[x_name] / unit, row["train_loss"]) for row in rows if "train_loss" in row]
            val = [(row[x_name] / unit, row["val_loss"], row.get("val_bpb", math.nan)) for row in rows if "val_loss" in row]
            color = loss_axis.plot([x for x, _ in train], [y for _, y in train], linewidth=0.7, alpha=0.4)[0].get_color()
            loss_axis.plot([x for x, _, _ in val], [y for _, y, _ in val], "o-", markersize=3, color=color,
                           label=literal(name))
            last = f": {val[-1][2]:.4f} after {rows[-1]['tokens'] / 1e6:,.2f} M tokens, {rows[-1]['seconds']:,.0f} s"
            bpb_axis.plot([x for x, _, _ in val], [y for _, _, y in val], "o-", markersize=3, color=color,
                          label=literal(name) + (last if val else ""))
            loss_axis.set(xlabel=AXIS_LABELS[x_name], ylabel="nats/token", title=f"Loss against {x_name}")
            bpb_axis.set(xlabel=AXIS_LABELS[x_name], ylabel="bits/byte", title=f"Bits per byte against {x_name}")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8).set_in_layout(False)  # a long name would leave no room for the curves
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


# -- comparisons, as SVG for pages ------------------------------------------------------------------------------------

def draw_mean_curves(curves: dict[str, list[list[dict]]], by_bytes: bool = False) -> str:
    """Validation loss of each name's runs, the mean with a band from the lowest to the highest, against tokens, FLOPs and
    seconds. curves: name -> rows of each run. by_bytes: bits per byte, and bytes of text instead of tokens, for names whose
    tokens differ; the rows have a key "bytes". Returns SVG."""
    figure, axes = make_axes(3)
    loss_name, loss_label = ("val_bpb", "bits per byte") if by_bytes else ("val_loss", "validation loss, nats/token")
    x_name, x_unit = ("bytes", (1e6, "MB of text")) if by_bytes else ("tokens", (1e6, "million tokens"))
    units = {x_name: x_unit, "flops": (1e12, "TFLOP of matrix products"), "seconds": (1, "seconds of training")}
    lowest, early = math.inf, []
    for (name, runs), color in zip(curves.items(), COLORS * 9):
        evaluations = align_evaluations(runs)
        losses = [[row[loss_name] for row in rows] for rows in evaluations]
        means, lows, highs = ([f(values) for values in losses] for f in (statistics.mean, min, max))
        early += [mean for rows, mean in zip(evaluations, means) if rows[0]["tokens"] >= evaluations[-1][0]["tokens"] / 5]
        lowest = min([lowest, *lows])
        for axis, (x_name, (unit, _)) in zip(axes, units.items()):
            x = [statistics.mean(row[x_name] for row in rows) / unit for rows in evaluations]
            axis.fill_between(x, lows, highs, color=color, alpha=0.2, linewidth=0)
            axis.plot(x, means, ".-", color=color, label=literal(name), linewidth=1.3)
    for axis, (x_name, (_, label)) in zip(axes, units.items()):
        axis.set(xlabel=label, ylabel=loss_label,
                 title=f"{'Bits per byte' if by_bytes else 'Loss'} against {x_name.replace('flops', 'FLOPs')}")
        if early:  # the steep first fifth would flatten the rest
            axis.set_ylim(lowest - 0.05 * (max(early) - lowest) - 1e-3, max(early) + 1e-3)
    axes[0].legend(fontsize=8, frameon=False)
    return to_svg(figure)


def align_evaluations(runs: list[list[dict]]) -> list[list[dict]]:
    """For every step that all runs were validated at, their rows; last their final rows, whose steps may differ."""
    by_step = [{row["step"]: row for row in rows if "val_loss" in row and row["step"] > 0} for rows in runs]
    shared = set.intersection(*(set(rows) - {max(rows, default=0)} for rows in by_step))
    final = [[rows[max(rows)] for rows in by_step]] if all(by_step) else []
    return [[rows[step] for rows in by_step] for step in sorted(shared)] + final


def draw_pareto_fronts(results: dict[str, dict]) -> str:
    """Bits per byte of each name against seconds and against memory, with the Pareto fronts. results: name -> bpb,
    bpb_margin, seconds, peak_memory (bytes). Returns SVG."""
    figure, axes = make_axes(2)
    for axis, x_name, unit, label in zip(axes, ("seconds", "peak_memory"), (1, 2**20),
                                         ("seconds of training", "peak memory, MiB")):
        points = {name: (result[x_name] / unit, result["bpb"]) for name, result in results.items()}
        axis.plot(*zip(*pareto_front(list(points.values()))), "--", color="#999999", linewidth=1, zorder=1,
                  label="Pareto front")
        for (name, (x, y)), color in zip(points.items(), COLORS * 9):
            margin = results[name]["bpb_margin"]
            axis.errorbar(x, y, yerr=margin if math.isfinite(margin) else None, fmt="o", color=color, capsize=3,
                          label=literal(name))
        axis.set(xlabel=label, ylabel="bits per byte",
                 title=f"Bits per byte against {label.split(',')[0]} (lower left is better)")
    axes[0].legend(fontsize=8, frameon=False)
    return to_svg(figure)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in one number without losing in the other; lower is better in both.
    [(1, 3), (2, 4), (3, 2)] -> [(1, 3), (3, 2)]"""
    return sorted({p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)})


def draw_scaling(fits: dict[str, tuple]) -> str:
    """Bits per byte against the FLOPs of a run, on logarithmic axes, with each name's power law. fits: name -> (points, a,
    b) of y = a x^-b. Returns SVG."""
    figure, (axis,) = make_axes(1, 5.0)
    for (name, (points, a, b)), color in zip(fits.items(), COLORS * 9):
        x = [x for x, _ in points]
        axis.plot(x, [y for _, y in points], "o", color=color)
        axis.plot(x, [a * value ** -b for value in x], "-", color=color, linewidth=1.2,
                  label=f"{literal(name)}: FLOPs^-{b:.4f}")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs of a run, matrix products and element-wise", ylabel="bits per byte",
             title="Loss against FLOPs")
    axis.yaxis.set_major_formatter("{x:.4g}")  # 1.6, where a logarithmic axis writes 1.6 x 10^0
    axis.yaxis.set_minor_formatter("{x:.4g}")
    axis.legend(fontsize=8, frameon=False)
    return to_svg(figure)


def draw_by_vocabulary(series: dict[str, list[tuple[int, float, float]]]) -> str:
    """Bits per byte against the size of the vocabulary, a line for each name. series: name -> (vocab_size, bits per byte,
    half-width of its interval or infinity). Returns SVG."""
    figure, (axis,) = make_axes(1, 5.0)
    for (name, points), color in zip(series.items(), COLORS * 9):
        x, y, margins = zip(*sorted(points))
        axis.errorbar(x, y, yerr=[margin if math.isfinite(margin) else 0 for margin in margins], fmt="o-", color=color,
                      capsize=3, linewidth=1.2, label=literal(name))
    sizes = sorted({size for points in series.values() for size, _, _ in points})
    axis.set(xscale="log", xlabel="tokens in the vocabulary", ylabel="bits per byte",
             title="Bits per byte against the size of the vocabulary (lower is better)")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.legend(fontsize=8, frameon=False)
    return to_svg(figure)


# -- tokenizers -------------------------------------------------------------------------------------------------------

def draw_compression(results: dict[str, dict[str, float]]) -> str:
    """Bars of bytes per token for each kind of text, one for each tokenizer. results: name of a tokenizer -> kind of text ->
    bytes per token; the kinds of the first are drawn. Returns SVG."""
    figure, (axis,) = make_axes(1, 5.0)
    kinds, height = list(next(iter(results.values()))), 0.8 / len(results)
    for i, ((name, values), color) in enumerate(zip(results.items(), COLORS * 9)):
        y = [k + (i - (len(results) - 1) / 2) * height for k in range(len(kinds))]
        axis.barh(y, [values[kind] for kind in kinds], height * 0.9, color=color, label=literal(name))
    axis.set_yticks(range(len(kinds)), [literal(kind) for kind in kinds])
    axis.invert_yaxis()
    axis.set(xlabel="bytes per token", title="Bytes per token by kind of text (more is better)")
    axis.legend(fontsize=8, frameon=False)
    return to_svg(figure)


# -- probes -----------------------------------------------------------------------------------------------------------

def draw_accuracy_matrix(arms: list[str], columns: dict[str, list[str]], labels: dict, accuracies: dict, chance: dict,
                         title: str, folder: Path, name: str):
    """Writes <name>.png and <name>.svg: a row per arm, and per task a box for each of its columns, coloured by accuracy from
    chance level (0) to 1.

    columns: task -> names of its boxes, as many for each. labels, accuracies: (arm, task) -> text above its boxes, and a
    number or None for each. chance: task -> accuracy of guessing.
    """
    import numpy as np
    plt = import_pyplot()
    tasks, n = list(columns), len(next(iter(columns.values())))
    long_names = max(0, min(40, max(map(len, arms))) - 20) / 12  # inches beyond the usual
    width = max(5.5, 2.0 + 1.75 * len(tasks)) + long_names
    figure, axis = plt.subplots(figsize=(width, 1.6 + 0.95 * len(arms)), layout="constrained")
    above_chance = lambda accuracy, task: math.nan if accuracy is None else \
        max(0.0, (accuracy - chance[task]) / (1 - chance[task]))
    shades = np.array([[above_chance(x, task) for task in tasks for x in accuracies[arm, task]] for arm in arms])
    colors = plt.get_cmap("Blues").with_extremes(bad="#dddddd")
    image = axis.imshow(np.ma.masked_invalid(shades), cmap=colors, vmin=0, vmax=1, aspect="auto")
    for (y, arm), (i, task) in itertools.product(enumerate(arms), enumerate(tasks)):
        axis.text(n * i + (n - 1) / 2, y - 0.2, labels[arm, task], ha="center", va="center", fontsize=8.5, color="black",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 2, "alpha": 0.85})
        for k, accuracy in enumerate(accuracies[arm, task]):
            axis.text(n * i + k, y + 0.27, "-" if accuracy is None else f"{accuracy:.2f}", ha="center", va="center",
                      fontsize=9, color="white" if shades[y, n * i + k] > 0.6 else "black")
    label_matrix(axis, arms, columns)
    figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(image, ax=axis, ticks=[0, 1], pad=0.01, shrink=0.9)
    bar.ax.set_yticklabels(["chance", "all correct"], fontsize=8)
    for extension in ("png", "svg"):
        with atomic_write(folder / f"{name}.{extension}") as file:
            figure.savefig(file, format=extension, dpi=110)
    plt.close(figure)


def label_matrix(axis, arms: list[str], columns: dict[str, list[str]]):
    """Names the rows, the tasks and their columns, and draws white lines between arms and between tasks."""
    n = len(next(iter(columns.values())))
    axis.set_yticks(range(len(arms)), [textwrap.fill(literal(arm), 40) for arm in arms])
    axis.set_xticks(range(n * len(columns)), list(itertools.chain(*columns.values())), fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for i, task in enumerate(columns):
        axis.text(n * i + (n - 1) / 2, -0.56, task, ha="center", va="bottom", fontsize=10.5, fontweight="bold")
    for x in range(1, len(columns)):
        axis.axvline(n * x - 0.5, color="white", linewidth=5)
    for y in range(1, len(arms)):
        axis.axhline(y - 0.5, color="white", linewidth=5)


# -- prepared text ----------------------------------------------------------------------------------------------------

def draw_corpus_stats(lengths, counts, title: str, path: Path):
    """Writes a PNG: a histogram of the documents' lengths, and the frequency of each token against its rank.

    lengths: tokens of each document, (documents,). counts: occurrences of each id, (vocab_size,). Both are numpy arrays.
    """
    import numpy as np
    plt = import_pyplot()
    falling = -np.sort(-counts[counts > 0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    left.hist(np.maximum(lengths, 1), np.geomspace(1, lengths.max() + 1, 60), color="#4878a8")
    left.axvline(np.median(lengths), color="black", linewidth=0.8)
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents",
             title=f"{len(lengths):,} documents, median {np.median(lengths):,.0f} tokens, longest {lengths.max():,}")
    ranks = np.arange(1, len(falling) + 1)
    right.plot(ranks, falling, color="#4878a8", label="tokens")
    right.plot(ranks, falling[0] / ranks, color="black", linewidth=0.8, label="Zipf: 1 / rank")
    right.set(xscale="log", yscale="log", xlabel="rank", ylabel="occurrences",
              title=f"{len(falling):,} of {len(counts):,} tokens of the vocabulary occur")
    right.legend()
    figure.suptitle(literal(title))
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


# -- matplotlib -------------------------------------------------------------------------------------------------------

def import_pyplot():
    """matplotlib.pyplot, drawing without a display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box in the picture says it too
    return plt


def literal(text: str) -> str:
    """`text` as matplotlib draws it without reading anything into it: $ would begin a formula, and a legend leaves out what
    begins with an underscore. What cannot be printed, and would not be valid SVG, becomes a question mark."""
    text = "".join(c if c.isprintable() else "?" for c in shorten(text)).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def make_axes(columns: int, height: float = 4.0) -> tuple:
    """A figure for SVG, and its axes side by side. height: inches."""
    plt = import_pyplot()
    plt.rcParams["svg.fonttype"] = "none"   # text stays text: small, and searchable
    plt.rcParams["svg.hashsalt"] = "gpt"    # the same picture is the same file
    figure, axes = plt.subplots(1, columns, figsize=(12, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def to_svg(figure) -> str:
    plt = import_pyplot()
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()
