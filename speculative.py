"""Lossless speculative decoding: cheap guesses at the next tokens, all checked in one forward pass of the model.

    for new in speculate(model, prompt, 200, SamplingConfig(), generator, PromptLookup()):
        text += new

A forward pass over a few positions costs little more than one over a single position where reading the weights, or starting
operations, is what takes the time. Source: Leviathan et al. 2023, arXiv:2211.17192.
"""
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model import GPT, Cache
from runtime.config import BadInput, check_flags, flag, refuse_given
from runtime.device import Machine
from sampling import (
    SamplingConfig,
    cache_dtype,
    draw,
    filter_tokens,
    load_model,
    penalize,
    sample,
    stream_texts,
    token_mask,
)
from tokenizer import Tokenizer

FIRST_DRAFT, SHORTEST_DRAFT = 4, 2  # tokens of the first draft, and of one after wrong ones, at most
# What prompt look-up looks for. Single tokens would give more drafts, most of them wrong, which does not pay where a pass
# over several positions takes twice as long as one over a single position (large models in fp32 on a CPU).
NGRAMS = range(2, 5)


class Draft(NamedTuple):
    """A guess at the next k tokens. probs: (k, V), the distributions they were drawn from; None: they were not drawn."""
    ids: list[int]
    probs: Tensor | None = None


class Drafter(Protocol):
    def propose(self, text: list[int], n: int, sampling: SamplingConfig, generator: torch.Generator | None) -> Draft:
        """At most n tokens to come after `text`, which begins with that of the last call. sampling, generator: those of the
        decoding, for drafts that are drawn."""


# -- decoding ---------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def speculate(model: GPT, prompt: Tensor, max_new_tokens: int, sampling: SamplingConfig, generator: torch.Generator | None,
              drafter: Drafter, max_draft: int = 16) -> Iterator[list[int]]:
    """Yields the `max_new_tokens` tokens after `prompt`, (T,) int64, in lists, one for each forward pass of the model.
    max_draft: tokens in a draft, at most.

    They are the tokens that `generate` yields for one row and this generator, up to rounding: a draft changes how many come
    from a forward pass, not which. Drafts that are drawn themselves consume the generator in another way: then the tokens
    have the same distribution. A draft's length doubles after one that was accepted as a whole, and else is halved.
    """
    block_size, text = model.config.block_size, prompt.tolist()
    max_len = min(block_size, len(text) + max_new_tokens - 1)

    def prefill(n: int) -> tuple[Tensor, Cache]:
        logits, cache = model.prefill([torch.tensor(text[-n:], device=prompt.device)], max_len, cache_dtype(model))
        cache.rewindable = True
        return logits, cache

    logits, cache = prefill(block_size)
    seen = token_mask([prompt], model.config.vocab_size) if sampling.repetition_penalty != 1 else None
    draft, length, n_left = Draft([]), FIRST_DRAFT, max_new_tokens
    while True:
        new = verify(logits, draft, sampling, generator, seen)
        text += new
        n_left -= len(new)
        yield new
        if not n_left:
            return
        n_wrong = len(draft.ids) + 1 - len(new)
        cache.rewind(n_wrong)
        if draft.ids:
            length = max(SHORTEST_DRAFT, length // 2) if n_wrong else 2 * length
        if cache.length == max_len:  # rebuilt as in `generate`
            (logits, cache), draft = prefill(max(1, block_size // 2)), Draft([])
            continue
        length = min(length, max_draft)
        draft = drafter.propose(text, min(length, n_left - 1, max_len - cache.length - 1), sampling, generator)
        logits = model.eager_forward(torch.tensor([[new[-1], *draft.ids]], device=prompt.device), cache=cache)[0]


def verify(logits: Tensor, draft: Draft, sampling: SamplingConfig, generator: torch.Generator | None,
           seen: Tensor | None = None) -> list[int]:
    """The next tokens: as many of the draft's k as are accepted, and one more. logits: (k + 1, V), before the draft and
    after each of its tokens. seen: (1, V) bool, what the repetition penalty applies to, or None; takes in the new tokens.

    A draft that was not drawn is accepted as far as it agrees with the tokens that plain sampling draws. That is the method
    of the source, section 2.3, for a draft with probability 1.
    """
    new = []
    for i, row in enumerate(logits.split(1)):
        if i < len(draft.ids) and draft.probs is not None:
            token = accept_or_redraw(token_probs(row, sampling, seen)[0], draft.probs[i], draft.ids[i], generator)
        else:
            token = int(sample(row, sampling, generator, seen))
        new.append(token)
        if seen is not None:
            seen[0, token] = True
        if draft.ids[i:i + 1] != [token]:
            break
    return new


def accept_or_redraw(p: Tensor, q: Tensor, token: int, generator: torch.Generator | None) -> int:
    """A draw from p, (V,), with the help of `token`, a draw from q, (V,): that token with probability min(1, p/q), else one
    from what p has more than q."""
    if torch.rand((), device=p.device, generator=generator) * q[token] < p[token]:
        return token
    rest = (p - q).clamp(min=0)
    return int(draw((rest if rest.any() else p)[None], generator))  # nothing is left where p and q differ by rounding alone


def token_probs(logits: Tensor, sampling: SamplingConfig, seen: Tensor | None) -> Tensor:
    """(B, V) logits -> (B, V), the probabilities of the tokens that `sample` draws."""
    weights, ids = filter_tokens(penalize(logits, sampling, seen), sampling)
    probs = weights if ids is None else torch.zeros_like(logits).scatter_(1, ids, weights)
    return probs / probs.sum(dim=-1, keepdim=True)


# -- drafts -----------------------------------------------------------------------------------------------------------

class PromptLookup:
    """Drafts what followed the last n tokens where they occurred last, for the largest n in NGRAMS for which they did.
    Source: Saxena 2023, prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding."""

    def __init__(self):
        self.n_indexed, self.ends = 0, {}  # the position after the last occurrence of each n-gram

    def propose(self, text: list[int], n: int, sampling: SamplingConfig, generator: torch.Generator | None) -> Draft:
        self.index(text)
        found = (self.ends.get(tuple(text[-size:])) for size in reversed(NGRAMS))
        start = next((end for end in found if end is not None), None)
        if start is None:
            return Draft([])
        period = len(text) - start  # where the draft would run into the end of the text, the text repeats itself
        return Draft([text[start + i % period] for i in range(n)])

    def index(self, text: list[int]):
        """Takes in all n-grams but those at the end of the text, which nothing follows yet."""
        for end in range(self.n_indexed + 1, len(text)):
            for size in NGRAMS:
                self.ends[tuple(text[max(0, end - size):end])] = end
        self.n_indexed = len(text) - 1


class DraftModel:
    """Drafts with another model of the same vocabulary, which decodes as the large one would."""

    def __init__(self, model: GPT):
        self.model, self.cache = model, None
        self.n_read, self.drafted = 0, []  # what the cache holds: this much of the text, and then tokens of the last draft

    @torch.inference_mode()
    def propose(self, text: list[int], n: int, sampling: SamplingConfig, generator: torch.Generator | None) -> Draft:
        if n < 1:
            return Draft([])
        logits, n = self.read(text, n)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = token_mask([torch.tensor(text, device=logits.device)], logits.size(1))
        ids, probs = [], []
        for i in range(n):
            if sampling.is_greedy:
                token = sample(logits, sampling, generator, seen)
            else:
                probs.append(token_probs(logits, sampling, seen))
                token = draw(probs[-1], generator)[:, 0]
            ids.append(int(token))
            if seen is not None:
                seen[0, token] = True
            if i < n - 1:
                logits = self.model.eager_forward(token[:, None], cache=self.cache)[:, 0]
        self.n_read, self.drafted = len(text), ids[:-1]
        return Draft(ids, torch.cat(probs) if probs else None)

    def read(self, text: list[int], n: int) -> tuple[Tensor, int]:
        """Brings the cache to the end of `text`. Returns the logits there, (1, V), and how many of n tokens fit into the
        context after it."""
        block_size, device, new = self.model.config.block_size, self.model.embed.weight.device, text[self.n_read:]
        n_right = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.drafted, new[:-1]))])
        if self.cache is not None:
            self.cache.rewind(len(self.drafted) - n_right)
            if self.cache.length + len(new) - n_right + n - 1 <= block_size:
                new = torch.tensor([new[n_right:]], device=device)
                return self.model.eager_forward(new, cache=self.cache, logits_to_keep=1)[:, 0], n
        context = text if len(text) + n - 1 <= block_size else text[-max(1, block_size // 2):]
        logits, self.cache = self.model.prefill([torch.tensor(context, device=device)], block_size, cache_dtype(self.model))
        self.cache.rewindable = True
        return logits, min(n, block_size - len(context) + 1)


# -- for the commands -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SpeculationConfig:
    """Speculative decoding."""
    speculate: str = flag("none", "for speed, guess several tokens and check them in one forward pass. lookup: guess what "
                                  "followed where the last tokens occurred before, which does not change the text; draft: "
                                  "let another model guess, which changes sampled texts, but not how likely each is",
                          choices=("none", "lookup", "draft"))
    draft_path: Path = flag(None, "with --speculate=draft, the model that guesses: a smaller one with the same tokenizer")
    draft_tokens: int = flag(16, "guessed tokens in a forward pass, at most; fewer after wrong guesses", at_least=1,
                             at_most=1000)

    def __post_init__(self):
        check_flags(self)
        if self.speculate == "none":
            refuse_given(self, {"draft_tokens"}, "is only used to speculate: add --speculate=lookup")
        if self.speculate != "draft":
            refuse_given(self, {"draft_path"}, "is only used with --speculate=draft")
        elif self.draft_path is None:
            raise BadInput("--speculate=draft: needs --draft_path, a smaller model with the same tokenizer")


@dataclass
class Speculation:
    """`generate_texts` for one prompt, with drafts. tokens, passes: how many tokens have come from how many forward passes
    of the model."""
    model: GPT
    drafter: Drafter
    max_draft: int
    tokens: int = 0
    passes: int = 0

    def generate_text(self, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int, sampling: SamplingConfig,
                      stop: Sequence[str] = (), seed: int = 0) -> Iterator[tuple[int, str]]:
        device = self.model.embed.weight.device
        groups = speculate(self.model, torch.tensor(prompt, device=device), max_new_tokens, sampling,
                           torch.Generator(device).manual_seed(seed), self.drafter, self.max_draft)
        return stream_texts(tokenizer, ([token] for group in groups for token in self.count(group)), 1, stop)

    def count(self, new: list[int]) -> list[int]:
        self.tokens, self.passes = self.tokens + len(new), self.passes + 1
        return new


def open_speculation(config: SpeculationConfig, model: GPT, tokenizer: Tokenizer,
                     machine: Machine) -> Speculation:
    """For `model` and its tokenizer. Raises BadInput when the draft model does not fit them."""
    if config.speculate == "lookup":
        return Speculation(model, PromptLookup(), config.draft_tokens)
    draft_model, its_tokenizer = load_model(config.draft_path, machine)
    if its_tokenizer.fingerprint() != tokenizer.fingerprint() or draft_model.config.vocab_size != model.config.vocab_size:
        raise BadInput(f"--draft_path={config.draft_path}: has another tokenizer ({its_tokenizer.fingerprint()}, "
                       f"{draft_model.config.vocab_size:,} ids) than the model ({tokenizer.fingerprint()}, "
                       f"{model.config.vocab_size:,} ids): train it on the same data folder")
    return Speculation(model, DraftModel(draft_model), config.draft_tokens)
