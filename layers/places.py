"""Where the tokens of a forward pass stand and what they may see of each other, worked out once for all layers."""
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """start: how many slots of the caches are filled. mask: (B or 1, 1, T, start + T) bool, what each token sees; None: all
    that stand before it, and itself. rotation: cosines and sines, see layers/attention.py. begins: (B, T) bool, where a text
    begins that must see nothing of those before it in its row; None: nowhere but at the start."""
    start: int = 0
    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    begins: Tensor | None = None


def text_of(begins: Tensor) -> Tensor:
    """Which text of its row each token belongs to, counting from 0 or 1. (B, T) bool -> (B, T) int64."""
    return begins.cumsum(dim=1)


def positions_in_texts(begins: Tensor) -> Tensor:
    """Each token's position in its own text. (B, T) bool -> (B, T) int64. [1 0 0 1 0] -> [0 1 2 0 1]"""
    at = torch.arange(begins.size(1), device=begins.device).expand(begins.shape)
    return at - at.where(begins, 0).cummax(dim=1).values


def mask_of_texts(begins: Tensor) -> Tensor:
    """(B, 1, T, T): a token sees what stands before it in its own text, and itself."""
    text, T = text_of(begins), begins.size(1)
    seen = torch.ones(T, T, dtype=torch.bool, device=begins.device).tril()
    return ((text.unsqueeze(2) == text.unsqueeze(1)) & seen).unsqueeze(1)


def mask_of_cache(n_new: int, start: int, skipped: Tensor | None, device: torch.device) -> Tensor | None:
    """For `n_new` tokens after `start` filled slots, of which each row left the first `skipped`, (B,), empty."""
    if skipped is None and (start == 0 or n_new == 1):
        return None
    seen = torch.ones(n_new, start + n_new, dtype=torch.bool, device=device).tril(diagonal=start)
    if skipped is None:
        return seen[None, None]
    filled = torch.arange(start + n_new, device=device) >= skipped[:, None]
    return seen & filled[:, None, None, :]
