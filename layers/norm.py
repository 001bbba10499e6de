"""Normalisation of the residual stream, (B, T, C) -> (B, T, C)."""
import torch
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps


class UnitRMS(torch.autograd.Function):
    """Passes over the numbers a third as often as autograd would."""

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
        kept, scale = ctx.saved_tensors
        y = kept * scale if ctx.save_input else kept
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / -y.size(-1)
        return torch.addcmul(grad, y, along).mul_(scale).to(ctx.x_dtype), None, None


def rms_norm(x: Tensor, save_input: bool = False, eps: float = EPS) -> Tensor:
    """x scaled to mean square 1 over its last dimension, in fp32. save_input: for the backward pass, rather than the result;
    one of them costs no memory where another layer keeps it too. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
    return UnitRMS.apply(x, save_input, eps)


class RMSNorm(nn.Module):
    """Without parameters: what would scale its output is in the matrices that read it."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps or EPS

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, eps=self.eps)


class ScaledRMSNorm(RMSNorm):
    """With a factor for each channel, as in Llama (Touvron et al. 2023, arXiv:2302.13971)."""

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
