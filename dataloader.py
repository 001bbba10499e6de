"""Batches of training data in a fixed, seeded order, and the loader, whose position can be saved and restored exactly.

Owns the order of batches, the loader's position and IGNORE_INDEX. Two kinds of batches: blocks of one long sequence of
tokens for pretraining, and rows packed with whole conversations for finetuning.

    loader = shard_loader(open_data(Path("data")), batch_size=4, block_size=128, seed=1337)
    inputs, targets = loader.next_batch()
"""
import bisect
import hashlib
import itertools
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from runtime.config import BadInput
from runtime.signals import sigint_blocked
from shards import DataFolder, check_ids, require_block
from text.messages import has_loss
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from tasks.conversations import Conversation

IGNORE_INDEX = -100  # a target without loss; the value that F.cross_entropy skips by default
# Rows of few conversations are shorter than the context, so that there are about MIN_ROWS, each of at least MIN_ROW tokens.
MIN_ROWS, MIN_ROW = 16, 64


# -- the order of an epoch --------------------------------------------------------------------------------------------

def epoch_order(positions: np.ndarray, n_blocks: int, seed: int) -> np.ndarray:
    """Which block is at each of `positions` (k,) in the endless sequence of all epochs, each in its own order."""
    blocks = np.empty_like(positions)
    epochs = positions // n_blocks
    for epoch in np.unique(epochs):
        is_here = epochs == epoch
        blocks[is_here] = permute_index(positions[is_here] % n_blocks, n_blocks, seed, int(epoch))
    return blocks


def permute_index(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The image of `index`, (k,) in 0..n-1, under a permutation of 0..n-1 chosen by (seed, epoch). Returns (k,) int64.

    An eight-round Feistel network on the next even power of two; results outside 0..n-1 are permuted again (cycle walking;
    Black and Rogaway 2002). Any part of the order is computed without the rest: no array of n, which at ten billion tokens
    would take hundreds of megabytes in every worker, and no dependence on the version of numpy.
    """
    half_bits = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half_bits)) - 1)
    digest = hashlib.sha512(f"{seed} {epoch}".encode()).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def permute(x: np.ndarray) -> np.ndarray:
        left, right = x >> half_bits, x & low
        for key in keys:
            left, right = right, left ^ (mix_bits(right ^ key) & low)
        return left << half_bits | right

    x = permute(index.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = permute(x[outside])
    return x.astype(np.int64)


def mix_bits(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): every input bit affects every output bit. (k,) uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# -- the loader -------------------------------------------------------------------------------------------------------

class Batches(Protocol):
    """What a TrainLoader reads from: BlockBatches or PackedBatches. In the latter, a block is a row of packed conversations.

    flag_name: the flag that names the data, for messages. batch_size: blocks in a batch. block_size: tokens in a block.
    seed: of the order of the blocks in each epoch.
    """
    flag_name: str
    batch_size: int
    block_size: int
    seed: int

    def __getitem__(self, first: int) -> tuple[Tensor, ...]:
        """Blocks first..first + batch_size of the sequence of all epochs, which depend on nothing but `first`.

        Inputs and targets, int64 (batch_size, block_size); of packed rows also doc_starts, bool (batch_size, block_size).
        """

    def check(self, batch: tuple[Tensor, ...]):
        """Raises BadInput, naming the data, if a model could not be trained on the batch."""


class TrainLoader:
    """Endless shuffled training batches whose position can be saved and restored exactly.

    blocks_seen counts what was returned, not what workers have prefetched: it is the whole position.
    """

    def __init__(self, batches: Batches, fingerprint: str, num_workers: int = 0, pin_memory: bool = False,
                 rank: int = 0, n_ranks: int = 1):
        """fingerprint: a digest of the training data, which must be the same when a run is resumed. rank, n_ranks: it is one
        of so many loaders, in as many processes, that take the batches in turns."""
        self.rank, self.n_ranks = rank, n_ranks
        self.batches, self.fingerprint = batches, fingerprint
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.blocks_seen = 0
        self.iterator: Iterator | None = None

    def next_batch(self, model=None) -> tuple[Tensor, ...]:
        """The next batch, as `Batches` returns it. model: ignored."""
        if self.iterator is None:
            with sigint_blocked():
                self.iterator = iter(DataLoader(
                    self.batches, batch_size=None, sampler=itertools.count(
                        self.blocks_seen + self.rank * self.batches.batch_size, self.n_ranks * self.batches.batch_size),
                    num_workers=self.num_workers, pin_memory=self.pin_memory, worker_init_fn=ignore_signals,
                    generator=torch.Generator()))  # by default a DataLoader draws from torch's global generator
        batch = next(self.iterator)
        self.blocks_seen += self.n_ranks * self.batches.batch_size  # by all of them
        self.batches.check(batch)
        return batch

    def state_dict(self) -> dict:
        return {"blocks_seen": self.blocks_seen, "seed": self.batches.seed, "block_size": self.batches.block_size,
                "data": self.fingerprint}

    def load_state_dict(self, state: dict):
        """Batch size and number of workers may differ from those of the saved loader. Raises BadInput when the position
        belongs to other data, ValueError when it is not valid."""
        if state["data"] != self.fingerprint:
            raise BadInput(f"{self.batches.flag_name}: the training data ({self.fingerprint}) differs from what the "
                           f"checkpoint was trained on ({state['data']}): give the same data to resume, with the version of "
                           f"this program that the run was started with")
        if state["seed"] != self.batches.seed or type(state["block_size"]) is not int:
            raise ValueError(f"a position of seed {state['seed']!r} and block_size {state['block_size']!r}")
        if state["block_size"] != self.batches.block_size:
            raise BadInput(f"{self.batches.flag_name}: its rows have {self.batches.block_size:,} tokens here, and had "
                           f"{state['block_size']:,} in the checkpoint's run: finish that with the version that began it")
        if type(state["blocks_seen"]) is not int or state["blocks_seen"] < 0:
            raise ValueError(f"blocks_seen is {state['blocks_seen']!r}")
        self.close()
        self.blocks_seen = state["blocks_seen"]

    def close(self):
        """Ends the workers. The position stays; the next batch starts new workers."""
        workers = getattr(self.iterator, "_workers", [])
        if not all(worker.is_alive() for worker in workers):
            for worker in workers:
                worker.kill()
            # torch would wait for this event's lock forever if the dead worker held it
            self.iterator._workers_done_event = threading.Event()
        # explicitly: while an exception is handled, its traceback keeps the iterator, and so the workers, alive
        getattr(self.iterator, "_shutdown_workers", lambda: None)()
        self.iterator = None


def ignore_signals(worker: int):
    """A Ctrl-C or SIGTERM for the training process may reach its workers too, which must live until the current step has its
    batches: they ignore Ctrl-C, and SIGTERM ends them after 30 s. They exit when the training process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *args: signal.alarm(30))


# -- blocks of tokens, for pretraining --------------------------------------------------------------------------------

class BlockBatches:
    """Batches of fixed-size blocks of a split. A batch depends on nothing but its number, so that no worker, prefetch or
    restart can change it.

    Block i is tokens i*block_size .. (i+1)*block_size + 1: the inputs, and the targets shifted by one. The blocks of all
    epochs form one endless sequence, shuffled within each epoch; a batch may span two epochs.
    """
    flag_name = "--data_path"

    def __init__(self, data: DataFolder, split: str, batch_size: int, block_size: int, seed: int,
                 n_tokens: int | None = None):
        """n_tokens: read no more than the first ones. Raises BadInput when the split is shorter than one block, or than
        that."""
        self.tokens = require_block(data, split, block_size)
        if n_tokens is not None and not block_size < n_tokens <= len(self.tokens):
            raise BadInput(f"--train_tokens={n_tokens}: must be more than --block_size={block_size}, and at most the "
                           f"{len(self.tokens):,} tokens of the {split} split in {data.path}")
        self.data_path, self.vocab_size = data.path, data.manifest.vocab_size  # not `data`: workers get a copy of self
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self.n_blocks = ((n_tokens or len(self.tokens)) - 1) // block_size

    def __getitem__(self, first: int) -> tuple[Tensor, Tensor]:
        """Blocks first..first + batch_size of the sequence: inputs and targets, each int64 (batch_size, block_size)."""
        return self.read(epoch_order(np.arange(first, first + self.batch_size), self.n_blocks, self.seed))

    def read(self, blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        """The blocks with these numbers: inputs and targets, each int64 (len(blocks), block_size)."""
        rows = np.stack([self.tokens.read(start, start + self.block_size + 1)
                         for start in (blocks * self.block_size).tolist()])
        # both contiguous: else a copy to a GPU would wait for a copy on the CPU
        return tuple(torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :-1], rows[:, 1:]))

    def check(self, batch: tuple[Tensor, Tensor]):
        """Raises BadInput for an id beyond the vocabulary."""
        for part in batch:
            check_ids(self.data_path, self.vocab_size, part.numpy())


def shard_loader(data: DataFolder, batch_size: int, block_size: int, seed: int, num_workers: int = 0,
                 pin_memory: bool = False, n_tokens: int | None = None, rank: int = 0, n_ranks: int = 1) -> TrainLoader:
    """A loader of the training split. n_tokens, and what it raises: see BlockBatches; rank, n_ranks: see TrainLoader."""
    batches = BlockBatches(data, "train", batch_size, block_size, seed, n_tokens)
    return TrainLoader(batches, data.manifest.fingerprint(), num_workers, pin_memory, rank, n_ranks)


def val_batches(data: DataFolder, n_tokens: int, batch_size: int, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `n_tokens` tokens of the validation split in blocks, always in the same order.

    Yields inputs and targets, each int64 (at most batch_size, block_size). Every token but the first is a target once; those
    behind the last are IGNORE_INDEX.
    """
    tokens, step = data.split("val"), batch_size * block_size
    for start in range(0, n_tokens - 1, step):
        ids = tokens.read(start, min(start + step + 1, n_tokens)).astype(np.int64)
        n = math.ceil((len(ids) - 1) / block_size) * block_size
        inputs, targets = np.zeros(n, np.int64), np.full(n, IGNORE_INDEX)
        inputs[:len(ids) - 1], targets[:len(ids) - 1] = ids[:-1], ids[1:]
        check_ids(data.path, data.manifest.vocab_size, ids)
        yield tuple(torch.from_numpy(part.reshape(-1, block_size)) for part in (inputs, targets))


def val_tokens(data: DataFolder, n_bytes: int) -> int:
    """How many tokens the first documents of the validation split take that hold at least `n_bytes` of text, or all: the
    same text for every vocabulary."""
    tokens, token_bytes, at = data.split("val"), data.tokenizer.token_bytes(), 0
    while at < len(tokens):
        ids = tokens.read(at, min(at + (1 << 20), len(tokens)))
        check_ids(data.path, len(token_bytes), ids)
        if n_bytes > 0:
            sums = np.cumsum(token_bytes[ids])
            start = int(np.searchsorted(sums, n_bytes)) + 1  # the separator of the next document is searched from here
            n_bytes -= int(sums[-1])
        else:
            start = 0
        if n_bytes <= 0 and len(found := np.flatnonzero(ids[start:] == data.tokenizer.separator_id)):
            return at + start + int(found[0])
        at += len(ids)
    return len(tokens)


# -- windows of a document, for evaluation ----------------------------------------------------------------------------

def cut_windows(n: int, block_size: int, first: int = 0, stride: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Windows of at most `block_size` positions in which `first` to n - 1 are scored once each, as (start, first scored,
    stop). stride: how far each is from the one before, by default half a block.

    The first window scores all that it holds from `first` on, the others what is new. So a position is predicted from at
    least half a block, or from all there is before it, as always where all n fit into one block. Source: strided evaluation,
    as in Hugging Face's "Perplexity of fixed-length models".

    Example: n = 10, block_size = 4 -> (0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10).
    """
    overlap = block_size - (stride or max(1, block_size // 2))
    while first < n:
        start = 0 if n <= block_size else max(0, first - overlap)
        stop = min(start + block_size, n)
        yield start, first, stop
        first = stop


# -- packed conversations, for finetuning -----------------------------------------------------------------------------

class PackedBatches:
    """Batches of rows packed with whole conversations, shuffled in each epoch as in BlockBatches. Which conversations share
    a row is the same in all epochs, as none sees another.

    conversations: (ids, assistant_mask) of each that has a target, truncated to the model's context. block_size: the length
    of a row, see `row_length`.
    """
    flag_name = "--dataset"

    def __init__(self, tokenizer: Tokenizer, conversations: "list[Conversation]", batch_size: int, context: int, seed: int):
        """context: of the model, in tokens. Raises BadInput for a malformed conversation, if none has a target, or if the
        tokenizer has no chat tokens."""
        self.batch_size, self.seed, self.pad_id = batch_size, seed, tokenizer.separator_id
        self.conversations, self.n_truncated, self.n_too_long = [], 0, 0
        tokenizer.chat_token_ids()  # raises here, rather than as an error of the first conversation
        for conversation in conversations:
            ids, assistant_mask = encode_conversation(tokenizer, conversation, context + 2)
            if not any(assistant_mask[:context + 1]):
                self.n_too_long += 1
            else:
                self.n_truncated += len(ids) > context + 1
                self.conversations.append((np.array(ids[:context + 1]), np.array(assistant_mask[:context + 1])))
        if not self.conversations:
            raise BadInput(f"{self.flag_name}: no conversation has a message of the assistant that starts within the "
                           f"{context} tokens of the model's context")
        lengths = [len(ids) - 1 for ids, _ in self.conversations]  # a conversation of n tokens takes n - 1 inputs
        self.block_size = row_length(lengths, context)
        self.rows = pack_rows(lengths, self.block_size, seed)
        self.n_blocks = len(self.rows)

    def fingerprint(self) -> str:
        """16 hex digits that change with any token."""
        digest = hashlib.sha256()
        for ids, assistant_mask in self.conversations:
            digest.update(ids.tobytes() + assistant_mask.tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows first..first + batch_size of the sequence of all epochs; see `read`."""
        return self.read(epoch_order(np.arange(first, first + self.batch_size), self.n_blocks, self.seed))

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The rows with these numbers: inputs and targets, int64 (len(rows), block_size), IGNORE_INDEX except where the
        assistant speaks; and doc_starts, bool (len(rows), block_size): where a conversation or the padding starts."""
        shape = len(rows), self.block_size
        inputs, targets, doc_starts = np.full(shape, self.pad_id), np.full(shape, IGNORE_INDEX), np.zeros(shape, bool)
        for row, number in enumerate(rows):
            start = 0
            for i in self.rows[number]:
                ids, assistant_mask = self.conversations[i]
                stop = start + len(ids) - 1
                inputs[row, start:stop] = ids[:-1]
                targets[row, start:stop] = np.where(assistant_mask[1:], ids[1:], IGNORE_INDEX)
                doc_starts[row, start] = True
                start = stop
            if start < self.block_size:
                doc_starts[row, start] = True
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(doc_starts)

    def check(self, batch: tuple[Tensor, ...]):
        """Nothing to check: the tokenizer has just made these ids."""

    def sequential(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All rows once, in order, as `read` returns them; the last batch may be smaller."""
        for first in range(0, self.n_blocks, self.batch_size):
            yield self.read(range(first, min(first + self.batch_size, self.n_blocks)))


def encodable(conversations: "list[Conversation]", tokenizer: Tokenizer, skipped: list[str]) -> "list[Conversation]":
    """Those without a byte that the vocabulary has no token for. A message for each other one is added to `skipped`. Raises
    BadInput if there is none."""
    kept = []
    for conversation in conversations:
        if all(tokenizer.can_encode(message["content"]) for message in conversation.messages):
            kept.append(conversation)
        else:
            skipped.append(f"{conversation.where}: holds a byte that the vocabulary has no token for")
    if not kept:
        raise BadInput(f"{skipped[-1]}, like every other conversation: use a model with another vocabulary")
    return kept


def encode_conversation(tokenizer: Tokenizer, conversation: "Conversation", max_tokens: int) -> tuple[list[int], list[bool]]:
    """The first `max_tokens` ids of a conversation, and their assistant mask. Raises BadInput, which starts with
    `conversation.where`, if it is malformed or has nothing to learn."""
    try:
        ids_and_mask = tokenizer.encode_chat(conversation.messages, max_tokens=max_tokens)
    except BadInput as error:
        raise BadInput(f"{conversation.where}: {error}") from None
    if not any(map(has_loss, conversation.messages)):
        raise BadInput(f"{conversation.where}: has no message of the assistant, so there is nothing to learn")
    return ids_and_mask


def row_length(lengths: Sequence[int], context: int) -> int:
    """Tokens in a row for conversations of `lengths`: the context, or the smallest power of two that holds the longest of
    them, and all of them in about MIN_ROWS rows. It does not depend on the batch size, which a resumed run may change."""
    needed = max(max(lengths), sum(lengths) // MIN_ROWS, MIN_ROW)
    return min(context, 1 << (needed - 1).bit_length())


def pack_rows(lengths: Sequence[int], row_length: int, seed: int) -> list[list[int]]:
    """Packs conversations of `lengths`, each at most row_length, into rows of row_length: in random order, each goes into
    the fullest row that has room for it (best fit). Returns the indices of the conversations in each row."""
    rows, free = [], []  # free: (room, row) of the rows with room left, sorted
    for i in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        at = bisect.bisect_left(free, (lengths[i], -1))
        room, row = free.pop(at) if at < len(free) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if room > lengths[i]:
            bisect.insort(free, (room - lengths[i], row))
    return rows
