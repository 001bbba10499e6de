import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO
from runtime.flags import BadInput
from runtime.hub import hub_failure, is_network_error

ROWS = [[{"text": f"Document {i} of file {j} is about the number {i * j}.", "score": i} for i in range(30)]
        for j in range(3)]
# Pauses between tries pass 100 times as fast.
QUICK = "import time; sleep = time.sleep; time.sleep = lambda s: sleep(s / 100); import download_data; download_data.main()"


@pytest.fixture(scope="module")
def prepare_from_hub(hub, tmp_path_factory):
    """Runs download_data.py against the stand-in in a process of its own, since HF_ENDPOINT is read on import."""
    rows = ROWS
    hub.add("HuggingFaceFW/fineweb-edu", {"sample-10BT": rows, "default": rows[:1]})
    hub.add("someone/empty", {"default": [[]]})
    home = tmp_path_factory.mktemp("home")

    def run(*flags, url=hub.url):
        hub.requests.clear()
        return subprocess.run([sys.executable, "-c", QUICK, "--vocab_size=300", "--val_tokens=200", *flags], cwd=REPO,
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
    assert source["revisions"][0].startswith("0123456789abcdef")


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
    answer = lambda status: argparse.Namespace(headers={}, status_code=status, request=None)
    for error in (ConnectionResetError(104, "reset"), TimeoutError("late"), socket.gaierror(-2, "Name or service not known"),
                  errors.HfHubHTTPError("503 Server Error", response=answer(503)),
                  errors.HfHubHTTPError("429 Too Many Requests", response=answer(429))):
        assert is_network_error(error), error
    caused = datasets.exceptions.DatasetGenerationError("An error occurred")
    caused.__cause__ = EOFError("Compressed file ended")
    for error, words in (
            (errors.GatedRepoError("403", response=answer(403)), "is gated"), (caused, "EOFError: Compressed file ended"),
            (errors.RevisionNotFoundError("404", response=answer(404)), "no longer has the revision"),
            (errors.RepositoryNotFoundError("404", response=answer(404)), "nor a dataset of the hub"),
            (ValueError("BuilderConfig 'x' not found"), "BuilderConfig 'x' not found"),
            (pyarrow.ArrowInvalid("bad\nbytes"), "damaged (ArrowInvalid: bad bytes)"),
            (OSError("Couldn't deserialize thrift"), "damaged")):
        assert not is_network_error(error), error
        told = hub_failure(error, "--dataset=a/b")
        assert isinstance(told, BadInput) and str(told).startswith("--dataset=a/b: ") and words in str(told)
    full = hub_failure(OSError(28, "No space left on device"), "--dataset=a/b")
    assert type(full) is OSError and "HF_HOME" in str(full) and "No space left" in str(full)


def test_no_network(prepare_from_hub, tmp_path):
    done = prepare_from_hub(f"--data_path={tmp_path / 'data'}", url="http://127.0.0.1:9")  # nobody listens there
    assert_refused(done, ["--dataset=HuggingFaceFW/fineweb-edu", "cannot be reached", "builtin"])


def assert_refused(done, words):
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "[00:" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]
