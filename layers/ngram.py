"""A memory of pairs of tokens: a table of vectors that a hash of each token and the one before it looks up."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.attention_metadata import AttentionMetadata
from layers.cache import RowCache, last_positions

MULTIPLIERS = 36313, 27191  # of a token and of the one before it, as in modded-nanogpt
NO_TOKEN = -1               # before the first one of a document


@dataclass
class LastToken(RowCache):
    """The last token seen, (B, 1) int64, NO_TOKEN before the first. Where it is rewindable: all that `rewind` may return
    to."""
    tokens: Tensor

    def rewind(self, n: int):
        self.tokens = self.tokens[:, -1 - n, None]


class NgramMemory(nn.Module):
    """--ngram_rows vectors, which start at zero and are added to the residual stream before each block, by a factor that the
    block learns. Looking one up costs no product, so the table can have many more numbers than the rest of the model; pairs
    that share a row share it. Sources: modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt), pull request 201;
    Cheng et al. 2026 (Engram), arXiv:2601.07372.

    sparse: makes the gradient of the table sparse, for update rules that know such a one: a step then costs as much as the
    rows that its tokens look up, whatever the size of the table."""

    def __init__(self, config):
        super().__init__()
        self.sparse = False
        self.embed = nn.Embedding(config.ngram_rows, config.n_embd)

    def init_cache(self, batch_size: int, device: torch.device) -> LastToken:
        return LastToken(torch.full((batch_size, 1), NO_TOKEN, device=device))

    def forward(self, idx: Tensor, metadata: AttentionMetadata, cache: LastToken | None = None) -> Tensor:
        """idx: (B, T) int64 -> (B, T, C). cache: holds the token before idx, and takes in its last one."""
        rows = self.hash(idx, previous_tokens(idx, metadata, cache))
        if self.sparse and torch.is_grad_enabled() and idx.device.type != "mps":  # whose sparse tensors lack operations
            return sparse_embedding(rows, self.embed.weight)
        return self.embed(rows)

    def hash(self, idx: Tensor, previous: Tensor) -> Tensor:
        """The row of each pair, both (B, T) int64: any but the last one, which is that of first tokens."""
        last = self.embed.num_embeddings - 1
        rows = ((MULTIPLIERS[0] * idx) ^ (MULTIPLIERS[1] * previous)) % last
        return rows.masked_fill(previous == NO_TOKEN, last)


@torch._disable_dynamo  # whose compiler of backward passes knows no sparse gradient
def sparse_embedding(rows: Tensor, table: Tensor) -> Tensor:
    """rows: (B, T) int64, table: (N, C) -> (B, T, C)."""
    return F.embedding(rows, table, sparse=True)


def previous_tokens(idx: Tensor, metadata: AttentionMetadata, cache: LastToken | None) -> Tensor:
    """(B, T): at each position the token before it, NO_TOKEN at the first of a document."""
    if cache is None:
        previous = F.pad(idx[:, :-1], (1, 0), value=NO_TOKEN)
        return previous if metadata.doc_starts is None else previous.masked_fill(metadata.doc_starts, NO_TOKEN)
    previous = torch.cat((cache.tokens[:, -1:], idx[:, :-1]), dim=1)
    cache.tokens = torch.cat((cache.tokens, idx), dim=1) if metadata.rewindable else last_positions(idx, 1)
    return previous
