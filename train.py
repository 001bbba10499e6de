"""Trains a GPT on prepared shards: the pretraining command, and `fit`, the one training loop.

    python train.py --data_path=data                               trains, writes checkpoints/gpt.pt
    python train.py --resume_checkpoint                            goes on exactly where that run stopped

Beside the checkpoint a folder of its name holds the run's numbers: checkpoints/gpt/metrics.jsonl and TensorBoard events.
"""
import argparse
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dataloader import Data, TrainLoader, explain_dead_worker, open_data, val_batches
from generate import generate_text
from model import GPT, GPTConfig
from optimizer import OptimizerConfig, load_optimizer, lr_scale, make_optimizer, set_learning_rate
from runtime.checkpoint import load_checkpoint, reading, save_checkpoint
from runtime.device import (
    DeviceConfig,
    Machine,
    compile_in_place,
    explain_out_of_memory,
    open_machine,
    rng_state,
    seed_everything,
    set_rng_state,
)
from runtime.files import require_writable
from runtime.flags import BadInput, Parser, add_flags, check_flags, command, flag, parse_bool, read_flags
from runtime.metrics import LossSums, MetricsLog, read_rows
from tokenizer import Tokenizer


@dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to look."""
    max_iter: int = flag(5_000, "optimizer steps; each sees batch_size * num_batch_accum * block_size tokens", at_least=1)
    num_batch_accum: int = flag(16, "batches whose gradients are averaged in a step", at_least=1)
    val_intervals: int = flag(250, "steps between validations, each of which writes the checkpoint", at_least=1)
    log_intervals: int = flag(10, "steps between rows of metrics.jsonl", at_least=1)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 does not clip", at_least=0)
    verbose: bool = flag(True, "0 prints nothing but errors")
    __post_init__ = check_flags


@dataclass(frozen=True)
class RunConfig:
    """The run."""
    data_path: Path = flag(Path("data"), "folder that download_data.py filled")
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "file to write; metrics go into the folder of its name")
    resume_checkpoint: str = flag(None, "go on with --checkpoint_path, or with the file given here; flags not given keep "
                                        "their\nvalue, and the run continues exactly as if never stopped", bare="1")
    overwrite: bool = flag(False, "let a fresh run replace the checkpoint and metrics of an earlier one")
    batch_size: int = flag(4, "blocks of text in a batch", at_least=1, at_most=1_000_000)
    val_iter: int = flag(20, "batches in a validation, always the same ones", at_least=1)
    dataloader_num_workers: int = flag(2, "processes that read batches ahead; 0 reads in this one", at_least=0,
                                        at_most=1000)
    compile_model: bool = flag(False, "torch.compile: a slow start, then faster steps")
    sample_tokens: int = flag(128, "tokens of text to make from the trained model at the end", at_least=0)
    seed: int = flag(1337, "of initial weights and of the order of the data", at_least=0, at_most=2**63 - 1)
    __post_init__ = check_flags


CONFIGS = RunConfig, GPTConfig, OptimizerConfig, LoopConfig, DeviceConfig
# What a resumed run may not change, what it may but is then another run, and what is no part of a run.
FIXED = {"seed", *(field.name for field in dataclasses.fields(GPTConfig))}
CHANGEABLE = {"max_iter", "num_batch_accum", "batch_size", "learning_rate", "weight_decay", "warmup_iter",
              "cooldown_frac", "grad_clip", "compile_model", "val_iter", "val_intervals"}
NOT_SAVED = {"checkpoint_path", "resume_checkpoint", "overwrite", "verbose"}
LESS_MEMORY = "halve --batch_size and double --num_batch_accum, or train a smaller model"


# -- the loop ---------------------------------------------------------------------------------------------------------

@dataclass
class TrainState:
    """Everything that moves while training, and where it is written. A checkpoint is all of it."""
    model: GPT
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    schedule: OptimizerConfig
    scaler: torch.amp.GradScaler
    loader: TrainLoader
    machine: Machine
    checkpoint_path: Path
    metrics: MetricsLog
    settings: dict               # the run's flags, from which it resumes
    step: int = 0                # optimizer steps done
    tokens: int = 0              # tokens trained on
    seconds: float = 0.0         # spent training, without validation and writing
    saved_step: int = -1         # that `checkpoint_path` holds; -1 before this run has written it

    def save(self):
        """Raises FloatingPointError rather than replace a good checkpoint by weights that are no longer finite."""
        if not all(torch.isfinite(weight).all() for weight in self.model.parameters()):
            raise diverged(self, "the weights are no longer finite")
        self.metrics.open()
        save_checkpoint(self.checkpoint_path, self.model.to_blob() | {
            "tokenizer": self.tokenizer.to_json(),
            "training": {
                "settings": self.settings, "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "loader": self.loader.state_dict(), "rng": rng_state(), "machine": str(self.machine)}})
        self.saved_step = self.step

    def kept(self) -> str:
        """What a run that fails now leaves behind."""
        if self.saved_step >= 0:
            return f"{self.checkpoint_path} holds step {self.saved_step}, from which --resume_checkpoint goes on"
        return f"{self.checkpoint_path} " + ("is as it was" if self.checkpoint_path.exists() else "was not written")

    def load(self, training: dict):
        """Takes over what `save` put under "training". The weights are the model's own business. Raises KeyError,
        TypeError or ValueError when it is damaged."""
        self.step, self.tokens, self.seconds = training["step"], training["tokens"], training["seconds"]
        load_optimizer(self.optimizer, training["optimizer"])
        if (scaler := training["scaler"]) and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        self.loader.load_state_dict(training["loader"])
        set_rng_state(training["rng"])


def fit(state: TrainState, loop: LoopConfig, loss_fn: Callable, on_eval: Callable) -> int | None:
    """Trains `state` up to `loop.max_iter`; returns the signal that stopped it before, or None.

    Pretraining, finetuning and self-play differ in loader and `loss_fn(model, batch)` -> nats/token, not here.
    on_eval(state) -> the numbers of a validation. It runs before the first step, where a loss far from ln(vocab_size)
    means that the wiring is wrong, every `val_intervals` and at the end; each time the checkpoint is written.
    Raises FloatingPointError when the loss is no longer finite; the checkpoint is then the last one written.
    """
    with StopSignals() as stop, progress_bar(state, loop) as bar:
        if state.step == 0 and not state.metrics.rows:
            row = {"step": 0, "tokens": 0, "seconds": 0.0, "flops": 0} | on_eval(state)
            state.metrics.write(row)
            state.save()
            show(bar, row)
        stopped, clock, clock_tokens = None, time.perf_counter(), state.tokens
        while state.step < loop.max_iter and not stopped:
            set_learning_rate(state.optimizer, lr_scale(state.step, loop.max_iter, state.schedule))
            loss, n_tokens = train_step(state, loop, loss_fn)
            state.step += 1
            state.tokens += n_tokens
            bar.update()
            stopped = stop.signal
            is_val = state.step % loop.val_intervals == 0 or state.step == loop.max_iter
            is_log = is_val or state.step % loop.log_intervals == 0
            if is_log or stopped:
                train_loss = loss.item()  # waits for the device, so not at every step
                if not math.isfinite(train_loss):
                    raise diverged(state, f"loss is {train_loss}")
                seconds = time.perf_counter() - clock
                state.seconds += seconds
                row = measure(state, train_loss, (state.tokens - clock_tokens) / seconds)
                if is_val:
                    row |= on_eval(state)
                    if not math.isfinite(row["val_loss"]):
                        raise diverged(state, f"validation loss is {row['val_loss']}")
                if is_log:
                    state.metrics.write(row)
                if is_val or stopped:
                    state.save()
                if is_log:
                    show(bar, row)  # last: where nobody reads any more, it ends the run
                clock, clock_tokens = time.perf_counter(), state.tokens
        return stopped if state.step < loop.max_iter else None


def diverged(state: TrainState, what: str) -> FloatingPointError:
    return FloatingPointError(f"{what} at step {state.step}: lower --learning_rate; {state.kept()}")


def train_step(state: TrainState, loop: LoopConfig, loss_fn: Callable) -> tuple[Tensor, int]:
    """One optimizer step over `num_batch_accum` batches of equal weight. Returns their mean loss, a scalar tensor that
    stays on the device, and how many tokens they held."""
    total, n_tokens = 0.0, 0
    for _ in range(loop.num_batch_accum):
        batch = [part.to(state.machine.device, non_blocking=True) for part in next(state.loader)]
        with state.machine.autocast():
            loss = loss_fn(state.model, batch) / loop.num_batch_accum  # backward() sums gradients; we want their mean
        state.scaler.scale(loss).backward()
        total = total + loss.detach()
        n_tokens += batch[0].numel()
    if loop.grad_clip:
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), loop.grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return total, n_tokens


def measure(state: TrainState, train_loss: float, tok_per_sec: float) -> dict:
    """A row of metrics.jsonl, without validation."""
    flops_per_token, peak = state.model.flops_per_token(), state.machine.peak_flops()
    return {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3),
            "flops": state.tokens * flops_per_token, "lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss, "tok_per_sec": round(tok_per_sec, 1),
            "mfu": round(tok_per_sec * flops_per_token / peak, 4) if peak else None,
            "peak_memory": state.machine.peak_memory()}


def progress_bar(state: TrainState, loop: LoopConfig) -> tqdm:
    # where nobody watches, a line every half minute is enough for a log
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=loop.max_iter, initial=state.step, unit="step", disable=not loop.verbose, dynamic_ncols=True,
                mininterval=interval, maxinterval=max(interval, 10))


def show(bar: tqdm, row: dict):
    """Every row in the bar, validations as a line of their own as well."""
    shown = {"loss": f"{row['train_loss']:.3f}", "tok/s": f"{row['tok_per_sec']:,.0f}"} if "train_loss" in row else {}
    if row.get("mfu"):
        shown["mfu"] = f"{row['mfu']:.1%}"
    bar.set_postfix(shown, refresh=False)
    if "val_loss" in row and not bar.disable:
        trained = f"train {row['train_loss']:.4f} | " if "train_loss" in row else ""
        tqdm.write(f"step {row['step']:>6,} | {trained}val {row['val_loss']:.4f} nats/token, {row['val_bpb']:.4f} "
                   f"bits/byte | {row['tokens'] / 1e6:.2f} M tokens, {row['seconds']:.0f} s")


class StopSignals:
    """Ctrl-C and SIGTERM let the step under way finish; `signal` then says which came. A second one stops at once, unless
    it comes within half a second: a terminal and a parent process may both pass on the same Ctrl-C."""
    AT_ONCE = 0.5

    def __init__(self):
        self.signal: int | None = None
        self.came = 0.0  # when

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            self.before = {number: signal.signal(number, self.request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request(self, number: int, frame):
        if not self.signal:
            self.signal, self.came = number, time.monotonic()
        elif time.monotonic() - self.came >= self.AT_ONCE:
            raise KeyboardInterrupt


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
            losses = model(idx.to(machine.device), targets.to(machine.device), reduction="none")
        sums.add(losses, targets, token_bytes)
    return {"val_loss": sums.loss, "val_bpb": sums.bits_per_byte}


def read_command(argv) -> tuple[dict, dict | None]:
    """The value of every flag, and the checkpoint to resume. A resumed run has the flags it was started with, except
    for those given now. Raises BadInput when one of these cannot change."""
    parser = Parser("Trains a GPT on the shards that download_data.py prepared.")
    add_flags(parser, *CONFIGS)
    values = vars(parser.parse_args(argv))
    resume, path = values["resume_checkpoint"], values["checkpoint_path"]
    if resume == "":
        raise BadInput("--resume_checkpoint=: is empty: give a path, or the bare flag to go on with --checkpoint_path")
    try:
        if resume is None or not parse_bool(resume):
            return values | {"resume_checkpoint": None}, None
    except argparse.ArgumentTypeError:  # neither yes nor no: a path
        path = Path(resume).expanduser()
    parser = Parser(None)
    add_flags(parser, *CONFIGS, suppress=True)
    given = vars(parser.parse_args(argv))
    blob = load_checkpoint(path)
    if "training" not in blob:
        raise BadInput(f"--resume_checkpoint={path}: holds a model but no training state to go on with")
    with reading(path):
        training = blob["training"]
        if type(training["step"]) is not int or training["step"] < 0:
            raise ValueError(f"step is {training['step']!r}")
        if missing := values.keys() - NOT_SAVED - training["settings"].keys():
            raise BadInput(f"does not say what {min(missing)} its run had: resume it with the version that wrote it")
        saved = {name: Path(value) if isinstance(values[name], Path) else value
                 for name, value in training["settings"].items() if name in values}
        for config in CONFIGS:
            read_flags(config, values | saved)
    for name in sorted(given.keys() & FIXED & saved.keys()):
        if given[name] != saved[name]:
            raise BadInput(f"--{name}={given[name]}: {path} was trained with {name}={saved[name]}, which a resumed run "
                           f"keeps: drop the flag, or start a fresh run at another --checkpoint_path")
    return {**values, "checkpoint_path": path, **saved, **given, "resume_checkpoint": str(path)}, blob


def run_folder(checkpoint_path: Path) -> Path:
    """Where a run's metrics go: checkpoints/gpt.pt -> checkpoints/gpt, and checkpoints/a -> checkpoints/a.run."""
    name = checkpoint_path.name
    return checkpoint_path.with_name(name.removesuffix(".pt") if name.endswith(".pt") and name != ".pt" else name + ".run")


def open_run(configs: list, values: dict, blob: dict | None) -> tuple[TrainState, Data, LoopConfig, RunConfig]:
    """Everything a run needs, new or as `blob` left it. configs: one of each of CONFIGS, read from `values`. Raises
    BadInput before any file is written."""
    run, gpt, schedule, loop, device = configs
    path, resumed = run.checkpoint_path, run.resume_checkpoint
    in_place = bool(resumed) and path.exists() and path.samefile(resumed)
    if path.is_dir():
        raise BadInput(f"--checkpoint_path={path}: is a folder: give a file, such as {path}.pt")
    if path.exists() and not run.overwrite and not in_place:
        raise BadInput(f"--checkpoint_path={path}: exists: go on with it by --resume_checkpoint, replace it by "
                       f"--overwrite, or choose another path")
    if not resumed and not run.overwrite and read_rows(run_folder(path) / "metrics.jsonl"):
        raise BadInput(f"--checkpoint_path={path}: {run_folder(path)} holds the metrics of an earlier run: replace them by "
                       f"--overwrite, or choose another path")
    machine = open_machine(device)
    data = open_data(run.data_path, None if blob else gpt.vocab_size)
    seed_everything(run.seed)
    loader = TrainLoader(data, run.batch_size, gpt.block_size, run.seed, run.dataloader_num_workers,
                         pin_memory=machine.device.type == "cuda")
    if blob:
        with reading(Path(resumed)):
            loader.load_state_dict(blob["training"]["loader"])
            model = GPT.from_blob(blob)
    else:
        model = GPT(dataclasses.replace(gpt, vocab_size=data.manifest.vocab_size))
    next(val_batches(data, 1, 1, gpt.block_size))  # validation data that are too few are refused now
    model.to(machine.device)
    values = values | {"vocab_size": model.config.vocab_size}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()
                if name not in NOT_SAVED}
    require_writable(path, f"--checkpoint_path={path}")
    require_writable(run_folder(path) / "metrics.jsonl", f"--checkpoint_path={path}")
    rows = []
    if blob:
        step = blob["training"]["step"]
        rows = [row for row in read_rows(run_folder(Path(resumed)) / "metrics.jsonl") if row["step"] <= step]
    state = TrainState(model, data.tokenizer, make_optimizer(model, schedule), schedule, machine.grad_scaler(), loader,
                       machine, path, MetricsLog(run_folder(path), rows), settings)
    if blob:
        with reading(Path(resumed)):
            state.load(blob["training"])
        state.saved_step = state.step if in_place else -1
    return state, data, loop, run


def report_changes(values: dict, state: TrainState, training: dict):
    """Says what makes the rest of a resumed run, or its numbers, differ from what they would have been."""
    for name in sorted(CHANGEABLE):
        if values[name] != training["settings"][name]:
            note = "; the learning-rate schedule now fits the new one" if name == "max_iter" else ""
            print(f"changed on resuming: {name} {training['settings'][name]} -> {values[name]}{note}")
    if str(state.machine) != training.get("machine"):
        print(f"changed on resuming: machine {training.get('machine')} -> {state.machine}")


def describe(state: TrainState, data: Data, loop: LoopConfig, run: RunConfig):
    """The lines a run begins with."""
    config, step_tokens = state.model.config, run.batch_size * loop.num_batch_accum * state.model.config.block_size
    train_tokens = data.manifest.total("train", "tokens")
    print(f"model    {config.n_layer} layers x {config.n_embd}, {config.mixer} and {config.mlp}, vocabulary "
          f"{config.vocab_size:,}: {state.model.n_parameters() / 1e6:.2f} M parameters, "
          f"{state.model.flops_per_token() / 1e6:.1f} MFLOP per token")
    print(f"data     {data.path}: {train_tokens / 1e6:.2f} M training tokens; {loop.max_iter:,} steps of {step_tokens:,} "
          f"see {loop.max_iter * step_tokens / train_tokens:.2f} epochs")
    print(f"machine  {state.machine}" + (
        f"; going on from step {state.step:,} of {run.resume_checkpoint}" if run.resume_checkpoint else ""))


@command
def main(argv=None):
    values, blob = read_command(argv)
    configs = [read_flags(config, values) for config in CONFIGS]
    if blob and values["max_iter"] <= blob["training"]["step"]:
        done = blob["training"]["step"]
        if values["max_iter"] < done:
            raise BadInput(f"--max_iter={values['max_iter']}: the checkpoint is at step {done} already: give more")
        if values["verbose"]:
            print(f"{values['resume_checkpoint']}: finished before at step {done:,}; a larger --max_iter trains on")
        return
    with explain_out_of_memory(LESS_MEMORY):
        state, data, loop, run = open_run(configs, values, blob)
        if loop.verbose:
            describe(state, data, loop, run)
            if run.checkpoint_path.exists() and state.saved_step < 0:
                print(f"replacing {run.checkpoint_path}")
            if blob:
                report_changes(values, state, blob["training"])
        del blob  # as large as model and optimizer together
        train(state, data, loop, run)


def train(state: TrainState, data: Data, loop: LoopConfig, run: RunConfig):
    """From an opened run to the sample of its text. Raises SystemExit when a signal stops it."""
    model, machine = state.model, state.machine
    if run.compile_model:
        def try_step():
            batch = torch.zeros(2, run.batch_size, model.config.block_size, dtype=torch.int64, device=machine.device)
            with machine.autocast():
                loss = next_token_loss(model, batch)
            loss.backward()
        compile_in_place(model, try_step)
    try:
        with explain_out_of_memory(LESS_MEMORY), explain_dead_worker(run.dataloader_num_workers):
            stopped_by = fit(state, loop, next_token_loss,
                             lambda state: validate(model, data, machine, run.val_iter, run.batch_size))
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:
        kind = MemoryError if isinstance(error, MemoryError) else OSError
        raise kind(f"{error}; {state.kept()}") from None
    finally:
        state.loader.close()
        state.metrics.close()
    if stopped_by:
        print(f"stopped at step {state.step:,}, saved: `python train.py --checkpoint_path={run.checkpoint_path} "
              f"--resume_checkpoint` goes on", file=sys.stderr)
        raise SystemExit(128 + stopped_by)
    if loop.verbose:
        print(f"saved {run.checkpoint_path} and {run_folder(run.checkpoint_path)}/metrics.jsonl; "
              f"`python generate.py --checkpoint_path={run.checkpoint_path}` samples from it")
        if run.sample_tokens:
            print("sample, the start of a document:")
            with machine.autocast():
                print("".join(generate_text(model, state.tokenizer, "", run.sample_tokens, 0.8, 50, run.seed)).strip())


if __name__ == "__main__":
    main()
