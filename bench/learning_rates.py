"""Does the default learning rate suit models of other depth, width and batch size? Trains each shape at it and at a grid of
rates.

    python download_data.py --dataset=builtin --data_path=data/builtin --vocab_size=4096
    python bench/learning_rates.py --data_path=data/builtin --out runs/learning_rates

Writes studies/learning_rates.md: per shape the validation loss at each rate (lower is better), each with a full cooldown.
"""
import argparse
from pathlib import Path

from side_by_side import REPO, machine, train_runs

from optimizer import OptimizerConfig

SHAPES = {  # name: n_layer, n_head (of 32 channels), batch_size (of 128 tokens), steps as a multiple of --max_iter
    "4 layers x 128, steps of 2,048 tokens": (4, 4, 16, 1),
    "2 layers": (2, 4, 16, 1),
    "8 layers": (8, 4, 16, 1),
    "width 64": (4, 2, 16, 1),
    "width 256": (4, 8, 16, 1),
    "steps of 512 tokens": (4, 4, 4, 1),
    "steps of 512 tokens, four times as many": (4, 4, 4, 4),
    "steps of 8,192 tokens": (4, 4, 64, 1),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="data/builtin")
    parser.add_argument("--out", type=Path, default=Path("runs/learning_rates"), help="folder for the runs")
    parser.add_argument("--max_iter", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.015, 0.03, 0.06])
    args = parser.parse_args()
    rates = ["auto", *map(str, args.rates)]

    def run_name(layers, heads, batch, times, rate):
        return f"{layers}x{32 * heads}_{batch}_{times * args.max_iter}_{rate}"
    runs, steps = {}, {}
    for shape in SHAPES.values():
        layers, heads, batch, times = shape
        for rate in rates:
            name = run_name(*shape, rate)
            steps[name] = times * args.max_iter
            runs[name] = [f"--data_path={args.data_path}", f"--n_layer={layers}", f"--n_head={heads}", "--head_size=32",
                          "--block_size=128", f"--batch_size={batch}", "--num_batch_accum=1",
                          f"--val_intervals={steps[name]}", f"--val_iter={768 // batch}", f"--learning_rate={rate}"]
    rows = train_runs(runs, args.out, steps)
    lines = [f"| nats/token after {args.max_iter} steps, lower is better | auto | auto is | {' | '.join(rates[1:])} |",
             "|---" * (3 + len(args.rates)) + "|"]
    for name, (layers, heads, batch, times) in SHAPES.items():
        losses = [rows[run_name(layers, heads, batch, times, rate)][-1]["val_loss"] for rate in rates]
        shown = [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]
        lines.append(f"| {name} | {shown[0]} | {OptimizerConfig().peak_lr(128 * batch):.3g} | {' | '.join(shown[1:])} |")
    text = "\n".join(["# The default learning rate at other shapes", "", *lines, "",
                      f"Built-in text, vocabulary 4,096, blocks of 128, one seed; {machine()}: "
                      f"`python bench/learning_rates.py`.", ""])
    (REPO / "studies" / "learning_rates.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
