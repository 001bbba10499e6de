"""Pictures of what budgets and sizes do: the way to a target loss, IsoFLOP curves, repeated text."""
import math
import statistics

from experiments.plots import COLORS, INK, add_legend, make_panels, set_log_ticks, to_svgs, wrap_label
from experiments.stats import power_law


def draw_to_target(curves: dict[str, list[tuple[float, float, list[float]]]], target: float, unit: str) -> list[str]:
    """The loss at the end of runs against their tokens and seconds, the mean with a band from the lowest to the highest
    seed, and the target. curves: arm -> (tokens, seconds, loss of each seed) of each budget. Returns panels."""
    axes = make_panels(2)
    for axis, column, scale, label in zip(axes, (0, 1), (1e6, 1), ("million tokens", "seconds")):
        for (name, points), color in zip(curves.items(), COLORS * 9):
            x = [point[column] / scale for point in points]
            means, lows, highs = ([f(point[2]) for point in points] for f in (statistics.mean, min, max))
            if not points or math.isnan(x[0]):
                continue
            axis.fill_between(x, lows, highs, color=color, alpha=0.2, linewidth=0)
            axis.plot(x, means, ".-", color=color, label=wrap_label(name), linewidth=1.3)
        axis.axhline(target, color=INK, linewidth=1, linestyle="--", label=f"target: {target:g}")
        axis.set(xscale="log", xlabel=f"{label}, of a whole run", ylabel=f"validation, {unit}",
                 title=f"Loss at the end of runs against {label.split()[-1]}\n(lower is better)")
        set_log_ticks(axis.xaxis)
        add_legend(axis)
    return to_svgs(axes)


def draw_isoflop(points: dict[str, list[tuple[list[tuple[int, float]], float]]],
                 lowest: dict[str, list[tuple[float, float, float]]]) -> list[str]:
    """Bits per byte against parameters, a curve for each arm and budget, the larger the darker; the lowest ones against
    FLOPs, with power laws; and the parameters that have them. points: arm -> ((parameters, bits per byte), FLOPs) of each
    budget. lowest: arm -> (FLOPs, bits per byte, parameters), of budgets that have one. Returns panels."""
    axes = make_panels(3)
    budgets = sorted({flops for own in points.values() for _, flops in own})
    for (name, own), color in zip(points.items(), COLORS * 9):
        for curve, flops in own:
            strength = 0.35 + 0.65 * (budgets.index(flops) + 1) / len(budgets)
            axes[0].plot(*zip(*curve), ".-", color=color, alpha=strength, linewidth=1.2,
                         label=f"{wrap_label(name)}, {flops:.3g} FLOPs")
        flops, bpb, parameters = zip(*lowest[name]) if lowest[name] else ((), (), ())
        axes[0].plot(parameters, bpb, "*", color=color, markersize=9)
        axes[1].plot(flops, bpb, "*", color=color, markersize=9, label=wrap_label(name))
        axes[2].plot(flops, parameters, "*-", color=color, markersize=9, label=wrap_label(name))
        if len(flops) > 1:
            a, b = power_law(flops, bpb)
            axes[1].plot(flops, [a * x ** -b for x in flops], "-", color=color, linewidth=1.2)
    axes[0].set(xscale="log", xlabel="parameters", ylabel="bits per byte",
                title="Bits per byte for equal FLOPs\n(star: the lowest; lower is better)")
    axes[1].set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="bits per byte",
                title="Lowest bits per byte\n(lower is better)")
    axes[2].set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="parameters",
                title="Parameters of the lowest bits per byte")
    for axis, column in zip(axes[1:], (1, 2)):
        if len({f"{row[column]:.3g}" for own in lowest.values() for row in own}) > 1:
            set_log_ticks(axis.yaxis)
    for axis in axes:
        add_legend(axis)
    return to_svgs(axes)


def draw_epochs(curves: dict[str, list[dict]]) -> list[str]:
    """Bits per byte, and the cost of repetition, against epochs. curves: name -> rows of epochs.epoch_rows that have "bpb",
    rising. Returns panels."""
    axes = make_panels(2)
    for (name, rows), color in zip(curves.items(), COLORS * 9):
        for axis, column in zip(axes, ("bpb", "cost")):
            shown = [row for row in rows if column in row]
            margins = [row[f"{column}_margin"] if math.isfinite(row[f"{column}_margin"]) else 0 for row in shown]
            axis.errorbar([row["epochs"] for row in shown], [row[column] for row in shown], yerr=margins, fmt="o-",
                          color=color, capsize=3, linewidth=1.2, label=wrap_label(name))
    epochs = sorted({row["epochs"] for rows in curves.values() for row in rows})
    for axis, title in zip(axes, ("Bits per byte", "Cost of repetition")):
        axis.set(xscale="log", xlabel="epochs of the same budget", ylabel="bits per byte",
                 title=f"{title} against epochs\n(lower is better)")
        axis.set_xticks(epochs, [f"{n:g}" for n in epochs])
        axis.minorticks_off()
        add_legend(axis)
    return to_svgs(axes)
