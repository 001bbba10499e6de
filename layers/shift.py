"""Layers that add something of the previous token: a learned multiple per channel, or of the whole embedding by a gate."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.attention_metadata import AttentionMetadata
from layers.cache import RowCache, last_positions
from layers.linear import Linear

GATE_CHANNELS = 24  # of the embedding that the gate of Smear reads


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
        if metadata.doc_starts is None and cache is None:
            return TokenShiftFunction.apply(x, coeff)
        return torch.addcmul(x, coeff, previous_positions(x, metadata, cache))


class Smear(nn.Module):
    """x_t + coeff * gate(x_t) * x_{t-1} for embeddings x, with a gate of each token between 0 and 1. Source: nanochat,
    https://github.com/karpathy/nanochat."""

    def __init__(self, config):
        super().__init__()
        self.n_embd = config.n_embd
        self.gate = Linear(min(GATE_CHANNELS, config.n_embd), 1, bias=False)
        self.smear_coeff = nn.Parameter(torch.tensor(0.0))

    def init_cache(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ShiftCache:
        return ShiftCache(torch.zeros(batch_size, 1, self.n_embd, device=device, dtype=dtype))

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: ShiftCache | None = None) -> Tensor:
        """As TokenShift."""
        gate = self.smear_coeff * torch.sigmoid(self.gate(x[..., :self.gate.in_features]))
        return x + gate.to(x.dtype) * previous_positions(x, metadata, cache)


def previous_positions(x: Tensor, metadata: AttentionMetadata, cache: ShiftCache | None) -> Tensor:
    """(B, T, C): at each position the one before it, 0 at the first of a document. The cache takes in the last of x."""
    if cache is None:
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        return previous if metadata.doc_starts is None else previous.masked_fill(metadata.doc_starts.unsqueeze(-1), 0.0)
    previous, dtype = cache.last[:, -1:].to(x.dtype), cache.last.dtype
    cache.last = torch.cat((cache.last, x.to(dtype)), dim=1) if metadata.rewindable else last_positions(x, 1).to(dtype)
    return torch.cat((previous, x[:, :-1]), dim=1)


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
