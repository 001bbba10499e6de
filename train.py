"""Trains a GPT on prepared shards: the pretraining command, and `fit`, the one training loop.

    python train.py --data_path=data                               trains, writes checkpoints/gpt.pt
    python train.py --resume_checkpoint                            goes on exactly where that run stopped

Beside the checkpoint a folder of its name holds the run's numbers: checkpoints/gpt/metrics.jsonl and TensorBoard events.
"""
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dataloader import shard_loader, val_batches
from experiments.plots import draw_curves
from model import GPT, GPTConfig
from optimizer import OptimizerConfig
from runtime.checkpoint import reading, run_folder
from runtime.cli import command
from runtime.config import BadInput, check_flags, flag, read_flags
from runtime.device import DeviceConfig, Machine, explain_device_errors, faster_machine, known_dtype, seed_everything
from runtime.files import folder_lock
from runtime.memory import largest_batch
from runtime.metrics import LossSums, read_rows
from runtime.run import STOP_FLAGS, TrainingCommand, is_finished, override_horizon
from sampling import SamplingConfig, generate_text
from shards import Data, open_data, require_a_block
from trainer import LoopConfig, TrainState, make_state, next_token_loss, oom_advice, open_place, report_start, train

PRESETS = {
    # nanoGPT's model and recipe: https://github.com/karpathy/nanoGPT, train.py and config/train_gpt2.py
    "gpt2": {"n_layer": 12, "n_head": 12, "head_size": 64, "block_size": 1024, "mlp": "gelu", "norm": "layer",
             "positions": "learned", "qk_norm": False, "value_residual": False, "x0_residual": False,
             "token_shift": False, "softcap": 0.0, "tied": True, "bias": True, "init": "gpt2", "optimizer": "gpt2",
             "learning_rate": 6e-4, "weight_decay": 0.1, "schedule": "cosine", "warmup_iter": 2000, "grad_clip": 1.0,
             "max_iter": 600_000, "batch_size": 12, "num_batch_accum": 40, "val_intervals": 1000},
    # Llama's model with our recipe: stock engines run what is exported of it
    "llama": {"mlp": "swiglu", "norm": "scaled_rms", "qk_norm": False, "value_residual": False, "x0_residual": False,
              "token_shift": False, "softcap": 0.0},
    "6gb": {"batch_size": 8, "num_batch_accum": 8},
    "p100": {"batch_size": 16, "num_batch_accum": 4, "compile_model": False},
    "cpu": {"n_layer": 4, "n_head": 4, "head_size": 64, "block_size": 256, "batch_size": 16, "num_batch_accum": 1,
            "max_iter": 2000, "val_intervals": 200, "val_iter": 50},
}


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
CHANGEABLE = {*STOP_FLAGS, "num_batch_accum", "batch_size", "learning_rate", "momentum_dtype", "weight_decay", "schedule",
              "warmup_iter", "cooldown_frac", "grad_clip", "compile_model", "val_intervals", "deterministic"}
NOT_SAVED = {"resume_checkpoint", "overwrite", "verbose"}
PRETRAINING = TrainingCommand(
    "train.py", "Trains a GPT on the shards that download_data.py prepared.", CONFIGS, "checkpoint_path",
    {"seed", "preset", "optimizer", *(field.name for field in dataclasses.fields(GPTConfig))},
    CHANGEABLE | {"val_iter"}, NOT_SAVED | {"checkpoint_path", "plot"})


@torch.no_grad()
def validate(model: GPT, data: Data, machine: Machine, n_batches: int, batch_size: int) -> dict:
    """Loss in nats/token and bits per byte on the fixed validation batches."""
    sums, token_bytes = LossSums(), torch.from_numpy(data.tokenizer.token_bytes())
    for idx, targets in val_batches(data, n_batches, batch_size, model.config.block_size):
        with machine.autocast():
            # forward, not a call: a compiled model would compile again, without gradients and for the last, smaller batch
            losses = model.eager_forward(idx.to(machine.device), targets.to(machine.device), reduction="none")
        sums.add(losses, targets, token_bytes)
    return {"val_loss": sums.loss, "val_bpb": sums.bits_per_byte}


def resolve_flags(start: dict, given: dict) -> dict:
    """The flags a run begins with, and those given. A batch_size that has yet to be found keeps the blocks of a step, as
    num_batch_accum batches of one; validation keeps the batches it would have had."""
    values = override_horizon(start, given)
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
            model = GPT.from_checkpoint(blob)
    else:
        model = GPT(dataclasses.replace(gpt, vocab_size=data.manifest.vocab_size))
    model.to(machine.device)
    model.gradient_checkpointing = run.gradient_checkpointing
    if device.dtype == "auto" and machine.device.type == "cuda" and not known_dtype(machine.device) and not blob:
        machine = faster_machine(partial(dry_run_step, model), machine)
    if run.batch_size == "auto":
        n_blocks = loop.num_batch_accum
        states = sum(8 * p.numel() for p in model.parameters())  # of the optimizer, which has none yet: at most two in fp32
        batch_size = largest_batch(partial(dry_run_step, model, machine), machine.device, n_blocks, states)
        run = dataclasses.replace(run, batch_size=batch_size)
        loop = dataclasses.replace(loop, num_batch_accum=n_blocks // batch_size)
    loader = shard_loader(data, run.batch_size, gpt.block_size, run.seed, run.dataloader_num_workers,
                          pin_memory=machine.device.type == "cuda")
    settings = PRETRAINING.settings(run, model.config, schedule, loop, device)
    state = make_state(PRETRAINING, model, data.tokenizer, schedule, loader, machine, writer, settings, resumed, blob)
    return state, data, loop, run


def dry_run_step(model: GPT, machine: Machine, batch_size: int):
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
          f"{state.peak_lr():.3g}")
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
    with folder_lock(run_folder(path), f"--checkpoint_path={path}"):
        start, blob = PRESETS.get(given.get("preset"), {}), None
        if resumed:
            start, blob = PRETRAINING.read_checkpoint(resumed, given)
        values = resolve_flags(defaults | start, given) | {
            "checkpoint_path": path, "resume_checkpoint": str(resumed) if resumed else None}
        configs = [read_flags(config, values) for config in CONFIGS]
        if blob and is_finished(configs[CONFIGS.index(LoopConfig)], blob["training"], resumed, values["verbose"]):
            return
        with explain_device_errors(oom_advice(values)):
            state, data, loop, run = open_run(configs, blob)
            if loop.verbose:
                describe(state, data, loop, run)
                report_start(PRETRAINING, state, blob)
            del blob  # as large as model and optimizer together
            evaluate = lambda state: validate(state.model, data, state.machine, run.val_iter, run.val_batch)
            try_step = partial(dry_run_step, state.model, state.machine, run.batch_size)
            train(state, loop, next_token_loss, evaluate, run.compile_model, try_step, PRETRAINING)
    if loop.verbose:
        report_end(state, run)


def report_end(state: TrainState, run: RunConfig):
    path = state.writer.path
    print(f"saved {path} and {run_folder(path)}/metrics.jsonl; `python generate.py --checkpoint_path={path}` samples "
          f"from it, `python train.py --checkpoint_path={path} --plot` draws its curves")
    if run.sample_tokens:
        print("sample, the start of a document:")
        with state.machine.autocast():
            print("".join(generate_text(state.model, state.tokenizer, "", run.sample_tokens, SamplingConfig(),
                                        seed=run.seed)).strip())


if __name__ == "__main__":
    main()
