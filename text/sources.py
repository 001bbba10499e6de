"""Where text comes from: a dataset of the Hugging Face hub, local files, the documentation built into this machine's
Python, or a mix of these.

    for text in open_source(SourceConfig(dataset="builtin")).documents(): ...

A source is opened once and yields its documents in a fixed order, in chunks of about a megabyte. Every chunk knows its
position, from which reading can continue without what precedes it: this is how an interrupted preparation resumes.
"""
import difflib
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtime.cli import log_line
from runtime.config import BadInput, check_flags, flag
from text.builtin import builtin_revision, builtin_texts
from text.documents import PackedDocuments
from text.folders import COMPRESSIONS, PROSE, ROW_FORMATS, DataFiles, find_data_files, local_path, open_file
from text.formats import CHUNK_BYTES, Chunk, TextFile, read_files, read_from, split_files
from text.hub import is_hub_id, open_hub

FINEWEB = "HuggingFaceFW/fineweb-edu"


@dataclass(frozen=True)
class SourceConfig:
    """Where text comes from."""
    dataset: str = flag(FINEWEB, "id of a hub dataset, a local file or folder (parquet, jsonl, json, csv; txt, md and other "
                                 "text; source code; .gz, .zst), or `builtin`: the documentation inside Python, numpy and "
                                 "torch, several MB, no network; several, separated by commas, are mixed",
                        on_resume="fixed")
    mix: str = flag(None, "share of the bytes of text for each of several datasets, such as 0.8,0.2", on_resume="fixed")
    dataset_config: str = flag(None, "configuration of a hub dataset (default: sample-10BT for fineweb-edu, else none)",
                               on_resume="fixed")
    text_column: str = flag("text", "column or JSON key that holds the text, such as data.text for one inside another; in "
                                    "a mix, one for all datasets or one for each", on_resume="fixed")
    streaming: bool = flag(True, "1 reads a hub dataset over the network while it is prepared, 0 downloads its files first "
                                 "and keeps them in the HF_HOME folder", on_resume="free")
    retry_seconds: int = flag(600, "seconds to keep retrying a hub that does not answer", at_least=0, on_resume="free")
    skip_errors: bool = flag(False, "1 skips what cannot be read in local files and in parquet files of the hub: a row "
                                    "group, a row, a line or a file; the manifest counts them", on_resume="free")
    __post_init__ = check_flags


@dataclass(frozen=True)
class Source:
    """An opened source. description: the flags and revisions that identify the text, for the manifest. read(state): its
    chunks from a state on, None for the beginning. train_state: where the text to train on starts, if held-out text comes
    first. notes: lines about what is not read of local folders. held_out: the files of the held-out text, for a line.
    n_bytes: about how much text there is to train on, None if that is not known."""
    description: dict
    read: Callable[[object], Iterator[Chunk]]
    train_state: dict | None = None
    notes: tuple[str, ...] = ()
    held_out: str = ""
    n_bytes: int | None = None

    def log_notes(self, uses_held_out: bool):
        """Logs what is not read, and the held-out files either as such or as validation text."""
        for note in self.notes:
            log_line(note)
        if self.held_out:
            log_line(f"held out, for validation: {self.held_out}" if uses_held_out else
                     f"left out, as held-out text: {self.held_out}")

    def chunks(self, position: dict | None = None) -> Iterator[Chunk]:
        """The chunks from `position` on, which Chunk.position_after returned; by default all."""
        return read_from(self.read, position)

    def training_chunks(self, position: dict | None = None) -> Iterator[Chunk]:
        """The chunks from `position` on, by default all that are not held out."""
        return self.chunks(position or {"at": self.train_state, "skip": 0})

    def held_out_chunks(self) -> Iterator[Chunk]:
        """The chunks of files that are named as held out."""
        return itertools.takewhile(lambda chunk: chunk.split == "val", self.chunks() if self.train_state else ())

    def documents(self) -> Iterator[str]:
        """The text of every document that is not held out; logs the notes, and a line for each part that is skipped."""
        self.log_notes(uses_held_out=False)
        for chunk in self.read(self.train_state):
            for message in chunk.skipped:
                log_line(f"skipped: {message}")
            yield from chunk.documents.strings()


def open_source(config: SourceConfig, revisions: list[str] | None = None, part: tuple[int, int] = (0, 1)) -> Source:
    """revisions: of the hub datasets, when a preparation is resumed; by default the latest. part: (k, n) is the k-th of n
    disjoint parts. Raises BadInput when there is no such dataset, file or column, or when it is empty."""
    configs = split_mix(config)
    opened = [open_dataset(one, revision, part) for one, revision in zip(configs, revisions or [None] * len(configs))]
    description = source_flags(config) | {"revisions": [source.description["revision"] for source in opened]}
    if len(opened) == 1:
        return replace(opened[0], description=description)
    reads = [functools.partial(read_training_text, source) for source in opened]
    weights, sizes = mix_weights(config), [source.n_bytes for source in opened]
    n_bytes = None if None in sizes else int(sum(weights) * min(size / weight for size, weight in zip(sizes, weights)))
    left_out = tuple(f"left out, as held-out text: {source.held_out}" for source in opened if source.held_out)
    return Source(description, functools.partial(interleave, reads, weights),
                  notes=tuple(note for source in opened for note in source.notes) + left_out, n_bytes=n_bytes)


def read_training_text(source: Source, state: object) -> Iterator[Chunk]:
    """A mix leaves out the held-out text of its sources."""
    return source.read(source.train_state if state is None else state)


def source_flags(config: SourceConfig) -> dict:
    """The flags that decide which text this is, as `Source.description` holds them."""
    if len(configs := split_mix(config)) > 1:
        each = [source_flags(one) for one in configs]
        return {name: ",".join(flags.get(name) or "" for flags in each)
                for name in ("dataset", "dataset_config", "text_column")} | {"mix": config.mix}
    if config.dataset == "builtin":
        return {"dataset": "builtin"}
    if path := local_path(config.dataset):
        return {"dataset": str(path), "text_column": config.text_column}
    dataset_config = config.dataset_config or ("sample-10BT" if config.dataset == FINEWEB else None)
    return {"dataset": config.dataset, "dataset_config": dataset_config, "text_column": config.text_column}


def open_dataset(config: SourceConfig, revision: str | None, part: tuple[int, int]) -> Source:
    """A single dataset; its description is the revision only."""
    if not config.dataset:
        raise BadInput("--dataset=: is empty: give a hub dataset, a local path, or `builtin`")
    path = local_path(config.dataset)
    if config.dataset_config and (path or config.dataset == "builtin"):
        raise BadInput(f"--dataset_config={config.dataset_config}: only hub datasets have configurations: drop it "
                       f"(in a mix, leave the entry for {config.dataset} empty)")
    if config.dataset == "builtin":
        n_bytes = sum(len(text.encode()) for text in builtin_texts())
        return Source({"revision": builtin_revision()}, lambda state: read_builtin(state or 0, part),
                      n_bytes=n_bytes // part[1])
    if path:
        return open_files(path, config, part)
    require_hub_id(config.dataset)
    revision, read = open_hub(
        config.dataset, source_flags(config)["dataset_config"], config.text_column, streaming=config.streaming,
        skip_errors=config.skip_errors, retry_seconds=config.retry_seconds, revision=revision, part=part)
    return Source({"revision": revision}, read)


def require_hub_id(dataset: str):
    """Raises BadInput for what is no local path if it cannot be a dataset of the hub either, or is meant as a path: it ends
    as a file of data does, or is in a folder that is there."""
    folder, name = os.path.split(os.path.expanduser(dataset.rstrip("/")))
    is_in_folder = folder != "" and os.path.isdir(folder)
    is_file = dataset.lower().endswith((*ROW_FORMATS, *PROSE, *COMPRESSIONS, ".py"))
    if is_hub_id(dataset) and not is_file and not is_in_folder:
        return
    try:
        beside = [other for other in sorted(os.listdir(folder or ".")) if not other.startswith(".")]
    except (OSError, ValueError):  # no such folder, or a name that none can have
        beside = []
    close = [os.path.join(folder, other) for other in difflib.get_close_matches(name, beside, n=1)]
    if is_hub_id(dataset) and not is_file and not close:
        raise BadInput(f"--dataset={dataset}: no such file or folder; the hub is not asked, as there is a folder {folder}")
    raise BadInput(f"--dataset={dataset}: no such file or folder" + (f": did you mean {close[0]}?" if close else ""))


def take_text(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """The first of `texts`, up to and including the one that brings them to `n_bytes` of UTF-8."""
    texts = iter(texts)
    while n_bytes > 0 and (text := next(texts, None)) is not None:
        yield text
        n_bytes -= len(text.encode("utf-8", "surrogatepass"))


# -- mixes ------------------------------------------------------------------------------------------------------------

def split_mix(config: SourceConfig) -> list[SourceConfig]:
    """One config for each dataset of a mix; [config] if it is not a mix. Raises BadInput when the flags do not match."""
    if "," not in config.dataset or local_path(config.dataset):
        if config.mix is not None:
            raise BadInput(f"--mix={config.mix}: there is only one --dataset={config.dataset}: give several, separated by "
                           f"commas")
        return [config]
    datasets = config.dataset.split(",")
    if config.mix is None:
        raise BadInput(f"--dataset={config.dataset}: names {len(datasets)} datasets: give their shares, such as "
                       f"--mix={','.join([f'{1 / len(datasets):.2g}'] * len(datasets))}")
    mix_weights(config)
    one_each = {}
    for name in ("dataset_config", "text_column"):
        values = (getattr(config, name) or "").split(",")
        if len(values) not in (1, len(datasets)):
            raise BadInput(f"--{name}={getattr(config, name)}: give one for all, or one for each of the {len(datasets)} "
                           f"datasets")
        one_each[name] = values * len(datasets) if len(values) == 1 else values
    return [replace(config, dataset=dataset, mix=None, dataset_config=dataset_config or None, text_column=text_column)
            for dataset, dataset_config, text_column in zip(datasets, one_each["dataset_config"], one_each["text_column"])]


def mix_weights(config: SourceConfig) -> list[float]:
    """The shares in `config.mix`. Raises BadInput unless each dataset has one above zero."""
    try:
        shares = [float(share) for share in config.mix.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(config.dataset.split(",")) or not all(0 < share < float("inf") for share in shares):
        raise BadInput(f"--mix={config.mix}: give a number above zero for each of {config.dataset}")
    return shares


class MixPart:
    """One source of a mix: its current chunk, and how many documents of it and bytes in all were taken."""

    def __init__(self, read: Callable, weight: float, position: dict | None, n_bytes: int):
        self.stream, self.weight = read_from(read, position), weight
        self.position, self.n_bytes = position, n_bytes
        self.chunk: Chunk | None = None
        self.n_taken = 0

    @property
    def is_used_up(self) -> bool:
        return self.chunk is None or self.n_taken == len(self.chunk.documents)

    def next_chunk(self) -> bool:
        """Moves on to the next chunk of the source; False at its end."""
        self.chunk, self.n_taken = next(self.stream, None), 0
        if self.chunk is not None:
            self.position = self.chunk.position_after(0)
        return self.chunk is not None

    def take(self) -> np.ndarray:
        """The UTF-8 bytes of the next document of the chunk."""
        documents = self.chunk.documents
        start, stop = documents.offsets[self.n_taken:self.n_taken + 2].tolist()
        self.n_taken, self.n_bytes = self.n_taken + 1, self.n_bytes + stop - start
        self.position = self.chunk.position_after(self.n_taken)
        return documents.utf8[start:stop]


def interleave(reads: list[Callable], weights: list[float], state: dict | None) -> Iterator[Chunk]:
    """Mixes sources: the next document is always of the source that is furthest behind its share of the bytes, until one of
    them ends. weights: above zero, in any unit."""
    resumed = zip(state["places"], state["bytes"]) if state else [(None, 0)] * len(reads)
    parts = [MixPart(read, weight, *at) for read, weight, at in zip(reads, weights, resumed)]
    furthest_behind = lambda: min(parts, key=lambda part: part.n_bytes / part.weight)
    current_state = lambda: {"places": [part.position for part in parts], "bytes": [part.n_bytes for part in parts]}
    skipped = ()
    while True:
        part = furthest_behind()
        if part.is_used_up:
            if not part.next_chunk():
                break
            skipped += part.chunk.skipped
            if part.is_used_up:
                continue
        state = current_state()
        fractions = [part.chunk.fraction for part in parts if part.chunk is not None]
        documents, n_bytes = [], 0
        # a chunk of the mix ends where a chunk of one of its parts does, so that skipped parts lie between chunks
        while n_bytes < CHUNK_BYTES and not (part := furthest_behind()).is_used_up:
            documents.append(part.take())
            n_bytes += len(documents[-1])
        yield Chunk(PackedDocuments.from_utf8(documents), state, 0, skipped, None if None in fractions else max(fractions))
        skipped = ()
    if skipped:
        yield Chunk(PackedDocuments.from_utf8([]), current_state(), skipped=skipped)


# -- local files and the built-in text --------------------------------------------------------------------------------

def open_files(path: Path, config: SourceConfig, part: tuple[int, int]) -> Source:
    """A local file or folder. What its names say is validation text, or else test text, comes first, held out."""
    found = find_data_files(path)
    train, held_out, note = split_by_name(found)
    first = split_files(list(map(local_file, held_out)), part, "val")
    parts = first + split_files(list(map(local_file, train)), part, "train" if held_out else None)
    read = lambda state: read_files(parts, config.text_column, state, config.skip_errors)
    n_bytes = sum(local_file(file).text_bytes for file in train) // part[1]
    train_state = {"file": len(first), "row": 0, "byte": 0} if held_out else None
    if not any(len(chunk.documents) for chunk in read(train_state)):
        raise BadInput(f"--dataset={path}: contains no text")
    names = ", ".join(found.relative(file) for file in held_out[:3]) + (", …" if len(held_out) > 3 else "")
    return Source({"revision": files_revision([*held_out, *train])}, read, train_state, (note,) if note else (),
                  f"{path}: {names}" if held_out else "", n_bytes)


def split_by_name(found: DataFiles) -> tuple[list[Path], list[Path], str | None]:
    """The files to train on, the held-out ones, and a line about what is left out. If no file is for training, the names say
    nothing."""
    splits = found.named_splits()
    if "train" not in splits:
        return list(found.files), [], found.describe_left_out()
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    files = found.of_split(held_out) if held_out else []
    return found.of_split("train"), files, found.describe_left_out(splits - {"train", held_out})


def local_file(path: Path) -> TextFile:
    """Opening it raises BadInput naming the file when it cannot be opened."""
    return TextFile(str(path), path.stat().st_size, functools.partial(open_file, path))


def files_revision(files: list[Path]) -> str:
    """Changes when a file is added, renamed or changes its size; hashing gigabytes of content would take minutes."""
    listing = b"\n".join(os.fsencode(file.name) + b" %d" % file.stat().st_size for file in sorted(files))
    return hashlib.sha256(listing).hexdigest()[:16]


def local_revisions(config: SourceConfig) -> list[str | None]:
    """The current revision of each dataset; None for those that are not local files."""
    paths = [local_path(one.dataset) for one in split_mix(config)]
    return [files_revision([file for files in split_by_name(find_data_files(path))[:2] for file in files]) if path else None
            for path in paths]


def read_builtin(first: int, part: tuple[int, int]) -> Iterator[Chunk]:
    """The built-in documents from number `first` on; of part (k, n), every n-th from the k-th on."""
    documents = iter(builtin_texts()[part[0] + first * part[1]::part[1]])
    while texts := list(take_text(documents, CHUNK_BYTES)):
        yield Chunk(PackedDocuments.from_strings(texts), first)
        first += len(texts)
