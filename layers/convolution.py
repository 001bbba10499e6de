"""Short causal convolutions."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.attention_metadata import AttentionMetadata, doc_position_ids


class ShortConvolution(nn.Module):
    """silu(Σ_j taps_j * x_{t-j}), each channel by itself. It starts as silu(x). Source: Yang et al. 2024 (Gated DeltaNet),
    section 3.4, arXiv:2412.06464."""

    def __init__(self, n_channels: int, n_taps: int):
        super().__init__()
        self.taps = nn.Parameter(torch.cat((torch.ones(1, n_channels), torch.zeros(n_taps - 1, n_channels))))

    @property
    def n_previous(self) -> int:
        """The positions before a token that it reads."""
        return self.taps.size(0) - 1

    def forward(self, x: Tensor, metadata: AttentionMetadata, previous: Tensor | None = None) -> Tensor:
        """x: (B, T, channels) -> (B, T, channels). previous: at least the n_previous positions before x; None: zeros."""
        T, n = x.size(1), self.n_previous
        padded = F.pad(x, (0, 0, n, 0)) if previous is None else torch.cat((previous[:, previous.size(1) - n:], x), dim=1)
        taps, y = self.taps.to(x.dtype), x * self.taps[0].to(x.dtype)
        positions = None if metadata.doc_starts is None else doc_position_ids(metadata.doc_starts)
        for j in range(1, n + 1):
            earlier = padded[:, n - j:n - j + T]
            if positions is not None:
                earlier = earlier.masked_fill((positions < j).unsqueeze(-1), 0.0)
            y = torch.addcmul(y, earlier, taps[j])
        return F.silu(y)
