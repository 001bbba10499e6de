"""Pretrains a GPT on prepared shards.

    python train.py --data_path=data                               trains, writes checkpoints/gpt.pt
    python train.py --resume_checkpoint                            continues exactly where that run stopped

Beside the checkpoint a folder of its name holds the run's numbers: checkpoints/gpt/metrics.jsonl and TensorBoard events.
Owns the presets, the flags of pretraining and its validation; the loop is trainer.py's.
"""
import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from dataloader import shard_loader, val_batches, val_tokens
from evaluate import mean_losses
from experiments.plots import draw_curves, validation_note
from model import GPT, GPTConfig, meta_model
from optimizer import OptimizerConfig
from runtime.checkpoint import explain_damage, run_folder
from runtime.cli import command, read_path, say
from runtime.config import BadInput, check_flags, flag, shorten
from runtime.device import DeviceConfig, Machine, preferred_dtype, seed_everything, with_faster_dtype
from runtime.distributed import join
from runtime.forecast import format_seconds
from runtime.memory import largest_batch
from runtime.metrics import read_rows
from runtime.run import TrainingCommand, override_horizon
from sampling import SamplingConfig, generate_text
from shards import DataFolder, open_data, require_block
from trainer import (
    SHORTER,
    Evaluation,
    LoopConfig,
    Run,
    RunFlags,
    TrainSetup,
    TrainState,
    describe_machine,
    dry_run_step,
    next_token_loss,
    open_output,
    restore_state,
    train_command,
)

PRESETS = {
    # README's quick start: a few minutes on two CPU cores
    "quickstart": {"checkpoint_path": Path("checkpoints/quickstart.pt"), "overwrite": True, "n_layer": 4, "n_head": 4,
                   "head_size": 32, "block_size": 128, "batch_size": 16, "num_batch_accum": 1, "max_iter": 500,
                   "val_intervals": 100},
    # nanoGPT's model and recipe: https://github.com/karpathy/nanoGPT, train.py and config/train_gpt2.py
    "gpt2": {"n_layer": 12, "n_head": 12, "head_size": 64, "block_size": 1024, "mlp": "gelu", "norm": "layer",
             "positions": "learned", "qk_norm": False, "value_residual": False, "x0_residual": False,
             "token_shift": False, "softcap": 0.0, "tied": True, "bias": True, "init": "gpt2", "optimizer": "gpt2",
             "learning_rate": 6e-4, "weight_decay": 0.1, "schedule": "cosine", "warmup_iter": 2000, "grad_clip": 1.0,
             "max_iter": 600_000, "batch_size": 12, "num_batch_accum": 40, "val_intervals": 1000},
    # nanochat's model of 12 layers and its recipe: https://github.com/karpathy/nanochat, nanochat/gpt.py, nanochat/optim.py
    # and scripts/base_train.py; its shorter windows are a quarter of the context
    "nanochat": {"n_layer": 12, "n_head": 6, "head_size": 128, "block_size": 2048, "mlp": "relu2", "mixer": "SSSA",
                 "norm": "rms", "positions": "rotary", "rotary_base": 100_000.0, "qk_norm": True, "qk_scale": 1.2,
                 "value_residual": False, "value_embeddings": True, "x0_residual": True, "token_shift": False,
                 "smear": True, "backout": True, "softcap": 15.0, "tied": False, "bias": False, "init": "nanochat",
                 "optimizer": "nanochat", "momentum_dtype": "fp32", "weight_decay": 0.28, "warmup_iter": 39,
                 "cooldown_frac": 0.65, "final_lr_frac": 0.05, "max_iter": 2520, "batch_size": 32, "num_batch_accum": 8},
    # Llama's model with our recipe: its exports run in stock engines
    "llama": {"mlp": "swiglu", "norm": "scaled_rms", "qk_norm": False, "value_residual": False, "x0_residual": False,
              "token_shift": False, "softcap": 0.0},
    "6gb": {"batch_size": 8, "num_batch_accum": 8},
    "p100": {"batch_size": 16, "num_batch_accum": 4, "compile_model": False},
    "cpu": {"n_layer": 4, "n_head": 4, "head_size": 64, "block_size": 256, "batch_size": 16, "num_batch_accum": 1,
            "max_iter": 2000, "val_intervals": 200},
}


@dataclass(frozen=True)
class RunConfig(RunFlags):
    """The run."""
    data_path: Path = flag(Path("data"), "folder that download_data.py filled", on_resume="free", scope="shared")
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "file to write; metrics go into the folder of its name",
                                 on_resume="unsaved", scope="run")
    plot: str = flag(None, "train nothing: draw the run of --checkpoint_path, or of the checkpoints or metrics files given "
                           "here, separated by commas, into curves.png beside the metrics of the first", bare="1",
                     on_resume="unsaved", scope="run")
    preset: str = flag(None, "values for flags that are not given (docs/train.md)", choices=tuple(PRESETS))
    batch_size: int = flag(4, "blocks of text in a batch; auto: as many as fit into memory, with --num_batch_accum changed "
                              "so that a step sees the same tokens", at_least=1, at_most=1_000_000, auto=True,
                           on_resume="warn")
    val_batch: int = None  # blocks in a batch of validation: the batch_size that the run was started with
    val_bytes: int = flag(400_000, "bytes of text in a validation: the first documents of the validation split that hold as "
                                   "many, the same ones for every vocabulary", at_least=1, on_resume="warn", scope="shared")
    val_iter: int = flag(None, "batches in a validation, always the same ones, in place of --val_bytes", at_least=1,
                         on_resume="warn", scope="shared")
    train_tokens: int = flag(None, "tokens to train on, the first ones of the training split, over and over (default: all)",
                             at_least=2, scope="run")
    dataloader_num_workers: int = flag(2, "processes that read batches ahead; 0 reads in the training process", at_least=0,
                                       at_most=1000, on_resume="free")
    sample_tokens: int = flag(128, "tokens of text to generate from the trained model at the end", at_least=0,
                              on_resume="free", scope="run")
    seed: int = flag(1337, "random seed of the initial weights and the order of the data", at_least=0, at_most=2**63 - 1,
                     scope="run")
    __post_init__ = check_flags


class TrainConfigs(NamedTuple):
    """The flags of train.py."""
    run: RunConfig
    model: GPTConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    device: DeviceConfig


PRETRAINING = TrainingCommand("train.py", "Trains a GPT on the shards that download_data.py prepared.", TrainConfigs,
                              "checkpoint_path")


def validate(model: GPT, data: DataFolder, machine: Machine, run: RunConfig, show_progress: bool = False) -> dict:
    """The losses of `mean_losses` on the fixed validation batches."""
    block_size = model.config.block_size
    n_tokens = validation_tokens(data, run, block_size)
    batches = val_batches(data, n_tokens, run.val_batch, block_size)
    n_batches = math.ceil((n_tokens - 1) / run.val_batch / block_size)
    return mean_losses(model, data.tokenizer, machine, batches, n_batches if show_progress else None,
                       by_position=True)


def validation_tokens(data: DataFolder, run: RunConfig, block_size: int) -> int:
    """Tokens at the start of the validation split that a validation reads: whole blocks with --val_iter, else whole
    documents."""
    if not run.val_iter:
        return val_tokens(data, run.val_bytes)
    n_blocks = (len(data.split("val")) - 1) // block_size
    return min(run.val_iter * run.val_batch, n_blocks) * block_size + 1


def training_tokens(data: DataFolder, run: RunConfig) -> int:
    """Tokens in a pass over what the run trains on."""
    return run.train_tokens or data.manifest.total("train", "tokens")


def estimate_validation(model: GPT, data: DataFolder, machine: Machine, run: RunConfig) -> float:
    """Seconds of a validation, from its first batch."""
    n_tokens = validation_tokens(data, run, model.config.block_size)
    first = next(val_batches(data, n_tokens, run.val_batch, model.config.block_size))
    start = time.perf_counter()
    mean_losses(model, data.tokenizer, machine, [first])
    return (time.perf_counter() - start) * max(1.0, n_tokens / first[0].numel())


def shorter_run(configs: TrainConfigs, machine: Machine, flops: float) -> str:
    """What to do about a run that takes too long. flops: a second that the model reaches."""
    preset = PRESETS["cpu"]
    if machine.device.type != "cpu" or configs.model.n_embd <= preset["n_head"] * preset["head_size"]:
        return SHORTER
    shape = {name: value for name, value in preset.items() if name in GPTConfig.__dataclass_fields__}
    model = meta_model(GPTConfig(vocab_size=configs.model.vocab_size, **shape))
    n_tokens = preset["max_iter"] * preset["batch_size"] * preset["num_batch_accum"] * preset["block_size"]
    return f"--preset=cpu takes about {format_seconds(n_tokens * model.flops_per_token() / flops)}"


def resolve_flags(start: dict, given: dict) -> dict:
    """The flag values `start`, overridden by those given.

    batch_size=auto keeps the blocks of a step, as num_batch_accum batches of one, until it is found; validation keeps the
    batches it would have had.
    """
    values = override_horizon(start, given)
    is_auto = values["batch_size"] == "auto"
    if "val_bytes" in given and "val_iter" not in given:
        values["val_iter"] = None
    values["val_batch"] = start["val_batch"] or (start if is_auto else values)["batch_size"]
    if is_auto:
        values["num_batch_accum"] *= start["batch_size"]
    return values


def open_run(configs: TrainConfigs, checkpoint: dict | None, resumed: Path | None) -> Run:
    """Everything a run needs, new or as `checkpoint`, read from `resumed`, left it. Raises BadInput before any file is
    written."""
    run, device = configs.run, configs.device
    output = open_output(PRETRAINING, run.checkpoint_path, resumed, run.overwrite, device, checkpoint)
    machine, data = output.machine, open_data(run.data_path, None if checkpoint else configs.model.vocab_size)
    require_block(data, "train", configs.model.block_size)
    require_block(data, "val", configs.model.block_size if run.val_iter else 1)
    seed_everything(run.seed)
    if checkpoint:
        with explain_damage(resumed):
            model = GPT.from_checkpoint(checkpoint)
    else:
        model = GPT(dataclasses.replace(configs.model, vocab_size=data.manifest.vocab_size))
    model.to(machine.device)
    model.gradient_checkpointing = run.gradient_checkpointing
    if device.dtype == "auto" and machine.device.type == "cuda" and not preferred_dtype(machine.device) and not checkpoint:
        with join().failing_together():
            machine = with_faster_dtype(machine, partial(dry_run, model))
        machine = dataclasses.replace(machine, dtype=join().gather(machine.dtype)[0])  # all take what the first has found
        output = dataclasses.replace(output, machine=machine)
    configs = configs._replace(model=model.config)
    if run.batch_size == "auto":
        configs = find_batch_size(configs, model, machine)
    run, loop, block_size = configs.run, configs.loop, model.config.block_size
    loader = shard_loader(data, run.batch_size, block_size, run.seed, run.dataloader_num_workers,
                          pin_memory=machine.device.type == "cuda", n_tokens=run.train_tokens,
                          rank=join().rank, n_ranks=join().size)
    state, setup = restore_state(output, model, data.tokenizer, configs.optimizer, loader,
                                 run.batch_size * loop.num_batch_accum * block_size, PRETRAINING.settings(*configs))
    evaluate = Evaluation(lambda state: validate(state.model, data, machine, run, loop.verbose))
    return Run(configs, state, setup, next_token_loss, evaluate, partial(dry_run, model, machine, run.batch_size),
               partial(describe, state, setup, data, configs), partial(estimate_validation, model, data, machine, run),
               training_tokens(data, run), partial(shorter_run, configs, machine))


def find_batch_size(configs: TrainConfigs, model: GPT, machine: Machine) -> TrainConfigs:
    """With the largest batch that fits into the memory of every process, a step of as many blocks as before. Raises
    MemoryError if none does, BadInput where the processes cannot have as many blocks each."""
    n_blocks, world = configs.loop.num_batch_accum, join()
    if n_blocks % world.size:
        raise BadInput(f"--batch_size=auto: {world.size} processes cannot take as many each of the {n_blocks} blocks of a "
                       f"step: give a multiple of {world.size} as --num_batch_accum")
    optimizer_bytes = sum(8 * p.numel() for p in model.parameters())  # at most two fp32 states each, not allocated yet
    model.loops = model.config.max_loops
    n_sharing = world.local_size if machine.device.type == "cpu" else 1
    with world.failing_together():
        batch_size = largest_batch(partial(dry_run, model, machine), machine.device, n_blocks // world.size, optimizer_bytes,
                                   n_sharing)
    batch_size = -int(world.largest(-batch_size)[0])
    model.loops = model.config.loops
    return configs._replace(run=dataclasses.replace(configs.run, batch_size=batch_size),
                            loop=dataclasses.replace(configs.loop, num_batch_accum=n_blocks // batch_size))


def dry_run(model: GPT, machine: Machine, batch_size: int):
    """Forward and backward pass of a batch of zeros, see dry_run_step."""
    batch = torch.zeros(2, batch_size, model.config.block_size, dtype=torch.int64, device=machine.device)
    dry_run_step(model, machine, next_token_loss, batch)


def describe(state: TrainState, setup: TrainSetup, data: DataFolder, configs: TrainConfigs) -> list[str]:
    """The lines that a run starts with: model, data and machine."""
    config, loop, run = state.model.config, configs.loop, configs.run
    where = "every linear layer" if config.linear_scope == "all" else f"linear layers of {config.linear_scope}"
    linear = f", {config.linear} for {where}" if config.linear != "linear" else ""
    train_tokens = training_tokens(data, run)
    limits = loop.max_iter and loop.max_iter * setup.step_tokens, loop.max_tokens
    seen = min((tokens for tokens in limits if tokens), default=0)
    epochs = f", {seen / train_tokens:.2f} epochs" if seen else ""
    source = "by its data sheet" if setup.machine.datasheet_flops() else "measured"
    resumed = f"; resuming at step {state.step:,} of {run.resume_checkpoint}" if run.resume_checkpoint else ""
    return [f"model    {config.describe_shape()}, {config.mixer} and {config.mlp}{linear}, vocabulary "
            f"{config.vocab_size:,}: {state.model.n_parameters() / 1e6:.2f} M parameters, "
            f"{state.model.flops_per_token() / 1e6:.1f} MFLOP per token, {configs.optimizer.optimizer} at "
            f"{setup.peak_lr():.3g}",
            f"data     {data.path}: {train_tokens / 1e6:.2f} M training tokens; steps of {setup.step_tokens:,} "
            f"({run.batch_size} x {loop.num_batch_accum} blocks) until {loop.horizon()}{epochs}",
            f"machine  {describe_machine(setup.machine)}, {setup.machine.peak_flops() / 1e12:.3g} TFLOP/s {source}{resumed}"]


def report_end(state: TrainState, setup: TrainSetup, run: RunConfig):
    path = setup.writer.path
    say(f"saved {path} and {run_folder(path)}/metrics.jsonl; `python generate.py --checkpoint_path={path}` samples "
        f"from it, `python train.py --checkpoint_path={path} --plot` draws its curves")
    if run.sample_tokens:
        print("sample, the start of a document:")
        with setup.machine.autocast():
            print("".join(generate_text(state.model, setup.tokenizer, "", run.sample_tokens, SamplingConfig(),
                                        seed=run.seed)).strip())


def plot(value: str, default: Path):
    """Draws the runs that --plot={value} names, separated by commas: checkpoints, their folders, or files of metrics; "1" is
    the checkpoint `default`. The picture goes beside the first one's metrics."""
    named = f"--checkpoint_path={default}" if value == "1" else f"--plot={shorten(value)}"
    paths = [default] if value == "1" else [read_path(name.strip(), named) for name in value.split(",")]
    runs, pictures = {}, []
    for path in paths:
        rows_path = path if path.suffix == ".jsonl" else (path if path.is_dir() else run_folder(path)) / "metrics.jsonl"
        is_standard = rows_path.name == "metrics.jsonl"
        pictures.append(rows_path.parent / "curves.png" if is_standard else rows_path.with_suffix(".png"))
        if not rows_path.exists():
            raise BadInput(f"{named}: {shorten(rows_path)}: no such file: check the path")
        runs[str(path)] = read_rows(rows_path)
        if not any({"val_loss", "tokens", "seconds"} <= row.keys() for row in runs[str(path)]):
            raise BadInput(f"{named}: {shorten(rows_path)} holds no validation rows: give checkpoints of runs that have "
                           f"started")
    draw_curves(runs, pictures[0])
    print(pictures[0])
    if note := validation_note(runs):
        say(note)


@command
def main(argv=None):
    given = PRETRAINING.flags_given(argv)
    defaults = PRETRAINING.defaults() | PRESETS.get(given.get("preset"), {})
    path, resumed = PRETRAINING.paths(given, defaults["checkpoint_path"])
    if "plot" in given:
        plot(given["plot"], path)
        return
    resolve = lambda start, given: resolve_flags((PRETRAINING.defaults() if resumed else defaults) | start, given)
    run = train_command(PRETRAINING, given, path, resumed, resolve, open_run, can_find_batch=True)
    if run and run.configs.loop.verbose:
        report_end(run.state, run.setup, run.configs.run)


if __name__ == "__main__":
    main()
