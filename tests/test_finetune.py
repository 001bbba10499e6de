"""finetune.py: packed rows, the loss on answers, before and after, and a resumed run that equals an uninterrupted one."""
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_conversations import write_jsonl

import finetune
import train
from conftest import assert_same, run_rows, saved_training, stderr_lines, train_tiny
from dataloader import IGNORE_INDEX, PackedBatches, encodable, pack_rows
from finetune import answer_loss, compare_answers, read_answers, write_answers
from model import GPT
from runtime.checkpoint import load_checkpoint, run_folder, save_checkpoint
from runtime.config import BadInput
from runtime.device import Machine
from runtime.metrics import NonFiniteGuard
from tasks.conversations import Conversation
from tokenizer import Tokenizer
from trainer import LoopConfig, TrainState, train_step


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["yes no maybe who what why"] * 9, 270)


def conversation(*contents: str, system: str = "") -> Conversation:
    """The user and the assistant take turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation(([{"role": "system", "content": system}] if system else []) + messages, "here")


# -- packed rows ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(9))
def test_packing_fills_gaps_exactly_in_any_order(seed):
    lengths = [6, 6, 4, 10]
    rows = pack_rows(lengths, 10, seed)
    assert sorted(sorted(lengths[i] for i in row) for row in rows) == [[4, 6], [6], [10]]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(0, 9))
def test_packing_loses_nothing_and_fits(lengths, seed):
    rows = pack_rows(lengths, 20, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 20 for row in rows)
    assert pack_rows(lengths, 20, seed) == rows
    shortest = sorted(sum(lengths[i] for i in row) for row in rows)[:2]
    assert len(shortest) < 2 or sum(shortest) > 20  # no two rows would fit into one


def test_packed_row_by_hand(tokenizer):
    """Only the assistant's message and its end are targets; padding is a document of its own."""
    batches = PackedBatches(tokenizer, [conversation("hi", "ab", system="s")], 1, 16, 0)
    (inputs,), (targets,), (doc_starts,) = batches[0]
    role_ids, end = tokenizer.chat_token_ids()
    start, (s, h, i, a, b) = tokenizer.separator_id, b"shiab"
    messages = [role_ids["system"], s, end, role_ids["user"], h, i, end, role_ids["assistant"], a, b]
    assert inputs.tolist() == [start, *messages, *[start] * 5]
    assert targets.tolist() == [*[IGNORE_INDEX] * 8, a, b, end, *[IGNORE_INDEX] * 5]
    assert doc_starts.tolist() == [True, *[False] * 10, True, *[False] * 4]


def test_every_answer_of_a_conversation_is_a_target(tokenizer):
    batches = PackedBatches(tokenizer, [conversation("a", "b", "c", "d")], 1, 32, 0)
    _, (targets,), _ = batches[0]
    end = tokenizer.chat_token_ids()[1]
    assert [int(target) for target in targets if target != IGNORE_INDEX] == [ord("b"), end, ord("d"), end]


def test_an_epoch_contains_every_conversation_once(tokenizer):
    conversations = [conversation(str(i), str(i) * (i % 5 + 1)) for i in range(40)]
    batches = PackedBatches(tokenizer, conversations, 3, 24, seed=7)
    n = batches.n_blocks

    def answers(first_row: int) -> list[str]:
        rows = [batches[row][1][0] for row in range(first_row, first_row + n)]
        return sorted(tokenizer.decode([target for target in row.tolist() if target != IGNORE_INDEX]) for row in rows)
    first_epoch = answers(0)
    assert first_epoch == answers(n)
    assert all("".join(first_epoch).count(f"{one.messages[1]['content']}<|end|>") for one in conversations)


def test_fingerprint_depends_on_the_conversations(tokenizer):
    conversations = [conversation(str(i), "yes") for i in range(4)]
    fingerprints = [PackedBatches(tokenizer, some, 3, 24, seed).fingerprint()
                    for some, seed in ((conversations, 7), (conversations, 7), (conversations[1:], 7))]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_bytes_that_the_vocabulary_lacks(tokenizer):
    """Of a foreign vocabulary: such a conversation is an error that names it, or left out."""
    ranks = {token: token_id for token, token_id in tokenizer.ranks.items() if b"\xa1" not in token}
    lacking = Tokenizer(ranks, tokenizer.pattern, tokenizer.special_tokens)
    conversations = [conversation("¡who?", "me"), conversation("who?", "me")]
    with pytest.raises(BadInput, match="0xA1"):
        PackedBatches(lacking, conversations, 1, 64, 0)
    assert encodable(conversations, lacking, skipped := []) == conversations[1:] and len(skipped) == 1
    assert encodable(conversations, tokenizer, []) == conversations
    with pytest.raises(BadInput, match="like every other"):
        encodable(conversations[:1], lacking, [])


def test_long_conversations_are_truncated_and_counted(tokenizer):
    conversations = [conversation("who", "x" * 50), conversation("y" * 50, "z"), conversation("a", "b")]
    batches = PackedBatches(tokenizer, conversations, 1, 16, 0)
    assert (batches.n_truncated, batches.n_too_long, len(batches.conversations)) == (1, 1, 2)
    assert max(len(ids) for ids, _ in batches.conversations) == 17


@pytest.mark.parametrize("one, words", [
    (conversation("y" * 50, "z"), "no conversation has a message of the assistant that starts"),
    (conversation("y"), "here: has no message of the assistant")], ids=["truncated away", "no answer"])
def test_conversations_without_an_answer_are_refused(tokenizer, one, words):
    with pytest.raises(BadInput, match=words):
        PackedBatches(tokenizer, [one], 1, 16, 0)


def test_a_step_is_the_mean_over_all_answers(base, tokenizer):
    """Two batches with 3 and 13 targets give the gradient and the loss of one that holds both."""
    machine, results = Machine(torch.device("cpu"), "fp32"), []
    apart = [PackedBatches(tokenizer, [one], 1, 32, 0).read([0])
             for one in (conversation("hi", "ab"), conversation("who", "abcdefghijkl"))]
    for parts in (apart, [tuple(map(torch.cat, zip(*apart)))]):
        model = GPT.from_checkpoint(load_checkpoint(base))
        remaining = iter(parts)
        loader = SimpleNamespace(next_batch=lambda model, remaining=remaining: next(remaining))
        optimizer = SimpleNamespace(step=lambda skip: None, zero_grad=lambda: None)
        state = TrainState(model, optimizer, machine.grad_scaler(), loader, NonFiniteGuard(machine.device, 2))
        loss, _ = train_step(state, LoopConfig(num_batch_accum=len(parts)), answer_loss, machine)
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))


# -- answers and report -----------------------------------------------------------------------------------------------

def answer_row(step: int, output: str, task: str = "t", question: str = "q|") -> dict:
    return {"step": step, "kind": "k", "task": task, "question": question, "answer": "a", "output": output,
            "correct": output == "a"}


def test_comparison_by_hand():
    rows = [{"step": 0, "val_loss": 5.0, "val_bpb": 2.0, "exact_match": 0.0}, {"step": 3, "train_loss": 1.0},
            {"step": 4, "val_loss": 1.0, "val_bpb": 0.5, "exact_match": 0.75}]
    metrics, tasks, samples = compare_answers(rows, [answer_row(0, "x"), answer_row(2, "y"), answer_row(4, "a")])
    assert [row[1:] for row in metrics.rows] == [
        ("lower", "5.0000", "1.0000"), ("lower", "2.0000", "0.5000"), ("higher", "0.0%", "75.0%")]
    assert tasks.rows == [("k: t", "higher", "0.0%", "100.0%")] and samples.rows == [("q|", "a", "x", "a")]


@pytest.mark.parametrize("tasks, expected", [("aaabbb", "aabb"), ([""] * 14, [""] * 12)], ids=["tasks", "no tasks"])
def test_samples_are_two_of_each_task_or_twelve(tasks, expected):
    rows = [{"step": 0, "val_loss": 5.0}]
    answers = [answer_row(0, "x", task, question=f"{task} {i}") for i, task in enumerate(tasks)]
    _, _, samples = compare_answers(rows, answers)
    assert [question.split()[0] if expected[0] else "" for question, *_ in samples.rows] == list(expected)


def test_answers_of_repeated_steps_are_replaced(tmp_path):
    path = tmp_path / "answers.jsonl"
    for step, output in ((0, "x"), (5, "y"), (10, "z"), (5, "a")):  # the last from a run resumed at step 0
        row = answer_row(step, output)
        row.pop("step")
        write_answers(path, step, [row])
    assert [(row["step"], row["output"]) for row in read_answers(path)] == [(0, "x"), (5, "a")]


def test_damaged_and_foreign_answers_are_ignored(tmp_path):
    path = write_jsonl(tmp_path / "answers.jsonl", [answer_row(0, "x"), {"step": 1, "said": "y"}, ["a list"]])
    path.write_text(path.read_text() + json.dumps(answer_row(2, "z"))[:30])
    assert read_answers(path) == [answer_row(0, "x")] and read_answers(tmp_path / "none.jsonl") == []


# -- the command ------------------------------------------------------------------------------------------------------

QUESTIONS = [{"question": f"{i} or {i + 1}?", "answer": "yes"} for i in range(60)]


@pytest.fixture(scope="module")
def base(data_path, tmp_path_factory) -> Path:
    """A model hardly trained, which tests share and must leave as it is."""
    return train_tiny(tmp_path_factory.mktemp("base") / "gpt.pt", data_path, "--max_iter=2", "--block_size=32")


def finetune_tiny(base: Path, questions: Path, out: Path, *flags: str) -> Path:
    """Finetunes `base` quietly in this process; returns `out`, its checkpoint."""
    defaults = [f"--out_path={out}", "--verbose=0", "--device=cpu"]
    if not any(flag.startswith("--resume_checkpoint") for flag in flags):
        defaults += [f"--checkpoint_path={base}", f"--dataset={questions}", "--dtype=fp32", "--batch_size=4",
                     "--num_batch_accum=2", "--val_intervals=3", "--log_intervals=1", "--warmup_iter=2",
                     "--val_conversations=5"]
    finetune.main([*defaults, *flags])
    return out


@pytest.fixture
def run(base, tmp_path):
    """run("--max_iter=3", …) -> path of the checkpoint of a finetuning on QUESTIONS, see finetune_tiny."""
    questions = write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    return lambda *flags, out="out/gpt.pt": finetune_tiny(base, questions, tmp_path / out, *flags)


@pytest.mark.integration
def test_it_learns_to_answer(run, capsys):
    path = run("--max_iter=60", "--val_intervals=30", "--learning_rate=0.05", "--verbose=1", "--num_batch_accum=1")
    rows = run_rows(path)
    assert rows[0]["exact_match"] == 0 and rows[-1]["exact_match"] == 1
    assert rows[-1]["val_loss"] < 0.1 < rows[0]["val_loss"]
    answers = read_answers(run_folder(path) / "answers.jsonl")
    assert [row["step"] for row in answers] == [step for step in (0, 30, 60) for _ in range(5)]
    assert {row["output"] for row in answers[-5:]} == {"yes"}
    assert "| exact match of held-out answers | higher | 0.0% | 100.0% |" in capsys.readouterr().out
    page = (run_folder(path) / "finetuning.html").read_text(encoding="utf-8")
    assert "100.0%" in page and "<svg" in page and "questions.jsonl" in page
    train.main([f"--checkpoint_path={path}", "--plot"])
    assert (run_folder(path) / "curves.png").exists()


@pytest.mark.integration
def test_rows_that_cannot_be_read_are_left_out_on_request(base, tmp_path, capsys, refused):
    """And what is no Unicode, here in a task, which TensorBoard and answers.jsonl name, ends no finetuning."""
    tool = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [
        *(row | {"task": f"\ud83d {i % 2}", "id": i} for i, row in enumerate(QUESTIONS)), {"messages": [tool]}])
    flags = ["--max_iter=1", "--verbose=1", "--val_conversations=6"]
    with pytest.raises(SystemExit):
        finetune_tiny(base, path, tmp_path / "gpt.pt", *flags)
    line, = stderr_lines(capsys.readouterr().err)
    assert "line 61: message 1 uses a tool" in line and "--skip_errors=1 leaves such rows out" in line
    out = finetune_tiny(base, path, tmp_path / "gpt.pt", *flags, "--skip_errors")
    printed = capsys.readouterr().out
    assert f"left out 1 that cannot be read, the first: {path}: line 61" in printed and "columns not used: id\n" in printed
    rows, answers = run_rows(out), read_answers(run_folder(out) / "answers.jsonl")
    assert [row["skipped_rows"] for row in rows if "val_loss" in row] == [1, 1]
    assert {row["task"] for row in answers} == {"\ufffd 0", "\ufffd 1"} and "exact_match/\ufffd 0" in rows[0]
    finetune_tiny(base, path, out, "--resume_checkpoint", "--max_iter=2")  # the flag belongs to the run
    assert run_rows(out)[-1]["step"] == 2


@pytest.mark.integration
def test_few_short_conversations_make_small_steps(data_path, tmp_path):
    """Whatever the context: rows of 2,048 tokens would make 16,384 a step."""
    base = train_tiny(tmp_path / "long.pt", data_path, "--max_iter=1", "--block_size=2048", "--batch_size=1", "--val_iter=1")
    path = finetune_tiny(base, write_jsonl(tmp_path / "six.jsonl", QUESTIONS[:6]), tmp_path / "gpt.pt", "--max_iter=2")
    assert run_rows(path)[-1]["tokens"] == 2 * 8 * 64
    whole = finetune_tiny(base, tmp_path / "six.jsonl", tmp_path / "whole.pt", "--max_iter=4", "--cooldown_frac=0")
    parts = finetune_tiny(base, tmp_path / "six.jsonl", tmp_path / "parts.pt", "--max_iter=2", "--cooldown_frac=0")
    finetune_tiny(base, tmp_path / "six.jsonl", parts, "--resume_checkpoint", "--max_iter=4")
    assert_same(saved_training(parts), saved_training(whole))


def test_base_model_is_unchanged(run, base):
    before = base.read_bytes()
    path = run("--max_iter=1")
    assert base.read_bytes() == before
    old, new = (load_checkpoint(file) for file in (base, path))
    assert old["model"].keys() == new["model"].keys() and old["tokenizer"] == new["tokenizer"]
    assert any(not torch.equal(old["model"][name], new["model"][name]) for name in old["model"])


@pytest.fixture(scope="module")
def default_val_loss(base, tmp_path_factory) -> float:
    folder = tmp_path_factory.mktemp("default")
    questions = write_jsonl(folder / "questions.jsonl", QUESTIONS)
    return run_rows(finetune_tiny(base, questions, folder / "gpt.pt", "--max_iter=3"))[-1]["val_loss"]


@pytest.mark.parametrize("flag", [
    "--learning_rate=0.5", "--batch_size=3", "--num_batch_accum=1", "--seed=1", "--weight_decay=5", "--warmup_iter=5",
    "--optimizer=adamw", "--grad_clip=0.001", "--dtype=bf16", "--val_conversations=3"])
def test_flag_changes_the_run(run, default_val_loss, flag):
    assert run_rows(run(flag, "--max_iter=3"))[-1]["val_loss"] != default_val_loss


@pytest.mark.integration
def test_extended_run_equals_an_uninterrupted_one(run):
    """With a constant learning rate, which does not depend on where the run ends."""
    first = run("--max_iter=6", "--cooldown_frac=0", out="parts/gpt.pt")
    whole = run("--max_iter=12", "--cooldown_frac=0", out="whole/gpt.pt")
    run("--resume_checkpoint", "--max_iter=12", out="parts/gpt.pt")
    assert_same(saved_training(first), saved_training(whole))
    assert run_rows(first) == run_rows(whole)
    assert read_answers(run_folder(first) / "answers.jsonl") == read_answers(run_folder(whole) / "answers.jsonl")


def test_run_resumed_after_ctrl_c_equals_an_uninterrupted_one(run, monkeypatch, capsys):
    whole = run("--max_iter=8")
    loss_fn, calls = finetune.answer_loss, iter(range(10**6))

    def interrupted_loss(model, batch):
        if next(calls) == 9:  # of two a step
            signal.raise_signal(signal.SIGINT)
        return loss_fn(model, batch)
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "answer_loss", interrupted_loss)
        with pytest.raises(SystemExit) as stop:
            run("--max_iter=8", out="parts/gpt.pt")
    line, = stderr_lines(capsys.readouterr().err)
    assert stop.value.code == 130 and "stopped at step 5, saved" in line
    assert re.search("`python finetune.py --out_path=.*parts/gpt.pt --resume_checkpoint`", line)
    assert_same(saved_training(run("--resume_checkpoint", out="parts/gpt.pt")), saved_training(whole))


def test_epochs_are_passes_over_the_rows(run):
    training = load_checkpoint(run("--epochs=2.5", "--val_intervals=1000"))["training"]
    assert training["loader"]["blocks_seen"] == 8 * training["step"] and training["settings"]["max_iter"] == training["step"]
    assert training["step"] > 1 == load_checkpoint(run("--epochs=0.01", out="b/gpt.pt"))["training"]["step"]


def test_default_out_path_is_beside_the_base(base, tmp_path):
    copy = tmp_path / "gpt.pt"
    shutil.copy(base, copy)
    questions = write_jsonl(tmp_path / "questions.jsonl", QUESTIONS[:9])
    finetune.main([f"--checkpoint_path={copy}", f"--dataset={questions}", "--max_iter=1", "--verbose=0", "--device=cpu"])
    finetune.main([f"--checkpoint_path={copy}", "--resume_checkpoint", "--max_iter=2", "--verbose=0"])
    assert load_checkpoint(tmp_path / "gpt_finetuned.pt")["training"]["step"] == 2


def test_optimizer_is_that_of_pretraining_and_adamw_for_imported_models(run, base, tmp_path):
    ours = load_checkpoint(run("--max_iter=1"))["training"]["settings"]
    imported = load_checkpoint(base)
    del imported["training"]
    save_checkpoint(tmp_path / "imported.pt", imported)
    path = run("--max_iter=1", f"--checkpoint_path={tmp_path / 'imported.pt'}", out="b/gpt.pt")
    training = load_checkpoint(path)["training"]
    assert ours["optimizer"] == "muon" and training["settings"]["optimizer"] == "adamw"
    assert "adamw" in training["optimizer"] and "muon" not in training["optimizer"]


# -- bad input --------------------------------------------------------------------------------------------------------

def test_base_must_have_chat_tokens(base, tmp_path, refused):
    checkpoint = load_checkpoint(base)
    bare = Tokenizer(Tokenizer.from_json(checkpoint["tokenizer"]).ranks, "default", {"<|endoftext|>": 507})
    save_checkpoint(tmp_path / "bare.pt", checkpoint | {"tokenizer": bare.to_json()})
    refused(finetune.main, [f"--checkpoint_path={tmp_path / 'bare.pt'}", "--dataset=builtin", "--device=cpu"],
            "bare.pt", "no <|system|> token")


@pytest.mark.parametrize("messages, words", [
    ([{"role": "robot", "content": "x"}], "robot"),
    ([{"role": "user", "content": "what?"}], "no message of the assistant")], ids=["unknown role", "no answer"])
def test_conversation_that_cannot_be_used_is_named(base, tmp_path, refused, messages, words):
    good = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(3)]
    path = write_jsonl(tmp_path / "bad.jsonl", [*good, {"messages": messages}])
    refused(finetune.main, [f"--checkpoint_path={base}", f"--dataset={path}", f"--out_path={tmp_path / 'gpt.pt'}",
                            "--device=cpu"], "bad.jsonl: line 4", words)


@pytest.mark.parametrize("flags, words", [
    (["--checkpoint_path=none.pt"], ["none.pt: no checkpoint"]), (["--dataset=none.jsonl"], ["none.jsonl"]),
    (["--epoch=2"], ["did you mean --epochs"]), (["--answer_tokens=0"], ["--answer_tokens=0: must be at least 1"])], ids=str)
def test_bad_flags_are_refused(base, tmp_path, refused, flags, words):
    questions = write_jsonl(tmp_path / "questions.jsonl", QUESTIONS[:2])
    refused(finetune.main, [f"--checkpoint_path={base}", f"--dataset={questions}", "--max_iter=1", "--device=cpu", *flags],
            *words)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """The checkpoint of a finetuning of one step, which tests share and must leave as it is."""
    folder = tmp_path_factory.mktemp("finished")
    return finetune_tiny(base, write_jsonl(folder / "questions.jsonl", QUESTIONS), folder / "gpt.pt", "--max_iter=1")


def test_existing_checkpoint_is_not_replaced(finished, base, refused):
    refused(finetune.main, [f"--checkpoint_path={base}", f"--dataset={finished.parent / 'questions.jsonl'}",
                            f"--out_path={finished}", "--device=cpu"], f"--out_path={finished}: exists")


@pytest.mark.parametrize("flag", ["--dataset=builtin", "--seed=9", "--epochs=9.0", "--optimizer=adamw",
                                  "--checkpoint_path=other.pt", "--val_conversations=4"])
def test_resumed_run_keeps_its_flags(finished, refused, flag):
    refused(finetune.main, [f"--out_path={finished}", "--resume_checkpoint", "--max_iter=2", flag], flag, "keeps")


def test_only_the_script_that_wrote_a_checkpoint_resumes_it(finished, base, refused):
    refused(train.main, [f"--checkpoint_path={finished}", "--resume_checkpoint"], "is a checkpoint of finetune.py")
    refused(finetune.main, [f"--out_path={base}", "--resume_checkpoint"], "is a checkpoint of train.py")


def test_resumed_run_refuses_other_conversations(run, tmp_path, refused):
    path = run("--max_iter=1")
    write_jsonl(tmp_path / "questions.jsonl", [row | {"answer": "no"} for row in QUESTIONS])
    refused(finetune.main, [f"--out_path={path}", "--resume_checkpoint", "--max_iter=2"], "--dataset", "the same data")
    assert run_rows(path)[-1]["step"] == 1
