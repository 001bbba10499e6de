"""`fit`, the one training loop, and what a run needs to begin and to go on."""
import gc
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from dataloader import TrainLoader, explain_dead_worker
from model import GPT
from optimizer import MuonAdamW, OptimizerConfig, make_optimizer, set_rates
from runtime.checkpoint import CheckpointWriter, reading, run_folder
from runtime.cli import log_line
from runtime.config import check_flags, flag
from runtime.device import (
    DeviceConfig,
    Machine,
    can_compile,
    compile_in_place,
    explain_device_errors,
    open_machine,
    rng_state,
    set_rng_state,
)
from runtime.memory import disable_malloc_trim, peak_memory
from runtime.metrics import MetricsLog, NonFiniteGuard, read_rows
from runtime.run import TrainingCommand
from runtime.signals import StopSignals, without_garbage_collection
from tokenizer import Tokenizer


@dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to look."""
    max_iter: int = flag(None, "optimizer steps; each sees batch_size * num_batch_accum * block_size tokens (default: 5000, "
                               "if no\nother end is given; of several the first to come counts)", at_least=1)
    max_tokens: int = flag(None, "end after so many tokens", at_least=1)
    max_seconds: float = flag(None, "end after so many seconds of training, without compiling, validation and writing",
                              above=0)
    num_batch_accum: int = flag(16, "batches whose gradients are averaged in a step", at_least=1)
    val_intervals: int = flag(250, "steps between validations, each of which writes the checkpoint", at_least=1)
    log_intervals: int = flag(10, "steps between rows of metrics.jsonl", at_least=1)
    grad_clip: float = flag(0.0, "largest norm of the gradient; 0 does not clip", at_least=0)
    verbose: bool = flag(True, "0 prints nothing but errors")

    def __post_init__(self):
        check_flags(self)
        if not (self.max_iter or self.max_tokens or self.max_seconds):
            object.__setattr__(self, "max_iter", 5000)

    def ends(self) -> str:
        """"5,000 steps or 60 seconds"."""
        ends = ("steps", self.max_iter), ("tokens", self.max_tokens), ("seconds", self.max_seconds)
        return " or ".join(f"{end:,} {unit}" for unit, end in ends if end)

    def progress(self, step: int, tokens: int, seconds: float) -> float:
        """Share of the run that is done, 1 or more at its end."""
        done = (step, self.max_iter), (tokens, self.max_tokens), (seconds, self.max_seconds)
        return max(now / end for now, end in done if end)


DIVERGED = "lower --learning_rate"  # in the last line of a run that did, by which compare.py knows
FP16_SKIPS = 40  # in a row, after which the loss scale is at 1e-7 and no scale will do


# -- the loop ---------------------------------------------------------------------------------------------------------

@dataclass
class TrainState:
    """Everything that moves while training, and where it is written. A checkpoint is all of it."""
    model: GPT
    tokenizer: Tokenizer
    optimizer: MuonAdamW
    schedule: OptimizerConfig
    scaler: torch.amp.GradScaler
    loader: TrainLoader
    machine: Machine
    guard: NonFiniteGuard
    writer: CheckpointWriter
    metrics: MetricsLog
    settings: dict               # the run's flags, from which it resumes
    step: int = 0                # optimizer steps done
    tokens: int = 0              # tokens trained on
    seconds: float = 0.0         # spent training, without validation and writing
    best: float = math.inf       # lowest validation loss so far
    reported_skips: int = 0          # steps left out that the user has been told of
    saved_step: int = -1         # that the checkpoint holds; -1 before this run has written it
    script: str = "train.py"     # that can go on with the checkpoint

    @torch.no_grad()
    def save(self, is_best: bool = False, blocking: bool = True):
        """blocking: when this returns, it is on disk. Raises FloatingPointError rather than replace a good checkpoint by
        weights that are no longer finite."""
        if not torch.isfinite(get_total_norm(self.model.parameters())):
            raise diverged(self, "the weights are no longer finite")
        self.metrics.open()
        step = self.step
        blob = self.model.to_checkpoint() | {
            "tokenizer": self.tokenizer.to_json(),
            "training": {
                "settings": self.settings, "step": step, "tokens": self.tokens, "seconds": self.seconds, "best": self.best,
                "is_best": is_best, "script": self.script,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "watch": self.guard.counts,
                "loader": self.loader.state_dict(), "rng": rng_state(), "machine": str(self.machine)}}
        self.writer.save(blob, is_best, blocking, lambda: setattr(self, "saved_step", step))

    def step_tokens(self) -> int:
        return math.prod(self.settings[name] for name in ("batch_size", "num_batch_accum", "block_size"))

    def peak_lr(self) -> float:
        """The peak learning rate."""
        return self.schedule.peak_lr(self.step_tokens())

    def checkpoint_status(self) -> str:
        """What a run that fails now leaves behind."""
        path = self.writer.path
        with suppress(Exception):  # which is what is being told of, or comes later
            self.writer.wait()
        if self.saved_step >= 0:
            return f"{path} holds step {self.saved_step}, from which --resume_checkpoint goes on"
        return f"{path} " + ("is as it was" if path.exists() else "was not written")

    def load(self, training: dict):
        """Takes over what `save` put under "training". The weights are the model's own business. Raises KeyError,
        TypeError or ValueError when it is damaged."""
        self.step, self.tokens, self.seconds, self.best = (training[name] for name in ("step", "tokens", "seconds", "best"))
        self.optimizer.load_state_dict(training["optimizer"])
        if (scaler := training["scaler"]) and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        self.guard.counts.copy_(training["watch"])
        self.reported_skips = self.guard.read()["skipped"]
        self.loader.load_state_dict(training["loader"])
        set_rng_state(training["rng"])


def fit(state: TrainState, loop: LoopConfig, loss_fn: Callable, on_eval: Callable) -> int | None:
    """Trains `state` until `loop` says it is done; returns the signal that stopped it before, or None.

    Pretraining, finetuning and self-play differ in loader and `loss_fn(model, batch)` -> nats/token, not here.
    on_eval(state) -> the numbers of a validation. It runs before the first step, where a loss far from ln(vocab_size)
    means that the wiring is wrong, every `val_intervals` and at the end; each time the checkpoint is written.
    Raises FloatingPointError when the run has diverged; the checkpoint is then the last one written.
    """
    with StopSignals() as stop, without_garbage_collection(), progress_bar(state, loop) as bar:
        if state.step == 0 and not state.metrics.rows:
            row = {"step": 0, "tokens": 0, "seconds": 0.0, "flops": 0} | on_eval(state)
            state.best = require_finite(state, row)
            state.save(is_best=True)  # first: rows without a checkpoint would keep the same command from starting again
            state.metrics.write(row)
            show(bar, row, 0.0)
        stopped, clock, clock_tokens = None, time.perf_counter(), state.tokens
        progress = loop.progress(state.step, state.tokens, state.seconds)
        while progress < 1 and not stopped:
            set_rates(state.optimizer, state.step, progress, state.schedule)
            loss, n_tokens = train_step(state, loop, loss_fn)
            state.step += 1
            state.tokens += n_tokens
            with suppress(OSError):  # a terminal that is gone: its SIGHUP has saved before
                bar.update()
            stopped = stop.signal
            seconds = time.perf_counter() - clock
            progress = loop.progress(state.step, state.tokens, state.seconds + seconds)
            is_val = state.step % loop.val_intervals == 0 or progress >= 1
            is_log = is_val or state.step % loop.log_intervals == 0
            if is_log or stopped:
                train_loss, watched = loss.item(), state.guard.read()  # waits for the device, so not at every step
                seconds = time.perf_counter() - clock
                state.seconds += seconds
                report_skipped(state, watched)
                row = measure(state, train_loss, (state.tokens - clock_tokens) / seconds, watched)
                is_best = False
                if is_val:
                    row |= on_eval(state)
                    is_best = require_finite(state, row) < state.best
                    state.best = min(state.best, row["val_loss"])
                    gc.collect()
                if is_log:
                    state.metrics.write(row)
                    state.guard.start_row()
                if is_val or stopped:
                    state.save(is_best, blocking=bool(stopped) or progress >= 1)
                state.writer.check()
                if is_log:
                    show(bar, row, progress)  # last: where nobody reads any more, it ends the run
                clock, clock_tokens = time.perf_counter(), state.tokens
        return stopped if progress < 1 else None


def diverged(state: TrainState, what: str, step: int | None = None) -> FloatingPointError:
    return FloatingPointError(f"{what} at step {step or state.step}: {DIVERGED}, which is {state.peak_lr():.3g}, or "
                              f"--grad_clip=1; {state.checkpoint_status()}")


def require_finite(state: TrainState, row: dict) -> float:
    """The row's validation loss. Raises FloatingPointError."""
    if not math.isfinite(row["val_loss"]):
        raise diverged(state, f"validation loss is {row['val_loss']}")
    return row["val_loss"]


def report_skipped(state: TrainState, watched: dict):
    """Tells of a step that was left out. Raises FloatingPointError when it was not the first in a row."""
    if watched["failed_at"]:
        raise diverged(state, f"loss or gradient not finite {state.guard.limit} times in a row,", watched["failed_at"])
    if watched["skipped"] > state.reported_skips and not state.scaler.is_enabled():
        n = watched["skipped"] - state.reported_skips
        log_line(f"up to step {state.step:,}: {n} with a loss or gradient that is not finite, which changed nothing; "
            f"{state.guard.limit} in a row end the run")
    state.reported_skips = watched["skipped"]


def train_step(state: TrainState, loop: LoopConfig, loss_fn: Callable) -> tuple[Tensor, int]:
    """One optimizer step over `num_batch_accum` batches of equal weight. Returns their mean loss, a scalar tensor that
    stays on the device, and how many tokens they held."""
    total, n_tokens = 0.0, 0
    for _ in range(loop.num_batch_accum):
        batch = state.machine.to_device(next(state.loader))
        with state.machine.autocast():
            loss = loss_fn(state.model, batch) / loop.num_batch_accum  # backward() sums gradients; we want their mean
        state.scaler.scale(loss).backward()
        total = total + loss.detach()
        n_tokens += batch[0].numel()
    state.scaler.unscale_(state.optimizer)
    parameters = list(state.model.parameters())
    norm = get_total_norm([p.grad for p in parameters])
    if loop.grad_clip:
        clip_grads_with_norm_(parameters, loop.grad_clip, norm)
    state.optimizer.step(skip=state.guard.update(total, norm, state.step + 1))
    state.scaler.update()
    state.optimizer.zero_grad()
    return total, n_tokens


def measure(state: TrainState, train_loss: float, tok_per_sec: float, watched: dict) -> dict:
    """A row of metrics.jsonl, without validation."""
    flops_per_token, peak = state.model.flops_per_token(), state.machine.peak_flops()
    return {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3),
            "flops": state.tokens * flops_per_token, "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss, "largest_loss": watched["largest_loss"], "grad_norm": watched["largest_norm"],
            "skipped": watched["skipped"], "tok_per_sec": round(tok_per_sec, 1),
            "mfu": round(tok_per_sec * flops_per_token / peak, 4), "peak_memory": peak_memory(state.machine.device)}


def progress_bar(state: TrainState, loop: LoopConfig) -> tqdm:
    # where nobody watches, a line every half minute is enough for a log
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=loop.max_iter, initial=state.step, unit="step", disable=not loop.verbose, dynamic_ncols=True,
                mininterval=interval, maxinterval=max(interval, 10))


def show(bar: tqdm, row: dict, progress: float):
    """Every row in the bar, validations as a line of their own as well. progress: from which follows how many steps there
    will be."""
    if progress:
        bar.total = max(row["step"], round(row["step"] / progress))
    shown = {"loss": f"{row['train_loss']:.3f}", "tok/s": f"{row['tok_per_sec']:,.0f}"} if "train_loss" in row else {}
    if row.get("mfu"):
        shown["mfu"] = f"{row['mfu']:.1%}"
    bar.set_postfix(shown, refresh=False)
    if "val_loss" in row and not bar.disable:
        trained = f"train {row['train_loss']:.4f} | " if "train_loss" in row else ""
        tqdm.write(f"step {row['step']:>6,} | {trained}val {row['val_loss']:.4f} nats/token, {row['val_bpb']:.4f} "
                   f"bits/byte | {row['tokens'] / 1e6:.2f} M tokens, {row['seconds']:.0f} s")


# -- pretraining ------------------------------------------------------------------------------------------------------

def next_token_loss(model: GPT, batch: list[Tensor]) -> Tensor:
    """Mean loss in nats/token of a batch of inputs and targets, each (B, T)."""
    idx, targets = batch
    return model(idx, targets)


def open_place(command: TrainingCommand, path: Path, resumed: Path | None, overwrite: bool, device: DeviceConfig,
               blob: dict | None) -> tuple[CheckpointWriter, Machine]:
    """Where a run writes, and the machine it runs on. Raises BadInput."""
    writer = CheckpointWriter(path, run_folder(path), resumed, bool(blob) and blob["training"].get("is_best", False))
    command.require_place(path, resumed, overwrite, writer)
    machine = open_machine(device, resume_dtype=str(blob["training"].get("machine")).rpartition(", ")[2] if blob else "")
    if machine.device.type == "cpu":
        disable_malloc_trim()
    return writer, machine


def make_state(command: TrainingCommand, model: GPT, tokenizer: Tokenizer, schedule: OptimizerConfig, loader: TrainLoader,
               machine: Machine, writer: CheckpointWriter, settings: dict, resumed: Path | None,
               blob: dict | None) -> TrainState:
    """New, or as `blob`, the checkpoint `resumed`, left it. Raises BadInput."""
    path = writer.path
    command.check_writable(path)
    rows = []
    if blob:
        step = blob["training"]["step"]
        rows = [row for row in read_rows(run_folder(resumed) / "metrics.jsonl") if row["step"] <= step]
    scaler = machine.grad_scaler()
    guard = NonFiniteGuard(machine.device, limit=FP16_SKIPS if scaler.is_enabled() else 2)
    state = TrainState(model, tokenizer, None, schedule, scaler, loader, machine, guard, writer,
                       MetricsLog(run_folder(path), rows), settings, script=command.script)
    state.optimizer = make_optimizer(model, schedule, state.step_tokens(), machine.newton_schulz_dtype())
    if blob:
        with reading(resumed):
            loader.load_state_dict(blob["training"]["loader"])
            state.load(blob["training"])
        state.saved_step = state.step if writer.resumes_in_place else -1
    return state


def report_start(command: TrainingCommand, state: TrainState, blob: dict | None):
    path = state.writer.path
    if path.exists() and state.saved_step < 0:
        print(f"replacing {path}")
    if blob:
        command.report_changes(state.settings, str(state.machine), blob["training"])


def train(state: TrainState, loop: LoopConfig, loss_fn: Callable, on_eval: Callable, compile_model: bool | str,
          try_step: Callable, command: TrainingCommand):
    """`fit`, with everything closed at its end. try_step(): a step as they will be, to see whether it can be compiled.
    Raises SystemExit when a signal stops it, OSError and MemoryError with what is kept."""
    path, num_workers = state.writer.path, state.loader.num_workers
    if can_compile(state.machine.device) if compile_model == "auto" else compile_model:
        compile_in_place(state.model, try_step)
    try:
        with explain_device_errors(oom_advice(state.settings)), explain_dead_worker(num_workers):
            stopped_by = fit(state, loop, loss_fn, on_eval)
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:
        kind = MemoryError if isinstance(error, MemoryError) else OSError
        raise kind(f"{error}; {state.checkpoint_status()}") from None
    finally:
        state.loader.close()
        state.metrics.close()
        with suppress(OSError):  # what is still being written; where that matters, `fit` has waited for it
            state.writer.wait()
    if stopped_by:
        with suppress(OSError):  # the terminal may be what is gone
            print(f"stopped at step {state.step:,}, saved: `python {command.script} --{command.out}={path} "
                  f"--resume_checkpoint` goes on", file=sys.stderr)
        raise SystemExit(128 + stopped_by)


def oom_advice(values: dict) -> str:
    """What to say where memory does not suffice."""
    what = "" if values["gradient_checkpointing"] else "--gradient_checkpointing, "
    auto = "" if values["batch_size"] == "auto" or "val_batch" not in values else "--batch_size=auto, "
    return f"--batch_size={values['batch_size']} blocks of {values['block_size']} tokens: try {auto}{what}or a smaller model"
