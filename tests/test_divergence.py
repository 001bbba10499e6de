"""Steps whose loss or gradient is not finite: one is skipped, several in a row end the run with exit code 3."""
import itertools
import json
import math
import re

import pytest
import torch
from test_resume import GPT2

import train
import trainer
from conftest import run_rows
from runtime.checkpoint import load_checkpoint, run_folder
from runtime.cli import DIVERGED


def poison(monkeypatch, steps, value=math.nan, per_step=2):
    """Multiplies the loss of the second batch of these steps (from 1), and so its gradients, by `value`."""
    loss_fn, calls = train.next_token_loss, itertools.count()

    def poisoned(model, batch):
        loss, n = loss_fn(model, batch), next(calls)
        return loss * value if n % per_step == 1 and n // per_step + 1 in steps else loss
    monkeypatch.setattr(train, "next_token_loss", poisoned)


def diverges(run_train, *flags: str):
    """Runs train.py, which must exit as diverged."""
    with pytest.raises(SystemExit) as stop:
        run_train(*flags)
    assert stop.value.code == DIVERGED == 3


# -- skipped steps ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, value", [
    ([], math.nan), ([], math.inf), (["--grad_clip=0.5", "--optimizer=adamw"], math.nan), (GPT2, math.inf)],
    ids=["nan", "inf", "adamw", "gpt2"])
def test_a_step_that_is_not_finite_changes_nothing(run_train, monkeypatch, capsys, value, flags):
    with monkeypatch.context() as patch:
        poison(patch, [3], value)
        path = run_train(*flags, "--val_intervals=1")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("up to step 3: skipped 1 step whose loss or gradient was not finite; 2 in a row end the run")
    rows = run_rows(path)
    assert [row["skipped"] for row in rows[1:]] == [0, 0, 1, 1, 1, 1] and len(rows) == 7
    assert rows[3]["val_loss"] == rows[2]["val_loss"] != rows[4]["val_loss"]
    assert math.isfinite(rows[-1]["val_loss"]) and math.isfinite(rows[-1]["grad_norm"])
    assert load_checkpoint(path)["training"]["guard"][:3].tolist() == [0, 1, 0]


def test_metrics_of_a_skipped_step_are_json(run_train, monkeypatch):
    """NaN is not JSON: strict readers refuse the file."""
    poison(monkeypatch, [3])
    path = run_train()

    def refuse(constant):
        raise AssertionError(constant)
    lines = (run_folder(path) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == list(range(7))


def test_fp16_overflow_halves_the_loss_scale(run_train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        poison(patch, [2, 3, 5], math.inf)
        path = run_train("--dtype=fp16")
    assert capsys.readouterr().err == ""  # normal: the loss scale is found that way
    assert load_checkpoint(path)["training"]["scaler"]["scale"] == 65_536 / 2**3
    rows = run_rows(path)
    assert [row["skipped"] for row in rows[1:]] == [0, 1, 2, 2, 3, 3] and math.isfinite(rows[-1]["val_loss"])


# -- diverged runs ----------------------------------------------------------------------------------------------------

def test_two_skipped_steps_in_a_row_end_the_run(run_train, monkeypatch, capsys, tmp_path):
    poison(monkeypatch, [2, 4, 5])
    diverges(run_train, "--max_iter=9")
    error = capsys.readouterr().err.splitlines()
    assert "2 times in a row at step 5" in error[-1]
    assert "gpt.pt holds step 3, from which --resume_checkpoint continues" in error[-1]
    assert [line.split(":")[0] for line in error] == ["up to step 2", "up to step 4", "train.py"]
    checkpoint = load_checkpoint(tmp_path / "run" / "gpt.pt")
    assert checkpoint["training"]["step"] == 3
    assert all(torch.isfinite(weight).all() for weight in checkpoint["model"].values())


def test_skipped_steps_between_two_rows_end_the_run_at_the_next_row(run_train, monkeypatch, capsys):
    """The host reads the counts only when a row is due; they name the step at which it happened."""
    poison(monkeypatch, [2, 3])
    diverges(run_train, "--max_iter=9", "--log_intervals=5", "--val_intervals=100")
    assert "2 times in a row at step 3:" in capsys.readouterr().err


def test_skipped_steps_in_a_row_are_counted_over_a_resumption(run_train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        poison(patch, [3])
        path = run_train("--max_iter=3")
    with monkeypatch.context() as patch:
        poison(patch, [1])
        diverges(run_train, "--resume_checkpoint", "--max_iter=9")
    assert "2 times in a row at step 4:" in capsys.readouterr().err
    assert load_checkpoint(path)["training"]["step"] == 3


def test_fp16_that_always_overflows_ends_the_run(run_train, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "MAX_FP16_SKIPS", 4)
    poison(monkeypatch, range(3, 100), math.inf)
    diverges(run_train, "--dtype=fp16", "--max_iter=50")
    (error,) = capsys.readouterr().err.splitlines()
    assert "4 times in a row at step 6" in error and "holds step 3" in error


def test_a_learning_rate_far_too_high(run_train, tmp_path, capsys):
    diverges(run_train, "--learning_rate=1e38", "--grad_clip=0", "--warmup_iter=0", "--max_iter=50", "--val_intervals=1000")
    skipped, error = capsys.readouterr().err.splitlines()
    assert re.search(r"^train.py: loss or gradient not finite 2 times in a row at step \d+: lower --learning_rate, now "
                     r"1e\+38, .* \S+gpt.pt holds step 0, from which --resume_checkpoint continues$", error)
    assert skipped.startswith("up to step ")
    checkpoint = load_checkpoint(tmp_path / "run" / "gpt.pt")
    assert all(torch.isfinite(weight).all() for weight in checkpoint["model"].values())


def test_weights_that_are_not_finite_are_never_saved(run_train, tmp_path, monkeypatch, capsys):
    """The loss of a batch can be finite while a weight that it does not reach is not."""
    train_step = trainer.train_step

    def poisoned(state, *args):
        done = train_step(state, *args)
        if state.step == 4:
            state.model.embed.weight.data[3] = torch.nan
        return done
    monkeypatch.setattr(trainer, "train_step", poisoned)
    monkeypatch.setattr(train, "validate", lambda *args: {"val_loss": 1.0, "val_bpb": 1.0})
    diverges(run_train)
    assert re.search("weights are no longer finite at step 6.*holds step 3", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run" / "gpt.pt")["training"]["step"] == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_ends_the_run(run_train, monkeypatch, tmp_path, capsys, value):
    values = iter([6.2, 6.1, value])
    monkeypatch.setattr(train, "validate", lambda *args: {"val_loss": next(values), "val_bpb": 1.0})
    diverges(run_train)
    assert re.search(f"val_loss is {value} at step 6.*holds step 3", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run" / "gpt.pt")["training"]["step"] == 3
