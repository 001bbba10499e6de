"""Causal self-attention with rotary positions, and its cache of keys and values."""
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers.attention_metadata import AttentionMetadata
from layers.kan import LINEARS
from layers.linear import elementwise_flops, matrix_flops
from layers.norm import rms_norm

# Not cuDNN's, which newer torch prefers on Hopper: it makes a plan for every length it meets, and so at every token.
DECODING_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class KVCache:
    """Keys and values of the positions seen so far: each (B, n_kv_head, n_tokens, head_size)."""
    keys: Tensor
    values: Tensor

    def append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new positions after the first `start`, (B, n_kv_head, T, head_size); returns all there are so far."""
        stop = start + keys.size(2)
        assert stop <= self.keys.size(2), (stop, self.keys.shape)
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def copy_rows_from(self, rows: list[int], other: "KVCache", other_rows: list[int], stop: int, n: int):
        """The `n` positions that the rows `other_rows` of another cache hold become the last ones before `stop` of these."""
        self.keys[rows, :, stop - n:stop] = other.keys[other_rows, :, :n]
        self.values[rows, :, stop - n:stop] = other.values[other_rows, :, :n]


class Rotary(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position, so that a product of query and key depends
    on their distance. Source: Su et al. 2021 (RoFormer), section 3.2.2, arXiv:2104.09864."""

    def __init__(self, head_size: int, block_size: int, base: float = 10_000.0):
        super().__init__()
        self.head_size, self.block_size, self.base = head_size, block_size, base
        self.init_buffers()

    def init_buffers(self):
        """Makes the tables, (block_size, head_size). They follow from the shape alone, so they are not in checkpoints."""
        frequencies = self.base ** -(torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size)
        angles = torch.outer(torch.arange(self.block_size, dtype=torch.float32), frequencies)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=1), persistent=False)

    def forward(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """positions: a slice of T, or (B, T). Returns cosines and sines, each (T, head_size) or (B, 1, T, head_size)."""
        cos, sin = self.cos[positions], self.sin[positions]
        return (cos, sin) if isinstance(positions, slice) else (cos.unsqueeze(1), sin.unsqueeze(1))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x: (B, n_head, T, head_size). Returns the same shape in fp32: bf16 angles would confuse neighbouring positions."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


class Attention(nn.Module):
    """Multi-head causal attention. Where heads of keys and values are fewer, groups of heads share them (Ainslie et al.
    2023, arXiv:2305.13245).

    qk_norm: queries and keys are normalised, which keeps their products in bounds however large the weights grow (Henry
    et al. 2020, arXiv:2010.04245). value_residual: values are a learned mix of the layer's own and the first layer's,
    which keep what the token itself was (Zhou et al. 2024, arXiv:2410.17897).
    """
    letter = "A"

    def __init__(self, config, layer: int):
        super().__init__()
        self.n_head, self.head_size, self.qk_norm = config.n_head, config.head_size, config.qk_norm
        self.n_kv_head = config.n_kv_head or config.n_head
        width, n_all = config.n_head * config.head_size, config.n_head + 2 * self.n_kv_head
        self.qkv = LINEARS[config.linear](config.n_embd, n_all * config.head_size, config.bias)
        self.proj = LINEARS[config.linear](width, config.n_embd, config.bias)
        # the first layer has nothing to mix in
        self.value_mix = nn.Parameter(torch.tensor(0.5)) if config.value_residual and layer > 0 else None

    def init_cache(self, batch_size: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """Room for `n_tokens` positions: 2 * B * n_kv_head * n_tokens * head_size numbers."""
        shape = batch_size, self.n_kv_head, n_tokens, self.head_size
        return KVCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: KVCache | None = None,
                first_layer_v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, C), which stand after what `cache` holds; it takes them in. first: the values of the first layer.
        Returns (B, T, C), and the values of this layer, (B, n_kv_head, T, head_size)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_size).transpose(1, 2).split(
            (self.n_head, self.n_kv_head, self.n_kv_head), dim=1)  # each (B, heads, T, head_size)
        if self.value_mix is not None:
            v = torch.lerp(v, first_layer_v, self.value_mix.to(v.dtype))
        value = v
        if self.qk_norm:
            q, k = rms_norm(q, save_input=True), rms_norm(k, save_input=True)  # parts of a tensor that v keeps
        if metadata.rotation is not None:
            q, k = rotate(q, metadata.rotation), rotate(k, metadata.rotation)
        q, k = q.to(v.dtype), k.to(v.dtype)
        products = kernels = nullcontext()
        if cache is not None:
            kept = cache.append(metadata.start, k, v)
            if metadata.start > 0:  # else they are all there are
                k, v = kept
                q, products = q.to(k.dtype), torch.autocast(x.device.type, enabled=False)
                if x.device.type == "cuda":
                    kernels = sdpa_kernel(DECODING_KERNELS)
        with products, kernels:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=metadata.mask, enable_gqa=self.n_kv_head < self.n_head,
                                               is_causal=metadata.mask is None and metadata.start == 0)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_size)), value

    def flops_per_token(self, block_size: int) -> int:
        """Projections, and scores and sums over the whole block: the upper triangle counts too, as is customary
        (Chowdhery et al. 2022, appendix B, arXiv:2204.02311)."""
        return 3 * (matrix_flops(self) + 2 * 2 * block_size * self.n_head * self.head_size)

    def elementwise_flops_per_token(self, block_size: int) -> int:
        return 3 * elementwise_flops(self)
