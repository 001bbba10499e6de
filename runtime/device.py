"""The machine: device, autocast dtype, torch.compile where it works, peak FLOP/s, memory, random generators."""
import json
import random
import re
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from runtime.flags import BadInput, check_flags, flag

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
    device: str = flag("auto", "cuda, cuda:1, mps or cpu; auto takes the first there is, in this order")
    dtype: str = flag("auto", "of matrix products; auto is bf16 on a GPU that computes it, fp16 with a loss scaler on "
                              "an older one, else fp32,\nwhich newer GPUs compute as TF32", choices=("auto", *DTYPES))
    __post_init__ = check_flags


@dataclass(frozen=True)
class Machine:
    """A device and the dtype matrix products run in. Weights and optimizer states are fp32 always."""
    device: torch.device
    dtype: str

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}"

    def autocast(self):
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """fp16 gradients underflow unless the loss is scaled up; for other dtypes this does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")

    def peak_flops(self) -> float | None:
        """FLOP/s that MFU is a share of; None where the peak is not known."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        if "Laptop" in name:  # a laptop's RTX 4090 is another chip than the desktop's
            return None
        return next((peaks.get(self.dtype) for part, peaks in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)

    def peak_memory(self) -> int:
        """Most bytes held so far: tensors on a GPU, the whole process elsewhere (0 where the system does not tell)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource  # not on Windows
        except ImportError:
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def open_machine(config: DeviceConfig) -> Machine:
    """Raises BadInput when the device is not there."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    there += [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if (f"{name}:0" if name == "cuda" else name) not in there:
        raise BadInput(f"--device={config.device}: not on this machine, which has {', '.join(there)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dtype = config.dtype
    if dtype == "auto":
        dtype = "fp32"
        if device.type == "cuda":
            # torch.cuda.is_bf16_supported() is true on older cards too, which only emulate it, slowly
            dtype = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return Machine(device, dtype)


@contextmanager
def explain_out_of_memory(advice: str):
    """Turns torch's several errors for too little memory into a MemoryError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"too little memory: {advice} ({str(error).splitlines()[0][:200]})") from None


def is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError is a GPU's; the allocators of CPU and mps raise a bare RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in ("allocate memory", "out of memory")))


def compile_in_place(model: torch.nn.Module, try_step) -> bool:
    """Compiles `model` and runs `try_step()`, where a machine that cannot compile fails; then it stays uncompiled with
    one warning. Returns whether it is compiled. In place, because torch.compile(model) would rename every weight."""
    try:
        model.compile()
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
    finally:
        model.zero_grad(set_to_none=True)


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
