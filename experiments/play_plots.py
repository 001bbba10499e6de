"""Pictures of self-play, as SVG panels for experiments/report.py."""
from contextlib import suppress

from experiments.plots import COLORS, add_legend, make_panels, plot_points, to_svgs


def draw_play(rows: list[dict]) -> list[str]:
    """How well a model played over a run: right moves and values, lines that it lost, its rating, how much its games differ;
    where cards are hidden, how much it can be exploited. rows: of evaluations. Returns panels."""
    measured = {name for row in rows for name in row}
    panels = [draw for draw, name in (
        (draw_exploitability, "exploitability"), (draw_truth, "optimal_moves"), (draw_lost_lines, "lost_lines_first"),
        (draw_rating, "elo"), (draw_diversity, "entropy")) if name in measured]
    x_name = "games" if any("games" in row for row in rows) else "step"
    axes = make_panels(len(panels))
    for axis, draw in zip(axes, panels):
        draw(axis, [row | {"x": row.get(x_name, 0)} for row in rows])
        axis.set_xlabel(x_name)
        add_legend(axis)
    return to_svgs(axes)


def plot_rows(axis, rows: list[dict], color: int, label: str, value):
    """value(row) -> a number; raises KeyError where the row has none."""
    points = []
    for row in rows:
        with suppress(KeyError):
            points.append((row["x"], value(row)))
    if points:
        plot_points(axis, points, color=COLORS[color], marker="o", markersize=3, label=label)


def draw_truth(axis, rows: list[dict]):
    plot_rows(axis, rows, 0, "optimal moves", lambda row: row["optimal_moves"])
    plot_rows(axis, rows, 1, "right values", lambda row: row["value_accuracy"])
    plot_rows(axis, rows, 2, "score against perfect play", lambda row: row["perfect_score"])
    axis.set(ylabel="fraction", title="Against exact truth", ylim=(-0.05, 1.05))


def draw_exploitability(axis, rows: list[dict]):
    plot_rows(axis, rows, 0, "of the latest policy", lambda row: row["exploitability"])
    axis.set(ylabel="chips a game", title="Exploitability", yscale="log")


def draw_lost_lines(axis, rows: list[dict]):
    plot_rows(axis, rows, 0, "as first player", lambda row: row["lost_lines_first"] / row["lines_first"])
    plot_rows(axis, rows, 1, "as second player", lambda row: row["lost_lines_second"] / row["lines_second"])
    axis.set(ylabel="fraction", title="Lines that some opponent wins")


def draw_rating(axis, rows: list[dict]):
    x, y, margins = zip(*((row["x"], row["elo"], row["elo_margin"]) for row in rows if "elo" in row))
    axis.errorbar(x, y, yerr=margins, color=COLORS[0], marker="o", markersize=3, capsize=3, label="with its 95 % interval")
    axis.set(ylabel="Elo", title="Rating among its own earlier models")


def draw_diversity(axis, rows: list[dict]):
    plot_rows(axis, rows, 0, "entropy of moves, nats", lambda row: row["entropy"])
    plot_rows(axis, rows, 1, "games that begin alike and then differ, fraction", lambda row: row["distinct_games"])
    plot_rows(axis, rows, 2, "distinct first four moves, fraction", lambda row: row["distinct_openings"])
    axis.set(title="Diversity")
