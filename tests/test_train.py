"""The pretraining command: what a run writes and prints, its flags and presets, and its one-line failures."""
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
import trainer
from conftest import REPO, TINY_MODEL, assert_same, before_batch, run_rows, saved_training, train_tiny
from model import GPT
from runtime.checkpoint import load_checkpoint, run_folder, save_checkpoint
from runtime.device import Machine
from shards import open_data
from tokenizer import Tokenizer


def contents(folder: Path) -> dict:
    """Every file of the folder with its bytes."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- what a run writes ------------------------------------------------------------------------------------------------

def test_metrics_rows_of_a_run(run_train, data_path):
    path = run_train()
    rows, data = run_rows(path, timings=True), open_data(data_path)
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


def test_a_checkpoint_holds_model_tokenizer_and_flags(trained, data_path):
    checkpoint = load_checkpoint(trained)
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    assert tokenizer.fingerprint() == open_data(data_path).tokenizer.fingerprint()
    assert GPT.from_checkpoint(checkpoint).config.vocab_size == tokenizer.vocab_size
    assert checkpoint["training"]["settings"]["max_iter"] == 3 and checkpoint["training"]["script"] == "train.py"
    assert json.dumps(checkpoint["training"]["settings"])


def test_metrics_go_into_the_folder_of_the_checkpoints_name():
    names = {"a/gpt.pt": "a/gpt", "a/gpt": "a/gpt.run", "a/v1.0.pt": "a/v1.0", ".pt": ".pt.run"}
    assert {name: str(run_folder(Path(name))) for name in names} == names


def test_training_lowers_the_loss(run_train):
    rows = run_rows(run_train("--max_iter=60", "--learning_rate=0.01", "--val_intervals=60", "--batch_size=16"))
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 1.0


def test_accumulation_equals_one_large_batch(run_train):
    """The same blocks in the same order, 2 x 4 a step or 8 at once."""
    flags = "--learning_rate=0.003", "--max_iter=4"  # a high learning rate amplifies rounding
    accumulated = run_train(*flags, "--batch_size=4", "--num_batch_accum=2", checkpoint="a/gpt.pt")
    large = run_train(*flags, "--batch_size=8", "--num_batch_accum=1", checkpoint="b/gpt.pt")
    for a, b in zip(run_rows(accumulated)[1:], run_rows(large)[1:]):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5) and a["tokens"] == b["tokens"]
    for (name, a), b in zip(load_checkpoint(accumulated)["model"].items(), load_checkpoint(large)["model"].values()):
        assert torch.allclose(a, b, atol=1e-3), name  # where a gradient is nearly 0, AdamW makes steps of its rounding


@pytest.fixture(scope="module")
def default_loss(tmp_path_factory, data_path) -> float:
    """Validation loss after 3 steps with the default flags."""
    return run_rows(train_tiny(tmp_path_factory.mktemp("default") / "gpt.pt", data_path, "--max_iter=3"))[-1]["val_loss"]


@pytest.mark.parametrize("flag", [
    "--learning_rate=0.01", "--weight_decay=5", "--warmup_iter=1", "--cooldown_frac=0", "--grad_clip=0.001", "--seed=1",
    "--batch_size=3", "--num_batch_accum=1", "--mlp=relu2", "--mlp=swiglu", "--dtype=bf16", "--norm=layer",
    "--positions=learned", "--qk_norm=0", "--value_residual=0", "--x0_residual=0", "--token_shift=0", "--softcap=0",
    "--tied=0", "--bias", "--init=gpt2", "--optimizer=adamw", "--optimizer=gpt2", "--schedule=cosine",
    "--momentum_dtype=fp32"])
def test_every_knob_changes_the_run(run_train, default_loss, flag):
    assert run_rows(run_train("--max_iter=3", flag))[-1]["val_loss"] != default_loss


def test_observation_does_not_change_the_run(run_train):
    plain = run_train(checkpoint="a/gpt.pt")
    observed = run_train("--val_intervals=1", "--val_iter=5", "--log_intervals=4", "--verbose=1", "--sample_tokens=5",
                         checkpoint="b/gpt.pt")
    trained = [saved_training(path) for path in (plain, observed)]
    for _, training in trained:
        del training["best"], training["is_best"]  # of more validations
    assert_same(*trained)


def test_unscaled_gradients_are_clipped(run_train):
    """With fp16's loss scale left in the gradient, every step would be clipped to next to nothing."""
    flags = "--grad_clip=0.5", "--max_iter=20", "--val_intervals=20", "--learning_rate=0.01"
    exact, half = (run_rows(run_train(*flags, f"--dtype={dtype}", checkpoint=f"{dtype}/gpt.pt"))[-1]["val_loss"]
                   for dtype in ("fp32", "fp16"))
    assert half == pytest.approx(exact, abs=0.02) and exact < 6.21


def test_mfu_is_a_fraction_of_the_peak(run_train, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "peak_flops", lambda self: 1e10)
    path = run_train("--verbose=1", "--sample_tokens=0")
    flops = GPT.from_checkpoint(load_checkpoint(path)).flops_per_token()
    for row in run_rows(path, timings=True)[1:]:
        assert row["mfu"] == pytest.approx(row["tok_per_sec"] * flops / 1e10, abs=1e-4) and row["mfu"] > 0
    assert "mfu=" in capsys.readouterr().err


def test_verbose(run_train, capsys):
    run_train("--max_iter=3")
    assert capsys.readouterr() == ("", "")
    run_train("--verbose=1", "--sample_tokens=9", checkpoint="b/gpt.pt")
    out, err = capsys.readouterr()
    for words in ("2 layers x 16, attention and gelu, vocabulary 512", "epochs", "cpu, fp32", "step      6 | train",
                  "nats/token", "bits/byte", "sample, the start", "generate.py --checkpoint_path="):
        assert words in out, words
    assert "6/6" in err and "loss=" in err and "tok/s=" in err


# -- what is not overwritten ------------------------------------------------------------------------------------------

def test_a_new_run_replaces_nothing_unasked(run_train, refused, tmp_path, data_path, capsys):
    path, other = run_train("--max_iter=3"), run_train("--max_iter=1", "--seed=2", checkpoint="run/other.pt")
    before, new = contents(tmp_path), f"--data_path={data_path}"
    refused(train.main, [new, f"--checkpoint_path={path}"], "--checkpoint_path=", "--overwrite", "--resume_checkpoint")
    refused(train.main, [new, f"--checkpoint_path={run_folder(path)}", "--overwrite"], "is a folder: give a file")
    refused(train.main, [f"--resume_checkpoint={path}", f"--checkpoint_path={other}", "--max_iter=9"], "exists")
    after = contents(tmp_path)
    assert {file: after[file] for file in before} == before
    run_train("--max_iter=6", "--overwrite", "--verbose=1", "--sample_tokens=0")
    assert load_checkpoint(path)["training"]["step"] == 6 and len(run_rows(path)) == 7
    assert f"replacing {path}" in capsys.readouterr().out


def test_metrics_without_their_checkpoint_are_not_overwritten(run_train, refused, data_path):
    path = run_train("--max_iter=1")
    path.unlink()
    before = (run_folder(path) / "metrics.jsonl").read_bytes()
    refused(train.main, [f"--data_path={data_path}", f"--checkpoint_path={path}"], "--checkpoint_path=", "metrics of an")
    assert (run_folder(path) / "metrics.jsonl").read_bytes() == before


def test_overwriting_waits_until_there_is_something_to_write(run_train, monkeypatch, tmp_path):
    """A new run that is stopped in its first validation leaves the earlier one whole."""
    run_train("--max_iter=1")
    before = contents(tmp_path)

    def interrupted(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "validate", interrupted)
        run_train("--overwrite")
    after = contents(tmp_path)
    assert {file: after[file] for file in before} == before


# -- failures ---------------------------------------------------------------------------------------------------------

def fails(capsys, run_train, *flags: str) -> str:
    """Runs train.py, which must exit with code 1. Returns its only line on stderr."""
    with pytest.raises(SystemExit) as stop:
        run_train(*flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("train.py: ")
    return line


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="a shell")
@pytest.mark.parametrize("redirect", ["| head -1", ">&-", "2>&-", ">/dev/full 2>&1", "2>&1 >/dev/null | head -c 1",
                                      "<&- >&- 2>&-"])
def test_a_training_goes_on_when_nobody_reads_its_output(data_path, tmp_path, redirect):
    command = [sys.executable, str(REPO / "train.py"), *TINY_MODEL, f"--data_path={data_path}", "--checkpoint_path=gpt.pt",
               "--device=cpu", "--dtype=fp32", "--batch_size=1", "--num_batch_accum=1", "--val_intervals=2", "--val_iter=1",
               "--log_intervals=1", "--max_iter=6", "--dataloader_num_workers=0", "--sample_tokens=4"]
    done = subprocess.run(f"({shlex.join(command)}; echo $? > code) {redirect}", shell=True, cwd=tmp_path,
                          capture_output=True, text=True)
    assert (tmp_path / "code").read_text().strip() == "0" and "Traceback" not in done.stderr
    assert load_checkpoint(tmp_path / "gpt.pt")["training"]["step"] == 6 and len(run_rows(tmp_path / "gpt.pt")) == 7


@pytest.mark.integration
def test_commands_start_without_the_compiler(data_path, tmp_path):
    """torch would import it at the first optimizer, its first step and the first loaded model. It still works after them."""
    program = """
import sys, torch, generate, train
path, flags = f"--checkpoint_path={sys.argv[1]}", sys.argv[2:]
for main, argv in ((train.main, [path, *flags, "--max_iter=2"]), (train.main, [path, "--resume_checkpoint", "--max_iter=3"]),
                   (generate.main, [path, "--max_new_tokens=2", "--device=cpu"])):
    main(argv)
assert "torch._dynamo" not in sys.modules
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
assert "torch._dynamo" in sys.modules
"""
    flags = [*TINY_MODEL, f"--data_path={data_path}", "--device=cpu", "--dtype=fp32", "--batch_size=1",
             "--num_batch_accum=1", "--val_iter=1", "--dataloader_num_workers=0", "--sample_tokens=1"]
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "gpt.pt"), *flags], cwd=REPO, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="a locale")
def test_names_outside_ascii_work_in_the_c_locale(data_path, tmp_path):
    """Without UTF-8 mode, which Python has by itself there: such bytes of the command line are then no valid text."""
    shutil.copytree(data_path, tmp_path / "dätä")
    train_py = [sys.executable, str(REPO / "train.py"), "--checkpoint_path=ü/mödel.pt"]
    flags = [*TINY_MODEL, "--data_path=dätä", "--device=cpu", "--dtype=fp32", "--batch_size=1", "--num_batch_accum=1",
             "--val_iter=1", "--max_iter=1", "--dataloader_num_workers=0"]
    for own in (flags, ["--resume_checkpoint", "--max_iter=2"], ["--plot"]):
        done = subprocess.run([*train_py, *own], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"})
        assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "ü" / "mödel.pt")["training"]["step"] == 2
    assert (tmp_path / "ü" / "mödel" / "curves.png").exists()


@contextmanager
def full_disk():
    """For files that grow; a limit of the size of files stands for it."""
    import resource
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield fill
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")
@pytest.mark.parametrize("when, name", [("start", "gpt.pt"), ("step 2", "gpt/metrics.jsonl"), ("plot", "curves.png")])
def test_a_disk_that_fills_up_is_one_line_with_the_file(run_train, monkeypatch, capsys, tmp_path, when, name):
    path = run_train("--max_iter=1")
    before = contents(tmp_path)
    with full_disk() as fill:
        if when == "step 2":
            before_batch(monkeypatch, 2, fill)
        else:
            fill()
        plot = lambda: train.main([f"--checkpoint_path={path}", "--plot"])
        line = fails(capsys, plot if when == "plot" else lambda: run_train("--overwrite"))
    assert re.search(rf"{name}: cannot be written \(File too large\)", line), line
    after = contents(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    if when != "step 2":  # nothing of the earlier run is lost
        assert before.items() <= after.items()


def test_a_full_disk_keeps_the_last_checkpoint(run_train, monkeypatch, capsys):
    def full(path, checkpoint, **options):
        if checkpoint["training"]["step"] == 6:
            raise OSError(f"{path}: cannot be written (No space left on device)")
        save_checkpoint(path, checkpoint, **options)
    monkeypatch.setattr("runtime.checkpoint.save_checkpoint", full)
    assert re.search(r"gpt.pt: cannot be written \(No space.*gpt.pt holds step 3, from which --resume_checkpoint",
                     fails(capsys, run_train))


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_dead_data_worker_is_one_line(run_train, monkeypatch, capsys):
    def kill():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.2)  # torch's SIGCHLD handler needs a moment
    before_batch(monkeypatch, 3, kill)
    error = fails(capsys, run_train, "--dataloader_num_workers=1")
    assert "--dataloader_num_workers: a data worker process died" in error and "holds step 0" in error


def test_running_out_of_memory_is_one_line_with_advice(run_train, monkeypatch, capsys):
    def allocate():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried …")
    before_batch(monkeypatch, 3, allocate)
    error = fails(capsys, run_train)
    for words in ("out of memory (peak ", "--batch_size=4 blocks of 16 tokens", "--batch_size=auto",
                  "--gradient_checkpointing", "holds step 0"):
        assert words in error


# -- flags ------------------------------------------------------------------------------------------------------------

def bad(flag: str, *words: str):
    """A flag and what the error about it must contain."""
    return pytest.param(flag, words, id=flag.lstrip("-"))


@pytest.mark.parametrize("flag, words", [bad(*case) for case in [
    ("--n_layer=0", "--n_layer=0", "at least 1"), ("--head_size=7", "--head_size=7", "even"),
    ("--learning_rate=-1", "--learning_rate=-1.0", "above 0"), ("--num_batch_accum=0", "--num_batch_accum=0"),
    ("--batch_size=0", "--batch_size=0"), ("--max_iter=0", "--max_iter=0"), ("--val_iter=0", "--val_iter=0"),
    ("--val_intervals=0", "--val_intervals=0"), ("--dataloader_num_workers=-1", "--dataloader_num_workers=-1"),
    ("--device=cuda:9", "--device=cuda:9", "has cpu"), ("--dtype=fp8", "--dtype=fp8", "bf16"),
    ("--mlp=kan9", "--mlp=kan9", "relu2"), ("--n_layers=3", "--n_layers=3", "did you mean --n_layer?"),
    ("--n_head=1000000", "--n_head=1000000", "at most"), ("--batch_size=1e9", "--batch_size=1000000000", "at most"),
    ("--max_tokens=0", "--max_tokens=0", "at least 1"), ("--max_seconds=0", "--max_seconds=0.0", "above 0"),
    ("--preset=gpt3", "--preset=gpt3", ", ".join(train.PRESETS)),
    ("--compile_model=perhaps", "--compile_model", "1 nor 0"), ("--optimizer=sgd", "--optimizer=sgd", "muon"),
    ("--batch_size=big", "--batch_size", "'big'"), ("--checkpoint_path=/dev/null/x/gpt.pt", "--checkpoint_path")]])
def test_bad_flags(tmp_path, data_path, refused, flag, words):
    flags = [f"--data_path={data_path}", f"--checkpoint_path={tmp_path / 'run' / 'gpt.pt'}"]
    refused(train.main, [*flags, "--n_layer=1", "--block_size=16", "--n_head=1", "--head_size=8", flag], *words)
    assert not (tmp_path / "run").exists()


def resolved(*argv: str) -> dict:
    """Every flag's value in a new run."""
    given, defaults = train.PRETRAINING.flags_given(argv), train.PRETRAINING.defaults()
    return train.resolve_flags(defaults | train.PRESETS.get(given.get("preset"), {}), given)


def test_the_gpt2_preset_is_nanogpts_recipe():
    """https://github.com/karpathy/nanoGPT: GPTConfig's and train.py's defaults, with config/train_gpt2.py on top."""
    values = resolved("--preset=gpt2")
    model = {"n_layer": 12, "n_head": 12, "head_size": 768 // 12, "block_size": 1024, "norm": "layer", "bias": True,
             "mlp": "gelu", "positions": "learned", "tied": True, "init": "gpt2", "qk_norm": False, "softcap": 0,
             "value_residual": False, "x0_residual": False, "token_shift": False}
    recipe = {"learning_rate": 6e-4, "weight_decay": 1e-1, "grad_clip": 1.0, "warmup_iter": 2000, "max_iter": 600_000,
              "schedule": "cosine", "optimizer": "gpt2", "batch_size": 12, "num_batch_accum": 5 * 8, "val_intervals": 1000}
    assert {name: values[name] for name in model | recipe} == model | recipe
    assert values["batch_size"] * values["num_batch_accum"] * values["block_size"] == 491_520  # their "~0.5M" tokens


@pytest.mark.parametrize("preset", train.PRESETS)
def test_a_preset_sets_exactly_its_flags_and_yields_to_given_ones(preset):
    defaults, values = resolved(), resolved(f"--preset={preset}")
    assert values.pop("val_batch") == values["batch_size"]
    assert {name: value for name, value in values.items() if value != defaults[name]} == {"preset": preset} | {
        name: value for name, value in train.PRESETS[preset].items() if value != defaults[name]}
    train.PRETRAINING.read_configs(values)  # within their ranges
    values = resolved(f"--preset={preset}", "--batch_size=7", "--learning_rate=0.5", "--max_seconds=9")
    assert (values["batch_size"], values["learning_rate"], values["max_seconds"]) == (7, 0.5, 9)
    assert values["max_iter"] is None  # a given stop flag replaces the preset's


def test_the_gpt2_preset_trains(run_train):
    path = run_train("--preset=gpt2", *TINY_MODEL, "--batch_size=8", "--num_batch_accum=1", "--max_iter=30",
                     "--val_intervals=30", "--learning_rate=0.01")
    rows = run_rows(path)
    assert rows[0]["val_loss"] == pytest.approx(math.log(512), abs=0.1) and rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.5
    assert load_checkpoint(path)["config"]["norm"] == "layer"
    assert rows[-1]["lr"] < 0.2 * 0.01 and rows[15]["lr"] == pytest.approx(0.01 * (0.55), rel=0.2)


def test_a_preset_may_name_the_checkpoint(data_path, tmp_path, monkeypatch, refused):
    """--preset=quickstart writes, and when it is given again replaces, a file of its own; it resumes and plots that file."""
    monkeypatch.chdir(tmp_path)
    path = train.PRESETS["quickstart"]["checkpoint_path"]
    flags = [f"--data_path={data_path}", "--preset=quickstart", *TINY_MODEL, "--max_iter=1", "--verbose=0", "--device=cpu",
             "--dataloader_num_workers=0", "--val_iter=1"]
    for _ in range(2):
        train.main(flags)
    assert [file.name for file in tmp_path.glob("checkpoints/*.pt")] == [path.name]
    train.main(["--preset=quickstart", "--resume_checkpoint", "--max_iter=2", "--verbose=0"])
    assert load_checkpoint(path)["training"]["step"] == 2
    train.main(["--preset=quickstart", "--plot"])
    assert (run_folder(path) / "curves.png").exists()
    refused(train.main, ["--preset=quickstart", f"--checkpoint_path={tmp_path / 'other.pt'}", "--plot"],
            f"--checkpoint_path={tmp_path / 'other.pt'}: ", "no such file")


# -- the horizon ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("max_tokens", [6 * 128, 6 * 128 - 100])  # the step that passes the limit is the last
def test_a_run_limited_by_tokens_equals_one_limited_by_steps(run_train, max_tokens):
    by_tokens = run_train(f"--max_tokens={max_tokens}", checkpoint="tokens/gpt.pt")
    assert [row["step"] for row in run_rows(by_tokens)] == list(range(7))
    if max_tokens == 6 * 128:
        by_steps = run_train("--max_iter=6", checkpoint="steps/gpt.pt")
        assert_same(saved_training(by_steps), saved_training(by_tokens))
        assert run_rows(by_steps) == run_rows(by_tokens)


def test_a_run_limited_by_seconds_cools_down(run_train, monkeypatch):
    """On a clock that advances by a hundredth of a second whenever it is read, a few times in a step."""
    ticks = itertools.count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 100))
    path = run_train("--max_seconds=2", "--warmup_iter=0", "--cooldown_frac=0.5", "--learning_rate=0.01",
                     "--val_intervals=1000")
    rows = run_rows(path, timings=True)
    assert 2 <= rows[-1]["seconds"] < 2.1 and "val_loss" in rows[-1] and len(rows) > 50
    for before, row in zip(rows[1:], rows[2:]):
        assert row["lr"] == pytest.approx(0.01 * min(1, (1 - before["seconds"] / 2) / 0.5), abs=0.0002)
    assert rows[-1]["lr"] < 0.001 and rows[1]["lr"] == 0.01


# -- curves -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plotted(tmp_path_factory, data_path) -> tuple[Path, Path]:
    """The checkpoints of two runs."""
    folder = tmp_path_factory.mktemp("plotted")
    return tuple(train_tiny(folder / name / "gpt.pt", data_path, "--max_iter=3", f"--seed={seed}")
                 for seed, name in enumerate("ab"))


@pytest.mark.integration
def test_plot_draws_finished_runs(plotted, capsys):
    first, second = plotted
    image = run_folder(first) / "curves.png"
    before = contents(first.parents[1])
    for flags in ([f"--checkpoint_path={first}", "--plot"],
                  [f"--plot={run_folder(first)},{second},{run_folder(second) / 'metrics.jsonl'}"]):
        train.main(flags)
        assert capsys.readouterr().out == f"{image}\n"
        assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 20_000
        image.unlink()
    assert contents(first.parents[1]) == before


def test_plot_needs_rows_of_validations(plotted, refused, tmp_path):
    refused(train.main, [f"--plot={plotted[0]},{tmp_path / 'none.pt'}"], "--plot=",
            "none/metrics.jsonl: no such file")
    refused(train.main, [f"--checkpoint_path={tmp_path / 'none.pt'}", "--plot"], "no such file")
    refused(train.main, ["--plot="], "--plot=: is empty")
    refused(train.main, ["--plot=a,~nosuchuser/x"], "--plot=a,~nosuchuser/x:", "the home of a user that does not exist")
    refused(train.main, ["--plot=" + "x" * 300], "--plot=xxx", "longer than file names can be")
    (tmp_path / "incomplete.jsonl").write_text('{"step": 1, "val_loss": 3.0}\n')
    refused(train.main, [f"--plot={tmp_path / 'incomplete.jsonl'}"], "holds no validation rows")
    assert not (tmp_path / "none").exists()


def test_plot_ignores_rows_that_lack_values(tmp_path):
    rows = tmp_path / "odd.jsonl"
    rows.write_text('{"step": 1, "val_loss": 3.0}\n{"step": 2, "tokens": 9, "seconds": 1.0, "val_loss": 2.0}\n')
    train.main([f"--plot={rows}"])
    assert (tmp_path / "odd.png").exists()
