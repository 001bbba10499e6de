"""Reading datasets of the hub, from a stand-in that fails on request."""
import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_download_data import contents, documents_in

import download_data
import text.hub
from conftest import HUB, REPO, stderr_lines
from hub import COMMIT, damage_row_group
from runtime.config import BadInput
from shards import open_data
from tasks.rows import read_dataset
from text import formats
from text.documents import PackedDocuments
from text.formats import Chunk
from text.hub import RetryPolicy, hub_error, is_network_error
from text.sources import SourceConfig, open_source
from tokenizer import Tokenizer

ROWS = [[{"text": f"Document {i} of file {j} is about the number {i * j}.", "score": i} for i in range(30)]
        for j in range(3)]
SMALL_SHARDS = ["--val_bytes=50", "--shard_size_threshold=150", "--tokenizer_bytes=1000"]
VOCABULARY = ["--vocab_size=300", "--val_bytes=200"]


@pytest.fixture(scope="module", autouse=True)
def datasets_of_the_hub():
    HUB.add("HuggingFaceFW/fineweb-edu", {"sample-10BT": ROWS, "default": ROWS[:1]})
    HUB.add("someone/empty", {"default": [[]]})


@pytest.fixture
def prepare_from_hub(hub, capsys, monkeypatch):
    """Runs download_data.py against the stand-in. Pauses are 100 times shorter, and a chunk is a few documents."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 100))
    for module in (text.hub, formats):
        monkeypatch.setattr(module, "CHUNK_BYTES", 500)

    def run(*flags):
        hub.requests.clear()
        capsys.readouterr()
        code = 0
        try:
            download_data.main([*VOCABULARY, *flags])
        except SystemExit as stop:
            code = stop.code
        return argparse.Namespace(returncode=code, **capsys.readouterr()._asdict())
    return run


@pytest.mark.integration
def test_streaming_and_downloading_give_the_same_shards(prepare_from_hub, hub, tmp_path):
    for streaming in (1, 0):
        done = prepare_from_hub(f"--data_path={tmp_path / str(streaming)}", f"--streaming={streaming}")
        assert done.returncode == 0, done.err
        counts = [int(count) for count in re.findall(r"(\d+) documents, \d+ shards", done.out)]
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
    assert done.returncode == 0, done.err
    (tmp_path / "part").mkdir()
    tokenizer = f"--tokenizer_path={tmp_path / 'all' / 'tokenizer.json'}"
    done = prepare_from_hub(f"--data_path={tmp_path / 'part'}", tokenizer, "--tokens_threshold=400")
    assert done.returncode == 0, done.err
    shards = json.loads((tmp_path / "part" / "manifest.json").read_text())["shards"]
    total = sum(shard["tokens"] for split in shards.values() for shard in split)
    assert 400 < total < 450


@pytest.mark.parametrize("flags, words", [
    (["--dataset=someone/nothing"], ["--dataset=someone/nothing", "nor a repository on the hub"]),
    (["--dataset=nothing"], ["--dataset=nothing"]),
    (["--dataset_config=sample-9BT"], ["--dataset_config=sample-9BT", "sample-10BT"]),
    (["--text_column=body"], ["--text_column=body", "text, score"]),
    (["--text_column=score"], ["--text_column=score", "int"]),
    (["--dataset=someone/empty"], ["--dataset=someone/empty", "empty"])])
def test_missing_datasets_are_refused(prepare_from_hub, tmp_path, flags, words):
    assert_refused(prepare_from_hub(f"--data_path={tmp_path / 'data'}", *flags), words)
    assert not list((tmp_path / "data").glob("*"))


def test_a_damaged_file_on_the_hub(prepare_from_hub, hub, tmp_path):
    rows, more = [[{"text": f"Document {i} of file {j} is about the number {i * i}."} for i in range(40)] for j in (0, 1)]
    hub.add("someone/damaged", {"default": [rows, more]})
    damage_row_group(hub.folder / "someone" / "damaged" / "default" / "001.parquet", 2)
    flags = ["--dataset=someone/damaged", f"--data_path={tmp_path / 'data'}", "--tokenizer_bytes=1000",
             "--shard_size_threshold=100", "--val_bytes=100"]
    assert_refused(prepare_from_hub(*flags), ["someone/damaged", "001.parquet: row group 2 of 6 cannot be read",
                                              "--skip_errors=1", "resume after them"])
    done = prepare_from_hub(*flags, "--skip_errors=1")
    assert done.returncode == 0, done.err
    assert "skipped: datasets/someone/damaged" in done.err and "skipped, as unreadable: 1" in done.out
    found = documents_in(tmp_path / "data", "val") + documents_in(tmp_path / "data", "train")
    assert sorted(found) == sorted(row["text"] for row in [*rows, *more[:14], *more[21:]])  # of seven rows each
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["left_out"] == 1


@pytest.mark.parametrize("readme, name, content, words", [
    ("hello", "things.py", b"import datasets\n", []),  # the words depend on the version of datasets
    ("---\nconfigs: [\n---\n", "header.jsonl", b'{"text": "a"}\n', ["damaged", "ParserError"]),
    ("hello", "notes.xyz", b"no data", ["No (supported) data files"]),
    ("hello", "latin.jsonl", b'{"text": "\xff\xfe"}\n', ["damaged", "UnicodeDecodeError"])])
def test_unreadable_datasets_are_refused(prepare_from_hub, hub, tmp_path, readme, name, content, words):
    dataset = f"someone/{Path(name).stem}"
    folder = hub.folder / dataset
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(readme)
    (folder / name).write_bytes(content)
    assert_refused(prepare_from_hub(f"--dataset={dataset}", f"--data_path={tmp_path / 'data'}"), [dataset, *words])


def test_network_errors_are_distinguished_from_other_errors():
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
            (errors.RepositoryNotFoundError("404", response=answer(404)), "nor a repository on the hub"),
            (ValueError("BuilderConfig 'x' not found"), "BuilderConfig 'x' not found"),
            (pyarrow.ArrowInvalid("bad\nbytes"), "damaged (ArrowInvalid: bad bytes)"),
            (OSError("Couldn't deserialize thrift"), "damaged")):
        assert not is_network_error(error), error
        explained = hub_error(error, "--dataset=a/b")
        assert isinstance(explained, BadInput) and words in str(explained)
        assert str(explained).startswith("--dataset=a/b: ")
    full = hub_error(OSError(28, "No space left on device"), "--dataset=a/b")
    assert type(full) is OSError and "HF_HOME" in str(full) and "No space left" in str(full)


@pytest.mark.integration
def test_no_network(tmp_path):
    """Nobody listens there. A process of its own, since HF_ENDPOINT is read on import."""
    done = subprocess.run([sys.executable, "download_data.py", *VOCABULARY, f"--data_path={tmp_path / 'data'}"], cwd=REPO,
                          env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}, capture_output=True, text=True)
    done.err = done.stderr
    assert_refused(done, ["--dataset=HuggingFaceFW/fineweb-edu", "cannot be reached", "builtin"])
    assert not list(tmp_path.iterdir())


def assert_refused(done, words):
    line, = stderr_lines(done.err)
    assert done.returncode == 2
    for word in words:
        assert word in line, line


# -- retrying ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses of a RetryPolicy, which pass at once by a clock that only they move."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(time, "monotonic", lambda: float(sum(pauses)))
    return pauses


RESET = ConnectionResetError(104, "reset")


def fail_first(n_failures, error=RESET):
    """A function that raises `error` n_failures times and then returns 7."""
    failures = iter(range(n_failures))

    def function():
        if next(failures, None) is not None:
            raise error
        return 7
    return function


def test_pauses_grow_to_a_minute(pauses, capsys):
    assert RetryPolicy("--dataset=a/b", 600).call(fail_first(6)) == 7
    assert pauses == [10, 20, 40, 60, 60, 60]
    lines = stderr_lines(capsys.readouterr().err)
    assert lines[0] == ("--dataset=a/b: the hub does not answer (ConnectionResetError: [Errno 104] reset): trying again in "
                        "10 s")
    assert len(lines) == 6 and "in 60 s" in lines[-1]


@pytest.mark.parametrize("seconds, n_pauses", [(0, 0), (5, 0), (11, 1), (30, 1), (31, 2), (600, 11)])
def test_retries_end_within_retry_seconds(pauses, capsys, seconds, n_pauses):
    with pytest.raises(ConnectionError, match="--dataset=a/b: the hub stopped answering .TimeoutError: late"):
        RetryPolicy("--dataset=a/b", seconds).call(fail_first(10**6, TimeoutError("late")))
    assert len(pauses) == n_pauses and sum(pauses) <= seconds


def test_every_chunk_restarts_the_clock(pauses, capsys):
    """Reading fails for 30 of 31 allowed seconds before each of five chunks, and continues after the previous one."""
    failures = [2] * 5

    def read(state):
        for number in range(state or 0, 5):
            if failures[number]:
                failures[number] -= 1
                raise TimeoutError("late")
            yield Chunk(PackedDocuments.from_strings([str(number)]), number)
    chunks = list(RetryPolicy("--dataset=a/b", 31).retry_reading(read)(None))
    assert [text for chunk in chunks for text in chunk.documents.strings()] == ["0", "1", "2", "3", "4"]
    assert pauses == [10, 20] * 5


@pytest.mark.parametrize("error", [BadInput("--text_column=x: no such column"), MemoryError(), KeyboardInterrupt()],
                         ids=repr)
def test_other_errors_are_not_retried(pauses, error):
    with pytest.raises(type(error)) as raised:
        RetryPolicy("--dataset=a/b", 600).call(fail_first(1, error))
    assert raised.value is error and not pauses
    with pytest.raises(BadInput, match="--dataset=a/b: cannot be read; perhaps .* damaged .EOFError: ended"):
        RetryPolicy("--dataset=a/b", 600).call(fail_first(1, EOFError("ended")))


# -- a network that fails ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """The files of a preparation without failures."""
    path = tmp_path_factory.mktemp("undisturbed") / "data"
    download_data.main([*VOCABULARY, f"--data_path={path}", *SMALL_SHARDS])
    return contents(path)


@pytest.mark.integration
@pytest.mark.parametrize("streaming", [1, 0])
@pytest.mark.parametrize("how", ["503", "429", "cut", "away"])
def test_a_short_failure_changes_nothing(prepare_from_hub, hub, undisturbed, tmp_path, how, streaming):
    """Each file fails once, after its first requests; the hub's own library retries most of this silently."""
    for name in ("000", "001", "002"):
        hub.fail(how, f"resolve/{COMMIT}/sample-10BT/{name}.parquet", after=1 - streaming)
    done = prepare_from_hub(f"--data_path={tmp_path / 'data'}", f"--streaming={streaming}", *SMALL_SHARDS)
    assert done.returncode == 0, done.err
    assert all("the hub does not answer (" in line for line in stderr_lines(done.err)), done.err
    assert sum(fault[3] for fault in hub.faults) == 0  # all of them happened
    assert contents(tmp_path / "data") == undisturbed


@pytest.mark.integration
@pytest.mark.parametrize("how", ["503", "away"])
def test_a_hub_that_is_away_for_a_minute(prepare_from_hub, hub, undisturbed, tmp_path, how):
    """That is for longer than its own library retries."""
    hub.fail(how, "sample-10BT/001.parquet", times=15)
    done = prepare_from_hub(f"--data_path={tmp_path / 'data'}", *SMALL_SHARDS)
    assert done.returncode == 0, done.err
    lines = [line for line in stderr_lines(done.err) if "trying again in" in line]
    assert [re.search(r"trying again in (\d+) s", line).group(1) for line in lines] == ["10", "20"], done.err
    assert all("--dataset=HuggingFaceFW/fineweb-edu" in line for line in lines)
    assert contents(tmp_path / "data") == undisturbed


@pytest.mark.integration
def test_a_hub_that_stays_away(prepare_from_hub, hub, undisturbed, tmp_path):
    """Finished shards stay, and the command that the error names resumes after them."""
    hub.fail("away", "sample-10BT/002.parquet", times=10**9)
    flags = [f"--data_path={tmp_path / 'data'}", *SMALL_SHARDS, "--retry_seconds=0"]
    done = prepare_from_hub(*flags)
    last, = stderr_lines(done.err)
    assert done.returncode == 1, done.err
    assert "the hub stopped answering" in last and "resume after them with `python " in last
    for flag in flags:
        assert flag in last
    finished = sorted(path.name for path in (tmp_path / "data").glob("*.npy"))
    assert len(finished) > 3 and not list((tmp_path / "data").glob("*.tmp"))
    hub.fail("away", "/api/", times=10**9)  # still away when that command is run
    done = prepare_from_hub(*flags)
    last = stderr_lines(done.err)[-1]
    assert done.returncode == 1 and "stopped answering" in last and "resume after them with `python " in last
    assert sorted(path.name for path in (tmp_path / "data").glob("*.npy")) == finished
    hub.faults.clear()
    done = prepare_from_hub(*flags)
    assert done.returncode == 0, done.err
    assert contents(tmp_path / "data") == undisturbed
    assert not any("sample-10BT/000.parquet" in request for request in hub.requests if "resolve" in request)


@pytest.mark.integration
def test_a_busy_hub_at_the_first_contact_is_retried(prepare_from_hub, hub, undisturbed, tmp_path):
    hub.fail("503", "/api/datasets/", times=2)
    done = prepare_from_hub(f"--data_path={tmp_path / 'data'}", *SMALL_SHARDS)
    assert done.returncode == 0 and "does not answer" in stderr_lines(done.err)[0], done.err
    assert contents(tmp_path / "data") == undisturbed


@pytest.mark.parametrize("where", ["revision", "tree"])
def test_a_hub_that_never_answers(prepare_from_hub, hub, tmp_path, monkeypatch, where):
    """Its own library would wait forever."""
    dataset = f"someone/silent-{where}"  # not in a cache of the library
    hub.add(dataset, {"default": ROWS})
    monkeypatch.setattr(text.hub, "ANSWER_SECONDS" if where == "revision" else "LISTING_SECONDS", 1)
    hub.released.clear()
    hub.fail("silent", f"/api/datasets/{dataset}/{where}")
    flags = [f"--dataset={dataset}", f"--data_path={tmp_path / 'data'}", *SMALL_SHARDS]
    done = prepare_from_hub(*flags)
    hub.released.set()
    if where == "revision":  # the first contact
        assert_refused(done, ["cannot be reached", "no answer in 1 s"])
        done = prepare_from_hub(*flags)
    else:
        assert "no answer in 1 s" in stderr_lines(done.err)[0] and "trying again in 10 s" in stderr_lines(done.err)[0]
    assert done.returncode == 0, done.err
    assert len(documents_in(tmp_path / "data", "val") + documents_in(tmp_path / "data", "train")) == 90


@pytest.mark.parametrize("read", [
    lambda dataset: next(open_source(SourceConfig(dataset)).chunks()),
    lambda dataset: next(read_dataset(dataset, None, "train"))])
def test_a_hub_that_answers_late_is_named_meanwhile(hub, monkeypatch, capsys, read):
    """Not after the half minute in which its own library tries again."""
    dataset = f"someone/late-{id(read)}"  # not in a cache of the library
    hub.add(dataset, {"default": ROWS})
    monkeypatch.setattr(text.hub, "PATIENCE_SECONDS", 0.1)
    hub.released.clear()
    hub.fail("silent", f"/api/datasets/{dataset}")
    threading.Timer(0.5, hub.released.set).start()
    with contextlib.suppress(BadInput):  # the request that was not answered is cut off then
        read(dataset)
    line = stderr_lines(capsys.readouterr().err)[0]
    assert line.startswith(f"--dataset={dataset}: the hub does not answer yet: trying for up to ")


@pytest.mark.integration
def test_other_formats_resume_from_their_state(prepare_from_hub, hub, tmp_path):
    """jsonl is read by `datasets`; its second file fails at first, and then no longer."""
    folder = hub.folder / "someone" / "lines"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n")
    for name, rows in zip("ab", ROWS):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer.train([row["text"] for rows in ROWS for row in rows], 300).save(tokenizer)
    flags = ["--dataset=someone/lines", *SMALL_SHARDS, "--retry_seconds=0", f"--tokenizer_path={tokenizer}"]
    for streaming in (1, 0):
        done = prepare_from_hub(f"--data_path={tmp_path / f'whole{streaming}'}", *flags, f"--streaming={streaming}")
        assert done.returncode == 0, done.err
    assert contents(tmp_path / "whole1") == contents(tmp_path / "whole0")
    hub.fail("away", "b.jsonl", times=10**9)
    done = prepare_from_hub(f"--data_path={tmp_path / 'data'}", *flags)
    assert done.returncode == 1 and "stopped answering" in stderr_lines(done.err)[-1], done.err
    hub.faults.clear()
    done = prepare_from_hub(f"--data_path={tmp_path / 'data'}", *flags)
    assert done.returncode == 0, done.err
    assert contents(tmp_path / "data") == contents(tmp_path / "whole1")


@pytest.mark.integration
@pytest.mark.parametrize("num_nodes", [2, 5])
def test_nodes_take_disjoint_parts(prepare_from_hub, tmp_path, num_nodes):
    """Two files and one of three; rows, if there are more nodes than files."""
    texts = []
    for node in range(num_nodes):
        path = tmp_path / str(node)
        done = prepare_from_hub(f"--data_path={path}", f"--num_nodes={num_nodes}", f"--node={node}", "--val_bytes=50")
        assert done.returncode == 0, done.err
        texts += documents_in(path, "val") + documents_in(path, "train")
    assert sorted(texts) == sorted(row["text"] for rows in ROWS for row in rows)
    assert len({(tmp_path / str(node) / "tokenizer.json").read_bytes() for node in range(num_nodes)}) == 1
    assert open_data(tmp_path).manifest.total("train", "documents") > 60
