"""Normalisation without parameters."""
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor) -> Tensor:
    """x scaled to mean square 1 over its last dimension. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
    return F.rms_norm(x, (x.size(-1),))
