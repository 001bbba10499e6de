"""experiments/plots.py: the curves of train.py --plot, and the statistics of prepared text."""
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.plots import (
    draw_accuracy_matrix,
    draw_corpus_stats,
    draw_curves,
    draw_mean_curves,
    draw_pareto_fronts,
    draw_scaling,
)


@pytest.mark.integration  # matplotlib takes 2 s to import
def test_every_run_has_a_curve_of_its_own_color(tmp_path):
    from PIL import Image
    rows = [{"step": i, "tokens": i * 1000, "seconds": i, "train_loss": 6 - i / 10} | (
        {"val_loss": 6 - i / 11, "val_bpb": 2 - i / 30} if i % 5 == 0 else {}) for i in range(1, 21)]
    first_row = [{"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": 6.0, "val_bpb": 2.0}]
    blue, orange = (31, 119, 180), (255, 127, 14)  # matplotlib's first two
    pixels = []
    for runs in ({"a": rows}, {"a": rows, "b": rows[:7]}, {"a": first_row}):
        draw_curves(runs, tmp_path / "curves.png")
        image = Image.open(tmp_path / "curves.png")
        image.load()
        assert image.format == "PNG" and image.width > 800 and image.height > 500
        counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
        pixels.append([counts.get(color, 0) for color in (blue, orange)])
    one_run, two_runs, one_row = pixels
    assert one_run[0] > 500 and one_run[1] == 0
    assert two_runs[0] > 500 and two_runs[1] > 200
    assert 0 < one_row[0] < one_run[0]
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


NAMES = {"$\\foo$": "$\\foo$", "a\\$b$": "a\\$b$", "_hidden": " _hidden", "x" * 300: "x" * 100 + "…", "<&>": "<&>",
         "\udcff\0\n": "???", "名前": "名前"}


@pytest.mark.integration
@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are(tmp_path):
    """$ begins a formula in matplotlib, and a legend leaves out what begins with an underscore."""
    rows = [{"step": i, "tokens": i, "seconds": i, "flops": i, "val_loss": 3.0, "val_bpb": 1.0} for i in (1, 2)]
    result = {"bpb": 1.0, "bpb_margin": 0.1, "seconds": 1.0, "peak_memory": 1}
    for svg in (draw_mean_curves(dict.fromkeys(NAMES, [rows])), draw_pareto_fronts(dict.fromkeys(NAMES, result)),
                draw_scaling(dict.fromkeys(NAMES, ([(1e9, 2.0), (2e9, 1.0)], 1.0, 0.1)))):
        texts = [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert {name for name in NAMES.values() if any(name in text for text in texts)} == set(NAMES.values())
    draw_curves(dict.fromkeys(NAMES, rows), tmp_path / "curves.png")
    draw_accuracy_matrix(list(NAMES), {"parity": ["1x"]}, dict.fromkeys([(name, "parity") for name in NAMES], "solved"),
                         dict.fromkeys([(name, "parity") for name in NAMES], [0.5]), {"parity": 0.5}, "title", tmp_path, "a")
    draw_corpus_stats(np.array([5]), np.array([9]), "$\\foo$", tmp_path / "stats.png")
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.integration
def test_corpus_statistics_are_drawn_for_one_empty_document_too(tmp_path):
    for i, (lengths, counts) in enumerate((([5, 0, 300], [9, 0, 4, 4]), ([0], [1, 0]))):
        draw_corpus_stats(np.array(lengths), np.array(counts), "a title", tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
