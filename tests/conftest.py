"""Fixtures: a tiny prepared data folder, train.py run in this process, a stand-in for the Hugging Face hub on loopback."""
import atexit
import gc
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from commands import Command

import download_data
import tokenizer
import train
import trainer
from hub import HubStandIn
from model import GPT, GPTConfig
from runtime.checkpoint import load_checkpoint, run_folder
from runtime.metrics import read_rows
from text.builtin import builtin_documents

# With two threads on two busy cores the tests, and the commands that they run, are many times slower
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
REPO = Path(__file__).parent.parent
# datasets and huggingface_hub read these when they are imported, later: every test uses the stand-in.
HUB_FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, HUB_FOLDER, ignore_errors=True)
HUB = HubStandIn(HUB_FOLDER / "served")
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": str(HUB_FOLDER / "home")}
tokenizer.SHORT_TEXT = 0  # the tests are of the kernels; test_tokenizer.py has those of short texts
# 2 layers x 16 channels, blocks of 16 tokens: a step takes milliseconds
TINY_MODEL = ["--n_layer=2", "--n_head=2", "--head_size=8", "--block_size=16"]


def pytest_addoption(parser):
    parser.addoption("--rehearse", action="store_true",
                     help="run one case of each test marked gpu on the CPU, to see that it runs")


@pytest.fixture(scope="session")
def card(request) -> torch.device:
    """The GPU, or with --rehearse the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not request.config.getoption("--rehearse"):
        pytest.skip("needs a GPU")
    return torch.device("cpu")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--rehearse"):  # the last case of each parametrised test, where everything is switched on
        items[:] = {item.originalname: item for item in items}.values()
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


def pytest_runtest_setup(item):
    """bench/gpu.py gives its tests until GPU_TESTS_END, a time.time(): those that may take longer are skipped."""
    if end := os.environ.get("GPU_TESTS_END"):
        left, needed = float(end) - time.time(), 30 if item.get_closest_marker("compiles") else 5
        if left < needed and not item.config.getoption("--rehearse"):
            pytest.skip(f"no time: {max(0.0, left):.0f} s left, {needed} needed")


@pytest.fixture(scope="module", autouse=True)
def freeze_imported_objects():
    """`fit` collects garbage at each evaluation: 0.3 s with the objects of all imported modules, 0.01 s without."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def english() -> list[str]:
    """About 1 MB of real text, in documents."""
    return list(itertools.islice(builtin_documents(), 150))


@pytest.fixture(scope="session")
def data_path(tmp_path_factory, english) -> Path:
    """A folder prepared by download_data.py: 512 ids, several training shards."""
    folder = tmp_path_factory.mktemp("prepared")
    for i, text in enumerate(english[:40]):
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    download_data.main([f"--dataset={folder}", f"--data_path={folder / 'data'}", "--vocab_size=512",
                        "--val_bytes=8000", "--shard_size_threshold=9000", "--tokens_threshold=40000"])
    return folder / "data"


def train_tiny(path: Path, data_path: Path, *flags: str) -> Path:
    """Trains a tiny model quietly in this process; returns `path`, its checkpoint."""
    defaults = [f"--data_path={data_path}", f"--checkpoint_path={path}", "--verbose=0", "--device=cpu"]
    if not any(flag.startswith("--resume_checkpoint") for flag in flags):
        defaults += [*TINY_MODEL, "--dtype=fp32", "--batch_size=4", "--num_batch_accum=2", "--val_intervals=3",
                     "--log_intervals=1", "--val_iter=2", "--warmup_iter=2", "--dataloader_num_workers=0"]
        if not any(flag.startswith("--max_") for flag in flags):
            defaults.append("--max_iter=6")
    train.main([*defaults, *flags])
    return path


@pytest.fixture
def run_train(data_path, tmp_path):
    """run_train("--max_iter=3", …) -> path of the checkpoint, see train_tiny."""
    def run(*flags: str, checkpoint: str = "run/gpt.pt", data: Path = data_path) -> Path:
        return train_tiny(tmp_path / checkpoint, data, *flags)
    return run


@pytest.fixture(scope="session")
def trained(data_path, tmp_path_factory) -> Path:
    """The checkpoint of a run of 3 steps, which tests share and must leave as it is."""
    return train_tiny(tmp_path_factory.mktemp("trained") / "gpt.pt", data_path, "--max_iter=3")


@pytest.fixture
def forked(monkeypatch):
    """The Python programs that this process starts need not import torch, see commands.py."""
    monkeypatch.setattr(subprocess, "Popen", Command)


TIMINGS = {"seconds", "tok_per_sec", "mfu", "peak_memory"}  # these differ between two runs of the same steps


def tiny_player(game, **flags) -> GPT:
    """A model of a game, with random weights that prefer some moves."""
    torch.manual_seed(1)
    shape = {"n_layer": 2, "n_head": 2, "head_size": 8, "init": "gpt2"} | flags
    model = GPT(GPTConfig(vocab_size=game.vocab_size, block_size=game.max_plies + 1, **shape))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)
    return model


def run_rows(path, timings=False) -> list[dict]:
    """The metrics rows of the run that wrote the checkpoint at `path`."""
    rows = read_rows(run_folder(path) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if timings or name not in TIMINGS} for row in rows]


def saved_training(path) -> tuple[dict, dict]:
    """Weights and training state of a checkpoint, without its flags and its seconds."""
    checkpoint = load_checkpoint(path)
    training = checkpoint["training"]
    training.pop("seconds")
    training["settings"] = None
    return checkpoint["model"], training


def assert_same(a, b, where="checkpoint"):
    """Asserts that nested dicts, lists and tensors are equal bit for bit."""
    assert type(a) is type(b) or isinstance(a, dict) and isinstance(b, dict), where  # an OrderedDict equals a dict
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def signal_in_step(monkeypatch, step, batch=0, number=signal.SIGTERM, times=1):
    """Sends the signal to this process while it computes that batch of its `step`-th step (of 2 batches each)."""
    before_batch(monkeypatch, step * 2 + batch, lambda: [signal.raise_signal(number) for _ in range(times)])


def before_batch(monkeypatch, batch, action):
    """Calls `action()` before the loss of the run's `batch`-th batch is computed."""
    loss_fn, calls = trainer.next_token_loss, iter(range(10**6))

    def watched(model, tensors):
        if next(calls) == batch:
            action()
        return loss_fn(model, tensors)
    monkeypatch.setattr(train, "next_token_loss", watched)


def stderr_lines(error: str) -> list[str]:
    """The lines printed to stderr, without progress bars, which show times."""
    return [line for line in error.replace("\r", "\n").splitlines() if line.strip() and "[00:" not in line]


@pytest.fixture
def refused(capsys):
    """refused(main, flags, "words", …) asserts that the command exits with code 2 and one line that contains the words."""
    def check(main, argv: list[str], *words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        (line,) = stderr_lines(error)
        for word in words:
            assert word in line, line
        return line
    return check


@pytest.fixture
def hub():
    """The stand-in for the hub, with an empty local cache and an empty log of requests. Faults end with the test."""
    shutil.rmtree(HUB_FOLDER / "home" / "hub", ignore_errors=True)
    HUB.requests.clear()
    yield HUB
    HUB.faults.clear()
