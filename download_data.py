"""Turns text into token shards that train.py reads.

    python download_data.py                                       FineWeb-Edu 10BT, streamed from the hub, into data/
    python download_data.py --dataset=builtin --vocab_size=4096   several MB that need no network
    python download_data.py --dataset=my_texts/                   a folder of parquet, jsonl or txt
    python download_data.py --verify                              reads the shards in data/ again and checks them
    python download_data.py --stats                               draws what is in them: data/stats.png

The stream's first documents become the validation split, the rest the training split. Finished shards survive whatever
happens, and the same command goes on after the last of them. One thread reads, one a core encodes, one writes.
"""
import csv
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.cli import command, log_line, parse_flags
from runtime.config import BadInput, check_flags, flag
from runtime.files import atomic_write, check_writable, folder_lock
from runtime.threads import available_cores, map_ahead
from shards import SPLITS, Data, Manifest, ShardWriter, documents_to_reach, open_data, verify
from text.formats import CHUNK_BYTES, Chunk
from text.sources import Source, SourceConfig, local_revisions, open_source, source_flags, take_text
from tokenizer import MAX_VOCAB_SIZE, TRAINING_BYTES, Tokenizer


@dataclass(frozen=True)
class PrepareConfig:
    """The shards."""
    data_path: Path = flag(Path("data"), "folder for the shards, manifest.json and tokenizer.json")
    tokenizer_path: Path = flag(None, "a tokenizer.json to use (default: train one on the head of the text)")
    vocab_size: int = flag(None, "size of the tokenizer that is trained (default: 32768), or what the one at "
                                 "--tokenizer_path must have", at_least=256, at_most=MAX_VOCAB_SIZE)
    tokenizer_bytes: int = flag(TRAINING_BYTES, "bytes of text, from the head of the stream, to train a tokenizer on",
                                at_least=1)
    shard_size_threshold: int = flag(100_000_000, "tokens at which a shard is closed", at_least=1)
    tokens_threshold: int = flag(10_000_000_000, "stop once more than so many tokens are written", at_least=1)
    val_tokens: int = flag(1_000_000, "tokens at which the validation split is closed", at_least=1)
    num_nodes: int = flag(1, "machines that share the work, each with a folder of its own, which then stand side by side in "
                             "the\n--data_path of train.py", at_least=1)
    node: int = flag(0, "which of them this is, from 0", at_least=0)
    verify: bool = flag(False, "prepare nothing: check every shard in --data_path against its manifest")
    stats: bool = flag(False, "prepare nothing: draw document lengths and token frequencies of --data_path")

    def __post_init__(self):
        check_flags(self)
        if self.tokens_threshold <= self.val_tokens:
            raise BadInput(f"--tokens_threshold={self.tokens_threshold}: must be above --val_tokens={self.val_tokens}, or "
                           f"nothing is left to train on")
        if self.node >= self.num_nodes:
            raise BadInput(f"--node={self.node}: must be below --num_nodes={self.num_nodes}")

    def settings(self) -> dict:
        """What, besides source and tokenizer, decides the bytes of the shards."""
        return {name: getattr(self, name) for name in ("shard_size_threshold", "tokens_threshold", "val_tokens",
                                                       "tokenizer_bytes", "num_nodes", "node")}


def prepare(config: PrepareConfig, source_config: SourceConfig, again: str) -> tuple[Data, bool]:
    """Fills `config.data_path`, or goes on filling it. Returns it, and whether it was full already. again: the command that
    goes on after an interruption.

    Raises BadInput when the flags, the folder and the text do not fit. Whatever stops it, finished shards stay; a folder
    that this call began is as it was before where it has none, or no training shard can be made of the text.
    """
    with folder_lock(config.data_path, f"--data_path={config.data_path}"):
        manifest = find_manifest(config, source_config)
        if manifest is not None and manifest.complete:
            data = open_data(config.data_path)
            for split in SPLITS:
                data.split(split)  # a folder whose damage is plain to see is not a finished one
            return data, True
        check_writable(config.data_path / "manifest.json", f"--data_path={config.data_path}")
        had_tokenizer, began = (config.data_path / "tokenizer.json").exists(), manifest is None
        revisions = None if began else manifest.source["revisions"]
        try:
            source = open_source(source_config, revisions, part=(config.node, config.num_nodes))
            if began:
                tokenizer = choose_tokenizer(config, source_config, source)
                manifest = Manifest(source.name, config.settings(), tokenizer.fingerprint(), tokenizer.vocab_size,
                                    tokenizer.dtype.name)
                _ = tokenizer.separator_id  # a vocabulary without one is refused before anything is written
                tokenizer.save(config.data_path / "tokenizer.json")
                manifest.save(config.data_path)
            else:
                if source.name != manifest.source:  # other packages, whose documentation the built-in text is
                    raise BadInput(f"--data_path={config.data_path}: was begun with {manifest.source}, but the text is now "
                                   f"{source.name}: choose another --data_path")
                tokenizer = Tokenizer.load(config.data_path / "tokenizer.json")
            write_shards(config, manifest, tokenizer, source.chunks(manifest.place or None))
            manifest.place, manifest.complete = {}, True
            manifest.save(config.data_path)
        except (BadInput, OSError, KeyboardInterrupt) as error:
            n_shards = keep_or_take_back(config.data_path, began, had_tokenizer, isinstance(error, BadInput))
            raise retold(error, config.data_path, n_shards, again) from None
        return Data(config.data_path, manifest, tokenizer), False


def retold(error: BaseException, folder: Path, n_shards: int, again: str) -> BaseException:
    """`error` again, of a kind with the same exit code, in words that name the folder and what stays in it."""
    reason = str(error) or "interrupted"
    if getattr(error, "errno", None) is not None:  # the system's own words, which name no file when a disk is full
        reason = f"{folder}: {error.strerror}"
    kind = next(kind for kind in (BadInput, OSError, KeyboardInterrupt) if isinstance(error, kind))
    return kind(f"{reason}; finished shards in {folder}: {n_shards}, go on after them with: {again}" if n_shards else reason)


def keep_or_take_back(folder: Path, began: bool, had_tokenizer: bool, is_bad_input: bool) -> int:
    """Leaves a folder whose preparation has just failed as it should be, and returns how many shards stay in it."""
    manifest = Manifest.load(folder) if (folder / "manifest.json").exists() else None
    n_shards = {split: len(manifest.shards[split]) if manifest else 0 for split in SPLITS}
    if began and (not any(n_shards.values()) or (is_bad_input and not n_shards["train"])):
        # there were none before, see find_manifest; the manifest goes last, without which the rest would be unlisted
        for split in SPLITS:
            for shard in folder.glob(f"{split}_*.npy"):
                shard.unlink()
        if not had_tokenizer:
            (folder / "tokenizer.json").unlink(missing_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        return 0
    return sum(n_shards.values())


def find_manifest(config: PrepareConfig, source_config: SourceConfig) -> Manifest | None:
    """What `--data_path` holds already. Raises BadInput when it is not what the flags ask for."""
    folder = config.data_path
    if not (folder / "manifest.json").exists():
        if stray := sorted(folder.glob("*.npy")):
            raise BadInput(f"--data_path={folder}: holds {stray[0].name} but no manifest.json: choose another folder")
        return None
    manifest = Manifest.load(folder)
    asked = config.settings() | source_flags(source_config)
    held = manifest.settings | {name: value for name, value in manifest.source.items() if name != "revisions"}
    if config.vocab_size is not None:
        asked["vocab_size"], held["vocab_size"] = config.vocab_size, manifest.vocab_size
    for name in [*asked, *held]:
        if asked.get(name) != held.get(name):
            raise BadInput(f"--{name}={asked.get(name)}: {folder} was prepared with --{name}={held.get(name)}: give that, "
                           f"or choose another --data_path")
    if any(now not in (None, then) for now, then in zip(local_revisions(source_config), manifest.source["revisions"])):
        raise BadInput(f"--dataset={source_config.dataset}: its files have changed since {folder} was prepared from them: "
                       f"choose another --data_path")
    if config.tokenizer_path and Tokenizer.load(config.tokenizer_path).fingerprint() != manifest.tokenizer:
        raise BadInput(f"--tokenizer_path={config.tokenizer_path}: {folder} was prepared with another tokenizer, its "
                       f"tokenizer.json: drop the flag, or choose another --data_path")
    return manifest


def choose_tokenizer(config: PrepareConfig, source_config: SourceConfig, source: Source) -> Tokenizer:
    """The tokenizer that was asked for, or one trained on the head of the stream."""
    beside = config.data_path / "tokenizer.json"
    path = config.tokenizer_path or (beside if beside.exists() else None)
    if path is None:
        if config.num_nodes > 1:  # the same for all nodes: from the head of the whole stream
            source = open_source(source_config, source.name["revisions"])
        texts = (text for chunk in source.chunks() for text in chunk.texts.strings())
        return Tokenizer.train(take_text(texts, config.tokenizer_bytes), config.vocab_size or 32_768, progress=True)
    tokenizer = Tokenizer.load(path)
    if beside.exists() and Tokenizer.load(beside).fingerprint() != tokenizer.fingerprint():
        raise BadInput(f"--tokenizer_path={path}: {beside} is another tokenizer: choose another --data_path")
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise BadInput(f"--vocab_size={config.vocab_size}: the tokenizer {path} has {tokenizer.vocab_size}: "
                       f"drop the flag, or choose another tokenizer or folder")
    print(f"using the tokenizer {path}")
    return tokenizer


def write_shards(config: PrepareConfig, manifest: Manifest, tokenizer: Tokenizer, chunks: Iterator[Chunk]):
    """Documents to shards until the threshold or the end of the stream. On an error, finished shards stay."""
    writers = {split: ShardWriter(config.data_path, split, config.shard_size_threshold, manifest) for split in SPLITS}
    written = {split: manifest.total(split, "tokens") for split in SPLITS}
    try:
        with Progress(config, manifest) as progress, closing(encode_ahead(tokenizer, chunks)) as encoded:
            while sum(written.values()) <= config.tokens_threshold and (batch := next(encoded, None)):
                chunk, ids, starts = batch
                for line in chunk.skipped:
                    log_line(f"left out: {line}")
                manifest.left_out += len(chunk.skipped)
                if not len(chunk.texts):
                    manifest.place = chunk.place(0)  # else what was left out would be counted again from here
                at = 0
                while at < len(chunk.texts) and sum(written.values()) <= config.tokens_threshold:
                    if written["val"] < config.val_tokens:
                        split, room = "val", config.val_tokens - written["val"]
                    else:
                        split, room = "train", config.tokens_threshold + 1 - sum(written.values())
                    writer = writers[split]
                    stop = documents_to_reach(starts, at, min(room, writer.room))
                    texts = chunk.texts.part(at, stop)
                    progress.shows(chunk, writer.name, len(texts), int(starts[stop] - starts[at]), len(texts.utf8))
                    writer.add(ids[starts[at]:starts[stop]], len(texts), len(texts.utf8))
                    written[split] += int(starts[stop] - starts[at])
                    manifest.place = chunk.place(stop)
                    at = stop
                    if writer.room <= 0 or (split == "val" and written["val"] >= config.val_tokens):
                        writer.close()
        if written["train"] == 0:
            if written["val"] > config.tokens_threshold:
                raise BadInput(f"--tokens_threshold={config.tokens_threshold}: the documents that fill --val_tokens="
                               f"{config.val_tokens} hold {written['val']:,} tokens already: give a larger number")
            raise BadInput(f"--val_tokens={config.val_tokens}: takes all {written['val']:,} tokens of the text: give more "
                           f"text or a smaller number (a document is never divided between the splits)")
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise


def encode_ahead(tokenizer: Tokenizer, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, np.ndarray, np.ndarray]]:
    """Chunks with their ids, each document led by the separator, (n,), and where each starts, (documents + 1,); read and
    encoded in threads, a few megabytes ahead."""
    cores = available_cores()
    encode = lambda chunk: (chunk, *tokenizer.encode_texts(chunk.texts, separated=True))
    _ = tokenizer.vocabulary  # before several threads each make one
    return map_ahead(encode, chunks, cores, lambda chunk: len(chunk.texts.utf8), 2 * cores * CHUNK_BYTES)


class Progress(tqdm):
    """A bar of tokens, with what else there is to know of a preparation under way."""

    def __init__(self, config: PrepareConfig, manifest: Manifest):
        total = lambda what: sum(manifest.total(split, what) for split in SPLITS)
        self.threshold, self.documents = config.tokens_threshold, total("documents")
        self.new_bytes = self.new_tokens = 0
        # until more is known, a hub dataset is taken to be larger than the threshold
        is_hub = "dataset_config" in manifest.source and "mix" not in manifest.source
        super().__init__(total=self.threshold if is_hub else None, initial=total("tokens"), unit="tok",
                         unit_scale=True, dynamic_ncols=True)

    def shows(self, chunk: Chunk, shard: str, documents: int, tokens: int, n_bytes: int):
        """So many have been added to a shard."""
        self.documents += documents
        self.new_bytes += n_bytes
        self.new_tokens += tokens
        if chunk.fraction:  # of the text before this chunk; the threshold may come sooner
            self.total = min(self.threshold, int(self.n / chunk.fraction))
        bytes_per_token = self.new_bytes / self.new_tokens
        self.set_description_str(shard.removesuffix(".npy"), refresh=False)
        self.set_postfix_str(f"{self.documents:,} docs, {bytes_per_token * (self.format_dict['rate'] or 0) / 1e6:.1f} "
                             f"MB/s, {bytes_per_token:.2f} bytes/tok", refresh=False)
        self.update(tokens)


def summary(data: Data) -> Iterator[str]:
    """Lines that say what a prepared folder holds."""
    for split in SPLITS:
        tokens, n_bytes, documents = (data.manifest.total(split, what) for what in ("tokens", "bytes", "documents"))
        yield (f"{split:5}: {tokens:,} tokens, {n_bytes / 1e6:.1f} MB of text, {n_bytes / (tokens - documents):.2f} bytes "
               f"per token, {documents:,} documents, {len(data.manifest.shards[split])} shards")
    tokens = data.split("val")
    sample = tokens.read(0, min(1_000_000, len(tokens)))
    starts = np.flatnonzero(sample == data.tokenizer.separator_id)
    if len(sample) < len(tokens):  # whole documents
        sample = sample[:starts[-1]] if len(starts) > 1 else tokens.read(0, len(tokens))
    yield f"words that are one token: {data.tokenizer.one_token_words(sample):.1%} of the validation split's"
    if data.manifest.left_out:
        yield f"left out, as unreadable: {data.manifest.left_out}"


@command
def main(argv=None):
    """Turns a hub dataset, local files or the built-in text into token shards."""
    config, source_config = parse_flags(main.__doc__, argv, PrepareConfig, SourceConfig)
    if config.verify:
        verify(config.data_path)
    if config.stats:
        draw_stats(open_data(config.data_path, unfinished=True))
    if config.verify or config.stats:
        return
    start = time.perf_counter()
    again = shlex.join(["python", Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
    data, was_complete = prepare(config, source_config, again)
    for line in summary(data):
        print(line)
    print(f"{config.data_path}: " + ("finished before, nothing to do" if was_complete else
                                     f"finished in {time.perf_counter() - start:.1f} s"))


def count(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in each document, without its separator, (documents,), and how often each id occurs, (vocab_size,)."""
    lengths, counts = [], np.zeros(data.manifest.vocab_size, np.int64)
    with tqdm(total=sum(data.manifest.total(split, "tokens") for split in SPLITS), desc="counting", unit="tok",
              unit_scale=True) as bar:
        for split in SPLITS:
            tokens = data.split(split)
            starts = []
            for start in range(0, len(tokens), 1 << 24):
                part = tokens.read(start, min(start + (1 << 24), len(tokens)))
                if part.max() >= len(counts):
                    raise BadInput(f"--data_path={data.path}: holds id {part.max()}, beyond its vocabulary of {len(counts)}"
                                   f": --verify tells where")
                counts += np.bincount(part, minlength=len(counts))
                starts.append(start + np.flatnonzero(part == data.tokenizer.separator_id))
                bar.update(len(part))
            lengths.append(np.diff(np.concatenate([*starts, [len(tokens)]])) - 1)
    return np.concatenate(lengths), counts


def draw_stats(data: Data):
    """Writes stats.png, document lengths and token frequencies (Zipf), and stats.csv, the frequencies, into the folder."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lengths, counts = count(data)
    if not len(lengths):
        raise BadInput(f"--data_path={data.path}: holds no finished shard yet")
    order = np.argsort(-counts, kind="stable")
    falling = counts[order][counts[order] > 0]
    five, half, ninety_five = np.percentile(lengths, [5, 50, 95])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    left.hist(np.maximum(lengths, 1), np.geomspace(1, lengths.max() + 1, 60), color="#4878a8")
    left.axvline(half, color="black", linewidth=0.8)
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents",
             title=f"{len(lengths):,} documents, median {half:,.0f} tokens, longest {lengths.max():,}")
    ranks = np.arange(1, len(falling) + 1)
    right.plot(ranks, falling, color="#4878a8", label="tokens")
    right.plot(ranks, falling[0] / ranks, color="black", linewidth=0.8, label="Zipf: 1 / rank")
    right.set(xscale="log", yscale="log", xlabel="rank", ylabel="occurrences",
              title=f"{len(falling):,} of {len(counts):,} tokens of the vocabulary occur")
    right.legend()
    figure.suptitle(f"{data.path}: {counts.sum():,} tokens of {data.manifest.source.get('dataset')}")
    with atomic_write(data.path / "stats.png") as file:
        figure.savefig(file, dpi=110, format="png")
    with atomic_write(data.path / "stats.csv", "w") as file:
        file.write("rank,id,occurrences,token\n")
        rows = csv.writer(file, lineterminator="\n")
        rows.writerows([rank, token, counts[token], repr(data.tokenizer.tokens[token])[2:-1]]
                       for rank, token in enumerate(order.tolist(), 1))
    print(f"documents: {len(lengths):,}; tokens in one: 5 % below {five:,.0f}, median {half:,.0f}, 5 % above "
          f"{ninety_five:,.0f}, longest {lengths.max():,}")
    print(f"tokens: {counts.sum():,}; of the vocabulary of {len(counts):,}, {len(falling):,} occur; the 100 most frequent "
          f"are {falling[:100].sum() / counts.sum():.0%} of them")
    print(f"{data.path / 'stats.png'}, {data.path / 'stats.csv'}")


if __name__ == "__main__":
    main()
