import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import train
from dataloader import BlockBatches, permute_index, shard_loader, val_batches
from runtime.config import BadInput
from runtime.signals import StopSignals, no_interrupt
from shards import Manifest, ShardWriter, documents_to_reach, open_data

BLOCK = 16


@pytest.fixture(scope="module")
def data(data_path):
    return open_data(data_path)


@pytest.fixture
def clone_to_cpu(data_path, tmp_path):
    """A copy of the data folder that a test may damage."""
    return shutil.copytree(data_path, tmp_path / "data")


def take(loader, n):
    return [next(loader) for _ in range(n)]


def equal(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(a, b) for pair in zip(batches, others) for a, b in zip(*pair))


# -- the order --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_shuffled_is_a_permutation(n):
    for epoch in range(3):
        assert sorted(permute_index(np.arange(n), n, seed=3, epoch=epoch)) == list(range(n))


def test_batches_are_whole_in_memory(data_path):
    """A copy of a part of something to a GPU would wait for a copy on the CPU first."""
    data = open_data(data_path)
    loader = shard_loader(data, 3, 16, seed=0)
    assert all(part.is_contiguous() for part in (*next(loader), *next(val_batches(data, 1, 3, 16))))


def test_shuffled_depends_on_seed_and_epoch_and_on_nothing_else():
    orders = {tuple(permute_index(np.arange(50), 50, seed, epoch)) for seed, epoch in itertools.product(range(5), range(5))}
    assert len(orders) == 25
    parts = [permute_index(np.arange(first, first + 10), 50, 1, 2) for first in range(0, 50, 10)]
    assert np.array_equal(np.concatenate(parts), permute_index(np.arange(50), 50, 1, 2))
    # pinned: a change of the order would break the resuming of every run under way
    assert permute_index(np.arange(8), 8, seed=1337, epoch=0).tolist() == PINNED_ORDER


PINNED_ORDER = [4, 7, 6, 1, 0, 5, 2, 3]


def test_shuffled_looks_random():
    """Where block 0 lands over many epochs is uniform, and neighbours do not stay neighbours (5 sigma bounds)."""
    n, epochs = 10, 2000
    places = np.array([permute_index(np.arange(n), n, seed=0, epoch=epoch) for epoch in range(epochs)])
    counts = np.bincount(places[:, 0], minlength=n)
    assert np.all(abs(counts - epochs / n) < 5 * np.sqrt(epochs / n))
    stay = (np.diff(places, axis=1) == 1).mean()
    assert abs(stay - 1 / n) < 5 * np.sqrt(0.1 / (epochs * n))


def test_every_block_once_an_epoch_across_shards(data):
    tokens = data.split("train")
    whole = np.concatenate([np.load(path) for path in tokens.paths]).astype(np.int64)
    n_blocks = (len(whole) - 1) // BLOCK
    assert len(tokens.paths) > 2 and n_blocks % 4, "the test wants several shards and batches that straddle epochs"
    loader = shard_loader(data, batch_size=4, block_size=BLOCK, seed=7)
    rows = torch.cat([torch.cat((inputs, targets[:, -1:]), dim=1) for inputs, targets in take(loader, n_blocks)])
    expected = sorted(whole[i * BLOCK:(i + 1) * BLOCK + 1].tolist() for i in range(n_blocks))
    epochs = [rows[i * n_blocks:(i + 1) * n_blocks].tolist() for i in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert loader.blocks_seen == 4 * n_blocks


def test_targets_are_the_next_token(data):
    inputs, targets = next(shard_loader(data, 3, BLOCK, seed=0))
    assert inputs.shape == targets.shape == (3, BLOCK) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_batches_do_not_depend_on_workers(data):
    alone, helped = (shard_loader(data, 4, BLOCK, seed=1, num_workers=n) for n in (0, 2))
    assert equal(take(alone, 25), take(helped, 25))


def test_batches_do_not_touch_the_global_generator(data):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(shard_loader(data, 4, BLOCK, seed=1, num_workers=1), 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("n_before", [0, 1, 5, 700])
def test_position_is_what_was_handed_out(data, workers, n_before):
    """With prefetched batches in flight, inside and after the first epoch."""
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
    """Workers look at an event at every batch: one that is killed just then holds the event's lock for ever."""
    loader = shard_loader(data, 4, BLOCK, seed=1, num_workers=2)
    take(loader, 1)
    holder = threading.Thread(target=loader.iterator._workers_done_event._cond.acquire, daemon=True)
    holder.start(), holder.join()
    with pytest.raises(RuntimeError, match="DataLoader worker"):  # from torch's signal handler
        os.kill(loader.iterator._workers[1].pid, signal.SIGKILL)
        time.sleep(10)
    loader.close()
    assert not multiprocessing.active_children()


def test_another_batch_size_goes_on_with_the_same_blocks(data):
    large, small = shard_loader(data, 6, BLOCK, seed=1), shard_loader(data, 3, BLOCK, seed=1)
    next(large)
    small.load_state_dict(large.state_dict())
    inputs, _ = next(large)
    assert torch.equal(inputs, torch.cat([next(small)[0], next(small)[0]]))


def test_position_in_other_data_is_refused(data):
    loader = shard_loader(data, 4, BLOCK, seed=1)
    with pytest.raises(BadInput, match="not what the checkpoint was trained on"):
        loader.load_state_dict(loader.state_dict() | {"data": "0" * 16})


def test_val_batches_are_fixed_and_in_order(data):
    tokens = data.split("val").read(0, len(data.split("val"))).astype(np.int64)
    first, second = list(val_batches(data, 3, 4, BLOCK)), list(val_batches(data, 3, 4, BLOCK))
    assert equal(first, second)
    assert torch.cat([inputs for inputs, _ in first]).flatten().tolist() == tokens[:3 * 4 * BLOCK].tolist()
    everything = list(val_batches(data, 10**6, 4, BLOCK))
    assert sum(len(inputs) for inputs, _ in everything) == (len(tokens) - 1) // BLOCK


def test_a_pickled_loader_opens_the_shards_again(data):
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


def test_a_shard_takes_documents_until_it_is_closed(tmp_path):
    manifest = Manifest({"revisions": ["r"]}, {}, "f", 300, "uint16")
    writer = ShardWriter(tmp_path, "train", 8, manifest)
    writer.close()  # nothing is open
    for ids, documents, room in ((np.arange(7), 2, 1), (np.arange(3), 1, -2)):
        writer.add(ids.astype(np.uint16), documents, 10)
        assert writer.room == room and not list(tmp_path.glob("*.npy"))
    manifest.place = {"at": 3, "skip": 1}
    writer.close()
    assert np.load(tmp_path / "train_000000.npy").tolist() == [*range(7), *range(3)]
    shard, = manifest.shards["train"]
    assert (shard.tokens, shard.documents, shard.bytes, writer.name, writer.room) == (10, 3, 20, "train_000001.npy", 8)
    assert Manifest.load(tmp_path) == manifest
    writer.add(np.zeros(2, np.uint16), 1, 1)
    writer.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "train_000000.npy"]


def test_large_vocabularies_take_uint32(tmp_path):
    manifest = Manifest({}, {}, "f", 70_000, "uint32")
    writer = ShardWriter(tmp_path, "val", 10, manifest)
    writer.add(np.array([69_999, 1], np.uint32), 1, 3)
    writer.close()
    assert np.load(tmp_path / "val_000000.npy").tolist() == [69_999, 1]


# -- folders that cannot be used --------------------------------------------------------------------------------------

def train_flags(path, tmp_path):
    return [f"--data_path={path}", f"--checkpoint_path={tmp_path / 'new' / 'gpt.pt'}", "--n_layer=1", "--n_head=1",
            "--head_size=8", "--block_size=16", "--max_iter=1", "--batch_size=2", "--num_batch_accum=1", "--verbose=0",
            "--dataloader_num_workers=0"]


def cut_off(folder):
    path = folder / "train_000001.npy"
    path.write_bytes(path.read_bytes()[:-100])


def foreign_dtype(folder):
    np.save(folder / "train_000001.npy", np.load(folder / "train_000001.npy").astype(np.float32))


def not_npy(folder):
    (folder / "train_000001.npy").write_bytes(b"not an array")


def pickled(folder):
    np.save(folder / "train_000001.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def shorter(folder):
    np.save(folder / "val_000000.npy", np.load(folder / "val_000000.npy")[:-3])


def missing(folder):
    (folder / "train_000000.npy").unlink()


def stranger(folder):
    shutil.copy(folder / "train_000000.npy", folder / "train_000077.npy")


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def foreign_manifest(folder):
    (folder / "manifest.json").write_text('{"name": "something else"}')


def newer_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("shards 2", "shards 9"))


def unfinished(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"complete": true', '"complete": false'))


def other_tokenizer(folder):
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|user|>", "<|human|>"))


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def foreign_values(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"vocab_size": 512', '"vocab_size": "512"'))


def changed(**values):
    """A damage: a value of the manifest, its source or settings, or of the first validation shard in it, is another."""
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, value in values.items():
            next(part for part in (manifest, manifest["source"], manifest["settings"], manifest["shards"]["val"][0])
                 if name in part)[name] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return damage


def no_shards(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"]["train"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))


def nested_deeply(folder):
    (folder / "manifest.json").write_text("[" * 100_000)


def ids_of_another_vocabulary(folder):
    ids = np.load(folder / "train_000001.npy")
    ids[5] = 512
    np.save(folder / "train_000001.npy", ids)


def cut_in_a_document(folder):
    np.save(folder / "train_000001.npy", np.roll(np.load(folder / "train_000001.npy"), 1))


@pytest.mark.parametrize("damage, words", [
    (foreign_values, ["manifest.json", "not a manifest of ours", "vocab_size"]),
    (changed(source=None), ["manifest.json", "not a manifest of ours", "source"]), (changed(source={}), ["not a manifest"]),
    (changed(settings=[]), ["not a manifest of ours", "settings"]), (changed(sha256=7), ["not a manifest", "sha256"]),
    (changed(complete="no"), ["not a manifest of ours", "complete"]), (changed(dtype="int8"), ["not a manifest", "int8"]),
    (changed(file="../val_000000.npy"), ["not a manifest of ours", "../val_000000.npy"]),
    (changed(revisions=None), ["not a manifest of ours", "revisions"]),
    (changed(place={"x": 1}), ["not a manifest of ours", "place"]),
    (changed(place={"at": 3, "skip": "1"}), ["not a manifest", "place"]), (changed(node="0"), ["not a manifest", "node"]),
    (no_shards, ["not a manifest of ours", "complete without shards"]), (nested_deeply, ["not a manifest of ours"]),
    (ids_of_another_vocabulary, ["train_000001.npy", "not tokens of this vocabulary"]),
    (cut_in_a_document, ["train_000001.npy", "separator"]),
    (cut_off, ["train_000001.npy", "cut off"]), (foreign_dtype, ["train_000001.npy", "float32", "uint16"]),
    (not_npy, ["train_000001.npy", "not a .npy file"]), (pickled, ["train_000001.npy"]),
    (shorter, ["val_000000.npy", "manifest.json says"]), (missing, ["train_000000.npy", "missing"]),
    (stranger, ["train_000077.npy", "not in manifest.json"]), (no_manifest, ["--data_path", "no manifest.json"]),
    (foreign_manifest, ["manifest.json", "not a manifest of ours"]), (newer_manifest, ["shards 9", "shards 2"]),
    (unfinished, ["--data_path", "did not finish"]), (other_tokenizer, ["tokenizer.json", "not the tokenizer"]),
    (no_tokenizer, ["tokenizer.json: missing", "put back"])])
def test_damaged_data_is_refused(copied, tmp_path, refused, damage, words):
    damage(copied)
    refused(train.main, train_flags(copied, tmp_path), *words)
    assert not (tmp_path / "new").exists()


def test_an_id_beyond_the_vocabulary_deep_in_a_shard(copied, tmp_path, refused, monkeypatch):
    """Opening a shard looks at its first million ids only."""
    monkeypatch.setattr("shards.check_shard", lambda *args: None)
    for split, number in (("val", 0), ("train", 1)):
        path = copied / f"{split}_{number:06d}.npy"
        whole = np.load(path)
        damaged = whole.copy()
        damaged[:] = 600
        np.save(path, damaged)
        refused(train.main, [*train_flags(copied, tmp_path), "--batch_size=1500", "--overwrite"], "id 600", "512", "damaged")
        np.save(path, whole)


def test_other_refusals(data_path, tmp_path, refused):
    flags = train_flags(data_path, tmp_path)
    refused(train.main, train_flags(tmp_path / "nowhere", tmp_path), "--data_path", "no shards", "download_data.py")
    refused(train.main, [*flags, "--vocab_size=1000"], "--vocab_size=1000", "512")
    refused(train.main, [*flags, "--block_size=1000000"], "--block_size=1000000", "train split")
    refused(train.main, [*flags, "--block_size=8000"], "--block_size=8000", "val split", "--val_tokens")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("inside", [True, False])
def test_a_ctrl_c_is_not_lost_while_processes_start(inside):
    """They ignore it; this one hears of it as soon as they are there, also of one that came just before."""
    with StopSignals() as stop:
        if not inside:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            signal.raise_signal(signal.SIGINT)
        with no_interrupt():
            if inside:
                signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            assert stop.signal is None
            child = subprocess.run([sys.executable, "-c", "import signal; signal.raise_signal(signal.SIGINT); print(5)"],
                                   capture_output=True, text=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        time.sleep(0.01)
        assert stop.signal == signal.SIGINT and child.stdout == "5\n"
