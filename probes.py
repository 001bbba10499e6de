"""What a transformer of some architecture can learn to compute: synthetic tasks whose answers are known.

    python probes.py --arms "mixer=attention" "mlp=swiglu" --out_path=studies/probes

trains every arm small on every task, from several seeds, and tests it at one, two and four times the length it was trained
at. It writes probes.md, probes.csv, probes.png and probes.svg into the folder, and a file per cell (arm, task and seed) into
its folder cells: a cell that is finished there is not trained again.
"""
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import re
import shlex
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from compare import read_arm
from dataloader import IGNORE_INDEX
from experiments.report import Table, markdown
from model import GPT, GPTConfig
from optimizer import OptimizerConfig, make_optimizer
from runtime.cli import Parser, add_flags, command, log_line
from runtime.config import BadInput, check_flags, flag, read_flags
from runtime.device import DeviceConfig, Machine, hardware, open_machine, seed_everything
from runtime.files import atomic_write, check_writable, folder_lock
from runtime.metrics import NonFiniteGuard
from runtime.signals import StopSignals, no_interrupt
from tasks.synthetic import TASKS, Task
from trainer import FP16_SKIPS, LoopConfig, TrainState, fit, next_token_loss

EXAMPLES = 256       # of a validation; always the same, whatever arm and seed
SCALES = 1, 2, 4     # times the trained length
ENOUGH = 0.99        # accuracy at the trained length at which a task counts as solved


# -- flags ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ProbeConfig:
    """The probes."""
    arms: tuple[str, ...] = flag(("mixer=attention",), "architectures, each flags of train.py with commas between: "
                                                       "\"mlp=relu2,n_layer=4\"")
    tasks: tuple[str, ...] = flag(tuple(TASKS), "what to train them on", choices=tuple(TASKS))
    seeds: int = flag(3, "cells of an arm and task, each with weights and data of its own", at_least=1, at_most=1000)
    jobs: int = flag(1, "cells trained at a time, each in a process with one thread", at_least=1, at_most=1000)
    out_path: Path = flag(Path("studies/probes"), "folder to write; cells that are finished there are kept")
    __post_init__ = check_flags


@dataclass(frozen=True)
class CellConfig:
    """Every arm, unless it says otherwise; the flags are train.py's."""
    n_layer: int = flag(2, "blocks", at_least=1)
    n_head: int = flag(4, "attention heads; the width is n_head * head_size", at_least=1)
    head_size: int = flag(16, "channels of a head, an even number", at_least=2)
    batch_size: int = flag(32, "examples in a batch", at_least=1)
    max_iter: int = flag(1200, "optimizer steps after which an unsolved task is given up", at_least=2)
    val_intervals: int = flag(50, "steps between validations", at_least=1)
    learning_rate: float = flag(0.02, "peak learning rate, see train.py", above=0)
    weight_decay: float = flag(0.1, "of the matrices, per step and learning rate", at_least=0)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 does not clip", at_least=0)
    device: str = flag("cpu", "cuda, cuda:1, mps or cpu; auto takes the first there is, in this order")
    dtype: str = flag("fp32", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    __post_init__ = check_flags


CONFIGS = ProbeConfig, CellConfig
# What an arm may set besides; `block_size` is the task's, and when the rate falls is found while training.
OF_AN_ARM = {field.name for config in (GPTConfig, OptimizerConfig) for field in dataclasses.fields(config)} - {
    "block_size", "vocab_size", "schedule", "cooldown_frac"} | {"batch_size", "num_batch_accum", "grad_clip"}
COOLDOWN = 0.2       # last part of a cell's steps, in which the learning rate falls to zero
FORMAT = 1           # of a cell's file; another one where tasks or training change: cells are then trained anew


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm on one task from one seed."""
    arm: str
    task: str
    seed: int
    values: dict         # flags

    @property
    def name(self) -> str:
        """Of its file: readable, and with a hash of everything that determines the numbers in it."""
        said = json.dumps([FORMAT, dataclasses.astuple(self), list(map(str, self.configs()))], sort_keys=True)
        readable = re.sub(r"[^\w.=-]+", "_", f"{self.task}-{self.seed}-{self.arm}")[:80]
        return f"{readable}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"

    def configs(self) -> tuple[GPTConfig, OptimizerConfig, LoopConfig, DeviceConfig]:
        """Raises BadInput."""
        task, values = TASKS[self.task], self.values
        own = {"vocab_size": task.vocab_size, "block_size": max(SCALES) * task.length, "num_batch_accum": 1,
               "warmup_iter": 20, "cooldown_frac": 0.0, "log_intervals": values["val_intervals"], "verbose": False}
        return tuple(read_flags(config, own | values) for config in (GPTConfig, OptimizerConfig, LoopConfig, DeviceConfig))


def plan(probe: ProbeConfig, common: CellConfig) -> list[Cell]:
    """All cells; those of a seed come one after the other. Raises BadInput where an arm cannot be trained."""
    values = {}
    for arm in dict.fromkeys(probe.arms):
        given = read_arm(arm, "--arms")
        if foreign := given.keys() - OF_AN_ARM:
            raise BadInput(f"--arms {arm!r}: {min(foreign)} is not an arm's to set here")
        values[arm] = vars(common) | given
        if values[arm]["batch_size"] == "auto":
            raise BadInput(f"--arms {arm!r}: batch_size=auto: give a number")
    cells = [Cell(arm, task, seed, values[arm]) for seed in range(probe.seeds) for task in dict.fromkeys(probe.tasks)
             for arm in values]
    for cell in cells:
        try:
            cell.configs()
        except BadInput as error:
            raise BadInput(f"--arms {cell.arm!r}: {error}") from None
    return cells


# -- training a cell --------------------------------------------------------------------------------------------------

def examples(task: Task, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches at the trained length, in place of a TrainLoader."""
    rng = np.random.default_rng([1, seed])  # validation's begin with 0
    while True:
        yield tuple(map(torch.from_numpy, task.make(rng, batch_size, task.length)))


class ProbeState(TrainState):
    """Leaves no checkpoint."""

    def save(self, is_best: bool = False, blocking: bool = True):
        pass

    def checkpoint_status(self) -> str:
        return "nothing is kept of it"


class Solved(Exception):
    """Raised by a validation, to end `fit`."""


@torch.no_grad()
def examine(model: GPT, task: Task, machine: Machine, scale: int, batch_size: int) -> tuple[float, float]:
    """Loss in nats and accuracy over the answers of the fixed examples, `scale` times as long as trained."""
    inputs, targets = map(torch.from_numpy, task.make(np.random.default_rng([0, scale]), EXAMPLES, scale * task.length))
    nats, n_right = 0.0, 0
    for idx, target in zip(inputs.split(batch_size), targets.split(batch_size)):
        idx, target = machine.to_device((idx, target))
        with machine.autocast():
            logits = model.eager_forward(idx).float()
        nats += F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum").item()
        n_right += (logits.argmax(-1) == target).sum().item()
    n_answers = (targets != IGNORE_INDEX).sum().item()
    return nats / n_answers, n_right / n_answers


def open_cell(cell: Cell) -> tuple[ProbeState, LoopConfig]:
    """Everything a cell needs: what train.py's open_run gives a run."""
    gpt, schedule, loop, device = cell.configs()
    machine, task = open_machine(device), TASKS[cell.task]
    seed_everything(cell.seed)
    model = GPT(gpt).to(machine.device)
    settings = cell.values | {"block_size": task.length, "num_batch_accum": loop.num_batch_accum}
    nowhere = SimpleNamespace(rows=[], write=lambda row: None, check=lambda: None)  # as metrics, and as writer
    optimizer = make_optimizer(model, schedule, settings["batch_size"] * loop.num_batch_accum * task.length,
                               machine.newton_schulz_dtype())
    guard = NonFiniteGuard(machine.device, limit=FP16_SKIPS if machine.dtype == "fp16" else 2)
    return ProbeState(model, None, optimizer, schedule, machine.grad_scaler(),
                      examples(task, settings["batch_size"], cell.seed), machine, guard, nowhere, nowhere, settings), loop


def train_cell(state: ProbeState, loop: LoopConfig, task: Task) -> tuple[int | None, int | None]:
    """Trains at a constant rate until the task is solved or a share of 1 - COOLDOWN of the steps is done, and then with a
    falling rate for COOLDOWN of all it takes: noise of a large rate is no part of what was learnt. Returns the step of the
    first validation that found the task solved, if any, and the signal that stopped it, if any."""
    solved_at = []

    def validation(state: ProbeState, ends: bool) -> dict:
        loss, accuracy = examine(state.model, task, state.machine, 1, state.settings["batch_size"])
        if accuracy >= ENOUGH:
            solved_at.append(state.step)
            if ends:
                raise Solved
        return {"val_loss": loss, "accuracy": accuracy}
    stopped = None
    try:
        constant = dataclasses.replace(loop, max_iter=max(1, round((1 - COOLDOWN) * loop.max_iter)))
        stopped = fit(state, constant, next_token_loss, partial(validation, ends=True))
    except Solved:
        pass
    if not stopped and state.step:
        state.schedule = dataclasses.replace(state.schedule, cooldown_frac=COOLDOWN)
        falling = dataclasses.replace(loop, max_iter=max(state.step + 1, round(state.step / (1 - COOLDOWN))))
        stopped = fit(state, falling, next_token_loss, partial(validation, ends=False))
    return next(iter(solved_at), None), stopped


def empty_row(cell: Cell) -> dict:
    return {"arm": cell.arm, "task": cell.task, "seed": cell.seed, "status": "failed", "solved": False, "steps": None,
            **{f"accuracy_{scale}x": None for scale in SCALES}, "guessing": TASKS[cell.task].guessing, "parameters": None,
            "seconds": None, "reason": ""}


def run_cell(cell: Cell) -> dict | int:
    """What a cell came to, or the signal that stopped it."""
    torch.set_num_threads(1)  # cells so small only wait for a second one
    task, start = TASKS[cell.task], time.perf_counter()
    row = empty_row(cell)
    try:
        state, loop = open_cell(cell)
        row["parameters"] = state.model.n_parameters()
        row["steps"], stopped = train_cell(state, loop, task)
        if stopped:
            return stopped
        for scale in SCALES:
            row[f"accuracy_{scale}x"] = examine(state.model, task, state.machine, scale, state.settings["batch_size"])[1]
        row["solved"] = row["steps"] is not None
        row["status"] = "solved" if row["solved"] else "unsolved"
    except FloatingPointError as error:
        row |= {"status": "diverged", "reason": str(error)}
    except Exception as error:  # whatever it is, the other cells can do without this one
        row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


# -- running all ------------------------------------------------------------------------------------------------------

FINISHED = "solved", "unsolved", "diverged"  # cells that are not trained again; failed and killed ones are


def read_cell(path: Path) -> dict | None:
    """The row of a cell that is finished, or None."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not a row
        row = json.loads(path.read_text(encoding="utf-8"))
        return row if row["status"] in FINISHED else None
    return None


def write_cell(path: Path, row: dict):
    with atomic_write(path, "w") as file:
        json.dump(row, file, indent=1)


def in_own_process(cell: Cell, path: Path):
    """What a worker does. Its file is there at the end unless a signal stopped it."""
    row = run_cell(cell)
    if isinstance(row, int):
        sys.exit(128 + row)
    write_cell(path, row)


def run_here(cells: dict[Path, Cell], stop: StopSignals, done: Callable):
    """One cell after the other in this process. done(row) is called after each."""
    for path, cell in cells.items():
        row = stop.signal or run_cell(cell)
        if isinstance(row, int):
            stop.signal = row
            return
        write_cell(path, row)
        done(row)


def run_in_processes(cells: dict[Path, Cell], jobs: int, stop: StopSignals, done: Callable):
    """The same, `jobs` at a time in a process each: one that dies takes no other with it."""
    context, waiting, running = multiprocessing.get_context("spawn"), deque(cells.items()), {}
    if sys.platform != "win32":
        resource_tracker.ensure_running()  # which lets Ctrl-C through when it starts, and would do so under no_interrupt
    try:
        while (waiting or running) and not stop.signal:
            while waiting and len(running) < jobs:
                path, cell = waiting.popleft()
                path.unlink(missing_ok=True)  # of a cell that failed before
                process = context.Process(target=in_own_process, args=(cell, path), daemon=True)
                with no_interrupt():  # a terminal sends Ctrl-C to all of them; they end when this process says so
                    process.start()
                running[process.sentinel] = process, path, cell
            for sentinel in wait(list(running), timeout=0.5):
                process, path, cell = running.pop(sentinel)
                process.join()
                if not path.exists() and not stop.signal:
                    end = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
                    write_cell(path, empty_row(cell) | {"status": "killed", "reason": f"its process ended by {end}"})
                if path.exists():
                    done(json.loads(path.read_text(encoding="utf-8")))
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()


def run_cells(cells: list[Cell], jobs: int, folder: Path) -> list[dict]:
    """The rows of all cells in their order, of which those finished before are only read. Raises SystemExit when a signal
    stops it."""
    paths = {cell: folder / f"{cell.name}.json" for cell in cells}
    to_do = {path: cell for cell, path in paths.items() if read_cell(path) is None}
    # where nobody watches, a line every half minute is enough for a log
    interval = 0.2 if sys.stderr.isatty() else 30
    with StopSignals() as stop, tqdm(total=len(cells), initial=len(cells) - len(to_do), unit="cell", dynamic_ncols=True,
                                     mininterval=interval, maxinterval=max(interval, 10), smoothing=0.1) as bar:
        def done(row: dict):
            bar.update()
            if row["status"] in ("failed", "killed"):
                log_line(f"{row['task']}, {row['arm']}, seed {row['seed']}: {row['status']}, {row['reason']}")
            bar.set_postfix_str(f"{row['task']}, {row['arm']}: {row['status']}")
        if jobs == 1:
            run_here(to_do, stop, done)
        else:
            run_in_processes(to_do, jobs, stop, done)
    if stop.signal:
        log_line("stopped; what is finished is kept: the same command goes on")
        raise SystemExit(128 + stop.signal)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths.values()]


# -- what it says -----------------------------------------------------------------------------------------------------

def summary(rows: list[dict]) -> tuple[str, list[float | None]]:
    """Of the seeds of an arm and task: "solved 2/3, 400 steps, 1 diverged" (the median of those that solved it), and the
    mean accuracy at each of SCALES of those that were trained to the end."""
    solved = [row["steps"] for row in rows if row["solved"]]
    words = [f"solved {len(solved)}/{len(rows)}", *([f"{statistics.median(solved):,.0f} steps"] if solved else ())]
    for status in ("diverged", "failed", "killed"):
        if n := sum(row["status"] == status for row in rows):
            words.append(f"{n} {status}")
    ended = [row for row in rows if row["accuracy_1x"] is not None]
    return ", ".join(words), [statistics.mean(row[f"accuracy_{scale}x"] for row in ended) if ended else None
                              for scale in SCALES]


def describe(rows: list[dict], fields: dict, probe: ProbeConfig, common: CellConfig, command_line: str) -> str:
    """probes.md. fields: (arm, task) -> its summary."""
    arms, tasks = list(dict.fromkeys(arm for arm, _ in fields)), list(dict.fromkeys(task for _, task in fields))
    shown = lambda words, accuracies: f"{words}: {' '.join('-' if x is None else f'{x:.2f}' for x in accuracies)}"
    matrix = Table(("task", "guessing", *arms), [
        (task, f"{TASKS[task].guessing:.2f}", *(shown(*fields[arm, task]) for arm in arms)) for task in tasks])
    scales = ", ".join(f"{scale}x" for scale in SCALES)
    sizes = [f"{arm}: {' to '.join(f'{n:,}' for n in sorted({min(found), max(found)}))} parameters" for arm in arms
             if (found := [row["parameters"] for row in rows if row["arm"] == arm and row["parameters"]])]
    return "\n".join([
        "# Probes", "", markdown(matrix), "",
        f"Each field: seeds that solved the task ({ENOUGH:.0%} of the answers in {EXAMPLES} examples right at the trained "
        f"length), the median of the steps they took, and the mean accuracy at {scales} the trained length, after the "
        f"learning rate has fallen to zero. Guessing: choosing evenly among the possible answers. Trained lengths: "
        f"{', '.join(f'{task} {TASKS[task].length}' for task in tasks)} tokens.", "",
        f"{common.n_layer} layers, {common.n_head} heads x {common.head_size}, batches of {common.batch_size} examples, at "
        f"most {common.max_iter:,} steps, learning rate {common.learning_rate:g}, where an arm does not say otherwise; "
        f"{probe.seeds} seeds. {'; '.join(sizes)}. {sum(row['seconds'] or 0 for row in rows) / 60:,.1f} minutes in all, "
        f"{probe.jobs} at a time with one thread each, "
        f"{hardware(open_machine(DeviceConfig(common.device, common.dtype)).device)}: `{command_line}`.", "",
        *(f"- {row['task']}, {row['arm']}, seed {row['seed']}: {row['status']}: {row['reason']}" for row in rows
          if row["reason"])]).rstrip() + "\n"


def draw(fields: dict, folder: Path):
    """probes.png and probes.svg: a row per arm, three boxes per task, coloured by accuracy from guessing (0) to 1."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    arms, tasks = list(dict.fromkeys(arm for arm, _ in fields)), list(dict.fromkeys(task for _, task in fields))
    n, width = len(SCALES), max(5.5, 2.0 + 1.75 * len(tasks))
    figure, axis = plt.subplots(figsize=(width, 1.6 + 0.95 * len(arms)), layout="constrained")
    above = lambda accuracy, task: float("nan") if accuracy is None else \
        max(0.0, (accuracy - TASKS[task].guessing) / (1 - TASKS[task].guessing))
    shades = np.array([[above(x, task) for task in tasks for x in fields[arm, task][1]] for arm in arms])
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="#dddddd")
    image = axis.imshow(np.ma.masked_invalid(shades), cmap=colors, vmin=0, vmax=1, aspect="auto")
    for (y, arm), (i, task) in itertools.product(enumerate(arms), enumerate(tasks)):
        words, accuracies = fields[arm, task]
        words = words.replace(", ", "\n", 1)
        axis.text(n * i + (n - 1) / 2, y - 0.2, words, ha="center", va="center", fontsize=8.5, color="black",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 2, "alpha": 0.85})
        for k, accuracy in enumerate(accuracies):
            shown = "-" if accuracy is None else f"{accuracy:.2f}"
            axis.text(n * i + k, y + 0.27, shown, ha="center", va="center", fontsize=9,
                      color="white" if shades[y, n * i + k] > 0.6 else "black")
    axis.set_yticks(range(len(arms)), arms)
    axis.set_xticks(range(n * len(tasks)), [f"{scale}x" for _ in tasks for scale in SCALES], fontsize=8)
    axis.tick_params(length=0)
    for i, task in enumerate(tasks):
        axis.text(n * i + (n - 1) / 2, -0.56, task, ha="center", va="bottom", fontsize=10.5, fontweight="bold")
    for x in range(1, len(tasks)):
        axis.axvline(n * x - 0.5, color="white", linewidth=5)
    for y in range(1, len(arms)):
        axis.axhline(y - 0.5, color="white", linewidth=5)
    axis.spines[:].set_visible(False)
    figure.suptitle("Accuracy at 1, 2 and 4 times the trained length", fontsize=11)
    bar = figure.colorbar(image, ax=axis, ticks=[0, 1], pad=0.01, shrink=0.9)
    bar.ax.set_yticklabels(["guessing", "all right"], fontsize=8)
    for kind in ("png", "svg"):
        with atomic_write(folder / f"probes.{kind}") as file:
            figure.savefig(file, format=kind, dpi=110)
    plt.close(figure)


def write_report(rows: list[dict], probe: ProbeConfig, common: CellConfig, command_line: str) -> str:
    """All files but the cells'. Returns the text of probes.md."""
    fields = {}
    for row in rows:
        fields.setdefault((row["arm"], row["task"]), []).append(row)
    fields = {key: summary(found) for key, found in fields.items()}
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    text = describe(rows, fields, probe, common, command_line)
    for name, content in (("probes.csv", table.getvalue()), ("probes.md", text)):
        with atomic_write(probe.out_path / name, "w") as file:
            file.write(content)
    draw(fields, probe.out_path)
    return text


@command
def main(argv=None):
    parser = Parser("Trains small models on synthetic tasks whose answers are known: what can an architecture compute?")
    add_flags(parser, *CONFIGS)
    values = vars(parser.parse_args(argv))
    probe, common = (read_flags(config, values) for config in CONFIGS)
    cells = plan(probe, common)
    open_machine(DeviceConfig(common.device, common.dtype))  # not there: says so now
    given = f"--out_path={probe.out_path}"
    with folder_lock(probe.out_path, given):
        check_writable(probe.out_path / "probes.md", given)
        rows = run_cells(cells, probe.jobs, probe.out_path / "cells")
        command_line = shlex.join(["python", "probes.py", *(sys.argv[1:] if argv is None else argv)])
        print(write_report(rows, probe, common, command_line))
    if failed := sum(row["status"] in ("failed", "killed") for row in rows):
        log_line(f"{failed} of {len(rows)} cells were not trained: the same command tries them again")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
