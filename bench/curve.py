"""Draws the loss curves of one or more runs from their metrics.jsonl.

    python bench/curve.py checkpoints/gpt/metrics.jsonl --out studies/quickstart.png
"""
import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from runtime.metrics import read_rows  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.jsonl of a run")
    parser.add_argument("--out", type=Path, required=True, help="picture to write (.png or .svg)")
    args = parser.parse_args()
    figure, (loss_axis, bpb_axis) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for path in args.metrics:
        rows = read_rows(path)
        train = [(row["tokens"] / 1e6, row["train_loss"]) for row in rows if "train_loss" in row]
        val = [(row["tokens"] / 1e6, row["val_loss"], row["val_bpb"], row["seconds"]) for row in rows if "val_loss" in row]
        name = path.parent.name
        line, = loss_axis.plot(*zip(*train), linewidth=0.8, alpha=0.5, label=f"{name}: training, single batches")
        loss_axis.plot([row[0] for row in val], [row[1] for row in val], "o-", markersize=3, color=line.get_color(),
                       label=f"{name}: validation")
        bpb_axis.plot([row[0] for row in val], [row[2] for row in val], "o-", markersize=3, color=line.get_color(),
                      label=f"{name}: {val[-1][2]:.3f} after {val[-1][3]:.0f} s of training")
    loss_axis.set(xlabel="million tokens", ylabel="loss, nats/token", title="Loss")
    bpb_axis.set(xlabel="million tokens", ylabel="bits per byte", title="Bits per byte of the validation text")
    for axis in (loss_axis, bpb_axis):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
