"""The default recipe against nanoGPT's model and recipe (--preset=gpt2) on the same shards: tokens, time, memory to a loss.

    python bench/training.py --text docs_train.parquet --out runs/training

4 layers x 256, blocks of 256, 8,192 ids, 4,096 tokens a step. Each side trains with its own optimizer at every learning rate
of a grid, with its whole schedule. At its best rate the default also trains on shorter budgets, each with its full cooldown,
until it just reaches nanoGPT's final loss, in the dtype that --dtype=auto chooses and in fp32. Losses do not depend on the
clock, so two of these runs share the cores; a run that has finished in --out is not repeated. Step times are measured alone,
on all cores, each in a process of its own, the sides in turns. nanoGPT's side runs as it would there: eager, all logits at
once, both hidden tensors of GELU saved, fp32 (it disables autocast on a CPU), the C library's allocator at its defaults.

Writes its table into docs/benchmarks.md and its curves into studies/training.png. About two hours on two cores.
"""
import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from memory import NANOGPT, peak_of_step, preset_configs
from side_by_side import REPO, machine, peak_memory, run, table, take_turns, train_runs, write_into_docs

import download_data
import train
import trainer
from dataloader import TrainLoader
from layers.mlp import GELU, MLP
from model import GPT
from runtime.device import Machine, choose_dtype

SHAPE = {"n_layer": 4, "n_head": 4, "head_size": 64, "block_size": 256}
BATCH_SIZE, STEP_TOKENS, VOCAB_SIZE = 16, 4096, 8192
COMMON = [*(f"--{name}={value}" for name, value in SHAPE.items()), f"--batch_size={BATCH_SIZE}", "--num_batch_accum=1",
          "--device=cpu"]
# nanoGPT's warmup for small models, see its config/train_shakespeare_char.py: with fewer steps it ends at a higher loss
SIDES = {"gpt2": ["--preset=gpt2", "--warmup_iter=100"], "ours": []}
VAL_ITER = 49  # batches: 200,704 tokens
VAL_BYTES = 1_000_000  # of the validation split


# -- step times: each arm runs in a process of its own ----------------------------------------------------------------

@dataclass(frozen=True)
class TimedFlags:
    """How steps are timed: flags of train.py. as_nanogpt: with those of nanoGPT's habits that are not flags. fp32_muon:
    Muon's own matrix products in fp32 too."""
    flags: list[str]
    as_nanogpt: bool = False
    fp32_muon: bool = False


def timed_side(side: str, dtype: str = "fp32", is_compiled: bool = False, **options) -> TimedFlags:
    return TimedFlags([*SIDES[side], *COMMON, f"--dtype={dtype}", f"--compile_model={int(is_compiled)}"], **options)


TIMING_ARMS = {"gpt2": timed_side("gpt2", as_nanogpt=True), "ours": timed_side("ours"),
               "gpt2_auto": timed_side("gpt2", "auto", as_nanogpt=True), "ours_auto": timed_side("ours", "auto"),
               "ours_compiled": timed_side("ours", is_compiled=True),
               "ours_fp32_muon": timed_side("ours", fp32_muon=True), "gpt2_in_our_loop": timed_side("gpt2")}


def full_logits_loss(model, batch):
    """As nanoGPT computes it."""
    idx, targets = batch
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())


def time_steps(arm: TimedFlags, data: str, steps: int = 14, warmup: int = 4) -> dict:
    """Trains for `steps` steps. Returns the median seconds of those after the warmup, the loader's fraction of their time,
    MB that the process gained, and seconds to compile.

    Replaces functions of the training command, for good: this process does nothing else.
    """
    if arm.as_nanogpt:
        train.next_token_loss, trainer.disable_malloc_trim, GELU.forward = full_logits_loss, lambda: None, MLP.forward
    if arm.fp32_muon:
        Machine.newton_schulz_dtype = lambda self: torch.float32
    step_seconds, loader_seconds, compile_seconds = [], [], []

    def timed(function, seconds: list[float]):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return result
        return call

    compile_in_place = timed(trainer.compile_in_place, compile_seconds)

    def require_compiled(*args):
        if not compile_in_place(*args):
            raise SystemExit("torch.compile does not work on this machine")
    trainer.train_step = timed(trainer.train_step, step_seconds)
    TrainLoader.next_batch = timed(TrainLoader.next_batch, loader_seconds)
    trainer.compile_in_place = require_compiled
    train.validate = lambda *args: {"val_loss": 1.0, "val_bpb": 1.0}
    before = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        train.main([f"--data_path={data}", f"--checkpoint_path={folder}/gpt.pt", f"--max_iter={steps}", *arm.flags,
                    "--dataloader_num_workers=1", "--sample_tokens=0", "--verbose=0"])
    assert len(step_seconds) == steps
    warm = step_seconds[warmup:]
    return {"seconds": statistics.median(warm), "loader": sum(loader_seconds[warmup:]) / sum(warm),
            "memory": peak_memory() - before, "compile": sum(compile_seconds)}


# -- losses -----------------------------------------------------------------------------------------------------------

def prepare_data(text: str | None, folder: Path, val_bytes: int = VAL_BYTES):
    """Shards of the documents in the parquet file `text`, once."""
    if not (folder / "manifest.json").exists():
        if text is None:
            print(f"--text: {folder} holds no shards yet: give a parquet file of documents", file=sys.stderr)
            raise SystemExit(2)
        download_data.main([f"--dataset={text}", f"--data_path={folder}", f"--vocab_size={VOCAB_SIZE}",
                            f"--val_bytes={val_bytes}"])


@dataclass(frozen=True)
class LossRun:
    side: str
    rate: float
    steps: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.side}_{self.rate:g}_{self.steps}_{self.dtype}"

    def flags(self, data: str) -> list[str]:
        return [f"--data_path={data}", *SIDES[self.side], *COMMON, f"--learning_rate={self.rate}", f"--dtype={self.dtype}",
                f"--val_intervals={max(1, self.steps // 4)}", f"--val_iter={VAL_ITER}"]


def validation_rows(runs: list[LossRun], data: str, out: Path) -> dict[LossRun, list[dict]]:
    """Trains what has not finished in `out`; the rows with validations of each run."""
    rows = train_runs({run.name: run.flags(data) for run in runs}, out, {run.name: run.steps for run in runs})
    return {run: [row for row in rows[run.name] if "val_loss" in row] for run in runs}


@dataclass
class Losses:
    """grid: all runs of both sides with the whole budget. best: side -> its run with the lowest final loss. shorter: dtype
    -> (tokens, final loss) of the default's runs on shorter budgets."""
    grid: dict[LossRun, list[dict]]
    best: dict[str, LossRun]
    shorter: dict[str, list[tuple[int, float]]]

    @property
    def goal(self) -> float:
        return self.grid[self.best["gpt2"]][-1]["val_loss"]

    def tokens_to_goal(self, dtype: str) -> float:
        """NaN when no budget was large enough."""
        return next((tokens for tokens, loss in self.shorter[dtype] if loss <= self.goal), math.nan)


def train_all(args, data: str, own_dtype: str) -> Losses:
    steps, rates = args.tokens // STEP_TOKENS, {"ours": args.rates, "gpt2": args.gpt2_rates}
    grid = validation_rows([LossRun(side, rate, steps, own_dtype if side == "ours" else "fp32")
                            for side in rates for rate in rates[side]], data, args.out)
    final_loss = lambda run: grid[run][-1]["val_loss"]
    best = {side: min((run for run in grid if run.side == side), key=final_loss) for side in rates}
    losses = Losses(grid, best, {})

    def train_shorter(dtype: str, budgets: list[int]) -> int:
        """Returns the index of the smallest budget that reaches the goal, or of the largest."""
        runs = [dataclasses.replace(best["ours"], steps=budget // STEP_TOKENS, dtype=dtype) for budget in budgets]
        ends = [rows[-1] for rows in validation_rows(runs, data, args.out).values()]
        losses.shorter[dtype] = sorted((row["tokens"], row["val_loss"]) for row in ends)
        reaches = [loss <= losses.goal for _, loss in losses.shorter[dtype]]
        return reaches.index(True) if any(reaches) else len(budgets) - 1
    smallest = train_shorter(own_dtype, args.budgets)
    if own_dtype != "fp32":
        train_shorter("fp32", args.budgets[max(0, smallest - 1):smallest + 2])
    return losses


# -- results ----------------------------------------------------------------------------------------------------------

def comparison_rows(losses: Losses, timings: dict[str, list[dict]], own_dtype: str) -> list[tuple]:
    """Rows of the table. timings: arm -> its measurements."""
    median = lambda arm, figure: statistics.median(timing[figure] for timing in timings[arm])
    step_seconds = {arm: median(arm, "seconds") for arm in timings}
    ours, peer = losses.grid[losses.best["ours"]][-1], losses.grid[losses.best["gpt2"]][-1]
    seconds_for = lambda arm, n_tokens: step_seconds[arm] * n_tokens / STEP_TOKENS
    megatokens = lambda n: f"{n / 1e6:.2f} M"

    def tokens_to_goal(what: str, dtype: str):
        tokens = losses.tokens_to_goal(dtype)
        return (f"tokens to nanoGPT's final loss, {what}: ours / nanoGPT", f"{tokens / peer['tokens']:.3f}", "lower",
                megatokens(tokens), megatokens(peer["tokens"]))

    def seconds_to_goal(what: str, arm: str, dtype: str):
        mine, theirs = seconds_for(arm, losses.tokens_to_goal(dtype)), seconds_for("gpt2", peer["tokens"])
        return (f"seconds to nanoGPT's final loss, {what}: ours / nanoGPT", f"{mine / theirs:.3f}", "lower",
                f"{mine:,.0f} s", f"{theirs:,.0f} s")

    def step_time(what: str, arm: str, baseline: str = "gpt2", baseline_name: str = "nanoGPT"):
        return (f"step time, {what}: ours / {baseline_name}", f"{step_seconds[arm] / step_seconds[baseline]:.2f}", "lower",
                f"{step_seconds[arm] * 1e3:,.0f} ms", f"{step_seconds[baseline] * 1e3:,.0f} ms")

    def peak_mib(preset: str | None, **options) -> float:
        return peak_of_step(*preset_configs(preset, **SHAPE, vocab_size=VOCAB_SIZE), BATCH_SIZE, **options) / 2**20
    own_peak, compile_seconds = peak_mib(None), median("ours_compiled", "compile")
    peaks = [("`gpt2` preset with all logits", peak_mib("gpt2", all_logits=True)),
             ("nanoGPT, which also saves both hidden tensors", peak_mib("gpt2", **NANOGPT.options))]
    loader, memory = ({arm: median(arm, figure) for arm in ("ours", "gpt2")} for figure in ("loader", "memory"))
    return [
        (f"validation loss after {peer['tokens'] / 1e6:.2f} M tokens, nats/token: ours - nanoGPT",
         f"{ours['val_loss'] - peer['val_loss']:+.3f}", "lower", f"{ours['val_loss']:.3f} ({ours['val_bpb']:.3f} bits/byte)",
         f"{peer['val_loss']:.3f} ({peer['val_bpb']:.3f} bits/byte)"),
        tokens_to_goal(f"ours in {own_dtype}", own_dtype),
        tokens_to_goal("both in fp32", "fp32"),
        seconds_to_goal(f"each with its own dtype (ours {own_dtype})", "ours_auto", own_dtype),
        seconds_to_goal("both in fp32", "ours", "fp32"),
        seconds_to_goal(f"both in fp32, ours compiled (which takes {compile_seconds:.0f} s more)", "ours_compiled", "fp32"),
        step_time("both in fp32 and eager", "ours"),
        step_time("the same, Muon's products in fp32 too", "ours_fp32_muon"),
        step_time("both in fp32 and eager", "ours", "gpt2_in_our_loop", "the preset `gpt2` in our loop"),
        step_time("both in fp32, ours compiled", "ours_compiled"),
        step_time(f"both in {own_dtype} and eager", "ours_auto", "gpt2_auto", "nanoGPT under autocast"),
        step_time(f"each with its own dtype (ours {own_dtype})", "ours_auto"),
        ("loader's fraction of a step", f"{loader['ours'] / loader['gpt2']:.2f}", "lower", f"{loader['ours']:.2%}",
         f"{loader['gpt2']:.2%}"),
        *((f"peak memory of a step, all tensors, fp32: ours / {name}", f"{own_peak / peak:.2f}", "lower",
           f"{own_peak:,.0f} MiB", f"{peak:,.0f} MiB") for name, peak in peaks),
        ("memory that the process gained: ours / nanoGPT", f"{memory['ours'] / memory['gpt2']:.2f}", "lower",
         f"{memory['ours']:,.0f} MB", f"{memory['gpt2']:,.0f} MB")]


def caption(losses: Losses, own_dtype: str, rounds: int) -> str:
    grids = "; ".join(f"{name} " + ", ".join(f"{rows[-1]['val_loss']:.3f} at {run.rate:g}"
                                             for run, rows in losses.grid.items() if run.side == side)
                      for name, side in (("ours", "ours"), ("nanoGPT", "gpt2")))
    budgets = "; ".join(f"in {dtype} " + ", ".join(f"{loss:.3f} after {n / 1e6:.2f} M" for n, loss in ends)
                        for dtype, ends in losses.shorter.items())
    return (f"4 layers x 256, block 256, {VOCAB_SIZE:,} ids, {STEP_TOKENS:,} tokens a step; {n_parameters(None)} M "
            f"parameters against {n_parameters('gpt2')} M; {machine()}; on this processor `--dtype=auto` is {own_dtype}, "
            f"also for Muon's own products. Final losses of the grids: {grids}; ours at the best rate on shorter budgets, "
            f"each with its full cooldown: {budgets}. One seed. Step times are medians of {rounds} processes that took "
            f"turns: `python bench/training.py --text docs_train.parquet`.")


def n_parameters(preset: str | None) -> str:
    with torch.device("meta"):
        return f"{GPT(preset_configs(preset, **SHAPE, vocab_size=VOCAB_SIZE)[0]).n_parameters() / 1e6:.2f}"


def draw(losses: Losses, own_dtype: str, seconds: dict[str, float], path: Path):
    """Loss against tokens and against seconds. seconds: of a step, of each timing arm."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, scale, label in ((axes[0], lambda arm, x: x / 1e6, "million tokens"),
                               (axes[1], lambda arm, x: seconds[arm] * x / STEP_TOKENS, "seconds of training")):
        for side, name, arm in (("gpt2", "nanoGPT's recipe, its best rate", "gpt2"),
                                ("ours", "default recipe, its best rate", "ours_auto")):
            curve = [(row["tokens"], row["val_loss"]) for row in losses.grid[losses.best[side]]]
            axis.plot([scale(arm, x) for x, _ in curve], [y for _, y in curve], "o-", label=name)
        ends = losses.shorter[own_dtype]
        axis.plot([scale("ours_auto", x) for x, _ in ends], [y for _, y in ends], "x", color="black",
                  label="default recipe, ends of shorter runs")
        axis.axhline(losses.goal, color="gray", linewidth=0.8)
        axis.set(xlabel=label, ylabel="validation loss, nats/token")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="parquet of documents to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/training"), help="folder for the runs")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="budget of the grid's runs")
    parser.add_argument("--budgets", type=int, nargs="+", default=[250_000, 300_000, 350_000, 400_000],
                        help="budgets of the default's shorter runs, in tokens")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.015, 0.03, 0.06], help="the default's learning rates")
    parser.add_argument("--gpt2_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="nanoGPT's learning rates")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each timing")
    parser.add_argument("--val_bytes", type=int, default=VAL_BYTES, help="bytes of the validation split")
    for name in ("data", "arm"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)  # of one timing, printed as JSON
    args = parser.parse_args()
    data = args.data or str(args.out / "data")
    if args.arm:
        print(json.dumps(time_steps(TIMING_ARMS[args.arm], data)))
        return
    prepare_data(args.text, Path(data), args.val_bytes)
    own_dtype = choose_dtype(torch.device("cpu"))
    losses, timings = train_all(args, data, own_dtype), {arm: [] for arm in TIMING_ARMS}

    def measure(arm: str) -> float:
        timings[arm].append(run(__file__, arm, [f"--data={data}"]))
        return timings[arm][-1]["seconds"]
    step_seconds = dict(zip(TIMING_ARMS, take_turns(measure, list(TIMING_ARMS), args.rounds)))
    text = f"{table(comparison_rows(losses, timings, own_dtype))}\n\n{caption(losses, own_dtype, args.rounds)}"
    print(text)
    write_into_docs("bench/training.py", text)
    draw(losses, own_dtype, step_seconds, REPO / "studies" / "training.png")


if __name__ == "__main__":
    main()
