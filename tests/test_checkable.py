"""Questions that a program checks: the grammars, what they refuse, held-out parts, and rows of a file."""
import ast
import itertools
import operator
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_conversations import write_jsonl

from evaluate import exact_match
from runtime.config import BadInput
from tasks.builtin_questions import MAKERS, is_held_out, make_questions
from tasks.checkable import (
    ANSWER_TASKS,
    COUNTDOWN_TARGET,
    PROPOSE,
    check_countdown,
    check_proposal,
    demonstrate_countdown,
    demonstrate_proposals,
    draw_countdowns,
    evaluate_expression,
    make_arithmetic,
    make_countdown,
    read_checkable,
    solve_arithmetic,
)
from tokenizer import ROLES

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate_tree(node: ast.AST) -> Fraction:
    """The oracle: Python's own parser, on a list of what is allowed. Raises ValueError for everything else."""
    if isinstance(node, ast.Expression):
        return evaluate_tree(node.body)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](evaluate_tree(node.left), evaluate_tree(node.right))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    raise ValueError(ast.dump(node))


def value_by_grammar(text: str) -> Fraction | None:
    try:
        return evaluate_expression(text)[0]
    except (ValueError, ZeroDivisionError):
        return None


def value_by_python(text: str) -> Fraction | None:
    try:
        return evaluate_tree(ast.parse(text.strip(), mode="eval"))
    except (ValueError, SyntaxError, ZeroDivisionError):
        return None


# -- Countdown --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, is_right", [
    ("3 * 8", True), ("8*3", True), ("(3 * 8) * 1", True), ("((8))/1*3", True), (" 8 * 3\n", True), ("8 * (3 / 1)", True),
    ("3 * 8 = 24", False), ("24", False), ("8 + 8 + 8", False), ("3 * 8 * 1 * 1", False), ("3 * 8 + 1", False),
    ("", False), ("3 *", False), ("* 3 8", False), ("3 8", False), ("(3 * 8", False), ("3 * 8)", False), ("()", False),
    ("3 x 8", False), ("3 ** 8", False), ("-3 * -8", False), ("3 // 8", False), ("8 / (3 - 3)", False), ("3.0 * 8", False),
    ("٣ * ٨", False), ("3 * ⁸", False), ("__import__('os')", False), ("3 * 8" + " " * 99, False), ("(" * 99, False)])
def test_countdown_by_hand(answer, is_right):
    """Reach 24 with 3 8 1."""
    assert check_countdown((3, 8, 1), 24, answer) == float(is_right)


def test_a_number_that_is_given_twice_may_be_used_twice():
    assert check_countdown((5, 5, 1), 25, "5 * 5") == 1.0
    assert check_countdown((5, 1), 25, "5 * 5") == 0.0


def test_division_is_exact():
    """8 / (3 - 8 / 3) = 24, which in floating-point numbers it is not."""
    assert check_countdown((8, 3, 8, 3), 24, "8 / (3 - 8 / 3)") == 1.0
    assert 8 / (3 - 8 / 3) != 24
    assert check_countdown((7, 2), 3, "7 / 2") == 0.0
    assert evaluate_expression("1 - 2 - 3 * 4 / 6 / 2") == (-2, [1, 2, 3, 4, 6, 2])


EXPRESSIONS = st.recursive(st.integers(0, 30).map(str), lambda part: st.tuples(
    part, st.sampled_from(["+", "-", "*", "/", " + ", " / "]), part, st.booleans()).map(
        lambda parts: f"({''.join(parts[:3])})" if parts[3] else "".join(parts[:3])), max_leaves=8)


@given(EXPRESSIONS.filter(lambda text: len(text) <= 64))
def test_values_are_those_of_python(text):
    assert value_by_grammar(text) == value_by_python(text)


@given(st.text("0123 +-*/()", max_size=14))
def test_the_grammar_takes_what_python_takes(text):
    """Except for signs before a number, leading zeros and tuples, where Python has more or less."""
    found, expected = value_by_grammar(text), value_by_python(text)
    assert found == expected or expected is None and any(
        part.startswith("0") and len(part) > 1 for part in text.replace("(", " ").replace(")", " ").replace("+", " ")
        .replace("-", " ").replace("*", " ").replace("/", " ").split())


@given(st.one_of(st.text(max_size=80), st.text("0123456789+-*/() ", max_size=80)))
def test_no_answer_makes_a_check_fail(answer):
    assert check_countdown((3, 8, 1), 24, answer) in (0.0, 1.0)
    assert solve_arithmetic(answer) is None or answer.isascii()


@pytest.mark.parametrize("held_out", [False, True])
def test_countdowns_can_be_reached_and_are_in_their_part(held_out):
    found = list(draw_countdowns(300, 1, held_out))
    questions = list(make_countdown(300, 1, held_out))
    assert len({question.text for question in questions}) == 300
    for (numbers, target, solution), question in zip(found, questions):
        assert question.text == f"Reach {target} with {' '.join(map(str, numbers))}."
        assert question.check(solution) == 1.0 and value_by_python(solution) == target
        assert 0 < target <= COUNTDOWN_TARGET and target not in numbers and question.check(str(target)) == 0.0
        assert question.task == f"{len(numbers)} numbers"
    assert {len(numbers) for numbers, *_ in found} == {2, 3, 4}
    assert {part for *_, solution in found for part in solution} >= set("+-*/()")


def test_the_same_numbers_in_another_order_are_in_the_same_part():
    parts = [{(tuple(sorted(numbers)), target) for numbers, target, _ in draw_countdowns(2000, 0, held_out)}
             for held_out in (False, True)]
    assert not parts[0] & parts[1]


def test_questions_depend_on_nothing_but_the_seed():
    for name, task in ANSWER_TASKS.items():
        if name != "builtin":
            first, again, other = ([question.text for question in task.make(50, seed, False, exact_match)]
                                   for seed in (0, 0, 1))
            assert first == again != other and len(set(first)) == 50


def test_demonstrations_of_countdown_are_right():
    for one in demonstrate_countdown(50, 3):
        question, answer = (message["content"] for message in one.messages)
        target, *numbers = map(int, question.removeprefix("Reach ").replace("with ", "").rstrip(".").split())
        assert check_countdown(tuple(numbers), target, answer) == 1.0


# -- proposed arithmetic ----------------------------------------------------------------------------------------------

def test_the_grammar_knows_every_question_of_the_makers():
    found = list(make_arithmetic(2000, 0, False, exact_match))
    assert {question.task for question in found} == set(MAKERS["arithmetic"])
    for question in found:
        assert solve_arithmetic(question.text) == question.answer
        assert question.check(question.answer) == 1.0 and question.check(question.answer + "1") == 0.0


@pytest.mark.parametrize("text, answer", [
    ("What is 3 plus 4?", "7"), ("What is 30 minus 4 plus 99?", "125"), ("What is 3 minus 4?", None),
    ("What is 3?", None), ("What is 3 plus 100?", None), ("What is 03 plus 1?", None), ("What is 3 plus 4", None),
    ("What is 1 plus 1 plus 1 plus 1 plus 1?", "5"), ("What is 1 plus 1 plus 1 plus 1 plus 1 plus 1?", None),
    ("What is 3  plus 4?", None), ("What is 3 times 4?", None), ("What is ٣ plus 4?", None),
    ("Which is larger, 9 or 10?", "10"), ("Which is larger, 9 or 9?", None), ("Count from 8 to 11.", "8 9 10 11"),
    ("Count from 8 to 8.", None), ("Count from 8 to 7.", None), ("Count from 0 to 9.", "0 1 2 3 4 5 6 7 8 9"),
    ("Count from 0 to 10.", None), ("What is 3 plus 4?\n", None), ("", None), ("Write backwards: sea sun", None)])
def test_proposals_by_hand(text, answer):
    assert solve_arithmetic(text) == answer


@given(st.lists(st.integers(0, 99), min_size=2, max_size=5), st.lists(st.booleans(), min_size=4, max_size=4))
def test_sums_and_differences_are_those_of_python(numbers, signs):
    words = [str(numbers[0]), *(f"{'plus' if sign else 'minus'} {number}" for sign, number in zip(signs, numbers[1:]))]
    text = " ".join(words)
    expected = value_by_python(text.replace("plus", "+").replace("minus", "-"))
    assert solve_arithmetic(f"What is {text}?") == (str(expected) if expected >= 0 else None)


def test_a_held_out_question_cannot_be_proposed():
    texts = [f"Which is larger, {a} or {b}?" for a, b in itertools.permutations(range(40), 2)]
    accepted = Counter((check_proposal(text, exact_match) is not None, is_held_out(text)) for text in texts)
    assert set(accepted) == {(True, False), (False, True)}
    held_out = make_arithmetic(60, 0, True, exact_match)
    assert all(check_proposal(question.text, exact_match) is None for question in held_out)


def test_demonstrations_are_proposals_and_answers_in_turn():
    messages = [[message["content"] for message in one.messages] for one in demonstrate_proposals(80, 0)]
    assert all(prompt == PROPOSE and check_proposal(text, exact_match) for prompt, text in messages[::2])
    assert all(solve_arithmetic(question) == answer for question, answer in messages[1::2])
    assert len(messages) == 80 and len({text for _, text in messages[::2]}) == 40


# -- built-in questions, and those of a file --------------------------------------------------------------------------

def test_builtin_questions_are_those_of_finetune(monkeypatch):
    monkeypatch.setattr("tasks.builtin_questions.passages", lambda: [[["one", "two", "three", "four", "five"]]] * 2)
    found = list(ANSWER_TASKS["builtin"].make(36, 0, True, exact_match))
    expected = list(make_questions(36, 0, held_out=True))
    assert [(one.text, one.answer, one.kind, one.task) for one in found] == \
        [(one.text, one.answer, one.kind, one.task) for one in expected]
    assert found[0].messages() == expected[0].messages()[:1]
    assert all(one.check(f" {one.answer} ") == 1.0 and one.check(f"{one.answer} x") == 0.0 for one in found)


ROWS = [{"question": f"{i} or {i + 1}?", "answer": "yes" if i % 2 else "no", "task": "t"} for i in range(60)]


def test_rows_of_a_file_are_split_whatever_their_order(tmp_path):
    train, held_out = read_checkable(str(write_jsonl(tmp_path / "a.jsonl", ROWS)), ROLES, 240, exact_match)
    assert (len(train), len(held_out)) == (54, 6) and not {one.text for one in train} & {one.text for one in held_out}
    mixed = [ROWS[i] for i in np.random.default_rng(0).permutation(60)]
    _, again = read_checkable(str(write_jsonl(tmp_path / "b.jsonl", mixed)), ROLES, 240, exact_match)
    assert {one.text for one in again} == {one.text for one in held_out}
    assert len(read_checkable(str(tmp_path / "a.jsonl"), ROLES, 2, exact_match)[1]) == 2
    one = train[0]
    assert (one.check(one.answer), one.check("maybe"), one.kind, one.task) == (1.0, 0.0, "t", "t")


def test_of_a_conversation_the_last_answer_is_asked_for(tmp_path):
    turns = lambda i: [{"role": "system", "content": "s"}, {"role": "user", "content": f"{i}?"},
                       {"role": "assistant", "content": "a"}, {"role": "user", "content": "and?"},
                       {"role": "assistant", "content": f"b{i}"}, {"role": "user", "content": "thanks"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns(i)} for i in range(20)])
    (one, *_), _ = read_checkable(str(path), ROLES, 1, exact_match)
    i = int(one.answer[1:])
    assert one.text == "and?" and one.messages() == turns(i)[:4] and one.check(f"b{i}") == 1.0


@pytest.mark.parametrize("rows, words", [
    ([{"question": "1?"}], ["line 1: has no question with an answer, its columns are question", '"answer": "4"']),
    ([ROWS[0], {"question": "1?", "answer": None}], ["line 2", "answer is null"]),
    ([ROWS[0], {"question": "1?", "answer": " "}], ["line 2", "no answer"]),
    ([{"messages": [{"role": "user", "content": "1?"}]}], ["line 1", "no answer"]),
    ([{"messages": [{"role": "assistant", "content": "1"}]}], ["line 1", "no answer"]),
    ([{"messages": [{"role": "robot", "content": "1"}]}], ["line 1", "robot"]),
    ([{"text": "once upon a time"}], ["line 1", "its columns are text"]),
    ([ROWS[0]] * 5, ["--task=", "ask the same", "none can be held out"]), ([], ["holds no"])], ids=str)
def test_files_without_answers_are_refused(tmp_path, rows, words):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadInput) as refused:
        read_checkable(str(path), ROLES, 240, exact_match)
    assert all(word in str(refused.value) for word in [*words, "rows.jsonl"]), refused.value


@pytest.mark.parametrize("name, words", [
    ("none.jsonl", "there is no such file"), ("countdwn", "there is no such file"), ("text.bin", "is no file of rows"),
    ("x" * 5000, "there is no such file"), (".", "is no file of rows")])
def test_what_is_no_task_and_no_file_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match=f"--task={name[:9]}.*{words}: choose one of builtin, countdown, arithmetic, or"):
        read_checkable(name, ROLES, 240, exact_match)
