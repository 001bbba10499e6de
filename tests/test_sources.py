"""Reading text: formats, positions to resume from, mixes, parts for several nodes, damage, and what is refused."""
import json

import pyarrow
import pyarrow.parquet
import pytest

from hub import damage_row_group
from runtime.config import BadInput, flag_names
from tasks.rows import read_dataset
from text import formats, parquet, sources
from text.builtin import builtin_documents
from text.sources import SourceConfig, open_source, source_flags, take_text

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


def strings(chunks) -> list[str]:
    return [text for chunk in chunks for text in chunk.documents.strings()]


def messages(chunks) -> list[str]:
    return [message for chunk in chunks for message in chunk.skipped]


def read_after(dataset, n):
    """The documents after the first n, read from the position that their chunk gives."""
    source = open_source(SourceConfig(dataset=str(dataset)))
    for chunk in source.chunks():
        if n <= len(chunk.documents):
            break
        n -= len(chunk.documents)
    return strings(source.chunks(chunk.position_after(n)))


def assert_resumes_everywhere(source) -> list[str]:
    """From every position that a chunk gives, the rest of the documents follows, and every later message about a skipped
    part once. Returns all documents."""
    chunks = list(source.chunks())
    expected, done = strings(chunks), 0
    assert all(expected)
    for i, chunk in enumerate(chunks):
        for n in range(len(chunk.documents) + 1):
            position = json.loads(json.dumps(chunk.position_after(n)))  # it is stored in manifest.json
            resumed = list(source.chunks(position))
            assert strings(resumed) == expected[done + n:]
            assert messages(resumed) == messages(chunks[i + 1:])
        done += len(chunk.documents)
    return expected


def assert_fractions_rise(chunks):
    fractions = [chunk.fraction for chunk in chunks]
    assert fractions == sorted(fractions) and fractions[0] < 0.1 and 0.4 < fractions[-1] < 1


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_are_documents(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", TEXTS)
    assert read(path) == TEXTS
    assert read_after(path, 3) == TEXTS[3:]


def test_empty_and_missing_texts_are_skipped(tmp_path):
    path = write(tmp_path / "a.parquet", [None, "one", "", "two"])
    assert read(path) == ["one", "two"]
    assert read_after(path, 1) == ["two"]


def test_a_folder_is_read_in_name_order(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "c.jsonl", ["last"])
    write(tmp_path / "b" / "x.jsonl", TEXTS[2:])
    write(tmp_path / "a.parquet", TEXTS[:2])
    assert read(tmp_path) == [*TEXTS, "last"]


def test_a_long_txt_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * 100 + "\r\n\r\n" for i in range(200)]
    documents = read(write(tmp_path / "a.txt", paragraphs))
    assert "".join(documents) == "".join(paragraphs)
    assert 4 < len(documents) < 10
    assert all(document.startswith("paragraph") for document in documents)
    without_blank_lines = ["line " * 2000 + "\n"] * 300
    documents = read(write(tmp_path / "b.txt", without_blank_lines))
    assert "".join(documents) == "".join(without_blank_lines) and len(documents) == 43


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_reading_resumes_after_every_document(tmp_path, monkeypatch, suffix):
    """Also with chunks smaller than row groups, and with empty rows in between."""
    monkeypatch.setattr(formats, "CHUNK_BYTES", 40)
    monkeypatch.setattr(formats, "TXT_DOCUMENT_BYTES", 20)
    texts = [f"{number}: " + "wörd " * (number % 5) + "\n\n" if number % 3 else "" for number in range(40)]
    write(tmp_path / f"a{suffix}", texts)
    write(tmp_path / f"b{suffix}", texts[:7])
    source = open_source(SourceConfig(dataset=str(tmp_path)))
    assert_resumes_everywhere(source)
    chunks = list(source.chunks())
    assert len(chunks) > 5
    assert_fractions_rise(chunks)


# -- mixes ------------------------------------------------------------------------------------------------------------

def test_a_mix_keeps_its_shares_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_BYTES", 60)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 200)
    write(tmp_path / "long.parquet", [f"a{number} " + "long " * 10 for number in range(60)])
    write(tmp_path / "short.jsonl", [f"b{number}" for number in range(200)])
    config = SourceConfig(dataset=f"{tmp_path / 'long.parquet'},{tmp_path / 'short.jsonl'}", mix="3,1")
    texts = assert_resumes_everywhere(open_source(config))
    assert texts == list(open_source(config).documents())
    assert_fractions_rise(list(open_source(config).chunks()))
    for kind in "ab":  # each dataset in its own order
        assert [text for text in texts if text[0] == kind] == [
            text for text in read(tmp_path / ("long.parquet" if kind == "a" else "short.jsonl")) if text in set(texts)]
    n_a = n_all = 0
    for text in texts:
        n_a, n_all = n_a + len(text) * (text[0] == "a"), n_all + len(text)
        assert abs(n_a - 0.75 * n_all) <= 54  # never further off than one document
    assert n_all > 2000


@pytest.mark.parametrize("flags, words", [
    ({"mix": None}, ["--dataset=", "names 2 datasets", "--mix=0.5,0.5"]), ({"mix": "1"}, ["--mix=1:", "for each of"]),
    ({"mix": "1,0"}, ["--mix=1,0", "above zero"]), ({"mix": "1,x"}, ["--mix=1,x"]), ({"mix": "1,nan"}, ["--mix=1,nan"]),
    ({"mix": "1,1", "text_column": "a,b,c"}, ["--text_column=a,b,c", "one for each of the 2"]),
    ({"mix": "1,1", "text_column": "text,body"}, ["--text_column=body", "no such column"]),
    ({"dataset": "builtin", "mix": "1"}, ["--mix=1", "there is only one --dataset=builtin"])])
def test_invalid_mixes_are_refused(tmp_path, flags, words):
    write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(BadInput) as error:
        open_source(SourceConfig(**{"dataset": f"{tmp_path / 'a.parquet'},{tmp_path / 'a.parquet'}"} | flags))
    for word in words:
        assert word in str(error.value)


def test_the_flags_that_identify_a_text_are_those_declared_fixed(tmp_path):
    identifying = source_flags(SourceConfig(dataset="org/a,org/b", mix="1,1"))
    assert identifying.keys() == flag_names(SourceConfig, on_resume="fixed")
    (tmp_path / "a.txt").write_text("x")
    for dataset in ("builtin", "org/a", str(tmp_path / "a.txt")):
        assert source_flags(SourceConfig(dataset=dataset)).keys() < identifying.keys()


def test_a_file_with_a_comma_in_its_name_is_not_a_mix(tmp_path):
    assert read(write(tmp_path / "a,b.jsonl", TEXTS)) == TEXTS


def test_each_dataset_of_a_mix_has_its_column(tmp_path):
    (tmp_path / "code.jsonl").write_text('{"content": "x = 1"}\n')
    write(tmp_path / "prose.jsonl", ["one"])
    assert set(read(f"{tmp_path / 'prose.jsonl'},{tmp_path / 'code.jsonl'}", mix="1,1", text_column="text,content")) == {
        "one", "x = 1"}


# -- parts for several nodes ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_files, num_nodes", [(5, 2), (4, 4), (1, 3), (2, 3)])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_nodes_take_disjoint_parts(tmp_path, monkeypatch, suffix, n_files, num_nodes):
    monkeypatch.setattr(formats, "TXT_DOCUMENT_BYTES", 5)
    for number in range(n_files):
        write(tmp_path / f"{number}{suffix}", [f"{number}-{row}\n\n" for row in range(10)])
    everything = read(tmp_path)
    parts = [list(open_source(SourceConfig(dataset=str(tmp_path)), part=(node, num_nodes)).documents())
             for node in range(num_nodes)]
    assert sorted(text for part in parts for text in part) == sorted(everything) and min(map(len, parts)) >= 3


def test_nodes_share_the_builtin_text(english, monkeypatch):
    monkeypatch.setattr(sources, "builtin_texts", lambda: english)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 50_000)
    parts = [list(open_source(SourceConfig(dataset="builtin"), part=(node, 3)).chunks()) for node in range(3)]
    texts = [strings(part) for part in parts]
    assert sorted(text for part in texts for text in part) == sorted(english)
    resumed = open_source(SourceConfig(dataset="builtin"), part=(1, 3)).chunks(parts[1][1].position_after(2))
    assert strings(resumed) == texts[1][len(parts[1][0].documents) + 2:]


# -- unusual content --------------------------------------------------------------------------------------------------


def test_invalid_utf8_in_parquet_is_replaced(tmp_path):
    column = pyarrow.array([b"good", b"b\xffad", None, "ä".encode()]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["good", "b\ufffdad", "ä"]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_other_string_types_of_parquet(tmp_path, kind):
    column = pyarrow.array([*TEXTS, None]).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS


def test_skip_errors_skips_what_is_damaged(tmp_path, monkeypatch):
    """A row group, a line, a whole file; before, between and after what can be read."""
    monkeypatch.setattr(formats, "CHUNK_BYTES", 20)
    rows = [f"row {number}" for number in range(10)]
    damage_row_group(write(tmp_path / "a.parquet", rows), 2)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "c.jsonl").write_text('{bad\n{"text": "one"}\n["x"]\n{"text": "two"}\n{"text": "three"}\n{"text":')
    (tmp_path / "d.csv").write_bytes(b"text\ngood\nb\xffad\n\"open")
    monkeypatch.setattr(formats, "TXT_DOCUMENT_BYTES", 4)
    source = open_source(SourceConfig(dataset=str(tmp_path), skip_errors=True))
    assert list(source.documents()) == [*rows[:4], *rows[6:], "one", "two", "three", "good"]
    chunks = list(source.chunks())
    for message, words in zip(messages(chunks), (
            ["a.parquet: row group 2 of 5"], ["b.parquet: not a readable parquet"], ["c.jsonl: line 1 cannot"],
            ["c.jsonl: line 3 is"], ["c.jsonl: line 6"], ["d.csv: row 2 is not UTF-8", "0xff"],
            ["d.csv: row 3 cannot be read"]), strict=True):
        assert all(word in message for word in words), message
    assert_resumes_everywhere(source)
    with pytest.raises(BadInput, match="row group 2 of 5 cannot be read .*: --skip_errors=1 skips it"):
        list(open_source(SourceConfig(dataset=str(tmp_path))).documents())


def test_skipped_parts_of_a_mix_are_reported_once(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_BYTES", 30)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 50)
    lines = [json.dumps({"text": f"row {n}"}) if n % 4 else "{bad" for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    damage_row_group(write(tmp_path / "b.parquet", [f"document {n}" for n in range(30)]), 3)
    both = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.parquet'}"
    source = open_source(SourceConfig(dataset=both, mix="1,1", skip_errors=True))
    assert len(messages(source.chunks())) >= 6
    assert len(assert_resumes_everywhere(source)) > 30


def test_documents_too_long_for_the_memory_are_refused(tmp_path, monkeypatch):
    for module in (formats, parquet):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 40)
    texts = ["one", "x" * 50, "two", "y" * 90, "z" * 41, "three"]
    for suffix, row in ((".parquet", "row 1 is longer"), (".jsonl", "line 2 is longer")):
        path = write(tmp_path / f"a{suffix}", texts)
        with pytest.raises(BadInput, match=f"a{suffix}: {row} than 0 MB: --skip_errors=1 skips it"):
            read(path)
        chunks = list(open_source(SourceConfig(dataset=str(path), skip_errors=True)).chunks())
        assert strings(chunks) == ["one", "two", "three"] and len(messages(chunks)) == 3


def test_a_txt_file_without_line_ends_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "TXT_MAX_BYTES", 64)
    text = "中🙂ä" * 100
    documents = read(write(tmp_path / "a.txt", [text]))
    assert "".join(documents) == text and 10 < len(documents) < 20


def test_the_revision_changes_when_files_are_added(tmp_path):
    write(tmp_path / "a.jsonl", TEXTS)
    describe = lambda: open_source(SourceConfig(dataset=str(tmp_path))).description
    before = describe()
    assert describe() == before
    write(tmp_path / "b.jsonl", TEXTS)
    assert describe()["revisions"] != before["revisions"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    for name, content in (("a.jsonl", b'{"text": "one"}\n'), ("a.json", b'[{"text": "one"}]'), ("a.csv", b"text\none\n"),
                          ("a.txt", b"one")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert read(tmp_path / name) == ["one"]


def test_take_text_by_hand():
    assert list(take_text(["ab", "é", "c", "d"], 4)) == ["ab", "é"]
    assert list(take_text(["ab"], 100)) == ["ab"] and list(take_text([], 1)) == []


@pytest.mark.integration
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
    (b'{"text": "a"}', "body", ["--text_column=body: no such column in", "line 1"]),
    (b'{"text": "a"', "text", ["a.jsonl: line 1 cannot be parsed as JSON"]),
    (b'["a"]\n["b"]', "text", ["a.jsonl: line 1 is not a JSON object"]),
    (b'{"text": ' + b"[" * 100_000, "text", ["a.jsonl: line 1 cannot be parsed as JSON"]),
    (b'{"text": ' + b"9" * 5_000 + b"}", "text", ["a.jsonl: line 1 cannot be parsed as JSON"]),
    (b'{"text": "\xff"}', "text", ["a.jsonl: line 1 is not UTF-8", "0xff"]),
    (b"", "text", ["contains no text"]), (b'{"text": ""}\n\n{"text": null}\n', "text", ["contains no text"])])
def test_unreadable_jsonl_is_refused(tmp_path, content, column, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(BadInput) as error:
        read(tmp_path / "a.jsonl", text_column=column)
    for word in words:
        assert word in str(error.value)


def test_unreadable_parquet_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(BadInput, match="--text_column=body: .*has id, text"):
        read(path, text_column="body")
    with pytest.raises(BadInput, match="--text_column=id: .*holds int"):
        read(path, text_column="id")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadInput, match="a.parquet: not a readable parquet"):
        read(path)


@pytest.mark.parametrize("dataset", ["none", "none.parquet", "./none", "none.txt", "x/" * 3000, ""])
def test_a_missing_path_is_refused(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="no such file or folder" if dataset else "--dataset=: is empty"):
        read(f"{tmp_path}/{dataset}" if dataset.startswith("none") else dataset)


@pytest.mark.parametrize("dataset, words", [
    ("x.json", ""), ("texts/no_such", "there is a folder texts"), ("texts/builtn", "did you mean texts/builtin?"),
    ("texts/builtn/", "did you mean texts/builtin?"), ("notes.md", "did you mean note.md?"), ("./a/b", ""), ("a/b/c", ""),
    ("owner/rows.jsonl.gz", ""), ("~/no_such_folder_here", "")])
def test_what_is_meant_as_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, dataset, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts" / "builtin").mkdir(parents=True)
    (tmp_path / "note.md").write_text("x")
    monkeypatch.setattr(sources, "open_hub", None)
    for read_it in (read, lambda path: list(read_dataset(path, None, "train"))):
        with pytest.raises(BadInput, match=f"--dataset={dataset}: no such file or folder.*{words.replace('?', '[?]')}"):
            read_it(dataset)


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(BadInput, match=r"cannot read \.pdf"):
        read(tmp_path / "a.pdf")
    with pytest.raises(BadInput, match=r"no file of parquet, .* in this folder, but 1 \.pdf file$"):
        read(tmp_path)


def test_a_local_file_has_no_configuration_and_any_case(tmp_path):
    write(tmp_path / "a.jsonl", TEXTS).rename(tmp_path / "A.JSONL")
    assert read(tmp_path / "A.JSONL") == TEXTS
    with pytest.raises(BadInput, match="--dataset_config=en: only hub datasets"):
        read(tmp_path / "A.JSONL", dataset_config="en")


# -- whole rows -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_records_are_whole_rows_with_their_address(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", TEXTS)
    row = "row" if suffix == ".parquet" else "line"
    records = list(formats.read_records(sources.local_file(path)))
    assert [where for where, _ in records] == [f"{path}: {row} {number}" for number in (1, 2, 3, 4)]
    assert [record["text"] for _, record in records] == TEXTS


def test_records_of_damaged_files_are_refused(tmp_path):
    damaged = damage_row_group(write(tmp_path / "a.parquet", TEXTS), 1)
    (tmp_path / "b.jsonl").write_text('{"a": {"b": [1]}}\n\n{}\n[1]\n')
    records = formats.read_records(sources.local_file(tmp_path / "b.jsonl"))
    assert next(records)[1] == {"a": {"b": [1]}} and next(records) == (f"{tmp_path / 'b.jsonl'}: line 3", {})
    with pytest.raises(BadInput, match="b.jsonl: line 4 is not a JSON object: --skip_errors=1 skips it"):
        next(records)
    with pytest.raises(BadInput, match="a.parquet: row group 1 of 2 cannot be read from row 2 on"):
        list(formats.read_records(sources.local_file(damaged)))
    with pytest.raises(BadInput, match="a.txt: holds no rows: give .parquet, .jsonl"):
        list(formats.read_records(sources.local_file(write(tmp_path / "a.txt", TEXTS))))
