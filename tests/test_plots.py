"""experiments/plots.py: the curves of train.py --plot, and the statistics of prepared text."""
import numpy as np
import pytest

from experiments.plots import draw_corpus_stats, draw_curves


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


@pytest.mark.integration
def test_corpus_statistics_are_drawn_for_one_empty_document_too(tmp_path):
    for i, (lengths, counts) in enumerate((([5, 0, 300], [9, 0, 4, 4]), ([0], [1, 0]))):
        draw_corpus_stats(np.array(lengths), np.array(counts), "a title", tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
