"""Conversations: the cache against a forward pass over the whole conversation, the sliding context, and the terminal."""
import io
import json
import os
import re
import select
import signal
import time

import commands
import pytest
import torch
from test_model import random_model
from test_sampling import ARCHITECTURES, BYTES, END, SHAPE, START, UNFILTERED

import chat as chat_module
import export
import finetune
import train
from chat import ADAPT_HELP, HELP, Chat, chat_loop, main
from conftest import REPO, train_tiny
from layers import LINEARS, MIXERS, MLPS
from learner import ADAPT_SCOPES, AdaptConfig, Learner
from model import GPT
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.config import BadInput
from runtime.device import Machine
from runtime.signals import StopSignals
from sampling import GREEDY, SamplingConfig, load_pretrained, sample
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
        if len(contexts) == 2 and args[5] is not None:  # with a cache: not the pass that it is compared with
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


# -- learning ---------------------------------------------------------------------------------------------------------

TRAINED = [pytest.param(SHAPE | {switch: name}, id=name) for switch, names in (
    ("mixer", MIXERS), ("mlp", MLPS), ("linear", LINEARS)) for name in names]


def learning_chat(model: GPT, system: str = "", max_new_tokens: int = 6, **flags) -> Chat:
    learner = Learner(model, AdaptConfig(**{"adapt_rate": 0.01, "adapt_hop": 2} | flags), CPU)
    return Chat(model, BYTES, GREEDY, max_new_tokens, system, learner=learner)


def clone_weights(model: GPT) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal_weights(model: GPT, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def learn_and_ask(chat: Chat, message: str) -> str:
    chat.learn(message)
    return ask(chat, message)


@torch.no_grad()
def test_a_message_is_scored_given_the_conversation_before_it(model, monkeypatch):
    """With a hop as long as the messages, so that the weights are those before: the words of the user alone, given all that
    came before them."""
    chat = learning_chat(model, "be kind", adapt_hop=20)
    for message in ("hi", "yé"):
        ids = torch.tensor([*chat.context_ids(), USER, *message.encode()])
        logprobs = model(ids[None, :-1])[0].log_softmax(-1)
        losses = -logprobs.gather(1, ids[1:, None])[-len(message.encode()):]
        with torch.enable_grad():
            learnt = chat.learn(message)
        assert (learnt.tokens, learnt.loss) == (len(losses), pytest.approx(losses.mean().item(), rel=1e-5))
        assert learnt.loss_after < learnt.loss
        ask(chat, message)
    assert chat.learn("") is None


def test_no_loss_depends_on_a_later_message():
    runs = []
    for last in ("one", "two"):
        chat = learning_chat(random_model(**SHAPE))
        runs.append([(chat.learn(message), ask(chat, message)) for message in ("hello", "you", last)])
    assert runs[0][:2] == runs[1][:2] and runs[0][2][0].loss != runs[1][2][0].loss


@pytest.mark.parametrize("switches", TRAINED)
def test_after_forget_the_conversation_goes_on_as_if_nothing_had_been_learnt(switches):
    model = random_model(**switches)
    weights, chat = clone_weights(model), learning_chat(model)
    for message in ("hello", "you"):
        learn_and_ask(chat, message)
    assert not equal_weights(model, weights)
    chat_module.run_command(chat, "/forget")
    assert equal_weights(model, weights)
    fresh = Chat(random_model(**switches), BYTES, GREEDY, 6)
    fresh.turns, fresh.history = [list(turn) for turn in chat.turns], list(chat.history)
    assert ask(chat, "go") == ask(fresh, "go") and chat.history == fresh.history


@pytest.mark.parametrize("switches, scope", [
    *(pytest.param(case.values[0], scope, id=f"{case.id}-{scope}") for case in TRAINED for scope in ("all", "lora")),
    *(pytest.param(SHAPE | {"norm": "layer"}, scope, id=scope) for scope in ADAPT_SCOPES)])
def test_saved_weights_answer_as_the_model_that_learnt(switches, scope, tmp_path, monkeypatch):
    chat = learning_chat(random_model(**switches), adapt_scope=scope, adapt_rate=0.05)
    for message in ("hello", "you"):
        learn_and_ask(chat, message)
    chat.save_weights(tmp_path / "saved.pt")
    loaded, tokenizer, _ = load_pretrained(tmp_path / "saved.pt", chat=True)
    assert loaded.state_dict().keys() == random_model(**switches).state_dict().keys()
    again, idx = Chat(loaded, tokenizer, GREEDY, 6), torch.tensor([[*b"hello you"]])
    again.turns = [list(turn) for turn in chat.turns]
    with torch.no_grad():
        learnt, kept, before = (one(idx) for one in (chat.model, loaded, random_model(**switches)))
    assert torch.allclose(learnt, kept, atol=1e-5) and not torch.allclose(learnt, before, atol=1e-3)
    assert ask(again, "go") == ask(chat, "go")


def test_learning_reads_what_the_answer_is_given(model, monkeypatch):
    """Also where the context is full: the same turns are dropped."""
    chat, read, n_dropped = learning_chat(model, "s"), [], 0
    contexts = check_logits(monkeypatch, chat, "one|two|three|four|five|six|")
    monkeypatch.setattr(chat.learner, "read", lambda ids, first, learn=True: read.append((ids.tolist(), first)) or
                        Learner.read(chat.learner, ids, first, learn))
    for message in ("hello", "you", "a", "longer one", "x", "and"):
        read.clear(), contexts.clear()
        n_turns = len(chat.turns)
        learn_and_ask(chat, message)
        n_dropped += len(chat.turns) <= n_turns
        ids, first = read[0]
        assert ids == contexts[0][:-2] and ids[first:] == [USER, *message.encode()] and read[1] == read[0]
    assert n_dropped >= 1


def test_a_message_too_long_to_learn_from_changes_nothing(attention_model):
    chat = learning_chat(attention_model)
    learn_and_ask(chat, "hi")
    weights, ids = clone_weights(attention_model), chat.context_ids()
    with pytest.raises(BadInput, match="the message has 37 tokens"):
        chat.learn("m" * 37)
    assert equal_weights(attention_model, weights) and chat.context_ids() == ids


def fail_at(monkeypatch, chat: Chat, forward: int, action):
    """Replaces the loss of that forward pass with targets by `action()`."""
    calls, eager_forward = iter(range(10**6)), chat.model.eager_forward

    def watched(idx, targets=None, **options):
        loss = eager_forward(idx, targets, **options)
        return loss if targets is None or next(calls) != forward else action(loss)
    monkeypatch.setattr(chat.model, "eager_forward", watched)


@pytest.mark.parametrize("forward, words", [
    (1, "loss or gradient not finite at step 2: lower --adapt_rate, now 0.01; what was learnt is forgotten"),
    (5, "loss not finite after step 3: lower --adapt_rate, now 0.01; what was learnt is forgotten")], ids=str)
def test_a_step_that_is_not_finite_is_forgotten_and_the_message_answered(attention_model, monkeypatch, capsys, forward,
                                                                         words):
    weights, chat = clone_weights(attention_model), learning_chat(attention_model)
    fail_at(monkeypatch, chat, forward, lambda loss: loss * torch.nan)
    check_logits(monkeypatch, chat, "one|two|")
    type_lines(monkeypatch, "hello")
    chat_loop(chat, CPU)
    assert capsys.readouterr().out.splitlines() == [f"({words})", "one", ""] and equal_weights(attention_model, weights)
    assert chat.learn("again").loss_after > 0 and not equal_weights(attention_model, weights)


def test_an_interrupt_while_learning_forgets(attention_model, monkeypatch, capsys):
    def interrupt(loss):
        raise KeyboardInterrupt
    weights, chat = clone_weights(attention_model), learning_chat(attention_model)
    fail_at(monkeypatch, chat, 1, interrupt)
    type_lines(monkeypatch, "hello")
    chat_loop(chat, CPU)
    assert capsys.readouterr().out == "(what was learnt is forgotten) (stopped)\n\n"
    assert equal_weights(attention_model, weights) and chat.context_ids() == [START] and not chat.history


def test_learning_and_answers_see_the_weights_as_they_are_under_autocast(attention_model, monkeypatch):
    """Around a step, autocast would keep its casts of the weights before. What is compared with is computed in fp32."""
    chat, machine, distances = learning_chat(attention_model, adapt_rate=0.1), Machine(torch.device("cpu"), "bf16"), []
    chat.learner.machine, learnt, learn = machine, [], chat.learn
    monkeypatch.setattr(chat, "learn", lambda message: learnt.append(learn(message)))

    def compared_sample(logits, *others):
        with torch.autocast("cpu", enabled=False):
            ids = torch.tensor([chat.context_ids()])
            expected = chat.model(ids)
            losses = -expected[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        distances.append((logits - expected[:, -1]).abs().max().item())
        distances.append(abs(learnt[-1].loss_after - losses[-2 - learnt[-1].tokens:-2].mean().item()))
        return torch.tensor([END])
    monkeypatch.setattr(chat_module, "sample", compared_sample)
    type_lines(monkeypatch, "hello", "you", "there")
    chat_loop(chat, machine)
    assert len(distances) == 6 and max(distances) < 0.1, distances


def test_commands_of_a_chat_that_learns(attention_model, monkeypatch, capsys, tmp_path):
    chat, weights, talk = learning_chat(attention_model), tmp_path / "new.pt", tmp_path / "talk.jsonl"
    check_logits(monkeypatch, chat, "one|two|")
    type_lines(monkeypatch, f"/save {weights}", "hi", f"/save {weights}", f"/save {weights}", f"/save {talk}", "/reset",
               "yo", "/forget", f"/save {tmp_path / 'b.pt'}", "/help", "/unknown")
    chat_loop(chat, CPU)
    assert capsys.readouterr().out.splitlines() == [
        f"(/save {weights}: nothing to save: nothing has been learnt)", "one", f"(saved to {weights})",
        f"(/save {weights}: exists: choose another name)", f"(saved to {talk})", "(conversation cleared)", "two",
        "(what was learnt is forgotten, the weights are as they were)",
        f"(/save {tmp_path / 'b.pt'}: nothing to save: nothing has been learnt)", *ADAPT_HELP.splitlines(),
        "(/unknown: no such command)", *ADAPT_HELP.splitlines(), ""]
    assert max(map(len, ADAPT_HELP.splitlines())) <= 80 and "tokenizer" in load_checkpoint(weights)
    assert json.loads(talk.read_text())["messages"][1]["content"] == "one"


def test_without_adapt_forget_is_no_command_and_pt_files_are_conversations(attention_model, monkeypatch, capsys, tmp_path):
    type_lines(monkeypatch, "/forget", "hi", f"/save {tmp_path / 'a.pt'}")
    chat_loop(Chat(attention_model, BYTES, GREEDY, 3), CPU)
    assert capsys.readouterr().out.startswith(f"(/forget: no such command)\n{HELP}\n")
    assert json.loads((tmp_path / "a.pt").read_text())["messages"]


def test_a_terminal_shows_what_was_learnt(attention_model, monkeypatch, capsys):
    chat = learning_chat(attention_model)
    check_logits(monkeypatch, chat, "one|")
    type_lines(monkeypatch, "hello")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    chat_loop(chat, CPU)
    first, second, *_ = capsys.readouterr().out.removeprefix("/help lists commands\n> ").splitlines()
    assert re.fullmatch(r"\(learnt from 5 tokens: \d+\.\d\d nats/token when read, now \d+\.\d\d\)", first)
    assert second == "one"


@pytest.mark.integration
def test_what_was_learnt_can_be_finetuned_and_exported_but_not_resumed(data_path, tmp_path, monkeypatch, capsys, refused):
    """From a base model, which is still named as one that was never finetuned."""
    base = train_tiny(tmp_path / "gpt.pt", data_path, "--max_iter=1", "--block_size=64")
    saved, rows = tmp_path / "learnt.pt", tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{letter}?", "answer": "b"}}\n' for letter in "abcd"))
    flags = ["--device=cpu", "--dtype=fp32"]
    type_lines(monkeypatch, "the array", f"/save {saved}")
    main([f"--checkpoint_path={base}", "--adapt", "--adapt_hop=2", "--max_new_tokens=3", *flags])
    type_lines(monkeypatch, "the array")
    main([f"--checkpoint_path={saved}", "--max_new_tokens=3", *flags])
    assert capsys.readouterr().err.count("never finetuned") == 2
    settings = load_checkpoint(base)["training"]["settings"]
    assert load_checkpoint(saved)["training"] == {"script": "train.py", "settings": settings}
    assert load_pretrained(saved)[2] == settings
    refused(train.main, [f"--checkpoint_path={saved}", "--resume_checkpoint"], "learnt.pt: holds a model but no training")
    finetune.main([f"--checkpoint_path={saved}", f"--dataset={rows}", "--max_iter=1", "--verbose=0", *flags])
    export.main([f"--checkpoint_path={saved}", f"--out_path={tmp_path / 'exported'}"])
    assert (tmp_path / "learnt_finetuned.pt").exists() and (tmp_path / "exported" / "config.json").exists()


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
    (["--stop="], "--stop: one of its strings is empty"), (["--samples=2"], "--samples=2: one of them is the answer"),
    ([f"--system={'s' * 50}"], "tiny.pt: --system=ssssssssssssssssssss…: has 53 tokens"),
    (["--adapt_hop=4"], "--adapt_hop=4: is only used when the model learns: add --adapt"),
    (["--adapt", "--adapt_rate=0"], "--adapt_rate=0.0: must be above 0"),
    (["--adapt", "--adapt_scope=norms"], "--adapt_scope=norms: this model has no parameters there"),
    (["--adapt", "--adapt_optimizer=rms", "--adapt_statistics=none.txt"], "none.txt: no such file"),
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
        self.process = commands.start(
            command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
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
