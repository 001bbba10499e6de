"""The device and the dtype of matrix products, torch.compile where it works, peak FLOP/s, random generators.

    machine = open_machine(DeviceConfig(device="auto", dtype="auto"))
    with machine.autocast():
        loss = model(*machine.to_device(batch))
"""
import dataclasses
import functools
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.config import BadInput, check_flags, flag
from runtime.distributed import join
from runtime.memory import is_out_of_memory

CPUINFO = Path("/proc/cpuinfo")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Peak FLOP/s of dense matrix products from the vendors' data sheets, by part of the device's name. The first match counts.
PEAK_FLOPS = {
    "H200": {"bf16": 989e12, "fp16": 989e12}, "H100 PCIe": {"bf16": 756e12, "fp16": 756e12},
    "H100": {"bf16": 989e12, "fp16": 989e12}, "A100": {"bf16": 312e12, "fp16": 312e12},
    "L4": {"bf16": 121e12, "fp16": 121e12}, "T4": {"fp16": 65e12, "fp32": 8.1e12},
    "V100-PCIE": {"fp16": 112e12, "fp32": 14e12}, "V100": {"fp16": 125e12, "fp32": 15.7e12},
    "P100-PCIE": {"fp16": 18.7e12, "fp32": 9.3e12}, "P100": {"fp16": 21.2e12, "fp32": 10.6e12},
    "RTX 4090": {"bf16": 165e12, "fp16": 165e12}, "RTX 3090": {"bf16": 71e12, "fp16": 71e12},
}


@dataclass(frozen=True)
class DeviceConfig:
    """The device."""
    device: str = flag("auto", "cuda, cuda:1, mps or cpu; auto takes the first available, in this order", on_resume="free",
                       scope="shared")
    dtype: str = flag("auto", "dtype of matrix products; auto: the fastest that the device supports natively, see "
                              "docs/train.md", choices=("auto", *DTYPES), on_resume="free")
    deterministic: bool = flag(False, "on a GPU, use only kernels that always add in the same order; slower",
                               on_resume="warn")
    __post_init__ = check_flags


@dataclass(frozen=True)
class Machine:
    """A device and the dtype of its matrix products. Weights are always fp32."""
    device: torch.device
    dtype: str

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}"

    def autocast(self):
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])

    def to_device(self, batch: Iterable[Tensor]) -> list[Tensor]:
        """`batch` on the device. A GPU copies pinned tensors on a separate stream while it computes the previous batch."""
        if self.device.type != "cuda":
            return [tensor.to(self.device, non_blocking=True) for tensor in batch]
        copying, computing = copy_stream(self.device), torch.cuda.current_stream(self.device)
        with torch.cuda.stream(copying):
            batch = [tensor.to(self.device, non_blocking=True) for tensor in batch]
        computing.wait_stream(copying)
        for tensor in batch:
            tensor.record_stream(computing)  # its memory is reused only after `computing` is done with it
        return batch

    def newton_schulz_dtype(self) -> torch.dtype:
        """bf16 where the device is fast in it, else fp32: Muon's products need little precision, whatever --dtype is."""
        return torch.bfloat16 if "bf16" in (self.dtype, preferred_dtype(self.device)) else torch.float32

    def grad_scaler(self) -> torch.amp.GradScaler:
        """fp16 gradients underflow unless the loss is scaled up; disabled for other dtypes."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")

    def peak_flops(self) -> float:
        """FLOP/s that MFU is a fraction of: the data sheet's, or those of a large matrix product, measured once."""
        return self.datasheet_flops() or measure_flops(self.device, self.dtype, 4096 if self.device.type == "cuda" else 1024)

    def datasheet_flops(self) -> float | None:
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        if "Laptop" in name:  # a laptop's RTX 4090 is another chip than the desktop's
            return None
        return next((peaks.get(self.dtype) for part, peaks in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def open_machine(config: DeviceConfig, resume_dtype: str = "") -> Machine:
    """Selects the device and the dtype, and sets torch up for them. Raises BadInput when the device is not available.

    resume_dtype: of a resumed run, the dtype so far: timing the dtypes again might choose another one.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and (world := join()).size > 1:
        name = f"cuda:{world.local_rank}"
    available = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    available += [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if (f"{name}:0" if name == "cuda" else name) not in available:
        raise BadInput(f"--device={config.device}: not on this machine, which has {', '.join(available)}")
    device = torch.device(name)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # for code that does not name a device
        check_gpu_supported(device, config.device)
        torch.set_float32_matmul_precision("high")  # TF32, where the GPU has it
        if config.deterministic:
            # read at cuBLAS's first product, see docs.nvidia.com/cuda/cublas, "Results reproducibility"
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # with warn_only, fused attention would only warn and still add in any order: aten's attention_backward.cu
            torch.use_deterministic_algorithms(True)
    return Machine(device, choose_dtype(device, resume_dtype) if config.dtype == "auto" else config.dtype)


def check_gpu_supported(device: torch.device, device_flag: str):
    """Raises BadInput when the installed torch has no kernels for this GPU: torch.cuda.is_available() is True all the same.

    device_flag: the value of --device.
    """
    major, minor = torch.cuda.get_device_capability(device)
    archs = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch) for arch in torch.cuda.get_arch_list()]
    if torch.version.hip:
        return  # AMD names its architectures differently
    for kind, x, y, suffix in (match.groups() for match in archs if match):
        built_for = int(x), int(y)
        # binaries (sm) run on later GPUs of their major version, PTX (compute) is compiled for any later GPU, and what is
        # specific to an architecture (suffix a) runs on no other
        if built_for == (major, minor) or suffix != "a" and (
                built_for <= (major, minor) and (kind == "compute" or built_for[0] == major)):
            return
    wheel = "cu126" if (major, minor) < (7, 5) else "cu128"  # cu128 dropped Maxwell, Pascal and Volta
    name, install = torch.cuda.get_device_name(device), "pip install --force-reinstall 'torch>=2.6,<2.14'"
    raise BadInput(f"--device={device_flag}: {name} has compute capability {major}.{minor}, for which the installed torch "
                   f"{torch.__version__} has no kernels: `{install} --index-url https://download.pytorch.org/whl/{wheel}`, "
                   f"or --device=cpu")


def describe_hardware(device: torch.device) -> str:
    """"NVIDIA H100 PCIe, AMD EPYC, 16 cores, Python 3.12.1, torch 2.11.0", for the caption of a measurement."""
    cpu = next((line.split(":")[1].strip() for line in read_lines(CPUINFO) if line.startswith("model name")),
               platform.machine())
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{gpu}{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def read_lines(path: Path) -> list[str]:
    """[] where the file cannot be read: only Linux has /proc."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


# -- dtype ------------------------------------------------------------------------------------------------------------

def choose_dtype(device: torch.device, resume_dtype: str = "") -> str:
    """The dtype of --dtype=auto."""
    if preferred := preferred_dtype(device):
        return preferred
    # Some CPUs take up to seven times as long in bf16, a P100 gains little from fp16, and no table tells which.
    half, n = ("bf16", 256) if device.type == "cpu" else ("fp16", 2048)
    if resume_dtype in (half, "fp32"):
        return resume_dtype
    return half if measure_flops(device, half, n) > 1.2 * measure_flops(device, "fp32", n) else "fp32"


def preferred_dtype(device: torch.device) -> str | None:
    """The best dtype of a device by its specification; None where only timing tells."""
    if device.type == "mps":
        return "fp32"
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() is also true on older GPUs, which emulate it, slowly
        capability = torch.cuda.get_device_capability(device)
        if capability >= (7, 0):
            return "bf16" if capability >= (8, 0) else "fp16"
    return x86_dtype() if device.type == "cpu" else None


@functools.cache
def x86_dtype(cpuinfo: Path = CPUINFO) -> str | None:
    """bf16 on an x86 CPU with instructions for it, fp32 on one that would emulate it; None on other CPUs and systems."""
    match = re.search(r"^flags\s*:(.*)", "\n".join(read_lines(cpuinfo)), re.MULTILINE)
    return match and ("bf16" if {"avx512_bf16", "amx_bf16"} & set(match.group(1).split()) else "fp32")


@functools.cache
def measure_flops(device: torch.device, dtype: str, n: int) -> float:
    """FLOP/s of an n x n matrix product, the best of 20, or of as many as begin within a second: other processes may
    interrupt some of them. (A CPU without instructions for fp16 takes seconds for one.)"""
    best, spent = 0.0, 0.0
    a = torch.ones(n, n, dtype=DTYPES[dtype], device=device)
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        synchronize()
        seconds = time.perf_counter() - start
        best, spent = max(best, 2 * n**3 / seconds), spent + seconds
        if spent > 1:
            break
    return best


def with_faster_dtype(machine: Machine, step: Callable[[Machine, int], None]) -> Machine:
    """`machine`, a GPU, in fp16 or fp32, whichever makes `step(machine, batch_size=1)` faster: the best of 4 each."""
    def step_seconds(machine: Machine) -> float:
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step(machine, 1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)
    return min((dataclasses.replace(machine, dtype=dtype) for dtype in ("fp32", "fp16")), key=step_seconds)


# -- threads ----------------------------------------------------------------------------------------------------------

def fastest_threads(step: Callable[[], None], n_all: int) -> int:
    """How many threads of a CPU make `step()`, of a second or less, fastest: `n_all`, unless fewer are clearly faster.

    Threads wait for each other after every operation. Where another process holds one of their cores, small operations
    take up to ten times as long with all cores as with one.
    """
    def step_seconds(n: int, limit: float) -> float:
        torch.set_num_threads(n)
        times = []
        for _ in range(4):  # the first one starts threads
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
            if times[-1] > limit:
                break
        return statistics.median(times[1:] or times)
    seconds = {1: step_seconds(1, math.inf)}
    for n in sorted({2**i for i in range(1, n_all.bit_length())} - {n_all}) + [n_all]:
        seconds[n] = step_seconds(n, 2 * min(seconds.values()))
    best = min(seconds, key=seconds.get)
    chosen = best if 1.3 * seconds[best] < seconds[n_all] else n_all  # timing varies, so a small gain changes nothing
    torch.set_num_threads(chosen)
    return chosen


# -- torch.compile ----------------------------------------------------------------------------------------------------

MAX_COMPILED_RATIO = 0.97  # timing varies, so a small gain changes nothing


def can_compile(device: torch.device) -> bool:
    """Whether --compile_model=auto may compile: on GPUs that Triton supports, and on a CPU with a C++ compiler."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def compile_model(model: torch.nn.Module):
    """Compiles `model` in place, at its first call: torch.compile(model) would rename every weight."""
    from torch._functorch import config as functorch_config
    # Compiled backward passes run without autocast, as eager ones do: hand-written ones need fp32 in some places.
    if hasattr(functorch_config, "backward_pass_autocast"):
        functorch_config.backward_pass_autocast = "off"
    if torch.are_deterministic_algorithms_enabled():
        from torch._inductor import config as inductor_config
        if hasattr(inductor_config, "deterministic"):
            inductor_config.deterministic = True  # no kernel is chosen by timing
    model.compile()


def compile_in_place(model: torch.nn.Module, try_step: Callable[[], None]) -> bool:
    """Compiles `model` and runs `try_step()`, which fails where compilation does not work: then `model` stays eager, with
    one warning. Returns whether it is compiled."""
    try:
        compile_model(model)
        try_step()
        return True
    except Exception as error:  # a missing compiler, an old GPU, an unsupported operation: each raises a type of its own
        if is_out_of_memory(error):
            raise
        model._compiled_call_impl = None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"--compile_model: torch.compile does not work here ({reason[:120]}); running without it",
                      stacklevel=2)
        return False


def keep_faster(model: torch.nn.Module, step: Callable[[], None]) -> float:
    """Leaves a compiled `model` compiled only where that makes `step()` clearly faster, on a CPU. Returns the ratio of its
    time to the eager one's."""
    ways, seconds = {"compiled": model._compiled_call_impl, "eager": None}, {"compiled": [], "eager": []}
    for _ in range(4):
        for name, model._compiled_call_impl in ways.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    ratio = min(seconds["compiled"][1:]) / min(seconds["eager"][1:])  # the first ones allocate memory
    model._compiled_call_impl = ways["compiled" if ratio < MAX_COMPILED_RATIO else "eager"]
    return ratio


# -- random generators ------------------------------------------------------------------------------------------------

def seed_everything(seed: int):
    """Seeds Python's, numpy's and, on every device, torch's global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The state of all generators, in types that a checkpoint can hold: numpy's is JSON text."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": json.dumps([kind, keys.tolist(), *rest]),
            "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def set_rng_state(state: dict):
    """Restores what `rng_state` returned. A GPU's generators are restored on a machine with as many GPUs."""
    random.setstate(state["python"])
    np.random.set_state(json.loads(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if torch.backends.mps.is_available() and state["mps"] is not None:
        torch.mps.set_rng_state(state["mps"])
