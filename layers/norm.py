"""Normalisation layers, (B, T, C) -> (B, T, C): the classes in the dict NORMS, and the function `rms_norm`."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.decode import rms_norm_rows

EPS = torch.finfo(torch.float32).eps


class RMSNorm(nn.Module):
    """RMSNorm without parameters: the matrices that read its output learn the scale."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps or EPS

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, eps=self.eps)


class ScaledRMSNorm(RMSNorm):
    """RMSNorm with a learned factor per channel, as in Llama (Touvron et al. 2023, arXiv:2302.13971)."""

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.eps = config.norm_eps or 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, eps=self.eps) * self.weight


class LayerNorm(nn.LayerNorm):
    """As in GPT-2. Source: Ba et al. 2016, arXiv:1607.06450."""

    def __init__(self, config):
        super().__init__(config.n_embd, eps=config.norm_eps or 1e-5, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


def rms_norm(x: Tensor, save_input: bool = False, eps: float = EPS) -> Tensor:
    """x / √(mean(x²) + eps) over the last dimension, in fp32. Source: Zhang and Sennrich 2019, arXiv:1910.07467.

    save_input: keep the input for the backward pass rather than the output. Choose the one that another layer saves
    anyway, and it costs no memory.
    """
    if not torch.is_grad_enabled() and x.is_cpu and x.size(-2) == 1:  # a token that is decoded: calls are what takes time
        return rms_norm_rows(x.to(torch.promote_types(x.dtype, torch.float32)), eps)
    return RMSNormFunction.apply(x, save_input, eps)


class RMSNormFunction(torch.autograd.Function):
    """A third of the passes over memory that autograd's version takes."""

    @staticmethod
    def forward(ctx, x: Tensor, save_input: bool, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(norm.square() / x.size(-1) + eps)
        y = x * scale
        ctx.save_for_backward(x if save_input else y, scale)
        ctx.save_input, ctx.x_dtype = save_input, x.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        saved, scale = ctx.saved_tensors
        y = saved * scale if ctx.save_input else saved
        radial = torch.linalg.vecdot(grad, y).unsqueeze(-1) / -y.size(-1)  # along y nothing changes the output
        return torch.addcmul(grad, y, radial).mul_(scale).to(ctx.x_dtype), None, None
