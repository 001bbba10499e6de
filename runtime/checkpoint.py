"""The checkpoint file: one file of tensors and plain values, written whole or not at all, read without running code."""
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.device import is_out_of_memory
from runtime.files import whole_file
from runtime.flags import BadInput

FORMAT = "gpt-workbench checkpoint 1"


def save_checkpoint(path: Path, blob: dict):
    """blob: nested dicts and lists of tensors, numbers, text and None."""
    with whole_file(path) as file:
        try:
            torch.save({"format": FORMAT, **blob}, file)
        except RuntimeError as error:  # torch's zip writer covers what stopped it with an error of its own
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise


def load_checkpoint(path: Path) -> dict:
    """Tensors come to the CPU. Raises BadInput when the file is missing, damaged, foreign or of another format."""
    if not path.is_file():
        raise BadInput(f"{path}: no checkpoint to read: check the path, or train one with `python train.py "
                       f"--checkpoint_path={path}`")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at the checksums it writes
                raise zipfile.BadZipFile(damaged)
        blob = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, struct and torch errors, depending on which byte is wrong
        raise BadInput(f"{path}: damaged, or not a checkpoint ({type(error).__name__} on reading): use another") from None
    if not isinstance(blob, dict) or "format" not in blob:
        raise BadInput(f"{path}: not a checkpoint of ours: use one that train.py wrote")
    if blob["format"] != FORMAT:
        raise BadInput(f"{path}: its format is {blob['format']!r}, this version reads {FORMAT!r}: use the version that "
                       f"wrote it")
    return blob


@contextmanager
def reading(path: Path):
    """Turns what a part of a checkpoint that is missing or of the wrong kind raises into one line with the file's name."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:100]
        raise BadInput(f"{path}: a part of it is missing or damaged ({type(error).__name__}: {reason}): use "
                       f"another") from None
