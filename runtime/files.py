"""Files that are written whole or not at all."""
import os
from contextlib import contextmanager
from pathlib import Path

from runtime.flags import BadInput


@contextmanager
def whole_file(path: Path, mode: str = "wb"):
    """A file beside `path` that takes its name only when the block ends well and its bytes are on disk.

    A reader, a crash half-way or a full disk sees the old file or the new one. Raises OSError naming `path`.
    """
    path = Path(os.path.realpath(path))  # a link stays a link to what is written
    part = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:  # a full disk names no file
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path):
    """Makes a rename inside `folder` survive a power cut. Only POSIX systems can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_writable(path: Path, given: str):
    """Raises BadInput now, before hours of work, when `path` or its folder cannot be written. Leaves nothing behind.

    given: the flag as the user gave it, `--data_path=data`, for the message.
    """
    try:
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            raise OSError(0, "not a file" if not path.is_dir() else "a folder")
        folder = next(folder for folder in path.parents if folder.exists())
        probe = folder / (path.name + ".tmp")
        left_over = probe.exists()
        open(probe, "ab").close()
        if not left_over:
            probe.unlink()
    except OSError as error:
        raise BadInput(f"{given}: cannot be written ({error.strerror}): choose another path") from None
