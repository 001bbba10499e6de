"""Token shards on disk and the batches read from them.

Owns the shard format: `<split>_000000.npy` (uint16, or uint32 above 65,536 ids; one dimension; each document led by the
separator token) and `manifest.json` (source, tokenizer fingerprint, and per shard its tokens, bytes of text, documents
and checksum). Owns the order in which training sees them.

    python download_data.py --data_path=data      writes a folder of them; train.py reads it
"""
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.cli import log_line
from runtime.config import BadInput
from runtime.files import atomic_write, fsync_folder
from tokenizer import Tokenizer

FORMAT = "gpt-workbench shards 2"
SPLITS = ("val", "train")  # in the order of the stream: its first documents are for validation
PREPARE_AGAIN = "delete the folder and prepare it again (its manifest.json names the text)"
LOOKED_AT = 1 << 20        # tokens of each shard that are looked at when training starts; --verify looks at all


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
        with atomic_write(data_path / "manifest.json", "w") as file:
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
        fsync_folder(self.data_path)
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
        if unlisted := unlisted_files(self.paths, split):
            raise BadInput(f"{min(unlisted)}: not in manifest.json: move it away or prepare the data again")

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


def unlisted_files(paths: list[Path], split: str) -> set[Path]:
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


def find_corruption(data: Data) -> Iterator[str]:
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
            if unlisted := unlisted_files([data.path / shard.file for shard in manifest.shards[split]], split):
                yield f"{min(unlisted)}: not in manifest.json"


def require_a_block(data: Data, split: str, block_size: int) -> ShardedTokens:
    tokens = data.split(split)
    if len(tokens) <= block_size:
        raise BadInput(f"--block_size={block_size}: the {split} split in {data.path} has only {len(tokens):,} tokens: "
                       f"prepare more text{' (--val_tokens)' if split == 'val' else ''} or use a smaller block")
    return tokens


# -- looking at a prepared folder -------------------------------------------------------------------------------------

def verify(data_path: Path):
    """Prints a line for each thing that is wrong with a folder. Raises BadInput if there is any."""
    data, wrong = open_data(data_path, unfinished=True), 0
    for line in find_corruption(data):
        log_line(line)
        wrong += 1
    if wrong:
        raise BadInput(f"--data_path={data_path}: not as its manifest.json says, see above: put back what was changed, or "
                       f"prepare it again into another folder")
    shards = sum(len(data.manifest.shards[split]) for split in SPLITS)
    tokens = sum(data.manifest.total(split, "tokens") for split in SPLITS)
    print(f"{data_path}: {shards} shards, {tokens:,} tokens, are as manifest.json says"
          + ("" if data.manifest.complete else "; the preparation has not finished"))
