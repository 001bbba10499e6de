"""Multiple choice: a context, its endings, and which of them is right."""
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.config import BadInput

# Columns of well-known sets of multiple choice, of which the first that is there counts.
CONTEXTS, ENDINGS, LABELS = ("ctx", "query", "question"), ("endings", "choices"), ("label", "answerKey", "gold", "answer")


# -- multiple choice --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Choice:
    """A context, its possible endings, and which of them is right. where: for messages about it."""
    context: str
    endings: list[str]
    label: int
    where: str


def choice_of(row: dict, where: str, question_column: str | None = None, answer_column: str | None = None) -> Choice:
    """Of a row in HellaSwag's form, or in ARC's: {"text": [endings], "label": [their names]}, where the label is one of the
    names. Raises BadInput."""
    context = value_of(row, (question_column,) if question_column else CONTEXTS, "--question_column")
    endings, names = value_of(row, ENDINGS), None
    label = value_of(row, (answer_column,) if answer_column else LABELS, "--answer_column")
    if isinstance(endings, dict):
        endings, names = endings.get("text"), endings.get("label")
    if not isinstance(endings, list) or len(endings) < 2:
        raise BadInput(f"has {len(endings) if isinstance(endings, list) else 'no list of'} endings: give at least 2")
    if not isinstance(context, str) or not all(isinstance(ending, str) and ending for ending in endings):
        raise BadInput("its context or an ending is no text, or an ending is empty")
    names = list(map(str, names if isinstance(names, list) else range(len(endings))))[:len(endings)]
    if str(label) not in names:
        raise BadInput(f"its label is {str(label)[:40]!r}: must be one of {', '.join(names)}")
    return Choice(context, endings, names.index(str(label)), where)


def value_of(row: dict, names: Sequence[str], given_by: str = ""):
    """Of the first of these columns that is there. Raises BadInput, which tells of the flag that names another."""
    if not (found := [name for name in names if name in row]):
        raise BadInput(f"has no column {' or '.join(names)}: its columns are {', '.join(row)}"
                       f"{given_by and f': name it by {given_by}'}")
    return row[found[0]]
