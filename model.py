"""The network: GPTConfig, GPT, its loss, its cache and its FLOPs.

A decoder-only transformer: token embedding, blocks of mixer and MLP on a residual stream, a linear head. Which mixer,
MLP and norm is a choice by name from layers/.

    model = GPT(GPTConfig(n_layer=4, n_head=4, head_size=32, block_size=128, vocab_size=4096))
    loss = model(idx, targets)
"""
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers import LINEARS, MIXERS, MLPS, NORMS
from layers.attention import Rotary
from layers.attention_metadata import AttentionMetadata, cached_causal_mask, doc_position_ids, document_causal_mask
from layers.linear import linear_layers
from layers.loss import cross_entropy, softcap_logits
from layers.norm import rms_norm
from layers.shift import ShiftCache, TokenShift
from runtime.config import BadInput, check_flags, flag

LETTERS = {mixer.letter: mixer for mixer in MIXERS.values()}
EMBED_LOGITS = 0.1  # standard deviation of a tied model's first logits: nearly a uniform guess


@dataclass(frozen=True)
class GPTConfig:
    """The model."""
    n_layer: int = flag(12, "blocks", at_least=1, at_most=10_000)
    n_head: int = flag(12, "attention heads; the width is n_head * head_size", at_least=1, at_most=10_000)
    head_size: int = flag(64, "channels of a head, an even number", at_least=2, at_most=10_000)
    n_kv_head: int = flag(None, "heads of keys and values, which groups of attention heads share (default: as many)",
                          at_least=1, at_most=10_000)
    block_size: int = flag(1024, "tokens of context", at_least=1, at_most=10_000_000)
    vocab_size: int = flag(None, "tokens the vocabulary must have (default: what the data's tokenizer has)", at_least=1,
                           scope="run")
    mlp: str = flag("auto", "feed-forward layer; auto: gelu, or the kind of --linear if that is not linear",
                    choices=("auto", *MLPS))
    n_hidden: int = flag(None, "width of the hidden layer in it (default: such that it has about 8 * width² parameters)",
                         at_least=1, at_most=10_000_000)
    mixer: str = flag("attention", "layer that mixes positions: attention, gated_delta, or a pattern of their letters A and "
                                   "D, a letter a\nlayer, which is repeated: DDDA")
    linear: str = flag("linear", "every linear layer in the blocks, those of attention too", choices=tuple(LINEARS))
    norm: str = flag("rms", "normalisation: without parameters and of the embedding too, Llama's, or GPT-2's",
                     choices=tuple(NORMS))
    norm_eps: float = flag(None, "added to the mean square there (default: 1e-5; with --norm=rms 1e-7)", above=0, at_most=1)
    positions: str = flag("rotary", "how attention knows the order", choices=("rotary", "learned"))
    rotary_base: float = flag(10_000.0, "of the angles, of which the slowest turns once in about 6 times so many tokens",
                              above=1)
    qk_norm: bool = flag(True, "normalise queries and keys")
    value_residual: bool = flag(True, "mix the first layer's values into the later layers'")
    x0_residual: bool = flag(True, "mix the embedding into the input of each block")
    token_shift: bool = flag(True, "add a learned share of the token before to the input of mixers and feed-forward layers")
    softcap: float = flag(15.0, "keeps logits within this distance of 0; 0 does not", at_least=0)
    tied: bool = flag(True, "embedding and head are one matrix")
    bias: bool = flag(False, "of linear layers and LayerNorm")
    init: str = flag("zero", "of matrices that write into the residual stream: zero, or GPT-2's for all weights",
                     choices=("zero", "gpt2"))

    def __post_init__(self):
        check_flags(self)
        if self.mlp == "auto":
            object.__setattr__(self, "mlp", "gelu" if self.linear == "linear" else self.linear)
        if self.mixer not in MIXERS and not (0 < len(self.mixer) <= self.n_layer and set(self.mixer) <= LETTERS.keys()):
            raise BadInput(f"--mixer={self.mixer}: give one of {', '.join(MIXERS)}, or a pattern of the letters "
                           f"{', '.join(LETTERS)}, of at most the {self.n_layer} of --n_layer")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise BadInput(f"--n_kv_head={self.n_kv_head}: must divide --n_head={self.n_head}")
        if self.n_kv_head not in (None, self.n_head) and any(
                self.mixer_class(layer) is not MIXERS["attention"] for layer in range(self.n_layer)):
            raise BadInput(f"--n_kv_head={self.n_kv_head}: only attention has such heads, not --mixer={self.mixer}")
        if self.head_size % 2:
            raise BadInput(f"--head_size={self.head_size}: must be even, rotary positions turn pairs of channels")

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head_size

    def mixer_class(self, layer: int) -> type:
        return MIXERS.get(self.mixer) or LETTERS[self.mixer[layer % len(self.mixer)]]


@dataclass
class BlockCache:
    """What a block keeps of the positions it has seen."""
    mixer: object
    shifts: list[ShiftCache]

    def copy_rows_from(self, rows: list[int], other: "BlockCache", other_rows: list[int], stop: int, n: int):
        for part, source in zip((self.mixer, *self.shifts), (other.mixer, *other.shifts)):
            part.copy_rows_from(rows, source, other_rows, stop, n)


@dataclass
class Cache:
    """What a model keeps of the texts it has seen, one a row, with room for `max_len` positions. They all end at slot
    `length`; where they differ in length, a row has left its first `skipped` slots, (B,), empty."""
    blocks: list[BlockCache]
    max_len: int
    length: int = 0
    left_pad: Tensor | None = None

    def copy_rows_from(self, rows: list[int], other: "Cache", other_rows: list[int]):
        """The texts of the rows `others` of another cache, all of one length, become those of these rows."""
        for block, source in zip(self.blocks, other.blocks):
            block.copy_rows_from(rows, source, other_rows, self.length, other.length)


class Block(nn.Module):
    """x + mixer(shift(norm(x))), then x + mlp(shift(norm(x))), where a shift adds a share of the token before; with the
    shortcut, x is at first a learned mix of x and the embedding."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.x0_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_residual and layer > 0 else None
        self.mixer_norm, self.mlp_norm = NORMS[config.norm](config), NORMS[config.norm](config)
        self.shifts = nn.ModuleList(TokenShift(config) for _ in range(2)) if config.token_shift else None
        self.mixer = config.mixer_class(layer)(config, layer)
        self.mlp = MLPS[config.mlp](config)

    def init_cache(self, batch_size: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> BlockCache:
        return BlockCache(self.mixer.init_cache(batch_size, n_tokens, device, dtype),
                          [shift.init_cache(batch_size, device, dtype) for shift in self.shifts or ()])

    def forward(self, x: Tensor, embedded: Tensor, first_layer_v: Tensor | None, metadata: AttentionMetadata,
                cache: BlockCache | None = None) -> tuple[Tensor, Tensor]:
        """x, embedded: (B, T, C). Returns the new x, and the mixer's value."""
        if self.x0_mix is not None:
            x = self.x0_mix[0] * x + self.x0_mix[1] * embedded
        mixer_input = self.sublayer_input(0, self.mixer_norm, x, metadata, cache)
        y, value = self.mixer(mixer_input, metadata, cache and cache.mixer, first_layer_v)
        x = x + y
        return x + self.mlp(self.sublayer_input(1, self.mlp_norm, x, metadata, cache)), value

    def sublayer_input(self, i: int, norm: nn.Module, x: Tensor, metadata: AttentionMetadata,
                       cache: BlockCache | None) -> Tensor:
        """What the block's i-th layer sees of the residual stream."""
        return norm(x) if self.shifts is None else self.shifts[i](norm(x), metadata, cache and cache.shifts[i])


class GPT(nn.Module):
    """Predicts the next token at every position."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # how it is trained, not what it is: no part of the config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        is_rotary = config.positions == "rotary"
        self.rotary = Rotary(config.head_size, config.block_size, config.rotary_base) if is_rotary else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = NORMS[config.norm](config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """zero: matrices that keep the variance (1/√fan_in, if linear), but what writes into the residual stream, and a
        head of its own, starts at zero: at first every block is the identity and (nearly, if tied) every token equally
        likely. gpt2: as in section 2.3 of Radford et al. 2019, and nanoGPT."""
        gpt2, n_layer = self.config.init == "gpt2", self.config.n_layer
        unit_std = {f"{name}.weight": layer.unit_std for name, layer in self.named_modules() if hasattr(layer, "unit_std")}
        for name, weight in self.named_parameters():
            if weight.dim() < 2 or not name.endswith("weight"):
                continue  # biases, norms and coefficients: their layers have set them
            if name == "embed.weight" and self.config.norm == "rms" and not self.config.tied:
                std = 1.0  # its norm takes the scale away, so the scale only sets how fast it turns
            elif weight is self.embed.weight:
                std = 0.02 if gpt2 else EMBED_LOGITS / self.config.n_embd ** 0.5
            elif name.endswith("proj.weight"):
                std = 0.02 / (2 * n_layer) ** 0.5 if gpt2 else 0.0
            elif name == "head.weight":
                std = 0.02 if gpt2 else 0.0
            else:
                std = 0.02 if gpt2 else unit_std.get(name, weight.size(1) ** -0.5)
            nn.init.normal_(weight, std=std)
        for name, bias in self.blocks.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, reduction: str = "mean",
                doc_starts: Tensor | None = None, logits_to_keep: int | None = None) -> Tensor:
        """idx: (B, T) int64. Returns logits (B, T, V) in fp32; with targets (B, T), the loss in nats/token: a scalar,
        or (B, T) with reduction="none", 0 where the target is IGNORE_INDEX. Under autocast the logits have its
        precision; softmax and sums are fp32 all the same.

        The loss path never holds (B, T, V): head, softcap and cross-entropy run in chunks, see layers/loss.py.
        cache: what `init_cache` made; idx then continues what it holds, and it takes idx in.
        doc_starts: (B, T) bool, where a text doc_starts, if rows hold several: none sees another, whatever the mixer.
        logits_to_keep: logits of so many last positions alone.
        """
        assert reduction in ("mean", "none"), reduction
        assert doc_starts is None or cache is None
        metadata, positions = self.attention_metadata(idx, cache, doc_starts)
        x = self.embed(idx)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.positions is not None:
            x = x + self.positions.weight[positions]
        if self.config.norm == "rms":
            x = rms_norm(x)
        embedded, first_layer_v = x, None
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, value = checkpoint(block, x, embedded, first_layer_v, metadata, use_reentrant=False,
                                      preserve_rng_state=False)
            else:
                x, value = block(x, embedded, first_layer_v, metadata, cache.blocks[i] if cache is not None else None)
            first_layer_v = value if first_layer_v is None else first_layer_v
        if cache is not None:
            cache.length += idx.size(1)
        x = self.norm(x if logits_to_keep is None else x[:, -logits_to_keep:])
        if targets is None:
            return softcap_logits(x, self.head.weight, self.config.softcap)
        return cross_entropy(x, self.head.weight, targets, self.config.softcap, reduction)

    def eager_forward(self, *args, **kwargs) -> Tensor:
        """`forward` without the compiled graph, which would be compiled again for every new shape and without gradients."""
        return self.forward(*args, **kwargs)

    def attention_metadata(self, idx: Tensor, cache: Cache | None,
                           doc_starts: Tensor | None) -> tuple[AttentionMetadata, slice | Tensor]:
        """Where `idx` stands, and the position of each token in its text, a slice or (B, T)."""
        T, start = idx.size(1), 0 if cache is None else cache.length
        positions = slice(start, start + T)
        if doc_starts is not None:
            positions = doc_position_ids(doc_starts)
        elif cache is not None and cache.left_pad is not None:
            positions = torch.arange(start, start + T, device=idx.device) - cache.left_pad[:, None]
        mask = None
        if any(block.mixer.letter == "A" for block in self.blocks):
            mask = document_causal_mask(doc_starts) if doc_starts is not None else cached_causal_mask(
                T, start, cache and cache.left_pad, idx.device)
        return AttentionMetadata(start, mask, self.rotary and self.rotary(positions), doc_starts), positions

    def init_cache(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> Cache:
        """With room for `max_len` positions in each row; `forward` fills it in place."""
        weight = self.embed.weight
        return Cache([block.init_cache(batch_size, max_len, weight.device, dtype or weight.dtype)
                      for block in self.blocks], max_len)

    def prefill(self, texts: list[Tensor], max_len: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Cache]:
        """Takes in texts, each (T,) int64 and T >= 1, of any lengths up to max_len. Returns the logits after the last token
        of each, (B, V), and the cache, which further tokens of all rows continue."""
        by_length = {}  # n -> the different texts of n tokens, each with its rows
        for row, text in enumerate(texts):
            by_length.setdefault(len(text), {}).setdefault(tuple(text.tolist()), []).append(row)
        longest, first = max(by_length), next(iter(by_length.values()))
        if len(by_length) == 1 and len(first) == len(texts):
            cache = self.init_cache(len(texts), max_len, dtype)
            return self.eager_forward(torch.stack(texts), cache=cache, logits_to_keep=1)[:, 0], cache
        cache = self.init_cache(len(texts), max_len, dtype)
        cache.length = longest
        if len(by_length) > 1:
            cache.left_pad = torch.tensor([longest - len(text) for text in texts], device=texts[0].device)
        logits = [None] * len(texts)
        for n, same in by_length.items():  # no padding is computed, and no text twice
            part = self.init_cache(len(same), n, dtype)
            distinct = torch.stack([texts[rows[0]] for rows in same.values()])
            found = self.eager_forward(distinct, cache=part, logits_to_keep=1)[:, 0]
            pairs = [(row, i) for i, rows in enumerate(same.values()) for row in rows]
            for row, i in pairs:
                logits[row] = found[i]
            cache.copy_rows_from([row for row, _ in pairs], part, [i for _, i in pairs])
        return torch.stack(logits), cache

    def cast_matrices(self, dtype: torch.dtype):
        """For inference under autocast to `dtype`, which would convert every matrix again at every token. The rest stays."""
        for layer in (self.embed, self.head, *linear_layers(self)):
            layer.weight.requires_grad_(False)
            layer.weight.data = layer.weight.data.to(dtype)

    def flops_per_token(self) -> int:
        """Floating-point operations of the matrix products of one training token: forward, and twice that backward.
        What is computed a second time to save memory does not count."""
        return 3 * 2 * self.head.weight.numel() + sum(
            layer.flops_per_token(self.config.block_size) for block in self.blocks for layer in (block.mixer, block.mlp))

    def elementwise_flops_per_token(self) -> int:
        """The same of what is no matrix product and differs between architectures: activations and the bases of KAN layers,
        where an addition, a multiplication, a division or an exponential counts one. Norms, softmax and what else all share
        is left out."""
        return sum(layer.elementwise_flops_per_token(self.config.block_size)
                   for block in self.blocks for layer in (block.mixer, block.mlp))

    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def to_checkpoint(self) -> dict:
        """Shape and weights, as a checkpoint holds them."""
        return {"config": asdict(self.config), "model": self.state_dict()}

    @classmethod
    def from_checkpoint(cls, blob: dict) -> "GPT":
        """The inverse of `to_checkpoint`."""
        model = cls(GPTConfig(**blob["config"]))
        try:
            model.load_state_dict(blob["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise BadInput(f"the checkpoint's weights are not those of its shape {blob['config']} ({reason})") from None
        return model
