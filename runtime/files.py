"""Files that are written whole or not at all, and folders that one process at a time writes to.

    with folder_lock(Path("data"), "--data_path=data"), atomic_write(Path("data/manifest.json"), "w") as file:
        file.write("{}")
"""
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.config import BadInput


@contextmanager
def atomic_write(path: Path, mode: str = "wb"):
    """Opens a temporary file beside `path`, which is fsynced and renamed to `path` when the block ends without an error.

    A reader, a crash half-way or a full disk sees the old file or the new one. Raises OSError naming `path`.
    """
    path = Path(os.path.realpath(path))  # writes through a symbolic link instead of replacing it
    temporary = path.with_name(path.name + ".tmp")
    with explain_write_failure(path), delete_on_failure(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)


@contextmanager
def explain_write_failure(path: Path):
    """Turns the OSError of a block that writes `path` into one that names it: a full disk names no file, and a read-only
    disk the temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextmanager
def delete_on_failure(temporary: Path):
    try:
        yield
    except BaseException:
        with suppress(OSError):  # a read-only disk refuses even to look
            temporary.unlink(missing_ok=True)
        raise


def read_json_lines(path: Path) -> Iterator[dict]:
    """The objects in a file that holds one a line; none if there is no such file. Lines that a crash cut off, or that hold
    something else, are left out."""
    if os.path.isfile(path):  # not a named pipe, which may never end
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError, RecursionError):
                    if isinstance(row := json.loads(line), dict):
                        yield row


def append_json_line(path: Path, row: dict):
    """Raises OSError naming `path`."""
    with explain_write_failure(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def replace_with_link(path: Path, other: Path):
    """Replaces `other` by a hard link to the file `path`, or by a copy where the file system has no links. Raises OSError
    naming `other`."""
    temporary = other.with_name(other.name + ".tmp")
    with explain_write_failure(other):
        temporary.unlink(missing_ok=True)
        other.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(path), temporary)
    except OSError:
        with open(path, "rb") as old, atomic_write(other) as new:
            shutil.copyfileobj(old, new)
        return
    with explain_write_failure(other):
        os.replace(temporary, other)
        temporary.unlink(missing_ok=True)  # rename(2) does nothing where both names are links to one file
        fsync_folder(other.parent)


def fsync_folder(folder: Path):
    """Makes a rename inside `folder` survive a power cut. Only POSIX systems can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def folder_lock(folder: Path, flag_text: str):
    """Creates `folder` if it does not exist, and keeps out other processes that ask for its lock.

    The system releases the lock when the process ends, however it ends, so a lock file that a killed process left behind
    blocks nobody. Forked processes do not hold it. At the end the lock file is removed, and a folder that was created here
    and is still empty. Where locking is not possible, in a read-only folder or on a file system without locks, nothing is
    locked.

    flag_text: the flag as typed, `--data_path=data`. Raises BadInput, which starts with it, when the folder is
    locked or cannot be created.
    """
    from filelock import FileLock, Timeout  # 0.07 s to import
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{flag_text}: cannot be written ({error.strerror}): choose another path") from None
    path = folder / ".lock"
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise BadInput(f"{flag_text}: another process is writing there: let it finish, or choose another path") from None
    except OSError:
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows keeps open files; there release() removes it
                path.unlink()  # before the release: filelock discards a lock on a file that has been unlinked
            lock.release()
        with suppress(OSError):  # not empty
            for made in created:
                made.rmdir()


def require_regular_file(path: Path, flag_text: str):
    """Raises BadInput unless `path` is a file that has an end. Opening a named pipe would wait for somebody to write to it,
    and reading a device such as /dev/zero never ends.

    flag_text: the flag as typed, `--tokenizer_path=t.json`, or the path alone, for the message.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise BadInput(f"{flag_text}: cannot be read ({getattr(error, 'strerror', error)}): check the path") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise BadInput(f"{flag_text}: is {kind}: give a file")


def check_writable(path: Path, flag_text: str):
    """Raises BadInput now, before hours of work, when the file `path` cannot be written. Leaves nothing behind.

    flag_text: the flag as typed, `--data_path=data`, for the message.
    """
    try:
        path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            raise OSError(0, "a folder" if path.is_dir() else "not a file")
        folder = next(folder for folder in path.parents if folder.exists())
        probe = folder / (path.name + ".tmp")
        existed = probe.exists()
        open(probe, "ab").close()
        if not existed:
            probe.unlink(missing_ok=True)  # another process that checks the same may have
    except OSError as error:
        raise BadInput(f"{flag_text}: cannot be written ({error.strerror}): choose another path") from None
