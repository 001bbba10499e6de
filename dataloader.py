"""The order in which training sees its data, and the loader, whose position is saved and restored exactly.

Two kinds of batches: blocks of a long sequence of tokens for pretraining, rows packed with whole conversations for
finetuning.
"""
import bisect
import hashlib
import itertools
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from runtime.config import BadInput
from runtime.signals import no_interrupt
from shards import PREPARE_AGAIN, Data, require_a_block
from tasks.conversations import Conversation
from tokenizer import Tokenizer

IGNORE_INDEX = -100  # targets that carry no loss; the value F.cross_entropy skips by default


# -- batches ----------------------------------------------------------------------------------------------------------

def permute_index(place: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where each of `place`, (k,) in 0..n-1, goes under a permutation of n that (seed, epoch) choose. Returns (k,).

    An eight-round Feistel network on the next even power of two; what falls outside 0..n-1 goes round again (cycle
    walking; Black and Rogaway 2002). Any part of the order is computed without the rest: no array of n, which at ten
    billion tokens would be hundreds of megabytes in every worker, and no dependence on a numpy version.
    """
    half_bits = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half_bits)) - 1)
    digest = hashlib.sha512(f"{seed} {epoch}".encode()).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def permute(x: np.ndarray) -> np.ndarray:
        left, right = x >> half_bits, x & low
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & low)
        return left << half_bits | right

    x = permute(place.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = permute(x[outside])
    return x.astype(np.int64)

def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): every input bit moves every output bit. (k,) uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class BlockBatches:
    """Batch `first` is a pure function of its number, so that no worker, prefetch or restart can change it.

    Block i is tokens i*block_size .. (i+1)*block_size + 1 of the split: inputs, and targets one further on. The blocks
    of all epochs stand in one endless row, shuffled within each epoch, and a batch may straddle two epochs.
    """
    given = "--data_path"

    def __init__(self, data: Data, split: str, batch_size: int, block_size: int, seed: int | None):
        """Raises BadInput when the split does not hold a block."""
        self.tokens = require_a_block(data, split, block_size)
        self.data_path, self.vocab_size = data.path, data.manifest.vocab_size  # not `data`, for a worker gets a copy
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.n_blocks = (len(self.tokens) - 1) // block_size

    def __getitem__(self, first: int) -> tuple[Tensor, Tensor]:
        """Blocks first..first + batch_size of the row: inputs and targets, each int64 (batch_size, block_size)."""
        return self.read(epoch_order(np.arange(first, first + self.batch_size), self.n_blocks, self.seed))

    def read(self, blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = np.stack([self.tokens.read(start, start + self.block_size + 1)
                         for start in (blocks * self.block_size).tolist()])
        # each whole in memory: else a copy to a GPU would wait for one of its own
        return tuple(torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :-1], rows[:, 1:]))


    def checked(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`batch`, whose ids an embedding can look up: on a GPU a stray one ends in an error that names nothing."""
        if (largest := max(int(part.max()) for part in batch)) >= self.vocab_size:
            raise BadInput(f"--data_path={self.data_path}: a shard holds id {largest}, beyond the vocabulary of "
                           f"{self.vocab_size}: it is damaged: {PREPARE_AGAIN}")
        return batch


def epoch_order(index: np.ndarray, n_blocks: int, seed: int) -> np.ndarray:
    """Which block stands at each of `index` in the endless row of all epochs."""
    blocks = np.empty_like(index)
    epochs = index // n_blocks
    for epoch in np.unique(epochs):
        here = epochs == epoch
        blocks[here] = permute_index(index[here] % n_blocks, n_blocks, seed, int(epoch))
    return blocks


class TrainLoader:
    """Endless shuffled training batches whose position can be saved and restored exactly.

    batches: such as BlockBatches; a batch is a pure function of where its first block stands in the row of all epochs.
    blocks_seen counts what was handed out, not what workers have read ahead: it is the whole position.
    """

    def __init__(self, batches, fingerprint: str, num_workers: int = 0, pin_memory: bool = False):
        """fingerprint: of all that is trained on."""
        self.batches, self.fingerprint = batches, fingerprint
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.blocks_seen = 0
        self.iterator: Iterator | None = None

    def next_batch(self, model=None) -> tuple[Tensor, ...]:
        """What `batches` makes; of shards inputs and targets, each int64 (batch_size, block_size). model: ignored."""
        if self.iterator is None:
            with no_interrupt():
                self.iterator = iter(DataLoader(
                    self.batches, batch_size=None, sampler=itertools.count(self.blocks_seen, self.batches.batch_size),
                    num_workers=self.num_workers, pin_memory=self.pin_memory, worker_init_fn=outlive_signals,
                    generator=torch.Generator()))  # its own: by default a start draws from torch's global generator
        batch = next(self.iterator)
        self.blocks_seen += self.batches.batch_size
        return self.batches.checked(batch)

    def state_dict(self) -> dict:
        return {"blocks_seen": self.blocks_seen, "seed": self.batches.seed, "block_size": self.batches.block_size,
                "data": self.fingerprint}

    def load_state_dict(self, state: dict):
        """Raises BadInput when the position belongs to other data, ValueError when it is none. Batch size and workers may
        have changed."""
        if state["data"] != self.fingerprint:
            raise BadInput(f"{self.batches.given}: the training data ({self.fingerprint}) is not what the checkpoint was "
                           f"trained on ({state['data']}): give the same data to resume")
        if (state["seed"], state["block_size"]) != (self.batches.seed, self.batches.block_size):
            raise ValueError(f"a position of seed {state['seed']} and block_size {state['block_size']}")
        if type(state["blocks_seen"]) is not int or state["blocks_seen"] < 0:
            raise ValueError(f"blocks_seen is {state['blocks_seen']!r}")
        self.close()
        self.blocks_seen = state["blocks_seen"]

    def close(self):
        """Ends the workers. The position stays, and the next batch starts new ones."""
        workers = getattr(self.iterator, "_workers", [])
        if not all(worker.is_alive() for worker in workers):
            for worker in workers:
                worker.kill()
            # torch would wait for this event's lock for ever if the dead worker held it
            self.iterator._workers_done_event = threading.Event()
        # by hand: while an exception is handled, its traceback keeps the iterator, and so the workers, alive
        getattr(self.iterator, "_shutdown_workers", lambda: None)()
        self.iterator = None


def shard_loader(data: Data, batch_size: int, block_size: int, seed: int, num_workers: int = 0,
                 pin_memory: bool = False) -> TrainLoader:
    """Of the training split. Raises BadInput when it does not hold a block."""
    batches = BlockBatches(data, "train", batch_size, block_size, seed)
    return TrainLoader(batches, data.manifest.fingerprint(), num_workers, pin_memory)


def outlive_signals(worker: int):
    """Ctrl-C and SIGTERM may reach the workers too, which must live until the step under way has its batches: Ctrl-C
    is ignored, and SIGTERM ends a worker after half a minute. They end themselves when the training process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *args: signal.alarm(30))


def val_batches(data: Data, n_batches: int, batch_size: int, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first n_batches * batch_size blocks of the validation split, or all there are, always in the same order.

    Yields inputs and targets, each int64 (at most batch_size, block_size).
    """
    batches = BlockBatches(data, "val", batch_size, block_size, seed=None)
    blocks = np.arange(min(n_batches * batch_size, batches.n_blocks))
    for first in range(0, len(blocks), batch_size):
        yield batches.checked(batches.read(blocks[first:first + batch_size]))


# -- batches ----------------------------------------------------------------------------------------------------------

def pack_rows(lengths: Sequence[int], row_length: int, seed: int) -> list[list[int]]:
    """Which conversations share a row: in random order each goes into the fullest row that has room for it. lengths: at most
    row_length each."""
    rows, rooms = [], []  # rooms: (room, row) of those that have some, in order
    for i in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        at = bisect.bisect_left(rooms, (lengths[i], -1))
        room, row = rooms.pop(at) if at < len(rooms) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if room > lengths[i]:
            bisect.insort(rooms, (room - lengths[i], row))
    return rows


class PackedBatches:
    """Rows of conversations, shuffled in each epoch: see dataloader.BlockBatches. Which share a row stays as it is, since
    none sees another."""
    given = "--dataset"

    def __init__(self, tokenizer: Tokenizer, conversations: list[Conversation], batch_size: int, block_size: int, seed: int):
        """Raises BadInput where there is nothing for a model to say, or the tokenizer has no tokens for conversations."""
        self.batch_size, self.block_size, self.seed, self.fillerer = batch_size, block_size, seed, tokenizer.separator_id
        self.texts, self.n_truncated = [], 0
        for one in conversations:
            ids, assistant_mask = tokenizer.encode_chat(one.messages)
            if not any(assistant_mask):
                raise BadInput(f"{one.where}: has no message of the assistant, so there is nothing to learn")
            self.n_truncated += len(ids) > block_size + 1
            if any(assistant_mask[:block_size + 1]):
                self.texts.append((np.array(ids[:block_size + 1]), np.array(assistant_mask[:block_size + 1])))
        if not self.texts:
            raise BadInput(f"{self.given}: in none of its conversations the assistant says something within the "
                           f"{block_size} tokens of the model's context")
        # a conversation of n tokens is n - 1 inputs
        self.rows = pack_rows([len(ids) - 1 for ids, _ in self.texts], block_size, seed)
        self.n_blocks = len(self.rows)

    def fingerprint(self) -> str:
        """16 hex digits that change with any token."""
        digest = hashlib.sha256()
        for ids, assistant_mask in self.texts:
            digest.update(ids.tobytes() + assistant_mask.tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, first: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.read(epoch_order(np.arange(first, first + self.batch_size), self.n_blocks, self.seed))

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets, int64 (B, block_size), targets only where the assistant speaks; and where a conversation
        begins, or what fills the row up, bool (B, block_size)."""
        shape = len(rows), self.block_size
        inputs, targets, doc_starts = np.full(shape, self.fillerer), np.full(shape, IGNORE_INDEX), np.zeros(shape, bool)
        for row, number in enumerate(rows):
            at = 0
            for i in self.rows[number]:
                (ids, assistant_mask), stop = self.texts[i], at + len(self.texts[i][0]) - 1
                inputs[row, at:stop] = ids[:-1]
                targets[row, at:stop] = np.where(assistant_mask[1:], ids[1:], IGNORE_INDEX)
                doc_starts[row, at] = True
                at = stop
            if at < self.block_size:
                doc_starts[row, at] = True
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(doc_starts)

    def checked(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return batch

    def in_turn(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All rows once, the last batch smaller."""
        for first in range(0, self.n_blocks, self.batch_size):
            yield self.read(range(first, min(first + self.batch_size, self.n_blocks)))
