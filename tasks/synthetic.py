"""Synthetic tasks whose answers are known: what can an architecture learn to compute?

    inputs, targets = TASKS["recall"].generate(np.random.default_rng(0), 8, 32)     # 8 examples of 32 tokens

probes.py trains on them. A generator makes a batch of B examples of T tokens: inputs and targets, int64 (B, T). A target is
the answer that the model has to predict at that position, or IGNORE_INDEX where nothing determines one.
"""
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

IGNORE_INDEX = -100  # targets without a loss, as in dataloader.py and F.cross_entropy

Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Task:
    generate: Callable[[np.random.Generator, int, int], Batch]  # generate(rng, B, T), see above
    length: int          # T that models are trained at
    vocab_size: int
    n_answers: int       # different tokens that can be an answer

    @property
    def chance(self) -> float:
        """The accuracy of guessing uniformly among the possible answers."""
        return 1 / self.n_answers


# -- lookup and copying -----------------------------------------------------------------------------------------------

def recall(rng: np.random.Generator, B: int, T: int, n_keys: int, n_values: int) -> Batch:
    """T/4 pairs "key value", then every key again in another order, each followed by its value, which is the answer.

    Source: multi-query associative recall, Arora et al. 2023, arXiv:2312.04927.
    """
    keys, values = sample_distinct(rng, B, n_keys, T // 4), n_keys + rng.integers(n_values, size=(B, T // 4))
    order = sample_distinct(rng, B, T // 4, T // 4)
    queries, answers = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
    pairs = np.concatenate((np.stack((keys, values), -1), np.stack((queries, answers), -1)), axis=1)  # (B, T/2, 2)
    targets = np.full((B, T), IGNORE_INDEX)
    targets[:, T // 2::2] = answers
    return pairs.reshape(B, T), targets


def induction(rng: np.random.Generator, B: int, T: int, n_symbols: int) -> Batch:
    """T/2 different symbols, then the same sequence rotated by a random amount; the answer after a symbol is the one that
    followed it in the first half (none after that half's last).

    Source: Olsson et al. 2022, arXiv:2209.11895.
    """
    n = T // 2
    symbols = sample_distinct(rng, B, n_symbols, n)
    indices = (np.arange(n) + rng.integers(n, size=(B, 1))) % n
    rotated = np.take_along_axis(symbols, indices, 1)
    answers = np.where(indices < n - 1, np.take_along_axis(symbols, (indices + 1) % n, 1), IGNORE_INDEX)
    return np.concatenate((symbols, rotated), 1), np.concatenate((np.full((B, n), IGNORE_INDEX), answers), 1)


def selective_copy(rng: np.random.Generator, B: int, T: int, n_symbols: int) -> Batch:
    """T/4 symbols scattered over 3T/4 positions that are otherwise blank (0), a separator, then the symbols in order.

    Source: Gu and Dao 2023, section 3.1, arXiv:2312.00752.
    """
    n = T // 4
    positions, symbols = np.sort(sample_distinct(rng, B, 3 * n, n)), 1 + rng.integers(n_symbols, size=(B, n))
    scattered = np.zeros((B, 3 * n), dtype=np.int64)
    np.put_along_axis(scattered, positions, symbols, 1)
    return append_answers(scattered, symbols, separator=n_symbols + 1)


def sort(rng: np.random.Generator, B: int, T: int, n_symbols: int) -> Batch:
    """T/2 different symbols, a separator, then the same in ascending order."""
    symbols = sample_distinct(rng, B, n_symbols, T // 2)
    return append_answers(symbols, np.sort(symbols), separator=n_symbols)


def sample_distinct(rng: np.random.Generator, batch_size: int, n: int, k: int) -> np.ndarray:
    """(batch_size, k) of 0..n-1, without repetition in a row, in random order."""
    return rng.random((batch_size, n)).argsort(axis=1)[:, :k]


def append_answers(question: np.ndarray, answers: np.ndarray, separator: int) -> Batch:
    """`question`, a separator, and all answers but the last; each answer is the target at the position before it."""
    B, n = question.shape
    inputs = np.concatenate((question, np.full((B, 1), separator), answers[:, :-1]), 1)
    return inputs, np.concatenate((np.full((B, n), IGNORE_INDEX), answers), 1)


# -- state tracking ---------------------------------------------------------------------------------------------------

def running_sum(rng: np.random.Generator, B: int, T: int, modulus: int) -> Batch:
    """Numbers below the modulus; the answer at every position is the sum so far. Modulus 2 is parity.

    Source: parity in Hahn 2020, arXiv:1906.06755; other moduli in Grazzi et al. 2024, arXiv:2411.12537.
    """
    numbers = rng.integers(modulus, size=(B, T))
    return numbers, numbers.cumsum(1) % modulus


PERMUTATIONS = list(itertools.permutations(range(3)))
# COMPOSE[p, q]: the permutation that applies p, then q
COMPOSE = np.array([[PERMUTATIONS.index(tuple(q[i] for i in p)) for q in PERMUTATIONS] for p in PERMUTATIONS])


def permute(rng: np.random.Generator, B: int, T: int) -> Batch:
    """Permutations of three things; the answer at every position is the product of all so far.

    Source: word problems of groups, Merrill et al. 2024, arXiv:2404.08819.
    """
    steps = rng.integers(len(PERMUTATIONS), size=(B, T))
    return steps, np.stack(list(itertools.accumulate(steps.T, lambda p, q: COMPOSE[p, q])), axis=1)


def dyck(rng: np.random.Generator, B: int, T: int, kinds: int, depth: int) -> Batch:
    """Nested brackets, 0..kinds-1 opening and kinds..2*kinds-1 closing, at most `depth` open; the answers are the closing
    brackets.

    Source: Yao et al. 2021, arXiv:2105.11115.
    """
    stack, height, rows = np.zeros((B, depth + 1), dtype=np.int64), np.zeros(B, dtype=np.int64), np.arange(B)
    brackets = np.empty((B, T + 1), dtype=np.int64)
    for t in range(T + 1):
        opens = (height == 0) | (height < depth) & (rng.random(B) < 0.5)
        height += opens
        stack[rows[opens], height[opens]] = rng.integers(kinds, size=B)[opens]
        brackets[:, t] = stack[rows, height] + kinds * ~opens
        height -= ~opens
    following = brackets[:, 1:]
    return brackets[:, :-1], np.where(following >= kinds, following, IGNORE_INDEX)


AUTOMATON_PERIOD = 15  # tokens of a string: the start, then 7 times a symbol and a state


def automaton(rng: np.random.Generator, B: int, T: int, states: int, symbols: int) -> Batch:
    """Strings of a finite automaton that differs between examples: the start (0), then random symbols, each followed by the
    state (1..states) that it leads to. That state is the answer wherever the same symbol was read in the same state before.

    Source: in-context languages, Akyürek et al. 2024, arXiv:2401.12973. There states are hidden, so that no next token would
    be certain.
    """
    rows, transitions = np.arange(B), rng.integers(1, states + 1, size=(B, states + 1, symbols))
    seen, inputs, targets = np.zeros(transitions.shape, bool), np.zeros((B, T), np.int64), np.full((B, T), IGNORE_INDEX)
    for t in range(T):
        if t % AUTOMATON_PERIOD == 0:
            state = np.zeros(B, dtype=np.int64)
        elif t % AUTOMATON_PERIOD % 2 == 0:
            inputs[:, t] = state
        else:
            symbol = rng.integers(symbols, size=B)
            transition = rows, state, symbol
            state = transitions[transition]
            inputs[:, t], targets[:, t] = states + 1 + symbol, np.where(seen[transition], state, IGNORE_INDEX)
            seen[transition] = True
    return inputs, targets


TASKS = {
    "recall": Task(partial(recall, n_keys=32, n_values=16), length=32, vocab_size=48, n_answers=16),
    "recall_many": Task(partial(recall, n_keys=128, n_values=16), length=128, vocab_size=144, n_answers=16),
    "induction": Task(partial(induction, n_symbols=128), length=64, vocab_size=128, n_answers=128),
    "selective_copy": Task(partial(selective_copy, n_symbols=16), length=48, vocab_size=18, n_answers=16),
    "sort": Task(partial(sort, n_symbols=64), length=32, vocab_size=65, n_answers=64),
    "parity": Task(partial(running_sum, modulus=2), length=48, vocab_size=2, n_answers=2),
    "modular": Task(partial(running_sum, modulus=5), length=48, vocab_size=5, n_answers=5),
    "permute": Task(permute, length=32, vocab_size=6, n_answers=6),
    "dyck": Task(partial(dyck, kinds=8, depth=4), length=48, vocab_size=16, n_answers=8),
    "automaton": Task(partial(automaton, states=5, symbols=3), length=60, vocab_size=9, n_answers=5),
}
