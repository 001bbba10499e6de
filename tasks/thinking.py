"""Questions that are hard to answer at once and easy in steps, with the steps: thoughts that a model can learn to say first.

    problem = TASKS["addition"].draw(rng, 12)
    thought = TASKS["addition"].levels[0].think(problem, rng)
    print(problem.text, thought + THOUGHT_END + problem.answer)      "04+57" "10#61"

Each task has levels, from thinking most to answering at once. The level is told in the system message, and an answer is the
thought, THOUGHT_END and what the question asks for. A task is a line in TASKS.
"""
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from tasks.builtin_questions import is_held_out
from tasks.checkable import COUNTDOWN_NUMBERS, COUNTDOWN_TARGET, THOUGHT_END, check_countdown, countdown_text

STRIDES = 1, 2, 4, 8          # steps of which one is said
TRIES = 16, 8, 4, 2, 1        # of Countdown, at most
AT_ONCE = "at once"
MAX_TRY = 16                  # characters of one on average, about: a budget of tokens allows so many fewer


class Problem(NamedTuple):
    """steps: what can be said on the way, a character each; of Countdown the numbers, and the target."""
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
    """draw(rng, size) -> a Problem. levels: from thinking most to answering at once. size: by default; sizes(size): those
    that are trained on. has_verifier: whether an answer can be checked without knowing the right one."""
    draw: Callable[[np.random.Generator, int], Problem]
    levels: tuple[Level, ...]
    size: int
    sizes: Callable[[int], range]
    unit: str
    has_verifier: bool = False

    def level_within(self, n_tokens: int, size: int) -> Level:
        """The one that thinks most among those of at most so many tokens."""
        return next(level for level in self.levels if level.n_tokens(size) <= n_tokens)

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
    return lambda output: float(output.rpartition(THOUGHT_END)[2].strip() == answer)


# -- a state that every step changes ----------------------------------------------------------------------------------

def said_steps(stride: int, problem: Problem, rng: np.random.Generator) -> str:
    """Every `stride`-th, but not the last one, which is in the answer."""
    return problem.steps[stride - 1:-1:stride]


def no_thought(problem: Problem, rng: np.random.Generator) -> str:
    return ""


SAY_NOTHING = Level(AT_ONCE, lambda size: 0, no_thought)
STEP_LEVELS = (*(Level(f"every {stride}", lambda size, stride=stride: (size - 1) // stride, partial(said_steps, stride))
                 for stride in STRIDES), SAY_NOTHING)
PERMUTATIONS = list(itertools.permutations(range(3)))
LETTERS = "abcdef"


def draw_permutations(rng: np.random.Generator, size: int) -> Problem:
    """"fbdc": permutations of three things, one after the other. The answer is what all do together."""
    drawn, state, steps = rng.integers(0, 6, size).tolist(), (0, 1, 2), ""
    for i in drawn:
        state = tuple(PERMUTATIONS[i][place] for place in state)
        steps += LETTERS[PERMUTATIONS.index(state)]
    return Problem("".join(LETTERS[i] for i in drawn), steps[-1], exact(steps[-1]), steps)


def draw_addition(rng: np.random.Generator, size: int) -> Problem:
    """"04+57": the steps are the carries, from the last digit on."""
    a, b = rng.integers(0, 10, (2, size))
    carries, carry = "", 0
    for i in reversed(range(size)):
        carry = (a[i] + b[i] + carry) // 10
        carries += str(carry)
    left, right = ("".join(map(str, digits)) for digits in (a, b))
    answer = f"{int(left) + int(right):0{size + 1}d}"
    return Problem(f"{left}+{right}", answer, exact(answer), carries)


def draw_multiplication(rng: np.random.Generator, size: int) -> Problem:
    """"047*6": by one digit; the steps are the carries, from the last digit on."""
    digits, factor = rng.integers(0, 10, size), int(rng.integers(2, 10))
    carries, carry = "", 0
    for digit in digits[::-1].tolist():
        carry = (digit * factor + carry) // 10
        carries += str(carry)
    number = "".join(map(str, digits))
    answer = f"{int(number) * factor:0{size + 1}d}"
    return Problem(f"{number}*{factor}", answer, exact(answer), carries)


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


TASKS = {"permutations": ThinkingTask(draw_permutations, STEP_LEVELS, 32, up_to, "permutations"),
         "addition": ThinkingTask(draw_addition, STEP_LEVELS, 12, up_to, "digits"),
         "multiplication": ThinkingTask(draw_multiplication, STEP_LEVELS, 12, up_to, "digits"),
         "countdown": ThinkingTask(draw_countdown, TRY_LEVELS, 4, lambda size: range(min(3, size), size + 1), "numbers",
                                   has_verifier=True)}


def draw_examples(task: ThinkingTask, rng: np.random.Generator, n: int, size: int,
                  n_levels: int) -> Iterator[tuple[Problem, Level, str]]:
    """`n` problems to train on of random sizes, each with one of the first levels and a thought of it."""
    sizes = task.sizes(size)
    while n:
        problem = task.draw(rng, sizes[rng.integers(len(sizes))])
        if is_held_out(problem.text):
            continue
        level = task.levels[rng.integers(n_levels)]
        yield problem, level, level.think(problem, rng)
        n -= 1
