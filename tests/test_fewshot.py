"""fewshot.py: views, answers, what may be learnt from, rows, and the whole path on tiny models. Rules: test_rules.py."""
import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import fewshot
from fewshot import RulesConfig, View
from layers import LINEARS
from learner import ADAPT_OPTIMIZERS, ADAPT_SCOPES, AdaptConfig, Learner
from model import GPT
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.config import BadInput
from runtime.device import DeviceConfig, open_machine
from tasks.rules import Pair, draw_rules, encode_question, make_task

MACHINE = open_machine(DeviceConfig("cpu", "fp32"))
TINY = RulesConfig(n_layer=1, n_head=2, head_size=8, families=("permutation", "fill"),
                   train_families=("permutation", "fill"), bases=fewshot.BASES, rules=2,
                   questions=3, adapt_steps=2, adapt_rows=2, undertrained_iter=3, converged_iter=4, batch_size=2)


@pytest.fixture(autouse=True)
def few_evaluated_episodes(monkeypatch):
    monkeypatch.setattr(fewshot, "EVAL_EPISODES", 4)


def make_model(**flags) -> GPT:
    """With weights that are not zero, so that its answers depend on what it reads."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, **flags).model_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_learner(**adapt) -> Learner:
    return fewshot.open_rule_learner(make_model(), TINY, AdaptConfig(**{"adapt_rate": 0.01} | adapt), MACHINE)


def example_task(family: str = "permutation", n_questions: int = 3):
    return make_task(draw_rules(family, "test", 1)[0], 3, n_questions)


def with_other_answers(task):
    """The same demonstrations and questions; every answer is another grid of another size."""
    questions = [Pair(pair.input, np.full((2, 2), 9)) for pair in task.questions]
    return dataclasses.replace(task, questions=questions)


# -- views ------------------------------------------------------------------------------------------------------------

def test_view_by_hand():
    colors = np.array([0, 2, 3, 1, 4, 5, 6, 7, 8, 9])  # 1 becomes 2, 2 becomes 3, 3 becomes 1
    view = View((1, 0), colors)
    task = dataclasses.replace(example_task(), demonstrations=[Pair(np.array([[1, 2]]), np.array([[2, 1]])),
                                                               Pair(np.array([[3, 0]]), np.array([[0, 3]]))])
    shown = [[grid.tolist() for grid in pair] for pair in view.demonstrations(task)]
    assert shown == [[[[1, 0]], [[0, 1]]], [[[2, 3]], [[3, 2]]]]
    assert view.undo(np.array([[2, 3, 1, 0]])).tolist() == [[1, 2, 3, 0]]


def test_random_views_keep_the_background_and_undo_what_they_do():
    rng, grid = np.random.default_rng(0), np.random.default_rng(1).integers(0, 10, (3, 3))
    for view in fewshot.draw_views(rng, 4, 20):
        assert view.colors[0] == 0 and sorted(view.order) == [0, 1, 2, 3]
        assert np.array_equal(view.undo(view.colors[grid]), grid)


@pytest.mark.parametrize("answers, winner", [
    ([[[1]], [[2]], [[2]]], [[2]]), ([[[1]], [[2]]], [[1]]), ([None, None, [[3]]], [[3]]), ([None], None),
    ([[[1, 1]], [[1], [1]], [[1], [1]]], [[1], [1]])])
def test_vote_by_hand(answers, winner):
    found = fewshot.vote([None if grid is None else np.array(grid) for grid in answers])
    assert (found is None) if winner is None else found.tolist() == winner


def test_votes_over_recoloured_views_are_exact_for_a_model_that_copies(monkeypatch):
    """A stand-in that answers every question with its own input: undone, every view agrees on the input itself."""
    task = example_task()

    def copy(model, machine, task, inputs, views):
        return [[view.undo(view.colors[grid]) for view in views] for grid in inputs], 0
    monkeypatch.setattr(fewshot, "decode", copy)
    answers, _ = fewshot.answer(None, MACHINE, task, fewshot.draw_views(np.random.default_rng(0), 3, 9))
    assert all(np.array_equal(fewshot.vote(found), pair.input) for found, pair in zip(answers, task.questions))


# -- what is learnt from, and forgotten -------------------------------------------------------------------------------

def test_no_batch_and_no_answer_depends_on_the_true_answers(monkeypatch):
    task, step = example_task(), Learner.step

    def run(task) -> tuple[list, list]:
        seen = []
        monkeypatch.setattr(Learner, "step", lambda self, batch, loss_fn: seen.append(batch) or step(self, batch, loss_fn))
        learner = make_learner()
        fewshot.train_on(learner, task, np.random.default_rng(0), 4, 3)
        answers, _ = fewshot.answer(learner.model, MACHINE, task, fewshot.draw_views(np.random.default_rng(1), 3, 4))
        return seen, answers
    (batches, answers), (other_batches, other_answers) = run(task), run(with_other_answers(task))
    assert len(batches) == 4 and len(answers) == 3 and any(grid is not None for found in answers for grid in found)
    assert all(torch.equal(a, b) for pair in zip(batches, other_batches) for a, b in zip(*pair))
    assert all(np.array_equal(a, b) for pair in zip(answers, other_answers) for a, b in zip(*pair))


def test_budget_does_not_depend_on_the_true_answers():
    task = example_task("fill")
    assert fewshot.make_budget(TINY, task) == fewshot.make_budget(TINY, with_other_answers(task))


def test_batch_asks_for_each_demonstration_given_the_others():
    task = example_task()
    inputs, targets = fewshot.leave_one_out(task, np.random.default_rng(0), 64)
    n = inputs.size(1) // 3  # a pair and its end, all of one length
    plain = {tuple(encode_question(pair.input)) for pair in task.demonstrations}
    last = {tuple(row[2 * n + 2:2 * n + 2 + len(next(iter(plain)))]) for row in inputs.tolist()}
    assert plain & last and len(last) > 3  # plain rows and recoloured ones
    assert (targets >= 0).sum(1).tolist() == [3 * 6] * 64


@pytest.mark.parametrize("scope", ADAPT_SCOPES)
def test_weights_are_bit_equal_after_a_task(scope):
    model = GPT(dataclasses.replace(make_model().config, norm="scaled_rms"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    learner = fewshot.open_rule_learner(model, TINY, AdaptConfig(adapt_rate=0.01, adapt_scope=scope), MACHINE)
    fewshot.run_arms(learner, TINY, example_task(), example_task("permutation"), seed=0)
    after = learner.to_checkpoint()["model"]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("optimizer", ADAPT_OPTIMIZERS)
def test_training_at_inference_time_changes_the_weights(optimizer):
    learner = make_learner(adapt_optimizer=optimizer)
    fewshot.train_on(learner, example_task(), np.random.default_rng(0), 2, 2)
    assert any(not torch.equal(parameter, initial) for parameter, initial in learner.weights)


def test_rate_that_diverges_is_named_and_forgotten():
    learner = make_learner(adapt_rate=1e30, adapt_optimizer="sgd")
    row = fewshot.run_task(learner, dataclasses.replace(TINY, adapt_steps=8), example_task(), None,
                           ("random", 0, "permutation", "x"))
    assert "lower --adapt_rate" in row["diverged"]
    assert all(torch.equal(parameter, initial) for parameter, initial in learner.weights)


# -- answers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [{}, {"mixer": "DA", "n_layer": 2}, *({"linear": name} for name in LINEARS)])
def test_answers_are_greedy_continuations(flags, monkeypatch):
    """With the demonstrations of a view read once for all questions, as without any cache. The token that most answers hold
    plays the part of their end."""
    model, task, outputs = make_model(**flags), example_task(n_questions=8), []
    views = fewshot.draw_views(np.random.default_rng(0), 3, 4)
    ids = torch.tensor([[token for pair in view.demonstrations(task) for token in fewshot.encode_pair(pair)]
                        + encode_question(view.colors[question.input]) for view in views for question in task.questions])
    n = ids.size(1)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    rows = ids[:, n:].tolist()
    end = max(range(13), key=lambda token: sum(token in row[1:] for row in rows))
    monkeypatch.setattr(fewshot, "PAIR_END", end)
    monkeypatch.setattr(fewshot, "decode_grid", lambda ids: outputs.append(list(ids)))
    fewshot.decode(model, MACHINE, task, [pair.input for pair in task.questions], views)
    assert outputs == [row[:row.index(end)] for row in rows if end in row] != []


def test_equal_compute():
    """Arms that train or vote cost within a tenth of each other, in the same units."""
    config = dataclasses.replace(TINY, adapt_steps=16, adapt_rows=4, questions=8)
    learner = fewshot.open_rule_learner(make_model(), config, AdaptConfig(adapt_rate=1e-4), MACHINE)
    row = fewshot.run_arms(learner, config, example_task(n_questions=8), None, seed=0)
    flops = [row[f"flops_{arm}"] for arm in ("trained", "trained_voting")]
    assert max(flops) < 1.2 * min(flops) and row["flops_in_context"] < min(flops) / 5
    budget = fewshot.make_budget(config, example_task(n_questions=8))
    tokens = 3 * 16 * 4 * 36
    assert abs(budget.views * (36 + 8 * (6 + 5)) - tokens) < 2 * (36 + 8 * 11)


# -- rows -------------------------------------------------------------------------------------------------------------

def run(folder: Path, config: RulesConfig = TINY, **options) -> list[dict]:
    fewshot.run_rules(config, AdaptConfig(), MACHINE, folder, "python adapt.py --task=rules", **options)
    return read(folder)


def read(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "rules.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.integration
def test_stopped_and_resumed_gives_the_same_rows(tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole")
    assert len(whole) == 3 * 4 and {row["base"] for row in whole} == set(fewshot.BASES)
    run_task = fewshot.run_task

    def interrupted(learner, config, task, elsewhere, key):
        if key[0] == "converged":
            signal.raise_signal(signal.SIGINT)
        return run_task(learner, config, task, elsewhere, key)
    monkeypatch.setattr(fewshot, "run_task", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "stopped")
    assert stop.value.code == 130 and "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(fewshot, "run_task", run_task)
    path = tmp_path / "stopped" / "rules.jsonl"
    assert len(read(tmp_path / "stopped")) == 5
    path.write_text(path.read_text() + '{"base": "conv')  # a line that a crash cut off
    monkeypatch.setattr(fewshot, "train_base", lambda config, machine, base, seed: (
        pytest.fail("trained again") if base != "random" else train_base(config, machine, base, seed)))
    assert run(tmp_path / "stopped") == whole
    assert {file.name for file in (tmp_path / "stopped").iterdir()} == {
        "plan.json", *(f"rules.{kind}" for kind in ("jsonl", "md", "csv", "svg", "html")), "undertrained-0.pt",
        "converged-0.pt"}


train_base = fewshot.train_base


@pytest.mark.integration
def test_other_flags_are_refused_or_overwrite_rows_and_bases(tmp_path):
    config = dataclasses.replace(TINY, bases=("undertrained",), families=("fill",), rules=1)
    run(tmp_path, config)
    changed = dataclasses.replace(config, adapt_steps=1)
    with pytest.raises(BadInput, match="adapt_steps"):
        run(tmp_path, changed)
    (tmp_path / "gpt.pt").write_text("somebody else's")
    assert len(run(tmp_path, changed, overwrite=True)) == 1
    more = dataclasses.replace(changed, rules=2, seeds=2)  # may grow
    grown = {fewshot.row_key(row): row for row in run(tmp_path, more)}
    whole = run(tmp_path / "whole", more)
    assert (tmp_path / "gpt.pt").exists() and [grown[fewshot.row_key(row)] for row in whole] == whole and len(whole) == 4


def test_damaged_rows_and_bases_are_named_or_left_out(tmp_path):
    config = dataclasses.replace(TINY, bases=("undertrained",), families=("fill",), rules=1)
    whole = run(tmp_path, config)
    (tmp_path / "rules.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        3, {"base": "undertrained"}, {**whole[0], "seconds": 1.0, "rule": {}})))
    assert run(tmp_path, config)[-1:] == whole
    checkpoint = load_checkpoint(tmp_path / "undertrained-0.pt")
    save_checkpoint(tmp_path / "undertrained-0.pt", {name: checkpoint[name] for name in checkpoint if name != "evaluations"})
    with pytest.raises(BadInput, match="undertrained-0.pt: a part of it is missing"):
        run(tmp_path, config)


@pytest.mark.integration
def test_report_has_every_family_arm_and_base(tmp_path, capsys):
    run(tmp_path)
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if "  " in line) <= 80 and "base: converged" in printed
    assert "\ntrained, voting  " in printed and "\ntrained - in context  " in printed and "rules.html" in printed
    text = (tmp_path / "rules.md").read_text()
    for name in (*fewshot.BASES, "permutation", "fill", "trained, voting", "MFLOP per question", "--task=rules"):
        assert name in text
    assert "<svg" in (tmp_path / "rules.svg").read_text() and "trained" in (tmp_path / "rules.html").read_text()


@pytest.mark.integration
def test_arc_tasks_that_do_not_fit_are_left_out_and_counted(tmp_path, capsys):
    pair = lambda n: {"input": [[1] * n], "output": [[2] * n]}
    for name, n in (("small", 2), ("large", 29)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"train": [pair(n), pair(n - 1)], "test": [pair(n), pair(1)]}))
    config = dataclasses.replace(TINY, bases=("undertrained",))
    rows = run(tmp_path / "out", config, dataset=tmp_path)
    assert [row["rule"] for row in rows] == ["small"] and "1 left out" in capsys.readouterr().out
    path = tmp_path / "small.json"
    path.write_text(path.read_text().replace("2]", "3]"))  # another task of the same name is answered anew
    assert run(tmp_path / "out", config, dataset=tmp_path)[-1]["content"] != rows[0]["content"]
    path.unlink()
    with pytest.raises(BadInput, match="none of its 1 tasks fits"):
        run(tmp_path / "none", config, dataset=tmp_path)


def test_context_that_is_too_short_for_the_rules_is_refused(tmp_path):
    with pytest.raises(BadInput, match="--block_size=32"):
        run(tmp_path / "out", dataclasses.replace(TINY, block_size=32))
    assert not (tmp_path / "out").exists()


def test_rate_is_that_of_rules_unless_given():
    assert fewshot.rule_rate(AdaptConfig()).rate == fewshot.RULE_RATE
    assert fewshot.rule_rate(AdaptConfig(adapt_rate=0.5)).rate == 0.5


@pytest.mark.slow
def test_training_at_inference_time_solves_new_permutations():
    """A base of three hundred steps on permutations: next to nothing right in context, most after training."""
    config = RulesConfig(families=("permutation",), train_families=("permutation",), undertrained_iter=300)
    model, _ = fewshot.train_base(config, MACHINE, "undertrained", 0)
    learner = fewshot.open_rule_learner(model, config, fewshot.rule_rate(AdaptConfig()), MACHINE)
    tasks = [make_task(rule, 3, 32) for rule in draw_rules("permutation", "test", 3)]
    rows = [fewshot.run_arms(learner, config, task, None, 0) for task in tasks]
    assert np.mean([row["in_context"] for row in rows]) < 0.1 and np.mean([row["trained"] for row in rows]) > 0.4
