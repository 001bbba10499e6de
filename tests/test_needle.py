"""Needles in haystacks: a model that copies finds every one, a unigram model is at chance, and scores equal slow loops."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_evaluate import CPU, make_model, next_logprobs

import evaluate
from candidates import score_continuations
from evaluate import EvaluateConfig, score_needles
from experiments.needle_report import needle_scores, needle_tables
from layers import MIXERS
from runtime.config import BadInput
from tasks.needle import Haystack, default_lengths, make_needles
from tokenizer import Tokenizer

LENGTHS, DEPTHS = (120, 200), (0.0, 0.3, 1.0)


@pytest.fixture(scope="module")
def tokenizer(english) -> Tokenizer:
    return Tokenizer.train(english[:5], 400)


def make_haystack(tokenizer: Tokenizer, text: str) -> Haystack:
    return Haystack(np.array(tokenizer.encode(text)), tokenizer.encode, tokenizer.separator_id)


# -- questions --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_is_the_text_with_the_fact_at_its_depth(tokenizer, english, length):
    haystack = make_haystack(tokenizer, english[6])
    for needle in make_needles(5, 4, seed=1):
        without = haystack.prompt(needle, length, None)
        question = tokenizer.encode(needle.question)
        passage = tokenizer.decode(without[1:-len(question)]).removesuffix("\n\n")
        fact = f"{needle.question} {needle.answer}."
        assert without[0] == tokenizer.separator_id and passage in english[6] and needle.answer not in passage
        assert tokenizer.decode(haystack.prompt(needle, length, 0.0)[1:]) == f"{fact}\n\n{passage}\n\n{needle.question}"
        assert tokenizer.decode(haystack.prompt(needle, length, 1.0)[1:]) == f"{passage}\n\n{fact}\n\n{needle.question}"
        middle = haystack.prompt(needle, length, 0.3)
        before, after = tokenizer.decode(middle[1:]).split(f"\n\n{fact}\n\n")
        assert before + after == f"{passage}\n\n{needle.question}"
        n = len(without) - 1 - len(question) - len(tokenizer.encode("\n\n"))
        assert middle[1:1 + round(0.3 * n)] == without[1:1 + round(0.3 * n)]
        assert len(middle) + max(map(len, haystack.choices(needle))) == length
        for choice, ids in zip(needle.choices, haystack.choices(needle)):
            assert tokenizer.decode(question + ids) == f"{needle.question} {choice}"


def test_questions_follow_from_the_seed_and_every_place_is_right_equally_often():
    needles = make_needles(400, 4, seed=0)
    assert needles == make_needles(500, 4, seed=0)[:400] and needles != make_needles(400, 4, seed=1)
    assert all(len(set(needle.choices)) == 4 for needle in needles)
    counts = np.bincount([needle.label for needle in needles])
    assert len(counts) == 4 and ((counts - 100) ** 2 / 100).sum() < 16.3  # chi-square, p = 0.001


def test_lengths_without_room_for_text_are_left_out_or_refused(tokenizer, english):
    haystack, needles = make_haystack(tokenizer, english[6]), make_needles(4, 4, seed=0)
    shortest = max(map(haystack.n_around, needles)) + 1
    assert default_lengths(haystack, needles, 4 * shortest) == [shortest, 2 * shortest, 4 * shortest]
    assert len(haystack.prompt(needles[0], shortest, 0.5)) < shortest
    with pytest.raises(BadInput, match=f"take {shortest} tokens or more, the model's context holds {shortest - 1}"):
        default_lengths(haystack, needles, shortest - 1)
    with pytest.raises(BadInput, match="--needle_lengths=20: .* leave no room"):
        haystack.prompt(needles[0], 20, 0.5)
    with pytest.raises(BadInput, match="--needle_lengths=200: the text has .* give more text"):
        make_haystack(tokenizer, "short").prompt(needles[0], 200, 0.5)


# -- scores -----------------------------------------------------------------------------------------------------------

class History(list):
    """A cache that is the ids of each row."""

    @property
    def length(self) -> int:
        return max(map(len, self))

    def fork(self, rows: list[int], max_len: int) -> "History":
        forked = History(self[row] for row in rows)
        forked.max_len = max_len
        return forked


class StandIn:
    """What decoding needs of a GPT. predict(ids) -> logits of the next token, (V,)."""

    def __init__(self, predict, block_size: int):
        self.predict, self.config = predict, SimpleNamespace(block_size=block_size)
        self.embed = SimpleNamespace(weight=torch.zeros(1))

    def prefill_distinct(self, prompts, max_len, dtype):
        cache = History(prompt.tolist() for prompt in prompts)
        return torch.stack([self.predict(ids) for ids in cache]), cache

    def eager_forward(self, idx, cache, logits_to_keep):
        cache[:] = [ids + new for ids, new in zip(cache, idx.tolist())]
        return torch.stack([self.predict(ids) for ids in cache])[:, None]


def copying(vocab_size: int):
    """Expects what followed the same three tokens when they came last; at first anything."""
    def predict(ids: list[int]) -> torch.Tensor:
        logits = torch.zeros(vocab_size)
        earlier = [i for i in range(3, len(ids)) if ids[i - 3:i] == ids[-3:]]
        if earlier:
            logits[ids[earlier[-1]]] = 20.0
        return logits
    return predict


def unigram(vocab_size: int):
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    return lambda ids: logits


def score_stand_in(predict, tokenizer, english, n: int):
    config = EvaluateConfig(task="needle", needle_lengths=LENGTHS, needle_depths=DEPTHS, limit=n)
    return score_needles(StandIn(predict, max(LENGTHS)), tokenizer, CPU, english[6:9], config, None)


def test_a_model_that_copies_finds_every_fact_and_is_at_chance_without_it(tokenizer, english):
    scores, rows = score_stand_in(copying(tokenizer.vocab_size), tokenizer, english, 40)
    for row in rows:
        assert row["depth"] is None or row["correct"] and row["exact"] and row["gain"] > 10, row
    assert scores["choice accuracy"].value == scores["exact match"].value == 1 and scores["chance"].value == 0.25
    assert abs(scores["choice accuracy, fact absent"].value - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 40)
    assert scores["exact match, fact absent"].value == 0
    assert len(rows) == 40 * len(LENGTHS) * (1 + len(DEPTHS))


def test_a_unigram_model_is_at_chance_and_gains_nothing(tokenizer, english):
    scores, rows = score_stand_in(unigram(tokenizer.vocab_size), tokenizer, english, 60)
    for name in ("choice accuracy", "choice accuracy, fact absent"):
        assert abs(scores[name].value - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 60)
    assert max(abs(row["gain"]) for row in rows if row["depth"] is not None) < 1e-4
    assert scores["exact match"].value == 0


@pytest.mark.parametrize("mixer", [*MIXERS, "DA"])
def test_continuations_have_the_scores_of_a_loop_over_positions(mixer):
    """Whatever is computed together: 1, 2 or all of the prompts."""
    model, rng = make_model(24, 50, mixer), np.random.default_rng(0)
    prompts = [rng.integers(0, 50, n).tolist() for n in (5, 20, 20)]
    continuations = [[rng.integers(0, 50, n).tolist() for n in (1, 4)] for _ in prompts]
    expected = []
    for prompt, own in zip(prompts, continuations):
        own.append([next_logprobs(model, prompt).argmax().item()])  # the greedy one
        for ids in own:
            logprobs = [next_logprobs(model, prompt + ids[:i]) for i in range(len(ids))]
            expected.append((sum(row[i].item() for row, i in zip(logprobs, ids)),
                             all(row.argmax() == i for row, i in zip(logprobs, ids))))
    for batch_size in (1, 6, 100):
        found = [scored for own in score_continuations(model, prompts, continuations, batch_size) for scored in own]
        assert [scored.logprob for scored in found] == pytest.approx([logprob for logprob, _ in expected], rel=1e-4)
        assert [scored.is_greedy for scored in found] == [is_greedy for _, is_greedy in expected]
    assert [scored.is_greedy for scored in found[2::3]] == [True] * 3


def test_means_are_over_facts_and_cells_have_intervals_by_hand():
    """Two facts: one found at both depths, the other at none; 2 of 4 hits, but only two independent values."""
    rows = [{"fact": fact, "length": 64, "depth": depth, "choices": ("1", "2"), "correct": depth is not None and fact == 0,
             "exact": False, "gain": None if depth is None else 3.0 * (fact == 0)}
            for fact in (0, 1) for depth in (None, 0.0, 1.0)]
    scores, tables = needle_scores(rows), needle_tables(rows)
    assert str(scores["choice accuracy"]) == "50.0% ± 50.0%" and str(scores["choice accuracy, fact absent"]) == "0.0% ± 0.0%"
    assert str(scores["gain of the right answer, nats"]) == "+1.500 ± 1.500"
    table = tables["choice accuracy"]
    # Wilson's interval of 0 of 2: up to 1.96² / (2 + 1.96²) = 66 %; of 1 of 2: 0.5 ± 0.405
    assert table.head == ("tokens", "absent", "0%", "100%")
    assert table.rows == [("64", "0% (0% to 66%)", "50% (9% to 91%)", "50% (9% to 91%)")]


# -- the command ------------------------------------------------------------------------------------------------------

def test_the_command_writes_rows_a_page_and_a_picture(run_train, data_path, refused, capsys):
    model = run_train("--block_size=128", "--max_iter=1")
    command = [f"--checkpoint_path={model}", "--task=needle", f"--dataset={data_path}", "--device=cpu", "--dtype=fp32",
               "--limit=3", "--needle_depths", "0", "1"]
    evaluate.main(command)
    printed, path = capsys.readouterr().out, model.with_suffix("") / "needle.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(row["length"], row["depth"]) for row in rows} >= {(128, None), (128, 0.0), (128, 1.0)}
    assert "| chance |  | 25.0% |" in printed and f"{model}: choice accuracy\n\n| tokens | absent | 0% |" in printed
    page = path.with_suffix(".html").read_text()
    assert page.count("<svg") == 3 and "Exact match" in page and path.with_suffix(".svg").exists()
    evaluate.main([*command, f"--out_path={model.parent / 'again.jsonl'}", "--batch_size=3"])
    again = [json.loads(line) for line in (model.parent / "again.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in again] == [pytest.approx(row["scores"], rel=1e-4) for row in rows]
    refused(evaluate.main, [*command, f"--out_path={model.parent / 'again.jsonl'}"], "exists", "--overwrite")
    refused(evaluate.main, [*command, "--needle_lengths", "64", "256"], "--needle_lengths=256: ", "context of 128 tokens")
    refused(evaluate.main, [*command, "--needle_lengths", "9"], "--needle_lengths=9: ", "leave no room for text")
    words = model.parent / "words.txt"
    words.write_text("A few words.")
    refused(evaluate.main, [*command, f"--dataset={words}"], "--needle_lengths=64: the text has 8 tokens", "give more text")


@pytest.mark.parametrize("flags, words", [
    (["--task=text", "--needle_seed=1"], ["--needle_seed=1: is of --task=needle"]),
    (["--task=needle", "--adapt"], ["--adapt", "is of --task=text, choice, answers"]),
    (["--task=needle", "--split=test"], ["--split=test"]), (["--task=needle", "--needle_depths=2"], ["--needle_depths=2"]),
    (["--task=needle", "--dataset=none"], ["--dataset=none"]), (["--task=needle", "--out_path=x.svg"], ["end it in .jsonl"]),
    (["--task=needle", "--dataset=DATA"], ["fact, question, answer and text take", "context holds 16"])], ids=str)
def test_bad_flags_are_refused(trained, data_path, refused, flags, words):
    flags = [flag.replace("DATA", str(data_path)) for flag in flags]
    refused(evaluate.main, [f"--checkpoint_path={trained}", "--device=cpu", *flags], *words)
