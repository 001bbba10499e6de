"""Synthetic tasks whose answers are known: what can an architecture learn to compute?"""
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

IGNORE_INDEX = -100        # targets that carry no loss; the value F.cross_entropy skips by itself


# -- tasks ------------------------------------------------------------------------------------------------------------

# Each makes B examples of T tokens: inputs and targets, int64 (B, T), where a target is what the model must say at that
# position, and IGNORE_INDEX where nothing is determined.
def distinct(rng: np.random.Generator, batch_size: int, n: int, k: int) -> np.ndarray:
    """(batch_size, k) of 0..n-1, no two alike in a row, in random order."""
    return rng.random((batch_size, n)).argsort(axis=1)[:, :k]


def make_recall(rng: np.random.Generator, B: int, T: int, n_keys: int, n_values: int) -> tuple[np.ndarray, np.ndarray]:
    """T/4 pairs "key value", then every key again in another order, each followed by its value, which is the answer.
    Source: multi-query associative recall, Arora et al. 2023, arXiv:2312.04927."""
    keys, values = distinct(rng, B, n_keys, T // 4), n_keys + rng.integers(n_values, size=(B, T // 4))
    order = distinct(rng, B, T // 4, T // 4)
    asked, answers = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
    pairs = np.concatenate((np.stack((keys, values), -1), np.stack((asked, answers), -1)), axis=1)  # (B, T/2, 2)
    targets = np.full((B, T), IGNORE_INDEX)
    targets[:, T // 2::2] = answers
    return pairs.reshape(B, T), targets


def make_induction(rng: np.random.Generator, B: int, T: int, n_symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """T/2 different symbols, then the same from a random place on and round: what follows a symbol is what followed it
    before. Not after the last one, which nothing had followed. Source: Olsson et al. 2022, arXiv:2209.11895."""
    n = T // 2
    symbols = distinct(rng, B, n_symbols, n)
    places = (np.arange(n) + rng.integers(n, size=(B, 1))) % n
    again = np.take_along_axis(symbols, places, 1)
    answers = np.where(places < n - 1, np.take_along_axis(symbols, (places + 1) % n, 1), IGNORE_INDEX)
    return np.concatenate((symbols, again), 1), np.concatenate((np.full((B, n), IGNORE_INDEX), answers), 1)


def asked_for(given: np.ndarray, answers: np.ndarray, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """`given`, a sign, and then the answers one by one, each the target at the position before it."""
    B, n = len(given), given.shape[1]
    inputs = np.concatenate((given, np.full((B, 1), sign), answers[:, :-1]), 1)
    return inputs, np.concatenate((np.full((B, n), IGNORE_INDEX), answers), 1)


def make_selective_copy(rng: np.random.Generator, B: int, T: int, n_symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """T/4 symbols scattered over 3T/4 places that are otherwise blank (0), a sign, then the symbols in their order.
    Source: Gu and Dao 2023, section 3.1, arXiv:2312.00752."""
    n = T // 4
    places, symbols = np.sort(distinct(rng, B, 3 * n, n)), 1 + rng.integers(n_symbols, size=(B, n))
    scattered = np.zeros((B, 3 * n), dtype=np.int64)
    np.put_along_axis(scattered, places, symbols, 1)
    return asked_for(scattered, symbols, n_symbols + 1)


def make_sort(rng: np.random.Generator, B: int, T: int, n_symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """T/2 different symbols, a sign, then the same in ascending order."""
    symbols = distinct(rng, B, n_symbols, T // 2)
    return asked_for(symbols, np.sort(symbols), n_symbols)


def make_running_sum(rng: np.random.Generator, B: int, T: int, modulus: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers below the modulus; the answer at every position is the sum so far. Source: parity, which is modulus 2, in
    Hahn 2020, arXiv:1906.06755; others in Grazzi et al. 2024, arXiv:2411.12537."""
    numbers = rng.integers(modulus, size=(B, T))
    return numbers, numbers.cumsum(1) % modulus


PERMUTATIONS = list(itertools.permutations(range(3)))
# AFTER[p, q]: the permutation that does p, then q
AFTER = np.array([[PERMUTATIONS.index(tuple(q[i] for i in p)) for q in PERMUTATIONS] for p in PERMUTATIONS])


def make_permute(rng: np.random.Generator, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Permutations of three things; the answer at every position is what all so far amount to, one after the other.
    Source: word problems of groups, Merrill et al. 2024, arXiv:2404.08819."""
    steps = rng.integers(len(PERMUTATIONS), size=(B, T))
    return steps, np.stack(list(itertools.accumulate(steps.T, lambda p, q: AFTER[p, q])), axis=1)


def make_dyck(rng: np.random.Generator, B: int, T: int, kinds: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Nested brackets, 0..kinds-1 opening and kinds..2*kinds-1 closing, at most `depth` open; the answers are the closing
    ones. Source: Yao et al. 2021, arXiv:2105.11115."""
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


STRING = 15  # tokens: the start, and 7 times a symbol and a state


def make_automaton(rng: np.random.Generator, B: int, T: int, states: int, symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """Strings of a finite automaton that is another one in every example: the start (0), then random symbols, each followed
    by the state (1..states) that it leads to. That state is the answer where the same symbol was read in the same state
    before. Source: in-context languages, Akyürek et al. 2024, arXiv:2401.12973, where states are not shown: then nothing
    that follows would be certain."""
    rows, table = np.arange(B), rng.integers(1, states + 1, size=(B, states + 1, symbols))
    seen, inputs, targets = np.zeros(table.shape, bool), np.zeros((B, T), np.int64), np.full((B, T), IGNORE_INDEX)
    for t in range(T):
        if t % STRING == 0:
            state = np.zeros(B, dtype=np.int64)
        elif t % STRING % 2 == 0:
            inputs[:, t] = state
        else:
            symbol = rng.integers(symbols, size=B)
            step = rows, state, symbol
            state = table[step]
            inputs[:, t], targets[:, t] = states + 1 + symbol, np.where(seen[step], state, IGNORE_INDEX)
            seen[step] = True
    return inputs, targets


@dataclass(frozen=True)
class Task:
    make: Callable      # make(rng, B, T) -> inputs and targets
    length: int         # T that a model is trained at
    vocab_size: int
    n_answers: int      # symbols that can be an answer

    @property
    def guessing(self) -> float:
        """The share that is right by choosing evenly among the possible answers."""
        return 1 / self.n_answers


TASKS = {
    "recall": Task(partial(make_recall, n_keys=32, n_values=16), 32, 48, 16),
    "recall_many": Task(partial(make_recall, n_keys=128, n_values=16), 128, 144, 16),
    "induction": Task(partial(make_induction, n_symbols=128), 64, 128, 128),
    "selective_copy": Task(partial(make_selective_copy, n_symbols=16), 48, 18, 16),
    "sort": Task(partial(make_sort, n_symbols=64), 32, 65, 64),
    "parity": Task(partial(make_running_sum, modulus=2), 48, 2, 2),
    "modular": Task(partial(make_running_sum, modulus=5), 48, 5, 5),
    "permute": Task(make_permute, 32, 6, 6),
    "dyck": Task(partial(make_dyck, kinds=8, depth=4), 48, 16, 8),
    "automaton": Task(partial(make_automaton, states=5, symbols=3), 60, 9, 5),
}
