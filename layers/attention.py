"""Causal self-attention with rotary positions, and its cache of keys and values."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.kan import LINEARS
from layers.linear import elementwise_flops, matrix_flops
from layers.norm import rms_norm


@dataclass
class KVCache:
    """Keys and values of the positions seen so far: each (B, n_head, n_tokens, head_size), the first `length` filled."""
    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new positions, (B, n_head, T, head_size); returns all there are so far."""
        stop = self.length + keys.size(2)
        assert stop <= self.keys.size(2), (stop, self.keys.shape)
        self.keys[:, :, self.length:stop] = keys
        self.values[:, :, self.length:stop] = values
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class Rotary(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position, so that a product of query and key depends
    on their distance. Source: Su et al. 2021 (RoFormer), section 3.2.2, arXiv:2104.09864."""

    def __init__(self, head_size: int, block_size: int, base: float = 10_000.0):
        super().__init__()
        frequencies = base ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        angles = torch.outer(torch.arange(block_size, dtype=torch.float32), frequencies)
        # derived from the shape alone, so not in checkpoints
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)  # (block_size, head_size)
        self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=1), persistent=False)

    def forward(self, x: Tensor, start: int) -> Tensor:
        """x: (B, n_head, T, head_size), whose first position is `start`. Returns the same shape in fp32: bf16 angles
        would confuse neighbouring positions."""
        cos, sin = (table[start:start + x.size(2)] for table in (self.cos, self.sin))
        a, b = x.float().chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


class Attention(nn.Module):
    """Multi-head causal attention.

    qk_norm: queries and keys are normalised, which keeps their products in bounds however large the weights grow (Henry
    et al. 2020, arXiv:2010.04245). value_residual: values are a learned mix of the layer's own and the first layer's,
    which keep what the token itself was (Zhou et al. 2024, arXiv:2410.17897).
    """
    letter = "A"

    def __init__(self, config, layer: int):
        super().__init__()
        self.n_head, self.head_size, self.qk_norm = config.n_head, config.head_size, config.qk_norm
        width = config.n_head * config.head_size
        self.qkv = LINEARS[config.linear](config.n_embd, 3 * width, config.bias)
        self.proj = LINEARS[config.linear](width, config.n_embd, config.bias)
        self.rotary = Rotary(config.head_size, config.block_size) if config.positions == "rotary" else None
        # the first layer has nothing to mix in
        self.value_mix = nn.Parameter(torch.tensor(0.5)) if config.value_residual and layer > 0 else None

    def init_cache(self, batch_size: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """Room for `n_tokens` positions: 2 * B * n_head * n_tokens * head_size numbers."""
        shape = batch_size, self.n_head, n_tokens, self.head_size
        return KVCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor, cache: KVCache | None = None, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, C), which stand after what `cache` holds; it takes them in. first: the values of the first layer.
        Returns (B, T, C), and the values of this layer, (B, n_head, T, head_size)."""
        B, T, C = x.shape
        start = cache.length if cache else 0
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if self.value_mix is not None:
            v = torch.lerp(v, first, self.value_mix.to(v.dtype))
        value = v
        if self.qk_norm:
            q, k = rms_norm(q, keeps_x=True), rms_norm(k, keeps_x=True)  # parts of a tensor that v keeps
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        q, k = q.to(v.dtype), k.to(v.dtype)
        mask = None
        if cache is not None:
            k, v = (kept.to(q.dtype) for kept in cache.append(k, v))
            if start > 0 and T > 1:  # query t sees the cached positions and its own block up to t
                mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(diagonal=start)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=start == 0)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_size)), value

    def flops_per_token(self, block_size: int) -> int:
        """Projections, and scores and sums over the whole block: the upper triangle counts too, as is customary
        (Chowdhery et al. 2022, appendix B, arXiv:2204.02311)."""
        return 3 * (matrix_flops(self) + 2 * 2 * block_size * self.n_head * self.head_size)

    def elementwise_flops_per_token(self, block_size: int) -> int:
        return 3 * elementwise_flops(self)
