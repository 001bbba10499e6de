"""Where the tokens of a forward pass stand and what they may see of each other, worked out once for all layers."""
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """start: how many slots of the caches are filled. mask: (B or 1, 1, T, start + T) bool, what each token sees; None: all
    that stand before it, and itself. rotation: cosines and sines, see layers/attention.py. doc_starts: (B, T) bool, where a
    text begins that must see nothing of those before it in its row; None: nowhere but at the start."""
    start: int = 0
    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    doc_starts: Tensor | None = None


def doc_ids(doc_starts: Tensor) -> Tensor:
    """Which text of its row each token belongs to, counting from 0 or 1. (B, T) bool -> (B, T) int64."""
    return doc_starts.cumsum(dim=1)


def doc_position_ids(doc_starts: Tensor) -> Tensor:
    """Each token's position in its own text. (B, T) bool -> (B, T) int64. [1 0 0 1 0] -> [0 1 2 0 1]"""
    at = torch.arange(doc_starts.size(1), device=doc_starts.device).expand(doc_starts.shape)
    return at - at.where(doc_starts, 0).cummax(dim=1).values


def document_causal_mask(doc_starts: Tensor) -> Tensor:
    """(B, 1, T, T): a token sees what stands before it in its own text, and itself."""
    text, T = doc_ids(doc_starts), doc_starts.size(1)
    seen = torch.ones(T, T, dtype=torch.bool, device=doc_starts.device).tril()
    return ((text.unsqueeze(2) == text.unsqueeze(1)) & seen).unsqueeze(1)


def cached_causal_mask(n_new: int, start: int, left_pad: Tensor | None, device: torch.device) -> Tensor | None:
    """For `n_new` tokens after `start` filled slots, of which each row left the first `skipped`, (B,), empty."""
    if left_pad is None and (start == 0 or n_new == 1):
        return None
    seen = torch.ones(n_new, start + n_new, dtype=torch.bool, device=device).tril(diagonal=start)
    if left_pad is None:
        return seen[None, None]
    filled = torch.arange(start + n_new, device=device) >= left_pad[:, None]
    return seen & filled[:, None, None, :]
