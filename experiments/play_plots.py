"""Pictures of self-play, as SVG panels for experiments/report.py."""
from experiments.plots import COLORS, add_legend, make_panels, plot_points, to_svgs


def draw_play(rows: list[dict]) -> list[str]:
    """How well a model played over a run: right moves and values, lines that it lost, its rating, how much its games differ.
    rows: of evaluations. Returns panels."""
    x_name = "games" if any("games" in row for row in rows) else "step"
    curve = lambda name: [(row.get(x_name, 0), row[name]) for row in rows if name in row]
    has_lines, has_elo = any("lost_lines_first" in row for row in rows), any("elo" in row for row in rows)
    axes = make_panels(2 + has_lines + has_elo)
    for name, label, color in (("optimal_moves", "optimal moves", 0), ("value_accuracy", "right values", 1),
                               ("perfect_score", "score against perfect play", 2)):
        if curve(name):
            plot_points(axes[0], curve(name), color=COLORS[color], marker="o", markersize=3, label=label)
    axes[0].set(ylabel="fraction", title="Against exact truth", ylim=(-0.05, 1.05))
    if has_lines:
        for name, color in (("first", 0), ("second", 1)):
            shares = [(row.get(x_name, 0), row[f"lost_lines_{name}"] / row[f"lines_{name}"]) for row in rows
                      if f"lost_lines_{name}" in row]
            plot_points(axes[1], shares, color=COLORS[color], marker="o", markersize=3, label=f"as {name} player")
        axes[1].set(ylabel="fraction", title="Lines that some opponent wins")
    if has_elo:
        x, y, margins = zip(*((row.get(x_name, 0), row["elo"], row["elo_margin"]) for row in rows if "elo" in row))
        axes[1 + has_lines].errorbar(x, y, yerr=margins, color=COLORS[0], marker="o", markersize=3, capsize=3,
                                     label="with its 95 % interval")
        axes[1 + has_lines].set(ylabel="Elo", title="Rating among its own earlier models")
    for name, label, color in (("entropy", "entropy of moves, nats", 0), ("distinct_games", "distinct games, fraction", 1),
                               ("distinct_openings", "distinct first four moves, fraction", 2)):
        if curve(name):
            plot_points(axes[-1], curve(name), color=COLORS[color], marker="o", markersize=3, label=label)
    axes[-1].set(title="Diversity")
    for axis in axes:
        axis.set_xlabel(x_name)
        add_legend(axis)
    return to_svgs(axes)
