"""Causal self-attention with rotary position embeddings, and its key-value cache."""
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.decode import attend, can_attend
from layers.attention_metadata import AttentionMetadata
from layers.blocked_attention import blocked_attention, is_blocked
from layers.cache import RowCache, RowGroups
from layers.linear import elementwise_flops, linear_class, matrix_flops
from layers.norm import rms_norm
from layers.value_embedding import ValueEmbedding

# All but cuDNN's, which newer torch prefers on Hopper: it builds a plan for every new length, so at every decoded token.
DECODE_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class KVCache(RowCache):
    """Keys and values of the positions seen so far: each (B, n_kv_head, max_len, head_size). prefix: those of the first
    positions where rows share them, a row for each of `metadata.groups`; keys and values are then those of the positions
    behind it."""
    keys: Tensor
    values: Tensor
    prefix: "KVCache | None" = None

    def reserve(self, start: int, n: int, rewindable: bool) -> tuple[int, int]:
        """Makes room for `n` positions after the first `start`. Returns the slots of the first of them, and of the first
        position that they see."""
        slot = start - (self.prefix.keys.size(2) if self.prefix else 0)
        assert slot + n <= self.keys.size(2), (slot, n, self.keys.shape)
        return slot, 0

    def append(self, start: int, keys: Tensor, values: Tensor, rewindable: bool) -> tuple[Tensor, Tensor]:
        """Stores keys and values, each (B, n_kv_head, T, head_size), after the first `start` positions. Returns those of all
        positions that they see, or all behind the prefix. rewindable: whether `rewind` may undo this."""
        T = keys.size(2)
        slot, first = self.reserve(start, T, rewindable)
        self.keys[:, :, slot:slot + T] = keys
        self.values[:, :, slot:slot + T] = values
        return self.keys[:, :, first:slot + T], self.values[:, :, first:slot + T]

    def copy_rows_from(self, rows: list[int], other: "KVCache", other_rows: list[int], stop: int, n: int):
        assert self.prefix is None and other.prefix is None
        self.keys[rows, :, stop - n:stop] = other.keys[other_rows, :, :n]
        self.values[rows, :, stop - n:stop] = other.values[other_rows, :, :n]

    def fork(self, rows: Tensor, max_len: int, shared: Tensor | None) -> "KVCache":
        """shared: the rows of this cache, which is full, that are kept once as the prefix."""
        assert self.prefix is None
        _, n_head, n, head_size = self.keys.shape
        room = lambda: self.keys.new_zeros(len(rows), n_head, max_len - n, head_size)
        if shared is None:
            return KVCache(torch.cat((self.keys[rows], room()), dim=2), torch.cat((self.values[rows], room()), dim=2))
        return KVCache(room(), room(), KVCache(self.keys[shared], self.values[shared]))

    def rewind(self, n: int):
        """Nothing has to be undone: the positions that come next overwrite them."""


@dataclass
class WindowCache(KVCache):
    """Keys and values of the last positions, at least `window` of them. first: the position in slot 0. n_undoable: of the
    positions seen, those that `rewind` may forget, with which what they see is kept."""
    window: int = 0
    max_len: int = 0
    first: int = 0
    n_undoable: int = 0

    @classmethod
    def capacity(cls, window: int, max_len: int) -> int:
        """Slots for texts of `max_len`; the window moves on by some at a time, as all that is in it has to be copied."""
        return min(max_len, window + max(8, window // 8))

    def reserve(self, start: int, n: int, rewindable: bool) -> tuple[int, int]:
        self.n_undoable = self.n_undoable + n if rewindable else 0
        if start + n - self.first > self.keys.size(2):
            first = max(self.first, start - max(0, self.n_undoable - n) - self.window)
            size = max(self.capacity(self.window, self.max_len), start + n - first)
            kept, room = slice(first - self.first, start - self.first), (0, 0, 0, size - start + first)
            self.keys, self.values = (F.pad(part[:, :, kept], room) for part in (self.keys, self.values))
            self.first = first
        return start - self.first, max(0, start - self.first - self.window)

    def append(self, start: int, keys: Tensor, values: Tensor, rewindable: bool) -> tuple[Tensor, Tensor]:
        if rewindable or keys.size(2) == 1:
            return super().append(start, keys, values, rewindable)
        self.n_undoable, stop = 0, start + keys.size(2)
        seen = slice(max(0, start - self.first - self.window), start - self.first)
        keys, values = (torch.cat((cached[:, :, seen], new.to(cached.dtype)), dim=2)
                        for cached, new in ((self.keys, keys), (self.values, values)))
        n = min(self.window, keys.size(2), self.keys.size(2))
        self.keys[:, :, :n], self.values[:, :, :n], self.first = keys[:, :, -n:], values[:, :, -n:], stop - n
        return keys, values

    def copy_rows_from(self, rows: list[int], other: "WindowCache", other_rows: list[int], stop: int, n: int):
        if stop - self.first > self.keys.size(2):  # of this one, which is new
            self.first = stop - self.window
        start = max(self.first, stop - n + other.first)
        to, of = slice(start - self.first, stop - self.first), slice(start - stop + n - other.first, n - other.first)
        self.keys[rows, :, to] = other.keys[other_rows, :, of]
        self.values[rows, :, to] = other.values[other_rows, :, of]

    def fork(self, rows: Tensor, max_len: int, shared: Tensor | None) -> "WindowCache":
        """Shares nothing, as the window leaves the first positions behind."""
        fork = RowCache.fork(self, rows, max_len, None)
        fork.max_len = max_len
        return fork

    def rewind(self, n: int):
        self.n_undoable = 0


class Attention(nn.Module):
    """Multi-head causal attention; grouped-query attention with --n_kv_head (Ainslie et al. 2023, arXiv:2305.13245).

    qk_norm: queries and keys are normalised, which bounds their products however large the weights grow (Henry et al. 2020,
    arXiv:2010.04245). value_residual: values are a learned mix of the layer's own and the first layer's, which keeps the
    identity of the token available (Zhou et al. 2024, arXiv:2410.17897). value_embeddings: see ValueEmbedding, in every
    second layer, counted from the last.
    """
    letter = "A"
    needs_mask = True

    def __init__(self, config, layer: int):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.head_size
        self.qk_norm, self.qk_scale = config.qk_norm, config.qk_scale
        self.n_kv_head = config.n_kv_head or config.n_head
        self.qkv = linear_class(config, "mixer.qkv")(
            config.n_embd, (config.n_head + 2 * self.n_kv_head) * config.head_size, config.bias)
        self.proj = linear_class(config, "mixer.proj")(config.n_head * config.head_size, config.n_embd, config.bias)
        self.value_mix = nn.Parameter(torch.tensor(0.5)) if config.value_residual and layer > 0 else None
        self.value_embedding = ValueEmbedding(config) if config.has_value_embedding(layer) else None

    def init_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        """An empty cache for `max_len` positions: 2 * B * n_kv_head * max_len * head_size numbers."""
        shape = batch_size, self.n_kv_head, max_len, self.head_size
        return KVCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor, metadata: AttentionMetadata, cache: KVCache | None = None,
                first_layer_v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, C), the positions after those in `cache`, which takes them in. first_layer_v: the values of the first
        layer. Returns (B, T, C), and this layer's values, (B, n_kv_head, T, head_size)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_size).transpose(1, 2).split(
            (self.n_head, self.n_kv_head, self.n_kv_head), dim=1)  # each (B, heads, T, head_size)
        if self.value_mix is not None:
            v = torch.lerp(v, first_layer_v, self.value_mix.to(v.dtype))
        new_v = v
        if self.value_embedding is not None:
            v = v + self.value_embedding(x, metadata.idx).to(v.dtype)
        if self.qk_norm:
            q, k = rms_norm(q, save_input=True), rms_norm(k, save_input=True)  # views of a tensor that v keeps alive
        if self.qk_scale != 1:
            q, k = q * self.qk_scale, k * self.qk_scale
        rotation, mask = metadata.rotation, self.choose_mask(metadata)
        if cache is not None and mask is None and cache.prefix is None and can_attend(q, v, cache.keys):
            slot, first = cache.reserve(metadata.start, 1, metadata.rewindable)
            return self.proj(attend(q, k, v, rotation, cache.keys, cache.values, slot, first)), new_v
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k = q.to(v.dtype), k.to(v.dtype)
        autocast = backends = nullcontext()
        if cache is not None:
            cached = cache.append(metadata.start, k, v, metadata.rewindable)
            if metadata.start > 0:
                k, v = cached
                q, autocast = q.to(k.dtype), torch.autocast(x.device.type, enabled=False)
                if x.device.type == "cuda":
                    backends = sdpa_kernel(DECODE_BACKENDS)
        prefix = cache.prefix if cache is not None else None
        if prefix is not None and T > 1:  # holding the scores of so many queries costs more than repeating keys
            k, v = (torch.cat((shared[metadata.groups.index], own), dim=2)
                    for shared, own in ((prefix.keys, k), (prefix.values, v)))
        if mask is not None and prefix is None:
            mask = mask[..., -k.size(2):]  # of the positions that are still in the cache
        if mask is not None and x.is_cuda and self.n_kv_head < self.n_head:  # no fused kernel takes both
            k, v = (part.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for part in (k, v))
        is_unmasked, window = metadata.mask is None and metadata.start == 0, self.n_visible(T) - 1
        with autocast, backends:
            if prefix is not None and T == 1:
                y = attend_with_prefix(q, k, v, prefix, metadata.groups, mask)
            elif is_unmasked and is_blocked(q, k, window):
                y = blocked_attention(q, k, v, window)
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_unmasked and mask is None,
                                                   enable_gqa=k.size(1) < self.n_head)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_size)), new_v

    def choose_mask(self, metadata: AttentionMetadata) -> Tensor | None:
        return metadata.mask

    def n_visible(self, block_size: int) -> int:
        """The most positions that a token sees."""
        return block_size

    def flops_per_token(self, block_size: int) -> int:
        """Projections, scores and weighted sums over the whole block, or the window. The masked upper triangle counts, as is
        customary (Chowdhery et al. 2022, appendix B, arXiv:2204.02311)."""
        return 3 * (matrix_flops(self) + 2 * 2 * self.n_visible(block_size) * self.n_head * self.head_size)

    def elementwise_flops_per_token(self, block_size: int) -> int:
        return 3 * elementwise_flops(self)


class SlidingAttention(Attention):
    """Attention to the token itself and the --window positions before it. Source: Beltagy et al. 2020 (Longformer),
    section 3.1, arXiv:2004.05150. The cache does not grow beyond the window."""
    letter = "S"

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.window = config.window_size

    def init_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> WindowCache:
        """An empty cache: as of Attention, but for no more positions than WindowCache.capacity."""
        cache = super().init_cache(batch_size, WindowCache.capacity(self.window, max_len), device, dtype)
        return WindowCache(cache.keys, cache.values, window=self.window, max_len=max_len)

    def choose_mask(self, metadata: AttentionMetadata) -> Tensor | None:
        return metadata.window_mask

    def n_visible(self, block_size: int) -> int:
        return min(block_size, self.window + 1)


def attend_with_prefix(q: Tensor, k: Tensor, v: Tensor, prefix: KVCache, groups: RowGroups, mask: Tensor | None) -> Tensor:
    """Attention of a token, q: (B, n_head, 1, head_size), over the prefix that rows share, which is read once for each
    group, and over k and v, (B, n_kv_head, S, head_size), behind it. mask: (B or 1, 1, 1, P + S). Source: Juravsky et al.
    2024 (Hydragen), arXiv:2402.05099; over few keys, one softmax costs less than two and their combination."""
    B, n_head, _, head_size = q.shape
    n_kv_head, n_shared = k.size(1), prefix.keys.size(2)
    n = n_head // n_kv_head  # heads that share keys and values
    q = (q * head_size ** -0.5).view(B, n_kv_head, n, head_size)
    shared_scores = groups.ungroup(groups.group(q) @ prefix.keys.transpose(-1, -2), n)
    scores = torch.cat((shared_scores, q @ k.transpose(-1, -2)), dim=-1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    y = groups.ungroup(groups.group(weights[..., :n_shared]) @ prefix.values, n) + weights[..., n_shared:] @ v
    return y.view(B, n_head, 1, head_size)


class Rotary(nn.Module):
    """Rotary position embeddings: rotates pairs of channels by an angle proportional to the position, so that the product of
    a query and a key depends on their distance. Source: Su et al. 2021 (RoFormer), section 3.2.2, arXiv:2104.09864."""

    def __init__(self, head_size: int, block_size: int, base: float = 10_000.0):
        super().__init__()
        self.head_size, self.block_size, self.base = head_size, block_size, base
        self.init_buffers()

    def init_buffers(self):
        """The tables of cosines and sines, (block_size, head_size). They follow from the config, so checkpoints do not hold
        them."""
        frequencies = self.base ** -(torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size)
        angles = torch.outer(torch.arange(self.block_size, dtype=torch.float32), frequencies)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", torch.cat((-angles.sin(), angles.sin()), dim=1), persistent=False)

    def forward(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """positions: a slice of T, or (B, T). Returns cosines and sines, each (T, head_size) or (B, 1, T, head_size)."""
        cos, sin = self.cos[positions], self.sin[positions]
        return (cos, sin) if isinstance(positions, slice) else (cos.unsqueeze(1), sin.unsqueeze(1))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Applies what Rotary returned to x, (B, n_head, T, head_size). Returns the same shape in fp32: with bf16 angles,
    neighbouring positions would coincide."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)
