"""Scores: against slow loops over positions and numbers by hand, and the command on a tiny model."""
import json
import math

import numpy as np
import pytest
import torch

import evaluate
import finetune
from conftest import HUB
from evaluate import (
    EvaluateConfig,
    bits_per_byte,
    document_losses,
    endings_of,
    losses_of,
    read_questions,
    score_choice,
    score_text,
    share,
    windows_of,
)
from model import GPT, GPTConfig
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.config import BadInput
from runtime.device import Machine
from runtime.metrics import LossSums
from tasks.builtin_questions import make_questions
from tasks.multiple_choice import Choice, choice_of
from tokenizer import Tokenizer

CPU = Machine(torch.device("cpu"), "fp32")
HELLASWAG = [{"ctx": "The array is", "endings": ["sorted in place.", "a dog.", "blue", "wet"], "label": "0"},
             {"ctx": "If x is None, the", "endings": ["sea", "default is used", "cat", "dog runs"], "label": "1"},
             {"ctx": "Returns", "endings": ["a copy", "the moon", "an élan", "no"], "label": "2"}]
ARC = {"question": "Which is a number?", "choices": {"text": ["dog", "one", "cat"], "label": ["A", "B", "C"]},
       "answerKey": "B"}


@pytest.fixture(scope="module")
def tokenizer(english) -> Tokenizer:
    return Tokenizer.train(english[:5], 400)


def model_of(block_size: int, vocab_size: int, mixer: str = "attention", std: float = 0.3) -> GPT:
    """std 0: every token is equally likely."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, head_size=8, block_size=block_size, vocab_size=vocab_size, mixer=mixer))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def logprobs(model: GPT, ids: list[int]) -> torch.Tensor:
    """Of what comes after `ids`, (V,)."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].double().log_softmax(0)


def config_of(task: str, **values) -> EvaluateConfig:
    return EvaluateConfig(task=task, **values)


def write_rows(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def cells_of(table: str) -> dict[str, list[str]]:
    """The printed table: measure -> value of each checkpoint."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in lines}


# -- text -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 16, 17, 24, 25, 100])
def test_windows_score_every_token_once(block_size, n):
    ids = np.arange(n + 1)
    windows = list(windows_of(ids, block_size))
    scored = [token for window in windows for token in window.ids[len(window.ids) - window.n_scored:]]
    assert scored == ids[1:].tolist()
    for window in windows:
        assert 1 <= window.n_scored < len(window.ids) <= block_size + 1
        assert window.ids[0] == 0 or len(window.ids) - window.n_scored >= block_size / 2  # what the first of them sees


@pytest.mark.parametrize("mixer", ["attention", "gated_delta"])
def test_bits_per_byte_equal_a_loop_over_positions(tokenizer, english, mixer):
    """Documents shorter than the context, and longer than several; with the last batch smaller than the others."""
    model, texts = model_of(16, tokenizer.vocab_size, mixer), [english[6][:150], "é", english[7][:40], english[8][:90]]
    expected = []
    for text in texts:
        ids, nats = [tokenizer.separator_id, *tokenizer.encode(text)], 0.0
        for i in range(1, len(ids)):
            start = max(0, math.ceil((i - 16) / 8) * 8)  # of the first window of 16 inputs, 8 apart, that predicts ids[i]
            nats -= logprobs(model, ids[start:i])[ids[i]].item()
        expected.append(nats)
    assert max(len(tokenizer.encode(text)) for text in texts) > 40
    documents = document_losses(model, tokenizer, CPU, texts, batch_size=5)
    assert [one.text_nats for one in documents] == pytest.approx(expected, rel=1e-5)
    assert [one.text_bytes for one in documents] == [len(text.encode()) for text in texts]
    assert [one.tokens for one in documents] == [len(tokenizer.encode(text)) for text in texts]
    measured, rows = score_text(model, tokenizer, CPU, texts, config_of("text", batch_size=1))
    n_bytes = sum(len(text.encode()) for text in texts)
    assert measured["bits per byte"].value == pytest.approx(sum(expected) / math.log(2) / n_bytes, rel=1e-5)
    assert measured["nats per token"].value * measured["tokens"].value == pytest.approx(sum(expected), rel=1e-5)
    assert [row["nats"] for row in rows] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing(tokenizer, english):
    measured, _ = score_text(model_of(16, tokenizer.vocab_size, std=0.0), tokenizer, CPU, english[6:8], config_of("text"))
    n_tokens, n_bytes = len(tokenizer.encode_batch(english[6:8])[0]), len("".join(english[6:8]).encode())
    assert measured["bits per byte"].value == pytest.approx(math.log2(tokenizer.vocab_size) * n_tokens / n_bytes, rel=1e-6)
    assert measured["nats per token"].value == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)


def test_standard_errors_by_hand():
    # 2 and 6 bits in 1 and 2 bytes: 8/3 a byte, from which they are -2/3 and 2/3 away; √(2/1 · 8/9) / 3 = 4/9
    documents = [LossSums(text_nats=2 * math.log(2), text_bytes=1), LossSums(text_nats=6 * math.log(2), text_bytes=2)]
    measured = bits_per_byte(documents)
    assert (measured.value, measured.error) == (pytest.approx(8 / 3), pytest.approx(4 / 9))
    assert str(measured) == "2.6667 ± 0.4444" and str(bits_per_byte(documents[:1])) == "2.0000"
    half = share([True, False, True, False])
    assert (half.value, half.error) == (0.5, pytest.approx(math.sqrt(0.25 / 3)))
    assert str(half) == "50.0% ± 28.9%" and str(share([True])) == "100.0%"


# -- multiple choice --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block_size", [64, 12])
def test_scores_are_sums_over_each_endings_tokens(tokenizer, block_size):
    """Against the probabilities after each prefix; of a text longer than the context, those of its last tokens."""
    model, choices = model_of(block_size, tokenizer.vocab_size), [choice_of(row, "")
                                                                  for row in HELLASWAG]
    longest = 0
    _, rows = score_choice(model, tokenizer, CPU, choices, config_of("choice", batch_size=5))
    for row, choice in zip(rows, choices):
        context = [tokenizer.separator_id, *tokenizer.encode(choice.context)]
        for score, ending in zip(row["scores"], choice.endings):
            ids = context + tokenizer.encode(" " + ending)
            longest, n_cut = max(longest, len(ids) - 1), max(0, len(ids) - 1 - block_size)
            assert score == pytest.approx(sum(logprobs(model, ids[n_cut:i])[ids[i]].item()
                                              for i in range(len(context), len(ids))), rel=1e-5)
        assert row["chosen"] == np.argmax(row["scores"]) and row["label"] == choice.label
    assert longest > 12


def test_a_long_ending_is_likelier_per_character(tokenizer):
    """To a model that knows nothing, with a token for each byte, n bytes after a space are n + 1 tokens: the shortest ending
    is likeliest, and the longest per character."""
    choices = [Choice("x", ["abc", "d", "ee"], label, "") for label in (0, 0, 0, 1)]
    measured, rows = score_choice(model_of(16, 261, std=0.0), Tokenizer.train(["abc"], 261), CPU, choices,
                                  config_of("choice"))
    assert rows[0]["scores"] == pytest.approx([-4 * math.log(261), -2 * math.log(261), -3 * math.log(261)], rel=1e-5)
    assert (rows[0]["chosen"], rows[0]["chosen_norm"]) == (1, 0)
    assert [measured[name].value for name in ("acc", "acc_norm", "by chance")] == pytest.approx([0.25, 0.75, 1 / 3])
    assert measured["acc"].error == measured["acc_norm"].error == pytest.approx(0.25)  # √(3/16 / 3)
    choices = [Choice("x", ["ab", "éé"], 0, "")]
    _, rows = score_choice(model_of(16, 261, std=0.0), Tokenizer.train(["abc"], 261), CPU, choices, config_of("choice"))
    assert rows[0]["chosen_norm"] == 0  # 3 tokens for 2 characters against 5 for 2; per byte it would be the other


def test_an_ending_comes_after_one_space():
    tokenizer = Tokenizer.train(["abc"], 261)
    window, other = endings_of(Choice("x  ", ["é", "ab"], 0, ""), tokenizer, 16)
    assert window.ids.tolist() == [tokenizer.separator_id, *b"x \xc3\xa9"] and window.n_scored == 3 == other.n_scored
    window, _ = endings_of(Choice("", ["a", "b"], 0, ""), tokenizer, 16)
    assert window.ids.tolist() == [tokenizer.separator_id, *b" a"] and window.n_scored == 2


def test_an_ending_has_a_token_even_where_it_merges_with_the_context():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" b": 256, b"a b": 257}
    tokenizer = Tokenizer.from_ranks(ranks, ".+")
    window, _ = endings_of(Choice("a", ["b", "c"], 0, ""), tokenizer, 4)
    assert window.ids.tolist() == [tokenizer.separator_id, 257] and window.n_scored == 1


@pytest.mark.parametrize("row, label", [
    (HELLASWAG[1], 1), (HELLASWAG[1] | {"label": 3}, 3), (ARC, 1),
    (ARC | {"choices": {"text": ["dog", "one"], "label": ["1", "2"]}, "answerKey": "2"}, 1),
    ({"query": "Go on", "choices": ["a", "b"], "gold": 1}, 1),
    ({"question": "Which?", "choices": ["a", "b"], "answer": 0}, 0)])
def test_forms_of_rows(row, label):
    choice = choice_of(row, "here")
    endings = row.get("endings") or row["choices"]
    assert choice.label == label and choice.endings == (endings["text"] if isinstance(endings, dict) else endings)
    assert choice.context in row.values() and choice.where == "here"


def test_columns_by_name():
    row = {"text": "Go on", "ctx": "not this", "endings": ["a", "b"], "label": 0, "right": "1"}
    choice = choice_of(row, "", question_column="text", answer_column="right")
    assert (choice.context, choice.label) == ("Go on", 1)


@pytest.mark.parametrize("changes, words", [
    ({"label": ""}, "its label is '': must be one of 0, 1, 2, 3"), ({"label": "4"}, "its label is '4'"),
    ({"label": -1}, "its label is '-1'"), ({"label": None}, "its label is 'None'"), ({"label": "B"}, "its label is 'B'"),
    ({"endings": ["one"]}, "has 1 endings: give at least 2"), ({"endings": "one"}, "has no list of endings"),
    ({"endings": {"label": ["A"]}}, "has no list of endings"), ({"endings": ["a", ""]}, "an ending is empty"),
    ({"endings": ["a", 5]}, "is no text"), ({"ctx": None}, "is no text")])
def test_rows_that_cannot_be_used(changes, words):
    with pytest.raises(BadInput, match=words):
        choice_of(HELLASWAG[0] | changes, "")


def test_an_ending_longer_than_the_context(tokenizer):
    choice = Choice("x", ["a", "one two three"], 0, "file: line 3")
    with pytest.raises(BadInput, match="file: line 3: an ending has .* tokens, the model's context holds 2: leave the row"):
        score_choice(model_of(2, tokenizer.vocab_size), tokenizer, CPU, [choice], config_of("choice"))


def test_losses_come_from_whole_batches_of_any_size(tokenizer):
    model, ids = model_of(16, tokenizer.vocab_size), np.random.default_rng(0).integers(0, 256, 80)
    windows = [window for n in (3, 80, 20) for window in windows_of(ids[:n], 16)]
    alone, together = (dict(losses_of(model, CPU, windows, batch_size)) for batch_size in (1, 100))
    assert alone.keys() == together.keys() == set(range(len(windows)))
    for i, window in enumerate(windows):
        assert len(alone[i]) == window.n_scored and torch.allclose(alone[i], together[i], atol=1e-5)


# -- the command ------------------------------------------------------------------------------------------------------

def test_text_side_by_side(run_train, capsys, refused, tmp_path, english):
    """Two checkpoints, in a table and a row for each document; the one that was trained knows more."""
    paths = [run_train("--max_iter=30", "--learning_rate=0.02"), run_train("--max_iter=1", checkpoint="other/gpt.pt")]
    texts = write_rows(tmp_path / "texts.jsonl", [{"body": text[:200]} for text in english[41:45]])
    out, flags = tmp_path / "out" / "rows.jsonl", ["--device=cpu", "--dtype=fp32", "--checkpoint_path", *map(str, paths)]
    command = [*flags, f"--dataset={texts}", "--text_column=body", "--limit=3", f"--out_path={out}"]
    capsys.readouterr()
    evaluate.main(command)
    printed = capsys.readouterr().out
    cells = cells_of(printed)
    assert cells[""] == [str(path) for path in paths]
    trained, fresh = (float(cell.split(" ± ")[0]) for cell in cells["bits per byte"])
    assert trained < fresh - 0.1 and f"{texts}: 3 documents" in printed and "cpu, fp32" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["checkpoint"], row["document"]) for row in rows] == [(str(path), i) for path in paths for i in (1, 2, 3)]
    assert [row["bytes"] for row in rows[:3]] == [len(text[:200].encode()) for text in english[41:44]]
    nats, n_bytes = (sum(row[name] for row in rows[:3]) for name in ("nats", "bytes"))
    assert trained == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-4)
    assert cells["tokens"] == [f"{sum(row['tokens'] for row in rows[:3]):,}"] * 2
    refused(evaluate.main, command, f"--out_path={out}: exists", "--overwrite")
    evaluate.main([*command, "--overwrite", "--max_bytes=1"])
    assert len(out.read_text().splitlines()) == 2


def test_choice_of_a_local_file(run_train, capsys, tmp_path):
    path, out = run_train("--max_iter=1", "--block_size=32"), tmp_path / "out.jsonl"
    rows = write_rows(tmp_path / "rows.jsonl", [*HELLASWAG, ARC])
    capsys.readouterr()
    evaluate.main([f"--checkpoint_path={path}", "--task=choice", f"--dataset={rows}", "--device=cpu", f"--out_path={out}"])
    printed = capsys.readouterr().out
    said = [json.loads(line) for line in out.read_text().splitlines()]
    acc = share([row["chosen"] == row["label"] for row in said])
    assert cells_of(printed)["acc"] == [str(acc)] and "4 questions" in printed
    assert [(row["question"], row["label"], len(row["scores"])) for row in said] == [
        ("The array is", 0, 4), ("If x is None, the", 1, 4), ("Returns", 2, 4), ("Which is a number?", 1, 3)]


def test_choice_of_the_hub(run_train, hub, capsys):
    """HellaSwag's validation split is what is measured without a word about it."""
    path = run_train("--max_iter=1", "--block_size=32")
    HUB.add("Rowan/hellaswag", {"default": [HELLASWAG]})
    readme = HUB.folder / "Rowan" / "hellaswag" / "README.md"
    readme.write_text(readme.read_text().replace("split: train", "split: validation"))
    HUB.add("allenai/ai2_arc", {"ARC-Easy": [[ARC] * 5]})
    flags = [f"--checkpoint_path={path}", "--task=choice", "--device=cpu"]
    capsys.readouterr()
    evaluate.main([*flags, "--limit=2"])
    assert "Rowan/hellaswag, validation: 2 questions" in capsys.readouterr().out
    evaluate.main([*flags, "--dataset=allenai/ai2_arc", "--dataset_config=ARC-Easy", "--split=train"])
    assert "allenai/ai2_arc, train: 5 questions" in capsys.readouterr().out


def test_answers(run_train, capsys, tmp_path, monkeypatch):
    """One of two questions is answered right, by task; a model says what it is told to."""
    path, out = run_train("--max_iter=1", "--block_size=64"), tmp_path / "out.jsonl"
    rows = write_rows(tmp_path / "rows.jsonl", [
        {"question": "3 + 4?", "answer": "7", "task": "sums"}, {"question": "4 + 4?", "answer": "8", "task": "sums"},
        {"question": "Go", "answer": "on  7", "task": "words"}])
    flags = [f"--checkpoint_path={path}", "--task=answers", "--device=cpu", "--dtype=fp32"]
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "answers_to", lambda model, tokenizer, prompts, n: ["7"] * len(prompts))
        capsys.readouterr()
        evaluate.main([*flags, f"--dataset={rows}", f"--out_path={out}"])
    cells = cells_of(capsys.readouterr().out)
    assert cells["answered right"] == [str(share([True, False, False]))] == ["33.3% ± 33.3%"]
    assert cells["- sums"] == ["50.0% ± 50.0%"] and cells["- words"] == ["0.0%"]
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["question"], row["said"], row["right"]) for row in said] == [
        ("3 + 4?", "7", True), ("4 + 4?", "7", False), ("Go", "7", False)]
    # nearly uniform after a step: log2 of the vocabulary a token, one or two bytes each
    assert 3 < float(cells["bits per byte of the answers"][0]) < 9.5


def test_the_builtin_questions_are_those_held_out(run_train, capsys, tmp_path):
    path, out = run_train("--max_iter=1", "--block_size=64"), tmp_path / "out.jsonl"
    capsys.readouterr()
    evaluate.main([f"--checkpoint_path={path}", "--task=answers", "--device=cpu", "--limit=24", f"--out_path={out}"])
    printed = capsys.readouterr().out
    assert "builtin: 24 conversations" in printed and cells_of(printed)["answered right"] == ["0.0% ± 0.0%"]
    assert len([name for name in cells_of(printed) if name.startswith("- ")]) > 6
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(said) == int(cells_of(printed)["questions that fit into the context"][0]) > 12
    assert {row["question"] for row in said} <= {question.text for question in make_questions(24, 0, held_out=True)}


def test_all_conversations_of_a_dataset_are_asked(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": f"{i}?", "a": f"{i}"} for i in range(30)])
    config = config_of("answers", dataset=str(rows), question_column="q", answer_column="a")
    assert [one.messages[1]["content"] for one in read_questions(config)] == [str(i) for i in range(30)]


def test_a_model_without_tokens_for_conversations(run_train, refused, tmp_path):
    """It is refused before the one before it is asked anything."""
    path, bare = run_train("--max_iter=1"), tmp_path / "bare.pt"
    blob = load_checkpoint(path)
    tokenizer = json.loads(blob["tokenizer"])
    tokenizer["special_tokens"] = {name.replace("<|user|>", "<|other|>"): i
                                   for name, i in tokenizer["special_tokens"].items()}
    save_checkpoint(bare, blob | {"tokenizer": json.dumps(tokenizer)})
    refused(evaluate.main, ["--checkpoint_path", str(path), str(bare), "--task=answers", "--device=cpu"],
            f"{bare}: the tokenizer has no <|user|> token")


def test_what_is_refused(run_train, refused, tmp_path):
    path = run_train("--max_iter=1")
    rows = write_rows(tmp_path / "rows.jsonl", [HELLASWAG[0], {"ctx": "no label", "endings": ["a", "b"]}])
    base, choice = [f"--checkpoint_path={path}", "--device=cpu"], ["--task=choice", f"--dataset={rows}"]
    for flags, *words in [
            (["--dataset="], "--dataset=: is empty"),
            ([f"--dataset={tmp_path / 'none.txt'}"], "none.txt: no such file or folder"),
            ([f"--dataset={rows}"], "rows.jsonl", "text"),
            (["--dataset=a/b,c/d"], "--dataset=a/b,c/d: one at a time"),
            (["--split=test"], "--split=test", "train split"),
            (["--task=guess"], "--task=guess: choose one of text, choice, answers"),
            (["--task=choice", "--dataset=builtin"], "--dataset=builtin: has no endings"),
            (["--task=choice", f"--dataset={tmp_path / 'none.jsonl'}"], "none.jsonl: no such file"),
            (choice, "rows.jsonl: line 2: has no column label", "ctx, endings", "--answer_column"),
            ([*choice, "--question_column=q"], "line 1: has no column q", "--question_column"),
            (["--task=answers", f"--dataset={rows}"], "rows.jsonl: line 1: has no messages"),
            (["--task=answers", "--question_column=q"], "give both or none"),
            ([f"--out_path={tmp_path}"], "a folder"),
            (["--batch_size=0"], "--batch_size=0: must be at least 1")]:
        refused(evaluate.main, [*base, *flags], *words)
    refused(evaluate.main, ["--checkpoint_path", str(path), str(tmp_path / "gone.pt")], "gone.pt: no checkpoint to read")
