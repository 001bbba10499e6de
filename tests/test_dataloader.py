"""Batches, their order and position; shards written and read; data folders that are refused."""
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch

import train
from conftest import run_rows
from dataloader import (
    IGNORE_INDEX,
    BlockBatches,
    PackedBatches,
    TrainLoader,
    permute_index,
    row_length,
    shard_loader,
    val_batches,
    val_tokens,
)
from download_data import retokenize
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.config import BadInput
from shards import Manifest, ShardWriter, documents_to_reach, open_data
from tasks.conversations import Conversation
from tokenizer import Tokenizer

BLOCK = 16


@pytest.fixture(scope="module")
def data(data_path):
    return open_data(data_path)


@pytest.fixture
def data_copy(data_path, tmp_path):
    """A copy of the data folder that a test may damage."""
    return shutil.copytree(data_path, tmp_path / "data")


def take(loader, n):
    return [loader.next_batch() for _ in range(n)]


def equal(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(a, b) for pair in zip(batches, others) for a, b in zip(*pair))


# -- the order --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_index_is_a_permutation(n):
    for epoch in range(3):
        assert sorted(permute_index(np.arange(n), n, seed=3, epoch=epoch)) == list(range(n))


def test_batches_are_contiguous(data):
    """Copying a view to a GPU would wait for a copy on the CPU first."""
    loader = shard_loader(data, 3, 16, seed=0)
    assert all(part.is_contiguous() for part in (*loader.next_batch(), *next(val_batches(data, 49, 3, 16))))


def test_permute_index_depends_only_on_seed_and_epoch():
    orders = {tuple(permute_index(np.arange(50), 50, seed, epoch)) for seed, epoch in itertools.product(range(5), range(5))}
    assert len(orders) == 25
    parts = [permute_index(np.arange(first, first + 10), 50, 1, 2) for first in range(0, 50, 10)]
    assert np.array_equal(np.concatenate(parts), permute_index(np.arange(50), 50, 1, 2))
    # pinned: another order would break resuming of every current run
    assert permute_index(np.arange(8), 8, seed=1337, epoch=0).tolist() == PINNED_ORDER


PINNED_ORDER = [4, 7, 6, 1, 0, 5, 2, 3]


def test_permute_index_looks_random():
    """Over many epochs block 0 is uniformly distributed, and neighbours do not stay neighbours (5 sigma bounds)."""
    n, epochs = 10, 2000
    orders = np.array([permute_index(np.arange(n), n, seed=0, epoch=epoch) for epoch in range(epochs)])
    counts = np.bincount(orders[:, 0], minlength=n)
    assert np.all(abs(counts - epochs / n) < 5 * np.sqrt(epochs / n))
    stay = (np.diff(orders, axis=1) == 1).mean()
    assert abs(stay - 1 / n) < 5 * np.sqrt(0.1 / (epochs * n))


def test_an_epoch_has_every_block_once_across_shards(data):
    tokens = data.split("train")
    whole = np.concatenate([np.load(path) for path in tokens.paths]).astype(np.int64)
    n_blocks = (len(whole) - 1) // BLOCK
    assert len(tokens.paths) > 2 and n_blocks % 4, "the test needs several shards and batches that span two epochs"
    loader = shard_loader(data, batch_size=4, block_size=BLOCK, seed=7)
    rows = torch.cat([torch.cat((inputs, targets[:, -1:]), dim=1) for inputs, targets in take(loader, n_blocks)])
    expected = sorted(whole[i * BLOCK:(i + 1) * BLOCK + 1].tolist() for i in range(n_blocks))
    epochs = [rows[i * n_blocks:(i + 1) * n_blocks].tolist() for i in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert loader.blocks_seen == 4 * n_blocks


def test_the_first_tokens_over_and_over(data):
    """Three blocks, each once in an epoch; a part that is shorter than a block, or longer than the split, is refused."""
    loader, tokens = shard_loader(data, 3, BLOCK, seed=0, n_tokens=4 * BLOCK), data.split("train")
    expected = sorted(tokens.read(i * BLOCK, (i + 1) * BLOCK).tolist() for i in range(3))
    for _ in range(2):
        assert sorted(loader.next_batch()[0].tolist()) == expected
    for n_tokens in (BLOCK, len(tokens) + 1):
        with pytest.raises(BadInput, match=f"--train_tokens={n_tokens}: must be more than --block_size"):
            shard_loader(data, 3, BLOCK, seed=0, n_tokens=n_tokens)
    assert shard_loader(data, 3, BLOCK, seed=0, n_tokens=len(tokens)).next_batch()


def test_targets_are_the_next_token(data):
    inputs, targets = shard_loader(data, 3, BLOCK, seed=0).next_batch()
    assert inputs.shape == targets.shape == (3, BLOCK) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_batches_do_not_depend_on_workers(data):
    without, with_workers = (shard_loader(data, 4, BLOCK, seed=1, num_workers=n) for n in (0, 2))
    assert equal(take(without, 25), take(with_workers, 25))


def test_batches_do_not_touch_the_global_generator(data):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(shard_loader(data, 4, BLOCK, seed=1, num_workers=1), 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("n_before", [0, 1, 5, 700])
def test_the_position_counts_what_was_returned(data, workers, n_before):
    """With prefetched batches in flight, during and after the first epoch."""
    loader = shard_loader(data, 4, BLOCK, seed=1, num_workers=workers)
    loader.blocks_seen = 4 * n_before
    take(loader, 3)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = take(loader, 4)
    other = shard_loader(data, 4, BLOCK, seed=1, num_workers=2 - workers)
    other.load_state_dict(state)
    assert equal(take(other, 4), expected)


def test_close_ends_the_workers_and_keeps_the_position(data):
    loader, other = (shard_loader(data, 4, BLOCK, seed=1, num_workers=n) for n in (2, 0))
    take(loader, 3), take(other, 3)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert not multiprocessing.active_children()
    assert equal(take(loader, 2), take(other, 2))
    loader.close()


def test_close_after_a_worker_died_with_a_lock(data):
    """Workers check an event at every batch: one that is killed just then holds the event's lock forever."""
    loader = shard_loader(data, 4, BLOCK, seed=1, num_workers=2)
    take(loader, 1)
    holder = threading.Thread(target=loader.iterator._workers_done_event._cond.acquire, daemon=True)
    holder.start(), holder.join()
    with pytest.raises(RuntimeError, match="DataLoader worker"):  # from torch's signal handler
        os.kill(loader.iterator._workers[1].pid, signal.SIGKILL)
        time.sleep(10)
    loader.close()
    assert not multiprocessing.active_children()


def test_another_batch_size_resumes_with_the_same_blocks(data):
    large, small = shard_loader(data, 6, BLOCK, seed=1), shard_loader(data, 3, BLOCK, seed=1)
    large.next_batch()
    small.load_state_dict(large.state_dict())
    inputs, _ = large.next_batch()
    assert torch.equal(inputs, torch.cat([small.next_batch()[0], small.next_batch()[0]]))


def test_a_position_in_other_data_is_refused(data):
    loader = shard_loader(data, 4, BLOCK, seed=1)
    with pytest.raises(BadInput, match="differs from what the checkpoint was trained on"):
        loader.load_state_dict(loader.state_dict() | {"data": "0" * 16})


def test_val_batches_are_sequential(data):
    tokens = data.split("val").read(0, len(data.split("val"))).astype(np.int64)
    first, second = (list(val_batches(data, 3 * 4 * BLOCK + 1, 4, BLOCK)) for _ in range(2))
    assert equal(first, second)
    for part, start in ((0, 0), (1, 1)):
        assert torch.cat([batch[part] for batch in first]).flatten().tolist() == tokens[start:3 * 4 * BLOCK + start].tolist()


@pytest.mark.parametrize("val_iter, n_blocks", [(3, 12), (10**6, None)])
def test_val_iter_is_whole_blocks_as_far_as_the_split_goes(data, val_iter, n_blocks):
    run = train.RunConfig(val_iter=val_iter, val_batch=4)
    n_blocks = n_blocks or (len(data.split("val")) - 1) // BLOCK
    assert train.validation_tokens(data, run, BLOCK) == n_blocks * BLOCK + 1


@pytest.fixture(scope="module")
def vocabularies(data, tmp_path_factory) -> list:
    """The same documents in two vocabularies."""
    return [data, retokenize(data, Tokenizer.from_ranks(BYTES.ranks, "gpt2"), tmp_path_factory.mktemp("bytes") / "data")]


@pytest.mark.parametrize("n_bytes", [1, 700, 3000, 10**9])
@pytest.mark.parametrize("batch_size, block_size", [(1, 7), (4, 16), (64, 64), (2, 20_000)])
def test_validation_by_bytes_covers_the_same_text_for_every_vocabulary(vocabularies, n_bytes, batch_size, block_size):
    """Whole documents, the fewest from the start that hold as many bytes; each target once, and what follows masked."""
    expected = None
    for data in vocabularies:
        tokens, text = data.split("val"), []
        everything = tokens.read(0, len(tokens)).tolist()
        documents = b"".join(b"\0" if token == data.tokenizer.separator_id else data.tokenizer.decode_bytes([token])
                             for token in everything).split(b"\0")[1:]
        n_documents = next((n for n in range(1, len(documents)) if sum(map(len, documents[:n])) >= n_bytes), len(documents))
        expected = expected or documents[:n_documents]
        assert documents[:n_documents] == expected
        n_tokens = val_tokens(data, n_bytes)
        for inputs, targets in val_batches(data, n_tokens, batch_size, block_size):
            assert inputs.shape == targets.shape and 0 < len(inputs) <= batch_size and inputs.shape[1] == block_size
            is_target = targets != IGNORE_INDEX
            both = is_target.flatten()[1:]
            assert torch.equal(inputs.flatten()[1:][both], targets.flatten()[:-1][both])
            text += targets[is_target].tolist()
        assert text == everything[1:len(text) + 1]
        covered = [token for token in text if token != data.tokenizer.separator_id]
        assert data.tokenizer.decode_bytes(covered) == b"".join(expected)
        assert len(text) - len(covered) == n_documents - 1
        batches = [val_batches(data, n_tokens, batch_size, block_size) for _ in range(2)]
        assert equal(*map(list, batches))


def test_runs_validate_on_the_same_bytes_whatever_the_vocabulary(vocabularies, tmp_path):
    """Rows say how many; a run that began before there was --val_bytes goes on with its --val_iter."""
    paths = [tmp_path / str(number) / "gpt.pt" for number in (0, 1)]
    for path, data in zip(paths, vocabularies):
        train.main([*train_flags(data.path, tmp_path), f"--checkpoint_path={path}", "--val_bytes=3000", "--val_intervals=1"])
    covered = [{row["val_bytes"] for row in run_rows(path)} for path in paths]
    assert covered[0] == covered[1] and len(covered[0]) == 1 and 3000 <= min(covered[0]) < 9000
    checkpoint = load_checkpoint(paths[0])
    settings = checkpoint["training"]["settings"]
    assert vocabularies[0].manifest.val_digest == vocabularies[1].manifest.val_digest != ""
    del settings["val_bytes"]
    settings["val_iter"] = 2
    save_checkpoint(paths[0], checkpoint)
    resume = ["--resume_checkpoint", f"--checkpoint_path={paths[0]}", "--verbose=0", "--device=cpu"]
    train.main([*resume, "--max_iter=2"])
    assert run_rows(paths[0])[-1]["val_bytes"] < 300  # of two batches
    train.main([*resume, "--max_iter=3", "--val_bytes=3000"])
    assert {run_rows(paths[0])[-1]["val_bytes"]} == covered[0]


def test_pickled_batches_reopen_the_shards(data):
    batches = BlockBatches(data, "train", 2, BLOCK, seed=0)
    expected = batches[0]
    assert len(pickle.dumps(batches)) < 5000
    assert equal([pickle.loads(pickle.dumps(batches))[0]], [expected])


# -- shards -----------------------------------------------------------------------------------------------------------

def test_documents_to_reach_by_hand():
    starts = np.array([0, 5, 9, 12])
    assert [documents_to_reach(starts, 0, n) for n in (1, 5, 6, 9, 10, 99)] == [1, 1, 2, 2, 3, 3]
    assert documents_to_reach(starts, 1, 4) == 2 and documents_to_reach(starts, 2, 0) == 3
    assert documents_to_reach(starts, 1, 2**63 - 1) == 3


def test_a_shard_takes_documents_until_closed(tmp_path):
    manifest = Manifest({"revisions": ["r"]}, {}, "f", 300, "uint16")
    writer = ShardWriter(tmp_path, "train", 8, manifest)
    writer.close()  # nothing is open
    for ids, documents, room in ((np.arange(7), 2, 1), (np.arange(3), 1, -2)):
        writer.add(ids.astype(np.uint16), documents, 10)
        assert writer.room == room and not list(tmp_path.glob("*.npy"))
    manifest.position = {"at": 3, "skip": 1}
    writer.close()
    assert np.load(tmp_path / "train_000000.npy").tolist() == [*range(7), *range(3)]
    shard, = manifest.shards["train"]
    assert (shard.tokens, shard.documents, shard.bytes, writer.name, writer.room) == (10, 3, 20, "train_000001.npy", 8)
    assert Manifest.load(tmp_path) == manifest
    writer.add(np.zeros(2, np.uint16), 1, 1)
    writer.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "train_000000.npy"]


def test_large_vocabularies_use_uint32(tmp_path):
    manifest = Manifest({}, {}, "f", 70_000, "uint32")
    writer = ShardWriter(tmp_path, "val", 10, manifest)
    writer.add(np.array([69_999, 1], np.uint32), 1, 3)
    writer.close()
    assert np.load(tmp_path / "val_000000.npy").tolist() == [69_999, 1]


# -- folders that are refused -----------------------------------------------------------------------------------------

def train_flags(path, tmp_path):
    return [f"--data_path={path}", f"--checkpoint_path={tmp_path / 'new' / 'gpt.pt'}", "--n_layer=1", "--n_head=1",
            "--head_size=8", "--block_size=16", "--max_iter=1", "--batch_size=2", "--num_batch_accum=1", "--verbose=0",
            "--dataloader_num_workers=0"]


def edit_shard(edit, name="train_000001.npy"):
    """A damage: the tokens of a shard are replaced by edit(tokens)."""
    return lambda folder: np.save(folder / name, edit(np.load(folder / name)), allow_pickle=True)


def edit_text(name, old, new):
    """A damage: `old` is replaced by `new` in a file of text."""
    def damage(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    return damage


def edit_manifest(**values):
    """A damage: values of the manifest, of its source or settings, or of the first validation shard in it, are replaced."""
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, value in values.items():
            next(part for part in (manifest, manifest["source"], manifest["settings"], manifest["shards"]["val"][0])
                 if name in part)[name] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return damage


def delete(name):
    return lambda folder: (folder / name).unlink()


def write(name, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def set_id_of_another_vocabulary(tokens):
    tokens[5] = 512
    return tokens


NOT_A_MANIFEST = "not a manifest of this program"
DAMAGES = {
    "vocab_size is a string": (edit_text("manifest.json", '"vocab_size": 512', '"vocab_size": "512"'),
                               [NOT_A_MANIFEST, "vocab_size"]),
    "no source": (edit_manifest(source=None), [NOT_A_MANIFEST, "source"]),
    "empty source": (edit_manifest(source={}), [NOT_A_MANIFEST]),
    "settings are a list": (edit_manifest(settings=[]), [NOT_A_MANIFEST, "settings"]),
    "checksum is a number": (edit_manifest(sha256=7), [NOT_A_MANIFEST, "sha256"]),
    "complete is a string": (edit_manifest(complete="no"), [NOT_A_MANIFEST, "complete"]),
    "unknown dtype": (edit_manifest(dtype="int8"), [NOT_A_MANIFEST, "int8"]),
    "shard outside the folder": (edit_manifest(file="../val_000000.npy"), [NOT_A_MANIFEST, "../val_000000.npy"]),
    "no revisions": (edit_manifest(revisions=None), [NOT_A_MANIFEST, "revisions"]),
    "position of another format": (edit_manifest(place={"x": 1}), [NOT_A_MANIFEST, "position"]),
    "skip is a string": (edit_manifest(place={"at": 3, "skip": "1"}), [NOT_A_MANIFEST, "position"]),
    "node is a string": (edit_manifest(node="0"), [NOT_A_MANIFEST, "node"]),
    "complete without shards": (edit_manifest(shards={"val": [], "train": []}), [NOT_A_MANIFEST, "complete without shards"]),
    "manifest nested deeply": (write("manifest.json", b"[" * 100_000), [NOT_A_MANIFEST]),
    "manifest of another program": (write("manifest.json", b'{"name": "something else"}'), [NOT_A_MANIFEST]),
    "newer manifest": (edit_text("manifest.json", "shards 4", "shards 9"), ["shards 9", "shards 4"]),
    "no manifest": (delete("manifest.json"), ["--data_path", "no manifest.json"]),
    "unfinished": (edit_text("manifest.json", '"complete": true', '"complete": false'), ["--data_path", "did not finish"]),
    "id of another vocabulary": (edit_shard(set_id_of_another_vocabulary),
                                 ["train_000001.npy", "not tokens of this vocabulary"]),
    "starts within a document": (edit_shard(lambda tokens: np.roll(tokens, 1)), ["train_000001.npy", "separator"]),
    "truncated shard": (lambda folder: write("train_000001.npy", (folder / "train_000001.npy").read_bytes()[:-100])(folder),
                        ["train_000001.npy", "cut off"]),
    "other dtype": (edit_shard(lambda tokens: tokens.astype(np.float32)), ["train_000001.npy", "float32", "uint16"]),
    "not an array": (write("train_000001.npy", b"not an array"), ["train_000001.npy", "not a .npy file"]),
    "pickled shard": (edit_shard(lambda tokens: np.array([{"a": 1}], dtype=object)), ["train_000001.npy"]),
    "shorter shard": (edit_shard(lambda tokens: tokens[:-3], "val_000000.npy"), ["val_000000.npy", "manifest.json says"]),
    "missing shard": (delete("train_000000.npy"), ["train_000000.npy", "missing"]),
    "unlisted shard": (lambda folder: shutil.copy(folder / "train_000000.npy", folder / "train_000077.npy"),
                       ["train_000077.npy", "not in manifest.json"]),
    "other tokenizer": (edit_text("tokenizer.json", "<|user|>", "<|human|>"), ["tokenizer.json", "not the tokenizer"]),
    "no tokenizer": (delete("tokenizer.json"), ["tokenizer.json: missing", "restore"])}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_data_is_refused(data_copy, tmp_path, refused, damage, words):
    damage(data_copy)
    refused(train.main, train_flags(data_copy, tmp_path), *words)
    assert not (tmp_path / "new").exists()


@pytest.mark.integration
def test_an_id_beyond_the_vocabulary_deep_in_a_shard(data_copy, tmp_path, refused, monkeypatch):
    """Opening a shard checks its first million ids only."""
    monkeypatch.setattr("shards.check_shard", lambda *args: None)
    for split, number in (("val", 0), ("train", 1)):
        path = data_copy / f"{split}_{number:06d}.npy"
        whole = np.load(path)
        np.save(path, np.full_like(whole, 600))
        refused(train.main, [*train_flags(data_copy, tmp_path), "--batch_size=1500", "--overwrite"], "id 600", "512",
                "damaged")
        np.save(path, whole)


@pytest.mark.parametrize("flags, words", [
    (["--data_path=nowhere"], ["--data_path", "no shards", "download_data.py"]),
    (["--vocab_size=1000"], ["--vocab_size=1000", "512"]),
    (["--block_size=1000000"], ["--block_size=1000000", "train split"]),
    (["--block_size=8000", "--val_iter=1"], ["--block_size=8000", "val split", "--val_bytes"])], ids=str)
def test_flags_that_do_not_match_the_data_are_refused(data_path, tmp_path, refused, flags, words):
    refused(train.main, [*train_flags(data_path, tmp_path), *flags], *words)


# -- packed conversations ---------------------------------------------------------------------------------------------

BYTES = Tokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, "gpt2")


def conversation(user: str, assistant: str | None = None) -> Conversation:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Conversation(messages[:1 if assistant is None else 2], "chat.jsonl: line 7")


@pytest.mark.parametrize("messages, words", [
    ([{"role": "robot", "content": "x"}], "chat.jsonl: line 7: message 1 has the unknown role 'robot'"),
    ([{"role": "user"}], "chat.jsonl: line 7: message 1 has no role and content"),
    ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}],
     "chat.jsonl: line 7: has no message of the assistant"),
    ([{"role": "assistant", "content": "y", "weight": 0.5}], "chat.jsonl: line 7: message 1 has the weight '0.5': give"),
    ([{"role": "user", "content": "x"}], "chat.jsonl: line 7: has no message of the assistant")], ids=str)
def test_a_malformed_conversation_is_named(messages, words):
    with pytest.raises(BadInput) as error:
        PackedBatches(BYTES, [conversation("a", "b"), Conversation(messages, "chat.jsonl: line 7")], 1, 16, 0)
    assert str(error.value).startswith(words)


def test_a_tokenizer_without_chat_tokens_is_not_the_conversations_fault():
    plain = Tokenizer.from_ranks(BYTES.ranks, "gpt2", ("<|endoftext|>",))
    with pytest.raises(BadInput, match=r"^the tokenizer has no <\|system\|> token"):
        PackedBatches(plain, [conversation("a", "b")], 1, 16, 0)


def test_a_message_of_weight_0_is_context_without_loss():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no", "weight": 0},
                {"role": "user", "content": "b"}, {"role": "assistant", "content": "yes", "weight": 1}]
    inputs, targets, _ = PackedBatches(BYTES, [Conversation(messages, "")], 1, 32, 0)[0]
    _, end = BYTES.chat_token_ids()
    assert targets[targets != IGNORE_INDEX].tolist() == [*b"yes", end]
    assert b"no" in bytes(min(token_id, 255) for token_id in inputs[0].tolist())


@pytest.mark.parametrize("lengths, context, expected", [
    ([10, 12, 9], 8192, 64), ([10, 12, 9], 32, 32), ([10, 65], 8192, 128), ([128] * 9, 8192, 128), ([129] * 9, 8192, 256),
    ([8000], 8192, 8192), ([5000], 6000, 6000), ([100] * 1000, 8192, 8192), ([100] * 100, 8192, 1024)], ids=str)
def test_rows_are_as_long_as_what_they_hold(lengths, context, expected):
    assert row_length(lengths, context) == expected


def test_few_conversations_make_short_rows_whatever_the_batch():
    """So that a resumed run may change the batch size, and a compiled model sees one shape."""
    conversations = [conversation("who?" * (i % 3), "me") for i in range(6)]
    loaders = [TrainLoader(PackedBatches(BYTES, conversations, n, 8192, 1), "data") for n in (2, 16)]
    assert [loader.next_batch()[0].shape for loader in loaders] == [(2, 64), (16, 64)]
    loaders[1].load_state_dict(loaders[0].state_dict())
    loaders[0].next_batch()
    assert torch.equal(loaders[0].next_batch()[1], loaders[1].next_batch()[1][2:4])
    with pytest.raises(BadInput, match="--dataset: its rows have 64 tokens here, and had 8,192 in the checkpoint's run"):
        loaders[0].load_state_dict(loaders[0].state_dict() | {"block_size": 8192})
    for loader in loaders:
        loader.close()


def test_the_rest_of_a_long_conversation_is_not_encoded(monkeypatch):
    """Its ids would take gigabytes; the first ones are as they would be."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "x" * 20} for i in range(40)]
    ids, assistant_mask = BYTES.encode_chat(messages)
    for n in (1, 2, 21, 22, 23, 44, 200, 10_000):
        assert BYTES.encode_chat(messages, max_tokens=n) == (ids[:n], assistant_mask[:n])
    encoded, encode = [], BYTES.encode_documents
    monkeypatch.setattr(BYTES, "encode_documents", lambda texts: encoded.append(len(texts.utf8)) or encode(texts))
    batches = PackedBatches(BYTES, [Conversation(messages, "")], 1, 64, 0)
    assert sum(encoded) <= 100 and batches.n_truncated == 1 and len(batches.conversations[0][0]) == 65
