import json

import pyarrow
import pyarrow.parquet
import pytest

from runtime.flags import BadInput
from runtime.sources import SourceConfig, builtin_documents, open_source, take_text

TEXTS = ["first text", "zweiter Text: ä", "第三", "four\r\nlines\n"]


def write(path, texts):
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, pyarrow.string())})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    else:
        path.write_bytes("".join(texts).encode())
    return path


def read(dataset, **config):
    return list(open_source(SourceConfig(dataset=str(dataset), **config)).documents())


def read_on(dataset, skip, **config):
    """The documents after the first `skip`, found by the place that the chunk gave."""
    source = open_source(SourceConfig(dataset=str(dataset), **config))
    for chunk in source.chunks():
        if skip <= len(chunk.texts):
            break
        skip -= len(chunk.texts)
    return [text for chunk in source.chunks(chunk.place(skip)) for text in chunk.texts.strings()]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_are_documents(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", TEXTS)
    assert read(path) == TEXTS
    assert read_on(path, 3) == TEXTS[3:]


def test_empty_and_missing_texts_are_no_documents(tmp_path):
    path = write(tmp_path / "a.parquet", [None, "one", "", "two"])
    assert read(path) == ["one", "two"]
    assert read_on(path, 1) == ["two"]


def test_a_folder_is_read_in_order_of_name(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "c.txt", ["last"])
    write(tmp_path / "b" / "x.jsonl", TEXTS[2:])
    write(tmp_path / "a.parquet", TEXTS[:2])
    (tmp_path / "notes.md").write_text("not text")
    assert read(tmp_path) == [*TEXTS, "last"]


def test_a_long_txt_file_gives_several_documents(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * 100 + "\r\n\r\n" for i in range(200)]
    documents = read(write(tmp_path / "a.txt", paragraphs))
    assert "".join(documents) == "".join(paragraphs)
    assert 4 < len(documents) < 10
    assert all(document.startswith("paragraph") for document in documents)
    without_blank_lines = ["line " * 2000 + "\n"] * 300
    documents = read(write(tmp_path / "b.txt", without_blank_lines))
    assert "".join(documents) == "".join(without_blank_lines) and len(documents) == 3


def test_the_revision_changes_with_the_files(tmp_path):
    write(tmp_path / "a.jsonl", TEXTS)
    name = open_source(SourceConfig(dataset=str(tmp_path))).name
    assert open_source(SourceConfig(dataset=str(tmp_path))).name == name
    write(tmp_path / "b.jsonl", TEXTS)
    assert open_source(SourceConfig(dataset=str(tmp_path))).name != name


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo\r\n")
    assert read(tmp_path) == ["one", "two\r\n"]


def test_take_text_by_hand():
    assert list(take_text(["ab", "é", "c", "d"], 4)) == ["ab", "é"]
    assert list(take_text(["ab"], 100)) == ["ab"] and list(take_text([], 1)) == []


def test_builtin_text_is_english_megabytes_in_a_fixed_order(english):
    everything = list(builtin_documents())
    assert sum(len(text.encode()) for text in everything) > 5_000_000
    assert everything[:len(english)] == english
    assert len(set(everything)) == len(everything)
    whole = "".join(everything)
    # reference topics, standard library, numpy and torch in Python and in C
    for phrase in ("The \"with\" statement", "class ArgumentParser", "def einsum(", "torch.addmm", "class CrossEntropyLoss"):
        assert phrase in whole, phrase
    assert "the" in everything[0].lower() and everything[0] == next(builtin_documents())


@pytest.mark.parametrize("content, column, words", [
    (b'{"text": 1}', "text", ["--text_column=text", "line 1", "int"]),
    (b'{"text": "a"}\n{"body": "b"}', "text", ["--text_column=text", "line 2", "body"]),
    (b'{"text": "a"}', "body", ["--text_column=body", "text"]),
    (b'{"text": "a"', "text", ["a.jsonl: line 1 is not JSON"]),
    (b'["a"]', "text", ["a.jsonl: line 1 is not a JSON object"]),
    (b'{"text": ' + b"[" * 100_000, "text", ["a.jsonl: line 1 is not JSON that can be read"]),
    (b'{"text": ' + b"9" * 5_000 + b"}", "text", ["a.jsonl: line 1 is not JSON that can be read"]),
    (b'{"text": "\xff"}', "text", ["a.jsonl: line 1 is not UTF-8", "0xff"]),
    (b"", "text", ["no text in it"]), (b'{"text": ""}\n\n{"text": null}\n', "text", ["no text in it"])])
def test_jsonl_that_cannot_be_read(tmp_path, content, column, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(BadInput) as error:
        read(tmp_path / "a.jsonl", text_column=column)
    for word in words:
        assert word in str(error.value)


def test_parquet_that_cannot_be_read(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(BadInput, match="--text_column=body: .*has id, text"):
        read(path, text_column="body")
    with pytest.raises(BadInput, match="--text_column=id: .*holds int"):
        read(path, text_column="id")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadInput, match="a.parquet: not a readable parquet"):
        read(path)


def test_paths_that_cannot_be_read(tmp_path):
    for missing in (tmp_path / "none", tmp_path / "none.parquet", "./none", "none.txt"):
        with pytest.raises(BadInput, match="no such file or folder"):
            read(missing)
    with pytest.raises(BadInput, match="--dataset=: is empty"):
        read("")
    with pytest.raises(BadInput, match="no such file or folder"):
        read("x/" * 3000)
    write(tmp_path / "a.jsonl", TEXTS).rename(tmp_path / "A.JSONL")
    assert read(tmp_path / "A.JSONL") == TEXTS
    with pytest.raises(BadInput, match="--dataset_config=en: only datasets of the hub"):
        read(tmp_path / "A.JSONL", dataset_config="en")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.pdf").write_text("x")
    with pytest.raises(BadInput, match=r"cannot read \.pdf"):
        read(tmp_path / "only" / "a.pdf")
    with pytest.raises(BadInput, match=r"no \.parquet, \.jsonl, \.txt file in this folder"):
        read(tmp_path / "only")
