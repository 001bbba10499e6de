"""What does each ingredient of the default recipe contribute? Removes or replaces one at a time, with the same seeds.

    python download_data.py --dataset=builtin --data_path=data/builtin --vocab_size=4096
    python bench/ablations.py --data_path=data/builtin --out runs/ablations

Writes studies/ablations.md and studies/ablations.png: validation loss (mean over seeds, lower is better), its difference
from the default's (paired by seed, with its standard error; positive: the ingredient helps), bits per byte, tokens, seconds.
"""
import argparse
import statistics
from pathlib import Path

from side_by_side import REPO, machine, train_runs

ARMS = {
    "default": [],
    "AdamW for the matrices, not Muon": ["--optimizer=adamw"],
    "no rotary, learned positions": ["--positions=learned"],
    "no QK-norm": ["--qk_norm=0"],
    "ReLU² for GELU": ["--mlp=relu2"],
    "SwiGLU for GELU": ["--mlp=swiglu"],
    "LayerNorm for RMSNorm": ["--norm=layer"],
    "GPT-2's initial weights, not zero projections": ["--init=gpt2"],
    "no softcap": ["--softcap=0"],
    "softcap at 30": ["--softcap=30"],
    "no value residual": ["--value_residual=0"],
    "no x0 residual": ["--x0_residual=0"],
    "no token shift": ["--token_shift=0"],
    "untied head": ["--tied=0"],
    "biases": ["--bias"],
    "cosine schedule": ["--schedule=cosine"],
    "Muon's momentum in fp32, not bf16": ["--momentum_dtype=fp32"],
    "no weight decay": ["--weight_decay=0"],
    "clipping at 1": ["--grad_clip=1"],
}


def run_name(arm: str, seed: int) -> str:
    return "_".join([flag.strip("-").replace("=", "_") for flag in ARMS[arm]] or ["default"]) + f"_seed{seed}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="data/builtin")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder for the runs")
    parser.add_argument("--max_iter", type=int, default=160, help="steps of 2,048 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    common = [f"--data_path={args.data_path}", "--n_layer=4", "--n_head=4", "--head_size=32", "--block_size=128",
              "--batch_size=16", "--num_batch_accum=1", "--learning_rate=0.03",
              f"--val_intervals={args.max_iter}", "--val_iter=48"]
    seeds = range(1, args.seeds + 1)
    runs = {run_name(arm, seed): [*common, *flags, f"--seed={seed}"] for seed in seeds for arm, flags in ARMS.items()}
    rows = train_runs(runs, args.out, dict.fromkeys(runs, args.max_iter))
    last = {arm: [rows[run_name(arm, seed)][-1] for seed in seeds] for arm in ARMS}
    lines = ["| default, but | nats/token (lower is better) | worse than the default by | bits/byte (lower is better) | "
             "tokens | seconds |",
             "|---|---|---|---|---|---|"]
    worse = {}
    for arm, ends in last.items():
        differences = [row["val_loss"] - base["val_loss"] for row, base in zip(ends, last["default"])]
        mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
        worse[arm] = mean, error
        shown = "" if arm == "default" else f"{mean:+.3f} ± {error:.3f}"
        lines.append(f"| {arm} | {statistics.mean(row['val_loss'] for row in ends):.3f} | {shown} | "
                     f"{statistics.mean(row['val_bpb'] for row in ends):.3f} | {ends[0]['tokens'] / 1e6:.2f} M | "
                     f"{statistics.mean(row['seconds'] for row in ends):.0f} |")
    spread = statistics.stdev(row["val_loss"] for row in last["default"])
    text = "\n".join([
        "# Ablations of the default recipe", "", *lines, "",
        f"4 layers x 128, blocks of 128, vocabulary 4,096, built-in text, {args.max_iter} steps of 2,048 tokens at "
        f"learning rate 0.03; means of {len(seeds)} seeds, differences paired by seed ± their standard error; the "
        f"default's standard deviation over seeds is {spread:.3f}. One thread per run, {machine()}: "
        f"`python bench/ablations.py`. Results of a model so small, trained so briefly, may not hold for a larger one.", ""])
    (REPO / "studies" / "ablations.md").write_text(text, encoding="utf-8")
    draw(worse)
    print(text)


def draw(worse: dict[str, tuple[float, float]]):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    arms = sorted((arm for arm in worse if arm != "default"), key=lambda arm: worse[arm][0])
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    axis.barh(arms, [worse[arm][0] for arm in arms], xerr=[worse[arm][1] for arm in arms], color="#4878a8")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="validation loss above the default's, nats/token")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(REPO / "studies" / "ablations.png", dpi=110)


if __name__ == "__main__":
    main()
