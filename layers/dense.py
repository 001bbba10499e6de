"""Dense connections: a block reads the inputs of all blocks before it."""
import torch.nn.functional as F
from torch import Tensor, nn

from layers.linear import Linear, matrix_flops
from layers.mlp import GELU
from layers.norm import rms_norm

CHANNELS_PER_SOURCE = 4  # of the hidden layer that the factors are computed in


class DenseConnections(nn.Module):
    """Adds to the input of block `layer` the inputs of the blocks before it, each times a factor that a small MLP computes
    for each position. At first all factors are 0. Source: Xiao et al. 2025 (MUDDFormer), arXiv:2502.12170, of whose four
    mixtures this is the one of the residual stream; in the last blocks alone, as in modded-nanogpt
    (https://github.com/KellerJordan/modded-nanogpt), pull request 259."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.fc = Linear(config.n_embd, CHANNELS_PER_SOURCE * layer, bias=False)
        self.proj = Linear(CHANNELS_PER_SOURCE * layer, layer, bias=False)
        self.dense_mix = nn.Parameter(self.proj.weight.new_zeros(layer))

    def forward(self, x: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
        """x: (B, T, C). sources: `layer` tensors of the same shape."""
        factors = self.dense_mix + self.proj(F.gelu(self.fc(rms_norm(x))))
        for source, factor in zip(sources, factors.to(x.dtype).unbind(-1), strict=True):
            x = x + factor.unsqueeze(-1) * source
        return x

    def flops_per_token(self, block_size: int) -> int:
        return 3 * matrix_flops(self)

    def elementwise_flops_per_token(self, block_size: int) -> int:
        return 3 * (2 * self.fc.in_features * len(self.dense_mix) + GELU.activation_flops * self.fc.out_features)
