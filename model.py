"""The network: GPTConfig, GPT, its loss, its cache and its FLOPs.

A decoder-only transformer: token embedding, blocks of mixer and MLP on a residual stream, a linear head. Which mixer
and MLP is a choice by name from layers/.

    model = GPT(GPTConfig(n_layer=4, n_head=4, head_size=32, block_size=128, vocab_size=4096))
    loss = model(idx, targets)
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers import MIXERS, MLPS
from layers.norm import rms_norm
from runtime.flags import BadInput, check_flags, flag

LOSS_CHUNK = 1024  # tokens whose logits exist at once: 128 MiB in fp32 at 32k ids, and too few to slow a GPU


@dataclass(frozen=True)
class GPTConfig:
    """The model."""
    n_layer: int = flag(12, "blocks", at_least=1, at_most=10_000)
    n_head: int = flag(12, "attention heads; the width is n_head * head_size", at_least=1, at_most=10_000)
    head_size: int = flag(64, "channels of a head, an even number", at_least=2, at_most=10_000)
    block_size: int = flag(1024, "tokens of context", at_least=1, at_most=10_000_000)
    vocab_size: int = flag(None, "tokens the vocabulary must have (default: what the data's tokenizer has)", at_least=1)
    mlp: str = flag("relu2", "feed-forward layer", choices=tuple(MLPS))
    mixer: str = flag("attention", "layer that mixes positions", choices=tuple(MIXERS))

    def __post_init__(self):
        check_flags(self)
        if self.head_size % 2:
            raise BadInput(f"--head_size={self.head_size}: must be even, rotary positions turn pairs of channels")

    @property
    def n_embd(self) -> int:
        return self.n_head * self.head_size


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.mixer = MIXERS[config.mixer](config.n_embd, config.n_head, config.head_size, config.block_size)
        self.mlp = MLPS[config.mlp](config.n_embd)

    def forward(self, x: Tensor, cache=None) -> Tensor:
        x = x + self.mixer(rms_norm(x), cache)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """Predicts the next token at every position."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Unit-variance embedding and 1/√fan_in matrices; what writes into the residual stream, and the head, starts at
        zero: at first every block is the identity and every token equally likely."""
        nn.init.normal_(self.embed.weight)
        for name, weight in self.blocks.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=weight.size(1) ** -0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: list | None = None,
                reduction: str = "mean") -> Tensor:
        """idx: (B, T) int64. Returns logits (B, T, V) in fp32; with targets (B, T), the loss in nats/token: a scalar,
        or (B, T) with reduction="none", 0 where the target is IGNORE_INDEX. Under autocast the logits have its
        precision; softmax and sums are fp32 all the same.

        The loss path never holds (B, T, V): head and cross-entropy run in chunks and are recomputed in backward.
        cache: what `init_cache` made; idx then continues what it holds, and it takes idx in.
        """
        assert reduction in ("mean", "none"), reduction
        x = rms_norm(self.embed(idx))
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache is not None else None)
        x = rms_norm(x)
        if targets is None:
            return self.head(x).float()
        return self.chunked_loss(x, targets, reduction)

    def chunked_loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """x: (B, T, C), targets: (B, T) -> see `forward`. At 32k ids the logits of a batch of 8 x 1024 in fp32 would be
        1 GiB, and as much again for their gradient; here LOSS_CHUNK of 8,192 rows exist at a time."""
        def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.head(x).float(), targets, reduction="none")  # (chunk,)

        losses = []
        for x_chunk, target_chunk in zip(x.flatten(0, 1).split(LOSS_CHUNK), targets.flatten().split(LOSS_CHUNK)):
            if torch.is_grad_enabled():
                losses.append(checkpoint(chunk_loss, x_chunk, target_chunk, use_reentrant=False,
                                         preserve_rng_state=False))
            else:
                losses.append(chunk_loss(x_chunk, target_chunk))
        losses = torch.cat(losses)
        if reduction == "none":
            return losses.view_as(targets)
        return losses.sum() / (targets >= 0).sum().clamp(min=1)

    def init_cache(self, batch_size: int, n_tokens: int, dtype: torch.dtype | None = None) -> list:
        """One entry per block, made by its mixer, with room for `n_tokens` positions; `forward` fills it in place."""
        weight = self.embed.weight
        return [block.mixer.init_cache(batch_size, n_tokens, weight.device, dtype or weight.dtype)
                for block in self.blocks]

    def flops_per_token(self) -> int:
        """Floating-point operations of the matrix products of one training token: forward, and twice that backward.
        What is computed a second time to save memory does not count."""
        forward = sum(layer.flops_per_token(self.config.block_size)
                      for block in self.blocks for layer in (block.mixer, block.mlp))
        return 3 * (forward + 2 * self.head.weight.numel())

    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def to_blob(self) -> dict:
        """Shape and weights, as a checkpoint holds them."""
        return {"config": asdict(self.config), "model": self.state_dict()}

    @classmethod
    def from_blob(cls, blob: dict) -> "GPT":
        """The inverse of `to_blob`."""
        model = cls(GPTConfig(**blob["config"]))
        try:
            model.load_state_dict(blob["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise BadInput(f"the checkpoint's weights are not those of its shape {blob['config']} ({reason})") from None
        return model
