"""A conversation with a finetuned model, in the terminal.

    python chat.py --checkpoint_path=checkpoints/gpt_finetuned.pt
    python chat.py --checkpoint_path=checkpoints/gpt_finetuned.pt --adapt       learns from what it is told, see learner.py
"""
import contextlib
import json
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from candidates import CHOICES, CandidateConfig, find_check, sample_candidates
from learner import AdaptConfig, Learner, open_learner, require_adapt
from model import GPT, GPTConfig
from runtime.checkpoint import explain_damage, load_checkpoint, save_checkpoint
from runtime.cli import command, explain_failures, log_line, parse_flags, parse_path
from runtime.config import BadInput, flag, redeclare
from runtime.device import DeviceConfig, Machine, open_machine
from runtime.files import atomic_write, check_writable
from runtime.signals import StopSignals
from sampling import (
    LOOPS_HELP,
    SamplingConfig,
    TextStream,
    cache_dtype,
    check_stop,
    load_model,
    load_pretrained,
    sample,
    token_mask,
)
from text.documents import valid_unicode
from tokenizer import Tokenizer

HELP = """/reset        clear the conversation
/save FILE    write the conversation as a line of JSON that finetune.py reads
/help         show this
/quit         end the conversation
Ctrl-C stops an answer, Ctrl-D quits."""
ADAPT_HELP = """\
The model learns from each message of yours before it answers, not from its own
answers.
/forget       put the weights back as they were; the conversation stays
/reset        clear the conversation; what was learnt stays
/save FILE.pt write the weights as a checkpoint, as they are now
/save FILE    write the conversation as a line of JSON that finetune.py reads
/help         show this
/quit         end the conversation
Ctrl-C stops an answer, Ctrl-D quits."""
LEAVE = "/quit", "/exit", "/bye"


@dataclass(frozen=True)
class ChatConfig(CandidateConfig):
    """The conversation."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt_finetuned.pt"), "a model that finetune.py trained")
    prompt: str = flag("", "the first message (default: read from the terminal)")
    max_new_tokens: int = flag(200, "maximum number of tokens in an answer", at_least=1)
    system: str = flag("", "system message that the conversation starts with")
    stop: tuple[str, ...] = flag((), "strings that end an answer, with spaces between; they are not shown")
    seed: int = flag(0, "random seed of the sampling", at_least=0, at_most=2**63 - 1)
    adapt: bool = flag(False, "learn from each message before it is answered; in the conversation, /forget puts the "
                               "weights back, and /save keeps them")
    loops: int = redeclare(GPTConfig, "loops", None, help=LOOPS_HELP)

    def __post_init__(self):
        super().__post_init__()
        check_stop(self.stop)
        if self.samples > 1 and not self.choose:
            raise BadInput(f"--samples={self.samples}: one of them is the answer: say how to --choose it, such as "
                           f"--choose=vote")


# -- conversation -----------------------------------------------------------------------------------------------------

class Learnt(NamedTuple):
    """What `Chat.learn` did with a message: its tokens, and its loss in nats/token as it was read, each hop before the step
    on it, and read once more after all steps."""
    tokens: int
    loss: float
    loss_after: float


class Chat:
    """A conversation whose cache is kept from turn to turn, as long as the weights stay as they are.

    A turn is a user's message and the answer. When the context is full, the oldest turns are dropped until half of it is
    free; the system message stays.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, sampling: SamplingConfig, max_new_tokens: int, system: str = "",
                 stop: Sequence[str] = (), seed: int = 0, learner: Learner | None = None, provenance: dict | None = None,
                 candidates: CandidateConfig | None = None):
        """learner: of `model`, for `learn`. provenance: goes into the checkpoints of `save_weights`, see `provenance_of`.
        candidates: how many answers are sampled, which of them is given, and how long a thought may be. Raises BadInput when
        the tokenizer has no chat tokens, or the system message leaves no room for a turn."""
        self.model, self.tokenizer, self.sampling, self.stop = model, tokenizer, sampling, stop
        self.max_new_tokens, self.learner, self.provenance = max_new_tokens, learner, provenance or {}
        self.candidates = candidates or CandidateConfig()
        self.role_ids, self.end_id = tokenizer.chat_token_ids()
        self.generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
        system = valid_unicode(system)  # a command line may hold lone surrogates
        self.system_messages = [{"role": "system", "content": system}] if system else []
        self.system_ids, _ = tokenizer.encode_chat(self.system_messages)  # the separator alone, if there is none
        if self.max_turn_tokens() < 4:
            found = f"--system={system[:20]}…: has {len(self.system_ids):,} tokens, " if system else ""
            raise BadInput(f"{found}the model's context holds {model.config.block_size:,}: too few for a conversation")
        self.reset()

    def reset(self):
        """Clears the conversation."""
        self.history = list(self.system_messages)  # all messages so far, also those of dropped turns
        self.turns: list[list[int]] = []           # the ids of each turn in the context
        self.cached_ids, self.cache = [], None     # the ids that the cache holds keys and values of
        self.context_full = False                  # whether the last answer was cut off by the end of the context

    def max_turn_tokens(self) -> int:
        return self.model.config.block_size - len(self.system_ids)

    def context_ids(self) -> list[int]:
        """What the model sees: the system message and the turns that have not been dropped."""
        return [*self.system_ids, *(token_id for turn in self.turns for token_id in turn)]

    def encode_turn(self, message: str) -> list[int]:
        """The ids of a turn up to the answer. Raises BadInput when they do not fit into the context."""
        turn = [self.role_ids["user"], *self.tokenizer.encode(message), self.end_id, self.role_ids["assistant"]]
        if len(turn) > self.max_turn_tokens():
            raise BadInput(f"the message has {len(turn) - 3:,} tokens, the model's context holds "
                           f"{self.max_turn_tokens() - 3:,}: shorten it")
        return turn

    def make_room(self):
        """Drops the oldest turns, but never the newest, where the context is longer than the model's."""
        block_size = self.model.config.block_size
        if len(self.context_ids()) > block_size:
            while len(self.turns) > 1 and len(self.context_ids()) > block_size // 2:
                del self.turns[0]

    def answer(self, message: str) -> Iterator[str]:
        """Yields the answer token by token, "" where a token completes no text. Closing the iterator ends the answer there.
        Raises BadInput when `message` does not fit into the context; the conversation is then unchanged."""
        message = valid_unicode(message)  # terminals may deliver lone surrogates
        turn = self.encode_turn(message)
        is_chosen = self.candidates.samples > 1 or self.candidates.think is not None
        check = find_check(message) if self.candidates.choose == "verifier" else None
        self.turns.append(turn)
        self.context_full, pieces = False, []
        try:
            for text in self.choose_turn(turn, check) if is_chosen else self.generate_turn(turn):
                pieces.append(text)
                yield text
        except BaseException as error:
            if not isinstance(error, GeneratorExit):  # it comes between two tokens, others within one: layers may disagree
                self.cache = None
            raise
        finally:
            self.finish_turn(turn, message, "".join(pieces))

    def generate_turn(self, turn: list[int]) -> Iterator[str]:
        """Appends the tokens of the answer to `turn`, the last one of `turns`, and yields the text that each completes."""
        n_prompt, pieces, stream = len(turn), [], TextStream(self.tokenizer, self.stop)
        for _ in range(self.max_new_tokens):
            token_id = self.next_token()
            if token_id is None:
                break
            pieces.append(stream.push(token_id))
            if token_id not in stream.end_ids:
                turn.append(token_id)
            yield pieces[-1]
            if stream.is_done:
                if token_id not in stream.end_ids:  # a stop string: the model sees no more of it than the user
                    turn[n_prompt:] = self.tokenizer.encode("".join(pieces))
                return
        yield stream.finish()

    def choose_turn(self, turn: list[int], check: Callable[[str], float] | None) -> Iterator[str]:
        """`generate_turn` with --samples and --think: the answer as one piece. check: of a verifier."""
        self.make_room()
        ids, config = self.context_ids(), self.candidates
        room = min(self.max_new_tokens, self.model.config.block_size + 1 - len(ids))
        if room < 1:
            self.context_full = True
            return
        answers, = sample_candidates(self.model, self.tokenizer, [ids], config, room, self.sampling, self.generator,
                                     self.stop)
        answer = answers[CHOICES[config.choose or "vote"](answers, check)]
        turn += self.tokenizer.encode(answer.text)
        self.context_full = not answer.has_ended and room < self.max_new_tokens
        yield answer.text

    def finish_turn(self, turn: list[int], message: str, answer: str):
        """Ends the answer in `turn`, and adds the messages to the history."""
        turn.append(self.end_id)
        self.history += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]

    @torch.inference_mode()
    def next_token(self) -> int | None:
        """None, after setting `context_full`, when the current turn alone fills the context."""
        self.make_room()
        block_size, ids = self.model.config.block_size, self.context_ids()
        if len(ids) > block_size:
            self.context_full = True
            return None
        device, n_cached = self.model.embed.weight.device, len(self.cached_ids)
        if self.cache is not None and ids[:n_cached] == self.cached_ids and len(ids) > n_cached:
            new = torch.tensor([ids[n_cached:]], device=device)
            logits = self.model.eager_forward(new, cache=self.cache, logits_to_keep=1)[:, 0]
        else:
            logits, self.cache = self.model.prefill([torch.tensor(ids, device=device)], block_size, cache_dtype(self.model))
        self.cached_ids = ids
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = token_mask([torch.tensor(ids, device=device)], self.model.config.vocab_size)
            seen[:, list(self.tokenizer.special_tokens.values())] = False  # or no answer would end after the first one
        return int(sample(logits, self.sampling, self.generator, seen))

    # -- learning -----------------------------------------------------------------------------------------------------

    def learn(self, message: str) -> Learnt | None:
        """Trains the model on the words of `message`, hop by hop, given the conversation before it; `answer` comes next.
        None for a message of no tokens. Not under autocast, which would go on with its casts of earlier weights.

        Raises BadInput as `answer` does, and FloatingPointError when a step was not finite. After that, or an interrupt,
        the weights are as `forget` leaves them.
        """
        turn = self.encode_turn(valid_unicode(message))
        if not (n_tokens := len(turn) - 3):
            return None
        self.turns.append(turn)
        self.make_room()
        ids = torch.tensor(self.context_ids()[:-2])  # the end of the message and what follows are not the user's words
        self.turns.pop()
        first = len(ids) - 1 - n_tokens
        self.cached_ids, self.cache = [], None  # of the weights before
        try:
            loss = self.learner.read(ids, first).sum().item() / n_tokens
            loss_after = self.learner.read(ids, first, learn=False).sum().item() / n_tokens
        except BaseException:
            self.forget()
            raise
        return Learnt(n_tokens, loss, loss_after)

    def forget(self):
        """Puts the weights back as they were when the conversation began, bit for bit. The conversation stays."""
        self.learner.forget()
        self.cached_ids, self.cache = [], None

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: Path):
        """Writes the conversation as finetune.py reads it: a line of JSON. Raises BadInput or OSError."""
        if len(self.history) == len(self.system_messages):
            raise BadInput(f"/save {path}: nothing to save: the conversation has no messages yet")
        check_new(path)
        with atomic_write(path, "w") as file:
            file.write(json.dumps({"messages": self.history}, ensure_ascii=False) + "\n")

    def save_weights(self, path: Path):
        """Writes the weights as they are now as a checkpoint, without a state to resume from. Raises BadInput or OSError."""
        if not self.learner.state.step:
            raise BadInput(f"/save {path}: nothing to save: nothing has been learnt")
        check_new(path)
        save_checkpoint(path, self.learner.to_checkpoint() | {"tokenizer": self.tokenizer.to_json()} | self.provenance)


def check_new(path: Path):
    """Raises BadInput unless /save can write a new file at `path`."""
    check_writable(path, f"/save {path}")
    if path.exists():
        raise BadInput(f"/save {path}: exists: choose another name")


# -- the terminal -----------------------------------------------------------------------------------------------------

def chat_loop(chat: Chat, machine: Machine, first_message: str = ""):
    """Reads messages and commands, and prints answers, until the input ends or one of LEAVE."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 (arrow keys and history for input())
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("/help lists commands")
    while True:
        try:
            line, first_message = first_message or input("> " if sys.stdin.isatty() else ""), ""
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D quits)")
            continue
        if line.strip() in LEAVE:
            return
        try:
            if line.startswith("/"):
                run_command(chat, line)
            elif line.strip():
                print_answer(chat, machine, line)
        except (BadInput, OSError, ArgumentTypeError) as error:
            print(f"({error})")
        except KeyboardInterrupt:  # a second one, which does not wait for the token
            print(" (stopped)")


def run_command(chat: Chat, line: str):
    """line: "/reset", "/save FILE", "/help" or, with a learner, "/forget"; anything else prints the help."""
    name, _, argument = line.partition(" ")
    if name == "/reset":
        chat.reset()
        print("(conversation cleared)")
    elif name == "/forget" and chat.learner is not None:
        chat.forget()
        print("(what was learnt is forgotten, the weights are as they were)")
    elif name == "/save" and (path := argument.strip()):
        (chat.save_weights if chat.learner is not None and path.endswith(".pt") else chat.save)(parse_path(path))
        print(f"(saved to {path})")
    else:
        known = HELP if chat.learner is None else ADAPT_HELP
        print(known if name in ("/save", "/help") else f"({name}: no such command)\n{known}")


def print_answer(chat: Chat, machine: Machine, message: str):
    """Prints the answer as it is generated, after the model has learnt from the message where it has a learner. Ctrl-C stops
    it after the current token."""
    with StopSignals() as stop:
        n_turns = len(chat.turns)
        if chat.learner is not None:
            learn(chat, message)
        with machine.autocast():
            answer = chat.answer(message)
            for text in answer:
                print(text, end="", flush=True)
                if stop.signal:
                    break
            answer.close()
    print(" (stopped)" if stop.signal else "")
    if chat.context_full:
        print("(the context is full: the answer ends here)")
    elif len(chat.turns) <= n_turns:
        print("(the context is full: the oldest turns are dropped)")
    if stop.signal not in (None, signal.SIGINT):
        raise SystemExit(128 + stop.signal)


def learn(chat: Chat, message: str):
    """Learns from a message, and says on a terminal how well. A message that it cannot learn from is answered all the
    same."""
    try:
        learnt = chat.learn(message)
    except FloatingPointError as error:
        print(f"({error}; what was learnt is forgotten)")
    except KeyboardInterrupt:
        print("(what was learnt is forgotten)", end="")
        raise
    else:
        if learnt is not None and sys.stdin.isatty():
            print(f"(learnt from {learnt.tokens:,} tokens: {learnt.loss:.2f} nats/token when read, now "
                  f"{learnt.loss_after:.2f})")


# -- the command ------------------------------------------------------------------------------------------------------

def is_base_model(checkpoint: dict) -> bool:
    """Whether train.py wrote it. Of an imported model nothing is known."""
    training = checkpoint.get("training")
    return isinstance(training, dict) and training.get("script") == "train.py"


def provenance_of(checkpoint: dict) -> dict:
    """The part of a checkpoint that says which command with which flags trained the model; {} of an imported one."""
    training = checkpoint.get("training", {})
    kept = {name: training[name] for name in ("script", "settings") if name in training}
    return {"training": kept} if kept else {}


def start_chat(config: ChatConfig, sampling: SamplingConfig, machine: Machine, adapt: AdaptConfig):
    """Loads the model and runs the conversation. Raises BadInput when the model cannot hold one."""
    path, learner = config.checkpoint_path, None
    checkpoint = load_checkpoint(path)
    if config.adapt:
        # all weights in fp32, to train on
        model, tokenizer, _ = load_pretrained(path, checkpoint, chat=True, loops=config.loops)
        learner = open_learner(model, tokenizer, adapt, machine)
    else:
        model, tokenizer = load_model(path, machine, checkpoint, config.loops)
    with explain_damage(path):
        chat = Chat(model, tokenizer, sampling, config.max_new_tokens, config.system, config.stop, config.seed, learner,
                    provenance_of(checkpoint), config)
    if is_base_model(checkpoint):
        log_line(f"{path} was pretrained and never finetuned: it continues text and does not answer; `python finetune.py "
                 f"--checkpoint_path={path}` makes it a model that does")
    del checkpoint
    chat_loop(chat, machine, config.prompt)


@command
def main(argv=None):
    """Talks with a finetuned model in the terminal."""
    config, adapt, sampling, device_config = parse_flags(main.__doc__, argv, ChatConfig, AdaptConfig, SamplingConfig,
                                                         DeviceConfig)
    require_adapt(config.adapt, adapt)
    machine = open_machine(device_config)
    with explain_failures(lambda: "try a smaller model, or --device=cpu"):
        start_chat(config, sampling, machine, adapt)


if __name__ == "__main__":
    main()
