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
    length: int          # T, at which models are tested, and the longest that they are trained at
    vocab_size: int
    n_answers: int       # different tokens that can be an answer
    unit: int = 4        # that divides T
    # All answers come from the logits at the last position, n_answers of them for each, see compression.
    is_read_at_the_end: bool = False

    @property
    def chance(self) -> float:
        """The accuracy of guessing uniformly among the possible answers."""
        return 1 / self.n_answers

    @property
    def trained_lengths(self) -> list[int]:
        """About an eighth, a quarter, half and all of `length`. Short examples show the way to long ones: some tasks are not
        learnt without them (Arora et al. 2023, arXiv:2312.04927, train on all numbers of pairs; docs/probes.md)."""
        return sorted({max(self.unit, self.length // n // self.unit * self.unit) for n in (8, 4, 2, 1)})


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


def noisy_recall(rng: np.random.Generator, B: int, T: int, n_keys: int, n_values: int, n_noise: int) -> Batch:
    """As recall, with 3T/16 pairs in each half, between which T/8 other tokens are scattered.

    Source: Poli et al. 2024 (MAD), section 3, arXiv:2403.17844.
    """
    n, n_others = 3 * T // 16, T // 8
    pairs, answers = recall(rng, B, 4 * n, n_keys, n_values)
    inputs, targets = n_keys + n_values + rng.integers(n_noise, size=(B, T)), np.full((B, T), IGNORE_INDEX)
    for half in range(2):
        is_pair = rng.permuted(np.arange(n + n_others) < n + np.zeros((B, 1), int), axis=1)  # of pairs and single tokens
        starts = half * (T // 2) + np.cumsum(1 + is_pair, axis=1) - 1 - is_pair
        at = starts[is_pair].reshape(B, n)
        for i in range(2):
            here = slice(2 * n * half + i, 2 * n * (half + 1), 2)
            np.put_along_axis(inputs, at + i, pairs[:, here], 1)
            np.put_along_axis(targets, at + i, answers[:, here], 1)
    return inputs, targets


def fuzzy_recall(rng: np.random.Generator, B: int, T: int, n_symbols: int) -> Batch:
    """As recall, with keys and values of one to three tokens, up to the length T. The last token of each is of a kind of its
    own, so that it is known where it ends. Tokens, n_symbols of each: of keys, but for their last; their last; of values;
    their last.

    Source: Poli et al. 2024 (MAD), section 3, arXiv:2403.17844.
    """
    inputs, targets = np.empty((B, T), np.int64), np.full((B, T), IGNORE_INDEX)
    for row in range(B):
        known, tokens = {}, []
        while len(tokens) < T // 2:
            key, value = (tuple(kind * n_symbols + symbol for kind, symbol in zip(
                [first] * int(rng.integers(3)) + [first + 1], rng.integers(n_symbols, size=3).tolist())) for first in (0, 2))
            if key not in known:
                known[key] = value
                tokens += key + value
        answers = [IGNORE_INDEX] * len(tokens)
        keys = list(known)
        while len(tokens) < T:
            key = keys[int(rng.integers(len(keys)))]
            tokens += key + known[key]
            answers += (IGNORE_INDEX,) * (len(key) - 1) + known[key] + (IGNORE_INDEX,)
        inputs[row], targets[row] = tokens[:T], answers[:T]
    return inputs, targets


def k_hop(rng: np.random.Generator, B: int, T: int, n_nodes: int, n_hops: int) -> Batch:
    """A cycle through T/4 nodes, as its edges "node, next node" in random order; then T/4 times a node and a number k up to
    n_hops (token n_nodes + k - 1): the answer is the k-th node after it.

    Source: Depo in Allen-Zhu 2025 (Physics of Language Models 4.1), section 3, ssrn.5240330.
    """
    n = T // 4
    cycle, order = sample_distinct(rng, B, n_nodes, n), sample_distinct(rng, B, n, n)
    node = lambda at: np.take_along_axis(cycle, at % n, 1)
    start, k = rng.integers(n, size=(B, n)), rng.integers(1, n_hops + 1, size=(B, n))
    edges = np.stack((node(order), node(order + 1)), -1)
    questions = np.stack((node(start), n_nodes + k - 1), -1)
    targets = np.full((B, T), IGNORE_INDEX)
    targets[:, T // 2 + 1::2] = node(start + k)
    return np.concatenate((edges, questions), 1).reshape(B, T), targets


def memorisation(rng: np.random.Generator, B: int, T: int, n_keys: int, n_values: int) -> Batch:
    """T/2 pairs "key value", whose value, the answer, is the same in all examples.

    Source: Poli et al. 2024 (MAD), section 3, arXiv:2403.17844.
    """
    facts = n_keys + np.random.default_rng(0).integers(n_values, size=n_keys)
    keys = rng.integers(n_keys, size=(B, T // 2))
    targets = np.full((B, T), IGNORE_INDEX)
    targets[:, ::2] = facts[keys]
    return np.stack((keys, facts[keys]), -1).reshape(B, T), targets


def compression(rng: np.random.Generator, B: int, T: int, n_symbols: int) -> Batch:
    """T - 1 random symbols and an end. All of them are the answers, read from the logits at the end: n_symbols of them for
    each position. So a single vector has to hold what was seen; longer examples than those of training cannot be answered.

    Source: Poli et al. 2024 (MAD), section 3, arXiv:2403.17844, where an MLP reads the vector.
    """
    symbols = rng.integers(n_symbols, size=(B, T - 1))
    end, none = np.full((B, 1), n_symbols), np.full((B, 1), IGNORE_INDEX)
    return np.concatenate((symbols, end), 1), np.concatenate((symbols, none), 1)


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


def hidden_automaton(rng: np.random.Generator, B: int, T: int, states: int, symbols: int) -> Batch:
    """As automaton, but instead of its number each state shows one bit, so that it has to be inferred from what was read
    before. Tokens: the start, the bits 1 and 2, symbols. The answers are the bits, wherever the same symbol was read in the
    same state before; not all of them can be inferred.

    Source: in-context languages, Akyürek et al. 2024, arXiv:2401.12973.
    """
    rows, transitions = np.arange(B), rng.integers(states, size=(B, states, symbols))
    seen, inputs, targets = np.zeros(transitions.shape, bool), np.zeros((B, T), np.int64), np.full((B, T), IGNORE_INDEX)
    for t in range(T):
        if t % AUTOMATON_PERIOD == 0:
            state = np.zeros(B, dtype=np.int64)
        elif t % AUTOMATON_PERIOD % 2 == 0:
            inputs[:, t] = 1 + state % 2
        else:
            symbol = rng.integers(symbols, size=B)
            transition = rows, state, symbol
            state = transitions[transition]
            inputs[:, t], targets[:, t] = 3 + symbol, np.where(seen[transition], 1 + state % 2, IGNORE_INDEX)
            seen[transition] = True
    return inputs, targets


# -- calculating ------------------------------------------------------------------------------------------------------

def nested(rng: np.random.Generator, B: int, T: int, modulus: int) -> Batch:
    """Four expressions of T/4 tokens: in prefix notation, operators before their operands, n operators +, - and * (modulus
    to modulus + 2), n + 1 numbers below the modulus, and "=" (modulus + 3), where the answer is the value.

    Source: Mano in Allen-Zhu 2025 (Physics of Language Models 4.1), section 3, ssrn.5240330.
    """
    n, size = T // 8 - 1, T // 4
    is_operator = rng.permuted(np.arange(size - 1) < n + np.zeros((4 * B, 1), int), axis=1)
    # of the rotations of such a row one is an expression: that which starts behind the first minimum of the count of
    # operators less numbers (the cycle lemma, Dvoretzky and Motzkin 1947)
    shift = np.cumsum(2 * is_operator - 1, axis=1).argmin(axis=1)[:, None] + 1
    is_operator = np.take_along_axis(is_operator, (np.arange(size - 1) + shift) % (size - 1), 1)
    operators, numbers = modulus + rng.integers(3, size=is_operator.shape), rng.integers(modulus, size=is_operator.shape)
    tokens = np.where(is_operator, operators, numbers)
    stack, height, rows = np.zeros((4 * B, n + 2), np.int64), np.zeros(4 * B, np.int64), np.arange(4 * B)
    for token in tokens.T[::-1]:  # from the last, so that an operator finds its operands, the left one on top
        operates = token >= modulus
        a, b = stack[rows, height - 1], stack[rows, height - 2]
        value = np.choose(np.maximum(token - modulus, 0), (a + b, a - b, a * b)) % modulus
        height += np.where(operates, -1, 1)
        stack[rows, height - 1] = np.where(operates, value, token)
    inputs = np.concatenate((tokens, np.full((4 * B, 1), modulus + 3)), 1).reshape(B, T)
    targets = np.full((4 * B, size), IGNORE_INDEX)
    targets[:, -1] = stack[:, 0]
    return inputs, targets.reshape(B, T)


TASKS = {
    "recall": Task(partial(recall, n_keys=64, n_values=16), length=32, vocab_size=80, n_answers=16),
    "recall_many": Task(partial(recall, n_keys=256, n_values=16), length=128, vocab_size=272, n_answers=16),
    "recall_noisy": Task(partial(noisy_recall, n_keys=96, n_values=16, n_noise=16), length=64, vocab_size=128, n_answers=16,
                         unit=16),
    "recall_fuzzy": Task(partial(fuzzy_recall, n_symbols=8), length=64, vocab_size=32, n_answers=16, unit=16),
    "k_hop": Task(partial(k_hop, n_nodes=128, n_hops=4), length=64, vocab_size=132, n_answers=128, unit=8),
    "induction": Task(partial(induction, n_symbols=256), length=64, vocab_size=256, n_answers=256),
    "selective_copy": Task(partial(selective_copy, n_symbols=16), length=48, vocab_size=18, n_answers=16),
    "compression": Task(partial(compression, n_symbols=16), length=16, vocab_size=16 * 16 * 8, n_answers=16,
                        is_read_at_the_end=True),
    "memorisation": Task(partial(memorisation, n_keys=512, n_values=32), length=32, vocab_size=544, n_answers=32),
    "sort": Task(partial(sort, n_symbols=256), length=32, vocab_size=257, n_answers=256),
    "parity": Task(partial(running_sum, modulus=2), length=48, vocab_size=2, n_answers=2),
    "modular": Task(partial(running_sum, modulus=5), length=48, vocab_size=5, n_answers=5),
    "permute": Task(permute, length=32, vocab_size=6, n_answers=6),
    "dyck": Task(partial(dyck, kinds=8, depth=4), length=48, vocab_size=16, n_answers=8),
    "automaton": Task(partial(automaton, states=5, symbols=3), length=60, vocab_size=9, n_answers=5, unit=15),
    "hidden_automaton": Task(partial(hidden_automaton, states=4, symbols=3), length=60, vocab_size=6, n_answers=2, unit=15),
    "nested": Task(partial(nested, modulus=5), length=64, vocab_size=9, n_answers=5, unit=16),
}
