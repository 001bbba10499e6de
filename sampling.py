"""Text from a model: sampling and decoding with a cache."""
import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import GPT
from runtime.checkpoint import load_checkpoint, reading
from runtime.config import BadInput, check_flags, flag
from runtime.device import DTYPES, Machine
from tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen."""
    temperature: float = flag(0.8, "below 1 prefers likely tokens, 0 always takes the likeliest", at_least=0, at_most=100)
    top_k: int = flag(50, "choose among so many likeliest tokens; 0 is all", at_least=0)
    top_p: float = flag(1.0, "choose among the likeliest tokens that together have this probability", above=0, at_most=1)
    min_p: float = flag(0.0, "choose among tokens that have this share of the likeliest one's probability", at_least=0,
                        at_most=1)
    repetition_penalty: float = flag(1.0, "above 1 makes tokens that were there before less likely", above=0, at_most=100)
    __post_init__ = check_flags


GREEDY = SamplingConfig(temperature=0.0)


# -- tokens -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model: GPT, prompts: Sequence[Tensor], max_new_tokens: int, sampling: SamplingConfig = SamplingConfig(),
             generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Yields the next token of each row, (B,), `max_new_tokens` times. prompts: (T,) int64 each, T >= 1, of any lengths.

    The cache holds block_size positions. When it is full, it starts again from the last half of each text, so that a new
    token costs one forward step of one position, and every half block one of half a block.
    """
    block_size = model.config.block_size
    texts = [prompt[-block_size:] for prompt in prompts]
    max_len = min(block_size, max(map(len, texts)) + max_new_tokens - 1)
    logits, cache = model.prefill(texts, max_len, cache_dtype(model))
    seen = seen_in(prompts, model.config.vocab_size) if sampling.repetition_penalty != 1 else None
    made = []
    for i in range(max_new_tokens):
        new = sample(logits, sampling, generator, seen)
        yield new
        if i == max_new_tokens - 1:
            return
        made.append(new)
        if seen is not None:
            seen.scatter_(1, new[:, None], True)
        if cache.length < max_len:
            # forward, not a call: a compiled model would compile again for every new shape
            logits = model.eager_forward(new[:, None], cache=cache, logits_to_keep=1)[:, 0]
        else:
            rows = torch.stack(made, dim=1)
            texts, made = [torch.cat((text, row))[-max(1, block_size // 2):] for text, row in zip(texts, rows)], []
            logits, cache = model.prefill(texts, max_len, cache_dtype(model))


def cache_dtype(model: GPT) -> torch.dtype:
    """Of the keys and values kept: autocast's on a GPU; fp32 on a CPU, whose attention of one token to many is
    slower in bf16."""
    kind = model.embed.weight.device.type
    return torch.get_autocast_dtype(kind) if kind != "cpu" and torch.is_autocast_enabled(kind) else torch.float32


def seen_in(prompts: Sequence[Tensor], vocab_size: int) -> Tensor:
    """(B, V) bool: the tokens of each prompt."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=prompts[0].device)
    for row, prompt in zip(seen, prompts):
        row[prompt] = True
    return seen


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None = None,
           seen: Tensor | None = None) -> Tensor:
    """(B, V) logits -> (B,) ids. seen: (B, V) bool, the tokens that the repetition penalty is for.

    Sources: repetition penalty, Keskar et al. 2019, section 4.1, arXiv:1909.05858; top-k, Fan et al. 2018, arXiv:1805.04833;
    top-p, Holtzman et al. 2019, arXiv:1904.09751; min-p, Nguyen et al. 2024, arXiv:2407.01082.
    """
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature < 1e-6:  # dividing by it would overflow
        return logits.argmax(dim=-1)
    logits, ids = logits / sampling.temperature, None
    if 0 < sampling.top_k < logits.size(-1):
        logits, ids = logits.topk(sampling.top_k, dim=-1)  # what follows works on few numbers, sorted
    elif sampling.top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probabilities = logits.softmax(dim=-1)
    kept = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_p < 1:
        # what comes before falls short of it; whole numbers, whose sums are the same in any order, which a GPU's are in
        shares = (probabilities * 2**40).long()
        kept &= shares.cumsum(dim=-1) - shares < math.ceil(sampling.top_p * 2**40)
    if sampling.min_p > 0:
        kept &= probabilities >= sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
    chosen = torch.multinomial(probabilities * kept, 1, generator=generator)
    return (chosen if ids is None else ids.gather(1, chosen))[:, 0]


# -- text -------------------------------------------------------------------------------------------------------------

class TextStream:
    """Makes text of one row's tokens as they come: whole characters, and nothing that may become a stop text or stands
    behind one; of several the first to be complete counts. Special tokens end it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.ends = tokenizer, stop, set(tokenizer.special_tokens.values())
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.is_done = "", False

    def push(self, token_id: int) -> str:
        """The text that is certain now, with this token."""
        if token_id in self.ends:
            return self.finish()
        return self.add(self.decoder.decode(self.tokenizer.decode_bytes([token_id])))

    def finish(self) -> str:
        """What was held back, at the end."""
        text = self.add(self.decoder.decode(b"", final=True)) + self.held
        self.held, self.is_done = "", True
        return text

    def add(self, text: str) -> str:
        self.held += text
        if found := [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]:
            text, self.held, self.is_done = self.held[:min(found)[1]], "", True
            return text
        n = max((n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        text, self.held = self.held[:len(self.held) - n], self.held[len(self.held) - n:]
        return text


def generate_texts(model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int,
                   sampling: SamplingConfig, stop: Sequence[str] = (), seed: int = 0) -> Iterator[tuple[int, str]]:
    """Yields (row, text) as it is made, until all rows have ended. prompts: ids."""
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    streams = [TextStream(tokenizer, stop) for _ in prompts]
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    for new in generate(model, rows, max_new_tokens, sampling, generator):
        for row, (stream, token_id) in enumerate(zip(streams, new.tolist())):
            if not stream.is_done and (text := stream.push(token_id)):
                yield row, text
        if all(stream.is_done for stream in streams):
            return
    for row, stream in enumerate(streams):
        if not stream.is_done and (text := stream.finish()):
            yield row, text


def generate_text(model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: SamplingConfig,
                  stop: Sequence[str] = (), seed: int = 0) -> Iterator[str]:
    """Yields text as it is made, after the start of a document and `prompt`. Raises BadInput when that is longer than the
    context."""
    ids = document_start(model, tokenizer, prompt)
    for _, text in generate_texts(model, tokenizer, [ids], max_new_tokens, sampling, stop, seed):
        yield text


def document_start(model: GPT, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids. Raises BadInput when they are more than the context holds."""
    ids = [tokenizer.separator_id] + tokenizer.encode(prompt)
    if len(ids) > model.config.block_size:
        raise BadInput(f"--prompt={prompt[:20]}…: has {len(ids) - 1:,} tokens, the model's context holds "
                       f"{model.config.block_size - 1:,}: shorten it")
    return ids


# -- the command ------------------------------------------------------------------------------------------------------

def load_model(path: Path, machine: Machine) -> tuple[GPT, Tokenizer]:
    """A checkpoint's model, on the device, and its tokenizer. Raises BadInput."""
    blob = load_checkpoint(path)
    with reading(path):
        model, tokenizer = GPT.from_checkpoint(blob), Tokenizer.from_json(blob["tokenizer"])
    model.cast_matrices(DTYPES[machine.dtype])
    return model.to(machine.device), tokenizer
