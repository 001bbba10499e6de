"""--batch_size=auto: the largest batch that fits into memory, and a run that trains with it."""
import subprocess
import sys

import pytest
import torch

import train
from conftest import REPO, TINY_MODEL, run_rows
from model import GPT, GPTConfig
from runtime import memory
from runtime.checkpoint import load_checkpoint
from runtime.device import Machine
from runtime.distributed import World
from runtime.memory import largest_batch


def fake_memory(monkeypatch, free: float, bytes_of):
    """The device has `free` bytes, and a step of a batch of n blocks allocates bytes_of(n) of them, or raises.
    Returns that step."""
    peak = [1000]

    def try_batch(batch_size):
        peak[0] = max(peak[0], 1000 + bytes_of(batch_size))
    monkeypatch.setattr(train, "dry_run", lambda model, machine, batch_size: try_batch(batch_size))
    monkeypatch.setattr(memory, "peak_memory", lambda device: peak[0])
    monkeypatch.setattr(memory, "reset_peak_memory", lambda device: peak.__setitem__(0, 1000))
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    return try_batch


def found_batch(monkeypatch, n_blocks: int, free: float, bytes_of, device: str = "cpu") -> int:
    try_batch = fake_memory(monkeypatch, free, bytes_of)
    return largest_batch(try_batch, torch.device(device), n_blocks, reserved=432)


# -- largest_batch ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_blocks, available, expected", [
    (64, 10**9, 64), (64, 40_500, 32), (64, 33_000, 32), (64, 31_900, 16), (60, 31_000, 30), (60, 29_900, 20), (7, 5_000, 1),
    (7, 10_000, 7), (1, 10**9, 1)])
def test_the_largest_batch_that_fits(monkeypatch, n_blocks, available, expected):
    """A divisor of a step's blocks, at 1000 bytes a block. A tenth of the free memory is kept free."""
    assert found_batch(monkeypatch, n_blocks, (available + 432) / 0.9 + 100, lambda n: 1000 * n) == expected


def test_processes_that_share_memory_divide_it(monkeypatch):
    try_batch = fake_memory(monkeypatch, (64_432 + 1_432) / 0.9, lambda n: 1000 * n)
    assert [largest_batch(try_batch, torch.device("cpu"), 64, 432, n) for n in (1, 2, 4)] == [64, 32, 16]


def test_two_sizes_predict_the_others(monkeypatch):
    """On a CPU, where a step that does not fit would end the process, and steps of large batches are slow."""
    tried = []

    def bytes_of(n):
        tried.append(n)
        return 500 + 100 * n
    assert found_batch(monkeypatch, 64, 10**5, bytes_of) == 64 and tried == [1, 1, 2]


def test_a_gpu_tries_the_predicted_batch(monkeypatch):
    """Its allocator fragments, which two small sizes do not show."""
    tried = []

    def bytes_of(n):
        tried.append(n)
        if n > 16:
            raise RuntimeError("CUDA out of memory. Tried to allocate …")
        return 1000 * n
    assert found_batch(monkeypatch, 64, 10**9, bytes_of, "cuda") == 16 and tried == [1, 1, 2, 64, 32, 16]


def test_other_errors_of_a_step_are_raised(monkeypatch):
    def broken(n):
        raise RuntimeError("another error")
    with pytest.raises(RuntimeError, match="another error"):
        found_batch(monkeypatch, 64, 10**9, broken, "cuda")


@pytest.mark.integration
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not report peak memory")
def test_the_peak_of_a_step_is_measured_repeatably():
    """Though freed memory is retained, and the process had a higher peak before."""
    done = subprocess.run([sys.executable, "-c", """if True:
        import torch
        from runtime.memory import disable_malloc_trim, measure_batch_memory
        disable_malloc_trim()
        torch.ones(300 << 18)
        for n in 1, 1, 2, 1:
            print(measure_batch_memory(lambda n: torch.ones(n * 50 << 18).add_(1), torch.device("cpu"), n) / 2**20)
        """], capture_output=True, text=True, cwd=REPO, check=True)
    assert [float(line) for line in done.stdout.split()] == pytest.approx([50, 50, 100, 50], abs=5)


# -- the run ----------------------------------------------------------------------------------------------------------

def test_a_system_without_peak_memory_needs_a_number(data_path, tmp_path, monkeypatch, refused):
    def cannot(device):
        raise OSError
    monkeypatch.setattr(memory, "reset_peak_memory", cannot)
    refused(train.main, [f"--data_path={data_path}", f"--checkpoint_path={tmp_path}/gpt.pt", *TINY_MODEL, "--device=cpu",
                         "--batch_size=auto"], "--batch_size=auto", "give a number")
    assert list(tmp_path.glob("**/*.pt")) == []


def test_processes_have_as_many_blocks_each(data_path, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(train, "join", lambda: World(size=5))
    refused(train.main, [f"--data_path={data_path}", f"--checkpoint_path={tmp_path}/gpt.pt", *TINY_MODEL, "--device=cpu",
                         "--batch_size=auto", "--num_batch_accum=3"], "5 processes cannot take as many each of the 12")


def test_a_dry_run_leaves_no_gradient():
    model = GPT(GPTConfig(n_layer=1, n_head=1, head_size=8, block_size=16, vocab_size=512))
    machine = Machine(torch.device("cpu"), "fp32")
    train.dry_run(model, machine, 2)
    assert all(parameter.grad is None for parameter in model.parameters())

    def fail(grad):
        raise RuntimeError("too late")
    model.embed.weight.register_hook(fail)  # the last gradient to be computed
    with pytest.raises(RuntimeError, match="too late"):
        train.dry_run(model, machine, 2)
    assert all(parameter.grad is None for parameter in model.parameters())


def out_of_memory(n):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")


@pytest.mark.parametrize("free, bytes_of", [(10**9, out_of_memory), (10, lambda n: 1000)], ids=["raises", "measured"])
def test_no_batch_at_all_fits(run_train, monkeypatch, capsys, free, bytes_of):
    fake_memory(monkeypatch, free, bytes_of)
    with pytest.raises(SystemExit) as stop:
        run_train("--batch_size=auto")
    (error,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and error.startswith("train.py: ") and "not even a batch of one block fits" in error


@pytest.mark.parametrize("free, batch_size, accum", [(10**9, 32, 1), (9_000_000 / 0.9, 8, 4)])
def test_a_batch_size_that_was_found_trains_like_one_that_was_given(run_train, monkeypatch, free, batch_size, accum):
    """Steps see as many tokens as with the default batch_size: 8 batches of 4 blocks."""
    with monkeypatch.context() as patch:
        fake_memory(patch, free, lambda n: 1_000_000 * n)
        found = run_train("--batch_size=auto", "--num_batch_accum=8", checkpoint="a/gpt.pt")
    given = run_train(f"--batch_size={batch_size}", f"--num_batch_accum={accum}", checkpoint="b/gpt.pt")
    settings = load_checkpoint(found)["training"]["settings"]
    assert (settings["batch_size"], settings["num_batch_accum"]) == (batch_size, accum)
    model, expected = load_checkpoint(found)["model"], load_checkpoint(given)["model"]
    assert all(torch.equal(model[name], expected[name]) for name in expected)
    assert [row.get("train_loss") for row in run_rows(found)] == [row.get("train_loss") for row in run_rows(given)]
    assert run_rows(found)[1]["tokens"] == 32 * 16
    default = run_rows(run_train("--num_batch_accum=8", "--max_iter=1", checkpoint="c/gpt.pt"))  # 4 blocks a batch
    assert run_rows(found)[0]["val_loss"] == default[0]["val_loss"]  # the same text, whatever the batch size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not report peak memory")
def test_a_batch_size_is_found_on_this_machine(run_train):
    path = run_train("--batch_size=auto", "--max_iter=1")
    settings = load_checkpoint(path)["training"]["settings"]
    assert settings["batch_size"] * settings["num_batch_accum"] == 4 * 2 and run_rows(path)[1]["tokens"] == 128
