import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from runtime.flags import BadInput
from runtime.sources import SourceConfig, builtin_documents, hub_failure, is_network_error, open_source, take_text

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


def read(dataset, skip=0, **config):
    return list(open_source(SourceConfig(dataset=str(dataset), **config)).documents(skip))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_are_documents(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", TEXTS)
    assert read(path) == TEXTS
    assert read(path, skip=3) == TEXTS[3:]


def test_empty_and_missing_texts_are_no_documents(tmp_path):
    path = write(tmp_path / "a.parquet", [None, "one", "", "two"])
    assert read(path) == ["one", "two"]
    assert read(path, skip=1) == ["two"]


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
    (b'{"text": "\xff"}', "text", ["a.jsonl: not UTF-8"]),
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


# -- the hub ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def prepare_from_hub(hub, tmp_path_factory):
    """Runs download_data.py against the stand-in in a process of its own, since HF_ENDPOINT is read on import."""
    rows = [[{"text": f"Document {i} of file {j} is about the number {i * j}.", "score": i} for i in range(30)]
            for j in range(3)]
    hub.add("HuggingFaceFW/fineweb-edu", {"sample-10BT": rows, "default": rows[:1]})
    hub.add("someone/empty", {"default": [[]]})
    home = tmp_path_factory.mktemp("home")

    def run(*flags, url=hub.url):
        hub.requests.clear()
        return subprocess.run([sys.executable, "download_data.py", "--vocab_size=300", "--val_tokens=200", *flags],
                              env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home)}, capture_output=True, text=True)
    return run


def test_streaming_and_downloading_give_the_same_shards(prepare_from_hub, hub, tmp_path):
    for streaming in (1, 0):
        done = prepare_from_hub(f"--data_path={tmp_path / str(streaming)}", f"--streaming={streaming}")
        assert done.returncode == 0, done.stderr
        counts = [int(count) for count in re.findall(r"(\d+) documents", done.stdout)]
        assert len(counts) == 2 and sum(counts) == 90 and min(counts) > 0
        assert any("sample-10BT/002.parquet" in request for request in hub.requests)
    streamed, downloaded = tmp_path / "1", tmp_path / "0"
    for name in ("val_000000.npy", "train_000000.npy", "tokenizer.json", "manifest.json"):
        assert (streamed / name).read_bytes() == (downloaded / name).read_bytes()
    source = json.loads((streamed / "manifest.json").read_text())["source"]
    assert source["dataset"] == "HuggingFaceFW/fineweb-edu" and source["dataset_config"] == "sample-10BT"
    assert source["revision"].startswith("0123456789abcdef")


def test_streaming_stops_reading_at_the_threshold(prepare_from_hub, hub, tmp_path):
    done = prepare_from_hub(f"--data_path={tmp_path / 'all'}")
    assert done.returncode == 0, done.stderr
    (tmp_path / "part").mkdir()
    tokenizer = f"--tokenizer_path={tmp_path / 'all' / 'tokenizer.json'}"
    done = prepare_from_hub(f"--data_path={tmp_path / 'part'}", tokenizer, "--tokens_threshold=400")
    assert done.returncode == 0, done.stderr
    shards = json.loads((tmp_path / "part" / "manifest.json").read_text())["shards"]
    total = sum(shard["tokens"] for split in shards.values() for shard in split)
    assert 400 < total < 450


@pytest.mark.parametrize("flags, words", [
    (["--dataset=someone/nothing"], ["--dataset=someone/nothing", "nor a dataset of the hub"]),
    (["--dataset=nothing"], ["--dataset=nothing"]),
    (["--dataset_config=sample-9BT"], ["--dataset_config=sample-9BT", "sample-10BT"]),
    (["--text_column=body"], ["--text_column=body", "text, score"]),
    (["--text_column=score"], ["--text_column=score", "int"]),
    (["--dataset=someone/empty"], ["--dataset=someone/empty", "empty"])])
def test_what_the_hub_does_not_have(prepare_from_hub, tmp_path, flags, words):
    assert_refused(prepare_from_hub(f"--data_path={tmp_path / 'data'}", *flags), words)
    assert not list((tmp_path / "data").glob("*"))


def test_a_damaged_file_of_the_hub(prepare_from_hub, hub, tmp_path):
    rows = [{"text": f"Document {i} of many is about the number {i * i}."} for i in range(40)]
    hub.add("someone/damaged", {"default": [rows, rows]})
    second = hub.folder / "someone" / "damaged" / "default" / "001.parquet"
    data = second.read_bytes()
    second.write_bytes(data[:100] + bytes(len(data) - 200) + data[-100:])
    done = prepare_from_hub("--dataset=someone/damaged", f"--data_path={tmp_path / 'data'}", "--tokenizer_bytes=1000",
                            "--shard_size_threshold=100")
    assert_refused(done, ["--dataset=someone/damaged", "perhaps a file of it is damaged"])


@pytest.mark.parametrize("readme, name, content, words", [
    ("hello", "things.py", b"import datasets\n", []),  # the words depend on the version of datasets
    ("---\nconfigs: [\n---\n", "header.jsonl", b'{"text": "a"}\n', ["damaged", "ParserError"]),
    ("hello", "notes.xyz", b"no data", ["No (supported) data files"]),
    ("hello", "latin.jsonl", b'{"text": "\xff\xfe"}\n', ["damaged", "UnicodeDecodeError"])])
def test_what_cannot_be_read_from_the_hub(prepare_from_hub, hub, tmp_path, readme, name, content, words):
    dataset = f"someone/{Path(name).stem}"
    folder = hub.folder / dataset
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(readme)
    (folder / name).write_bytes(content)
    assert_refused(prepare_from_hub(f"--dataset={dataset}", f"--data_path={tmp_path / 'data'}"), [dataset, *words])


def test_causes_of_a_hub_that_does_not_answer_are_told_apart():
    import datasets
    import pyarrow
    from huggingface_hub import errors
    answer = argparse.Namespace(headers={}, status_code=503, request=None)
    for error in (ConnectionResetError(104, "reset"), TimeoutError("late"), socket.gaierror(-2, "Name or service not known"),
                  errors.HfHubHTTPError("503 Server Error", response=answer)):
        assert is_network_error(error), error
    caused = datasets.exceptions.DatasetGenerationError("An error occurred")
    caused.__cause__ = EOFError("Compressed file ended")
    for error, words in (
            (errors.GatedRepoError("403", response=answer), "is gated"), (caused, "EOFError: Compressed file ended"),
            (errors.RevisionNotFoundError("404", response=answer), "no longer has the revision"),
            (errors.RepositoryNotFoundError("404", response=answer), "nor a dataset of the hub"),
            (ValueError("BuilderConfig 'x' not found"), "BuilderConfig 'x' not found"),
            (pyarrow.ArrowInvalid("bad\nbytes"), "damaged (ArrowInvalid: bad bytes)"),
            (OSError("Couldn't deserialize thrift"), "damaged")):
        assert not is_network_error(error), error
        told = hub_failure(error, "--dataset=a/b")
        assert isinstance(told, BadInput) and str(told).startswith("--dataset=a/b: ") and words in str(told)
    full = hub_failure(OSError(28, "No space left on device"), "--dataset=a/b")
    assert type(full) is OSError and "HF_HOME" in str(full) and "No space left" in str(full)


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("timed out")])
def test_a_hub_that_stops_answering_is_no_bad_input(monkeypatch, error):
    import datasets
    import huggingface_hub

    def rows():
        yield {"text": "one"}
        yield {"text": "two"}
        raise error

    class Rows:
        def __iter__(self):
            return rows()

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append(kwargs["revision"]) or Rows())
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, revision: argparse.Namespace(sha=revision))
    documents = open_source(SourceConfig(dataset="some/one"), revision="abc").documents()
    assert asked == ["abc"]  # a preparation that goes on reads the state of the hub that it began with
    assert [next(documents), next(documents)] == ["one", "two"]
    with pytest.raises(ConnectionError, match="--dataset=some/one: the hub stopped answering"):
        next(documents)


def test_no_network(prepare_from_hub, tmp_path):
    done = prepare_from_hub(f"--data_path={tmp_path / 'data'}", url="http://127.0.0.1:9")  # nobody listens there
    assert_refused(done, ["--dataset=HuggingFaceFW/fineweb-edu", "cannot be reached", "builtin"])


def assert_refused(done, words):
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "[00:" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]
