"""Rows of small datasets, from the hub or local files, as dicts: conversations, questions, multiple choice.

    for where, row in read_dataset("questions.jsonl", None, "train"): ...
"""
from collections.abc import Collection, Iterator

from runtime.cli import log_line
from runtime.config import BadInput
from text.folders import find_data_files, local_path
from text.formats import read_records
from text.hub import (
    LISTING_SECONDS,
    call_with_timeout,
    configure_libraries,
    dataset_flags,
    hub_error,
    hub_unreachable,
    is_network_error,
)
from text.sources import local_file, require_hub_id


def read_dataset(dataset: str, dataset_config: str | None, split: str,
                 skipped: list[str] | None = None,
                 also_read: Collection[str] | None = ()) -> Iterator[tuple[str, dict]]:
    """Yields (where, row); where: file and line, for error messages.

    dataset: a local file or folder (jsonl, json, csv, parquet), or a hub dataset, whose `split` is downloaded into the
    HF_HOME folder. A folder whose files are named after splits has splits too, see `local_splits`. A line on stderr says
    what of a folder is not read; also_read: splits that the caller reads as well, None for no line. Raises BadInput naming
    what cannot be read; with `skipped`, the messages about rows, row groups and files that cannot be read are added to it
    instead, and reading goes on.
    """
    path = local_path(dataset)
    if path is None:
        yield from read_hub(dataset, dataset_config, split)
        return
    if dataset_config:
        raise BadInput(f"--dataset_config={dataset_config}: only hub datasets have configurations: drop it")
    found = find_data_files(path)
    if not (files := found.of_split(split)):
        raise BadInput(f"--split={split}: no file of {path} is named so; it has {', '.join(sorted(found.named_splits()))}")
    if also_read is not None and (note := found.describe_left_out(found.named_splits() - {split, *also_read})):
        log_line(note)
    for file in files:
        yield from read_records(local_file(file), skipped)


def local_splits(dataset: str) -> set[str]:
    """The splits, of "train", "validation" and "test", that the names in a local folder say; files whose names say none
    belong to "train". Empty for a folder where no name says one, a file, and a hub dataset."""
    path = local_path(dataset)
    return find_data_files(path).named_splits() if path else set()


def read_hub(dataset: str, dataset_config: str | None, split: str) -> Iterator[tuple[str, dict]]:
    flags = dataset_flags(dataset, dataset_config)
    require_hub_id(dataset)
    import datasets
    configure_libraries()
    try:
        builder = call_with_timeout(lambda: datasets.load_dataset_builder(dataset, dataset_config), LISTING_SECONDS, flags)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    except Exception as error:
        if is_network_error(error):
            raise hub_unreachable(flags, error, "a local file") from None
        raise hub_error(error, flags) from None
    for number, row in enumerate(rows, 1):
        yield f"{flags}: row {number}", row
