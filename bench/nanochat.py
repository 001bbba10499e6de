"""The default recipe against nanochat's model and recipe (--preset=nanochat) on the same shards, at two sizes.

    python bench/nanochat.py --text docs_train.parquet --out runs/nanochat

small: 4 layers x 256, 2 M tokens; large: 6 layers x 384, 8 M tokens; both with blocks of 256, 8,192 ids and 4,096 tokens a
step. Each side trains with its whole schedule at learning rates that are doubled or halved until the best is between two
others (large: on a quarter of the tokens), and at the best from six seeds (large: three); differences are paired by seed.
What is equal: the shape, and with it the parameters in matrix products (nanochat's value embeddings are look-ups); or the
parameters in all, where ours is wider; or the seconds, where ours trains on as many more tokens as its step is shorter
(small). nanochat's warm-up is shortened to 20 steps and its weight decay, made for runs of billions of tokens, left out.
Runs share the cores, one thread each, and are not repeated once they have finished in --out; step times are measured alone,
the sides in turns. Writes its tables into docs/benchmarks.md.
"""
import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from side_by_side import estimate, machine, run, table, take_turns, train_runs, write_into_docs
from training import STEP_TOKENS, VAL_ITER, VOCAB_SIZE, TimedFlags, prepare_data, time_steps

from model import GPT, GPTConfig
from runtime.config import read_flags
from runtime.files import atomic_write
from train import PRESETS

BLOCK_SIZE, BATCH_SIZE, HEAD_SIZE = 256, 16, 64
SHORT_WINDOW = 128  # nanochat rounds a quarter of the context up to a multiple of 128
RATES = {"ours": (0.015, 0.03, 0.06), "nanochat": (0.01, 0.02, 0.04)}


@dataclass(frozen=True)
class Scale:
    """A size of both sides. wide: the largest width of ours with no more parameters than nanochat's."""
    n_layer: int
    width: int
    wide: int
    steps: int
    rate_steps: int  # of the runs that find the best rate
    has_equal_seconds: bool
    n_seeds: int  # at its best rate nanochat's losses differ by 0.3 nats between seeds


SCALES = {"small": Scale(4, 256, 384, 488, 488, True, 6), "large": Scale(6, 384, 512, 1953, 488, False, 3)}


def shape(side: str, scale: Scale) -> dict:
    """side: ours, wide or nanochat -> flags of the model."""
    width, head_size = scale.wide if side == "wide" else scale.width, 128 if side == "nanochat" else HEAD_SIZE
    flags = {"n_layer": scale.n_layer, "n_head": width // head_size, "head_size": head_size, "block_size": BLOCK_SIZE}
    return flags | {"window": SHORT_WINDOW} if side == "nanochat" else flags


def side_flags(side: str, scale: Scale) -> list[str]:
    recipe = ["--preset=nanochat", "--weight_decay=0", "--warmup_iter=20"] if side == "nanochat" else []
    return [*recipe, *(f"--{name}={value}" for name, value in shape(side, scale).items()), f"--batch_size={BATCH_SIZE}",
            "--num_batch_accum=1", "--device=cpu", "--dtype=auto"]


def n_parameters(side: str, scale: Scale) -> tuple[float, float]:
    """Millions in all, and in matrix products."""
    preset = PRESETS["nanochat"] if side == "nanochat" else {}
    with torch.device("meta"):
        model = GPT(read_flags(GPTConfig, preset | shape(side, scale) | {"vocab_size": VOCAB_SIZE}))
    tables = 0 if model.config.tied else model.embed.weight.numel()
    tables += sum(p.numel() for name, p in model.named_parameters() if name.endswith("value_embedding.embed.weight"))
    return model.n_parameters() / 1e6, (model.n_parameters() - tables) / 1e6


@dataclass(frozen=True)
class LossRun:
    side: str
    rate: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.side}_{self.rate:g}_seed{self.seed}"


def final_losses(name: str, runs: list[LossRun], out: Path, jobs: int) -> dict[LossRun, float]:
    """The validation losses at the ends of runs of the scale of this name, in nats/token; trains what has not finished."""
    by_steps, losses = {}, {}
    for loss_run in runs:
        by_steps.setdefault(loss_run.steps, []).append(loss_run)
    for steps, group in by_steps.items():
        flags = {run.name: [f"--data_path={out / 'data'}", *side_flags(run.side, SCALES[name]), f"--seed={run.seed}",
                            f"--learning_rate={run.rate}", f"--val_intervals={steps}", f"--val_iter={VAL_ITER}"]
                 for run in group}
        rows = train_runs(flags, out / name, dict.fromkeys(flags, steps), jobs)
        losses |= {run: rows[run.name][-1]["val_loss"] for run in group}
    return losses


def find_rates(name: str, out: Path, jobs: int) -> dict[LossRun, float]:
    """Losses at RATES and, where the best of a side's rates is its lowest or highest, at half or twice that one, and so on;
    sorted by rate."""
    rates = {side: list(rates) for side, rates in RATES.items()}
    while True:
        runs = [LossRun(side, rate, SCALES[name].rate_steps, 1) for side in rates for rate in sorted(rates[side])]
        grid = final_losses(name, runs, out, jobs)
        more = {}
        for side in rates:
            best = min((run for run in runs if run.side == side), key=grid.get).rate
            more[side] = [best / 2] * (best == min(rates[side])) + [best * 2] * (best == max(rates[side]))
        if not any(more.values()):
            return {run: grid[run] for run in runs}
        rates = {side: rates[side] + more[side] for side in rates}


def measure_steps(name: str, out: Path, rounds: int) -> dict[str, float]:
    """Side -> median seconds of a step. Measured once: how long the runs at equal seconds are depends on it."""
    path = out / name / "step_seconds.json"
    if not path.exists():
        sides, flags = ["ours", "nanochat"], [f"--out={out}", f"--stages={name}"]
        seconds = take_turns(lambda side: run(__file__, side, flags)["seconds"], sides, rounds)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as file:
            json.dump(dict(zip(sides, seconds)), file)
    return json.loads(path.read_text())


def compare(name: str, out: Path, jobs: int, rounds: int) -> str:
    """Trains both sides at the scale of this name; returns its table."""
    scale = SCALES[name]
    grid = find_rates(name, out, jobs)
    best = {side: min((run for run in grid if run.side == side), key=grid.get).rate for side in RATES}

    def train_arms(arms: dict[str, tuple[str, int]]) -> dict[str, list[float]]:
        """arms: name -> side and steps. Returns name -> loss of each seed."""
        runs = {arm: [LossRun(side, best["nanochat" if side == "nanochat" else "ours"], steps, seed)
                       for seed in range(1, scale.n_seeds + 1)]
                for arm, (side, steps) in arms.items()}
        found = final_losses(name, [loss_run for arm in runs.values() for loss_run in arm], out, jobs)
        return {arm: [found[loss_run] for loss_run in arm_runs] for arm, arm_runs in runs.items()}
    losses = train_arms({side: (side, scale.steps) for side in ("nanochat", "ours", "wide")})
    seconds = measure_steps(name, out, rounds)
    ratio = seconds["nanochat"] / seconds["ours"]
    steps_in_equal_seconds = round(scale.steps * ratio)
    if scale.has_equal_seconds:
        losses |= train_arms({"equal seconds": ("ours", steps_in_equal_seconds)})

    def row(what: str, arm: str):
        differences = [mine - theirs for mine, theirs in zip(losses[arm], losses["nanochat"])]
        means = (f"{statistics.mean(losses[side]):.3f}" for side in (arm, "nanochat"))
        return f"{what} ({scale.n_seeds} seeds)", estimate(differences, "{:+.3f}"), "lower", *means
    megatokens = lambda steps: f"{steps * STEP_TOKENS / 1e6:.2f} M"
    (own, own_matrix), (peer, peer_matrix), (wide, _) = (n_parameters(side, scale) for side in ("ours", "nanochat", "wide"))
    rows = [row(f"nats/token after {megatokens(scale.steps)} tokens, equal shape ({own_matrix:.2f} M parameters in matrix "
                f"products against {peer_matrix:.2f} M, {own:.2f} M in all against {peer:.2f} M): ours - nanochat", "ours"),
            row(f"the same, about equal in all ({scale.n_layer} layers x {scale.wide}, {wide:.2f} M parameters)", "wide")]
    if scale.has_equal_seconds:
        rows.append(row(f"the same at equal shape and seconds (ours {megatokens(steps_in_equal_seconds)} tokens)",
                        "equal seconds"))
    rows.append(("step time: ours / nanochat", f"{1 / ratio:.2f}", "lower", f"{seconds['ours'] * 1e3:,.0f} ms",
                 f"{seconds['nanochat'] * 1e3:,.0f} ms"))
    grids = "; ".join(f"{side} " + ", ".join(f"{loss:.3f} at {run.rate:g}" for run, loss in grid.items() if run.side == side)
                      for side in RATES)
    return (f"{name}: {scale.n_layer} layers x {scale.width}\n\n{table(rows)}\n\nLosses of the grids of rates, after "
            f"{megatokens(scale.rate_steps)} tokens from one seed: {grids}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="parquet of documents to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/nanochat"), help="folder for the runs")
    parser.add_argument("--stages", nargs="+", choices=tuple(SCALES), default=tuple(SCALES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each timing")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # of one timing, printed as JSON
    args = parser.parse_args()
    out = args.out.resolve()
    if args.arm:
        print(json.dumps(time_steps(TimedFlags(side_flags(args.arm, SCALES[args.stages[0]])), str(out / "data"))))
        return
    prepare_data(args.text, out / "data")
    for name in args.stages:
        text = compare(name, out, args.jobs, args.rounds)
        print(f"{text}\n")
        with atomic_write(out / f"{name}.md", "w") as file:
            file.write(text + "\n")
    found = [(out / f"{name}.md").read_text() for name in SCALES if (out / f"{name}.md").exists()]
    write_into_docs("bench/nanochat.py", "\n".join([*found, (
        f"Means over seeds with the 95 % interval of the paired differences. Blocks of {BLOCK_SIZE}, "
        f"{VOCAB_SIZE:,} ids, {STEP_TOKENS:,} tokens a step, {machine()}: "
        f"`python bench/nanochat.py --text docs_train.parquet`.")]))


if __name__ == "__main__":
    main()
