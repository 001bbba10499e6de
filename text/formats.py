"""Text files, parquet, jsonl and txt, read from any row on, about a megabyte at a time.

A row is a row of a parquet file, a line of a jsonl file, or one of the pieces that a txt file is cut into.
"""
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from runtime.config import BadInput
from text.documents import PackedDocuments, concat, from_strings, from_utf8, utf8

CHUNK_BYTES = 1 << 20  # of text are read, encoded and handed on at a time
# A txt file is cut at the first blank line after so many bytes, or, where there are no blank lines, at the first line end
# after LINES_LENGTH, or there where no line ends.
TXT_LENGTH, LINES_LENGTH = 16_384, 1 << 20
# A document is held in memory several times over; with one emoji in it, each character of a str takes four bytes.
MAX_DOCUMENT_BYTES = 100_000_000


@dataclass(frozen=True)
class Chunk:
    """Documents that follow each other in a source, and where they stand in it.

    at: a JSON value from which the source reads them again; skip: how many documents after `at` come before these.
    skipped: a line for each row group, row or file between the chunk before and this that could not be read and was left
    out (--skip_errors).
    fraction: how much of the source comes before `at`, about; None where that is not known.
    """
    texts: PackedDocuments
    at: object
    skip: int = 0
    skipped: tuple[str, ...] = ()
    fraction: float | None = None

    def place(self, n: int) -> dict:
        """Where the document after the first n of these stands."""
        return {"at": self.at, "skip": self.skip + n}

    def without(self, n: int) -> "Chunk":
        """The chunk after its first n documents."""
        return replace(self, texts=self.texts.part(n, len(self.texts)), skip=self.skip + n)


def chunks_from(read: Callable[[object], Iterator[Chunk]], place: dict | None) -> Iterator[Chunk]:
    """The chunks of `read`, a function of `at`, without the documents before `place`."""
    place = place or {"at": None, "skip": 0}
    skip = place["skip"]
    for chunk in read(place["at"]):
        if skip == 0 or skip < len(chunk.texts):
            yield chunk.without(skip)
        skip = max(0, skip - len(chunk.texts))


class Unreadable(BadInput):
    """Part of a file that `--skip_errors` leaves out. row: the first one in it."""

    def __init__(self, message: str, row: int = 0):
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class TextFile:
    """A file of text. name: for messages. open: gives it as a binary file."""
    name: str
    size: int
    open: Callable[[], io.IOBase]

    def read(self, row: int, byte: int, text_column: str) -> Iterator:
        """See READERS. Raises OSError naming the file when a local disk fails."""
        try:
            yield from READERS["." + self.name.rsplit(".", 1)[-1].lower()](self, row, byte, text_column)
        except OSError as error:
            if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
                raise
            raise OSError(f"{self.name}: cannot be read ({error.strerror})") from None


def read_files(files: list[TextFile], text_column: str, at: dict | None, skip_errors: bool, nth: tuple[int, int]
               ) -> Iterator[Chunk]:
    """The documents of `files` from `at` on; empty ones are none. nth: (k, n) takes of every n rows the k-th.

    Raises BadInput naming the file and what in it cannot be read; with `skip_errors` it is left out instead.
    """
    first_file, row, byte = (at["file"], at["row"], at["byte"]) if at else (0, 0, 0)
    before = np.cumsum([0, *(file.size for file in files)]).tolist()
    parts, size, skipped, at, fraction = [], 0, [], None, 0.0  # of the chunk under way, which may span small files
    for number, file in list(enumerate(files))[first_file:]:
        for found in file.read(row, byte, text_column):
            if isinstance(found, Unreadable):
                if found.row % nth[1] != nth[0]:
                    continue  # another part's to tell
                if not skip_errors:
                    raise BadInput(f"{found}: --skip_errors=1 leaves it out")
                if parts:
                    yield from divided(Chunk(concat(parts), at, 0, tuple(skipped), fraction))
                    parts, size, skipped = [], 0, []
                skipped.append(str(found))
                continue
            texts, first, first_byte, part_read = found
            lengths = np.diff(texts.offsets)
            chosen = (lengths > 0) & ((first + np.arange(len(lengths))) % nth[1] == nth[0])
            if not chosen.any():
                continue
            if not parts:
                at = {"file": number, "row": first, "byte": first_byte}
                fraction = (before[number] + part_read * file.size) / max(before[-1], 1)
            parts.append(texts.chosen(chosen))
            size += len(parts[-1].utf8)
            del texts, found
            if size >= CHUNK_BYTES:
                chunk, parts = Chunk(concat(parts), at, 0, tuple(skipped), fraction), []
                yield from divided(chunk)
                size, skipped = 0, []
                del chunk  # before the next is made
        row = byte = 0
    if parts:
        yield from divided(Chunk(concat(parts), at, 0, tuple(skipped), fraction))
    elif skipped:
        yield Chunk(from_utf8([]), {"file": len(files), "row": 0, "byte": 0}, 0, tuple(skipped))


def divided(chunk: Chunk) -> Iterator[Chunk]:
    """The chunk in parts of CHUNK_BYTES or so, or of one document."""
    start = 0
    while start < len(chunk.texts):
        offsets = chunk.texts.offsets
        stop = int(np.searchsorted(offsets, min(offsets[start] + CHUNK_BYTES, offsets[-1])))
        yield replace(chunk, texts=chunk.texts.part(start, stop), skip=chunk.skip + start,
                      skipped=() if start else chunk.skipped)
        start = stop


def split_files(files: list, part: tuple[int, int]) -> tuple[list, tuple[int, int]]:
    """The k-th of n disjoint parts, as `read_files` takes it: an n-th of the files, or, where they are fewer than n, of the
    rows of all of them. part: (k, n)."""
    if part[1] == 1 or len(files) < part[1]:
        return files, part
    from datasets import Dataset
    from datasets.distributed import split_dataset_by_node
    places = Dataset.from_dict({"place": list(range(len(files)))})
    return [files[i] for i in split_dataset_by_node(places, *part)["place"]], (0, 1)


def read_parquet(file: TextFile, row: int, byte: int, text_column: str) -> Iterator:
    import pyarrow.parquet
    with file.open() as opened:
        try:
            # buffer_size without pre_buffer reads a column in pieces: a row group may be larger than the memory
            parquet = pyarrow.parquet.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False,
                                                  page_checksum_verification=True)
        except Exception as error:
            yield unreadable(error, f"{file.name}: not a readable parquet file", 0)
            return
        require_column(text_column, parquet.schema_arrow.names, file.name)
        first = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if first + rows > row:
                yield from read_row_group(parquet, group, first, row, text_column, file.name)
            first += rows


def read_row_group(parquet, group: int, first: int, row: int, text_column: str, name: str) -> Iterator:
    """The rows of a row group from `row` on. first: where the row group begins."""
    batches = parquet.iter_batches(rows_at_once(parquet.metadata.row_group(group), text_column), row_groups=[group],
                                   columns=[text_column], use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            yield unreadable(error, f"{name}: row group {group} of {parquet.num_row_groups} cannot be read from row {first} "
                                    f"on", first)
            return
        if batch is None:
            return
        skip = min(max(row - first, 0), len(batch))
        texts, at = arrow_texts(batch.column(0).slice(skip), text_column, name), first + skip
        first += len(batch)
        del batch
        long = np.flatnonzero(np.diff(texts.offsets) > MAX_DOCUMENT_BYTES).tolist()
        for start, stop in zip([-1, *long], [*long, len(texts)]):
            if start >= 0:
                yield Unreadable(f"{name}: row {at + start} is longer than {MAX_DOCUMENT_BYTES / 1e6:.0f} MB", at + start)
            if start + 1 < stop:
                yield texts.part(start + 1, stop), at + start + 1, 0, (at + start + 1) / parquet.metadata.num_rows
        del texts  # before the next are made


def rows_at_once(group, text_column: str) -> int:
    """So few that also where some are much longer than others, or repeat and take no room in the file, they fit into
    memory."""
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == text_column:
            return max(1, min(128, CHUNK_BYTES * group.num_rows // max(1, column.total_uncompressed_size)))
    return 1


def unreadable(error: Exception, what: str, row: int) -> Unreadable:
    """What an error of pyarrow means that bytes of the file are the cause of. Raises `error` if they are not."""
    import pyarrow
    if isinstance(error, MemoryError) or not (isinstance(error, pyarrow.ArrowException) or (
            type(error) is OSError and error.errno is None)):
        raise error
    return Unreadable(f"{what} ({' '.join(str(error).split())[:200]})", row)


def arrow_texts(column, text_column: str, where: str) -> PackedDocuments:
    """A column of pyarrow as texts, missing ones empty. Raises BadInput if it does not hold strings."""
    import pyarrow
    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
            or pyarrow.types.is_null(kind)):
        raise BadInput(f"--text_column={text_column}: {where} holds {kind}, not text")
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        column = column.cast(pyarrow.large_string())
    if column.null_count:
        column = column.fill_null("")
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:  # not UTF-8
        return from_strings(column.cast(pyarrow.large_binary()).to_pylist())
    _, offsets, data = column.buffers()
    offsets = np.frombuffer(offsets, np.int64 if pyarrow.types.is_large_string(column.type) else np.int32)
    offsets = offsets[column.offset:column.offset + len(column) + 1].astype(np.int64)
    return PackedDocuments(np.frombuffer(data or b"", np.uint8)[offsets[0]:offsets[-1]], offsets - offsets[0])


def read_jsonl(file: TextFile, row: int, byte: int, text_column: str) -> Iterator:
    with file.open() as opened:
        opened.seek(byte)
        yield from in_chunks(jsonl_rows(opened, file.name, row, byte, text_column), file, row, byte)


def jsonl_rows(opened: io.IOBase, name: str, row: int, byte: int, text_column: str) -> Iterator[tuple]:
    """See `in_chunks`. A long line is let go before what comes of it is used."""
    while line := opened.readline(MAX_DOCUMENT_BYTES):
        row, byte = row + 1, byte + len(line)
        try:
            found = utf8(text_in_line(line, text_column, f"{name}: line {row}"))
        except BadInput as error:
            if row == 1 and str(error).startswith("--text_column"):
                raise  # all lines will lack it
            found = Unreadable(str(error), row - 1)
            while len(line) == MAX_DOCUMENT_BYTES and line[-1:] != b"\n":  # the rest of a long line
                line = opened.readline(MAX_DOCUMENT_BYTES)
                byte += len(line)
        del line
        yield found, byte
        del found


def in_chunks(rows: Iterator[tuple], file: TextFile, row: int, byte: int) -> Iterator:
    """What a reader yields. rows: of each, its text or why it is Unreadable, and the byte where the next begins."""
    parts, begins, size = [], (row, byte), 0
    for found, after in rows:
        failure = found if isinstance(found, Unreadable) else None
        if failure is None:
            parts.append(found)
        del found
        row, byte, size = row + 1, after, size + after - byte
        if parts and (size >= CHUNK_BYTES or failure):
            texts, parts = from_utf8(parts), []
            yield texts, *begins, begins[1] / max(1, file.size)
            del texts
        if failure:
            yield failure
        if not parts:
            begins, size = (row, byte), 0
    if parts:
        yield from_utf8(parts), *begins, begins[1] / max(1, file.size)


def text_in_line(line: bytes, text_column: str, where: str) -> str:
    """The text of a line of JSON; of a blank line, none. Raises BadInput."""
    if not line.strip():
        return ""
    if len(line) >= MAX_DOCUMENT_BYTES:
        raise BadInput(f"{where} is longer than {MAX_DOCUMENT_BYTES / 1e6:.0f} MB")
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 text (it holds byte 0x{error.object[error.start]:02x})") from None
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, or brackets 100,000 deep
        raise BadInput(f"{where} is not JSON that can be read ({getattr(error, 'msg', error)})") from None
    if not isinstance(found, dict):
        raise BadInput(f"{where} is not a JSON object")
    require_column(text_column, list(found), where)
    return require_text(found[text_column], text_column, where)


def read_txt(file: TextFile, row: int, byte: int, text_column: str) -> Iterator:
    """The file in pieces; joined they are the file."""
    with file.open() as opened:
        opened.seek(byte)
        yield from in_chunks(txt_rows(opened, file.name, row, byte), file, row, byte)


def txt_rows(opened: io.IOBase, name: str, row: int, byte: int) -> Iterator[tuple]:
    for number, piece in enumerate(txt_pieces(opened), row):
        try:
            piece.decode()
            found = piece.removeprefix(b"\xef\xbb\xbf") if number == 0 else piece  # a byte order mark is no text
        except UnicodeDecodeError as error:
            found = Unreadable(f"{name}: not UTF-8 text (it holds byte 0x{piece[error.start]:02x} at "
                               f"{byte + error.start:,})", number)
        byte += len(piece)
        yield found, byte


def txt_pieces(opened: io.IOBase) -> Iterator[bytes]:
    lines, length = [], 0
    while line := opened.readline(LINES_LENGTH):
        if len(line) == LINES_LENGTH and line[-1:] != b"\n":  # do not cut a character
            more = next((i for i in range(1, 5) if line[-i] & 0xC0 != 0x80), 1)  # bytes of the last one
            if line[-more] & 0x80:
                opened.seek(-more, io.SEEK_CUR)
                line = line[:-more]
        lines.append(line)
        length += len(line)
        if (length >= TXT_LENGTH and not line.strip()) or length >= LINES_LENGTH - 4:
            yield b"".join(lines)
            lines, length = [], 0
    if lines:
        yield b"".join(lines)


# Each reads a TextFile from a row, at a byte, on. It yields texts, rows one after the other with empty ones among them; the
# row and byte where they begin; and the part of the file before them, 0 to 1. Where it cannot read, it yields Unreadable.
READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}


def require_column(text_column: str, columns: Iterable[str], where: str):
    if text_column not in columns:
        raise BadInput(f"--text_column={text_column}: no such column in {where}, which has {', '.join(columns) or 'none'}")


def require_text(text, text_column: str, where: str) -> str:
    """`text` if it is a str; a missing value is an empty document."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadInput(f"--text_column={text_column}: {where} holds {type(text).__name__}, not text")
    return text
