import copy
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_model import random_model

import generate
import train
import trainer
from conftest import TINY_MODEL, assert_same, at_batch, rows_of, stop_in, training_of
from dataloader import shard_loader
from layers import LINEARS, MIXERS, MLPS
from model import GPT
from runtime import memory
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.memory import largest_batch
from shards import open_data
from tokenizer import Tokenizer

# the parts of the preset that a tiny model can have
GPT2 = [f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in train.PRESETS["gpt2"].items()
        if name in ("mlp", "norm", "positions", "qk_norm", "value_residual", "x0_residual", "token_shift", "softcap",
                    "bias", "init", "optimizer", "weight_decay", "schedule", "grad_clip")]


# -- resuming ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps, flags", [
    ((0,), []), ((1,), []), ((2,), []), ((3,), []), ((4,), []), ((1, 2, 4), []),
    ((1,), ["--dataloader_num_workers=2"]), ((3,), ["--dtype=bf16", "--batch_size=2"]),
    ((1, 3), ["--dtype=fp16", "--batch_size=2"]), ((1, 4), GPT2), ((1,), ["--gradient_checkpointing"]),
    ((3,), ["--optimizer=adamw", "--tied=0"]), ((1,), ["--momentum_dtype=fp32"]),
    ((1,), ["--schedule=cosine", "--grad_clip=0.1", "--weight_decay=0.1"]),
    *(((1,), [f"--mlp={mlp}"]) for mlp in MLPS), *(((1,), [f"--mixer={mixer}"]) for mixer in (*MIXERS, "DA")),
    *(((1,), [f"--linear={linear}"]) for linear in LINEARS), ((1,), ["--linear=grkan", "--mixer=AD", "--dtype=fp16"])])
def test_a_stopped_run_resumes_bit_for_bit(run_train, tmp_path, monkeypatch, capsys, steps, flags):
    """Stopped in the middle of steps, before, at and after validations (every 3 steps), in several epochs."""
    flags = ["--batch_size=150", *flags]  # two batches are more than half an epoch
    expected, path, done = run_train(*flags, checkpoint="whole/gpt.pt"), tmp_path / "stopped" / "gpt.pt", 0
    for step in steps:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            stop_in(patch, step - done, batch=step % 2)
            run_train(*(["--resume_checkpoint"] if done else flags), checkpoint="stopped/gpt.pt")
        assert stop.value.code == 128 + signal.SIGTERM
        assert f"train.py --checkpoint_path={path} --resume_checkpoint" in capsys.readouterr().err
        done = load_checkpoint(path)["training"]["step"]
        assert done == step + 1
    run_train("--resume_checkpoint", checkpoint="stopped/gpt.pt")
    assert_same(training_of(path), training_of(expected))
    assert rows_of(path) == rows_of(expected) and len(rows_of(path)) == 7


def test_a_killed_run_resumes_from_its_last_validation(run_train, tmp_path, monkeypatch):
    """The checkpoint is of step 3, metrics.jsonl goes on to step 5 and ends in the middle of a row."""
    expected = run_train(checkpoint="whole/gpt.pt")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in(patch, 5, times=2)
        patch.setattr(train.StopSignals, "AT_ONCE", 0)  # a second signal does not wait for the step to end
        run_train(checkpoint="killed/gpt.pt")
    path = tmp_path / "killed" / "gpt.pt"
    assert load_checkpoint(path)["training"]["step"] == 3
    with open(tmp_path / "killed" / "gpt" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tok')
    run_train("--resume_checkpoint", checkpoint="killed/gpt.pt")
    assert_same(training_of(path), training_of(expected))
    assert rows_of(path) == rows_of(expected)


def test_a_run_killed_in_its_first_step_resumes(run_train, tmp_path, monkeypatch):
    expected = run_train(checkpoint="whole/gpt.pt")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in(patch, 0, times=2)
        patch.setattr(train.StopSignals, "AT_ONCE", 0)
        run_train(checkpoint="killed/gpt.pt")
    run_train("--resume_checkpoint", checkpoint="killed/gpt.pt")
    assert_same(training_of(tmp_path / "killed" / "gpt.pt"), training_of(expected))
    assert rows_of(tmp_path / "killed" / "gpt.pt") == rows_of(expected)
    lines = (tmp_path / "killed" / "gpt" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(rows_of(expected))  # the row of step 0 stands there once


def test_a_resumed_run_does_not_tell_again_of_a_step_left_out(run_train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        loss_fn, calls = trainer.next_token_loss, iter(range(10**6))
        patch.setattr(trainer, "next_token_loss",
                      lambda model, batch: loss_fn(model, batch) * (math.nan if next(calls) == 2 else 1))
        run_train("--max_iter=3")
    assert "up to step 2: 1 with a loss or gradient that is not finite" in capsys.readouterr().err
    run_train("--resume_checkpoint", "--max_iter=6")
    assert capsys.readouterr().err == ""


def test_the_same_signal_twice_at_once_is_one(run_train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_in(patch, 1, number=signal.SIGINT, times=2)
        run_train(checkpoint="a/gpt.pt")
    assert stop.value.code == 130 and load_checkpoint(tmp_path / "a" / "gpt.pt")["training"]["step"] == 2


def test_a_signal_in_the_last_step_changes_nothing(run_train, monkeypatch):
    stop_in(monkeypatch, 5)
    assert load_checkpoint(run_train())["training"]["step"] == 6


def test_resuming_needs_no_flags_and_may_write_elsewhere(run_train, tmp_path):
    first = run_train("--max_iter=3", "--mlp=gelu", "--learning_rate=0.003")
    second = tmp_path / "second" / "gpt.pt"
    train.main([f"--resume_checkpoint={first}", f"--checkpoint_path={second}", "--max_iter=6", "--verbose=0"])
    assert load_checkpoint(first)["training"]["step"] == 3
    blob = load_checkpoint(second)
    assert blob["training"]["step"] == 6 and blob["config"]["mlp"] == "gelu"
    assert blob["training"]["settings"]["learning_rate"] == 0.003
    assert [row["step"] for row in rows_of(second)] == list(range(7))


def test_a_changed_horizon_refits_the_schedule_and_says_so(run_train, capsys):
    path = run_train("--max_iter=4", "--warmup_iter=0", "--cooldown_frac=0.5", "--learning_rate=0.001")
    run_train("--resume_checkpoint", "--max_iter=8", "--verbose=1", "--sample_tokens=0")
    assert "max_iter 4 -> 8; the schedule now fits the new one" in capsys.readouterr().out
    rates = [row["lr"] for row in rows_of(path)[1:]]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3] + [1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_a_changed_learning_rate_is_obeyed_and_said(run_train, capsys):
    path = run_train("--max_iter=4", "--warmup_iter=0", "--cooldown_frac=0")
    run_train("--resume_checkpoint", "--max_iter=5", "--learning_rate=0.5", "--verbose=1", "--sample_tokens=0")
    assert "learning_rate" in capsys.readouterr().out
    assert rows_of(path)[-1]["lr"] == 0.5


def test_a_finished_run_says_so(run_train, capsys, refused):
    path = run_train()
    before = path.read_bytes()
    run_train("--resume_checkpoint", "--verbose=1")
    assert "finished before at step 6" in capsys.readouterr().out
    refused(train.main, ["--resume_checkpoint", f"--checkpoint_path={path}", "--max_iter=5"], "--max_iter=5", "step 6")
    assert path.read_bytes() == before


def test_checkpoints_that_cannot_be_resumed(run_train, tmp_path, refused, data_path):
    path = run_train("--max_iter=3")
    before = path.read_bytes()
    flags = ["--resume_checkpoint", f"--checkpoint_path={path}", "--max_iter=9"]
    for changed in ("--n_layer=3", "--n_head=1", "--head_size=16", "--block_size=8", "--mlp=relu2", "--seed=1",
                    "--vocab_size=500", "--optimizer=adamw", "--softcap=10.0", "--tied=False", "--preset=cpu"):
        name, value = changed.split("=")
        refused(train.main, [*flags, changed], changed, f"{name.strip('-')}=", "drop the flag")
    refused(train.main, ["--resume_checkpoint=none.pt"], "none.pt: no checkpoint")
    refused(train.main, [f"--checkpoint_path={path}", "--resume_checkpoint="], "--resume_checkpoint=: is empty")
    blob = load_checkpoint(path)
    for name, damaged, words in (
            ("cut", path.read_bytes()[:-1000], ["cut.pt: damaged"]), ("text", b"hello", ["text.pt: damaged"])):
        (tmp_path / f"{name}.pt").write_bytes(damaged)
        refused(train.main, [f"--resume_checkpoint={tmp_path / name}.pt"], *words)
    torch.save(blob | {"format": "gpt-workbench checkpoint 0"}, tmp_path / "old.pt")
    refused(train.main, [f"--resume_checkpoint={tmp_path / 'old.pt'}"], "old.pt", "checkpoint 0")
    save_checkpoint(tmp_path / "shape.pt", blob | {"config": blob["config"] | {"n_layer": 5}})
    refused(train.main, [f"--resume_checkpoint={tmp_path / 'shape.pt'}", "--max_iter=9"], "not those of its shape")
    save_checkpoint(tmp_path / "weights.pt", {key: blob[key] for key in ("config", "model", "tokenizer")})
    refused(train.main, [f"--resume_checkpoint={tmp_path / 'weights.pt'}"], "weights.pt", "no training state")
    for part in ("model", "tokenizer", "config"):
        save_checkpoint(tmp_path / "part.pt", {name: value for name, value in blob.items() if name != part})
        for command in (train.main, generate.main) if part != "tokenizer" else (generate.main,):
            name = "resume_checkpoint" if command is train.main else "checkpoint_path"
            refused(command, [f"--{name}={tmp_path / 'part.pt'}", *(["--max_iter=9"] if command is train.main else [])],
                    "part.pt", "missing or damaged")
    for damage in (lambda t: t.pop("step"), lambda t: t.update(step=-3), lambda t: t.update(step="3"),
                   lambda t: t.pop("scaler"), lambda t: t["settings"].pop("grad_clip"),
                   lambda t: t["settings"].update(batch_size="x"), lambda t: t["settings"].update(batch_size=0),
                   lambda t: t["loader"].update(seed=5), lambda t: t["loader"].update(blocks_seen="x"),
                   lambda t: t.pop("watch"), lambda t: t.update(watch=torch.zeros(2)), lambda t: t["rng"].pop("torch"),
                   lambda t: t["optimizer"].pop("muon"), lambda t: t["optimizer"]["adamw"]["state"].pop(0),
                   lambda t: t["optimizer"]["muon"]["state"][0].update(momentum=torch.zeros(3)),
                   lambda t: t["optimizer"]["adamw"]["state"][0].update(exp_avg=torch.zeros(3))):
        damaged = copy.deepcopy(blob)
        damage(damaged["training"])
        save_checkpoint(tmp_path / "part.pt", damaged)
        refused(train.main, [f"--resume_checkpoint={tmp_path / 'part.pt'}", "--max_iter=9"], "part.pt: ")
    other = shutil.copytree(data_path, tmp_path / "other")
    manifest = (other / "manifest.json").read_text()
    checksum = re.search('"sha256": "(.*?)"', manifest[manifest.index('"train"'):]).group(1)
    (other / "manifest.json").write_text(manifest.replace(checksum, "0" * 64))
    refused(train.main, [*flags, f"--data_path={other}"], "--data_path", "not what the checkpoint was trained on")
    assert path.read_bytes() == before


# -- what a run writes ------------------------------------------------------------------------------------------------

def test_rows_of_a_run(run_train, data_path):
    path = run_train()
    rows, data = rows_of(path, clocks=True), open_data(data_path)
    model = GPT.from_checkpoint(load_checkpoint(path))
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[0]["val_loss"] == pytest.approx(math.log(512), abs=0.1)
    assert ["val_loss" in row for row in rows] == [True, False, False, True, False, False, True]
    for row in rows[1:]:
        assert row["tokens"] == row["step"] * 4 * 2 * 16
        assert row["flops"] == row["tokens"] * model.flops_per_token()
        assert row["tok_per_sec"] > 0 and row["peak_memory"] > 0 and row["mfu"] >= 0
        assert row["skipped"] == 0 and row["largest_loss"] == pytest.approx(row["train_loss"]) and row["grad_norm"] > 0
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    # the first 2 * 4 blocks of the validation split, by hand
    ids = torch.from_numpy(data.split("val").read(0, 8 * 16 + 1).astype("int64"))
    with torch.no_grad():
        losses = model(ids[:-1].view(8, 16), ids[1:].view(8, 16), reduction="none").flatten().double()
    is_text = ids[1:] != data.tokenizer.separator_id
    n_bytes = len(data.tokenizer.decode_bytes(ids[1:][is_text].tolist()))
    assert rows[-1]["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert rows[-1]["val_bpb"] == pytest.approx(losses[is_text].sum().item() / math.log(2) / n_bytes, rel=1e-6)


def test_a_checkpoint_is_enough_to_talk_to_the_model(run_train, data_path):
    blob = load_checkpoint(run_train())
    tokenizer = Tokenizer.from_json(blob["tokenizer"])
    assert tokenizer.fingerprint() == open_data(data_path).tokenizer.fingerprint()
    assert GPT.from_checkpoint(blob).config.vocab_size == tokenizer.vocab_size
    assert blob["training"]["settings"]["max_iter"] == 6
    assert json.dumps(blob["training"]["settings"])


def test_training_lowers_the_loss(run_train):
    rows = rows_of(run_train("--max_iter=60", "--learning_rate=0.01", "--val_intervals=60", "--batch_size=16"))
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 1.0


def test_accumulation_equals_one_large_batch(run_train):
    """The same blocks in the same order, 2 x 4 a step or 8 at once."""
    rate = "--learning_rate=0.003"  # a large one makes much of what rounding does
    accumulated = run_train(rate, "--batch_size=4", "--num_batch_accum=2", checkpoint="a/gpt.pt")
    blocking = run_train(rate, "--batch_size=8", "--num_batch_accum=1", checkpoint="b/gpt.pt")
    for a, b in zip(rows_of(accumulated)[1:], rows_of(blocking)[1:]):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5) and a["tokens"] == b["tokens"]
    for (name, a), b in zip(load_checkpoint(accumulated)["model"].items(), load_checkpoint(blocking)["model"].values()):
        assert torch.allclose(a, b, atol=2e-4), name


def test_gradients_of_accumulated_batches_are_those_of_a_large_one(data_path):
    data = open_data(data_path)
    model = GPT(train.GPTConfig(n_layer=1, n_head=1, head_size=8, block_size=16, vocab_size=512))
    torch.nn.init.normal_(model.head.weight)
    small, large = shard_loader(data, 2, 16, seed=0), shard_loader(data, 6, 16, seed=0)
    for _ in range(3):
        (trainer.next_token_loss(model, next(small)) / 3).backward()
    accumulated = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    trainer.next_token_loss(model, next(large)).backward()
    for parameter, grad in zip(model.parameters(), accumulated):
        assert torch.allclose(parameter.grad, grad, atol=1e-6)


@pytest.mark.parametrize("flag", [
    "--learning_rate=0.01", "--weight_decay=5", "--warmup_iter=5", "--cooldown_frac=0", "--grad_clip=0.001", "--seed=1",
    "--batch_size=3", "--num_batch_accum=1", "--mlp=relu2", "--mlp=swiglu", "--dtype=bf16", "--norm=layer",
    "--positions=learned", "--qk_norm=0", "--value_residual=0", "--x0_residual=0", "--token_shift=0", "--softcap=0",
    "--tied=0", "--bias",
    "--init=gpt2", "--optimizer=adamw", "--optimizer=gpt2", "--schedule=cosine",
    "--momentum_dtype=fp32"])
def test_every_knob_turns_something(run_train, flag):
    usual, other = rows_of(run_train(checkpoint="a/gpt.pt")), rows_of(run_train(flag, checkpoint="b/gpt.pt"))
    assert usual[-1]["val_loss"] != other[-1]["val_loss"]


def test_what_watches_does_not_change_the_run(run_train):
    usual = run_train(checkpoint="a/gpt.pt")
    watched = run_train("--val_intervals=1", "--val_iter=5", "--log_intervals=4", "--verbose=1", "--sample_tokens=5",
                        checkpoint="b/gpt.pt")
    trained = [training_of(path) for path in (usual, watched)]
    for _, training in trained:
        del training["best"]  # of more validations
    assert_same(*trained)


def test_clipping_is_of_unscaled_gradients(run_train):
    """With fp16's loss scale left in the gradient, every step would be clipped to next to nothing."""
    flags = "--grad_clip=0.5", "--max_iter=20", "--val_intervals=20", "--learning_rate=0.01"
    exact, half = (rows_of(run_train(*flags, f"--dtype={dtype}", checkpoint=f"{dtype}/gpt.pt"))[-1]["val_loss"]
                   for dtype in ("fp32", "fp16"))
    assert half == pytest.approx(exact, abs=0.02) and exact < 6.2


def test_mfu_is_the_share_of_the_peak(run_train, monkeypatch, capsys):
    monkeypatch.setattr(train.Machine, "peak_flops", lambda self: 1e10)
    path = run_train("--verbose=1", "--sample_tokens=0")
    flops = GPT.from_checkpoint(load_checkpoint(path)).flops_per_token()
    for row in rows_of(path, clocks=True)[1:]:
        assert row["mfu"] == pytest.approx(row["tok_per_sec"] * flops / 1e10, abs=1e-4) and row["mfu"] > 0
    assert "mfu=" in capsys.readouterr().err


def test_verbose(run_train, capsys):
    run_train()
    assert capsys.readouterr() == ("", "")
    run_train("--verbose=1", "--sample_tokens=9", checkpoint="b/gpt.pt")
    said = capsys.readouterr()
    for words in ("2 layers x 16, attention and gelu, vocabulary 512", "epochs", "cpu, fp32", "step      6 | train",
                  "nats/token", "bits/byte", "sample, the start", "generate.py --checkpoint_path="):
        assert words in said.out, words
    assert "6/6" in said.err and "loss=" in said.err and "tok/s=" in said.err


# -- what is not overwritten ------------------------------------------------------------------------------------------

def test_a_fresh_run_never_overwrites(run_train, refused, tmp_path, data_path, capsys):
    path = run_train("--max_iter=3")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    refused(train.main, [f"--data_path={data_path}", f"--checkpoint_path={path}"], "--checkpoint_path=", "--overwrite",
            "--resume_checkpoint")
    refused(train.main, [f"--data_path={data_path}", f"--checkpoint_path={path.with_suffix('')}", "--overwrite"],
            "--checkpoint_path=", "is a folder: give a file")
    other = run_train("--max_iter=3", "--seed=2", checkpoint="run/other.pt")
    refused(train.main, [f"--resume_checkpoint={path}", f"--checkpoint_path={other}", "--max_iter=9"], "exists")
    assert {file: file.read_bytes() for file in before} == before
    run_train("--max_iter=6", "--overwrite", "--verbose=1", "--sample_tokens=0")
    assert load_checkpoint(path)["training"]["step"] == 6 and len(rows_of(path)) == 7
    assert f"replacing {path}" in capsys.readouterr().out


def test_overwriting_begins_when_there_is_something_to_write(run_train, monkeypatch, tmp_path):
    """A fresh run that is stopped in its first validation leaves the earlier one whole."""
    run_train("--max_iter=3")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def interrupted(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "validate", interrupted)
        run_train("--overwrite")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_closed_terminal_loses_no_checkpoint(run_train, monkeypatch, tmp_path):
    def closed(bar, row, progress):
        if row["step"] == 3:
            raise BrokenPipeError
    monkeypatch.setattr(train, "show", closed)
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        patch.setattr("os.dup2", lambda *args: None)
        run_train()
    assert load_checkpoint(tmp_path / "run" / "gpt.pt")["training"]["step"] == 3


def test_a_full_disk_keeps_the_last_checkpoint(run_train, monkeypatch, tmp_path, capsys):
    def full(path, blob):
        if blob["training"]["step"] == 6:
            raise OSError(f"{path}: cannot be written (No space left on device)")
        save_checkpoint(path, blob)
    monkeypatch.setattr("runtime.checkpoint.save_checkpoint", full)
    with pytest.raises(SystemExit) as stop:
        run_train()
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert re.search(r"gpt.pt: cannot be written \(No space.*gpt.pt holds step 3, from which --resume_checkpoint", error)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_dead_worker_is_one_line(run_train, monkeypatch, tmp_path, capsys):
    def kill():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.2)  # torch hears of it by a signal
    at_batch(monkeypatch, 3, kill)
    with pytest.raises(SystemExit) as stop:
        run_train("--dataloader_num_workers=1")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert "--dataloader_num_workers=1: a process that reads data died" in error and "holds step 0" in error


def test_too_little_memory_is_one_line(run_train, monkeypatch, tmp_path, capsys):
    def too_much():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried …")
    at_batch(monkeypatch, 3, too_much)
    with pytest.raises(SystemExit) as stop:
        run_train()
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "too little memory, " in error
    for words in ("--batch_size=4 blocks of 16 tokens", "--batch_size=auto", "--gradient_checkpointing", "holds step 0"):
        assert words in error


def test_a_diverged_run_keeps_its_last_checkpoint(run_train, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_train("--learning_rate=1e38", "--grad_clip=0", "--warmup_iter=0", "--max_iter=50", "--val_intervals=1000")
    assert stop.value.code == 1
    skipped, error = capsys.readouterr().err.splitlines()
    assert re.search(r"^train.py: loss or gradient not finite 2 times in a row, at step \d+: lower --learning_rate,.* "
                     r"\S+gpt.pt holds step 0, from which --resume_checkpoint goes on$", error)
    assert skipped.startswith("up to step ") and "changed nothing" in skipped
    blob = load_checkpoint(tmp_path / "run" / "gpt.pt")
    assert all(torch.isfinite(weight).all() for weight in blob["model"].values())


def test_weights_that_are_not_finite_are_never_saved(run_train, tmp_path, monkeypatch, capsys):
    """The loss of a batch can be finite while a weight that it does not reach is not."""
    step = trainer.train_step

    def poisoned(state, loop, loss_fn):
        done = step(state, loop, loss_fn)
        if state.step == 4:
            state.model.embed.weight.data[3] = torch.nan
        return done
    monkeypatch.setattr(trainer, "train_step", poisoned)
    monkeypatch.setattr(train, "validate", lambda *args: {"val_loss": 1.0, "val_bpb": 1.0})
    with pytest.raises(SystemExit) as stop:
        run_train()
    assert stop.value.code == 1
    assert re.search("no longer finite at step 6.*holds step 3", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run" / "gpt.pt")["training"]["step"] == 3


def test_a_validation_that_is_not_finite_stops_the_run(run_train, monkeypatch, tmp_path, capsys):
    values = iter([6.2, 6.1, math.nan])
    monkeypatch.setattr(train, "validate", lambda *args: {"val_loss": next(values), "val_bpb": 1.0})
    with pytest.raises(SystemExit) as stop:
        run_train()
    assert stop.value.code == 1 and re.search("validation loss is nan at step 6.*holds step 3", capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run" / "gpt.pt")["training"]["step"] == 3


def test_metrics_without_their_checkpoint_are_not_overwritten(run_train, refused, data_path):
    path = run_train("--max_iter=2")
    path.unlink()
    before = (path.with_suffix("") / "metrics.jsonl").read_bytes()
    refused(train.main, [f"--data_path={data_path}", f"--checkpoint_path={path}"], "--checkpoint_path=", "metrics of an")
    assert (path.with_suffix("") / "metrics.jsonl").read_bytes() == before


def test_where_metrics_go():
    names = {"a/gpt.pt": "a/gpt", "a/gpt": "a/gpt.run", "a/v1.0.pt": "a/v1.0", ".pt": ".pt.run"}
    assert {name: str(train.run_folder(Path(name))) for name in names} == names


@pytest.mark.parametrize("flag, words", [
    ("--n_layer=0", ["--n_layer=0", "at least 1"]), ("--head_size=7", ["--head_size=7", "even"]),
    ("--learning_rate=-1", ["--learning_rate=-1.0", "above 0"]), ("--num_batch_accum=0", ["--num_batch_accum=0"]),
    ("--batch_size=0", ["--batch_size=0"]), ("--max_iter=0", ["--max_iter=0"]), ("--val_iter=0", ["--val_iter=0"]),
    ("--val_intervals=0", ["--val_intervals=0"]), ("--dataloader_num_workers=-1", ["--dataloader_num_workers=-1"]),
    ("--device=cuda:9", ["--device=cuda:9", "has cpu"]), ("--dtype=fp8", ["--dtype=fp8", "bf16"]),
    ("--mlp=kan9", ["--mlp=kan9", "relu2"]), ("--n_layers=3", ["--n_layers=3", "did you mean --n_layer?"]),
    ("--n_head=1000000", ["--n_head=1000000", "at most"]), ("--batch_size=1e9", ["--batch_size=1000000000", "at most"]),
    ("--max_tokens=0", ["--max_tokens=0", "at least 1"]), ("--max_seconds=0", ["--max_seconds=0.0", "above 0"]),
    ("--preset=gpt3", ["--preset=gpt3", "gpt2, llama, 6gb, p100, cpu"]),
    ("--compile_model=perhaps", ["--compile_model", "1 nor 0"]), ("--optimizer=sgd", ["--optimizer=sgd", "muon"]),
    ("--batch_size=big", ["--batch_size", "'big'"]), ("--checkpoint_path=/dev/null/x/gpt.pt", ["--checkpoint_path"])])
def test_bad_flags(tmp_path, data_path, refused, flag, words):
    flags = [f"--data_path={data_path}", f"--checkpoint_path={tmp_path / 'run' / 'gpt.pt'}"]
    refused(train.main, [*flags, "--n_layer=1", "--block_size=16", "--n_head=1", "--head_size=8", flag], *words)
    assert not (tmp_path / "run").exists()


# -- torch.compile ----------------------------------------------------------------------------------------------------

def test_where_compiling_fails_training_goes_on(run_train, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler here")
    expected = run_train(checkpoint="a/gpt.pt")
    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    with pytest.warns(UserWarning, match="no compiler here") as caught:
        path = run_train("--compile_model", checkpoint="b/gpt.pt")
    assert len(caught) == 1
    assert_same(training_of(path), training_of(expected))


def test_it_is_compiled_once(run_train, monkeypatch):
    """What the trial compiles is what all steps run; validation, the sample and the end do not compile again."""
    graphs, compile_model = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_model(self, backend=backend))
    torch._dynamo.reset()
    run_train("--compile_model", "--max_iter=4", "--sample_tokens=8")
    assert len(graphs) == 1


@pytest.mark.parametrize("switches", [{}, {"mixer": "gated_delta"}, {"linear": "grkan"}])
def test_compiled_gradients_are_as_exact_as_eager_ones(switches, monkeypatch):
    """Under autocast, bit for bit without the compiler's own kernels: a backward pass traced under autocast would round."""
    traced = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: traced(self, backend="aot_eager"))
    model, idx = random_model(**switches, head_size=32, block_size=130), torch.arange(2 * 130).view(2, 130) % 96

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(idx, idx)
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]
    eager = gradients()
    torch._dynamo.reset()
    assert train.compile_in_place(model, gradients)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), eager))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--linear=grkan", "--mixer=DA"], ["--linear=grkan", "--gradient_checkpointing"],
                                   ["--mlp=chebkan"], ["--mlp=bspline"]])
def test_compiled_equals_eager(run_train, flags):
    eager = run_train(*flags, checkpoint="a/gpt.pt")
    compiled = run_train(*flags, "--compile_model", checkpoint="b/gpt.pt")
    for a, b in zip(rows_of(eager), rows_of(compiled)):
        assert a.get("train_loss") == pytest.approx(b.get("train_loss"), abs=1e-3)
    assert load_checkpoint(eager)["model"].keys() == load_checkpoint(compiled)["model"].keys()


@pytest.mark.parametrize("given, capability, compiles", [
    ("auto", None, False), ("auto", (6, 0), False), ("auto", (7, 0), True), ("1", None, True), ("0", (9, 0), False)])
def test_what_is_compiled(run_train, monkeypatch, given, capability, compiles):
    """auto: on GPUs that Triton knows; else as the flag says."""
    called = []
    monkeypatch.setattr(train, "compile_in_place", lambda model, try_step: called.append(try_step))
    if capability:
        monkeypatch.setattr("runtime.device.torch.cuda.get_device_capability", lambda device: capability)
        monkeypatch.setattr(train, "can_compile", lambda device, real=train.can_compile: real(torch.device("cuda")))
    run_train(f"--compile_model={given}", "--max_iter=1")
    assert len(called) == compiles


# -- presets ----------------------------------------------------------------------------------------------------------

def flags_with(*argv: str) -> dict:
    """What every flag of a fresh run is."""
    given, defaults = train.PRETRAINING.flags_given(argv), train.PRETRAINING.defaults()
    return train.resolve_flags(defaults | train.PRESETS.get(given.get("preset"), {}), given)


def test_the_gpt2_preset_is_nanogpts_recipe():
    """https://github.com/karpathy/nanoGPT: GPTConfig's and train.py's defaults, with config/train_gpt2.py on top."""
    values = flags_with("--preset=gpt2")
    model = {"n_layer": 12, "n_head": 12, "head_size": 768 // 12, "block_size": 1024, "norm": "layer", "bias": True,
             "mlp": "gelu", "positions": "learned", "tied": True, "init": "gpt2", "qk_norm": False, "softcap": 0,
             "value_residual": False, "x0_residual": False, "token_shift": False}
    recipe = {"learning_rate": 6e-4, "weight_decay": 1e-1, "grad_clip": 1.0, "warmup_iter": 2000, "max_iter": 600_000,
              "schedule": "cosine", "optimizer": "gpt2", "batch_size": 12, "num_batch_accum": 5 * 8, "val_intervals": 1000}
    assert {name: values[name] for name in model | recipe} == model | recipe
    assert values["batch_size"] * values["num_batch_accum"] * values["block_size"] == 491_520  # their "~0.5M" tokens


@pytest.mark.parametrize("preset", train.PRESETS)
def test_presets_give_way_to_flags_and_are_flags_themselves(preset):
    usual = flags_with()
    values = flags_with(f"--preset={preset}")
    assert values.pop("val_batch") == values["batch_size"]
    assert {name: value for name, value in values.items() if value != usual[name]} == {"preset": preset} | {
        name: value for name, value in train.PRESETS[preset].items() if value != usual[name]}
    for config in train.CONFIGS:
        train.read_flags(config, values)
    values = flags_with(f"--preset={preset}", "--batch_size=7", "--learning_rate=0.5", "--max_seconds=9")
    assert (values["batch_size"], values["learning_rate"], values["max_seconds"]) == (7, 0.5, 9)
    assert values["max_iter"] is None  # an end that is given is the only one


def test_the_gpt2_preset_trains(run_train):
    path = run_train("--preset=gpt2", *TINY_MODEL, "--batch_size=8", "--num_batch_accum=1", "--max_iter=30",
                     "--val_intervals=30", "--learning_rate=0.01")
    rows = rows_of(path)
    assert rows[0]["val_loss"] == pytest.approx(math.log(512), abs=0.1) and rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.5
    assert load_checkpoint(path)["config"]["norm"] == "layer"
    assert rows[-1]["lr"] < 0.2 * 0.01 and rows[15]["lr"] == pytest.approx(0.01 * (0.55), rel=0.2)


# -- ends -------------------------------------------------------------------------------------------------------------

def test_progress_by_hand():
    loop = trainer.LoopConfig(max_iter=10, max_tokens=1000, max_seconds=5.0)
    assert loop.progress(0, 0, 0.0) == 0 and loop.progress(5, 100, 1.0) == 0.5
    assert loop.progress(1, 800, 1.0) == 0.8 and loop.progress(1, 100, 4.5) == 0.9 and loop.progress(1, 1, 6.0) > 1
    assert trainer.LoopConfig().max_iter == 5000 and trainer.LoopConfig(max_tokens=9).max_iter is None
    assert trainer.LoopConfig(max_seconds=2.0).progress(10**6, 10**9, 1.0) == 0.5


def test_a_run_that_ends_by_tokens_is_one_that_ends_by_steps(run_train):
    by_steps = run_train("--max_iter=6", checkpoint="a/gpt.pt")
    for i, tokens in enumerate((6 * 128, 6 * 128 - 100)):  # the step that passes the end is the last
        recurrent_delta_rule = run_train(f"--max_tokens={tokens}", checkpoint=f"{i}/gpt.pt")
        assert [row["step"] for row in rows_of(recurrent_delta_rule)] == list(range(7))
        if tokens == 6 * 128:
            assert_same(training_of(by_steps), training_of(recurrent_delta_rule))
            assert rows_of(by_steps) == rows_of(recurrent_delta_rule)


def test_a_run_that_ends_by_seconds_cools_down(run_train, monkeypatch):
    """On a clock that goes on by a hundredth of a second whenever it is read: a few times in a step."""
    now = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(now) / 100))
    path = run_train("--max_seconds=2", "--warmup_iter=0", "--cooldown_frac=0.5", "--learning_rate=0.01",
                     "--val_intervals=1000")
    rows = rows_of(path, clocks=True)
    assert 2 <= rows[-1]["seconds"] < 2.1 and "val_loss" in rows[-1] and len(rows) > 50
    for before, row in zip(rows[1:], rows[2:]):
        assert row["lr"] == pytest.approx(0.01 * min(1, (1 - before["seconds"] / 2) / 0.5), abs=0.0002)
    assert rows[-1]["lr"] < 0.001 and rows[1]["lr"] == 0.01


def test_the_end_of_a_resumed_run_can_be_another(run_train, capsys):
    path = run_train("--max_iter=3")
    run_train("--resume_checkpoint", f"--max_tokens={5 * 128}", "--verbose=1", "--sample_tokens=0")
    said = capsys.readouterr().out
    assert "max_iter 3 -> None" in said and "max_tokens None -> 640; the schedule now fits" in said
    assert rows_of(path)[-1]["step"] == 5
    assert [load_checkpoint(path)["training"]["settings"][name] for name in ("max_iter", "max_tokens")] == [None, 640]
    run_train("--resume_checkpoint", "--verbose=1")
    assert "finished before at step 5; a larger --max_tokens trains on" in capsys.readouterr().out


def test_a_finished_run_by_tokens_wants_more(run_train, refused):
    path = run_train("--max_tokens=384")
    flags = ["--resume_checkpoint", f"--checkpoint_path={path}", "--max_tokens=100"]
    refused(train.main, flags, "--max_tokens=100", "step 3")


# -- batch_size=auto --------------------------------------------------------------------------------------------------

def fake_memory(monkeypatch, free, of_size):
    """The device has `free` bytes, and a step of a batch of n blocks comes to hold of_size(n) of them, or raises."""
    peak = [1000]

    def step(model, machine, batch_size):
        peak[0] = max(peak[0], 1000 + of_size(batch_size))
    monkeypatch.setattr(train, "dry_run_step", step)
    monkeypatch.setattr(memory, "peak_memory", lambda device: peak[0])
    monkeypatch.setattr(memory, "reset_peak_memory", lambda device: peak.__setitem__(0, 1000))
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    return lambda batch_size: step(None, None, batch_size)


def fitting(monkeypatch, n_blocks, free, of_size, device="cpu") -> int:
    step = fake_memory(monkeypatch, free, of_size)
    return largest_batch(step, torch.device(device), n_blocks, reserved=432)


@pytest.mark.parametrize("n_blocks, room, expected", [
    (64, 10**9, 64), (64, 40_500, 32), (64, 33_000, 32), (64, 31_900, 16), (60, 31_000, 30), (60, 29_900, 20), (7, 5_000, 1),
    (7, 10_000, 7), (1, 10**9, 1)])
def test_the_largest_batch_that_fits(monkeypatch, n_blocks, room, expected):
    """A divisor of the blocks of a step; 1000 bytes a block, and a tenth of what is free stays free."""
    assert fitting(monkeypatch, n_blocks, (room + 432) / 0.9 + 100, lambda n: 1000 * n) == expected


def test_two_sizes_say_what_all_would_take(monkeypatch):
    """On a CPU, where a step that does not fit would end the process, and every step of a large batch takes long."""
    tried = []

    def of_size(n):
        tried.append(n)
        return 500 + 100 * n
    assert fitting(monkeypatch, 64, 10**5, of_size) == 64 and tried == [1, 1, 2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_what_a_step_takes_is_seen_again_and_again():
    """Though freed memory is kept, and whatever the process held before."""
    done = subprocess.run([sys.executable, "-c", """if True:
        import torch
        from runtime.memory import disable_malloc_trim, peak_of_batch
        disable_malloc_trim()
        torch.ones(300 << 18)
        for n in 1, 1, 2, 1:
            print(peak_of_batch(lambda n: torch.ones(n * 50 << 18).add_(1), torch.device("cpu"), n) / 2**20)
        """], capture_output=True, text=True, cwd=Path(train.__file__).parent, check=True)
    assert [float(line) for line in done.stdout.split()] == pytest.approx([50, 50, 100, 50], abs=5)


def test_a_system_that_does_not_tell_what_a_step_takes(data_path, tmp_path, monkeypatch, refused):
    def cannot(self):
        raise OSError
    monkeypatch.setattr(memory, "reset_peak_memory", cannot)
    refused(train.main, [f"--data_path={data_path}", f"--checkpoint_path={tmp_path}/gpt.pt", *TINY_MODEL, "--device=cpu",
                         "--batch_size=auto"], "--batch_size=auto", "give a number")
    assert list(tmp_path.glob("**/*.pt")) == []


def test_a_trial_step_leaves_no_gradient(data_path):
    model = GPT(train.GPTConfig(n_layer=1, n_head=1, head_size=8, block_size=16, vocab_size=512))
    machine = train.Machine(torch.device("cpu"), "fp32")
    train.dry_run_step(model, machine, 2)
    assert all(parameter.grad is None for parameter in model.parameters())

    def fails_late(weight):
        raise RuntimeError("too late")
    model.embed.weight.register_hook(fails_late)
    with pytest.raises(RuntimeError, match="too late"):
        train.dry_run_step(model, machine, 2)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gpu_tries_what_should_fit(monkeypatch):
    """Its allocator has gaps that two small sizes do not show."""
    tried = []

    def of_size(n):
        tried.append(n)
        if n > 16:
            raise RuntimeError("CUDA out of memory. Tried to allocate …")
        return 1000 * n
    assert fitting(monkeypatch, 64, 10**9, of_size, "cuda") == 16 and tried == [1, 1, 2, 64, 32, 16]

    def broken(n):
        raise RuntimeError("another error")
    with pytest.raises(RuntimeError, match="another error"):
        fitting(monkeypatch, 64, 10**9, broken, "cuda")


def test_room_for_nothing_is_one_line(run_train, monkeypatch, capsys):
    def too_much(n):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")
    for free, of_size in ((10**9, too_much), (10, lambda n: 1000)):
        fake_memory(monkeypatch, free, of_size)
        with pytest.raises(SystemExit) as stop:
            run_train("--batch_size=auto")
        error, = capsys.readouterr().err.splitlines()
        assert stop.value.code == 1 and error.startswith("train.py: ") and "not even a batch of one block fits" in error


@pytest.mark.parametrize("free, sizes", [(10**9, (32, 1)), (9_000_000 / 0.9, (8, 4))])
def test_a_batch_that_was_found_trains_as_one_that_was_given(run_train, monkeypatch, free, sizes):
    """Steps keep the tokens that they would have had: 2 batches of the usual 4 blocks, here 8 * 4."""
    batch_size, accum = sizes
    with monkeypatch.context() as patch:
        memory(patch, free, lambda n: 1_000_000 * n)
        found = run_train("--batch_size=auto", "--num_batch_accum=8", checkpoint="a/gpt.pt")
    given = run_train(f"--batch_size={batch_size}", f"--num_batch_accum={accum}", checkpoint="b/gpt.pt")
    settings = load_checkpoint(found)["training"]["settings"]
    assert (settings["batch_size"], settings["num_batch_accum"]) == sizes
    model, other = load_checkpoint(found)["model"], load_checkpoint(given)["model"]
    assert all(torch.equal(model[name], other[name]) for name in other)
    assert [row.get("train_loss") for row in rows_of(found)] == [row.get("train_loss") for row in rows_of(given)]
    assert rows_of(found)[1]["tokens"] == 32 * 16
    usual = rows_of(run_train("--num_batch_accum=8", "--max_iter=3", checkpoint="c/gpt.pt"))  # 4 blocks a batch
    assert rows_of(found)[0]["val_loss"] == usual[0]["val_loss"]  # the same text, however large the batch found


def test_a_batch_is_found_on_this_machine(run_train):
    path = run_train("--batch_size=auto", "--max_iter=1")
    settings = load_checkpoint(path)["training"]["settings"]
    assert settings["batch_size"] * settings["num_batch_accum"] == 4 * 2 and rows_of(path)[1]["tokens"] == 128


# -- dtype ------------------------------------------------------------------------------------------------------------

def test_a_resumed_run_keeps_the_dtype_that_was_chosen(run_train, tmp_path, monkeypatch, capsys):
    """Though timing the products again would choose another."""
    monkeypatch.setattr("runtime.device.x86_dtype", lambda: None)

    def fastest(dtype):
        monkeypatch.setattr("runtime.device.measured_flops", lambda device, name, n: 9e9 if name == dtype else 1e9)
    fastest("bf16")
    path = run_train("--dtype=auto", "--max_iter=2")
    fastest("fp32")
    run_train("--resume_checkpoint", "--max_iter=3", "--verbose=1", "--sample_tokens=0")
    said = capsys.readouterr().out
    assert "cpu, bf16" in said and "machine cpu" not in said
    assert load_checkpoint(path)["training"]["machine"] == "cpu, bf16"
    run_train("--resume_checkpoint", "--max_iter=4", "--dtype=fp32", "--verbose=1", "--sample_tokens=0")
    assert "changed on resuming: machine cpu, bf16 -> cpu, fp32" in capsys.readouterr().out


# -- steps that are not finite ----------------------------------------------------------------------------------------

def poison(monkeypatch, steps, value=math.nan, per_step=2):
    """The loss of the second batch of these steps (from 1) is `value`, and so are its gradients."""
    loss_fn, calls = trainer.next_token_loss, itertools.count()

    def poisoned(model, batch):
        loss, n = loss_fn(model, batch), next(calls)
        return loss * value if n % per_step == 1 and n // per_step + 1 in steps else loss
    monkeypatch.setattr(trainer, "next_token_loss", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("flags", [[], ["--grad_clip=0.5", "--optimizer=adamw"], GPT2])
def test_a_poisoned_step_changes_nothing_and_the_run_goes_on(run_train, monkeypatch, capsys, value, flags):
    with monkeypatch.context() as patch:
        poison(patch, [3], value)
        path = run_train(*flags, "--val_intervals=1")
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("up to step 3: ") and "not finite" in line and "changed nothing" in line
    rows = rows_of(path)
    assert [row["skipped"] for row in rows[1:]] == [0, 0, 1, 1, 1, 1] and len(rows) == 7
    assert rows[3]["val_loss"] == rows[2]["val_loss"] != rows[4]["val_loss"]
    assert math.isfinite(rows[-1]["val_loss"]) and math.isfinite(rows[-1]["grad_norm"])
    assert load_checkpoint(path)["training"]["watch"][:3].tolist() == [0, 1, 0]


def test_metrics_of_a_poisoned_step_are_json(run_train, monkeypatch):
    """NaN is not JSON: strict readers refuse the file."""
    poison(monkeypatch, [3])
    path = run_train()

    def refuse(constant):
        raise AssertionError(constant)
    for line in (path.with_suffix("") / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_two_poisoned_steps_in_a_row_end_the_run(run_train, monkeypatch, capsys, tmp_path):
    poison(monkeypatch, [2, 4, 5])
    with pytest.raises(SystemExit) as stop:
        run_train("--max_iter=9")
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "2 times in a row, at step 5" in error[-1]
    assert "gpt.pt holds step 3, from which --resume_checkpoint goes on" in error[-1]
    assert [line.split(":")[0] for line in error] == ["up to step 2", "up to step 4", "train.py"]
    blob = load_checkpoint(tmp_path / "run" / "gpt.pt")
    assert blob["training"]["step"] == 3 and all(torch.isfinite(weight).all() for weight in blob["model"].values())


def test_poisoned_steps_between_two_rows_end_the_run_at_the_next(run_train, monkeypatch, capsys):
    """The host looks only when a row is due; what it then sees is the step at which it happened."""
    poison(monkeypatch, [2, 3])
    with pytest.raises(SystemExit):
        run_train("--max_iter=9", "--log_intervals=5", "--val_intervals=100")
    assert "2 times in a row, at step 3:" in capsys.readouterr().err


def test_the_count_of_steps_in_a_row_is_resumed(run_train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        poison(patch, [3])
        path = run_train("--max_iter=3")
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        poison(patch, [1])
        run_train("--resume_checkpoint", "--max_iter=9")
    assert "2 times in a row, at step 4:" in capsys.readouterr().err
    assert load_checkpoint(path)["training"]["step"] == 3


def test_an_overflow_of_fp16_halves_the_scale_and_the_run_goes_on(run_train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        poison(patch, [2, 3, 5], math.inf)
        path = run_train("--dtype=fp16")
    assert capsys.readouterr().err == ""  # that is how the scale is found
    assert load_checkpoint(path)["training"]["scaler"]["scale"] == 65_536 / 2**3
    rows = rows_of(path)
    assert [row["skipped"] for row in rows[1:]] == [0, 1, 2, 2, 3, 3] and math.isfinite(rows[-1]["val_loss"])


def test_fp16_that_always_overflows_ends_the_run(run_train, monkeypatch, capsys):
    monkeypatch.setattr(train, "FP16_SKIPS", 4)
    poison(monkeypatch, range(3, 100), math.inf)
    with pytest.raises(SystemExit) as stop:
        run_train("--dtype=fp16", "--max_iter=50")
    error, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "4 times in a row, at step 6" in error and "holds step 3" in error


# -- curves -----------------------------------------------------------------------------------------------------------

def test_plot_draws_runs_that_were(run_train, capsys, refused, tmp_path):
    first, second = run_train(checkpoint="a/gpt.pt"), run_train("--seed=1", checkpoint="b/gpt.pt")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    image = first.with_suffix("") / "curves.png"
    for flags in ([f"--checkpoint_path={first}", "--plot"],
                  [f"--plot={first.with_suffix('')},{second},{second.with_suffix('') / 'metrics.jsonl'}"]):
        train.main(flags)
        assert capsys.readouterr().out == f"{image}\n"
        assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 20_000
        image.unlink()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    refused(train.main, [f"--plot={first},{tmp_path / 'none.pt'}"], "--plot=", "none/metrics.jsonl holds no rows")
    refused(train.main, [f"--checkpoint_path={tmp_path / 'none.pt'}", "--plot"], "holds no rows")
    refused(train.main, ["--plot="], "--plot=: is empty")
    (tmp_path / "bare.jsonl").write_text('{"step": 1, "val_loss": 3.0}\n')
    refused(train.main, [f"--plot={tmp_path / 'bare.jsonl'}"], "holds no rows")
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"step": 1, "val_loss": 3.0}\n{"step": 2, "tokens": 9, "seconds": 1.0, "val_loss": 2.0}\n')
    train.main([f"--plot={odd}"])
    assert (tmp_path / "odd.png").exists()
    assert not image.exists() and not (tmp_path / "none").exists()
