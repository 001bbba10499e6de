"""Token shift: a learned share of the position before, channel by channel."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class ShiftCache:
    """The last position seen, (B, 1, C); zeros before the first."""
    last: Tensor


class TokenShift(nn.Module):
    """x_t + share * x_{t-1}. What a head must otherwise learn to fetch, the token before, is there from the first step on.
    Source: Peng et al. 2023 (RWKV), section 3.1, arXiv:2305.13048."""

    def __init__(self, config):
        super().__init__()
        self.share = nn.Parameter(torch.zeros(config.n_embd))

    def init_cache(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ShiftCache:
        return ShiftCache(torch.zeros(batch_size, 1, self.share.numel(), device=device, dtype=dtype))

    def forward(self, x: Tensor, cache: ShiftCache | None = None) -> Tensor:
        """x: (B, T, C), which stand after what `cache` holds; it takes the last of them in. Returns (B, T, C)."""
        before = torch.zeros_like(x[:, :1]) if cache is None else cache.last.to(x.dtype)
        if cache is not None:
            cache.last = x[:, -1:].to(cache.last.dtype)
        return x + self.share.to(x.dtype) * torch.cat((before, x[:, :-1]), dim=1)
