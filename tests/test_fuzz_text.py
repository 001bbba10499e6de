"""Damaged files of every format of text, damaged shards and manifests, and folders of anything: no traceback, no hang."""
import contextlib
import gzip
import json
import os
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import FUZZ, damaged_bytes, damaged_json, ends_well, fuzz, json_values, time_limit
from hypothesis import strategies as st
from test_sources import assert_resumes_everywhere
from test_text_forms import FORMS, compress, json_lines

import download_data
from runtime.config import BadInput
from tasks.rows import local_splits, read_dataset
from text import formats
from text.sources import SourceConfig, open_source


def parquet_bytes(table: pyarrow.Table, **options) -> bytes:
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, file, row_group_size=20, **options)
    return file.getvalue().to_pybytes()


TABLE = pyarrow.Table.from_pylist([{"id": n, "text": f"row {n} ä", "a": {"b": [n, None], "c": "x" * n}} for n in range(50)])
FILES = {name: FORMS[name] for name in ("lines.jsonl", "array.json", "pretty.json", "objects.json", "a.csv")} | {
    "a.txt": "Wörter\n\n".encode() * 20, "a.jsonl.gz": gzip.compress(json_lines(), mtime=0),
    "a.csv.zst": compress(FORMS["a.csv"], ".zst"), "a.parquet": parquet_bytes(TABLE),
    "plain.parquet": parquet_bytes(TABLE, compression="NONE", use_dictionary=False, write_page_checksum=True)}


def read_every_way(path, text_column="text"):
    """Reads documents and rows, raising and skipping; reading resumes anywhere. Only BadInput may be raised."""
    for read in (lambda: list(open_source(SourceConfig(dataset=str(path), text_column=text_column)).documents()),
                 lambda: list(read_dataset(str(path), None, "train")),
                 lambda: list(read_dataset(str(path), None, "train", [])),
                 lambda: assert_resumes_everywhere(open_source(SourceConfig(
                     dataset=str(path), text_column=text_column, skip_errors=True)))):
        # pyarrow may take seconds for a file with a damaged header of a page; the last one reads it from 50 places
        with time_limit(200), contextlib.suppress(BadInput):
            read()


@FUZZ
@pytest.mark.parametrize("name", FILES)
def test_damaged_files(tmp_path, monkeypatch, n, name):
    monkeypatch.setattr(formats, "CHUNK_BYTES", 50)
    monkeypatch.setattr(formats, "TXT_DOCUMENT_BYTES", 20)
    check = lambda data: ((tmp_path / name).write_bytes(data), read_every_way(tmp_path / name))
    fuzz(n, check, data=damaged_bytes(FILES[name]))


@pytest.mark.integration
def test_a_flipped_bit_in_the_metadata_of_parquet(tmp_path):
    """pyarrow 26 aborts the process when it is asked for the metadata of a column whose histograms have another length."""
    data = FILES["plain.parquet"]
    for at in range(len(data) - 2000, len(data)):
        (tmp_path / "a.parquet").write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1:])
        for read in (lambda: list(open_source(SourceConfig(dataset=str(tmp_path))).documents()),
                     lambda: list(read_dataset(str(tmp_path), None, "train"))):
            with contextlib.suppress(BadInput):
                read()


@FUZZ
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_rows_of_any_values(tmp_path, n, name):
    """A column holds whatever JSON can."""
    def check(values, column):
        rows = [{"text": value, "data": {"text": value}} for value in values]
        with contextlib.suppress(pyarrow.ArrowException, OverflowError, ValueError):  # what pyarrow cannot write, and json
            if name == "a.parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
            else:
                (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
        if (tmp_path / name).exists():
            read_every_way(tmp_path / name, column)
    columns = st.sampled_from(["text", "data.text", "data", ".", ""])
    fuzz(n, check, values=st.lists(json_values(), max_size=4), column=columns)


NAMES = ["a.jsonl", "b.json", "c.csv", "d.txt", "e.txt.gz", "test.jsonl", "val", "train", ".hidden", "LICENSE",
         "manifest.json", "tokenizer.json", "x", "y", "\udcff.jsonl", "zwei Wörter.jsonl", "f.parquet"]


@FUZZ
def test_folders_of_anything(tmp_path, n):
    """Files, folders and links that lead anywhere, pipes among them."""
    def check(entries):
        root = tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for parts, kind, target in entries:
            path = root.joinpath(*parts)
            if path.exists():  # perhaps a pipe, or a link to one
                continue
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "link":
                    path.symlink_to(os.path.join(*[".."] * len(parts), "root", *target))
                elif kind == "hard link":
                    os.link(root.joinpath(*target), path)
                elif kind == "pipe":
                    os.mkfifo(path)
                else:
                    path.write_bytes(gzip.compress(json_lines()) if path.suffix == ".gz" else json_lines())
        read_every_way(root)
        with contextlib.suppress(BadInput):
            local_splits(str(root))
    names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)
    kinds = st.sampled_from(["file"] * 6 + ["link", "link", "hard link", "pipe"])
    fuzz(n, check, entries=st.lists(st.tuples(names, kinds, names), max_size=8))


@pytest.fixture
def data(data_path, tmp_path):
    return shutil.copytree(data_path, tmp_path / "data")


@FUZZ
@pytest.mark.parametrize("name", ["train_000001.npy", "val_000000.npy"])
def test_damaged_shards(data, n, name):
    original = (data / name).read_bytes()

    def check(damaged):
        (data / name).write_bytes(damaged)
        code = ends_well(download_data.main, [f"--data_path={data}", "--verify"], keep=[data])
        assert code == 2 or damaged == original or damaged[128:] == original[128:]  # a header that says the same
    fuzz(n, check, damaged=damaged_bytes(original[:200]).map(lambda start: start + original[200:]) | damaged_bytes(original))


@FUZZ
@pytest.mark.parametrize("is_complete", [True, False])
def test_damaged_manifests(data, n, is_complete):
    """Resuming and checking what is left of a manifest never calls other shards complete."""
    path = data / "manifest.json"
    values = json.loads(path.read_text()) | {"complete": is_complete}
    if not is_complete:
        values |= {"place": {"at": {"file": 3, "row": 0, "byte": 0}, "skip": 1}}
    flags = [f"--dataset={values['source']['dataset']}", f"--data_path={data}", "--vocab_size=512", "--val_bytes=8000",
             "--shard_size_threshold=9000", "--tokens_threshold=40000"]

    def check(damaged):
        path.write_bytes(damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode())
        ends_well(download_data.main, [f"--data_path={data}", "--verify"], keep=[data])
        code = ends_well(download_data.main, flags, keep=[data] if not is_complete else [])
        assert is_complete or code == 2
    fuzz(n, check, damaged=damaged_json(values) | damaged_bytes(json.dumps(values).encode()))
