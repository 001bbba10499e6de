"""generate.py: samples of a prompt on the terminal, and --chat."""
import io

import pytest
import torch
from test_model import random_model
from test_sampling import BYTES, SHAPE, script_tokens

import chat
from generate import main, print_samples
from runtime.checkpoint import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """Of a tiny model whose tokens are bytes."""
    path = tmp_path / "tiny.pt"
    save_checkpoint(path, {**random_model(**SHAPE).to_checkpoint(), "tokenizer": BYTES.to_json()})
    return [f"--checkpoint_path={path}", "--device=cpu"]


def test_samples_are_printed_in_order_and_the_first_at_once(capsys):
    def pieces():
        assert capsys.readouterr().out == "--- 1 of 3 ---\nhey"
        yield 0, " you"
        assert capsys.readouterr().out == " you"
        yield from [(2, " th"), (1, " two"), (0, "!"), (2, "ree")]
    print_samples(pieces(), 3, "hey")
    assert capsys.readouterr().out == "!\n--- 2 of 3 ---\nhey two\n--- 3 of 3 ---\nhey three\n"
    print_samples(iter([(0, " you")]), 1, "hey")
    assert capsys.readouterr().out == "hey you\n"


def test_sampling_flags_reach_the_sampler(trained, capsys):
    def output(*more):
        main([f"--checkpoint_path={trained}", "--device=cpu", "--prompt=The numpy array", "--max_new_tokens=20", *more])
        return capsys.readouterr().out
    capsys.readouterr()
    first = output("--seed=3")
    assert first.startswith("The numpy array") and first.endswith("\n") and len(first) > 30
    assert output("--seed=3") == first != output("--seed=4")
    assert output("--temperature=0") == output("--top_k=1") == output("--top_p=1e-6") == output("--min_p=1", "--seed=9")
    assert output("--temperature=0") != first
    assert output("--temperature=0") != output("--temperature=0", "--repetition_penalty=100")
    assert output("--seed=3", "--dtype=bf16").startswith("The numpy array")


def test_samples_end_at_stop_strings(flags, capsys, monkeypatch):
    consumed = script_tokens(monkeypatch, b"one, two", b"1, 2, 3,", b"no more.")
    main([*flags, "--prompt=say: ", "--samples=3", "--stop", "two", ", 3", "m"])
    assert capsys.readouterr().out == "--- 1 of 3 ---\nsay: one, \n--- 2 of 3 ---\nsay: 1, 2\n--- 3 of 3 ---\nsay: no \n"
    assert len(consumed) == 8


def test_one_sample_is_chosen_and_thoughts_are_kept_short(flags, capsys):
    main([*flags, "--prompt=hey", "--samples=3", "--choose=mbr", "--max_new_tokens=4"])
    out = capsys.readouterr().out
    assert out.startswith("hey") and "---" not in out
    main([*flags, "--prompt=hey", "--think=0", "--max_new_tokens=6", "--seed=1"])
    assert capsys.readouterr().out.startswith("hey#")


def test_what_cannot_be_chosen_is_refused_before_anything_is_printed(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--prompt=hey", "--samples=2", "--choose=verifier"])
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and not out and error.startswith("generate.py: --choose=verifier: only answers")


def test_chat_flag_starts_a_conversation(flags, capsys, monkeypatch):
    """With --prompt as the first message, --system, --max_new_tokens and --stop."""
    answers, contexts = iter(b"one.12345"), []
    monkeypatch.setattr(chat, "sample", lambda *args: torch.tensor([next(answers)]))
    prefill = chat.GPT.prefill
    monkeypatch.setattr(chat.GPT, "prefill", lambda model, rows, *args: contexts.append(bytes(
        i for i in rows[0].tolist() if i < 256)) or prefill(model, rows, *args))
    monkeypatch.setattr("sys.stdin", io.StringIO("/reset\ngo on\n"))
    main([*flags, "--chat", "--system=be kind", "--prompt=hi", "--max_new_tokens=4", "--stop", "."])
    assert capsys.readouterr().out == "one\n(conversation cleared)\n1234\n\n"
    assert contexts == [b"be kindhi", b"be kindgo on"]


def test_adapt_flags_reach_the_conversation(flags, capsys, monkeypatch):
    monkeypatch.setattr(chat, "sample", lambda *args: torch.tensor([next(answers)]))
    outputs = []
    for more in (["--adapt", "--adapt_rate=0.05"], ["--adapt", "--adapt_rate=0.05", "--adapt_scope=lora"], []):
        answers = iter(b"one.two.")
        monkeypatch.setattr("sys.stdin", io.StringIO("go on\n/forget\n"))
        main([*flags, "--chat", "--prompt=hi", "--stop", ".", *more])
        outputs.append(capsys.readouterr().out.splitlines()[:3])
    assert outputs == [["one", "two", "(what was learnt is forgotten, the weights are as they were)"]] * 2 + [
        ["one", "two", "(/forget: no such command)"]]


@pytest.mark.parametrize("given, words", [
    (["--temperature=-1"], ["--temperature=-1.0: must be at least 0"]),
    (["--top_p=0"], ["--top_p=0.0: must be above 0"]),
    (["--min_p=1.5"], ["--min_p=1.5: must be at most 1"]),
    (["--stop="], ["--stop: one of its strings is empty"]),
    (["--chat", "--samples=2"], ["--samples=2: with --chat there is one answer"]),
    (["--system=be kind"], ["--system: is only used in a conversation: add --chat"]),
    (["--adapt"], ["--adapt: learns from a conversation: add --chat"]),
    (["--chat", "--adapt_rate=0.01"], ["--adapt_rate=0.01: is only used when the model learns: add --adapt"]),
    (["--chat", f"--system={'s' * 50}"], ["tiny.pt: --system=ssssssssssssssssssss…: has 53 tokens"]),
    ([f"--prompt={'long ' * 20}"], ["--prompt=long long long long …: has 100 tokens", "holds 39"]),
    (["--checkpoint_path=none.pt"], ["none.pt: no checkpoint"])], ids=str)
def test_bad_flags_are_refused(flags, refused, given, words):
    refused(main, [*flags, *given], *words)


def test_chat_needs_chat_tokens(trained, tmp_path, english, refused):
    path, bare = tmp_path / "bare.pt", Tokenizer.train(english[:5], 400, special_tokens=["<|endoftext|>"])
    save_checkpoint(path, {**load_checkpoint(trained), "tokenizer": bare.to_json()})
    refused(main, [f"--checkpoint_path={path}", "--device=cpu", "--chat"], f"{path}: the tokenizer has no <|system|> token")
