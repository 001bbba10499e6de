"""Sampling text from a trained model.

    python generate.py --checkpoint_path=checkpoints/gpt.pt --prompt="The history of"
"""
import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import GPT
from runtime.checkpoint import load_checkpoint, reading
from runtime.device import DeviceConfig, explain_out_of_memory, open_machine
from runtime.flags import check_flags, command, flag, parse_flags
from tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateConfig:
    """The text to make."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model to sample from")
    prompt: str = flag("", "text to go on from, without a space at its end (default: the start of a document)")
    max_new_tokens: int = flag(200, "tokens to make", at_least=1)
    temperature: float = flag(0.8, "below 1 prefers likely tokens, 0 always takes the likeliest", at_least=0, at_most=100)
    top_k: int = flag(50, "sample among so many likeliest tokens; 0 is all", at_least=0)
    seed: int = flag(0, "of the sampling", at_least=0, at_most=2**63 - 1)
    __post_init__ = check_flags


@torch.inference_mode()
def generate(model: GPT, idx: Tensor, max_new_tokens: int, temperature: float = 0.8, top_k: int = 50,
             generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Yields the next token of each row, (B,), `max_new_tokens` times. idx: (B, T) int64, the prompts, T >= 1.

    The cache holds block_size positions. When it is full, it starts again from the last half of them, so that a new
    token costs one forward step of one position, and every half block one of half a block.
    """
    block_size = model.config.block_size
    cache, held, unseen = None, 0, idx
    for _ in range(max_new_tokens):
        if cache is None or held + unseen.size(1) > block_size:
            unseen = idx[:, -(block_size if cache is None else max(1, block_size // 2)):]
            cache, held = model.init_cache(idx.size(0), block_size), 0
        # forward, not a call: a compiled model would compile again for every new shape
        logits = model.forward(unseen, cache=cache)[:, -1]
        held += unseen.size(1)
        unseen = sample(logits, temperature, top_k, generator)
        idx = torch.cat((idx, unseen), dim=1)[:, -block_size:]
        yield unseen[:, 0]


def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits -> (B, 1) ids."""
    if temperature < 1e-6:  # dividing by it would overflow
        return logits.argmax(dim=-1, keepdim=True)
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)


def generate_text(model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, temperature: float, top_k: int,
                  seed: int) -> Iterator[str]:
    """Yields text as it is made, whole characters only; ends with the document."""
    device = model.embed.weight.device
    ids = [tokenizer.separator_id] + tokenizer.encode(prompt)
    generator = torch.Generator(device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for (token_id,) in generate(model, torch.tensor([ids], device=device), max_new_tokens, temperature, top_k, generator):
        if token_id == tokenizer.separator_id:
            break
        yield decoder.decode(tokenizer.decode_bytes([token_id]))
    yield decoder.decode(b"", final=True)


@command
def main(argv=None):
    """Continues a prompt with text from a trained model."""
    config, device_config = parse_flags(main.__doc__, argv, GenerateConfig, DeviceConfig)
    machine = open_machine(device_config)
    blob = load_checkpoint(config.checkpoint_path)
    with explain_out_of_memory("try a smaller model, or --device=cpu"), machine.autocast():
        with reading(config.checkpoint_path):
            model, tokenizer = GPT.from_blob(blob).to(machine.device), Tokenizer.from_json(blob["tokenizer"])
        print(config.prompt, end="", flush=True)
        for text in generate_text(model, tokenizer, config.prompt, config.max_new_tokens, config.temperature,
                                  config.top_k, config.seed):
            print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
