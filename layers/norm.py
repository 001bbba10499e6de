"""Normalisation of the residual stream, (B, T, C) -> (B, T, C)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps  # torch 2.6 would take that of the input's dtype, 0.008 for bf16


def rms_norm(x: Tensor) -> Tensor:
    """x scaled to mean square 1 over its last dimension. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


class RMSNorm(nn.Module):
    """Without parameters: what would scale its output is in the matrices that read it."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)


class LayerNorm(nn.LayerNorm):
    """As in GPT-2. Source: Ba et al. 2016, arXiv:1607.06450."""

    def __init__(self, config):
        super().__init__(config.n_embd, bias=config.bias)
