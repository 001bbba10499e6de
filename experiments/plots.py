"""Pictures of runs."""
import io
import math
import statistics
from pathlib import Path

from runtime.files import atomic_write

COLORS = ["#3366aa", "#cc6633", "#339966", "#aa3377", "#888888", "#bb9922", "#4499bb", "#774488", "#995544", "#668833"]


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


LABELS = {"tokens": "million tokens", "seconds": "seconds of training, without compiling, validation and writing"}


def draw_curves(runs: dict[str, list[dict]], path: Path):
    """Writes a PNG: loss (training faint, validation strong) and bits per byte of each run, against tokens and seconds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for name, rows in runs.items():
        rows = [row for row in rows if {"tokens", "seconds"} <= row.keys()]
        for (loss_axis, bpb_axis), over, unit in zip(axes.T, ("tokens", "seconds"), (1e6, 1)):
            train = [(row[over] / unit, row["train_loss"]) for row in rows if "train_loss" in row]
            val = [(row[over] / unit, row["val_loss"], row.get("val_bpb", math.nan)) for row in rows if "val_loss" in row]
            color = loss_axis.plot([x for x, _ in train], [y for _, y in train], linewidth=0.7, alpha=0.4)[0].get_color()
            loss_axis.plot([x for x, _, _ in val], [y for _, y, _ in val], "o-", markersize=3, color=color, label=name)
            last = f": {val[-1][2]:.4f} after {rows[-1]['tokens'] / 1e6:,.2f} M tokens, {rows[-1]['seconds']:,.0f} s"
            bpb_axis.plot([x for x, _, _ in val], [y for _, _, y in val], "o-", markersize=3, color=color,
                          label=name + (last if val else ""))
            loss_axis.set(xlabel=LABELS[over], ylabel="nats/token", title=f"Loss against {over}")
            bpb_axis.set(xlabel=LABELS[over], ylabel="bits/byte", title=f"Bits per byte against {over}")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
