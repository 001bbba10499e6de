"""Continues a prompt with text sampled from a trained model.

    python generate.py --checkpoint_path=checkpoints/gpt.pt --prompt="The history of"
    python generate.py --speculate=lookup --prompt="The history of"                 the same, faster: see speculative.py
    python generate.py --samples=16 --choose=mbr --prompt="The history of"          the one that is most like the others
    python generate.py --checkpoint_path=checkpoints/gpt_finetuned.pt --chat        the same as chat.py
"""
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from candidates import CHOICES, CandidateConfig, find_check, sample_candidates
from chat import ChatConfig, start_chat
from learner import AdaptConfig, require_adapt
from model import GPT, GPTConfig
from runtime.cli import command, explain_failures, log_line, parse_flags
from runtime.config import BadInput, declared_flags, flag, redeclare
from runtime.device import DeviceConfig, open_machine
from sampling import LOOPS_HELP, SamplingConfig, check_stop, encode_prompt, generate_texts, load_model
from speculative import SpeculationConfig, open_speculation
from tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateConfig(CandidateConfig):
    """Generation."""
    samples: int = redeclare(CandidateConfig, "samples", 1, help="continuations of the prompt, generated as one batch; "
                                                                 "without --choose, all are printed; with --chat, answers")
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model to sample from")
    prompt: str = flag("", "text to continue, without a trailing space (default: the start of a document); with --chat, the "
                           "first message")
    max_new_tokens: int = flag(200, "maximum number of new tokens in a sample; with --chat, in an answer", at_least=1)
    stop: tuple[str, ...] = flag((), "strings that end a sample, with spaces between; they are not printed")
    chat: bool = flag(False, "talk with a model that finetune.py trained, as chat.py does")
    system: str = flag("", "with --chat, the system message that the conversation starts with")
    seed: int = flag(0, "random seed of the sampling", at_least=0, at_most=2**63 - 1)
    adapt: bool = flag(False, "with --chat, learn from each message before it is answered, see chat.py")
    loops: int = redeclare(GPTConfig, "loops", None, help=LOOPS_HELP)

    def __post_init__(self):
        super().__post_init__()
        check_stop(self.stop)
        if self.samples > 1 and not self.choose and (self.chat or self.think is not None):
            given = "--chat" if self.chat else f"--think={self.think}"
            raise BadInput(f"--samples={self.samples}: with {given} there is one answer: say how to --choose it, such as "
                           f"--choose=vote")
        if self.system and not self.chat:
            raise BadInput("--system: is only used in a conversation: add --chat")
        if self.adapt and not self.chat:
            raise BadInput("--adapt: learns from a conversation: add --chat")

    def chat_config(self) -> ChatConfig:
        return ChatConfig(**{name: getattr(self, name) for name in declared_flags(ChatConfig)})


def require_one_text(config: GenerateConfig, speculate: SpeculationConfig):
    """Raises BadInput when speculative decoding is to do anything but continue one prompt once."""
    if speculate.speculate != "none" and (config.chat or config.samples > 1 or config.think is not None):
        other = "--chat" if config.chat else (
            f"--samples={config.samples}" if config.samples > 1 else f"--think={config.think}")
        raise BadInput(f"{other}: --speculate={speculate.speculate} makes one sample of a prompt: drop one of the two flags")


def choose_text(model: GPT, tokenizer: Tokenizer, prompt: list[int], config: GenerateConfig,
                sampling: SamplingConfig) -> str:
    """The continuation of `prompt`, ids, that --samples, --choose and --think lead to. Raises BadInput where it cannot be
    chosen so."""
    check = find_check(config.prompt) if config.choose == "verifier" else None
    generator = torch.Generator(model.embed.weight.device).manual_seed(config.seed)
    answers, = sample_candidates(model, tokenizer, [prompt], config, config.max_new_tokens, sampling, generator, config.stop)
    return answers[CHOICES[config.choose or "vote"](answers, check)].text


def print_samples(pieces: Iterable[tuple[int, str]], n: int, prompt: str):
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
    with explain_failures(lambda: "try a smaller model, fewer --samples, or --device=cpu"):
        if config.chat:
            start_chat(config.chat_config(), sampling, machine, adapt)
            return
        model, tokenizer = load_model(config.checkpoint_path, machine, loops=config.loops)
        prompt, options = encode_prompt(model, tokenizer, config.prompt), (sampling, config.stop, config.seed)
        with machine.autocast():
            if speculate.speculate != "none":
                speculation = open_speculation(speculate, model, tokenizer, machine)
                pieces = speculation.generate_text(tokenizer, prompt, config.max_new_tokens, *options)
            elif config.choose or config.think is not None:
                pieces = [(0, choose_text(model, tokenizer, prompt, config, sampling))]
            else:
                pieces = generate_texts(model, tokenizer, [prompt] * config.samples, config.max_new_tokens, *options)
            print_samples(pieces, 1 if config.choose else config.samples, config.prompt)
        if speculate.speculate != "none" and sys.stderr.isatty():
            log_line(f"({speculation.tokens / speculation.passes:.2f} tokens per forward pass)")


if __name__ == "__main__":
    main()
