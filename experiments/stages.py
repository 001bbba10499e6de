"""Runs the cells of a comparison, stage by stage, with one progress bar over all of them."""
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from experiments.cluster import Cluster, open_runner
from experiments.runner import Job, JobResult
from runtime.cli import progress_bar
from runtime.signals import StopSignals


class FolderJob(Job, Protocol):
    """A job whose files are in a folder of its own."""
    folder: Path


class CellLike(Protocol):
    """One run of an arm. cost: how long it takes, relative to other cells."""
    job: FolderJob
    cost: float

    def progress(self) -> float:
        """The part of it that has run, 0 to 1."""


def readable_name(text: str) -> str:
    """`text` as a part of a file's name, which may have up to 255 bytes in all."""
    return re.sub(r"[^a-zA-Z0-9=.-]", "_", text)[:80]


class ComparisonBar:
    """One bar over all cells, weighted by what each costs, with the time that remains. That is an estimate until the search
    for the learning rate is over. expected_cost(): of all cells, those that have run included."""

    def __init__(self, expected_cost: Callable[[], float]):
        self.expected_cost, self.costs, self.checked = expected_cost, {}, 0.0
        self.bar = progress_bar(desc="starting", miniters=0, smoothing=0, bar_format="{desc} {percentage:3.0f}%|{bar}| "
                                "{elapsed} passed, about {remaining} left")

    def add(self, cell: CellLike, ended: JobResult):
        """Counts a cell that has ended; one of an earlier run of the command says nothing about speed."""
        if ended.is_earlier and cell.job.folder not in self.costs:
            self.bar.initial += cell.cost
        self.costs[cell.job.folder] = cell.cost
        self.show(0.0)

    def refresh(self, cells: list[CellLike]):
        """cells: of this stage; those that run count in part."""
        if time.monotonic() > self.checked + 2:  # reading their metrics takes a moment
            self.checked = time.monotonic()
            self.show(sum(cell.cost * cell.progress() for cell in cells if cell.job.folder not in self.costs))

    def show(self, running: float):
        """running: the cost so far of the cells that run."""
        done = sum(self.costs.values())
        self.bar.total = max(self.expected_cost(), done)
        self.bar.set_description_str(f"{len(self.costs)} cell{'s' * (len(self.costs) != 1)} done", refresh=False)
        self.bar.update(max(0.0, done + running - self.bar.n))


def run_stage(stage: str, cells: list[list], jobs: int, stop: StopSignals, bar: ComparisonBar,
              make_result: Callable, cluster: Cluster | None = None) -> list[list]:
    """The results of `cells`, a list per arm, which take turns: the first cell of each arm, then the second of each.
    make_result(cell, how it ended): what a result is. cluster: None for processes of this machine."""
    if stop.signal:
        return [[] for _ in cells]
    order = [cell for turn in itertools.zip_longest(*cells) for cell in turn if cell is not None]

    def on_end(i: int, ended: JobResult):
        bar.add(order[i], ended)
        tqdm.write(make_result(order[i], ended).describe())
    all_ended = open_runner(jobs, stop, cluster).run(
        [cell.job for cell in order], stage, on_end, lambda: bar.refresh(order))
    results = {cell.job.folder: make_result(cell, ended) for cell, ended in zip(order, all_ended)}
    return [[results[cell.job.folder] for cell in own] for own in cells]
