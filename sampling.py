"""Sampling and decoding with a cache: prompts of token ids in, tokens or text out.

    for text in generate_text(model, tokenizer, "The history of", max_new_tokens=50, sampling=SamplingConfig()):
        print(text, end="")
    logprobs = token_logprobs(model, torch.tensor([ids]))

`generate.py` and `chat.py` are the commands.
"""
import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import GPT, Cache
from runtime.checkpoint import explain_damage, load_checkpoint
from runtime.config import BadInput, check_flags, flag
from runtime.device import DTYPES, Machine
from tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling."""
    temperature: float = flag(0.8, "below 1 favours likely tokens; 0 always takes the likeliest", at_least=0, at_most=100)
    top_k: int = flag(50, "sample from this many of the likeliest tokens; 0 for all", at_least=0)
    top_p: float = flag(1.0, "sample from the smallest set of likeliest tokens with at least this total probability",
                        above=0, at_most=1)
    min_p: float = flag(0.0, "sample from tokens with at least this fraction of the likeliest token's probability",
                        at_least=0, at_most=1)
    repetition_penalty: float = flag(1.0, "above 1 makes tokens that have already occurred less likely", above=0,
                                     at_most=100)
    __post_init__ = check_flags

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken. Dividing by a smaller temperature would overflow."""
        return self.temperature < 1e-6


PROBABILITY_UNIT = 2**40
GREEDY = SamplingConfig(temperature=0.0)
LOOPS_HELP = "how often the middle blocks run, more for deeper thought, see train.py (default: as often as in training)"


# -- tokens -----------------------------------------------------------------------------------------------------------

class Sampled(NamedTuple):
    """The next token of each row, and two log-probabilities of it in nats: in the distribution that it was drawn from, after
    temperature and filters, and by the model alone (temperature 1, no filters)."""
    ids: Tensor             # (B,) int64
    logprobs: Tensor        # (B,) fp32
    model_logprobs: Tensor  # (B,) fp32


@torch.inference_mode()
def generate(model: GPT, prompts: Sequence[Tensor], max_new_tokens: int, sampling: SamplingConfig = SamplingConfig(),
             generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Yields the next token of each row, (B,) int64, `max_new_tokens` times. prompts: (T,) int64 each, T >= 1, of any
    lengths.

    The cache holds block_size positions. When it is full, it is rebuilt from the last half block of every row. So a new
    token costs a forward pass over one position, plus one over half a block every half block.
    """
    decoder = Decoder(model, prompts, max_new_tokens, sampling)
    for i in range(max_new_tokens):
        new = sample(decoder.logits, sampling, generator, decoder.seen)
        yield new
        if i < max_new_tokens - 1:
            decoder.append(new)


@torch.inference_mode()
def generate_with_logprobs(model: GPT, prompts: Sequence[Tensor], max_new_tokens: int,
                           sampling: SamplingConfig = SamplingConfig(),
                           generator: torch.Generator | None = None) -> Iterator[Sampled]:
    """The same tokens as `generate`, with their log-probabilities, as reinforcement learning needs them."""
    decoder = Decoder(model, prompts, max_new_tokens, sampling)
    for i in range(max_new_tokens):
        new = sample_with_logprobs(decoder.logits, sampling, generator, decoder.seen)
        yield new
        if i < max_new_tokens - 1:
            decoder.append(new.ids)


class Decoder:
    """Decodes a batch of prompts with the cache, a token of each row at a time.

    logits: (B, V), of the next token. seen: (B, V) bool, the tokens that the repetition penalty applies to, or None.
    """

    def __init__(self, model: GPT, prompts: Sequence[Tensor], max_new_tokens: int, sampling: SamplingConfig,
                 read: tuple[Tensor, Cache] | None = None):
        """read: logits and cache after the prompts, where these have been read."""
        block_size = model.config.block_size
        self.model = model
        self.contexts = [prompt[-block_size:] for prompt in prompts]
        self.max_len = read[1].max_len if read else min(block_size, max(map(len, self.contexts)) + max_new_tokens - 1)
        self.logits, self.cache = read or self.prefill()
        self.seen = token_mask(prompts, model.config.vocab_size) if sampling.repetition_penalty != 1 else None
        self.generated: list[Tensor] = []  # since the last prefill

    def prefill(self) -> tuple[Tensor, Cache]:
        return self.model.prefill(self.contexts, self.max_len, cache_dtype(self.model))

    def keep(self, rows: list[int]):
        """Goes on with these rows of the batch."""
        self.cache.select_rows(rows)
        self.logits, self.contexts = self.logits[rows], [self.contexts[row] for row in rows]
        self.seen = None if self.seen is None else self.seen[rows]
        self.generated = [new[rows] for new in self.generated]

    def append(self, new: Tensor):
        """new: (B,) int64. Computes the logits after it."""
        self.generated.append(new)
        if self.seen is not None:
            self.seen.scatter_(1, new[:, None], True)
        if self.cache.length < self.max_len:
            # eager: a compiled model would recompile for every new shape
            self.logits = self.model.eager_forward(new[:, None], cache=self.cache, logits_to_keep=1)[:, 0]
            return
        keep, rows = max(1, self.model.config.block_size // 2), torch.stack(self.generated, dim=1)
        self.contexts = [torch.cat((context, row))[-keep:] for context, row in zip(self.contexts, rows)]
        self.generated = []
        self.logits, self.cache = self.prefill()


class Reading:
    """Prompts, (T,) int64 each, that are read once, and from which batch after batch can be decoded."""

    def __init__(self, model: GPT, prompts: Sequence[Tensor]):
        self.model, self.prompts = model, prompts
        contexts = [prompt[-model.config.block_size:] for prompt in prompts]
        self.logits, self.cache = model.prefill_distinct(contexts, max(map(len, contexts)), cache_dtype(model))

    def decoder(self, rows: list[int], max_new_tokens: int, sampling: SamplingConfig) -> Decoder:
        """Of texts that go on from these of the prompts."""
        max_len = min(self.model.config.block_size, self.cache.length + max_new_tokens - 1)
        return Decoder(self.model, [self.prompts[row] for row in rows], max_new_tokens, sampling,
                       (self.logits[rows], self.cache.fork(rows, max_len)))


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None = None,
           seen: Tensor | None = None) -> Tensor:
    """(B, V) logits -> (B,) ids. seen: (B, V) bool, the tokens that the repetition penalty applies to.

    The filters apply in transformers' order: penalty, temperature, top-k, top-p, min-p. Sources: repetition penalty, Keskar
    et al. 2019, section 4.1, arXiv:1909.05858; top-k, Fan et al. 2018, arXiv:1805.04833; top-p, Holtzman et al. 2019,
    arXiv:1904.09751; min-p, Nguyen et al. 2024, arXiv:2407.01082.
    """
    logits = penalize(logits, sampling, seen)
    if sampling.is_greedy:
        return logits.argmax(dim=-1)
    weights, ids = filter_tokens(logits, sampling)
    drawn = draw(weights, generator)
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


def sample_with_logprobs(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None = None,
                         seen: Tensor | None = None) -> Sampled:
    """The same ids as `sample`, with their log-probabilities."""
    penalized = penalize(logits, sampling, seen)
    if sampling.is_greedy:
        new, logprobs = penalized.argmax(dim=-1), logits.new_zeros(len(logits))
    else:
        weights, ids = filter_tokens(penalized, sampling)
        drawn = draw(weights, generator)
        new = (drawn if ids is None else ids.gather(1, drawn))[:, 0]
        logprobs = (weights.gather(1, drawn)[:, 0] / weights.sum(dim=-1)).log()
    return Sampled(new, logprobs, logits.gather(1, new[:, None])[:, 0] - logits.logsumexp(dim=-1))


def penalize(logits: Tensor, sampling: SamplingConfig, seen: Tensor | None) -> Tensor:
    """The repetition penalty. logits: (B, V); seen: (B, V) bool or None."""
    if seen is None:
        return logits
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_tokens(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """(B, V) logits -> the probability of each token that may be drawn, (B, K), up to a factor for each row and 0 for what
    the filters remove, and the ids of these tokens, (B, K), or None where they are 0..V-1."""
    logits, ids = logits / sampling.temperature, None
    if 0 < sampling.top_k < logits.size(-1):
        logits, ids = logits.topk(sampling.top_k, dim=-1)  # everything below then works on k sorted numbers
    elif sampling.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = logits.softmax(dim=-1)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if sampling.top_p < 1:
        scaled = as_integers(probs)  # a token is kept while those before it sum to less than top_p
        keep &= scaled.cumsum(dim=-1) - scaled < math.ceil(sampling.top_p * PROBABILITY_UNIT)
    if sampling.min_p > 0:
        keep &= probs >= sampling.min_p * probs.amax(dim=-1, keepdim=True)
    return probs * keep, ids


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, K), each 0 to 1 -> a column of each row, (B, 1), with a probability in proportion to its weight. Raises
    FloatingPointError when the weights are not finite; a GPU, which is not waited for, then fails by itself.

    On a CPU from one random number a row: torch.multinomial draws one for every weight, which takes long there.
    """
    if weights.device.type != "cpu":
        return torch.multinomial(weights, 1, generator=generator)
    total = weights.sum(dim=-1)
    if not bool(((total > 0) & total.isfinite()).all()):
        raise FloatingPointError("the model's logits are not finite: use another checkpoint")
    sums = as_integers(weights).cumsum(dim=-1)
    uniform, total = torch.rand(len(weights), 1, dtype=torch.float64, generator=generator), sums[:, -1:]
    return torch.searchsorted(sums, (uniform * total).long().clamp(max=total - 1), right=True)


def as_integers(probs: Tensor) -> Tensor:
    """Int64, whose sums do not depend on their order: on a GPU those of a cumsum of floats vary."""
    return (probs * PROBABILITY_UNIT).long()


def token_logprobs(model: GPT, ids: Tensor) -> Tensor:
    """ids: (B, T) int64, T >= 2, at most block_size + 1 -> log-probability in nats of every token but the first, given those
    before it in its row, (B, T - 1) fp32. It has a gradient, and never holds (B, T, V): see layers/loss.py. Raises
    ValueError for other lengths; `evaluate.document_losses` takes texts of any length.
    """
    n, block_size = ids.size(1), model.config.block_size
    if not 2 <= n <= block_size + 1:
        raise ValueError(f"{n} tokens: give 2 to {block_size + 1}, the model's context and the token after it")
    return -model.eager_forward(ids[:, :-1], ids[:, 1:], reduction="none")


def token_mask(prompts: Sequence[Tensor], vocab_size: int) -> Tensor:
    """(B, V) bool: the tokens that occur in each prompt."""
    mask = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=prompts[0].device)
    for row, prompt in zip(mask, prompts):
        row[prompt] = True
    return mask


def cache_dtype(model: GPT) -> torch.dtype:
    """The dtype of cached keys and values: autocast's on a GPU; fp32 on a CPU, whose attention of one query to many keys is
    slower in bf16."""
    device_type = model.embed.weight.device.type
    if device_type != "cpu" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.float32


# -- text -------------------------------------------------------------------------------------------------------------

def generate_text(model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: SamplingConfig,
                  stop: Sequence[str] = (), seed: int = 0) -> Iterator[str]:
    """Yields the continuation of `prompt`, which starts a document, piece by piece. Raises BadInput when the prompt does not
    fit into the context."""
    ids = encode_prompt(model, tokenizer, prompt)
    for _, text in generate_texts(model, tokenizer, [ids], max_new_tokens, sampling, stop, seed):
        yield text


def generate_texts(model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int,
                   sampling: SamplingConfig, stop: Sequence[str] = (), seed: int = 0) -> Iterator[tuple[int, str]]:
    """Yields (row, piece of text) as tokens are generated, until every row has ended at a token that ends texts, a stop
    string or `max_new_tokens`. prompts: ids."""
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    columns = (new.tolist() for new in generate(model, rows, max_new_tokens, sampling, generator))
    yield from stream_texts(tokenizer, columns, len(rows), stop)


def stream_texts(tokenizer: Tokenizer, columns: Iterable[Sequence[int]], n_rows: int,
                 stop: Sequence[str] = ()) -> Iterator[tuple[int, str]]:
    """(row, piece of text) from the tokens of all rows, a column at a time, until every row has ended."""
    streams = [TextStream(tokenizer, stop) for _ in range(n_rows)]
    for column in columns:
        for row, (stream, token_id) in enumerate(zip(streams, column)):
            if not stream.is_done and (text := stream.push(token_id)):
                yield row, text
        if all(stream.is_done for stream in streams):
            return
    for row, stream in enumerate(streams):
        if not stream.is_done and (text := stream.finish()):
            yield row, text


class TextStream:
    """Turns the tokens of one row into text as they arrive. Holds back incomplete characters and anything that may become a
    stop string. Ends at the stop string that is complete first, which it drops, or at a token that ends texts. Other special
    tokens, and ids that the tokenizer lacks, are no text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.end_ids = tokenizer, stop, tokenizer.end_ids
        self.special_ids = set(tokenizer.special_tokens.values())
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.pending, self.is_done = "", False

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is final now."""
        if token_id in self.end_ids:
            return self.finish()
        if token_id in self.special_ids or token_id >= self.tokenizer.vocab_size:
            return ""
        return self.release(self.decoder.decode(self.tokenizer.decode_bytes([token_id])))

    def finish(self) -> str:
        """Ends the stream; returns the text that was held back."""
        text = self.release(self.decoder.decode(b"", final=True)) + self.pending
        self.pending, self.is_done = "", True
        return text

    def release(self, new_text: str) -> str:
        """Appends to `pending`, and takes from it what cannot be part of a stop string."""
        self.pending += new_text
        matches = [(start + len(stop), start) for stop in self.stop if (start := self.pending.find(stop)) >= 0]
        if matches:
            _, start = min(matches)  # the one whose last character comes first
            text, self.pending, self.is_done = self.pending[:start], "", True
            return text
        n_held = max((n for stop in self.stop for n in range(1, len(stop)) if self.pending.endswith(stop[:n])), default=0)
        n_final = len(self.pending) - n_held
        text, self.pending = self.pending[:n_final], self.pending[n_final:]
        return text


def encode_prompt(model: GPT, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of the separator and `prompt`. Raises BadInput when they do not fit into the model's context."""
    ids = [tokenizer.separator_id] + tokenizer.encode(prompt)
    if len(ids) > model.config.block_size:
        raise BadInput(f"--prompt={prompt[:20]}…: has {len(ids) - 1:,} tokens, the model's context holds "
                       f"{model.config.block_size - 1:,}: shorten it")
    return ids


# -- for the commands -------------------------------------------------------------------------------------------------

def load_pretrained(path: Path, checkpoint: dict | None = None, chat: bool = False,
                    loops: int | None = None) -> tuple[GPT, Tokenizer, dict]:
    """The model of a checkpoint on the CPU in fp32, its tokenizer, and its `pretraining_flags`.

    checkpoint: what `load_checkpoint(path)` returned, where that has been called. chat: whether the tokenizer must have the
    chat tokens. loops: in place of the number in its config. Raises BadInput, which names the file, when something is
    missing or damaged.
    """
    if checkpoint is None:
        checkpoint = load_checkpoint(path)
    with explain_damage(path):
        if "tokenizer" not in checkpoint:  # of few-shot rules, say
            raise BadInput("holds no tokenizer: give a model of text, one that train.py or finetune.py wrote")
        tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
        _ = tokenizer.separator_id
        if chat:
            tokenizer.chat_token_ids()
        model = GPT.from_checkpoint(checkpoint)
        model.loops = loops or model.loops
        if tokenizer.vocab_size > model.config.vocab_size:
            raise BadInput(f"its tokenizer has {tokenizer.vocab_size:,} ids, its model {model.config.vocab_size:,}: they do "
                           f"not belong together")
        return model, tokenizer, pretraining_flags(checkpoint)


def pretraining_flags(checkpoint: dict) -> dict:
    """The flags of the run that wrote a checkpoint; {} if the model was imported."""
    return checkpoint.get("training", {}).get("settings", {})


def load_model(path: Path, machine: Machine, checkpoint: dict | None = None,
               loops: int | None = None) -> tuple[GPT, Tokenizer]:
    """The model of a checkpoint, on the device with its matrices in the machine's dtype, and its tokenizer. checkpoint,
    loops, errors: see load_pretrained."""
    model, tokenizer, _ = load_pretrained(path, checkpoint, loops=loops)
    model.cast_matrices(DTYPES[machine.dtype])
    return model.to(machine.device), tokenizer


def check_stop(stop: Sequence[str]):
    """Raises BadInput for an empty stop string, which every text contains."""
    if "" in stop:
        raise BadInput("--stop: one of its strings is empty: drop it, or no text would be generated")
