"""Triton's kernels, where they run."""
import functools
import warnings
from types import ModuleType

import torch

SLOWER = {"cross_entropy_triton": "the loss is computed", "rational_triton": "rational functions run"}


@functools.cache
def triton_kernels(name: str, device: torch.device) -> ModuleType | None:
    """The module kernels/{name}.py, or None where Triton does not support the card or, with a warning, fails."""
    if torch.cuda.get_device_capability(device) < (7, 0):
        return None
    try:
        from kernels import cross_entropy_triton, rational_triton
        module = {"cross_entropy_triton": cross_entropy_triton, "rational_triton": rational_triton}[name]
        module.try_out(device)
        return module
    except Exception as error:  # no Triton, no compiler for its launcher, another driver: each raises its own type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"{SLOWER[name]} without Triton, slower and with more memory ({reason[:120]})", stacklevel=2)
        return None
