"""Would another ingredient make the default recipe better? One change at a time, on two budgets, with the same seeds.

    python bench/ingredients.py --text docs_train.parquet --out runs/ingredients

4 layers x 256, blocks of 256, 8,192 ids, 4,096 tokens a step, as in bench/training.py. All arms train on 2 M tokens from one
seed; those that may help from two more; and those that help on average on 8 M tokens from three. What a slower step costs is
counted in loss: by how much the default's loss falls when its tokens double. Runs have one thread each, and are not repeated
once they have finished in --out. Writes studies/ingredients.md.
"""
import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from side_by_side import REPO, estimate, machine, train_runs
from training import COMMON, STEP_TOKENS, VAL_ITER, VOCAB_SIZE, prepare_data

from runtime.files import atomic_write

ARMS = {
    "default": [],
    "NorMuon for Muon": ["--optimizer=normuon"],
    "value embeddings": ["--value_embeddings"],
    "value embeddings for the value residual": ["--value_embeddings", "--value_residual=0"],
    "smear": ["--smear"],
    "backout": ["--backout"],
    "dense connections of the last two blocks": ["--dense_blocks=2"],
    "queries and keys times 1.2": ["--qk_scale=1.2"],
    "nanochat's initial weights": ["--init=nanochat"],
    "a rotary base of 100,000": ["--rotary_base=100_000"],
    "a cooldown to 5 %": ["--final_lr_frac=0.05"],
    "a longer cooldown": ["--cooldown_frac=0.8"],
    "half the cooldown": ["--cooldown_frac=0.3"],
    "sliding windows in three of four layers": ["--mixer=SSSA"],
    "ReLU² for GELU": ["--mlp=relu2"],
    "SwiGLU for GELU": ["--mlp=swiglu"],
    "softcap at 30": ["--softcap=30"],
    "untied head": ["--tied=0"],
    "no weight decay": ["--weight_decay=0"],
    "half the learning rate": ["--learning_rate=0.015"],
    "twice the learning rate": ["--learning_rate=0.06"],
}
TOKENS = {"short": 2_000_000, "long": 8_000_000}
SEEDS = (1, 2, 3)
LEARNING_RATE = 0.03  # the best of bench/training.py
MAX_WORSE = 0.01      # nats/token; an arm worse than that from the first seed gets no other


@dataclass(frozen=True)
class ArmRun:
    arm: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        flags = [flag.strip("-").replace("=", "_") for flag in ARMS[self.arm]]
        return "_".join([*(flags or ["default"]), f"seed{self.seed}"])


class Runs:
    """Trains runs in the folder `out`, and holds the last row of each."""

    def __init__(self, out: Path, jobs: int):
        self.out, self.jobs, self.rows = out, jobs, {}

    def train(self, arms: list[str], budget: str, seeds: tuple[int, ...]):
        steps, runs = TOKENS[budget] // STEP_TOKENS, [ArmRun(arm, budget, seed) for seed in seeds for arm in arms]
        flags = {run.name: [f"--data_path={self.out / 'data'}", *COMMON, f"--learning_rate={LEARNING_RATE}",
                            f"--seed={run.seed}", f"--val_intervals={steps}", f"--val_iter={VAL_ITER}", *ARMS[run.arm]]
                 for run in runs}
        rows = train_runs(flags, self.out, dict.fromkeys(flags, steps), self.jobs)
        self.rows |= {run: rows[run.name][-1] for run in runs}

    def differences(self, arm: str, budget: str, figure: str = "val_loss") -> list[float]:
        """Of the arm from the default, for each seed that both have."""
        pairs = [(self.rows.get(ArmRun(arm, budget, seed)), self.rows.get(ArmRun("default", budget, seed)))
                 for seed in SEEDS]
        return [row[figure] - base[figure] for row, base in pairs if row and base]

    def mean(self, arm: str, budget: str, figure: str) -> float:
        return statistics.mean(row[figure] for run, row in self.rows.items() if (run.arm, run.budget) == (arm, budget))


def shown(values: list[float]) -> str:
    return "" if not values else estimate(values, "{:+.3f}") if len(values) > 1 else f"{values[0]:+.3f}, one seed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="parquet of documents to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/ingredients"), help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--short", action="store_true", help="leave the larger budget out")
    args = parser.parse_args()
    out = args.out.resolve()
    prepare_data(args.text, out / "data")
    runs = Runs(out, args.jobs)
    runs.train(list(ARMS), "short", SEEDS[:1])
    promising = [arm for arm in ARMS if runs.differences(arm, "short")[0] <= MAX_WORSE]  # the default among them
    runs.train(promising, "short", SEEDS[1:])
    helpful = [arm for arm in promising if statistics.mean(runs.differences(arm, "short")) <= 0]
    if not args.short:
        runs.train(helpful, "long", SEEDS)
        fall = runs.mean("default", "short", "val_loss") - runs.mean("default", "long", "val_loss")
        fall_per_doubling = fall / math.log2(TOKENS["long"] / TOKENS["short"])
    lines = ["| default, but | above the default after 2 M tokens, nats/token (lower is better) | after 8 M tokens | "
             "seconds | after the seconds of 8 M tokens |", "|---|---|---|---|---|"]
    for arm in ARMS:
        if arm == "default":
            continue
        ratio = runs.mean(arm, "short", "seconds") / runs.mean("default", "short", "seconds")
        long, in_equal_seconds = runs.differences(arm, "long"), ""
        if long:
            in_equal_seconds = f"{statistics.mean(long) + fall_per_doubling * math.log2(ratio):+.3f}"
        lines.append(f"| {arm} | {shown(runs.differences(arm, 'short'))} | {shown(long)} | x {ratio:.2f} | "
                     f"{in_equal_seconds} |")
    figures = ", ".join(f"{runs.mean('default', budget, 'val_loss'):.3f} after {TOKENS[budget] / 1e6:.0f} M tokens"
                        for budget in TOKENS if (ArmRun("default", budget, 1) in runs.rows))
    text = "\n".join([
        "# Further ingredients", "", *lines, "",
        f"Loss above the default's, which is {figures}; with 95 % intervals of the differences, paired by seed. 4 layers x "
        f"256, blocks of 256, {VOCAB_SIZE:,} ids, {STEP_TOKENS:,} tokens a step at learning rate {LEARNING_RATE}. Arms more "
        f"than {MAX_WORSE} worse from one seed got no more of them; those not better from three were not trained on 8 M "
        f"tokens. One thread a run, {machine()}: `python bench/ingredients.py --text docs_train.parquet`.", ""])
    with atomic_write(REPO / "studies" / "ingredients.md", "w") as file:
        file.write(text)
    print(text)


if __name__ == "__main__":
    main()
