"""Where text comes from: a dataset of the Hugging Face hub, local files, the text built into this machine's Python, or a
mix of such.

A source is opened once and gives its documents in a fixed order, about a megabyte at a time, each with its place; from there
they are read again without what is before, which is how an interrupted preparation goes on.
"""
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.cli import log_line
from runtime.config import BadInput, check_flags, flag
from text.builtin import builtin_revision, builtin_texts
from text.documents import from_strings, from_utf8
from text.formats import CHUNK_BYTES, READERS, Chunk, TextFile, chunks_from, read_files, split_files
from text.hub import open_hub

FINEWEB = "HuggingFaceFW/fineweb-edu"


@dataclass(frozen=True)
class SourceConfig:
    """Where text comes from."""
    dataset: str = flag(FINEWEB, "a dataset of the hub by its id, a local file or folder (parquet, jsonl, txt), or "
                                 "`builtin`:\nthe documentation inside Python, numpy and torch, several MB, no network;\n"
                                 "several, with commas between, are mixed")
    mix: str = flag(None, "shares of the bytes of text that the datasets get: 0.8,0.2")
    dataset_config: str = flag(None, "configuration of a hub dataset (default: sample-10BT for fineweb-edu, else none)")
    text_column: str = flag("text", "column or JSON key that holds the text; for a mix, one for all or one for each")
    streaming: bool = flag(True, "1 reads a hub dataset over the network as it goes, 0 downloads its files\n"
                                "and keeps them where HF_HOME says")
    retry_seconds: int = flag(600, "how long a hub that does not answer is asked again", at_least=0)
    skip_errors: bool = flag(False, "1 leaves out what cannot be read of local files and of parquet files of the hub: a "
                                    "row\ngroup, a line or a file; the manifest counts them")
    __post_init__ = check_flags


@dataclass(frozen=True)
class Source:
    """An opened source: what it is, for the manifest, and `read(at)`, its chunks from there on."""
    name: dict
    read: Callable[[object], Iterator[Chunk]]

    def chunks(self, place: dict | None = None) -> Iterator[Chunk]:
        """From `place`, which a chunk gave, or from the beginning."""
        return chunks_from(self.read, place)

    def documents(self) -> Iterator[str]:
        """The text of each, with a line on stderr for what is left out."""
        for chunk in self.chunks():
            for line in chunk.skipped:
                log_line(f"left out: {line}")
            yield from chunk.texts.strings()


def source_flags(config: SourceConfig) -> dict:
    """The flags that decide which text this is, as `Source.name` holds them."""
    if len(parts := parts_of(config)) > 1:
        flags = [source_flags(part) for part in parts]
        return {name: ",".join(part.get(name) or "" for part in flags)
                for name in ("dataset", "dataset_config", "text_column")} | {"mix": config.mix}
    if config.dataset == "builtin":
        return {"dataset": "builtin"}
    if path := local_path(config.dataset):
        return {"dataset": str(path), "text_column": config.text_column}
    dataset_config = config.dataset_config or ("sample-10BT" if config.dataset == FINEWEB else None)
    return {"dataset": config.dataset, "dataset_config": dataset_config, "text_column": config.text_column}


def parts_of(config: SourceConfig) -> list[SourceConfig]:
    """One config for each dataset of a mix; of what is no mix, itself."""
    if "," not in config.dataset or local_path(config.dataset):
        if config.mix is not None:
            raise BadInput(f"--mix={config.mix}: there is one --dataset={config.dataset}: give several with commas between")
        return [config]
    datasets = config.dataset.split(",")
    if config.mix is None:
        raise BadInput(f"--dataset={config.dataset}: names {len(datasets)} datasets: say how they are mixed, such as "
                       f"--mix={','.join([f'{1 / len(datasets):.2g}'] * len(datasets))}")
    weights(config)
    one_each = {}
    for name in ("dataset_config", "text_column"):
        values = (getattr(config, name) or "").split(",")
        if len(values) not in (1, len(datasets)):
            raise BadInput(f"--{name}={getattr(config, name)}: give one for all, or one for each of the {len(datasets)} "
                           f"datasets")
        one_each[name] = values * len(datasets) if len(values) == 1 else values
    return [replace(config, dataset=dataset, mix=None, dataset_config=dataset_config or None, text_column=text_column)
            for dataset, dataset_config, text_column in zip(datasets, one_each["dataset_config"], one_each["text_column"])]


def weights(config: SourceConfig) -> list[float]:
    """Raises BadInput unless `config.mix` has a share above zero for each dataset."""
    try:
        shares = [float(share) for share in config.mix.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(config.dataset.split(",")) or not all(0 < share < float("inf") for share in shares):
        raise BadInput(f"--mix={config.mix}: give a number above zero for each of {config.dataset}")
    return shares


def local_path(dataset: str) -> Path | None:
    """The file or folder `dataset` names, if there is one."""
    try:
        path = Path(dataset).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # names that no file can have
        return None


def local_revisions(config: SourceConfig) -> list[str | None]:
    """Of the text files the datasets name, None for those that are not local."""
    paths = [local_path(part.dataset) for part in parts_of(config)]
    return [files_revision(find_text_files(path)) if path else None for path in paths]


def open_source(config: SourceConfig, revisions: list[str] | None = None, part: tuple[int, int] = (0, 1)) -> Source:
    """revisions: of the hub, where a preparation goes on; by default what it has now. part: (k, n) is the k-th of n
    disjoint parts. Raises BadInput when there is no such dataset, file or column, or nothing in it."""
    configs = parts_of(config)
    opened = [open_one(one, revision, part) for one, revision in zip(configs, revisions or [None] * len(configs))]
    read = opened[0][1] if len(opened) == 1 else lambda at: interleave([read for _, read in opened], weights(config), at)
    return Source(source_flags(config) | {"revisions": [revision for revision, _ in opened]}, read)


def open_one(config: SourceConfig, revision: str | None, part: tuple[int, int]) -> tuple[str, Callable]:
    """The revision and the chunks of a single dataset."""
    if not config.dataset:
        raise BadInput("--dataset=: is empty: give a dataset of the hub, a local path, or `builtin`")
    path = local_path(config.dataset)
    if config.dataset_config and (path or config.dataset == "builtin"):
        raise BadInput(f"--dataset_config={config.dataset_config}: only datasets of the hub have configurations: drop it "
                       f"(in a mix, leave the place of {config.dataset} empty)")
    if config.dataset == "builtin":
        return builtin_revision(), lambda at: read_builtin(at or 0, part)
    if path:
        files = find_text_files(path)
        taken, nth = split_files([TextFile(str(file), file.stat().st_size, opener(file)) for file in files], part)
        read = lambda at: read_files(taken, config.text_column, at, config.skip_errors, nth)
        if not any(len(chunk.texts) for chunk in read(None)):
            raise BadInput(f"--dataset={path}: no text in it")
        return files_revision(files), read
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+|[\w-]+", config.dataset) or config.dataset.endswith(tuple(READERS)):
        raise BadInput(f"--dataset={config.dataset}: no such file or folder")
    return open_hub(config.dataset, source_flags(config)["dataset_config"], config.text_column, config.streaming,
                    config.skip_errors, config.retry_seconds, revision, part)


def take_text(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """The first of `texts`, up to and including the one with which they reach `n_bytes` of UTF-8."""
    texts = iter(texts)
    while n_bytes > 0 and (text := next(texts, None)) is not None:
        yield text
        n_bytes -= len(text.encode("utf-8", "surrogatepass"))


def interleave(reads: list[Callable], weights: list[float], at: dict | None) -> Iterator[Chunk]:
    """The documents of several sources, each time the next one of that which is most behind its share of the bytes; until
    one of them ends. weights: above zero, in any unit."""
    places, taken = (list(at["places"]), list(at["bytes"])) if at else ([None] * len(reads), [0] * len(reads))
    streams = [chunks_from(read, place) for read, place in zip(reads, places)]
    nothing = Chunk(from_utf8([]), None)
    chunks, used = [nothing] * len(reads), [0] * len(reads)
    skipped = ()
    next_one = lambda: min(range(len(reads)), key=lambda i: taken[i] / weights[i])
    while True:
        i = next_one()
        if used[i] == len(chunks[i].texts):
            chunks[i], used[i] = next(streams[i], nothing), 0
            skipped += chunks[i].skipped
            if chunks[i] is nothing:
                break
            places[i] = chunks[i].place(0)
            if not len(chunks[i].texts):
                continue
        at = {"places": list(places), "bytes": list(taken)}
        fractions = [chunk.fraction for chunk in chunks if chunk is not nothing]
        parts, size = [], 0
        # a chunk of the mix ends where one of a part does, so that what was left out lies between chunks
        while size < CHUNK_BYTES and used[i := next_one()] < len(chunks[i].texts):
            start, stop = chunks[i].texts.offsets[used[i]:used[i] + 2].tolist()
            parts.append(chunks[i].texts.utf8[start:stop])
            used[i], taken[i], size = used[i] + 1, taken[i] + stop - start, size + stop - start
            places[i] = chunks[i].place(used[i])
        yield Chunk(from_utf8(parts), at, 0, skipped, None if None in fractions else max(fractions))
        skipped = ()
    if skipped:
        yield Chunk(from_utf8([]), {"places": list(places), "bytes": list(taken)}, skipped=skipped)


# -- local files ------------------------------------------------------------------------------------------------------

def find_text_files(path: Path) -> list[Path]:
    """`path` itself, or the parquet, jsonl and txt files below it in order of name. Raises BadInput if there are none."""
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise BadInput(f"--dataset={path}: cannot read {path.suffix or 'a file without ending'}: "
                           f"give {', '.join(READERS)} or a folder of such")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
    if not files:
        raise BadInput(f"--dataset={path}: no {', '.join(READERS)} file in this folder")
    return files


def files_revision(files: list[Path]) -> str:
    """Changes when a file is added, renamed or changes its size; reading gigabytes to be surer would cost minutes."""
    listed = b"\n".join(os.fsencode(file.name) + b" %d" % file.stat().st_size for file in files)
    return hashlib.sha256(listed).hexdigest()[:16]


def opener(path: Path) -> Callable:
    """A function that opens the file. Raises BadInput naming it."""
    def opened():
        try:
            return open(path, "rb")
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None
    return opened


def read_builtin(first: int, part: tuple[int, int]) -> Iterator[Chunk]:
    """The built-in documents from number `first` on; of part (k, n), every n-th from the k-th on."""
    documents = iter(builtin_texts()[part[0] + first * part[1]::part[1]])
    while texts := list(take_text(documents, CHUNK_BYTES)):
        yield Chunk(from_strings(texts), first)
        first += len(texts)
