"""The files of a run: latest, previous and best checkpoint, writes in the background, locks, and what survives a kill."""
import contextlib
import os
import random
import signal
import threading
import time

import commands
import pytest
import torch

import runtime.checkpoint
import train
import trainer
from conftest import REPO, TINY_MODEL, assert_same, before_batch, run_rows, saved_training, signal_in_step
from runtime.checkpoint import CheckpointWriter, load_checkpoint, run_folder, run_lock, save_checkpoint
from runtime.files import folder_lock


def step_of(path) -> int:
    return load_checkpoint(path)["training"]["step"]


def script_validations(monkeypatch, *losses):
    """Makes the run's validations return these losses, one after the other."""
    remaining = iter(losses)
    monkeypatch.setattr(train, "validate", lambda *args: {"val_loss": next(remaining), "val_bpb": 1.0})


def contents(folder) -> dict:
    """Every file of the folder with its bytes."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def write_async(monkeypatch):
    """Every checkpoint that need not be blocking is written by a thread."""
    monkeypatch.setattr(CheckpointWriter, "MAX_PAUSE_SECONDS", -1)


# -- latest, previous and best ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("losses, best", [((6, 5, 4, 3), 6), ((6, 4, 5, 4.5), 2), ((3, 4, 5, 6), 0), ((6, 5, 5, 5), 2)])
def test_a_run_keeps_its_latest_previous_and_best_checkpoint(run_train, monkeypatch, losses, best):
    script_validations(monkeypatch, *losses)
    path = run_train("--val_intervals=2")
    folder = run_folder(path)
    assert (step_of(path), step_of(folder / "previous.pt"), step_of(folder / "best.pt")) == (6, 4, best)
    assert load_checkpoint(path)["training"]["best"] == min(losses)
    assert min((row["val_loss"], row["step"]) for row in run_rows(path) if "val_loss" in row)[1] == best
    same = {6: path, 4: folder / "previous.pt"}.get(best)
    assert same is None or (folder / "best.pt").samefile(same)  # a hard link, not a second copy
    assert not list(path.parent.rglob("*.tmp"))


def test_resuming_in_place_keeps_the_best(run_train, monkeypatch):
    script_validations(monkeypatch, 6.0, 3.0, 4.0)
    path = run_train()
    script_validations(monkeypatch, 3.5, 3.2)
    run_train("--resume_checkpoint", "--max_iter=12")
    assert step_of(run_folder(path) / "best.pt") == 3 and step_of(run_folder(path) / "previous.pt") == 9
    script_validations(monkeypatch, 2.9)
    run_train("--resume_checkpoint", "--max_iter=15")
    assert step_of(run_folder(path) / "best.pt") == 15


@pytest.mark.parametrize("kept", ["latest", "previous.pt", "best.pt"])
def test_resuming_elsewhere_starts_a_best_of_its_own(run_train, monkeypatch, tmp_path, kept):
    """Though the checkpoint that it resumes was better than anything that the new run finds."""
    with monkeypatch.context() as patch:
        script_validations(patch, 6.0, 3.0, 4.0)
        first = run_train(checkpoint="a/gpt.pt")
    before = contents(first.parent)
    source = first if kept == "latest" else run_folder(first) / kept
    script_validations(monkeypatch, 5.0, 4.5, 4.7)
    second = tmp_path / "b" / "gpt.pt"
    steps = range(step_of(source), step_of(source) + 10, 3)
    train.main([f"--resume_checkpoint={source}", f"--checkpoint_path={second}", f"--max_iter={steps[-1]}", "--verbose=0"])
    assert step_of(run_folder(second) / "best.pt") == steps[2] and load_checkpoint(second)["training"]["best"] == 4.5
    assert step_of(second) == steps[3] and step_of(run_folder(second) / "previous.pt") == steps[2]
    assert contents(first.parent) == before


@pytest.mark.parametrize("name", ["previous.pt", "best.pt"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_resuming_from_a_runs_own_best_or_previous_keeps_its_best(run_train, refused, monkeypatch, name, relative):
    """The run is the one whose folder the file is in, however the path is written. It is not replaced unasked."""
    with monkeypatch.context() as patch:
        script_validations(patch, 6.0, 3.0, 4.0)
        path = run_train()
    kept = run_folder(path) / name
    assert step_of(kept) == 3
    flags = [f"--resume_checkpoint={kept}"]
    refused(train.main, [*flags, "--max_iter=9"], f"continue in {path}, which exists", "--overwrite")
    if relative:
        monkeypatch.chdir(path.parent)
        flags += [f"--checkpoint_path={path.name}"]
    with monkeypatch.context() as patch:
        script_validations(patch, 5.0, 5.0)
        train.main([*flags, "--max_iter=9", "--overwrite", "--verbose=0"])
    assert step_of(run_folder(path) / "best.pt") == 3  # nothing better came
    assert load_checkpoint(path)["training"]["best"] == 3.0
    assert step_of(path) == 9 and [row["step"] for row in run_rows(path)] == list(range(10))
    assert not (run_folder(path) / name.removesuffix(".pt")).exists()


def test_a_run_killed_before_it_links_its_best_links_it_when_it_resumes(run_train, monkeypatch, tmp_path):
    """The checkpoint of step 3 was written, best.pt still names that of step 0."""
    path, folder = tmp_path / "run" / "gpt.pt", tmp_path / "run" / "gpt"
    script_validations(monkeypatch, 6.0, 3.0)
    link = runtime.checkpoint.replace_with_link

    def killed(target, name):
        if name.name == "best.pt" and step_of(target) == 3:
            raise KeyboardInterrupt
        link(target, name)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(runtime.checkpoint, "replace_with_link", killed)
        run_train()
    assert step_of(path) == 3 and step_of(folder / "best.pt") == 0
    script_validations(monkeypatch, 4.0)
    run_train("--resume_checkpoint")
    assert step_of(path) == 6 and step_of(folder / "best.pt") == 3


def test_overwriting_leaves_nothing_of_the_earlier_run(run_train):
    seeds = lambda files: {load_checkpoint(file)["training"]["settings"]["seed"] for file in files}
    path = run_train("--max_iter=4")
    assert seeds(path.parent.rglob("*.pt")) == {1337}
    run_train("--overwrite", "--seed=7", "--max_iter=2", "--val_intervals=2")
    files = sorted(path.parent.rglob("*.pt"))
    assert len(files) == 3 and seeds(files) == {7}


def test_a_damaged_checkpoint_is_recovered_by_the_command_that_the_error_names(run_train, refused):
    expected = run_train("--weight_decay=0", "--max_iter=9", checkpoint="whole/gpt.pt")
    path = run_train("--weight_decay=0")
    path.write_bytes(path.read_bytes()[:-1000])
    line = refused(train.main, ["--resume_checkpoint", f"--checkpoint_path={path}"], "damaged", "previous.pt")
    flags = [word for word in line.split() if word.startswith("--")]
    assert [flag.split("=")[0] for flag in flags] == ["--resume_checkpoint", "--checkpoint_path", "--overwrite"]
    train.main([*flags, "--max_iter=9", "--verbose=0"])
    assert_same(saved_training(path), saved_training(expected))
    assert run_rows(path) == run_rows(expected)
    assert step_of(run_folder(path) / "previous.pt") == 6


# -- background writes ------------------------------------------------------------------------------------------------

def test_background_writes_change_nothing(run_train, monkeypatch):
    """Though each is delayed until training has moved on."""
    expected = run_train("--val_intervals=1", checkpoint="a/gpt.pt")
    blocking = []

    def slow(path, checkpoint, **options):
        time.sleep(0.03)
        save_checkpoint(path, checkpoint, **options)
        blocking.append(threading.current_thread() is threading.main_thread())
    monkeypatch.setattr(CheckpointWriter, "MAX_PAUSE_SECONDS", -1)
    monkeypatch.setattr(runtime.checkpoint, "save_checkpoint", slow)
    path = run_train("--val_intervals=1", checkpoint="b/gpt.pt")
    assert blocking == [True, *[False] * 5, True]  # the first and the last
    assert run_rows(path) == run_rows(expected)
    for a, b in ((path, expected), *((run_folder(path) / name, run_folder(expected) / name)
                                     for name in ("previous.pt", "best.pt"))):
        assert_same(saved_training(a), saved_training(b))


def test_each_background_write_holds_the_weights_of_its_step(run_train, monkeypatch, write_async):
    """Not those of the time at which it is written."""
    seen, written, train_step = {}, {}, trainer.train_step

    def recorded(state, *args):
        done = train_step(state, *args)
        seen[state.step + 1] = {name: weight.clone() for name, weight in state.model.state_dict().items()}
        return done

    def slow(path, checkpoint, **options):
        time.sleep(0.05)
        save_checkpoint(path, checkpoint, **options)
        written[checkpoint["training"]["step"]] = load_checkpoint(path)
    monkeypatch.setattr(trainer, "train_step", recorded)
    monkeypatch.setattr(runtime.checkpoint, "save_checkpoint", slow)
    run_train("--val_intervals=2")
    assert sorted(written) == [0, 2, 4, 6]
    for step in (2, 4, 6):
        assert_same(written[step]["model"], seen[step])


def test_a_stopped_run_with_background_writes_resumes_bit_for_bit(run_train, monkeypatch, tmp_path, write_async):
    expected = run_train(checkpoint="whole/gpt.pt")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_in_step(patch, 3)
        run_train(checkpoint="stopped/gpt.pt")
    path = tmp_path / "stopped" / "gpt.pt"
    assert stop.value.code == 128 + signal.SIGTERM and step_of(path) == 4
    run_train("--resume_checkpoint", checkpoint="stopped/gpt.pt")
    assert_same(saved_training(path), saved_training(expected))
    assert run_rows(path) == run_rows(expected)


@pytest.mark.parametrize("error, words", [
    (OSError("gpt.pt: cannot be written (No space left on device)"), "No space left"),
    (MemoryError("too little memory to copy"), "too little memory to copy")])
def test_a_failed_background_write_ends_the_run_in_one_line(run_train, monkeypatch, tmp_path, capsys, write_async, error,
                                                            words):
    def full(path, checkpoint, **options):
        if checkpoint["training"]["step"] == 3:
            raise error
        save_checkpoint(path, checkpoint, **options)
    monkeypatch.setattr(runtime.checkpoint, "save_checkpoint", full)
    with pytest.raises(SystemExit) as stop:
        run_train("--max_iter=30", "--val_intervals=3")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and words in line and "gpt.pt holds step 0, from which --resume_checkpoint contin" in line
    assert step_of(tmp_path / "run" / "gpt.pt") == 0


# -- locks and signals ------------------------------------------------------------------------------------------------

def test_two_processes_do_not_share_a_checkpoint(run_train, tmp_path, refused, data_path):
    path = run_train("--max_iter=3")
    before = contents(tmp_path)
    flags = [f"--checkpoint_path={path}", f"--data_path={data_path}"]
    with folder_lock(run_folder(path), "held by the test"):
        refused(train.main, [*flags, "--overwrite"], f"--checkpoint_path={path}: another process")
        refused(train.main, [*flags, "--resume_checkpoint", "--max_iter=9"], "another process")
    left = contents(tmp_path)
    assert {file: left[file] for file in before} == before and not [file for file in left if file.suffix == ".tmp"]
    run_train("--resume_checkpoint", "--max_iter=6")
    assert step_of(path) == 6


def test_a_checkpoint_has_one_run_whatever_its_name(run_train, tmp_path, refused, data_path):
    """Two runs would share the temporary file of the file behind a link."""
    path = run_train("--max_iter=1")
    (tmp_path / "linked").symlink_to(path.parent)
    (tmp_path / "link.pt").symlink_to(path)
    (tmp_path / "second.pt").symlink_to("link.pt")
    before = contents(tmp_path)
    for first, second in ((path, "link.pt"), ("link.pt", "second.pt"), ("second.pt", path), (path, "linked/gpt.pt")):
        with run_lock(tmp_path / first, "held by the test"):
            refused(train.main, [f"--checkpoint_path={tmp_path / second}", f"--data_path={data_path}", "--overwrite"],
                    f"--checkpoint_path={tmp_path / second}: another process")
        assert contents(tmp_path) == before
    run_train("--overwrite", "--max_iter=2", checkpoint="link.pt")
    assert (tmp_path / "link.pt").is_symlink() and step_of(path) == 2


def test_a_run_locks_its_checkpoint_while_it_trains(run_train, monkeypatch, capsys):
    errors = []

    def start_another():
        with contextlib.suppress(SystemExit):
            run_train("--overwrite")
        errors.append(capsys.readouterr().err)
    before_batch(monkeypatch, 5, start_another)
    path = run_train()
    assert errors[0].count("\n") == 1 and "another process" in errors[0]
    assert step_of(path) == 6


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
def test_a_closing_terminal_saves_the_run(run_train, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_in_step(patch, 3, number=signal.SIGHUP)
        run_train()
    assert stop.value.code == 129 and step_of(tmp_path / "run" / "gpt.pt") == 4


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
def test_a_closing_terminal_is_ignored_under_nohup(run_train, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_in_step(monkeypatch, 3, number=signal.SIGHUP)
        assert step_of(run_train()) == 6
    finally:
        signal.signal(signal.SIGHUP, before)


# -- kill -9 ----------------------------------------------------------------------------------------------------------

ASYNC = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import train
from runtime.checkpoint import CheckpointWriter
CheckpointWriter.MAX_PAUSE_SECONDS = -1
train.main(sys.argv[1:])
"""


def modified(path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("n_kills, n_steps", [(3, 60), pytest.param(20, 400, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_equals_an_uninterrupted_one(run_train, tmp_path, data_path, n_kills, n_steps):
    """By SIGKILL, at random moments of a run that writes checkpoints all the time, every other one in the background."""
    flags = [f"--max_iter={n_steps}", "--val_intervals=2", "--val_iter=1"]
    expected, random_moment = run_train(*flags, checkpoint="whole/gpt.pt"), random.Random(n_kills)
    path, kills, starts = tmp_path / "killed" / "gpt.pt", 0, 0
    new = [f"--data_path={data_path}", *TINY_MODEL, "--dtype=fp32", "--device=cpu", "--batch_size=4",
           "--num_batch_accum=2", "--log_intervals=1", "--warmup_iter=2", "--dataloader_num_workers=0", *flags]
    while True:
        last = modified(path)
        program = ["-c", ASYNC] if starts % 2 else [str(REPO / "train.py")]
        process = commands.start([*program, f"--checkpoint_path={path}", "--verbose=0",
                                  *(["--resume_checkpoint"] if last else new)])
        starts += 1
        try:
            if kills < n_kills:
                end = time.monotonic() + 60
                for _ in range(random_moment.randint(1, 3)):  # so many checkpoints, and a part of the next
                    while process.poll() is None and (now := modified(path)) == last:
                        assert time.monotonic() < end, "nothing was written"
                        time.sleep(0.002)
                    last = now
                time.sleep(random_moment.uniform(0, 0.05))
                process.kill()
            error = process.communicate(timeout=300)[1]
        finally:
            process.kill()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
        for file in path.parent.rglob("*.pt"):
            assert 0 <= step_of(file) < n_steps  # a whole file, and not the end of the run
    assert kills == n_kills  # else the run was too short
    assert_same(saved_training(path), saved_training(expected))
    assert run_rows(path) == run_rows(expected)
    for name in ("previous.pt", "best.pt"):
        assert step_of(run_folder(path) / name) == step_of(run_folder(expected) / name), name
    assert not list(path.parent.rglob("*.tmp"))
    assert all(torch.isfinite(weight).all() for weight in load_checkpoint(path)["model"].values())
