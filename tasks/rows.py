"""Rows of small datasets, from the hub or local files, as dicts: conversations, questions, multiple choice.

    for where, row in read_dataset("questions.jsonl", None, "train"): ...
"""
from collections.abc import Iterator

from runtime.config import BadInput
from text.formats import RECORD_READERS, read_records
from text.hub import configure_libraries, dataset_flags, hub_error, hub_unreachable, is_network_error
from text.sources import find_text_files, local_file, local_path


def read_dataset(dataset: str, dataset_config: str | None, split: str) -> Iterator[tuple[str, dict]]:
    """Yields (where, row); where: file and line, for error messages.

    dataset: a local file or folder (jsonl, parquet), or a hub dataset, whose `split` is downloaded into the HF_HOME folder.
    Raises BadInput naming what cannot be read.
    """
    path = local_path(dataset)
    if path is None:
        yield from read_hub(dataset, dataset_config, split)
        return
    if dataset_config:
        raise BadInput(f"--dataset_config={dataset_config}: only hub datasets have configurations: drop it")
    for file in find_text_files(path):
        yield from read_records(local_file(file))


def read_hub(dataset: str, dataset_config: str | None, split: str) -> Iterator[tuple[str, dict]]:
    import datasets
    flags = dataset_flags(dataset, dataset_config)
    if dataset.endswith(tuple(RECORD_READERS)):
        raise BadInput(f"{flags}: no such file")
    configure_libraries()
    try:
        rows = datasets.load_dataset(dataset, dataset_config, split=split)
    except Exception as error:
        if is_network_error(error):
            raise hub_unreachable(flags, error, "a local file") from None
        raise hub_error(error, flags) from None
    for number, row in enumerate(rows, 1):
        yield f"{flags}: row {number}", row
