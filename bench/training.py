"""The default against nanoGPT's model and recipe (`--preset=gpt2`) on the same shards: tokens, seconds, memory to a loss.

    python bench/training.py --text docs_train.parquet --out runs/training

4 layers x 256, blocks of 256, 8,192 ids, 4,096 tokens a step. Each side trains with its own optimizer at every learning
rate of a grid, with its whole schedule; the default recipe, at its best rate, also on shorter budgets, each with its full
cooldown, until it just reaches the other's final loss, in the dtype it takes by itself and in fp32. These runs are of
losses, so two go on at a time with a thread each, and a run that --out holds finished is not run again. Step times are
taken alone, on all cores, the sides in turns, each in a process of its own. nanoGPT's side runs as it would: eager, all
logits at once, what goes into and comes out of GELU both kept, fp32 (it switches autocast off on a CPU), the C library's
allocator as it is.

Writes its table into README.md and its curves into studies/training.png. About two hours on two cores.
"""
import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from memory import of_preset, peak_of_step
from side_by_side import REPO, machine, peak_memory, run, table, take_turns, train_runs, write_into_readme

import download_data
import train
import trainer
from layers.mlp import GELU, MLP
from model import GPT
from runtime import device

SHAPE = {"n_layer": 4, "n_head": 4, "head_size": 64, "block_size": 256}
STEP_TOKENS, VOCAB_SIZE = 4096, 8192
COMMON = [*(f"--{name}={value}" for name, value in SHAPE.items()), "--batch_size=16", "--num_batch_accum=1",
          "--device=cpu"]
# nanoGPT's warmup for small models, see its config/train_shakespeare_char.py: with fewer steps it ends higher
SIDES = {"gpt2": ["--preset=gpt2", "--warmup_iter=100"], "ours": []}
VAL_ITER = 49  # batches: 200,704 tokens


def full_logits_loss(model, batch):
    """As nanoGPT computes it."""
    idx, targets = batch
    return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())


def as_nanogpt():
    """What of the loop is not a flag."""
    trainer.next_token_loss, trainer.disable_malloc_trim, GELU.forward = full_logits_loss, lambda: None, MLP.forward


def run_of(side: str, rate: float, steps: int, dtype: str) -> str:
    return f"{side}_{rate:g}_{steps}_{dtype}"


def time_arm(name: str, data: str, steps: int = 14):
    """Prints the median seconds of a step after the first ones, the loader's share, MB that the process came to hold, and
    seconds to compile."""
    side, *options = name.split("_")[1:]
    if side == "gpt2" and "preset" not in options:
        as_nanogpt()
    if "fp32muon" in options:
        device.Machine.newton_schulz_dtype = lambda self: torch.float32
    times, loader_times = [], []
    step, load = trainer.train_step, train.TrainLoader.__next__

    def timed_step(*args):
        start = time.perf_counter()
        done = step(*args)
        times.append(time.perf_counter() - start)
        return done

    def timed_load(self):
        start = time.perf_counter()
        batch = load(self)
        loader_times.append(time.perf_counter() - start)
        return batch

    trainer.train_step, train.TrainLoader.__next__ = timed_step, timed_load
    train.validate = lambda *args: {"val_loss": 1.0, "val_bpb": 1.0}
    compile_seconds = 0.0
    if "compiled" in options:
        compile_in_place = train.compile_in_place

        def timed_compile(*args):
            nonlocal compile_seconds
            start = time.perf_counter()
            if not compile_in_place(*args):
                raise SystemExit("torch.compile does not work here")
            compile_seconds = time.perf_counter() - start
        train.compile_in_place = timed_compile
    before = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        train.main([f"--data_path={data}", f"--checkpoint_path={folder}/gpt.pt", *SIDES[side], *COMMON,
                    f"--max_iter={steps}", f"--dtype={'auto' if 'auto' in options else 'fp32'}",
                    f"--compile_model={int('compiled' in options)}", "--dataloader_num_workers=1", "--sample_tokens=0",
                    "--verbose=0"])
    assert len(times) == steps
    warm = times[4:]
    print(json.dumps({"seconds": statistics.median(warm), "loader": sum(loader_times[4:]) / sum(warm),
                      "memory": peak_memory() - before, "compile": compile_seconds}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="parquet of documents to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/training"), help="folder for the runs")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[250_000, 300_000, 350_000, 400_000],
                        help="tokens of the default's shorter runs")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.015, 0.03, 0.06])
    parser.add_argument("--gpt2_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    data = args.data or str(args.out / "data")
    if args.arm:
        time_arm(args.arm, data)
        return
    if not (args.out / "data" / "manifest.json").exists():
        download_data.main([f"--dataset={args.text}", f"--data_path={data}", f"--vocab_size={VOCAB_SIZE}",
                            "--val_tokens=250_000"])
    timed = {arm: [] for arm in ("time_gpt2", "time_ours", "time_ours_auto", "time_ours_compiled", "time_ours_fp32muon",
                                 "time_gpt2_preset")}

    def seconds_of(arm: str) -> float:
        timed[arm].append(run(__file__, arm, [f"--data={data}", f"--out={args.out}"]))
        return timed[arm][-1]["seconds"]

    def losses(runs: list[tuple[str, float, int, str]]) -> dict[str, list[dict]]:
        """Each run's rows of validations. A run is a side, its rate, its steps and its dtype."""
        flags = {run_of(*a): [f"--data_path={data}", *SIDES[a[0]], *COMMON, f"--learning_rate={a[1]}", f"--dtype={a[3]}",
                              f"--val_intervals={max(1, a[2] // 4)}", f"--val_iter={VAL_ITER}"] for a in runs}
        rows = train_runs(flags, args.out, {run_of(*a): a[2] for a in runs})
        return {name: [row for row in of_run if "val_loss" in row] for name, of_run in rows.items()}

    steps, own = args.tokens // STEP_TOKENS, device.choose_dtype(torch.device("cpu"))
    sides = {"ours": (args.rates, own), "gpt2": (args.gpt2_rates, "fp32")}
    grid = losses([(side, rate, steps, dtype) for side, (rates, dtype) in sides.items() for rate in rates])
    best = {side: min((run_of(side, rate, steps, dtype) for rate in rates), key=lambda name: grid[name][-1]["val_loss"])
            for side, (rates, dtype) in sides.items()}
    rate = float(best["ours"].split("_")[1])
    goal, ends = grid[best["gpt2"]][-1]["val_loss"], {}

    def ends_of(dtype, budgets):
        runs = losses([("ours", rate, budget // STEP_TOKENS, dtype) for budget in budgets])
        ends[dtype] = sorted((rows[-1]["tokens"], rows[-1]["val_loss"]) for rows in runs.values())
        return next((i for i, (_, loss) in enumerate(ends[dtype]) if loss <= goal), len(budgets) - 1)
    reached = ends_of(own, args.budgets)
    if own != "fp32":
        ends_of("fp32", args.budgets[max(0, reached - 1):reached + 2])
    step_seconds = dict(zip(timed, take_turns(seconds_of, list(timed), args.rounds)))
    write_results(args, sides, grid, best, ends, timed, step_seconds)


def write_results(args, sides, grid, best, ends, timed, step_seconds):
    ours, peer = grid[best["ours"]][-1], grid[best["gpt2"]][-1]
    goal, tokens, own = peer["val_loss"], peer["tokens"], sides["ours"][1]
    # a budget too small for the goal is not a number
    reached = {dtype: next((n for n, loss in of_dtype if loss <= goal), math.nan) for dtype, of_dtype in ends.items()}

    def to_goal(what, arm, dtype):
        ratio = reached[dtype] / tokens * step_seconds[arm] / step_seconds["time_gpt2"]
        return what, f"**{ratio:.3f}**", seconds(arm, reached[dtype]), seconds("time_gpt2", tokens)

    def median(arm, what):
        return statistics.median(figures[what] for figures in timed[arm])

    def seconds(arm, n_tokens):
        return f"{step_seconds[arm] * n_tokens / STEP_TOKENS:,.0f} s"

    def step_time(what, arm, of_peer="time_gpt2"):
        return (f"step time, {what}: share", f"**{step_seconds[arm] / step_seconds[of_peer]:.2f}**",
                f"{step_seconds[arm] * 1e3:,.0f} ms", f"{step_seconds[of_peer] * 1e3:,.0f} ms")

    def peak(preset, **options):
        return peak_of_step(*of_preset(preset, **SHAPE, vocab_size=VOCAB_SIZE), 16, **options) / 2**20
    peaks = [("`gpt2` preset with all logits", peak("gpt2", all_logits=True)),
             ("nanoGPT, which also keeps both tensors of the hidden layer", peak("gpt2", all_logits=True, two_hidden=True))]
    rows = [
        (f"validation loss after {tokens / 1e6:.2f} M tokens, nats/token: difference", f"**{ours['val_loss'] - goal:+.3f}**",
         f"{ours['val_loss']:.3f} ({ours['val_bpb']:.3f} bits/byte)",
         f"{goal:.3f} ({peer['val_bpb']:.3f} bits/byte)"),
        (f"tokens to reach nanoGPT's final loss, ours in {own}: share", f"**{reached[own] / tokens:.3f}**",
         f"{reached[own] / 1e6:.2f} M", f"{tokens / 1e6:.2f} M"),
        ("the same, both in fp32", f"**{reached['fp32'] / tokens:.3f}**", f"{reached['fp32'] / 1e6:.2f} M",
         f"{tokens / 1e6:.2f} M"),
        to_goal(f"seconds to reach it, each side with the dtype it takes by itself (ours in {own}): share", "time_ours_auto",
                own),
        to_goal("the same, both in fp32", "time_ours", "fp32"),
        to_goal(f"the same, ours compiled (and {median('time_ours_compiled', 'compile'):.0f} s for compiling)",
                "time_ours_compiled", "fp32"),
        step_time("both in fp32 and eager", "time_ours"),
        step_time("the same, Muon's products in fp32 too", "time_ours_fp32muon"),
        step_time("both in fp32 and eager, against the preset `gpt2` in our loop", "time_ours", "time_gpt2_preset"),
        step_time("both in fp32, ours compiled", "time_ours_compiled"),
        step_time(f"each side with the dtype it takes by itself (ours in {own})", "time_ours_auto"),
        ("loader's share of the step's time", "", f"{median('time_ours', 'loader'):.2%}",
         f"{median('time_gpt2', 'loader'):.2%}"),
        *((f"peak memory of a step, all its tensors, fp32, against {what}: share", f"**{peak(None) / of_peer:.2f}**",
           f"{peak(None):,.0f} MiB", f"{of_peer:,.0f} MiB") for what, of_peer in peaks),
        ("memory that the process came to hold above its start", "", f"{median('time_ours', 'memory'):,.0f} MB",
         f"{median('time_gpt2', 'memory'):,.0f} MB"),
    ]
    grids = "; ".join(f"{label} " + ", ".join(f"{grid[run_of(side, rate, peer['step'], dtype)][-1]['val_loss']:.3f} at "
                                              f"{rate:g}" for rate in rates)
                      for label, (side, (rates, dtype)) in zip(("ours", "nanoGPT"), sides.items()))
    budgets = "; ".join(f"in {dtype} " + ", ".join(f"{loss:.3f} after {n / 1e6:.2f} M" for n, loss in of_dtype)
                        for dtype, of_dtype in ends.items())
    text = (f"{table(rows)}\n\n4 layers x 256, block 256, {VOCAB_SIZE:,} ids, {STEP_TOKENS:,} tokens a step; "
            f"{n_parameters(None)} M parameters against {n_parameters('gpt2')} M; {machine()}; "
            f"on this processor `--dtype=auto` is {own}, and Muon's own products are of that dtype. Losses of the grids: "
            f"{grids}; ours at the best rate on shorter budgets, each with its full cooldown: {budgets}. One seed. Step "
            f"times are medians of {args.rounds} processes that took turns: `python bench/training.py --text "
            f"docs_train.parquet`.")
    write_into_readme("bench/training.py", text)
    draw(grid, best, ends[own], step_seconds)
    print(text)


def n_parameters(preset: str | None) -> str:
    with torch.device("meta"):
        return f"{GPT(of_preset(preset, **SHAPE, vocab_size=VOCAB_SIZE)[0]).n_parameters() / 1e6:.2f}"


def draw(grid, best, ends, step_seconds):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, scale, label in ((axes[0], lambda arm, x: x / 1e6, "million tokens"),
                               (axes[1], lambda arm, x: step_seconds[arm] * x / STEP_TOKENS, "seconds of training")):
        for side, name, arm in (("gpt2", "nanoGPT's recipe, its best rate", "time_gpt2"),
                                ("ours", "default recipe, its best rate", "time_ours_auto")):
            curve = [(row["tokens"], row["val_loss"]) for row in grid[best[side]]]
            axis.plot([scale(arm, x) for x, _ in curve], [y for _, y in curve], "o-", label=name)
        axis.plot([scale("time_ours_auto", x) for x, _ in ends], [y for _, y in ends], "x", color="black",
                  label="the same, ends of shorter runs")
        axis.axhline(grid[best["gpt2"]][-1]["val_loss"], color="gray", linewidth=0.8)
        axis.set(xlabel=label, ylabel="validation loss, nats/token")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(REPO / "studies" / "training.png", dpi=110)


if __name__ == "__main__":
    main()
