"""Reads parquet files a few rows at a time, whatever their row groups claim to be.

    for found in read_batches(opened, "a.parquet", 0, "text", convert): ...
"""
import io
from collections.abc import Callable, Iterator

import numpy as np

from text.columns import MAX_DOCUMENT_BYTES, MAX_RECORD_BYTES, Unreadable, WrongColumn, column_value, find_column
from text.documents import PackedDocuments

BATCH_BYTES = 1 << 20        # of text, or of rows, that are read at a time, if a row group's rows are of equal length
MAX_ROWS = 128               # where they may not be
REPEATED_BYTES = 1 << 28     # that a batch may take if a value is stored once and used by all of its rows
# A row group whose columns unpack to so many bytes, and to so many times what they take in the file, is no data.
BOMB_BYTES, BOMB_RATIO = 1 << 29, 200
MANY_VALUES = 10_000_000     # in lists of a row group: they take memory even where the file stores a bit for each


def read_batches(opened: io.IOBase, name: str, start_row: int, text_column: str | None, convert: Callable) -> Iterator:
    """Yields (first row, convert(batch), rows in the file) for the record batches from `start_row` on, or Unreadable for a
    damaged file or row group. text_column: read this column only; raises WrongColumn if there is none."""
    import pyarrow.parquet
    opened = GuardedFile(opened)
    try:
        # buffer_size without pre_buffer reads a column in pieces: a row group may be larger than the memory
        parquet = pyarrow.parquet.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False,
                                              page_checksum_verification=True)
        schema = parquet.schema_arrow
    except Exception as error:
        yield as_unreadable(error, f"{name}: not a readable parquet file", 0)
        return
    columns = None
    if text_column is not None:
        column_value(nested_columns(schema), text_column, name)  # raises if there is none
        columns = [".".join(find_column(nested_columns(schema), text_column))]
    first = 0
    for group in range(parquet.num_row_groups):
        n_rows = parquet.metadata.row_group(group).num_rows
        if first + n_rows > start_row:
            yield from row_group_batches(parquet, opened, group, first, start_row, columns, convert, name)
        first += n_rows


class GuardedFile:
    """An opened file that can refuse to be read."""

    def __init__(self, opened: io.IOBase):
        self.opened, self.is_closed_to_reads = opened, False

    def __getattr__(self, name: str):
        return getattr(self.opened, name)

    def read(self, n: int = -1) -> bytes:
        if self.is_closed_to_reads:
            raise ReadRefused
        return self.opened.read(n)


class ReadRefused(Exception):
    """A GuardedFile was read while it refuses that."""


def check_columns(parquet, opened: GuardedFile, group: int, columns: list[str] | None):
    """Raises pyarrow's exception for damaged metadata of the columns of a row group.

    Asking for that metadata itself would abort the process: where pyarrow hands it to Python, it does not catch what Parquet
    throws. Where it begins to read it does; and it checks all columns before it reads the first of them.
    """
    opened.is_closed_to_reads = True
    try:
        next(parquet.iter_batches(1, row_groups=[group], columns=columns, use_threads=False), None)
    except ReadRefused:
        pass
    finally:
        opened.is_closed_to_reads = False


def row_group_batches(parquet, opened: GuardedFile, group: int, first: int, start_row: int, columns: list[str] | None,
                      convert: Callable, name: str) -> Iterator:
    """As `read_batches`, for one row group, which starts at row `first`."""
    of_group = f"{name}: row group {group} of {parquet.num_row_groups}"
    try:
        check_columns(parquet, opened, group, columns)
        n_rows = rows_per_batch(parquet, opened, group, columns)
        if n_rows == 0:
            yield Unreadable(f"{of_group} unpacks to more than fits into memory", first)
            return
        batches = parquet.iter_batches(n_rows, row_groups=[group], columns=columns, use_threads=False)
    except Exception as error:
        yield as_unreadable(error, f"{of_group} cannot be read", first)
        return
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            n_before = min(max(start_row - first, 0), len(batch))
            values, at = convert(batch.slice(n_before)), first + n_before
        except Exception as error:
            yield as_unreadable(error, f"{of_group} cannot be read from row {first} on", first)
            return
        first += len(batch)
        del batch
        yield at, values, parquet.metadata.num_rows
        del values  # before the next ones are read


def rows_per_batch(parquet, opened: io.IOBase, group: int, columns: list[str] | None) -> int:
    """Few enough rows to fit into memory even if some are much longer than others, compress to almost nothing, or repeat one
    long value; 0 if no number is. columns: as read_batches reads them, None for all."""
    row_group, n_bytes, repeated_bytes, packed_bytes = parquet.metadata.row_group(group), 0, 0, 0
    for i in range(row_group.num_columns):
        path = parquet.schema.column(i).path
        if columns is None or any(path == name or path.startswith(name + ".") for name in columns):
            column = row_group.column(i)
            n_bytes += column.total_uncompressed_size
            packed_bytes += column.total_compressed_size
            repeated_bytes += longest_repeated_value(opened, column)
            if parquet.schema.column(i).max_repetition_level and column.num_values > max(
                    MANY_VALUES, 8 * column.total_uncompressed_size):
                return 0
    if n_bytes > max(BOMB_BYTES, BOMB_RATIO * packed_bytes) or n_bytes > 5 * MAX_DOCUMENT_BYTES * row_group.num_rows:
        return 0
    n = BATCH_BYTES * row_group.num_rows // max(1, n_bytes)
    if n_bytes > 16 * BATCH_BYTES:
        n = min(n, MAX_ROWS)
    return max(1, min(n, 65_536, REPEATED_BYTES // max(1, repeated_bytes)))


def longest_repeated_value(opened: io.IOBase, column) -> int:
    """At most how many bytes a row may take although the file stores them once for several rows."""
    if "DELTA_BYTE_ARRAY" in column.encodings:
        return column.total_uncompressed_size
    if column.dictionary_page_offset is None:
        return 0
    # The dictionary's page starts with a header of Thrift's compact protocol, whose second field is its size unpacked.
    position = opened.tell()
    opened.seek(column.dictionary_page_offset)
    header = opened.read(8)
    opened.seek(position)
    if header[:3] != b"\x15\x04\x15":  # page type: a dictionary; then a number
        return column.total_uncompressed_size
    size = 0
    for shift, byte in enumerate(header[3:]):
        size |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            break
    return size >> 1  # numbers are stored with their sign in the last bit


def as_unreadable(error: Exception, message: str, row: int) -> Unreadable:
    """`error`, of pyarrow, as Unreadable if the file's bytes are its cause. Raises `error` if they are not."""
    import pyarrow
    if isinstance(error, pyarrow.ArrowException) or type(error) in (ValueError, OverflowError, UnicodeDecodeError) or (
            type(error) is OSError and error.errno is None):
        return Unreadable(f"{message} ({' '.join(str(error).split())[:200]})", row)
    raise error


def nested_columns(fields) -> dict:
    """Name -> None, or for a struct its columns, of a pyarrow schema or struct type."""
    import pyarrow
    return {field.name: nested_columns(field.type) if pyarrow.types.is_struct(field.type) else False for field in fields}


# -- text -------------------------------------------------------------------------------------------------------------

def text_batches(opened: io.IOBase, name: str, row: int, text_column: str) -> Iterator:
    """Yields (first row, documents, rows in the file) from `row` on, or Unreadable for a row group or row."""
    convert = lambda batch: column_documents(text_array(batch, text_column), text_column, name)
    for found in read_batches(opened, name, row, text_column, convert):
        if isinstance(found, Unreadable):
            yield found
            continue
        first, (documents, failures), n_rows = found
        del found
        for number in np.flatnonzero(np.diff(documents.offsets) > MAX_DOCUMENT_BYTES).tolist():
            failures[number] = f"is longer than {MAX_DOCUMENT_BYTES / 1e6:.0f} MB"
        bad = sorted(failures)
        for before, stop in zip([-1, *bad], [*bad, len(documents)]):
            if before >= 0:
                yield Unreadable(f"{name}: row {first + before} {failures[before]}", first + before)
            if before + 1 < stop:
                yield first + before + 1, documents.slice(before + 1, stop), n_rows
        del documents  # before the next ones are read


def text_array(batch, text_column: str):
    """The column of a record batch that was read for `text_column`."""
    path = find_column(nested_columns(batch.schema), text_column)
    column = batch.column(batch.schema.names.index(path[0]))
    if path[1:]:
        import pyarrow.compute  # 0.05 s to import
        column = pyarrow.compute.struct_field(column, list(path[1:]))
    return column


def column_documents(column, text_column: str, where: str) -> tuple[PackedDocuments, dict[int, str]]:
    """A pyarrow array of strings, or of UTF-8 in binary values, as documents; nulls become empty ones. Also number ->
    message of the binary values that are not UTF-8. Raises WrongColumn if the column holds something else."""
    import pyarrow
    types = pyarrow.types
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    is_binary = (types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
                 or types.is_fixed_size_binary(kind))
    if not (is_binary or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
            or types.is_null(kind)):
        raise WrongColumn(f"--text_column={text_column}: {where} holds {kind}, not text")
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_binary:
        column = column.cast(pyarrow.large_binary()).cast(pyarrow.large_string(), safe=False)
    elif not (types.is_string(column.type) or types.is_large_string(column.type)):
        column = column.cast(pyarrow.large_string())
    if column.null_count:
        column = column.fill_null("")
    failures = {}
    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:  # not UTF-8
        values = column.cast(pyarrow.large_binary()).to_pylist()
        if is_binary:
            failures = {number: f"of the column {text_column} is not UTF-8 text" for number, value in enumerate(values)
                        if not is_utf8(value)}
        return PackedDocuments.from_strings(values), failures
    _, offsets, data = column.buffers()
    offsets = np.frombuffer(offsets, np.int64 if types.is_large_string(column.type) else np.int32)
    offsets = offsets[column.offset:column.offset + len(column) + 1].astype(np.int64)
    return PackedDocuments(np.frombuffer(data or b"", np.uint8)[offsets[0]:offsets[-1]], offsets - offsets[0]), failures


def is_utf8(value: bytes) -> bool:
    try:
        value.decode()
        return True
    except UnicodeDecodeError:
        return False


# -- whole rows -------------------------------------------------------------------------------------------------------

def record_batches(opened: io.IOBase, name: str) -> Iterator[tuple[str, dict] | Unreadable]:
    """Yields (where, record) for every row, or Unreadable for a row group or row."""
    for found in read_batches(opened, name, 0, None, lambda batch: batch):
        if isinstance(found, Unreadable):
            yield found
            continue
        first, batch, _ = found
        records = to_records(batch)
        for i in range(len(batch)):
            where = f"{name}: row {first + i + 1}"
            one = records[i:i + 1] if records else to_records(batch.slice(i, 1))
            if one:
                yield where, one[0]
            elif batch.slice(i, 1).nbytes > MAX_RECORD_BYTES:
                yield Unreadable(f"{where} is longer than {MAX_RECORD_BYTES / 1e6:.0f} MB", first + i)
            else:
                yield Unreadable(f"{where} holds what is no text, number or list", first + i)


def to_records(batch) -> list[dict] | None:
    """The rows of a record batch; None if they take too much memory, or one of them cannot be a Python value: text that is
    not UTF-8, or a date beyond Python's."""
    if batch.nbytes > MAX_RECORD_BYTES:
        return None
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # also pyarrow's
        return None
