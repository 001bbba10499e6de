"""Token shift: a learned share of the position before, channel by channel."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.places import Places


@dataclass
class ShiftCache:
    """The last position seen, (B, 1, C); zeros before the first."""
    last: Tensor

    def put(self, rows: list[int], other: "ShiftCache", others: list[int], stop: int, n: int):
        """See KVCache."""
        self.last[rows] = other.last[others]


class Shifted(torch.autograd.Function):
    """x_t + share * x_{t-1}, in as few passes over the numbers as there can be."""

    @staticmethod
    def forward(ctx, x: Tensor, share: Tensor) -> Tensor:
        """x: (B, T, C), share: (C,)"""
        ctx.save_for_backward(x, share)
        y = x.clone()
        y[:, 1:].addcmul_(x[:, :-1], share)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, share = ctx.saved_tensors
        x_grad = grad.clone()
        x_grad[:, :-1].addcmul_(grad[:, 1:], share)
        return x_grad, (grad[:, 1:] * x[:, :-1]).sum(dim=(0, 1))


class TokenShift(nn.Module):
    """x_t + share * x_{t-1}. What a head must otherwise learn to fetch, the token before, is there from the first step on.
    Source: Peng et al. 2023 (RWKV), section 3.1, arXiv:2305.13048."""

    def __init__(self, config):
        super().__init__()
        self.share = nn.Parameter(torch.zeros(config.n_embd))

    def init_cache(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ShiftCache:
        return ShiftCache(torch.zeros(batch_size, 1, self.share.numel(), device=device, dtype=dtype))

    def forward(self, x: Tensor, places: Places, cache: ShiftCache | None = None) -> Tensor:
        """x: (B, T, C), which stand after what `cache` holds; it takes the last of them in. Returns (B, T, C)."""
        share = self.share.to(x.dtype)
        if places.begins is not None:
            before = F.pad(x[:, :-1], (0, 0, 1, 0)).masked_fill(places.begins.unsqueeze(-1), 0.0)
            return torch.addcmul(x, share, before)
        if cache is None:
            return Shifted.apply(x, share)
        before, cache.last = cache.last.to(x.dtype), x[:, -1:].to(cache.last.dtype)
        return torch.addcmul(x, share, torch.cat((before, x[:, :-1]), dim=1))
