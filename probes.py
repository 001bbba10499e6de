"""What an architecture can learn to compute: small models trained on synthetic tasks whose answers are known.

    python probes.py --arms "mixer=attention" "mlp=swiglu" --out_path=studies/probes

trains every arm on every task, on short and long examples in turn: from one seed at several learning rates, then at the best
of them from the other seeds. It is tested at one, two, four and eight times the longest length it was trained at. An arm, a
task, a learning rate and a seed make a cell: a process of this script, which writes its row into the folder `cells` of
--out_path and is not trained again. Writes probes.md, probes.csv, probes.png and probes.svg.
"""
import bisect
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from budget import LOOPS
from compare import parse_arm, query_device
from dataloader import IGNORE_INDEX
from experiments.cluster import CLUSTER_HELP, Cluster, open_runner
from experiments.code_hash import code_hash
from experiments.probe_report import ProbeStudy, best_row, write_probe_report
from experiments.runner import JobResult, flag_texts
from layers import MIXERS
from model import FLAGS_OF_MIXERS, GPT, GPTConfig, meta_model
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
SCALES = 1, 2, 4, 8    # evaluated lengths, as multiples of the longest trained one
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
    seeds: int = flag(3, "cells per arm and task at the best learning rate, which differ in weights and data", at_least=1,
                      at_most=1000)
    rates: tuple[float, ...] = flag((0.5, 1.0, 2.0), "learning rates to try, as multiples of --learning_rate", above=0)
    state_bytes: int = flag(None, "in arms with layers of sliding attention or of a delta rule: the largest window or head "
                                  "size of these with which a text of the trained length leaves at most so many bytes to "
                                  "remember (default: as the arm says)", at_least=1)
    jobs: int = flag(None, "cells trained at a time, each in a process with one thread (default: 1; with --cluster one for "
                           "each GPU, or each core)", at_least=1, at_most=1000)
    cluster: str = flag(None, CLUSTER_HELP)
    out_path: Path = flag(Path("studies/probes"), "folder to write; cells that are finished there are kept")
    dry_run: bool = flag(False, "print the forecast, and do nothing")
    cell: int = flag(None, "internal: train only the cell of --arms, --tasks, --rates and this seed, in this process",
                     at_least=0)

    def __post_init__(self):
        check_flags(self)
        if self.jobs is None and not self.cluster:
            object.__setattr__(self, "jobs", 1)
        if self.cluster and self.dry_run:
            raise BadInput(f"--cluster={self.cluster}: --dry_run times batches on this machine, not there: leave one out")


@dataclass(frozen=True)
class CellConfig:
    """What all cells have in common, except where an arm sets it."""
    n_layer: int = redeclare(GPTConfig, "n_layer", 2)
    n_head: int = redeclare(GPTConfig, "n_head", 4)
    head_size: int = redeclare(GPTConfig, "head_size", 16)
    batch_size: int = flag(16, "examples of the trained length in a batch; more of shorter ones", at_least=1,
                           at_most=1_000_000)
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
    """One arm on one task at a learning rate from a seed. rate: the multiple of the arm's --learning_rate. flags: all of its
    model, optimizer, loop and device that are not the default."""
    arm: str
    task: str
    rate: float
    seed: int
    flags: dict

    def configs(self) -> tuple[GPTConfig, OptimizerConfig, LoopConfig, DeviceConfig]:
        """Raises BadInput."""
        return tuple(read_flags(config, self.flags) for config in (GPTConfig, OptimizerConfig, LoopConfig, DeviceConfig))

    def name(self, code: str) -> str:
        """Of its file: readable, with a digest of what its numbers depend on. code: hash of the source."""
        inputs = json.dumps([code, self.arm, self.task, self.rate, self.seed, self.flags], sort_keys=True)
        readable = re.sub(r"[^a-zA-Z0-9_.=-]+", "_", f"{self.task}-{self.seed}-{self.rate:g}-{self.arm}")[:80]
        return f"{readable}-{hashlib.sha256(inputs.encode()).hexdigest()[:10]}"


def build_cells(probe: ProbeConfig, common: CellConfig, seed: int,
                rates: Mapping[tuple[str, str], Sequence[float]] | None = None) -> list[ProbeCell]:
    """The cells of a seed, at the learning rates of each arm and task, by default at all of them. Raises BadInput where an
    arm cannot be trained."""
    cells, arms = [], {arm: parse_probe_arm(arm, common) for arm in dict.fromkeys(probe.arms)}
    for task in dict.fromkeys(probe.tasks):
        for arm, values in arms.items():
            flags = CELL_DEFAULTS | vars(common) | values | fixed_flags(TASKS[task], common)
            with name_the_arm(arm):
                flags = fit_state(flags, TASKS[task].length, probe.state_bytes)
            for rate in rates[arm, task] if rates else dict.fromkeys(probe.rates):
                learning_rate = rate * flags["learning_rate"]
                cells.append(ProbeCell(arm, task, rate, seed, flags | {"learning_rate": learning_rate}))
    for cell in cells:
        with name_the_arm(cell.arm):
            cell.configs()
    return cells


@contextmanager
def name_the_arm(arm: str):
    try:
        yield
    except BadInput as error:
        raise BadInput(f"--arms {arm!r}: {error}") from None


def fit_state(flags: dict, length: int, most_bytes: int | None) -> dict:
    """`flags` of a model with `window` and `d_head_size`, where it has layers that these are for and does not set them: with
    most_bytes the largest with which its state after a text of this length has at most so many, otherwise a quarter of the
    length and the heads of attention. Raises BadInput where none has."""
    config = read_flags(GPTConfig, flags)
    mixers = {config.mixer_class(layer) for layer in range(config.n_layer)}
    is_free = lambda name: name not in flags and mixers & {MIXERS[kind] for kind in FLAGS_OF_MIXERS[name]}
    if most_bytes is None:
        return flags | {"window": max(1, length // 4)} if is_free("window") else flags
    sizes = {"window": range(1, length), "d_head_size": [n for n in range(1, config.n_embd + 1) if config.n_embd % n == 0]}
    free = [name for name in sizes if is_free(name)]

    def with_state(n: int) -> dict:
        """Layers of all kinds grow together, by the numbers kept for each channel of the model: two for each position."""
        return flags | {name: max((size for size in sizes[name] if (2 * size if name == "window" else size) <= n), default=1)
                        for name in free}
    fits = lambda n: state_bytes(read_flags(GPTConfig, with_state(n)), length) <= most_bytes
    if not fits(1):
        raise BadInput(f"its state has more than --state_bytes={most_bytes:,}, however small its windows and heads are")
    return with_state(bisect.bisect_left(range(1, 2 * length + config.n_embd), True, key=lambda n: not fits(n)))


def state_bytes(config: GPTConfig, length: int) -> int:
    """Bytes of what a model remembers of a text of this length."""
    return meta_model(config).init_cache(1, length).n_bytes()


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
    """Endless random batches of a task, at each of its trained lengths in turn: inputs and targets, each int64
    (examples, length). A batch of the longest has `batch_size` examples, of shorter ones more, by the root of the length."""

    def __init__(self, task: Task, batch_size: int, seed: int):
        self.task, self.batch_size, self.lengths = task, batch_size, itertools.cycle(task.trained_lengths)
        self.rng = np.random.default_rng([1, seed])  # evaluations start from 0

    def next_batch(self, model: GPT) -> tuple[Tensor, Tensor]:
        length = next(self.lengths)
        n = round(self.batch_size * (self.task.length / length) ** 0.5)
        inputs, targets = self.task.generate(self.rng, n, length)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def answer_logits(model: GPT, idx: Tensor, task: Task) -> Tensor:
    """(B, T) int64 -> (B, T, tokens) in fp32; what is read at the end has n_answers tokens for each position."""
    if not task.is_read_at_the_end:
        return model.eager_forward(idx).float()
    return model.eager_forward(idx, logits_to_keep=1).float().view(len(idx), -1, task.n_answers)[:, :idx.size(1)]


def answer_loss(model: GPT, batch: tuple[Tensor, Tensor], task: Task) -> Tensor:
    """Mean loss of the answers, nats."""
    if not task.is_read_at_the_end:
        return next_token_loss(model, batch)
    idx, targets = batch
    return F.cross_entropy(answer_logits(model, idx, task).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


@torch.no_grad()
def evaluate_task(model: GPT, task: Task, machine: Machine, scale: int, batch_size: int) -> tuple[float, float]:
    """Loss in nats per answer and accuracy on the fixed examples, `scale` times as long as the trained ones."""
    batch = task.generate(np.random.default_rng([0, scale]), EVAL_EXAMPLES, scale * task.length)
    inputs, targets = map(torch.from_numpy, batch)
    nats, n_correct = 0.0, 0
    for idx, target in zip(inputs.split(batch_size), targets.split(batch_size)):
        idx, target = machine.to_device((idx, target))
        with machine.autocast():
            logits = answer_logits(model, idx, task)
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
    loss_fn = partial(answer_loss, task=task)
    stopped = fit(state, constant, loss_fn, Evaluation(evaluate), setup,
                  stop_when=lambda state, row: row["accuracy"] >= SOLVED_ACCURACY)
    if not stopped and state.step:
        setup = dataclasses.replace(setup, schedule=dataclasses.replace(setup.schedule, cooldown_frac=COOLDOWN_FRAC))
        falling = dataclasses.replace(loop, max_iter=max(state.step + 1, round(state.step / (1 - COOLDOWN_FRAC))))
        stopped = fit(state, falling, loss_fn, Evaluation(evaluate), setup)
    return next(iter(solved_at), None), stopped


def run_cell(cell: ProbeCell, path: Path):
    """Trains and tests a cell, and writes its row to `path`. Raises FloatingPointError when it has diverged, which its row
    says too, and SystemExit when a signal stopped it."""
    torch.set_num_threads(1)  # models so small would only wait for a second one
    task, row, start = TASKS[cell.task], empty_row(cell), time.perf_counter()
    seconds = lambda: round(time.perf_counter() - start, 1)
    try:
        state, setup, loop = open_cell(cell)
        row["parameters"], row["state_bytes"] = state.model.n_parameters(), state_bytes(state.model.config, task.length)
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
    return {"arm": cell.arm, "task": cell.task, "seed": cell.seed, "learning_rate": cell.flags["learning_rate"],
            "status": "failed", "solved": False, "steps": None, **{f"accuracy_{scale}x": None for scale in SCALES},
            "chance": TASKS[cell.task].chance, "parameters": None, "state_bytes": None, "seconds": None, "reason": "",
            **{f"accuracy_{loops}_loops": None for loops in LOOPS}}


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
    if row.keys() != expected.keys() or any(
            row[name] != expected[name] for name in ("arm", "task", "seed", "learning_rate", "chance")):
        return False
    numbers = [row["seconds"], *(row[f"accuracy_{scale}x"] for scale in SCALES)]
    if is_looped(cell):
        numbers += [row[f"accuracy_{loops}_loops"] for loops in LOOPS]
    if row["status"] == "diverged":
        numbers = [number for number in [*numbers, row["parameters"], row["state_bytes"]] if number is not None]
    else:
        numbers += [row["parameters"], row["state_bytes"]]
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
                f"--rates={self.cell.rate!r}", f"--cell={self.cell.seed}", *self.flags]

    def files(self) -> list[Path]:
        return [self.path]

    def complete(self, result: JobResult) -> JobResult:
        if result.status in ("finished", "diverged") and read_cell_row(self.path, self.cell) is None:
            return JobResult("failed", "its row is missing: the code has changed meanwhile")
        return JobResult("failed", result.reason) if result.status == "bad input" else result

    def row(self, result: JobResult) -> dict:
        failed = empty_row(self.cell) | {"status": result.status, "reason": result.reason}
        return read_cell_row(self.path, self.cell) or failed


def run_cells(cells: list[ProbeCell], probe: ProbeConfig, common: CellConfig, code: str, desc: str,
              cluster: Cluster | None) -> list[dict]:
    """The rows of all cells, in their order. Raises SystemExit when a signal stopped them."""
    given = {"state_bytes": probe.state_bytes} if probe.state_bytes else {}
    flags = (f"--out_path={probe.out_path}", *flag_texts(vars(common) | given))
    jobs = [CellJob(cell, row_path(probe, cell, code), flags, SCRIPT) for cell in cells]

    def report_failure(i: int, result: JobResult):
        if result.status in ("failed", "killed"):
            log_line(f"{cells[i].task}, {cells[i].arm}, seed {cells[i].seed}, learning rate "
                     f"{cells[i].flags['learning_rate']:g}: {result.status}: {result.reason}")
    with StopSignals() as stop:
        results = open_runner(probe.jobs, stop, cluster).run(jobs, desc, report_failure)
    if stop.signal:
        log_line("stopped, finished cells are kept: the same command continues")
        raise SystemExit(128 + stop.signal)
    return [job.row(result) for job, result in zip(jobs, results)]


def run_study(probe: ProbeConfig, common: CellConfig, code: str, cluster: Cluster | None) -> list[dict]:
    """The rows of the first seed at all learning rates, then of the others at the best of each arm and task."""
    cells = build_cells(probe, common, 0)
    rows, rates = run_cells(cells, probe, common, code, "learning rates", cluster), {}
    for entry, group in group_rows(zip(cells, rows)).items():
        best = best_row([row for _, row in group])
        rates[entry] = [next(cell.rate for cell, row in group if row is best)]
    others = [cell for seed in range(1, probe.seeds) for cell in build_cells(probe, common, seed, rates)]
    return rows + (run_cells(others, probe, common, code, "seeds", cluster) if others else [])


def group_rows(pairs: Iterable[tuple[ProbeCell, dict]]) -> dict[tuple[str, str], list[tuple[ProbeCell, dict]]]:
    """(arm, task) -> its cells and rows."""
    groups = {}
    for cell, row in pairs:
        groups.setdefault((cell.arm, cell.task), []).append((cell, row))
    return groups


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
        loss, _ = train_step(state, loop, partial(answer_loss, task=task), setup.machine)
        loss.item()
        times.append(seconds(start))
    start = time.perf_counter()
    evaluate_task(state.model, task, setup.machine, 1, batch_size)
    n_evaluations = 1 + math.ceil(loop.max_iter / loop.val_intervals)
    return state.model.n_parameters(), loop.max_iter * statistics.median(times[1:]) + n_evaluations * seconds(start)


def forecast_lines(probe: ProbeConfig, common: CellConfig, code: str) -> list[str]:
    """A line for each arm and one for all cells that are not finished. Each arm is timed on each task, from one seed."""
    torch.set_num_threads(1)  # as in a cell
    is_finished = lambda cell: read_cell_row(row_path(probe, cell, code), cell) is not None
    at_all_rates, measured, n_cells, n_left, total = build_cells(probe, common, 0), {}, 0, 0, 0.0
    entries = group_rows((cell, {}) for cell in at_all_rates)
    # which learning rate the other seeds have is known once the first has ended at all of them
    other_seeds = [group_rows((cell, {}) for cell in build_cells(probe, common, seed)) for seed in range(1, probe.seeds)]
    for (arm, task), group in progress_bar(entries.items(), desc="timing", unit="cell", leave=False, disable=None):
        left = [cell for cell, _ in group if not is_finished(cell)]
        n = len(left) + sum(not any(is_finished(cell) for cell, _ in cells[arm, task]) for cells in other_seeds)
        n_cells, n_left = n_cells + len(group) + len(other_seeds), n_left + n
        if n:
            parameters, seconds = cell_seconds(group[0][0])
            measured.setdefault(arm, []).append((parameters, seconds))
            total += n * seconds
    lines = []
    for arm, found in measured.items():
        sizes, times = zip(*found)
        lines.append(f"{arm}: {max(sizes) / 1e3:,.1f} k parameters, {format_seconds(sum(times) / len(times))} a cell")
    total /= min(probe.jobs, available_cores())
    return [*lines, f"{n_left} of {n_cells} cells to train: at most {format_seconds(total)} with --jobs={probe.jobs}, less "
                    f"where tasks are solved early"]


# -- the command ------------------------------------------------------------------------------------------------------

@command
def main(argv=None):
    """Trains small models on synthetic tasks with known answers: what can an architecture compute?"""
    ignore_output_errors()
    probe, common = parse_flags(main.__doc__, argv, ProbeConfig, CellConfig)
    code = code_hash(SCRIPT)
    cells = build_cells(probe, common, probe.cell or 0)
    if probe.cell is not None:
        for cell in cells:
            with explain_failures(lambda: "try a smaller --batch_size or model"):
                run_cell(cell, row_path(probe, cell, code))
        return
    if probe.dry_run:
        print(*forecast_lines(probe, common, code), sep="\n")
        return
    cluster = Cluster(probe.cluster) if probe.cluster else None
    probe = dataclasses.replace(probe, jobs=probe.jobs or cluster.slots)
    _, hardware = query_device(DeviceConfig(common.device, common.dtype), cluster)  # raises now if the device does not exist
    given = f"--out_path={probe.out_path}"
    with folder_lock(probe.out_path, given):
        check_writable(probe.out_path / "probes.md", given)
        rows = run_study(probe, common, code, cluster)
        study = ProbeStudy({task: TASKS[task].length for task in dict.fromkeys(probe.tasks)}, SCALES, LOOPS, SOLVED_ACCURACY,
                           EVAL_EXAMPLES, vars(probe) | vars(common), hardware, command_line("probes.py", argv))
        print(write_probe_report(rows, study, probe.out_path))
    if failed := sum(row["status"] in ("failed", "killed") for row in rows):
        log_line(f"{failed} of {len(rows)} cells were not trained: the same command trains them again")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
