"""Whether one learning rate serves models of other depth, width and batch: trains each shape at each rate of a grid.

    python download_data.py --dataset=builtin --data_path=data/builtin --vocab_size=4096 --val_tokens=100_000
    python bench/learning_rates.py --data_path=data/builtin --out runs/learning_rates

Writes studies/learning_rates.md: a row a shape, with the validation loss at each rate after the same number of steps, each
with a full cooldown.
"""
import argparse
from pathlib import Path

from side_by_side import REPO, machine, train_runs

SHAPES = {  # name: n_layer, n_head (of 32 channels), batch_size (of 128 tokens)
    "4 layers x 128, steps of 2,048 tokens": (4, 4, 16),
    "2 layers": (2, 4, 16),
    "8 layers": (8, 4, 16),
    "width 64": (4, 2, 16),
    "width 256": (4, 8, 16),
    "steps of 512 tokens": (4, 4, 4),
    "steps of 8,192 tokens": (4, 4, 64),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="data/builtin")
    parser.add_argument("--out", type=Path, default=Path("runs/learning_rates"), help="folder for the runs")
    parser.add_argument("--max_iter", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.015, 0.03, 0.06])
    args = parser.parse_args()
    runs = {f"{layers}x{32 * heads}_{batch}_{rate:g}": [
                f"--data_path={args.data_path}", f"--n_layer={layers}", f"--n_head={heads}", "--head_size=32",
                "--block_size=128", f"--batch_size={batch}", "--num_batch_accum=1", f"--val_intervals={args.max_iter}",
                f"--val_iter={768 // batch}", f"--learning_rate={rate}"]
            for layers, heads, batch in SHAPES.values() for rate in args.rates}
    rows = train_runs(runs, args.out, dict.fromkeys(runs, args.max_iter))
    lines = [f"| after {args.max_iter} steps, nats/token | {' | '.join(f'{rate:g}' for rate in args.rates)} |",
             "|---" * (1 + len(args.rates)) + "|"]
    for name, (layers, heads, batch) in SHAPES.items():
        losses = [rows[f"{layers}x{32 * heads}_{batch}_{rate:g}"][-1]["val_loss"] for rate in args.rates]
        lines.append(f"| {name} | " + " | ".join(f"**{x:.3f}**" if x == min(losses) else f"{x:.3f}" for x in losses) + " |")
    text = "\n".join(["# One learning rate for all shapes", "", *lines, "",
                      f"The built-in text, 4,096 ids, blocks of 128, one seed; {machine()}: "
                      f"`python bench/learning_rates.py`.", ""])
    (REPO / "studies" / "learning_rates.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
