"""A conversation in the terminal."""
import contextlib
import json
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from model import GPT
from runtime.cli import parse_path
from runtime.config import BadInput
from runtime.files import atomic_write, check_writable
from runtime.signals import StopSignals
from sampling import SamplingConfig, TextStream, cache_dtype, sample, seen_in
from text.documents import as_text
from tokenizer import Tokenizer

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
            logits = self.model.eager_forward(new, cache=self.cache, logits_to_keep=1)[:, 0]
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
        check_writable(path, f"/save {path}")
        if path.exists():
            raise BadInput(f"/save {path}: exists: choose another name")
        with atomic_write(path, "w") as file:
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
