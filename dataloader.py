"""Token shards on disk and the batches read from them.

Owns the shard format: `<split>_000000.npy` (uint16, or uint32 above 65,536 ids; one dimension; each document led by the
separator token) and `manifest.json` (source, tokenizer fingerprint, and per shard its tokens, bytes of text, documents
and checksum). Owns the order in which training sees them.

    python download_data.py --data_path=data      writes a folder of them; train.py reads it
"""
import hashlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from runtime.files import sync_folder, whole_file
from runtime.flags import BadInput
from tokenizer import Tokenizer

FORMAT = "gpt-workbench shards 2"
SPLITS = ("val", "train")  # in the order of the stream: its first documents are for validation
PREPARE_AGAIN = "delete the folder and prepare it again (its manifest.json names the text)"
LOOKED_AT = 1 << 20        # tokens of each shard that are looked at when training starts; --verify looks at all
IGNORE_INDEX = -100        # targets that carry no loss; the value F.cross_entropy skips by itself


# -- the folder -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Shard:
    """One file of tokens. bytes: UTF-8 text in it. sha256: of the tokens alone, without the .npy header."""
    file: str
    tokens: int
    bytes: int
    documents: int
    sha256: str


@dataclass
class Manifest:
    """What a data folder holds; `manifest.json` is this as JSON."""
    source: dict       # dataset, configuration, column and revisions
    settings: dict     # the thresholds that cut the stream into splits and shards, and which part of the stream this is
    tokenizer: str     # its fingerprint
    vocab_size: int
    dtype: str         # "uint16" or "uint32"
    complete: bool = False
    left_out: int = 0  # parts of the text that could not be read
    place: dict = field(default_factory=dict)  # where the text after the shards begins; empty at both ends of the text
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    format: str = FORMAT

    def total(self, split: str, what: str) -> int:
        """Sum over the shards of `split`; what: "tokens", "bytes" or "documents"."""
        return sum(getattr(shard, what) for shard in self.shards[split])

    def fingerprint(self) -> str:
        """16 hex digits that change with any token of the training data or the tokenizer."""
        facts = [self.tokenizer, self.dtype, *(shard.sha256 for shard in self.shards["train"])]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]

    def save(self, data_path: Path):
        with whole_file(data_path / "manifest.json", "w") as file:
            json.dump(asdict(self), file, indent=1)

    @classmethod
    def load(cls, data_path: Path) -> "Manifest":
        """Raises BadInput when there is none, or another format."""
        path = data_path / "manifest.json"
        try:
            blob = json.loads(path.read_text(encoding="utf-8"))
            if blob["format"] != FORMAT:
                raise ValueError(f"its format is {blob['format']!r}, expected {FORMAT!r}")
            blob["shards"] = {split: [typed(Shard, shard) for shard in blob["shards"][split]] for split in SPLITS}
            manifest = typed(cls, blob)
            for split in SPLITS:
                for i, shard in enumerate(manifest.shards[split]):
                    if shard.file != shard_name(split, i):
                        raise ValueError(f"shard {i} of {split} is {shard.file!r}")
            if manifest.dtype not in ("uint16", "uint32") or type(manifest.source["revisions"]) is not list:
                raise ValueError(f"dtype {manifest.dtype!r}, source {manifest.source}")
            if manifest.place and (manifest.place.keys() != {"at", "skip"} or type(manifest.place["skip"]) is not int):
                raise ValueError(f"place {manifest.place}")
            if not {type(manifest.settings.get(name, 0)) for name in ("num_nodes", "node")} == {int}:
                raise ValueError(f"settings {manifest.settings}")
            if manifest.complete and not all(manifest.shards.values()):
                raise ValueError("it is complete without shards")
            return manifest
        except OSError as error:
            if shards := sorted(data_path.glob("*.npy")):
                raise BadInput(f"--data_path={data_path}: holds {shards[0].name} but no manifest.json: put that back, or "
                               f"choose another folder") from None
            raise BadInput(f"--data_path={data_path}: no shards to read (manifest.json: {error.strerror}): "
                           f"run `python download_data.py --data_path={data_path}`") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f"{path}: not a manifest of ours ({type(error).__name__}: {error}): "
                           f"prepare the data again into another --data_path") from None


def typed(kind: type, values: dict):
    """`kind(**values)`, a dataclass. Raises TypeError where a plain field has another type than it declares."""
    made = kind(**values)
    for declared in fields(kind):
        value = getattr(made, declared.name)
        if declared.type in (int, str, bool, dict) and type(value) is not declared.type:
            raise TypeError(f"{declared.name} is {value!r}")
    return made


def shard_name(split: str, number: int) -> str:
    return f"{split}_{number:06d}.npy"


class ShardWriter:
    """Writes the shards of one split; a shard closes with the document that brings it to `threshold` tokens.

    An open shard has a temporary name, grows on disk rather than in memory, and takes its final name when it closes.
    """

    def __init__(self, data_path: Path, split: str, threshold: int, manifest: Manifest):
        self.data_path, self.split, self.threshold, self.manifest = data_path, split, threshold, manifest
        self.dtype = np.dtype(manifest.dtype)
        self.file = None
        self.tokens = self.bytes = self.documents = 0  # in the open shard

    @property
    def name(self) -> str:
        return shard_name(self.split, len(self.manifest.shards[self.split]))

    @property
    def room(self) -> int:
        """Tokens that the open shard lacks to its threshold."""
        return self.threshold - self.tokens

    def add(self, ids: np.ndarray, documents: int, n_bytes: int):
        """Appends whole documents, of so many bytes of text together. ids: (n,), of the shards' dtype."""
        if self.file is None:
            self._open()
        self.file.write(ids)
        self.checksum.update(ids)
        self.tokens += len(ids)
        self.bytes += n_bytes
        self.documents += documents

    def _open(self):
        self.file = open(self.data_path / (self.name + ".tmp"), "wb")  # noqa: SIM115 (closed by close or discard)
        self.checksum = hashlib.sha256()
        self._write_header()

    def _write_header(self):
        # numpy pads the header so that a first axis of any length fits: it can be written again when it is known
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False,
                        "shape": (self.tokens,)})

    def close(self):
        """Gives the open shard, if there is one, its final name and a place in the manifest, which is saved."""
        if self.file is None:
            return
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        os.replace(self.data_path / (self.name + ".tmp"), self.data_path / self.name)
        sync_folder(self.data_path)
        self.manifest.shards[self.split].append(
            Shard(self.name, self.tokens, self.bytes, self.documents, self.checksum.hexdigest()))
        self.tokens = self.bytes = self.documents = 0
        self.manifest.save(self.data_path)

    def discard(self):
        """Removes the open shard: its documents will be read again."""
        if self.file is not None:
            file, self.file = self.file, None
            with suppress(OSError):  # closing writes what is buffered, which a full disk refuses again
                file.close()
            (self.data_path / (self.name + ".tmp")).unlink(missing_ok=True)


def documents_to_reach(starts: np.ndarray, at: int, tokens: int) -> int:
    """Stop of the run of whole documents from `at` on that first holds `tokens` tokens, or all there are.

    starts, (documents + 1,): document i is tokens starts[i]..starts[i + 1]. [0, 5, 9, 12], 0, 6 -> 2
    """
    return int(np.searchsorted(starts, min(int(starts[at]) + max(tokens, 1), int(starts[-1]))))


class ShardedTokens:
    """The shards of one split as one long sequence of tokens, memory-mapped.

    Raises BadInput, naming the file, for a shard that is missing, cut off, foreign or not in the manifest.
    """

    def __init__(self, data_path: Path, manifest: Manifest, split: str, separator_id: int):
        self.paths = [data_path / shard.file for shard in manifest.shards[split]]
        lengths = [shard.tokens for shard in manifest.shards[split]]
        self.stops = np.cumsum([0, *lengths])
        self.maps: list[np.ndarray] | None = None
        for path, length in zip(self.paths, lengths):
            check_shard(path, length, manifest, separator_id)
        if strangers := find_strangers(self.paths, split):
            raise BadInput(f"{min(strangers)}: not in manifest.json: move it away or prepare the data again")

    def __len__(self) -> int:
        return int(self.stops[-1])

    def __getstate__(self):
        return self.__dict__ | {"maps": None}  # pickled for a worker, a memory map would become a copy of the shard

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop, (stop - start,), across shards where need be."""
        if self.maps is None:
            self.maps = [np.load(path, mmap_mode="r") for path in self.paths]
        first = int(np.searchsorted(self.stops, start, side="right")) - 1
        parts = []
        while start < stop:
            end = min(stop, int(self.stops[first + 1]))
            parts.append(self.maps[first][start - self.stops[first]:end - self.stops[first]])
            start, first = end, first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def find_strangers(paths: list[Path], split: str) -> set[Path]:
    """Files beside the shards `paths` that look like further ones."""
    folders = {path.parent for path in paths}  # several, where each holds the part of a node
    return {path for folder in folders for path in folder.glob(f"{split}_*.npy")} - set(paths)


def check_shard(path: Path, tokens: int, manifest: Manifest, separator_id: int):
    """Raises BadInput unless `path` is a .npy file of so many tokens that begins with a document. Reads its beginning
    only: a shard may hold gigabytes."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BadInput(f"{path}: listed in manifest.json but missing: {PREPARE_AGAIN}") from None
    except (ValueError, OSError, EOFError) as error:
        raise BadInput(f"{path}: cut off, or not a .npy file ({error}): {PREPARE_AGAIN}") from None
    if getattr(found, "dtype", None) != np.dtype(manifest.dtype) or found.shape != (tokens,):
        raise BadInput(f"{path}: holds {getattr(found, 'dtype', 'no array')} {getattr(found, 'shape', '')}, "
                       f"manifest.json says {manifest.dtype} ({tokens},): {PREPARE_AGAIN}")
    if tokens and (found[0] != separator_id or found[:LOOKED_AT].max() >= manifest.vocab_size):
        raise BadInput(f"{path}: not tokens of this vocabulary, or not led by the document separator: {PREPARE_AGAIN}")


@dataclass(frozen=True)
class Data:
    """An opened data folder: its manifest and the tokenizer that made it."""
    path: Path
    manifest: Manifest
    tokenizer: Tokenizer

    def split(self, name: str) -> ShardedTokens:
        return ShardedTokens(self.path, self.manifest, name, self.tokenizer.separator_id)


def open_data(data_path: Path, vocab_size: int | None = None, unfinished: bool = False) -> Data:
    """A folder that download_data.py filled, or one that holds such folders, the parts of several nodes.

    Raises BadInput when it is not finished (unless `unfinished` data will do), its parts do not belong together, or its
    vocabulary has not the `vocab_size` that was expected.
    """
    parts = [] if (data_path / "manifest.json").exists() else parts_of_nodes(data_path)
    manifests = [Manifest.load(folder) for folder in parts or [data_path]]
    for folder, manifest in zip(parts or [data_path], manifests):
        if not manifest.complete and not unfinished:
            raise BadInput(f"--data_path={folder}: the preparation did not finish: run `python download_data.py` with "
                           f"the same flags again to go on")
    manifest = joined(data_path, parts, manifests) if parts else manifests[0]
    path = (parts or [data_path])[0] / "tokenizer.json"
    if not path.exists():
        raise BadInput(f"{path}: missing: put back the one these shards were made with, or prepare them again")
    tokenizer = Tokenizer.load(path)
    if (tokenizer.fingerprint(), tokenizer.vocab_size) != (manifest.tokenizer, manifest.vocab_size):
        raise BadInput(f"{path}: not the tokenizer these shards were made with (fingerprint {tokenizer.fingerprint()} of "
                       f"{tokenizer.vocab_size}, manifest.json says {manifest.tokenizer} of {manifest.vocab_size}): put "
                       f"the right one back")
    if vocab_size not in (None, manifest.vocab_size):
        raise BadInput(f"--vocab_size={vocab_size}: the data in {data_path} has {manifest.vocab_size}: "
                       f"drop the flag, or prepare other data")
    return Data(data_path, manifest, tokenizer)


def parts_of_nodes(data_path: Path) -> list[Path]:
    """Folders in `data_path` that were each prepared with --num_nodes, in order of --node."""
    folders = {}
    for path in sorted(data_path.glob("*/manifest.json")):
        settings = Manifest.load(path.parent).settings
        if settings.get("num_nodes", 1) > 1:
            folders[path.parent] = settings.get("node", 0)
    return sorted(folders, key=folders.get)


def joined(data_path: Path, folders: list[Path], manifests: list[Manifest]) -> Manifest:
    """The manifest of the parts together. Raises BadInput unless they are all the parts of one preparation."""
    first = manifests[0]
    common = lambda manifest: (manifest.tokenizer, manifest.dtype, manifest.source, manifest.settings | {"node": None})
    for folder, manifest in zip(folders, manifests):
        if common(manifest) != common(first):
            raise BadInput(f"--data_path={data_path}: {folder} and {folders[0]} were prepared with other flags, text or "
                           f"tokenizer: put only parts of one preparation side by side")
    nodes, n = [manifest.settings.get("node", 0) for manifest in manifests], first.settings["num_nodes"]
    if nodes != list(range(n)):
        raise BadInput(f"--data_path={data_path}: holds the parts of node {', '.join(map(str, nodes))} of --num_nodes={n}: "
                       f"put each of 0 to {n - 1} there once")
    shards = {split: [replace(shard, file=f"{folder.name}/{shard.file}") for folder, manifest in zip(folders, manifests)
                      for shard in manifest.shards[split]] for split in SPLITS}
    return replace(first, shards=shards, complete=all(manifest.complete for manifest in manifests),
                   left_out=sum(manifest.left_out for manifest in manifests))


def damage(data: Data) -> Iterator[str]:
    """Reads every token and yields a line for each thing that is not as the manifest says."""
    manifest, separator_id = data.manifest, data.tokenizer.separator_id
    token_bytes, itemsize = data.tokenizer.token_bytes(), np.dtype(manifest.dtype).itemsize
    shards = [shard for split in SPLITS for shard in manifest.shards[split]]
    with tqdm(total=sum(shard.tokens for shard in shards) * itemsize, desc="verifying", unit="B", unit_scale=True) as bar:
        for shard in shards:
            path = data.path / shard.file
            try:
                check_shard(path, shard.tokens, manifest, separator_id)
            except BadInput as error:
                yield str(error)
                continue
            tokens, checksum, largest, documents, n_bytes = np.load(path, mmap_mode="r"), hashlib.sha256(), 0, 0, 0
            for start in range(0, len(tokens), 1 << 22):
                part = np.ascontiguousarray(tokens[start:start + (1 << 22)])
                checksum.update(part)
                largest = max(largest, int(part.max()))
                documents += np.count_nonzero(part == separator_id)
                n_bytes += int(token_bytes[np.minimum(part, len(token_bytes) - 1)].sum())
                bar.update(part.nbytes)
            if largest >= manifest.vocab_size:
                yield f"{path}: holds id {largest}, beyond the vocabulary of {manifest.vocab_size}"
            if checksum.hexdigest() != shard.sha256:
                yield f"{path}: its tokens are not those of the checksum in manifest.json"
            for found, expected, what in ((documents, shard.documents, "documents"),
                                          (n_bytes, shard.bytes, "bytes of text")):
                if found != expected:
                    yield f"{path}: holds {found:,} {what}, manifest.json says {expected:,}"
    if manifest.complete:
        for split in SPLITS:
            if strangers := find_strangers([data.path / shard.file for shard in manifest.shards[split]], split):
                yield f"{min(strangers)}: not in manifest.json"


# -- batches ----------------------------------------------------------------------------------------------------------

def shuffled(place: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
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
        return self.read(in_order(np.arange(first, first + self.batch_size), self.n_blocks, self.seed))

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


def in_order(places: np.ndarray, n_blocks: int, seed: int) -> np.ndarray:
    """Which block stands at each of `places` in the endless row of all epochs."""
    blocks = np.empty_like(places)
    epochs = places // n_blocks
    for epoch in np.unique(epochs):
        here = epochs == epoch
        blocks[here] = shuffled(places[here] % n_blocks, n_blocks, seed, int(epoch))
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

    def __next__(self) -> tuple[Tensor, ...]:
        """What `batches` makes; of shards inputs and targets, each int64 (batch_size, block_size)."""
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


@contextmanager
def explain_dead_worker(num_workers: int):
    """Around all that happens while a TrainLoader is in use: torch hears of a worker's death by a signal, and raises
    wherever the main thread happens to be. Raises OSError instead."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"--dataloader_num_workers={num_workers}: a process that reads data died ("
                      f"{str(error).splitlines()[0]}); 0 does without") from None


@contextmanager
def no_interrupt():
    """Processes started meanwhile ignore Ctrl-C from their first moment on. One that comes meanwhile waits; none is lost."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python does not allow handlers
        yield
        return
    has_masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    if has_masks:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    came = has_masks and signal.SIGINT in signal.sigpending()  # to ignore a signal forgets those that wait
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if has_masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGINT)


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


def require_a_block(data: Data, split: str, block_size: int) -> ShardedTokens:
    tokens = data.split(split)
    if len(tokens) <= block_size:
        raise BadInput(f"--block_size={block_size}: the {split} split in {data.path} has only {len(tokens):,} tokens: "
                       f"prepare more text{' (--val_tokens)' if split == 'val' else ''} or use a smaller block")
    return tokens
