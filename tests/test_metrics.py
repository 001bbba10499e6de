"""runtime/metrics.py: bits per byte, the guard against non-finite steps, metrics.jsonl."""
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.metrics import LossSums, MetricsLog, NonFiniteGuard, read_rows

NAN, INF, CPU = math.nan, math.inf, torch.device("cpu")


# -- sums of losses ---------------------------------------------------------------------------------------------------

def test_bits_per_byte_by_hand():
    """Ids 0 (special), 1 (one byte), 2 (three bytes): 2 + 4 bits of text over 1 + 3 bytes; the special token's 8 bits count
    only in the loss, the ignored position nowhere."""
    sums = LossSums()
    bits = torch.tensor([[8.0, 2.0], [4.0, 99.0]])
    sums.add(bits * math.log(2), torch.tensor([[0, 1], [2, -100]]), torch.tensor([0, 1, 3]))
    assert sums.bits_per_byte == pytest.approx(6 / 4)
    assert sums.loss == pytest.approx((8 + 2 + 4) / 3 * math.log(2)) and sums.tokens == 3


def test_losses_are_summed_in_float64():
    sums, token_bytes = LossSums(), torch.tensor([1])
    for _ in range(3):
        sums.add(torch.full((1000,), 1e8), torch.zeros(1000, dtype=torch.int64), token_bytes)
        sums.add(torch.full((1,), 1e-4), torch.zeros(1, dtype=torch.int64), token_bytes)
    assert sums.nats == pytest.approx(3e11 + 3e-4, abs=1e-4)


def test_without_text_there_are_no_bits_per_byte():
    sums = LossSums()
    sums.add(torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.tensor([0]))
    assert sums.loss == 1 and math.isnan(sums.bits_per_byte)


# -- non-finite steps -------------------------------------------------------------------------------------------------

def update_all(guard: NonFiniteGuard, steps: list[tuple[float, float]]) -> list[bool]:
    """Whether each step, a loss and a gradient norm, is skipped."""
    return [bool(guard.update(torch.tensor(loss), torch.tensor(norm), step)) for step, (loss, norm) in enumerate(steps, 1)]


def test_non_finite_steps_are_skipped_and_counted():
    guard = NonFiniteGuard(CPU, limit=2)
    skipped = update_all(guard, [(1.0, 2.0), (NAN, 1.0), (3.0, 1.0), (1.0, INF), (2.0, 1.0)])
    assert skipped == [False, True, False, True, False]
    assert guard.read() == {"skipped": 2, "failed_at": 0, "largest_loss": 3.0, "largest_norm": 2.0}
    guard.start_row()
    assert guard.read() == {"skipped": 2, "failed_at": 0, "largest_loss": 0.0, "largest_norm": 0.0}


BAD, GOOD = (NAN, 1.0), (1.0, 1.0)


@pytest.mark.parametrize("limit, steps, failed_at", [
    (2, [BAD, GOOD, BAD, GOOD], 0), (2, [GOOD, BAD, BAD, GOOD, BAD, BAD], 3), (2, [BAD] * 5, 2),
    (4, [*[BAD] * 3, GOOD, *[BAD] * 3], 0)])
def test_a_run_has_failed_at_the_limit_of_skips_in_a_row(limit, steps, failed_at):
    guard = NonFiniteGuard(CPU, limit)
    update_all(guard, steps)
    assert guard.read()["failed_at"] == failed_at


# -- rows -------------------------------------------------------------------------------------------------------------

def test_rows_come_back_and_the_last_row_of_a_step_counts(tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("from an earlier run")
    log = MetricsLog(tmp_path / "run", [{"step": 0, "val_loss": 9.0}])
    assert path.read_text() == "from an earlier run"  # until there is a row or a checkpoint to replace it
    log.write({"step": 1, "train_loss": 5.0, "mfu": None})
    log.write({"step": 2, "train_loss": 4.0, "grad_norm": NAN})
    log.close()
    with open(path, "ab") as file:  # a second row of step 1, lines that are not rows, and a crash
        file.write(b'{"step": 1, "train_loss": 3.0}\n\xff\xfe\n{}\n[1]\n{"step": "x"}\n{"step": 7, "trai')
    assert read_rows(path) == [{"step": 0, "val_loss": 9.0}, {"step": 1, "train_loss": 3.0}, {"step": 2, "train_loss": 4.0}]
    assert all(json.loads(line) for line in path.read_bytes().splitlines()[:3])


@pytest.mark.parametrize("line, row", [
    ('{"step": 1, "val_loss": "5.0", "lr": 0.1}', {"step": 1, "lr": 0.1}), ('{"step": 1, "a": null}', {"step": 1}),
    ('{"step": 1, "a": true, "b": [1], "c": {"d": 1}, "e": NaN, "f": -Infinity}', {"step": 1}),
    ('{"step": 1, "a": 1' + "0" * 400 + ', "flops": 1' + "0" * 30 + "}", {"step": 1, "flops": 10**30}),
    *((f'{{"step": {step}, "lr": 0.1}}', None) for step in ("true", "1.0", '"1"', "null", "-1", "1" * 30, "1" * 5000)),
    ("[" * 100_000, None), ("3", None), ('{"step": 1', None)], ids=lambda value: str(value)[:40])
def test_what_is_no_number_is_left_out(tmp_path, line, row):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0, "lr": 1}}\n{line}\n')
    assert read_rows(path) == [{"step": 0, "lr": 1}, *([row] if row else [])]


def test_a_missing_file_or_one_without_an_end_has_no_rows(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none.jsonl", tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        assert read_rows(path) == []


def test_a_row_that_cannot_be_written_names_the_file(tmp_path):
    log = MetricsLog(tmp_path, [])
    log.open()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="metrics.jsonl: cannot be written"):
        log.write({"step": 1})
    log.close()


def test_tensorboard_of_a_resumed_run_shows_every_row_once(tmp_path):
    log = MetricsLog(tmp_path, [])
    for step in (1, 2, 3):
        log.write({"step": step, "train_loss": float(step), "mfu": None})
    log.close()
    log = MetricsLog(tmp_path, read_rows(tmp_path / "metrics.jsonl")[:2])
    log.write({"step": 3, "train_loss": 30.0})
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(1, 1), (2, 2), (3, 30)]
    assert events.Tags()["scalars"] == ["train_loss"]


def test_rows_are_written_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    first, *rows = [{"step": step, "train_loss": 5.0 - step} for step in range(3)]
    log = MetricsLog(tmp_path, [first])
    for row in rows:
        log.write(row)
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [first, *rows]
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1
