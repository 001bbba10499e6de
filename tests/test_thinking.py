"""tasks/thinking.py: problems and their steps, against independent solutions."""
import itertools
import re

import numpy as np
import pytest

from tasks.builtin_questions import is_held_out
from tasks.checkable import THOUGHT_END, check_countdown, evaluate_expression, final_answer
from tasks.thinking import AT_ONCE, LABELS, STRIDES, TASKS, draw_examples, draw_try, messages

RNG = np.random.default_rng


def draw(name: str, size: int, n: int = 40):
    rng = RNG(1)
    return [TASKS[name].draw(rng, size) for _ in range(n)]


# -- steps and answers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [2, 5, 13])
def test_permutations_compose_as_functions_do(size):
    """Each digit is a permutation of three things in the order of their names; the last one is what all do together."""
    functions = dict(zip("012345", itertools.permutations(range(3))))
    for problem in draw("permutations", size):
        places, labels = [0, 1, 2], []
        for (label, digit), step in zip(pairs(problem.text), problem.steps, strict=True):
            places = [functions[digit][place] for place in places]
            assert step[:2] == label + digit and functions[step[2]] == tuple(places)
            labels.append(label)
        assert problem.answer == problem.steps[-1][2] and "".join(labels) in LABELS and len(labels) == size


def pairs(text: str) -> list[str]:
    """"A0B1" -> ["A0", "B1"]."""
    return [text[i:i + 2] for i in range(0, len(text), 2)]


def number(text: str) -> int:
    """"A0B1" -> 1."""
    return int(text[1::2])


@pytest.mark.parametrize("name, sign", [("addition", "+"), ("multiplication", "*")])
@pytest.mark.parametrize("size", [1, 3, 12])
def test_sums_and_products_are_right_and_carries_are_those_of_school(name, sign, size):
    for problem in draw(name, size):
        left, right = problem.text.split(sign)
        a, b = number(left), number(right) if sign == "+" else int(right)
        labels = problem.answer[::2]
        assert labels in LABELS and labels[1:] == left[::2] and len(labels) == size + 1
        assert number(problem.answer) == (a + b if sign == "+" else a * b)
        for i, step in enumerate(problem.steps, 1):  # what the last i digits put over to the others
            low = 10 ** i
            total = a % low + b % low if sign == "+" else a % low * b
            assert step == f"{labels[-i]}{total // low}"
        assert problem.steps[-1][1] == problem.answer[1]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_countdown_can_be_reached_and_tries_are_worked_out_right(size):
    for problem in draw("countdown", size):
        target, *numbers = map(int, re.findall("[0-9]+", problem.text))
        assert len(numbers) == size and check_countdown(tuple(numbers), target, problem.answer) == 1
        assert target not in numbers
    rng = RNG(2)
    for _ in range(200):
        found = draw_try(rng, (3, 12, 6, 7))
        value, used = evaluate_expression(found.text)
        assert value == found.value >= 0 and len(used) == len(found.work.split(",")) + 1
        for line in found.work.split(","):
            left, right = line.split("=")
            assert evaluate_expression(left)[0] == int(right)
        assert int(found.work.split("=")[-1]) == found.value


# -- thoughts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TASKS)
def test_every_thought_with_its_answer_is_right_and_another_answer_is_wrong(name):
    task, rng = TASKS[name], RNG(3)
    for problem, _, thought in draw_examples(task, rng, RNG(4), 60, task.size, task.levels):
        assert problem.check(f"{thought}{THOUGHT_END}{problem.answer}") == 1 == problem.check(problem.answer)
        assert problem.check(f"{thought}{THOUGHT_END}x") == 0 == problem.check(thought + THOUGHT_END)
        assert THOUGHT_END not in thought + problem.answer + problem.text and not is_held_out(problem.text)


@pytest.mark.parametrize("name", TASKS)
def test_problems_do_not_depend_on_the_levels(name):
    """So that an arm that only ever answers at once learns the same ones."""
    task = TASKS[name]
    a, b = ([problem.text for problem, *_ in draw_examples(task, RNG(3), RNG(4), 20, task.size, levels)]
            for levels in (task.levels, task.levels[-1:]))
    assert a == b


@pytest.mark.parametrize("name", ["permutations", "addition", "multiplication"])
@pytest.mark.parametrize("size", [2, 7, 32])
def test_a_thought_says_every_so_manieth_step_and_never_the_last(name, size):
    task = TASKS[name]
    for problem in draw(name, size, 5):
        for level, stride in zip(task.levels, STRIDES):
            thought = level.think(problem, None)
            assert thought == "".join(problem.steps[i] for i in range(size - 1) if (i + 1) % stride == 0)
            assert len(thought) == level.n_tokens(size)
        assert task.levels[-1].think(problem, None) == "" and task.levels[-1].name == AT_ONCE


def test_tries_of_countdown_end_with_the_right_one():
    task, rng = TASKS["countdown"], RNG(4)
    for problem in draw("countdown", 4, 20):
        for level in task.levels[:-1]:
            *wrong, right = level.think(problem, rng).split(";")
            assert len(wrong) < int(level.name.split()[1])
            assert right == problem.steps[1].work and not any(one.endswith(f"={problem.steps[1].value}") for one in wrong)


@pytest.mark.parametrize("name", TASKS)
def test_the_level_within_a_budget_is_the_one_that_thinks_most(name):
    task = TASKS[name]
    sizes = [level.n_tokens(task.size) for level in task.levels]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 0
    for n in sizes:
        assert task.level_within(n, task.size).n_tokens(task.size) == n
    assert task.level_within(sizes[0] - 1, task.size) is not task.levels[0]
    assert task.level_within(10 ** 6, task.size) is task.levels[0]


def test_the_level_stands_in_the_system_message():
    problem, = draw("addition", 3, 1)
    assert messages(problem, TASKS["addition"].levels[1]) == [
        {"role": "system", "content": "every 2"}, {"role": "user", "content": problem.text}]


@pytest.mark.parametrize("name", TASKS)
def test_held_out_problems_are_fixed_different_and_not_trained_on(name):
    task = TASKS[name]
    problems = task.make(30, task.size, seed=0)
    assert [problem.text for problem in problems] == [problem.text for problem in task.make(30, task.size, seed=0)]
    assert len({problem.text for problem in problems}) == 30 and all(is_held_out(problem.text) for problem in problems)


def test_labels_are_different_single_characters_and_none_has_another_meaning():
    assert len(set(LABELS)) == len(LABELS) >= 65 and not {*LABELS} & {*"0123456789+*=;#"}


def test_a_task_without_enough_problems_gives_those_it_has():
    problems = TASKS["countdown"].make(300, 2, seed=0)
    assert 0 < len(problems) < 300


@pytest.mark.parametrize("text, answer", [("1+2=3;4#4", "4"), ("5", "5"), ("a#b#c", "c"), ("#", "")])
def test_the_answer_is_what_follows_the_thought(text, answer):
    assert final_answer(text) == answer
