"""Rows of small datasets, of the hub or in local files, as dicts: conversations, questions, multiple choice."""
import json
from collections.abc import Iterator
from pathlib import Path

from runtime.config import BadInput
from text.hub import hub_failure, is_network_error, short
from text.sources import find_text_files, local_path


def read_dataset(dataset: str, dataset_config: str | None, split: str) -> Iterator[tuple[str, dict]]:
    """Yields (where, row). dataset: a local file or folder (jsonl, parquet), or a dataset of the hub, whose `split` is
    downloaded and kept where HF_HOME says. Raises BadInput."""
    path = local_path(dataset)
    if path is None:
        yield from read_hub(dataset, dataset_config, split)
        return
    if dataset_config:
        raise BadInput(f"--dataset_config={dataset_config}: only datasets of the hub have configurations: drop it")
    for file in find_text_files(path):
        reader = {".jsonl": read_jsonl, ".parquet": read_parquet}.get(file.suffix.lower())
        if reader is None:
            raise BadInput(f"--dataset={file}: holds no rows: give jsonl or parquet")
        yield from reader(file)


def read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise BadInput(f"{path}: line {number} is no JSON ({str(error)[:80]}): mend or remove it") from None
                if not isinstance(row, dict):
                    raise BadInput(f"{path}: line {number} is no JSON object: give one a line")
                yield f"{path}: line {number}", row
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise BadInput(f"{path}: cannot be read, or is no parquet ({' '.join(str(error).split())[:120]})") from None


def read_hub(dataset: str, dataset_config: str | None, split: str) -> Iterator[tuple[str, dict]]:
    import datasets
    import huggingface_hub
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error, it raises as well
    huggingface_hub.utils.logging.set_verbosity_error()
    given = f"--dataset={dataset}" + (f" --dataset_config={dataset_config}" if dataset_config else "")
    if dataset.endswith((".jsonl", ".parquet")):
        raise BadInput(f"{given}: no such file")
    try:
        rows = datasets.load_dataset(dataset, dataset_config, split=split)
    except Exception as error:
        if is_network_error(error):
            raise BadInput(f"{given}: the hub cannot be reached ({short(error)}): check the network, or give a local "
                           f"file") from None
        raise hub_failure(error, given) from None
    for i, row in enumerate(rows):
        yield f"{given}: row {i + 1}", row
