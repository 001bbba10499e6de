"""Turns text into token shards that train.py reads.

    python download_data.py                          FineWeb-Edu 10BT, streamed from the hub, into data/
    python download_data.py --dataset=builtin        several MB of documentation, no network
    python download_data.py --dataset=my_texts/      a folder of parquet, jsonl, json, csv or txt files
    python download_data.py --verify                 checks the shards in data/ against their manifest
    python download_data.py --stats                  draws what they contain: data/stats.png

The first documents of the stream become the validation split, the rest the training split, without documents that are in the
validation split too. Files that are named after a validation or test split are the validation split instead. Finished shards
survive any interruption, and the same command resumes after the last of them. One thread reads, one per core encodes, one
writes.
"""
import csv
import hashlib
import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.plots import draw_corpus_stats
from runtime.cli import command, log_line, parse_flags, progress_bar
from runtime.config import BadInput, check_flags, flag, flag_names
from runtime.files import atomic_write, check_writable, folder_lock
from runtime.threads import available_cores, map_ahead
from shards import SPLITS, DataFolder, Manifest, ShardWriter, documents_to_reach, open_data, verify
from text.documents import DocumentSet, PackedDocuments
from text.formats import CHUNK_BYTES, Chunk
from text.sources import Source, SourceConfig, local_revisions, open_source, source_flags, take_text
from tokenizer import MAX_VOCAB_SIZE, TRAINING_BYTES, Tokenizer

# Defaults of the flags that depend on the dataset: the built-in text is only several MB.
HUB_DEFAULTS = {"vocab_size": 32_768, "val_tokens": 1_000_000}
BUILTIN_DEFAULTS = {"vocab_size": 4_096, "val_tokens": 100_000}


@dataclass(frozen=True)
class PrepareConfig:
    """The shards."""
    data_path: Path = flag(Path("data"), "folder for the shards, manifest.json and tokenizer.json", on_resume="unsaved")
    tokenizer_path: Path = flag(None, "tokenizer.json to use (default: train one on the start of the text)")
    vocab_size: int = flag(None, f"size of the tokenizer to train (default: {HUB_DEFAULTS['vocab_size']}, with "
                                 f"--dataset=builtin {BUILTIN_DEFAULTS['vocab_size']}), or the size that the one at "
                                 f"--tokenizer_path must have",
                           at_least=256, at_most=MAX_VOCAB_SIZE)
    shard_size_threshold: int = flag(100_000_000, "tokens at which a shard is closed", at_least=1)
    tokens_threshold: int = flag(10_000_000_000, "stops once more than this many tokens are written", at_least=1)
    val_tokens: int = flag(None, f"tokens at which the validation split is closed (default: {HUB_DEFAULTS['val_tokens']:_}, "
                                 f"with --dataset=builtin {BUILTIN_DEFAULTS['val_tokens']:_})", at_least=1)
    tokenizer_bytes: int = flag(TRAINING_BYTES, "bytes of text to train a tokenizer on, from the start of the stream",
                                at_least=1)
    num_nodes: int = flag(1, "number of machines that share the work, each with a folder of its own; side by side, these "
                             "folders are the --data_path of train.py", at_least=1)
    node: int = flag(0, "which of the machines this is, from 0", at_least=0)
    verify: bool = flag(False, "prepares nothing: checks every shard in --data_path against its manifest",
                        on_resume="unsaved")
    stats: bool = flag(False, "prepares nothing: draws document lengths and token frequencies of --data_path",
                       on_resume="unsaved")

    def __post_init__(self):
        check_flags(self)
        if self.val_tokens is not None and self.tokens_threshold <= self.val_tokens:
            raise BadInput(f"--tokens_threshold={self.tokens_threshold}: must be above --val_tokens={self.val_tokens}, or "
                           f"nothing is left to train on")
        if self.node >= self.num_nodes:
            raise BadInput(f"--node={self.node}: must be below --num_nodes={self.num_nodes}")

    def settings(self) -> dict:
        """What, besides source and tokenizer, determines the bytes of the shards, for the manifest, which describes those
        two itself."""
        names = flag_names(PrepareConfig, on_resume="fixed") - {"tokenizer_path", "vocab_size"}
        return {name: value for name, value in vars(self).items() if name in names}


def dataset_defaults(source_config: SourceConfig) -> dict:
    """--vocab_size and --val_tokens where they are not given."""
    return BUILTIN_DEFAULTS if source_config.dataset == "builtin" else HUB_DEFAULTS


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
        default = dataset_defaults(source_config)["val_tokens"] if is_new else manifest.settings["val_tokens"]
        config = replace(config, val_tokens=config.val_tokens or default)
        try:
            if is_new:
                source, tokenizer, manifest = start_preparation(config, source_config)
                chunks = source.chunks()
            else:
                source, tokenizer = resume_preparation(config, source_config, manifest)
                chunks = resume_chunks(folder, source, manifest)
            write_shards(config, manifest, tokenizer, chunks)
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
    given = config.settings() | source_flags(source_config) | {"vocab_size": config.vocab_size}
    stored = manifest.settings | {"vocab_size": manifest.vocab_size} | {
        name: value for name, value in manifest.source.items() if name != "revisions"}
    for name in dataset_defaults(source_config):  # a flag that is not given keeps the folder's value
        if given[name] is None:
            given[name] = stored.get(name)
    for name in [*given, *stored]:
        if given.get(name) != stored.get(name):
            raise BadInput(f"--{name}={given.get(name)}: {folder} was prepared with --{name}={stored.get(name)}: give that, "
                           f"or choose another --data_path")
    if any(now not in (None, then) for now, then in zip(local_revisions(source_config), manifest.source["revisions"])):
        raise BadInput(f"--dataset={source_config.dataset}: its files have changed since {folder} was prepared from them: "
                       f"choose another --data_path")
    if config.tokenizer_path and Tokenizer.load(config.tokenizer_path).fingerprint() != manifest.tokenizer:
        raise BadInput(f"--tokenizer_path={config.tokenizer_path}: {folder} was prepared with another tokenizer, its "
                       f"tokenizer.json: drop the flag, or choose another --data_path")
    return manifest


def start_preparation(config: PrepareConfig, source_config: SourceConfig) -> tuple[Source, Tokenizer, Manifest]:
    """Opens the source, chooses a tokenizer and writes it and an empty manifest."""
    source = open_source(source_config, part=(config.node, config.num_nodes))
    source.log_notes(uses_held_out=True)
    tokenizer = choose_tokenizer(config, source_config, source)
    manifest = Manifest(source.description, config.settings(), tokenizer.fingerprint(), tokenizer.vocab_size,
                        tokenizer.dtype.name)
    _ = tokenizer.separator_id  # raises if the vocabulary has none, before anything is written
    tokenizer.save(config.data_path / "tokenizer.json")
    manifest.save(config.data_path)
    return source, tokenizer, manifest


def resume_preparation(config: PrepareConfig, source_config: SourceConfig,
                       manifest: Manifest) -> tuple[Source, Tokenizer]:
    """Opens the source and the tokenizer of an unfinished folder. Raises BadInput if the text has changed."""
    source = open_source(source_config, manifest.source["revisions"], part=(config.node, config.num_nodes))
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
    if any(manifest.shards.values()) if position is None else is_known and position["skip"] == 0:
        raise refusal
    chunks = source.chunks(position | {"skip": position["skip"] - 1} if is_known else position)
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


def choose_tokenizer(config: PrepareConfig, source_config: SourceConfig, source: Source) -> Tokenizer:
    """The tokenizer at --tokenizer_path or in the folder, else one trained on the start of the stream."""
    in_folder = config.data_path / "tokenizer.json"
    path = config.tokenizer_path or (in_folder if in_folder.exists() else None)
    if path is None:
        if config.num_nodes > 1:  # the same for all nodes: on the start of the whole stream
            source = open_source(source_config, source.description["revisions"])
        texts = (text for chunk in source.read(source.train_state) for text in chunk.documents.strings())
        vocab_size = config.vocab_size or dataset_defaults(source_config)["vocab_size"]
        return Tokenizer.train(take_text(texts, config.tokenizer_bytes), vocab_size, progress=True)
    tokenizer = Tokenizer.load(path)
    if in_folder.exists() and Tokenizer.load(in_folder).fingerprint() != tokenizer.fingerprint():
        raise BadInput(f"--tokenizer_path={path}: {in_folder} is another tokenizer: choose another --data_path")
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise BadInput(f"--vocab_size={config.vocab_size}: the tokenizer {path} has {tokenizer.vocab_size}: "
                       f"drop the flag, or choose another tokenizer or folder")
    print(f"using the tokenizer {path}")
    return tokenizer


def has_progress(folder: Path, is_bad_input: bool) -> bool:
    """Whether a new preparation that failed has left a shard worth resuming after; for bad input, a training shard."""
    if not (folder / "manifest.json").exists():
        return False
    shards = Manifest.load(folder).shards
    return bool(shards["train"] if is_bad_input else any(shards.values()))


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
        message += f"; finished shards in {folder}: {n_shards}, resume after them with: {resume_command}"
    return exception(message)


# -- writing shards ---------------------------------------------------------------------------------------------------

def write_shards(config: PrepareConfig, manifest: Manifest, tokenizer: Tokenizer, chunks: Iterator[Chunk]):
    """Writes documents to shards until the threshold or the end of the stream. On an error, finished shards stay."""
    stream = StreamWriter(config, manifest, tokenizer)
    chunks = stream.drop_unused(chunks)  # so that they are not encoded
    try:
        with closing(Progress(config, manifest)) as progress, closing(encode_ahead(tokenizer, chunks)) as encoded:
            while not stream.is_full and (batch := next(encoded, None)):
                stream.write(*batch, progress)
        stream.close()
        if n_unused := stream.n_unused + stream.n_unused_ahead:
            log_line(f"not used: {n_unused:,} held-out documents beyond --val_tokens={config.val_tokens}")
    except BaseException:
        stream.discard()
        raise


class StreamWriter:
    """Cuts a stream of encoded documents into the validation and the training split, and these into shards. Documents of the
    validation split are left out of the training split."""

    def __init__(self, config: PrepareConfig, manifest: Manifest, tokenizer: Tokenizer):
        self.config, self.manifest = config, manifest
        self.writers = {split: ShardWriter(config.data_path, split, config.shard_size_threshold, manifest)
                        for split in SPLITS}
        self.n_tokens = {split: manifest.total(split, "tokens") for split in SPLITS}
        # held-out documents beyond --val_tokens: seen by `write`, and by the thread that reads ahead
        self.n_unused = self.n_unused_ahead = 0
        self.val_documents = DocumentSet()
        for shard in manifest.shards["val"]:
            self.val_documents.add(decode_documents(tokenizer, np.load(config.data_path / shard.file)))

    @property
    def is_full(self) -> bool:
        return sum(self.n_tokens.values()) > self.config.tokens_threshold

    @property
    def val_is_full(self) -> bool:
        return self.n_tokens["val"] >= self.config.val_tokens

    def leaves_out(self, chunk: Chunk) -> bool:
        """Whether it is held-out text beyond --val_tokens, which nobody uses."""
        return chunk.split == "val" and self.val_is_full

    def drop_unused(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks, read ahead, without those that are known to be left out."""
        for chunk in chunks:
            if self.leaves_out(chunk):
                self.n_unused_ahead += len(chunk.documents)
            else:
                yield chunk

    def choose_split(self, chunk: Chunk) -> tuple[str, int]:
        """The split of the next document, which is of `chunk`, and how many tokens it still takes."""
        if not self.val_is_full and chunk.split != "train":
            return "val", self.config.val_tokens - self.n_tokens["val"]
        return "train", self.config.tokens_threshold + 1 - sum(self.n_tokens.values())

    def write(self, chunk: Chunk, ids: np.ndarray, starts: np.ndarray, progress: "Progress"):
        """Writes the documents of a chunk, or those before the threshold; see `encode_ahead`."""
        if self.leaves_out(chunk):  # it was not yet when it was read
            self.n_unused += len(chunk.documents)
            return
        if chunk.split == "train":
            self.writers["val"].close()  # before the position moves on
        for message in chunk.skipped:
            log_line(f"skipped: {message}")
        self.manifest.n_skipped += len(chunk.skipped)
        if not len(chunk.documents):
            self.advance(chunk, 0)  # else resuming would count the skipped parts again
        at, duplicates = 0, None
        while at < len(chunk.documents) and not self.is_full and not self.leaves_out(chunk):
            split, n_missing = self.choose_split(chunk)
            writer, stop = self.writers[split], len(chunk.documents)
            if split == "train":
                if duplicates is None:  # not before the last of the validation documents is known
                    duplicates = np.flatnonzero(self.val_documents.contains(chunk.documents))
                stop = int(np.append(duplicates, stop)[np.searchsorted(duplicates, at)])
                if stop == at:
                    self.manifest.n_duplicates += 1
                    at += 1
                    self.advance(chunk, at)
                    continue
            stop = min(stop, documents_to_reach(starts, at, min(n_missing, writer.room)))
            documents = chunk.documents.slice(at, stop)
            n_tokens, n_bytes = int(starts[stop] - starts[at]), len(documents.utf8)
            progress.add(chunk, writer.name, stop - at, n_tokens, n_bytes)
            writer.add(ids[starts[at]:starts[stop]], stop - at, n_bytes)
            if split == "val":
                self.val_documents.add(documents)
            self.n_tokens[split] += n_tokens
            self.advance(chunk, stop)
            at = stop
            if writer.room <= 0 or (split == "val" and self.val_is_full):
                writer.close()
        if self.leaves_out(chunk):
            self.n_unused += len(chunk.documents) - at

    def advance(self, chunk: Chunk, n: int):
        """Moves the position in the text to behind the first n documents of `chunk`."""
        self.manifest.position = chunk.position_after(n)
        self.manifest.last_document = checksum_of(chunk.documents, n - 1) if n else ""

    def close(self):
        """Closes the open shards. Raises BadInput if nothing is left for the training split, or nothing was held out."""
        if self.n_tokens["val"] == 0:
            raise BadInput("--dataset: the files that are named as held out contain no text: remove or rename them")
        if self.n_tokens["train"] == 0:
            if self.is_full:
                raise BadInput(f"--tokens_threshold={self.config.tokens_threshold}: the documents that fill "
                               f"--val_tokens={self.config.val_tokens} already hold {self.n_tokens['val']:,} tokens: give a "
                               f"larger number")
            if self.manifest.n_duplicates:
                raise BadInput(f"--dataset: the {self.manifest.n_duplicates:,} documents that would be trained on are all "
                               f"in the validation split too: give more text")
            raise BadInput(f"--val_tokens={self.config.val_tokens}: takes all {self.n_tokens['val']:,} tokens of the text: "
                           f"give more text or a smaller number (a document is never divided between the splits)")
        for writer in self.writers.values():
            writer.close()

    def discard(self):
        for writer in self.writers.values():
            writer.discard()


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
        if chunk.fraction:  # the part of the text before this chunk; the threshold may come first
            self.bar.total = min(self.threshold, int(self.bar.n / chunk.fraction))
        bytes_per_token = self.new_bytes / self.new_tokens
        bytes_per_second = bytes_per_token * (self.bar.format_dict["rate"] or 0)
        self.bar.set_description_str(shard.removesuffix(".npy"), refresh=False)
        self.bar.set_postfix_str(f"{self.documents:,} docs, {bytes_per_second / 1e6:.1f} MB/s, "
                                 f"{bytes_per_token:.2f} bytes/tok", refresh=False)
        self.bar.update(tokens)


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
        yield f"left out of the training split: {data.manifest.n_duplicates:,} documents that are in the validation split"


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
    print(f"documents: {len(lengths):,}; tokens per document: median {median:,.0f}, 5 % below {low:,.0f}, 5 % above "
          f"{high:,.0f}, longest {lengths.max():,}")
    print(f"tokens: {counts.sum():,}; {len(descending_counts):,} of the {len(counts):,} ids occur; the 100 most frequent "
          f"make up {descending_counts[:100].sum() / counts.sum():.0%}")
    print(f"{data.path / 'stats.png'}, {data.path / 'stats.csv'}")


# -- the command ------------------------------------------------------------------------------------------------------

@command
def main(argv=None):
    """Turns a hub dataset, local files or the built-in text into token shards."""
    config, source_config = parse_flags(main.__doc__, argv, PrepareConfig, SourceConfig)
    if config.verify:
        verify(config.data_path)
    if config.stats:
        write_stats(open_data(config.data_path, unfinished=True))
    if config.verify or config.stats:
        return
    start_time = time.perf_counter()
    resume_command = shlex.join(["python", Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
    data, was_complete = prepare(config, source_config, resume_command)
    for line in describe_data(data):
        print(line)
    print(f"{config.data_path}: " + ("already complete, nothing to do" if was_complete else
                                     f"finished in {time.perf_counter() - start_time:.1f} s"))


if __name__ == "__main__":
    main()
