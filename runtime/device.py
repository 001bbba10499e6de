"""The machine: device, autocast dtype, torch.compile where it works, peak FLOP/s, memory, random generators."""
import dataclasses
import functools
import json
import os
import platform
import random
import re
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
from runtime.memory import is_out_of_memory

CPUINFO = Path("/proc/cpuinfo")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Dense matrix-product peak in FLOP/s, by a part of the device's name; from the makers' data sheets. The first that fits
# counts.
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
    """The machine."""
    device: str = flag("auto", "cuda, cuda:1, mps or cpu; auto takes the first available, in this order", on_resume="free",
                       scope="shared")
    dtype: str = flag("auto", "of matrix products; auto: the fastest the device is good at, see docs/train.md",
                      choices=("auto", *DTYPES), on_resume="free")
    deterministic: bool = flag(False, "on a GPU, use only kernels that always add in the same order; slower",
                               on_resume="warn")
    __post_init__ = check_flags


@dataclass(frozen=True)
class Machine:
    """A device and the dtype matrix products run in. Weights are fp32 always."""
    device: torch.device
    dtype: str

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}"

    def autocast(self):
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])

    def to_device(self, batch: Iterable[Tensor]) -> list[Tensor]:
        """`batch` on the device. A GPU copies pinned tensors while it still computes what was asked of it before."""
        if self.device.type != "cuda":
            return [part.to(self.device, non_blocking=True) for part in batch]
        copies, steps = copy_stream(self.device), torch.cuda.current_stream(self.device)
        with torch.cuda.stream(copies):
            batch = [part.to(self.device, non_blocking=True) for part in batch]
        steps.wait_stream(copies)
        for part in batch:
            part.record_stream(steps)  # its memory is given back only when `steps` has used it
        return batch

    def newton_schulz_dtype(self) -> torch.dtype:
        """For products that need little precision, whatever `dtype` says of the others."""
        return torch.bfloat16 if "bf16" in (self.dtype, known_dtype(self.device)) else torch.float32

    def grad_scaler(self) -> torch.amp.GradScaler:
        """fp16 gradients underflow unless the loss is scaled up; for other dtypes this does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")

    def peak_flops(self) -> float:
        """FLOP/s that MFU is a share of: the data sheet's, else those of a large product, measured once."""
        return self.known_peak() or measured_flops(self.device, self.dtype, 4096 if self.device.type == "cuda" else 1024)

    def known_peak(self) -> float | None:
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        if "Laptop" in name:  # a laptop's RTX 4090 is another chip than the desktop's
            return None
        return next((peaks.get(self.dtype) for part, peaks in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def hardware(device: torch.device) -> str:
    """What it runs on, for the caption of a measurement."""
    name = next((line.split(":")[1].strip() for line in lines_of(CPUINFO) if line.startswith("model name")),
                platform.machine())
    card = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{card}{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not Linux
        return []


def open_machine(config: DeviceConfig, resume_dtype: str = "") -> Machine:
    """had: the dtype that a run which goes on was begun with; timing products again might choose another one. Raises
    BadInput when the device is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    there += [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if (f"{name}:0" if name == "cuda" else name) not in there:
        raise BadInput(f"--device={config.device}: not on this machine, which has {', '.join(there)}")
    device = torch.device(name)
    if device.type == "cuda":
        if device.index is not None:  # what asks for no device by name means this one too
            torch.cuda.set_device(device)
        require_kernels(device, config.device)
        torch.set_float32_matmul_precision("high")  # TF32 where there are units for it
        if config.deterministic:
            # cuBLAS reads it at its first product, see docs.nvidia.com/cuda/cublas, "Results reproducibility"
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # with warn_only, fused attention would warn and go on adding in any order: aten's attention_backward.cu
            torch.use_deterministic_algorithms(True)
    return Machine(device, choose_dtype(device, resume_dtype) if config.dtype == "auto" else config.dtype)


def choose_dtype(device: torch.device, resume_dtype: str = "") -> str:
    if known := known_dtype(device):
        return known
    # some take up to seven times as long in bf16, a P100 gains little by fp16, and no table says which
    half, n = ("bf16", 256) if device.type == "cpu" else ("fp16", 2048)
    if resume_dtype in (half, "fp32"):
        return resume_dtype
    return half if measured_flops(device, half, n) > 1.2 * measured_flops(device, "fp32", n) else "fp32"


def known_dtype(device: torch.device) -> str | None:
    """The dtype that is best on such a device; None where it takes timing."""
    if device.type == "mps":
        return "fp32"
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() is true on older cards too, which only emulate it, slowly
        capability = torch.cuda.get_device_capability(device)
        if capability >= (7, 0):
            return "bf16" if capability >= (8, 0) else "fp16"
    return x86_dtype() if device.type == "cpu" else None


@functools.cache
def x86_dtype(cpuinfo: Path = CPUINFO) -> str | None:
    """bf16 on a processor that has units for it, fp32 on one that would imitate them; None where the system, or another
    kind of processor, does not tell."""
    match = re.search(r"^flags\s*:(.*)", "\n".join(lines_of(cpuinfo)), re.MULTILINE)
    return match and ("bf16" if {"avx512_bf16", "amx_bf16"} & set(match.group(1).split()) else "fp32")


@functools.cache
def measured_flops(device: torch.device, dtype: str, n: int) -> float:
    """FLOP/s of a product of n x n matrices, the best of many: other processes may take their turns between."""
    best = 0.0
    a = torch.ones(n, n, dtype=DTYPES[dtype], device=device)
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        wait()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def require_kernels(device: torch.device, given: str):
    """Raises BadInput when the installed torch was built without this GPU: is_available() is true all the same."""
    major, minor = torch.cuda.get_device_capability(device)
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch) for arch in torch.cuda.get_arch_list()]
    if torch.version.hip:
        return  # AMD's cards have other names
    for kind, x, y, only in (match.groups() for match in built if match):
        has = int(x), int(y)
        # binaries run on later cards of their generation, intermediate code is compiled for any later card, and what is
        # for one architecture alone (a) runs on no other
        if has == (major, minor) or only != "a" and (has <= (major, minor) and (kind == "compute" or has[0] == major)):
            return
    wheel = "cu126" if (major, minor) < (7, 5) else "cu128"  # later ones dropped Maxwell to Volta
    raise BadInput(f"--device={given}: {torch.cuda.get_device_name(device)} computes sm_{major}{minor}, for which the "
                   f"installed torch {torch.__version__} has no kernels: `pip install --force-reinstall 'torch>=2.6,<2.14' "
                   f"--index-url https://download.pytorch.org/whl/{wheel}`, or --device=cpu")


def can_compile(device: torch.device) -> bool:
    """Whether compiling is worth its start without being asked for: on GPUs that Triton knows."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def compile_model(model: torch.nn.Module):
    """Compiles `model` in place, at its first call: torch.compile(model) would rename every weight."""
    from torch._functorch import config as functorch_config
    # Backward passes run without autocast, as eager ones do: those written by hand would lose fp32 where they need it.
    if hasattr(functorch_config, "backward_pass_autocast"):
        functorch_config.backward_pass_autocast = "off"
    if torch.are_deterministic_algorithms_enabled():
        from torch._inductor import config as inductor_config
        if hasattr(inductor_config, "deterministic"):
            inductor_config.deterministic = True  # no kernel is chosen by the clock
    model.compile()


def compile_in_place(model: torch.nn.Module, try_step) -> bool:
    """Compiles `model` and runs `try_step()`, where a machine that cannot compile fails; then it stays uncompiled with
    one warning. Returns whether it is compiled."""
    try:
        compile_model(model)
        try_step()
        return True
    except Exception as error:  # a missing compiler, an old GPU, an operation it does not know: each its own type
        if is_out_of_memory(error):
            raise
        model._compiled_call_impl = None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"--compile_model: torch.compile does not work here ({reason[:120]}); going on without",
                      stacklevel=2)
        return False


# -- random generators ------------------------------------------------------------------------------------------------

def seed_everything(seed: int):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # every device


def rng_state() -> dict:
    """All generators, in types that a checkpoint can hold: numpy's state is not, so it is JSON text."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": json.dumps([kind, keys.tolist(), *rest]),
            "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def set_rng_state(state: dict):
    random.setstate(state["python"])
    np.random.set_state(json.loads(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if torch.backends.mps.is_available() and state["mps"] is not None:
        torch.mps.set_rng_state(state["mps"])


def faster_dtype(step: Callable, machine: Machine) -> Machine:
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
