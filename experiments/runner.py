"""Runs many jobs, each a process, a few at a time.

A job that finished before is not run again. The first Ctrl-C lets running jobs save and exit, so that the same command
continues; after a second one nothing keeps running. How a job ended is read from its exit code (runtime/cli.py).

    with StopSignals() as stop:
        results = Runner(n_parallel=2, stop=stop).run(jobs, "runs", on_end=lambda i, result: print(jobs[i], result.status))
"""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from runtime.checkpoint import run_folder
from runtime.cli import BAD_INPUT, DIVERGED, progress_bar
from runtime.config import BadInput, shorten
from runtime.files import atomic_write, check_writable, explain_write_failure, folder_lock
from runtime.metrics import read_rows
from runtime.signals import StopSignals
from runtime.threads import available_cores

FINAL_STATUSES = "finished", "diverged"  # a job that failed or was killed runs again when the command is given again
GRACE = 30  # seconds that a process has to save and exit


@dataclass(frozen=True)
class JobResult:
    """How a job ended: finished, diverged, bad input, failed, killed or stopped. reason: one human-readable line.
    is_earlier: it ended in an earlier run of the command."""
    status: str
    reason: str = ""
    is_earlier: bool = field(default=False, compare=False)


class Job(Protocol):
    """A process of `script`, and what its exit means."""
    script: Path

    def previous_result(self) -> JobResult | None:
        """How it ended in an earlier run of the command; None when it has to be run."""

    def command(self) -> list[str]:
        """Its command line."""

    def files(self) -> list[Path]:
        """Files and folders that its process writes, and reads again when it goes on: what travels to another machine. Files
        that refer to others come before those: a checkpoint before metrics, a manifest before shards."""

    def complete(self, result: JobResult) -> JobResult:
        """Called when the process has exited; keeps what has to be kept, and returns the final result."""


class Runner:
    """Runs `n_parallel` jobs at a time, which share the cores: each gets OMP_NUM_THREADS accordingly, or what it is already
    if that is less."""

    def __init__(self, n_parallel: int, stop: StopSignals):
        self.n_parallel, self.stop = n_parallel, stop
        self.processes: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.is_over = False
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads_of_job(n_parallel))}

    def run(self, jobs: list[Job], desc: str, on_end: Callable[[int, JobResult], None],
            on_wait: Callable[[], None] | None = None) -> list[JobResult]:
        """The results of `jobs`, in their order; those that a signal stopped, or that have not started then, are "stopped".

        on_end(i, result): called when jobs[i] has ended, unless it was stopped. on_wait(): called about twice a second, for
        a caller that has a progress bar of its own; else there is one that counts jobs.
        """
        with ThreadPoolExecutor(self.n_parallel) as pool, progress_bar(
                total=len(jobs), desc=desc, unit="run", smoothing=0, disable=on_wait is not None) as bar:
            futures = {pool.submit(self.run_job, job): i for i, job in enumerate(jobs)}
            running, forwarded = set(futures), None
            try:
                while running:
                    ended, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in ended:
                        if future.result().status != "stopped":
                            bar.update()
                            on_end(futures[future], future.result())
                    if on_wait:
                        on_wait()
                    if self.stop.signal != forwarded:
                        forwarded = self.stop.signal
                        self.send_signal(signal.SIGTERM)
            finally:  # also after an error or a second Ctrl-C: no process outlives this one
                self.is_over = True
                self.end_all(running)
        return [future.result() for future in futures]

    def end_all(self, running: set):
        if running:
            self.send_signal(signal.SIGTERM)
            try:
                _, running = wait(running, timeout=GRACE)
            finally:
                if running and os.name == "posix":
                    self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int):
        """To every running process. On Windows a console's Ctrl-C has reached them already, and no other signal would let
        them save."""
        with self.lock:
            for process in self.processes if os.name == "posix" or self.is_over else ():
                process.send_signal(number)

    def run_job(self, job: Job) -> JobResult:
        if result := job.previous_result():
            return replace(result, is_earlier=True)
        with self.lock:
            if self.stop.signal or self.is_over:
                return JobResult("stopped")
            process = self.start(job)
            self.processes.add(process)
        _, stderr = process.communicate()
        with self.lock:
            self.processes.discard(process)
        if process.returncode and (self.stop.signal or self.is_over):
            return JobResult("stopped")
        return job.complete(interpret_exit(process.returncode, error_line(stderr, job.script)))

    def start(self, job: Job) -> subprocess.Popen:
        """Its process; experiments/cluster.py has one on another machine, with the same three methods and attributes."""
        return subprocess.Popen(
            job.command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
            env=self.environment, start_new_session=True)  # a terminal's Ctrl-C reaches this process, which forwards it


def threads_of_job(n_parallel: int) -> int:
    """Threads of a CPU that each of `n_parallel` jobs at a time gets, at most OMP_NUM_THREADS where that is given."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(available_cores() // n_parallel, int(given) if given.isdigit() else available_cores()))


def interpret_exit(code: int, reason: str) -> JobResult:
    """What the exit code of one of our commands means, see runtime/cli.py."""
    if code == 0:
        return JobResult("finished")
    if code < 0:
        return JobResult("killed", f"by signal {-code}")
    return JobResult({DIVERGED: "diverged", BAD_INPUT: "bad input"}.get(code, "failed"), reason)


def error_line(stderr: str, script: Path) -> str:
    """The line that one of our commands ends with; warnings of the interpreter's shutdown may follow it."""
    lines, prefix = [line for line in stderr.splitlines() if line.strip()], f"{script.name}: "
    own = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    return " ".join((own or lines or ["printed nothing on stderr"])[-1].split())


def save_plan(out_path: Path, plan: dict, overwrite: bool, what: str, results: Sequence[Path] = ()):
    """Writes plan.json, which says what the results in `out_path` belong to: "a comparison" or what else. results: files
    that only one plan may add to; those of another are deleted. Raises BadInput when there is another plan and it may not be
    replaced, or when there are `results` and no plan that can be read."""
    path, before, results = out_path / "plan.json", None, [result for result in results if result.exists()]
    check_writable(path, f"--out_path={out_path}")
    if path.exists():
        with suppress(ValueError, RecursionError):  # damaged
            found = json.loads(path.read_text(encoding="utf-8"))
            before = found if isinstance(found, dict) else None
    different = [name for name in {**before, **plan} if before.get(name) != plan.get(name)] if before is not None else []
    if before is None and results and not overwrite:
        raise BadInput(f"--out_path={out_path}: holds {results[0].name}, but no plan.json that says what it belongs to: "
                       f"choose another path, or replace it with --overwrite")
    if different and not overwrite:
        raise BadInput(f"--out_path={out_path}: holds {what} that differs in {shorten(different[0])}: choose another path, "
                       f"or replace its results with --overwrite (identical runs are kept)")
    if different or before is None:
        for result in results:
            with explain_write_failure(result):
                result.unlink()
    with atomic_write(path, "w") as file:
        json.dump(plan, file, indent=1)


@dataclass
class TrainingJob:
    """A run of a script that trains: it writes `checkpoint`, and its metrics into the folder of that name. out_flag: the
    flag that names the checkpoint. outcome: what the last row of its metrics has, besides what every row has. keeps_model:
    whether the checkpoint stays when it has finished. resumed: whether the latest `command` continues that checkpoint."""
    script: Path
    checkpoint: Path
    flags: tuple[str, ...]
    out_flag: str = "checkpoint_path"
    outcome: tuple[str, ...] = ("val_loss", "val_bpb")
    keeps_model: bool = False
    resumed: bool = False

    @property
    def folder(self) -> Path:
        return run_folder(self.checkpoint)

    def rows(self) -> list[dict]:
        return read_rows(self.folder / "metrics.jsonl")

    def command(self) -> list[str]:
        self.resumed = self.checkpoint.exists()
        flags = ["--resume_checkpoint"] if self.resumed else [*self.flags, "--overwrite"]
        return [sys.executable, str(self.script), f"--{self.out_flag}={self.checkpoint}", *flags, "--verbose=0"]

    def files(self) -> list[Path]:
        return [self.checkpoint, self.folder]

    def previous_result(self) -> JobResult | None:
        path = self.folder / "result.json"
        if not os.path.isfile(path):
            return None
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # truncated by a crash, or damaged
            saved = json.loads(path.read_text(encoding="utf-8"))
            result = JobResult(saved["status"], saved["reason"])
            if result.status in FINAL_STATUSES and isinstance(result.reason, str) and \
                    saved["flags"] == list(self.flags) and saved.get("metrics", digest := self.rows_digest()) == digest and (
                    result.status != "finished" or self.is_complete()):
                return result
        self.delete()
        return None

    def complete(self, result: JobResult) -> JobResult:
        if result.status == "bad input":
            if self.resumed:  # a checkpoint that cannot be read would fail forever
                with suppress(BadInput), folder_lock(self.folder, str(self.folder)):  # unless it is another process's
                    self.delete()
            return JobResult("failed", result.reason)
        if result.status == "finished" and not self.is_complete():
            self.delete()
            return JobResult("failed", "its last metrics are missing")
        if result.status in FINAL_STATUSES:
            self.save_result(result)
        return result

    def is_complete(self) -> bool:
        """Whether the metrics hold what experiments/analysis.py reads: a power cut may lose rows that the checkpoint
        survives."""
        rows = self.rows()
        return bool(rows) and all({"tokens", "seconds", "flops"} <= row.keys() for row in rows) and \
            {*self.outcome} <= rows[-1].keys() and all(
                rows[-1].get(name, 0) > 0 for name in ("tokens", "seconds", "tok_per_sec"))

    def rows_digest(self) -> str:
        """16 hex digits of metrics.jsonl: what was a result stays that result."""
        path = self.folder / "metrics.jsonl"
        return hashlib.sha256(path.read_bytes() if os.path.isfile(path) else b"").hexdigest()[:16]

    def save_result(self, result: JobResult):
        """Writes result.json, and deletes the checkpoints that nothing needs any more."""
        with atomic_write(self.folder / "result.json", "w") as file:
            json.dump({"status": result.status, "reason": result.reason, "flags": self.flags,
                       "metrics": self.rows_digest()}, file, indent=1)
        unneeded = *self.folder.glob("*.pt"), *self.folder.glob("events.*")
        for path in unneeded if self.keeps_model else (self.checkpoint, *unneeded):
            path.unlink(missing_ok=True)

    def delete(self):
        """Deletes its files: the next run starts from step 0."""
        self.checkpoint.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def flag_texts(values: dict) -> tuple[str, ...]:
    """{"bias": True, "mlp": "gelu", "n_hidden": None} -> ("--bias=1", "--mlp=gelu"), sorted."""
    return tuple(f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in sorted(values.items())
                 if value is not None)
