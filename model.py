"""The network: GPTConfig, GPT, its loss, its cache and its FLOPs.

A decoder-only transformer: token embedding, blocks of a mixer and an MLP on a residual stream, a linear head. Mixer, MLP,
linear layer and norm are chosen by name from the dicts in layers/.

    model = GPT(GPTConfig(n_layer=4, n_head=4, head_size=32, block_size=128, vocab_size=4096))
    loss = model(idx, targets)
"""
import math
import random
import re
import sys
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from layers import LINEAR_SCOPES, LINEARS, MIXERS, MLPS, NORMS
from layers.attention import Rotary
from layers.attention_metadata import (
    AttentionMetadata,
    cached_causal_mask,
    doc_position_ids,
    document_causal_mask,
    sliding_window_mask,
)
from layers.cache import RowCache, RowGroups
from layers.dense import DenseConnections
from layers.gated_delta import DEFAULT_HOUSEHOLDER
from layers.linear import cast_weights, linear_layers, matrix_flops
from layers.loss import cross_entropy, softcap_logits
from layers.ngram import LastToken, NgramMemory
from layers.norm import rms_norm
from layers.shift import ShiftCache, Smear, TokenShift
from runtime.config import BadInput, check_flags, flag

MIXERS_BY_LETTER = {mixer.letter: mixer for mixer in MIXERS.values()}
# flags of layers of some mixers only -> which
DELTA_RULES = "gated_delta", "delta_product", "rotary_delta"
FLAGS_OF_MIXERS = {"window": ("sliding",), "d_head_size": DELTA_RULES, "d_conv": DELTA_RULES,
                   "n_householder": ("delta_product",)}
MAX_ROTARY_NUMBERS = 2 ** 27  # in each of the two tables of angles, which no file holds: 1 GB in both
INITIAL_LOGIT_STD = 0.1  # std of a tied model's first logits, for a nearly uniform prediction
LOOPS_STD = 0.5  # of the logarithm of the rate at which --sampled_loops draws
MIN_SHARING = 4  # rows that go on from one, on average, from which its keys and values are kept once for them
NGRAM_MIX = 0.1  # of the memory of pairs in each block, at first
MAX_LOOPS_RATIO = 4  # of a draw to --loops, which bounds memory: 1 draw in 1,000 would be larger, the mean falls by 0.1 %


@dataclass(frozen=True)
class GPTConfig:
    """The model."""
    n_layer: int = flag(12, "blocks", at_least=1, at_most=1000)
    n_head: int = flag(12, "attention heads; the width is n_head * head_size", at_least=1, at_most=10_000)
    head_size: int = flag(64, "channels per head, an even number", at_least=2, at_most=10_000)
    n_kv_head: int = flag(None, "heads of keys and values, each shared by a group of attention heads (default: as many as "
                                "--n_head)", at_least=1, at_most=10_000)
    block_size: int = flag(1024, "context length in tokens", at_least=1, at_most=10_000_000)
    vocab_size: int = flag(None, "required vocabulary size (default: that of the data's tokenizer)", at_least=1, scope="run")
    mlp: str = flag("auto", "feed-forward layer; auto: gelu, or the kind of --linear if that is not linear",
                    choices=("auto", *MLPS))
    n_hidden: int = flag(None, "hidden width of the feed-forward layer (default: for about 8 * width² parameters)",
                         at_least=1, at_most=10_000_000)
    mixer: str = flag("attention", "layer that mixes positions: attention, sliding, gated_delta, delta_product, "
                                   "rotary_delta, or a pattern of their letters A, S, D, P and R, one letter per layer, "
                                   "repeated: DDDA")
    window: int = flag(None, "positions before a token that it sees in layers of sliding attention (default: a quarter of "
                             "--block_size)", at_least=1, at_most=10_000_000)
    d_head_size: int = flag(None, "channels per head in layers of delta rules (gated_delta, delta_product, rotary_delta), "
                                  "which keep as many numbers for each channel of the model (default: --head_size)",
                             at_least=1, at_most=10_000)
    d_conv: int = flag(None, "positions, with its own, in the convolution before queries, keys and values in layers of "
                             "delta rules (default: no convolution)", at_least=1, at_most=1000)
    n_householder: int = flag(None, "corrections of the state at every token in layers of delta_product (default: "
                                    f"{DEFAULT_HOUSEHOLDER})", at_least=1, at_most=64)
    loops: int = flag(1, "how often the middle blocks run, one after the other, with the same weights: all blocks but the "
                         "first and the last, or all of fewer than three", at_least=1, at_most=1000)
    sampled_loops: bool = flag(False, "draw the number of loops of each training batch at random, --loops on average, so "
                                      "that the model works with other numbers at inference")
    linear: str = flag("linear", "kind of every linear layer in the blocks, including those of attention",
                       choices=tuple(LINEARS))
    linear_scope: str = flag("all", "which of them are of that kind; values: only those after the mixers, which write what "
                                    "these have read; gates: only those of the gates, in layers of delta rules also of the "
                                    "rates of decay and correction", choices=tuple(LINEAR_SCOPES))
    norm: str = flag("rms", "normalisation: rms has no parameters and also normalises the embedding; scaled_rms is Llama's, "
                            "layer GPT-2's", choices=tuple(NORMS))
    norm_eps: float = flag(None, "added to the mean square in the norms (default: 1e-5; 1e-7 with --norm=rms)", above=0,
                           at_most=1)
    positions: str = flag("rotary", "position embeddings; none: only causality, token shift and delta rules say what comes "
                                    "before what", choices=("rotary", "learned", "none"))
    rotary_base: float = flag(10_000.0, "base of the rotary angles; the slowest one completes a turn in about 6 times as "
                                        "many tokens", above=1, at_most=1e12)
    qk_norm: bool = flag(True, "normalise queries and keys")
    qk_scale: float = flag(1.0, "factor of queries and keys, after they are normalised", above=0, at_most=1000)
    value_residual: bool = flag(True, "mix the first layer's values into those of later layers")
    value_embeddings: bool = flag(False, "add an embedding of each token to the values, by a gate per head, in every second "
                                         "layer, counted from the last, where that is attention")
    x0_residual: bool = flag(True, "mix the embedding into the input of each block")
    token_shift: bool = flag(True, "add a learned per-channel multiple of the previous token to the input of mixers and "
                                   "feed-forward layers")
    smear: bool = flag(False, "add a gated multiple of the previous token's embedding to each embedding")
    backout: bool = flag(False, "subtract a learned multiple of the residual stream in the middle from that at the end")
    dense_blocks: int = flag(None, "last blocks to whose input those of all blocks before them are added, times factors "
                                   "that a small MLP computes (default: none)", at_least=1, at_most=100_000)
    ngram_rows: int = flag(None, "vectors in a table for pairs of a token and the one before it, which share a vector where "
                                 "a hash of them agrees; 5 times the vocabulary is usual (default: no table)", at_least=2,
                           at_most=1_000_000_000)
    softcap: float = flag(15.0, "caps logits at softcap * tanh(logits / softcap); 0: no cap", at_least=0, at_most=1e6)
    tied: bool = flag(True, "share one matrix between embedding and head")
    bias: bool = flag(False, "biases in linear layers and LayerNorm")
    init: str = flag("zero", "initialisation; zero: the matrices that write into the residual stream start at zero; gpt2: "
                             "GPT-2's for all weights; nanochat: nanochat's, which also scales the stream in the first "
                             "block", choices=("zero", "gpt2", "nanochat"))

    def __post_init__(self):
        check_flags(self)
        if self.mlp == "auto":
            object.__setattr__(self, "mlp", "gelu" if self.linear == "linear" or self.linear_scope != "all" else self.linear)
        is_pattern = 0 < len(self.mixer) <= self.n_layer and set(self.mixer) <= MIXERS_BY_LETTER.keys()
        if self.mixer not in MIXERS and not is_pattern:
            raise BadInput(f"--mixer={self.mixer}: choose one of {', '.join(MIXERS)}, or a pattern of the letters "
                           f"{', '.join(MIXERS_BY_LETTER)}, at most --n_layer={self.n_layer} of them")
        if self.linear_scope != "all" and self.linear == "linear":
            raise BadInput(f"--linear_scope={self.linear_scope}: says which layers are of the kind --linear: give one, "
                           f"such as --linear=grkan")
        if self.linear_scope == "gates" and not self.has_gates:
            raise BadInput(f"--linear_scope=gates: --mixer={self.mixer} and --mlp={self.mlp} have no gates: give "
                           f"--mixer=gated_delta or --mlp=swiglu")
        if self.sampled_loops and self.loops == 1:
            raise BadInput("--sampled_loops: draws around --loops: give 2 or more")
        if self.dense_blocks and self.dense_blocks >= self.n_layer:
            raise BadInput(f"--dense_blocks={self.dense_blocks}: the first of --n_layer={self.n_layer} blocks has none "
                           f"before it: give at most {self.n_layer - 1}")
        if self.dense_blocks and self.loops > 1:
            raise BadInput(f"--dense_blocks={self.dense_blocks}: not with --loops={self.loops}, whose blocks have several "
                           f"inputs: leave one out")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise BadInput(f"--n_kv_head={self.n_kv_head}: must divide --n_head={self.n_head}")
        if self.n_kv_head not in (None, self.n_head) and not all(
                issubclass(self.mixer_class(layer), MIXERS["attention"]) for layer in range(self.n_layer)):
            raise BadInput(f"--n_kv_head={self.n_kv_head}: needs attention in every layer, not --mixer={self.mixer}")
        if self.value_embeddings and not any(self.has_value_embedding(layer) for layer in range(self.n_layer)):
            raise BadInput(f"--value_embeddings: with --mixer={self.mixer}, none of the layers that would have one is "
                           f"attention: give another --mixer")
        mixers = {self.mixer_class(layer) for layer in range(self.n_layer)}
        for name, kinds in FLAGS_OF_MIXERS.items():
            if getattr(self, name) and not any(MIXERS[kind] in mixers for kind in kinds):
                raise BadInput(f"--{name}={getattr(self, name)}: --mixer={self.mixer} has no layer of {' or '.join(kinds)}: "
                               f"leave it out, or give --mixer={kinds[0]} or a pattern with {MIXERS[kinds[0]].letter}")
        if self.d_head_size and self.n_embd % self.d_head_size:
            raise BadInput(f"--d_head_size={self.d_head_size}: must divide the width, {self.n_embd}")
        if self.d_head_size and self.d_head_size % 2 and MIXERS["rotary_delta"] in mixers:
            raise BadInput(f"--d_head_size={self.d_head_size}: must be even, because layers of rotary_delta rotate pairs of "
                           f"channels")
        if self.positions == "rotary" and self.block_size * self.head_size > MAX_ROTARY_NUMBERS:
            raise BadInput(f"--block_size={self.block_size}: with --head_size={self.head_size}, rotary embeddings support "
                           f"at most {MAX_ROTARY_NUMBERS // self.head_size:,} tokens")
        if self.head_size % 2:
            raise BadInput(f"--head_size={self.head_size}: must be even, because rotary embeddings rotate pairs of channels")

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head_size

    @property
    def window_size(self) -> int:
        return self.window or max(1, self.block_size // 4)

    @property
    def max_loops(self) -> int:
        """The most loops that a training batch can take."""
        return MAX_LOOPS_RATIO * self.loops if self.sampled_loops else self.loops

    @property
    def has_gates(self) -> bool:
        return self.mlp == "swiglu" or any(issubclass(self.mixer_class(layer), MIXERS["gated_delta"])
                                           for layer in range(self.n_layer))

    def has_value_embedding(self, layer: int) -> bool:
        return (self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2
                and issubclass(self.mixer_class(layer), MIXERS["attention"]))

    def mixer_class(self, layer: int) -> type:
        return MIXERS.get(self.mixer) or MIXERS_BY_LETTER[self.mixer[layer % len(self.mixer)]]

    def describe_shape(self) -> str:
        """"4 layers x 128", or "4 layers x 128 looped 3 times"."""
        loops = f" looped {self.loops} times" + " on average" * self.sampled_loops if self.loops > 1 else ""
        return f"{self.n_layer} layers x {self.n_embd}{loops}"


@dataclass
class BlockCache:
    """The state of one block after the positions seen so far."""
    mixer: RowCache
    shifts: list[ShiftCache]

    def parts(self) -> list[RowCache]:
        return [self.mixer, *self.shifts]


@dataclass
class Cache:
    """The state of a model after the positions seen so far, one text per row, with `max_len` slots per row. All texts end at
    slot `length`; if their lengths differ, the first `left_pad` slots, (B,), of each row are empty. blocks: of each pass
    through a block, so that every loop has keys and values of its own. rewindable: to be set before forward passes that
    `rewind` may undo. groups: of rows that share the first positions. smear, ngrams: what Smear and NgramMemory remember."""
    blocks: list[BlockCache]
    max_len: int
    length: int = 0
    left_pad: Tensor | None = None
    rewindable: bool = False
    groups: RowGroups | None = None
    smear: ShiftCache | None = None
    ngrams: LastToken | None = None

    def parts(self) -> list[RowCache]:
        return [part for block in self.blocks for part in block.parts()] + [
            part for part in (self.smear, self.ngrams) if part is not None]

    def prefixes(self) -> list[RowCache]:
        """What rows share."""
        return [part.prefix for part in self.parts() if getattr(part, "prefix", None) is not None]

    def tensors(self) -> list[Tensor]:
        """All that it holds or has room for."""
        return [tensor for part in (*self.parts(), *self.prefixes()) for tensor in part.tensors().values()]

    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def copy_rows_from(self, rows: list[int], other: "Cache", other_rows: list[int]):
        """Copies rows `other_rows` of another cache, which has no left padding, to rows `rows` of this one, where they end
        at slot `length`."""
        for part, source in zip(self.parts(), other.parts(), strict=True):
            part.copy_rows_from(rows, source, other_rows, self.length, other.length)

    def select_rows(self, rows: list[int]):
        """Row i becomes what row rows[i] was, as beam search needs it; any number of them."""
        device = self.tensors()[0].device
        index = torch.tensor(rows, device=device)
        for part in self.parts():
            part.select_rows(index)
        self.left_pad = None if self.left_pad is None else self.left_pad[index]
        if self.groups is not None:
            old, number = number_rows([self.groups.group_of_row[row] for row in rows])
            if len(old) < self.groups.n_groups:
                for prefix in self.prefixes():
                    prefix.select_rows(torch.tensor(old, device=device))
            self.groups = RowGroups(number, device)

    def fork(self, rows: list[int], max_len: int) -> "Cache":
        """A cache whose row i goes on from row rows[i] of this one, all of whose slots are filled, with `max_len` slots.
        Where many go on from the same row, its keys and values are kept once: on a CPU, where attention reads them so
        faster, and in fp32."""
        tensors, groups, shared = self.tensors(), None, None
        index, (old, number) = torch.tensor(rows, device=tensors[0].device), number_rows(rows)
        if max_len > self.length and len(rows) >= MIN_SHARING * len(old) and all(
                tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.int64) for tensor in tensors):
            groups, shared = RowGroups(number, index.device), torch.tensor(old)
        blocks = []
        for block in self.blocks:
            mixer, *shifts = (part.fork(index, max_len, shared) for part in block.parts())
            blocks.append(BlockCache(mixer, shifts))
        smear, ngrams = (part and part.fork(index, max_len, shared) for part in (self.smear, self.ngrams))
        return Cache(blocks, max_len, self.length, None if self.left_pad is None else self.left_pad[index], groups=groups,
                     smear=smear, ngrams=ngrams)

    def rewind(self, n: int):
        """Forgets the last `n` positions, at most as many as came since the last `rewind`, or since `rewindable` was set.
        That also frees what the cache kept for it."""
        for part in self.parts():
            part.rewind(n)
        self.length -= n

    def detach(self):
        """Cuts what is cached off the graph of the forward pass that made it."""
        for part in self.parts():
            part.detach()


def number_rows(rows: list[int]) -> tuple[list[int], list[int]]:
    """The distinct ones in ascending order, and of each row the place there."""
    distinct = sorted(set(rows))
    number = {row: i for i, row in enumerate(distinct)}
    return distinct, [number[row] for row in rows]


class Block(nn.Module):
    """x + mixer(shift(norm(x))), then x + mlp(shift(norm(x))). With x0_residual, x is first replaced by a learned mix of x
    and the embedding x0; with ngram_rows, a learned multiple of what NgramMemory has looked up is added before; in the last
    dense_blocks, the inputs of the blocks before."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.x0_mix = self.residual_scale = self.x0_scale = None
        if config.x0_residual and config.init == "nanochat":  # which updates both at rates of their own
            depth = layer / max(1, config.n_layer - 1)
            self.residual_scale = nn.Parameter(torch.tensor(1.15 - 0.10 * depth))
            self.x0_scale = nn.Parameter(torch.tensor(0.20 - 0.15 * depth))
        elif config.x0_residual and layer > 0:
            self.x0_mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.ngram_mix = nn.Parameter(torch.tensor(NGRAM_MIX)) if config.ngram_rows else None
        is_dense = layer >= config.n_layer - (config.dense_blocks or 0)
        self.dense = DenseConnections(config, layer) if is_dense else None
        self.mixer_norm, self.mlp_norm = NORMS[config.norm](config), NORMS[config.norm](config)
        self.shifts = nn.ModuleList(TokenShift(config) for _ in range(2)) if config.token_shift else None
        self.mixer = config.mixer_class(layer)(config, layer)
        self.mlp = MLPS[config.mlp](config)

    def init_cache(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> BlockCache:
        return BlockCache(self.mixer.init_cache(batch_size, max_len, device, dtype),
                          [shift.init_cache(batch_size, device, dtype) for shift in self.shifts or ()])

    def forward(self, x: Tensor, x0: Tensor, ngrams: Tensor | None, first_layer_v: Tensor | None,
                metadata: AttentionMetadata, cache: BlockCache | None = None,
                sources: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
        """x, x0, ngrams: (B, T, C). sources: the inputs of the blocks before, if some are dense. Returns the new x,
        (B, T, C), and the mixer's values."""
        if self.dense is not None:
            x = self.dense(x, sources)
        if self.x0_mix is not None:
            x = self.x0_mix[0] * x + self.x0_mix[1] * x0
        elif self.x0_scale is not None:
            x = self.residual_scale * x + self.x0_scale * x0
        if ngrams is not None:
            x = x + self.ngram_mix * ngrams
        mixer_input = self.sublayer_input(0, self.mixer_norm, x, metadata, cache)
        y, v = self.mixer(mixer_input, metadata, cache and cache.mixer, first_layer_v)
        x = x + y
        return x + self.mlp(self.sublayer_input(1, self.mlp_norm, x, metadata, cache)), v

    def parts(self) -> list[nn.Module]:
        """Those that count what they cost."""
        return [part for part in (self.dense, self.mixer, self.mlp) if part is not None]

    def sublayer_input(self, i: int, norm: nn.Module, x: Tensor, metadata: AttentionMetadata,
                       cache: BlockCache | None) -> Tensor:
        """What the mixer (i = 0) or the MLP (i = 1) reads of the residual stream."""
        return norm(x) if self.shifts is None else self.shifts[i](norm(x), metadata, cache and cache.shifts[i])


class GPT(nn.Module):
    """Predicts the next token at every position.

    loops: how often the middle blocks run (recurrent depth; Geiping et al. 2025, arXiv:2502.05171). At first the config's;
    may be set to another number at inference, before a cache is made. Checkpoints do not hold it.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.loops, self.sampled_loops = config, config.loops, config.sampled_loops
        self.gradient_checkpointing = False  # not in the config: it changes how the model trains, not what it computes
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        is_rotary = config.positions == "rotary"
        self.rotary = Rotary(config.head_size, config.block_size, config.rotary_base) if is_rotary else None
        self.smear = Smear(config) if config.smear else None
        self.ngrams = NgramMemory(config) if config.ngram_rows else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.backout_coeff = nn.Parameter(torch.tensor(0.2)) if config.backout else None
        self.norm = NORMS[config.norm](config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """zero: matrices preserve the variance (std 1/√fan_in if linear), but those that write into the residual stream, and
        an untied head, start at zero: at first every block is the identity, and the prediction is uniform (nearly, if tied).
        gpt2: section 2.3 of Radford et al. 2019, as in nanoGPT; each pass through a block counts as a layer. nanochat: as
        zero, but uniform, with a smaller first matrix of the MLP; gates start a bit above their middle."""
        gpt2, nanochat, n_layer = self.config.init == "gpt2", self.config.init == "nanochat", len(self.unrolled_blocks())
        unit_std = {f"{name}.weight": layer.unit_std for name, layer in self.named_modules() if hasattr(layer, "unit_std")}
        for name, weight in self.named_parameters():
            if weight.dim() < 2 or not name.endswith("weight"):
                continue  # biases, norms and coefficients: their layers have set them
            if name == "ngrams.embed.weight":
                nn.init.zeros_(weight)
                continue
            if name.endswith("angles.weight"):
                nn.init.zeros_(weight)
                continue
            if name.endswith(("value_gate.weight", "smear.gate.weight")):
                nn.init.uniform_(weight, 0.0, 0.02) if nanochat else nn.init.zeros_(weight)
                continue
            if name == "embed.weight" and self.config.norm == "rms" and not self.config.tied:
                # its norm removes the scale, so the scale only sets how fast its direction changes
                std = 0.8 if nanochat else 1.0
            elif weight is self.embed.weight:
                std = 0.02 if gpt2 else INITIAL_LOGIT_STD / self.config.n_embd ** 0.5
            elif name.endswith("proj.weight"):
                std = 0.02 / (2 * n_layer) ** 0.5 if gpt2 else 0.0
            elif name == "head.weight":
                std = 0.02 if gpt2 else 0.001 if nanochat else 0.0
            else:
                # a table of value embeddings has the scale of the values that it is added to
                n_in = self.config.n_embd if name.endswith("value_embedding.embed.weight") else weight.size(1)
                std = 0.02 if gpt2 else unit_std.get(name, n_in ** -0.5)
                if nanochat:
                    bound = 3 ** 0.5 * std * (0.4 if name.endswith("fc.weight") else 1.0)
                    nn.init.uniform_(weight, -bound, bound)
                    continue
            nn.init.normal_(weight, std=std)
        for name, bias in self.blocks.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(bias)

    # -- forward pass -------------------------------------------------------------------------------------------------

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, reduction: str = "mean",
                doc_starts: Tensor | None = None, logits_to_keep: int | None = None, loops: int | None = None) -> Tensor:
        """idx: (B, T) int64. Returns logits, (B, T, V) in fp32; with targets, (B, T) int64, the loss in nats/token: a
        scalar, or (B, T) with reduction="none", 0 where the target is IGNORE_INDEX. Autocast sets the precision of the
        logits; softmax and sums are always fp32.

        The loss path never holds (B, T, V): head, softcap and cross-entropy run in chunks, see layers/loss.py.
        cache: from `init_cache`; idx continues the texts in it and is added to it.
        doc_starts: (B, T) bool, True at the first token of each document packed into a row; documents do not see each other.
        logits_to_keep: return the logits of this many last positions only. loops: in place of `self.loops`.
        """
        blocks = self.unrolled_blocks(loops)
        assert reduction in ("mean", "none"), reduction
        assert doc_starts is None or cache is None
        assert cache is None or len(cache.blocks) == len(blocks), "the cache was made for another number of loops"
        metadata, positions = self.attention_metadata(idx, cache, doc_starts)
        x = self.embed(idx)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.positions is not None:
            x = x + self.positions.weight[positions]
        if self.config.norm == "rms":
            x = rms_norm(x)
        if self.smear is not None:
            x = self.smear(x, metadata, cache and cache.smear)
        ngrams = None if self.ngrams is None else self.ngrams(idx, metadata, cache and cache.ngrams)
        x0, first_layer_v, middle, inputs = x, None, None, ()
        for i, block in enumerate(blocks):
            sources, inputs = inputs, (*inputs, x) if self.config.dense_blocks else ()
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, v = run_checkpointed(block, x, x0, ngrams, first_layer_v, metadata, None, sources,
                                        use_reentrant=False, preserve_rng_state=False)
            else:
                x, v = block(x, x0, ngrams, first_layer_v, metadata, cache.blocks[i] if cache is not None else None, sources)
            first_layer_v = v if first_layer_v is None else first_layer_v
            middle = x if i == len(blocks) // 2 else middle
        if self.backout_coeff is not None:
            x = x - self.backout_coeff * middle
        if cache is not None:
            cache.length += idx.size(1)
        x = self.norm(x if logits_to_keep is None else x[:, -logits_to_keep:])
        if targets is None:
            return softcap_logits(x, self.head.weight, self.config.softcap)
        return cross_entropy(x, self.head.weight, targets, self.config.softcap, reduction)

    def unrolled_blocks(self, loops: int | None = None) -> list[Block]:
        """The blocks in the order in which they run; the middle ones repeat. loops: in place of `self.loops`."""
        blocks, n_outer = list(self.blocks), 1 if len(self.blocks) > 2 else 0
        stop = len(blocks) - n_outer
        return blocks[:n_outer] + blocks[n_outer:stop] * (self.loops if loops is None else loops) + blocks[stop:]

    def draw_loops(self) -> int | None:
        """The number of loops of a training batch, for `forward`: None without sampled_loops.

        1 + Poisson(e^τ) with τ ~ N(log(n - 1) - σ²/2, σ), whose mean is n = config.loops (Geiping et al. 2025, section 3.3,
        arXiv:2502.05171), at most config.max_loops. From Python's global generator, which a resumed run restores.
        """
        if not self.sampled_loops:
            return None
        rate, loops = random.lognormvariate(math.log(self.config.loops - 1) - LOOPS_STD**2 / 2, LOOPS_STD), 1
        while (rate := rate - random.expovariate(1.0)) > 0:  # a Poisson number of arrivals
            loops += 1
        return min(loops, self.config.max_loops)

    def eager_forward(self, *args, **kwargs) -> Tensor:
        """`forward` without torch.compile, which would recompile for every new shape and when gradients are turned off."""
        return self.forward(*args, **kwargs)

    def attention_metadata(self, idx: Tensor, cache: Cache | None,
                           doc_starts: Tensor | None) -> tuple[AttentionMetadata, slice | Tensor]:
        """The metadata of idx, (B, T), and the position of each token in its document: a slice, or (B, T) int64."""
        T, start = idx.size(1), 0 if cache is None else cache.length
        positions = slice(start, start + T)
        if doc_starts is not None:
            positions = doc_position_ids(doc_starts)
        elif cache is not None and cache.left_pad is not None:
            positions = torch.arange(start, start + T, device=idx.device) - cache.left_pad[:, None]
        mask = window_mask = None
        if any(block.mixer.needs_mask for block in self.blocks):
            mask = document_causal_mask(doc_starts) if doc_starts is not None else cached_causal_mask(
                T, start, cache and cache.left_pad, idx.device)
        if any(isinstance(block.mixer, MIXERS["sliding"]) for block in self.blocks):
            window_mask = sliding_window_mask(mask, self.config.window_size, T, start, idx.device)
        return AttentionMetadata(start, mask, self.rotary and self.rotary(positions), doc_starts,
                                 cache is not None and cache.rewindable, cache and cache.groups, window_mask,
                                 idx), positions

    # -- decoding -----------------------------------------------------------------------------------------------------

    def init_cache(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache with room for `max_len` positions per row; `forward` fills it in place."""
        device, dtype = self.embed.weight.device, dtype or self.embed.weight.dtype
        return Cache([block.init_cache(batch_size, max_len, device, dtype) for block in self.unrolled_blocks()], max_len,
                     smear=self.smear and self.smear.init_cache(batch_size, device, dtype),
                     ngrams=self.ngrams and self.ngrams.init_cache(batch_size, device))

    def prefill(self, prompts: list[Tensor], max_len: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Cache]:
        """Runs prompts, each (T,) int64 with 1 <= T <= max_len, of any lengths. Returns the logits after the last token of
        each, (B, V), and a cache from which decoding continues for all rows at once."""
        numbers = {}  # of distinct prompts, which are computed once
        number_of_row = [numbers.setdefault(tuple(prompt.tolist()), len(numbers)) for prompt in prompts]
        if len(numbers) == len(prompts):
            return self.prefill_distinct(prompts, max_len, dtype)
        distinct = [prompts[number_of_row.index(i)] for i in range(len(numbers))]
        logits, cache = self.prefill_distinct(distinct, max(map(len, distinct)), dtype)
        return logits[number_of_row], cache.fork(number_of_row, max_len)

    def prefill_distinct(self, prompts: list[Tensor], max_len: int, dtype: torch.dtype | None) -> tuple[Tensor, Cache]:
        """`prefill` without a look at which prompts are equal."""
        by_length = {}
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        longest, cache = max(by_length), self.init_cache(len(prompts), max_len, dtype)
        if len(by_length) == 1:
            return self.eager_forward(torch.stack(prompts), cache=cache, logits_to_keep=1)[:, 0], cache
        cache.length = longest
        cache.left_pad = torch.tensor([longest - len(prompt) for prompt in prompts], device=prompts[0].device)
        logits = [None] * len(prompts)
        for n, rows in by_length.items():  # computes no padding
            part = self.init_cache(len(rows), n, dtype)
            for row, row_logits in zip(rows, self.eager_forward(torch.stack([prompts[row] for row in rows]), cache=part,
                                                                logits_to_keep=1)[:, 0]):
                logits[row] = row_logits
            cache.copy_rows_from(rows, part, list(range(len(rows))))
        return torch.stack(logits), cache

    def cast_matrices(self, dtype: torch.dtype):
        """For inference under autocast to `dtype`, which would otherwise convert every matrix again for every token. All
        other parameters stay in fp32."""
        cast_weights((layer.weight for layer in (self.embed, self.head, *linear_layers(self))), dtype)

    # -- cost ---------------------------------------------------------------------------------------------------------

    def flops_per_token(self, context: int | None = None) -> int:
        """FLOPs of the matrix products for one training token: the forward pass, and twice that for the backward pass. What
        is recomputed to save memory does not count. Every loop counts; with sampled_loops it is the mean over batches.
        context: positions that it attends to, by default those of a whole block."""
        return 3 * 2 * self.head.weight.numel() + 3 * (matrix_flops(self.smear) if self.smear else 0) + sum(
            part.flops_per_token(context or self.config.block_size)
            for block in self.unrolled_blocks() for part in block.parts())

    def elementwise_flops_per_token(self) -> int:
        """FLOPs of one training token in what is not a matrix product and differs between architectures: activations and the
        bases of KAN layers. An addition, multiplication, division or exponential counts 1. What all architectures share,
        such as norms and softmax, does not count."""
        return sum(part.elementwise_flops_per_token(self.config.block_size)
                   for block in self.unrolled_blocks() for part in block.parts())

    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def to_checkpoint(self) -> dict:
        """Config and weights, as a checkpoint holds them."""
        return {"config": asdict(self.config), "model": self.state_dict()}

    @classmethod
    def from_checkpoint(cls, checkpoint: dict) -> "GPT":
        """The inverse of `to_checkpoint`, for checkpoints of format 2 too. Raises BadInput when the weights do not fit the
        config, before any memory is allocated for it."""
        config, weights = GPTConfig(**upgrade_config(checkpoint["config"])), upgrade_weights(checkpoint["model"])
        require_weights(config, {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()})
        model = cls(config)
        model.load_state_dict(weights)
        return model


def meta_model(config: GPTConfig) -> GPT:
    """The model of this config on torch's meta device: shapes without numbers."""
    with torch.device("meta"):
        with suppress(AttributeError, ImportError), compiler_kept_out():
            return GPT(config)
        return GPT(config)  # a torch that asks more of it


@contextmanager
def compiler_kept_out():
    """torch computes shapes by functions that it keeps out of compiled code, and imports the compiler to do so, which takes
    seconds. Until the end a stand-in for it leaves these functions as they are."""
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = torch._dynamo = SimpleNamespace(disable=lambda function, *args, **kwargs: function)
    try:
        yield
    finally:
        del sys.modules[name], torch._dynamo


def require_weights(config: GPTConfig, found: Mapping[str, tuple[tuple[int, ...], torch.dtype]]):
    """Raises BadInput unless `found`, name -> shape and dtype, are the parameters of a model of this config."""
    if config.vocab_size is None:
        raise BadInput("its config has no vocab_size")
    if config.n_layer > len(found):  # or it would take long to find out
        raise BadInput(f"{len(found)} weights are too few for the {config.n_layer:,} layers of its config")
    expected = meta_model(config).state_dict()
    for name in sorted(expected.keys() ^ found.keys()):
        raise BadInput(f"its config calls for {name}, which is not among the weights" if name in expected else
                       f"its config does not call for {name}, which is among the weights")
    for name, (shape, dtype) in found.items():
        if shape != tuple(expected[name].shape):
            raise BadInput(f"{name} is {shape}, its config calls for {tuple(expected[name].shape)}: use another checkpoint")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise BadInput(f"{name} is of {dtype}: weights must be floating-point numbers of at least 16 bits")


# -- names of format 2 ------------------------------------------------------------------------------------------------

# Checkpoints of format 2, and folders that were exported then, call the flag x0_residual `embed_shortcut`, and the
# parameters x0_mix and shift_coeff `shortcut` and `share`. Nothing else of a model differs.

def upgrade_config(config: dict) -> dict:
    """The fields of GPTConfig by their present names; a config of the present format is returned unchanged."""
    return {"x0_residual" if name == "embed_shortcut" else name: value for name, value in config.items()}


def upgrade_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict by its present names, in the same order; one of the present format is returned unchanged."""
    return {upgrade_name(name): value for name, value in weights.items()}


def upgrade_name(name: str) -> str:
    """The present name of a parameter."""
    return re.sub(r"\.shortcut$", ".x0_mix", re.sub(r"(shifts\.\d)\.share$", r"\1.shift_coeff", name))
