import json

import pyarrow
import pyarrow.parquet
import pytest

from hub import damage_row_group
from runtime.config import BadInput
from text import formats as readers
from text import sources
from text.builtin import builtin_documents
from text.sources import SourceConfig, open_source, take_text

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


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_every_document_has_a_place_to_go_on_from(tmp_path, monkeypatch, suffix):
    """Also where chunks are smaller than row groups, and empty rows lie between."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 40)
    monkeypatch.setattr(readers, "TXT_LENGTH", 20)
    texts = [f"{number}: " + "wörd " * (number % 5) + "\n\n" if number % 3 else "" for number in range(40)]
    write(tmp_path / f"a{suffix}", texts)
    write(tmp_path / f"b{suffix}", texts[:7])
    assert_all_places(open_source(SourceConfig(dataset=str(tmp_path))))


def assert_all_places(source):
    chunks = list(source.chunks())
    expected = [text for chunk in chunks for text in chunk.texts.strings()]
    assert len(chunks) > 5 and all(expected)
    done = 0
    for chunk in chunks:
        for n in range(len(chunk.texts) + 1):
            place = json.loads(json.dumps(chunk.place(n)))  # it is kept in a file
            assert [text for on in source.chunks(place) for text in on.texts.strings()] == expected[done + n:]
        done += len(chunk.texts)
    fractions = [chunk.fraction for chunk in chunks]
    assert fractions == sorted(fractions) and fractions[0] < 0.1 and 0.4 < fractions[-1] < 1
    return expected


def test_a_mix_has_its_shares_everywhere_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 60)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 200)
    write(tmp_path / "long.parquet", [f"a{number} " + "long " * 10 for number in range(60)])
    write(tmp_path / "short.jsonl", [f"b{number}" for number in range(200)])
    config = SourceConfig(dataset=f"{tmp_path / 'long.parquet'},{tmp_path / 'short.jsonl'}", mix="3,1")
    texts = assert_all_places(open_source(config))
    assert texts == list(open_source(config).documents())
    for kind in "ab":  # each part in its order
        assert [text for text in texts if text[0] == kind] == [
            text for text in read(tmp_path / ("long.parquet" if kind == "a" else "short.jsonl")) if text in set(texts)]
    of_a = of_all = 0
    for text in texts:
        of_a, of_all = of_a + len(text) * (text[0] == "a"), of_all + len(text)
        assert abs(of_a - 0.75 * of_all) <= 54  # never further off than one document
    assert of_all > 2000


@pytest.mark.parametrize("flags, words", [
    ({"mix": None}, ["--dataset=", "names 2 datasets", "--mix=0.5,0.5"]), ({"mix": "1"}, ["--mix=1:", "for each of"]),
    ({"mix": "1,0"}, ["--mix=1,0", "above zero"]), ({"mix": "1,x"}, ["--mix=1,x"]), ({"mix": "1,nan"}, ["--mix=1,nan"]),
    ({"mix": "1,1", "text_column": "a,b,c"}, ["--text_column=a,b,c", "one for each of the 2"]),
    ({"mix": "1,1", "text_column": "text,body"}, ["--text_column=body", "no such column"]),
    ({"dataset": "builtin", "mix": "1"}, ["--mix=1", "there is one --dataset=builtin"])])
def test_mixes_that_cannot_be(tmp_path, flags, words):
    write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(BadInput) as error:
        open_source(SourceConfig(**{"dataset": f"{tmp_path / 'a.parquet'},{tmp_path / 'a.parquet'}"} | flags))
    for word in words:
        assert word in str(error.value)


def test_a_file_with_a_comma_in_its_name_is_no_mix(tmp_path):
    assert read(write(tmp_path / "a,b.jsonl", TEXTS)) == TEXTS


def test_each_part_of_a_mix_has_its_column(tmp_path):
    (tmp_path / "code.jsonl").write_text('{"content": "x = 1"}\n')
    write(tmp_path / "prose.jsonl", ["one"])
    assert set(read(f"{tmp_path / 'prose.jsonl'},{tmp_path / 'code.jsonl'}", mix="1,1", text_column="text,content")) == {
        "one", "x = 1"}


@pytest.mark.parametrize("n_files, num_nodes", [(5, 2), (4, 4), (1, 3), (2, 3)])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".txt"])
def test_nodes_take_disjoint_parts(tmp_path, monkeypatch, suffix, n_files, num_nodes):
    monkeypatch.setattr(readers, "TXT_LENGTH", 5)
    for number in range(n_files):
        write(tmp_path / f"{number}{suffix}", [f"{number}-{row}\n\n" for row in range(10)])
    everything = read(tmp_path)
    parts = [list(open_source(SourceConfig(dataset=str(tmp_path)), part=(node, num_nodes)).documents())
             for node in range(num_nodes)]
    assert sorted(text for part in parts for text in part) == sorted(everything) and min(map(len, parts)) >= 3


def test_nodes_share_the_builtin_text():
    parts = [list(open_source(SourceConfig(dataset="builtin"), part=(node, 3)).chunks()) for node in range(3)]
    texts = [[text for chunk in part for text in chunk.texts.strings()] for part in parts]
    assert sorted(text for part in texts for text in part) == sorted(builtin_documents())
    on = open_source(SourceConfig(dataset="builtin"), part=(1, 3)).chunks(parts[1][1].place(2))
    assert [text for chunk in on for text in chunk.texts.strings()] == texts[1][len(parts[1][0].texts) + 2:]


def test_invalid_utf8_in_parquet_is_replaced(tmp_path):
    column = pyarrow.array([b"good", b"b\xffad", None, "ä".encode()]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["good", "b\ufffdad", "ä"]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_other_columns_of_text(tmp_path, kind):
    column = pyarrow.array([*TEXTS, None]).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TEXTS


def test_damage_is_left_out_where_that_was_asked_for(tmp_path, monkeypatch):
    """A row group, a line, a file that is none; before, between and after what can be read."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 20)
    rows = [f"row {number}" for number in range(10)]
    damage_row_group(write(tmp_path / "a.parquet", rows), 2)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "c.jsonl").write_text('{bad\n{"text": "one"}\n["x"]\n{"text": "two"}\n{"text": "three"}\n{"text":')
    (tmp_path / "d.txt").write_bytes(b"good\n\nb\xffad")
    monkeypatch.setattr(readers, "TXT_LENGTH", 4)
    source = open_source(SourceConfig(dataset=str(tmp_path), skip_errors=True))
    assert list(source.documents()) == [*rows[:4], *rows[6:], "one", "two", "three", "good\n\n"]
    chunks = list(source.chunks())
    skipped = [line for chunk in chunks for line in chunk.skipped]
    for line, words in zip(skipped, (["a.parquet: row group 2 of 5"], ["b.parquet: not a readable parquet"],
                                      ["c.jsonl: line 1 is"], ["c.jsonl: line 3 is"], ["c.jsonl: line 6"],
                                      ["d.txt: not UTF-8", "0xff at 7"]), strict=True):
        assert all(word in line for word in words), line
    for i, chunk in enumerate(chunks[:-1]):  # from any place on, what is left out after it is told once
        for n in range(len(chunk.texts) + 1):
            on = list(source.chunks(chunk.place(n)))
            assert [line for chunk in on for line in chunk.skipped] == [line for chunk in chunks[i + 1:]
                                                                        for line in chunk.skipped]
    with pytest.raises(BadInput, match="row group 2 of 5 cannot be read .*: --skip_errors=1 leaves it out"):
        list(open_source(SourceConfig(dataset=str(tmp_path))).documents())


def test_damage_in_a_mix_is_told_once_from_every_place(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 30)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 50)
    lines = [json.dumps({"text": f"row {n}"}) if n % 4 else "{bad" for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    damage_row_group(write(tmp_path / "b.parquet", [f"document {n}" for n in range(30)]), 3)
    both = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.parquet'}"
    source = open_source(SourceConfig(dataset=both, mix="1,1", skip_errors=True))
    chunks = list(source.chunks())
    texts = [text for chunk in chunks for text in chunk.texts.strings()]
    assert sum(len(chunk.skipped) for chunk in chunks) >= 6 and len(texts) > 30
    done = 0
    for i, chunk in enumerate(chunks):
        for n in range(len(chunk.texts) + 1):
            on = list(source.chunks(chunk.place(n)))
            assert [text for later in on for text in later.texts.strings()] == texts[done + n:]
            assert [later.skipped for later in on if later.skipped] == [
                later.skipped for later in chunks[i + 1:] if later.skipped]
        done += len(chunk.texts)


def test_documents_too_long_for_the_memory_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 40)
    texts = ["one", "x" * 50, "two", "y" * 90, "z" * 41, "three"]
    for suffix, row in ((".parquet", "row 1 is longer"), (".jsonl", "line 2 is longer")):
        path = write(tmp_path / f"a{suffix}", texts)
        with pytest.raises(BadInput, match=f"a{suffix}: {row} than 0 MB: --skip_errors=1 leaves it out"):
            read(path)
        chunks = list(open_source(SourceConfig(dataset=str(path), skip_errors=True)).chunks())
        assert [text for chunk in chunks for text in chunk.texts.strings()] == ["one", "two", "three"]
        assert sum(len(chunk.skipped) for chunk in chunks) == 3


def test_a_txt_file_without_line_ends_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LINES_LENGTH", 64)
    text = "中🙂ä" * 100
    documents = read(write(tmp_path / "a.txt", [text]))
    assert "".join(documents) == text and 10 < len(documents) < 20


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
    (b'{"text": "a"}', "body", ["--text_column=body: no such column in", "line 1"]),
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
