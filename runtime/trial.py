"""What a few steps on trial tell: the batch that fits into memory, the dtype that is faster.

`step(machine, batch_size)` is a forward and a backward pass that leaves no gradient.
"""
import dataclasses
import math
import time
from collections.abc import Callable

import torch

from runtime.device import Machine, is_out_of_memory
from runtime.flags import BadInput


def fitting_batch(step: Callable, machine: Machine, n_blocks: int, states: int) -> int:
    """The largest divisor of `n_blocks` whose step fits into the device's memory beside `states` bytes, by what the two
    smallest take: memory grows evenly with the batch. On a GPU it is tried too. Raises MemoryError when not even one
    block fits, BadInput where the system does not tell what a step takes."""
    try:
        machine.reset_peak_memory()
    except OSError:
        raise BadInput("--batch_size=auto: this system does not tell how much memory a step takes: give a number") from None
    room = 0.9 * machine.free_memory() - states
    sizes = [size for size in range(1, n_blocks + 1) if n_blocks % size == 0]
    peak_of(step, machine, 1)  # what is made once, such as handles of libraries, is no part of a block
    one = peak_of(step, machine, 1)
    if one > room:
        raise MemoryError("not even a batch of one block fits")
    grows = math.inf
    if len(sizes) > 1 and sizes[1] * one <= 4 * room:
        grows = max(0.0, peak_of(step, machine, sizes[1]) - one) / (sizes[1] - 1)
    fits = [size for size in sizes if size == 1 or one + grows * (size - 1) <= room]
    while machine.device.type == "cuda" and fits[-1] > 1 and peak_of(step, machine, fits[-1]) > room:
        fits.pop()
        torch.cuda.empty_cache()
    machine.reset_peak_memory()
    return fits[-1]


def peak_of(step: Callable, machine: Machine, batch_size: int) -> float:
    """Bytes that a step comes to hold; infinite where there are too few."""
    machine.reset_peak_memory()
    start = machine.peak_memory()
    try:
        step(machine, batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    return machine.peak_memory() - start


def faster_machine(step: Callable, machine: Machine) -> Machine:
    """Of fp16 and fp32 on a GPU, that in which a few steps take less time."""
    def seconds_of(machine: Machine) -> float:
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step(machine, 1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)
    return min((dataclasses.replace(machine, dtype=dtype) for dtype in ("fp32", "fp16")), key=seconds_of)
