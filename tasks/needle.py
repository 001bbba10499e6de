"""A needle in a haystack: a fact is put into real text, and asked for at its end. Scored by `evaluate.py --task=needle`.

    haystack = Haystack(np.array(tokenizer.encode(text)), tokenizer.encode, tokenizer.separator_id)
    prompt = haystack.prompt(make_needles(1, n_choices=4, seed=0)[0], length=256, depth=0.5)

The question is the beginning of the fact, which has to be continued: so it can be asked of models that have only been
trained on text. Which of the choices is right is drawn last and whatever the text is, so that a model that does not use the
fact picks it once in `n_choices` questions. Sources: Kamradt 2023, https://github.com/gkamradt/LLMTest_NeedleInAHaystack,
for lengths and depths; Hsieh et al. 2024, arXiv:2404.06654, for names with numbers.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime.config import BadInput, check_flags, flag

NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jacob", "Karen", "Louis", "Maria",
         "Nina", "Oscar", "Paul", "Rosa", "Simon", "Tina", "Victor")
LENGTHS = 8, 4, 2, 1  # parts of the model's context, unless --needle_lengths is given


@dataclass(frozen=True)
class NeedleConfig:
    """Needles in a haystack."""
    needle_lengths: tuple[int, ...] = flag(None, "for needle, tokens of the text with question and answer, with spaces "
                                                 "between (default: an eighth, a quarter, half and all of the "
                                                 "model's context, where they leave room for text)",
                                           at_least=1, at_most=100_000_000)
    needle_depths: tuple[float, ...] = flag((0.0, 0.25, 0.5, 0.75, 1.0),
                                            "for needle, the parts of the text that precede the fact, with spaces between",
                                            at_least=0, at_most=1)
    needle_choices: int = flag(4, "for needle, the answers among which the model chooses, of which one is right", at_least=2,
                               at_most=100)
    needle_seed: int = flag(0, "for needle, seed of the facts, and of the places in the text where haystacks begin",
                            at_least=0, at_most=2**63 - 1)
    __post_init__ = check_flags


@dataclass(frozen=True)
class Needle:
    """What is asked about `name`. label: the index of the right one of `choices`. start: where in all text the haystack
    begins, from 0 to 1."""
    name: str
    choices: tuple[str, ...]
    label: int
    start: float

    @property
    def question(self) -> str:
        return f"The secret number of {self.name} is"

    @property
    def answer(self) -> str:
        return self.choices[self.label]


def make_needles(n: int, n_choices: int, seed: int) -> list[Needle]:
    """Number i is the same whatever `n` is. Choices are different numbers of five digits."""
    needles = []
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        name, start = NAMES[rng.integers(len(NAMES))], rng.random()
        choices = 10_000 + rng.choice(90_000, n_choices, replace=False)
        needles.append(Needle(name, tuple(map(str, choices.tolist())), int(rng.integers(n_choices)), start))
    return needles


@dataclass(frozen=True)
class Haystack:
    """Text, (n,) token ids, in which facts are hidden."""
    ids: np.ndarray
    encode: Callable[[str], list[int]]
    separator_id: int

    def choices(self, needle: Needle) -> list[list[int]]:
        """The ids of each answer behind the question."""
        n_question = len(self.encode(needle.question))
        # encoded as one text, then split: a token may span the boundary
        return [self.encode(f"{needle.question} {choice}")[n_question:] for choice in needle.choices]

    def parts(self, needle: Needle) -> tuple[list[int], list[int], list[int]]:
        """Fact, question, and what ends a paragraph."""
        return (self.encode(f"{needle.question} {needle.answer}.\n\n"), self.encode(needle.question), self.encode("\n\n"))

    def n_around(self, needle: Needle) -> int:
        """Tokens of a prompt and the longest answer without the passage."""
        fact, question, end = self.parts(needle)
        return 1 + len(fact) + len(question) + 2 * len(end) + max(map(len, self.choices(needle)))

    def prompt(self, needle: Needle, length: int, depth: float | None) -> list[int]:
        """Ids of a document: a passage of the text with the fact behind `depth` of it, and the question at its end; with the
        longest answer `length` tokens, or a paragraph's end fewer. Each part is a paragraph. depth None: the same without
        the fact. Raises BadInput where no passage fits, or the text is too short."""
        fact, question, end = self.parts(needle)
        n = length - self.n_around(needle)
        if n < 1:
            raise BadInput(f"--needle_lengths={length}: fact, question and answer leave no room for text: give at least "
                           f"{length + 1 - n}")
        if n > len(self.ids):
            raise BadInput(f"--needle_lengths={length}: the text has {len(self.ids):,} tokens, {n:,} are needed: give more "
                           f"text, or smaller lengths")
        start = int(needle.start * (len(self.ids) - n + 1))
        passage = self.ids[start:start + n].tolist()
        if depth is None:
            return [self.separator_id, *passage, *end, *question]
        before, after = passage[:round(depth * n)], passage[round(depth * n):]
        return [self.separator_id, *before, *end * bool(before), *fact, *after, *end * bool(after), *question]


def default_lengths(haystack: Haystack, needles: list[Needle], block_size: int) -> list[int]:
    """Those LENGTHS of a context that leave room for text. Raises BadInput where none does."""
    shortest = max(map(haystack.n_around, needles)) + 1
    lengths = sorted({block_size // part for part in LENGTHS if block_size // part >= shortest})
    if not lengths:
        raise BadInput(f"--task=needle: fact, question, answer and text take {shortest} tokens or more, the model's context "
                       f"holds {block_size}: give a model with a longer one")
    return lengths
