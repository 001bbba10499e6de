import codecs
import io
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_model import GPT2, LLAMA, random_model

import generate as script
import sampling
from chat import Chat, talk
from conftest import REPO
from generate import main
from model import GPT
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.config import BadInput
from runtime.signals import StopSignals
from sampling import GREEDY, SamplingConfig, TextStream, generate, generate_text, generate_texts, sample
from tasks.conversations import ConversationConfig, read_conversations
from tokenizer import Tokenizer

BYTES = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, "default")  # every byte is a token: é takes two
START, END = BYTES.separator_id, BYTES.chat_ids()[1]
SYSTEM, USER, ASSISTANT = BYTES.chat_ids()[0].values()
RANDOM = SamplingConfig(temperature=1.0, top_k=0)
SHAPE = {"vocab_size": BYTES.vocab_size, "block_size": 40, "tied": False}  # a tied model of random weights repeats itself
ARCHITECTURES = [pytest.param(SHAPE | switches, id=name) for name, switches in {
    "attention": {}, "gated_delta": {"mixer": "gated_delta"}, "DA": {"mixer": "DA"}, "gpt2": GPT2, "llama": LLAMA}.items()]


@pytest.fixture(params=ARCHITECTURES)
def model(request) -> GPT:
    return random_model(**request.param)


@pytest.fixture
def plain() -> GPT:
    return random_model(**SHAPE)


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (n,), generator=generator) for n in lengths]


def made_by(model: GPT, prompts: list[torch.Tensor], n: int, sampling=GREEDY, seed: int = 0) -> list[list[int]]:
    """The new tokens of each row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(list(generate(model, prompts, n, sampling, generator)), dim=1).tolist()


@torch.no_grad()
def made_without_cache(model: GPT, prompts: list[torch.Tensor], n: int, penalize=lambda ids, logits: logits):
    """The likeliest, row by row, by a forward of all that the documented cache would hold at each token."""
    block_size, wholes = model.config.block_size, list(prompts)
    texts = [prompt[-block_size:] for prompt in prompts]
    for _ in range(n):
        if max(map(len, texts)) > block_size:
            texts = [text[-max(1, block_size // 2):] for text in texts]
        new = [penalize(whole[None], model(text[None])[:, -1]).argmax(-1) for whole, text in zip(wholes, texts)]
        texts, wholes = ([torch.cat(pair) for pair in zip(rows, new)] for rows in (texts, wholes))
    return [whole[len(prompt):].tolist() for whole, prompt in zip(wholes, prompts)]


# -- tokens -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lengths", [(5, 5, 5), (1, 20, 7), (9, 3, 9)])
def test_rows_equal_each_alone_and_without_a_cache(model, lengths):
    prompts = prompts_of(*lengths)
    made = made_by(model, prompts, 15)
    assert made == made_without_cache(model, prompts, 15) == [made_by(model, [prompt], 15)[0] for prompt in prompts]
    assert len({tuple(row) for row in made}) == 3 and len({*made[0], *made[1], *made[2]}) > 6  # they say something


@pytest.mark.parametrize("lengths", [(36,), (50,), (40, 3, 17), (90, 1), (2, 25, 38)])
def test_goes_on_beyond_the_context(model, lengths):
    """When the cache is full it starts again, twice here, from the last half of each text."""
    prompts = prompts_of(*lengths)
    assert made_by(model, prompts, 55) == made_without_cache(model, prompts, 55)


def test_the_smallest_context():
    model, prompts = random_model(**SHAPE | {"block_size": 1}), prompts_of(3)
    assert made_by(model, prompts, 6) == made_without_cache(model, prompts, 6)


def test_one_position_is_computed_a_token(plain, monkeypatch):
    widths, forward = [], plain.forward
    monkeypatch.setattr(plain, "forward", lambda idx, **options: widths.append(idx.size(1)) or forward(idx, **options))
    made_by(plain, prompts_of(30), 25)
    assert widths == [30, *[1] * 10, 20, *[1] * 13]  # the last token is not taken in


def test_same_seed_same_text_and_rows_differ(plain):
    runs = [made_by(plain, prompts_of(4) * 3, 12, RANDOM, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] and len({tuple(row) for row in runs[0] + runs[2]}) == 6


@torch.no_grad()
def test_each_row_follows_the_probabilities_after_its_own_text(plain):
    prompts = prompts_of(3, 8)
    rows = torch.tensor(made_by(plain, prompts * 10_000, 1, SamplingConfig(temperature=0.7, top_k=3))).view(-1, 2)
    for prompt, drawn in zip(prompts, rows.T):
        values, ids = plain(prompt[None])[0, -1].topk(3)
        expected = torch.zeros(BYTES.vocab_size).scatter_(0, ids, (values / 0.7).softmax(0))
        assert torch.allclose(drawn.bincount(minlength=BYTES.vocab_size) / 10_000, expected, atol=0.02)


def test_the_repetition_penalty_is_for_the_prompt_and_what_was_made(model):
    oracle = logits_processors().RepetitionPenaltyLogitsProcessor(1.5)
    prompts, sampling = prompts_of(4, 11), SamplingConfig(temperature=0, repetition_penalty=1.5)
    assert made_by(model, prompts, 20, sampling) == made_without_cache(model, prompts, 20, oracle)


def logits_processors():
    return pytest.importorskip("transformers.generation.logits_process")


def drawn(logits: torch.Tensor, sampling: SamplingConfig, seen=None, n: int = 20_000) -> torch.Tensor:
    """(B, V) -> (B, V): how often each token comes."""
    repeated = [None if part is None else part.repeat_interleave(n, dim=0) for part in (logits, seen)]
    ids = sample(repeated[0], sampling, torch.Generator().manual_seed(0), repeated[1]).view(-1, n)
    return torch.stack([row.bincount(minlength=logits.size(-1)) for row in ids]) / n


@pytest.mark.parametrize("switches", [
    {}, {"temperature": 1.7}, {"top_k": 3}, {"top_k": 1}, {"top_k": 99}, {"top_p": 0.7}, {"top_p": 1e-6},
    {"min_p": 0.3}, {"min_p": 1.0}, {"repetition_penalty": 1.8}, {"repetition_penalty": 0.5}, {"top_k": 5, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3}], ids=str)
def test_sampling_equals_transformers(switches):
    """The same tokens are possible, and they come as often."""
    oracle, sampling = logits_processors(), SamplingConfig(**{"temperature": 1.0, "top_k": 0} | switches)
    logits = torch.rand(10, 12, generator=torch.Generator().manual_seed(3)) * 3 - 1
    before = torch.arange(20).view(10, 2) % 12  # the text of each row
    warpers = [oracle.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
               oracle.TemperatureLogitsWarper(sampling.temperature), oracle.TopKLogitsWarper(sampling.top_k or 12),
               oracle.TopPLogitsWarper(sampling.top_p), oracle.MinPLogitsWarper(sampling.min_p)]
    expected = oracle.LogitsProcessorList(warpers)(before, logits.clone()).softmax(-1)
    frequencies = drawn(logits, sampling, torch.zeros(10, 12, dtype=torch.bool).scatter_(1, before, True))
    assert torch.equal(frequencies > 0, expected > 0)
    assert torch.allclose(frequencies, expected, atol=0.015)


@pytest.mark.parametrize("switches, expected", [
    ({}, [0.15, 0.5, 0.05, 0.3]), ({"top_k": 2}, [0, 5 / 8, 0, 3 / 8]), ({"top_p": 0.79}, [0, 5 / 8, 0, 3 / 8]),
    ({"top_p": 0.81}, [3 / 19, 10 / 19, 0, 6 / 19]), ({"min_p": 0.31}, [0, 5 / 8, 0, 3 / 8]),
    ({"top_k": 3, "top_p": 0.83}, [0, 5 / 8, 0, 3 / 8]),  # of three tokens, the first two have 16/19 = 0.84
    ({"temperature": 0.5}, [9 / 146, 100 / 146, 1 / 146, 36 / 146]),
    ({"temperature": 0.0}, [0, 1, 0, 0]), ({"temperature": 1e-9}, [0, 1, 0, 0])], ids=str)
def test_sampling_by_hand(switches, expected):
    sampling = SamplingConfig(**{"temperature": 1.0, "top_k": 0} | switches)
    frequencies = drawn(torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log(), sampling)[0].tolist()
    assert frequencies == pytest.approx(expected, abs=0.015) and [f > 0 for f in frequencies] == [e > 0 for e in expected]


# -- text -------------------------------------------------------------------------------------------------------------

def stream_of(pieces: list[bytes], stop: list[str]) -> TextStream:
    """Token i is the i-th piece; -1 is special."""
    return TextStream(SimpleNamespace(special_tokens={"<|end|>": -1}, decode_bytes=lambda ids: pieces[ids[0]]), stop)


def streamed(*pieces: bytes, stop=()) -> list[str]:
    """What each token lets through, and the end."""
    stream, out = stream_of(pieces, stop), []
    for i in range(len(pieces)):
        if not stream.is_done:
            out.append(stream.push(i))
    return out if stream.is_done else [*out, stream.finish()]


def test_bytes_that_are_not_yet_characters_are_held_back():
    assert streamed(b"n\xc3", b"\xa9", b"\xf0\x9f", b"\x99", b"\x82!", b"\xc3") == ["n", "é", "", "", "🙂!", "", "\ufffd"]
    assert streamed(b"a\xff", b"\xc3", b"b") == ["a\ufffd", "", "\ufffdb", ""]


def test_stop_texts_by_hand():
    assert streamed(b"one ST", b"O", b"P two", b"three", stop=["STOP"]) == ["one ", "", ""]
    assert streamed(b"one ST", b"O", b"RE", stop=["STOP"]) == ["one ", "", "STORE", ""]  # it was not one
    assert streamed(b"one ST", b"O", stop=["STOP"]) == ["one ", "", "STO"]               # nor will it be
    assert streamed(b"a", b"a", b"a", b"c", stop=["aac"]) == ["", "", "a", ""]           # what is held back moves on
    assert streamed(b"caf\xc3", b"\xa9 x", stop=["fé"]) == ["ca", ""]
    assert streamed(b"x STOP \n\n", stop=["\n\n", "STOP"]) == ["x "]


def test_special_tokens_end_it_and_let_go_of_what_was_held():
    stream = stream_of([b"ab\xc3"], ["bc", "b\ufffd!"])
    assert (stream.push(0), stream.is_done, stream.push(-1), stream.is_done) == ("a", False, "b\ufffd", True)


@given(st.text("ab🙂é", max_size=12), st.sets(st.integers(1, 40), max_size=6),
       st.lists(st.text("ab🙂é", min_size=1, max_size=4), max_size=3))
def test_any_text_in_any_pieces_ends_at_the_first_stop_text(text, cuts, stop):
    """And as early as can be: what is held back may yet become a stop text, or a character."""
    assume(not any(a in b[1:] for a in stop for b in stop))  # of those the next test tells
    utf8 = text.encode()
    pieces = [utf8[i:j] for i, j in itertools.pairwise([0, *sorted(cut for cut in cuts if cut < len(utf8)), len(utf8)])]
    stream, decoder, came, out = stream_of(pieces, stop), codecs.getincrementaldecoder("utf-8")(), "", ""
    for i, piece in enumerate(pieces):
        came, out = came + decoder.decode(piece), out + stream.push(i)
        if stream.is_done:
            break
        assert came.startswith(out) and any(one.startswith(came[len(out):]) for one in [*stop, ""])
    out += "" if stream.is_done else stream.finish()
    assert out == text[:min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]


def test_where_a_text_ends_does_not_depend_on_its_pieces():
    assert "".join(streamed(b"xabcd", stop=["abc", "b"])) == "".join(streamed(*[b"x", b"a", b"b", b"c"], stop=["abc", "b"]))


def play(monkeypatch, *rows: list[int]) -> list[list[int]]:
    """generate() gives these tokens, to each row its own. Returns those that were taken, as they are."""
    taken = []
    monkeypatch.setattr(script, "generate", lambda *args: (
        taken.append(list(column)) or torch.tensor(column) for column in zip(*rows)))
    return taken


def test_rows_end_each_at_its_own_place(plain, monkeypatch):
    taken = play(monkeypatch, [*b"ab", START, *b"xxx"], [*b"cSTOP!"], [0xC3, 0xA9, *b"d", END, *b"ef"])
    pieces = list(generate_texts(plain, BYTES, [[START]] * 3, 6, GREEDY, ["STOP"]))
    assert pieces == [(0, "a"), (1, "c"), (0, "b"), (2, "é"), (2, "d")]
    assert len(taken) == 5  # then all had ended
    play(monkeypatch, [*b"aST"], [*b"b\xc3\xa9"])
    pieces = list(generate_texts(plain, BYTES, [[START]] * 2, 3, GREEDY, ["STOP"]))
    assert pieces == [(0, "a"), (1, "b"), (1, "é"), (0, "ST")]


def test_text_follows_the_start_of_a_document_and_the_prompt(plain, monkeypatch):
    made = made_by(plain, [torch.tensor([START, *"é!".encode()])], 9, RANDOM, seed=5)[0]
    assert max(made) < 256  # no special token among them
    assert "".join(generate_text(plain, BYTES, "é!", 9, RANDOM, seed=5)) == BYTES.decode(made)
    taken = play(monkeypatch, b"one")
    text = generate_text(plain, BYTES, "", 3, GREEDY)
    assert taken == [] and next(text) == "o" and taken == [[ord("o")]] and "".join(text) == "ne"  # as it is made


def test_a_prompt_fills_the_context_or_is_refused(plain):
    assert sampling.document_start(plain, BYTES, "a" * 39) == [START, *b"a" * 39]
    with pytest.raises(BadInput, match="--prompt=aaaaaaaaaaaaaaaaaaaa…: has 40 tokens, .* holds 39: shorten it"):
        next(generate_text(plain, BYTES, "a" * 40, 5, GREEDY))


def test_samples_stand_one_below_the_other_and_the_first_comes_as_it_is_made(capsys):
    def pieces():
        assert capsys.readouterr().out == "--- 1 of 3 ---\nhey"
        yield 0, " you"
        assert capsys.readouterr().out == " you"
        yield from [(2, " th"), (1, " two"), (0, "!"), (2, "ree")]
    script.print_samples(pieces(), 3, "hey")
    assert capsys.readouterr().out == "!\n--- 2 of 3 ---\nhey two\n--- 3 of 3 ---\nhey three\n"
    script.print_samples(iter([(0, " you")]), 1, "hey")
    assert capsys.readouterr().out == "hey you\n"


# -- conversation -----------------------------------------------------------------------------------------------------

def watch(monkeypatch, chat: Chat, answers: str = "", act=lambda n: None) -> list[list[int]]:
    """At every token, what the cache gives is what a forward of the whole conversation without one gives. Returns the ids
    that the model saw, a list a token. answers: what it says, | ends one; else it is sampled. act(n): before token n."""
    steps, said = [], iter(END if byte == ord("|") else byte for byte in answers.encode())

    def watched(logits, *others):
        steps.append(chat.ids())
        assert len(steps[-1]) <= chat.model.config.block_size
        assert torch.allclose(logits, chat.model(torch.tensor(steps[-1:]))[:, -1], atol=3e-5)
        act(len(steps))
        return torch.tensor([next(said)]) if answers else sample(logits, *others)
    monkeypatch.setattr(script, "sample", watched)
    return steps


def log_line(chat: Chat, message: str) -> str:
    return "".join(chat.answer(message))


def turns_of(*turns: tuple[str, str]) -> list[int]:
    return [i for message, answer in turns for i in (USER, *message.encode(), END, ASSISTANT, *answer.encode(), END)]


def test_the_history_is_in_the_prompt(plain, monkeypatch):
    chat = Chat(plain, BYTES, GREEDY, 8, "be kind")
    steps, head = watch(monkeypatch, chat, "hey|wé|"), [START, SYSTEM, *b"be kind", END]
    assert list(chat.answer("hi")) == ["h", "e", "y", ""] and list(chat.answer("é")) == ["w", "", "é", ""]
    assert steps[0] == [*head, USER, *b"hi", END, ASSISTANT]
    assert steps[4] == [*head, *turns_of(("hi", "hey")), USER, *"é".encode(), END, ASSISTANT]
    assert chat.ids() == head + turns_of(("hi", "hey"), ("é", "wé")) == BYTES.encode_chat(chat.messages)[0]
    chat.reset()
    assert chat.ids() == head and chat.messages == [{"role": "system", "content": "be kind"}]


def test_answers_with_the_cache_equal_those_without(model, monkeypatch):
    """Over several turns, of which every position is computed once."""
    widths, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, cache=None, **options: (
        widths.append(idx.size(1)) if cache else None) or forward(idx, cache=cache, **options))
    chat = Chat(model, BYTES, RANDOM, 5)
    steps = watch(monkeypatch, chat)
    for message in ("hi", "you", ""):
        log_line(chat, message)
    assert len(steps) > 5 and sum(widths) == len(steps[-1]) and len(widths) == len(steps)


def test_the_same_seed_says_the_same(plain):
    said = [[log_line(chat, message) for message in ("hi", "you")]
            for chat in (Chat(plain, BYTES, RANDOM, 9, seed=seed) for seed in (1, 1, 2))]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("system", ["", "be kind"])
def test_the_context_slides_by_whole_turns(model, monkeypatch, system):
    """Half of it becomes free, if the newest turn lets it; what was told as system stays."""
    turns = [("hello", "one"), ("a", "two"), ("b", ""), ("a long message", "three"), ("c", "4"), ("d", "five"), ("é", "6")]
    chat = Chat(model, BYTES, GREEDY, 20, system)
    head, first, n_slides = chat.ids(), 0, 0
    steps = watch(monkeypatch, chat, "".join(answer + "|" for _, answer in turns))
    for i, (message, answer) in enumerate(turns):
        del steps[:]
        assert log_line(chat, message) == answer
        for n_said, step in enumerate(steps):
            seen = lambda k: (head + turns_of(*turns[k:i], turns[i]))[:-1 - len(answer) + n_said]  # noqa: B023
            k, = (k for k in range(first, i + 1) if step == seen(k))
            if k > first:
                assert len(seen(first)) > 40 and (len(step) <= 20 or k == i) and len(seen(k - 1)) > 20
                first, n_slides = k, n_slides + 1
    assert n_slides >= 2 and len(chat.messages) == 14 + len(chat.told)  # /save writes all of it


def test_an_answer_ends_where_it_fills_the_context(model, monkeypatch):
    chat = Chat(model, BYTES, GREEDY, 100)
    watch(monkeypatch, chat, "a" * 35 + "b|")
    assert log_line(chat, "hi") == "a" * 35 and len(chat.ids()) == 42  # the last token, and the end, were not taken in
    assert log_line(chat, "hi") == "b" and chat.ids() == [START, *turns_of(("hi", "b"))]


def test_a_message_longer_than_the_context_is_forgotten(plain, monkeypatch):
    chat = Chat(plain, BYTES, GREEDY, 9)
    watch(monkeypatch, chat, "one|x")
    log_line(chat, "hi")
    with pytest.raises(BadInput, match="the message has 37 tokens, the model's context holds 36: shorten it"):
        log_line(chat, "m" * 37)
    assert chat.ids() == [START, *turns_of(("hi", "one"))] and len(chat.messages) == 2
    assert log_line(chat, "m" * 36) == "x"
    with pytest.raises(BadInput, match="--system=ssssssssssssssssssss…: has 37 tokens, .* holds 40: too few"):
        Chat(plain, BYTES, GREEDY, 9, "s" * 34)


def test_an_answer_that_is_left_goes_on_from_there(model, monkeypatch):
    chat = Chat(model, BYTES, GREEDY, 9)
    watch(monkeypatch, chat, "onetwo|")
    answer = chat.answer("hi")
    assert [next(answer) for _ in range(3)] == ["o", "n", "e"]
    answer.close()
    assert log_line(chat, "go on") == "two"
    assert chat.ids() == [START, *turns_of(("hi", "one"), ("go on", "two"))] == BYTES.encode_chat(chat.messages)[0]


def test_an_interrupt_in_mid_step_leaves_a_conversation(model, monkeypatch):
    """One of the two layers has taken in a token that the other has not."""
    def interrupt(block, args, result):
        if len(steps) == 2 and args[4] is not None:  # the cache: not the forward that it is compared with
            hook.remove()
            raise KeyboardInterrupt
    chat, hook = Chat(model, BYTES, GREEDY, 9), model.blocks[0].register_forward_hook(interrupt)
    steps = watch(monkeypatch, chat, "one|two|")
    with pytest.raises(KeyboardInterrupt):
        log_line(chat, "hi")
    assert chat.ids() == [START, *turns_of(("hi", "on"))] == BYTES.encode_chat(chat.messages)[0]
    assert log_line(chat, "again") == "e" and log_line(chat, "and again") == "two"


def test_stop_texts_end_an_answer(plain, monkeypatch):
    chat = Chat(plain, BYTES, GREEDY, 9, stop=["\n\n"])
    watch(monkeypatch, chat, "one\n\ntwo\n|")
    assert list(chat.answer("hi")) == ["o", "n", "e", "", ""] and list(chat.answer("hi")) == ["t", "w", "o", "", "\n"]
    assert [message["content"] for message in chat.messages] == ["hi", "one", "hi", "two\n"]
    assert chat.ids() == [START, *turns_of(("hi", "one"), ("hi", "two\n"))]  # the model knows what was shown


def test_the_repetition_penalty_spares_the_tokens_that_end_an_answer(plain, monkeypatch):
    chat, seen = Chat(plain, BYTES, SamplingConfig(repetition_penalty=2.0), 1), []
    monkeypatch.setattr(script, "sample", lambda *args: seen.append(args[3].nonzero()[:, 1].tolist()) or sample(*args))
    log_line(chat, "hi")
    assert seen == [sorted(b"hi")]


def test_saved_conversations_can_be_learnt_from(plain, monkeypatch, tmp_path):
    chat = Chat(plain, BYTES, GREEDY, 9, "be kind")
    watch(monkeypatch, chat, "wé|two|")
    for message, name in (("é\udce9", "a.jsonl"), ("and?", "b.jsonl")):  # the first as a shell may give it, no Unicode
        log_line(chat, message)
        chat.save(tmp_path / name)
        if name == "a.jsonl":
            chat.reset()
    with pytest.raises(BadInput, match=r"/save .*a.jsonl: exists: choose another name"):
        chat.save(tmp_path / "a.jsonl")
    found = sum(read_conversations(ConversationConfig(dataset=str(tmp_path))), [])
    assert sorted([message["content"] for message in one.messages] for one in found) == [
        ["be kind", "and?", "two"], ["be kind", "é\ufffd", "wé"]]
    assert [message["role"] for message in found[0].messages] == ["system", "user", "assistant"]


# -- the terminal -----------------------------------------------------------------------------------------------------

def lines(monkeypatch, *typed: str):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in typed)))


def test_a_conversation_from_a_pipe(plain, monkeypatch, capsys, tmp_path):
    chat, path = Chat(plain, BYTES, GREEDY, 9), tmp_path / "saved.jsonl"
    watch(monkeypatch, chat, "first|one|full|two|")
    typed = ["hi", "  ", "/unknown", "/save", f"/save  {path} ", f"/save {path}", "m" * 37, "m" * 20, "/reset", "you"]
    lines(monkeypatch, *typed)
    talk(chat, "hello")
    assert capsys.readouterr().out.splitlines() == [
        "first", "one", *chat.COMMANDS.splitlines() * 2, f"(written to {path})",
        f"(/save {path}: exists: choose another name)",
        "(the message has 37 tokens, the model's context holds 36: shorten it)",
        "full", "(the context is full: the oldest turns are forgotten)", "(forgotten)", "two", ""]
    assert len(json.loads(path.read_text())["messages"]) == 4 and chat.ids() == [START, *turns_of(("you", "two"))]


def test_a_signal_stops_the_answer_and_only_sigint_leaves_the_program(plain, monkeypatch, capsys):
    chat, numbers = Chat(plain, BYTES, GREEDY, 9), {2: signal.SIGINT, 6: signal.SIGTERM}
    watch(monkeypatch, chat, "abcdefgh", lambda n: n in numbers and signal.raise_signal(numbers[n]))
    lines(monkeypatch, "one", "two", "three")
    with pytest.raises(SystemExit) as stop:
        talk(chat, "")
    assert stop.value.code == 128 + signal.SIGTERM and capsys.readouterr().out == "ab (stopped)\ncdef (stopped)\n"
    assert chat.ids() == [START, *turns_of(("one", "ab"), ("two", "cdef"))]


class Terminal:
    """A program in a terminal of its own, to type into."""

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

    def read_to(self, words: str, again: str = ""):
        """Waits for these words on the screen, after those it has waited for before. again: typed after a second without."""
        end = time.monotonic() + 60
        while words not in self.unread:
            assert time.monotonic() < end, f"no {words} in {self.unread}"
            if select.select([self.keys], [], [], 1.0)[0]:
                self.unread += os.read(self.keys, 1 << 16).decode(errors="replace")
            else:
                self.type(again)
        self.unread = self.unread.partition(words)[2]


def checkpoint_of(model: GPT, path):
    save_checkpoint(path, {**model.to_checkpoint(), "tokenizer": BYTES.to_json()})
    return path


@torch.no_grad()
def test_a_conversation_in_a_terminal(tmp_path):
    """With a model that says a, for ever."""
    model = random_model(**SHAPE | {"block_size": 100_000, "mixer": "gated_delta", "norm": "layer", "bias": True})
    model.norm.weight.zero_()
    model.norm.bias.fill_(1.0)
    model.head.weight.copy_(torch.arange(BYTES.vocab_size)[:, None] == ord("a"))
    path, saved = checkpoint_of(model, tmp_path / "endless.pt"), tmp_path / "said.jsonl"
    with Terminal(str(REPO / "generate.py"), "--chat", f"--checkpoint_path={path}", "--device=cpu",
                  "--max_new_tokens=90000", "--temperature=0") as terminal:
        for typed, shown in (("", "/help lists commands"), ("half a line\x03", "(Ctrl-D ends the program)"),
                             ("hello\n", "aaaa"), ("\x03", " (stopped)"), ("more\n", "aaaa"), ("\x03", " (stopped)"),
                             (f"/save {saved}\n", "(written to"), ("/reset\n", "(forgotten)")):
            terminal.type(typed)
            # Python misses a signal that comes just after it has shown the prompt, until the next key
            terminal.read_to(shown, again="\x03" if "Ctrl-D" in shown else "")
            if shown != "aaaa":
                terminal.read_to("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=120) == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["hello", "more"]
    assert all(set(message["content"]) == {"a"} and len(message["content"]) < 90_000 for message in messages[1::2])


# -- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture
def flags(plain, tmp_path) -> list[str]:
    return [f"--checkpoint_path={checkpoint_of(plain, tmp_path / 'tiny.pt')}", "--device=cpu"]


def test_command_continues_a_prompt(run_train, capsys):
    path = run_train("--max_iter=1")
    capsys.readouterr()

    def out(*more):
        main([f"--checkpoint_path={path}", "--device=cpu", "--prompt=The numpy array", "--max_new_tokens=20", *more])
        return capsys.readouterr().out
    first = out("--seed=3")
    assert first.startswith("The numpy array") and first.endswith("\n") and len(first) > 30
    assert out("--seed=3") == first != out("--seed=4")
    assert out("--temperature=0") == out("--top_k=1") == out("--top_p=1e-6") == out("--min_p=1", "--seed=9") != first
    assert out("--temperature=0") != out("--temperature=0", "--repetition_penalty=100")
    assert out("--seed=3", "--dtype=bf16").startswith("The numpy array")


def test_command_makes_several_samples_and_stops(flags, capsys, monkeypatch):
    taken = play(monkeypatch, b"one, two", b"1, 2, 3,", b"no more.")
    main([*flags, "--prompt=say: ", "--num_samples=3", "--stop", "two", ", 3", "m"])
    assert capsys.readouterr().out == "--- 1 of 3 ---\nsay: one, \n--- 2 of 3 ---\nsay: 1, 2\n--- 3 of 3 ---\nsay: no \n"
    assert len(taken) == 8


def test_command_talks(flags, capsys, monkeypatch):
    said = iter(b"one.12345")
    monkeypatch.setattr(script, "sample", lambda *args: torch.tensor([next(said)]))
    lines(monkeypatch, "/reset", "go on")
    main([*flags, "--chat", "--system=be kind", "--prompt=hi", "--max_new_tokens=4", "--stop", "."])
    assert capsys.readouterr().out == "one\n(forgotten)\n1234\n\n"


def test_command_refuses(flags, refused, tmp_path):
    refused(main, [*flags, "--temperature=-1"], "--temperature=-1.0: must be at least 0")
    refused(main, [*flags, "--top_p=0"], "--top_p=0.0: must be above 0")
    refused(main, [*flags, "--min_p=1.5"], "--min_p=1.5: must be at most 1")
    refused(main, [*flags, "--stop="], "--stop: one of its texts is empty")
    refused(main, [*flags, "--chat", "--num_samples=2"], "--num_samples=2: a conversation, --chat, has one answer at a time")
    refused(main, [*flags, "--system=be kind"], "--system: belongs to a conversation: add --chat")
    refused(main, [*flags, "--chat", f"--system={'s' * 50}"], "--system=ssssssssssssssssssss…: has 53 tokens")
    refused(main, [*flags, f"--prompt={'long ' * 20}"], "--prompt=long long long long …: has 100 tokens", "holds 39")
    refused(main, [f"--checkpoint_path={tmp_path / 'none.pt'}"], "none.pt: no checkpoint")


def test_a_model_without_chat_tokens_cannot_talk(run_train, english, refused):
    path = run_train("--max_iter=1")
    without = Tokenizer.train(english[:40], 512, special_tokens=["<|endoftext|>"])
    save_checkpoint(path, {**load_checkpoint(path), "tokenizer": without.to_json()})
    refused(main, [f"--checkpoint_path={path}", "--device=cpu", "--chat"], f"{path}: the tokenizer has no <|system|> token")


# -- bugs found: each of these has to pass ----------------------------------------------------------------------------

def test_an_impatient_ctrl_c_leaves_the_program(plain, monkeypatch, capsys):
    monkeypatch.setattr(StopSignals, "AT_ONCE", 0.0)
    chat = Chat(plain, BYTES, GREEDY, 9)
    watch(monkeypatch, chat, "abtwo|", lambda n: n == 2 and [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    lines(monkeypatch, "hello", "hi")
    try:
        talk(chat, "")
    except KeyboardInterrupt:
        pytest.fail("it ended")  # pytest itself would end
    assert chat.messages[-1]["content"] == "btwo"


def test_a_line_that_is_not_utf8(flags, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhi\n"), encoding="utf-8"))
    main([*flags, "--chat", "--max_new_tokens=3"])


def test_saving_in_the_home_of_nobody(plain, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines(monkeypatch, "/save ~nobody-of-this-name/a.jsonl", "/reset")
    talk(Chat(plain, BYTES, GREEDY, 3), "")
    assert "~nobody-of-this-name/a.jsonl" in capsys.readouterr().out
