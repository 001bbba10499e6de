"""The checkpoint file: one file of tensors and plain values, written whole or not at all, read without running code.

A run's last one is at its --checkpoint_path; the folder of that name, `run_folder`, has the one before it (previous.pt),
the one with the lowest validation loss (best.pt), and the metrics.
"""
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.config import BadInput
from runtime.files import atomic_write, replace_with_link
from runtime.memory import is_out_of_memory

FORMAT = "gpt-workbench checkpoint 2"


def save_checkpoint(path: Path, blob: dict):
    """blob: nested dicts and lists of tensors, numbers, text and None."""
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **blob}, file)
        except RuntimeError as error:  # torch's zip writer covers what stopped it with an error of its own
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise


class CheckpointWriter:
    """Writes a run's checkpoints, one after the other: the last one at `path`; in `folder`, as further names of the files
    and so without being written again, the one before (previous.pt) and the one with the lowest validation loss (best.pt).

    A write that would hold up training for more than PAUSE seconds, going by the one before, is done by a thread from a
    copy in memory.
    """
    PAUSE = 1.0

    def __init__(self, path: Path, folder: Path, came_from: Path | None = None, is_best: bool = False):
        """came_from: the checkpoint that the run goes on from, and whether that was its best."""
        self.path, self.previous, self.best = path, folder / "previous.pt", folder / "best.pt"
        self.resumes_in_place = came_from is not None and path.exists() and path.samefile(came_from)
        self.inherited = run_folder(came_from) / "best.pt" if came_from is not None else None
        self.is_best = is_best  # what is at `path` when `resumes_in_place`
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0  # that the last write took

    def save(self, blob: dict, is_best: bool, blocking: bool, on_written: Callable):
        """blocking: return when it is on disk. on_written() is called then. Raises OSError, also of an earlier write."""
        self.wait()
        if blocking or self.seconds <= self.PAUSE:
            self.write(blob, is_best, on_written)
            return
        self.thread = threading.Thread(target=self.write_async, args=(clone_to_cpu(blob), is_best, on_written))
        self.thread.start()

    def write(self, blob: dict, is_best: bool, on_written: Callable):
        start = time.perf_counter()
        self.name_what_is_there()
        save_checkpoint(self.path, blob)
        self.resumes_in_place, self.is_best = True, is_best
        on_written()
        if is_best:
            replace_with_link(self.path, self.best)
        self.seconds = time.perf_counter() - start

    def name_what_is_there(self):
        """Before `path` is replaced. A run that was killed may not have named its best any more."""
        if self.resumes_in_place:
            replace_with_link(self.path, self.previous)
            if self.is_best:
                replace_with_link(self.path, self.best)
        elif self.inherited != self.best:  # nothing of another run may pass for this one's
            self.previous.unlink(missing_ok=True)
            self.best.unlink(missing_ok=True)
            if self.inherited is not None and self.inherited.exists():
                replace_with_link(self.inherited, self.best)

    def write_async(self, *args):
        try:
            self.write(*args)
        except BaseException as error:  # whatever it is, the training thread tells of it
            self.error = error

    def wait(self):
        """Until nothing is being written. Raises the error of a write that failed since."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self):
        error, self.error = self.error, None
        if error is not None:
            raise error


def clone_to_cpu(value):
    """Nested dicts, lists and tuples with every tensor copied into the CPU's memory; what is one tensor stays one."""
    copies = {}

    def copy(value):
        if isinstance(value, torch.Tensor):
            key = value.data_ptr(), value.shape, value.dtype
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        return type(value)(copy(item) for item in value) if isinstance(value, (list, tuple)) else value
    return copy(value)


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


def load_last(path: Path) -> dict:
    """The checkpoint at `path`. Where it is damaged, the BadInput names the one before it, if there is one."""
    try:
        return load_checkpoint(path)
    except BadInput as error:
        previous = run_folder(path) / "previous.pt"
        if not path.exists() or not previous.exists():
            raise
        raise BadInput(f"{error}, such as the one before: --resume_checkpoint={previous} --checkpoint_path={path} "
                       f"--overwrite") from None


def run_folder(checkpoint_path: Path) -> Path:
    """Where a run's metrics go: checkpoints/gpt.pt -> checkpoints/gpt, and checkpoints/a -> checkpoints/a.run."""
    if run := of_run(checkpoint_path):
        return run_folder(run)
    name = checkpoint_path.name
    return checkpoint_path.with_name(name.removesuffix(".pt") if name.endswith(".pt") and name != ".pt" else name + ".run")


def of_run(path: Path) -> Path | None:
    """The checkpoint whose run keeps `path` in its folder: checkpoints/gpt/best.pt -> checkpoints/gpt.pt."""
    folder = path.parent
    if path.name not in ("best.pt", "previous.pt") or not (folder / "metrics.jsonl").exists():
        return None
    return folder.with_name(folder.name.removesuffix(".run") if folder.suffix == ".run" else folder.name + ".pt")


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
