"""The checkpoint file: tensors and plain values in one file, written whole or not at all, read without running code.

A run's latest checkpoint is at its --checkpoint_path. The folder of that name, `run_folder`, has the one before it
(previous.pt), the one with the best validation so far (best.pt), and the metrics.
"""
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from runtime.config import BadInput
from runtime.files import atomic_write, replace_with_link
from runtime.memory import is_out_of_memory

FORMAT = "gpt-workbench checkpoint 3"


def save_checkpoint(path: Path, checkpoint: dict):
    """checkpoint: nested dicts and lists of tensors, numbers, text and None."""
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **checkpoint}, file)
        except RuntimeError as error:  # torch's zip writer hides what stopped it behind an error of its own
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise


class CheckpointWriter:
    """Writes a run's checkpoints: the latest at `path`; the previous and the best one in `folder`, as hard links, so that
    nothing is written twice.

    A write that would hold up training for more than MAX_PAUSE_SECONDS, going by the duration of the previous write, is
    done by a thread from a copy in memory.
    """
    MAX_PAUSE_SECONDS = 1.0

    def __init__(self, path: Path, folder: Path, resumed: Path | None = None, is_best: bool = False):
        """resumed: the checkpoint that the run continues, and whether that was its best."""
        self.path, self.previous, self.best = path, folder / "previous.pt", folder / "best.pt"
        self.resumes_in_place = resumed is not None and path.exists() and path.samefile(resumed)
        self.same_run = resumed is not None and run_folder(resumed).resolve() == folder.resolve()  # best.pt too
        self.is_best = is_best  # the checkpoint at `path`, when the run resumes in place
        self.saved_step = -1    # step of the checkpoint at `path`; -1 before this run has written it
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0      # duration of the last write

    def save(self, checkpoint: dict, step: int, is_best: bool, blocking: bool):
        """blocking: return when it is on disk. Raises OSError, also that of an earlier write."""
        self.wait()
        if blocking or self.seconds <= self.MAX_PAUSE_SECONDS:
            self.write(checkpoint, step, is_best)
            return
        self.thread = threading.Thread(target=self.write_async, args=(clone_to_cpu(checkpoint), step, is_best))
        self.thread.start()

    def write(self, checkpoint: dict, step: int, is_best: bool):
        start = time.perf_counter()
        self.link_existing()
        save_checkpoint(self.path, checkpoint)
        self.resumes_in_place, self.is_best, self.saved_step = True, is_best, step
        if is_best:
            replace_with_link(self.path, self.best)
        self.seconds = time.perf_counter() - start

    def link_existing(self):
        """Before `path` is replaced: keeps what is there as previous.pt. A killed run may not have linked its best yet."""
        if self.resumes_in_place:
            replace_with_link(self.path, self.previous)
            if self.is_best:
                replace_with_link(self.path, self.best)
        elif not self.same_run:  # nothing of another run may pass for this one's
            self.previous.unlink(missing_ok=True)
            self.best.unlink(missing_ok=True)

    def write_async(self, *args):
        try:
            self.write(*args)
        except BaseException as error:  # whatever it is, the training thread raises it
            self.error = error

    def wait(self):
        """Returns when nothing is being written. Raises the error of a write that failed since."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self):
        """Raises the error of a write that failed, once."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def checkpoint_status(self) -> str:
        """What a run that fails now leaves behind, for its last line."""
        with suppress(Exception):  # the failure that is being reported, or one that comes with it
            self.wait()
        if self.saved_step >= 0:
            return f"{self.path} holds step {self.saved_step}, from which --resume_checkpoint continues"
        return f"{self.path} " + ("is unchanged" if self.path.exists() else "was not written")


def clone_to_cpu(value):
    """Nested dicts, lists and tuples with every tensor copied into CPU memory; shared tensors stay shared."""
    copies = {}

    def clone(value):
        if isinstance(value, torch.Tensor):
            key = value.data_ptr(), value.shape, value.dtype
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, dict):
            return {key: clone(item) for key, item in value.items()}
        return type(value)(clone(item) for item in value) if isinstance(value, (list, tuple)) else value
    return clone(value)


# -- reading ----------------------------------------------------------------------------------------------------------

def load_checkpoint(path: Path) -> dict:
    """Tensors are loaded to the CPU. Raises BadInput when the file is missing, damaged, foreign or of an unknown format."""
    if not path.is_file():
        raise BadInput(f"{path}: no checkpoint to read: check the path, or train one with `python train.py "
                       f"--checkpoint_path={path}`")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not verify the checksums it writes
                raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, struct and torch errors, depending on which byte is wrong
        raise BadInput(f"{path}: damaged, or not a checkpoint ({type(error).__name__} on reading): use another") from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise BadInput(f"{path}: not a checkpoint of this program: use one that train.py wrote")
    if checkpoint["format"] == "gpt-workbench checkpoint 2":
        with explain_damage(path):
            checkpoint = upgrade_2(checkpoint)
    if checkpoint["format"] != FORMAT:
        raise BadInput(f"{path}: its format is {checkpoint['format']!r}, this version reads {FORMAT!r}: use the version "
                       f"that wrote it")
    return checkpoint


def upgrade_2(checkpoint: dict) -> dict:
    """Format 2 as format 3, which renamed a flag and the counters of skipped steps, and has the dtype by itself. Its config
    and weights keep their names: model.py reads both. Nothing else differs, so a run resumes bit for bit."""
    if "training" not in checkpoint:
        return checkpoint | {"format": FORMAT}
    training = dict(checkpoint["training"])
    training["settings"] = {"x0_residual" if name == "embed_shortcut" else name: value
                            for name, value in training["settings"].items()}
    training["guard"] = training.pop("watch")
    training["dtype"] = training.get("machine", "").rpartition(", ")[2]
    return checkpoint | {"format": FORMAT, "training": training}


def load_resumable(path: Path) -> dict:
    """The checkpoint at `path`. Where it is damaged, the BadInput names the previous one, if there is one."""
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
    if run := owning_checkpoint(checkpoint_path):
        return run_folder(run)
    name = checkpoint_path.name
    return checkpoint_path.with_name(name.removesuffix(".pt") if name.endswith(".pt") and name != ".pt" else name + ".run")


def owning_checkpoint(path: Path) -> Path | None:
    """The checkpoint path of the run that keeps `path` in its folder: checkpoints/gpt/best.pt -> checkpoints/gpt.pt."""
    folder = path.parent
    if path.name not in ("best.pt", "previous.pt") or not (folder / "metrics.jsonl").exists():
        return None
    return folder.with_name(folder.name.removesuffix(".run") if folder.suffix == ".run" else folder.name + ".pt")


@contextmanager
def explain_damage(path: Path):
    """Turns the exceptions of a missing or malformed part of a file into one line with the file's name."""
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
