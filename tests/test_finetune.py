"""Finetuning: packed rows, what is learnt of them, before and after, and a run that goes on exactly."""
import json
import re
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_conversations import write_jsonl

import finetune
import train
from conftest import assert_same, lines_in, rows_of, training_of
from dataloader import IGNORE_INDEX, PackedBatches, pack_rows
from evaluate import answers_to, ask, exact_match, questions_of, shares_of
from finetune import read_answers, side_by_side
from model import GPT
from runtime.checkpoint import load_checkpoint, run_folder, save_checkpoint
from sampling import GREEDY, generate_texts
from tasks.conversations import Conversation
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["yes no maybe who what why"] * 9, 270)


def talk(*contents: str, system: str = "") -> Conversation:
    """The user speaks first, then by turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation(([{"role": "system", "content": system}] if system else []) + messages, "here")


# -- rows -------------------------------------------------------------------------------------------------------------

def test_packing_by_hand():
    """In whatever order they come, what fits exactly goes together."""
    for seed in range(9):
        rows = pack_rows([6, 6, 4, 10], 10, seed)
        assert sorted(sorted([6, 6, 4, 10][i] for i in row) for row in rows) == [[4, 6], [6], [10]]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(0, 9))
def test_packing_loses_nothing_and_fits(lengths, seed):
    rows = pack_rows(lengths, 20, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 20 for row in rows)
    assert pack_rows(lengths, 20, seed) == rows
    # no two rows would have fitted into one
    sums = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 20


def test_a_row_by_hand(tokenizer):
    """Only what the assistant says, and the end of it, is a target; fillers are a text of their own."""
    batches = PackedBatches(tokenizer, [talk("hi", "ab", system="s")], 1, 16, 0)
    (inputs,), (targets,), (doc_starts,) = batches[0]
    role_ids, end = tokenizer.chat_ids()
    start, (s, h, i, a, b) = tokenizer.separator_id, b"shiab"
    said = [role_ids["system"], s, end, role_ids["user"], h, i, end, role_ids["assistant"], a, b]
    assert inputs.tolist() == [start, *said, *[start] * 5]
    assert targets.tolist() == [*[IGNORE_INDEX] * 8, a, b, end, *[IGNORE_INDEX] * 5]
    assert doc_starts.tolist() == [True, *[False] * 10, True, *[False] * 4]


def test_every_turn_of_the_assistant_is_learnt(tokenizer):
    batches = PackedBatches(tokenizer, [talk("a", "b", "c", "d")], 1, 32, 0)
    _, (targets,), _ = batches[0]
    said = [int(target) for target in targets if target != IGNORE_INDEX]
    end = tokenizer.chat_ids()[1]
    assert said == [ord("b"), end, ord("d"), end]


def test_an_epoch_shows_every_conversation_once(tokenizer):
    conversations = [talk(str(i), str(i) * (i % 5 + 1)) for i in range(40)]
    batches = PackedBatches(tokenizer, conversations, 3, 24, seed=7)
    told = lambda rows: sorted(tokenizer.decode([t for t in row.tolist() if t != IGNORE_INDEX]) for row in rows)
    n = batches.n_blocks
    epochs = [told(torch.cat([batches[first][1][:1] for first in range(at, at + n)])) for at in (0, n)]
    everything = "".join(epochs[0])
    assert epochs[0] == epochs[1] and all(everything.count(f"{one.messages[1]['content']}<|end|>") for one in conversations)
    assert batches.fingerprint() != PackedBatches(tokenizer, conversations[1:], 3, 24, 7).fingerprint()


def test_long_conversations_are_cut_and_counted(tokenizer):
    batches = PackedBatches(tokenizer, [talk("who", "x" * 50), talk("y" * 50, "z"), talk("a", "b")], 1, 16, 0)
    assert batches.n_truncated == 2 and len(batches.texts) == 2  # of the second nothing that is said is left
    assert max(len(ids) for ids, _ in batches.texts) == 17
    with pytest.raises(ValueError, match="in none of its conversations"):
        PackedBatches(tokenizer, [talk("y" * 50, "z")], 1, 16, 0)
    with pytest.raises(ValueError, match="here: has no message of the assistant"):
        PackedBatches(tokenizer, [talk("y")], 1, 16, 0)


# -- questions --------------------------------------------------------------------------------------------------------

def test_questions_are_the_last_of_each_conversation(tokenizer):
    asked = questions_of([talk("a", "b", "c", "d"), talk("e", "f", "g"), talk("h" * 99, "i")], tokenizer, 40)
    assert [(one.question, one.answer) for one in asked] == [("c", "d"), ("e", "f")]  # the last does not fit
    assert tokenizer.decode(asked[0].prompt) == (
        "<|endoftext|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>")


def test_answers_are_what_each_question_alone_would_get(tokenizer):
    torch.manual_seed(0)
    model = GPT(train.GPTConfig(n_layer=2, n_head=2, head_size=8, block_size=64, vocab_size=tokenizer.vocab_size))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    asked = questions_of([talk("who" * n, "x") for n in (1, 5, 2, 5, 3)], tokenizer, 64)
    together = answers_to(model, tokenizer, [one.prompt for one in asked], 9)
    for one, said in zip(asked, together):
        assert said == "".join(text for _, text in generate_texts(model, tokenizer, [one.prompt], 9, GREEDY))
    rows = ask(model, tokenizer, asked, 9)
    assert [row["said"] for row in rows] == answers_to(model, tokenizer, [one.prompt for one in asked], 2)


def test_right_and_wrong():
    assert exact_match(" a  b\n", "a b") and not exact_match("a b.", "a b") and not exact_match("A", "a")
    answers = [{"task": "x: a", "right": True}, {"task": "x: b", "right": False}, {"task": "y", "right": True},
               {"task": "", "right": False}]
    assert shares_of(answers) == {"x": 0.5, "y": 1.0}
    assert shares_of(answers, by=lambda task: task) == {"x: a": 1.0, "x: b": 0.0, "y": 1.0}


def test_side_by_side_by_hand():
    rows = [{"step": 0, "val_loss": 5.0, "val_bpb": 2.0, "exact_match": 0.0}, {"step": 3, "train_loss": 1.0},
            {"step": 4, "val_loss": 1.0, "val_bpb": 0.5, "exact_match": 0.75}]
    answer = lambda step, said: {"step": step, "task": "t", "question": "q|", "answer": "a", "said": said,
                                 "right": said == "a"}
    numbers, tasks, samples = side_by_side(rows, [answer(0, "x"), answer(2, "y"), answer(4, "a")])
    assert numbers.rows[0][1:] == ("5.0000", "1.0000") and numbers.rows[2][1:] == ("0.0%", "75.0%")
    assert tasks.rows == [("t", "0.0%", "100.0%")] and samples.rows == [("q|", "a", "x", "a")]


# -- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture
def base(run_train):
    """A model with the tokenizer of the prepared data, hardly trained."""
    return run_train("--max_iter=2", "--block_size=32", checkpoint="base/gpt.pt")


@pytest.fixture
def run(base, tmp_path):
    """run("--max_iter=3", …) -> path of the checkpoint, of conversations that are all alike; quiet, in this process."""
    rows = [{"question": f"{i} or {i + 1}?", "answer": "yes"} for i in range(60)]
    path = write_jsonl(tmp_path / "talks.jsonl", rows)

    def finetuned(*flags: str, out: str = "out/gpt.pt"):
        defaults = [f"--out_path={tmp_path / out}", "--verbose=0", "--device=cpu"]
        if not any(flag.startswith("--resume_checkpoint") for flag in flags):
            defaults += [f"--checkpoint_path={base}", f"--dataset={path}", "--dtype=fp32", "--batch_size=4",
                         "--num_batch_accum=2", "--val_intervals=3", "--log_intervals=1", "--warmup_iter=2",
                         "--val_conversations=10"]
        finetune.main([*defaults, *flags])
        return tmp_path / out
    return finetuned


def test_it_learns_to_answer(run, capsys):
    path = run("--max_iter=60", "--val_intervals=30", "--learning_rate=0.05", "--verbose=1", "--num_batch_accum=1")
    rows = rows_of(path)
    assert rows[0]["exact_match"] == 0 and rows[-1]["exact_match"] == 1
    assert rows[-1]["val_loss"] < 0.1 < rows[0]["val_loss"]
    answers = read_answers(run_folder(path) / "answers.jsonl")
    assert [row["step"] for row in answers] == [step for step in (0, 30, 60) for _ in range(10)]
    assert {row["said"] for row in answers[-10:]} == {"yes"}
    out = capsys.readouterr().out
    assert "| held-out questions answered right | 0.0% | 100.0% |" in out
    page = (run_folder(path) / "finetuning.html").read_text(encoding="utf-8")
    assert "100.0%" in page and "<svg" in page and "talks.jsonl" in page
    train.main([f"--checkpoint_path={path}", "--plot"])
    assert (run_folder(path) / "curves.png").exists()


def test_the_model_it_begins_with_stays(run, base):
    before = base.read_bytes()
    path = run("--max_iter=1")
    assert base.read_bytes() == before
    (old, new) = (load_checkpoint(file)["model"] for file in (base, path))
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)
    assert load_checkpoint(path)["tokenizer"] == load_checkpoint(base)["tokenizer"]


@pytest.mark.parametrize("flag", [
    "--learning_rate=0.5", "--batch_size=3", "--num_batch_accum=1", "--seed=1", "--weight_decay=5", "--warmup_iter=5",
    "--optimizer=adamw", "--grad_clip=0.001", "--dtype=bf16", "--val_conversations=20"])
def test_every_knob_turns_something(run, flag):
    usual, other = rows_of(run("--max_iter=6")), rows_of(run(flag, "--max_iter=6", out="other/gpt.pt"))
    assert usual[-1]["val_loss"] != other[-1]["val_loss"]


def test_a_resumed_run_equals_one_that_never_stopped(run):
    """A constant rate, which does not depend on where the run ends."""
    cooled = run("--max_iter=12")
    first = run("--max_iter=6", "--cooldown_frac=0", out="parts/gpt.pt")
    straight = run("--max_iter=12", "--cooldown_frac=0", out="straight/gpt.pt")
    run("--resume_checkpoint", "--max_iter=12", out="parts/gpt.pt")
    assert_same(training_of(first), training_of(straight))
    assert rows_of(first) == rows_of(straight) != rows_of(cooled)
    assert read_answers(run_folder(first) / "answers.jsonl") == read_answers(run_folder(straight) / "answers.jsonl")


def test_ctrl_c_saves_and_the_run_goes_on_exactly(run, monkeypatch, capsys):
    whole = run("--max_iter=8")
    loss_fn, calls = finetune.answer_loss, iter(range(10**6))

    def stopping(model, batch):
        if next(calls) == 9:  # of two a step
            signal.raise_signal(signal.SIGINT)
        return loss_fn(model, batch)
    monkeypatch.setattr(finetune, "answer_loss", stopping)
    with pytest.raises(SystemExit) as stop:
        run("--max_iter=8", out="parts/gpt.pt")
    line, = lines_in(capsys.readouterr().err)
    assert stop.value.code == 130 and "stopped at step 5, saved" in line
    assert re.search("`python finetune.py --out_path=.*parts/gpt.pt --resume_checkpoint`", line)
    monkeypatch.setattr(finetune, "answer_loss", loss_fn)
    path = run("--resume_checkpoint", out="parts/gpt.pt")
    assert_same(training_of(path), training_of(whole))


def test_epochs_are_passes_over_the_rows(run):
    path = run("--epochs=2.5")
    training = load_checkpoint(path)["training"]
    n_rows = training["loader"]["blocks_seen"] / 8 / training["step"]
    assert n_rows == 1 and training["settings"]["max_iter"] == training["step"]
    fewer = load_checkpoint(run("--epochs=0.01", out="b/gpt.pt"))["training"]
    assert fewer["step"] == 1 < training["step"]


def test_where_it_writes_if_not_told(base, tmp_path):
    rows = [{"question": f"{i}?", "answer": "yes"} for i in range(9)]
    talks = write_jsonl(tmp_path / "t.jsonl", rows)
    finetune.main([f"--checkpoint_path={base}", f"--dataset={talks}", "--max_iter=1", "--verbose=0", "--device=cpu"])
    path = base.with_name("gpt_finetuned.pt")
    assert path.exists()
    finetune.main([f"--checkpoint_path={base}", "--resume_checkpoint", "--max_iter=2", "--verbose=0"])
    assert load_checkpoint(path)["training"]["step"] == 2


def test_the_optimizer_is_that_of_the_model(run, base, tmp_path):
    """AdamW where the model came from elsewhere, and at a tenth of Muon's rate."""
    ours = load_checkpoint(run("--max_iter=1"))["training"]["settings"]
    blob = load_checkpoint(base)
    del blob["training"]
    save_checkpoint(tmp_path / "foreign.pt", blob)
    path = run("--max_iter=1", f"--checkpoint_path={tmp_path / 'foreign.pt'}", out="b/gpt.pt")
    foreign = load_checkpoint(path)["training"]
    assert ours["optimizer"] == "muon" and foreign["settings"]["optimizer"] == "adamw"
    assert "adamw" in foreign["optimizer"] and "muon" not in foreign["optimizer"]


def test_bad_input(run, base, tmp_path, refused):
    talks = write_jsonl(tmp_path / "t.jsonl", [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d"}])
    flags = [f"--checkpoint_path={base}", f"--dataset={talks}", "--max_iter=1", "--device=cpu"]
    blob = load_checkpoint(base)
    plain = Tokenizer(Tokenizer.from_json(blob["tokenizer"]).ranks, "default", {"<|endoftext|>": 507})
    save_checkpoint(tmp_path / "plain.pt", blob | {"tokenizer": plain.to_json()})
    refused(finetune.main, [*flags, f"--checkpoint_path={tmp_path / 'plain.pt'}"], "plain.pt", "no <|system|> token")
    refused(finetune.main, [*flags, f"--checkpoint_path={tmp_path / 'none.pt'}"], "none.pt: no checkpoint")
    refused(finetune.main, [*flags, f"--dataset={tmp_path / 'none.jsonl'}"], "none.jsonl")
    refused(finetune.main, [*flags, "--epoch=2"], "did you mean --epochs")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [{"role": "robot", "content": "x"}]}])
    refused(finetune.main, [*flags, f"--dataset={bad}"], "bad.jsonl: line 1", "robot")
    silent = write_jsonl(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": str(i)}]} for i in range(4)])
    refused(finetune.main, [*flags, f"--dataset={silent}"], "silent.jsonl: line", "no message of the assistant")
    path = run("--max_iter=1")
    refused(finetune.main, [*flags, f"--out_path={path}"], f"--out_path={path}: exists")
    refused(finetune.main, [f"--out_path={path}", "--resume_checkpoint", f"--dataset={talks}"], "--dataset=", "keeps")
    for flag in ("--seed=9", "--epochs=9.0"):
        refused(finetune.main, [f"--out_path={path}", "--resume_checkpoint", "--max_iter=2", flag], flag, "keeps")
    refused(train.main, [f"--checkpoint_path={path}", "--resume_checkpoint"], "was written by finetune.py")
    refused(finetune.main, [f"--out_path={base}", "--resume_checkpoint"], "was written by train.py")
    write_jsonl(tmp_path / "talks.jsonl", [{"question": f"{i}", "answer": "no"} for i in range(60)])
    refused(finetune.main, [f"--out_path={path}", "--resume_checkpoint", "--max_iter=2"], "--dataset", "the same data")
    assert json.loads((run_folder(path) / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
