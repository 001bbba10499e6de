"""Scores against slow loops over positions and numbers by hand, and the command on tiny models."""
import json
import math

import numpy as np
import pytest
import torch
from test_conversations import ARC, few_documents, write_jsonl  # noqa: F401 (a fixture)

import evaluate
from conftest import HUB, train_tiny
from dataloader import PackedBatches
from evaluate import (
    EvaluateConfig,
    accuracy,
    adapted_bits_per_byte,
    adapted_proportion,
    answer_prompts,
    bits_per_byte,
    document_losses,
    ending_windows,
    eval_prompts,
    exact_match,
    greedy_answers,
    group_by_kind,
    group_by_task,
    mean_losses,
    proportion,
    read_questions,
    score_answers,
    score_choices,
    score_text,
    sliding_windows,
    token_losses,
)
from layers import MIXERS
from learner import AdaptConfig, Learner, encode_documents
from model import GPT, GPTConfig
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.config import BadInput
from runtime.device import Machine
from runtime.metrics import LossSums
from sampling import GREEDY, generate_texts
from tasks.builtin_questions import make_questions
from tasks.conversations import Conversation, ReadReport
from tasks.multiple_choice import Choice, parse_choice
from tokenizer import Tokenizer

CPU = Machine(torch.device("cpu"), "fp32")
HELLASWAG = [{"ctx": "The array is", "endings": ["sorted in place.", "a dog.", "blue", "wet"], "label": "0"},
             {"ctx": "If x is None, the", "endings": ["sea", "default is used", "cat", "dog runs"], "label": "1"},
             {"ctx": "Returns", "endings": ["a copy", "the moon", "an élan", "no"], "label": "2"}]


@pytest.fixture(scope="module")
def tokenizer(english) -> Tokenizer:
    return Tokenizer.train(english[:5], 400)


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer.train(["abc"], 261)


def make_model(block_size: int, vocab_size: int, mixer: str = "attention", std: float = 0.3) -> GPT:
    """std 0: every token is equally likely."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, head_size=8, block_size=block_size, vocab_size=vocab_size, mixer=mixer))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def next_logprobs(model: GPT, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the token after `ids`, (V,)."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].double().log_softmax(0)


def parse_table(printed: str) -> dict[str, list[str]]:
    """name of the metric -> its direction and the value of each checkpoint."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in printed.splitlines()
             if line.startswith("|")]
    return {name: cells for name, *cells in lines}


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def conversation(*contents: str, kind: str = "", task: str = "") -> Conversation:
    """The user and the assistant take turns."""
    return Conversation([{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)],
                        "here", kind, task)


# -- token losses -----------------------------------------------------------------------------------------------------

def test_token_losses_do_not_depend_on_the_batch(tokenizer):
    model, ids = make_model(16, tokenizer.vocab_size), np.random.default_rng(0).integers(0, 256, 80)
    windows = [window for n in (3, 80, 20) for window in sliding_windows(ids[:n], 16)]
    single, batched = (dict(token_losses(model, CPU, windows, batch_size)) for batch_size in (1, 100))
    assert single.keys() == batched.keys() == set(range(len(windows)))
    for i, window in enumerate(windows):
        assert len(single[i]) == window.n_scored and torch.allclose(single[i], batched[i], atol=1e-5)


# -- text -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 16, 17, 24, 25, 100])
def test_windows_score_every_token_once_from_half_a_block_or_more(block_size, n):
    ids = np.arange(n + 1)
    windows = list(sliding_windows(ids, block_size))
    scored = [token for window in windows for token in window.ids[len(window.ids) - window.n_scored:]]
    assert scored == ids[1:].tolist()
    for window in windows:
        assert 1 <= window.n_scored < len(window.ids) <= block_size + 1
        assert window.ids[0] == 0 or len(window.ids) - window.n_scored >= block_size / 2


@pytest.mark.parametrize("mixer", ["attention", "gated_delta"])
def test_document_losses_equal_a_loop_over_positions(tokenizer, english, mixer):
    """Of documents shorter than the context and longer than several; the last batch is smaller than the others."""
    model = make_model(16, tokenizer.vocab_size, mixer)
    texts = [english[6][:150], "é", english[7][:40], english[8][:90]]
    expected = []
    for text in texts:
        ids, nats = [tokenizer.separator_id, *tokenizer.encode(text)], 0.0
        for i in range(1, len(ids)):
            start = max(0, math.ceil((i - 16) / 8) * 8)  # of the first window of 16 inputs, 8 apart, that predicts ids[i]
            nats -= next_logprobs(model, ids[start:i])[ids[i]].item()
        expected.append(nats)
    assert max(len(tokenizer.encode(text)) for text in texts) > 40
    documents = document_losses(model, tokenizer, CPU, texts, batch_size=5)
    assert [sums.text_nats for sums in documents] == pytest.approx(expected, rel=1e-5)
    assert [sums.text_bytes for sums in documents] == [len(text.encode()) for text in texts]
    assert [sums.tokens for sums in documents] == [len(tokenizer.encode(text)) for text in texts]
    scores, rows = score_text(model, tokenizer, CPU, texts, EvaluateConfig(task="text", batch_size=1))
    n_bytes = sum(len(text.encode()) for text in texts)
    assert scores["bits per byte"].value == pytest.approx(sum(expected) / math.log(2) / n_bytes, rel=1e-5)
    assert scores["nats per token"].value * scores["tokens"].value == pytest.approx(sum(expected), rel=1e-5)
    assert [row["nats"] for row in rows] == pytest.approx(expected, rel=1e-5)


def test_uniform_model_has_the_loss_of_its_vocabulary(tokenizer, english):
    texts = english[6:8]
    scores, _ = score_text(make_model(16, tokenizer.vocab_size, std=0.0), tokenizer, CPU, texts, EvaluateConfig())
    n_tokens, n_bytes = len(tokenizer.encode_batch(texts)[0]), len("".join(texts).encode())
    assert scores["bits per byte"].value == pytest.approx(math.log2(tokenizer.vocab_size) * n_tokens / n_bytes, rel=1e-6)
    assert scores["nats per token"].value == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)


def test_standard_error_of_bits_per_byte_by_hand():
    # 2 and 6 bits in 1 and 2 bytes: 8/3 a byte, from which they are -2/3 and 2/3 away; √(2/1 · 8/9) / 3 = 4/9
    documents = [LossSums(text_nats=2 * math.log(2), text_bytes=1), LossSums(text_nats=6 * math.log(2), text_bytes=2)]
    score = bits_per_byte(documents)
    assert (score.value, score.stderr) == (pytest.approx(8 / 3), pytest.approx(4 / 9))
    assert str(score) == "2.6667 ± 0.4444" and str(bits_per_byte(documents[:1])) == "2.0000"


def test_standard_error_of_a_proportion_by_hand():
    half = proportion([True, False, True, False])
    assert (half.value, half.stderr) == (0.5, pytest.approx(math.sqrt(0.25 / 3)))
    assert str(half) == "50.0% ± 28.9%" and str(proportion([True])) == "100.0%"


# -- multiple choice --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block_size", [64, 12])
def test_ending_scores_equal_a_loop_over_positions(tokenizer, block_size):
    """Where the text is longer than the context, from its last tokens."""
    model, choices = make_model(block_size, tokenizer.vocab_size), [parse_choice(row, "") for row in HELLASWAG]
    longest = 0
    _, rows = score_choices(model, tokenizer, CPU, choices, EvaluateConfig(task="choice", batch_size=5))
    for row, choice in zip(rows, choices):
        context = [tokenizer.separator_id, *tokenizer.encode(choice.context)]
        for score, ending in zip(row["scores"], choice.endings):
            ids = context + tokenizer.encode(" " + ending)
            longest, n_cut = max(longest, len(ids) - 1), max(0, len(ids) - 1 - block_size)
            assert score == pytest.approx(sum(next_logprobs(model, ids[n_cut:i])[ids[i]].item()
                                              for i in range(len(context), len(ids))), rel=1e-5)
        assert row["chosen"] == np.argmax(row["scores"]) and row["label"] == choice.label
    assert longest > 12


def test_acc_favours_short_endings_and_acc_norm_long_ones(byte_tokenizer):
    """With a uniform model and a token per byte, an ending of n bytes after a space is n + 1 tokens."""
    model, config = make_model(16, 261, std=0.0), EvaluateConfig(task="choice")
    choices = [Choice("x", ["abc", "d", "ee"], label, "") for label in (0, 0, 0, 1)]
    scores, rows = score_choices(model, byte_tokenizer, CPU, choices, config)
    assert rows[0]["scores"] == pytest.approx([-4 * math.log(261), -2 * math.log(261), -3 * math.log(261)], rel=1e-5)
    assert (rows[0]["chosen"], rows[0]["chosen_norm"]) == (1, 0)
    assert [scores[name].value for name in ("acc", "acc_norm", "chance")] == pytest.approx([0.25, 0.75, 1 / 3])
    assert scores["acc"].stderr == scores["acc_norm"].stderr == pytest.approx(0.25)  # √(3/16 / 3)


def test_acc_norm_divides_by_characters_not_bytes(byte_tokenizer):
    """3 tokens for 2 characters against 5 for 2; by bytes the second would win."""
    _, rows = score_choices(make_model(16, 261, std=0.0), byte_tokenizer, CPU, [Choice("x", ["ab", "éé"], 0, "")],
                            EvaluateConfig(task="choice"))
    assert rows[0]["chosen_norm"] == 0


def test_ending_follows_one_space(byte_tokenizer):
    first, second = ending_windows(Choice("x  ", ["é", "ab"], 0, ""), byte_tokenizer, 16)
    assert first.ids.tolist() == [byte_tokenizer.separator_id, *b"x \xc3\xa9"] and first.n_scored == 3 == second.n_scored
    first, _ = ending_windows(Choice("", ["a", "b"], 0, ""), byte_tokenizer, 16)
    assert first.ids.tolist() == [byte_tokenizer.separator_id, *b" a"] and first.n_scored == 2


def test_ending_that_merges_with_the_context_still_has_a_token():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" b": 256, b"a b": 257}
    tokenizer = Tokenizer.from_ranks(ranks, ".+")
    window, _ = ending_windows(Choice("a", ["b", "c"], 0, ""), tokenizer, 4)
    assert window.ids.tolist() == [tokenizer.separator_id, 257] and window.n_scored == 1


def test_each_ending_may_have_its_own_context(tokenizer):
    """WinoGrande's options: what follows the gap is scored after each of them, as in lm-eval."""
    row = {"sentence": "The array is sorted and the _ is returned here.", "option1": "list", "option2": "copy", "answer": 2}
    model = make_model(64, tokenizer.vocab_size)
    _, (scored,) = score_choices(model, tokenizer, CPU, [parse_choice(row, "")], EvaluateConfig(task="choice"))
    for score, option in zip(scored["scores"], ("list", "copy")):
        context = [tokenizer.separator_id, *tokenizer.encode(f"The array is sorted and the {option}")]
        ids = context + tokenizer.encode(" is returned here.")
        assert score == pytest.approx(sum(next_logprobs(model, ids[:i])[ids[i]].item()
                                          for i in range(len(context), len(ids))), rel=1e-5)


def test_ending_longer_than_the_context_is_refused_or_left_out(tokenizer):
    long, short = Choice("x", ["a", "one two three"], 0, "file: line 3"), Choice("x", ["a", "b"], 0, "file: line 4")
    model = make_model(2, tokenizer.vocab_size)
    score = lambda choices, **flags: score_choices(model, tokenizer, CPU, choices, EvaluateConfig(task="choice", **flags))
    with pytest.raises(BadInput, match="line 3: an ending has .* tokens, the model's context holds 2: --skip_errors=1"):
        score([long, short])
    scores, rows = score([long, short], skip_errors=True)
    assert len(rows) == 1 and scores["questions longer than the context, left out"].value == 1
    with pytest.raises(BadInput, match="no question has endings that fit"):
        score([long], skip_errors=True)


# -- questions --------------------------------------------------------------------------------------------------------

def test_prompt_is_the_last_question_of_a_conversation(byte_tokenizer):
    prompts = eval_prompts([conversation("a", "b", "c", "d", kind="k", task="t"), conversation("e", "f", "g"),
                            conversation("only a question"), conversation("too long" * 9, "i")], byte_tokenizer, 40)
    assert [(one.question, one.answer, one.kind, one.task) for one in prompts] == [("c", "d", "k", "t"), ("e", "f", "", "")]
    assert byte_tokenizer.decode(prompts[0].ids) == (
        "<|endoftext|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>")


def test_batched_answers_equal_single_ones(byte_tokenizer):
    model = make_model(64, byte_tokenizer.vocab_size, std=0.4)
    prompts = eval_prompts([conversation("who" * n, "x") for n in (1, 5, 2, 5, 3)], byte_tokenizer, 64)
    outputs = greedy_answers(model, byte_tokenizer, [prompt.ids for prompt in prompts], 9)
    assert outputs == ["".join(text for _, text in generate_texts(model, byte_tokenizer, [prompt.ids], 9, GREEDY))
                       for prompt in prompts]
    # no more tokens than the longest right answer and its end
    rows = answer_prompts(model, byte_tokenizer, prompts, 9)
    shorter = greedy_answers(model, byte_tokenizer, [prompt.ids for prompt in prompts], 2)
    assert [row["output"] for row in rows] == shorter != outputs


def test_answers_do_not_depend_on_the_batch(byte_tokenizer, monkeypatch):
    """The longest right answer of all limits every answer, in whichever batch it is."""
    model = make_model(64, byte_tokenizer.vocab_size, std=0.4)
    prompts = eval_prompts([conversation("who" * n, "x" * n) for n in (1, 2, 3, 4, 5)], byte_tokenizer, 64)
    together = answer_prompts(model, byte_tokenizer, prompts, 9)
    monkeypatch.setattr(evaluate, "PROMPTS_PER_BATCH", 2)
    assert answer_prompts(model, byte_tokenizer, prompts, 9) == together
    assert [row["question"] for row in together] == ["who" * n for n in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("output, is_match", [(" a  b\n", True), ("a b.", False), ("A b", False), ("ab", False)])
def test_exact_match_ignores_whitespace_only(output, is_match):
    assert exact_match(output, "a b") == is_match


def test_accuracy_by_kind_and_task():
    """A task of two kinds is two; the kinds and tasks come from fields, whatever text is in them."""
    rows = [{"kind": kind, "task": task, "correct": correct} for kind, task, correct in (
        ("x", "a", True), ("x", "b", False), ("y", "a", True), ("z: 1", "z: 1", False), ("", "", False))]
    assert accuracy(rows) == 0.4
    assert {kind: accuracy(group) for kind, group in group_by_kind(rows).items()} == {"x": 0.5, "y": 1, "z: 1": 0}
    assert {task: accuracy(group) for task, group in group_by_task(rows).items()} == {
        "x: a": 1, "x: b": 0, "y: a": 1, "z: 1": 0}


def test_mean_losses_of_answers_equal_a_loop_over_positions(byte_tokenizer):
    """Of the answers and their ends alone, although conversations share rows. Ends count as tokens, but have no bytes."""
    model = make_model(32, byte_tokenizer.vocab_size)
    conversations = [conversation("a", "bé", "c", "d"), conversation("e", "fgh"), conversation("i", "j")]
    nats, text_nats, n_tokens, n_bytes = 0.0, 0.0, 0, 0
    for one in conversations:
        ids, assistant_mask = byte_tokenizer.encode_chat(one.messages)
        for i, is_target in enumerate(assistant_mask):
            if is_target:
                loss = -next_logprobs(model, ids[:i])[ids[i]].item()
                nats, n_tokens = nats + loss, n_tokens + 1
                if ids[i] < 256:
                    text_nats, n_bytes = text_nats + loss, n_bytes + 1
    batches = PackedBatches(byte_tokenizer, conversations, 1, 32, 0)
    losses = mean_losses(model, byte_tokenizer, CPU, batches.sequential())
    assert losses["val_loss"] == pytest.approx(nats / n_tokens, rel=1e-5)
    assert losses["val_bpb"] == pytest.approx(text_nats / math.log(2) / n_bytes, rel=1e-5)
    assert (losses["val_tokens"], losses["val_bytes"]) == (n_tokens, n_bytes)


def test_all_conversations_of_a_dataset_are_read(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"q": f"{i}?", "a": f"{i}"} for i in range(30)])
    config = EvaluateConfig(task="answers", dataset=str(rows), question_column="q", answer_column="a")
    assert [one.messages[1]["content"] for one in read_questions(config, ReadReport())] == [str(i) for i in range(30)]


# -- learning ---------------------------------------------------------------------------------------------------------

def make_learner(block_size: int, vocab_size: int, mixer: str = "attention", scope: str = "all") -> Learner:
    config = AdaptConfig(adapt_rate=0.03, adapt_hop=4, adapt_scope=scope)
    return Learner(make_model(block_size, vocab_size, mixer), config, CPU)


@pytest.mark.parametrize("mixer", [*MIXERS, "DA"])
def test_a_learner_that_does_not_learn_has_the_static_losses(tokenizer, english, mixer):
    texts = [english[6][:150], "é", english[7][:40], ""]
    static = document_losses(make_model(16, tokenizer.vocab_size, mixer), tokenizer, CPU, texts, batch_size=5)
    learner = make_learner(16, tokenizer.vocab_size, mixer)
    nats = [learner.read(ids, learn=False).sum().item() for ids in encode_documents(tokenizer, texts)]
    assert [sums.nats for sums in static] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("scope", ["all", "lora"])
def test_adapted_text_equals_a_learner_of_its_own_for_each_document(tokenizer, english, scope):
    texts = [english[6][:150], english[7][:60], "é", english[8][:90]]
    learner, config = make_learner(16, tokenizer.vocab_size, scope=scope), EvaluateConfig()
    before = learner.model.embed.weight.clone()
    scores, rows = score_text(learner.model, tokenizer, CPU, texts, config, learner)
    nats = [make_learner(16, tokenizer.vocab_size, scope=scope).read(ids).sum().item()
            for ids in encode_documents(tokenizer, texts)]
    assert [row["adapted_nats"] for row in rows] == pytest.approx(nats, rel=1e-6)
    assert scores["bits per byte, adapted"].value == pytest.approx(
        sum(nats) / math.log(2) / sum(len(text.encode()) for text in texts))
    static, _ = score_text(make_model(16, tokenizer.vocab_size), tokenizer, CPU, texts, config)
    assert {name: scores[name].value for name in static} == pytest.approx({n: score.value for n, score in static.items()})
    assert torch.equal(learner.model.embed.weight, before)


def test_paired_differences_by_hand():
    # 1 and 3 bits more in 1 and 2 bytes: 4/3 a byte, from which they are -1/3 and 1/3 away; √(2/1 · 2/9) / 3 = 2/9
    documents = [LossSums(text_nats=bits * math.log(2), text_bytes=n) for bits, n in ((2, 1), (6, 2))]
    scores = adapted_bits_per_byte(documents, [3 * math.log(2), 9 * math.log(2)])
    assert [str(score) for score in scores.values()] == ["4.0000 ± 0.6667", "+1.3333 ± 0.2222"]
    # one of four became a hit: 1/4, and √(3/16 / 3) = 1/4
    scores = adapted_proportion("acc", [True, False, False, True], [True, True, False, True])
    assert [str(score) for score in scores.values()] == ["75.0% ± 25.0%", "+25.0% ± 25.0%"]
    assert [*scores] == ["acc, adapted", "acc, adapted minus static"]


def test_adapted_choices_equal_endings_after_the_context_was_learnt(tokenizer):
    choices, config = [parse_choice(row, "") for row in HELLASWAG], EvaluateConfig(task="choice")
    learner = make_learner(64, tokenizer.vocab_size)
    scores, rows = score_choices(learner.model, tokenizer, CPU, choices, config, learner)
    static, static_rows = score_choices(make_model(64, tokenizer.vocab_size), tokenizer, CPU, choices, config)
    for row, choice, static_row in zip(rows, choices, static_rows):
        fresh = make_learner(64, tokenizer.vocab_size)
        fresh.read(torch.tensor([tokenizer.separator_id, *tokenizer.encode(choice.context)]))
        _, (expected,) = score_choices(fresh.model, tokenizer, CPU, [choice], config)
        assert row["adapted_scores"] == pytest.approx(expected["scores"]) != pytest.approx(row["scores"])
        assert row["scores"] == pytest.approx(static_row["scores"])
        assert row["adapted_chosen"] == np.argmax(row["adapted_scores"])
    hits = [row["adapted_chosen_norm"] == row["label"] for row in rows]
    assert str(scores["acc_norm, adapted"]) == str(proportion(hits)) and str(scores["acc"]) == str(static["acc"])


def test_adapted_answers_follow_what_was_learnt_from_the_prompt(byte_tokenizer):
    conversations = [conversation("who" * n, "x", "and " * n, "y" * n) for n in (1, 2)]
    learner, config = make_learner(64, byte_tokenizer.vocab_size), EvaluateConfig(task="answers", answer_tokens=9)
    scores, rows = score_answers(learner.model, byte_tokenizer, CPU, conversations, config, learner)
    _, static = score_answers(make_model(64, byte_tokenizer.vocab_size), byte_tokenizer, CPU, conversations, config)
    for row, prompt in zip(rows, eval_prompts(conversations, byte_tokenizer, 64)):
        fresh = make_learner(64, byte_tokenizer.vocab_size)
        fresh.read(torch.tensor(prompt.ids))
        assert [row["adapted_output"]] == greedy_answers(fresh.model, byte_tokenizer, [prompt.ids], 3)
    assert [row["output"] for row in rows] == [row["output"] for row in static] != [row["adapted_output"] for row in rows]
    assert scores["exact match, adapted"].value == 0 == scores["exact match, adapted minus static"].value


def test_what_learning_diverges_on_is_left_out_and_counted(tokenizer, english, monkeypatch):
    """Of both columns, and the next document is learnt from the weights as they were."""
    texts, learner, step = [english[6][:60], english[7][:60], english[8][:60]], make_learner(16, tokenizer.vocab_size), 0

    def read(ids):
        nonlocal step
        step += 1
        losses = Learner.read(learner, ids)
        if step in diverging:
            raise FloatingPointError("loss or gradient not finite at step 1: lower --adapt_rate, now 0.03")
        return losses
    monkeypatch.setattr(learner, "read", read)
    diverging = [2]
    scores, rows = score_text(learner.model, tokenizer, CPU, texts, EvaluateConfig(), learner)
    expected, _ = score_text(learner.model, tokenizer, CPU, [texts[0], texts[2]], EvaluateConfig(), learner)
    assert scores.pop("left out, as learning from them diverged").value == 1 and [row["document"] for row in rows] == [1, 3]
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {name: score.value for name, score in expected.items()})
    diverging = range(1, 100)
    with pytest.raises(FloatingPointError, match="lower --adapt_rate"):
        score_text(learner.model, tokenizer, CPU, texts, EvaluateConfig(), learner)


# -- the command ------------------------------------------------------------------------------------------------------

def test_adapted_and_static_side_by_side(trained, chat_model, capsys, tmp_path, english):
    """Two checkpoints; the static numbers are those without --adapt."""
    texts, out = write_jsonl(tmp_path / "texts.jsonl", [{"text": text[:300]} for text in english[41:44]]), tmp_path / "out"
    flags = ["--device=cpu", "--dtype=fp32", "--checkpoint_path", str(trained), str(chat_model), f"--dataset={texts}"]
    capsys.readouterr()
    evaluate.main(flags)
    static = parse_table(capsys.readouterr().out)
    evaluate.main([*flags, "--adapt", "--adapt_rate=0.01", f"--out_path={out}"])
    table = parse_table(capsys.readouterr().out)
    assert {name: table[name] for name in static} == static
    assert [*table][2:5] == ["bits per byte", "bits per byte, adapted", "bits per byte, adapted minus static"]
    for plain, adapted, difference in zip(*(table[name][1:] for name in [*table][2:5])):
        plain, adapted, difference = (float(cell.split(" ± ")[0]) for cell in (plain, adapted, difference))
        assert adapted - plain == pytest.approx(difference, abs=2e-4) and difference < -0.1
    assert all(row["adapted_nats"] < row["nats"] for row in read_jsonl(out)) and len(read_jsonl(out)) == 6


def test_text_side_by_side(trained, run_train, capsys, refused, tmp_path, english):
    """Two checkpoints in a table, and a row for each of their documents."""
    paths = [trained, run_train("--max_iter=15", "--learning_rate=0.02", "--val_intervals=100")]
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"body": text[:200]} for text in english[41:45]])
    out, flags = tmp_path / "out" / "rows.jsonl", ["--device=cpu", "--dtype=fp32", "--checkpoint_path", *map(str, paths)]
    command = [*flags, f"--dataset={texts}", "--text_column=body", "--limit=3", f"--out_path={out}"]
    capsys.readouterr()
    evaluate.main(command)
    printed = capsys.readouterr().out
    table = parse_table(printed)
    assert table["metric"] == ["better", *map(str, paths)]
    less, more = (float(cell.split(" ± ")[0]) for cell in table["bits per byte"][1:])
    assert more < less - 0.1 and table["bits per byte"][0] == "lower"
    assert f"{texts}: 3 documents" in printed and "cpu, fp32" in printed
    rows = read_jsonl(out)
    assert [(row["checkpoint"], row["document"]) for row in rows] == [(str(path), i) for path in paths for i in (1, 2, 3)]
    assert [row["bytes"] for row in rows[:3]] == [len(text[:200].encode()) for text in english[41:44]]
    nats, n_bytes = (sum(row[name] for row in rows[:3]) for name in ("nats", "bytes"))
    assert less == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-4)
    assert table["tokens"][1:] == [f"{sum(row['tokens'] for row in rows[:3]):,}"] * 2
    refused(evaluate.main, command, f"--out_path={out}: exists", "--overwrite")
    evaluate.main([*command, "--overwrite", "--max_bytes=1"])
    assert len(read_jsonl(out)) == 2


def test_choice_from_a_local_file(trained, capsys, tmp_path):
    out, rows = tmp_path / "out.jsonl", write_jsonl(tmp_path / "rows.jsonl", [*HELLASWAG, ARC])
    capsys.readouterr()
    evaluate.main([f"--checkpoint_path={trained}", "--task=choice", f"--dataset={rows}", "--device=cpu",
                   f"--out_path={out}"])
    printed, results = capsys.readouterr().out, read_jsonl(out)
    acc = proportion([row["chosen"] == row["label"] for row in results])
    assert parse_table(printed)["acc"] == ["higher", str(acc)] and "4 questions" in printed
    assert [(row["question"], row["label"], len(row["scores"])) for row in results] == [
        ("The array is", 0, 4), ("If x is None, the", 1, 4), ("Returns", 2, 4), ("Which is a number?", 1, 3)]


def test_what_cannot_be_used_is_left_out_and_counted(trained, chat_model, capsys, refused, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [HELLASWAG[0] | {"label": ""}, {"q": "a?", "e": [3, 4], "a": "B"}])
    flags = [f"--checkpoint_path={trained}", "--task=choice", f"--dataset={rows}", "--device=cpu"]
    columns = ["--question_column=q", "--endings_column=e", "--answer_column=a"]
    refused(evaluate.main, [*flags, *columns], "line 1: has no column q", "--skip_errors=1 leaves such rows out")
    evaluate.main([*flags, *columns, "--skip_errors"])
    printed = capsys.readouterr().out
    assert "1 questions" in printed and f"left out 1 that cannot be read, the first: {rows}: line 1: has no col" in printed
    write_jsonl(rows, [{"messages": None}, {"messages": [{"role": "user", "content": "\ud83d"}]}, {"text": "x"},
                       {"question": "\ud83d", "answer": "\ud83d", "task": "\ud83d", "id": 7}])
    flags = [f"--checkpoint_path={chat_model}", "--task=answers", f"--dataset={rows}", "--device=cpu"]
    refused(evaluate.main, flags, "line 1: has no messages", "--skip_errors=1 leaves such rows out")
    evaluate.main([*flags, "--skip_errors", f"--out_path={tmp_path / 'out.jsonl'}"])
    printed = capsys.readouterr().out
    assert "1 conversations" in printed and "left out 3 that" in printed and "columns not used: id" in printed
    assert [row["question"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["\ufffd"]
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "good"}\n{"text"\n')
    flags = [f"--checkpoint_path={trained}", f"--dataset={texts}", "--device=cpu"]
    refused(evaluate.main, flags, "texts.jsonl: line 2", "--skip_errors=1")
    evaluate.main([*flags, "--skip_errors"])
    assert "texts.jsonl: 1 documents" in capsys.readouterr().out


@pytest.mark.parametrize("files, read", [
    (("train", "test"), "test"), (("train", "valid", "test"), "valid"), (("a", "b"), "a")], ids=str)
def test_of_a_folder_the_held_out_files_are_read(files, read, trained, capsys, tmp_path):
    for name in files:
        write_jsonl(tmp_path / f"{name}.jsonl", [HELLASWAG[0] | {"ctx": name}] * 3)
    evaluate.main([f"--checkpoint_path={trained}", "--task=choice", f"--dataset={tmp_path}", "--device=cpu", "--limit=3",
                   f"--out_path={tmp_path / 'out' / 'rows.jsonl'}"])
    assert {row["question"] for row in read_jsonl(tmp_path / "out" / "rows.jsonl")} == {read}


def test_choice_from_the_hub(trained, hub, capsys):
    """HellaSwag's validation split by default; any dataset and split by flags."""
    HUB.add("Rowan/hellaswag", {"default": [HELLASWAG]})
    readme = HUB.folder / "Rowan" / "hellaswag" / "README.md"
    readme.write_text(readme.read_text().replace("split: train", "split: validation"))
    HUB.add("allenai/ai2_arc", {"ARC-Easy": [[ARC] * 5]})
    flags = [f"--checkpoint_path={trained}", "--task=choice", "--device=cpu"]
    capsys.readouterr()
    evaluate.main([*flags, "--limit=2"])
    assert "Rowan/hellaswag, validation: 2 questions" in capsys.readouterr().out
    evaluate.main([*flags, "--dataset=allenai/ai2_arc", "--dataset_config=ARC-Easy", "--split=train"])
    assert "allenai/ai2_arc, train: 5 questions" in capsys.readouterr().out


@pytest.fixture(scope="module")
def chat_model(data_path, tmp_path_factory):
    """A checkpoint with a context of 64 tokens, hardly trained, which tests share and must leave as it is."""
    return train_tiny(tmp_path_factory.mktemp("chat") / "gpt.pt", data_path, "--max_iter=1", "--block_size=64")


def test_answers_by_task(chat_model, capsys, tmp_path, monkeypatch):
    out, rows = tmp_path / "out.jsonl", write_jsonl(tmp_path / "rows.jsonl", [
        {"question": "3 + 4?", "answer": "7", "task": "sums"}, {"question": "4 + 4?", "answer": "8", "task": "sums"},
        {"question": "Go", "answer": "on  7", "task": "words"}])
    monkeypatch.setattr(evaluate, "greedy_answers", lambda model, tokenizer, prompts, n, show: ["7"] * len(prompts))
    capsys.readouterr()
    evaluate.main([f"--checkpoint_path={chat_model}", "--task=answers", "--device=cpu", "--dtype=fp32",
                   f"--dataset={rows}", f"--out_path={out}"])
    table = parse_table(capsys.readouterr().out)
    assert table["exact match"] == ["higher", "33.3% ± 33.3%"]
    assert table["- sums"] == ["higher", "50.0% ± 50.0%"] and table["- words"] == ["higher", "0.0%"]
    # a model of random weights: log2 of the vocabulary for a token of one or two bytes
    assert table["bits per byte of the answers"][0] == "lower" and 3 < float(table["bits per byte of the answers"][1]) < 9.5
    assert [(row["kind"], row["task"], row["question"], row["output"], row["correct"]) for row in read_jsonl(out)] == [
        ("sums", "sums", "3 + 4?", "7", True), ("sums", "sums", "4 + 4?", "7", False), ("words", "words", "Go", "7", False)]


@pytest.mark.usefixtures("few_documents")
def test_builtin_questions_are_the_held_out_ones(chat_model, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    capsys.readouterr()
    evaluate.main([f"--checkpoint_path={chat_model}", "--task=answers", "--device=cpu", "--limit=24", f"--out_path={out}"])
    printed, rows = capsys.readouterr().out, read_jsonl(out)
    table = parse_table(printed)
    assert "builtin: 24 conversations" in printed and table["exact match"] == ["higher", "0.0% ± 0.0%"]
    assert {"- arithmetic: sum", "- strings: sorted", "- look-ups: after"} <= table.keys()
    assert len(rows) == int(table["questions that fit into the context"][1]) > 12
    assert {row["question"] for row in rows} <= {question.text for question in make_questions(24, 0, held_out=True)}


def test_every_checkpoint_is_checked_before_the_first_is_scored(trained, refused, tmp_path):
    checkpoint, bare = load_checkpoint(trained), tmp_path / "bare.pt"
    tokenizer = json.loads(checkpoint["tokenizer"])
    tokenizer["special_tokens"] = {name.replace("<|user|>", "<|other|>"): token_id
                                   for name, token_id in tokenizer["special_tokens"].items()}
    save_checkpoint(bare, checkpoint | {"tokenizer": json.dumps(tokenizer)})
    refused(evaluate.main, ["--checkpoint_path", str(trained), str(bare), "--task=answers", "--device=cpu"],
            f"{bare}: the tokenizer has no <|user|> token")
    refused(evaluate.main, [f"--checkpoint_path={trained},{trained}"], f"separate the files by spaces: --checkpoint_path "
            f"{trained} {trained}")
    refused(evaluate.main, ["--checkpoint_path", str(trained), str(tmp_path / "gone.pt")], "gone.pt: no checkpoint to read")
    save_checkpoint(bare, checkpoint | {"model": {}})
    refused(evaluate.main, ["--checkpoint_path", str(trained), str(bare), "--device=cpu"], f"{bare}: ", "weights")


@pytest.mark.parametrize("flags, words", [
    (["--dataset="], ["--dataset=: is empty"]), (["--dataset=none.txt"], ["none.txt: no such file or folder"]),
    (["--dataset=ROWS"], ["rows.jsonl", "text"]), (["--dataset=a/b,c/d"], ["--dataset=a/b,c/d: give one at a time"]),
    (["--split=test"], ["--split=test", "train split"]),
    (["--task=guess"], ["--task=guess: choose one of text, choice, answers"]),
    (["--task=choice", "--dataset=builtin"], ["--dataset=builtin: has no endings"]),
    (["--task=choice", "--dataset=none.jsonl"], ["none.jsonl: no such file"]),
    (["--task=choice", "--dataset=ROWS"], ["rows.jsonl: line 2: has no column label", "ctx, endings", "--answer_column"]),
    (["--task=choice", "--dataset=ROWS", "--question_column=q"], ["line 1: has no column q", "--question_column"]),
    (["--task=answers", "--dataset=ROWS"], ["rows.jsonl: line 1: has no messages"]),
    (["--task=answers", "--question_column=q"], ["give both or none"]),
    (["--adapt_hop=3"], ["--adapt_hop=3: is only used when the model learns: add --adapt"]),
    (["--adapt", "--adapt_scope=norms"], ["gpt.pt: --adapt_scope=norms: this model has no parameters there"]),
    (["--out_path=FOLDER"], ["a folder"]), (["--batch_size=0"], ["--batch_size=0: must be at least 1"])], ids=str)
def test_bad_flags_are_refused(trained, refused, tmp_path, flags, words):
    rows = write_jsonl(tmp_path / "rows.jsonl", [HELLASWAG[0], {"ctx": "no label", "endings": ["a", "b"]}])
    flags = [flag.replace("ROWS", str(rows)).replace("FOLDER", str(tmp_path)) for flag in flags]
    refused(evaluate.main, [f"--checkpoint_path={trained}", "--device=cpu", *flags], *words)
