"""Compares architectures at an equal budget, with several seeds, and says what can be believed of it.

    python compare.py --data_path=data --arms "mlp=relu2" "mlp=grkan" "mixer=DDDA" --budget tokens=3e6

An arm is flags of train.py. All arms get as many parameters as the first (the width of the hidden layer is solved for), the
same data in the same order, and the same grid of learning rates, tried on a part of the budget; then each is trained at its
best rate with every seed, on the whole budget, with its full cooldown. Each such run, a cell, is a process of train.py that
checkpoints: the same command goes on where it was stopped, and what is finished is not run again.

Writes comparison.md, comparison.csv, a page (comparison.html) and its pictures into --out_path; the runs' metrics stay in
its folder `runs`.
"""
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from dataloader import Data, open_data, require_a_block
from model import GPT, GPTConfig
from optimizer import OptimizerConfig
from runtime.checkpoint import run_folder
from runtime.device import DeviceConfig, hardware, open_machine
from runtime.files import require_writable, sole_writer, whole_file
from runtime.flags import BadInput, Parser, add_flags, check_flags, command, flag, read_flags
from runtime.metrics import read_rows
from runtime.page import Figure, Table, draw_front, draw_lines, draw_scaling, markdown, write_page
from runtime.statistics import Estimate, holm, p_value, power_law
from runtime.stop import StopSignals
from runtime.threads import available_cores
from train import CONFIGS, DIVERGED, PRESETS, LoopConfig, RunConfig

REPO = Path(__file__).parent
# Flags of train.py that are the comparison's own business, and those that an arm or a size cannot set for itself either.
OWN = {"checkpoint_path", "resume_checkpoint", "overwrite", "plot", "seed", "max_iter", "max_tokens", "max_seconds",
       "vocab_size", "verbose", "sample_tokens"}
NOT_OF_AN_ARM = OWN | {"data_path", "device", "val_iter", "val_intervals", "log_intervals"}
TOLERANCE = 0.01        # of parameters, between arms that are matched
CLOSE = 0.0025          # near enough to stay as it is, or to take a hidden layer whose width is a multiple of 8
NULL_SEEDS = 1000       # of the first arm against itself: seeds from here on
VALIDATIONS = 10        # of a run, for its curve
SPEED_ROUNDS = 3        # in which the arms take turns
SPEED_STEPS, SPEED_WARMUP = 15, 5  # of each, and how many do not count


@dataclass(frozen=True)
class CompareConfig:
    """The comparison."""
    arms: tuple[str, ...] = flag(("mlp=gelu", "mlp=relu2"),
                                 "architectures or recipes, each some flags of train.py with commas between; the others are "
                                 "compared\nwith the first")
    budget: str = flag("tokens=1e7", "what a run may use: tokens=N, flops=N or seconds=N; flops are those of matrix "
                                     "products,\nactivations and bases")
    seeds: int = flag(3, "runs of each arm, of initial weights and order of data; the same for all arms", at_least=1,
                      at_most=NULL_SEEDS)
    sizes: tuple[str, ...] = flag((), "compare at several sizes, each some flags of train.py: n_layer=4,n_head=4")
    rates: tuple[float, ...] = flag((0.5, 1.0, 2.0), "learning rates to try, as multiples of what --learning_rate says",
                                    above=0)
    grid_share: float = flag(0.25, "part of the budget on which they are tried", above=0, at_most=1)
    match: str = flag("parameters", "what arms are given alike, beside the budget", choices=("parameters", "none"))
    null: bool = flag(False, "run the first arm against itself, with other seeds: what a difference of nothing looks like")
    jobs: int = flag(1, "runs at a time, which share the cores; the speed of arms is measured afterwards, one at a time",
                     at_least=1, at_most=1000)
    out_path: Path = flag(Path("studies/comparison"), "folder for the results")
    overwrite: bool = flag(False, "let another comparison replace the results in --out_path")

    def __post_init__(self):
        check_flags(self)
        if len(set(self.arms)) < len(self.arms) or not self.null and len(self.arms) < 2:
            raise BadInput(f"--arms {' '.join(map(repr, self.arms))}: give two or more that differ, or one and --null")
        if self.limit[0] == "seconds" and self.jobs > 1:
            raise BadInput(f"--jobs={self.jobs}: runs that end by seconds must have the machine to themselves")

    @property
    def limit(self) -> tuple[str, float]:
        """("tokens", 1e7). Raises BadInput."""
        kind, _, number = self.budget.partition("=")
        with suppress(ValueError):
            if kind in ("tokens", "flops", "seconds") and 0 < float(number) < math.inf:
                return kind, float(number)
        raise BadInput(f"--budget={self.budget}: give tokens=N, flops=N or seconds=N")


# -- what is to be run ------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Arm:
    """An architecture at a size, and what a token costs it."""
    name: str
    size: str
    values: dict          # the flags of train.py that make it
    seeds: tuple[int, ...]
    step_tokens: int
    rate: float           # that the grid's multiples are of
    n_parameters: int
    flops: int            # of matrix products, for a training token
    elementwise_flops: int


@dataclass(frozen=True)
class Cell:
    """One run of train.py."""
    name: str
    arm: Arm
    what: str             # "rate", "run" or "speed"
    multiple: float       # of the learning rate
    seed: int             # or the round in which a speed is measured
    share: float          # of the budget
    flags: tuple[str, ...]
    checkpoint: Path

    @property
    def result_path(self) -> Path:
        return run_folder(self.checkpoint) / "result.json"

    def rows(self) -> list[dict]:
        return read_rows(run_folder(self.checkpoint) / "metrics.jsonl")


@dataclass(frozen=True)
class Result:
    """How a cell ended: finished, diverged, failed or stopped, with the line that says why."""
    cell: Cell
    status: str
    reason: str
    rows: list[dict]

    @property
    def bpb(self) -> float:
        return self.rows[-1]["val_bpb"] if self.status == "finished" else math.inf

    def speed(self) -> float:
        """Tokens per second of a usual step, where a row is logged every step."""
        return statistics.median(row["tok_per_sec"] for row in self.rows if row["step"] > SPEED_WARMUP)


def read_arm(text: str, given: str) -> dict:
    """What flags of train.py an arm sets: "mlp=grkan,n_layer=4" -> {"mlp": "grkan", "n_layer": 4}. given: the flag it was
    given by, for the message. Raises BadInput."""
    parser = Parser(None)
    add_flags(parser, *CONFIGS, suppress=True)
    try:
        values = vars(parser.parse_args([f"--{part.strip()}" for part in text.split(",")]))
        for config in CONFIGS:
            read_flags(config, of_config(config, values))
    except BadInput as error:
        raise BadInput(f"{given} {text!r}: {error}") from None
    if foreign := values.keys() & NOT_OF_AN_ARM:
        raise BadInput(f"{given} {text!r}: {min(foreign)} is no part of an architecture or recipe")
    return values


def of_config(config: type, values: dict) -> dict:
    """The entries that are its fields, over the preset's and the defaults."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in (PRESETS.get(values.get("preset"), {}) | values).items() if name in names}


def arms_of(config: CompareConfig, common: dict, data: Data) -> list[Arm]:
    """Every arm at every size, the arms of a size matched. Raises BadInput."""
    names = [(name, range(1, config.seeds + 1)) for name in config.arms]
    if config.null:
        names = [names[0], (f"{config.arms[0]} again", range(NULL_SEEDS + 1, NULL_SEEDS + config.seeds + 1))]
    arms = []
    for size in config.sizes or ("",):
        shape = common | (read_arm(size, "--sizes") if size else {})
        target = None
        for name, seeds in names:
            values = shape | read_arm(name.removesuffix(" again"), "--arms")
            try:
                if target is not None and config.match == "parameters":
                    values = matched(values, target, data.manifest.vocab_size)
                arm = measured(name, size, values, tuple(seeds), data)
            except BadInput as error:
                raise BadInput(f"--arms {name!r}: {error}") from None
            target = target or arm.n_parameters
            arms.append(arm)
    return arms


def model_of(values: dict, vocab_size: int) -> GPT:
    """Without its weights: on torch's meta device nothing is computed."""
    with torch.device("meta"):
        return GPT(read_flags(GPTConfig, of_config(GPTConfig, values) | {"vocab_size": vocab_size}))


def measured(name: str, size: str, values: dict, seeds: tuple[int, ...], data: Data) -> Arm:
    model = model_of(values, data.manifest.vocab_size)
    loop, run = read_flags(LoopConfig, of_config(LoopConfig, values)), read_flags(RunConfig, of_config(RunConfig, values))
    if run.batch_size == "auto":
        raise BadInput("--batch_size=auto: give a number: a step must see the same tokens whatever the arm")
    step_tokens = run.batch_size * loop.num_batch_accum * model.config.block_size
    for split in ("train", "val"):
        require_a_block(data, split, model.config.block_size)
    rate = read_flags(OptimizerConfig, of_config(OptimizerConfig, values)).rate(step_tokens)
    return Arm(name, size, values, seeds, step_tokens, rate, model.n_parameters(), model.flops_per_token(),
               model.elementwise_flops_per_token())


def matched(values: dict, target: int, vocab_size: int) -> dict:
    """`values` with the width of the hidden layer at which the model has `target` parameters, whose number grows evenly with
    it. Raises BadInput when none comes within 1 %."""
    count = lambda **changed: model_of(values | changed, vocab_size).n_parameters()
    found, n = count(), None
    if abs(found - target) > CLOSE * target and "n_hidden" not in values:
        low, high = count(n_hidden=8), count(n_hidden=16)
        exact = 8 + 8 * (target - low) / (high - low)
        n = max(1, round(exact))
        if abs(count(n_hidden=max(8, 8 * round(exact / 8))) - target) <= CLOSE * target:
            n = max(8, 8 * round(exact / 8))  # which suits a processor's vectors and a GPU's tiles
        found = count(n_hidden=n)
    if abs(found - target) > TOLERANCE * target:
        raise BadInput(f"has {found:,} parameters, the first arm {target:,}: change its shape, or compare as they are with "
                       f"--match=none")
    return values if n is None else values | {"n_hidden": n}


def cell_of(arm: Arm, config: CompareConfig, data: Data, what: str, multiple: float, seed: int) -> Cell:
    """A run on the whole budget, on the part of it that rates are tried on, or of a few steps. Raises BadInput when that is
    less than one."""
    if what == "speed":
        return named_cell(arm, config, data, what, multiple, seed, 0.0, {
            "max_iter": SPEED_STEPS, "log_intervals": 1, "val_iter": 1, "val_intervals": SPEED_STEPS})
    kind, amount = config.limit
    share = config.grid_share if what == "rate" else 1.0
    amount *= share
    if kind == "flops":
        kind, amount = "tokens", amount / (arm.flops + arm.elementwise_flops)
    if kind == "tokens" and amount < arm.step_tokens:
        raise BadInput(f"--budget={config.budget}: {share:g} of it, which a run of {arm.name!r} gets, is {amount:,.0f} "
                       f"tokens, less than a step of {arm.step_tokens:,}: give more")
    own = {f"max_{kind}": int(amount) if kind == "tokens" else amount}
    if kind == "tokens" and "val_intervals" not in arm.values:
        own["val_intervals"] = max(1, math.ceil(amount / arm.step_tokens / VALIDATIONS))
    return named_cell(arm, config, data, what, multiple, seed, share, own)


def named_cell(arm: Arm, config: CompareConfig, data: Data, what: str, multiple: float, seed: int, share: float,
               own: dict) -> Cell:
    """Its name says what it is, and holds a hash of everything that determines its numbers. own: flags of its own."""
    values = {"dataloader_num_workers": 0} | arm.values | own | {"learning_rate": arm.rate * multiple, "seed": seed}
    flags = tuple(f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in sorted(values.items()))
    digest = hashlib.sha256("\n".join([data.manifest.fingerprint(), *flags]).encode()).hexdigest()[:10]
    words = "".join(c if c.isalnum() or c in "=.-" else "_" for c in f"{arm.name}-{arm.size}".strip("-"))[:80]
    name = f"{words}-{what}-{multiple:g}-{seed}-{digest}"
    return Cell(name, arm, what, multiple, seed, share, flags, config.out_path / "runs" / f"{name}.pt")


# -- running it -------------------------------------------------------------------------------------------------------

class Runner:
    """Runs cells, some at a time, each a process of its own whose threads are its share of the cores."""

    def __init__(self, jobs: int, stop: StopSignals):
        self.stop, self.pool, self.jobs = stop, ThreadPoolExecutor(jobs), jobs
        self.processes: dict[str, subprocess.Popen] = {}
        self.lock = threading.Lock()
        self.environment = os.environ | {"OMP_NUM_THREADS": str(max(1, available_cores() // jobs))}

    def run(self, cells: list[Cell], what: str) -> list[Result]:
        """Results in the order of the cells. When a signal comes, every cell under way saves and stops."""
        futures = [self.pool.submit(self.run_cell, cell) for cell in cells]
        waiting, passed_on = set(futures), None
        size_of = lambda cell: cell.share or 1.0
        with tqdm(total=sum(map(size_of, cells)), desc=what, unit="run", dynamic_ncols=True,
                  mininterval=0.2 if sys.stderr.isatty() else 30) as bar:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in ended:
                    result = future.result()
                    bar.update(size_of(result.cell))
                    if result.status != "stopped":
                        tqdm.write(told(result))
                if self.stop.signal != passed_on:
                    passed_on = self.stop.signal
                    with self.lock:
                        for process in self.processes.values():
                            process.send_signal(signal.SIGTERM)
        return [future.result() for future in futures]

    def run_cell(self, cell: Cell) -> Result:
        if cell.result_path.exists():
            with suppress(ValueError, KeyError):  # cut off by a power cut: run it again
                ended = json.loads(cell.result_path.read_text(encoding="utf-8"))
                return Result(cell, ended["status"], ended["reason"], cell.rows())
        resume = ["--resume_checkpoint"] if cell.checkpoint.exists() else [*cell.flags, "--overwrite"]
        with self.lock:
            if self.stop.signal:
                return Result(cell, "stopped", "", [])
            process = subprocess.Popen(
                [sys.executable, str(REPO / "train.py"), f"--checkpoint_path={cell.checkpoint}", *resume, "--verbose=0"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=self.environment,
                start_new_session=True)  # a terminal's Ctrl-C comes to this process alone, which passes it on
            self.processes[cell.name] = process
        _, error = process.communicate()
        with self.lock:
            del self.processes[cell.name]
        reason = " ".join((error.strip().splitlines() or [""])[-1].removeprefix("train.py: ").split())
        if process.returncode == 0:
            return self.ended(cell, "finished", "")
        if self.stop.signal:
            return Result(cell, "stopped", reason, [])
        if DIVERGED in reason:
            return self.ended(cell, "diverged", reason)
        # not for ever: what was killed, or had no room, goes on when the command is given again
        return Result(cell, "failed", f"killed by signal {-process.returncode}" if process.returncode < 0 else reason, [])

    def ended(self, cell: Cell, status: str, reason: str) -> Result:
        """Remembers how, and removes the checkpoints, which nothing needs any more."""
        with whole_file(cell.result_path, "w") as file:
            json.dump({"status": status, "reason": reason, "flags": cell.flags}, file, indent=1)
        folder = run_folder(cell.checkpoint)
        for path in (cell.checkpoint, *folder.glob("*.pt"), *folder.glob("events.*")):
            path.unlink(missing_ok=True)
        return Result(cell, status, reason, cell.rows())


def told(result: Result) -> str:
    cell = result.cell
    if result.status != "finished":
        end = f"{result.status}: {result.reason}"
    elif cell.what == "speed":
        end = f"{result.speed():,.0f} tok/s"
    else:
        end = f"{result.bpb:.4f} bits/byte, {result.rows[-1]['seconds']:.0f} s"
    which = {"rate": f"rate x {cell.multiple:g} on {cell.share:.0%}", "run": f"seed {cell.seed}",
             "speed": f"speed, round {cell.seed}"}[cell.what]
    return f"{cell.arm.size} {cell.arm.name}, {which}: {end}".strip()


def run_all(arms: list[Arm], config: CompareConfig, data: Data, stop: StopSignals) -> "list[Outcome]":
    """The grid of every arm; then every seed at the best rate; then, one at a time and in turns, how fast the arms are."""
    outcomes = [Outcome(arm) for arm in arms]
    cells = lambda outcome, what, multiples, seeds: [cell_of(outcome.arm, config, data, what, multiple, seed)
                                                     for multiple in multiples for seed in seeds]

    def run(what: str, wanted: dict[Outcome, list[Cell]], jobs: int):
        """Into the outcomes, in rounds: the first cell of each arm, then the second of each."""
        order = [(outcome, cell) for rank in itertools.zip_longest(*wanted.values())
                 for outcome, cell in zip(wanted, rank) if cell is not None]
        if not stop.signal:
            results = Runner(jobs, stop).run([cell for _, cell in order], f"{what}s")
            for (outcome, _), result in zip(order, results):
                getattr(outcome, f"{what}s").append(result)
    run("rate", {outcome: cells(outcome, "rate", config.rates, outcome.arm.seeds[:1]) for outcome in outcomes}, config.jobs)
    run("run", {outcome: cells(outcome, "run", [outcome.best().cell.multiple], outcome.arm.seeds)
                for outcome in outcomes if outcome.best()}, config.jobs)
    if config.limit[0] != "seconds":
        run("speed", {outcome: cells(outcome, "speed", [outcome.best().cell.multiple], range(SPEED_ROUNDS))
                      for outcome in outcomes if outcome.finished()}, 1)
    return outcomes


# -- what it says -----------------------------------------------------------------------------------------------------

@dataclass(eq=False)
class Outcome:
    """All runs of an arm."""
    arm: Arm
    rates: list[Result] = field(default_factory=list)   # on a part of the budget, at the rates of the grid
    runs: list[Result] = field(default_factory=list)    # at the best of them, a seed each
    speeds: list[Result] = field(default_factory=list)

    def best(self) -> Result | None:
        """At the best rate."""
        finished = [run for run in self.rates if run.status == "finished"]
        return min(finished, key=lambda run: run.bpb) if finished else None

    def finished(self) -> list[Result]:
        return [run for run in self.runs if run.status == "finished"]

    def last(self, name: str) -> float:
        """The mean of what the runs ended with."""
        return statistics.mean(run.rows[-1][name] for run in self.finished())

    def speed(self) -> float:
        """Tokens per second: measured apart, or of the runs where seconds were the budget."""
        measured = [run.speed() for run in self.speeds if run.status == "finished"]
        return statistics.median(measured) if measured else self.last("tokens") / self.last("seconds")

    def rows(self) -> list[list[dict]]:
        """Of each run, with seconds at the speed that was measured."""
        speed = self.speed()
        return [[row | {"seconds": row["tokens"] / speed} for row in run.rows] for run in self.finished()]

    def slope(self) -> float:
        """Bits per byte that a run of e times the budget is better by: between the grid's run and the whole one of the same
        seed, which both have their full cooldown. An intermediate loss would not do."""
        best = self.best()
        whole = next((run for run in self.finished() if run.cell.seed == best.cell.seed), None)
        return (best.bpb - whole.bpb) / -math.log(best.cell.share) if whole and best.cell.share < 1 else math.nan

    def at_edge(self) -> bool:
        """Whether a rate beyond the grid might have been better."""
        multiples, best = [run.cell.multiple for run in self.rates], self.best()
        return len(multiples) > 2 and best is not None and best.cell.multiple in (min(multiples), max(multiples))

    def problems(self) -> Iterator[str]:
        for run in (*self.rates, *self.runs, *self.speeds):
            if run.status != "finished":
                yield told(run)


def table_rows(outcomes: list[Outcome]) -> list[dict]:
    """A row for each arm, the first of which the others of its size are compared with. Arms without a finished run have
    None where others have numbers."""
    first, rows = outcomes[0], []
    reference = {i: run.bpb for i, run in enumerate(first.runs) if run.status == "finished"}
    for outcome in outcomes:
        arm, finished = outcome.arm, outcome.finished()
        row = {"size": arm.size, "arm": arm.name, "runs": len(finished), "runs_wanted": len(arm.seeds),
               "parameters": arm.n_parameters, "flops_per_token": arm.flops,
               "elementwise_flops_per_token": arm.elementwise_flops, "n_hidden": arm.values.get("n_hidden"),
               "rate_at_edge": outcome.at_edge()}
        if finished:
            bpb, seconds = Estimate.of([run.bpb for run in finished]), outcome.last("tokens") / outcome.speed()
            row |= {"bpb": bpb.mean, "bpb_margin": bpb.margin, "loss": outcome.last("val_loss"),
                    "learning_rate": arm.rate * outcome.best().cell.multiple, "tokens": outcome.last("tokens"),
                    "seconds": seconds, "tok_per_sec": outcome.speed(),
                    "peak_memory": max(row.get("peak_memory", 0) for run in finished for row in run.rows)}
        pairs = [run.bpb - reference[i] for i, run in enumerate(outcome.runs) if run.status == "finished" and i in reference]
        if pairs and outcome is not first:
            difference = Estimate.of(pairs)
            row |= {"difference": difference.mean, "difference_margin": difference.margin, "pairs": len(pairs),
                    "p": p_value(pairs)}
            if first.slope() > 0:
                row["worth"] = math.exp(-difference.mean / first.slope()) - 1
        if finished and first.finished():
            longer = seconds / (first.last("tokens") / first.speed())
            row["bpb_equal_seconds"] = bpb.mean + outcome.slope() * math.log(longer) if outcome is not first else bpb.mean
        rows.append(row)
    compared = [row for row in rows if "p" in row]
    for row, corrected in zip(compared, holm([row["p"] for row in compared])):
        row["p_holm"] = corrected
        excludes_0 = abs(row["difference"]) > row["difference_margin"]
        row["significant"] = "yes" if corrected < 0.05 else "not as one of several" if excludes_0 else "no"
    return rows


def verdict(row: dict, first: dict) -> str:
    """One sentence on an arm, which says no more than its interval does."""
    name, base = row["arm"], first["arm"]
    if "difference" not in row:
        return f"{name}: no run that could be compared was finished."
    interval = f"95 % interval {row['difference'] - row['difference_margin']:+.4f} to " \
               f"{row['difference'] + row['difference_margin']:+.4f}, {row['pairs']} pairs of seeds"
    if math.isinf(row["difference_margin"]):
        return f"{name}: {row['difference']:+.4f} bits/byte against {base} with one seed, of which nothing follows."
    if row["significant"] == "no":
        return f"{name}: no difference to {base} is shown ({interval})."
    how = "better" if row["difference"] < 0 else "worse"
    worth = f", worth {row['worth']:+.0%} of {base}'s steps" if abs(row.get("worth", math.nan)) < 3 else ""
    caution = "" if row["significant"] == "yes" else "; but among so many comparisons one such is likely by chance (Holm)"
    return f"{name}: {how} than {base} by {abs(row['difference']):.4f} bits/byte ({interval}){worth}{caution}."


def regime(outcomes: list[Outcome], config: CompareConfig, data: Data, device: str) -> str:
    """In what circumstances all this was measured: no verdict reaches beyond."""
    runs = [run for outcome in outcomes for run in outcome.finished()]
    model = model_of(outcomes[0].arm.values, data.manifest.vocab_size).config
    tokens = sorted({run.rows[-1]["tokens"] for run in runs})
    span = " to ".join(f"{n / 1e6:.2f}" for n in dict.fromkeys((tokens[0], tokens[-1]))) if tokens else "no"
    matched = "as many parameters as the first" if config.match == "parameters" else "parameters as they come"
    return (f"{model.n_layer} layers x {model.n_embd}, blocks of {model.block_size}, vocabulary {model.vocab_size:,}, "
            f"{outcomes[0].arm.n_parameters / 1e6:.2f} M parameters, {matched}; {span} M tokens of "
            f"{data.manifest.source.get('dataset', 'text')} in steps of {outcomes[0].arm.step_tokens:,}, budget "
            f"{config.budget}; {config.seeds} seeds; {device}")


HEAD = ("arm", "bits/byte", "difference to the first", "p (Holm)", "significant", "worth in steps",
        "bits/byte at equal seconds", "learning rate", "parameters", "MFLOP/token: products", "element-wise", "tok/s",
        "seconds", "peak MiB", "runs")


def shown(row: dict) -> tuple[str, ...]:
    """A row of the table for people."""
    def number(name: str, form: str, scale: float = 1.0) -> str:
        value = row.get(name)
        return "" if value is None or math.isnan(value) else format(value * scale, form)

    def with_margin(name: str) -> str:
        margin = row.get(f"{name}_margin", math.inf)
        return number(name, "+.4f" if name == "difference" else ".4f") + (f" ± {margin:.4f}" if margin < math.inf else "")
    worth = row.get("worth")
    return (row["arm"], with_margin("bpb"), with_margin("difference"), number("p_holm", ".3f"), row.get("significant", ""),
            "" if worth is None else f"{worth:+.0%}" if worth < 3 else "> +300%", number("bpb_equal_seconds", ".4f"),
            number("learning_rate", ".3g") + (" (edge)" if row["rate_at_edge"] else ""), f"{row['parameters']:,}",
            number("flops_per_token", ".2f", 1e-6), number("elementwise_flops_per_token", ".2f", 1e-6),
            number("tok_per_sec", ",.0f"), number("seconds", ",.0f"), number("peak_memory", ",.0f", 2**-20),
            f"{row['runs']} of {row['runs_wanted']}")


NOTES = """\
Means over seeds ± 95 % interval (Student's t); differences are paired by seed, negative is better; p and "significant" are
corrected for the number of arms (Holm). "Worth in steps": how much longer the first arm would have to train to be as good,
and "at equal seconds": what the arm would have reached in the seconds that the first one took. Both go by the arm's run on a
part of the budget and that on the whole, each with its full cooldown, and are rough beyond a factor of two. Learning rate:
the best of the grid on a part of the budget; (edge): it was the grid's first or last. FLOPs of a training token, forward
and backward: matrix products, and apart from them activations and the bases of KAN layers. Peak memory is that of the
process, on a GPU of its tensors. Tokens per second are the median of a few steps, measured after all runs, the arms in turns
and alone, and seconds are those of a run at that speed; where seconds are the budget, both are the runs' own."""


def report(outcomes: list[Outcome], config: CompareConfig, data: Data, device: str, line: str):
    """Writes the tables, the pictures and the page, and prints what they say."""
    by_size = [list(group) for _, group in itertools.groupby(outcomes, key=lambda outcome: outcome.arm.size)]
    rows, parts, lines, pictures = [], [], [], {}
    for group in by_size:
        size_rows = table_rows(group)
        rows += size_rows
        table = Table(HEAD, [shown(row) for row in size_rows])
        verdicts = [verdict(row, size_rows[0]) for row in size_rows[1:]]
        problems = [problem for outcome in group for problem in outcome.problems()]
        heading, where = group[0].arm.size or "Results", regime(group, config, data, device)
        name = "".join(c if c.isalnum() else "_" for c in group[0].arm.size).strip("_")
        curves = {outcome.arm.name: outcome.rows() for outcome in group if outcome.finished()}
        ends = {row["arm"]: row for row in size_rows if "bpb" in row}
        if curves:
            pictures["_".join(filter(None, ("curves", name)))] = draw_lines(curves)
            pictures["_".join(filter(None, ("front", name)))] = draw_front(ends)
        parts += [("h2", heading), ("p", f"{where}."), ("ul", verdicts), table,
                  *(Figure(pictures[key], key) for key in list(pictures)[-2 * bool(curves):] if curves)]
        lines += [f"## {heading}", "", f"{where}.", "", *(f"- {sentence}" for sentence in verdicts), "", markdown(table), ""]
        if problems:
            parts += [("h3", "Runs that are left out"), ("ul", problems)]
            lines += ["Runs that are left out:", "", *(f"- {problem}" for problem in problems), ""]
    if len(by_size) > 1 and (fits := scaling(by_size)):
        pictures["scaling"] = draw_scaling(fits)
        sentences = [f"{name}: loss = {a:.3g} x FLOPs^-{b:.4f}" + (", a line through two sizes" if len(points) == 2 else "")
                     for name, (points, a, b) in fits.items()]
        parts += [("h2", "Loss against FLOPs"), ("ul", sentences), Figure(pictures["scaling"], "scaling")]
        lines += ["## Loss against FLOPs", "", *(f"- {sentence}" for sentence in sentences), ""]
    title = "A null test: the first arm against itself" if config.null else "Comparison"
    text = "\n".join([f"# {title}", "", f"`{line}`", "", *lines, NOTES, ""])
    with whole_file(config.out_path / "comparison.md", "w") as file:
        file.write(text)
    with whole_file(config.out_path / "comparison.csv", "w") as file:
        file.write(as_csv(rows))
    for name, svg in pictures.items():
        with whole_file(config.out_path / f"{name}.svg", "w") as file:
            file.write(svg)
    write_page(config.out_path / "comparison.html", title, [("code", line), *parts, ("p", NOTES)])
    print(text)
    print(config.out_path / "comparison.html")


def scaling(by_size: list[list[Outcome]]) -> dict:
    """name -> ((FLOPs of a run, bits per byte) at each size, a, b), for arms that finished at two sizes or more."""
    points = {}
    for outcome in itertools.chain(*by_size):
        if outcome.finished():
            tokens = outcome.last("tokens")
            points.setdefault(outcome.arm.name, []).append(
                (tokens * (outcome.arm.flops + outcome.arm.elementwise_flops),
                 statistics.mean(run.bpb for run in outcome.finished())))
    return {name: (sorted(found), *power_law(*zip(*found))) for name, found in points.items() if len(found) > 1}


def as_csv(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


# -- the command ------------------------------------------------------------------------------------------------------

def read_command(argv) -> tuple[CompareConfig, dict]:
    """The comparison, and the flags of train.py that all its runs have."""
    parser = Parser(main.__doc__)
    add_flags(parser, CompareConfig)
    add_flags(parser, *CONFIGS, suppress=True, without=OWN)
    values = vars(parser.parse_args(argv))
    names = {field.name for field in dataclasses.fields(CompareConfig)}
    common = {name: value for name, value in values.items() if name not in names}
    return read_flags(CompareConfig, values), common


def plan_of(config: CompareConfig, common: dict, data: Data) -> dict:
    """What makes it this comparison, as JSON has it: not how many seeds there are, or how it is run."""
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("seeds", "jobs", "out_path",
                                                                                             "overwrite")}
    shared = {name: value for name, value in common.items() if name != "data_path"}
    return json.loads(json.dumps(kept | {"data": data.manifest.fingerprint(), "flags of train.py": shared}, default=str))


def require_place(config: CompareConfig, plan: dict):
    """Raises BadInput when --out_path holds the results of another comparison. More seeds are the same one."""
    path, before = config.out_path / "plan.json", plan
    require_writable(path, f"--out_path={config.out_path}")
    if path.exists() and not config.overwrite:
        with suppress(ValueError):  # a damaged one says nothing
            before = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name in {**before, **plan} if before.get(name) != plan.get(name)]:
        raise BadInput(f"--out_path={config.out_path}: holds a comparison with another {other[0]}: choose another path, or "
                       f"replace its results by --overwrite (runs that are the same are kept)")
    with whole_file(path, "w") as file:
        json.dump(plan, file, indent=1)


@command
def main(argv=None):
    """Compares architectures at an equal budget."""
    config, common = read_command(argv)
    machine = open_machine(read_flags(DeviceConfig, of_config(DeviceConfig, common)))
    data = open_data(common.get("data_path", RunConfig.data_path))
    arms = arms_of(config, common, data)
    line = shlex.join(["python", "compare.py", *(sys.argv[1:] if argv is None else argv)])
    with sole_writer(config.out_path, f"--out_path={config.out_path}"), StopSignals() as stop:
        for arm in arms:
            cell_of(arm, config, data, "rate", 1.0, 1)
        require_place(config, plan_of(config, common, data))
        start = time.perf_counter()
        outcomes = run_all(arms, config, data, stop)
        if stop.signal:
            print(f"stopped: every run is saved, and the same command goes on: {line}", file=sys.stderr)
            raise SystemExit(128 + stop.signal)
        report(outcomes, config, data, f"{hardware(machine.device)}, {machine.dtype}", line)
        print(f"{time.perf_counter() - start:,.0f} s")
    if any(run.status == "failed" for outcome in outcomes for run in (*outcome.rates, *outcome.runs, *outcome.speeds)):
        raise OSError("some runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    main()
