"""grpo.py: gradients against analytic ones, rollouts against the training pass, exact resuming, and whole runs."""
import copy
import dataclasses
import io
import itertools
import json
import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from test_conversations import write_jsonl
from test_model import random_model
from test_sampling import ARCHITECTURES, BYTES, END, START
from torch import nn

import grpo
from conftest import assert_same, run_rows, saved_training, train_tiny
from dataloader import IGNORE_INDEX
from experiments.answer_plots import PANELS, draw_answers
from grpo import (
    ANSWER_LR,
    ON_POLICY,
    Answer,
    AnswerConfig,
    AnswerContext,
    AnswerLoader,
    Group,
    Prompt,
    ProposalLoader,
    SelfPlayOptimizer,
    advantages,
    answer_logprobs,
    compare_evaluations,
    describe_collapse,
    evaluate_answers,
    half_known,
    open_answer_run,
    pack_answers,
    policy_gradient_loss,
    report_answers,
    sample_texts,
)
from model import GPT
from runtime.checkpoint import load_checkpoint, run_folder, save_checkpoint
from runtime.config import BadInput, check_flags, flag
from runtime.device import DeviceConfig, open_machine
from runtime.run import TrainingCommand
from sampling import token_logprobs
from tasks.builtin_questions import is_held_out
from tasks.checkable import PROPOSE, CheckableQuestion
from tokenizer import Tokenizer
from trainer import Evaluation, LoopConfig, RunFlags, TrainSetup, fit, init_state, train_command

MACHINE = open_machine(DeviceConfig("cpu", "fp32"))
SHAPE = {"vocab_size": BYTES.vocab_size, "block_size": 40, "tied": False}
TINY = AnswerConfig(questions=3, samples=4, answer_tokens=6, eval_questions=5, pass_k=2)


@pytest.fixture
def early_ends(monkeypatch):
    """A quarter of all tokens end an answer, so that some of every group end at each length."""
    monkeypatch.setattr(Tokenizer, "end_ids", property(lambda self: frozenset(range(0, 300, 4))))


def question(text: str, answer: str = "", check=None) -> CheckableQuestion:
    return CheckableQuestion(text, "k", "t", check or (lambda output: float(output == answer)), answer)


def odd_length(output: str) -> float:
    """A reward that a model of random weights earns about half of the time."""
    return float(len(output) % 2)


def make_prompts(n: int = 7) -> list[Prompt]:
    questions = [question("x" * (i % 3) + str(i), check=odd_length) for i in range(n)]
    return grpo.encode_questions(questions, BYTES, SHAPE["block_size"] + 1 - TINY.answer_tokens)


def make_loader(kind=AnswerLoader, config: AnswerConfig = TINY, start: nn.Module | None = None, seed: int = 0, **changes):
    config = dataclasses.replace(config, **changes)
    return kind(AnswerContext(config, BYTES, MACHINE, make_prompts(), start or random_model(**SHAPE)), seed)


def made(*ids: int, text: str = "", ended: bool = True, logprobs: tuple[float, ...] = ()) -> Answer:
    return Answer(list(ids), list(logprobs) or [0.0] * len(ids), text, ended)


# -- advantages and weights -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("baseline, expected", [("group", [0.75, -0.25, -0.25, -0.25]),
                                                ("rloo", [1, -1 / 3, -1 / 3, -1 / 3])])
def test_advantages_by_hand(baseline, expected):
    found = advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), baseline)
    assert torch.allclose(found, torch.tensor(expected))
    for equal in (0.5, 0.1, 1 / 3):  # whose means are rounded
        assert not advantages(torch.full((7,), equal, dtype=torch.float64), baseline).any()
    assert advantages(torch.tensor([1.0]), baseline).tolist() == [0.0]


def test_rows_by_hand():
    """The answers are targets, with their ends; the padding is none."""
    idx, targets = pack_answers([([1, 2, 3], [4, 5]), ([6], [7])], pad_id=0)
    ignored = IGNORE_INDEX
    assert idx.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
    assert targets.tolist() == [[ignored, ignored, 4, 5], [7, ignored, ignored, ignored]]


def test_the_length_of_an_answer_does_not_change_its_weight():
    groups = [Group([START], [made(1), made(1, 2, 3, 4), made(2), made(3, 4, 5)], [1.0, 1.0, 0.0, 0.0]),
              Group([START, 9], [made(1)] * 4, [1.0] * 4)]
    idx, targets, weights = make_loader().pack(groups)
    assert weights.tolist() == pytest.approx([0.5 / (8 * 6)] * 2 + [-0.5 / (8 * 6)] * 2)  # 8 answers, --answer_tokens=6
    assert (targets != IGNORE_INDEX).sum(dim=1).tolist() == [1, 4, 1, 3] and idx.shape == targets.shape


def test_each_role_has_a_mean_of_its_own():
    groups = [Group([START], [made(1), made(2)], [1.0, 0.0]), Group([START], [made(1), made(2), made(3)], [0.6, 0.0, 0.0],
                                                                    "propose")]
    *_, weights = make_loader().pack(groups)
    assert weights.tolist() == pytest.approx([0.5 / 12, -0.5 / 12, 0.4 / 18, -0.2 / 18, -0.2 / 18])


# -- the gradient -----------------------------------------------------------------------------------------------------

class TwoArms(nn.Module):
    """A policy over the tokens 0 and 1 that reads nothing: answers of a single token."""

    def __init__(self, *logits: float):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))
        self.embed = SimpleNamespace(weight=self.logits)

    def eager_forward(self, idx, targets, reduction):
        nats = -self.logits.log_softmax(0)[targets.clamp(min=0)]
        return torch.where(targets == IGNORE_INDEX, 0.0, nats)


def expected_gradient(model: TwoArms, start: TwoArms, rewards: list[float], n: int, **changes) -> torch.Tensor:
    """Of minus the loss, over all outcomes of a group of `n` answers, each with its probability. rewards: of each arm."""
    loader = make_loader(config=AnswerConfig(answer_tokens=1, **changes), start=start)
    logprobs, total = model.logits.detach().log_softmax(0), torch.zeros(2, dtype=torch.float64)
    for arms in itertools.product((0, 1), repeat=n):
        answers = [made(arm, logprobs=(logprobs[arm].item(),)) for arm in arms]
        with torch.no_grad():
            batch = loader.pack([Group([0], answers, [rewards[arm] for arm in arms])])
        model.logits.grad = None
        policy_gradient_loss(model, batch).backward()
        total -= math.exp(sum(logprobs[arm].item() for arm in arms)) * model.logits.grad
    return total


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("baseline", ["group", "rloo"])
def test_the_gradient_on_a_two_armed_bandit_is_the_analytic_one(baseline, n):
    """d/dθ of Σ p r is p (r - mean r). With the mean of the group as the baseline, an answer is a part of its own."""
    model, rewards = TwoArms(0.3, -0.5), [1.0, 0.25]
    p, r = model.logits.detach().softmax(0), torch.tensor(rewards, dtype=torch.float64)
    analytic = p * (r - (p * r).sum())
    found = expected_gradient(model, model, rewards, n, baseline=baseline)
    assert torch.allclose(found, analytic * (1 if baseline == "rloo" else 1 - 1 / n), atol=1e-7)
    assert analytic.abs().max() > 0.1


def test_the_penalty_has_the_gradient_of_the_kl_divergence():
    model, start = TwoArms(0.3, -0.5), TwoArms(-0.2, 1.0)
    logits = model.logits.detach().clone().requires_grad_()
    kl = (logits.softmax(0) * (logits.log_softmax(0) - start.logits.detach().log_softmax(0))).sum()
    analytic = torch.autograd.grad(kl, logits)[0]
    found = expected_gradient(model, start, [0.5, 0.5], 3, baseline="rloo", kl=0.7)
    assert torch.allclose(found, -0.7 * analytic, atol=1e-7) and analytic.abs().max() > 0.1
    assert torch.allclose(expected_gradient(model, model, [0.5, 0.5], 3, kl=0.7), torch.zeros(2, dtype=torch.float64),
                          atol=1e-12)


def test_the_loss_is_minus_the_weighted_log_probabilities():
    model = random_model(**SHAPE)
    idx, targets = pack_answers([([START, 5], [6, 7, END]), ([START], [8])], START)
    weights = torch.tensor([0.5, -2.0])
    logprobs = model(idx).log_softmax(-1)
    expected = -0.5 * sum(logprobs[0, i, t] for i, t in ((1, 6), (2, 7), (3, END))) + 2.0 * logprobs[1, 0, 8]
    assert torch.allclose(policy_gradient_loss(model, (idx, targets, weights)), expected, atol=1e-5)


def test_answers_without_an_advantage_have_no_gradient(early_ends):
    """They are left out of the batch: what remains has the gradient of all."""
    model, loader = random_model(**SHAPE), make_loader(questions=6)
    with torch.no_grad():
        groups = loader.rollout(model, 0)
    groups[0] = groups[0]._replace(rewards=[1.0] * 4)
    idx, _, weights = batch = loader.pack(groups)
    rows = [(group.prompt, answer.ids) for group in groups for answer in group.answers]
    all_weights = torch.cat([advantages(torch.tensor(group.rewards), "group") for group in groups]) / (len(rows) * 6)
    assert len(idx) < len(rows) and bool((weights != 0).all())
    gradients = []
    for one in (batch, (*pack_answers(rows, START), all_weights)):
        model.zero_grad()
        policy_gradient_loss(model, one).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for found, expected in zip(*gradients):
        assert torch.allclose(found, expected, atol=1e-6)


def train(model: GPT, loader, n_steps: int, **loop) -> None:
    setup = TrainSetup(MACHINE, loop.pop("schedule", SelfPlayOptimizer("muon", 0.02, weight_decay=0.0)), 100)
    fit(init_state(model, loader, setup), LoopConfig(max_iter=n_steps, verbose=False, **{"num_batch_accum": 1} | loop),
        policy_gradient_loss, Evaluation(lambda state: {"val_loss": 0.0}), setup)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_equal_rewards_change_no_weight(optimizer, early_ends, monkeypatch):
    """Whatever the lengths of the answers: there is no drift to short or long ones."""
    monkeypatch.setattr(grpo, "reward", lambda question, answer: 1.0)
    model, loader = random_model(**SHAPE), make_loader()
    before = copy.deepcopy(model.state_dict())
    train(model, loader, 3, schedule=SelfPlayOptimizer(optimizer, 0.02, weight_decay=0.0))
    assert_same(model.state_dict(), before)
    monkeypatch.setattr(grpo, "reward", lambda question, answer: odd_length(answer.text))
    train(model, loader, 3, schedule=SelfPlayOptimizer(optimizer, 0.02, weight_decay=0.0))
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_rewarded_token_becomes_likelier():
    """The whole loop: of answers of one token, those below 128 are right."""
    model, loader, ids = random_model(**SHAPE), make_loader(answer_tokens=1), [START, 9]

    def solve(model, prompts):
        answers = loader.sample(model, [ids] * 32)
        return [Group(ids, answers, [float(answer.ids[0] < 128) for answer in answers])]
    loader.solve = solve
    share = lambda: model(torch.tensor([ids]))[0, -1].softmax(0)[:128].sum().item()
    before = share()
    train(model, loader, 25)
    assert before < 0.7 and share() > 0.95


@pytest.mark.parametrize("baseline", ["group", "rloo"])
def test_a_reward_that_ignores_length_leaves_it_as_it_was(baseline):
    """Every answer, as often as a policy gives it that after each token but the first ends with probability 1/2. The first
    token alone decides what is right. So the gradient wants no prefix to go on rather than end, or the reverse: divided by
    the answer's length it would."""
    right, wrong, more = 10, 11, 12
    answers = [Answer([first, *[more] * k, *([END] if k < 3 else [])], [], "", k < 3)
               for first in (right, wrong) for k, n in ((0, 4), (1, 2), (2, 1), (3, 1)) for _ in range(n)]
    loader = make_loader(answer_tokens=4, baseline=baseline)
    _, targets, weights = loader.pack([Group([START], answers, [float(answer.ids[0] == right) for answer in answers])])
    wants = Counter()
    for row, weight in zip(targets.tolist(), weights.tolist()):
        for length in range(1, 4):
            if row[length] != IGNORE_INDEX:
                wants[tuple(row[:length])] += weight * (0.5 if row[length] == END else -0.5)
    assert len(wants) == 6 and len(weights) == 16 and all(abs(want) < 1e-7 for want in wants.values())
    assert weights[:8].min() > 0 > weights[8:].max()


# -- rollouts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", ARCHITECTURES)
def test_log_probabilities_of_rollouts_are_those_of_training(shape, early_ends):
    """From the cache, in batches that shrink as answers end, against a pass over the whole row."""
    model, prompts = random_model(**shape), [prompt.ids for prompt in make_prompts() for _ in range(4)]
    with torch.no_grad():
        answers = sample_texts(model, BYTES, prompts, 12, ON_POLICY, torch.Generator().manual_seed(0))
        found = answer_logprobs(model, list(zip(prompts, [answer.ids for answer in answers])), START)
    assert len({len(answer.ids) for answer in answers}) > 5
    for prompt, answer, logprobs in zip(prompts, answers, found):
        alone = token_logprobs(model, torch.tensor([prompt + answer.ids]))[0, -len(answer.ids):]
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4) == alone.tolist()
        assert answer.has_ended == (answer.ids[-1] % 4 == 0) and all(token % 4 for token in answer.ids[:-1])
        assert answer.has_ended or len(answer.ids) == 12
        text_ids = [token for token in answer.ids[:len(answer.ids) - answer.has_ended] if token < 256]
        assert answer.text == bytes(text_ids).decode(errors="replace")


def test_answers_are_drawn_from_the_model(early_ends):
    """Frequencies of the second token, where the batch has shrunk after the first one."""
    model, prompt = random_model(**SHAPE), [START, 9]
    with torch.no_grad():
        answers = sample_texts(model, BYTES, [prompt] * 4000, 2, ON_POLICY, torch.Generator().manual_seed(0))
        first = model(torch.tensor([prompt]))[0, -1].softmax(0)
        contexts = torch.tensor([[*prompt, token] for token in range(SHAPE["vocab_size"])])
        second = model(contexts)[:, -1].softmax(-1)
    goes_on = torch.tensor([token % 4 != 0 for token in range(SHAPE["vocab_size"])])
    for expected, seen in ((first, [answer.ids[0] for answer in answers]),
                           ((first[:, None] * goes_on[:, None] * second).sum(0),
                            [answer.ids[1] for answer in answers if len(answer.ids) > 1])):
        counts = torch.bincount(torch.tensor(seen), minlength=SHAPE["vocab_size"]) / 4000
        spread = (expected * (1 - expected) / 4000).sqrt()
        assert bool(((counts - expected).abs() < 5 * spread + 1e-3).all())


def test_an_answer_that_has_not_ended_is_wrong():
    one = question("1", "a")
    assert grpo.reward(one, made(97, END, text="a")) == 1.0 and grpo.reward(one, made(97, text="a", ended=False)) == 0.0


def test_a_step_is_on_policy(early_ends):
    """All micro-batches of a step are sampled from the weights that it changes; the next step from the changed ones."""
    model, loader = random_model(**SHAPE), make_loader()
    seen, next_batch = [], loader.next_batch

    def watched(model):
        seen.append(sum(p.double().abs().sum().item() for p in model.parameters()))
        return next_batch(model)
    loader.next_batch = watched
    train(model, loader, 3, num_batch_accum=2)
    assert seen[0::2] == seen[1::2] and len(set(seen)) == 3
    batches = [make_loader().next_batch(random_model(**SHAPE | changes)) for changes in ({}, {}, {"n_layer": 1})]
    assert_same(list(batches[0]), list(batches[1]))
    assert [part.tolist() for part in batches[0]] != [part.tolist() for part in batches[2]]


def test_an_epoch_asks_every_question_once():
    loader, asked = make_loader(questions=7), []
    loader.solve = lambda model, prompts: asked.append([prompt.question.text for prompt in prompts]) or [
        Group([START], [made(1)], [0.0])]
    for _ in range(2):
        loader.next_batch(None)
    assert sorted(asked[0]) == sorted(asked[1]) == sorted(prompt.question.text for prompt in make_prompts())
    assert asked[0] != asked[1]


def test_rollouts_go_on_where_the_state_was_saved(early_ends):
    model, loader = random_model(**SHAPE), make_loader(kl=0.1)
    for _ in range(3):
        loader.next_batch(model)
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    expected = [loader.next_batch(model) for _ in range(2)], loader.take_statistics()
    other_start = random_model(**SHAPE)
    with torch.no_grad():
        next(other_start.parameters()).add_(1.0)
    fresh = make_loader(kl=0.1, start=other_start)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    found = [fresh.next_batch(model) for _ in range(2)], fresh.take_statistics()
    assert_same([list(batch) for batch in found[0]], [list(batch) for batch in expected[0]])
    for statistics in (found[1], expected[1]):
        assert statistics.pop("rollout_seconds") > 0
    assert found[1] == expected[1]


@pytest.mark.parametrize("change, error", [
    ({"data": "0" * 16}, BadInput), ({"seed": 5}, ValueError), ({"questions_seen": -1}, ValueError),
    ({"questions_seen": 1.5}, ValueError), ({"sums": {"reward": "x"}}, ValueError), ({"start": {}}, RuntimeError)], ids=str)
def test_a_state_that_does_not_belong_is_refused(change, error):
    loader = make_loader()
    with pytest.raises(error):
        loader.load_state_dict(loader.state_dict() | change)


def test_statistics_by_hand(monkeypatch):
    answers = [made(1, END, text="a"), made(2, END, text="b"), made(1, END, text="a"), made(1, 2, text="c", ended=False)] * 2
    monkeypatch.setattr(grpo, "sample_texts", lambda *args: answers)
    loader = make_loader(questions=2)
    prompts = [Prompt(question("1", "a"), [START]), Prompt(question("2", "z"), [START])]
    groups = loader.solve(None, prompts)
    assert [group.rewards for group in groups] == [[1.0, 0.0, 1.0, 0.0], [0.0] * 4]
    assert loader.take_statistics() == {"rollout_tokens": 16, "reward": 0.25, "answer_length": 2.0, "unfinished": 0.25,
                                        "distinct_answers": 3.0, "no_signal": 0.5}
    assert loader.take_statistics() == {}


# -- proposals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rewards, expected", [([0, 0], 0.0), ([1, 1], 0.0), ([1, 0, 0, 0], 0.75), ([1, 1, 1, 0], 0.25)])
def test_a_proposal_is_worth_what_is_half_known(rewards, expected):
    assert half_known(rewards) == expected


def test_proposals_by_hand(monkeypatch):
    """One is proposed twice and answered once; the held-out one and what is no question are worth nothing."""
    held_out = next(text for i in range(99) if is_held_out(text := f"Which is larger, {i} or 100?"[:-3] + f"{99 - i}?"))
    free = next(text for i in range(99) if not is_held_out(text := f"What is {i} plus 4?"))
    answer, sure = str(int(free.split()[2]) + 4), "Count from 1 to 3."
    assert not is_held_out(sure)
    said = iter([[made(1, END, text=text) for text in (free, f" {free}", "what?", held_out, sure)] +
                 [made(1, text=sure, ended=False)],
                 [made(1, END, text=text) for text in (answer, "x", "x", "x", *["1 2 3"] * 4)]])
    asked = []
    monkeypatch.setattr(grpo, "sample_texts", lambda model, tokenizer, prompts, *args: asked.append(prompts) or next(said))
    loader = make_loader(ProposalLoader, questions=6)
    model = SimpleNamespace(config=SimpleNamespace(block_size=80))
    *solved, proposed = loader.rollout(model, 0)
    assert [group.rewards for group in solved] == [[1.0, 0.0, 0.0, 0.0], [1.0] * 4]
    assert proposed.rewards == [0.375, 0.375, 0.0, 0.0, 0.0, 0.0] and proposed.role == "propose"
    assert BYTES.decode(asked[0][0][2:-2]) == PROPOSE and len(asked[0]) == 6 and len(asked[1]) == 8
    assert BYTES.decode(asked[1][0][2:-2]) == free and solved[0].prompt == asked[1][0]
    statistics = loader.take_statistics()
    assert statistics["valid"] == 0.5 and statistics["distinct_proposals"] == pytest.approx(2 / 6)
    assert statistics["learnability"] == pytest.approx(0.125) and statistics["reward"] == 0.625


def test_a_rollout_without_a_valid_proposal_is_a_batch(early_ends):
    model, loader = random_model(**SHAPE | {"block_size": 80}), make_loader(ProposalLoader)
    *_, weights = batch = loader.next_batch(model)
    assert weights.tolist() == [0.0] and policy_gradient_loss(model, batch).item() == 0.0
    assert loader.take_statistics()["valid"] == 0.0


# -- evaluation -------------------------------------------------------------------------------------------------------

def test_evaluation_of_a_model_that_has_not_changed(early_ends):
    model, prompts = random_model(**SHAPE), make_prompts(5)
    row, answers = evaluate_answers(model, copy.deepcopy(model), BYTES, MACHINE, prompts, TINY)
    assert row["kl"] == row["kl_per_token"] == 0.0 and row["logprob_gap"] < 1e-5
    assert 0 < row["pass_at_1"] <= row["pass_at_k"] <= 1 and 1 <= row["mean_length"] <= 6
    assert row["entropy"] == pytest.approx(math.log(SHAPE["vocab_size"]), abs=1.5)  # of random weights
    assert row["exact_match"] == sum(answer["correct"] for answer in answers) / 5
    assert all(answer["correct"] == bool(odd_length(answer["output"])) for answer in answers)
    again, _ = evaluate_answers(model, copy.deepcopy(model), BYTES, MACHINE, prompts, TINY)
    assert again == row


def test_the_kl_divergence_is_estimated(early_ends):
    """Of answers of one token it can be summed."""
    model, start = random_model(**SHAPE), random_model(**SHAPE)
    with torch.no_grad():
        start.head.weight.mul_(0.5)
    prompts = make_prompts(1)
    config = dataclasses.replace(TINY, answer_tokens=1, pass_k=2000)
    row, _ = evaluate_answers(model, start, BYTES, MACHINE, prompts, config)
    with torch.no_grad():
        now, before = (policy(torch.tensor([prompts[0].ids]))[0, -1].log_softmax(0) for policy in (model, start))
    exact = (now.exp() * (now - before)).sum().item()
    spread = math.sqrt((now.exp() * (now - before - exact) ** 2).sum().item() / 4000)
    assert abs(row["kl"] - exact) < 4 * spread and exact > 10 * spread


GOOD = {"unanimous": 0.5, "exact_match": 0.6, "mean_length": 4.0}


@pytest.mark.parametrize("row, words", [
    ({}, ""), ({"unanimous": 0.99}, "the same to 99%"), ({"unanimous": 0.99, "exact_match": 0.97}, ""),
    ({"mean_length": 62.0}, "--answer_tokens=64 cuts them off"), ({"mean_length": 1.0}, "empty")], ids=str)
def test_a_collapse_is_described(row, words):
    found = describe_collapse(GOOD | row, 64)
    assert words in found and bool(words) == bool(found)


def test_rows_before_and_after_by_hand():
    rows = [{"step": 0, "exact_match": 0.5, "exact_match/k": 0.25, "pass_at_1": 0.4, "pass_at_k": 0.75, "kl": 0.0},
            {"step": 1, "train_loss": 0.1}, {"step": 2, "exact_match": 0.6, "reward": 0.25},
            {"step": 4, "exact_match": 0.75, "exact_match/k": 0.5, "pass_at_1": 0.6, "pass_at_k": 0.8, "kl": 1.5,
             "reward": 0.5}]
    table = compare_evaluations(rows, 8)
    assert table.rows == [("exact match of held-out questions, greedy", "higher", "50.0%", "75.0%"),
                          ("- k", "higher", "25.0%", "50.0%"), ("pass@1, sampled", "higher", "40.0%", "60.0%"),
                          ("pass@8, sampled", "higher", "75.0%", "80.0%"),
                          ("KL divergence from the start, nats/answer", "lower", "0.000", "1.500"),
                          ("rollouts: reward", "higher", "0.250", "0.500")]


def test_pictures_of_any_rows():
    rows = [{"step": 0, "exact_match": 0.5}, {"step": 3, "exact_match": 0.7, "reward": 0.4, "kl": 0.2}]
    for some in (rows, rows[:1]):
        panels = draw_answers(some)
        assert len(panels) == len(PANELS) and all("<svg" in panel for panel in panels)
    assert "held out, greedy" in panels[0] and "mean reward" not in panels[0]


# -- whole runs -------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class LabRun(RunFlags):
    """The run."""
    checkpoint_path: Path = flag(Path("gpt.pt"), "the model to start from")
    out_path: Path = flag(None, "checkpoint to write", on_resume="unsaved", scope="run")
    seed: int = flag(1337, "random seed", at_least=0, scope="run")
    __post_init__ = check_flags


class LabConfigs(NamedTuple):
    run: LabRun
    answers: AnswerConfig
    optimizer: SelfPlayOptimizer
    loop: LoopConfig
    device: DeviceConfig


LAB = TrainingCommand("lab.py", "Plays.", LabConfigs, "out_path")
QUESTIONS = [{"question": f"{i} or {i + 1}?", "answer": "e"} for i in range(60)]
DEFAULTS = {"device": "cpu", "dtype": "fp32", "questions": 4, "samples": 4, "answer_tokens": 4, "eval_questions": 5,
            "pass_k": 2, "num_batch_accum": 2, "val_intervals": 2, "log_intervals": 1, "warm_start_iter": 2,
            "verbose": False}


@pytest.fixture(scope="module")
def base(data_path, tmp_path_factory) -> Path:
    """A model hardly trained, which tests share and must leave as it is."""
    return train_tiny(tmp_path_factory.mktemp("base") / "gpt.pt", data_path, "--max_iter=2", "--block_size=64")


def run_lab(base: Path, out: Path, resume: bool = False, **flags):
    """A run in this process; returns it, or None when it had finished."""
    given = {"checkpoint_path": base} | flags
    resolve = lambda start, given: LAB.defaults() | DEFAULTS | start | given
    return train_command(LAB, {} | flags if resume else given, out, out if resume else None, resolve,
                         partial(open_answer_run, LAB))


@pytest.fixture
def questions(tmp_path) -> str:
    return str(write_jsonl(tmp_path / "questions.jsonl", QUESTIONS))


@pytest.fixture(autouse=True)
def few_questions(monkeypatch):
    monkeypatch.setattr(grpo, "N_TRAIN_QUESTIONS", 40)
    monkeypatch.setattr(grpo, "N_DEMONSTRATIONS", 40)


@pytest.fixture
def rewarded(monkeypatch):
    """A model that is hardly trained answers nothing right: here an odd number of characters is."""
    monkeypatch.setattr(grpo, "reward", lambda question, answer: odd_length(answer.text))


@pytest.mark.parametrize("task", ["file", "countdown", "arithmetic"])
def test_a_whole_run(base, tmp_path, questions, task, capsys):
    before = base.read_bytes()
    run = run_lab(base, tmp_path / "out" / "gpt.pt", task=questions if task == "file" else task, max_iter=2)
    rows = run_rows(run.setup.writer.path)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[0]["kl"] == 0.0
    assert {"exact_match", "pass_at_1", "pass_at_k", "mean_length", "kl"} <= rows[0].keys() & rows[2].keys()
    measured = {"valid", "distinct_proposals", "learnability"} if task == "arithmetic" else {"reward", "no_signal"}
    assert measured | {"rollout_tokens"} <= rows[2].keys() and "rollout_seconds" not in rows[0]
    assert not rows[2].keys() & {"val_loss", "val_bpb"} and base.read_bytes() == before
    assert capsys.readouterr().out == ""
    report_answers(run.state, run.setup)
    page = (run_folder(run.setup.writer.path) / "selfplay.html").read_text(encoding="utf-8")
    assert "| pass@2, sampled | higher |" in capsys.readouterr().out and page.count("<svg") == len(PANELS)


def test_a_run_that_is_killed_in_a_rollout_goes_on_bit_for_bit(base, tmp_path, questions, rewarded, monkeypatch):
    """Also the KL divergence from the model that it began with, and the statistics of its rollouts."""
    flags = {"task": questions, "cooldown_frac": 0.0, "kl": 0.05, "learning_rate": 0.02}
    whole, parts = tmp_path / "whole" / "gpt.pt", tmp_path / "parts" / "gpt.pt"
    run_lab(base, whole, max_iter=5, **flags)
    pack, calls = AnswerLoader.pack, iter(range(10))

    def killed(loader, groups):
        if next(calls) == 3:
            raise KeyError("killed")
        return pack(loader, groups)
    monkeypatch.setattr(AnswerLoader, "pack", killed)
    with pytest.raises(KeyError):
        run_lab(base, parts, max_iter=5, **flags)
    monkeypatch.setattr(AnswerLoader, "pack", pack)
    run_lab(base, parts, resume=True)
    assert run_lab(base, parts, resume=True) is None
    (weights, training), (expected_weights, expected) = map(saved_training, (parts, whole))
    for one in (training, expected):
        one["loader"]["sums"].pop("rollout_seconds", None), one["loader"]["sums"].pop("n/rollout_seconds", None)
    assert_same(weights, expected_weights)
    assert_same(training, expected)
    last = [{name: value for name, value in run_rows(path)[-1].items()
             if name in ("exact_match", "pass_at_k", "kl", "entropy", "mean_length")} for path in (parts, whole)]
    assert last[0] == last[1] and last[0]["kl"] != 0


def test_the_warm_start_is_the_start(base, tmp_path):
    """The KL divergence counts from the model that has seen the demonstrations."""
    path = tmp_path / "out" / "gpt.pt"
    run_lab(base, path, task="countdown", max_iter=1, learning_rate=0.01, warm_start_iter=3)
    start = load_checkpoint(path)["training"]["loader"]["start"]
    weights = load_checkpoint(base)["model"]
    assert start.keys() == weights.keys() and any(not torch.equal(start[name], weights[name]) for name in weights)
    run_lab(base, tmp_path / "b" / "gpt.pt", task="countdown", max_iter=1, warm_start_iter=0)
    assert_same(dict(load_checkpoint(tmp_path / "b" / "gpt.pt")["training"]["loader"]["start"]), dict(weights))


@pytest.mark.parametrize("name, value", [
    ("questions", 3), ("samples", 3), ("baseline", "rloo"), ("answer_tokens", 3), ("kl", 0.5), ("learning_rate", 0.1),
    ("seed", 2), ("optimizer", "muon")])
def test_a_flag_changes_the_run(base, tmp_path, questions, name, value, rewarded):
    flags = {"task": questions, "max_iter": 3, "val_intervals": 5, "samples": 5, "num_batch_accum": 1, "learning_rate": 0.02,
             "answer_tokens": 6}
    runs = [tmp_path / str(i) / "gpt.pt" for i in range(2)]
    run_lab(base, runs[0], **flags)
    run_lab(base, runs[1], **flags | {name: value})
    (weights, _), (others, _) = map(saved_training, runs)
    assert any(not torch.equal(weights[key], others[key]) for key in weights)


def test_a_run_describes_itself_and_a_dry_run_writes_nothing(base, tmp_path, questions, capsys):
    out = tmp_path / "out" / "gpt.pt"
    assert run_lab(base, out, task=questions, max_iter=2, dry_run=True) is None
    assert not out.parent.exists() and "steps" in capsys.readouterr().out
    run_lab(base, out, task=questions, max_iter=1, verbose=True, kl=0.1)
    printed = capsys.readouterr().out
    assert "55 questions; 5 held out" in printed and "4 questions x 4 answers of at most 4 tokens" in printed
    assert "KL penalty 0.1" in printed and "exact match 0.0%" in printed and "left out" not in printed


def test_questions_that_leave_no_room_are_counted(base, tmp_path, capsys):
    rows = [row | {"question": f"why {i} " * 40} if i % 5 == 0 else row for i, row in enumerate(QUESTIONS)]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    run_lab(base, tmp_path / "gpt.pt", task=str(path), max_iter=1, verbose=True)
    numbers = re.search(r"(\d+) questions; (\d+) held out; (\d+) left out, too long", capsys.readouterr().out).groups()
    trained, held_out, left_out = map(int, numbers)
    assert trained + held_out == 48 and left_out == 12


def test_a_collapse_is_reported_once(base, tmp_path, questions, capsys, monkeypatch):
    monkeypatch.setattr(grpo, "describe_collapse", lambda row, answer_tokens: "nothing is left")
    run_lab(base, tmp_path / "gpt.pt", task=questions, max_iter=4)
    assert capsys.readouterr().err.count("warning: at step 2 nothing is left: lower --learning_rate") == 1


def test_what_is_not_given_is_resolved_by_hand():
    found = SelfPlayOptimizer().for_answers(256)
    assert found.learning_rate == ANSWER_LR["gpt2"] / 2 and (found.optimizer, found.weight_decay, found.cooldown_frac) == (
        "gpt2", 0.0, 0.8)
    assert SelfPlayOptimizer(optimizer="muon").for_answers(256).learning_rate == ANSWER_LR["muon"]
    given = SelfPlayOptimizer("adamw", 0.02, weight_decay=0.1, cooldown_frac=0.0)
    assert given.for_answers(256) == given


# -- bad input --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ({"task": "none.jsonl"}, "--task=none.jsonl: there is no such file"),
    ({"answer_tokens": 64}, "--answer_tokens=64: leaves 1 of the 64 tokens"),
    ({"answer_tokens": 99}, "--answer_tokens=99: leaves 0 of the 64 tokens"),
    ({"checkpoint_path": Path("none.pt")}, "none.pt: no checkpoint"), ({"samples": 1}, "--samples=1: must be at least 2"),
    ({"baseline": "value"}, "--baseline=value: choose one of group, rloo")], ids=str)
def test_bad_flags_are_refused(base, tmp_path, questions, flags, words):
    with pytest.raises(BadInput, match=words):
        run_lab(base, tmp_path / "out" / "gpt.pt", **{"task": questions, "max_iter": 1} | flags)
    assert not (tmp_path / "out" / "gpt.pt").exists()


def test_a_file_without_answers_is_refused(base, tmp_path):
    path = write_jsonl(tmp_path / "asked.jsonl", [{"question": row["question"]} for row in QUESTIONS])
    with pytest.raises(BadInput, match="asked.jsonl: line 1: has no question with an answer, its columns are question"):
        run_lab(base, tmp_path / "gpt.pt", task=str(path), max_iter=1)


def test_the_model_must_have_chat_tokens(base, tmp_path, questions):
    checkpoint = load_checkpoint(base)
    bare = Tokenizer(Tokenizer.from_json(checkpoint["tokenizer"]).ranks, "default", {"<|endoftext|>": 507})
    save_checkpoint(tmp_path / "bare.pt", checkpoint | {"tokenizer": bare.to_json()})
    with pytest.raises(BadInput, match="bare.pt: the tokenizer has no <|system|> token"):
        run_lab(tmp_path / "bare.pt", tmp_path / "gpt.pt", task=questions, max_iter=1)


def test_a_resumed_run_refuses_other_questions(base, tmp_path, questions):
    run_lab(base, tmp_path / "gpt.pt", task=questions, max_iter=1)
    rows = [row | {"answer": "o"} for row in QUESTIONS]
    Path(questions).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(BadInput, match="--task=.*give the same ones to resume"):
        run_lab(base, tmp_path / "gpt.pt", resume=True, max_iter=2)
