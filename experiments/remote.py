"""The part of --cluster that runs on a node: a process, and the files that it writes.

Imports nothing but the standard library, so that a node starts it at once; experiments/cluster.py is the other side.
"""
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
LEFT_OUT = ".", "events."  # how the names of files begin that are neither results nor needed to go on


class RemoteProcess:
    """A process of one of our scripts, in a folder of its own. Its own files have the paths that they have on the machine
    that asked for it, below that folder."""

    def __init__(self):
        self.folder, self.process, self.sent = Path(tempfile.mkdtemp(prefix="cell-", dir=os.getcwd())), None, {}
        self.errors = self.folder / ".stderr"

    def start(self, script: str, args: Sequence[str], own: Sequence[str], files: dict[str, bytes], working_folder: str,
              threads: int) -> str:
        """Starts `script`, a path in the copy of the code, and returns the name of this machine. own: paths that it writes,
        absolute; files: what those held so far, by path. working_folder: where relative paths of what it reads begin, if
        there is such a folder here."""
        self.own = own
        for name, content in files.items():
            path = self.here(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.sent[name] = stamp(path)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.getcwd()}
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(script), *(self.map_path(arg) for arg in args)], stdout=subprocess.DEVNULL,
                stderr=errors, env=environment, start_new_session=True,
                cwd=working_folder if os.path.isdir(working_folder) else None,
                preexec_fn=end_with_parent if sys.platform == "linux" else None)
        return os.uname().nodename

    def here(self, path: str) -> Path:
        return self.folder / Path(path).relative_to(Path(path).anchor)

    def map_path(self, arg: str) -> str:
        """--name=value, whose value is one of its own files or folders, or the --out_path that they are in; what it reads
        may be above them and stays."""
        name, _, value = arg.partition("=")
        if value in self.own or name == "--out_path" and any(Path(path).is_relative_to(value) for path in self.own):
            return f"{name}={self.here(value)}"
        return arg

    def poll(self) -> tuple[int | None, str, dict[str, bytes]]:
        """(exit code or None, what it printed on stderr, its files that are new or have changed since the last time)."""
        code = self.process.poll()  # before the files are read, so that those of a finished process are complete
        changed, seen = {}, set()
        for path in self.own:  # in this order: what comes first may refer to what comes later, which is at least as new
            for file in find_files(self.here(path)):
                name = str(Path(Path(path).anchor) / file.relative_to(self.folder))
                with suppress(OSError):  # renamed or deleted meanwhile
                    now = stamp(file)
                    if name not in seen and self.sent.get(name) != now:
                        changed[name], self.sent[name] = file.read_bytes(), now
                seen.add(name)
        if code is None:
            return None, "", changed
        return code, self.errors.read_text(encoding="utf-8", errors="replace"), changed

    def send_signal(self, number: int):
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def close(self):
        self.send_signal(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def find_files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else path.rglob("*")
    return [file for file in found if file.is_file() and not file.name.startswith(LEFT_OUT) and file.suffix != ".tmp"]


def stamp(path: Path) -> tuple[int, int, int]:
    """Which another content of a file has other ones of."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def end_with_parent():
    """In the new process: it gets SIGTERM, and saves, when the process of the node that started it dies."""
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGTERM)
