"""Which cards Triton's kernels run on."""
import warnings
from collections.abc import Callable
from types import ModuleType

import torch


def load_kernels(device: torch.device, load: Callable[[], ModuleType], what: str) -> ModuleType | None:
    """The module that `load()` imports and tries out; None where Triton does not support the card or, with a warning about
    `what`, fails."""
    if torch.cuda.get_device_capability(device) < (7, 0):
        return None
    try:
        return load()
    except Exception as error:  # no Triton, no compiler for its launcher, another driver: each raises its own type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"{what} without Triton, slower and with more memory ({reason[:120]})", stacklevel=2)
        return None
