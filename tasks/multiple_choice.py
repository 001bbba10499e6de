"""Multiple choice: a context, its possible endings, and which of them is right. Scored by `evaluate.py --task=choice`.

    parse_choice({"ctx": "Water is", "endings": ["wet", "dry"], "label": "0"}, "line 1")

| dataset | columns |
|---|---|
| HellaSwag | `ctx`, `endings`, `label` |
| ARC, OpenBookQA, CommonsenseQA | `question`, `choices`: {"text": [endings], "label": [names]}, `answerKey` |
| MMLU, MMLU-Pro, RACE, MedQA | `question`, `choices` or `options`: […] or {"A": ending, …}, `answer`: index or letter |
| PIQA, WinoGrande, COPA, SIQA, SWAG, CosmosQA, MedMCQA, SciQ | a column for each ending, see ENDING_SETS |
| BoolQ | `passage`, `question`, `answer`: true or false |
"""
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.config import BadInput
from tasks.chat_rows import flatten, name_list, read_text
from tasks.rows import read_dataset

# Column names of well-known datasets; the first that a row has is used.
CONTEXT_COLUMNS = "ctx", "query", "question", "question_stem", "goal", "sentence", "premise", "startphrase"
PASSAGE_COLUMNS = "passage", "article", "support", "context"  # precede the question
ENDINGS_COLUMNS = "endings", "choices", "options"
LABEL_COLUMNS = "label", "answerKey", "gold", "answer", "cop", "correct_option"
# Columns that each hold an ending -> the label of the first
ENDING_SETS = {("sol1", "sol2"): 0, ("option1", "option2"): 1, ("choice1", "choice2"): 0,
               ("answerA", "answerB", "answerC"): 1, ("ending0", "ending1", "ending2", "ending3"): 0,
               ("answer0", "answer1", "answer2", "answer3"): 0, ("opa", "opb", "opc", "opd"): 0}
SCIQ_ENDINGS = "correct_answer", "distractor1", "distractor2", "distractor3"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GAP = "_"  # where WinoGrande's option goes
COPA_WORDS = {"cause": " because", "effect": " therefore"}  # lm-eval's


@dataclass(frozen=True)
class Choice:
    """label: the index of the right ending. where: file and row, for error messages. contexts: a context for each ending
    where these differ (WinoGrande), else empty."""
    context: str
    endings: list[str]
    label: int
    where: str
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChoiceColumns:
    """Names of columns, from flags; None: by the names of well-known datasets."""
    question: str | None = None
    endings: str | None = None
    answer: str | None = None


def read_choices(dataset: str, dataset_config: str | None, split: str, columns: ChoiceColumns = ChoiceColumns(),
                 limit: int | None = None, skipped: list[str] | None = None) -> list[Choice]:
    """The first `limit` rows of a dataset, see `read_dataset`. skipped: takes a message for each row that cannot be used,
    which is then left out. Raises BadInput, which names the row."""
    choices = []
    for where, row in read_dataset(dataset, dataset_config, split, skipped):
        try:
            choices.append(parse_choice(row, where, columns))
        except BadInput as error:
            if skipped is None:
                raise BadInput(f"{where}: {error}; --skip_errors=1 leaves such rows out") from None
            skipped.append(f"{where}: {error}")
        if len(choices) == limit:
            break
    if not choices:
        first = f" that can be used, the first: {skipped[0]}" if skipped else ""
        raise BadInput(f"--dataset={dataset}: has no rows{first}")
    return choices


def parse_choice(row: dict, where: str, columns: ChoiceColumns = ChoiceColumns()) -> Choice:
    """A row in one of the forms above. Raises BadInput."""
    row = {name: value for name, value in row.items() if value is not None}
    context = read_context(row, columns.question)
    label = lambda: find_value(row, (columns.answer,) if columns.answer else LABEL_COLUMNS, "--answer_column")
    if columns.endings is None:
        if set(SCIQ_ENDINGS) <= row.keys():
            return sciq_choice(row, where, context)
        for names, first in ENDING_SETS.items():
            if set(names) <= row.keys():
                endings = read_endings([row[name] for name in names], names)
                index = find_label(label(), [str(first + i) for i in range(len(names))], endings)
                return special_choice(row, Choice(context, endings, index, where))
        if isinstance(row.get("answer"), bool) and not row.keys() & set(ENDINGS_COLUMNS):
            return Choice(context, ["no", "yes"], int(row["answer"]), where)
    endings, names = find_value(row, (columns.endings,) if columns.endings else ENDINGS_COLUMNS, "--endings_column"), None
    if isinstance(endings, dict):
        endings, names = split_names(endings)
    if not isinstance(endings, list) or len(endings) < 2:
        raise BadInput(f"has {len(endings) if isinstance(endings, list) else 'no list of'} endings: give at least 2")
    endings = read_endings(endings)
    return Choice(context, endings, find_label(label(), names, endings), where)


def read_context(row: dict, question_column: str | None) -> str:
    """The question, after the passage that it is about."""
    question = find_value(row, (question_column,) if question_column else CONTEXT_COLUMNS, "--question_column")
    passages = [] if question_column else [text for name in PASSAGE_COLUMNS for text in flatten(row.get(name), name)]
    return "\n".join([*passages, read_text(question, "the context")])


def read_endings(endings: list, names: Sequence[str] = ()) -> list[str]:
    """Texts, or numbers as text. Raises BadInput, which names the ending."""
    what = [f"its {name}" for name in names] or [f"ending {number}" for number in range(1, len(endings) + 1)]
    texts = [read_text(ending, name) for ending, name in zip(endings, what)]
    if empty := [name for text, name in zip(texts, what) if not text]:
        raise BadInput(f"{empty[0]} is empty: give text")
    return texts


def split_names(endings: dict) -> tuple[list | None, list | None]:
    """(endings, names) of {"text": [endings], "label": [names]}, as in ARC, or {"A": ending, …}, as in MedQA."""
    if "text" in endings:
        return endings["text"], endings["label"] if isinstance(endings.get("label"), list) else None
    present = {name: ending for name, ending in endings.items() if ending is not None}
    return (list(present.values()), list(present)) if all(name in [*LETTERS] for name in present) else (None, None)


def find_label(label, names: list | None, endings: list[str]) -> int:
    """The index of the right ending. label: one of `names`; without names an index, a letter, or the ending itself. Raises
    BadInput."""
    if isinstance(label, (list, dict)):
        raise BadInput(f"the label is of type {type(label).__name__}: give an index, a letter or the ending")
    if isinstance(label, float) and label.is_integer():  # a column of integers some of which are missing
        label = int(label)
    text = str(label)
    known = [str(name) for name in names or range(len(endings))][:len(endings)]
    found = known.index(text) if text in known and not isinstance(label, bool) else None
    if names is None and len(text) == 1 and text in LETTERS[:len(endings)]:
        found = LETTERS.index(text)
    if isinstance(label, str) and endings.count(text) == 1 and (names is None or found is None):
        if found not in (None, endings.index(text)):
            raise BadInput(f"the label is {text[:40]!r}, the text of ending {endings.index(text) + 1}, but also means "
                           f"ending {found + 1}: give a number that is not text, or another letter")
        found = endings.index(text)
    if found is not None:
        return found
    letters = f" or {', '.join(LETTERS[:len(endings)])}" if names is None else ""
    raise BadInput(f"the label is {text[:40]!r}: must be one of {name_list(known)}{letters}"
                   + (": the rows of a test split are often not labelled" if text in ("", "-1") else ""))


def special_choice(row: dict, choice: Choice) -> Choice:
    """`choice`, in whose dataset the endings do not simply follow the context."""
    context, endings = choice.context, choice.endings
    if "option1" in row and context.count(GAP) == 1:  # WinoGrande: what follows the gap is scored, as in lm-eval
        before, after = context.split(GAP)
        if after.strip():
            contexts = tuple(before + option for option in endings)
            return Choice(context, [after.strip()] * len(endings), choice.label, choice.where, contexts)
    if {"choice1", "premise", "question"} <= row.keys() and row["question"] in [*COPA_WORDS]:
        premise = read_text(row["premise"], "its premise").strip().rstrip(".") + COPA_WORDS[row["question"]]
        return Choice(premise, [ending[0].lower() + ending[1:] for ending in endings], choice.label, choice.where)
    return choice


def sciq_choice(row: dict, where: str, context: str) -> Choice:
    """The right ending has a column of its own. It is put at a place that follows from the question: of endings with equal
    scores the first is chosen."""
    right, *wrong = read_endings([row[name] for name in SCIQ_ENDINGS], SCIQ_ENDINGS)
    label = hashlib.sha256(context.encode()).digest()[0] % len(SCIQ_ENDINGS)
    return Choice(context, [*wrong[:label], right, *wrong[label:]], label, where)


def find_value(row: dict, columns: Sequence[str], flag_name: str):
    """The value of the first of `columns` that the row has. Raises BadInput, which suggests the flag that names another."""
    for column in columns:
        if column in row:
            return row[column]
    raise BadInput(f"has no column {' or '.join(columns)}: its columns are {name_list(row)}: name it with {flag_name}")
