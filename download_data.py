"""Turns text into token shards that train.py reads.

    python download_data.py                          FineWeb-Edu 10BT, streamed from the hub, into data/
    python download_data.py --dataset=builtin        several MB of documentation, no network
    python download_data.py --dataset=my_texts/      a folder of parquet, jsonl, csv, txt, md … files
    python download_data.py --dataset=data/builtin   the text of a prepared folder, for another vocabulary
    python download_data.py --dry_run                what would be done, how long it would take, and the disk it needs
    python download_data.py --verify                 checks the shards in data/ against their manifest
    python download_data.py --stats                  draws what they contain: data/stats.png

A document belongs to the validation split if a hash of its text says so, until --val_bytes are full: the same documents
whatever the vocabulary. Files that are named after a validation or test split are the validation split instead. The rest is
the training split, without documents that are in the validation split too. Finished shards survive any interruption, and the
same command resumes after the last of them. One thread reads, one per core encodes, one writes.
"""
import csv
import hashlib
import itertools
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from experiments.plots import draw_corpus_stats
from runtime.cli import command, log_line, parse_flags, progress_bar, say, set_postfix
from runtime.config import BadInput, check_flags, flag, flag_names
from runtime.files import atomic_write, check_writable, folder_lock
from runtime.forecast import format_bytes, format_seconds, free_disk
from runtime.threads import available_cores, map_ahead
from shards import (
    SPLITS,
    DataFolder,
    Manifest,
    ShardWriter,
    check_ids,
    documents_to_reach,
    find_node_folders,
    open_data,
    verify,
)
from text.documents import DocumentSet, PackedDocuments, document_hashes, text_hash
from text.folders import is_prepared, local_path
from text.formats import CHUNK_BYTES, TXT_DOCUMENT_BYTES, TXT_MAX_BYTES, Chunk
from text.sources import Source, SourceConfig, local_revisions, open_source, source_flags, take_text
from tokenizer import MAX_VOCAB_SIZE, TRAINING_BYTES, Tokenizer, TooFewMerges

# Defaults of flags, most of which depend on how much text there is. TOKENS_THRESHOLD is a little more than the 328 M tokens
# that train.py reads by default.
TOKENS_THRESHOLD = 400_000_000
HUB_VOCAB_SIZE, BUILTIN_VOCAB_SIZE, SMALLEST_VOCAB_SIZE = 32_768, 4_096, 512
HUB_VAL_BYTES, LOCAL_VAL_BYTES = 4_000_000, 400_000
VAL_SHARES = 1 / 1000, 1 / 10  # of the documents, at least and at most, that may belong to the validation split
BYTES_PER_TOKEN = 4            # roughly, before there is a tokenizer
SAMPLE_BYTES = 4_000_000       # of text, on which a forecast is based


@dataclass(frozen=True)
class PrepareConfig:
    """The shards."""
    data_path: Path = flag(Path("data"), "folder for the shards, manifest.json and tokenizer.json", on_resume="unsaved")
    tokenizer_path: Path = flag(None, "tokenizer.json to use (default: train one on the start of the text)")
    vocab_size: int = flag(None, f"size of the tokenizer to train (default: {HUB_VOCAB_SIZE}; of less local text, the power "
                                 f"of two that it is enough for; with --dataset=builtin {BUILTIN_VOCAB_SIZE}), or the size "
                                 f"that the one at --tokenizer_path must have",
                           at_least=256, at_most=MAX_VOCAB_SIZE)
    shard_size_threshold: int = flag(100_000_000, "tokens at which a shard is closed", at_least=1)
    tokens_threshold: int = flag(None, f"stops once more than this many tokens are written (default: {TOKENS_THRESHOLD:_}, "
                                       f"somewhat more than train.py reads by default; of a data folder, all)", at_least=1)
    val_bytes: int = flag(None, f"bytes of text at which the validation split is closed; at most about a tenth of the text "
                                f"goes into it (default: of a hub dataset {HUB_VAL_BYTES:_}; else a tenth of the text, "
                                f"{LOCAL_VAL_BYTES:_} at most)", at_least=1)
    tokenizer_bytes: int = flag(TRAINING_BYTES, "bytes of text to train a tokenizer on, from the start of the stream",
                                at_least=1)
    num_nodes: int = flag(1, "number of machines that share the work, each with a folder of its own; side by side, these "
                             "folders are the --data_path of train.py", at_least=1)
    node: int = flag(0, "which of the machines this is, from 0", at_least=0)
    cluster: str = flag(None, "make the folders of all --num_nodes in --data_path, on a Ray cluster: auto, ray://host:10001 "
                              "or host:6379", on_resume="unsaved")
    dry_run: bool = flag(False, "print the forecast, and do nothing", on_resume="unsaved")
    verify: bool = flag(False, "prepares nothing: checks every shard in --data_path against its manifest",
                        on_resume="unsaved")
    stats: bool = flag(False, "prepares nothing: draws document lengths and token frequencies of --data_path",
                       on_resume="unsaved")

    def __post_init__(self):
        check_flags(self)
        if self.node >= self.num_nodes:
            raise BadInput(f"--node={self.node}: must be below --num_nodes={self.num_nodes}")
        if self.cluster and self.num_nodes == 1:
            raise BadInput(f"--cluster={self.cluster}: needs --num_nodes=N, the number of parts to make there: add it")
        if self.cluster and self.node:
            raise BadInput(f"--node={self.node}: --cluster={self.cluster} makes the parts of all nodes: leave one out")
        if self.cluster and self.dry_run:
            raise BadInput(f"--cluster={self.cluster}: --dry_run is about this machine: leave one out")

    def settings(self) -> dict:
        """What, besides source and tokenizer, determines the bytes of the shards, for the manifest, which describes those
        two itself."""
        names = flag_names(PrepareConfig, on_resume="fixed") - {"tokenizer_path", "vocab_size"}
        return {name: value for name, value in vars(self).items() if name in names}


def fill_defaults(config: PrepareConfig, source_config: SourceConfig, source: Source) -> PrepareConfig:
    """`config` with values for the flags that are not given."""
    tokens = config.tokens_threshold or TOKENS_THRESHOLD
    n_bytes = min(source.n_bytes or float("inf"), BYTES_PER_TOKEN * tokens) * config.num_nodes
    vocab_size = HUB_VOCAB_SIZE
    if source.n_bytes is not None:  # about 100 bytes of text for each token: there are as many merges
        vocab_size = max(SMALLEST_VOCAB_SIZE, min(HUB_VOCAB_SIZE, 1 << int(n_bytes // 100).bit_length() >> 1))
    if source_config.dataset == "builtin":
        vocab_size = BUILTIN_VOCAB_SIZE
    val_bytes = max(1, int(min(HUB_VAL_BYTES if source.n_bytes is None else LOCAL_VAL_BYTES, n_bytes // 10)))
    if folder := prepared_folder(source_config):
        manifest = open_data(folder).manifest
        val_bytes = manifest.total("val", "bytes")
        tokens = sum(manifest.total(split, quantity) for split in SPLITS for quantity in ("bytes", "documents"))  # at most
    return replace(config, vocab_size=config.vocab_size or (None if config.tokenizer_path else vocab_size),
                   val_bytes=config.val_bytes or val_bytes, tokens_threshold=config.tokens_threshold or tokens)


# -- preparing a folder -----------------------------------------------------------------------------------------------

def prepare(config: PrepareConfig, source_config: SourceConfig, resume_command: str) -> tuple[DataFolder, bool]:
    """Fills `config.data_path`, or resumes filling it. Returns the data, and whether they were complete already.

    resume_command: resumes after an interruption; for error messages. Raises BadInput when the flags, the folder and the
    text do not match. Whatever stops it, finished shards stay; a folder that this call started is restored if no shard is
    finished, or no training shard can be made of the text.
    """
    folder = config.data_path
    with folder_lock(folder, f"--data_path={folder}"):
        manifest = find_manifest(config, source_config)
        if manifest is not None and manifest.complete:
            data = open_data(folder)
            for split in SPLITS:
                data.split(split)  # raises for shards that are missing or damaged
            return data, True
        check_writable(folder / "manifest.json", f"--data_path={folder}")
        is_new, had_tokenizer = manifest is None, (folder / "tokenizer.json").exists()
        try:
            if is_new:
                config, source, tokenizer, manifest = start_preparation(config, source_config)
            else:
                config = replace(config, **{name: manifest.settings[name] for name in ("val_bytes", "tokens_threshold")})
                source, tokenizer = resume_preparation(config, source_config, manifest)
            if not manifest.val_digest:
                sample = write_validation(config, source, manifest, tokenizer)
                say(make_forecast(config, source, sample, tokenizer).line())
            write_training(config, manifest, tokenizer, resume_chunks(folder, source, manifest))
            manifest.position, manifest.last_document, manifest.complete = {}, "", True
            manifest.save(folder)
        except (BadInput, OSError, KeyboardInterrupt) as error:
            if is_new and not has_progress(folder, isinstance(error, BadInput)):
                delete_preparation(folder, keep_tokenizer=had_tokenizer)
            raise with_resume_advice(error, folder, resume_command) from None
        return DataFolder(folder, manifest, tokenizer), False


def find_manifest(config: PrepareConfig, source_config: SourceConfig) -> Manifest | None:
    """The manifest in `--data_path`; None if there is none. Raises BadInput when it does not match the given flags."""
    folder = config.data_path
    if not (folder / "manifest.json").exists():
        if stray := sorted(folder.glob("*.npy")):
            raise BadInput(f"--data_path={folder}: holds {stray[0].name} but no manifest.json: choose another folder")
        return None
    manifest = Manifest.load(folder)
    if not manifest.complete and not manifest.matches_checksum():
        raise BadInput(f"{folder / 'manifest.json'}: was changed: its shards and its place in the text do not match its "
                       f"checksum: restore it, or choose another --data_path")
    if not manifest.complete and "val_bytes" not in manifest.settings:
        raise BadInput(f"--data_path={folder}: an earlier version, which cuts the validation split in another way, began to "
                       f"prepare it: finish it with that version, or choose another --data_path")
    given = source_flags(source_config) | config.settings() | {"vocab_size": config.vocab_size}
    stored = manifest.settings | {"vocab_size": manifest.vocab_size} | {
        name: value for name, value in manifest.source.items() if name != "revisions"}
    stored.pop("val_tokens", None)  # of earlier versions
    for name in ("vocab_size", "val_bytes", "tokens_threshold"):  # a flag that is not given keeps the folder's value
        if given[name] is None:
            given[name] = stored.get(name)
    for name in [*given, *stored]:
        if given.get(name) != stored.get(name):
            raise BadInput(f"--{name}={given.get(name)}: {folder} was prepared with --{name}={stored.get(name)}: give that, "
                           f"or choose another --data_path")
    if any(now not in (None, then) for now, then in zip(current_revisions(source_config), manifest.source["revisions"])):
        raise BadInput(f"--dataset={source_config.dataset}: its files have changed since {folder} was prepared from them: "
                       f"choose another --data_path")
    if config.tokenizer_path and Tokenizer.load(config.tokenizer_path).fingerprint() != manifest.tokenizer:
        raise BadInput(f"--tokenizer_path={config.tokenizer_path}: {folder} was prepared with another tokenizer, its "
                       f"tokenizer.json: drop the flag, or choose another --data_path")
    return manifest


def start_preparation(config: PrepareConfig, source_config: SourceConfig) -> tuple[
        PrepareConfig, Source, Tokenizer, Manifest]:
    """Opens the source, decides on all flags, chooses a tokenizer and writes it and an empty manifest."""
    source = open_text(source_config, part=(config.node, config.num_nodes))
    source.log_notes(uses_held_out=True)
    given, config = config, fill_defaults(config, source_config, source)
    tokenizer = choose_tokenizer(given, config, source_config, source)
    manifest = Manifest(source.description, config.settings(), tokenizer.fingerprint(), tokenizer.vocab_size,
                        tokenizer.dtype.name)
    _ = tokenizer.separator_id  # raises if the vocabulary has none, before anything is written
    tokenizer.save(config.data_path / "tokenizer.json")
    manifest.save(config.data_path)
    return config, source, tokenizer, manifest


def resume_preparation(config: PrepareConfig, source_config: SourceConfig,
                       manifest: Manifest) -> tuple[Source, Tokenizer]:
    """Opens the source and the tokenizer of an unfinished folder. Raises BadInput if the text has changed."""
    source = open_text(source_config, manifest.source["revisions"], part=(config.node, config.num_nodes))
    if source.description != manifest.source:  # such as the built-in text after an update of torch
        raise OtherText(f"--data_path={config.data_path}: was started with {manifest.source}, but the text is now "
                        f"{source.description}: choose another --data_path")
    return source, Tokenizer.load(config.data_path / "tokenizer.json")


class OtherText(BadInput):
    """An unfinished folder cannot be resumed, because its manifest does not fit the text."""


def resume_chunks(folder: Path, source: Source, manifest: Manifest) -> Iterator[Chunk]:
    """The chunks after the finished shards. Raises OtherText unless the document before them is the one that it was."""
    position, refusal = manifest.position or None, OtherText(
        f"{folder / 'manifest.json'}: the place in the text from which to resume is not where its shards end: the text or "
        f"the manifest was changed: choose another --data_path")
    is_known = manifest.last_document != ""
    if manifest.shards["train"] if position is None else is_known and position["skip"] == 0:
        raise refusal
    chunks = source.training_chunks(position | {"skip": position["skip"] - 1} if is_known else position)
    try:
        first = next(chunks, None)
    except (LookupError, TypeError, AttributeError):  # a position of another kind of source
        raise refusal from None
    if is_known:
        if first is None or not len(first.documents) or checksum_of(first.documents, 0) != manifest.last_document:
            raise refusal
        first = first.drop_first(1)
    return chunks if first is None else itertools.chain([first], chunks)


def checksum_of(documents: PackedDocuments, i: int) -> str:
    """16 hex digits of the text of document `i`."""
    return hashlib.sha256(documents.utf8[documents.offsets[i]:documents.offsets[i + 1]]).hexdigest()[:16]


def choose_tokenizer(given: PrepareConfig, config: PrepareConfig, source_config: SourceConfig, source: Source) -> Tokenizer:
    """The tokenizer at --tokenizer_path or in the folder, else one trained on the start of the stream. given: the flags as
    given, config: with defaults for the rest."""
    in_folder = config.data_path / "tokenizer.json"
    path = config.tokenizer_path or (in_folder if in_folder.exists() else None)
    if path is None:
        if config.num_nodes > 1:  # the same for all nodes: on the start of the whole stream
            source = open_text(source_config, source.description["revisions"])
        return train_tokenizer(source, config, can_be_smaller=given.vocab_size is None and source.n_bytes is not None)
    tokenizer = Tokenizer.load(path)
    if in_folder.exists() and Tokenizer.load(in_folder).fingerprint() != tokenizer.fingerprint():
        raise BadInput(f"--tokenizer_path={path}: {in_folder} is another tokenizer: choose another --data_path")
    if given.vocab_size not in (None, tokenizer.vocab_size):
        raise BadInput(f"--vocab_size={given.vocab_size}: the tokenizer {path} has {tokenizer.vocab_size}: "
                       f"drop the flag, or choose another tokenizer or folder")
    say(f"using the tokenizer {path}")
    return tokenizer


def train_tokenizer(source: Source, config: PrepareConfig, can_be_smaller: bool) -> Tokenizer:
    """Trained on the start of the text. can_be_smaller: where the text has too few merges for the vocabulary, it becomes
    the largest power of two that it has them for, or below SMALLEST_VOCAB_SIZE all that it has."""
    def train(vocab_size: int) -> Tokenizer:
        texts = (text for chunk in source.training_chunks() for text in chunk.documents.strings())
        return Tokenizer.train(take_text(texts, config.tokenizer_bytes), vocab_size, progress=True)

    try:
        return train(config.vocab_size)
    except TooFewMerges as error:
        if not can_be_smaller:
            raise
        n = error.available
    return train(n if n < SMALLEST_VOCAB_SIZE else 1 << (n.bit_length() - 1))


def has_progress(folder: Path, is_bad_input: bool) -> bool:
    """Whether a new preparation that failed has left a shard worth resuming after; for bad input, a training shard."""
    if not (folder / "manifest.json").exists():
        return False
    manifest = Manifest.load(folder)
    return bool(manifest.shards["train"] if is_bad_input else manifest.val_digest)


def delete_preparation(folder: Path, keep_tokenizer: bool):
    """Deletes the files of a preparation. The manifest goes last, as without it the rest would be stray shards."""
    for split in SPLITS:
        for shard in folder.glob(f"{split}_*.npy"):
            shard.unlink()
    if not keep_tokenizer:
        (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)


def with_resume_advice(error: BaseException, folder: Path, resume_command: str) -> BaseException:
    """An exception with the same exit code as `error`, whose message names the folder and the shards that stay in it."""
    if isinstance(error, OtherText):
        return error
    message = str(error) or "interrupted"
    if getattr(error, "errno", None) is not None:  # the system's own message, which names no file when a disk is full
        message = f"{folder}: {error.strerror}"
    exception = next(kind for kind in (BadInput, OSError, KeyboardInterrupt) if isinstance(error, kind))
    shards = Manifest.load(folder).shards if (folder / "manifest.json").exists() else {}
    if n_shards := sum(map(len, shards.values())):
        message += f"; finished shards in {folder}: {n_shards}, resume after them with `{resume_command}`"
    return exception(message)


# -- the text of a prepared folder ------------------------------------------------------------------------------------

def open_text(config: SourceConfig, revisions: list[str] | None = None, part: tuple[int, int] = (0, 1)) -> Source:
    """`open_source`, which may also be a data folder: its text is prepared again, and its splits stay as they are."""
    folder = prepared_folder(config)
    if not folder:
        return open_source(config, revisions, part)
    if part[1] > 1:
        raise BadInput(f"--num_nodes={part[1]}: a data folder, {folder}, is prepared again by one machine")
    data = open_data(folder)
    return Source(source_flags(config) | {"revisions": current_revisions(config)}, partial(read_shards, data),
                  train_state={"split": "train", "token": 0}, n_bytes=data.manifest.total("train", "bytes"))


def prepared_folder(config: SourceConfig) -> Path | None:
    """The data folder that --dataset names, if it does; it may hold the folders of several nodes. `builtin` is the text."""
    path = None if config.dataset == "builtin" else local_path(config.dataset)
    is_one = path and (is_prepared(path) or path.is_dir() and find_node_folders(path))
    return path if is_one else None


def held_out_texts(config: SourceConfig) -> Iterator[str]:
    """The validation documents of a data folder, the held-out files of a local one that has some, else all documents."""
    source = open_text(config)
    chunks = source.chunks() if prepared_folder(config) else source.held_out_chunks()
    held_out = (text for chunk in itertools.takewhile(lambda chunk: chunk.split == "val", chunks)
                for text in chunk.documents.strings())
    first = next(held_out, None)
    if first is not None:
        source.log_notes(uses_held_out=True)
        yield from itertools.chain([first], held_out)
    elif prepared_folder(config):
        raise BadInput(f"--dataset={config.dataset}: has no validation documents: give another dataset")
    else:
        yield from source.documents()


def current_revisions(config: SourceConfig) -> list[str | None]:
    """As `local_revisions`; of a data folder, a digest of its tokens."""
    if not (folder := prepared_folder(config)):
        return local_revisions(config)
    manifest = open_data(folder).manifest
    facts = [manifest.tokenizer, *(shard.sha256 for split in SPLITS for shard in manifest.shards[split])]
    return [hashlib.sha256(" ".join(facts).encode()).hexdigest()[:16]]


def read_shards(data: DataFolder, state: dict | None) -> Iterator[Chunk]:
    """The documents of a data folder, both splits one after the other."""
    split, token = (state["split"], state["token"]) if state else (SPLITS[0], 0)
    n_val, n_train = (data.manifest.total(name, "tokens") for name in SPLITS)
    if split == "val":
        yield from read_split(data, "val", token, lambda at: at / (n_val + n_train))
        token = 0
    yield from read_split(data, "train", token, lambda at: (n_val + at) / (n_val + n_train))


def read_split(data: DataFolder, split: str, at: int = 0, fraction: Callable[[int], float] | None = None) -> Iterator[Chunk]:
    """The documents of one split from token `at` on, about a megabyte of whole documents at a time. fraction(token) -> see
    Chunk. Raises BadInput for shards that are damaged."""
    tokens = data.split(split)
    while at < len(tokens):
        n = CHUNK_BYTES // BYTES_PER_TOKEN
        while True:
            ids = tokens.read(at, min(at + n, len(tokens)))
            if at + n >= len(tokens):
                break
            if len(starts := np.flatnonzero(ids[1:] == data.tokenizer.separator_id)):
                ids = ids[:starts[-1] + 1]
                break
            n *= 2  # not even one document
        check_ids(data.path, data.manifest.vocab_size, ids)
        yield Chunk(decode_documents(data.tokenizer, ids), {"split": split, "token": at},
                    fraction=fraction(at) if fraction else None, split=split)
        at += len(ids)


def validation_documents(data: DataFolder) -> DocumentSet:
    """Those of the validation split. Raises BadInput for shards that are damaged."""
    documents = DocumentSet()
    for chunk in read_split(data, "val"):
        documents.add(chunk.documents)
    return documents


def retokenize(data: DataFolder, tokenizer: Tokenizer, out: Path) -> DataFolder:
    """The documents of `data` in the folder `out`, with another tokenizer: the same validation split, and the same training
    split, in order. Resumes or returns what an earlier call has prepared there. Raises BadInput as `prepare` does."""
    if not (out / "tokenizer.json").exists():
        tokenizer.save(out / "tokenizer.json")
    path = str(data.path)
    path = f"./{path}" if path == "builtin" else path  # a folder of that name, not the built-in text
    config, source_config = PrepareConfig(data_path=out), SourceConfig(dataset=path)
    resumed, _ = prepare(config, source_config, "the same command")
    if resumed.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise BadInput(f"--data_path={out}: was prepared with another tokenizer: choose another folder")
    return resumed


# -- the validation split ---------------------------------------------------------------------------------------------

class Sample:
    """The first megabytes of chunks that are read, and how fast these come."""

    def __init__(self):
        self.documents: list[PackedDocuments] = []
        self.n_documents, self.n_bytes, self.seconds = 0, 0, 0.0
        self.start: float | None = None  # the fraction of the source before the first chunk; None if that is not known
        self.fraction = 0.0              # of the source before the last chunk
        self.bytes_before = 0            # the last chunk

    def watch(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        while True:
            start = time.perf_counter()
            chunk = next(chunks, None)
            self.seconds += time.perf_counter() - start
            if chunk is None:
                return
            if self.n_bytes < SAMPLE_BYTES:
                self.documents.append(chunk.documents)
            if chunk.fraction is not None:
                self.start = chunk.fraction if self.start is None else self.start
                self.fraction, self.bytes_before = chunk.fraction, self.n_bytes
            self.n_documents += len(chunk.documents)
            self.n_bytes += len(chunk.documents.utf8)
            yield chunk

    def text_bytes(self, source: Source) -> float:
        """About how much text the source holds from the first chunk on."""
        if self.start is None or self.fraction <= self.start:
            return source.n_bytes or self.n_bytes
        return self.bytes_before * (1 - self.start) / (self.fraction - self.start)


def write_validation(config: PrepareConfig, source: Source, manifest: Manifest, tokenizer: Tokenizer) -> Sample:
    """Writes the validation split, all of it: it is small, so that an interruption starts it again. Returns a sample of the
    text. Raises BadInput if there is no text for it, or more than --tokens_threshold."""
    folder, sample, val_documents = config.data_path, Sample(), DocumentSet()
    for path in folder.glob("val_*.npy"):
        path.unlink()
    manifest.shards["val"], manifest.n_skipped = [], 0
    writer = ShardWriter(folder, "val", config.shard_size_threshold, manifest)
    n_bytes, n_documents = max(1, config.val_bytes // config.num_nodes), 0
    held_out = source.held_out_chunks()
    if source.train_state:
        chunks = take_bytes(sample.watch(held_out), n_bytes)
    else:
        chunks = choose_validation(sample.watch(source.chunks()), val_share(config, source), n_bytes)
    try:
        with closing(encode_ahead(tokenizer, chunks)) as encoded:
            for chunk, ids, starts in encoded:
                report_skipped(chunk, manifest)
                val_documents.add(chunk.documents)
                n_documents += len(chunk.documents)
                at, offsets = 0, chunk.documents.offsets
                while at < len(chunk.documents):
                    stop = documents_to_reach(starts, at, writer.room)
                    writer.add(ids[starts[at]:starts[stop]], stop - at, int(offsets[stop] - offsets[at]))
                    at = stop
                    if writer.room <= 0:
                        writer.close()
        writer.close()
    except BaseException:
        writer.discard()
        raise
    n_tokens = manifest.total("val", "tokens")
    if n_tokens == 0:
        raise BadInput("--dataset: the files that are named as held out contain no text: remove or rename them"
                       if source.train_state else "--dataset: contains no text")
    if n_tokens >= config.tokens_threshold:
        raise BadInput(f"--tokens_threshold={config.tokens_threshold}: the validation split alone holds {n_tokens:,} "
                       f"tokens: give a larger number, or a smaller --val_bytes (now {config.val_bytes})")
    n_unused = sample.n_documents + sum(len(chunk.documents) for chunk in held_out) - n_documents
    if source.train_state and n_unused:
        log_line(f"not used: {n_unused:,} held-out documents beyond --val_bytes={config.val_bytes}")
    manifest.val_digest, manifest.n_val_passed = val_documents.digest(), len(val_documents) if source.train_state else 0
    manifest.save(folder)
    return sample


def val_share(config: PrepareConfig, source: Source) -> float:
    """Of the documents, those that may belong to the validation split: so many that it is full at about the end of what is
    read, where this is known."""
    smallest, largest = VAL_SHARES
    if source.n_bytes is None:
        return largest
    n_bytes = min(source.n_bytes, BYTES_PER_TOKEN * config.tokens_threshold)
    return max(smallest, min(largest, config.val_bytes / config.num_nodes / max(n_bytes, 1)))


def choose_validation(chunks: Iterator[Chunk], share: float, n_bytes: int) -> Iterator[Chunk]:
    """The documents whose hashes are in the first `share` of all hashes, each once, until they hold `n_bytes`; but none that
    is longer. If there is no such document, the one with the smallest hash."""
    limit, blank = int(share * 2**64), text_hash(b"")
    chosen: set[int] = set()
    n_missing, last_resort = n_bytes, None
    for chunk in chunks:
        documents, hashes, lengths = chunk.documents, document_hashes(chunk.documents), np.diff(chunk.documents.offsets)
        mask = np.zeros(len(documents), bool)
        for i in np.flatnonzero((hashes < limit) & (hashes != blank) & (lengths <= n_bytes)).tolist():
            if n_missing > 0 and int(hashes[i]) not in chosen:
                mask[i] = True
                chosen.add(int(hashes[i]))
                n_missing -= int(lengths[i])
        if mask.any():
            yield replace(chunk, documents=documents.select(mask), skipped=())
        if n_missing <= 0:
            return
        if not chosen:
            ranks = [(length > 5 * n_bytes, number, i) for i, (length, number) in enumerate(zip(
                lengths.tolist(), hashes.tolist())) if number != blank]  # five tenths of a text are too much if it can be
            if ranks and (last_resort is None or min(ranks)[:2] < last_resort[0]):
                *rank, i = min(ranks)
                last_resort = tuple(rank), documents.slice(i, i + 1)
    if not chosen and last_resort:
        yield Chunk(last_resort[1], None)


def take_bytes(chunks: Iterator[Chunk], n_bytes: int) -> Iterator[Chunk]:
    """The first documents, up to and including the one that brings them to `n_bytes`."""
    for chunk in chunks:
        stop = int(np.searchsorted(chunk.documents.offsets, min(n_bytes, chunk.documents.offsets[-1])))
        yield replace(chunk, documents=chunk.documents.slice(0, stop))
        n_bytes -= int(chunk.documents.offsets[stop])
        if n_bytes <= 0:
            return


def report_skipped(chunk: Chunk, manifest: Manifest):
    """Logs and counts the parts before a chunk that could not be read."""
    for message in chunk.skipped:
        log_line(f"skipped: {message}")
    manifest.n_skipped += len(chunk.skipped)


# -- the training split -----------------------------------------------------------------------------------------------

def write_training(config: PrepareConfig, manifest: Manifest, tokenizer: Tokenizer, chunks: Iterator[Chunk]):
    """Writes documents to training shards until the threshold or the end of the text. On an error, finished shards stay."""
    writer = TrainingWriter(config, manifest, tokenizer)
    try:
        with closing(Progress(config, manifest)) as progress, closing(encode_ahead(tokenizer, chunks)) as encoded:
            while not writer.is_full and (batch := next(encoded, None)):
                writer.write(*batch, progress)
        writer.close()
    except BaseException:
        writer.shards.discard()
        raise


class TrainingWriter:
    """Cuts a stream of encoded documents into shards, and leaves out those of the validation split."""

    def __init__(self, config: PrepareConfig, manifest: Manifest, tokenizer: Tokenizer):
        self.config, self.manifest = config, manifest
        self.shards = ShardWriter(config.data_path, "train", config.shard_size_threshold, manifest)
        self.n_tokens = sum(manifest.total(split, "tokens") for split in SPLITS)
        self.n_trained = manifest.total("train", "tokens")
        self.val_documents = validation_documents(DataFolder(config.data_path, manifest, tokenizer))
        if self.val_documents.digest() != manifest.val_digest:
            raise BadInput(f"--data_path={config.data_path}: its validation shards are not those that it was started with: "
                           f"restore them, or choose another --data_path")

    @property
    def is_full(self) -> bool:
        return self.n_tokens > self.config.tokens_threshold

    def write(self, chunk: Chunk, ids: np.ndarray, starts: np.ndarray, progress: "Progress"):
        """Writes the documents of a chunk, or those before the threshold; see `encode_ahead`."""
        report_skipped(chunk, self.manifest)
        if not len(chunk.documents):
            self.advance(chunk, 0)  # else resuming would count the skipped parts again
        val_numbers = self.val_documents.find(chunk.documents)
        stops, at = np.append(np.flatnonzero(val_numbers >= 0), len(chunk.documents)), 0
        while at < len(chunk.documents) and not self.is_full:
            stop = int(stops[np.searchsorted(stops, at)])
            if stop == at:
                self.leave_out(int(val_numbers[at]))
                at += 1
                self.advance(chunk, at)
                continue
            n_missing = self.config.tokens_threshold + 1 - self.n_tokens
            stop = min(stop, documents_to_reach(starts, at, min(n_missing, self.shards.room)))
            n_tokens, n_bytes = int(starts[stop] - starts[at]), int(np.diff(chunk.documents.offsets[[at, stop]])[0])
            progress.add(chunk, self.shards.name, stop - at, n_tokens, n_bytes)
            self.shards.add(ids[starts[at]:starts[stop]], stop - at, n_bytes)
            self.n_tokens += n_tokens
            self.n_trained += n_tokens
            self.advance(chunk, stop)
            at = stop
            if self.shards.room <= 0:
                self.shards.close()

    def leave_out(self, val_number: int):
        """Counts a document of the validation split: its own place in the text, or a further copy. The validation documents
        stand in the text in the order of their numbers."""
        if val_number == self.manifest.n_val_passed:
            self.manifest.n_val_passed += 1
        else:
            self.manifest.n_duplicates += 1

    def advance(self, chunk: Chunk, n: int):
        """Moves the position in the text to behind the first n documents of `chunk`."""
        self.manifest.position = chunk.position_after(n)
        self.manifest.last_document = checksum_of(chunk.documents, n - 1) if n else ""

    def close(self):
        """Closes the open shard. Raises BadInput if there is nothing to train on."""
        if self.n_trained == 0:
            if self.manifest.n_duplicates:
                raise BadInput(f"--dataset: the {self.manifest.n_duplicates:,} documents that would be trained on are all "
                               f"in the validation split too: give more text")
            raise BadInput("--dataset: holds a single document, which becomes the validation split, as a document is never "
                           "divided between the splits: give more text, or several files (text without rows is cut at the "
                           f"first blank line after {TXT_DOCUMENT_BYTES:,} bytes, or line end after {TXT_MAX_BYTES:,})")
        self.shards.close()


def decode_documents(tokenizer: Tokenizer, ids: np.ndarray) -> PackedDocuments:
    """The text of the documents in a shard, which are each led by the separator."""
    bounds = np.append(np.flatnonzero(ids == tokenizer.separator_id), len(ids))
    return PackedDocuments.from_utf8(tokenizer.decode_bytes(ids[start + 1:stop].tolist())
                                     for start, stop in itertools.pairwise(bounds))


def encode_ahead(tokenizer: Tokenizer, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, np.ndarray, np.ndarray]]:
    """Yields each chunk, its ids, (n,), with a separator before each document, and where each document starts in them,
    (documents + 1,). Reads and encodes in threads, a few megabytes ahead."""
    cores = available_cores()
    def encode(chunk: Chunk) -> tuple[Chunk, np.ndarray, np.ndarray]:
        try:
            return chunk, *tokenizer.encode_documents(chunk.documents, add_separators=True)
        except BadInput as error:  # a byte that a foreign vocabulary lacks
            text = next((text for text in chunk.documents.strings() if not tokenizer.can_encode(text)), "")
            raise BadInput(f"the document that begins {text[:60]!r}: {error}") from None
    _ = tokenizer.vocabulary  # built here, or else by every thread
    return map_ahead(encode, chunks, cores, lambda chunk: len(chunk.documents.utf8), 2 * cores * CHUNK_BYTES)


class Progress:
    """A bar of tokens, with documents, speed and compression."""

    def __init__(self, config: PrepareConfig, manifest: Manifest):
        total = lambda quantity: sum(manifest.total(split, quantity) for split in SPLITS)
        self.threshold, self.documents = config.tokens_threshold, total("documents")
        self.new_bytes = self.new_tokens = 0
        self.start: tuple[float, int] | None = None  # the fraction of the text before the first chunk, and the tokens then
        # until more is known, a hub dataset is assumed to be larger than the threshold
        is_hub = "dataset_config" in manifest.source and "mix" not in manifest.source
        self.bar = progress_bar(total=self.threshold if is_hub else None, initial=total("tokens"), unit="tok",
                                unit_scale=True)

    def close(self):
        self.bar.close()

    def add(self, chunk: Chunk, shard: str, documents: int, tokens: int, n_bytes: int):
        """Counts documents of `chunk` that are added to `shard`."""
        self.documents += documents
        self.new_bytes += n_bytes
        self.new_tokens += tokens
        if chunk.fraction is not None:  # then the rest will be like what has come since; the threshold may come first
            self.start = self.start or (chunk.fraction, self.bar.n)
            before, n = self.start
            if chunk.fraction > before:
                self.bar.total = min(self.threshold, n + int((self.bar.n - n) * (1 - before) / (chunk.fraction - before)))
        bytes_per_token, rate = self.new_bytes / self.new_tokens, self.bar.format_dict["rate"]
        speed = {"MB/s": f"{bytes_per_token * rate / 1e6:.1f}"} if rate else {}  # none yet at the first chunk
        self.bar.set_description_str(shard.removesuffix(".npy"), refresh=False)
        set_postfix(self.bar, {"docs": f"{self.documents:,}", **speed, "bytes/tok": f"{bytes_per_token:.2f}"})
        self.bar.update(tokens)


# -- the forecast -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TextForecast:
    """What a preparation will come to, by a sample of its text. seconds: without the tokenizer's training."""
    n_bytes: float
    tokens: float
    documents: float
    seconds: float
    disk_bytes: float
    free_bytes: int

    def line(self) -> str:
        return (f"about {format_count(self.tokens)} tokens of {format_count(self.n_bytes)}B of text, in "
                f"{self.documents:,.0f} documents: {format_seconds(self.seconds)}; {self.disk()}")

    def disk(self) -> str:
        warning = ": TOO LITTLE" if self.disk_bytes > self.free_bytes else ""
        return f"{format_bytes(self.disk_bytes)} on disk, {format_bytes(self.free_bytes)} free{warning}"


def make_forecast(config: PrepareConfig, source: Source, sample: Sample, tokenizer: Tokenizer) -> TextForecast:
    """By encoding the sample. Reading, one core after the other encoding, and writing overlap: the slowest sets the pace."""
    documents = PackedDocuments.concat(sample.documents)
    start = time.perf_counter()
    n_tokens = len(tokenizer.encode_documents(documents, add_separators=True)[0])
    encode_seconds = (time.perf_counter() - start) / available_cores()
    n_bytes = len(documents.utf8)
    text_bytes = sample.text_bytes(source)
    share = min(1, config.tokens_threshold / (text_bytes / n_bytes * n_tokens))
    scale = share * text_bytes / n_bytes  # of the sample
    seconds = share * text_bytes * max(encode_seconds / n_bytes, sample.seconds / sample.n_bytes)
    return TextForecast(share * text_bytes, scale * n_tokens, scale * len(documents), seconds,
                    scale * n_tokens * tokenizer.dtype.itemsize, free_disk(config.data_path))


def format_count(n: float) -> str:
    """2_551_204 -> "2.6 M", for sizes too: f"{format_count(n)}B"."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:,.{0 if n >= 100 * unit else 1}f} {name}"
    return f"{n:.0f} "


def dry_run(config: PrepareConfig, source_config: SourceConfig):
    """Prints what `prepare` would do, by a sample of the text. Writes nothing."""
    if manifest := find_manifest(config, source_config):
        n_shards = sum(map(len, manifest.shards.values()))
        print(f"{config.data_path}: " + ("complete already, there is nothing to do" if manifest.complete else
                                         f"unfinished, would be resumed after {n_shards} shards"))
        return
    source = open_text(source_config, part=(config.node, config.num_nodes))
    for note in source.notes:
        log_line(note)
    given, config, sample = config, fill_defaults(config, source_config, source), Sample()
    for _ in sample.watch(source.training_chunks()):
        if sample.n_bytes >= SAMPLE_BYTES:
            break
    start = time.perf_counter()
    in_sample = Source({}, lambda state: iter([Chunk(documents, None) for documents in sample.documents]))
    has_tokenizer = config.tokenizer_path or (config.data_path / "tokenizer.json").exists()
    tokenizer = choose_tokenizer(given, config, source_config, source) if has_tokenizer else train_tokenizer(
        in_sample, config, can_be_smaller=True)
    training_seconds = time.perf_counter() - start
    _ = tokenizer.vocabulary  # from here on also a short text is encoded by the kernels
    tokenizer.encode_documents(sample.documents[0])  # compiles what is compiled on first use
    forecast = make_forecast(config, source, sample, tokenizer)
    text_bytes = sample.text_bytes(source)
    rows = {"source": f"{source_config.dataset}: about {format_count(text_bytes)}B of text"}
    if not has_tokenizer:
        read = min(config.tokenizer_bytes, text_bytes)
        rows["tokenizer"] = (f"{config.vocab_size:,} tokens, to be trained on the first {format_count(read)}B: up to "
                             f"{format_seconds(training_seconds * max(1, read / sample.n_bytes))}")
    rows |= {"splits": f"{format_count(config.val_bytes)}B for validation, then training up to {config.tokens_threshold:,} "
                       f"tokens in all",
             "expected": f"about {forecast.documents:,.0f} documents, {format_count(forecast.n_bytes)}B of text, "
                         f"{format_count(forecast.tokens)} tokens",
             "time": f"about {format_seconds(forecast.seconds)} at {forecast.n_bytes / forecast.seconds / 1e6:.1f} MB/s",
             "disk": f"{forecast.disk()}, in {config.data_path}"}
    chosen = [name for name in ("vocab_size", "val_bytes", "tokens_threshold") if getattr(given, name) is None
              and getattr(config, name) is not None]
    rows["defaults"] = " ".join(f"--{name}={getattr(config, name)}" for name in chosen) or "none"
    for name, text in rows.items():
        print(f"{name:10} {text}")


# -- what a folder holds ----------------------------------------------------------------------------------------------

def describe_data(data: DataFolder) -> Iterator[str]:
    """Lines that describe a prepared folder."""
    for split in SPLITS:
        tokens, n_bytes, documents = (data.manifest.total(split, quantity) for quantity in ("tokens", "bytes", "documents"))
        yield (f"{split:5}: {tokens:,} tokens, {n_bytes / 1e6:.1f} MB of text, {n_bytes / (tokens - documents):.2f} bytes "
               f"per token, {documents:,} documents, {len(data.manifest.shards[split])} shards")
    tokens = data.split("val")
    sample = tokens.read(0, min(1_000_000, len(tokens)))
    starts = np.flatnonzero(sample == data.tokenizer.separator_id)
    if len(sample) < len(tokens):  # whole documents only
        sample = sample[:starts[-1]] if len(starts) > 1 else tokens.read(0, len(tokens))
    yield f"words that are a single token: {data.tokenizer.single_token_words(sample):.1%} of the validation split"
    if data.manifest.n_skipped:
        yield f"skipped, as unreadable: {data.manifest.n_skipped}"
    if data.manifest.n_duplicates:
        yield (f"left out of the training split: {data.manifest.n_duplicates:,} further copies of documents that are in the "
               f"validation split")


def count_lengths_and_ids(data: DataFolder) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of each document, without its separator, (documents,), and the occurrences of each id, (vocab_size,)."""
    lengths, counts = [], np.zeros(data.manifest.vocab_size, np.int64)
    n_tokens = sum(data.manifest.total(split, "tokens") for split in SPLITS)
    with progress_bar(total=n_tokens, desc="counting", unit="tok", unit_scale=True) as bar:
        for split in SPLITS:
            tokens = data.split(split)
            starts = []
            for start in range(0, len(tokens), 1 << 24):
                part = tokens.read(start, min(start + (1 << 24), len(tokens)))
                if part.max() >= len(counts):
                    raise BadInput(f"--data_path={data.path}: holds id {part.max()}, beyond its vocabulary of {len(counts)}"
                                   f": --verify names the shard")
                counts += np.bincount(part, minlength=len(counts))
                starts.append(start + np.flatnonzero(part == data.tokenizer.separator_id))
                bar.update(len(part))
            lengths.append(np.diff(np.concatenate([*starts, [len(tokens)]])) - 1)
    return np.concatenate(lengths), counts


def write_stats(data: DataFolder):
    """Writes stats.png, document lengths and token frequencies, and stats.csv, the frequencies, into the folder; prints a
    summary."""
    for name in ("stats.png", "stats.csv"):
        check_writable(data.path / name, f"{data.path / name}")
    lengths, counts = count_lengths_and_ids(data)
    if not len(lengths):
        raise BadInput(f"--data_path={data.path}: holds no finished shard yet")
    order = np.argsort(-counts, kind="stable")
    descending_counts = counts[order][counts[order] > 0]
    title = f"{data.path}: {counts.sum():,} tokens of {data.manifest.source.get('dataset')}"
    draw_corpus_stats(lengths, counts, title, data.path / "stats.png")
    with atomic_write(data.path / "stats.csv", "w") as file:
        file.write("rank,id,occurrences,token\n")
        rows = csv.writer(file, lineterminator="\n")
        rows.writerows([rank, token, counts[token], repr(data.tokenizer.tokens[token])[2:-1]]
                       for rank, token in enumerate(order.tolist(), 1))
    low, median, high = np.percentile(lengths, [5, 50, 95])
    say(f"documents: {len(lengths):,}; tokens per document: median {median:,.0f}, 5 % below {low:,.0f}, 5 % above "
          f"{high:,.0f}, longest {lengths.max():,}")
    say(f"tokens: {counts.sum():,}; {len(descending_counts):,} of the {len(counts):,} ids occur; the 100 most frequent "
          f"make up {descending_counts[:100].sum() / counts.sum():.0%}")
    print(f"{data.path / 'stats.png'}, {data.path / 'stats.csv'}")


# -- the command ------------------------------------------------------------------------------------------------------

@command
def main(argv=None):
    """Turns a hub dataset, local files or the built-in text into token shards."""
    if any(re.match("--val_tokens(=|$)", argument) for argument in (sys.argv[1:] if argv is None else argv)):
        raise BadInput("--val_tokens: the validation split is now cut by bytes of text, the same for every vocabulary: give "
                       "--val_bytes (a token is about four bytes)")
    config, source_config = parse_flags(main.__doc__, argv, PrepareConfig, SourceConfig)
    if config.verify:
        verify(config.data_path)
    if config.stats:
        write_stats(open_data(config.data_path, unfinished=True))
    if config.verify or config.stats:
        return
    if config.dry_run:
        dry_run(config, source_config)
        return
    start_time, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    resume_command = shlex.join(["python", Path(__file__).name, *argv])
    if config.cluster:
        from experiments.preparation import prepare_on_cluster  # imports torch, which preparing does not need
        def is_complete(folder: Path) -> bool:
            """Raises BadInput where other flags have made it."""
            part = replace(config, node=int(folder.name), data_path=folder)
            return bool((manifest := find_manifest(part, source_config)) and manifest.complete)
        was_complete = prepare_on_cluster(config.cluster, Path(__file__), config.data_path, config.num_nodes, argv,
                                          resume_command, is_complete)
        data = open_data(config.data_path)
    else:
        data, was_complete = prepare(config, source_config, resume_command)
    for line in describe_data(data):
        say(line)
    say(f"{config.data_path}: " + ("already complete, nothing to do" if was_complete else
                                   f"finished in {time.perf_counter() - start_time:.1f} s"))


if __name__ == "__main__":
    main()
