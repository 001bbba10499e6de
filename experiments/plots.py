"""Pictures of runs and of prepared text, by matplotlib, which is imported when the first one is drawn.

    draw_curves({"gpt": read_rows(path)}, Path("curves.png"))         the curves of runs, as train.py --plot draws them
    panels = draw_mean_curves({"mlp=gelu": [rows, rows]})             mean and range over the runs of each name

Rows are those of metrics.jsonl. Pictures for pages are lists of panels, each an SVG of its own, so that a page can place
them side by side or one below the other. They have no background, and their text has the color of the page's.
"""
import io
import itertools
import math
import re
import statistics
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.analysis import BPB, Metric
from runtime.config import shorten
from runtime.files import atomic_write

# Readable on white and on a dark page: each has a contrast of at least 3 to both.
COLORS = ["#3b7dd8", "#d9662b", "#2e9e6b", "#c2559a", "#808892", "#a8820f", "#2f94b8", "#9067c6", "#b0704f", "#6f9430"]
INK = "#1c2430"       # text, axes and grid; in an SVG the text color of the page around it
DARK_INK = "#d7dde5"  # of an SVG shown by itself where the reader prefers dark pages
SVG_STYLE = (f"<style>svg {{ color: {INK}; color-scheme: light dark }} "
             f"@media (prefers-color-scheme: dark) {{ svg {{ color: {DARK_INK} }} }}</style>")
PANEL_INCHES = 5.0, 3.75
# unit, label of the axis, words for the title
X_AXES = {"tokens": (1e6, "million tokens", "tokens"), "flops": (1e12, "TFLOP of matrix products", "FLOPs"),
          "bytes": (1e6, "MB of text", "bytes of text"), "games": (1, "games", "games"),
          "seconds": (1, "seconds of training", "seconds")}
WARMUP = 0.1          # the part of a run, at its start, whose values may leave the picture
SAME_RATIO = 0.01     # two runs whose bytes per token differ by more have different vocabularies, or other validation text


# -- training curves of a few runs ------------------------------------------------------------------------------------

def draw_curves(runs: dict[str, list[dict]], path: Path):
    """Writes a PNG: loss (training thin, validation with dots) and bits per byte of each run, against tokens and seconds.
    Runs of different vocabularies share no axis in nats or tokens: they are drawn in bits per byte, against bytes of text.
    runs: name -> rows."""
    plt = import_pyplot()
    runs = {name: add_bytes([row for row in rows if {"tokens", "seconds"} <= row.keys()]) for name, rows in runs.items()}
    is_same = have_same_vocabulary(runs.values())
    quantities = (("loss", "nats/token", "Loss"), ("bpb", "bits/byte", "Bits per byte"))[0 if is_same else 1:]
    x_names = "tokens" if is_same else "bytes", "seconds"
    figure, axes = plt.subplots(len(quantities), 2, figsize=(12, 4 * len(quantities)), layout="constrained", squeeze=False)
    for axis, ((name, unit, title), x_name) in zip(axes.flat, itertools.product(quantities, x_names)):
        draw_runs(axis, runs, x_name, name, with_training=(name == "loss") == is_same)
        estimated = ", estimated by the bytes per token of the validation text" * (x_name == "bytes")
        axis.set(xlabel=X_AXES[x_name][1] + estimated, ylabel=unit, title=f"{title} against {X_AXES[x_name][2]}")
    if note := validation_note(runs):
        figure.suptitle(textwrap.fill(escape(note), 150), fontsize=9)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def draw_runs(axis, runs: dict[str, list[dict]], x_name: str, name: str, with_training: bool):
    """One panel of draw_curves. name: "loss" or "bpb", as in the rows' train_loss and val_bpb."""
    curves = []
    for (label, rows), color in zip(runs.items(), COLORS * 9):
        train = points(rows, x_name, f"train_{name}") if with_training else []
        val = points(rows, x_name, f"val_{name}")
        label = literal(label)
        if val and name == "bpb":
            label += f": {val[-1][1]:.4f} after {rows[-1]['tokens'] / 1e6:,.2f} M tokens, {rows[-1]['seconds']:,.0f} s"
        plot_points(axis, train, color=color, linewidth=0.7, alpha=0.6)
        plot_points(axis, val, marker="o", markersize=3, color=color, label=label)
        curves += [train, val]
    focus_y(axis, curves)
    add_legend(axis, "thin: training, with dots: validation" if with_training else None)


def points(rows: list[dict], x_name: str, y_name: str) -> list[tuple[float, float]]:
    """(x, y) of the rows that have both, in the units of X_AXES."""
    unit = X_AXES[x_name][0]
    return [(row[x_name] / unit, row[y_name]) for row in rows if x_name in row and y_name in row]


def plot_points(axis, xy: Sequence[tuple[float, float]], **style):
    axis.plot([x for x, _ in xy], [y for _, y in xy], **style)


def focus_y(axis, curves: Iterable[Sequence[tuple[float, float]]], shown: Iterable[float] = ()):
    """Sets the limits of the y axis to the values after each curve's warm-up, so that the high ones before it do not flatten
    the rest. shown: values that are inside in any case."""
    curves = [curve for curve in curves if curve]
    late = [y for curve in curves for x, y in curve if x >= WARMUP * curve[-1][0]] + list(shown)
    if not late:
        return
    low, high = min([y for curve in curves for _, y in curve] + late), max(late)
    if axis.get_yscale() == "log" and low > 0:
        margin = (high / low) ** 0.05
        axis.set_ylim(low / margin / 1.001, high * margin * 1.001)
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axis.set_ylim(low - margin, high + margin)


# -- which runs compare -----------------------------------------------------------------------------------------------

def validation_counts(rows: list[dict]) -> tuple[int, int] | None:
    """Bytes and tokens of the text that a run was validated on last; None in rows of earlier versions."""
    return next(((row["val_bytes"], row["val_tokens"]) for row in reversed(rows)
                 if row.get("val_tokens") and "val_bytes" in row), None)


def bytes_per_token(rows: list[dict]) -> float:
    """Of the text that a run was validated on; NaN where that is unknown. Where its tokens were not counted it is estimated
    by the loss in both units, of which bits per byte leave out the separators between documents."""
    if counts := validation_counts(rows):
        return counts[0] / counts[1]
    ratios = [row["val_loss"] / row["val_bpb"] / math.log(2) for row in rows if row.get("val_loss") and row.get("val_bpb")]
    return statistics.median(ratios) if ratios else math.nan


def add_bytes(rows: list[dict]) -> list[dict]:
    """The rows with `bytes`, of the text trained on, and `train_bpb`, as far as they follow from `bytes_per_token`; with
    their own where they have them."""
    if math.isnan(ratio := bytes_per_token(rows)):
        return rows
    return [({"bytes": row["tokens"] * ratio} if "tokens" in row else {}) | (
        {"train_bpb": row["train_loss"] / ratio / math.log(2)} if "train_loss" in row else {}) | row for row in rows]


def have_same_vocabulary(runs: Iterable[list[dict]]) -> bool:
    """Whether the runs' nats per token may be compared, as far as their rows tell."""
    runs = list(runs)
    counts = [validation_counts(rows) for rows in runs]
    if None not in counts and len({n_bytes for n_bytes, _ in counts}) == 1:
        return len({n_tokens for _, n_tokens in counts}) == 1
    ratios = [ratio for rows in runs if not math.isnan(ratio := bytes_per_token(rows))]
    return not ratios or max(ratios) <= min(ratios) * (1 + SAME_RATIO)


def validation_note(runs: dict[str, list[dict]]) -> str:
    """What to say of runs that were not validated on the same text, going by its bytes: a validation covers whole documents,
    so other ones hardly ever have as many. "" where nothing tells that the text differs."""
    covered = {name: next((row.get("val_bytes") for row in reversed(rows) if "val_loss" in row), None)
               for name, rows in runs.items()}
    if len(set(covered.values())) > 1:
        texts = "; ".join(f"{shorten(name)}: {f'{n:,.0f} bytes' if n else 'an unknown number of bytes'}"
                          for name, n in covered.items())
        return f"Not validated on the same text, so the values do not compare exactly ({texts})."
    if not have_same_vocabulary(runs.values()) and None in covered.values():
        return ("These runs may not have been validated on the same text: their vocabularies differ, and the metrics do not "
                "say which bytes were covered.")
    return ""


# -- comparisons, for pages -------------------------------------------------------------------------------------------

def draw_mean_curves(curves: dict[str, list[list[dict]]], by_bytes: bool | None = None, metric: Metric = BPB) -> list[str]:
    """The metric at the validations of each name's runs, the mean with a band from the lowest to the highest, against tokens
    or games, FLOPs and seconds. curves: name -> rows of each run. by_bytes: against bytes of text in place of tokens, for
    names whose tokens differ (default: as the rows tell). Returns panels."""
    curves = {name: [add_bytes(rows) for rows in runs] for name, runs in curves.items()}
    if by_bytes is None:
        by_bytes = not have_same_vocabulary(rows for runs in curves.values() for rows in runs)
    x_names = "games" if metric.is_of_games else "bytes" if by_bytes else "tokens", "flops", "seconds"
    axes = make_panels(len(x_names))
    for axis, x_name in zip(axes, x_names):
        drawn = []
        for (name, runs), color in zip(curves.items(), COLORS * 9):
            evaluations = align_evaluations(runs, metric.field)
            x = [statistics.mean(row[x_name] for row in rows) / X_AXES[x_name][0] for rows in evaluations]
            means, lows, highs = ([f(metric.of(row) for row in rows) for rows in evaluations]
                                  for f in (statistics.mean, min, max))
            axis.fill_between(x, lows, highs, color=color, alpha=0.2, linewidth=0)
            axis.plot(x, means, ".-", color=color, label=wrap_label(name), linewidth=1.3)
            drawn += [list(zip(x, lows)), list(zip(x, highs))]
        focus_y(axis, drawn)
        without_play = ", without those of play" * (metric.is_of_games and x_name == "flops")
        axis.set(xlabel=X_AXES[x_name][1] + without_play, ylabel=f"validation, {metric.label}",
                 title=f"{metric.label.capitalize()} against {X_AXES[x_name][2]}")
        add_legend(axis)
    return to_svgs(axes)


def draw_finetuning(rows: list[dict], held_out: str = "held-out answers") -> list[str]:
    """A finetuning from before its first step to its end: the loss of `held_out`, beside that of training, and exact match
    where it was measured, with the step of the lowest loss marked. Returns panels."""
    val = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    train = [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]
    matches = [(row["step"], row["exact_match"]) for row in rows if "exact_match" in row]
    best_step, best_loss = min(val, key=lambda point: point[1])
    axes = make_panels(1 + bool(matches))
    plot_points(axes[0], train, color=COLORS[0], linewidth=0.7, alpha=0.6, label="training")
    plot_points(axes[0], val, color=COLORS[0], marker="o", markersize=3, label=held_out)
    plot_points(axes[0], [(best_step, best_loss)], color=COLORS[1], linestyle="", marker="o", markersize=9, fillstyle="none",
                label=f"best: step {best_step:,}, {best_loss:.4f}")
    if best_loss > 0 and val[0][1] / best_loss > 5:  # from 9 to 0.06 nats: a linear axis would show one step
        axes[0].set_yscale("log")
    focus_y(axes[0], [train, val], shown=[loss for _, loss in val])
    if axes[0].get_yscale() == "log":
        set_log_ticks(axes[0].yaxis)
    axes[0].set(xlabel="step", ylabel="nats/token", title=f"Loss of {held_out}")
    if matches:
        plot_points(axes[1], matches, color=COLORS[0], marker="o", markersize=3, label="held-out answers")
        axes[1].axvline(best_step, color=COLORS[1], linewidth=1, linestyle="--", label=f"lowest loss: step {best_step:,}")
        axes[1].set(xlabel="step", ylabel="fraction", title="Exact match of held-out answers", ylim=(-0.05, 1.05))
    for axis in axes:
        add_legend(axis)
    return to_svgs(axes)


def align_evaluations(runs: list[list[dict]], name: str = "val_loss") -> list[list[dict]]:
    """For every step that all runs were validated at, their rows; last their final rows, whose steps may differ. name: of a
    number that rows of validations have."""
    by_step = [{row["step"]: row for row in rows if name in row} for rows in runs]
    shared = set.intersection(*(set(rows) - {max(rows, default=0)} for rows in by_step))
    final = [[rows[max(rows)] for rows in by_step]] if all(by_step) else []
    return [[rows[step] for rows in by_step] for step in sorted(shared)] + final


def draw_pareto_fronts(results: dict[str, dict], metric: Metric = BPB) -> list[str]:
    """The metric of each name against seconds and against memory, with the Pareto fronts. results: name -> the columns of
    analysis.table_rows, of which the metric's, seconds and peak_memory (bytes) are read. Returns panels."""
    axes = make_panels(2)
    for axis, x_name, unit, label in zip(axes, ("seconds", "peak_memory"), (1, 2**20),
                                         ("seconds of training", "peak memory, MiB")):
        coordinates = {name: (result[x_name] / unit, result[metric.name]) for name, result in results.items()}
        axis.plot(*zip(*pareto_front(list(coordinates.values()))), "--", color=COLORS[4], linewidth=1, zorder=1,
                  label="Pareto front")
        for (name, (x, y)), color in zip(coordinates.items(), COLORS * 9):
            margin = results[name][f"{metric.name}_margin"]
            axis.errorbar(x, y, yerr=margin if math.isfinite(margin) else None, fmt="o", color=color, capsize=3,
                          label=wrap_label(name))
        axis.set(xlabel=label, ylabel=metric.label,
                 title=f"{metric.label.capitalize()} against {label.split(',')[0]}\n(lower left is better)")
        add_legend(axis)
    return to_svgs(axes)


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in one number without losing in the other; lower is better in both.
    [(1, 3), (2, 4), (3, 2)] -> [(1, 3), (3, 2)]"""
    return sorted({p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)})


def draw_scaling(fits: dict[str, tuple]) -> list[str]:
    """Bits per byte against the FLOPs of a run, on logarithmic axes, with each name's power law. fits: name -> (points, a,
    b) of y = a x^-b. Returns panels, of which there is one."""
    axis, = make_panels(1)
    for (name, (measured, a, b)), color in zip(fits.items(), COLORS * 9):
        x = [x for x, _ in measured]
        axis.plot(x, [y for _, y in measured], "o", color=color)
        axis.plot(x, [a * value ** -b for value in x], "-", color=color, linewidth=1.2,
                  label=f"{wrap_label(name)}: FLOPs^-{b:.4f}")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs of a run, matrix products and element-wise", ylabel="bits per byte",
             title="Bits per byte against FLOPs")
    set_log_ticks(axis.yaxis)
    add_legend(axis)
    return to_svgs([axis])


def draw_by_vocabulary(series: dict[str, list[tuple[int, float, float]]]) -> list[str]:
    """Bits per byte against the size of the vocabulary, a line for each name. series: name -> (vocab_size, bits per byte,
    half-width of its interval or infinity). Returns panels, of which there is one."""
    axis, = make_panels(1)
    for (name, measured), color in zip(series.items(), COLORS * 9):
        x, y, margins = zip(*sorted(measured))
        axis.errorbar(x, y, yerr=[margin if math.isfinite(margin) else 0 for margin in margins], fmt="o-", color=color,
                      capsize=3, linewidth=1.2, label=wrap_label(name))
    sizes = sorted({size for measured in series.values() for size, _, _ in measured})
    axis.set(xscale="log", xlabel="tokens in the vocabulary", ylabel="bits per byte",
             title="Bits per byte against the size of the vocabulary\n(lower is better)")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    add_legend(axis)
    return to_svgs([axis])


# -- adapting at inference time ---------------------------------------------------------------------------------------

def draw_by_position(curves: dict[str, list[tuple[float, float]]], gains: dict[str, list[float]]) -> list[str]:
    """Bits per byte against the position in a document, a curve for each way of reading; and the differences between two
    ways, a group of points for each part of a document, with their mean. curves: name -> (tokens, bits per byte). gains:
    name of the part -> a difference for each document. Returns panels."""
    axes = make_panels(2)
    for (name, curve), color in zip(curves.items(), COLORS * 9):
        plot_points(axes[0], curve, marker=".", color=color, linewidth=1.3, label=wrap_label(name))
    axes[0].set(xlabel="position in the document, tokens", ylabel="bits per byte",
                title="Bits per byte by position\n(lower is better)")
    add_legend(axes[0])
    for i, values in enumerate(gains.values()):
        plot_group(axes[1], i, values, COLORS[0], COLORS[1])
    axes[1].axhline(0, color=INK, linewidth=0.8)
    axes[1].set_xticks(range(len(gains)), list(gains))
    axes[1].set(ylabel="adapted minus static, bits per byte",
                title="Difference by part of the document\n(a point: a document; a line: their mean)")
    return to_svgs(axes)


def plot_group(axis, x: float, values: list[float], color: str, mean_color: str):
    """The values as points beside each other around `x`, and a line at their mean."""
    spread = [x + 0.3 * ((k * 0.618) % 1 - 0.5) for k in range(len(values))]
    axis.plot(spread, values, ".", color=color, alpha=0.5, markersize=4)
    axis.plot([x - 0.25, x + 0.25], [statistics.mean(values)] * 2, color=mean_color, linewidth=2)


def draw_adapting_arms(curves: dict[str, dict[str, list[tuple[float, float]]]],
                       gains: dict[str, tuple[list[float], float]]) -> list[str]:
    """Bits per byte against the position in a document, two curves of one color for each arm; and the gains of each arm.
    curves: arm -> "static" and "adapted" -> (tokens, bits per byte). gains: arm -> (a gain for each document, half-width of
    the interval of their mean over seeds, or infinity). Returns panels."""
    axes = make_panels(2)
    for (arm, by_reading), color in zip(curves.items(), COLORS * 9):
        for reading, style in (("static", ":"), ("adapted", "-")):
            plot_points(axes[0], by_reading[reading], linestyle=style, color=color, linewidth=1.3,
                        label=wrap_label(arm) if reading == "adapted" else None)
    axes[0].set(xlabel="position in the document, tokens", ylabel="bits per byte",
                title="Bits per byte by position\n(lower is better)")
    add_legend(axes[0], "line: adapted, dotted: static")
    for i, ((values, margin), color) in enumerate(zip(gains.values(), COLORS * 9)):
        plot_group(axes[1], i, values, color, color)
        if math.isfinite(margin):
            axes[1].errorbar(i, statistics.mean(values), yerr=margin, color=INK, capsize=4, linewidth=1)
    axes[1].axhline(0, color=INK, linewidth=0.8)
    axes[1].set_xticks(range(len(gains)), [wrap_label(arm, 60 // len(gains)) for arm in gains], fontsize=8)
    axes[1].set(ylabel="static minus adapted, bits per byte",
                title="Gain (higher is better)\n(a point: a document; bar: 95 % over seeds)")
    return to_svgs(axes)


# -- tokenizers -------------------------------------------------------------------------------------------------------

def draw_compression(results: dict[str, dict[str, float]]) -> list[str]:
    """Bars of bytes per token for each kind of text, one for each tokenizer. results: name of a tokenizer -> kind of text ->
    bytes per token; the kinds of the first are drawn. Returns panels, of which there is one."""
    kinds, thickness = list(next(iter(results.values()))), 0.8 / len(results)
    axis, = make_panels(1, height=2 + (0.2 + 0.15 * len(kinds)) * len(results))
    for i, ((name, values), color) in enumerate(zip(results.items(), COLORS * 9)):
        y = [k + (i - (len(results) - 1) / 2) * thickness for k in range(len(kinds))]
        axis.barh(y, [values[kind] for kind in kinds], thickness * 0.9, color=color, label=wrap_label(name))
    axis.set_yticks(range(len(kinds)), [wrap_label(kind, 22) for kind in kinds])
    axis.invert_yaxis()
    axis.set(xlabel="bytes per token", title="Bytes per token (more is better)")
    axis.figure.legend(loc="outside lower center", fontsize=8, frameon=False)  # inside, bars would be behind it
    return to_svgs([axis])


# -- probes -----------------------------------------------------------------------------------------------------------

TASKS_PER_ROW = 6  # of a matrix of accuracies


def draw_accuracy_matrix(arms: list[str], columns: dict[str, list[str]], labels: dict, accuracies: dict, chance: dict,
                         title: str, folder: Path, name: str):
    """Writes <name>.png and <name>.svg: a row per arm, and per task a box for each of its columns, coloured by accuracy from
    chance level (0) to 1; tasks that do not fit beside the others go below.

    columns: task -> names of its boxes, as many for each. labels, accuracies: (arm, task) -> text above its boxes, and a
    number or None for each. chance: task -> accuracy of guessing.
    """
    plt = import_pyplot()
    tasks = list(columns)
    groups = [tasks[i:i + TASKS_PER_ROW] for i in range(0, len(tasks), TASKS_PER_ROW)]
    long_names = max(0, min(40, max(map(len, arms))) - 20) / 12  # inches beyond the usual
    width = max(5.5, 2.0 + max(1.75, 0.44 * len(columns[tasks[0]])) * len(groups[0])) + long_names
    figure, axes = plt.subplots(len(groups), figsize=(width, 0.7 + (0.9 + 0.95 * len(arms)) * len(groups)),
                                layout="constrained", squeeze=False)
    for axis, group in zip(axes[:, 0], groups):
        image = draw_matrix_row(axis, arms, {task: columns[task] for task in group}, labels, accuracies, chance)
        axis.set_xlim(-0.5, len(columns[tasks[0]]) * len(groups[0]) - 0.5)
    figure.suptitle(title, fontsize=11)
    bar = figure.colorbar(image, ax=axes[:, 0], ticks=[0, 1], pad=0.01, shrink=0.9 / len(groups))
    bar.ax.set_yticklabels(["chance", "all correct"], fontsize=8)
    write_figure(figure, folder, name)


def draw_matrix_row(axis, arms: list[str], columns: dict[str, list[str]], labels: dict, accuracies: dict, chance: dict):
    """Some tasks of `draw_accuracy_matrix`; returns what a colour bar needs."""
    import numpy as np
    tasks, n = list(columns), len(next(iter(columns.values())))
    above_chance = lambda accuracy, task: math.nan if accuracy is None else \
        max(0.0, (accuracy - chance[task]) / (1 - chance[task]))
    shades = np.array([[above_chance(x, task) for task in tasks for x in accuracies[arm, task]] for arm in arms])
    colors = import_pyplot().get_cmap("Blues").with_extremes(bad="#dddddd")
    axis.grid(False)
    axis.set(ylim=(len(arms) - 0.5, -0.5))
    for (y, arm), (i, task) in itertools.product(enumerate(arms), enumerate(tasks)):
        boxes = shades[y:y + 1, n * i:n * (i + 1)]  # with a gap to those of the next task and arm
        image = axis.pcolormesh(np.linspace(n * i - 0.47, n * (i + 1) - 0.53, n + 1), [y - 0.48, y + 0.48],
                                np.ma.masked_invalid(boxes), cmap=colors, vmin=0, vmax=1, edgecolors="face")
        axis.text(n * i + (n - 1) / 2, y - 0.2, labels[arm, task], ha="center", va="center", fontsize=8.5, color="black",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 2, "alpha": 0.85})
        for k, accuracy in enumerate(accuracies[arm, task]):
            axis.text(n * i + k, y + 0.27, "-" if accuracy is None else f"{accuracy:.2f}", ha="center", va="center",
                      fontsize=9, color="white" if shades[y, n * i + k] > 0.6 else "black")
    label_matrix(axis, arms, columns)
    return image


def draw_by_state(points: dict[str, dict[str, list[tuple[int, float]]]], folder: Path, name: str):
    """Writes <name>.svg: a panel for each task, accuracy against the bytes that a model remembers. points: task -> arm ->
    (bytes, accuracy) of each seed."""
    plt = import_pyplot()
    n_columns = min(4, len(points))
    n_rows = -(-len(points) // n_columns)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=(0.5 + 2.9 * n_columns, 0.9 + 2.4 * n_rows),
                                layout="constrained", squeeze=False, sharey=True)
    for axis, (task, arms) in zip(axes.flat, points.items()):
        for i, (arm, found) in enumerate(arms.items()):
            label = wrap_label(arm) if task == next(iter(points)) else None
            axis.plot(*zip(*found), "o", alpha=0.7, color=f"C{i}", label=label)
        axis.set(title=task, xscale="log", ylim=(-0.03, 1.03))
        axis.set_xlabel("bytes of state")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    for axis in axes.flat[len(points):]:
        axis.set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    write_figure(figure, folder, name, ("svg",))


def write_figure(figure, folder: Path, name: str, extensions: tuple[str, ...] = ("png", "svg")):
    """Writes and closes it."""
    for extension in extensions:
        with atomic_write(folder / f"{name}.{extension}") as file:
            if extension == "png":
                figure.savefig(file, format="png", dpi=110)
            else:
                file.write(to_svg(figure).encode())
    import_pyplot().close(figure)


def label_matrix(axis, arms: list[str], columns: dict[str, list[str]]):
    """Names the rows, the tasks and their columns."""
    n = len(next(iter(columns.values())))
    axis.set_yticks(range(len(arms)), [textwrap.fill(literal(arm), 40) for arm in arms])
    axis.set_xticks(range(n * len(columns)), list(itertools.chain(*columns.values())), fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for i, task in enumerate(columns):
        axis.text(n * i + (n - 1) / 2, -0.56, task, ha="center", va="bottom", fontsize=10.5, fontweight="bold")


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
    """matplotlib.pyplot, drawing without a display, text and axes in INK."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box in the picture says it too
    plt.rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
                                       "grid.color"), INK))
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.15, "axes.spines.top": False, "axes.spines.right": False,
                         "svg.fonttype": "none",   # text stays text: small, and searchable
                         "svg.hashsalt": "gpt"})   # the same picture is the same file
    return plt


def literal(name: str) -> str:
    """A name, shortened, as a legend takes it: one that begins with an underscore would be left out."""
    text = escape(shorten(name))
    return f" {text}" if text.startswith("_") else text


def escape(text: str) -> str:
    """`text` as matplotlib draws it without reading anything into it: $ would begin a formula. What cannot be printed, and
    would not be valid SVG, becomes a question mark."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


def wrap_label(name: str, width: int = 44) -> str:
    """A name in the legend of a panel, in lines that fit into it, broken after commas where possible."""
    lines = [""]
    for piece in re.findall("[^,]+,?|,", literal(name)):
        for part in textwrap.wrap(piece, width, drop_whitespace=False):
            if len(lines[-1] + part) > width:
                lines.append("")
            lines[-1] += part
    return "\n".join(line for line in lines if line)


def add_legend(axis, title: str | None = None):
    legend = axis.legend(fontsize=8, frameon=False, title=title, title_fontsize=8, alignment="left")
    legend.set_in_layout(False)  # a long name would leave no room for what is drawn


def set_log_ticks(ticks):
    """Ticks of a logarithmic xaxis or yaxis, whose limits are set: numbers as they are written, and not too many."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    low, high = ticks.get_view_interval()
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(6, steps=(1, 2, 5, 10)))
    ticks.set_major_formatter("{x:.4g}")
    ticks.set_minor_locator(NullLocator())


def make_panels(n: int, height: float = PANEL_INCHES[1]) -> list:
    """The axes of `n` panels, each in a figure of its own. height: inches."""
    plt = import_pyplot()
    return [plt.subplots(figsize=(PANEL_INCHES[0], height), layout="constrained")[1] for _ in range(n)]


def to_svgs(axes: list) -> list[str]:
    """The figures of these axes as SVG; they are closed."""
    plt = import_pyplot()
    panels = [to_svg(axis.figure) for axis in axes]
    for axis in axes:
        plt.close(axis.figure)
    return panels


def to_svg(figure) -> str:
    """An SVG without a background, whose ink is the page's."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    start, element, rest = file.getvalue().replace(INK, "currentColor").partition("<svg")
    tag, end, rest = rest.partition(">")
    return start + element + tag + end + SVG_STYLE + rest
