"""Positions and documents of the tokens in one forward pass, computed once for all layers."""
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.cache import RowGroups


@dataclass(frozen=True)
class AttentionMetadata:
    """start: filled slots of the cache. mask: (B or 1, 1, T, start + T) bool, True where a query may see a key; None: plain
    causal attention. rotation: cosines and sines, see layers/attention.py. doc_starts: (B, T) bool, True at the first token
    of each packed document, which sees nothing before it; None: every row is one document. rewindable: caches keep the state
    after every token, for `rewind`. groups: of rows whose cached keys and values begin with the same ones, see KVCache.
    window_mask: `mask` for layers of a sliding window. idx: the tokens, (B, T) int64."""
    start: int = 0
    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    doc_starts: Tensor | None = None
    rewindable: bool = False
    groups: RowGroups | None = None
    window_mask: Tensor | None = None
    idx: Tensor | None = None


def doc_ids(doc_starts: Tensor) -> Tensor:
    """The index of each token's document in its row, counting from 0 or 1. (B, T) bool -> (B, T) int64."""
    return doc_starts.cumsum(dim=1)


def doc_position_ids(doc_starts: Tensor) -> Tensor:
    """Each token's position in its own document. (B, T) bool -> (B, T) int64. [1 0 0 1 0] -> [0 1 2 0 1]"""
    index = torch.arange(doc_starts.size(1), device=doc_starts.device).expand(doc_starts.shape)
    return index - index.where(doc_starts, 0).cummax(dim=1).values


def document_causal_mask(doc_starts: Tensor) -> Tensor:
    """(B, T) bool -> (B, 1, T, T) bool: a token sees itself and the tokens before it in its own document."""
    ids, T = doc_ids(doc_starts), doc_starts.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=doc_starts.device).tril()
    return ((ids.unsqueeze(2) == ids.unsqueeze(1)) & causal).unsqueeze(1)


def cached_causal_mask(n_new: int, start: int, left_pad: Tensor | None, device: torch.device) -> Tensor | None:
    """The mask of `n_new` tokens after `start` cached ones, (B or 1, 1, n_new, start + n_new). left_pad: (B,), the number of
    empty slots at the start of each row. None where attention needs no mask."""
    if left_pad is None and (start == 0 or n_new == 1):
        return None
    causal = torch.ones(n_new, start + n_new, dtype=torch.bool, device=device).tril(diagonal=start)
    if left_pad is None:
        return causal[None, None]
    is_filled = torch.arange(start + n_new, device=device) >= left_pad[:, None]
    return causal & is_filled[:, None, None, :]


def sliding_window_mask(mask: Tensor | None, window: int, n_new: int, start: int, device: torch.device) -> Tensor | None:
    """`mask`, None or as `document_causal_mask` and `cached_causal_mask` return it for `n_new` tokens after `start` others,
    for queries that see the `window` slots before their own. None where that hides nothing more, and for one token, whose
    cache holds no more than it sees."""
    if start + n_new <= window + 1 or (n_new == 1 and mask is None):
        return mask
    near = torch.ones(n_new, start + n_new, dtype=torch.bool, device=device).triu(diagonal=start - window)
    if mask is not None:
        return mask & near
    return near.tril(diagonal=start)[None, None]
