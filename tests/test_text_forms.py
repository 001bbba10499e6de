"""Every form that people's text comes in: formats, compression, columns within columns, folders, links, splits, bombs."""
import bz2
import csv
import gzip
import io
import json
import os
import shutil
import socket
import subprocess
import sys

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import time_limit
from test_download_data import contents, documents_in
from test_sources import assert_resumes_everywhere, messages, read, strings

import download_data
from conftest import REPO, stderr_lines
from runtime.config import BadInput
from shards import Manifest
from tasks.rows import local_splits, read_dataset
from text import columns, formats, parquet
from text.folders import find_data_files
from text.sources import SourceConfig, open_source

TEXTS = ["first text", "zweiter Text: ä", "第三, \"quoted\"", "four\nlines\n\nand; more\t", "", " five "]
DOCUMENTS = [text for text in TEXTS if text]
ROWS = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]


def json_lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_bytes(delimiter: str, rows=ROWS) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def compress(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    return pyarrow.compress(data, codec="zstd", asbytes=True) if ending == ".zst" else data


FORMS = {
    "lines.jsonl": json_lines(), "lines.json": json_lines(), "array.json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "array.jsonl": json.dumps(ROWS).encode(), "pretty.json": json.dumps(ROWS, indent=1).encode(),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(), "a.csv": csv_bytes(","),
    "semicolons.csv": csv_bytes(";"), "a.tsv": csv_bytes("\t"), "no_last_line_end.csv": csv_bytes(",").rstrip(b"\r\n")}


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("name", FORMS)
def test_rows_in_every_form(tmp_path, monkeypatch, name, ending):
    """They are the same documents, resume anywhere, and are the same rows."""
    path = tmp_path / (name + ending)
    path.write_bytes(compress(FORMS[name], ending.lower()))
    assert read(path) == DOCUMENTS
    monkeypatch.setattr(formats, "CHUNK_BYTES", 30)
    assert assert_resumes_everywhere(open_source(SourceConfig(dataset=str(path)))) == DOCUMENTS
    assert [row for _, row in read_dataset(str(path), None, "train")] == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_csv_is_what_pandas_reads(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name])
    frame = pandas.read_csv(tmp_path / name, sep="," if name == "a.csv" else "\t", dtype=str, keep_default_na=False)
    assert [row for _, row in read_dataset(str(tmp_path / name), None, "train")] == frame.to_dict("records")


@pytest.mark.parametrize("content, expected", [
    ('["one", "two"]', ["one", "two"]), ('{"text": "one"}', ["one"]), ('{\n "text": "one"\n}', ["one"]), ("[]\n", []),
    ('\n\n [\n{"text": "one"} ,\n\n{"text": "two"}\n]\n\n', ["one", "two"]), ('"one"\n"two"\n', ["one", "two"]),
    ('[{"text": "one"},]', ["one"]), ('{"text": null}\n{"text": "one"}', ["one"])])
def test_small_json(tmp_path, content, expected):
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "b.json").write_text('{"text": "last"}')
    assert read(tmp_path) == [*expected, "last"]


def test_a_long_txt_file_is_the_same_when_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "TXT_MAX_BYTES", 64)
    text = ("中🙂ä" * 100 + "\n\n") * 3
    for ending in ("", ".gz", ".zst"):
        path = tmp_path / f"a.txt{ending}"
        path.write_bytes(compress(text.encode(), ending))
        found = assert_resumes_everywhere(open_source(SourceConfig(dataset=str(path))))
        assert "".join(found) == text and len(found) > 30


@pytest.mark.parametrize("line_end", ["\n", " "])
def test_half_a_megabyte_without_blank_lines_is_several_documents(tmp_path, line_end):
    text = f"one sentence after another.{line_end}" * 20_000
    (tmp_path / "a.txt").write_text(text)
    found = list(open_source(SourceConfig(dataset=str(tmp_path / "a.txt"))).documents())
    assert len(found) > 5 and "".join(found) == text
    assert line_end == " " or all(document.endswith("\n") for document in found)


@pytest.mark.parametrize("name, content, words", [
    ("a.json", b'[{"text": "one"}, {bad]', "row 2 and what follows it cannot be parsed as JSON"),
    ("a.json", b'[{"text": "one"}, {"text": "tw', "row 2 and what follows it cannot be parsed as JSON"),
    ("a.json", b'[{"text": "one"}', "ends before its array does, after 1 rows"),
    ("a.json", b'[{"text": "one"}] [', "goes on after its array"),
    ("a.json", b'[{"text": "one"}, 7]', "row 2 is not a JSON object"),
    ("a.json", b'[{"text": "one"}, {"text": "b\xffad"}]', "row 2 is not UTF-8 text (it holds byte 0xff)"),
    ("a.json", b'[{"text": "one"}, ' + b"[" * 100_000, "row 2 and what follows it cannot be parsed"),
    ("a.csv", b"text\none\nb\xe9ad\n", "row 2 is not UTF-8 text (it holds byte 0xe9)"),
    ("a.csv", b'text\none\n"two\n', "row 2 cannot be read (unexpected end of data)"),
    ("a.csv", b'text\none\n"t"wo\n', "row 2 cannot be read"),
    ("a.csv", b"text\none\ntwo, three\n", "row 2 has 2 fields, the header 1"),
    ("a.jsonl.gz", gzip.compress(json_lines([{"text": "one"}]), mtime=0)[:-6], "cannot be unpacked (Compressed file ended"),
    ("a.jsonl.gz", b"no gzip", "cannot be unpacked (Not a gzipped file"),
    ("a.jsonl.zst", b"no Zstandard", "cannot be unpacked"),
    ("a.jsonl.zst", compress(json_lines(), ".zst")[:-9], "cannot be unpacked (Truncated")])
def test_what_cannot_be_read_is_named_and_can_be_skipped(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.jsonl").write_text('{"text": "last"}\n')
    with pytest.raises(BadInput) as error:
        read(tmp_path)
    assert words in str(error.value) and f"{name}: " in str(error.value) and "--skip_errors=1" in str(error.value)
    source = open_source(SourceConfig(dataset=str(tmp_path), skip_errors=True))
    chunks = list(source.chunks())
    assert strings(chunks)[-1] == "last" and set(strings(chunks)[:-1]) <= {"one"} and words in messages(chunks)[0]
    assert_resumes_everywhere(source)
    with pytest.raises(BadInput, match="--skip_errors=1"):
        list(read_dataset(str(tmp_path), None, "train"))
    skipped = []
    assert list(read_dataset(str(tmp_path), None, "train", skipped))[-1][1] == {"text": "last"}
    assert len(skipped) == 1 and words in skipped[0]


def test_gzip_of_several_members(tmp_path):
    """As `cat a.gz b.gz` writes, and parallel compressors."""
    for ending in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(compress(json_lines(ROWS[:2]), ending) + compress(json_lines(ROWS[2:]), ending))
        assert read(path) == DOCUMENTS


# -- columns ----------------------------------------------------------------------------------------------------------

NESTED = [{"data": {"text": "one", "n": 1}, "data.text": "literal"}, {"data": {"text": "two", "n": 2}, "data.text": "wins"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_column_within_a_column(tmp_path, name):
    def write(rows):
        if name == "a.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        else:
            (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else json_lines(rows).decode())
    write(NESTED)
    assert read(tmp_path, text_column="data.text") == ["literal", "wins"]
    write([{"data": row["data"]} for row in NESTED] + [{"data": None}, {"data": {"text": None, "n": 0}}])
    assert read(tmp_path, text_column="data.text") == ["one", "two"]
    write([{"a": {"b": {"c.d": "deep"}}}])
    assert read(tmp_path, text_column="a.b.c.d") == ["deep"]
    for column, words in (("a.b", "holds"), *((name, "no such column") for name in ("a.x", "a.b.c", "x.b"))):
        with pytest.raises(BadInput, match=f"--text_column={column}: .*{words}"):
            read(tmp_path, text_column=column)


@pytest.mark.parametrize("kind", [
    pyarrow.binary(), pyarrow.large_binary(), pyarrow.dictionary(pyarrow.int8(), pyarrow.binary()),
    pyarrow.dictionary(pyarrow.int8(), pyarrow.string())], ids=str)
def test_binary_columns_that_hold_text(tmp_path, kind):
    values = ["one", None, "ä", "one"] if "string" in str(kind) else [b"one", None, "ä".encode(), b"one"]
    value_type = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    write_parquet(tmp_path / "a.parquet", pyarrow.array(values, value_type).cast(kind))
    assert read(tmp_path) == ["one", "ä", "one"]


def test_binary_columns_that_do_not_hold_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"one", b"\x89PNG", b"two"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="a.parquet: row 1 of the column text is not UTF-8 text: --skip_errors=1"):
        read(tmp_path)
    assert_resumes_everywhere(source := open_source(SourceConfig(dataset=str(tmp_path), skip_errors=True)))
    assert list(source.documents()) == ["one", "two"]


def test_a_list_of_columns_in_a_message_is_short(tmp_path):
    """A csv without a header has its first document as the name of its column."""
    (tmp_path / "a.csv").write_text("word " * 10_000 + "\none\n")
    with pytest.raises(BadInput, match="no such column") as error:
        read(tmp_path)
    assert len(str(error.value)) < 500


# -- folders ----------------------------------------------------------------------------------------------------------

def write_lines(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_lines([{"text": text} for text in texts]))
    return path


def test_hidden_files_are_no_data(tmp_path):
    for name in ("b.jsonl", ".a.jsonl", "._b.jsonl", ".ipynb_checkpoints/b-checkpoint.jsonl", "x/.cache/deep/c.jsonl"):
        write_lines(tmp_path / name, name)
    assert read(tmp_path) == ["b.jsonl"]
    assert [row["text"] for _, row in read_dataset(str(tmp_path), None, "train")] == ["b.jsonl"]
    assert read(tmp_path / ".ipynb_checkpoints") == [".ipynb_checkpoints/b-checkpoint.jsonl"]  # given as such
    assert read(tmp_path / ".a.jsonl") == [".a.jsonl"]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(BadInput, match="no file of parquet, .* in this folder, hidden ones aside: "):
        read(tmp_path)


def test_what_is_left_out_of_a_folder_is_named(tmp_path, capsys):
    folder = tmp_path / "t"
    folder.mkdir()
    for name in ("LICENSE", "a.png", "README.md", "x/y.py", "old.zip", ".git/config", "LICENSE.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "more.jsonl.bz2").write_bytes(bz2.compress(json_lines()))
    write_lines(folder / "a.jsonl", "one", "two")
    for number in range(4):
        (folder / f"{number}.PNG").write_text("x")
    (folder / "dataset_info.json").write_text("{}")
    expected = (f"left out of {folder}: 5 .png files (0.PNG, 1.PNG, 2.PNG, …), 1 hidden (.git), 1 file without an ending "
                f"(LICENSE), 1 that describe data (dataset_info.json), 1 .bz2 file (more.jsonl.bz2), 1 .zip file (old.zip), "
                f"1 .txt file beside files of rows (LICENSE.txt), 1 .md file beside files of rows (README.md), 1 .py file "
                f"beside files of rows (x/y.py)")
    assert read(folder) == ["one", "two"]
    assert stderr_lines(capsys.readouterr().err) == [expected]
    assert [row["text"] for _, row in read_dataset(str(folder), None, "train")] == ["one", "two"]
    assert stderr_lines(capsys.readouterr().err) == [expected]
    write_lines(folder / "a.jsonl", *numbered("one", 500))
    download_data.main([f"--dataset={folder}", f"--data_path={tmp_path / 'data'}", "--vocab_size=300", "--val_bytes=100"])
    assert stderr_lines(capsys.readouterr().err)[0] == expected


def test_text_and_source_code_are_read(tmp_path, capsys):
    """Names of code and of chapters do not say which split they are."""
    names = ["README.md", "a.txt", "b.rst.gz", "docs/test.md", "src/train.py", "src/x.c", "tests/test_x.py", "val.TEX"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(compress(f"this is {name}".encode(), ".gz" if name.endswith(".gz") else ""))
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    assert read(tmp_path) == [f"this is {name}" for name in names]
    assert stderr_lines(capsys.readouterr().err) == [f"left out of {tmp_path}: 20 .png files (0.png, 1.png, 10.png, …)"]
    assert read(tmp_path / "src" / "x.c") == ["this is src/x.c"]
    with pytest.raises(BadInput, match="a.txt: holds no rows"):
        list(read_dataset(str(tmp_path / "a.txt"), None, "train"))


def test_a_prepared_folder_is_no_text_for_other_commands(data_path):
    for read_it in (read, lambda path: list(read_dataset(str(path), None, "train"))):
        with pytest.raises(BadInput, match="holds the shards of a prepared text, which download_data.py alone reads"):
            read_it(data_path)


def test_the_files_of_a_prepared_folder_are_no_data(tmp_path):
    """A second run finds manifest.json and tokenizer.json below the text, and nothing has changed."""
    write_lines(tmp_path / "a.jsonl", *numbered("one", 500))
    flags = [f"--dataset={tmp_path}", f"--data_path={tmp_path / 'data'}", "--vocab_size=300", "--val_bytes=100"]
    download_data.main(flags)
    before = contents(tmp_path / "data")
    download_data.main(flags)
    assert contents(tmp_path / "data") == before and len(read(tmp_path)) == 500


def test_links_are_followed(tmp_path):
    """To files and folders, inside and outside; cycles end; each file is read once, under its own name."""
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    write_lines(folder / "b.jsonl", "b")
    write_lines(folder / "x" / "c.jsonl", "c")
    write_lines(outside / "d.jsonl", "d")
    write_lines(outside / "blob-without-an-ending", "e")
    (folder / "a_link_to_b.jsonl").symlink_to("b.jsonl")
    (folder / "e.jsonl").symlink_to(outside / "blob-without-an-ending")
    (folder / "linked").symlink_to(outside)
    (folder / "x" / "up").symlink_to("..")
    (outside / "back").symlink_to(folder)
    os.link(folder / "x" / "c.jsonl", folder / "x" / "hard.jsonl")
    assert read(folder) == ["b", "e", "d", "c"]
    (tmp_path / "link").symlink_to(folder)
    assert read(tmp_path / "link") == ["b", "e", "d", "c"]


@pytest.mark.parametrize("name, target", [("b.jsonl", "nowhere"), ("folder", "nowhere"), ("b.jsonl", "b.jsonl")])
def test_links_that_lead_nowhere_are_refused(tmp_path, name, target):
    write_lines(tmp_path / "a.jsonl", "a")
    (tmp_path / ".hidden").symlink_to("nowhere")
    assert read(tmp_path) == ["a"]
    (tmp_path / name).symlink_to(tmp_path / target)
    for read_folder in (read, lambda path: list(read_dataset(str(path), None, "train"))):
        with pytest.raises(BadInput, match=f"{name}: a link to .*{target}, which is not there"):
            read_folder(tmp_path)


def test_special_files_are_refused_at_once(tmp_path):
    """A named pipe would wait for somebody who writes; /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server, time_limit(20):
        server.bind(str(tmp_path / "s.csv"))
        for path in (tmp_path / "pipe.jsonl", tmp_path / "zero.txt", tmp_path / "s.csv", "/dev/zero", "/dev/stdin"):
            for read_path in (read, lambda path: list(read_dataset(str(path), None, "train"))):
                with pytest.raises(BadInput, match=f"{path}: is a pipe or a device|/dev/stdin"):
                    read_path(path)
        with pytest.raises(BadInput, match="pipe.jsonl: is a pipe or a device"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "train_000000.npy"])
def test_special_files_among_shards_are_refused_at_once(tmp_path, data_path, refused, name):
    path = shutil.copytree(data_path, tmp_path / "data")
    (path / name).unlink()
    os.mkfifo(path / name)
    with time_limit(20):
        refused(download_data.main, [f"--data_path={path}", "--stats"], name, "is a pipe or a device")


@pytest.mark.parametrize("dataset", ["~nosuchuser/x", "a\0b", "../", "x" * 300, "/dev/null/x", "*", "a/b/c"])
def test_what_is_no_dataset_is_refused(tmp_path, dataset):
    (tmp_path / "data").mkdir()
    if dataset == "../":
        dataset = str(tmp_path / "data" / ".." / "data")
    for read_it in (read, lambda path: list(read_dataset(path, None, "train"))):
        with pytest.raises(BadInput):
            read_it(dataset)


def test_names_that_are_not_unicode(tmp_path, capsys):
    os.mkdir(tmp_path / "t")
    os.mkdir(inner := os.fsencode(tmp_path / "t") + b"/\xff\n\xfe")
    with open(inner + b"/\xe4.jsonl", "wb") as file:
        file.write(b"{bad\n" + json_lines([{"text": text} for text in numbered("one", 500)]))
    open(inner + b"/\xf6", "wb").close()
    flags = [f"--dataset={tmp_path / 't'}", f"--data_path={tmp_path / 'data'}", "--vocab_size=300", "--val_bytes=100"]
    download_data.main([*flags, "--skip_errors=1"])
    download_data.main([*flags, "--skip_errors=1"])
    assert "1 file without an ending (" in capsys.readouterr().err and Manifest.load(tmp_path / "data").n_skipped == 1
    assert len(documents_in(tmp_path / "data", "train")) > 400


# -- splits -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, split", [
    ("train.jsonl", "train"), ("train-00000-of-00001.parquet", "train"), ("my_Training_data.csv", "train"),
    ("validation.jsonl", "validation"), ("valid.txt", "validation"), ("dev-v1.1.json", "validation"),
    ("x/val/0.txt", "validation"),
    ("data/test/train.jsonl", "train"), ("test.jsonl.gz", "test"), ("eval_1.csv", "test"), ("evaluation.json", "test"),
    ("testing/a/0.txt", "test"), ("latest.jsonl", None), ("contest/training2.txt", "train"), ("devices.txt", None),
    ("trainer.csv", None), ("a.txt", None), ("test/a.md", "test"), ("test.md", None), ("test_x.py", None),
    ("test/a.py", None)])
def test_the_split_that_a_name_says(tmp_path, name, split):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    assert local_splits(str(tmp_path)) == ({split} if split else set())


def test_rows_of_a_split(tmp_path, capsys):
    for name in ("train_0.jsonl", "b.jsonl", "dev.jsonl", "test.jsonl"):
        write_lines(tmp_path / name, name)
    rows = lambda split: [row["text"] for _, row in read_dataset(str(tmp_path), None, split)]
    assert local_splits(str(tmp_path)) == {"train", "validation", "test"}
    assert rows("train") == ["b.jsonl", "train_0.jsonl"] and rows("validation") == ["dev.jsonl"]
    assert stderr_lines(capsys.readouterr().err) == [
        f"left out of {tmp_path}: 1 of the split test (test.jsonl), 1 of the split validation (dev.jsonl)",
        f"left out of {tmp_path}: 1 of the split test (test.jsonl), 2 of the split train (b.jsonl, train_0.jsonl)"]
    assert [row["text"] for _, row in read_dataset(str(tmp_path / "dev.jsonl"), None, "train")] == ["dev.jsonl"]
    assert local_splits(str(tmp_path / "dev.jsonl")) == local_splits("org/name") == set()
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(BadInput, match="--split=test: no file of .* is named so; it has train, validation"):
        rows("test")


def numbered(name: str, n: int) -> list[str]:
    return [f"{name} document {number}" for number in range(n)]


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_files_named_as_held_out_are_the_validation_split(tmp_path, capsys, monkeypatch, held_out):
    """Up to --val_bytes; the rest of them is not used. Test files beside validation files are left out."""
    monkeypatch.setattr(formats, "CHUNK_BYTES", 2000)
    write_lines(tmp_path / "t" / "a" / "train.jsonl", *numbered("train", 500))
    write_lines(tmp_path / "t" / f"{held_out}.jsonl", *numbered("held-out", 300))
    if held_out == "validation":
        write_lines(tmp_path / "t" / "test.jsonl", *numbered("test", 300))
    flags = [f"--dataset={tmp_path / 't'}", "--vocab_size=300", "--val_bytes=2000", "--shard_size_threshold=500"]
    download_data.main([*flags, f"--data_path={tmp_path / 'data'}"])
    error = capsys.readouterr().err
    assert f"held out, for validation: {tmp_path / 't'}: {held_out}.jsonl" in error
    assert ("left out" in error) == ("1 of the split test (test.jsonl)" in error) == (held_out == "validation")
    val = documents_in(tmp_path / "data", "val")
    assert val == numbered("held-out", 300)[:len(val)] and 20 < len(val) < 290
    assert f"not used: {300 - len(val)} held-out documents beyond --val_bytes=2000" in error
    assert documents_in(tmp_path / "data", "train") == numbered("train", 500)
    download_data.main([*flags[:-2], "--val_bytes=1e6", "--shard_size_threshold=500", f"--data_path={tmp_path / 'all'}"])
    assert documents_in(tmp_path / "all", "val") == numbered("held-out", 300)
    assert documents_in(tmp_path / "all", "train") == numbered("train", 500)
    assert read(tmp_path / "t") == numbered("train", 500)  # as tokenizer.py reads it, and evaluate.py


def test_held_out_files_in_a_mix_and_on_nodes(tmp_path):
    for name in ("train", "test"):
        write_lines(tmp_path / "a" / f"{name}.jsonl", *numbered(name, 60))
    write_lines(tmp_path / "b.jsonl", *numbered("other", 60))
    source = open_source(SourceConfig(dataset=f"{tmp_path / 'a'},{tmp_path / 'b.jsonl'}", mix="1,1"))
    texts = assert_resumes_everywhere(source)
    assert {text.split()[0] for text in texts} == {"train", "other"} and "test.jsonl" in source.notes[0]
    parts = [list(open_source(SourceConfig(dataset=str(tmp_path / "a")), part=(node, 2)).chunks()) for node in (0, 1)]
    for split, name in (("val", "test"), ("train", "train")):
        texts = [strings([chunk for chunk in part if chunk.split == split]) for part in parts]
        assert sorted(sum(texts, [])) == sorted(numbered(name, 60)) and min(map(len, texts)) == 30


def test_names_say_nothing_if_no_file_is_for_training(tmp_path):
    write_lines(tmp_path / "test.jsonl", "one")
    write_lines(tmp_path / "dev.jsonl", "two")
    source = open_source(SourceConfig(dataset=str(tmp_path)))
    assert list(source.documents()) == ["two", "one"] and {chunk.split for chunk in source.chunks()} == {None}


# -- documents in both splits -----------------------------------------------------------------------------------------

def prepare_texts(tmp_path, documents, *flags, folder="data"):
    write_lines(tmp_path / "text.jsonl", *documents)
    download_data.main([f"--dataset={tmp_path / 'text.jsonl'}", f"--data_path={tmp_path / folder}", "--vocab_size=300",
                        "--val_bytes=600", "--shard_size_threshold=150", *flags])
    return tmp_path / folder


def test_no_document_stands_in_both_splits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "CHUNK_BYTES", 700)
    documents = numbered("one", 40)
    copies = [*numbered("two", 40), *documents, *(f" \t{text}\n\n" for text in documents), documents[0] + " and more",
              " " * 50 + documents[1] + "\n" * 50, "two document 3", "x" + documents[1], *numbered("three", 20)]
    path = prepare_texts(tmp_path, [*documents, *copies])
    val, everything = documents_in(path, "val"), [*documents, *copies]
    assert 4 < len(val) < 40 and sorted(val, key=everything.index) == val
    expected = [text for text in everything if text.strip() not in val]
    assert documents_in(path, "train") == expected
    n_copies = len(everything) - len(expected) - len(val)
    assert Manifest.load(path).n_duplicates == n_copies > 5
    line = f"left out of the training split: {n_copies} further copies of documents that are in the validation split"
    assert line in capsys.readouterr().out
    before = contents(path)
    for stop_after in range(3):  # the set of validation documents is made again from their shard
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_writing(patch, stop_after)
            prepare_texts(tmp_path, [*documents, *copies], folder=f"again{stop_after}")
        assert contents(prepare_texts(tmp_path, [*documents, *copies], folder=f"again{stop_after}")) == before


def stop_writing(patch, after: int):
    """Ctrl-C when the shard after the first `after` ones is begun."""
    open_shard, opened = download_data.ShardWriter._open, iter(range(10**6))

    def stop(self):
        open_shard(self)
        if next(opened) == after:
            raise KeyboardInterrupt
    patch.setattr(download_data.ShardWriter, "_open", stop)


def test_text_that_is_only_copies_is_refused(tmp_path, refused):
    write_lines(tmp_path / "a.jsonl", *["the same document again"] * 1000)
    refused(download_data.main, [f"--dataset={tmp_path / 'a.jsonl'}", f"--data_path={tmp_path / 'data'}", "--vocab_size=262",
                                 "--val_bytes=100"], "in the validation split too")
    assert not (tmp_path / "data").exists()


def test_held_out_files_without_text_are_refused(tmp_path):
    write_lines(tmp_path / "t" / "train.jsonl", *numbered("train", 500))
    write_lines(tmp_path / "t" / "test.jsonl", "")
    with pytest.raises(SystemExit) as stop:
        download_data.main([f"--dataset={tmp_path / 't'}", f"--data_path={tmp_path / 'data'}", "--vocab_size=300"])
    assert stop.value.code == 2 and not (tmp_path / "data").exists()


# -- bombs ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_limits(monkeypatch):
    """A million times smaller, so that a small file is as large as gigabytes."""
    for module in (columns, formats, parquet):
        for name in ("MAX_DOCUMENT_BYTES", "MAX_RECORD_BYTES"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 1000)
    monkeypatch.setattr(formats, "MAX_JSON_VALUES", 1000)
    monkeypatch.setattr(formats, "CHUNK_BYTES", 300)
    for name, value in {"BATCH_BYTES": 100, "BOMB_BYTES": 2000, "BOMB_RATIO": 5, "MANY_VALUES": 1000}.items():
        monkeypatch.setattr(parquet, name, value)


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "one"}\n{"text": "' + b"x" * 5000 + b'"}\n{"text": "two"}\n', "line 2 is longer than 0 MB"),
    ("a.json", b'[{"text": "one"}, {"text": "' + b"x" * 1100 + b'"}, {"text": "two"}]', "row 2 is longer than 0 MB"),
    ("a.csv", b'text\none\n"' + b"x\n" * 600 + b'"\n', "row 2 is longer than 0 MB, or lacks a quote, and ends"),
    ("a.csv", b"text\none\n" + b"x" * 3000 + b"\ntwo\n", "row 2 is longer than 0 MB, or lacks a quote, and ends")])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_rows_that_are_too_long(tmp_path, small_limits, name, content, words, ending):
    path = tmp_path / (name + ending)
    path.write_bytes(compress(content, ending))
    with pytest.raises(BadInput) as error:
        read(path)
    assert words in str(error.value)
    skipped = []
    rows = [row["text"] for _, row in read_dataset(str(path), None, "train", skipped)]
    source = open_source(SourceConfig(dataset=str(path), skip_errors=True))
    assert rows[0] == "one" and words in skipped[0] and assert_resumes_everywhere(source) == rows
    assert rows == ["one", "two"] or name == "a.csv"


def write_parquet(path, column, **options):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, **options)
    return path


def test_parquet_that_unpacks_to_too_much(tmp_path, small_limits):
    packed = write_parquet(tmp_path / "packed.parquet", ["x" * 900] * 20, use_dictionary=False, compression="zstd")
    lists = write_parquet(tmp_path / "lists.parquet", pyarrow.ListArray.from_arrays(
        [0, 20_000], pyarrow.nulls(20_000, "int8")))
    for path in (packed, lists):
        with pytest.raises(BadInput, match="row group 0 of 1 unpacks to more than fits into memory: --skip_errors=1"):
            list(read_dataset(str(path), None, "train"))
    with pytest.raises(BadInput, match="unpacks to more"):
        read(packed)


@pytest.mark.parametrize("encoding", [{"use_dictionary": True},
                                      {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}])
def test_a_long_value_that_is_stored_once(tmp_path, monkeypatch, encoding):
    """Few of its rows are read at a time."""
    path = write_parquet(tmp_path / "a.parquet", ["x" * 10_000] * 500, **encoding)
    monkeypatch.setattr(parquet, "REPEATED_BYTES", 40_000)
    with open(path, "rb") as opened:
        sizes = [len(documents) for _, documents, _ in parquet.text_batches(opened, "a", 0, "text")]
    assert sum(sizes) == 500 and max(sizes) <= 4


BOMBS = {
    "line.jsonl": lambda path: path.write_bytes(b'{"text": "' + b"x" * 200_000_000 + b'"}\n{"text": "one"}\n'),
    "values.jsonl": lambda path: path.write_bytes(b'{"text": [' + b"[]," * 30_000_000 + b'1]}\n{"text": "one"}\n'),
    "array.json": lambda path: path.write_bytes(b'[{"text": [' + b"[]," * 30_000_000 + b'1]}, {"text": "one"}]'),
    "field.csv": lambda path: path.write_bytes(b'text\none\n"' + b"x,\n" * 30_000_000),
    "line.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b'{"text": "' + b"x" * 10**9 + b'"}\n', 1)),
    "a.txt.zst": lambda path: path.write_bytes(compress(b"x" * 10**9, ".zst")),
    "dictionary.parquet": lambda path: write_parquet(path, pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 100, pyarrow.int32()), ["x" * 50_000_000]), compression="zstd"),
    "packed.parquet": lambda path: write_parquet(path, pyarrow.chunked_array([["x" * 30_000_000]] * 100), compression="zstd",
                                                 use_dictionary=False),
    "nulls.parquet": lambda path: write_parquet(path, pyarrow.nulls(20_000_000, pyarrow.string())),
    "lists.parquet": lambda path: write_parquet(path, pyarrow.ListArray.from_arrays(
        [0, 200_000_000], pyarrow.nulls(200_000_000, "int8")))}
READ = r"""
import contextlib, re, sys
from runtime.config import BadInput
from tasks.rows import read_dataset
from text.sources import SourceConfig, open_source
import pyarrow.parquet
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) >> 10  # MB; of this program alone
before = peak()
with contextlib.suppress(BadInput):
    for _ in read_dataset(sys.argv[1], None, "train", []) if sys.argv[2] == "rows" else open_source(
            SourceConfig(dataset=sys.argv[1], skip_errors=True)).chunks():
        pass
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measured in /proc")
@pytest.mark.parametrize("kind", ["text", "rows"])
@pytest.mark.parametrize("name", BOMBS)
def test_small_files_do_not_take_gigabytes(tmp_path, name, kind):
    BOMBS[name](tmp_path / name)
    done = subprocess.run([sys.executable, "-c", READ, tmp_path / name, kind], capture_output=True, text=True, timeout=100,
                          env={**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2000


def test_a_link_says_the_split_of_a_file(tmp_path):
    for name in ("aa", "bb"):
        write_lines(tmp_path / "blobs" / f"{name}.jsonl", name)
    (tmp_path / "train.jsonl").symlink_to("blobs/aa.jsonl")
    (tmp_path / "test.jsonl").symlink_to("blobs/bb.jsonl")
    found = find_data_files(tmp_path)
    assert [file.name for file in found.of_split("train")] == ["aa.jsonl"]
    assert [file.name for file in found.of_split("test")] == ["bb.jsonl"]
