"""Files that are written whole or not at all, and folders that one process at a time writes into."""
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.config import BadInput

# Of the locks held. A forked process, such as one that loads data, must not go on holding what its parent holds.
LOCKS: set[int] = set()


def close_locks():
    for descriptor in LOCKS:
        os.close(descriptor)
    LOCKS.clear()


@contextmanager
def atomic_write(path: Path, mode: str = "wb"):
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
        fsync_folder(path.parent)
    except OSError as error:  # a full disk names no file
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def replace_with_link(path: Path, other: Path):
    """Makes `other` a second name of the file `path`, in place of what had that name; a copy where links cannot be."""
    part = other.with_name(other.name + ".tmp")
    part.unlink(missing_ok=True)
    other.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(path), part)
    except OSError:
        with open(path, "rb") as old, atomic_write(other) as new:
            shutil.copyfileobj(old, new)
        return
    os.replace(part, other)
    part.unlink(missing_ok=True)  # where both were names of one file already, the system leaves both
    fsync_folder(other.parent)


def fsync_folder(folder: Path):
    """Makes a rename inside `folder` survive a power cut. Only POSIX systems can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def hold(descriptor: int):
    if not hasattr(hold, "registered"):  # once: a hook cannot be taken back
        os.register_at_fork(after_in_child=close_locks)
        hold.registered = True
    LOCKS.add(descriptor)


def let_go(descriptor: int):
    LOCKS.discard(descriptor)
    os.close(descriptor)


@contextmanager
def folder_lock(folder: Path, given: str):
    """Makes `folder` where there is none, and keeps other processes that ask for the same out of it. The system lets go of
    it when the process ends, however it does. A folder made here and still empty at the end goes away again.

    Raises BadInput, which begins with the flag `given`. Windows, and network disks without locks, keep nobody out.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{given}: cannot be written ({error.strerror}): choose another path") from None
    descriptor = None
    if os.name == "posix":
        import fcntl
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_taken = os.fstat(descriptor).st_ino != os.stat(folder).st_ino  # another has just removed and made it again
            hold(descriptor)
        except BlockingIOError:
            is_taken = True
        except OSError:  # a file system that has no locks, or a folder that only lets files be written
            is_taken = False
        if is_taken:
            let_go(descriptor)
            raise BadInput(f"{given}: another process is writing there: let it finish, or choose another path")
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
        if descriptor is not None:
            let_go(descriptor)


def check_writable(path: Path, given: str):
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
