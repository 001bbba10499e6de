"""Value embeddings: what a token is, added to the values of attention."""
import torch
from torch import Tensor, nn

from layers.linear import Linear

GATE_CHANNELS = 12  # of the layer's input that the gate reads


class ValueEmbedding(nn.Module):
    """A table of its own for the layer, whose row for each token a gate per head adds to the values, 0 to 3 times. Sources:
    Zhou et al. 2024, arXiv:2410.17897, as nanochat (https://github.com/karpathy/nanochat) has them."""

    def __init__(self, config):
        super().__init__()
        self.n_kv_head, self.head_size = config.n_kv_head or config.n_head, config.head_size
        self.embed = nn.Embedding(config.vocab_size, self.n_kv_head * config.head_size)
        self.value_gate = Linear(min(GATE_CHANNELS, config.n_embd), self.n_kv_head, bias=False)

    def forward(self, x: Tensor, idx: Tensor) -> Tensor:
        """x: the layer's input, (B, T, C); idx: (B, T) int64 -> (B, n_kv_head, T, head_size)"""
        B, T = idx.shape
        gate = 3 * torch.sigmoid(self.value_gate(x[..., :self.value_gate.in_features]))
        values = self.embed(idx).view(B, T, self.n_kv_head, self.head_size) * gate.unsqueeze(-1)
        return values.transpose(1, 2)
