"""Reads files: parquet, jsonl, json, csv, and text such as txt, md and py, starting at any row, about a megabyte at a time.

    documents = read_files([FilePart(file)], "text", None, skip_errors=False)      chunks of documents, of one column
    records = read_records(file)                                                   whole rows, as dicts

A row is a row of a parquet or csv file, a line of a jsonl file, an element of a json file's array, or one of the pieces that
a file of text is cut into.
"""
import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from runtime.config import BadInput
from text.columns import MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES, Unreadable, WrongColumn, column_value, require_text
from text.documents import PackedDocuments, to_utf8
from text.folders import TEXT_FORMATS, Damaged, file_endings, skip_to
from text.parquet import record_batches, text_batches

CHUNK_BYTES = 1 << 20  # text that is read, encoded and passed on at a time
# A txt file is cut at the first blank line after TXT_DOCUMENT_BYTES; where there is none, at the first line end after
# TXT_MAX_BYTES; where there is none either, at TXT_MAX_BYTES.
TXT_DOCUMENT_BYTES, TXT_MAX_BYTES = 16_384, 65_536
MAX_JSON_VALUES = 10_000_000  # in one document's row, beside its text: each takes up to 70 bytes


# -- chunks -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of a source, and their position in it.

    state: a JSON value from which the source can read these documents again. n_before: documents after `state` that precede
    these. skipped: a message for each row group, row or file between the previous chunk and this one that could not be read
    and was skipped (--skip_errors). fraction: roughly how much of the source precedes `state`, 0 to 1; None if unknown.
    split: "val" or "train" if the files say so; None in a source that does not.
    """
    documents: PackedDocuments
    state: object
    n_before: int = 0
    skipped: tuple[str, ...] = ()
    fraction: float | None = None
    split: str | None = None

    def position_after(self, n: int) -> dict:
        """The position after the first n documents of this chunk, as `read_from` takes it and manifest.json stores it."""
        return {"at": self.state, "skip": self.n_before + n}

    def drop_first(self, n: int) -> "Chunk":
        return replace(self, documents=self.documents.slice(n, len(self.documents)), n_before=self.n_before + n)

    def pieces(self) -> Iterator["Chunk"]:
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

    def flush(self, split: str | None) -> Iterator[Chunk]:
        """Yields what was collected, if there are documents, and empties itself."""
        if self.documents:
            chunk = Chunk(PackedDocuments.concat(self.documents), self.state, 0, tuple(self.skipped), self.fraction, split)
            self.documents, self.n_bytes, self.skipped = [], 0, []
            yield from chunk.pieces()


# -- files ------------------------------------------------------------------------------------------------------------

class RowBatch(NamedTuple):
    """Consecutive rows of a file, empty ones included. fraction: how much of the file precedes them, 0 to 1."""
    documents: PackedDocuments
    first_row: int
    first_byte: int
    fraction: float


@dataclass(frozen=True)
class TextFile:
    """A local or remote file. name: path or address, for messages. size: in bytes, as it is stored. open: opens it as a
    binary file, unpacked."""
    name: str
    size: int
    open: Callable[[], io.IOBase]

    @property
    def format(self) -> str:
        return file_endings(self.name)[0]

    @property
    def is_compressed(self) -> bool:
        return file_endings(self.name)[1] != ""

    @property
    def text_bytes(self) -> int:
        """Roughly how much text it holds, without opening it."""
        return self.size * (3 if self.is_compressed else 2 if self.format == ".parquet" else 1)

    @contextmanager
    def open_at(self, byte: int) -> Iterator[io.IOBase]:
        """Opens it and moves on to `byte` of its unpacked content."""
        with self.open() as opened:
            skip_to(opened, byte)
            yield opened

    def read(self, row: int, byte: int, text_column: str) -> Iterator[RowBatch | Unreadable]:
        """The rows from `row` on, which starts at `byte` (ignored for parquet); see READERS. Raises OSError naming the file
        when a local disk fails."""
        with naming_disk_errors(self.name):
            yield from READERS[self.format](self, row, byte, text_column)


class FilePart(NamedTuple):
    """What is read of a file: row_part (k, n) takes every n-th row, starting with the k-th. split: see Chunk."""
    file: TextFile
    row_part: tuple[int, int] = (0, 1)
    split: str | None = None


@contextmanager
def naming_disk_errors(name: str):
    """Adds the file's name to an OSError of a local disk; network errors pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            raise
        raise OSError(f"{name}: cannot be read ({error.strerror})") from None


def read_files(parts: list[FilePart], text_column: str, state: dict | None, skip_errors: bool) -> Iterator[Chunk]:
    """The documents of the files of `parts` from `state` on (None: from the beginning), without empty ones.

    Raises BadInput naming the file and the part of it that cannot be read; with `skip_errors` that part is skipped instead.
    """
    first_file, row, byte = (state["file"], state["row"], state["byte"]) if state else (0, 0, 0)
    bytes_before = np.cumsum([0, *(part.file.size for part in parts)]).tolist()
    pending, split = PendingChunk(), None
    for number, (file, row_part, split_of_file) in list(enumerate(parts))[first_file:]:
        if split_of_file != split:
            yield from pending.flush(split)
        split = split_of_file
        for rows in file.read(row, byte, text_column):
            if isinstance(rows, Unreadable):
                if rows.row % row_part[1] != row_part[0]:
                    continue  # another node reports it
                if not skip_errors:
                    raise BadInput(f"{rows.message}: --skip_errors=1 skips it")
                yield from pending.flush(split)
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
                yield from pending.flush(split)
        row = byte = 0
    yield from pending.flush(split)
    if pending.skipped:
        end = {"file": len(parts), "row": 0, "byte": 0}
        yield Chunk(PackedDocuments.from_utf8([]), end, 0, tuple(pending.skipped), split=split)


def split_files(files: list[TextFile], part: tuple[int, int], split: str | None = None) -> list[FilePart]:
    """The k-th of n disjoint parts, part = (k, n): an n-th of the files, or, where there are fewer files than parts, an n-th
    of the rows of all of them."""
    if part[1] == 1 or len(files) < part[1]:
        return [FilePart(file, part, split) for file in files]
    from datasets import Dataset
    from datasets.distributed import split_dataset_by_node
    numbers = Dataset.from_dict({"number": list(range(len(files)))})
    return [FilePart(files[i], (0, 1), split) for i in split_dataset_by_node(numbers, *part)["number"]]


def read_records(file: TextFile, skipped: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Yields (where, record) for every row of a file; where: file and row, for messages.

    Raises BadInput naming the file and the row that cannot be read; with `skipped`, that message is added to it instead.
    OSError when the disk fails.
    """
    if file.format not in RECORD_READERS:
        raise BadInput(f"--dataset={file.name}: holds no rows: give {', '.join(RECORD_READERS)}")
    with naming_disk_errors(file.name):
        for found in RECORD_READERS[file.format](file):
            if not isinstance(found, Unreadable):
                yield found
            elif skipped is None:
                raise BadInput(f"{found.message}: --skip_errors=1 skips it")
            else:
                skipped.append(found.message)


# -- shared by the formats --------------------------------------------------------------------------------------------

# Readers of rows take (file, row, byte, max_bytes, convert) and yield, for each row from `row` on, which starts at `byte`,
# (convert(record, where) or Unreadable, byte at which the next row starts). A row is freed before its value is used.

def failed_row(error: BadInput, row: int) -> Unreadable:
    """What a reader yields for a row. Raises a WrongColumn of the first row, as then every row lacks the column."""
    if row == 0 and isinstance(error, WrongColumn):
        raise error
    return Unreadable(str(error), row)


def damaged_rest(error: Damaged, row: int) -> Unreadable:
    """What cannot be unpacked, from `row` to the end of the file."""
    return Unreadable(f"{error} from row {row + 1} on", row)


def batch_rows(values: Iterator[tuple], file: TextFile, row: int, byte: int) -> Iterator[RowBatch | Unreadable]:
    """Joins rows into batches of about CHUNK_BYTES. values: of a reader of rows, UTF-8 bytes."""
    batch, first, n_bytes = [], (row, byte), 0
    size = float("inf") if file.is_compressed else max(1, file.size)
    rows = lambda: RowBatch(PackedDocuments.from_utf8(batch), *first, first[1] / size)
    rest = None
    try:
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
    except Damaged as error:
        rest = damaged_rest(error, row)
    if batch:
        yield rows()
    if rest:
        yield rest


def text_rows(read_rows: Callable) -> Callable:
    """A reader of READERS: the documents in the rows that `read_rows` reads."""
    def read(file: TextFile, row: int, byte: int, text_column: str) -> Iterator[RowBatch | Unreadable]:
        def get_text(record: dict | str | None, where: str) -> bytes:
            if isinstance(record, dict):
                record = require_text(column_value(record, text_column, where), text_column, where)
            return to_utf8(record or "")
        yield from batch_rows(read_rows(file, row, byte, MAX_DOCUMENT_BYTES, get_text), file, row, byte)
    return read


def record_rows(read_rows: Callable) -> Callable:
    """A reader of RECORD_READERS: the rows that `read_rows` reads."""
    def to_record(record: dict | str | None, where: str) -> tuple[str, dict] | None:
        if isinstance(record, str):
            raise BadInput(f"{where} is not a JSON object")
        return None if record is None else (where, record)

    def read(file: TextFile) -> Iterator[tuple[str, dict] | Unreadable]:
        row = 0
        try:
            for value, _ in read_rows(file, 0, 0, MAX_RECORD_BYTES, to_record):
                row += 1
                if value is not None:
                    yield value
        except Damaged as error:
            yield damaged_rest(error, row)
    return read


def too_long(where: str, max_bytes: int) -> str:
    return f"{where} is longer than {max_bytes / 1e6:.0f} MB"


# -- json and jsonl ---------------------------------------------------------------------------------------------------

def json_rows(file: TextFile, row: int, byte: int, max_bytes: int, convert: Callable) -> Iterator[tuple]:
    """The objects of a file of JSON lines, or of one JSON array, whatever its name says. Beside objects, a row may be a
    string, which is a document as it is."""
    layout = json_layout(file)
    if layout == "lines":
        yield from json_lines(file, row, byte, max_bytes, convert)
    else:
        yield from JsonValues(file, row, byte, max_bytes, layout == "array").rows(convert)


def json_layout(file: TextFile) -> str:
    """"lines", "array", or "objects" that span lines. Decided by the start of the file."""
    with file.open() as opened:
        line = b""
        while not line.strip() and (line := opened.readline(1 << 16).removeprefix(b"\xef\xbb\xbf")):
            pass
        start, is_whole = line.strip(), line[-1:] == b"\n"
        try:
            value = json.loads(start) if start[:1] in (b"[", b"{") else None
        except (ValueError, RecursionError):
            if start[:1] == b"[" and (not is_whole or not start.endswith(b"]")):
                return "array"
            return "objects" if start == b"{" or (file.format == ".json" and is_whole and start[:1] == b"{") else "lines"
        rest = opened.read(1 << 16) if is_whole else b""
        return "array" if isinstance(value, list) and not rest.strip() else "lines"


def json_lines(file: TextFile, row: int, byte: int, max_bytes: int, convert: Callable) -> Iterator[tuple]:
    with file.open_at(byte) as opened:
        while line := opened.readline(max_bytes):
            byte += len(line)
            where = f"{file.name}: line {row + 1}"
            try:
                if len(line) == max_bytes:
                    raise BadInput(too_long(where, max_bytes))
                value = convert(parse_json_line(line, where), where)
            except BadInput as error:
                value = failed_row(error, row)
                while len(line) == max_bytes and line[-1:] != b"\n":  # the rest of a long line
                    line = opened.readline(max_bytes)
                    byte += len(line)
            del line
            row += 1
            yield value, byte
            del value


def parse_json_line(line: bytes, where: str) -> dict | str | None:
    """A line of jsonl; None if it is blank. Raises BadInput starting with `where`."""
    if not line.strip():
        return None
    if len(line) > MAX_RECORD_BYTES:
        require_few_values(sum(map(line.count, (b",", b"[", b"{"))), where)
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 text (it holds byte 0x{error.object[error.start]:02x})") from None
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, or brackets 100,000 deep
        raise BadInput(f"{where} cannot be parsed as JSON ({getattr(error, 'msg', error)})") from None
    return require_object(value, where)


def require_object(value, where: str) -> dict | str:
    if not isinstance(value, (dict, str)):
        raise BadInput(f"{where} is not a JSON object")
    return value


def require_few_values(n: int, where: str):
    """Raises BadInput for a row that would take gigabytes as Python objects. n: at least how many values it has."""
    if n > MAX_JSON_VALUES:
        raise BadInput(f"{where} holds more than {MAX_JSON_VALUES:,} values")


class JsonValues:
    """The elements of a JSON array, or JSON objects one after the other, parsed one at a time from a window of the file."""

    def __init__(self, file: TextFile, row: int, byte: int, max_bytes: int, is_array: bool):
        self.file, self.row, self.byte, self.max_bytes, self.is_array = file, row, byte, max_bytes, is_array
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.has_ended = "", 0, False  # the window, and where in it reading has come to

    def rows(self, convert: Callable) -> Iterator[tuple]:
        with self.file.open_at(self.byte) as self.opened:
            if self.byte == 0:
                self.skip_space("\ufeff")
                self.skip_space("[" if self.is_array else "")
            while not (failure := self.end()):
                where = f"{self.file.name}: row {self.row + 1}"
                try:
                    value = convert(require_object(self.next_value(where), where), where)
                except JsonEnds as error:
                    failure = str(error)
                    break
                except BadInput as error:
                    value = failed_row(error, self.row)
                self.row += 1
                yield value, self.byte
                del value
        if failure is not True:
            yield Unreadable(failure, self.row), self.byte

    def end(self) -> bool | str:
        """Whether there is no further value; a message if the array does not end as it should."""
        self.skip_space()
        if not self.is_array or self.at < len(self.text) and self.text[self.at] != "]":
            return self.at == len(self.text)
        if self.at == len(self.text):
            return f"{self.file.name}: ends before its array does, after {self.row} rows"
        self.skip_space("]")
        return self.at == len(self.text) or f"{self.file.name}: goes on after its array"

    def next_value(self, where: str):
        """Parses the next value and moves on to the one after it. Raises BadInput, JsonEnds if it is not known where that
        starts."""
        while True:
            n = len(self.text) - self.at
            try:
                if n > MAX_RECORD_BYTES:
                    require_few_values(sum(self.text.count(character, self.at) for character in ",[{"), where)
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
                if end < len(self.text) or self.has_ended:
                    break
            except BadInput as error:
                raise JsonEnds(str(error)) from None
            except (ValueError, RecursionError) as error:
                if self.has_ended or not isinstance(error, json.JSONDecodeError):
                    raise JsonEnds(f"{where} and what follows it cannot be parsed as JSON "
                                   f"({getattr(error, 'msg', error)})") from None
                if n >= self.max_bytes:
                    raise JsonEnds(f"{too_long(where, self.max_bytes)}, or is no JSON, and ends the file") from None
            self.read_more(n)
        length, failure = end - self.at, bad_byte(self.text[self.at:end])
        self.move_to(end)
        self.skip_space("," if self.is_array else "")
        if failure:
            raise BadInput(f"{where} {failure}")
        if length >= self.max_bytes:
            raise BadInput(too_long(where, self.max_bytes))
        return value

    def skip_space(self, character: str = ""):
        """Moves on to what is not white space; with `character`, past that and the white space behind it, if it comes
        next."""
        while True:
            self.move_to(JSON_SPACE.match(self.text, self.at).end())
            if self.at < len(self.text):
                if not character or self.text[self.at] != character:
                    return
                self.move_to(self.at + 1)
                character = ""
            elif self.has_ended:
                return
            else:
                self.read_more(0)

    def move_to(self, at: int):
        self.byte += len(self.text[self.at:at].encode("utf-8", "surrogateescape"))
        self.text, self.at = (self.text[at:], 0) if at > CHUNK_BYTES else (self.text, at)

    def read_more(self, n: int):
        """Appends at least `n` bytes of the file to the window, if there are as many."""
        data = self.opened.read(max(n, CHUNK_BYTES))
        self.has_ended = not data
        self.text += self.decoder.decode(data, final=not data)


class JsonEnds(BadInput):
    """A value of a JSON array cannot be parsed, so that it is not known where the next one starts."""


JSON_SPACE = re.compile(r"[ \t\r\n]*")


def bad_byte(text: str) -> str | None:
    """What is wrong with `text`, decoded with surrogateescape, if it was not UTF-8."""
    try:
        text.encode()
        return None
    except UnicodeEncodeError as error:
        return f"is not UTF-8 text (it holds byte 0x{ord(text[error.start]) - 0xDC00:02x})"


# -- csv --------------------------------------------------------------------------------------------------------------

def csv_rows(file: TextFile, row: int, byte: int, max_bytes: int, convert: Callable) -> Iterator[tuple]:
    """The rows below the header. Fields are separated by commas, tabs or semicolons, whichever the header has most of."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES)  # the default is 131,072; CsvLines holds a row to `max_bytes`
    with file.open() as opened:
        lines = CsvLines(opened, 0, max_bytes)
        try:
            line = next(lines, "").removeprefix("\ufeff")
            delimiter = "\t" if file.format == ".tsv" else max(",\t;", key=line.count)
            reader = csv.reader(itertools.chain([line], lines), delimiter=delimiter, strict=True)
            header = next((fields for fields in reader if fields), [])
        except csv.Error as error:
            yield Unreadable(f"{file.name}: its header cannot be read ({error})", 0), lines.byte
            return
    positions = {}  # of columns with the same name, that of the first
    for i, name in enumerate(header):
        positions.setdefault(name, i)
    with file.open_at(byte if row else lines.byte) as opened:
        lines = CsvLines(opened, byte if row else lines.byte, max_bytes)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            where, lines.row_bytes = f"{file.name}: row {row + 1}", 0
            try:
                if (fields := next(reader, None)) is None:
                    return
                value = convert(csv_record(fields, header, positions, where), where)
                del fields
            except LongRow:  # most likely a quote without an end, and what follows is no whole row
                yield Unreadable(f"{too_long(where, max_bytes)}, or lacks a quote, and ends the file", row), lines.byte
                return
            except csv.Error as error:
                value = Unreadable(f"{where} cannot be read ({error})", row)
            except BadInput as error:
                value = failed_row(error, row)
            row += 1
            yield value, lines.byte
            del value


class CsvLines:
    """The lines of a file as csv.reader takes them, which asks for no more than the row needs. byte: at which the next line
    starts. row_bytes: of the current row. Raises LongRow when it has more than `max_bytes`."""

    def __init__(self, opened: io.IOBase, byte: int, max_bytes: int):
        self.opened, self.byte, self.max_bytes, self.row_bytes = opened, byte, max_bytes, 0

    def __iter__(self) -> "CsvLines":
        return self

    def __next__(self) -> str:
        if not (line := self.opened.readline(self.max_bytes)):
            raise StopIteration
        self.byte += len(line)
        self.row_bytes += len(line)
        if self.row_bytes >= self.max_bytes:
            raise LongRow("a row is too long")
        return line.decode("utf-8", "surrogateescape")


class LongRow(csv.Error):
    """A row does not end."""


def csv_record(fields: list[str], header: list[str], positions: dict[str, int], where: str) -> dict | None:
    """None for a blank line. Raises BadInput starting with `where`."""
    if not fields:
        return None
    if len(fields) != len(header):
        raise BadInput(f"{where} has {len(fields)} fields, the header {len(header)}")
    if failure := bad_byte("".join(fields)):
        raise BadInput(f"{where} {failure}")
    return {name: fields[i] for name, i in positions.items()}


# -- txt --------------------------------------------------------------------------------------------------------------

def read_txt(file: TextFile, row: int, byte: int, text_column: str) -> Iterator[RowBatch | Unreadable]:
    """The file in pieces that, joined, are the file."""
    yield from batch_rows(txt_rows(file, row, byte), file, row, byte)


def txt_rows(file: TextFile, row: int, byte: int) -> Iterator[tuple]:
    with file.open_at(byte) as opened:
        for number, piece in enumerate(txt_pieces(opened), row):
            try:
                piece.decode()
                value = piece.removeprefix(b"\xef\xbb\xbf") if number == 0 else piece  # a byte order mark is not text
            except UnicodeDecodeError as error:
                value = Unreadable(f"{file.name}: not UTF-8 text (it holds byte 0x{piece[error.start]:02x} at "
                                   f"{byte + error.start:,})", number)
            byte += len(piece)
            yield value, byte


def txt_pieces(opened: io.IOBase) -> Iterator[bytes]:
    lines, n_bytes, half_character = [], 0, b""
    while line := half_character + opened.readline(TXT_MAX_BYTES - len(half_character)):
        half_character = b""
        if len(line) == TXT_MAX_BYTES and line[-1:] != b"\n":  # do not cut a character
            tail = next((i for i in range(1, 5) if line[-i] & 0xC0 != 0x80), 1)  # bytes of the last character
            if line[-tail] & 0x80:
                line, half_character = line[:-tail], line[-tail:]
        lines.append(line)
        n_bytes += len(line)
        if (n_bytes >= TXT_DOCUMENT_BYTES and not line.strip()) or n_bytes >= TXT_MAX_BYTES - 4:
            yield b"".join(lines)
            lines, n_bytes = [], 0
    if lines:
        yield b"".join(lines)


# -- parquet ----------------------------------------------------------------------------------------------------------

def read_parquet(file: TextFile, row: int, byte: int, text_column: str) -> Iterator[RowBatch | Unreadable]:
    with file.open() as opened:
        for found in text_batches(opened, file.name, row, text_column):
            if isinstance(found, Unreadable):
                yield found
                continue
            first, documents, n_rows = found
            del found
            yield RowBatch(documents, first, 0, first / n_rows)
            del documents  # before the next ones are read


def parquet_records(file: TextFile) -> Iterator[tuple[str, dict] | Unreadable]:
    with file.open() as opened:
        yield from record_batches(opened, file.name)


ROW_READERS = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows}
# (file, row, byte, text_column) -> the rows from `row` on, which starts at `byte`, and Unreadable for what cannot be read
READERS = ({".parquet": read_parquet} | dict.fromkeys(TEXT_FORMATS, read_txt)
           | {ending: text_rows(rows) for ending, rows in ROW_READERS.items()})
# file -> (where, record) of every row, and Unreadable for what cannot be read
RECORD_READERS = {".parquet": parquet_records} | {ending: record_rows(rows) for ending, rows in ROW_READERS.items()}
