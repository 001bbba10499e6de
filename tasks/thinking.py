"""Questions that are hard to answer at once and easy in steps, with the steps: thoughts that a model can learn to say first.

    problem = TASKS["addition"].draw(rng, 2)
    thought = TASKS["addition"].levels[0].think(problem, rng)
    print(problem.text, thought + THOUGHT_END + problem.answer)      "B0C4+B5C7" "C1#A0B6C1"

Each task has levels, from thinking most to answering at once. The level is told in the system message, and an answer is the
thought, THOUGHT_END and what the question asks for. A task is a line in TASKS.
"""
import itertools
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from runtime.config import BadInput
from tasks.builtin_questions import is_held_out
from tasks.checkable import COUNTDOWN_NUMBERS, COUNTDOWN_TARGET, check_countdown, countdown_text, final_answer

STRIDES = 1, 2, 4, 8          # steps of which one is said
TRIES = 16, 8, 4, 2, 1        # of Countdown, at most
AT_ONCE = "at once"
MAX_TRY = 16                  # characters of one on average, about: a budget of tokens allows so many fewer


class Problem(NamedTuple):
    """steps: what can be said on the way, a text each; of Countdown the numbers, and a right try."""
    text: str
    answer: str
    check: Callable[[str], float]
    steps: object


@dataclass(frozen=True)
class Level:
    """How much is thought. name: as the model is told. n_tokens(size): of the longest thought, about, where a character is a
    token. think(problem, rng) -> the thought."""
    name: str
    n_tokens: Callable[[int], int]
    think: Callable[[Problem, np.random.Generator], str]


@dataclass(frozen=True)
class ThinkingTask:
    """draw(rng, size) -> a Problem. levels: from thinking most to answering at once. size: by default, and max_size
    at most; sizes(size): those that are trained on. has_verifier: whether an answer can be checked without knowing the right
    one."""
    draw: Callable[[np.random.Generator, int], Problem]
    levels: tuple[Level, ...]
    size: int
    max_size: int
    sizes: Callable[[int], range]
    unit: str
    has_verifier: bool = False

    def level_within(self, n_tokens: int, size: int) -> Level:
        """The one that thinks most among those of at most so many tokens."""
        return next(level for level in self.levels if level.n_tokens(size) <= n_tokens)

    def check_size(self, size: int):
        """Raises BadInput, which names --size."""
        if size > self.max_size:
            raise BadInput(f"--size={size}: has to be at most {self.max_size} {self.unit}: give less")

    def make(self, n: int, size: int, seed: int, held_out: bool = True) -> list[Problem]:
        """`n` different problems of one size, always the same ones; fewer where there are not so many."""
        rng, found = np.random.default_rng([8, seed, held_out]), {}
        for _ in range(100 * n + 1000):
            problem = self.draw(rng, size)
            if is_held_out(problem.text) == held_out:
                found.setdefault(problem.text, problem)
            if len(found) == n:
                break
        return list(found.values())


def messages(problem: Problem, level: Level) -> list[dict]:
    """The conversation up to the answer."""
    return [{"role": "system", "content": level.name}, {"role": "user", "content": problem.text}]


def exact(answer: str) -> Callable[[str], float]:
    return lambda output: float(final_answer(output).strip() == answer)


# -- a state that every step changes ----------------------------------------------------------------------------------

# Every place of a problem has a label, so that a step finds its input by what it is called: at these sizes a model does not
# learn to count so far. Labels are consecutive from a random one on, so that those of longer problems are known too. Source:
# index hints, Zhou et al. 2023, arXiv:2310.16028.
LABELS = string.ascii_letters + "!$%&'(),-./:<>?@[]^_`{|}~"
PERMUTATIONS = list(itertools.permutations(range(3)))


def draw_labels(rng: np.random.Generator, n: int) -> str:
    """`n` consecutive ones, at most as many as there are."""
    first = rng.integers(len(LABELS) - n + 1)
    return LABELS[first:first + n]


def label_all(labels: str, values: str) -> str:
    """"AB", "07" -> "A0B7"."""
    return "".join(label + value for label, value in zip(labels, values, strict=True))


def said_steps(stride: int, problem: Problem, rng: np.random.Generator) -> str:
    """Every `stride`-th, but not the last one, which is in the answer."""
    return "".join(problem.steps[stride - 1:-1:stride])


def no_thought(problem: Problem, rng: np.random.Generator) -> str:
    return ""


SAY_NOTHING = Level(AT_ONCE, lambda size: 0, no_thought)


def step_levels(n_tokens: int) -> tuple[Level, ...]:
    """n_tokens: of a step."""
    return (*(Level(f"every {stride}", lambda size, stride=stride: n_tokens * ((size - 1) // stride),
                    partial(said_steps, stride)) for stride in STRIDES), SAY_NOTHING)


def draw_permutations(rng: np.random.Generator, size: int) -> Problem:
    """"A5B1C3": permutations of three things, one after the other, by their numbers. The answer is what all do together, and
    a step is a permutation and what all up to it do. The former is a copy, by which a model learns to find its place: what
    all do follows from it and the step before, and from neither alone, so that without it nothing would be learnt."""
    labels, drawn, state, states = draw_labels(rng, size), rng.integers(0, 6, size).tolist(), (0, 1, 2), ""
    for i in drawn:
        state = tuple(PERMUTATIONS[i][place] for place in state)
        states += str(PERMUTATIONS.index(state))
    steps = [f"{label}{i}{state}" for label, i, state in zip(labels, drawn, states)]
    return Problem(label_all(labels, as_text(drawn)), states[-1], exact(states[-1]), steps)


def draw_addition(rng: np.random.Generator, size: int) -> Problem:
    """"B0C4+B5C7": 04 + 57. The answer is "A0B6C1", and the steps are the carries, from the last place on."""
    a, b = rng.integers(0, 10, (2, size)).tolist()
    sums = add_up(a, b)
    return column_problem(rng, sums, lambda labels: f"{label_all(labels, as_text(a))}+{label_all(labels, as_text(b))}")


def draw_multiplication(rng: np.random.Generator, size: int) -> Problem:
    """"B4C7*6": by one digit. The answer is "A2B8C2", and the steps are the carries, from the last place on."""
    digits, factor = rng.integers(0, 10, size).tolist(), int(rng.integers(2, 10))
    sums = add_up([digit * factor for digit in digits], [0] * size)
    return column_problem(rng, sums, lambda labels: f"{label_all(labels, as_text(digits))}*{factor}")


def as_text(digits: list[int]) -> str:
    return "".join(map(str, digits))


def add_up(a: list[int], b: list[int]) -> list[tuple[int, int]]:
    """The columns of two numbers, first place first -> (digit, carry) of each, last place first."""
    found, carry = [], 0
    for left, right in zip(a[::-1], b[::-1]):
        carry, digit = divmod(left + right + carry, 10)
        found.append((digit, carry))
    return found


def column_problem(rng: np.random.Generator, sums: list[tuple[int, int]], write: Callable[[str], str]) -> Problem:
    """sums: (digit, carry) of each place, the last first. write(labels) -> the question."""
    labels = draw_labels(rng, len(sums) + 1)
    digits = str(sums[-1][1]) + "".join(str(digit) for digit, _ in reversed(sums))
    answer = label_all(labels, digits)
    return Problem(write(labels[1:]), answer, exact(answer),
                   [label + str(carry) for label, (_, carry) in zip(reversed(labels), sums)])


# -- Countdown --------------------------------------------------------------------------------------------------------

class Try(NamedTuple):
    """An expression, its value, and how it is worked out: "(3+5)*8", 64, "3+5=8,8*8=64"."""
    text: str
    value: int
    work: str


def draw_try(rng: np.random.Generator, numbers: tuple[int, ...]) -> Try:
    """Two or more of the numbers, in any order, from the left; no value on the way is negative or a fraction."""
    first, *others = rng.permutation(numbers)[:rng.integers(2, len(numbers) + 1)].tolist()
    text, value, work = str(first), first, []
    for number in others:
        results = {"+": value + number, "*": value * number}
        if value >= number:
            results["-"] = value - number
        if value % number == 0:
            results["/"] = value // number
        operator = list(results)[rng.integers(len(results))]
        is_sum = any(sign in text for sign in "+-") and operator in "*/"
        work.append(f"{value}{operator}{number}={results[operator]}")
        text, value = f"{f'({text})' if is_sum else text}{operator}{number}", results[operator]
    return Try(text, value, ",".join(work))


def draw_countdown(rng: np.random.Generator, size: int) -> Problem:
    """"Reach 24 with 3 8 1.": the answer is an expression; the steps are the numbers, and a right try."""
    while True:
        numbers = tuple(rng.integers(1, COUNTDOWN_NUMBERS + 1, size).tolist())
        found = draw_try(rng, numbers)
        if 0 < found.value <= COUNTDOWN_TARGET and found.value not in numbers:
            return Problem(countdown_text(numbers, found.value), found.text, partial(check_countdown, numbers, found.value),
                           (numbers, found))


def try_until_right(n_tries: int, problem: Problem, rng: np.random.Generator) -> str:
    """Up to n_tries - 1 tries that fail, and the right one, as in a search that is told in words: Gandhi et al. 2024,
    arXiv:2404.03683."""
    numbers, right = problem.steps
    wrong = (draw_try(rng, numbers) for _ in range(rng.integers(n_tries)))
    return ";".join([*(one.work for one in wrong if one.value != right.value), right.work])


TRY_LEVELS = (*(Level(f"tries {n}", lambda size, n=n: n * MAX_TRY, partial(try_until_right, n)) for n in TRIES), SAY_NOTHING)


# -- all tasks --------------------------------------------------------------------------------------------------------

def up_to(size: int) -> range:
    return range(2, size + 1)


TASKS = {"permutations": ThinkingTask(draw_permutations, step_levels(3), 32, len(LABELS), up_to, "permutations"),
         "addition": ThinkingTask(draw_addition, step_levels(2), 12, len(LABELS) - 1, up_to, "digits"),
         "multiplication": ThinkingTask(draw_multiplication, step_levels(2), 12, len(LABELS) - 1, up_to, "digits"),
         "countdown": ThinkingTask(draw_countdown, TRY_LEVELS, 4, 8, lambda size: range(min(3, size), size + 1), "numbers",
                                   has_verifier=True)}


def draw_examples(task: ThinkingTask, rng: np.random.Generator, thought_rng: np.random.Generator, n: int, size: int,
                  levels: Sequence[Level]) -> Iterator[tuple[Problem, Level, str]]:
    """`n` problems to train on of random sizes, each with one of these levels and a thought of it. The problems follow from
    `rng` alone, whatever the levels are."""
    sizes = task.sizes(size)
    while n:
        problem = task.draw(rng, sizes[rng.integers(len(sizes))])
        if is_held_out(problem.text):
            continue
        level = levels[thought_rng.integers(len(levels))]
        yield problem, level, level.think(problem, thought_rng)
        n -= 1
