"""Pictures of reinforcement learning on answers that can be checked, from rows of metrics.jsonl.

    panels = draw_answers(read_rows(path))       SVGs for a page
"""
from experiments.plots import COLORS, add_legend, make_panels, plot_points, to_svgs

# title of a panel, label of its y axis, its curves: key of a row -> label
PANELS = (
    ("Right answers", "fraction", {"exact_match": "held out, greedy", "pass_at_1": "held out, pass@1",
                                   "pass_at_k": "held out, pass@k", "reward": "rollouts, mean reward"}),
    ("Length of an answer", "tokens", {"mean_length": "held out", "answer_length": "rollouts"}),
    ("KL divergence from the start", "nats/answer", {"kl": "held out"}),
    ("What there is to learn from", "fraction", {"no_signal": "groups whose rewards are all equal",
                                                 "unanimous": "held-out questions with one answer",
                                                 "valid": "valid proposals", "distinct_proposals": "distinct proposals",
                                                 "learnability": "reward of proposals"}))


def draw_answers(rows: list[dict]) -> list[str]:
    """Each number that the evaluations measured, against the steps. Returns panels."""
    axes = make_panels(len(PANELS))
    for axis, (title, unit, names) in zip(axes, PANELS):
        for (name, label), color in zip(names.items(), COLORS):
            if points := [(row["step"], row[name]) for row in rows if name in row]:
                plot_points(axis, points, color=color, marker="o", markersize=3, label=label)
        axis.set(xlabel="step", ylabel=unit, title=title)
        if unit == "fraction":
            axis.set_ylim(-0.05, 1.05)
        if axis.lines:
            add_legend(axis)
    return to_svgs(axes)


def draw_thinking(rows: list[dict]) -> list[str]:
    """Right answers at each amount of thought, against the steps. rows: of validations of think.py. Returns one panel."""
    axis, = make_panels(1)
    names = [name for name in rows[0] if name.startswith("exact_match/")]
    for name, color in zip(names, COLORS):
        plot_points(axis, [(row["step"], row[name]) for row in rows], color=color, marker="o", markersize=3,
                    label=name.partition("/")[2])
    axis.set(xlabel="step", ylabel="fraction", title="Right answers to held-out problems", ylim=(-0.05, 1.05))
    add_legend(axis)
    return to_svgs([axis])
