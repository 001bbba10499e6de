"""Reads files of text: parquet, jsonl and txt, starting at any row, about a megabyte at a time.

    documents = read_files([file], "text", None, skip_errors=False)      chunks of documents, of one column
    records = read_records(file)                                         whole rows of jsonl and parquet, as dicts

A row is a row of a parquet file, a line of a jsonl file, or one of the pieces that a txt file is cut into.
"""
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from runtime.config import BadInput
from text.documents import PackedDocuments, to_utf8

CHUNK_BYTES = 1 << 20  # text that is read, encoded and passed on at a time
# A txt file is cut at the first blank line after TXT_DOCUMENT_BYTES; where there is none, at the first line end after
# TXT_MAX_BYTES; where there is none either, at TXT_MAX_BYTES.
TXT_DOCUMENT_BYTES, TXT_MAX_BYTES = 16_384, 1 << 20
# A document is held in memory several times over; in a str with one emoji, every character takes four bytes.
MAX_DOCUMENT_BYTES = 100_000_000


# -- chunks -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of a source, and their position in it.

    state: a JSON value from which the source can read these documents again. n_before: documents after `state` that precede
    these. skipped: a message for each row group, row or file between the previous chunk and this one that could not be read
    and was skipped (--skip_errors). fraction: roughly how much of the source precedes `state`, 0 to 1; None if unknown.
    """
    documents: PackedDocuments
    state: object
    n_before: int = 0
    skipped: tuple[str, ...] = ()
    fraction: float | None = None

    def position_after(self, n: int) -> dict:
        """The position after the first n documents of this chunk, as `read_from` takes it and manifest.json stores it."""
        return {"at": self.state, "skip": self.n_before + n}

    def drop_first(self, n: int) -> "Chunk":
        return replace(self, documents=self.documents.slice(n, len(self.documents)), n_before=self.n_before + n)

    def split(self) -> Iterator["Chunk"]:
        """The chunk in pieces of about CHUNK_BYTES, or of one longer document."""
        start, offsets = 0, self.documents.offsets
        while start < len(self.documents):
            stop = int(np.searchsorted(offsets, min(offsets[start] + CHUNK_BYTES, offsets[-1])))
            yield replace(self, documents=self.documents.slice(start, stop), n_before=self.n_before + start,
                          skipped=() if start else self.skipped)
            start = stop


def read_from(read: Callable[[object], Iterator[Chunk]], position: dict | None) -> Iterator[Chunk]:
    """The chunks from `position` on (None: from the beginning). read(state) yields the chunks from a state on."""
    position = position or {"at": None, "skip": 0}
    n = position["skip"]
    for chunk in read(position["at"]):
        if n == 0 or n < len(chunk.documents):
            yield chunk.drop_first(n)
        n = max(0, n - len(chunk.documents))


class PendingChunk:
    """Collects rows, possibly of several small files, until they make a chunk."""

    def __init__(self):
        self.documents, self.n_bytes, self.skipped = [], 0, []
        self.state, self.fraction = None, 0.0

    def add(self, documents: PackedDocuments, state: dict, fraction: float):
        if not self.documents:
            self.state, self.fraction = state, fraction
        self.documents.append(documents)
        self.n_bytes += len(documents.utf8)

    def flush(self) -> Iterator[Chunk]:
        """Yields what was collected, if there are documents, and empties itself."""
        if self.documents:
            chunk = Chunk(PackedDocuments.concat(self.documents), self.state, 0, tuple(self.skipped), self.fraction)
            self.documents, self.n_bytes, self.skipped = [], 0, []
            yield from chunk.split()


# -- files ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Unreadable:
    """A part of a file that cannot be read; the readers of a format yield it in place of its rows. `read_files` and
    `read_records` then raise BadInput with `message`, which names file and part, or skip it (--skip_errors). row: its first
    one."""
    message: str
    row: int


class WrongColumn(BadInput):
    """--text_column names a column that does not exist or does not hold text."""


class RowBatch(NamedTuple):
    """Consecutive rows of a file, empty ones included. fraction: how much of the file precedes them, 0 to 1."""
    documents: PackedDocuments
    first_row: int
    first_byte: int
    fraction: float


@dataclass(frozen=True)
class TextFile:
    """A local or remote file. name: path or address, for messages. open: opens it as a binary file."""
    name: str
    size: int
    open: Callable[[], io.IOBase]

    @property
    def suffix(self) -> str:
        return "." + self.name.rsplit(".", 1)[-1].lower()

    def read(self, row: int, byte: int, text_column: str) -> Iterator[RowBatch | Unreadable]:
        """The rows from `row` on, which starts at `byte` (ignored for parquet); see READERS. Raises OSError naming the file
        when a local disk fails."""
        with naming_disk_errors(self.name):
            yield from READERS[self.suffix](self, row, byte, text_column)


@contextmanager
def naming_disk_errors(name: str):
    """Adds the file's name to an OSError of a local disk; network errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            raise
        raise OSError(f"{name}: cannot be read ({error.strerror})") from None


def read_files(files: list[TextFile], text_column: str, state: dict | None, skip_errors: bool,
               row_part: tuple[int, int] = (0, 1)) -> Iterator[Chunk]:
    """The documents of `files` from `state` on (None: from the beginning), without empty ones.

    row_part: (k, n) takes every n-th row, starting with the k-th. Raises BadInput naming the file and the part of it that
    cannot be read; with `skip_errors` that part is skipped instead.
    """
    first_file, row, byte = (state["file"], state["row"], state["byte"]) if state else (0, 0, 0)
    bytes_before = np.cumsum([0, *(file.size for file in files)]).tolist()
    pending = PendingChunk()
    for number, file in list(enumerate(files))[first_file:]:
        for rows in file.read(row, byte, text_column):
            if isinstance(rows, Unreadable):
                if rows.row % row_part[1] != row_part[0]:
                    continue  # another node reports it
                if not skip_errors:
                    raise BadInput(f"{rows.message}: --skip_errors=1 skips it")
                yield from pending.flush()
                pending.skipped.append(rows.message)
                continue
            lengths = np.diff(rows.documents.offsets)
            wanted = (lengths > 0) & ((rows.first_row + np.arange(len(lengths))) % row_part[1] == row_part[0])
            if wanted.any():
                pending.add(rows.documents.select(wanted),
                            {"file": number, "row": rows.first_row, "byte": rows.first_byte},
                            (bytes_before[number] + rows.fraction * file.size) / max(bytes_before[-1], 1))
            del rows  # before the next ones are read
            if pending.n_bytes >= CHUNK_BYTES:
                yield from pending.flush()
        row = byte = 0
    yield from pending.flush()
    if pending.skipped:
        end = {"file": len(files), "row": 0, "byte": 0}
        yield Chunk(PackedDocuments.from_utf8([]), end, 0, tuple(pending.skipped))


def split_files(files: list, part: tuple[int, int]) -> tuple[list, tuple[int, int]]:
    """The k-th of n disjoint parts, part = (k, n), as `read_files` takes it: an n-th of the files, or, where there are fewer
    files than parts, an n-th of the rows of all of them. Returns the files and `row_part`."""
    if part[1] == 1 or len(files) < part[1]:
        return files, part
    from datasets import Dataset
    from datasets.distributed import split_dataset_by_node
    numbers = Dataset.from_dict({"number": list(range(len(files)))})
    return [files[i] for i in split_dataset_by_node(numbers, *part)["number"]], (0, 1)


def read_records(file: TextFile) -> Iterator[tuple[str, dict]]:
    """Yields (where, record) for every row of a jsonl or parquet file; where: file and row, for messages.

    Raises BadInput naming the file and the row, or OSError when the disk fails.
    """
    if file.suffix not in RECORD_READERS:
        raise BadInput(f"--dataset={file.name}: holds no rows: give {' or '.join(RECORD_READERS)}")
    with naming_disk_errors(file.name):
        for found in RECORD_READERS[file.suffix](file):
            if isinstance(found, Unreadable):
                raise BadInput(f"{found.message}: fix or remove it")
            yield found


# -- parquet ----------------------------------------------------------------------------------------------------------

RECORDS_PER_BATCH = 1024


def parquet_batches(file: TextFile, start_row: int, text_column: str | None, convert: Callable) -> Iterator:
    """Yields (first row, convert(batch), rows in the file) for the record batches from `start_row` on, or Unreadable for a
    damaged file or row group. text_column: read this column only."""
    import pyarrow.parquet
    with file.open() as opened:
        try:
            # buffer_size without pre_buffer reads a column in pieces: a row group may be larger than the memory
            parquet = pyarrow.parquet.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False,
                                                  page_checksum_verification=True)
        except Exception as error:
            yield as_unreadable(error, f"{file.name}: not a readable parquet file", 0)
            return
        if text_column is not None:
            require_column(text_column, parquet.schema_arrow.names, file.name)
        first = 0
        for group in range(parquet.num_row_groups):
            n_rows = parquet.metadata.row_group(group).num_rows
            if first + n_rows > start_row:
                yield from row_group_batches(parquet, group, first, start_row, text_column, convert, file.name)
            first += n_rows


def row_group_batches(parquet, group: int, first: int, start_row: int, text_column: str | None, convert: Callable,
                      name: str) -> Iterator:
    """As `parquet_batches`, for one row group, which starts at row `first`."""
    n_rows = RECORDS_PER_BATCH if text_column is None else rows_per_batch(parquet.metadata.row_group(group), text_column)
    batches = parquet.iter_batches(n_rows, row_groups=[group], columns=text_column and [text_column], use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            yield as_unreadable(error, f"{name}: row group {group} of {parquet.num_row_groups} cannot be read from row "
                                       f"{first} on", first)
            return
        if batch is None:
            return
        n_before = min(max(start_row - first, 0), len(batch))
        values, at = convert(batch.slice(n_before)), first + n_before
        first += len(batch)
        del batch
        yield at, values, parquet.metadata.num_rows
        del values  # before the next ones are read


def rows_per_batch(row_group, text_column: str) -> int:
    """Few enough rows to fit into memory even if some are much longer than others, or compress to almost nothing."""
    for i in range(row_group.num_columns):
        column = row_group.column(i)
        if column.path_in_schema == text_column:
            return max(1, min(128, CHUNK_BYTES * row_group.num_rows // max(1, column.total_uncompressed_size)))
    return 1


def as_unreadable(error: Exception, message: str, row: int) -> Unreadable:
    """`error`, of pyarrow, as Unreadable if the file's bytes are its cause. Raises `error` if they are not."""
    import pyarrow
    if isinstance(error, MemoryError) or not (isinstance(error, pyarrow.ArrowException) or (
            type(error) is OSError and error.errno is None)):
        raise error
    return Unreadable(f"{message} ({' '.join(str(error).split())[:200]})", row)


def read_parquet(file: TextFile, row: int, byte: int, text_column: str) -> Iterator[RowBatch | Unreadable]:
    convert = lambda batch: column_documents(batch.column(0), text_column, file.name)
    for found in parquet_batches(file, row, text_column, convert):
        if isinstance(found, Unreadable):
            yield found
            continue
        first, documents, n_rows = found
        del found
        too_long = np.flatnonzero(np.diff(documents.offsets) > MAX_DOCUMENT_BYTES).tolist()
        for before, stop in zip([-1, *too_long], [*too_long, len(documents)]):
            if before >= 0:
                yield Unreadable(f"{file.name}: row {first + before} is longer than {MAX_DOCUMENT_BYTES / 1e6:.0f} MB",
                                 first + before)
            start = before + 1
            if start < stop:
                yield RowBatch(documents.slice(start, stop), first + start, 0, (first + start) / n_rows)
        del documents  # before the next ones are read


def column_documents(column, text_column: str, where: str) -> PackedDocuments:
    """A pyarrow array of strings as documents; nulls become empty ones. Raises WrongColumn if it does not hold strings."""
    import pyarrow
    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
            or pyarrow.types.is_null(kind)):
        raise WrongColumn(f"--text_column={text_column}: {where} holds {kind}, not text")
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        column = column.cast(pyarrow.large_string())
    if column.null_count:
        column = column.fill_null("")
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:  # not UTF-8
        return PackedDocuments.from_strings(column.cast(pyarrow.large_binary()).to_pylist())
    _, offsets, data = column.buffers()
    offsets = np.frombuffer(offsets, np.int64 if pyarrow.types.is_large_string(column.type) else np.int32)
    offsets = offsets[column.offset:column.offset + len(column) + 1].astype(np.int64)
    return PackedDocuments(np.frombuffer(data or b"", np.uint8)[offsets[0]:offsets[-1]], offsets - offsets[0])


def parquet_records(file: TextFile) -> Iterator[tuple[str, dict] | Unreadable]:
    for found in parquet_batches(file, 0, None, lambda batch: batch.to_pylist()):
        if isinstance(found, Unreadable):
            yield found
            continue
        first, records, _ = found
        for number, record in enumerate(records, first + 1):
            yield f"{file.name}: row {number}", record


# -- jsonl ------------------------------------------------------------------------------------------------------------

def json_lines(opened: io.IOBase, name: str, row: int, byte: int, convert: Callable) -> Iterator[tuple]:
    """Yields (convert(record, where) or Unreadable, byte at which the next line starts) for the lines from `row` on; record
    is None for a blank line. A long line is freed before its value is used. Raises WrongColumn for the first line, as then
    every line will lack the column."""
    while line := opened.readline(MAX_DOCUMENT_BYTES):
        row, byte = row + 1, byte + len(line)
        where = f"{name}: line {row}"
        try:
            value = convert(parse_json_object(line, where), where)
        except BadInput as error:
            if row == 1 and isinstance(error, WrongColumn):
                raise
            value = Unreadable(str(error), row - 1)
            while len(line) == MAX_DOCUMENT_BYTES and line[-1:] != b"\n":  # the rest of a long line
                line = opened.readline(MAX_DOCUMENT_BYTES)
                byte += len(line)
        del line
        yield value, byte
        del value


def parse_json_object(line: bytes, where: str) -> dict | None:
    """A line of jsonl; None if it is blank. Raises BadInput starting with `where`."""
    if not line.strip():
        return None
    if len(line) >= MAX_DOCUMENT_BYTES:
        raise BadInput(f"{where} is longer than {MAX_DOCUMENT_BYTES / 1e6:.0f} MB")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 text (it holds byte 0x{error.object[error.start]:02x})") from None
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, or brackets 100,000 deep
        raise BadInput(f"{where} cannot be parsed as JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(record, dict):
        raise BadInput(f"{where} is not a JSON object")
    return record


def read_jsonl(file: TextFile, row: int, byte: int, text_column: str) -> Iterator[RowBatch | Unreadable]:
    def get_text(record: dict | None, where: str) -> bytes:
        if record is None:
            return b""
        require_column(text_column, record, where)
        return to_utf8(require_text(record[text_column], text_column, where))

    with file.open() as opened:
        opened.seek(byte)
        yield from batch_rows(json_lines(opened, file.name, row, byte, get_text), file, row, byte)


def jsonl_records(file: TextFile) -> Iterator[tuple[str, dict] | Unreadable]:
    to_record = lambda record, where: None if record is None else (where, record)
    with file.open() as opened:
        for value, _ in json_lines(opened, file.name, 0, 0, to_record):
            if value is not None:
                yield value


# -- txt --------------------------------------------------------------------------------------------------------------

def read_txt(file: TextFile, row: int, byte: int, text_column: str) -> Iterator[RowBatch | Unreadable]:
    """The file in pieces that, joined, are the file."""
    with file.open() as opened:
        opened.seek(byte)
        yield from batch_rows(txt_rows(opened, file.name, row, byte), file, row, byte)


def txt_rows(opened: io.IOBase, name: str, row: int, byte: int) -> Iterator[tuple]:
    for number, piece in enumerate(txt_pieces(opened), row):
        try:
            piece.decode()
            value = piece.removeprefix(b"\xef\xbb\xbf") if number == 0 else piece  # a byte order mark is not text
        except UnicodeDecodeError as error:
            value = Unreadable(f"{name}: not UTF-8 text (it holds byte 0x{piece[error.start]:02x} at "
                               f"{byte + error.start:,})", number)
        byte += len(piece)
        yield value, byte


def txt_pieces(opened: io.IOBase) -> Iterator[bytes]:
    lines, n_bytes = [], 0
    while line := opened.readline(TXT_MAX_BYTES):
        if len(line) == TXT_MAX_BYTES and line[-1:] != b"\n":  # do not cut a character
            tail = next((i for i in range(1, 5) if line[-i] & 0xC0 != 0x80), 1)  # bytes of the last character
            if line[-tail] & 0x80:
                opened.seek(-tail, io.SEEK_CUR)
                line = line[:-tail]
        lines.append(line)
        n_bytes += len(line)
        if (n_bytes >= TXT_DOCUMENT_BYTES and not line.strip()) or n_bytes >= TXT_MAX_BYTES - 4:
            yield b"".join(lines)
            lines, n_bytes = [], 0
    if lines:
        yield b"".join(lines)


# -- shared by the formats --------------------------------------------------------------------------------------------

def batch_rows(values: Iterator[tuple], file: TextFile, row: int, byte: int) -> Iterator[RowBatch | Unreadable]:
    """Joins rows into batches of about CHUNK_BYTES. values: for each row its text, UTF-8 bytes, or Unreadable; and the byte
    at which the next row starts."""
    batch, first, n_bytes = [], (row, byte), 0
    rows = lambda: RowBatch(PackedDocuments.from_utf8(batch), *first, first[1] / max(1, file.size))
    for value, next_byte in values:
        failure = value if isinstance(value, Unreadable) else None
        if failure is None:
            batch.append(value)
        del value
        row, byte, n_bytes = row + 1, next_byte, n_bytes + next_byte - byte
        if batch and (n_bytes >= CHUNK_BYTES or failure):
            full, batch = rows(), []
            yield full
            del full
        if failure:
            yield failure
        if not batch:
            first, n_bytes = (row, byte), 0
    if batch:
        yield rows()


def require_column(text_column: str, columns: Iterable[str], where: str):
    """Raises WrongColumn if `text_column` is not among `columns`."""
    if text_column not in columns:
        raise WrongColumn(f"--text_column={text_column}: no such column in {where}, which has "
                          f"{', '.join(columns) or 'none'}")


def require_text(value, text_column: str, where: str) -> str:
    """`value` if it is a str; a missing value is an empty document. Raises WrongColumn for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise WrongColumn(f"--text_column={text_column}: {where} holds {type(value).__name__}, not text")
    return value


# (file, row, byte, text_column) -> the rows from `row` on, which starts at `byte`, and Unreadable for what cannot be read
READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}
# file -> (where, record) of every row, and Unreadable for what cannot be read
RECORD_READERS = {".jsonl": jsonl_records, ".parquet": parquet_records}
