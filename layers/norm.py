"""Normalisation of the residual stream, (B, T, C) -> (B, T, C)."""
import torch
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps


class UnitRMS(torch.autograd.Function):
    """Keeps its output for the backward pass, which what reads it mostly keeps too, and passes over the numbers a third as
    often as autograd would."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.size(-1) + EPS)
        y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.x_dtype = x.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / -y.size(-1)
        return torch.addcmul(grad, y, along).mul_(scale).to(ctx.x_dtype)


def rms_norm(x: Tensor) -> Tensor:
    """x scaled to mean square 1 over its last dimension, in fp32. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
    return UnitRMS.apply(x)


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
