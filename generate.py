"""Continues a prompt with text sampled from a trained model.

    python generate.py --checkpoint_path=checkpoints/gpt.pt --prompt="The history of"
    python generate.py --speculate=lookup --prompt="The history of"                 the same, faster: see speculative.py
    python generate.py --checkpoint_path=checkpoints/gpt_finetuned.pt --chat        the same as chat.py
"""
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chat import ChatConfig, start_chat
from learner import AdaptConfig, require_adapt
from runtime.cli import command, explain_failures, log_line, parse_flags
from runtime.config import BadInput, check_flags, flag
from runtime.device import DeviceConfig, open_machine
from sampling import SamplingConfig, check_stop, encode_prompt, generate_texts, load_model
from speculative import SpeculationConfig, open_speculation


@dataclass(frozen=True)
class GenerateConfig:
    """Generation."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model to sample from")
    prompt: str = flag("", "text to continue, without a trailing space (default: the start of a document); with --chat, the "
                           "first message")
    max_new_tokens: int = flag(200, "maximum number of new tokens in a sample; with --chat, in an answer", at_least=1)
    num_samples: int = flag(1, "continuations of the prompt, generated as one batch", at_least=1, at_most=10_000)
    stop: tuple[str, ...] = flag((), "strings that end a sample, with spaces between; they are not printed")
    chat: bool = flag(False, "talk with a model that finetune.py trained, as chat.py does")
    system: str = flag("", "with --chat, the system message that the conversation starts with")
    seed: int = flag(0, "random seed of the sampling", at_least=0, at_most=2**63 - 1)
    adapt: bool = flag(False, "with --chat, learn from each message before it is answered, see chat.py")

    def __post_init__(self):
        check_flags(self)
        check_stop(self.stop)
        if self.chat and self.num_samples > 1:
            raise BadInput(f"--num_samples={self.num_samples}: --chat has one answer at a time: drop one of the two flags")
        if self.system and not self.chat:
            raise BadInput("--system: is only used in a conversation: add --chat")
        if self.adapt and not self.chat:
            raise BadInput("--adapt: learns from a conversation: add --chat")

    def chat_config(self) -> ChatConfig:
        return ChatConfig(self.checkpoint_path, self.prompt, self.max_new_tokens, self.system, self.stop, self.seed,
                          self.adapt)


def require_one_text(config: GenerateConfig, speculate: SpeculationConfig):
    """Raises BadInput when speculative decoding is to do anything but continue one prompt once."""
    if speculate.speculate != "none" and (config.chat or config.num_samples > 1):
        other = "--chat" if config.chat else f"--num_samples={config.num_samples}"
        raise BadInput(f"{other}: --speculate={speculate.speculate} makes one sample of a prompt: drop one of the two flags")


def print_samples(pieces: Iterator[tuple[int, str]], n: int, prompt: str):
    """Prints `n` samples one below the other: the first as it is generated, each other one when those before it are
    complete. pieces: see generate_texts."""
    def print_start(row: int):
        print(f"--- {row + 1} of {n} ---\n{prompt}" if n > 1 else prompt, end="", flush=True)

    texts: list[list[str]] = [[] for _ in range(n)]
    print_start(0)
    for row, text in pieces:
        if row == 0:
            print(text, end="", flush=True)
        else:
            texts[row].append(text)
    for row in range(1, n):
        print()
        print_start(row)
        print("".join(texts[row]), end="", flush=True)
    print()


@command
def main(argv=None):
    """Continues a prompt with text sampled from a trained model."""
    config, adapt, sampling, speculate, device_config = parse_flags(
        main.__doc__, argv, GenerateConfig, AdaptConfig, SamplingConfig, SpeculationConfig, DeviceConfig)
    require_adapt(config.adapt, adapt)
    require_one_text(config, speculate)
    machine = open_machine(device_config)
    with explain_failures(lambda: "try a smaller model, fewer --num_samples, or --device=cpu"):
        if config.chat:
            start_chat(config.chat_config(), sampling, machine, adapt)
            return
        model, tokenizer = load_model(config.checkpoint_path, machine)
        prompt, options = encode_prompt(model, tokenizer, config.prompt), (sampling, config.stop, config.seed)
        if speculate.speculate == "none":
            pieces = generate_texts(model, tokenizer, [prompt] * config.num_samples, config.max_new_tokens, *options)
        else:
            speculation = open_speculation(speculate, model, tokenizer, machine)
            pieces = speculation.generate_text(tokenizer, prompt, config.max_new_tokens, *options)
        with machine.autocast():
            print_samples(pieces, config.num_samples, config.prompt)
        if speculate.speculate != "none" and sys.stderr.isatty():
            log_line(f"({speculation.tokens / speculation.passes:.2f} tokens per forward pass)")


if __name__ == "__main__":
    main()
