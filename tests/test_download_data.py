"""Preparing shards: splits and thresholds, resuming after any interruption, nodes, --verify, --stats, what is refused."""
import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import commands
import numpy as np
import pytest
from test_sources import assert_resumes_everywhere

import download_data
import shards
import train
from conftest import REPO, TINY_MODEL, stderr_lines
from runtime.config import BadInput
from runtime.files import folder_lock
from shards import Manifest, open_data
from text import formats, sources
from text.builtin import builtin_revision
from text.documents import PackedDocuments
from tokenizer import Tokenizer


@pytest.fixture
def texts(english) -> list[str]:
    """Documents so short that a shard holds several."""
    return list(dict.fromkeys(document[:1500] for document in english))


@pytest.fixture
def text(tmp_path, texts):
    """The --dataset flag of a folder with these documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    with open(folder / "a.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in texts)
    return f"--dataset={folder}"


def prepare(tmp_path, text, *flags, folder="data"):
    path = tmp_path / folder
    defaults = {"--vocab_size": 400, "--val_bytes": 8000, "--shard_size_threshold": 9000, "--tokens_threshold": 40000}
    given = {flag.split("=")[0] for flag in flags} | ({"--vocab_size"} if any("tokenizer" in f for f in flags) else set())
    download_data.main([text, f"--data_path={path}", *flags,
                        *(f"{name}={value}" for name, value in defaults.items() if name not in given)])
    return path


def documents_in(path, split) -> list[str]:
    """The decoded documents of a split."""
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    ids = np.concatenate([np.load(file) for file in sorted(path.glob(f"{split}_*.npy"))])
    assert ids[0] == tokenizer.separator_id
    starts = [*np.flatnonzero(ids == tokenizer.separator_id), len(ids)]
    return [tokenizer.decode(ids[start + 1:stop]) for start, stop in zip(starts, starts[1:])]


def contents(path) -> dict:
    """name -> bytes of the files in a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def expected_validation(texts: list[str], n_bytes: int, share: float) -> list[str]:
    """By its definition: the documents with the smallest hashes, in order."""
    chosen = {}
    for text in texts:
        utf8 = text.encode()
        number = int.from_bytes(hashlib.blake2b(utf8.strip(), digest_size=8).digest(), "little")
        if number < share * 2**64 and len(utf8) <= n_bytes and sum(map(len, chosen.values())) < n_bytes:
            chosen.setdefault(utf8.strip(), utf8)
    return [utf8.decode() for utf8 in chosen.values()]


def test_the_splits_are_the_stream_in_order(tmp_path, text, texts):
    path = prepare(tmp_path, text)
    val, train = documents_in(path, "val"), documents_in(path, "train")
    rest = [document for document in texts if document not in val]
    assert train == rest[:len(train)] and len(train) > 20
    assert val == expected_validation(texts, 8000, 8000 / 160_000) and len(val) > 4


@pytest.mark.parametrize("val_bytes, share", [(3000, 0.02), (20_000, 0.1), (10**6, 0.1), (700, 1 / 160)])
def test_the_validation_split_is_the_same_whatever_the_vocabulary(tmp_path, text, texts, val_bytes, share):
    """And whatever the size of shards and chunks; it is spread over the text, and a tenth of it at most."""
    total = sum(map(len, (document.encode() for document in texts)))
    share = min(0.1, val_bytes / (tmp_path / "text" / "a.jsonl").stat().st_size)
    expected = expected_validation(texts, val_bytes, share)
    folders = [prepare(tmp_path, text, f"--val_bytes={val_bytes}", "--tokens_threshold=1e9", *flags, folder=str(number))
               for number, flags in enumerate((["--vocab_size=300"], ["--vocab_size=600", "--shard_size_threshold=500"]))]
    manifests = [Manifest.load(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests):
        val = documents_in(folder, "val")
        assert val == expected or not expected and len(val) == 1
        assert manifest.val_digest == manifests[0].val_digest and manifest.n_val_passed == len(val)
        assert manifest.total("val", "bytes") == sum(len(document.encode()) for document in val) < 0.2 * total
        assert documents_in(folder, "train") == [document for document in texts if document not in val]
    positions = [texts.index(document) for document in documents_in(folders[0], "val")]
    assert positions == sorted(positions)


@pytest.mark.parametrize("documents", [["one"], ["  ", "\n"], ["one", "one ", " one"]])
def test_text_that_cannot_be_split_is_refused(tmp_path, documents, refused):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text + "\n"}) + "\n" for text in documents))
    tokenizer = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, "gpt2")
    tokenizer.save(tmp_path / "t.json")
    refused(download_data.main, [f"--dataset={tmp_path / 'a.jsonl'}", f"--data_path={tmp_path / 'data'}",
                                 f"--tokenizer_path={tmp_path / 't.json'}"], "--dataset")
    assert not (tmp_path / "data").exists()


def test_few_documents_leave_most_for_training(tmp_path):
    """The one that a hash chooses, though never one of more than half of the text."""
    tokenizer = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, "gpt2")
    tokenizer.save(tmp_path / "t.json")
    for seed in range(8):
        documents = [f"{seed} {letter * n}" for letter, n in (("a", 900), ("b", 100), ("c", 120))]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        download_data.main([f"--dataset={tmp_path / 'a.jsonl'}", f"--data_path={tmp_path / str(seed)}",
                            f"--tokenizer_path={tmp_path / 't.json'}"])
        assert documents_in(tmp_path / str(seed), "train")[0] == documents[0]


def test_thresholds(tmp_path, text):
    path = prepare(tmp_path, text)
    manifest = Manifest.load(path)
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    last = documents_in(path, "train")[-1]
    total = manifest.total("val", "tokens") + manifest.total("train", "tokens")
    assert total > 40000 >= total - len(tokenizer.encode(last)) - 1
    shards = manifest.shards["train"]
    assert len(shards) > 2 and all(shard.tokens >= 9000 for shard in shards[:-1])


def test_the_manifest_describes_the_shards(tmp_path, text):
    path = prepare(tmp_path, text)
    manifest, tokenizer = Manifest.load(path), Tokenizer.load(path / "tokenizer.json")
    assert (manifest.tokenizer, manifest.vocab_size, manifest.dtype) == (tokenizer.fingerprint(), 400, "uint16")
    assert manifest.complete and manifest.source["dataset"] == text.removeprefix("--dataset=")
    for split in ("val", "train"):
        for shard in manifest.shards[split]:
            ids = np.load(path / shard.file)
            assert ids.dtype == np.uint16 and ids.ndim == 1 and len(ids) == shard.tokens
            assert hashlib.sha256(ids.tobytes()).hexdigest() == shard.sha256
            assert shard.bytes == tokenizer.token_bytes()[ids].sum()
            assert shard.documents == (ids == tokenizer.separator_id).sum()
    assert sorted(file.name for file in path.iterdir()) == sorted(
        ["manifest.json", "tokenizer.json", *(shard.file for split in manifest.shards.values() for shard in split)])


def test_shard_size_does_not_change_the_tokens(tmp_path, text):
    many, one = prepare(tmp_path, text), prepare(tmp_path, text, "--shard_size_threshold=1e9", folder="one")
    assert documents_in(many, "train") == documents_in(one, "train")
    assert len(list(one.glob("train_*"))) == 1


def test_tokenizer_path_is_used_and_copied(tmp_path, text):
    first = prepare(tmp_path, text, "--vocab_size=300")
    second = prepare(tmp_path, text, f"--tokenizer_path={first / 'tokenizer.json'}", folder="second")
    assert contents(first) == contents(second)


def test_a_second_run_does_nothing(tmp_path, text, capsys, monkeypatch):
    path = prepare(tmp_path, text)
    before = contents(path)
    capsys.readouterr()
    monkeypatch.setattr(download_data, "open_source", None)  # the text is not even read
    prepare(tmp_path, text)
    assert "already complete, nothing to do" in capsys.readouterr().out
    assert contents(path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_an_interrupted_preparation_resumes(tmp_path, text, monkeypatch, error, stop_after):
    expected = contents(prepare(tmp_path, text, folder="whole"))
    opened = 0
    open_shard = shards.ShardWriter._open

    def stop(self):
        nonlocal opened
        opened += 1
        open_shard(self)
        if opened > stop_after:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "_open", stop)
        with pytest.raises(SystemExit) as exit:
            prepare(tmp_path, text)
    assert exit.value.code == (130 if error is KeyboardInterrupt else 1)
    path = tmp_path / "data"
    assert len(list(path.glob("*.npy"))) == stop_after and not list(path.glob("*.tmp"))
    assert stop_after or not path.exists()  # without a finished shard nothing stays
    prepare(tmp_path, text)
    assert contents(path) == expected


def interrupt_at(event: int, functions: set[str] | None):
    """A trace function that raises KeyboardInterrupt at the event-th line executed in `functions` (None: all) of the modules
    that write files."""
    left = event

    def trace(frame, what, arg):
        nonlocal left
        if Path(frame.f_code.co_filename).name not in {"shards.py", "files.py"} or (
                functions and frame.f_code.co_name not in functions):
            return None
        if what == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace
    return trace


@pytest.mark.integration
@pytest.mark.parametrize("functions", [{"close"}, pytest.param(None, marks=pytest.mark.slow)])
def test_a_preparation_resumes_after_ctrl_c_at_any_line(tmp_path, text, texts, functions, monkeypatch):
    """In each line that closes a shard, or that writes anything at all; and once more while resuming."""
    @contextlib.contextmanager
    def make_folder(folder, flag):
        folder.mkdir(exist_ok=True)
        yield
    monkeypatch.setattr(download_data, "folder_lock", make_folder)  # a lock ends with its process, but this process stays
    tokenizer = f"--tokenizer_path={prepare(tmp_path, text, folder='first') / 'tokenizer.json'}"
    flags = [tokenizer, "--val_bytes=700", "--shard_size_threshold=1000"]
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:4]))
    expected, interruptions = contents(prepare(tmp_path, text, *flags, folder="whole")), 0
    for event in range(1, 10**6):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        for _ in range(2):
            sys.settrace(interrupt_at(event, functions))
            try:
                prepare(tmp_path, text, *flags)
            except SystemExit as stop:
                assert stop.code == 130
                interruptions += 1
            finally:
                sys.settrace(None)
        prepare(tmp_path, text, *flags)
        assert contents(tmp_path / "data") == expected, event
        if not interruptions:
            break  # the preparation has fewer lines than this
        interruptions = 0
    assert event > 20


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="POSIX resource limits")
@pytest.mark.parametrize("limit", [500, 2_000, 5_000, 18_100])
def test_a_full_disk(tmp_path, text, limit):
    """Files may have at most `limit` bytes: the tokenizer, the validation shard or a training shard cannot be written."""
    expected = contents(prepare(tmp_path, text, folder="whole"))
    program = f"""import download_data, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
download_data.main()"""
    flags = [text, f"--data_path={tmp_path / 'data'}", "--vocab_size=400", "--val_bytes=8000",
             "--shard_size_threshold=9000", "--tokens_threshold=40000"]
    done = commands.run(["-c", program, *flags], cwd=REPO, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "[00:" not in line]
    assert done.returncode == 1 and len(lines) == 1 and "File too large" in lines[0], done.stderr
    assert str(tmp_path / "data") in lines[0] and not list((tmp_path / "data").glob("*.tmp"))
    prepare(tmp_path, text)
    assert contents(tmp_path / "data") == expected


def test_a_bad_row_found_after_resuming_keeps_finished_shards(tmp_path, text, monkeypatch, refused, capsys):
    """Interrupted after the validation shard, and then stopped by a line that is not JSON."""
    (tmp_path / "text" / "val.jsonl").write_text('{"text": "a document of the validation split"}\n')
    with open(tmp_path / "text" / "a.jsonl", "a") as file:
        file.write("{bad")
    monkeypatch.setattr(formats, "CHUNK_BYTES", 10_000)  # so that the bad line is not read before anything is written
    interrupt_after_shards(monkeypatch, tmp_path, text, 1, "--tokens_threshold=1e9", "--tokenizer_bytes=30000",
                           "--vocab_size=400")
    before = contents(tmp_path / "data")
    error = capsys.readouterr().err
    assert "val_000000.npy" in before
    assert f"finished shards in {tmp_path / 'data'}: 1, resume after them with `python download_data.py" in error
    refused(download_data.main, [
        text, f"--data_path={tmp_path / 'data'}", "--vocab_size=400", "--val_bytes=8000", "--shard_size_threshold=1e9",
        "--tokens_threshold=1e9", "--tokenizer_bytes=30000"], "--shard_size_threshold")
    refused(download_data.main, [
        text, f"--data_path={tmp_path / 'data'}", "--vocab_size=400", "--val_bytes=8000", "--shard_size_threshold=9000",
        "--tokens_threshold=1e9", "--tokenizer_bytes=30000"], "a.jsonl: line",
        "cannot be parsed as JSON", "--skip_errors=1", "resume after them")
    assert before.items() - contents(tmp_path / "data").items() <= {("manifest.json", before["manifest.json"])}


def test_a_tokenizer_already_in_the_folder_is_used(tmp_path, text):
    first = prepare(tmp_path, text, "--vocab_size=300")
    second = tmp_path / "second"
    second.mkdir()
    (second / "tokenizer.json").write_bytes((first / "tokenizer.json").read_bytes())
    prepare(tmp_path, text, "--vocab_size=300", folder="second")
    assert contents(first) == contents(second)


# -- killed processes -------------------------------------------------------------------------------------------------

KILL = """
import os, random, signal, sys, threading
import download_data, shards, text.hub, text.formats
text.hub.CHUNK_BYTES = text.formats.CHUNK_BYTES = 20_000
random.seed(int(sys.argv.pop(1)))
open_shard, started = shards.ShardWriter._open, []
def open_and_start_clock(self):  # the clock runs from the first shard on
    if not started:
        started.append(threading.Timer(random.uniform(0, 0.25), os.kill, (os.getpid(), signal.SIGKILL)))
        started[0].daemon = True
        started[0].start()
    open_shard(self)
shards.ShardWriter._open = open_and_start_clock
download_data.main()
"""


def prepare_with_kills(flags: list[str], path: Path, n_kills: int) -> list[int]:
    """Runs the command in processes that are killed at random moments of their work, n_kills times or more; then once
    unharmed. Returns the number of shards there were after each kill."""
    seeds, n_shards = itertools.count(), []
    while len(n_shards) < n_kills or (n_kills > 10 and len(set(n_shards)) < 5):
        done = commands.run(["-c", KILL, next(seeds), *flags], cwd=REPO, timeout=60)
        assert done.returncode in (0, -9), done.stderr
        if Manifest.load(path).complete:  # it was faster
            shutil.rmtree(path)
        else:
            n_shards.append(len(list(path.glob("*.npy"))))
    download_data.main(flags)
    return n_shards


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("origin, n_kills", [
    ("local", 3), ("streamed", 1), *(pytest.param(origin, 20, marks=pytest.mark.slow)
                                     for origin in ("local", "streamed", "mix", "downloaded"))])
def test_kills_do_not_change_the_folder(tmp_path, text, texts, hub, origin, n_kills):
    """With shards so small that most of the time goes into closing them."""
    flags = [f"--data_path={tmp_path / 'data'}", "--vocab_size=300", "--tokenizer_bytes=30000", "--val_bytes=20000",
             "--shard_size_threshold=2000"]
    if origin == "local":
        flags.append(text)
    elif origin == "mix":
        (tmp_path / "other.txt").write_text("\n\n".join(texts), encoding="utf-8")
        flags += [f"{text},{tmp_path / 'other.txt'}", "--mix=0.7,0.3"]
    else:
        hub.add("some/texts", {"default": [[{"text": text} for text in texts[i::3]] for i in range(3)]})
        flags += ["--dataset=some/texts", f"--streaming={int(origin == 'streamed')}"]
    download_data.main([flag.replace("/data", "/whole") if flag.startswith("--data_path") else flag for flag in flags])
    n_shards = prepare_with_kills(flags, tmp_path / "data", n_kills)
    assert max(n_shards) > 0, n_shards
    expected, found = contents(tmp_path / "whole"), contents(tmp_path / "data")
    assert found.keys() == expected.keys() and len(found) > 40
    assert found == expected


@pytest.mark.parametrize("event", ["saved", "closed"])
def test_skipped_parts_are_counted_once(tmp_path, text, monkeypatch, event):
    """Stopped before the last save, or after the last shard, with skipped lines behind it, it resumes to the same count."""
    monkeypatch.setattr(formats, "CHUNK_BYTES", 10_000)
    with open(tmp_path / "text" / "a.jsonl", "a") as file:
        file.write("{bad\n[1]\n")
    (tmp_path / "text" / "0.jsonl").write_text('nothing\n{"text": "one"}\n')
    flags = ["--skip_errors=1", "--tokens_threshold=1e9"]
    expected = contents(prepare(tmp_path, text, *flags, folder="whole"))
    assert json.loads(expected["manifest.json"])["left_out"] == 3
    save, saved = Manifest.save, 0
    n_saves = len(expected)  # at the start, for each shard and at the end: as many as files but tokenizer.json

    def stop(self, path):
        nonlocal saved
        saved += 1
        if event == "saved" and saved == n_saves - 1 or event == "closed" and saved == n_saves - 2:
            save(self, path)
            raise KeyboardInterrupt
        save(self, path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Manifest, "save", stop)
        prepare(tmp_path, text, *flags)
    assert not Manifest.load(tmp_path / "data").complete
    prepare(tmp_path, text, *flags)
    assert contents(tmp_path / "data") == expected


@pytest.mark.integration
def test_the_summary_of_non_ascii_text(tmp_path, capsys):
    """Its sample of the validation split ends with a document, not within a character."""
    for name, documents in (("one", 1), ("three", 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": "中文字" * 120_000}) + "\n"
                                                        for _ in range(documents)) + '{"text": "rest"}\n')
        tokenizer = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, "default")
        tokenizer.save(tmp_path / "tokenizer.json")
        download_data.main([f"--dataset={tmp_path / f'{name}.jsonl'}", f"--data_path={tmp_path / name}",
                            f"--tokenizer_path={tmp_path / 'tokenizer.json'}", f"--val_bytes={documents * 1_000_000}"])
        assert "words that are a single token: 0.0%" in capsys.readouterr().out


@pytest.mark.integration
def test_two_preparations_in_one_folder_are_refused(tmp_path, text, refused):
    """While the first is running, even before it has written anything."""
    expected = contents(prepare(tmp_path, text, folder="whole"))
    flags = [text, f"--data_path={tmp_path / 'data'}", "--vocab_size=400", "--val_bytes=8000",
             "--shard_size_threshold=9000", "--tokens_threshold=40000"]
    program = """import download_data, sys
download_data.write_validation  # or the line below would replace nothing
download_data.write_validation = lambda *args: sys.stdin.read()
download_data.main()"""
    process = commands.start(["-c", program, *flags], cwd=REPO, stdin=subprocess.PIPE)
    try:
        while not (tmp_path / "data" / "manifest.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        refused(download_data.main, flags, "--data_path=", "another process is writing there")
        process.kill()  # releases the lock
    finally:
        process.kill()
        process.wait()
    download_data.main(flags)
    assert contents(tmp_path / "data") == expected
    with folder_lock(tmp_path / "new", "--data_path=new"):
        refused(download_data.main, [text, f"--data_path={tmp_path / 'new'}"], "another process")
    assert not (tmp_path / "new").exists()


# -- thresholds by hand -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_val, shard_size, tokens, val, train", [
    # documents of 3, 4, 2, 9, 2, 2 tokens, the first in a file for validation; expected: the lengths of those in each shard
    (1, 7, 10**6, [[3]], [[4, 2, 9], [2, 2]]),
    (2, 8, 10**6, [[3, 4]], [[2, 9], [2, 2]]),
    (3, 4, 10**6, [[3, 4], [2]], [[9], [2, 2]]),
    (1, 1, 10**6, [[3]], [[4], [2], [9], [2], [2]]),
    (1, 100, 6, [[3]], [[4]]),
    (1, 100, 7, [[3]], [[4, 2]]),  # stops with more tokens than the threshold, not with as many
    (1, 4, 9, [[3]], [[4], [2, 9]]),
    (1, 100, 21, [[3]], [[4, 2, 9, 2, 2]]),
    (1, 100, 22, [[3]], [[4, 2, 9, 2, 2]])])  # the text ends first
@pytest.mark.parametrize("chunk_bytes", [1, 20, 1 << 20])
def test_thresholds_by_hand(tmp_path, monkeypatch, n_val, shard_size, tokens, val, train, chunk_bytes):
    """One token per byte, and one for the separator. The size of chunks makes no difference."""
    monkeypatch.setattr(formats, "CHUNK_BYTES", chunk_bytes)
    tokenizer = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, "gpt2")
    tokenizer.save(tmp_path / "tokenizer.json")
    lines = [json.dumps({"text": letter * (n - 1)}) + "\n" for letter, n in zip("abcdef", (3, 4, 2, 9, 2, 2))]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "val.jsonl").write_text("".join(lines[:n_val]))
    (tmp_path / "text" / "train.jsonl").write_text("".join(lines[n_val:]))
    download_data.main([f"--dataset={tmp_path / 'text'}", f"--data_path={tmp_path / 'data'}", "--val_bytes=100",
                        f"--tokenizer_path={tmp_path / 'tokenizer.json'}", f"--shard_size_threshold={shard_size}",
                        f"--tokens_threshold={tokens}"])
    for split, expected in (("val", val), ("train", train)):
        shards = [np.load(path) for path in sorted((tmp_path / "data").glob(f"{split}_*.npy"))]
        assert [np.diff([*np.flatnonzero(ids == tokenizer.separator_id), len(ids)]).tolist() for ids in shards] == expected


# -- a data folder as a source ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("has_named_splits", [False, True])
def test_a_data_folder_is_prepared_again_for_another_vocabulary(tmp_path, text, texts, monkeypatch, has_named_splits):
    """Its documents to the byte, each in the split where it was, in order; also after an interruption."""
    if has_named_splits:
        held_out = [json.dumps({"text": f" a\r\n{n} ä "}) + "\n" for n in range(9)]
        (tmp_path / "text" / "test.jsonl").write_text("".join(held_out))
    first = prepare(tmp_path, text)
    monkeypatch.setattr(download_data, "CHUNK_BYTES", 3000)
    flags = [f"--dataset={first}", "--vocab_size=300", "--shard_size_threshold=9000"]
    download_data.main([*flags, f"--data_path={tmp_path / 'whole'}"])
    manifests = [Manifest.load(path) for path in (first, tmp_path / "whole")]
    assert manifests[0].vocab_size != manifests[1].vocab_size and manifests[0].val_digest == manifests[1].val_digest
    for split in ("val", "train"):
        assert documents_in(tmp_path / "whole", split) == documents_in(first, split)
        assert manifests[0].total(split, "bytes") == manifests[1].total(split, "bytes")
    assert manifests[1].n_duplicates == 0
    for n in (0, 1, 2, 3):
        with interrupt_shard(monkeypatch, n):
            download_data.main([*flags, f"--data_path={tmp_path / 'data2'}"])
        download_data.main([*flags, f"--data_path={tmp_path / 'data2'}"])
        assert contents(tmp_path / "data2") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "data2")
    source = download_data.open_text(sources.SourceConfig(dataset=str(first)))
    assert assert_resumes_everywhere(source) == documents_in(first, "val") + documents_in(first, "train")
    assert len(list(source.chunks())) > 10


def test_retokenize(tmp_path, text, data_path):
    data, tokenizer = open_data(prepare(tmp_path, text)), Tokenizer.load(data_path / "tokenizer.json")
    again = download_data.retokenize(data, tokenizer, tmp_path / "again")
    assert again.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert documents_in(again.path, "train") == documents_in(data.path, "train")
    before = contents(again.path)
    download_data.retokenize(data, tokenizer, again.path)
    assert contents(again.path) == before
    with pytest.raises(BadInput, match="another tokenizer"):
        download_data.retokenize(data, data.tokenizer, again.path)


def test_a_data_folder_named_builtin_is_not_the_builtin_text(tmp_path, text, data_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, text, folder="builtin")
    again = download_data.retokenize(open_data(Path("builtin")), Tokenizer.load(data_path / "tokenizer.json"), Path("again"))
    assert documents_in(again.path, "train") == documents_in(Path("builtin"), "train")
    source = download_data.open_text(sources.SourceConfig(dataset="builtin"))
    assert source.description["revisions"] == [builtin_revision()]


def test_data_folders_that_cannot_be_prepared_again(tmp_path, text, refused):
    first, other = prepare(tmp_path, text), f"--data_path={tmp_path / 'other'}"
    refused(download_data.main, [f"--dataset={first}", other, "--num_nodes=2"], "--num_nodes=2", "by one machine")
    refused(download_data.main, [f"--dataset={first},builtin", "--mix=1,1", other], "only by itself")
    refused(download_data.main, [f"--dataset={first}", f"--data_path={first}"], "--dataset=", "was prepared with")
    download_data.main([f"--dataset={first}", other, "--vocab_size=300"])
    shutil.rmtree(first)
    prepare(tmp_path, text, "--tokens_threshold=20000")
    refused(download_data.main, [f"--dataset={first}", other, "--vocab_size=300"], "its files have changed")


# -- the forecast -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [[], ["--vocab_size=400", "--tokens_threshold=40000"], ["--tokenizer_path=t.json"]],
                         ids=str)
def test_a_forecast_is_near_what_comes(tmp_path, text, data_path, monkeypatch, capsys, flags):
    """And nothing is written for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(data_path / "tokenizer.json", "t.json")
    flags, before = [text, "--data_path=out/data", *flags], sorted(tmp_path.rglob("*"))
    download_data.main([*flags, "--dry_run"])
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("using"))
    assert sorted(tmp_path.rglob("*")) == before
    assert list(rows) == ["source", *["tokenizer"] * ("--tokenizer_path=t.json" not in flags), "splits", "expected", "time",
                          "disk", "defaults"]
    download_data.main(flags)
    manifest = Manifest.load(Path("out/data"))
    total = lambda quantity: sum(manifest.total(split, quantity) for split in ("val", "train"))
    number = lambda words: float(words[0].replace(",", "")) * {"k": 1e3, "M": 1e6, "K": 1024}.get(words[1][0], 1)
    documents, n_bytes, tokens = (part.replace("about ", "").split() for part in rows["expected"].split(", "))
    for expected, found in ((documents, "documents"), (n_bytes, "bytes"), (tokens, "tokens")):
        assert number(expected) == pytest.approx(total(found), rel=0.1), (rows["expected"], found)
    assert number(rows["disk"].split()) == pytest.approx(2 * total("tokens"), rel=0.1)
    if "--tokens_threshold=40000" not in flags:
        assert f"--val_bytes={manifest.settings['val_bytes']}" in rows["defaults"]
    download_data.main([*flags, "--dry_run"])
    assert "complete already" in capsys.readouterr().out


def test_a_sample_says_how_much_text_follows_the_held_out_text():
    documents = PackedDocuments.from_utf8([b"x" * 1000])
    sample = download_data.Sample()
    for _ in sample.watch(formats.Chunk(documents, None, fraction=fraction) for fraction in (0.5, 0.75)):
        pass
    assert sample.text_bytes(sources.Source({}, None)) == 2000


def test_the_bar_ends_where_the_text_does_also_after_held_out_text(tmp_path, text):
    """A fifth is held out, of which 1,000 tokens are written; then 4,000 are a half of the rest."""
    manifest = Manifest.load(prepare(tmp_path, text))
    manifest.shards = {"val": [replace(manifest.shards["val"][0], tokens=1000)], "train": []}
    progress = download_data.Progress(download_data.PrepareConfig(tokens_threshold=10**9), manifest)
    for fraction in (0.2, 0.6):
        chunk = formats.Chunk(PackedDocuments.from_utf8([b"x"]), None, fraction=fraction)
        progress.add(chunk, "train_000000.npy", 1, 4000, 9000)
    progress.close()
    assert progress.bar.total == 1000 + 8000


def test_too_little_disk_is_said_before(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1024))
    prepare(tmp_path, text)
    assert "1.0 KiB free: TOO LITTLE" in capsys.readouterr().out


# -- several nodes ----------------------------------------------------------------------------------------------------

@pytest.mark.integration
def test_folders_of_nodes_train_together(tmp_path, text, texts, refused):
    """Side by side they hold the stream once, though each starts with its own validation split."""
    for node in (0, 1, 2):
        prepare(tmp_path, text, "--num_nodes=3", f"--node={node}", "--tokens_threshold=1e9", "--val_bytes=9000",
                folder=f"data/{node}")
    data = open_data(tmp_path / "data")
    found = [document for node in (0, 1, 2) for split in ("val", "train")
             for document in documents_in(tmp_path / "data" / str(node), split)]
    assert sorted(found) == sorted(texts)
    assert data.manifest.total("val", "documents") + data.manifest.total("train", "documents") == len(texts)
    train_flags = [f"--data_path={tmp_path / 'data'}", f"--checkpoint_path={tmp_path / 'gpt.pt'}", *TINY_MODEL,
                   "--batch_size=4", "--num_batch_accum=1", "--max_iter=2", "--val_iter=1", "--device=cpu", "--verbose=0",
                   "--overwrite"]
    train.main(train_flags)
    download_data.main([f"--data_path={tmp_path / 'data'}", "--verify"])
    assert data.split("train").read(0, 10**4).tolist() == np.concatenate(
        [np.load(path) for path in sorted((tmp_path / "data").glob("*/train_*.npy"))])[:10**4].tolist()
    refused(download_data.main, [text, "--num_nodes=3", "--node=3", "--data_path=x"], "--node=3", "--num_nodes=3")
    shutil.move(tmp_path / "data" / "1", tmp_path / "1")
    refused(train.main, train_flags, "--data_path=", "node 0, 2 of --num_nodes=3")
    prepare(tmp_path, text, "--num_nodes=3", "--node=1", "--vocab_size=401", folder="data/1")
    refused(train.main, train_flags, "were prepared with different flags, text or tokenizers")
    shutil.rmtree(tmp_path / "data" / "1")
    shutil.copytree(tmp_path / "data" / "0", tmp_path / "data" / "1")
    refused(train.main, train_flags, "node 0, 0, 2 of --num_nodes=3")
    (tmp_path / "data" / "2" / "manifest.json").unlink()
    (tmp_path / "data" / "1" / "manifest.json").unlink()
    (tmp_path / "data" / "0" / "manifest.json").unlink()
    refused(train.main, train_flags, "--data_path=", "no shards to read")


def test_other_folders_are_not_parts_of_nodes(tmp_path, text, refused):
    prepare(tmp_path, text, folder="data/mine")
    refused(train.main, [f"--data_path={tmp_path / 'data'}"], "--data_path=", "no shards to read")


# -- --verify, --stats, the summary -----------------------------------------------------------------------------------

def test_verify_names_every_difference(tmp_path, text, capsys, monkeypatch, refused):
    monkeypatch.setattr("shards.CHECKED_TOKENS", 1000)  # so that the stray id is further on
    path = prepare(tmp_path, text)
    capsys.readouterr()
    download_data.main([f"--data_path={path}", "--verify"])
    shards = list(path.glob("*.npy"))
    assert f"{len(shards)} shards" in capsys.readouterr().out
    separator = Tokenizer.load(path / "tokenizer.json").separator_id

    def change(name, change_ids):
        ids = np.load(path / name)
        change_ids(ids)
        np.save(path / name, ids)

    change("train_000000.npy", lambda ids: ids.__setitem__(7, 5))  # another byte
    change("train_000001.npy", lambda ids: ids.__setitem__(-1, 399 + 1))  # beyond the vocabulary
    change("train_000002.npy", lambda ids: ids.__setitem__(9, separator))  # one document more
    (path / "val_000000.npy").unlink()
    np.save(path / "train_000077.npy", np.zeros(3))
    refused(download_data.main, [f"--data_path={path}", "--stats"], "val_000000.npy", "missing")
    manifest = Manifest.load(path)
    manifest.shards["train"][3] = replace(manifest.shards["train"][3], bytes=7)
    manifest.save(path)
    with pytest.raises(SystemExit) as stop:
        download_data.main([f"--data_path={path}", "--verify"])
    *messages, last = stderr_lines(capsys.readouterr().err)
    assert stop.value.code == 2 and last.startswith("download_data.py: --data_path=")
    assert "does not match its manifest.json" in last
    for words in (["val_000000.npy", "missing"], ["train_000000.npy", "checksum"], ["train_000001.npy", "holds id 400"],
                  ["train_000001.npy", "checksum"], ["train_000002.npy", "documents, manifest.json says"],
                  ["train_000003.npy", "bytes of text, manifest.json says 7"], ["train_000077.npy", "not in manifest.json"]):
        assert any(all(word in line for word in words) for line in messages), (words, messages)
    assert not any("train_000003.npy" in line and "checksum" in line for line in messages)


def test_verify_an_unfinished_folder(tmp_path, text, capsys):
    path = prepare(tmp_path, text)
    manifest = Manifest.load(path)
    manifest.complete = False
    manifest.shards["train"].pop()
    manifest.save(path)  # as if killed between the last byte of a shard and its entry
    capsys.readouterr()
    download_data.main([f"--data_path={path}", "--verify"])
    assert "the preparation has not finished" in capsys.readouterr().out


@pytest.mark.parametrize("change, words", [
    (lambda data: data + b"\0\0", "holds 2 bytes after its tokens"), (lambda data: data + data, "bytes after its tokens"),
    (lambda data: data[:10] + bytes([data[10] ^ 4]) + data[11:], "not a .npy file"),
    (lambda data: data[:60] + b"\0" + data[61:], "not a .npy file"), (lambda data: b"", "not a .npy file"),
    (lambda data: data.replace(b"'shape': (", b"'shape': [", 1), "not a .npy file"),
    (lambda data: data.replace(b"<u2", b"|O2", 1), "not a .npy file")], ids=range(7))
def test_damaged_shards_are_refused(tmp_path, text, refused, change, words):
    """By --verify, and on opening."""
    shard = prepare(tmp_path, text) / "train_000001.npy"
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(BadInput, match=f"train_000001.npy: .*{words}"):
        open_data(shard.parent).split("train")
    with pytest.raises(BadInput, match="does not match its manifest.json"):
        shards.verify(shard.parent)


@pytest.mark.parametrize("change, words", [
    (lambda path: path.write_bytes(b""), "not a .npy file"), (Path.unlink, "missing"),
    (lambda path: np.save(path, np.full_like(np.load(path), 400)), "not tokens of this vocabulary")],
    ids=["cut off", "missing", "ids"])
def test_damaged_validation_shards_are_refused_on_resuming(tmp_path, text, monkeypatch, refused, change, words):
    interrupt_after_shards(monkeypatch, tmp_path, text, 3)
    change(tmp_path / "data" / "val_000000.npy")
    refused(lambda _: prepare(tmp_path, text), [], "val_000000.npy", words)


def test_a_flipped_bit_anywhere_in_a_header_is_refused_or_harmless(tmp_path, text):
    shard = prepare(tmp_path, text) / "val_000000.npy"
    data, ids = shard.read_bytes(), np.load(shard)
    for bit in range(0, 8 * 128, 3):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        try:
            tokens = open_data(shard.parent).split("val")
        except BadInput as error:
            assert "val_000000.npy: " in str(error)
        else:
            assert np.array_equal(tokens.read(0, len(tokens)), ids)


@pytest.mark.parametrize("place", [{}, {"at": {"file": 0, "row": 0, "byte": 0}, "skip": 0}, {"at": None, "skip": 9},
                                   {"at": {"file": 7, "row": 0, "byte": 0}, "skip": 1}, {"at": 3, "skip": 1},
                                   {"at": {}, "skip": 1}, {"at": {"file": 0, "row": 0, "byte": 7}, "skip": 1},
                                   "later", "the text was edited"], ids=str)
@pytest.mark.parametrize("has_checksum", [False, True])
def test_a_wrong_place_in_the_text_is_refused(tmp_path, text, texts, monkeypatch, refused, place, has_checksum):
    """It would end with other tokens than an uninterrupted preparation, and call them complete."""
    monkeypatch.setattr(formats, "CHUNK_BYTES", 5000)
    interrupt_after_shards(monkeypatch, tmp_path, text, 2)
    manifest = Manifest.load(tmp_path / "data")
    if place == "the text was edited":  # without a change of its size
        file = tmp_path / "text" / "a.jsonl"
        file.write_text(file.read_text().replace("e", "i").replace("tixt", "text"))
    else:
        manifest.position = manifest.position | {"skip": manifest.position["skip"] + 5} if place == "later" else place
    checksum = manifest.checksum
    manifest.save(tmp_path / "data")
    if not has_checksum:  # only the place was changed
        path = tmp_path / "data" / "manifest.json"
        path.write_text(path.read_text().replace(Manifest.load(tmp_path / "data").checksum, checksum))
    before = contents(tmp_path / "data")
    words = ["cannot be parsed as JSON"] if has_checksum and "'byte': 7" in str(place) else ["manifest.json: ", "changed"]
    refused(download_data.main, [text, f"--data_path={tmp_path / 'data'}", "--vocab_size=400", "--val_bytes=8000",
                                 "--shard_size_threshold=9000", "--tokens_threshold=40000"], *words)
    assert contents(tmp_path / "data") == before


@contextlib.contextmanager
def interrupt_shard(monkeypatch, n: int):
    """Ctrl-C while the n-th shard that the block writes, from 0, is open."""
    open_shard, opened = shards.ShardWriter._open, iter(range(10**6))

    def stop(self):
        open_shard(self)
        if next(opened) == n:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shards.ShardWriter, "_open", stop)
        yield


def interrupt_after_shards(monkeypatch, tmp_path, text, n: int, *flags: str):
    """Prepares `data` up to Ctrl-C while the shard after the first n is written."""
    with interrupt_shard(monkeypatch, n):
        prepare(tmp_path, text, *flags)


@pytest.mark.parametrize("is_complete", [True, False])
def test_folders_of_earlier_versions(tmp_path, text, refused, is_complete, capsys):
    """They are trained on, and are complete for the same command; an unfinished one is not resumed, as its validation split
    is another one."""
    path = prepare(tmp_path, text)
    manifest = Manifest.load(path)
    del manifest.settings["val_bytes"]
    manifest.settings |= {"val_tokens": 3000, "tokens_threshold": 10**10}
    manifest.val_digest, manifest.complete = "", is_complete
    manifest.save(path)
    values = json.loads((path / "manifest.json").read_text())
    del values["val_digest"], values["n_val_passed"]
    flags = [text, f"--data_path={path}", "--vocab_size=400", "--shard_size_threshold=9000"]
    for number in (3, 2):
        for name in ("checksum", "last_document", "n_duplicates") if number == 2 else ():
            del values[name]
        (path / "manifest.json").write_text(json.dumps(values | {"format": f"gpt-workbench shards {number}"}))
        if not is_complete:
            before = contents(path)
            refused(download_data.main, flags, "an earlier version", "choose another --data_path")
            assert contents(path) == before
            continue
        download_data.main(flags)
        assert "already complete" in capsys.readouterr().out
        refused(download_data.main, [*flags, "--val_bytes=9000"], "--val_bytes=9000", "was prepared")
        assert len(open_data(path).split("train")) > 30_000
        download_data.main([f"--data_path={path}", "--verify"])


@pytest.mark.parametrize("change", [
    {"vocab_size": None}, {"vocab_size": 1.5}, {"vocab_size": 10**30}, {"vocab_size": -1}, {"vocab_size": 70_000},
    {"tokenizer": 3}, {"left_out": -1}, {"n_duplicates": "1"}, {"shards": []}, {"shards": {"val": {}, "train": 3}},
    {"complete": 1}, {"settings": {"val_bytes": "many"}}, {"settings": {"num_nodes": 0}},
    {"val_digest": "x"}, {"n_val_passed": -1},
    {"source": {"dataset": 3, "revisions": []}}, {"source": {"revisions": [3]}}, {"place": []},
    {"place": {"at": 0, "skip": -1}}, {"checksum": 3}, {"extra": 1},
    *({"shard": {name: value}} for name, values in {
        "tokens": [-1, 0, 1.5, "9", None, 10**40], "bytes": [-1, 2**63], "documents": [0, 10**9],
        "sha256": ["", "x" * 64, None], "file": ["../x.npy", 3]}.items() for value in values)], ids=str)
def test_manifests_with_other_values_are_refused(data_path, tmp_path, change):
    values = json.loads((data_path / "manifest.json").read_text())
    values["shards"]["train"][0] |= change.get("shard", {})
    values |= {name: value for name, value in change.items() if name != "shard"}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BadInput, match="manifest.json: not a manifest of this program"):
        Manifest.load(tmp_path)


def test_stats_that_cannot_be_written_are_refused_first(tmp_path, text, refused, monkeypatch):
    path = prepare(tmp_path, text)
    monkeypatch.setattr(download_data, "count_lengths_and_ids", None)
    (path / "stats.csv").mkdir()
    refused(download_data.main, [f"--data_path={path}", "--stats"], f"{path / 'stats.csv'}: cannot be written")


def test_stats_count_and_draw(tmp_path, text, capsys, refused):
    path = prepare(tmp_path, text)
    data = open_data(path)
    lengths, counts = download_data.count_lengths_and_ids(data)
    documents = documents_in(path, "val") + documents_in(path, "train")
    encoded = [data.tokenizer.encode(document) for document in documents]
    assert lengths.tolist() == [len(ids) for ids in encoded]
    expected = np.bincount(np.concatenate(encoded), minlength=400)
    expected[data.tokenizer.separator_id] = len(documents)
    assert counts.tolist() == expected.tolist()
    download_data.main([f"--data_path={path}", "--stats"])
    out = capsys.readouterr().out
    assert f"documents: {len(documents)}; " in out and f"longest {lengths.max():,}" in out
    assert (path / "stats.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.reader((path / "stats.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["rank", "id", "occurrences", "token"] and len(rows) == 401
    assert int(rows[1][2]) == counts.max() and sum(int(row[2]) for row in rows[1:]) == counts.sum()
    data.split("train")  # the new files are not taken for shards
    refused(download_data.main, [f"--data_path={tmp_path / 'none'}", "--stats"], "no shards to read")


def test_stats_of_a_damaged_folder(tmp_path, text, monkeypatch, refused):
    path = prepare(tmp_path, text)
    ids = np.load(path / "train_000001.npy")
    ids[-1] = 400
    np.save(path / "train_000001.npy", ids)
    monkeypatch.setattr("shards.CHECKED_TOKENS", 1000)
    refused(download_data.main, [f"--data_path={path}", "--stats"], "holds id 400", "--verify names the shard")


def test_the_summary_describes_the_folder(tmp_path, text, capsys):
    path = prepare(tmp_path, text)
    out = capsys.readouterr().out
    data = open_data(path)
    ids = data.split("val").read(0, len(data.split("val")))
    assert f"words that are a single token: {data.tokenizer.single_token_words(ids):.1%} of the validation split" in out
    tokens, n_bytes = (data.manifest.total("val", quantity) for quantity in ("tokens", "bytes"))
    assert f"val  : {tokens:,} tokens" in out and "bytes per token" in out
    assert n_bytes == sum(len(document.encode()) for document in documents_in(path, "val"))


# -- what is refused --------------------------------------------------------------------------------------------------

def test_refusals_leave_a_finished_folder_alone(tmp_path, text, refused):
    path = prepare(tmp_path, text)
    before = contents(path)
    flags = [text, f"--data_path={path}", "--val_bytes=8000", "--shard_size_threshold=9000", "--tokens_threshold=40000"]
    refused(download_data.main, [*flags, "--vocab_size=500"], "--vocab_size=500", "400")
    refused(download_data.main, [*flags, "--val_bytes=4000"], "--val_bytes=4000", "8000")
    refused(download_data.main, ["--dataset=builtin", *flags[1:]], "--dataset=builtin", "was prepared with")
    refused(download_data.main, [*flags, "--text_column=body"], "--text_column=body", "text_column=text")
    other = prepare(tmp_path, text, "--vocab_size=300", folder="other") / "tokenizer.json"
    refused(download_data.main, [*flags, f"--tokenizer_path={other}"], f"--tokenizer_path={other}", "another tokenizer")
    assert contents(path) == before


def test_a_tokenizer_already_in_the_folder_is_not_deleted(tmp_path, text, refused):
    first = prepare(tmp_path, text, "--vocab_size=300")
    second = tmp_path / "second"
    second.mkdir()
    (second / "tokenizer.json").write_bytes((first / "tokenizer.json").read_bytes())
    (tmp_path / "one.jsonl").write_text('{"text": "a single document"}')
    refused(download_data.main, [f"--dataset={tmp_path / 'one.jsonl'}", f"--data_path={second}"], "a single document")
    assert contents(second) == {"tokenizer.json": (first / "tokenizer.json").read_bytes()}


def test_a_damaged_folder_is_not_complete(tmp_path, text, refused):
    path = prepare(tmp_path, text)
    shard = path / "train_000001.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(download_data.main, [text, f"--data_path={path}", "--val_bytes=8000", "--shard_size_threshold=9000",
                                 "--tokens_threshold=40000"], "train_000001.npy", "cut off")


def test_an_unfinished_folder_of_other_text_is_left_alone(tmp_path, text, refused, english):
    path = prepare(tmp_path, text)
    manifest = Manifest.load(path)
    manifest.complete = False
    manifest.save(path)
    before = contents(path)
    (tmp_path / "text" / "b.jsonl").write_text(json.dumps({"text": english[50]}))
    flags = [text, f"--data_path={path}", "--vocab_size=400", "--val_bytes=8000", "--shard_size_threshold=9000",
             "--tokens_threshold=40000"]
    refused(download_data.main, flags, "--dataset=", "its files have changed", "choose another --data_path")
    assert contents(path) == before


def test_builtin_text_of_other_packages_is_not_resumed(tmp_path, english, refused, monkeypatch):
    monkeypatch.setattr(sources, "builtin_texts", lambda: english)
    flags = ["--dataset=builtin", f"--data_path={tmp_path / 'data'}", "--vocab_size=300", "--val_bytes=8000",
             "--tokenizer_bytes=30000"]
    download_data.main(flags)
    manifest = Manifest.load(tmp_path / "data")
    manifest.complete = False
    manifest.save(tmp_path / "data")
    before = contents(tmp_path / "data")
    monkeypatch.setattr(sources, "builtin_revision", lambda: "python 2.7")
    refused(download_data.main, flags, "was started with", "python 2.7", "choose another --data_path")
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("words, vocab_size", [(12, range(262, 512)), (400, [512, 1024])])
def test_default_vocabulary_of_text_that_repeats_itself(tmp_path, words, vocab_size):
    """Sums, speeches of a few words: large files for which there are few merges."""
    some = [f"{i * 7919 % 99991:x}".translate(str.maketrans("0123456789", "ghijklmnop")) for i in range(words)]
    text = "\n\n".join(" ".join(random.Random(i).choices(some, k=12)) for i in range(9000))
    (tmp_path / "a.txt").write_text(text)
    download_data.main([f"--dataset={tmp_path / 'a.txt'}", f"--data_path={tmp_path / 'data'}"])
    assert Manifest.load(tmp_path / "data").vocab_size in vocab_size


FLAGS = ["--vocab_size=400", "--val_bytes=8000"]


@pytest.mark.parametrize("flags, words", [
    ([*FLAGS, "--tokens_threshold=100"], ["--tokens_threshold=100", "--val_bytes"]),
    ([*FLAGS, "--shard_size_threshold=0"], ["--shard_size_threshold=0"]),
    ([*FLAGS, "--tokenizer_path=none.json"], ["none.json", "no tokenizer"]),
    ([*FLAGS, "--tokenizer_path=text/a.jsonl"], ["not a tokenizer.json of this program"]),
    ([*FLAGS, "--vocab_size=30000"], ["--vocab_size=30000", "merges for only", "or --vocab_size="]),
    (["--streaming=maybe"], ["--streaming", "'maybe'"]),
    (["--val_bytes=many"], ["--val_bytes", "'many'"]),
    (["--val_tokens=1000"], ["--val_tokens", "give --val_bytes"]),
    
    ([*FLAGS, "--tokens_threshold=1e19"], ["--tokens_threshold", "too large"]),
    (["--num_nodes=2", "--node=2"], ["--node=2", "--num_nodes=2"]),
    ([*FLAGS, "--data_path=text/a.jsonl/x"], ["--data_path=", "cannot be written"])], ids=str)
def test_bad_flags_are_refused(tmp_path, text, monkeypatch, refused, flags, words):
    monkeypatch.chdir(tmp_path)
    refused(download_data.main, ["--dataset=text", "--data_path=data", *flags], *words)
    assert not (tmp_path / "data").exists()


def test_a_tokenizer_without_a_separator_is_refused(tmp_path, text, refused):
    Tokenizer.train(["aa bb"], 257, special_tokens=()).save(tmp_path / "other.json")
    refused(download_data.main, [text, f"--data_path={tmp_path / 'data'}", "--val_bytes=8000",
                                 f"--tokenizer_path={tmp_path / 'other.json'}"], "<|endoftext|>")
    assert not (tmp_path / "data").exists()


def test_a_folder_with_stray_shards_is_refused(tmp_path, text, refused):
    np.save(tmp_path / "train_000000.npy", np.zeros(3))
    before = contents_of_files(tmp_path)
    refused(download_data.main, [text, f"--data_path={tmp_path}", *FLAGS], "--data_path=", "no manifest.json")
    assert contents_of_files(tmp_path) == before


def contents_of_files(path) -> dict:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


# -- defaults that depend on the dataset ------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset, vocab_size", [("builtin", 4096), ("text", 512)])
def test_defaults_fit_the_text(tmp_path, english, text, monkeypatch, capsys, dataset, vocab_size):
    """0.2 MB of one's own text need no flags; nor do 3 kB of the same words, which have few merges."""
    monkeypatch.setattr(sources, "builtin_texts", lambda: english)
    trained = []
    train_tokenizer = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size, **kwargs: (
        trained.append(size), train_tokenizer(texts, min(size, 600)))[1])
    flag_text = "--dataset=builtin" if dataset == "builtin" else text
    n_bytes = sum(len(document.encode()) for document in english)
    if dataset == "text":
        n_bytes = (tmp_path / "text" / "a.jsonl").stat().st_size
        vocab_size = 1 << (n_bytes // 100).bit_length() - 1
    download_data.main([flag_text, f"--data_path={tmp_path / 'data'}"])
    manifest = Manifest.load(tmp_path / "data")
    assert trained == [vocab_size] and manifest.settings["val_bytes"] == n_bytes // 10
    assert manifest.settings["tokens_threshold"] == 400_000_000
    assert 0.03 < manifest.total("val", "bytes") / manifest.total("train", "bytes") < 0.13
    assert "tokens of" in capsys.readouterr().out  # the forecast


def test_a_default_vocabulary_shrinks_to_the_merges_there_are(tmp_path, english):
    words = sorted(set(" ".join(english[:20]).split()))[:400]
    texts = [" ".join([str(number), *words]) for number in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    download_data.main([f"--dataset={tmp_path / 'a.jsonl'}", f"--data_path={tmp_path / 'data'}"])
    assert Manifest.load(tmp_path / "data").vocab_size in (512, 1024)  # its size alone would be enough for 8,192


def test_a_flag_that_is_not_given_keeps_the_folders_value(tmp_path, text, capsys):
    """So that a folder of an earlier version, when the defaults were others, is complete for the same command."""
    path = prepare(tmp_path, text)
    before = contents(path)
    capsys.readouterr()
    download_data.main([text, f"--data_path={path}", "--shard_size_threshold=9000", "--tokens_threshold=40000"])
    assert "already complete" in capsys.readouterr().out
    manifest = Manifest.load(path)
    manifest.complete, manifest.shards["train"] = False, []
    manifest.position, manifest.last_document, manifest.n_val_passed = {}, "", 0
    manifest.save(path)
    for shard in path.glob("train_*.npy"):
        shard.unlink()
    download_data.main([text, f"--data_path={path}", "--shard_size_threshold=9000", "--tokens_threshold=40000"])
    assert contents(path) == before
