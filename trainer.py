"""`fit`, the only training loop, and `train_command`, which takes a training command from its flags to its end.

Pretraining, finetuning and the probes call `fit` with a loader, a loss function and an evaluation of their own:

    stopped = fit(state, loop, next_token_loss, Evaluation(validate), setup)
"""
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from model import GPT
from optimizer import CombinedOptimizer, OptimizerConfig, make_optimizer, set_rates
from runtime.checkpoint import CheckpointWriter, explain_damage, find_tensors, run_folder, run_lock
from runtime.cli import (
    DIVERGED,
    explain_failures,
    ignore_output_errors,
    log_line,
    progress_bar,
    say,
    set_postfix,
    terminal_width,
    wrap,
)
from runtime.config import BadInput, check_flags, flag
from runtime.device import (
    DeviceConfig,
    Machine,
    can_compile,
    compile_in_place,
    fastest_threads,
    keep_faster,
    open_machine,
    rng_state,
    set_rng_state,
)
from runtime.distributed import ALONE, World, join
from runtime.forecast import (
    CHECKPOINTS_KEPT,
    DAY,
    Forecast,
    forecast_table,
    format_bytes,
    format_seconds,
    free_disk,
)
from runtime.memory import available_memory, disable_malloc_trim, peak_memory
from runtime.metrics import MetricsLog, NonFiniteGuard, read_rows
from runtime.run import TrainingCommand, is_finished
from runtime.signals import StopSignals, without_garbage_collection
from runtime.threads import available_cores
from sharding import ShardedOptimizer
from tokenizer import Tokenizer

STOP_NOTICE = "stopping after this step; again stops now and saves nothing"
SMALL_BATCH_FLOPS = 5e11    # of a batch, below which threads may wait longer than they work: a second or so of one core
SHORTER = "--max_seconds=3600 fits the whole schedule into an hour"
MAX_TIMING_SECONDS = 5.0    # of --dry_run, beyond one step
TYPICAL_MFU = 0.4  # of a CPU, for a guess at how long a run takes
MIN_SECONDS_TO_COMPILE = 1200.0  # of a run on a CPU, where compiling takes up to a minute and may save a tenth
MANY_PROCESSES = "train.py", "finetune.py", "selfplay.py"  # scripts that torchrun may start
MAX_FP16_SKIPS = 40  # in a row, after which the loss scale is at 1e-7 and no scale helps


@dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to look."""
    max_iter: int = flag(None, "optimizer steps; each sees batch_size * num_batch_accum * block_size tokens (default: 5000, "
                               "if no other end is given; the first end that is reached counts)", at_least=1,
                         on_resume="warn", scope="run")
    max_tokens: int = flag(None, "stop after this many tokens", at_least=1, on_resume="warn", scope="run")
    max_seconds: float = flag(None, "stop after this many seconds of training, not counting compilation, validation and "
                                    "writing", above=0, on_resume="warn", scope="run")
    num_batch_accum: int = flag(16, "batches whose gradients are averaged in a step", at_least=1, on_resume="warn")
    val_intervals: int = flag(250, "steps between validations, each of which writes the checkpoint", at_least=1,
                              on_resume="warn", scope="shared")
    log_intervals: int = flag(10, "steps between rows of metrics.jsonl", at_least=1, on_resume="free", scope="shared")
    grad_clip: float = flag(0.0, "largest norm of the gradient; 0 does not clip", at_least=0, on_resume="warn")
    verbose: bool = flag(True, "0 prints nothing but errors", on_resume="unsaved", scope="run")

    def __post_init__(self):
        check_flags(self)
        if not (self.max_iter or self.max_tokens or self.max_seconds):
            object.__setattr__(self, "max_iter", 5000)

    def horizon(self) -> str:
        """"5,000 steps or 60 seconds"."""
        limits = ("steps", self.max_iter), ("tokens", self.max_tokens), ("seconds", self.max_seconds)
        return " or ".join(f"{limit:,} {unit}" for unit, limit in limits if limit)

    def progress(self, step: int, tokens: int, seconds: float) -> float:
        """Fraction of the run that is done, 1 or more at its end."""
        done = (step, self.max_iter), (tokens, self.max_tokens), (seconds, self.max_seconds)
        return max(now / limit for now, limit in done if limit)

    def remaining_steps(self, state: "TrainState", step_tokens: int, step_seconds: float) -> int:
        """Steps until the first limit, at these tokens and seconds a step."""
        limits = ((self.max_iter, state.step, 1), (self.max_tokens, state.tokens, step_tokens),
                  (self.max_seconds, state.seconds, step_seconds))
        return max(0, min(math.ceil((limit - done) / per_step) for limit, done, per_step in limits if limit))

    def remaining_validations(self, step: int, n_steps: int) -> int:
        """How many the `n_steps` after `step` hold: the last step always validates, and so does an untrained model."""
        end = step + n_steps
        return end // self.val_intervals - step // self.val_intervals + (end % self.val_intervals > 0) + (step == 0)


# -- state ------------------------------------------------------------------------------------------------------------

class Loader(Protocol):
    """Endless batches whose position can be saved and restored, see dataloader.TrainLoader."""

    def next_batch(self, model: GPT) -> tuple[Tensor, ...]:
        """The first tensor is (B, T) int64. model: for loaders that make their data with it (rollouts)."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict): ...

    def close(self): ...


@dataclass
class TrainState:
    """What changes during training. With the weights and the random generators, it is what a checkpoint holds."""
    model: GPT
    optimizer: CombinedOptimizer
    scaler: torch.amp.GradScaler
    loader: Loader
    guard: NonFiniteGuard
    step: int = 0              # optimizer steps done
    tokens: int = 0            # tokens trained on
    seconds: float = 0.0       # spent training, without validation and writing
    best: float | None = None  # the best value of the evaluation's metric so far
    reported_skips: int = 0    # skipped steps that have been reported

    def state_dict(self) -> dict:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "best": self.best,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "guard": self.guard.counts,
                "loader": self.loader.state_dict(), "rng": rng_state()}

    def load_state_dict(self, saved: dict):
        """Raises KeyError, TypeError or ValueError when `saved` is damaged, BadInput when it belongs to other data."""
        self.loader.load_state_dict(saved["loader"])
        self.step, self.tokens, self.seconds, self.best = (saved[name] for name in ("step", "tokens", "seconds", "best"))
        self.optimizer.load_state_dict(saved["optimizer"])
        if (scaler := saved["scaler"]) and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        if saved["guard"].shape != self.guard.counts.shape:
            raise ValueError("counts of skipped steps of another shape")  # copy_ would repeat them
        self.guard.counts.copy_(saved["guard"])
        self.reported_skips = self.guard.read()["skipped"]
        set_rng_state(saved["rng"])


@dataclass(frozen=True)
class TrainSetup:
    """What stays fixed during a run."""
    machine: Machine
    schedule: OptimizerConfig
    step_tokens: int                         # tokens per optimizer step
    settings: dict = field(default_factory=dict)  # the run's flags, from which it resumes
    tokenizer: Tokenizer | None = None       # goes into the checkpoint
    contents: dict = field(default_factory=dict)  # more entries of the checkpoint: the game whose moves the tokens are
    period: int = 1                          # steps from one rollout to the next; timings are means over whole periods
    script: str = ""                         # command that can resume the checkpoint
    writer: CheckpointWriter | None = None   # None: no checkpoints
    metrics: MetricsLog | None = None        # None: no rows

    def peak_lr(self) -> float:
        return self.schedule.peak_lr(self.step_tokens)

    def checkpoint_status(self) -> str:
        """What a run that fails now leaves behind."""
        if not join().is_main:
            return "what the first process has written is kept"
        return self.writer.checkpoint_status() if self.writer else "no checkpoints are written"


@dataclass(frozen=True)
class Evaluation:
    """run(state) -> numbers for a row, among them `metric`, of which the lowest value is the best, or the highest."""
    run: Callable[[TrainState], dict]
    metric: str = "val_loss"
    maximize: bool = False
    label: str = "val {:.4f} nats/token"  # the metric in the line of an evaluation

    def is_better(self, value: float, best: float | None) -> bool:
        return best is None or (value > best if self.maximize else value < best)


@torch.no_grad()
def save(state: TrainState, setup: TrainSetup, is_best: bool = False, blocking: bool = True):
    """Writes the checkpoint, if the run has a writer; of several processes, the main one does. blocking: it is on disk when
    this returns.

    Raises FloatingPointError rather than replace a good checkpoint by weights that are no longer finite.
    """
    if not torch.isfinite(get_total_norm(state.model.parameters())):
        raise divergence_error(state, setup, "the weights are no longer finite")
    training = state.state_dict() if setup.writer is not None else {}  # in all processes: each may have a part of it
    if not join().is_main:
        return
    if setup.writer is not None:
        vocabulary = {"tokenizer": setup.tokenizer.to_json()} if setup.tokenizer else {}
        assert vocabulary or setup.contents, "a checkpoint says what its tokens mean"
        machine = {"machine": str(setup.machine), "dtype": setup.machine.dtype}
        setup.writer.save(state.model.to_checkpoint() | vocabulary | setup.contents | {
            "training": training | machine | {"settings": setup.settings, "script": setup.script, "is_best": is_best}},
            state.step, is_best, blocking)
    if setup.metrics is not None:
        setup.metrics.open()  # after the checkpoint: where that cannot be written, the files of an earlier run stay


# -- the loop ---------------------------------------------------------------------------------------------------------

def fit(state: TrainState, loop: LoopConfig, loss_fn: Callable, evaluate: Evaluation, setup: TrainSetup,
        stop_when: Callable[[TrainState, dict], bool] = lambda state, row: False,
        on_timed: Callable[[float, float | None], None] | None = None, world: World | None = None) -> int | None:
    """Trains `state` until `loop` says it is done; returns the signal that stopped it before, or None.

    loss_fn(model, batch) -> nats/token, a scalar; or that and the batch's weight in the mean of a step, where it is not the
    same for all; batch: what the loader makes, on the device. The evaluation runs before the first step, where a loss far
    from ln(vocab_size) means that something is wired wrongly, every `val_intervals` steps and at the end; each time the
    checkpoint is written. stop_when(state, row): called after each evaluation with its row; True ends the run there.
    on_timed(seconds of a step, seconds of the first evaluation with its checkpoint, or None where a resumed run has none):
    called once, after the first few steps. world: the processes that share the batches, by default all. Raises
    FloatingPointError when the run has diverged; the checkpoint is then the last good one.
    """
    timer, world = StepTimer(on_timed, setup.period), world or join()
    with StopSignals(STOP_NOTICE if loop.verbose else "") as signals, without_garbage_collection(), progress_bar(
            total=loop.max_iter, initial=state.step, unit="step", disable=not loop.verbose) as bar:
        if state.step == 0 and not (setup.metrics and setup.metrics.rows):
            start = time.perf_counter()
            row = start_run(state, evaluate, setup)
            timer.evaluation_seconds = time.perf_counter() - start
            update_progress(bar, evaluate, row, 0.0)
            if stop_when(state, row):
                return None
        stopped, last_row = None, (time.perf_counter(), state.tokens)
        progress = loop.progress(state.step, state.tokens, state.seconds)
        while progress < 1 and not stopped:
            set_rates(state.optimizer, state.step, progress, setup.schedule)
            with timer:
                loss, n_tokens = train_step(state, loop, loss_fn, setup.machine, world)
                timer.loss = loss
                state.step += 1
                state.tokens += n_tokens
            bar.update()
            now = state.seconds + time.perf_counter() - last_row[0]
            signal, progress = world.largest(signals.signal or 0, loop.progress(state.step, state.tokens, now))
            stopped = int(signal) or None
            is_val = state.step % loop.val_intervals == 0 or progress >= 1
            is_log = is_val or state.step % loop.log_intervals == 0
            if not (is_log or stopped):
                continue
            row = end_interval(state, setup, loss, *last_row)
            is_best = is_val and evaluate_into(row, state, evaluate, setup)
            is_solved = is_val and stop_when(state, row)
            if is_log:
                write_row(setup, row)
                state.guard.start_row()
            if is_val or stopped:
                save(state, setup, is_best, blocking=bool(stopped) or is_solved or progress >= 1)
            if setup.writer is not None:
                setup.writer.check()
            if is_log:
                update_progress(bar, evaluate, row, progress)
            if is_solved:
                return stopped
            last_row = time.perf_counter(), state.tokens
        return stopped if progress < 1 else None


class StepTimer:
    """A context that times the first training steps of a run, and then calls `on_timed`, see `fit`. It waits for the device
    at each of them, and changes no number."""
    MIN_STEPS, MIN_SECONDS, SLOW_STEP = 3, 1.0, 10.0

    def __init__(self, on_timed: Callable[[float, float | None], None] | None, period: int = 1):
        """period: see TrainSetup."""
        self.on_timed, self.period, self.evaluation_seconds = on_timed, period, None
        self.times: list[float] = []
        self.loss: Tensor | None = None  # of the step inside the context

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, error, *rest):
        if self.on_timed is None or error is not None:
            return
        self.loss.item()
        self.times.append(time.perf_counter() - self.start)
        warm = self.times[1:]  # the first step also allocates memory and starts threads
        is_enough = len(warm) >= self.MIN_STEPS and sum(warm) >= self.MIN_SECONDS or sum(warm) >= self.SLOW_STEP
        if self.period == 1 and (is_enough or not warm and self.times[0] >= self.SLOW_STEP):
            self.report(statistics.median(warm or self.times))
        elif self.period > 1 and is_enough and len(warm) % self.period == 0:  # a part of a period says nothing
            self.report(statistics.mean(warm))

    def report(self, step_seconds: float):
        self.on_timed(step_seconds, self.evaluation_seconds)
        self.on_timed = None


def start_run(state: TrainState, evaluate: Evaluation, setup: TrainSetup) -> dict:
    """Evaluates and saves the untrained model; returns the row of step 0."""
    row = {"step": 0, "tokens": 0, "seconds": 0.0, "flops": 0}
    evaluate_into(row, state, evaluate, setup)
    save(state, setup, is_best=True)  # before its row: rows without a checkpoint would block the same command
    write_row(setup, row)
    return row


def evaluate_into(row: dict, state: TrainState, evaluate: Evaluation, setup: TrainSetup) -> bool:
    """Adds the evaluation to `row`; returns whether it is the best so far. Raises FloatingPointError when its metric is not
    finite."""
    row |= evaluate.run(state)
    gc.collect()
    if not math.isfinite(value := row[evaluate.metric]):
        raise divergence_error(state, setup, f"{evaluate.metric} is {value}")
    if is_best := evaluate.is_better(value, state.best):
        state.best = value
    return is_best


def train_step(state: TrainState, loop: LoopConfig, loss_fn: Callable, machine: Machine,
               world: World = ALONE) -> tuple[Tensor, int]:
    """One optimizer step over `num_batch_accum` batches, of which each process of `world` has its part. loss_fn: see `fit`.
    Returns their mean loss, a scalar tensor that stays on the device, and how many tokens they held."""
    total, weights, n_tokens = 0.0, 0.0, 0
    for i in range(loop.num_batch_accum):
        if i % world.size != world.rank:
            state.model.draw_loops()  # as many draws in every process, so that a batch has the same wherever it is
            continue
        batch = machine.to_device(state.loader.next_batch(state.model))
        with machine.autocast():
            loss, *weight = as_tuple(loss_fn(state.model, batch))
        loss = loss / loop.num_batch_accum  # backward() sums gradients; we want their mean
        if weight:
            loss, weights = loss * weight[0], weights + weight[0] / loop.num_batch_accum
        state.scaler.scale(loss).backward()
        total = total + loss.detach()
        n_tokens += batch[0].numel()
    grads = [p.grad for p in state.model.parameters() if p.grad is not None]  # at inference time, most may be frozen
    is_weighted = isinstance(weights, Tensor)
    world.sum_in_place([*grads, total, *([weights] if is_weighted else [])])
    state.scaler.unscale_(state.optimizer)
    grads = [grad._values() if grad.is_sparse else grad for grad in grads]  # of a table, in which no row repeats
    if is_weighted:  # those of all processes are known now
        torch._foreach_mul_(grads, 1 / weights)
        total = total / weights
    norm = get_total_norm(grads)
    if loop.grad_clip:
        torch._foreach_mul_(grads, (loop.grad_clip / (norm + 1e-6)).clamp(max=1.0))  # as clip_grad_norm_
    state.optimizer.step(skip=state.guard.update(total, norm, state.step + 1))
    state.scaler.update()
    state.optimizer.zero_grad()
    return total, world.sum(n_tokens)


def as_tuple(loss: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Of what a loss_fn returns."""
    return loss if isinstance(loss, tuple) else (loss,)


def next_token_loss(model: GPT, batch: list[Tensor]) -> Tensor:
    """Mean loss in nats/token of a batch of inputs and targets, each (B, T)."""
    idx, targets = batch
    return model(idx, targets, loops=model.draw_loops())


def divergence_error(state: TrainState, setup: TrainSetup, what: str, step: int | None = None) -> FloatingPointError:
    return FloatingPointError(f"{what} at step {step or state.step}: lower --learning_rate, now {setup.peak_lr():.3g}, or "
                              f"try --grad_clip=1; {setup.checkpoint_status()}")


def report_skipped(state: TrainState, setup: TrainSetup, counts: dict):
    """Reports steps that were skipped. Raises FloatingPointError when there were too many in a row."""
    if counts["failed_at"]:
        what = f"loss or gradient not finite {state.guard.limit} times in a row"
        raise divergence_error(state, setup, what, counts["failed_at"])
    if counts["skipped"] > state.reported_skips and not state.scaler.is_enabled() and join().is_main:
        n = counts["skipped"] - state.reported_skips
        log_line(f"up to step {state.step:,}: skipped {n} step{'s' * (n > 1)} whose loss or gradient was not finite; "
                 f"{state.guard.limit} in a row end the run")
    state.reported_skips = counts["skipped"]


def end_interval(state: TrainState, setup: TrainSetup, loss: Tensor, clock: float, tokens: int) -> dict:
    """A row of metrics.jsonl, without evaluation, of what was trained since `clock` and `tokens`; counts the seconds.

    Waits for the device. Raises FloatingPointError when too many steps in a row were not finite.
    """
    train_loss, counts, machine = loss.item(), state.guard.read(), setup.machine
    seconds = time.perf_counter() - clock
    state.seconds += seconds
    report_skipped(state, setup, counts)
    flops_per_token, tok_per_sec = state.model.flops_per_token(), (state.tokens - tokens) / seconds
    return {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3),
            "flops": state.tokens * flops_per_token, "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss, "largest_loss": counts["largest_loss"], "grad_norm": counts["largest_norm"],
            "skipped": counts["skipped"], "tok_per_sec": round(tok_per_sec, 1),
            "mfu": float(f"{tok_per_sec * flops_per_token / machine.peak_flops():.4g}"),
            "peak_memory": peak_memory(machine.device)}


def write_row(setup: TrainSetup, row: dict):
    if setup.metrics is not None and join().is_main:
        setup.metrics.write(row)


def update_progress(bar: tqdm, evaluate: Evaluation, row: dict, progress: float):
    """Every row in the bar, evaluations as a line of their own as well. progress: predicts how many steps there will be."""
    if progress:
        bar.total = max(row["step"], round(row["step"] / progress))
    shown = {"loss": f"{row['train_loss']:.3f}", "tok/s": f"{row['tok_per_sec']:,.0f}"} if "train_loss" in row else {}
    if row.get("mfu"):
        shown["mfu"] = f"{row['mfu']:.1%}"
    if "lr" in row:
        shown |= {"lr": f"{row['lr']:.3g}", "memory": format_bytes(row["peak_memory"])}
    set_postfix(bar, shown)
    if evaluate.metric in row and not bar.disable:
        trained = f"train {row['train_loss']:.4f} | " if "train_loss" in row else ""
        value = evaluate.label.format(row[evaluate.metric])
        bpb = f", {row['val_bpb']:.4f} bits/byte" if "val_bpb" in row else ""
        line = f"step {row['step']:>6,} | {trained}{value}{bpb} | {row['tokens'] / 1e6:.2f} M tokens, {row['seconds']:.0f} s"
        for unit in " nats/token", "ens":  # "tokens" becomes "tok"
            if sys.stdout.isatty() and len(line) > terminal_width():
                line = line.replace(unit, "")
        tqdm.write(wrap(line, sys.stdout, " " * 14))


# -- a command that trains, from its flags to its end -----------------------------------------------------------------

@dataclass(frozen=True)
class RunFlags:
    """The flags that every such command has. Its own dataclass of the run inherits them."""
    resume_checkpoint: str = flag(None, "continue the checkpoint that this run would write, or the file given here; flags "
                                        "not given keep their value, and the result equals an uninterrupted run",
                                  bare="1", on_resume="unsaved", scope="run")
    overwrite: bool = flag(False, "let a new run replace the checkpoint and metrics of an earlier one", on_resume="unsaved",
                           scope="run")
    compile_model: bool = flag("auto", "torch.compile: a slow start, then faster steps; auto: on GPUs that Triton supports, "
                                       "and on a CPU for runs of 20 minutes or more, if a trial shows that it pays",
                               auto=True, on_resume="warn")
    threads: int = flag("auto", "threads of a CPU; auto: the fastest number in a few timed passes where the model is small, "
                                "which a resumed run keeps; 0, and auto for other models or where OMP_NUM_THREADS is set: "
                                "torch's own number", at_least=0, at_most=10_000, auto=True, on_resume="free",
                        scope="shared")
    dry_run: bool = flag(False, "print the forecast, and do nothing", on_resume="unsaved", scope="run")
    shard: str = flag("none", "of several processes (torchrun), what each keeps a part of; optimizer: the optimizer's state",
                      choices=("none", "optimizer"), on_resume="free")
    gradient_checkpointing: bool = flag(False, "keep only the inputs of blocks and recompute the rest: less memory, slower",
                                        on_resume="free")


@dataclass(frozen=True)
class RunOutput:
    """Where a run writes, which checkpoint it continues, if any, and the machine it runs on."""
    command: TrainingCommand
    writer: CheckpointWriter
    machine: Machine
    resumed: Path | None
    checkpoint: dict | None


@dataclass
class Run:
    """A run that is ready to start: what a command's `open_run` makes of its flags."""
    configs: tuple            # the command's NamedTuple, with what `open_run` has found out
    state: TrainState
    setup: TrainSetup
    loss_fn: Callable
    evaluate: Evaluation
    dry_run: Callable         # dry_run(): a forward and backward pass as the run's will be, without effect
    describe: Callable        # describe() -> the lines it starts with
    validation_seconds: Callable[[], float]  # estimate from a part of a validation, without effect
    epoch_tokens: float | None  # tokens in a pass over the training data; None where that has no end
    shorter: Callable[[float], str] = lambda flops: SHORTER
    """shorter(FLOP/s that the model reaches) -> what to do about a run that takes too long"""


def train_command(command: TrainingCommand, given: dict, path: Path, resumed: Path | None, resolve: Callable,
                  open_run: Callable, can_find_batch: bool = False) -> Run | None:
    """Runs a command that trains, from its flags to its end; returns the run, or None when it had already finished.

    given: the flags on the command line. resolve(start, given) -> values of all flags, where start is {} or the flags of
    the resumed run. open_run(configs, checkpoint, resumed) -> Run, before which nothing is written. Raises BadInput, and
    what `explain_failures` raises; SystemExit when a signal stops it.
    """
    ignore_output_errors()
    world = join()
    if world.size > 1 and command.script not in MANY_PROCESSES:
        raise BadInput(f"torchrun --nproc_per_node={world.size}: {command.script} trains in one process: start it with "
                       f"python")
    if world.n_restarts and not resumed and path.exists():
        resumed = path
    is_dry = given.get("dry_run", False)  # writes nothing, so it needs no lock
    locked = run_lock(path, f"--{command.out_flag}={path}") if world.is_main and not is_dry else nullcontext()
    with locked:
        with world.failing_together():
            start, checkpoint = command.read_checkpoint(resumed, given) if resumed else ({}, None)
            values = resolve(start, given) | {command.out_flag: path,
                                              "resume_checkpoint": str(resumed) if resumed else None}
            values |= ({"overwrite": True} if is_dry else {}) | ({} if world.is_main else {"verbose": False})
            configs, run = command.read_configs(values), None
        if checkpoint and is_finished(configs.loop, checkpoint["training"], resumed):
            return None
        with explain_failures(lambda: oom_advice(command, run.setup.settings if run else values, can_find_batch),
                              lambda: run.setup.checkpoint_status() if run else ""):
            with world.failing_together():
                run = open_run(configs, checkpoint, resumed)
            with world.failing_together():
                check_processes(run, world)
            check_compile(run.configs.run.compile_model, run.state.model)
            choose_threads(run)
            if is_dry:
                print_forecast(run)
                return None
            if configs.loop.verbose:
                print(*(wrap(line, sys.stdout, " " * 9) for line in run.describe()), sep="\n")
                report_start(command, run.setup, checkpoint)
                warn_of_days(run)
            del checkpoint  # as large as model and optimizer together
            try:
                fit_and_close(command, run)
            except FloatingPointError:  # found by all processes at the same step
                if world.is_main:
                    raise
                with suppress(OSError):
                    world.largest(0)  # until the one that says why has ended: torchrun would end it with this one
                raise SystemExit(DIVERGED) from None
        return run


def check_processes(run: Run, world: World):
    """Raises BadInput unless the batches of a step can be divided among the processes, which have the same flags."""
    n_batches = run.configs.loop.num_batch_accum
    if n_batches % world.size:
        raise BadInput(f"--num_batch_accum={n_batches}: {world.size} processes cannot take as many batches each: give a "
                       f"multiple of {world.size}")
    settings = world.gather(run.setup.settings)
    for rank, other in enumerate(settings):
        for name in sorted(settings[0]):
            if other[name] != settings[0][name]:
                raise BadInput(f"--{name}={other[name]}: in process {rank}, but {settings[0][name]} in the first: start all "
                               f"with the same flags")


def fit_and_close(command: TrainingCommand, run: Run):
    """`fit`, compiled where asked, with everything closed at its end. Raises SystemExit when a signal stops it."""
    state, setup, loop = run.state, run.setup, run.configs.loop
    compile_where_asked(run)
    try:
        stopped_by = fit(state, loop, run.loss_fn, run.evaluate, setup,
                         on_timed=partial(report_forecast, run) if loop.verbose else None)
    finally:
        state.loader.close()
        setup.metrics.close()
        with suppress(OSError, MemoryError):  # of a write in progress; where that matters, `fit` has waited for it
            setup.writer.wait()
    if stopped_by:
        join().largest(0)  # torchrun would end the process that writes once another has ended
        if not join().is_main:
            raise SystemExit(128 + stopped_by)
        log_line(f"stopped at step {state.step:,}, saved: `python {command.script} --{command.out_flag}="
                 f"{setup.writer.path} --resume_checkpoint` continues")
        raise SystemExit(128 + stopped_by)


def check_compile(compile_model: bool | str, model: GPT):
    """Raises BadInput where --compile_model=1 would compile the model for every number of loops that is drawn."""
    if compile_model is True and model.config.sampled_loops:
        raise BadInput("--compile_model=1: a model with --sampled_loops has another graph for each number of loops: leave "
                       "it out, or set --sampled_loops=0")


def compile_where_asked(run: Run):
    compile_model, model, device = run.configs.run.compile_model, run.state.model, run.setup.machine.device
    is_auto = compile_model == "auto"
    if is_auto:
        compile_model = can_compile(device) and not model.config.sampled_loops
    if compile_model and is_auto and device.type == "cpu":
        compile_where_faster(run)
    elif compile_model:
        compile_in_place(model, run.dry_run)


def compile_where_faster(run: Run):
    """On a CPU: compiles a long run, and stays with that where it is faster. The settings keep the choice, on which the
    run's last bits depend."""
    step_flops = run.setup.step_tokens * run.state.model.flops_per_token()
    step_seconds = step_flops / (TYPICAL_MFU * run.setup.machine.peak_flops())
    n_steps = run.configs.loop.remaining_steps(run.state, run.setup.step_tokens, step_seconds)
    if n_steps * step_seconds < MIN_SECONDS_TO_COMPILE or not compile_in_place(run.state.model, run.dry_run):
        return
    ratio = keep_faster(run.state.model, run.dry_run)
    is_compiled = run.setup.settings["compile_model"] = run.state.model._compiled_call_impl is not None
    if run.configs.loop.verbose:
        log_line(f"compiled steps take {ratio:.2f} times as long as eager ones: training "
                 f"{'compiled' if is_compiled else 'eager'}")


def choose_threads(run: Run):
    """Sets the threads of a CPU to --threads. The run's settings keep the number, on which its last bits depend."""
    n, n_all = run.configs.run.threads, torch.get_num_threads()
    if run.setup.machine.device.type != "cpu":
        n = 0
    elif n == "auto":
        batch_flops = run.state.model.flops_per_token() * run.setup.step_tokens / run.configs.loop.num_batch_accum
        is_small = n_all > 1 and "OMP_NUM_THREADS" not in os.environ and batch_flops < SMALL_BATCH_FLOPS
        n = fastest_threads(run.dry_run, n_all) if is_small else 0
    elif n:
        torch.set_num_threads(min(n, available_cores()))  # the checkpoint may come from a larger machine
    run.setup.settings["threads"] = n


def describe_machine(machine: Machine) -> str:
    """"cpu, bf16, 1 of 2 threads"."""
    if machine.device.type != "cpu":
        return str(machine)
    n, n_cores = torch.get_num_threads(), available_cores()
    return f"{machine}, {n} of {n_cores} threads" if n < n_cores else f"{machine}, {n} thread{'s' * (n > 1)}"


# -- forecast ---------------------------------------------------------------------------------------------------------

def measure_run(run: Run) -> Forecast:
    """The forecast of a run that has not begun, from a few timed steps, after which its state can only be thrown away.
    Writes nothing."""
    compile_where_asked(run)
    available = available_memory(run.setup.machine.device)
    try:
        step_seconds = time_step(run.state, run.configs.loop, run.loss_fn, run.setup, run.dry_run)
        return make_forecast(run, step_seconds, run.validation_seconds(), available)
    finally:
        run.state.loader.close()


def time_step(state: TrainState, loop: LoopConfig, loss_fn: Callable, setup: TrainSetup,
              pass_batch: Callable[[], None]) -> float:
    """Seconds of an optimizer step, from steps of one and of two batches: one of many may take minutes. pass_batch(): a
    forward and backward pass of a batch, which is timed instead where even one step is slow. Afterwards the state can only
    be thrown away."""
    def step_seconds(n_batches: int) -> float:
        start = time.perf_counter()
        loss, _ = train_step(state, replace(loop, num_batch_accum=n_batches), loss_fn, setup.machine)
        loss.item()  # waits for the device
        return time.perf_counter() - start
    set_rates(state.optimizer, state.step, 0.0, setup.schedule)
    if (model := state.model).sampled_loops:  # the largest number takes the most memory, the mean number the mean time
        model.sampled_loops, model.loops = False, model.config.max_loops
        pass_batch()
        model.loops = model.config.loops
    if setup.period > 1:
        return time_period(state, loop, loss_fn, setup)
    n_batches, start = loop.num_batch_accum, time.perf_counter()
    first = step_seconds(1)  # allocates memory and starts threads
    if first > MAX_TIMING_SECONDS:
        if n_batches > 1:
            start = time.perf_counter()
            pass_batch()
        return first + (n_batches - 1) * (time.perf_counter() - start)
    times, end = {1: [], 2: []}, time.perf_counter() + MAX_TIMING_SECONDS
    while not times[1] or len(times[1]) < 10 and time.perf_counter() < end:
        for n in range(1, min(2, n_batches) + 1):
            times[n].append(step_seconds(n))
    one = statistics.median(times[1])
    return one if n_batches == 1 else one + (n_batches - 1) * max(0.0, statistics.median(times[2]) - one)


def time_period(state: TrainState, loop: LoopConfig, loss_fn: Callable, setup: TrainSetup) -> float:
    """Seconds of an optimizer step, the mean over a period; the median of several, after one that also allocates memory."""
    times, end = [], time.perf_counter() + MAX_TIMING_SECONDS
    while not times or len(times) < 5 and time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(setup.period):
            loss, _ = train_step(state, loop, loss_fn, setup.machine)
        loss.item()  # waits for the device
        times.append((time.perf_counter() - start) / setup.period)
    return statistics.median(times[1:] or times)


def make_forecast(run: Run, step_seconds: float, validation_seconds: float | None, available: int) -> Forecast:
    """available: see Forecast.available_memory."""
    state, setup, loop = run.state, run.setup, run.configs.loop
    steps = loop.remaining_steps(state, setup.step_tokens, step_seconds)
    tensors = find_tensors(state.model.state_dict())
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}  # tied weights count once
    checkpoint_bytes = sum(sizes.values()) + state.optimizer.saved_bytes()
    path = setup.writer.path
    flops = setup.step_tokens * state.model.flops_per_token() / step_seconds
    epochs = run.epoch_tokens and steps * setup.step_tokens / run.epoch_tokens
    return Forecast(state.model.n_parameters(), peak_memory(setup.machine.device), available, setup.step_tokens,
                    step_seconds, steps, loop.remaining_validations(state.step, steps), validation_seconds,
                    epochs, CHECKPOINTS_KEPT * checkpoint_bytes, free_disk(path), run.shorter(flops))


def print_forecast(run: Run):
    forecast = measure_run(run)
    if not join().is_main:
        return
    print(forecast_table(forecast))
    for warning in forecast.warnings():
        say(warning)


def report_forecast(run: Run, step_seconds: float, validation_seconds: float | None):
    """Prints the forecast in one line, and its warnings, after the first steps of a run."""
    forecast = make_forecast(run, step_seconds, validation_seconds, available_memory(run.setup.machine.device))
    tqdm.write(wrap(forecast.line(), sys.stdout, " " * 9))
    for warning in forecast.warnings():
        log_line(warning)


def warn_of_days(run: Run):
    """Warns before the first validation and step, which may take minutes, where even the device's peak is too slow for the
    run to end in a day."""
    setup, flops = run.setup, run.setup.machine.peak_flops()
    step_seconds = setup.step_tokens * run.state.model.flops_per_token() / flops
    seconds = run.configs.loop.remaining_steps(run.state, setup.step_tokens, step_seconds) * step_seconds
    if seconds > DAY:
        log_line(f"warning: at least {format_seconds(seconds)}, at the peak speed of this device; --dry_run measures the "
                 f"run's own; {run.shorter(flops)}")


def open_output(command: TrainingCommand, path: Path, resumed: Path | None, overwrite: bool, device: DeviceConfig,
                checkpoint: dict | None) -> RunOutput:
    """Raises BadInput when the device is missing or the run would replace another's files."""
    training = checkpoint["training"] if checkpoint else {}
    writer = CheckpointWriter(path, run_folder(path), resumed, training.get("is_best", False))
    command.check_output(path, resumed, overwrite, writer)
    machine = open_machine(device, resume_dtype=training.get("dtype", ""))
    if machine.device.type == "cpu":
        disable_malloc_trim()
    return RunOutput(command, writer, machine, resumed, checkpoint)


def restore_state(output: RunOutput, model: GPT, tokenizer: Tokenizer | None, schedule: OptimizerConfig, loader: Loader,
                  step_tokens: int, settings: dict, contents: dict | None = None,
                  period: int = 1) -> tuple[TrainState, TrainSetup]:
    """A run's state, new or as the resumed checkpoint left it. From tokenizer on: see TrainSetup. Raises BadInput."""
    writer, checkpoint, rows = output.writer, output.checkpoint, []
    if join().is_main:
        output.command.check_writable(writer.path)
    if checkpoint:
        step = checkpoint["training"]["step"]
        folder = run_folder(writer.path if writer.resumes_in_place else output.resumed)  # one file may have two names
        rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= step]
    setup = TrainSetup(output.machine, schedule, step_tokens, settings, tokenizer, contents or {}, period,
                       output.command.script, writer, MetricsLog(run_folder(writer.path), rows))
    state = init_state(model, loader, setup)
    if checkpoint:
        with explain_damage(output.resumed):
            state.load_state_dict(checkpoint["training"])
        if writer.resumes_in_place:
            writer.saved_step = state.step
        elif not writer.same_run:
            state.best = None  # no checkpoint of this run is better yet
    return state, setup


def init_state(model: GPT, loader: Loader, setup: TrainSetup) -> TrainState:
    """The state before the first step, with an optimizer of its own."""
    machine, scaler = setup.machine, setup.machine.grad_scaler()
    optimizer, world = make_optimizer(model, setup.schedule, setup.step_tokens, machine.newton_schulz_dtype()), join()
    if world.size > 1 and setup.settings.get("shard") == "optimizer":
        optimizer = ShardedOptimizer(optimizer, world)
    if model.ngrams is not None and world.size > 1:
        model.ngrams.sparse = False  # each process sees other rows
    guard = NonFiniteGuard(machine.device, limit=MAX_FP16_SKIPS if scaler.is_enabled() else 2)
    return TrainState(model, optimizer, scaler, loader, guard)


def dry_run_step(model: GPT, machine: Machine, loss_fn: Callable, batch: Sequence[Tensor]):
    """Forward and backward pass of a batch on the device with `model.loops`, to see whether they work and what they need.
    Leaves no gradient, and draws no random number."""
    sampled_loops, model.sampled_loops = model.sampled_loops, False
    try:
        with machine.autocast():
            loss, *_ = as_tuple(loss_fn(model, batch))
        loss.backward()
    finally:
        model.sampled_loops = sampled_loops
        model.zero_grad(set_to_none=True)


def report_start(command: TrainingCommand, setup: TrainSetup, checkpoint: dict | None):
    path = setup.writer.path
    if path.exists() and setup.writer.saved_step < 0:
        print(f"replacing {path}")
    if checkpoint:
        command.report_changes(setup.settings, str(setup.machine), checkpoint["training"])


def oom_advice(command: TrainingCommand, values: dict, can_find_batch: bool) -> str:
    """What to try when memory runs out. values: flags. can_find_batch: whether the command has --batch_size=auto."""
    auto = "--batch_size=auto, " if can_find_batch and values["batch_size"] != "auto" else ""
    checkpointing = "" if values["gradient_checkpointing"] else "--gradient_checkpointing, "
    return f"{command.describe_memory(values)}: try less of that, {auto}{checkpointing}or a smaller model"
