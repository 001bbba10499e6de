"""Questions with one right answer, made from a seed without a network: arithmetic, strings, and look-ups in the built-in
text.

    for question in make_questions(240, seed=0, held_out=True):
        print(question.text, question.answer)

Whether a question is held out follows from a hash of its text, and for a question about a passage from a hash of the
document. So no seed puts the same question into both parts.
"""
import functools
import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from text.builtin import builtin_texts

HELD_OUT_RATIO = 8  # 1 question in 8 is held out
WORDS = re.findall(r"\w+", """
    apple bird black blue boat book bread child city cloud cold cow day dog door earth fire fish five food four garden girl
    gold grass green hand head hill horse house king lake leaf light man milk moon mother mountain music night one paper
    queen rain red river road rock rose sea ship silver sky snow song star stone story street summer sun table three tree
    two wall water white wind winter woman wood word world yellow""")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Question:
    """kind, task: keys of MAKERS."""
    kind: str
    task: str
    text: str
    answer: str

    def messages(self) -> list[dict]:
        return [{"role": "user", "content": self.text}, {"role": "assistant", "content": self.answer}]


def make_questions(n: int, seed: int, held_out: bool, kinds: Collection[str] | None = None) -> Iterator[Question]:
    """`n` different questions, spread evenly over the tasks; fewer where a task runs out of different ones. kinds: of these,
    only those."""
    tasks = [(kind, task, maker) for kind, makers in MAKERS.items() for task, maker in makers.items()]
    for i, (kind, task, maker) in enumerate(tasks):
        if kinds is not None and kind not in kinds:
            continue
        rng, seen, tries = np.random.default_rng([seed, i, held_out]), set(), 0
        wanted = n * (i + 1) // len(tasks) - n * i // len(tasks)
        texts = passages()[held_out] if maker.needs_passage else None
        while len(seen) < wanted and tries < 100 * wanted + 1000:
            tries += 1
            text, answer = maker.make(rng) if texts is None else maker.make(rng, texts[rng.integers(len(texts))])
            if text not in seen and (texts is not None or is_held_out(text) == held_out):
                seen.add(text)
                yield Question(kind, task, text, answer)


def is_held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_RATIO == 0


@functools.cache
def passages() -> dict[bool, list[list[str]]]:
    """Whether held out -> runs of 5 to 9 different lower-case words in the built-in documents of that part."""
    found = {False: [], True: []}
    for text in builtin_texts():
        own = found[is_held_out(text)]
        for run in re.findall(r"(?<![\w`'.-])[a-z]+(?: [a-z]+){4,8}(?![\w`'(])", text):
            words = run.split()
            if len(set(words)) == len(words):
                own.append(words)
    return found


# -- makers -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Maker:
    """make(rng) -> question, answer; with needs_passage make(rng, passage), where the passage is a list of words from the
    built-in text."""
    make: Callable
    needs_passage: bool = False


def draw(rng: np.random.Generator, items, low: int, high: int) -> list[str]:
    """`low` to `high` different items."""
    return [items[i] for i in rng.permutation(len(items))[:rng.integers(low, high + 1)]]


def make_sum(rng):
    numbers = rng.integers(0, 10, rng.integers(3, 5))
    return f"What is {' plus '.join(map(str, numbers))}?", f"{sum(numbers)}"


def make_difference(rng):
    a, b, c, d = rng.integers(0, 10, 4)
    return f"What is {a + b + c} minus {a} minus {b} plus {d}?", f"{c + d}"


def make_larger(rng):
    a, b = rng.permutation(100)[:2]
    return f"Which is larger, {a} or {b}?", f"{max(a, b)}"


def make_count(rng):
    a, n = rng.integers(0, 90), rng.integers(2, 7)
    return f"Count from {a} to {a + n}.", " ".join(str(i) for i in range(a, a + n + 1))


def make_backwards(rng):
    words = draw(rng, WORDS, 2, 5)
    return f"Write backwards: {' '.join(words)}", " ".join(reversed(words))


def make_last(rng):
    words = draw(rng, WORDS, 3, 6)
    return f"What is the last word of: {' '.join(words)}", words[-1]


def make_second(rng):
    words = draw(rng, WORDS, 3, 6)
    return f"What is the second word of: {' '.join(words)}", words[1]


def make_repeat(rng):
    words, n = draw(rng, WORDS, 1, 2), rng.integers(2, 5)
    times = {2: "twice", 3: "three times", 4: "four times"}[int(n)]
    return f"Say {' '.join(words)} {times}.", " ".join(words * n)


def make_sorted(rng):
    letters = draw(rng, LETTERS, 3, 5)
    return f"Put in order: {' '.join(letters)}", " ".join(sorted(letters))


def make_length(rng):
    words = draw(rng, WORDS, 1, 7)
    return f"How many words are there: {' '.join(words)}", str(len(words))


def make_after(rng, passage: list[str]):
    i = rng.integers(len(passage) - 1)
    return f"Which word comes after {passage[i]} in: {' '.join(passage)}", passage[i + 1]


def make_before(rng, passage: list[str]):
    i = rng.integers(1, len(passage))
    return f"Which word comes before {passage[i]} in: {' '.join(passage)}", passage[i - 1]


MAKERS: dict[str, dict[str, Maker]] = {  # kind -> task -> maker
    "arithmetic": {"sum": Maker(make_sum), "difference": Maker(make_difference), "larger": Maker(make_larger),
                   "count": Maker(make_count)},
    "strings": {"backwards": Maker(make_backwards), "last": Maker(make_last), "second": Maker(make_second),
                "repeat": Maker(make_repeat), "sorted": Maker(make_sorted), "length": Maker(make_length)},
    "look-ups": {"after": Maker(make_after, needs_passage=True), "before": Maker(make_before, needs_passage=True)},
}
