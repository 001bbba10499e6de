"""Memory of the device: what is free, the peak of a step, the largest batch that fits, and which errors mean too little."""
import ctypes
import math
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from runtime.config import BadInput


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate, including what its caching allocator holds in reserve."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1))
    except (OSError, AttributeError):
        return 4 * 2**30  # not Linux: a guess that any current machine meets
    with suppress(OSError, ValueError):  # a container's cgroup limit
        limit, held = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - held)
    return free


def available_memory(device: torch.device) -> int:
    """Bytes that this process can have: what is free, and what it holds."""
    if device.type == "cuda":
        return free_memory(device) + torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    held = 0
    with suppress(OSError, AttributeError):  # not Linux
        held = 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))
    return free_memory(device) + held


def reset_peak_memory(device: torch.device):
    """Restarts what `peak_memory` measures. Raises OSError where the system cannot do that (of CPUs, Linux alone can)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        raise OSError("mps keeps no peak statistics")
    else:
        with suppress(AttributeError, OSError, TypeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)  # pages that `disable_malloc_trim` retains would hide new allocations
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of tensors on a GPU, of the whole process elsewhere (0 where the system does not tell)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


def current_device_peak() -> int:
    """Peak bytes so far of whatever this process computes on."""
    return peak_memory(torch.device("cuda" if torch.cuda.is_initialized() else "cpu"))


def peak_resident_bytes() -> int:
    """Peak resident bytes of this process; 0 where the system does not tell."""
    with suppress(OSError, AttributeError):  # Linux, whose ru_maxrss starts from the parent's
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def largest_batch(try_batch: Callable[[int], None], device: torch.device, n_blocks: int, reserved: int,
                  n_sharing: int = 1) -> int:
    """The largest divisor of `n_blocks` that fits as a batch size beside `reserved` bytes.

    try_batch(batch_size): a forward and backward pass that leaves no gradient. n_sharing: how many processes divide the
    memory, which grows linearly with the batch, so the two smallest sizes predict the others; on a GPU the prediction is
    tried as well.
    Raises MemoryError when not even one block fits, BadInput where the system does not report peak memory.
    """
    try:
        reset_peak_memory(device)
    except OSError:
        raise BadInput("--batch_size=auto: this system does not report peak memory: give a number") from None
    available = 0.9 * free_memory(device) / n_sharing - reserved
    sizes = [size for size in range(1, n_blocks + 1) if n_blocks % size == 0]
    measure_batch_memory(try_batch, device, 1)  # one-time allocations, such as library handles, do not belong to a block
    one = measure_batch_memory(try_batch, device, 1)
    if one > available:
        raise MemoryError("not even a batch of one block fits")
    per_block = math.inf
    if len(sizes) > 1 and sizes[1] * one <= 4 * available:
        per_block = max(0.0, measure_batch_memory(try_batch, device, sizes[1]) - one) / (sizes[1] - 1)
    fits = [size for size in sizes if size == 1 or one + per_block * (size - 1) <= available]
    while device.type == "cuda" and fits[-1] > 1 and measure_batch_memory(try_batch, device, fits[-1]) > available:
        fits.pop()
        torch.cuda.empty_cache()
    reset_peak_memory(device)
    return fits[-1]


def measure_batch_memory(try_batch: Callable[[int], None], device: torch.device, batch_size: int) -> float:
    """Additional peak bytes of `try_batch(batch_size)`; infinite when it runs out of memory."""
    reset_peak_memory(device)
    start = peak_memory(device)
    try:
        try_batch(batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    return peak_memory(device) - start


def disable_malloc_trim():
    """Makes glibc keep freed memory instead of returning it to the system and faulting it in again at every step.

    The equivalent of MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ for a running process; a no-op elsewhere.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
    with suppress(AttributeError, OSError, TypeError):  # another C library, or another system
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError comes from GPUs; the CPU and mps allocators, and cuBLAS creating its handle, raise a bare
    RuntimeError, which only its text tells apart."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")))
