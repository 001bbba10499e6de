"""Text from a trained model: sampling with a cache, and a conversation in the terminal.

    python generate.py --checkpoint_path=checkpoints/gpt.pt --prompt="The history of"
    python generate.py --checkpoint_path=checkpoints/gpt_finetuned.pt --chat
"""
import codecs
import contextlib
import json
import math
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import GPT
from runtime.checkpoint import load_checkpoint, reading
from runtime.device import DTYPES, DeviceConfig, Machine, explain_device_errors, open_machine
from runtime.files import require_writable, whole_file
from runtime.flags import BadInput, check_flags, command, flag, parse_flags, parse_path
from runtime.stop import StopSignals
from runtime.texts import as_text
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
    n_slots = min(block_size, max(map(len, texts)) + max_new_tokens - 1)
    logits, cache = model.prefill(texts, n_slots, cache_dtype(model))
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
        if cache.length < n_slots:
            # forward, not a call: a compiled model would compile again for every new shape
            logits = model.forward(new[:, None], cache=cache, n_last=1)[:, 0]
        else:
            rows = torch.stack(made, dim=1)
            texts, made = [torch.cat((text, row))[-max(1, block_size // 2):] for text, row in zip(texts, rows)], []
            logits, cache = model.prefill(texts, n_slots, cache_dtype(model))


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


# -- conversation -----------------------------------------------------------------------------------------------------

class Chat:
    """A conversation whose cache goes on from turn to turn. When the context is full, its oldest turns are forgotten, each
    with its answer, until half of it is free; what the model was told as system stays."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, sampling: SamplingConfig, max_new_tokens: int, system: str = "",
                 stop: Sequence[str] = (), seed: int = 0):
        self.model, self.tokenizer, self.sampling, self.stop = model, tokenizer, sampling, stop
        self.max_new_tokens, self.role_ids, self.end_id = max_new_tokens, *tokenizer.chat_ids()
        self.generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
        self.told = [{"role": "system", "content": system}] if system else []
        self.head = tokenizer.encode_chat(self.told)[0] if system else [tokenizer.separator_id]
        if self.room() < 4:
            told = f"--system={system[:20]}…: has {len(self.head):,} tokens, " if system else ""
            raise BadInput(f"{told}the model's context holds {model.config.block_size:,}: too few for a conversation")
        self.reset()

    def reset(self):
        """Forgets the conversation."""
        self.messages = list(self.told)
        self.turns: list[list[int]] = []  # a user's message and the answer each
        self.held, self.cache = [], None  # the ids that the cache has taken in
        self.is_full = False              # whether the last turn has filled the context

    def room(self) -> int:
        """Tokens that a turn may have."""
        return self.model.config.block_size - len(self.head)

    def answer(self, message: str) -> Iterator[str]:
        """Yields the answer as it is made, nothing where a token makes no text yet; where the caller stops early, it ends
        there. Raises BadInput, and forgets `message`, when it is longer than the context."""
        message = as_text(message)  # terminals may give halves of surrogate pairs
        turn = [self.role_ids["user"], *self.tokenizer.encode(message), self.end_id, self.role_ids["assistant"]]
        if len(turn) > self.room():
            raise BadInput(f"the message has {len(turn) - 3:,} tokens, the model's context holds {self.room() - 3:,}: "
                           f"shorten it")
        self.turns.append(turn)
        self.is_full, n_asked = False, len(turn)
        said, stream = [], TextStream(self.tokenizer, self.stop)
        try:
            for _ in range(self.max_new_tokens):
                token_id = self.next_token()
                if self.is_full:
                    break
                said.append(stream.push(token_id))
                if token_id not in stream.ends:
                    turn.append(token_id)
                yield said[-1]
                if stream.is_done:
                    if token_id not in stream.ends:  # a stop text, of which the model is to know as little as the user
                        turn[n_asked:] = self.tokenizer.encode("".join(said))
                    return
            said.append(stream.finish())
            yield said[-1]
        except BaseException as error:
            if not isinstance(error, GeneratorExit):  # which comes between tokens; others may come in the middle of one
                self.cache = None
            raise
        finally:
            turn.append(self.end_id)
            self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": "".join(said)}]

    @torch.inference_mode()
    def next_token(self) -> int | None:
        """None, and `is_full`, when the turn has filled the context."""
        block_size, ids = self.model.config.block_size, self.ids()
        if len(ids) > block_size:
            while len(self.turns) > 1 and len(ids) > block_size // 2:
                del self.turns[0]
                ids = self.ids()
            if len(ids) > block_size:
                self.is_full = True
                return None
        device = self.model.embed.weight.device
        if self.cache is not None and ids[:len(self.held)] == self.held and len(ids) > len(self.held):
            new = torch.tensor([ids[len(self.held):]], device=device)
            logits = self.model.forward(new, cache=self.cache, n_last=1)[:, 0]
        else:
            logits, self.cache = self.model.prefill([torch.tensor(ids, device=device)], block_size, cache_dtype(self.model))
        self.held = ids
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = seen_in([torch.tensor(ids, device=device)], self.model.config.vocab_size)
            seen[:, list(self.tokenizer.special_tokens.values())] = False  # or no answer would end after the first
        return int(sample(logits, self.sampling, self.generator, seen))

    def ids(self) -> list[int]:
        return [*self.head, *(token_id for turn in self.turns for token_id in turn)]

    def save(self, path: Path):
        """Writes the conversation as finetune.py reads it: a line of JSON. Raises BadInput or OSError."""
        require_writable(path, f"/save {path}")
        if path.exists():
            raise BadInput(f"/save {path}: exists: choose another name")
        with whole_file(path, "w") as file:
            file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")


COMMANDS = """/reset        forget the conversation
/save FILE    write it as a line of JSON, as finetune.py reads it
/help         these lines
Ctrl-C ends an answer, Ctrl-D the program."""


def talk(chat: Chat, first: str):
    """Reads messages and commands, and prints answers, until the input ends. first: a message before those, or nothing."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 (arrow keys and history for input())
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("/help lists commands")
    while True:
        try:
            line, first = first or input("> " if sys.stdin.isatty() else ""), ""
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the program)")
            continue
        try:
            if line.startswith("/"):
                obey(chat, line)
            elif line.strip():
                print_answer(chat, line)
        except (BadInput, OSError, ArgumentTypeError) as error:
            print(f"({error})")
        except KeyboardInterrupt:  # a second one, in the middle of a token
            print(" (stopped)")


def obey(chat: Chat, line: str):
    name, _, rest = line.partition(" ")
    if name == "/reset":
        chat.reset()
        print("(forgotten)")
    elif name == "/save" and rest.strip():
        chat.save(parse_path(rest.strip()))
        print(f"(written to {rest.strip()})")
    else:
        print(COMMANDS)


def print_answer(chat: Chat, message: str):
    """Ctrl-C stops the answer after the token under way."""
    with StopSignals() as stop:
        n_turns, answer = len(chat.turns), chat.answer(message)
        for text in answer:
            print(text, end="", flush=True)
            if stop.signal:
                break
        answer.close()
    print(" (stopped)" if stop.signal else "")
    if chat.is_full:
        print("(the answer has filled the context and ends here)")
    elif len(chat.turns) <= n_turns:
        print("(the context is full: the oldest turns are forgotten)")
    if stop.signal not in (None, signal.SIGINT):
        raise SystemExit(128 + stop.signal)


# -- the command ------------------------------------------------------------------------------------------------------

def load_model(path: Path, machine: Machine) -> tuple[GPT, Tokenizer]:
    """A checkpoint's model, on the device, and its tokenizer. Raises BadInput."""
    blob = load_checkpoint(path)
    with reading(path):
        model, tokenizer = GPT.from_blob(blob), Tokenizer.from_json(blob["tokenizer"])
    model.cast_matrices(DTYPES[machine.dtype])
    return model.to(machine.device), tokenizer


@command
def main(argv=None):
    """Continues a prompt with text from a trained model, or talks with it."""
    config, sampling, device_config = parse_flags(main.__doc__, argv, GenerateConfig, SamplingConfig, DeviceConfig)
    machine = open_machine(device_config)
    with explain_device_errors("try a smaller model, fewer --num_samples, or --device=cpu"), machine.autocast():
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
