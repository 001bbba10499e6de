"""The column that holds the text: finding it in a row, and what is said of rows that cannot be used.

    column_value({"data": {"text": "a"}}, "data.text", "a.jsonl: line 1")      "a"
"""
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.config import BadInput

# A document is held in memory several times over; in a str with one emoji, every character takes four bytes.
MAX_DOCUMENT_BYTES = 100_000_000
# A row of questions or conversations, which become Python objects: of many small values, each takes up to 70 bytes.
MAX_RECORD_BYTES = 16_000_000


@dataclass(frozen=True)
class Unreadable:
    """A part of a file that cannot be read; the readers of a format yield it in place of its rows. `read_files` and
    `read_records` then raise BadInput with `message`, which names file and part, or skip it (--skip_errors). row: its first
    one."""
    message: str
    row: int


class WrongColumn(BadInput):
    """--text_column names a column that does not exist or does not hold text."""


def find_column(columns: Mapping, column: str) -> tuple[str, ...] | None:
    """The keys that lead to `column` in nested mappings; None if there is none. A key that holds a dot wins.

    Examples: {"data": {"text": "a"}}, "data.text" -> ("data", "text"); {"data.text": "a"}, "data.text" -> ("data.text",)
    """
    if column in columns:
        return (column,)
    for at in [at for at, character in enumerate(column) if character == "."]:
        inner = columns.get(column[:at])
        if isinstance(inner, Mapping) and (rest := find_column(inner, column[at + 1:])):
            return (column[:at], *rest)
        if inner is None and column[:at] in columns:  # a missing value
            return (column[:at],)
    return None


def column_value(record: Mapping, column: str, where: str):
    """The value of `column`, see `find_column`. Raises WrongColumn naming the columns there are."""
    if column in record:
        return record[column]
    path = find_column(record, column)
    if path is None:
        names = ", ".join(map(str, record))
        raise WrongColumn(f"--text_column={column}: no such column in {where}, which has "
                          f"{names[:200] + ' …' if len(names) > 200 else names or 'none'}")
    for key in path:
        record = record[key]
    return record


def require_text(value, column: str, where: str) -> str:
    """`value` if it is a str; a missing value is an empty document. Raises WrongColumn for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise WrongColumn(f"--text_column={column}: {where} holds {type(value).__name__}, not text")
    return value
