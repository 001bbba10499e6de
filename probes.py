"""What an architecture can learn to compute: small models trained on synthetic tasks whose answers are known.

    python probes.py --arms "mixer=attention" "mlp=swiglu" --out_path=studies/probes

trains every arm on every task from several seeds, and tests it at one, two and four times the length it was trained at. An
arm, a task and a seed make a cell: a process of this script, which writes its row into the folder `cells` of --out_path and
is not trained again. Writes probes.md, probes.csv, probes.png and probes.svg.
"""
import dataclasses
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from budget import LOOPS
from compare import parse_arm, query_device
from dataloader import IGNORE_INDEX
from experiments.code_hash import code_hash
from experiments.probe_report import ProbeStudy, write_probe_report
from experiments.runner import JobResult, Runner, flag_texts
from model import GPT, GPTConfig
from optimizer import OptimizerConfig
from runtime.cli import (
    command,
    command_line,
    explain_failures,
    ignore_output_errors,
    log_line,
    parse_flags,
    progress_bar,
)
from runtime.config import BadInput, check_flags, flag, flag_names, read_flags, redeclare
from runtime.device import DeviceConfig, Machine, open_machine, seed_everything
from runtime.files import atomic_write, check_writable, folder_lock
from runtime.forecast import format_seconds
from runtime.metrics import is_finite_number
from runtime.signals import StopSignals
from runtime.threads import available_cores
from tasks.synthetic import TASKS, Task
from trainer import Evaluation, LoopConfig, TrainSetup, TrainState, fit, init_state, next_token_loss, train_step

SCRIPT = Path(__file__)
EVAL_EXAMPLES = 256    # of an evaluation; always the same, whatever the arm and the seed
SCALES = 1, 2, 4       # evaluated lengths, as multiples of the trained one
SOLVED_ACCURACY = 0.99
TIMED_STEPS = 3        # of a forecast
COOLDOWN_FRAC = 0.2    # last fraction of a cell's steps, in which the learning rate falls to zero


# -- flags and cells --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ProbeConfig:
    """The probes."""
    arms: tuple[str, ...] = flag(("mixer=attention",), "architectures, each some flags of train.py separated by commas: "
                                                       "\"mlp=relu2,n_layer=4\"")
    tasks: tuple[str, ...] = flag(tuple(TASKS), "what to train them on", choices=tuple(TASKS))
    seeds: int = flag(3, "cells per arm and task, which differ in weights and data", at_least=1, at_most=1000)
    jobs: int = flag(1, "cells trained at a time, each in a process with one thread", at_least=1, at_most=1000)
    out_path: Path = flag(Path("studies/probes"), "folder to write; cells that are finished there are kept")
    dry_run: bool = flag(False, "print the forecast, and do nothing")
    cell: int = flag(None, "internal: train only the cell of --arms, --tasks and this seed, in this process", at_least=0)
    __post_init__ = check_flags


@dataclass(frozen=True)
class CellConfig:
    """What all cells have in common, except where an arm sets it."""
    n_layer: int = redeclare(GPTConfig, "n_layer", 2)
    n_head: int = redeclare(GPTConfig, "n_head", 4)
    head_size: int = redeclare(GPTConfig, "head_size", 16)
    batch_size: int = flag(32, "examples in a batch", at_least=1, at_most=1_000_000)
    max_iter: int = flag(1200, "optimizer steps after which an unsolved task is given up", at_least=2, scope="shared")
    val_intervals: int = flag(50, "steps between evaluations", at_least=1, scope="shared")
    learning_rate: float = flag(0.02, "peak learning rate, see train.py", above=0)
    weight_decay: float = flag(0.1, "weight decay of the matrices; each step multiplies it by the learning rate", at_least=0)
    grad_clip: float = redeclare(LoopConfig, "grad_clip", 1.0)
    device: str = redeclare(DeviceConfig, "device", "cpu")
    dtype: str = redeclare(DeviceConfig, "dtype", "fp32", scope="shared")
    __post_init__ = check_flags


CELL_DEFAULTS = {"num_batch_accum": 1, "warmup_iter": 20}  # of flags that an arm may set, but probes.py does not have


def fixed_flags(task: Task, common: CellConfig) -> dict:
    """The flags of a cell that no arm can set."""
    return {"vocab_size": task.vocab_size, "block_size": max(SCALES) * task.length, "schedule": "linear",
            "cooldown_frac": 0.0,  # until the task is solved, see train_cell
            "log_intervals": common.val_intervals, "verbose": False}


@dataclass(frozen=True, eq=False)
class ProbeCell:
    """One arm on one task from one seed. flags: all of its model, optimizer, loop and device that are not the default."""
    arm: str
    task: str
    seed: int
    flags: dict

    def configs(self) -> tuple[GPTConfig, OptimizerConfig, LoopConfig, DeviceConfig]:
        """Raises BadInput."""
        return tuple(read_flags(config, self.flags) for config in (GPTConfig, OptimizerConfig, LoopConfig, DeviceConfig))

    def name(self, code: str) -> str:
        """Of its file: readable, with a digest of what its numbers depend on. code: hash of the source."""
        inputs = json.dumps([code, self.arm, self.task, self.seed, self.flags], sort_keys=True)
        readable = re.sub(r"[^a-zA-Z0-9_.=-]+", "_", f"{self.task}-{self.seed}-{self.arm}")[:80]
        return f"{readable}-{hashlib.sha256(inputs.encode()).hexdigest()[:10]}"


def build_cells(probe: ProbeConfig, common: CellConfig) -> list[ProbeCell]:
    """All cells, seed by seed; with --cell only that seed's. Raises BadInput where an arm cannot be trained."""
    seeds = range(probe.seeds) if probe.cell is None else [probe.cell]
    arms = {arm: parse_probe_arm(arm, common) for arm in dict.fromkeys(probe.arms)}
    cells = [ProbeCell(arm, task, seed, CELL_DEFAULTS | vars(common) | values | fixed_flags(TASKS[task], common))
             for seed in seeds for task in dict.fromkeys(probe.tasks) for arm, values in arms.items()]
    for cell in cells:
        try:
            cell.configs()
        except BadInput as error:
            raise BadInput(f"--arms {cell.arm!r}: {error}") from None
    return cells


def parse_probe_arm(text: str, common: CellConfig) -> dict:
    """The flags that an arm sets. Raises BadInput."""
    values = parse_arm(text, "--arms")
    allowed = flag_names(GPTConfig, OptimizerConfig, LoopConfig, CellConfig, scope="arm")
    allowed -= fixed_flags(next(iter(TASKS.values())), common).keys()
    if not_allowed := values.keys() - allowed:
        raise BadInput(f"--arms {text!r}: {min(not_allowed)} cannot be set by an arm of probes.py: leave it out")
    if values.get("batch_size") == "auto":
        raise BadInput(f"--arms {text!r}: batch_size=auto: give a number")
    return values


def is_looped(cell: ProbeCell) -> bool:
    return cell.flags.get("loops", 1) > 1


# -- training a cell --------------------------------------------------------------------------------------------------

class ExampleLoader:
    """Endless random batches of a task at its trained length: inputs and targets, each int64 (batch_size, length)."""

    def __init__(self, task: Task, batch_size: int, seed: int):
        self.task, self.batch_size = task, batch_size
        self.rng = np.random.default_rng([1, seed])  # evaluations start from 0

    def next_batch(self, model: GPT) -> tuple[Tensor, Tensor]:
        inputs, targets = self.task.generate(self.rng, self.batch_size, self.task.length)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


@torch.no_grad()
def evaluate_task(model: GPT, task: Task, machine: Machine, scale: int, batch_size: int) -> tuple[float, float]:
    """Loss in nats per answer and accuracy on the fixed examples, `scale` times as long as the trained ones."""
    batch = task.generate(np.random.default_rng([0, scale]), EVAL_EXAMPLES, scale * task.length)
    inputs, targets = map(torch.from_numpy, batch)
    nats, n_correct = 0.0, 0
    for idx, target in zip(inputs.split(batch_size), targets.split(batch_size)):
        idx, target = machine.to_device((idx, target))
        with machine.autocast():
            logits = model.eager_forward(idx).float()
        nats += F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum").item()
        n_correct += (logits.argmax(-1) == target).sum().item()
    n_answers = (targets != IGNORE_INDEX).sum().item()
    return nats / n_answers, n_correct / n_answers


def open_cell(cell: ProbeCell) -> tuple[TrainState, TrainSetup, LoopConfig]:
    """Raises BadInput."""
    gpt, schedule, loop, device = cell.configs()
    machine, task, batch_size = open_machine(device), TASKS[cell.task], cell.flags["batch_size"]
    seed_everything(cell.seed)
    model = GPT(gpt).to(machine.device)
    setup = TrainSetup(machine, schedule, step_tokens=batch_size * loop.num_batch_accum * task.length)
    return init_state(model, ExampleLoader(task, batch_size, cell.seed), setup), setup, loop


def train_cell(state: TrainState, setup: TrainSetup, loop: LoopConfig, task: Task,
               batch_size: int) -> tuple[int | None, int | None]:
    """Trains at a constant learning rate until the task is solved, or for a fraction of 1 - COOLDOWN_FRAC of the steps, and
    then with a falling rate, for COOLDOWN_FRAC of all steps: the noise of a large rate is not part of what was learnt.

    Returns the step of the first evaluation that found the task solved, and the signal that stopped it, if any.
    """
    solved_at = []

    def evaluate(state: TrainState) -> dict:
        loss, accuracy = evaluate_task(state.model, task, setup.machine, 1, batch_size)
        if accuracy >= SOLVED_ACCURACY:
            solved_at.append(state.step)
        return {"val_loss": loss, "accuracy": accuracy}
    constant = dataclasses.replace(loop, max_iter=max(1, round((1 - COOLDOWN_FRAC) * loop.max_iter)))
    stopped = fit(state, constant, next_token_loss, Evaluation(evaluate), setup,
                  stop_when=lambda state, row: row["accuracy"] >= SOLVED_ACCURACY)
    if not stopped and state.step:
        setup = dataclasses.replace(setup, schedule=dataclasses.replace(setup.schedule, cooldown_frac=COOLDOWN_FRAC))
        falling = dataclasses.replace(loop, max_iter=max(state.step + 1, round(state.step / (1 - COOLDOWN_FRAC))))
        stopped = fit(state, falling, next_token_loss, Evaluation(evaluate), setup)
    return next(iter(solved_at), None), stopped


def run_cell(cell: ProbeCell, path: Path):
    """Trains and tests a cell, and writes its row to `path`. Raises FloatingPointError when it has diverged, which its row
    says too, and SystemExit when a signal stopped it."""
    torch.set_num_threads(1)  # models so small would only wait for a second one
    task, row, start = TASKS[cell.task], empty_row(cell), time.perf_counter()
    seconds = lambda: round(time.perf_counter() - start, 1)
    try:
        state, setup, loop = open_cell(cell)
        row["parameters"] = state.model.n_parameters()
        row["steps"], stopped = train_cell(state, setup, loop, task, cell.flags["batch_size"])
        if stopped:
            raise SystemExit(128 + stopped)
        for scale in SCALES:
            row[f"accuracy_{scale}x"] = evaluate_task(state.model, task, setup.machine, scale, cell.flags["batch_size"])[1]
        for loops in LOOPS if is_looped(cell) else ():
            state.model.loops = loops
            row[f"accuracy_{loops}_loops"] = evaluate_task(state.model, task, setup.machine, 1, cell.flags["batch_size"])[1]
    except FloatingPointError as error:
        write_cell_row(path, row | {"status": "diverged", "reason": str(error), "seconds": seconds()})
        raise
    row["solved"] = row["steps"] is not None
    write_cell_row(path, row | {"status": "solved" if row["solved"] else "unsolved", "seconds": seconds()})


# -- rows -------------------------------------------------------------------------------------------------------------

FINAL_CELL_STATUSES = "solved", "unsolved", "diverged"  # cells that failed or were killed are trained again


def empty_row(cell: ProbeCell) -> dict:
    """steps: at which it was found solved."""
    return {"arm": cell.arm, "task": cell.task, "seed": cell.seed, "status": "failed", "solved": False, "steps": None,
            **{f"accuracy_{scale}x": None for scale in SCALES}, "chance": TASKS[cell.task].chance, "parameters": None,
            "seconds": None, "reason": "", **{f"accuracy_{loops}_loops": None for loops in LOOPS}}


def read_cell_row(path: Path, cell: ProbeCell) -> dict | None:
    """The row of a finished cell; None if it is missing, damaged, or that of another one."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        if os.path.isfile(path):
            row = json.loads(path.read_text(encoding="utf-8"))
            checksum = row.pop("checksum", None)
            if is_finished_row(row, cell) and checksum in (None, row_checksum(row)):
                return row
    return None


def is_finished_row(row: dict, cell: ProbeCell) -> bool:
    """Whether `row` is what `run_cell` writes for this cell. May raise TypeError."""
    expected, n_steps = empty_row(cell), row["steps"]
    if row.keys() != expected.keys() or any(row[name] != expected[name] for name in ("arm", "task", "seed", "chance")):
        return False
    numbers = [row["seconds"], *(row[f"accuracy_{scale}x"] for scale in SCALES)]
    if is_looped(cell):
        numbers += [row[f"accuracy_{loops}_loops"] for loops in LOOPS]
    if row["status"] == "diverged":
        numbers = [number for number in [*numbers, row["parameters"]] if number is not None]
    else:
        numbers.append(row["parameters"])
    return (row["status"] in FINAL_CELL_STATUSES and isinstance(row["reason"], str) and all(map(is_finite_number, numbers))
            and row["solved"] is (row["status"] == "solved")
            and (type(n_steps) is int if row["solved"] else n_steps is None))


def write_cell_row(path: Path, row: dict):
    with atomic_write(path, "w") as file:
        json.dump(row | {"checksum": row_checksum(row)}, file, indent=1)


def row_checksum(row: dict) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:10]


# -- running them -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CellJob:
    """The process of a cell, see runner.Job. path: of its row."""
    cell: ProbeCell
    path: Path
    flags: tuple[str, ...]
    script: Path

    def previous_result(self) -> JobResult | None:
        return JobResult("finished") if read_cell_row(self.path, self.cell) else None

    def command(self) -> list[str]:
        return [sys.executable, str(self.script), "--arms", self.cell.arm, "--tasks", self.cell.task,
                f"--cell={self.cell.seed}", *self.flags]

    def complete(self, result: JobResult) -> JobResult:
        if result.status in ("finished", "diverged") and read_cell_row(self.path, self.cell) is None:
            return JobResult("failed", "its row is missing: the code has changed meanwhile")
        return JobResult("failed", result.reason) if result.status == "bad input" else result

    def row(self, result: JobResult) -> dict:
        failed = empty_row(self.cell) | {"status": result.status, "reason": result.reason}
        return read_cell_row(self.path, self.cell) or failed


def run_cells(cells: list[ProbeCell], probe: ProbeConfig, common: CellConfig, code: str) -> list[dict]:
    """The rows of all cells, in their order. Raises SystemExit when a signal stopped them."""
    flags = (f"--out_path={probe.out_path}", *flag_texts(vars(common)))
    jobs = [CellJob(cell, row_path(probe, cell, code), flags, SCRIPT) for cell in cells]

    def report_failure(i: int, result: JobResult):
        if result.status in ("failed", "killed"):
            log_line(f"{cells[i].task}, {cells[i].arm}, seed {cells[i].seed}: {result.status}: {result.reason}")
    with StopSignals() as stop:
        results = Runner(probe.jobs, stop).run(jobs, "cells", report_failure)
    if stop.signal:
        log_line("stopped, finished cells are kept: the same command continues")
        raise SystemExit(128 + stop.signal)
    return [job.row(result) for job, result in zip(jobs, results)]


def row_path(probe: ProbeConfig, cell: ProbeCell, code: str) -> Path:
    return probe.out_path / "cells" / f"{cell.name(code)}.json"


# -- forecast ---------------------------------------------------------------------------------------------------------

def cell_seconds(cell: ProbeCell) -> tuple[int, float]:
    """Parameters of a cell, and its seconds if its task stays unsolved, from one evaluation and a few steps."""
    task, batch_size = TASKS[cell.task], cell.flags["batch_size"]
    state, setup, loop = open_cell(cell)
    seconds = lambda start: time.perf_counter() - start
    times = []
    for _ in range(TIMED_STEPS + 1):
        start = time.perf_counter()
        loss, _ = train_step(state, loop, next_token_loss, setup.machine)
        loss.item()
        times.append(seconds(start))
    start = time.perf_counter()
    evaluate_task(state.model, task, setup.machine, 1, batch_size)
    n_evaluations = 1 + math.ceil(loop.max_iter / loop.val_intervals)
    return state.model.n_parameters(), loop.max_iter * statistics.median(times[1:]) + n_evaluations * seconds(start)


def forecast_lines(cells: list[ProbeCell], probe: ProbeConfig, code: str) -> list[str]:
    """A line for each arm and one for all cells that are not finished. Each arm is timed on each task, from one seed."""
    torch.set_num_threads(1)  # as in a cell
    remaining = [cell for cell in cells if read_cell_row(row_path(probe, cell, code), cell) is None]
    measured = {}
    for cell in progress_bar(remaining, desc="timing", unit="cell", leave=False, disable=None):
        if (cell.arm, cell.task) not in measured:
            measured[cell.arm, cell.task] = cell_seconds(cell)
    lines = []
    for arm in dict.fromkeys(arm for arm, _ in measured):
        sizes, times = zip(*(value for (name, _), value in measured.items() if name == arm))
        lines.append(f"{arm}: {max(sizes) / 1e3:,.1f} k parameters, {format_seconds(sum(times) / len(times))} a cell")
    jobs = min(probe.jobs, available_cores())
    total = sum(measured[cell.arm, cell.task][1] for cell in remaining) / jobs
    return [*lines, f"{len(remaining)} of {len(cells)} cells to train: at most {format_seconds(total)} with --jobs="
                    f"{probe.jobs}, less where tasks are solved early"]


# -- the command ------------------------------------------------------------------------------------------------------

@command
def main(argv=None):
    """Trains small models on synthetic tasks with known answers: what can an architecture compute?"""
    ignore_output_errors()
    probe, common = parse_flags(main.__doc__, argv, ProbeConfig, CellConfig)
    cells, code = build_cells(probe, common), code_hash(SCRIPT)
    if probe.cell is not None:
        for cell in cells:
            with explain_failures(lambda: "try a smaller --batch_size or model"):
                run_cell(cell, row_path(probe, cell, code))
        return
    if probe.dry_run:
        print(*forecast_lines(cells, probe, code), sep="\n")
        return
    _, hardware = query_device(DeviceConfig(common.device, common.dtype))  # raises now if the device does not exist
    given = f"--out_path={probe.out_path}"
    with folder_lock(probe.out_path, given):
        check_writable(probe.out_path / "probes.md", given)
        rows = run_cells(cells, probe, common, code)
        study = ProbeStudy({task: TASKS[task].length for task in dict.fromkeys(probe.tasks)}, SCALES, LOOPS, SOLVED_ACCURACY,
                           EVAL_EXAMPLES, vars(probe) | vars(common), hardware, command_line("probes.py", argv))
        print(write_probe_report(rows, study, probe.out_path))
    if failed := sum(row["status"] in ("failed", "killed") for row in rows):
        log_line(f"{failed} of {len(rows)} cells were not trained: the same command trains them again")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
