"""Turns text into token shards that train.py reads.

    python download_data.py                                       FineWeb-Edu 10BT, streamed from the hub, into data/
    python download_data.py --dataset=builtin --vocab_size=4096   several MB that need no network
    python download_data.py --dataset=my_texts/                   a folder of parquet, jsonl or txt

The stream's first documents become the validation split, the rest the training split. Finished shards survive an
interruption: the same command goes on after the last of them.
"""
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloader import SPLITS, Manifest, ShardWriter, documents_to_reach, open_data
from runtime.files import require_writable
from runtime.flags import BadInput, check_flags, command, flag, parse_flags
from runtime.sources import Source, SourceConfig, local_revision, open_source, source_flags, take_text
from tokenizer import MAX_VOCAB_SIZE, TRAINING_BYTES, Tokenizer, utf8

BATCH_BYTES = 1 << 24  # of text are encoded at once, in threads


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
    __post_init__ = check_flags

    def settings(self) -> dict:
        """What, besides source and tokenizer, decides the bytes of the shards."""
        return {name: getattr(self, name) for name in ("shard_size_threshold", "tokens_threshold", "val_tokens",
                                                       "tokenizer_bytes")}


def prepare(config: PrepareConfig, source_config: SourceConfig) -> tuple[Manifest, bool]:
    """Fills `config.data_path`, or goes on filling it. Returns its manifest, and whether it was full already.

    Raises BadInput when the flags, the folder and the text do not fit. Whatever stops it, finished shards stay; a folder
    that this call began is as it was before where it has none, or no training shard can be made of the text.
    """
    if config.tokens_threshold <= config.val_tokens:
        raise BadInput(f"--tokens_threshold={config.tokens_threshold}: must be above --val_tokens={config.val_tokens}, "
                       f"or nothing is left to train on")
    manifest = find_manifest(config, source_config)
    if manifest is not None and manifest.complete:
        data = open_data(config.data_path)
        for split in SPLITS:
            data.split(split)  # a folder whose damage is plain to see is not a finished one
        return manifest, True
    require_writable(config.data_path / "manifest.json", f"--data_path={config.data_path}")
    source = open_source(source_config, revision=manifest.source["revision"] if manifest else None)
    began, before = manifest is None, [path.exists() for path in (config.data_path, config.data_path / "tokenizer.json")]
    if began:
        tokenizer, documents = choose_tokenizer(config, source)
        manifest = Manifest(source.name, config.settings(), tokenizer.fingerprint(), tokenizer.vocab_size,
                            tokenizer.dtype.name)
        _ = tokenizer.separator_id  # a vocabulary without one is refused before anything is written
    else:
        if source.name != manifest.source:  # other packages, whose documentation the built-in text is
            raise BadInput(f"--data_path={config.data_path}: was begun with {manifest.source}, but the text is now "
                           f"{source.name}: choose another --data_path")
        tokenizer = Tokenizer.load(config.data_path / "tokenizer.json")
        documents = source.documents(skip=sum(manifest.total(split, "documents") for split in SPLITS))
    try:
        if began:
            tokenizer.save(config.data_path / "tokenizer.json")
            manifest.save(config.data_path)
        write_shards(config, manifest, tokenizer, documents)
        manifest.complete = True
        manifest.save(config.data_path)
    except (BadInput, OSError, KeyboardInterrupt) as error:
        kept = keep_or_take_back(config.data_path, began, *before, isinstance(error, BadInput))
        raise retold(error, config.data_path, kept) from None
    return manifest, False


def retold(error: BaseException, folder: Path, kept: str) -> BaseException:
    """`error` again, of a kind with the same exit code, in words that name the folder and what stays in it."""
    reason = str(error) or "interrupted"
    if getattr(error, "errno", None) is not None:  # the system's own words, which name no file when a disk is full
        reason = f"{folder}: {error.strerror}"
    kind = next(kind for kind in (BadInput, OSError, KeyboardInterrupt) if isinstance(error, kind))
    return kind(f"{reason}; {kept}" if kept else reason)


def keep_or_take_back(folder: Path, began: bool, had_folder: bool, had_tokenizer: bool, is_bad_input: bool) -> str:
    """What becomes of a folder whose preparation has just failed, and the words that say so."""
    manifest = Manifest.load(folder) if (folder / "manifest.json").exists() else None
    n_shards = {split: len(manifest.shards[split]) if manifest else 0 for split in SPLITS}
    if began and (not any(n_shards.values()) or (is_bad_input and not n_shards["train"])):
        # there were none before, see find_manifest; the manifest goes last, without which the rest would be strangers
        for split in SPLITS:
            for shard in folder.glob(f"{split}_*.npy"):
                shard.unlink()
        if not had_tokenizer:
            (folder / "tokenizer.json").unlink(missing_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        if not had_folder and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
        return ""
    return f"{sum(n_shards.values())} finished shards stay in {folder}, and the same command goes on after them"


def find_manifest(config: PrepareConfig, source_config: SourceConfig) -> Manifest | None:
    """What `--data_path` holds already. Raises BadInput when it is not what the flags ask for."""
    folder = config.data_path
    if not (folder / "manifest.json").exists():
        if stray := sorted(folder.glob("*.npy")):
            raise BadInput(f"--data_path={folder}: holds {stray[0].name} but no manifest.json: choose another folder")
        return None
    manifest = Manifest.load(folder)
    asked = config.settings() | source_flags(source_config)
    held = manifest.settings | manifest.source
    if config.vocab_size is not None:
        asked["vocab_size"], held["vocab_size"] = config.vocab_size, manifest.vocab_size
    for name in asked:
        if asked[name] != held.get(name):
            raise BadInput(f"--{name}={asked[name]}: {folder} was prepared with --{name}={held.get(name)}: give that, or "
                           f"choose another --data_path")
    if local_revision(source_config.dataset) not in (None, manifest.source["revision"]):
        raise BadInput(f"--dataset={source_config.dataset}: its files have changed since {folder} was prepared from them: "
                       f"choose another --data_path")
    if config.tokenizer_path and Tokenizer.load(config.tokenizer_path).fingerprint() != manifest.tokenizer:
        raise BadInput(f"--tokenizer_path={config.tokenizer_path}: {folder} was prepared with another tokenizer, its "
                       f"tokenizer.json: drop the flag, or choose another --data_path")
    return manifest


def choose_tokenizer(config: PrepareConfig, source: Source) -> tuple[Tokenizer, Iterator[str]]:
    """The tokenizer that was asked for, or one trained on the head of the stream; and all documents of the stream."""
    beside = config.data_path / "tokenizer.json"
    path = config.tokenizer_path or (beside if beside.exists() else None)
    if path is None:
        documents, head = source.documents(), []
        texts = keep(take_text(documents, config.tokenizer_bytes), head)
        tokenizer = Tokenizer.train(texts, config.vocab_size or 32_768, progress=True)
        return tokenizer, itertools.chain(head, documents)
    tokenizer = Tokenizer.load(path)
    if beside.exists() and Tokenizer.load(beside).fingerprint() != tokenizer.fingerprint():
        raise BadInput(f"--tokenizer_path={path}: {beside} is another tokenizer: choose another --data_path")
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise BadInput(f"--vocab_size={config.vocab_size}: the tokenizer {path} has {tokenizer.vocab_size}: "
                       f"drop the flag, or choose another tokenizer or folder")
    print(f"using the tokenizer {path}")
    return tokenizer, source.documents()


def keep(texts: Iterable[str], kept: list[str]) -> Iterator[str]:
    for text in texts:
        kept.append(text)
        yield text


def write_shards(config: PrepareConfig, manifest: Manifest, tokenizer: Tokenizer, documents: Iterator[str]):
    """Documents to shards until the threshold or the end of the stream. On an error, finished shards stay."""
    writers = {split: ShardWriter(config.data_path, split, config.shard_size_threshold, manifest) for split in SPLITS}
    written = {split: manifest.total(split, "tokens") for split in SPLITS}
    batches = encode_documents(tokenizer, documents)
    # the end of local text is not known; a hub dataset is taken to be larger than the threshold
    total = config.tokens_threshold if "dataset_config" in manifest.source else None
    try:
        with tqdm(total=total, initial=sum(written.values()), desc="tokenizing", unit="tok",
                  unit_scale=True) as bar:
            while sum(written.values()) <= config.tokens_threshold and (batch := next(batches, None)):
                ids, starts, text_bytes = batch
                at = 0
                while at < len(text_bytes) and sum(written.values()) <= config.tokens_threshold:
                    if written["val"] < config.val_tokens:
                        split, room = "val", config.val_tokens - written["val"]
                    else:
                        split, room = "train", config.tokens_threshold + 1 - sum(written.values())
                    stop = documents_to_reach(starts, at, room)
                    writers[split].add(ids, starts[at:stop + 1], text_bytes[at:stop])
                    written[split] += int(starts[stop] - starts[at])
                    bar.update(int(starts[stop] - starts[at]))
                    at = stop
                    if split == "val" and written["val"] >= config.val_tokens:
                        writers["val"].close()
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


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[tuple]:
    """Yields ids (n,), starts (documents + 1,) and bytes of text (documents,) for a few documents at a time; each
    document is led by the separator."""
    documents = iter(documents)
    while texts := list(take_text(documents, BATCH_BYTES)):
        ids, offsets = tokenizer.encode_batch(texts)
        ids = np.insert(ids, offsets[:-1], tokenizer.separator_id)
        text_bytes = np.array([len(utf8(text)) for text in texts])
        yield ids, offsets + np.arange(len(offsets)), text_bytes


@command
def main(argv=None):
    """Turns a hub dataset, local files or the built-in text into token shards."""
    config, source_config = parse_flags(main.__doc__, argv, PrepareConfig, SourceConfig)
    start = time.perf_counter()
    manifest, was_complete = prepare(config, source_config)
    for split in SPLITS:
        tokens, n_bytes = manifest.total(split, "tokens"), manifest.total(split, "bytes")
        documents = manifest.total(split, "documents")
        print(f"{split:5}: {tokens:,} tokens, {n_bytes / 1e6:.1f} MB of text, {n_bytes / (tokens - documents):.2f} bytes "
              f"per token, {documents:,} documents, {len(manifest.shards[split])} shards")
    print(f"{config.data_path}: " + ("finished before, nothing to do" if was_complete else
                                     f"finished in {time.perf_counter() - start:.1f} s"))


if __name__ == "__main__":
    main()
