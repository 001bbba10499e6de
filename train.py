"""Trains a GPT on prepared shards: the pretraining command, and `fit`, the one training loop.

    python train.py --data_path=data                               trains, writes checkpoints/gpt.pt
    python train.py --resume_checkpoint                            goes on exactly where that run stopped

Beside the checkpoint a folder of its name holds the run's numbers: checkpoints/gpt/metrics.jsonl and TensorBoard events.
"""
import dataclasses
import gc
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from dataloader import Data, TrainLoader, explain_dead_worker, open_data, require_a_block, shard_loader, val_batches
from generate import SamplingConfig, generate_text
from model import GPT, GPTConfig
from optimizer import MuonAdamW, OptimizerConfig, make_optimizer, set_rates
from runtime.checkpoint import CheckpointWriter, reading, run_folder
from runtime.device import (
    DeviceConfig,
    Machine,
    can_compile,
    compile_in_place,
    explain_device_errors,
    keep_pages,
    known_dtype,
    open_machine,
    rng_state,
    seed_everything,
    set_rng_state,
)
from runtime.files import sole_writer
from runtime.flags import BadInput, check_flags, command, flag, read_flags, say
from runtime.metrics import LossSums, MetricsLog, Watch, draw_curves, read_rows
from runtime.resume import ENDS, TrainingCommand, is_finished, with_ends
from runtime.stop import StopSignals, without_garbage_collection
from runtime.trial import faster_machine, fitting_batch
from tokenizer import Tokenizer

PRESETS = {
    # nanoGPT's model and recipe: https://github.com/karpathy/nanoGPT, train.py and config/train_gpt2.py
    "gpt2": {"n_layer": 12, "n_head": 12, "head_size": 64, "block_size": 1024, "mlp": "gelu", "norm": "layer",
             "positions": "learned", "qk_norm": False, "value_residual": False, "embed_shortcut": False,
             "token_shift": False, "softcap": 0.0, "tied": True, "bias": True, "init": "gpt2", "optimizer": "gpt2",
             "learning_rate": 6e-4, "weight_decay": 0.1, "schedule": "cosine", "warmup_iter": 2000, "grad_clip": 1.0,
             "max_iter": 600_000, "batch_size": 12, "num_batch_accum": 40, "val_intervals": 1000},
    # Llama's model with our recipe: stock engines run what is exported of it
    "llama": {"mlp": "swiglu", "norm": "scaled_rms", "qk_norm": False, "value_residual": False, "embed_shortcut": False,
              "token_shift": False, "softcap": 0.0},
    "6gb": {"batch_size": 8, "num_batch_accum": 8},
    "p100": {"batch_size": 16, "num_batch_accum": 4, "compile_model": False},
    "cpu": {"n_layer": 4, "n_head": 4, "head_size": 64, "block_size": 256, "batch_size": 16, "num_batch_accum": 1,
            "max_iter": 2000, "val_intervals": 200, "val_iter": 50},
}


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


@dataclass(frozen=True)
class RunConfig:
    """The run."""
    data_path: Path = flag(Path("data"), "folder that download_data.py filled")
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "file to write; metrics go into the folder of its name")
    resume_checkpoint: str = flag(None, "go on with --checkpoint_path, or with the file given here; flags not given keep "
                                        "their\nvalue, and the run continues exactly as if never stopped", bare="1")
    overwrite: bool = flag(False, "let a fresh run replace the checkpoint and metrics of an earlier one")
    plot: str = flag(None, "train nothing: draw the run of --checkpoint_path, or of the checkpoints or files of metrics "
                           "given here\nwith commas between, into curves.png beside the metrics of the first", bare="1")
    preset: str = flag(None, "values for flags that are not given, see README", choices=tuple(PRESETS))
    batch_size: int = flag(4, "blocks of text in a batch; auto: as many as fit into memory, with --num_batch_accum changed "
                              "so that\na step sees the tokens it would have seen", at_least=1, at_most=1_000_000, auto=True)
    val_batch: int = None  # blocks in a batch of validation: the batch_size that the run was begun with
    val_iter: int = flag(20, "batches in a validation, always the same ones", at_least=1)
    dataloader_num_workers: int = flag(2, "processes that read batches ahead; 0 reads in this one", at_least=0,
                                        at_most=1000)
    compile_model: bool = flag("auto", "torch.compile: a slow start, then faster steps; auto: on GPUs that it knows",
                               auto=True)
    gradient_checkpointing: bool = flag(False, "keep only the inputs of blocks and compute the rest again: less memory, "
                                                "slower")
    sample_tokens: int = flag(128, "tokens of text to make from the trained model at the end", at_least=0)
    seed: int = flag(1337, "of initial weights and of the order of the data", at_least=0, at_most=2**63 - 1)
    __post_init__ = check_flags


CONFIGS = RunConfig, GPTConfig, OptimizerConfig, LoopConfig, DeviceConfig
# Of every run that trains: what it may change when it goes on, but is then another run, and what is no part of it.
CHANGEABLE = {*ENDS, "num_batch_accum", "batch_size", "learning_rate", "momentum_dtype", "weight_decay", "schedule",
              "warmup_iter", "cooldown_frac", "grad_clip", "compile_model", "val_intervals", "deterministic"}
NOT_SAVED = {"resume_checkpoint", "overwrite", "verbose"}
PRETRAINING = TrainingCommand(
    "train.py", "Trains a GPT on the shards that download_data.py prepared.", CONFIGS, "checkpoint_path",
    {"seed", "preset", "optimizer", *(field.name for field in dataclasses.fields(GPTConfig))},
    CHANGEABLE | {"val_iter"}, NOT_SAVED | {"checkpoint_path", "plot"})
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
    watch: Watch
    writer: CheckpointWriter
    metrics: MetricsLog
    settings: dict               # the run's flags, from which it resumes
    step: int = 0                # optimizer steps done
    tokens: int = 0              # tokens trained on
    seconds: float = 0.0         # spent training, without validation and writing
    best: float = math.inf       # lowest validation loss so far
    skips_told: int = 0          # steps left out that the user has been told of
    saved_step: int = -1         # that the checkpoint holds; -1 before this run has written it
    script: str = "train.py"     # that can go on with the checkpoint

    @torch.no_grad()
    def save(self, is_best: bool = False, at_once: bool = True):
        """at_once: when this returns, it is on disk. Raises FloatingPointError rather than replace a good checkpoint by
        weights that are no longer finite."""
        if not torch.isfinite(get_total_norm(self.model.parameters())):
            raise diverged(self, "the weights are no longer finite")
        self.metrics.open()
        step = self.step
        blob = self.model.to_blob() | {
            "tokenizer": self.tokenizer.to_json(),
            "training": {
                "settings": self.settings, "step": step, "tokens": self.tokens, "seconds": self.seconds, "best": self.best,
                "is_best": is_best, "script": self.script,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "watch": self.watch.counts,
                "loader": self.loader.state_dict(), "rng": rng_state(), "machine": str(self.machine)}}
        self.writer.save(blob, is_best, at_once, lambda: setattr(self, "saved_step", step))

    def step_tokens(self) -> int:
        return math.prod(self.settings[name] for name in ("batch_size", "num_batch_accum", "block_size"))

    def rate(self) -> float:
        """The peak learning rate."""
        return self.schedule.rate(self.step_tokens())

    def kept(self) -> str:
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
        self.watch.counts.copy_(training["watch"])
        self.skips_told = self.watch.look()["skipped"]
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
                train_loss, watched = loss.item(), state.watch.look()  # waits for the device, so not at every step
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
                    state.watch.start_row()
                if is_val or stopped:
                    state.save(is_best, at_once=bool(stopped) or progress >= 1)
                state.writer.check()
                if is_log:
                    show(bar, row, progress)  # last: where nobody reads any more, it ends the run
                clock, clock_tokens = time.perf_counter(), state.tokens
        return stopped if progress < 1 else None

def diverged(state: TrainState, what: str, step: int | None = None) -> FloatingPointError:
    return FloatingPointError(f"{what} at step {step or state.step}: {DIVERGED}, which is {state.rate():.3g}, or "
                              f"--grad_clip=1; {state.kept()}")


def require_finite(state: TrainState, row: dict) -> float:
    """The row's validation loss. Raises FloatingPointError."""
    if not math.isfinite(row["val_loss"]):
        raise diverged(state, f"validation loss is {row['val_loss']}")
    return row["val_loss"]


def report_skipped(state: TrainState, watched: dict):
    """Tells of a step that was left out. Raises FloatingPointError when it was not the first in a row."""
    if watched["failed_at"]:
        raise diverged(state, f"loss or gradient not finite {state.watch.limit} times in a row,", watched["failed_at"])
    if watched["skipped"] > state.skips_told and not state.scaler.is_enabled():
        n = watched["skipped"] - state.skips_told
        say(f"up to step {state.step:,}: {n} with a loss or gradient that is not finite, which changed nothing; "
            f"{state.watch.limit} in a row end the run")
    state.skips_told = watched["skipped"]


def train_step(state: TrainState, loop: LoopConfig, loss_fn: Callable) -> tuple[Tensor, int]:
    """One optimizer step over `num_batch_accum` batches of equal weight. Returns their mean loss, a scalar tensor that
    stays on the device, and how many tokens they held."""
    total, n_tokens = 0.0, 0
    for _ in range(loop.num_batch_accum):
        batch = state.machine.put(next(state.loader))
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
    state.optimizer.step(skip=state.watch.see(total, norm, state.step + 1))
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
            "mfu": round(tok_per_sec * flops_per_token / peak, 4), "peak_memory": state.machine.peak_memory()}


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


@torch.no_grad()
def validate(model: GPT, data: Data, machine: Machine, n_batches: int, batch_size: int) -> dict:
    """Loss in nats/token and bits per byte on the fixed validation batches."""
    sums, token_bytes = LossSums(), torch.from_numpy(data.tokenizer.token_bytes())
    for idx, targets in val_batches(data, n_batches, batch_size, model.config.block_size):
        with machine.autocast():
            # forward, not a call: a compiled model would compile again, without gradients and for the last, smaller batch
            losses = model.forward(idx.to(machine.device), targets.to(machine.device), reduction="none")
        sums.add(losses, targets, token_bytes)
    return {"val_loss": sums.loss, "val_bpb": sums.bits_per_byte}


def merged(start: dict, given: dict) -> dict:
    """The flags a run begins with, and those given. A batch_size that has yet to be found keeps the blocks of a step, as
    num_batch_accum batches of one; validation keeps the batches it would have had."""
    values = with_ends(start, given)
    is_auto = values["batch_size"] == "auto"
    values["val_batch"] = start["val_batch"] or (start if is_auto else values)["batch_size"]
    if is_auto:
        values["num_batch_accum"] *= start["batch_size"]
    return values


def open_run(configs: list, blob: dict | None) -> tuple[TrainState, Data, LoopConfig, RunConfig]:
    """Everything a run needs, new or as `blob` left it. configs: one of each of CONFIGS. Raises BadInput before any file is
    written."""
    run, gpt, schedule, loop, device = configs
    path, resumed = run.checkpoint_path, Path(run.resume_checkpoint) if run.resume_checkpoint else None
    writer, machine = open_place(PRETRAINING, path, resumed, run.overwrite, device, blob)
    data = open_data(run.data_path, None if blob else gpt.vocab_size)
    for split in ("train", "val"):
        require_a_block(data, split, gpt.block_size)
    seed_everything(run.seed)
    if blob:
        with reading(resumed):
            model = GPT.from_blob(blob)
    else:
        model = GPT(dataclasses.replace(gpt, vocab_size=data.manifest.vocab_size))
    model.to(machine.device)
    model.gradient_checkpointing = run.gradient_checkpointing
    if device.dtype == "auto" and machine.device.type == "cuda" and not known_dtype(machine.device) and not blob:
        machine = faster_machine(partial(step_of_zeros, model), machine)
    if run.batch_size == "auto":
        n_blocks = loop.num_batch_accum
        states = sum(8 * p.numel() for p in model.parameters())  # of the optimizer, which has none yet: at most two in fp32
        batch_size = fitting_batch(partial(step_of_zeros, model), machine, n_blocks, states)
        run = dataclasses.replace(run, batch_size=batch_size)
        loop = dataclasses.replace(loop, num_batch_accum=n_blocks // batch_size)
    loader = shard_loader(data, run.batch_size, gpt.block_size, run.seed, run.dataloader_num_workers,
                          pin_memory=machine.device.type == "cuda")
    settings = PRETRAINING.settings(run, model.config, schedule, loop, device)
    state = make_state(PRETRAINING, model, data.tokenizer, schedule, loader, machine, writer, settings, resumed, blob)
    return state, data, loop, run


def open_place(command: TrainingCommand, path: Path, resumed: Path | None, overwrite: bool, device: DeviceConfig,
               blob: dict | None) -> tuple[CheckpointWriter, Machine]:
    """Where a run writes, and the machine it runs on. Raises BadInput."""
    writer = CheckpointWriter(path, run_folder(path), resumed, bool(blob) and blob["training"].get("is_best", False))
    command.require_place(path, resumed, overwrite, writer)
    machine = open_machine(device, had=str(blob["training"].get("machine")).rpartition(", ")[2] if blob else "")
    if machine.device.type == "cpu":
        keep_pages()
    return writer, machine


def make_state(command: TrainingCommand, model: GPT, tokenizer: Tokenizer, schedule: OptimizerConfig, loader: TrainLoader,
               machine: Machine, writer: CheckpointWriter, settings: dict, resumed: Path | None,
               blob: dict | None) -> TrainState:
    """New, or as `blob`, the checkpoint `resumed`, left it. Raises BadInput."""
    path = writer.path
    command.require_writable(path)
    rows = []
    if blob:
        step = blob["training"]["step"]
        rows = [row for row in read_rows(run_folder(resumed) / "metrics.jsonl") if row["step"] <= step]
    scaler = machine.grad_scaler()
    watch = Watch(machine.device, limit=FP16_SKIPS if scaler.is_enabled() else 2)
    state = TrainState(model, tokenizer, None, schedule, scaler, loader, machine, watch, writer,
                       MetricsLog(run_folder(path), rows), settings, script=command.script)
    state.optimizer = make_optimizer(model, schedule, state.step_tokens(), machine.rough_dtype())
    if blob:
        with reading(resumed):
            loader.load_state_dict(blob["training"]["loader"])
            state.load(blob["training"])
        state.saved_step = state.step if writer.is_ours else -1
    return state


def step_of_zeros(model: GPT, machine: Machine, batch_size: int):
    """Forward and backward pass of a batch, to see whether they work here, and what they need. Leaves no gradient."""
    batch = torch.zeros(2, batch_size, model.config.block_size, dtype=torch.int64, device=machine.device)
    try:
        with machine.autocast():
            loss = next_token_loss(model, batch)
        loss.backward()
    finally:
        model.zero_grad(set_to_none=True)


def describe(state: TrainState, data: Data, loop: LoopConfig, run: RunConfig):
    """The lines a run begins with."""
    config, step_tokens = state.model.config, state.step_tokens()
    train_tokens = data.manifest.total("train", "tokens")
    seen = min((tokens for tokens in (loop.max_iter and loop.max_iter * step_tokens, loop.max_tokens) if tokens), default=0)
    print(f"model    {config.n_layer} layers x {config.n_embd}, {config.mixer} and {config.mlp}"
          + (f", {config.linear} for every linear layer" if config.linear != "linear" else "") + f", vocabulary "
          f"{config.vocab_size:,}: {state.model.n_parameters() / 1e6:.2f} M parameters, "
          f"{state.model.flops_per_token() / 1e6:.1f} MFLOP per token, {state.settings['optimizer']} at "
          f"{state.rate():.3g}")
    print(f"data     {data.path}: {train_tokens / 1e6:.2f} M training tokens; steps of {step_tokens:,} "
          f"({run.batch_size} x {loop.num_batch_accum} blocks) until {loop.ends()}"
          + (f", {seen / train_tokens:.2f} epochs" if seen else ""))
    peak, known = state.machine.peak_flops(), state.machine.known_peak()
    print(f"machine  {state.machine}, {peak / 1e12:.3g} TFLOP/s {'by its data sheet' if known else 'measured'}" + (
        f"; going on from step {state.step:,} of {run.resume_checkpoint}" if run.resume_checkpoint else ""))


def plot(named: str, path: Path):
    """Draws the runs that --plot names: checkpoints, their folders, or files of rows. path: --checkpoint_path. The picture
    is beside the first one's rows."""
    paths = [path] if named == "1" else [Path(name.strip()).expanduser() for name in named.split(",")]
    runs, pictures = {}, []
    for path in paths:
        rows_at = path if path.suffix == ".jsonl" else (path if path.is_dir() else run_folder(path)) / "metrics.jsonl"
        pictures.append(rows_at.parent / "curves.png" if rows_at.name == "metrics.jsonl" else rows_at.with_suffix(".png"))
        runs[str(path)] = read_rows(rows_at)
        if not any({"val_loss", "tokens", "seconds"} <= row.keys() for row in runs[str(path)]):
            raise BadInput(f"--plot={named}: {rows_at} holds no rows of validations: give checkpoints of runs that have "
                           f"begun")
    draw_curves(runs, pictures[0])
    print(pictures[0])


@command
def main(argv=None):
    given, defaults = PRETRAINING.flags_given(argv), PRETRAINING.defaults()
    path, resumed = PRETRAINING.paths_of(given, defaults["checkpoint_path"])
    if "plot" in given:
        plot(given["plot"], path)
        return
    with sole_writer(run_folder(path), f"--checkpoint_path={path}"):
        start, blob = PRESETS.get(given.get("preset"), {}), None
        if resumed:
            start, blob = PRETRAINING.read_checkpoint(resumed, given)
        values = merged(defaults | start, given) | {
            "checkpoint_path": path, "resume_checkpoint": str(resumed) if resumed else None}
        configs = [read_flags(config, values) for config in CONFIGS]
        if blob and is_finished(configs[CONFIGS.index(LoopConfig)], blob["training"], resumed, values["verbose"]):
            return
        with explain_device_errors(less_memory(values)):
            state, data, loop, run = open_run(configs, blob)
            if loop.verbose:
                describe(state, data, loop, run)
                report_start(PRETRAINING, state, blob)
            del blob  # as large as model and optimizer together
            evaluate = lambda state: validate(state.model, data, state.machine, run.val_iter, run.val_batch)
            try_step = partial(step_of_zeros, state.model, state.machine, run.batch_size)
            train(state, loop, next_token_loss, evaluate, run.compile_model, try_step, PRETRAINING)
    if loop.verbose:
        report_end(state, run)


def report_start(command: TrainingCommand, state: TrainState, blob: dict | None):
    path = state.writer.path
    if path.exists() and state.saved_step < 0:
        print(f"replacing {path}")
    if blob:
        command.report_changes(state.settings, str(state.machine), blob["training"])


def report_end(state: TrainState, run: RunConfig):
    path = state.writer.path
    print(f"saved {path} and {run_folder(path)}/metrics.jsonl; `python generate.py --checkpoint_path={path}` samples "
          f"from it, `python train.py --checkpoint_path={path} --plot` draws its curves")
    if run.sample_tokens:
        print("sample, the start of a document:")
        with state.machine.autocast():
            print("".join(generate_text(state.model, state.tokenizer, "", run.sample_tokens, SamplingConfig(),
                                        seed=run.seed)).strip())


def train(state: TrainState, loop: LoopConfig, loss_fn: Callable, on_eval: Callable, compile_model: bool | str,
          try_step: Callable, command: TrainingCommand):
    """`fit`, with everything closed at its end. try_step(): a step as they will be, to see whether it can be compiled.
    Raises SystemExit when a signal stops it, OSError and MemoryError with what is kept."""
    path, num_workers = state.writer.path, state.loader.num_workers
    if can_compile(state.machine.device) if compile_model == "auto" else compile_model:
        compile_in_place(state.model, try_step)
    try:
        with explain_device_errors(less_memory(state.settings)), explain_dead_worker(num_workers):
            stopped_by = fit(state, loop, loss_fn, on_eval)
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:
        kind = MemoryError if isinstance(error, MemoryError) else OSError
        raise kind(f"{error}; {state.kept()}") from None
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


def less_memory(values: dict) -> str:
    """What to say where memory does not suffice."""
    what = "" if values["gradient_checkpointing"] else "--gradient_checkpointing, "
    auto = "" if values["batch_size"] == "auto" or "val_batch" not in values else "--batch_size=auto, "
    return f"--batch_size={values['batch_size']} blocks of {values['block_size']} tokens: try {auto}{what}or a smaller model"


if __name__ == "__main__":
    main()
