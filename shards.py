"""Token shards on disk: writing, reading and verifying them.

Owns the shard format: `<split>_000000.npy` (uint16, or uint32 above 65,536 ids; one dimension; each document preceded by the
separator token) and `manifest.json` (source, tokenizer fingerprint, and for each shard its tokens, bytes of text, documents
and checksum).

    python download_data.py --data_path=data                writes a folder of shards; train.py reads it
    python download_data.py --data_path=data --verify       checks it against its manifest
"""
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.cli import log_line, progress_bar
from runtime.config import BadInput
from runtime.files import atomic_write, fsync_folder, require_regular_file
from tokenizer import Tokenizer

FORMAT = "gpt-workbench shards 4"
# The same without `val_digest`: their validation split is the start of the stream, up to a number of tokens; and 2 without
# `checksum`, which proves the place, and `last_document`.
EARLIER_FORMATS = "gpt-workbench shards 3", "gpt-workbench shards 2"
SPLITS = ("val", "train")  # in the order in which they are written
PREPARE_AGAIN = "delete the folder and prepare it again (its manifest.json names the text)"
CHECKED_TOKENS = 1 << 20   # tokens of each shard that are checked when training starts; --verify checks all


# -- the manifest -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Shard:
    """One file of tokens. bytes: of the UTF-8 text that it encodes. sha256: of the tokens, without the .npy header."""
    file: str
    tokens: int
    bytes: int
    documents: int
    sha256: str


@dataclass
class Manifest:
    """What a data folder holds; `manifest.json` is this as JSON, with the names of JSON_NAMES."""
    source: dict       # dataset, configuration, column and revisions
    settings: dict     # the thresholds that cut the stream into splits and shards, and the part of the stream this is
    tokenizer: str     # fingerprint
    vocab_size: int
    dtype: str         # "uint16" or "uint32"
    complete: bool = False
    n_skipped: int = 0  # parts of the text that could not be read
    n_duplicates: int = 0  # further copies of validation documents, which were left out of the training split
    n_val_passed: int = 0  # validation documents whose own place in the text is before `position`
    position: dict = field(default_factory=dict)  # where the text after the shards starts; empty at both ends of the text
    last_document: str = ""  # checksum of the document before `position`; "" if there is none
    val_digest: str = ""  # of the texts of the validation split, whatever the tokenizer; "" until it is written
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    format: str = FORMAT
    checksum: str = ""  # of what a preparation resumes from; "" in folders of earlier versions

    def total(self, split: str, quantity: str) -> int:
        """Sum over the shards of `split`; quantity: "tokens", "bytes" or "documents"."""
        return sum(getattr(shard, quantity) for shard in self.shards[split])

    def fingerprint(self) -> str:
        """16 hex digits that change with any token of the training split and with the tokenizer."""
        facts = [self.tokenizer, self.dtype, *(shard.sha256 for shard in self.shards["train"])]
        return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]

    def compute_checksum(self) -> str:
        """Of what belongs together: the shards, and where the text after them starts."""
        facts = [self.position, self.last_document, self.n_skipped, self.n_duplicates,
                 [asdict(shard) for split in SPLITS for shard in self.shards[split]]]
        if self.val_digest:  # not in earlier formats
            facts += [self.val_digest, self.n_val_passed]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def save(self, data_path: Path):
        self.checksum = self.compute_checksum()
        with atomic_write(data_path / "manifest.json", "w") as file:
            json.dump({JSON_NAMES.get(name, name): value for name, value in asdict(self).items()}, file, indent=1)

    @classmethod
    def load(cls, data_path: Path) -> "Manifest":
        """Raises BadInput when there is none, or one of another format."""
        path = data_path / "manifest.json"
        if path.exists():
            require_regular_file(path, str(path))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] not in (FORMAT, *EARLIER_FORMATS):
                raise ValueError(f"its format is {values['format']!r}, expected {FORMAT!r}")
            if values["format"] != EARLIER_FORMATS[-1] and not values["checksum"]:
                raise ValueError("its checksum is empty")
            values["format"] = FORMAT
            for name, json_name in JSON_NAMES.items():
                if json_name in values:
                    values[name] = values.pop(json_name)
            values["shards"] = {split: [from_json(Shard, shard) for shard in values["shards"][split]] for split in SPLITS}
            manifest = from_json(cls, values)
            manifest.check()
            return manifest
        except OSError as error:
            if shards := sorted(data_path.glob("*.npy")):
                raise BadInput(f"--data_path={data_path}: holds {shards[0].name} but no manifest.json: restore that, or "
                               f"choose another folder") from None
            found = f"manifest.json: {error.strerror}" if data_path.exists() else "no such folder"
            raise BadInput(f"--data_path={data_path}: no shards to read ({found}): {suggest_folder(data_path)}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{path}: not a manifest of this program ({type(error).__name__}: "
                           f"{str(error)[:300]}): prepare the data again into another --data_path") from None

    def check(self):
        """Raises ValueError or another exception for values that no preparation writes."""
        for split in SPLITS:
            for i, shard in enumerate(self.shards[split]):
                if shard.file != shard_name(split, i):
                    raise ValueError(f"shard {i} of {split} is {shard.file!r}")
                if not 0 < shard.documents <= shard.tokens < 2 ** 50 or not 0 <= shard.bytes < 2 ** 60 or not re.fullmatch(
                        "[0-9a-f]{64}", shard.sha256):
                    raise ValueError(f"{shard.file} is {shard}")
        revisions = self.source["revisions"]
        if type(revisions) is not list or not {type(value) for value in [*revisions, *self.source.values()]
                                               if value is not revisions} <= {str, type(None)}:
            raise ValueError(f"source {self.source}")
        if self.dtype not in ("uint16", "uint32") or not 0 < self.vocab_size <= np.iinfo(self.dtype).max + 1:
            raise ValueError(f"dtype {self.dtype!r}, vocab_size {self.vocab_size}")
        if self.position and (self.position.keys() != {"at", "skip"} or type(self.position["skip"]) is not int
                              or self.position["skip"] < 0):
            raise ValueError(f"position {self.position}")
        if not {type(value) for value in self.settings.values()} <= {int, type(None)} or not (
                0 <= self.settings.get("node", 0) < self.settings.get("num_nodes", 1)):
            raise ValueError(f"settings {self.settings}")
        if self.complete and not all(self.shards.values()):
            raise ValueError("it is complete without shards")
        if min(self.n_skipped, self.n_duplicates, self.n_val_passed) < 0:
            raise ValueError(f"left_out is {self.n_skipped}, n_duplicates {self.n_duplicates}, n_val_passed "
                             f"{self.n_val_passed}")
        if not re.fullmatch("([0-9a-f]{16})?", self.val_digest):
            raise ValueError(f"val_digest {self.val_digest!r}")

    def matches_checksum(self) -> bool:
        return self.checksum in ("", self.compute_checksum())


def suggest_folder(data_path: Path) -> str:
    """What to give instead of a folder that holds no shards: a prepared one in it, or beside it with a similar name; or
    else how to prepare it."""
    inside, beside = ([str(path.parent) for path in sorted(folder.glob("*/manifest.json"))
                       if path.with_name("tokenizer.json").exists()] for folder in (data_path, data_path.parent))
    if close := inside or difflib.get_close_matches(str(data_path), beside, n=1):
        return f"did you mean {' or '.join(close[:3])}?"
    others = f", or give a folder that is prepared: {', '.join(beside[:3])}" if beside else ""
    return f"run `python download_data.py --data_path={data_path}`{others}"


JSON_NAMES = {"n_skipped": "left_out", "position": "place"}  # attribute of Manifest -> its key in manifest.json


def from_json(dataclass_type: type, values: dict):
    """`dataclass_type(**values)`. Raises TypeError if a plain field has another type than declared."""
    instance = dataclass_type(**values)
    for declared in fields(dataclass_type):
        value = getattr(instance, declared.name)
        if declared.type in (int, str, bool, dict) and type(value) is not declared.type:
            raise TypeError(f"{JSON_NAMES.get(declared.name, declared.name)} is {value!r}"[:200])
    return instance


def shard_name(split: str, number: int) -> str:
    return f"{split}_{number:06d}.npy"


# -- writing ----------------------------------------------------------------------------------------------------------

class ShardWriter:
    """Writes the shards of one split; the caller closes a shard with the document that brings it to `threshold` tokens.

    An open shard has a temporary name, grows on disk rather than in memory, and gets its final name when it is closed.
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
        """Tokens that the open shard can take until it reaches its threshold."""
        return self.threshold - self.tokens

    def add(self, ids: np.ndarray, documents: int, n_bytes: int):
        """Appends whole documents. ids: (n,), of the shards' dtype, separators included. n_bytes: of their text."""
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
        # numpy pads the header for a first axis of any length, so it can be rewritten once the length is known
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False,
                        "shape": (self.tokens,)})

    def close(self):
        """Gives the open shard, if there is one, its final name, adds it to the manifest and saves that."""
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
        """Removes the open shard: a resumed preparation reads its documents again."""
        if self.file is not None:
            file, self.file = self.file, None
            with suppress(OSError):  # closing flushes the buffer, which a full disk refuses again
                file.close()
            (self.data_path / (self.name + ".tmp")).unlink(missing_ok=True)


def documents_to_reach(starts: np.ndarray, at: int, tokens: int) -> int:
    """The smallest `stop` for which documents at..stop hold at least `tokens` tokens, or the number of documents.

    starts, (documents + 1,): document i is tokens starts[i]..starts[i + 1]. Example: [0, 5, 9, 12], 0, 6 -> 2
    """
    return int(np.searchsorted(starts, min(int(starts[at]) + max(tokens, 1), int(starts[-1]))))


# -- reading ----------------------------------------------------------------------------------------------------------

class ShardedTokens:
    """The shards of one split as one long sequence of tokens, memory-mapped.

    Raises BadInput naming the file for a shard that is missing, truncated, of another format or not in the manifest.
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
        return self.__dict__ | {"maps": None}  # a memory map would be pickled, for a worker, as a copy of the shard

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop, (stop - start,), of the shards' dtype; may span shards."""
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
    """Files in the folders of the shards `paths` that are named like shards but are not among them."""
    folders = {path.parent for path in paths}  # several if each holds the part of a node
    return {path for folder in folders for path in folder.glob(f"{split}_*.npy")} - set(paths)


def check_shard(path: Path, tokens: int, manifest: Manifest, separator_id: int):
    """Raises BadInput unless `path` is a .npy file of `tokens` tokens of this vocabulary that starts with a document. Reads
    only its first CHECKED_TOKENS: a shard may hold gigabytes."""
    if not path.exists():
        raise BadInput(f"{path}: listed in manifest.json but missing: {PREPARE_AGAIN}")
    require_regular_file(path, str(path))
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads the header, a Python literal, with Python's parser
        raise BadInput(f"{path}: cut off, or not a .npy file ({str(error)[:200]}): {PREPARE_AGAIN}") from None
    if getattr(found, "dtype", None) != np.dtype(manifest.dtype) or found.shape != (tokens,):
        raise BadInput(f"{path}: holds {getattr(found, 'dtype', 'no array')} {getattr(found, 'shape', '')}, "
                       f"manifest.json says {manifest.dtype} ({tokens},): {PREPARE_AGAIN}")
    if (extra := path.stat().st_size - found.offset - found.nbytes) != 0:
        raise BadInput(f"{path}: holds {extra:,} bytes after its tokens: {PREPARE_AGAIN}")
    if tokens and (found[0] != separator_id or found[:CHECKED_TOKENS].max() >= manifest.vocab_size):
        raise BadInput(f"{path}: not tokens of this vocabulary, or does not start with the document separator: "
                       f"{PREPARE_AGAIN}")


def check_ids(data_path: Path, vocab_size: int, ids: np.ndarray):
    """Raises BadInput for an id beyond the vocabulary: on a GPU, its embedding would fail without naming anything."""
    if (largest := int(ids.max())) >= vocab_size:
        raise BadInput(f"--data_path={data_path}: a shard holds id {largest}, beyond the vocabulary of {vocab_size}: it is "
                       f"damaged: {PREPARE_AGAIN}")


@dataclass(frozen=True)
class DataFolder:
    """An opened data folder: its manifest and the tokenizer that its shards were made with."""
    path: Path
    manifest: Manifest
    tokenizer: Tokenizer

    def split(self, name: str) -> ShardedTokens:
        return ShardedTokens(self.path, self.manifest, name, self.tokenizer.separator_id)


def open_data(data_path: Path, vocab_size: int | None = None, unfinished: bool = False) -> DataFolder:
    """Opens a folder that download_data.py filled, or one that holds such folders, the parts of several nodes.

    Raises BadInput when it is not finished (accepted if `unfinished`), its parts do not belong together, or its vocabulary
    does not have the size `vocab_size`.
    """
    parts = [] if (data_path / "manifest.json").exists() else find_node_folders(data_path)
    manifests = [Manifest.load(folder) for folder in parts or [data_path]]
    for folder, manifest in zip(parts or [data_path], manifests):
        if not manifest.complete and not unfinished:
            raise BadInput(f"--data_path={folder}: the preparation did not finish: run `python download_data.py` with "
                           f"the same flags again to resume it")
    manifest = merge_manifests(data_path, parts, manifests) if parts else manifests[0]
    path = (parts or [data_path])[0] / "tokenizer.json"
    if not path.exists():
        raise BadInput(f"{path}: missing: restore the one these shards were made with, or prepare them again")
    tokenizer = Tokenizer.load(path)
    if (tokenizer.fingerprint(), tokenizer.vocab_size) != (manifest.tokenizer, manifest.vocab_size):
        raise BadInput(f"{path}: not the tokenizer these shards were made with (fingerprint {tokenizer.fingerprint()} of "
                       f"{tokenizer.vocab_size}, manifest.json says {manifest.tokenizer} of {manifest.vocab_size}): "
                       f"restore the right one")
    if vocab_size not in (None, manifest.vocab_size):
        raise BadInput(f"--vocab_size={vocab_size}: the data in {data_path} has {manifest.vocab_size}: "
                       f"drop the flag, or prepare other data")
    return DataFolder(data_path, manifest, tokenizer)


def find_node_folders(data_path: Path) -> list[Path]:
    """The folders in `data_path` that were prepared with --num_nodes, sorted by --node."""
    folders = {}
    for path in sorted(data_path.glob("*/manifest.json")):
        settings = Manifest.load(path.parent).settings
        if settings.get("num_nodes", 1) > 1:
            folders[path.parent] = settings.get("node", 0)
    return sorted(folders, key=folders.get)


def merge_manifests(data_path: Path, folders: list[Path], manifests: list[Manifest]) -> Manifest:
    """One manifest for the parts of all nodes. Raises BadInput unless `folders` are all the parts of one preparation."""
    first = manifests[0]
    common = lambda manifest: (manifest.tokenizer, manifest.dtype, manifest.source, manifest.settings | {"node": None})
    for folder, manifest in zip(folders, manifests):
        if common(manifest) != common(first):
            raise BadInput(f"--data_path={data_path}: {folder} and {folders[0]} were prepared with different flags, text or "
                           f"tokenizers: put only parts of one preparation side by side")
    nodes, n = [manifest.settings.get("node", 0) for manifest in manifests], first.settings["num_nodes"]
    if nodes != list(range(n)):
        raise BadInput(f"--data_path={data_path}: holds the parts of node {', '.join(map(str, nodes))} of --num_nodes={n}: "
                       f"put each of 0 to {n - 1} there once")
    shards = {split: [replace(shard, file=f"{folder.name}/{shard.file}") for folder, manifest in zip(folders, manifests)
                      for shard in manifest.shards[split]] for split in SPLITS}
    total = lambda name: sum(getattr(manifest, name) for manifest in manifests)
    digests = [manifest.val_digest for manifest in manifests]
    return replace(first, shards=shards, complete=all(manifest.complete for manifest in manifests),
                   val_digest=hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if all(digests) else "",
                   n_skipped=total("n_skipped"), n_duplicates=total("n_duplicates"), n_val_passed=total("n_val_passed"),
                   checksum="")


def require_block(data: DataFolder, split: str, block_size: int) -> ShardedTokens:
    """The tokens of a split. Raises BadInput if it is shorter than one block."""
    tokens = data.split(split)
    if len(tokens) <= block_size:
        raise BadInput(f"--block_size={block_size}: the {split} split in {data.path} has only {len(tokens):,} tokens: "
                       f"prepare more text{' (--val_bytes)' if split == 'val' else ''} or use a smaller block")
    return tokens


# -- verifying --------------------------------------------------------------------------------------------------------

def find_corruption(data: DataFolder) -> Iterator[str]:
    """Reads every token and yields a message for each difference from the manifest."""
    manifest = data.manifest
    if not manifest.matches_checksum():
        yield f"{data.path / 'manifest.json'}: its shards and its place in the text do not match its checksum"
    shards = [shard for split in SPLITS for shard in manifest.shards[split]]
    n_bytes = sum(shard.tokens for shard in shards) * np.dtype(manifest.dtype).itemsize
    with progress_bar(total=n_bytes, desc="verifying", unit="B", unit_scale=True) as bar:
        for shard in shards:
            try:
                check_shard(data.path / shard.file, shard.tokens, manifest, data.tokenizer.separator_id)
            except BadInput as error:
                yield str(error)
                continue
            yield from compare_shard(data, shard, bar)
    if manifest.complete:
        for split in SPLITS:
            if unlisted := unlisted_files([data.path / shard.file for shard in manifest.shards[split]], split):
                yield f"{min(unlisted)}: not in manifest.json"


def compare_shard(data: DataFolder, shard: Shard, bar: tqdm) -> Iterator[str]:
    """Yields a message for each difference between the tokens of a shard and its entry in the manifest."""
    path, vocab_size, token_bytes = data.path / shard.file, data.manifest.vocab_size, data.tokenizer.token_bytes()
    tokens, checksum = np.load(path, mmap_mode="r"), hashlib.sha256()
    largest = documents = n_bytes = 0
    for start in range(0, len(tokens), 1 << 22):
        part = np.ascontiguousarray(tokens[start:start + (1 << 22)])
        checksum.update(part)
        largest = max(largest, int(part.max()))
        documents += np.count_nonzero(part == data.tokenizer.separator_id)
        n_bytes += int(token_bytes[np.minimum(part, len(token_bytes) - 1)].sum())
        bar.update(part.nbytes)
    if largest >= vocab_size:
        yield f"{path}: holds id {largest}, beyond the vocabulary of {vocab_size}"
    if checksum.hexdigest() != shard.sha256:
        yield f"{path}: its tokens do not match the checksum in manifest.json"
    for found, expected, unit in ((documents, shard.documents, "documents"), (n_bytes, shard.bytes, "bytes of text")):
        if found != expected:
            yield f"{path}: holds {found:,} {unit}, manifest.json says {expected:,}"


def verify(data_path: Path):
    """Logs a line for each difference between a folder and its manifest. Raises BadInput if there is any."""
    data, n_differences = open_data(data_path, unfinished=True), 0
    for message in find_corruption(data):
        log_line(message)
        n_differences += 1
    if n_differences:
        raise BadInput(f"--data_path={data_path}: does not match its manifest.json, see above: restore what was changed, or "
                       f"prepare the data again into another folder")
    shards = sum(len(data.manifest.shards[split]) for split in SPLITS)
    tokens = sum(data.manifest.total(split, "tokens") for split in SPLITS)
    print(f"{data_path}: {shards} shards, {tokens:,} tokens, match manifest.json"
          + ("" if data.manifest.complete else "; the preparation has not finished"))
