"""The cells of `compare.py --script=adapt`: processes of adapt.py, each reading the same documents with one model of an arm.

compare.py builds the arms and calls `run_adaptation`; what the results say is experiments/adaptation_comparison.py.
"""
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from experiments.adaptation import bits_per_byte
from experiments.cluster import Cluster
from experiments.runner import FINAL_STATUSES, JobResult, flag_texts
from experiments.stages import ComparisonBar, readable_name, run_stage
from runtime.files import atomic_write
from runtime.signals import StopSignals

MAX_MORE_RATES = 3    # tried beyond the lowest or highest of --rates
SUMMARY_KEYS = {"hop", "rate", "n_trained", "flops", "stride", "extra_bytes", "rows"}  # of adaptation.json

# -- arms and cells ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class AdaptArm:
    """An architecture, as one or more models trained with different seeds, and how it adapts. flags: of adapt.py. base_rate:
    the learning rate that multiples refer to. flops_per_token: for comparing what cells cost."""
    name: str
    text: str                     # as given with --arms
    checkpoints: dict[int, Path]  # seed -> model
    digests: dict[int, str]       # seed -> hex digits of that file
    flags: dict
    base_rate: float
    n_parameters: int
    block_size: int
    tokenizer: str
    flops_per_token: int

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.checkpoints)


@dataclass(frozen=True)
class AdaptJob:
    """A run of adapt.py, with its rows, page and adaptation.json in `folder`. It continues by itself."""
    script: Path
    folder: Path
    flags: tuple[str, ...]

    def command(self) -> list[str]:
        return [sys.executable, str(self.script), f"--out_path={self.folder}", *self.flags, "--overwrite"]

    def files(self) -> list[Path]:
        return [self.folder]

    def summary(self) -> dict | None:
        """adaptation.json; None where it is missing or damaged."""
        summary = read_json(self.folder / "adaptation.json")
        return summary if summary.keys() >= SUMMARY_KEYS and summary["rows"] else None

    def n_read(self) -> int:
        """Documents that have been read."""
        with suppress(OSError):
            return (self.folder / "documents.jsonl").read_bytes().count(b"\n")
        return 0

    def previous_result(self) -> JobResult | None:
        if self.summary():
            return JobResult("finished")
        saved = read_json(self.folder / "result.json")
        return JobResult("diverged", str(saved.get("reason"))) if saved.get("status") == "diverged" else None

    def complete(self, result: JobResult) -> JobResult:
        if result.status == "bad input":
            return JobResult("failed", result.reason)
        if result.status == "finished" and not self.summary():
            return JobResult("failed", "its adaptation.json is missing")
        if result.status == "diverged":
            with atomic_write(self.folder / "result.json", "w") as file:
                json.dump({"status": result.status, "reason": result.reason}, file, indent=1)
        return result


def read_json(path: Path) -> dict:
    """{} where the file is missing or holds something else."""
    if os.path.isfile(path):
        with suppress(ValueError, RecursionError):
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


@dataclass(frozen=True)
class AdaptCell:
    """What one model of an arm reads: in stage "rates" a few documents, to choose the learning rate, in stage "runs" those
    that count. cost: how long it takes, relative to other cells."""
    arm: AdaptArm
    stage: str
    multiple: float
    seed: int
    n_documents: int
    job: AdaptJob
    cost: float

    def progress(self) -> float:
        """The part of it that has run, 0 to 1."""
        return min(1.0, self.job.n_read() / self.n_documents)


def gain(row: dict) -> float:
    """Bits per byte static minus adapted of a document: positive is better."""
    return bits_per_byte(row, "static") - bits_per_byte(row, "adapted")


class AdaptResult(NamedTuple):
    """How a cell ended (status and reason as in runner.JobResult), and its adaptation.json if it finished."""
    cell: AdaptCell
    status: str
    reason: str
    summary: dict | None

    @classmethod
    def from_job(cls, cell: AdaptCell, ended: JobResult) -> "AdaptResult":
        return cls(cell, ended.status, ended.reason, cell.job.summary() if ended.status == "finished" else None)

    def rows(self) -> dict[str, dict]:
        """text_digest -> row of each document that was read to its end."""
        return {row["text_digest"]: row for row in self.summary["rows"] if "diverged" not in row}

    def n_diverged(self) -> int:
        return sum("diverged" in row for row in self.summary["rows"])

    def mean_gain(self) -> float:
        """Bits per byte static minus adapted."""
        return statistics.mean(map(gain, self.rows().values()))

    def describe(self) -> str:
        cell = self.cell
        which = f"{cell.arm.name}, adapt_rate x {cell.multiple:g}, seed {cell.seed}"
        which += " (choosing the rate)" * (cell.stage == "rates")
        if self.status != "finished":
            return f"{which}: {self.status}: {self.reason}"
        diverged = f", {self.n_diverged()} of {len(self.summary['rows'])} documents diverged" * bool(self.n_diverged())
        return f"{which}: gain {self.mean_gain():+.4f} bits/byte{diverged}"


@dataclass(eq=False)
class AdaptResults:
    """All results of an arm. rates: empty where only one multiple is tried."""
    arm: AdaptArm
    rates: list[AdaptResult] = field(default_factory=list)
    runs: list[AdaptResult] = field(default_factory=list)

    def best_multiple(self) -> float | None:
        """The one with the fewest documents that diverged, and of these the largest mean gain. None while a cell has to be
        run again, or when all have diverged."""
        if any(result.status not in FINAL_STATUSES for result in self.rates):
            return None
        finished = [result for result in self.rates if result.summary]
        best = min(finished, key=lambda result: (result.n_diverged(), -result.mean_gain()), default=None)
        return best and best.cell.multiple

    def next_multiple(self, n_given: int) -> float | None:
        """The multiple to try next where the best is the lowest or highest tried: as far beyond it as its neighbour is on
        the other side. None elsewhere, and when MAX_MORE_RATES were tried besides the `n_given` first."""
        tried, best = sorted(result.cell.multiple for result in self.rates), self.best_multiple()
        if best is None or len(tried) < 2 or len(tried) >= n_given + MAX_MORE_RATES:
            return None
        neighbour = {tried[0]: tried[1], tried[-1]: tried[-2]}.get(best)
        return neighbour and best * best / neighbour

    def finished(self) -> dict[int, AdaptResult]:
        """seed -> its finished run."""
        return {run.cell.seed: run for run in self.runs if run.summary}

    def results(self) -> list[AdaptResult]:
        return self.rates + self.runs

    def problems(self) -> list[str]:
        """Cells that did not finish, and documents that were left out."""
        return [result.describe() for result in self.results() if not result.summary or result.n_diverged()]


class DocumentSize(NamedTuple):
    """text_digest: hex digits of a text. n_tokens: that are read of it."""
    text_digest: str
    n_tokens: int


@dataclass(frozen=True)
class AdaptDocuments:
    """The documents of a comparison. of_arm: name of an arm -> first those that count, then those on which the learning
    rate is chosen. n_counted, n_rates: how many of either."""
    of_arm: dict[str, list[DocumentSize]]
    n_counted: int
    n_rates: int

    def select(self, arm: AdaptArm, stage: str) -> list[DocumentSize]:
        return self.of_arm[arm.name][:self.n_counted] if stage == "runs" else self.of_arm[arm.name][self.n_counted:]

    def digest(self) -> str:
        """16 hex digits of the texts."""
        texts = [document.text_digest for documents in self.of_arm.values() for document in documents]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class AdaptStudy:
    """What all cells of a comparison have in common. folder: of their folders. rates: multiples to try. environment: what
    their numbers depend on besides models, flags and documents. jobs: how many run at a time. cluster: None for this
    machine."""
    script: Path
    folder: Path
    documents: AdaptDocuments
    rates: tuple[float, ...]
    environment: str
    jobs: int
    cluster: Cluster | None = None


# -- running them -----------------------------------------------------------------------------------------------------

def make_cell(arm: AdaptArm, study: AdaptStudy, stage: str, multiple: float, seed: int) -> AdaptCell:
    """stage: "rates" or "runs", see AdaptCell."""
    is_run, documents = stage == "runs", study.documents
    skip, limit = (0, documents.n_counted) if is_run else (documents.n_counted, documents.n_rates)
    values = arm.flags | {"adapt_rate": arm.base_rate * multiple, "skip": skip, "limit": limit, "controls": is_run}
    inputs = [arm.digests[seed], study.environment, *(document.text_digest for document in documents.select(arm, stage)),
              *flag_texts({name: value for name, value in values.items() if name != "dataset"})]
    digest = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:10]
    folder = study.folder / f"{readable_name(arm.name)}-{stage}-{multiple:g}-{seed}-{digest}"
    job = AdaptJob(study.script, folder, flag_texts(values | {"checkpoint_path": arm.checkpoints[seed]}))
    controls = 2.0 if is_run else 1.0  # which take about as long as the rest
    return AdaptCell(arm, stage, multiple, seed, limit, job, limit * arm.flops_per_token * controls)


def run_adaptation(arms: list[AdaptArm], study: AdaptStudy, stop: StopSignals) -> list[AdaptResults]:
    """Tries every arm's learning rates with its first model, further ones while the lowest or highest is the best, then
    reads the documents that count with each of its models at the best."""
    all_results = [AdaptResults(arm) for arm in arms]
    cost = lambda arm, stage: make_cell(arm, study, stage, 1.0, arm.seeds[0]).cost
    n_given = len(study.rates) if study.documents.n_rates else 0
    n_rates = lambda results: max(len(results.rates), n_given)
    bar = ComparisonBar(lambda: sum(n_rates(results) * cost(results.arm, "rates") + len(results.arm.seeds) * cost(
        results.arm, "runs") for results in all_results))

    def run(stage: str, selected: list[AdaptResults], multiples: Callable, seeds: Callable) -> list[list[AdaptResult]]:
        cells = [[make_cell(results.arm, study, stage, multiple, seed) for multiple in multiples(results)
                  for seed in seeds(results.arm)] for results in selected]
        return run_stage(stage, cells, study.jobs, stop, bar, AdaptResult.from_job, study.cluster)
    with closing(bar.bar):
        searching, multiples = all_results if n_given else [], lambda _: study.rates
        while searching and not stop.signal:
            for results, tried in zip(searching, run("rates", searching, multiples, lambda arm: arm.seeds[:1])):
                results.rates += tried
            multiples = lambda results: [results.next_multiple(n_given)]
            searching = [results for results in all_results if results.next_multiple(n_given)]
        best = lambda results: [results.best_multiple() if results.rates else study.rates[0]]
        able = [results for results in all_results if best(results) != [None]]
        for results, runs in zip(able, run("runs", able, best, lambda arm: arm.seeds)):
            results.runs = runs
    return all_results
