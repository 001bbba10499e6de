"""runtime/forecast.py and --dry_run: what a run will take is told before the work, and telling changes nothing."""
import re
import time
from pathlib import Path

import pytest
import torch

import finetune
import train
import trainer
from conftest import TINY_MODEL, assert_same, run_rows, saved_training
from model import GPT
from runtime import device
from runtime.checkpoint import load_checkpoint
from runtime.device import fastest_threads
from runtime.forecast import Forecast, format_bytes, format_seconds
from trainer import LoopConfig, StepTimer


def forecast(**changes) -> Forecast:
    values = {"n_parameters": 1_310_000, "peak_memory": 2**30, "available_memory": 2**33, "step_tokens": 2048,
              "step_seconds": 0.5, "steps": 500, "validations": 6, "validation_seconds": 10.0, "epochs": 0.4,
              "disk": 3 * 2**20, "free_disk": 2**35, "advice": "--preset=cpu takes about 12 min"}
    return Forecast(**values | changes)


def test_a_forecast_by_hand():
    assert forecast().seconds == 500 * 0.5 + 6 * 10 and forecast().tok_per_sec == 4096
    assert forecast().texts() == {
        "parameters": "1.31 M", "memory": "1.0 GiB at the peak of a step, 8.0 GiB available",
        "speed": "4,096 tokens/s, 500 ms a step", "time": "about 5.2 min: 500 steps and 6 validations of 10 s",
        "data": "0.40 epochs", "disk": "3.0 MiB for checkpoints, 32.0 GiB free"}
    line = forecast().line()
    assert "\n" not in line and all(text in line for name, text in forecast().texts().items() if name != "parameters")


@pytest.mark.parametrize("changes, words", [
    ({}, []), ({"step_seconds": 3600.0}, ["about 21 days at the measured speed; --preset=cpu takes about 12 min"]),
    ({"free_disk": 2**20}, ["checkpoints need 3.0 MiB, 1.0 MiB are free"]),
    ({"peak_memory": 2**34}, ["needs 16.0 GiB of memory, 8.0 GiB are available"])])
def test_what_does_not_fit_is_warned_of(changes, words):
    warnings = forecast(**changes).warnings()
    assert len(warnings) == len(words) and all(word in line for word, line in zip(words, warnings))


@pytest.mark.parametrize("seconds, text", [
    (0.0123, "12 ms"), (0.0012, "1.2 ms"), (2.5, "2.5 s"), (99, "99 s"), (120, "2.0 min"), (5400, "90 min"),
    (7200, "2.0 hours"), (1e5, "28 hours"), (1e6, "12 days")])
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("n, text", [(999, "999 bytes"), (5e6, "4.8 MiB"), (3e9, "2.8 GiB"), (3e11, "279 GiB"),
                                     (3e16, "27,285 TiB")])
def test_sizes(n, text):
    assert format_bytes(n) == text


@pytest.mark.parametrize("flags, step, steps, validations", [
    ({"max_iter": 6}, 0, 6, 3), ({"max_iter": 7}, 0, 7, 4), ({"max_iter": 7}, 3, 4, 2), ({"max_iter": 7}, 6, 1, 1),
    ({"max_tokens": 1000}, 0, 10, 5), ({"max_tokens": 1001, "max_iter": 50}, 0, 11, 5), ({"max_seconds": 10}, 0, 20, 8)])
def test_what_is_still_to_do_equals_what_a_loop_does(flags, step, steps, validations):
    """Counted by hand: validations at steps 0, 3, 6 … and at the last one."""
    loop = LoopConfig(val_intervals=3, **flags)
    state = trainer.TrainState(None, None, None, None, None, step=step, tokens=100 * step, seconds=0.5 * step)
    assert loop.remaining_steps(state, 100, 0.5) == steps and loop.remaining_validations(step, steps) == validations


def test_the_first_steps_are_timed_once_and_only_as_long_as_needed(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = StepTimer(lambda *args: calls.append(args))
    timer.evaluation_seconds = 7.0
    for seconds in (2.0, 0.3, 0.5, 0.4, 0.9, 0.9):
        with timer:
            timer.loss = torch.tensor(1.0)
            now[0] += seconds
    assert calls == [(pytest.approx(0.4), 7.0)]  # the median of the second to the fourth
    timer = StepTimer(lambda *args: calls.append(args))
    with timer:
        timer.loss = torch.tensor(1.0)
        now[0] += 60.0
    assert calls[-1] == (60.0, None)


def test_steps_that_repeat_are_timed_by_whole_periods(monkeypatch):
    """Every second one plays games first: the mean of the second to the fifth."""
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = StepTimer(lambda *args: calls.append(args), period=2)
    for seconds in (9.0, 0.5, 3.5, 0.5, 3.5, 0.5, 3.5):
        with timer:
            timer.loss = torch.tensor(1.0)
            now[0] += seconds
    assert calls == [(pytest.approx(2.0), None)]


# -- the commands -----------------------------------------------------------------------------------------------------

def files(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags", [[], ["--max_tokens=64000", "--num_batch_accum=3"], ["--batch_size=auto"]], ids=str)
def test_a_dry_run_of_train_writes_nothing(tmp_path, data_path, capsys, flags):
    argv = [f"--data_path={data_path}", f"--checkpoint_path={tmp_path / 'x' / 'gpt.pt'}", *TINY_MODEL, "--device=cpu",
            "--dataloader_num_workers=0", "--val_iter=2", *flags]
    train.main([*argv, "--dry_run"])
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["parameters", "memory", "speed", "time", "data", "disk"]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_leaves_a_run_that_exists_or_can_be_resumed_alone(run_train, capsys):
    path = run_train("--max_iter=6", "--num_batch_accum=1")
    before = files(path.parent)
    run_train("--dry_run", "--max_iter=6")
    assert "6 steps and 3 validations" in capsys.readouterr().out
    run_train("--dry_run", "--resume_checkpoint", "--max_iter=10")
    assert "4 steps and 2 validations" in capsys.readouterr().out
    assert files(path.parent) == before


def test_a_dry_run_of_finetune_writes_nothing(trained, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{i}+1", "answer": "{i + 1}"}}\n' for i in range(40)))
    finetune.main([f"--checkpoint_path={trained}", f"--out_path={tmp_path / 'a.pt'}", f"--dataset={rows}", "--device=cpu",
                   "--batch_size=2", "--max_iter=8", "--dry_run"])
    assert "8 steps and 2 validations" in capsys.readouterr().out and list(tmp_path.iterdir()) == [rows]


def test_the_disk_of_a_forecast_is_that_of_three_checkpoints(run_train, capsys):
    path = run_train("--max_iter=6")
    run_train("--dry_run", "--max_iter=6")
    size, unit = re.search(r"disk +([\d.,]+) (\w+) for checkpoints", capsys.readouterr().out).groups()
    n_bytes = float(size) * {"KiB": 2**10, "MiB": 2**20}[unit]
    assert n_bytes == pytest.approx(3 * path.stat().st_size, rel=0.25)  # a checkpoint also holds names and the tokenizer


def test_a_run_tells_its_forecast_once_and_ends_the_same(run_train, monkeypatch, capsys):
    plain = run_train("--max_iter=8", checkpoint="a/gpt.pt")
    monkeypatch.setattr(StepTimer, "MIN_SECONDS", 0.0)
    told = run_train("--max_iter=8", "--verbose=1", "--sample_tokens=0", checkpoint="b/gpt.pt")
    out = capsys.readouterr().out
    assert out.count("forecast about ") == 1 and "4 steps and 2 validations" in out  # after a first step and three more
    assert_same(saved_training(plain), saved_training(told))
    assert run_rows(plain) == run_rows(told)


@pytest.mark.parametrize("n_head, words", [(2, "--max_seconds=3600"), (40, "--preset=cpu takes about ")])
def test_a_run_of_days_is_warned_of_before_it_begins(data_path, tmp_path, monkeypatch, capsys, n_head, words):
    monkeypatch.setattr(trainer, "fit", lambda *args, **kwargs: None)
    monkeypatch.setattr(train, "report_end", lambda *args: None)
    monkeypatch.setattr(device.Machine, "peak_flops", lambda self: 1e8)
    train.main([f"--data_path={data_path}", f"--checkpoint_path={tmp_path / 'gpt.pt'}", *TINY_MODEL, f"--n_head={n_head}",
                "--device=cpu", "--max_iter=10_000_000", "--dataloader_num_workers=0", "--compile_model=0"])
    assert re.search(r"warning: at least .*(hours|days).*; " + words, capsys.readouterr().err)


# -- threads ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def threads(monkeypatch):
    """A CPU of 4 cores."""
    current = [4]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: current.__setitem__(0, n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: current[0])
    monkeypatch.setattr(trainer, "available_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize("times, chosen", [((1.0, 0.6, 0.35), 4), ((0.1, 0.5, 1.0), 1), ((1.0, 0.5, 1.0), 2),
                                           ((0.9, 1.0, 1.0), 4)])
def test_fewer_threads_are_taken_only_where_they_are_clearly_faster(threads, monkeypatch, times, chosen):
    now, seconds = [0.0], dict(zip((1, 2, 4), times))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    step = lambda: now.__setitem__(0, now[0] + seconds[torch.get_num_threads()])
    assert fastest_threads(step, 4) == chosen == torch.get_num_threads()


@pytest.mark.parametrize("flags, setting", [([], 1), (["--threads=0"], 0), (["--threads=3"], 3), (["--threads=64"], 64)])
def test_a_run_keeps_its_threads_when_it_goes_on(threads, run_train, monkeypatch, flags, setting):
    monkeypatch.setattr(trainer, "fastest_threads", lambda step, n: torch.set_num_threads(1) or 1)
    path = run_train("--max_iter=3", *flags)
    assert load_checkpoint(path)["training"]["settings"]["threads"] == setting
    assert torch.get_num_threads() == min(setting or 4, 4)
    torch.set_num_threads(4)
    monkeypatch.setattr(trainer, "fastest_threads", lambda step, n: pytest.fail("timed again"))
    run_train("--resume_checkpoint", "--max_iter=5")
    assert torch.get_num_threads() == min(setting or 4, 4)


def test_threads_of_the_environment_and_of_large_models_stay(threads, run_train, monkeypatch):
    monkeypatch.setattr(trainer, "fastest_threads", lambda step, n: pytest.fail("timed"))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    run_train("--max_iter=1", checkpoint="a/gpt.pt")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(GPT, "flops_per_token", lambda self: 1e12)
    run_train("--max_iter=1", checkpoint="b/gpt.pt")
    assert torch.get_num_threads() == 4
