"""Token shift: adds a learned per-channel multiple of the previous token."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.attention_metadata import AttentionMetadata
from layers.cache import RowCache


@dataclass
class ShiftCache(RowCache):
    """The last position seen, (B, 1, C); zeros before the first. Where it is rewindable: all that `rewind` may return to."""
    last: Tensor

    def rewind(self, n: int):
        self.last = self.last[:, -1 - n, None]


class TokenShift(nn.Module):
    """x_t + coeff * x_{t-1}. A head would otherwise have to learn to fetch the previous token; here it is available from
    the first step on. Source: Peng et al. 2023 (RWKV), section 3.1, arXiv:2305.13048."""

    def __init__(self, config):
        super().__init__()
        self.shift_coeff = nn.Parameter(torch.zeros(config.n_embd))

    def init_cache(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ShiftCache:
        return ShiftCache(torch.zeros(batch_size, 1, self.shift_coeff.numel(), device=device, dtype=dtype))

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: ShiftCache | None = None) -> Tensor:
        """x: (B, T, C) -> (B, T, C). cache: holds the position before x, and takes in the last of x."""
        coeff = self.shift_coeff.to(x.dtype)
        if metadata.doc_starts is not None:
            previous = F.pad(x[:, :-1], (0, 0, 1, 0)).masked_fill(metadata.doc_starts.unsqueeze(-1), 0.0)
            return torch.addcmul(x, coeff, previous)
        if cache is None:
            return TokenShiftFunction.apply(x, coeff)
        previous, last = cache.last[:, -1:].to(x.dtype), x[:, -1:].to(cache.last.dtype)
        cache.last = torch.cat((cache.last, x.to(last.dtype)), dim=1) if metadata.rewindable else last
        return torch.addcmul(x, coeff, torch.cat((previous, x[:, :-1]), dim=1))


class TokenShiftFunction(torch.autograd.Function):
    """x_t + coeff * x_{t-1}, with as few passes over memory as possible."""

    @staticmethod
    def forward(ctx, x: Tensor, coeff: Tensor) -> Tensor:
        """x: (B, T, C), coeff: (C,)"""
        ctx.save_for_backward(x, coeff)
        y = x.clone()
        y[:, 1:].addcmul_(x[:, :-1], coeff)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, coeff = ctx.saved_tensors
        x_grad = grad.clone()
        x_grad[:, :-1].addcmul_(grad[:, 1:], coeff)
        return x_grad, (grad[:, 1:] * x[:, :-1]).sum(dim=(0, 1))
