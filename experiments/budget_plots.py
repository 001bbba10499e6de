"""Pictures of accuracy against what it costs at inference, as SVG panels for experiments/report.py."""
import itertools

from experiments.plots import COLORS, add_legend, make_panels, plot_points, set_log_ticks, to_svgs, wrap_label

# key of a row -> label of the axis, what one unit of it is
COSTS = {"tokens": ("tokens generated for a question", 1), "flops": ("MFLOP for a question", 1e6),
         "seconds": ("milliseconds for a question", 1e-3)}
MARKERS = "os^Dv<>Pd*X"


def draw_budgets(rows: list[dict], whose: str = "") -> list[str]:
    """Accuracy against each kind of cost that the rows have, a curve for each way to spend. rows: of one model, see
    budget.budget_rows; whose: what its titles end with. Returns panels."""
    ways, costs = {}, {name: axis for name, axis in COSTS.items() if name in rows[0]}
    for row in rows:
        ways.setdefault(row["way"], []).append(row)
    axes = make_panels(len(costs))
    for axis, (name, (label, unit)) in zip(axes, costs.items()):
        for i, ((way, own), color) in enumerate(zip(ways.items(), itertools.cycle(COLORS))):
            points = sorted((row[name] / unit, row["accuracy"], row["accuracy_margin"]) for row in own if row[name] > 0)
            if not points:
                continue
            plot_points(axis, [point[:2] for point in points], color=color, marker=MARKERS[i % len(MARKERS)], markersize=3,
                        label=wrap_label(way))
            axis.fill_between(*zip(*((x, y - margin, y + margin) for x, y, margin in points)), color=color, alpha=0.08,
                              linewidth=0)
        axis.set(xlabel=label, ylabel="accuracy", xscale="log", ylim=(-0.05, 1.05),
                 title=f"Accuracy against {name.replace('flops', 'FLOPs')}{whose}")
        set_log_ticks(axis.xaxis)
        add_legend(axis)
    return to_svgs(axes)
