"""Runs of a command that checkpoints, each a process of its own and some at a time: what is finished is not run again, what
was stopped goes on, and how each ended is remembered beside its metrics."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from runtime.checkpoint import run_folder
from runtime.files import atomic_write
from runtime.metrics import read_rows
from runtime.signals import StopSignals
from runtime.threads import available_cores

REMEMBERED = "finished", "diverged"  # what failed or was killed is tried again when the command is given again
GRACE = 30  # seconds that a process has to save and end


@dataclass(frozen=True)
class Run:
    """A process of `script`, which writes `checkpoint`, its rows into the folder of that name, and takes --overwrite and
    --resume_checkpoint. out: the flag that names the checkpoint."""
    script: Path
    checkpoint: Path
    flags: tuple[str, ...]
    out: str = "checkpoint_path"

    @property
    def folder(self) -> Path:
        return run_folder(self.checkpoint)

    def rows(self) -> list[dict]:
        return read_rows(self.folder / "metrics.jsonl")

    def is_whole(self) -> bool:
        """Whether its last row is that of its end: metrics may be lost in a power cut that the checkpoint survives."""
        rows = self.rows()
        return bool(rows) and "val_bpb" in rows[-1] and "tok_per_sec" in rows[-1]

    def forget(self):
        """So that it begins anew."""
        self.checkpoint.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def ended_before(self) -> tuple[str, str] | None:
        """How it ended and why, if that is remembered."""
        with suppress(OSError, ValueError, KeyError):  # not there, or cut off
            ended = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
            if ended["status"] in REMEMBERED and (ended["status"] != "finished" or self.is_whole()):
                return ended["status"], ended["reason"]
            self.forget()
        return None

    def remember(self, status: str, reason: str):
        """And removes the checkpoints, which nothing needs any more."""
        with atomic_write(self.folder / "result.json", "w") as file:
            json.dump({"status": status, "reason": reason, "flags": self.flags}, file, indent=1)
        for path in (self.checkpoint, *self.folder.glob("*.pt"), *self.folder.glob("events.*")):
            path.unlink(missing_ok=True)


class Runner:
    """Runs some at a time, whose threads are their share of the cores."""

    def __init__(self, jobs: int, stop: StopSignals, diverged: str):
        """diverged: words by which the last line of a run says that it did."""
        self.jobs, self.stop, self.diverged = jobs, stop, diverged
        self.processes: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.is_over = False
        self.environment = os.environ | {"OMP_NUM_THREADS": str(max(1, available_cores() // jobs))}

    def run(self, runs: list[Run], sizes: list[float], what: str, tell: Callable) -> list[tuple[str, str]]:
        """How each ended, and why: finished, diverged, failed or stopped. When a signal comes, all under way save and stop.
        sizes: of the runs, for the bar. tell(i, ended) -> a line to print when it has."""
        with ThreadPoolExecutor(self.jobs) as pool, tqdm(
                total=sum(sizes), desc=what, unit="run", dynamic_ncols=True, smoothing=0,
                mininterval=0.2 if sys.stderr.isatty() else 30) as bar:
            futures = {pool.submit(self.run_one, run): i for i, run in enumerate(runs)}
            waiting, passed_on = set(futures), None
            try:
                while waiting:
                    ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in ended:
                        bar.update(sizes[futures[future]])
                        if future.result()[0] != "stopped":
                            tqdm.write(tell(futures[future], future.result()))
                    if self.stop.signal != passed_on:
                        passed_on = self.stop.signal
                        self.end(signal.SIGTERM)
            finally:  # a full disk, or a second Ctrl-C: nothing goes on unseen
                self.is_over = True
                if waiting:
                    self.end(signal.SIGTERM)
                    _, waiting = wait(waiting, timeout=GRACE)
                    if waiting and os.name == "posix":
                        self.end(signal.SIGKILL)
        return [future.result() for future in futures]

    def end(self, number: int):
        """Sends a signal to every process under way. On Windows a console's Ctrl-C has reached them already, and nothing
        else lets them save."""
        with self.lock:
            for process in self.processes if os.name == "posix" or self.is_over else ():
                process.send_signal(number)

    def run_one(self, run: Run) -> tuple[str, str]:
        if ended := run.ended_before():
            return ended
        resumes = run.checkpoint.exists()
        flags = ["--resume_checkpoint"] if resumes else [*run.flags, "--overwrite"]
        with self.lock:
            if self.stop.signal or self.is_over:
                return "stopped", ""
            process = subprocess.Popen(
                [sys.executable, str(run.script), f"--{run.out}={run.checkpoint}", *flags, "--verbose=0"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=self.environment,
                start_new_session=True)  # a terminal's Ctrl-C comes to this process alone, which passes it on
            self.processes.add(process)
        _, error = process.communicate()
        with self.lock:
            self.processes.discard(process)
        reason = reason_of(error, run.script.name)
        if process.returncode == 0:
            if not run.is_whole():
                run.forget()
                return "failed", "its last rows were lost"
            run.remember("finished", "")
            return "finished", ""
        if self.stop.signal or self.is_over:
            return "stopped", reason
        if self.diverged in reason:
            run.remember("diverged", reason)
            return "diverged", reason
        if process.returncode == 2 and resumes:  # what cannot be read would fail for ever
            run.forget()
        return "failed", f"killed by signal {-process.returncode}" if process.returncode < 0 else reason


def reason_of(error: str, script: str) -> str:
    """The line that a command of ours ends with; warnings of what is taken down may come after it."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    said = [line.removeprefix(f"{script}: ") for line in lines if line.startswith(f"{script}: ")]
    return " ".join((said or lines or ["it said nothing"])[-1].split())
