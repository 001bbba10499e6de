"""Conversations: the cache against a forward pass over the whole conversation, the sliding context, and the terminal."""
import io
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_model import random_model
from test_sampling import ARCHITECTURES, BYTES, END, SHAPE, START, UNFILTERED

import chat as chat_module
from chat import HELP, Chat, chat_loop, main
from conftest import REPO
from model import GPT
from runtime.checkpoint import save_checkpoint
from runtime.config import BadInput
from runtime.device import Machine
from runtime.signals import StopSignals
from sampling import GREEDY, SamplingConfig, sample
from tasks.conversations import ConversationConfig, read_conversations
from tokenizer import ROLES

CPU = Machine(torch.device("cpu"), "fp32")
SYSTEM, USER, ASSISTANT = (BYTES.chat_token_ids()[0][role] for role in ("system", "user", "assistant"))


@pytest.fixture(params=ARCHITECTURES)
def model(request) -> GPT:
    return random_model(**request.param)


@pytest.fixture
def attention_model() -> GPT:
    return random_model(**SHAPE)


def check_logits(monkeypatch, chat: Chat, script: str = "", action=lambda n: None) -> list[list[int]]:
    """Asserts at every token that the cache gives the logits of a forward pass over the whole context without one.

    Returns the context at every token. script: the tokens to answer with, where | ends an answer; "" samples. action(n):
    called before token n.
    """
    contexts, scripted = [], iter(END if byte == ord("|") else byte for byte in script.encode())

    def checked_sample(logits, *others):
        contexts.append(chat.context_ids())
        assert len(contexts[-1]) <= chat.model.config.block_size
        assert torch.allclose(logits, chat.model(torch.tensor(contexts[-1:]))[:, -1], atol=3e-5)
        action(len(contexts))
        return torch.tensor([next(scripted)]) if script else sample(logits, *others)
    monkeypatch.setattr(chat_module, "sample", checked_sample)
    return contexts


def ask(chat: Chat, message: str) -> str:
    return "".join(chat.answer(message))


def encode_turns(*turns: tuple[str, str]) -> list[int]:
    return [i for message, answer in turns for i in (USER, *message.encode(), END, ASSISTANT, *answer.encode(), END)]


# -- context ----------------------------------------------------------------------------------------------------------

def test_history_is_in_the_context(attention_model, monkeypatch):
    chat = Chat(attention_model, BYTES, GREEDY, 8, "be kind")
    contexts, system = check_logits(monkeypatch, chat, "hey|wé|"), [START, SYSTEM, *b"be kind", END]
    assert list(chat.answer("hi")) == ["h", "e", "y", ""] and list(chat.answer("é")) == ["w", "", "é", ""]
    assert contexts[0] == [*system, USER, *b"hi", END, ASSISTANT]
    assert contexts[4] == [*system, *encode_turns(("hi", "hey")), USER, *"é".encode(), END, ASSISTANT]
    assert chat.context_ids() == system + encode_turns(("hi", "hey"), ("é", "wé")) == BYTES.encode_chat(chat.history)[0]
    chat.reset()
    assert chat.context_ids() == system and chat.history == [{"role": "system", "content": "be kind"}]


def test_every_position_is_computed_once(model, monkeypatch):
    """Over several turns, with the logits of a pass without a cache."""
    widths, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, cache=None, **options: (
        widths.append(idx.size(1)) if cache else None) or forward(idx, cache=cache, **options))
    chat = Chat(model, BYTES, UNFILTERED, 5)
    contexts = check_logits(monkeypatch, chat)
    for message in ("hi", "you", ""):
        ask(chat, message)
    assert len(contexts) > 5 and sum(widths) == len(contexts[-1]) and len(widths) == len(contexts)


def test_seed_determines_the_conversation(attention_model):
    conversations = [[ask(chat, message) for message in ("hi", "you")]
                     for chat in (Chat(attention_model, BYTES, UNFILTERED, 9, seed=seed) for seed in (1, 1, 2))]
    assert conversations[0] == conversations[1] != conversations[2]


@pytest.mark.parametrize("system", ["", "be kind"])
def test_full_context_drops_the_oldest_turns(model, monkeypatch, system):
    """Until half of it is free, or only the newest turn is left; the system message stays."""
    turns = [("hello", "one"), ("a", "two"), ("b", ""), ("a long message", "three"), ("c", "4"), ("d", "five"), ("é", "6")]
    chat = Chat(model, BYTES, GREEDY, 20, system)
    system_ids, oldest, n_drops = chat.context_ids(), 0, 0
    contexts = check_logits(monkeypatch, chat, "".join(answer + "|" for _, answer in turns))

    def expected_context(oldest: int, newest: int, n_answered: int) -> list[int]:
        ids = system_ids + encode_turns(*turns[oldest:newest + 1])
        return ids[:len(ids) - 1 - len(turns[newest][1]) + n_answered]

    for i, (message, answer) in enumerate(turns):
        contexts.clear()
        assert ask(chat, message) == answer
        for n_answered, context in enumerate(contexts):
            k, = (k for k in range(oldest, i + 1) if context == expected_context(k, i, n_answered))
            if k > oldest:
                assert len(expected_context(oldest, i, n_answered)) > 40
                assert len(context) <= 20 or k == i
                assert len(expected_context(k - 1, i, n_answered)) > 20  # one turn fewer would not have been enough
                oldest, n_drops = k, n_drops + 1
    assert n_drops >= 2 and len(chat.history) == 14 + len(chat.system_messages)  # /save writes all of it


def test_answer_ends_where_it_fills_the_context(model, monkeypatch):
    chat = Chat(model, BYTES, GREEDY, 100)
    check_logits(monkeypatch, chat, "a" * 35 + "b|")
    # the last token and the end of the turn are beyond the 40 positions
    assert ask(chat, "hi") == "a" * 35 and chat.context_full and len(chat.context_ids()) == 42
    assert ask(chat, "hi") == "b" and not chat.context_full
    assert chat.context_ids() == [START, *encode_turns(("hi", "b"))]


def test_message_longer_than_the_context_is_refused(attention_model, monkeypatch):
    chat = Chat(attention_model, BYTES, GREEDY, 9)
    check_logits(monkeypatch, chat, "one|x")
    ask(chat, "hi")
    with pytest.raises(BadInput, match="the message has 37 tokens, the model's context holds 36: shorten it"):
        ask(chat, "m" * 37)
    assert chat.context_ids() == [START, *encode_turns(("hi", "one"))] and len(chat.history) == 2
    assert ask(chat, "m" * 36) == "x"


def test_system_message_must_leave_room(attention_model):
    with pytest.raises(BadInput, match="--system=ssssssssssssssssssss…: has 37 tokens, .* holds 40: too few"):
        Chat(attention_model, BYTES, GREEDY, 9, "s" * 34)


# -- answers that end early -------------------------------------------------------------------------------------------

def test_closed_answer_stays_in_the_conversation(model, monkeypatch):
    chat = Chat(model, BYTES, GREEDY, 9)
    check_logits(monkeypatch, chat, "onetwo|")
    answer = chat.answer("hi")
    assert [next(answer) for _ in range(3)] == ["o", "n", "e"]
    answer.close()
    assert ask(chat, "go on") == "two"
    turns = encode_turns(("hi", "one"), ("go on", "two"))
    assert chat.context_ids() == [START, *turns] == BYTES.encode_chat(chat.history)[0]


def test_interrupt_within_a_forward_pass_discards_the_cache(model, monkeypatch):
    """The first of two layers has cached a token that the second has not."""
    def interrupt(block, args, result):
        if len(contexts) == 2 and args[4] is not None:  # with a cache: not the pass that it is compared with
            hook.remove()
            raise KeyboardInterrupt
    chat, hook = Chat(model, BYTES, GREEDY, 9), model.blocks[0].register_forward_hook(interrupt)
    contexts = check_logits(monkeypatch, chat, "one|two|")
    with pytest.raises(KeyboardInterrupt):
        ask(chat, "hi")
    assert chat.context_ids() == [START, *encode_turns(("hi", "on"))] == BYTES.encode_chat(chat.history)[0]
    assert ask(chat, "again") == "e" and ask(chat, "and again") == "two"


def test_stop_string_ends_an_answer(attention_model, monkeypatch):
    chat = Chat(attention_model, BYTES, GREEDY, 9, stop=["\n\n"])
    check_logits(monkeypatch, chat, "one\n\ntwo\n|")
    assert list(chat.answer("hi")) == ["o", "n", "e", "", ""] and list(chat.answer("hi")) == ["t", "w", "o", "", "\n"]
    assert [message["content"] for message in chat.history] == ["hi", "one", "hi", "two\n"]
    assert chat.context_ids() == [START, *encode_turns(("hi", "one"), ("hi", "two\n"))]  # without the stop string


def test_repetition_penalty_spares_special_tokens(attention_model, monkeypatch):
    chat, seen = Chat(attention_model, BYTES, SamplingConfig(repetition_penalty=2.0), 1), []
    monkeypatch.setattr(chat_module, "sample",
                        lambda *args: seen.append(args[3].nonzero()[:, 1].tolist()) or sample(*args))
    ask(chat, "hi")
    assert seen == [sorted(b"hi")]


# -- the terminal -----------------------------------------------------------------------------------------------------

def type_lines(monkeypatch, *lines: str):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_saved_conversations_can_be_finetuned_on(attention_model, monkeypatch, tmp_path):
    chat = Chat(attention_model, BYTES, GREEDY, 9, "be \udce9")
    check_logits(monkeypatch, chat, "wé|two|")
    ask(chat, "é\udce9")  # a lone surrogate, as terminals deliver bytes that are not UTF-8
    chat.save(tmp_path / "a.jsonl")
    chat.reset()
    ask(chat, "and?")
    chat.save(tmp_path / "b.jsonl")
    with pytest.raises(BadInput, match=r"/save .*a.jsonl: exists: choose another name"):
        chat.save(tmp_path / "a.jsonl")
    train, held_out = read_conversations(ConversationConfig(dataset=str(tmp_path)), ROLES)
    assert sorted([message["content"] for message in one.messages] for one in train + held_out) == [
        ["be \ufffd", "and?", "two"], ["be \ufffd", "é\ufffd", "wé"]]
    assert [message["role"] for message in train[0].messages] == ["system", "user", "assistant"]


def test_conversation_from_a_pipe(attention_model, monkeypatch, capsys, tmp_path):
    chat, path = Chat(attention_model, BYTES, GREEDY, 9), tmp_path / "saved.jsonl"
    check_logits(monkeypatch, chat, "first|one|full|two|")
    type_lines(monkeypatch, "hi", "  ", "/unknown", "/save", f"/save  {path} ", f"/save {path}", "m" * 37, "m" * 20,
               "/reset", "you")
    chat_loop(chat, CPU, "hello")
    assert capsys.readouterr().out.splitlines() == [
        "first", "one", "(/unknown: no such command)", *HELP.splitlines() * 2, f"(saved to {path})",
        f"(/save {path}: exists: choose another name)",
        "(the message has 37 tokens, the model's context holds 36: shorten it)",
        "full", "(the context is full: the oldest turns are dropped)", "(conversation cleared)", "two", ""]
    assert len(json.loads(path.read_text())["messages"]) == 4
    assert chat.context_ids() == [START, *encode_turns(("you", "two"))]


def test_any_signal_stops_the_answer_and_all_but_sigint_quit(attention_model, monkeypatch, capsys):
    chat, numbers = Chat(attention_model, BYTES, GREEDY, 9), {2: signal.SIGINT, 6: signal.SIGTERM}
    check_logits(monkeypatch, chat, "abcdefgh", lambda n: n in numbers and signal.raise_signal(numbers[n]))
    type_lines(monkeypatch, "one", "two", "three")
    with pytest.raises(SystemExit) as stop:
        chat_loop(chat, CPU)
    assert stop.value.code == 128 + signal.SIGTERM and capsys.readouterr().out == "ab (stopped)\ncdef (stopped)\n"
    assert chat.context_ids() == [START, *encode_turns(("one", "ab"), ("two", "cdef"))]


def test_second_ctrl_c_does_not_quit(attention_model, monkeypatch, capsys):
    monkeypatch.setattr(StopSignals, "DEBOUNCE_SECONDS", 0.0)
    chat = Chat(attention_model, BYTES, GREEDY, 9)
    check_logits(monkeypatch, chat, "abtwo|", lambda n: n == 2 and [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    type_lines(monkeypatch, "hello", "hi")
    try:
        chat_loop(chat, CPU)
    except KeyboardInterrupt:
        pytest.fail("the program quit")  # the exception itself would end pytest
    assert chat.history[-1]["content"] == "btwo"


def test_save_reports_an_unknown_home(attention_model, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    type_lines(monkeypatch, "/save ~nobody-of-this-name/a.jsonl", "/reset")
    chat_loop(Chat(attention_model, BYTES, GREEDY, 3), CPU)
    assert "~nobody-of-this-name/a.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["/quit", "/exit", " /bye "])
def test_a_conversation_ends_by_the_usual_words(attention_model, monkeypatch, capsys, line):
    type_lines(monkeypatch, line, "/reset")
    chat_loop(Chat(attention_model, BYTES, GREEDY, 3), CPU)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("system", ["", "be kind"])
def test_a_conversation_without_messages_is_not_saved(attention_model, monkeypatch, capsys, tmp_path, system):
    path = tmp_path / "chat.jsonl"
    type_lines(monkeypatch, f"/save {path}", "hi", "/reset", f"/save {path}", "again", f"/save {path}")
    chat_loop(Chat(attention_model, BYTES, GREEDY, 3, system), CPU)
    assert capsys.readouterr().out.count("nothing to save") == 2
    assert [message["content"] for message in json.loads(path.read_text())["messages"]][bool(system)] == "again"


@pytest.mark.parametrize("script, said", [("train.py", True), ("finetune.py", False), (None, False)])
def test_a_model_that_was_never_finetuned_is_named_as_such(attention_model, monkeypatch, capsys, tmp_path, script, said):
    training = {"training": {"script": script, "settings": {}}} if script else {}
    save_checkpoint(tmp_path / "a.pt", attention_model.to_checkpoint() | {"tokenizer": BYTES.to_json()} | training)
    type_lines(monkeypatch, "hi", "more")
    main([f"--checkpoint_path={tmp_path / 'a.pt'}", "--device=cpu", "--max_new_tokens=3"])
    assert capsys.readouterr().err.count("never finetuned") == said


def save_model(model: GPT, path):
    save_checkpoint(path, {**model.to_checkpoint(), "tokenizer": BYTES.to_json()})
    return path


@pytest.fixture
def flags(attention_model, tmp_path) -> list[str]:
    return [f"--checkpoint_path={save_model(attention_model, tmp_path / 'tiny.pt')}", "--device=cpu"]


def test_command(flags, monkeypatch, capsys):
    answers = iter(b"one.12345")
    monkeypatch.setattr(chat_module, "sample", lambda *args: torch.tensor([next(answers)]))
    type_lines(monkeypatch, "/reset", "go on")
    main([*flags, "--system=be kind", "--prompt=hi", "--max_new_tokens=4", "--stop", "."])
    assert capsys.readouterr().out == "one\n(conversation cleared)\n1234\n\n"


@pytest.mark.parametrize("given, words", [
    (["--stop="], "--stop: one of its strings is empty"), (["--num_samples=2"], "--num_samples=2: no such flag"),
    ([f"--system={'s' * 50}"], "tiny.pt: --system=ssssssssssssssssssss…: has 53 tokens"),
    (["--checkpoint_path=none.pt"], "none.pt: no checkpoint")], ids=str)
def test_bad_flags_are_refused(flags, refused, given, words):
    refused(main, [*flags, *given], words)


def test_line_that_is_not_utf8(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhi\n"), encoding="utf-8"))
    main([*flags, "--max_new_tokens=3"])
    assert len(capsys.readouterr().out.splitlines()) >= 2  # both lines were answered


class Terminal:
    """A program in a pseudo-terminal of its own."""

    def __init__(self, *command: str):
        fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
        self.keys, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))  # so that Ctrl-C is a signal
        os.close(terminal)
        self.unread = ""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.keys)

    def type(self, text: str):
        os.write(self.keys, text.encode())

    def wait_for(self, words: str, retry: str = ""):
        """Waits until the screen shows these words after those waited for before. retry: typed after a second without."""
        deadline = time.monotonic() + 60
        while words not in self.unread:
            assert time.monotonic() < deadline, f"no {words} in {self.unread}"
            if select.select([self.keys], [], [], 1.0)[0]:
                self.unread += os.read(self.keys, 1 << 16).decode(errors="replace")
            else:
                self.type(retry)
        self.unread = self.unread.partition(words)[2]


@pytest.mark.integration
@torch.no_grad()
def test_conversation_in_a_terminal(tmp_path):
    """Ctrl-C, Ctrl-D and the commands, with a model that answers aaaa… without an end."""
    model = random_model(**SHAPE | {"block_size": 100_000, "mixer": "gated_delta", "norm": "layer", "bias": True})
    model.norm.weight.zero_()
    model.norm.bias.fill_(1.0)
    model.head.weight.copy_(torch.arange(BYTES.vocab_size)[:, None] == ord("a"))
    path, saved = save_model(model, tmp_path / "endless.pt"), tmp_path / "saved.jsonl"
    with Terminal(str(REPO / "chat.py"), f"--checkpoint_path={path}", "--device=cpu", "--max_new_tokens=90000",
                  "--temperature=0") as terminal:
        for typed, shown in (("", "/help lists commands"), ("half a line\x03", "(Ctrl-D quits)"),
                             ("hello\n", "aaaa"), ("\x03", " (stopped)"), ("more\n", "aaaa"), ("\x03", " (stopped)"),
                             (f"/save {saved}\n", "(saved to"), ("/reset\n", "(conversation cleared)")):
            terminal.type(typed)
            # Python misses a signal that arrives just after it has shown the prompt, until the next key
            terminal.wait_for(shown, retry="\x03" if "Ctrl-D" in shown else "")
            if shown != "aaaa":
                terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=120) == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["hello", "more"]
    assert all(set(message["content"]) == {"a"} and len(message["content"]) < 90_000 for message in messages[1::2])
