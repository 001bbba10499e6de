"""runtime/memory.py: what is free, the peak, and which errors mean too little."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import memory
from runtime.memory import disable_malloc_trim, free_memory, is_out_of_memory, peak_memory, peak_resident_bytes

REPO = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_free_memory_is_less_than_the_machine_has():
    total = 2**50
    if sys.platform.startswith("linux"):
        total = 1024 * int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert 2**20 < free_memory(CPU) < total


@pytest.mark.integration
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_a_process_is_that_of_its_tensors():
    program = """if True:
        import torch
        from runtime.memory import peak_memory, peak_resident_bytes, reset_peak_memory
        cpu = torch.device("cpu")
        before = peak_memory(cpu)
        torch.ones(64 << 18)  # 64 MiB of fp32, freed at once
        after = peak_memory(cpu)
        reset_peak_memory(cpu)
        print(after - before, peak_memory(cpu) - before, peak_resident_bytes() == peak_memory(cpu))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True)
    rise, after_reset, is_same = done.stdout.split()
    assert 60 << 20 < int(rise) < 80 << 20 and int(after_reset) < 20 << 20 and is_same == "True"


def test_where_proc_is_missing_the_peak_comes_from_getrusage(monkeypatch):
    pytest.importorskip("resource")  # not on Windows
    from_proc = peak_memory(CPU)

    def no_proc(path, *args, **kwargs):
        raise FileNotFoundError(path)
    monkeypatch.setattr(memory.Path, "read_text", no_proc)
    assert 0.5 * from_proc < peak_resident_bytes() < 50 * from_proc  # ru_maxrss may start from the parent's
    assert free_memory(CPU) == 4 * 2**30


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried …"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated …"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False), (ValueError("out of memory"), False)],
    ids=["cuda", "cublas", "mps", "cpu", "another", "another type"])
def test_which_errors_mean_too_little_memory(error, expected):
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize("library", ["this", "missing", "without mallopt"])
def test_disabling_malloc_trim_is_silent_on_every_system(monkeypatch, capfd, library):
    def load(name):
        if library == "missing":
            raise OSError("no such library")
        return object()
    if library != "this":
        monkeypatch.setattr(memory.ctypes, "CDLL", load)
    disable_malloc_trim()
    assert torch.zeros(3 << 20).add(1).sum() == 3 << 20
    assert capfd.readouterr() == ("", "")
