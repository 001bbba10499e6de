"""Questions whose answers a program can check: built-in ones, Countdown, arithmetic that a model proposes, rows of a file.

    for question in ANSWER_TASKS["countdown"].make(4, seed=0, held_out=True, exact_match=exact_match):
        print(question.text, question.check("3 * 8"))       1.0 where the answer is right, else 0.0

No answer is evaluated as code, and none makes a check fail: what is malformed is wrong. A task is a line in ANSWER_TASKS.
"""
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np

from runtime.config import BadInput
from tasks.builtin_questions import MAKERS, is_held_out, make_questions
from tasks.chat_rows import UnknownForm, parse_row
from tasks.conversations import Conversation, ConversationConfig, ReadReport, group_name, hold_out, opening_digest
from tasks.rows import read_dataset
from text.folders import ROW_FORMATS, file_format, local_path
from text.messages import check_messages, has_loss

THOUGHT_END = "#"                             # between what a model says to itself and its answer
COUNTDOWN_NUMBERS, COUNTDOWN_TARGET = 12, 99  # the largest of each
MAX_EXPRESSION = 64                           # characters of an answer to Countdown
PROPOSE = "Ask a question about numbers."     # what a model is told that proposes arithmetic
MAX_COUNT = 9                                 # steps that a proposed question may have counted
FILE_ADVICE = ('give rows with a question and its answer, such as {"question": "2 + 2?", "answer": "4"}, or messages that '
               "end with the assistant's")


def final_answer(text: str) -> str:
    """What follows the thought, where there is one."""
    return text.rpartition(THOUGHT_END)[2]


@dataclass(frozen=True)
class CheckableQuestion:
    """check(answer) -> 1.0 or 0.0. kind, task: as of a Conversation. answer: a right one, "" where none is known. context:
    the messages before the question."""
    text: str
    kind: str
    task: str
    check: Callable[[str], float]
    answer: str = ""
    context: tuple[dict, ...] = ()

    def messages(self) -> list[dict]:
        """The conversation up to the answer."""
        return [*self.context, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class AnswerTask:
    """make(n, seed, held_out, exact_match) -> at most `n` different CheckableQuestions, where exact_match(output, answer)
    judges those with one right answer. demonstrate(n, seed) -> `n` Conversations that show the form of an answer to a model
    that has not seen the task; None where one that is finetuned on the built-in questions knows it. proposes: whether the
    model makes the questions that it learns from."""
    make: Callable[..., Iterator[CheckableQuestion]]
    demonstrate: Callable[[int, int], Iterator[Conversation]] | None = None
    proposes: bool = False


def matching_question(text: str, answer: str, kind: str, task: str, exact_match: Callable[[str, str], bool],
                      context: tuple[dict, ...] = ()) -> CheckableQuestion:
    """A question with one right answer."""
    def check(output: str) -> float:
        return float(exact_match(output, answer) or exact_match(final_answer(output), answer))
    return CheckableQuestion(text, kind, task, check, answer, context)


def make_builtin(n: int, seed: int, held_out: bool, exact_match: Callable,
                 kinds: Collection[str] | None = None) -> Iterator[CheckableQuestion]:
    """The questions that finetune.py trains on and validates with, or some kinds of them."""
    for question in make_questions(n, seed, held_out, kinds):
        yield matching_question(question.text, question.answer, question.kind, question.task, exact_match)


# -- Countdown --------------------------------------------------------------------------------------------------------

def make_countdown(n: int, seed: int, held_out: bool, exact_match: Callable | None = None) -> Iterator[CheckableQuestion]:
    """"Reach 24 with 3 8 1.": 2 to 4 numbers, and a target that some of them reach by + - * and exact /."""
    for numbers, target, _ in draw_countdowns(n, seed, held_out):
        yield CheckableQuestion(countdown_text(numbers, target), "countdown", f"{len(numbers)} numbers",
                                partial(check_countdown, numbers, target))


def demonstrate_countdown(n: int, seed: int) -> Iterator[Conversation]:
    for numbers, target, solution in draw_countdowns(n, seed, held_out=False):
        yield conversation(countdown_text(numbers, target), solution)


def countdown_text(numbers: tuple[int, ...], target: int) -> str:
    return f"Reach {target} with {' '.join(map(str, numbers))}."


def countdown_check(question: str) -> Callable[[str], float] | None:
    """The check of an answer to a question of `countdown_text`; None for other texts."""
    found = re.fullmatch(r"Reach ([0-9]{1,9}) with ([0-9]{1,9}(?: [0-9]{1,9})*)\.", question.strip())
    return found and partial(check_countdown, tuple(map(int, found[2].split())), int(found[1]))


def draw_countdowns(n: int, seed: int, held_out: bool) -> Iterator[tuple[tuple[int, ...], int, str]]:
    """(numbers, target, a solution) of `n` different questions; those of the same numbers in another order are in the same
    part."""
    rng, seen = np.random.default_rng([seed, held_out]), set()
    while len(seen) < n:
        numbers = tuple(rng.integers(1, COUNTDOWN_NUMBERS + 1, rng.integers(2, 5)).tolist())
        value, solution = draw_expression(rng, numbers)
        if value.denominator > 1 or not 0 < value <= COUNTDOWN_TARGET or value in numbers:
            continue
        target = int(value)
        text = countdown_text(numbers, target)
        if text not in seen and is_held_out(countdown_text(tuple(sorted(numbers)), target)) == held_out:
            seen.add(text)
            yield numbers, target, solution


def draw_expression(rng: np.random.Generator, numbers: tuple[int, ...]) -> tuple[Fraction, str]:
    """A random expression of two or more of the numbers, each used once: its value and its text."""
    parts = [(Fraction(number), str(number)) for number in rng.permutation(numbers)[:rng.integers(2, len(numbers) + 1)]]
    while len(parts) > 1:
        (a, left), (b, right) = parts.pop(), parts.pop()
        operator = "+-*/"[rng.integers(4 if b and a % b == 0 else 3)]
        text = f"{left} {operator} {right}"
        value = a / b if operator == "/" else {"+": a + b, "-": a - b, "*": a * b}[operator]
        parts.append((value, f"({text})" if parts else text))
    return parts[0]


def check_countdown(numbers: tuple[int, ...], target: int, answer: str) -> float:
    """1.0 where the answer is an expression of the target in which each number occurs at most as often as in `numbers`."""
    try:
        value, used = evaluate_expression(final_answer(answer))
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(value == target and Counter(used) <= Counter(numbers))


def evaluate_expression(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and the numbers in it. Raises ValueError, or ZeroDivisionError.

    sum: product, then any number of + product or - product. product: factor, then any number of * factor or / factor.
    factor: digits, or (sum). At most MAX_EXPRESSION characters, which bounds depth and size.
    """
    if len(text) > MAX_EXPRESSION:
        raise ValueError("too long")
    parser = ExpressionParser(re.findall(r"[0-9]+|\S", text))
    value = parser.read_sum()
    if parser.tokens:
        raise ValueError(f"{parser.tokens[-1]!r} is left over")
    return value, parser.numbers


class ExpressionParser:
    """Recursive descent, a method for each rule. tokens: what is still to be read, in reverse. numbers: those read."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.numbers = tokens[::-1], []

    def accept(self, choices: str) -> str:
        """The next token, taken, if it is one of these characters; else ""."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in choices else ""

    def read_sum(self) -> Fraction:
        value = self.read_product()
        while operator := self.accept("+-"):
            other = self.read_product()
            value = value + other if operator == "+" else value - other
        return value

    def read_product(self) -> Fraction:
        value = self.read_factor()
        while operator := self.accept("*/"):
            other = self.read_factor()
            value = value * other if operator == "*" else value / other
        return value

    def read_factor(self) -> Fraction:
        if self.accept("("):
            value = self.read_sum()
            if not self.accept(")"):
                raise ValueError("a parenthesis is not closed")
            return value
        if not self.tokens or not re.fullmatch("[0-9]+", self.tokens[-1]):
            raise ValueError("a number is missing")
        self.numbers.append(int(self.tokens.pop()))
        return Fraction(self.numbers[-1])


# -- arithmetic that a model proposes ---------------------------------------------------------------------------------

def make_arithmetic(n: int, seed: int, held_out: bool, exact_match: Callable) -> Iterator[CheckableQuestion]:
    """Those of the built-in questions that are about numbers."""
    n_all = n * sum(map(len, MAKERS.values())) // len(MAKERS["arithmetic"])
    return make_builtin(n_all, seed, held_out, exact_match, {"arithmetic"})


def demonstrate_proposals(n: int, seed: int) -> Iterator[Conversation]:
    """The makers' own questions as what a model says to PROPOSE, and as questions with their answers, in turn."""
    for i, question in enumerate(make_arithmetic(n, seed, False, str.__eq__)):
        yield conversation(question.text, question.answer) if i % 2 else conversation(PROPOSE, question.text)


def solve_arithmetic(text: str) -> str | None:
    """The answer to a question in one of the forms of MAKERS["arithmetic"], None for any other text.

    Numbers have one or two digits. Up to five are added and subtracted, where the answer must not be negative; or two
    different ones are compared; or counted between, at most MAX_COUNT steps.
    """
    number = "(0|[1-9][0-9]?)"
    if found := re.fullmatch(f"What is {number}((?: (?:plus|minus) {number}){{1,4}})\\?", text):
        terms = re.findall("(plus|minus) ([0-9]+)", found[2])
        total = int(found[1]) + sum(int(term) if word == "plus" else -int(term) for word, term in terms)
        return str(total) if total >= 0 else None
    if found := re.fullmatch(f"Which is larger, {number} or {number}\\?", text):
        a, b = map(int, found.groups())
        return str(max(a, b)) if a != b else None
    if found := re.fullmatch(f"Count from {number} to {number}\\.", text):
        a, b = map(int, found.groups())
        return " ".join(map(str, range(a, b + 1))) if 0 < b - a <= MAX_COUNT else None
    return None


def check_proposal(text: str, exact_match: Callable) -> CheckableQuestion | None:
    """The question that a model has proposed; None where it is not one, or one that is held out."""
    text = text.strip()
    answer = solve_arithmetic(text)
    if answer is None or is_held_out(text):
        return None
    return matching_question(text, answer, "arithmetic", "proposed", exact_match)


def conversation(question: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "a demonstration")


# -- questions of a file ----------------------------------------------------------------------------------------------

def read_checkable(path: str, roles: Collection[str], n_held_out: int,
                   exact_match: Callable) -> tuple[list[CheckableQuestion], list[CheckableQuestion]]:
    """The last question of each row of a local file, in any form that chat_rows.py reads: those to train on, and as in
    tasks.conversations.hold_out at most `n_held_out` held out. Raises BadInput, which names the file or --task."""
    conversations = list(read_answered(path, roles))
    if len({opening_digest(one) for one in conversations}) < 2:
        found = "all its rows ask the same" if conversations else "holds no rows"
        raise BadInput(f"--task={path}: {found}, so none can be held out: {FILE_ADVICE}")
    config = ConversationConfig(path, val_conversations=n_held_out)
    return tuple([last_question(one, exact_match) for one in part]
                 for part in hold_out(conversations, config, ReadReport()))


def read_answered(path: str, roles: Collection[str]) -> Iterator[Conversation]:
    """The conversations of a file, each with an answer. Raises BadInput."""
    file = local_path(path)
    if file is None or not file.is_file() or file_format(path) not in ROW_FORMATS:
        found = "there is no such file" if file is None else "is no file of rows"
        raise BadInput(f"--task={path}: {found}: choose one of {', '.join(ANSWER_TASKS)}, or give a file of questions with "
                       f"answers ({', '.join(ROW_FORMATS)})")
    for where, row in read_dataset(path, None, "train"):
        try:
            messages, _ = parse_row(row)
            check_messages(messages, roles)
        except UnknownForm:
            raise BadInput(f"{where}: has no question with an answer, its columns are {', '.join(map(str, row))[:200]}: "
                           f"{FILE_ADVICE}") from None
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
        answers = [i for i, message in enumerate(messages) if i and has_loss(message) and message["content"].strip()]
        if not answers or messages[answers[-1] - 1]["role"] != "user":
            raise BadInput(f"{where}: its question has no answer: {FILE_ADVICE}")
        task = group_name(row.get("task") or row.get("category"))
        yield Conversation(messages[:answers[-1] + 1], where, group_name(row.get("kind")) or task, task)


def last_question(one: Conversation, exact_match: Callable) -> CheckableQuestion:
    *context, question, answer = one.messages
    return matching_question(question["content"], answer["content"], one.kind, one.task, exact_match, tuple(context))


ANSWER_TASKS = {"builtin": AnswerTask(make_builtin), "countdown": AnswerTask(make_countdown, demonstrate_countdown),
                "arithmetic": AnswerTask(make_arithmetic, demonstrate_proposals, proposes=True)}
