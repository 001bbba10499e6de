"""experiments/plots.py: pictures of runs, for train.py --plot and for pages, and the statistics of prepared text."""
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.plots import (
    COLORS,
    add_bytes,
    bytes_per_token,
    draw_accuracy_matrix,
    draw_by_vocabulary,
    draw_compression,
    draw_corpus_stats,
    draw_curves,
    draw_finetuning,
    draw_mean_curves,
    draw_pareto_fronts,
    draw_scaling,
    have_same_vocabulary,
    import_pyplot,
    validation_note,
)

pytestmark = pytest.mark.integration  # matplotlib takes 2 s to import


def make_rows(end: int, ids: float = 1.0, **validation) -> list[dict]:
    """A validation at every 5th step. ids: factor of the bytes per token, as of a larger vocabulary."""
    return [{"step": i, "tokens": i * 1000, "seconds": i, "flops": i * 10} | (
        {"train_loss": ids * (6 - i / 10)} if i else {}) | (
        {"val_loss": ids * (6 - i / 10), "val_bpb": 2 - i / 30, **validation} if i % 5 == 0 else {}) for i in range(end + 1)]


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The axes of all figures that were written."""
    plt, axes = import_pyplot(), []
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: axes.extend(figure.axes))
    yield axes
    close("all")


def svg_texts(panels: list[str]) -> list[str]:
    return [element.text or "" for panel in panels
            for element in ElementTree.fromstring(panel).iter("{http://www.w3.org/2000/svg}text")]


# -- the curves of train.py --plot ------------------------------------------------------------------------------------

def test_every_run_has_a_curve_of_its_own_color(tmp_path):
    from PIL import Image
    colors = [tuple(bytes.fromhex(color[1:])) for color in COLORS[:2]]
    pixels = []
    for runs in ({"a": make_rows(20)}, {"a": make_rows(20), "b": make_rows(7)}, {"a": make_rows(0)}):
        draw_curves(runs, tmp_path / "curves.png")
        image = Image.open(tmp_path / "curves.png")
        image.load()
        assert image.format == "PNG" and image.width > 800 and image.height > 500
        counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
        pixels.append([counts.get(color, 0) for color in colors])
    one_run, two_runs, one_row = pixels
    assert one_run[0] > 500 and one_run[1] == 0
    assert two_runs[0] > 500 and two_runs[1] > 200
    assert 0 < one_row[0] < one_run[0]
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_the_values_before_the_warm_up_do_not_flatten_the_rest(tmp_path, drawn):
    """What comes after the warm-up is inside, with a margin."""
    rows = [make_rows(0)[0] | {"val_loss": 80.0, "val_bpb": 40.0}, *make_rows(20)[1:]]
    draw_curves({"a": rows, "b": rows[:12]}, tmp_path / "curves.png")
    draw_mean_curves({"a": [rows, rows], "b": [rows[:12]]})
    assert len(drawn) == 7
    for axis in drawn:
        late = [y for line in axis.lines for x, y in zip(*line.get_data()) if x >= 0.2 * max(line.get_xdata())]
        bottom, top = axis.get_ylim()
        assert bottom < min(late) and max(late) < top < 1.2 * max(late)


def test_training_and_validation_are_told_apart(tmp_path, drawn):
    draw_curves({"a": make_rows(20)}, tmp_path / "curves.png")
    for axis in drawn[:2]:
        assert axis.get_legend().get_title().get_text() == "thin: training, with dots: validation"
        train, val = axis.lines
        assert train.get_linewidth() < val.get_linewidth() and (train.get_marker(), val.get_marker()) == ("None", "o")


@pytest.mark.parametrize("ids", [1.0, 1.25])
def test_runs_of_different_vocabularies_share_no_axis_of_nats_or_tokens(ids, tmp_path, drawn):
    runs = {"a": make_rows(20), "b": make_rows(20, ids)}
    draw_curves(runs, tmp_path / "curves.png")
    units = [(axis.get_xlabel(), axis.get_ylabel()) for axis in drawn]
    panels = svg_texts(draw_mean_curves({name: [rows] for name, rows in runs.items()}))
    is_same = ids == 1.0
    assert ("nats/token" in {y for _, y in units}) == ("million tokens" in {x for x, _ in units}) == is_same
    assert ("million tokens" in panels) == is_same and "nats/token" not in " ".join(panels)
    assert "bits/byte" in {y for _, y in units} and "validation, bits per byte" in panels
    if not is_same:
        trained = [line for line in drawn[0].lines if line.get_marker() == "None"]
        assert [line.get_xdata()[-1] for line in trained] == pytest.approx([0.02 * 3 / np.log(2), 0.025 * 3 / np.log(2)])


@pytest.mark.parametrize("by_bytes", [False, True])
def test_whoever_knows_the_vocabularies_says_so(by_bytes, drawn):
    """And the bytes that a run's rows hold are those that are drawn."""
    rows = [row | {"bytes": 7e6 * row["step"]} for row in make_rows(20)]
    draw_mean_curves({"a": [rows], "b": [rows]}, by_bytes)
    assert drawn[0].get_xlabel() == ("MB of text" if by_bytes else "million tokens")
    assert drawn[0].lines[0].get_xdata()[-1] == (140 if by_bytes else 0.02)


def test_the_training_loss_in_bits_per_byte_by_hand():
    """3 nats/token are 1 bit/byte: a token is 3 / ln 2 bytes."""
    _, row = add_bytes([{"tokens": 0, "val_loss": 3.0, "val_bpb": 1.0}, {"tokens": 10, "train_loss": 1.5}])
    assert row["train_bpb"] == pytest.approx(0.5) and row["bytes"] == pytest.approx(30 / np.log(2))
    assert add_bytes([{"step": 1, "tokens": 9, "train_loss": 1.0}]) == [{"step": 1, "tokens": 9, "train_loss": 1.0}]


@pytest.mark.parametrize("n_tokens, is_same", [(1000, True), (1003, False)])
def test_counted_tokens_say_whether_vocabularies_differ(n_tokens, is_same):
    """Also where short documents' separators, or vocabularies that are nearly as large, would make an estimate wrong."""
    a = [{"val_loss": 3.0, "val_bpb": 1.0, "val_bytes": 4000, "val_tokens": 1000}]
    b = [{"val_loss": 3.2, "val_bpb": 1.0, "val_bytes": 4000, "val_tokens": n_tokens}]
    assert have_same_vocabulary([a, b]) == is_same and bytes_per_token(a) == 4


@pytest.mark.parametrize("a, b, words", [
    ({"val_bytes": 400_000}, {"val_bytes": 400_000}, ""), ({}, {}, ""),
    ({"val_bytes": 400_000}, {"val_bytes": 391_000}, "Not validated on the same text.* a: 400,000 bytes; b: 391,000 bytes"),
    ({"val_bytes": 400_000}, {}, "a: 400,000 bytes; b: an unknown number of bytes"),
    ({"ids": 1.25, "val_bytes": 7}, {"val_bytes": 7}, ""), ({"ids": 1.25}, {}, "may not have been .* vocabularies differ")])
def test_runs_that_were_not_validated_on_the_same_text_are_named(a, b, words, tmp_path, drawn):
    runs = {"a": make_rows(10, **a), "b": make_rows(10, **b)}
    note = validation_note(runs)
    assert re.search(words, note.replace("(", "")) if words else note == ""
    draw_curves(runs, tmp_path / "curves.png")
    assert drawn[0].figure.get_suptitle().split() == note.split()


# -- panels for pages -------------------------------------------------------------------------------------------------

def luminance(color: str) -> float:
    """Relative luminance of #rrggbb. Source: WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    values = [byte / 255 for byte in bytes.fromhex(color[1:])]
    return np.dot([0.2126, 0.7152, 0.0722], [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values])


def test_colors_are_readable_on_white_and_on_a_dark_page():
    for color in COLORS:
        lighter = 1.05 / (luminance(color) + 0.05)
        darker = (luminance(color) + 0.05) / (luminance("#14181f") + 0.05)
        assert min(lighter, darker) >= 3, (color, lighter, darker)


def test_svgs_take_the_color_of_the_page_and_have_no_background(tmp_path):
    """Whoever shows one by itself gets light ink where dark pages are preferred."""
    rows, result = make_rows(10), {"bpb": 1.0, "bpb_margin": 0.1, "seconds": 1.0, "peak_memory": 1}
    draw_accuracy_matrix(["a"], {"parity": ["1x", "2x"]}, {("a", "parity"): "solved"}, {("a", "parity"): [0.5, None]},
                         {"parity": 0.5}, "title", tmp_path, "m")
    panels = [*draw_mean_curves({"a": [rows]}), *draw_pareto_fronts({"a": result}), *draw_finetuning(rows),
              *draw_scaling({"a": ([(1e9, 2.0), (2e9, 1.0)], 1.0, 0.1)}), *draw_by_vocabulary({"a": [(1024, 1.0, 0.1)]}),
              *draw_compression({"a": {"prose": 4.0}})]
    for svg in (*panels, (tmp_path / "m.svg").read_text()):
        drawn = svg.replace(re.search("<style>.*?</style>", svg).group(), "")
        assert "currentColor" in drawn and "@media (prefers-color-scheme: dark)" in svg
        backgrounds = re.findall(r'<g id="patch_[12]">\s*<path d="M 0 [^>]*>', drawn)
        assert all("fill: none" in path or "opacity: 0" in path for path in backgrounds) and len(backgrounds) == 1
        inks = set(re.findall(r"(?:fill|stroke): (#\w+)", drawn)) - set(COLORS)
        assert not inks or svg not in panels  # the boxes of the matrix have colors of their own


def test_a_finetuning_is_drawn_from_before_its_first_step_with_its_best(drawn):
    """Overfitted: the loss rises after step 10. Every validation is inside the panel, the last one too."""
    losses = {0: 3.0, 5: 2.5, 10: 2.0, 15: 2.6, 20: 3.4}
    rows = [row | ({"val_loss": losses[row["step"]], "exact_match": 0.1} if row["step"] in losses else {})
            for row in make_rows(20)]
    texts = svg_texts(draw_finetuning(rows))
    assert {"training", "held-out answers", "best: step 10, 2.0000", "lowest loss: step 10"} <= set(texts)
    loss, matches = drawn
    line = next(line for line in loss.lines if line.get_label() == "held-out answers")
    assert dict(zip(*line.get_data())) == losses
    for axis, values in ((loss, losses.values()), (matches, [0.1])):
        (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
        assert left < 0 and right > 20 and bottom < min(values) and max(values) < top


@pytest.mark.parametrize("first, scale", [(9.0, "log"), (2.0, "linear")])
def test_the_start_of_a_finetuning_leaves_room_for_the_rest(first, scale, drawn):
    rows = [{"step": step, "val_loss": loss} for step, loss in ((0, first), (5, 1.0), (10, 0.5))]
    draw_finetuning(rows)
    axis, = drawn
    assert axis.get_yscale() == scale
    y = [axis.transData.transform((0, loss))[1] for loss in (0.5, 1.0)]
    assert y[1] - y[0] > 0.2 * axis.get_window_extent().height


NAMES = {"$\\foo$": "$\\foo$", "a\\$b$": "a\\$b$", "_hidden": "_hidden", "x" * 300: "x" * 100 + "…", "<&>": "<&>",
         "\udcff\0\n": "???", "名前": "名前", ",".join(f"flag_{i}=1" for i in range(6)): "flag_5=1"}


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are(tmp_path):
    """$ begins a formula in matplotlib, and a legend leaves out what begins with an underscore. Long names are wrapped."""
    rows = [{"step": i, "tokens": i, "seconds": i, "flops": i, "val_loss": 3.0, "val_bpb": 1.0} for i in (1, 2)]
    result = {"bpb": 1.0, "bpb_margin": 0.1, "seconds": 1.0, "peak_memory": 1}
    for panels in (draw_mean_curves(dict.fromkeys(NAMES, [rows])), draw_pareto_fronts(dict.fromkeys(NAMES, result)),
                   draw_scaling(dict.fromkeys(NAMES, ([(1e9, 2.0), (2e9, 1.0)], 1.0, 0.1))),
                   draw_by_vocabulary(dict.fromkeys(NAMES, [(1024, 1.0, 0.1), (2048, 1.1, float("inf"))])),
                   draw_compression(dict.fromkeys(NAMES, {"prose": 4.0, "code": 3.0}))):
        for panel in panels:
            texts = svg_texts([panel])
            assert {name for name in NAMES.values() if name in "".join(texts)} == set(NAMES.values())
            assert max(map(len, texts)) <= 44 + len(": FLOPs^-0.1000")
    draw_curves(dict.fromkeys(NAMES, rows), tmp_path / "curves.png")
    draw_accuracy_matrix(list(NAMES), {"parity": ["1x"]}, dict.fromkeys([(name, "parity") for name in NAMES], "solved"),
                         dict.fromkeys([(name, "parity") for name in NAMES], [0.5]), {"parity": 0.5}, "title", tmp_path, "a")
    draw_corpus_stats(np.array([5]), np.array([9]), "$\\foo$", tmp_path / "stats.png")
    assert len(list(tmp_path.iterdir())) == 4


# -- prepared text ----------------------------------------------------------------------------------------------------

def test_corpus_statistics_are_drawn_for_one_empty_document_too(tmp_path):
    for i, (lengths, counts) in enumerate((([5, 0, 300], [9, 0, 4, 4]), ([0], [1, 0]))):
        draw_corpus_stats(np.array(lengths), np.array(counts), "a title", tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
