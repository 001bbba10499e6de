"""What a run leaves on disk, and what survives whatever ends it."""
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import train
import trainer
from conftest import REPO, TINY_MODEL, assert_same, at_batch, rows_of, stop_in, training_of
from runtime.checkpoint import CheckpointWriter, load_checkpoint, run_folder, save_checkpoint
from runtime.files import folder_lock


def step_of(path) -> int:
    return load_checkpoint(path)["training"]["step"]


def validations(monkeypatch, *losses):
    """What the validations of the run find, one after the other."""
    values = iter(losses)
    monkeypatch.setattr(train, "validate", lambda *args: {"val_loss": next(values), "val_bpb": 1.0})


@pytest.fixture
def aside(monkeypatch):
    """Every checkpoint that may be is written by a thread."""
    monkeypatch.setattr(CheckpointWriter, "PAUSE", -1)


# -- the last, the previous, the best ---------------------------------------------------------------------------------

@pytest.mark.parametrize("losses, best", [((6, 5, 4, 3), 6), ((6, 4, 5, 4.5), 2), ((3, 4, 5, 6), 0), ((6, 5, 5, 5), 2)])
def test_a_run_keeps_its_last_its_previous_and_its_best(run_train, monkeypatch, losses, best):
    validations(monkeypatch, *losses)
    path = run_train("--val_intervals=2")
    folder = run_folder(path)
    assert (step_of(path), step_of(folder / "previous.pt"), step_of(folder / "best.pt")) == (6, 4, best)
    assert load_checkpoint(path)["training"]["best"] == min(losses)
    assert min((row["val_loss"], row["step"]) for row in rows_of(path) if "val_loss" in row)[1] == best
    same = {6: path, 4: folder / "previous.pt"}.get(best)
    assert same is None or (folder / "best.pt").samefile(same)  # a second name, not a second file
    assert not list(path.parent.rglob("*.tmp"))


def test_the_best_is_kept_over_a_resumption(run_train, monkeypatch):
    validations(monkeypatch, 6.0, 3.0, 4.0)
    path = run_train()
    validations(monkeypatch, 3.5, 3.2)
    run_train("--resume_checkpoint", "--max_iter=12")
    assert step_of(run_folder(path) / "best.pt") == 3 and step_of(run_folder(path) / "previous.pt") == 9
    validations(monkeypatch, 2.9)
    run_train("--resume_checkpoint", "--max_iter=15")
    assert step_of(run_folder(path) / "best.pt") == 15


def test_a_run_that_is_killed_before_it_names_its_best_names_it_when_it_resumes(run_train, monkeypatch, tmp_path):
    """The checkpoint of step 3 was written, and then came the end: its name best.pt is still to be given."""
    path, folder = tmp_path / "run" / "gpt.pt", tmp_path / "run" / "gpt"
    validations(monkeypatch, 6.0, 3.0)

    def killed(target, name):
        if name.name == "best.pt" and step_of(target) == 3:
            raise KeyboardInterrupt
        link(target, name)
    import runtime.checkpoint
    link = runtime.checkpoint.replace_with_link
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runtime.checkpoint, "replace_with_link", killed)
        run_train()
    assert step_of(path) == 3 and step_of(folder / "best.pt") == 0
    validations(monkeypatch, 4.0)
    run_train("--resume_checkpoint")
    assert step_of(path) == 6 and step_of(folder / "best.pt") == 3


def test_overwriting_leaves_nothing_of_the_earlier_run(run_train):
    path = run_train()
    old = {load_checkpoint(file)["training"]["settings"]["seed"] for file in path.parent.rglob("*.pt")}
    run_train("--overwrite", "--seed=7", "--max_iter=2", "--val_intervals=2")
    files = sorted(path.parent.rglob("*.pt"))
    assert old == {1337} and len(files) == 3
    assert {load_checkpoint(file)["training"]["settings"]["seed"] for file in files} == {7}


def test_a_run_that_goes_on_elsewhere_leaves_the_first_as_it_was(run_train, tmp_path):
    first = run_train("--max_iter=3", checkpoint="a/gpt.pt")
    before = {file: file.read_bytes() for file in first.parent.rglob("*") if file.is_file()}
    second = tmp_path / "b" / "gpt.pt"
    train.main([f"--resume_checkpoint={first}", f"--checkpoint_path={second}", "--max_iter=9", "--verbose=0"])
    assert {file: file.read_bytes() for file in before} == before and set(before) == {
        file for file in first.parent.rglob("*") if file.is_file()}
    assert (run_folder(second) / "best.pt").exists()
    assert step_of(second) == 9 and step_of(run_folder(second) / "previous.pt") == 6


def test_a_damaged_checkpoint_is_mended_by_the_command_it_names(run_train, tmp_path, refused):
    expected = run_train("--weight_decay=0", "--max_iter=9", checkpoint="whole/gpt.pt")
    path = run_train("--weight_decay=0")
    path.write_bytes(path.read_bytes()[:-1000])
    line = refused(train.main, ["--resume_checkpoint", f"--checkpoint_path={path}"], "damaged", "previous.pt")
    flags = [word for word in line.split() if word.startswith("--")]
    assert [flag.split("=")[0] for flag in flags] == ["--resume_checkpoint", "--checkpoint_path", "--overwrite"]
    train.main([*flags, "--max_iter=9", "--verbose=0"])
    assert_same(training_of(path), training_of(expected))
    assert rows_of(path) == rows_of(expected)
    assert step_of(run_folder(path) / "previous.pt") == 6


@pytest.mark.parametrize("name", ["previous.pt", "best.pt"])
def test_going_on_from_a_kept_checkpoint_needs_no_path(run_train, refused, monkeypatch, name):
    """The run is the one whose folder it is in, which is not replaced without being asked for."""
    with monkeypatch.context() as patch:
        validations(patch, 6.0, 3.0, 4.0)
        path = run_train()
    kept = run_folder(path) / name
    assert step_of(kept) == 3
    refused(train.main, [f"--resume_checkpoint={kept}", "--max_iter=9"], f"go on in {path}, which exists", "--overwrite")
    with monkeypatch.context() as patch:
        validations(patch, 5.0, 5.0)
        train.main([f"--resume_checkpoint={kept}", "--max_iter=9", "--overwrite", "--verbose=0"])
    assert step_of(run_folder(path) / "best.pt") == 3  # nothing better came
    assert step_of(path) == 9 and [row["step"] for row in rows_of(path)] == list(range(10))
    assert not (run_folder(path) / name.removesuffix(".pt")).exists()


# -- written aside ----------------------------------------------------------------------------------------------------

def test_writing_aside_changes_nothing(run_train, monkeypatch):
    """Though the thread comes to write only when training has gone on."""
    expected = run_train("--val_intervals=1", checkpoint="a/gpt.pt")
    writers = []

    def slow(path, blob):
        time.sleep(0.03)
        save_checkpoint(path, blob)
        writers.append(threading.current_thread() is threading.main_thread())
    monkeypatch.setattr(CheckpointWriter, "PAUSE", -1)
    monkeypatch.setattr("runtime.checkpoint.save_checkpoint", slow)
    path = run_train("--val_intervals=1", checkpoint="b/gpt.pt")
    assert writers == [True, *[False] * 5, True]  # the first and the last at once
    assert rows_of(path) == rows_of(expected)
    for a, b in ((path, expected), *((run_folder(path) / name, run_folder(expected) / name)
                                     for name in ("previous.pt", "best.pt"))):
        assert_same(training_of(a), training_of(b))


def test_each_checkpoint_written_aside_holds_its_own_step(run_train, monkeypatch, aside):
    """The weights of step 3 are those that step 3 had, not those of step 5 when they were written."""
    seen, step = {}, trainer.train_step

    def watched(state, loop, loss_fn):
        done = step(state, loop, loss_fn)
        seen[state.step + 1] = {name: weight.clone() for name, weight in state.model.state_dict().items()}
        return done
    monkeypatch.setattr(trainer, "train_step", watched)
    written = {}

    def slow(path, blob):
        time.sleep(0.05)
        save_checkpoint(path, blob)
        written[blob["training"]["step"]] = load_checkpoint(path)
    monkeypatch.setattr("runtime.checkpoint.save_checkpoint", slow)
    run_train("--val_intervals=2")
    assert sorted(written) == [0, 2, 4, 6]
    for step_number in (2, 4, 6):
        assert_same(written[step_number]["model"], seen[step_number])


def test_a_run_written_aside_resumes_bit_for_bit(run_train, monkeypatch, tmp_path, aside):
    expected = run_train(checkpoint="whole/gpt.pt")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_in(patch, 3)
        run_train(checkpoint="stopped/gpt.pt")
    path = tmp_path / "stopped" / "gpt.pt"
    assert stop.value.code == 128 + signal.SIGTERM and step_of(path) == 4
    run_train("--resume_checkpoint", checkpoint="stopped/gpt.pt")
    assert_same(training_of(path), training_of(expected))
    assert rows_of(path) == rows_of(expected)


@pytest.mark.parametrize("error, words", [
    (OSError("gpt.pt: cannot be written (No space left on device)"), "No space left"),
    (MemoryError("too little memory to copy"), "too little memory to copy")])
def test_a_write_aside_that_fails_ends_the_run_in_one_line(run_train, monkeypatch, tmp_path, capsys, aside, error, words):
    def full(path, blob):
        if blob["training"]["step"] == 3:
            raise error
        save_checkpoint(path, blob)
    monkeypatch.setattr("runtime.checkpoint.save_checkpoint", full)
    with pytest.raises(SystemExit) as stop:
        run_train("--max_iter=30", "--val_intervals=3")
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and words in line and "gpt.pt holds step 0, from which --resume_checkpoint goes on" in line
    assert step_of(tmp_path / "run" / "gpt.pt") == 0


# -- signals, and others at work --------------------------------------------------------------------------------------

def test_two_runs_do_not_share_a_checkpoint(run_train, tmp_path, refused, data_path):
    path = run_train()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    flags = [f"--checkpoint_path={path}", f"--data_path={data_path}"]
    with folder_lock(run_folder(path), "held by the test"):
        refused(train.main, [*flags, "--overwrite"], f"--checkpoint_path={path}: another process is writing there")
        refused(train.main, [*flags, "--resume_checkpoint", "--max_iter=9"], "another process is writing there")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    run_train("--resume_checkpoint", "--max_iter=9")
    assert step_of(path) == 9


def test_a_run_holds_its_checkpoint_against_others_while_it_trains(run_train, monkeypatch, capsys):
    second = []

    def start_another():
        with contextlib.suppress(SystemExit):
            run_train("--overwrite")
        second.append(capsys.readouterr().err)
    at_batch(monkeypatch, 5, start_another)
    path = run_train()
    assert second[0].count("\n") == 1 and "another process is writing there" in second[0]
    assert step_of(path) == 6


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
def test_a_terminal_that_closes_saves(run_train, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_in(patch, 3, number=signal.SIGHUP)
        run_train()
    assert stop.value.code == 129 and step_of(tmp_path / "run" / "gpt.pt") == 4


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
def test_under_nohup_a_terminal_that_closes_is_nothing(run_train, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_in(monkeypatch, 3, number=signal.SIGHUP)
        assert step_of(run_train()) == 6
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_changed_batch_goes_on_with_the_blocks_that_come_next(run_train, tmp_path):
    """4 x 2 or 8 x 1 blocks a step: the same data, so nearly the same losses."""
    expected = run_train(checkpoint="whole/gpt.pt")
    path = run_train("--max_iter=3", "--cooldown_frac=0", checkpoint="b/gpt.pt")
    run_train("--resume_checkpoint", "--max_iter=6", "--cooldown_frac=0.6", "--batch_size=8", "--num_batch_accum=1",
              "--val_iter=1", checkpoint="b/gpt.pt")
    other = run_train("--max_iter=3", "--cooldown_frac=0", checkpoint="c/gpt.pt")
    run_train("--resume_checkpoint", "--max_iter=6", "--cooldown_frac=0.6", checkpoint="c/gpt.pt")
    for a, b in zip(rows_of(path)[1:], rows_of(other)[1:]):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-3) and a["tokens"] == b["tokens"]
    assert [row["tokens"] for row in rows_of(path)] == [row["tokens"] for row in rows_of(expected)]


# -- kill -9 ----------------------------------------------------------------------------------------------------------

ASIDE = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import train
train.CheckpointWriter.PAUSE = -1
train.main(sys.argv[1:])
"""


def modified(path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("n_kills, n_steps", [(3, 60), pytest.param(20, 400, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(run_train, tmp_path, data_path, n_kills, n_steps):
    """By SIGKILL, at random moments of a run that writes checkpoints all the time, every other one by a thread."""
    flags = [f"--max_iter={n_steps}", "--val_intervals=2", "--val_iter=1"]
    expected, chance = run_train(*flags, checkpoint="whole/gpt.pt"), random.Random(n_kills)
    path, kills = tmp_path / "killed" / "gpt.pt", 0
    fresh = [f"--data_path={data_path}", *TINY_MODEL, "--dtype=fp32", "--device=cpu", "--batch_size=4",
             "--num_batch_accum=2", "--log_intervals=1", "--warmup_iter=2", "--dataloader_num_workers=0", *flags]
    starts = 0
    while True:
        last = modified(path)
        program = ["-c", ASIDE] if starts % 2 else [str(REPO / "train.py")]
        process = subprocess.Popen(
            [sys.executable, *program, f"--checkpoint_path={path}", "--verbose=0",
             *(["--resume_checkpoint"] if last else fresh)], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, text=True)
        starts += 1
        try:
            if kills < n_kills:
                end = time.monotonic() + 60
                for _ in range(chance.randint(1, 3)):  # so many checkpoints, and a part of the next
                    while process.poll() is None and (now := modified(path)) == last:
                        assert time.monotonic() < end, "nothing was written"
                        time.sleep(0.002)
                    last = now
                time.sleep(chance.uniform(0, 0.05))
                process.kill()
            error = process.communicate(timeout=300)[1]
        finally:
            process.kill()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
        for file in path.parent.rglob("*.pt"):
            assert 0 <= step_of(file) < n_steps  # whole, and not the end
    assert kills == n_kills  # else it was too short
    assert_same(training_of(path), training_of(expected))
    assert rows_of(path) == rows_of(expected)
    for name in ("previous.pt", "best.pt"):
        assert step_of(run_folder(path) / name) == step_of(run_folder(expected) / name), name
    assert not list(path.parent.rglob("*.tmp"))
    assert all(torch.isfinite(weight).all() for weight in load_checkpoint(path)["model"].values())
