"""The checkpoint file: tensors and plain values in one file, written whole or not at all, read without running code.

A run's latest checkpoint is at its --checkpoint_path. The folder of that name, `run_folder`, has the one before it
(previous.pt), the one with the best validation so far (best.pt), and the metrics.
"""
import difflib
import os
import re
import threading
import time
import zipfile
import zlib
from collections.abc import Collection
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from runtime.config import BadInput
from runtime.files import atomic_write, folder_lock, replace_with_link
from runtime.memory import is_out_of_memory

FORMAT = "gpt-workbench checkpoint 3"
MAX_EXPANSION = 4  # bytes of all tensors, as multiples of the file's: tied weights count twice


def save_checkpoint(path: Path, checkpoint: dict, obsolete: Collection[Path] = ()):
    """checkpoint: nested dicts and lists of tensors, numbers, text and None. obsolete: files that must not outlive what
    `path` held so far; they are deleted once the new content is on disk, just before it gets its name."""
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **checkpoint}, file)
        except RuntimeError as error:  # torch's zip writer hides what stopped it behind an error of its own
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise
        if obsolete:
            file.flush()
            os.fsync(file.fileno())
        for old in obsolete:
            old.unlink(missing_ok=True)


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
        self.same_run = resumed is not None and (  # best.pt too
            os.path.realpath(run_folder(resumed)) == os.path.realpath(folder))
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
        if self.resumes_in_place or self.same_run:
            self.link_existing()
            save_checkpoint(self.path, checkpoint)
        else:  # nothing of another run may pass for this one's
            save_checkpoint(self.path, checkpoint, obsolete=(self.previous, self.best))
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
        raise BadInput(explain_missing(path))
    try:
        checkpoint = read_archive(path)
    except PermissionError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # zip, pickle, struct and torch errors, depending on which byte is wrong
        if is_out_of_memory(error) or isinstance(error, MemoryError):
            raise MemoryError(f"{path}: too little memory to read it") from None
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


def explain_missing(path: Path) -> str:
    """The message for a path that is no file, with the checkpoint that may be meant."""
    with suppress(BadInput, ValueError):
        if path.is_dir():  # checkpoints/gpt, a run's folder
            runs = [run for name in (path.name + ".pt", path.name.removesuffix(".run")) if
                    (run := path.with_name(name)).is_file()] or sorted(path.glob("*.pt"))
            return f"{path}: is a folder" + (f", did you mean {runs[0]}?" if runs else ": give a file that ends in .pt")
        parts = str(path).split(",")
        if len(parts) > 1 and all(Path(part).is_file() for part in parts):
            return f"{path}: are {len(parts)} files: give one, or where several are allowed, spaces between them"
        names = [file.name for file in path.parent.glob("*.pt")]
        if close := difflib.get_close_matches(path.with_suffix(".pt").name, names, n=1):
            return f"{path}: no such file, did you mean {path.with_name(close[0])}?"
    return f"{path}: no checkpoint to read: check the path, or train one with `python train.py --checkpoint_path={path}`"


def read_archive(path: Path):
    """What torch.save wrote into the zip archive `path`, with tensors on the CPU. Raises one of many kinds of exception when
    any byte of it is not what was written.

    torch verifies no checksum when it reads, may leave a tensor unfilled, and lets a small file claim large tensors. So it
    maps the file here, which copies nothing, and every storage that it hands out is compared with the archive's checksums.
    """
    checksums = verify_archive(path)
    name = os.fspath(path)
    with open(path, "rb") as file:
        if not is_utf8(name):
            name = f"/proc/self/fd/{file.fileno()}"  # torch takes no other names
        content = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    tensors, size = list(find_tensors(content)), path.stat().st_size
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided or \
                tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
            raise ValueError("a tensor of a kind that no checkpoint holds")
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > MAX_EXPANSION * size:
        raise ValueError("tensors larger than the file")
    copy_storages(tensors, checksums)
    return content


def verify_archive(path: Path) -> set[tuple[int, int]]:
    """Raises an exception unless all entries of the archive are as torch writes them, and all but the tensors' storages have
    their checksum. Returns the size and the CRC-32 of each storage."""
    checksums = set()
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size or any(
                entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & 0x10 for entry in entries):
            raise zipfile.BadZipFile("compressed, a folder, or larger than the file")
        for entry in entries:
            with archive.open(entry) as file:  # compares the two copies of its name
                if re.search(r"/data/\d+$", entry.filename):
                    checksums.add((entry.file_size, entry.CRC))
                else:
                    file.read()  # compares its checksum
    return checksums


def find_tensors(value, seen: set[int] | None = None):
    """Every tensor in nested dicts, lists and tuples, once. A damaged file may have containers that hold themselves."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    if isinstance(value, torch.Tensor):
        seen.add(id(value))
        yield value
    elif isinstance(value, (dict, list, tuple)):
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from find_tensors(item, seen)


@torch.no_grad()
def copy_storages(tensors: list[torch.Tensor], checksums: set[tuple[int, int]]):
    """Moves `tensors` from the mapped file into memory; those that share a storage go on sharing it. Raises ValueError for a
    storage whose size and CRC-32 are not among `checksums`."""
    copies = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in copies:
            copies[key] = copy = storage.clone()
            content = torch.empty(0, dtype=torch.uint8, device="cpu").set_(copy).numpy()
            if (copy.nbytes(), zlib.crc32(content)) not in checksums:
                raise ValueError("a tensor is not what was written")
        tensor.set_(copies[key], tensor.storage_offset(), tensor.size(), tensor.stride())


def is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    """Where a run's metrics go: checkpoints/gpt.pt -> checkpoints/gpt, and checkpoints/a -> checkpoints/a.run. Raises
    BadInput for a path that ends in no name."""
    if run := owning_checkpoint(checkpoint_path):
        return run_folder(run)
    if (name := checkpoint_path.name) in ("", ".."):  # as of "." and "/"
        raise BadInput(f"{checkpoint_path}: is a folder: give a file")
    return checkpoint_path.with_name(name.removesuffix(".pt") if name.endswith(".pt") and name != ".pt" else name + ".run")


@contextmanager
def run_lock(checkpoint_path: Path, flag_text: str):
    """Locks the folder of a run, and where the checkpoint is a symbolic link, that of the file behind it: two runs would
    write that file. flag_text, errors: see folder_lock."""
    paths = Path(os.path.realpath(checkpoint_path)), checkpoint_path
    folders = {os.path.realpath(folder): folder for folder in map(run_folder, paths)}
    with ExitStack() as stack:
        for folder in folders.values():
            stack.enter_context(folder_lock(folder, flag_text))
        yield


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
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:100]
        raise BadInput(f"{path}: a part of it is missing or damaged ({type(error).__name__}: {reason}): use "
                       f"another") from None
