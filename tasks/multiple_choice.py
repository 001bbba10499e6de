"""Multiple choice: a context, its possible endings, and which of them is right. Scored by `evaluate.py --task=choice`.

Rows have HellaSwag's form, {"ctx": …, "endings": [...], "label": 0}, or ARC's and MMLU's: see `parse_choice`.
"""
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.config import BadInput
from tasks.rows import read_dataset

# Column names of well-known datasets; the first that a row has is used.
CONTEXT_COLUMNS = "ctx", "query", "question"
ENDINGS_COLUMNS = "endings", "choices"
LABEL_COLUMNS = "label", "answerKey", "gold", "answer"


@dataclass(frozen=True)
class Choice:
    """label: the index of the right ending. where: file and row, for error messages."""
    context: str
    endings: list[str]
    label: int
    where: str


def read_choices(dataset: str, dataset_config: str | None, split: str, question_column: str | None = None,
                 answer_column: str | None = None, limit: int | None = None) -> list[Choice]:
    """The first `limit` rows of a dataset, see `read_dataset`. Raises BadInput, which names the row."""
    choices = []
    for where, row in itertools.islice(read_dataset(dataset, dataset_config, split), limit):
        try:
            choices.append(parse_choice(row, where, question_column, answer_column))
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from None
    if not choices:
        raise BadInput(f"--dataset={dataset}: has no rows")
    return choices


def parse_choice(row: dict, where: str, question_column: str | None = None, answer_column: str | None = None) -> Choice:
    """The label is an index into a list of endings; or, where endings are {"text": [endings], "label": [names]} as in ARC,
    one of the names. Raises BadInput."""
    context = find_value(row, (question_column,) if question_column else CONTEXT_COLUMNS, "--question_column")
    endings, names = find_value(row, ENDINGS_COLUMNS), None
    label = find_value(row, (answer_column,) if answer_column else LABEL_COLUMNS, "--answer_column")
    if isinstance(endings, dict):
        endings, names = endings.get("text"), endings.get("label")
    if not isinstance(endings, list) or len(endings) < 2:
        raise BadInput(f"has {len(endings) if isinstance(endings, list) else 'no list of'} endings: give at least 2")
    if not isinstance(context, str) or not all(isinstance(ending, str) and ending for ending in endings):
        raise BadInput("the context or an ending is not text, or an ending is empty")
    names = list(map(str, names if isinstance(names, list) else range(len(endings))))[:len(endings)]
    if str(label) not in names:
        raise BadInput(f"the label is {str(label)[:40]!r}: must be one of {', '.join(names)}")
    return Choice(context, endings, names.index(str(label)), where)


def find_value(row: dict, columns: Sequence[str], flag_name: str = ""):
    """The value of the first of `columns` that the row has. Raises BadInput, which suggests the flag that names another."""
    for column in columns:
        if column in row:
            return row[column]
    raise BadInput(f"has no column {' or '.join(columns)}: its columns are {', '.join(row)}"
                   + (f": name it with {flag_name}" if flag_name else ""))
