"""Text from a trained model: sampling with a cache, and a conversation in the terminal.

    python generate.py --checkpoint_path=checkpoints/gpt.pt --prompt="The history of"
    python generate.py --checkpoint_path=checkpoints/gpt_finetuned.pt --chat
"""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chat import Chat, talk
from runtime.checkpoint import reading
from runtime.cli import command, explain_failures, parse_flags
from runtime.config import BadInput, check_flags, flag
from runtime.device import DeviceConfig, open_machine
from sampling import SamplingConfig, document_start, generate_texts, load_model


@dataclass(frozen=True)
class GenerateConfig:
    """The text to make."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model to sample from")
    prompt: str = flag("", "text to go on from, without a space at its end (default: the start of a document); with --chat, "
                           "the first\nmessage")
    max_new_tokens: int = flag(200, "tokens to make, of an answer with --chat", at_least=1)
    num_samples: int = flag(1, "texts to make from the prompt, all at once", at_least=1, at_most=10_000)
    stop: tuple[str, ...] = flag((), "texts, with spaces between, at which it ends")
    chat: bool = flag(False, "talk with a model that finetune.py made")
    system: str = flag("", "with --chat, what the model is told before the conversation")
    seed: int = flag(0, "of the sampling", at_least=0, at_most=2**63 - 1)

    def __post_init__(self):
        check_flags(self)
        if "" in self.stop:
            raise BadInput("--stop: one of its texts is empty: it would end before it begins")
        if self.chat and self.num_samples > 1:
            raise BadInput(f"--num_samples={self.num_samples}: a conversation, --chat, has one answer at a time")
        if self.system and not self.chat:
            raise BadInput("--system: belongs to a conversation: add --chat")


def print_samples(pieces: Iterator[tuple[int, str]], n: int, prompt: str):
    """The texts one below the other: the first as it is made, the others when those before are complete."""
    waiting, current = [[] for _ in range(n)], 0
    begin = lambda row: print(f"--- {row + 1} of {n} ---\n{prompt}" if n > 1 else prompt, end="", flush=True)
    begin(0)
    for row, text in pieces:
        if row == current:
            print(text, end="", flush=True)
        else:
            waiting[row].append(text)
    for row in range(1, n):
        print()
        begin(row)
        print("".join(waiting[row]), end="", flush=True)
    print()


@command
def main(argv=None):
    """Continues a prompt with text from a trained model, or talks with it."""
    config, sampling, device_config = parse_flags(main.__doc__, argv, GenerateConfig, SamplingConfig, DeviceConfig)
    machine = open_machine(device_config)
    with explain_failures("try a smaller model, fewer --num_samples, or --device=cpu"), machine.autocast():
        model, tokenizer = load_model(config.checkpoint_path, machine)
        if config.chat:
            with reading(config.checkpoint_path):
                chat = Chat(model, tokenizer, sampling, config.max_new_tokens, config.system, config.stop, config.seed)
            talk(chat, config.prompt)
            return
        prompts = [document_start(model, tokenizer, config.prompt)] * config.num_samples
        pieces = generate_texts(model, tokenizer, prompts, config.max_new_tokens, sampling, config.stop, config.seed)
        print_samples(pieces, config.num_samples, config.prompt)


if __name__ == "__main__":
    main()
