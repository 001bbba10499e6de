"""tasks/synthetic.py: every generator against a slow oracle."""
import itertools

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
    assert row[n] == 256
    return after_separator(row, n, sorted(row[:n]))


def recall_noisy(row):
    """Keys below 96, then 16 values, then noise; in each half, a key is followed by its value."""
    known, answers, half = {}, [], len(row) // 2
    noise = [token for token in row if token >= 112]
    assert len(noise) == len(row) // 4 and sum(token >= 112 for token in row[:half]) == len(row) // 8
    for t, token in enumerate(row):
        is_key = token < 96
        assert is_key == (t + 1 < len(row) and 96 <= row[t + 1] < 112)
        if is_key and t < half:
            assert token not in known
            known[token] = row[t + 1]
        answers.append(known[token] if is_key and t >= half else NONE)
    return answers


def split_words(row, start):
    """Runs of tokens of kinds 0 1 (a key) and 2 3 (a value), whose last is of an odd kind; (start, tokens) of each."""
    words, word = [], []
    for t in range(start, len(row)):
        word.append(row[t])
        if row[t] // 8 % 2:
            words.append((t + 1 - len(word), word))
            word = []
    return words, word


def recall_fuzzy(row):
    """The tokens of a value, after a key that was seen before: first met, a key is learnt."""
    answers, known, (words, rest) = [NONE] * len(row), {}, split_words(row, 0)
    for (_, key), (at, value) in zip(words[::2], words[1::2]):
        assert len(key) <= 3 and len(value) <= 3 and key[0] // 8 <= 1 and value[0] // 8 >= 2
        if tuple(key) in known:
            assert known[tuple(key)] == value and at > len(row) // 2
            answers[at - 1:at - 1 + len(value)] = value
        else:
            assert at - len(key) < len(row) // 2
        known[tuple(key)] = value
    if len(words) % 2:  # the row ends in a value
        value = known[tuple(words[-1][1])]
        at = len(row) - len(rest)
        answers[at - 1:] = value[:len(row) - at + 1]
    return answers


def k_hop(row):
    n = len(row) // 4
    following = dict(zip(row[:2 * n:2], row[1:2 * n:2]))
    assert len(following) == n and set(following) == set(following.values())
    answers = [NONE] * 2 * n
    for node, hops in zip(row[2 * n::2], row[2 * n + 1::2]):
        for _ in range(hops - 127):
            node = following[node]
        answers += [NONE, node]
    return answers


def memorisation(row):
    """Its values never change, see test_facts_are_the_same_in_all_examples."""
    assert all(key < 512 <= value for key, value in zip(row[::2], row[1::2]))
    return [answer for value in row[1::2] for answer in (value, NONE)]


def compression(row):
    assert row[-1] == 16
    return [*row[:-1], NONE]


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


def nested(row):
    """Evaluates recursively, in integers, and takes the remainder at the end."""
    def evaluate(tokens):
        token = next(tokens)
        if token < 5:
            return token
        a, b = evaluate(tokens), evaluate(tokens)
        return (a + b, a - b, a * b)[token - 5]
    answers, size = [NONE] * len(row), len(row) // 4
    for start in range(0, len(row), size):
        tokens = iter(row[start:start + size])
        answers[start + size - 1] = evaluate(tokens) % 5
        assert list(tokens) == [8]
    return answers


# of all tasks but hidden_automaton
ORACLES = {"recall": recall, "recall_many": recall, "recall_noisy": recall_noisy, "recall_fuzzy": recall_fuzzy,
           "k_hop": k_hop, "induction": induction, "selective_copy": selective_copy, "compression": compression,
           "memorisation": memorisation, "sort": sort, "parity": parity, "modular": modular, "permute": permute,
           "dyck": dyck, "automaton": automaton, "nested": nested}


def generate(name, scale=1, n=16, seed=5):
    return TASKS[name].generate(np.random.default_rng(seed), n, scale * TASKS[name].length)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ORACLES)
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


def test_bits_of_a_hidden_automaton_are_those_of_one_that_exists():
    """Of the 729 automata of three states and two symbols, of which two show the same bit, all are tried: one that shows
    what the row shows has these answers."""
    inputs, targets = synthetic.hidden_automaton(np.random.default_rng(3), 4, 60, states=3, symbols=2)
    for row, answers in zip(inputs.tolist(), targets.tolist()):
        possible = []
        for machine in itertools.product(itertools.product(range(3), repeat=2), repeat=3):  # [state][symbol] -> state
            state, shown, seen, expected = 0, [], set(), []
            for t, token in enumerate(row):
                i, before = t % 15, state
                state = 0 if i == 0 else machine[state][token - 3] if i % 2 else state
                expected.append(1 + state % 2 if i % 2 and (before, token) in seen else NONE)
                seen.add((before, token) if i % 2 else None)
                shown.append(0 if i == 0 else token if i % 2 else 1 + state % 2)
            if shown == row:
                possible.append(expected)
        assert 0 < len(possible) < 729 and answers in possible


def test_facts_are_the_same_in_all_examples():
    known = {}
    for seed in range(3):
        for row in generate("memorisation", seed=seed)[0].tolist():
            for key, value in zip(row[::2], row[1::2]):
                assert known.setdefault(key, value) == value
    assert len(set(known.values())) == 32


@pytest.mark.parametrize("name", TASKS)
def test_examples_of_every_trained_length(name):
    task = TASKS[name]
    assert task.trained_lengths[-1] == task.length and len(task.trained_lengths) >= 3
    for length in task.trained_lengths:
        inputs, targets = task.generate(np.random.default_rng(0), 50, length)
        assert inputs.shape == targets.shape == (50, length) and (targets != NONE).any()


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
    assert k_hop([5, 9, 2, 5, 9, 2, 5, 128, 2, 129, 9, 130]) == [NONE] * 7 + [9, NONE, 9, NONE, 9]
    assert nested([6, 1, 3, 8] * 4) == [NONE, NONE, NONE, 3] * 4  # 1 - 3 = -2


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
