"""tasks/synthetic.py: every generator against a slow oracle."""
import numpy as np
import pytest

import dataloader
from probes import SCALES
from tasks import synthetic
from tasks.synthetic import TASKS

NONE = synthetic.IGNORE_INDEX


def test_ignored_targets_are_those_of_the_loss():
    assert synthetic.IGNORE_INDEX == dataloader.IGNORE_INDEX == -100


# -- oracles: the answers again from the inputs alone, one row at a time ----------------------------------------------

def recall(row):
    n = len(row) // 4
    known = dict(zip(row[:2 * n:2], row[1:2 * n:2]))
    assert len(known) == n and sorted(row[2 * n::2]) == sorted(known)
    return [NONE] * 2 * n + [answer for key in row[2 * n::2] for answer in (known[key], NONE)]


def induction(row):
    n, answers = len(row) // 2, []
    assert len(set(row[:n])) == n and sorted(row[:n]) == sorted(row[n:])
    for symbol in row[n:]:
        after = row[:n].index(symbol) + 1
        answers.append(row[after] if after < n else NONE)
    return [NONE] * n + answers


def after_separator(row, n, result):
    """The answers of a row of n tokens, a separator, and `result` but for its last."""
    assert row[n + 1:] == result[:-1]
    return [NONE] * n + result


def selective_copy(row):
    n = len(row) // 4
    copied = [symbol for symbol in row[:3 * n] if symbol != 0]
    assert len(copied) == n and row[3 * n] == 17
    return after_separator(row, 3 * n, copied)


def sort(row):
    n = len(row) // 2
    assert row[n] == 64
    return after_separator(row, n, sorted(row[:n]))


def parity(row):
    return [row[:t + 1].count(1) % 2 for t in range(len(row))]


def modular(row):
    return [sum(row[:t + 1]) % 5 for t in range(len(row))]


def permute(row):
    """Moves three things, rather than looking up products."""
    moves, things, answers = synthetic.PERMUTATIONS, [0, 1, 2], []
    for symbol in row:
        things = [moves[symbol][thing] for thing in things]
        answers.append(moves.index(tuple(things)))
    return answers


def dyck(row, kinds=8, depth=4):
    """The last answer follows the row's end, so it is only known which bracket could close there."""
    answers, stack = [], []
    for t, bracket in enumerate(row):
        if bracket < kinds:
            stack.append(bracket)
        else:
            assert stack.pop() == bracket - kinds
        assert len(stack) <= depth
        closes = t + 1 < len(row) and row[t + 1] >= kinds
        answers.append(kinds + stack[-1] if closes else NONE)
    return answers


def automaton(row):
    answers, seen = [], {}
    for t, token in enumerate(row):
        i = t % 15
        assert (token == 0) == (i == 0) and (i == 0 or (1 <= token <= 5) == (i % 2 == 0))
        answers.append(seen.get((row[t - 1], token), NONE) if i % 2 else NONE)
        if i and i % 2 == 0:
            assert seen.setdefault((row[t - 2], row[t - 1]), token) == token
    return answers


ORACLES = {"recall": recall, "recall_many": recall, "induction": induction, "selective_copy": selective_copy, "sort": sort,
           "parity": parity, "modular": modular, "permute": permute, "dyck": dyck, "automaton": automaton}


def generate(name, scale=1, n=16, seed=5):
    return TASKS[name].generate(np.random.default_rng(seed), n, scale * TASKS[name].length)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TASKS)
def test_targets_equal_the_oracles(name, scale):
    inputs, targets = generate(name, scale)
    assert inputs.shape == targets.shape == (16, scale * TASKS[name].length)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.min() >= 0 and max(inputs.max(), targets.max()) < TASKS[name].vocab_size
    for row, answers in zip(inputs.tolist(), targets.tolist()):
        expected = ORACLES[name](row)
        if name == "dyck":
            assert answers[:-1] == expected[:-1]
        else:
            assert answers == expected


def test_last_answer_of_dyck_closes_an_open_bracket():
    inputs, targets = generate("dyck", n=64)
    for row, answer in zip(inputs.tolist(), targets[:, -1].tolist()):
        stack = []
        for bracket in row:
            stack = [*stack, bracket] if bracket < 8 else stack[:-1]
        assert answer == NONE or answer == 8 + stack[-1]
    assert 0 < (targets[:, -1] == NONE).sum() < 64


def test_oracles_by_hand():
    assert recall([3, 40, 7, 41, 7, 41, 3, 40]) == [NONE] * 4 + [41, NONE, 40, NONE]
    assert induction([5, 9, 2, 9, 2, 5]) == [NONE] * 3 + [2, NONE, 9]
    assert parity([1, 0, 1, 1]) == [1, 1, 0, 1]


def test_composition_of_permutations_by_hand():
    swap, rotate = synthetic.PERMUTATIONS.index((1, 0, 2)), synthetic.PERMUTATIONS.index((1, 2, 0))
    assert synthetic.COMPOSE[swap, rotate] != synthetic.COMPOSE[rotate, swap]  # the order counts
    assert synthetic.COMPOSE[swap, swap] == synthetic.PERMUTATIONS.index((0, 1, 2))


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_what_uniform_guesses_score(name):
    task, rng = TASKS[name], np.random.default_rng(1)
    answers = np.concatenate([targets[targets != NONE] for _, targets in (generate(name, n=200, seed=s) for s in range(4))])
    possible = np.unique(answers)
    assert len(possible) == task.n_answers
    accuracy = (rng.choice(possible, size=len(answers)) == answers).mean()
    assert accuracy == pytest.approx(task.chance, abs=4 * (task.chance / len(answers)) ** 0.5)
