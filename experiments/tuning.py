"""Runs the cells of arms that are trained: the search for each one's learning rate, its seeds, the timing of its steps."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from experiments.analysis import Arm, ArmResults, Cell, CellResult
from experiments.cluster import Cluster
from experiments.runner import JobResult
from experiments.stages import ComparisonBar, run_stage
from runtime.signals import StopSignals


@dataclass(frozen=True)
class ArmRunner:
    """Runs cells, whose arms take turns, and adds their results to those of the arms. make_cell(arm, stage, multiple of its
    base_lr, seed): see Cell. jobs: runs at a time, but for those that measure speed. cluster: None for this machine."""
    make_cell: Callable[[Arm, str, float, int], Cell]
    jobs: int
    stop: StopSignals
    bar: ComparisonBar
    cluster: Cluster | None = None

    def run(self, stage: str, selected: list[ArmResults], multiples: Callable[[ArmResults], Iterable[float]],
            seeds: Callable[[ArmResults], Iterable[int]]) -> list[list[CellResult]]:
        """The results of one stage, a list for each arm."""
        cells = [[self.make_cell(results.arm, stage, multiple, seed) for multiple in multiples(results)
                  for seed in seeds(results)] for results in selected]
        return run_stage(stage, cells, 1 if stage == "speed" else self.jobs, self.stop, self.bar, cell_result,
                         self.cluster)

    def tune(self, selected: list[ArmResults], rates: tuple[float, ...]):
        """The grid of learning rates on a part of the budget, unless an arm has that of smaller budgets; then lower rates on
        the whole budget while they improve."""
        new, first_seed = [results for results in selected if not results.grid], lambda results: results.arm.seeds[:1]
        for results, grid in zip(new, self.run("lr_grid", new, lambda _: rates, first_seed)):
            results.grid = grid
        while not self.stop.signal and (searching := [results for results in selected if results.next_lr_multiple()]):
            multiple = lambda results: [results.next_lr_multiple()]
            for results, runs in zip(searching, self.run("run", searching, multiple, first_seed)):
                results.full_budget_lr_runs += runs

    def run_seeds(self, selected: list[ArmResults]):
        """Every seed on the whole budget, of arms with a best learning rate."""
        tuned = [results for results in selected if results.best()]
        for results, runs in zip(tuned, self.run("run", tuned, best_multiple, lambda results: results.arm.seeds)):
            results.runs = runs

    def measure_speed(self, selected: list[ArmResults], n_rounds: int):
        """Of arms with a finished run; one with several budgets, or epochs, has one speed."""
        trained = {(results.arm.name, results.arm.size): results for results in reversed(selected) if results.finished()}
        timed = list(reversed(trained.values()))
        speeds = dict(zip(timed, self.run("speed", timed, best_multiple, lambda _: range(n_rounds))))
        for results in selected:
            if results.finished():
                results.speeds = speeds[trained[results.arm.name, results.arm.size]]


def best_multiple(results: ArmResults) -> list[float]:
    return [results.best().cell.lr_multiple]


def cell_result(cell: Cell, ended: JobResult) -> CellResult:
    return CellResult(cell, ended.status, ended.reason, cell.job.rows())
