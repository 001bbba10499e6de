"""Pages, tables and pictures of results."""
import re

from experiments.plots import draw_front, draw_lines, draw_scaling, front_of, validations
from experiments.report import Figure, Table, markdown, write_page


def rows(losses: list[float]) -> list[dict]:
    return [{"step": i, "tokens": 1e6 * i, "seconds": 10.0 * i, "flops": 1e12 * i, "val_loss": loss}
            for i, loss in enumerate(losses)]


def test_a_table_as_markdown():
    assert markdown(Table(("a", "b"), [("1", "x|y"), ("2", "")])) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| 2 |  |"


def test_what_people_write_is_not_taken_for_tags(tmp_path):
    write_page(tmp_path / "p.html", "a < b", [("p", "<script>alert(1)</script>"), ("ul", ["1 & 2"]), ("code", "x <y>"),
                                              Table(("<h>",), [("<td>",)]), Figure("<?xml?><svg></svg>", "a")])
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "<y>" not in text and "<h>" not in text and "a &lt; b" in text and "1 &amp; 2" in text
    assert "<?xml" not in text and '<figure id="a"><svg></svg></figure>' in text


def test_curves_show_every_name_and_are_the_same_twice():
    curves = {"one": [rows([8.0, 5.0, 4.0]), rows([8.0, 5.2, 4.1])], "two": [rows([8.0, 5.5, 4.5])]}
    svg = draw_lines(curves)
    assert svg == draw_lines(curves)
    for words in ("one", "two", "million tokens", "Loss against FLOPs", "seconds of training"):
        assert words in svg


def test_runs_that_end_at_different_steps_are_averaged_step_by_step():
    a, b = rows([8.0, 5.0, 4.0, 3.0]), rows([8.0, 5.2, 4.2])
    assert [[row["val_loss"] for row in at] for at in validations([a, b])] == [[5.0, 5.2], [3.0, 4.2]]


def test_the_front_has_what_none_beats_in_both():
    assert front_of([(10, 1.6), (20, 1.7), (30, 1.5), (30, 1.55), (10, 1.6)]) == [(10, 1.6), (30, 1.5)]
    ends = {name: {"bpb": bpb, "bpb_margin": margin, "seconds": 10 * bpb, "peak_memory": 2**20}
            for name, bpb, margin in (("one", 1.6, 0.01), ("two", 1.7, float("inf")))}
    svg = draw_front(ends)
    for words in ("Pareto front", "one", "two", "peak memory, MiB"):
        assert words in svg


def test_scaling_is_drawn_with_its_exponent():
    assert "a: FLOPs^-0.0500" in draw_scaling({"a": ([(1e15, 2.0), (1e16, 1.8)], 11.2, 0.05)})


def test_losses_that_lie_close_are_told_apart_on_a_logarithmic_axis():
    svg = draw_scaling({"a": ([(1e12, 1.579), (2e12, 1.571)], 1.937, 0.0074)})
    labels = re.findall(r">(1\.5\d*)</text>", svg)
    assert len(labels) > 1 and len(set(labels)) == len(labels)
