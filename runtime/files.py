"""Files that are written whole or not at all."""
import os
from contextlib import contextmanager
from pathlib import Path

from runtime.flags import BadInput


@contextmanager
def whole_file(path: Path, mode: str = "wb"):
    """A file beside `path` that takes its name only when the block ends well and its bytes are on disk.

    A reader, a crash half-way or a full disk sees the old file or the new one.
    """
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path):
    """Makes a rename inside `folder` survive a power cut. Only POSIX systems can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_writable(path: Path, flag: str):
    """Raises BadInput now, before hours of work, when `path` cannot be written. Makes its folder."""
    probe = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "is a folder")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"{flag}={path}: cannot be written ({error.strerror}): choose another path") from None
