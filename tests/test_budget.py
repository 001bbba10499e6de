"""budget.py: what accuracy costs, against hand examples and enumeration."""
import itertools
import json

import numpy as np
import pytest
import torch

import budget
import evaluate
from budget import (
    Depth,
    GameSubject,
    Point,
    Pool,
    Subject,
    budget_rows,
    choice_accuracy,
    first_sight,
    inference_flops,
    look_ahead,
    measure_budgets,
    measure_moves,
    measure_play,
    spend_by_difficulty,
    stop_early,
)
from candidates import ROUND, Answer
from model import GPT, GPTConfig
from players import open_positions
from runtime.checkpoint import save_checkpoint
from runtime.device import DeviceConfig, open_machine
from sampling import SamplingConfig
from strength import make_exam
from tasks.games import make_game
from tasks.positions import move_values, random_line
from tasks.thinking import TASKS, messages
from think import byte_tokenizer

BYTES, MACHINE = byte_tokenizer(), open_machine(DeviceConfig("cpu", "fp32"))
T1 = SamplingConfig(temperature=1.0, top_k=0)


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"n_layer": 3, "n_head": 2, "head_size": 8, "block_size": 64, "vocab_size": BYTES.vocab_size}
                         | changes)).requires_grad_(False)


def make_pool(rows: list[str], right: str) -> Pool:
    """A row of one-letter answers for each question, and the right one of each."""
    answers = [[Answer([0, 0], [-1.0, -1.0], letter, True) for letter in row] for row in rows]
    return Pool(answers, np.array([[float(letter == truth) for letter in row] for row, truth in zip(rows, right)]),
                np.full((len(rows), len(rows[0])), 2))


# -- several answers --------------------------------------------------------------------------------------------------

def test_a_choice_among_all_is_that_of_the_pool_and_among_one_is_the_mean(monkeypatch):
    pool = make_pool(["aabb", "abbb", "aaab"], "aab")
    assert choice_accuracy(pool, "vote", 4).tolist() == [1, 0, 0]
    assert choice_accuracy(pool, "verifier", 4).tolist() == [1, 1, 1]
    monkeypatch.setattr(budget, "N_SUBSETS", 20_000)
    assert choice_accuracy(pool, "vote", 1) == pytest.approx([0.5, 0.25, 0.25], abs=0.02)


def test_fewer_samples_are_all_subsets_of_the_pool(monkeypatch):
    """Votes of three of "aabbb", ties to the first: by enumeration."""
    monkeypatch.setattr(budget, "N_SUBSETS", 20_000)
    subsets = list(itertools.combinations("aabbb", 3))
    exact = sum(subset.count("a") > subset.count("b") for subset in subsets) / len(subsets)
    assert choice_accuracy(make_pool(["aabbb"], "a"), "vote", 3)[0] == pytest.approx(exact, abs=0.02)


def test_a_vote_that_stops_early_is_as_right_as_the_whole_one_and_takes_fewer():
    pool = make_pool(["a" * 16, "a" * 9 + "b" * 7, "ab" * 8], "aaa")
    right, n_used, tokens = stop_early(pool, 1.0)
    assert right[0] == 1 == right[1] and ROUND < n_used < 16 and tokens == pytest.approx(2 * n_used)
    _, n_unanimous, _ = stop_early(make_pool(["a" * 16], "a"), 0.9)
    assert n_unanimous == ROUND


def test_samples_go_where_they_help():
    """Half of the questions are answered alike by all samples; of the others only many tell the first answer from the
    second."""
    rng = np.random.default_rng(0)
    easy, hard = ["a" * 32] * 40, ["".join(rng.permutation([*"a" * 12, *"b" * 9, *"cdefghijklm"])) for _ in range(40)]
    pool = make_pool([text for pair in zip(easy, easy, hard, hard) for text in pair], "a" * 160)
    right, used, tokens = spend_by_difficulty(pool, "vote", 16)
    assert used <= 16 and tokens == pytest.approx(2 * used)
    assert right.mean() > choice_accuracy(pool, "vote", 16).mean() + 0.02


# -- cost -------------------------------------------------------------------------------------------------------------

def test_flops_are_two_for_each_weight_and_those_of_attention():
    model = make_model(tied=False)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = lambda context: 3 * 2 * 2 * context * 16  # layers, scores and sums, width
    assert inference_flops(model, 10, 0) == 10 * (2 * weights + attention(5))
    assert inference_flops(model, 10, 4, 3) == inference_flops(model, 10, 0) + 3 * 4 * (2 * weights + attention(12))


def test_loops_cost_what_they_repeat():
    model = make_model(loops=2)
    one = inference_flops(model, 8, 8)
    model.loops = 4
    assert inference_flops(model, 8, 8) > 1.3 * one


# -- all ways ---------------------------------------------------------------------------------------------------------

def make_subject(name: str, **changes) -> Subject:
    task, model = TASKS[name], make_model(block_size=128, **changes)
    problems = task.make(6, 3, seed=0)
    depths = [Depth(level.name, level.n_tokens(3), [
        BYTES.encode_chat(messages(problem, level), add_generation_prompt=True)[0] for problem in problems])
        for level in (task.levels[0], task.levels[-1])]
    return Subject(model, BYTES, MACHINE, depths, [problem.check for problem in problems], task.has_verifier, 12)


@pytest.mark.parametrize("name, changes", [("addition", {}), ("countdown", {"loops": 2})])
def test_every_way_that_a_model_has_is_measured_once_for_each_budget(name, changes):
    points = measure_budgets(make_subject(name, **changes), 4, T1)
    keys = [(point.way, point.budget) for point in points]
    assert len(set(keys)) == len(keys)
    ways = {way for way, _ in keys}
    assert {"one answer, greedy", "thinking, as told", "thinking, cut off", "vote", "logprob", "mbr", "one of them is right",
            "vote, answering at once", "vote, certain to 100%"} <= ways
    assert ("verifier" in ways) == (name == "countdown") and ("loops" in ways) == ("loops" in changes)
    assert all(len(point.right) == 6 and point.tokens > 0 and point.flops > 0 and point.seconds > 0 for point in points)
    assert all(point.right.min() >= 0 and point.right.max() <= 1 for point in points)


def test_the_loops_of_a_model_are_as_before_afterwards():
    subject = make_subject("addition", loops=3)
    budget.measure_loops(subject)
    assert subject.model.loops == 3


def test_rows_have_paired_differences():
    a, b = (Point("a", 1, np.array(right, float), 1.0, 1.0, 1.0) for right in ([1, 0, 0, 1], [1, 1, 0, 1]))
    first, second = budget_rows([a, b])
    assert first["difference"] == 0 and second["difference"] == 0.25 and second["accuracy"] == 0.75
    assert second["difference_margin"] == pytest.approx(0.25 * 3.182446, rel=1e-5)  # t of 3 degrees of freedom


# -- games ------------------------------------------------------------------------------------------------------------

def game_model(game) -> GPT:
    return make_model(block_size=game.max_plies + 1, vocab_size=game.vocab_size)


def test_looking_ahead_to_the_end_plays_perfectly():
    """Near the end of tic-tac-toe, four moves ahead are all there are."""
    game = make_game("tic_tac_toe")
    line = random_line(game, 60, 5, np.random.default_rng(0))
    moves, n_read = look_ahead(open_positions(game_model(game), game, line), 4)
    values = move_values(game, line.state)
    best = np.where(values == 2, -9, values).max(1)
    assert (values[np.arange(len(moves)), moves] == best).all() and n_read > 4 * len(moves)


def test_one_move_ahead_is_expand_and_none_is_first_sight():
    game = make_game("tic_tac_toe")
    positions = open_positions(game_model(game), game, random_line(game, 20, 2, np.random.default_rng(0)))
    from players import expand, predict
    moves, n_read = look_ahead(positions, 1)
    assert moves.tolist() == expand(positions).values.argmax(1).tolist() and n_read == 7 * 20
    expected = predict(game, positions.logits, game.legal(positions.state)).moves.argmax(1)
    assert first_sight(positions)[0].tolist() == expected.tolist()


def test_play_is_measured_at_every_depth(monkeypatch):
    game = make_game("tic_tac_toe")
    subject = GameSubject(game_model(game), game, [q for q in make_exam(game) if q.line.history.shape[1] > 5], MACHINE)
    monkeypatch.setattr(budget, "SIMULATIONS", (2, 4))
    points = measure_play(subject)
    ways = [("at first sight", 0), *(("all moves", depth) for depth in budget.AHEAD), ("tree search", 2), ("tree search", 4)]
    assert [(point.way.split(",")[0], point.budget) for point in points] == 2 * ways
    assert [point.way.endswith("untrained") for point in points] == [False] * 6 + [True] * 6
    assert points[9].right.mean() == 1.0  # a search to the end needs no network
    assert points[3].right.mean() == 1.0  # three moves are all that are left
    assert points[0].tokens == 0 < points[1].tokens < points[2].tokens
    assert measure_moves(subject, "x", 0, first_sight).right.tolist() == points[0].right.tolist()


# -- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture
def thinker(tmp_path):
    path = tmp_path / "addition.pt"
    save_checkpoint(path, make_model(block_size=128).to_checkpoint() | {
        "tokenizer": BYTES.to_json(), "training": {"script": "think.py", "settings": {"task": "addition", "size": 3}}})
    return path


def test_the_command_draws_the_curve_and_writes_rows(thinker, capsys):
    evaluate.main([f"--checkpoint_path={thinker}", "--task=addition", "--limit=4", "--samples=4", "--budget_curve",
                   "--device=cpu", "--dtype=fp32"])
    rows = [json.loads(line) for line in (thinker.with_suffix("") / "budget.jsonl").read_text().splitlines()]
    assert rows[0]["way"] == "one answer, greedy" and {row["questions"] for row in rows} == {4}
    page = (thinker.with_suffix("") / "budget.html").read_text()
    assert (thinker.with_suffix("") / "budget.svg").read_text().count("<svg") == 4  # three in one
    assert page.count("<svg") == 3 and "thinking, cut off" in page and "| way | budget |" in capsys.readouterr().out


def test_the_command_scores_problems_with_votes_and_thoughts(thinker, capsys):
    for flags in ([], ["--samples=4", "--choose=vote"], ["--think=2", "--think_fully"], ["--think=0"]):
        evaluate.main([f"--checkpoint_path={thinker}", "--task=addition", "--limit=4", "--device=cpu", *flags])
        out = capsys.readouterr().out
        assert "| exact match | higher |" in out and ("pass@1" in out) == ("--samples=4" in flags)


@pytest.mark.parametrize("flags, words", [
    (["--task=addition", "--choose=verifier", "--samples=2"], ["--choose=verifier", "can only be checked"]),
    (["--task=text", "--samples=2"], ["--samples=2: is of --task=answers"]),
    (["--task=text", "--budget_curve"], ["--budget_curve", "is of --task=answers"]),
    (["--task=addition", "--search=puct"], ["--search=puct: is of --task=game"]),
    (["--task=addition", "--adapt"], ["--adapt", "is of --task=text"]),
    (["--task=addition", "--size=70"], ["--size", "context"]), (["--task=addition", "--size=99"], ["--size=99", "at most"]),
    (["--task=addition", "--budget_curve", "--out_path=x.svg"], ["--out_path=x.svg", "end it in .jsonl"]),
    (["--task=game"], ["its tokens are not those of a game"])])
def test_bad_flags_are_one_line(thinker, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([f"--checkpoint_path={thinker}", "--device=cpu", *flags])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in error and all(word in error for word in words), error
