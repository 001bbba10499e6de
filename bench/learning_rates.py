"""Does the default learning rate suit models of other depth, width and batch size? Trains each shape at it and at a grid of
rates. Does that of the mixes suit runs of other lengths? Trains each length at it and at a grid of ratios.

    python download_data.py --dataset=builtin --data_path=data/builtin --vocab_size=4096
    python bench/learning_rates.py --data_path=data/builtin --out runs/learning_rates

Writes studies/learning_rates.md: the validation loss at each (lower is better), each with a full cooldown.
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
MIX_LENGTHS, MIX_RATIOS = (1, 4, 16), ["auto", "0.25", "0.5", "1", "2", "4", "8"]  # of the first shape; times --max_iter


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="data/builtin")
    parser.add_argument("--out", type=Path, default=Path("runs/learning_rates"), help="folder for the runs")
    parser.add_argument("--max_iter", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.015, 0.03, 0.06])
    args = parser.parse_args()
    rates = ["auto", *map(str, args.rates)]

    def run_name(layers, heads, batch, times, rate, mix_ratio="auto"):
        return f"{layers}x{32 * heads}_{batch}_{times * args.max_iter}_{rate}_mixes_{mix_ratio}"
    runs, steps = {}, {}
    lengths = [(*next(iter(SHAPES.values()))[:3], times) for times in MIX_LENGTHS]
    for shape, rate, ratio in [*((shape, rate, "auto") for shape in SHAPES.values() for rate in rates),
                               *((shape, "auto", ratio) for shape in lengths for ratio in MIX_RATIOS)]:
        (layers, heads, batch, times), name = shape, run_name(*shape, rate, ratio)
        steps[name] = times * args.max_iter
        runs[name] = [f"--data_path={args.data_path}", f"--n_layer={layers}", f"--n_head={heads}", "--head_size=32",
                      "--block_size=128", f"--batch_size={batch}", "--num_batch_accum=1", f"--val_intervals={steps[name]}",
                      f"--val_iter={768 // batch}", f"--learning_rate={rate}", f"--mix_lr_ratio={ratio}"]
    rows = train_runs(runs, args.out, steps)
    loss = lambda *run: rows[run_name(*run)][-1]["val_loss"]
    lines = [f"| nats/token after {args.max_iter} steps, lower is better | auto | auto is | {' | '.join(rates[1:])} |",
             "|---" * (3 + len(args.rates)) + "|"]
    for name, (layers, heads, batch, times) in SHAPES.items():
        shown = mark_lowest([loss(layers, heads, batch, times, rate) for rate in rates])
        lines.append(f"| {name} | {shown[0]} | {OptimizerConfig().peak_lr(128 * batch):.3g} | {' | '.join(shown[1:])} |")
    lines += ["", "The learning rate of token shifts and mixes relative to that of the matrices (`--mix_lr_ratio`), in runs "
              "of the first shape:", "", f"| nats/token, lower is better | auto | auto is | {' | '.join(MIX_RATIOS[1:])} |",
              "|---" * (2 + len(MIX_RATIOS)) + "|"]
    for shape in lengths:
        n_steps = shape[3] * args.max_iter
        shown = mark_lowest([loss(*shape, "auto", ratio) for ratio in MIX_RATIOS])
        lines.append(f"| {n_steps:,} steps | {shown[0]} | {OptimizerConfig().mix_ratio(n_steps, 1.0):.3g} | "
                     f"{' | '.join(shown[1:])} |")
    text = "\n".join(["# The default learning rate at other shapes and lengths", "", *lines, "",
                      f"Built-in text, vocabulary 4,096, blocks of 128, one seed; {machine()}: "
                      f"`python bench/learning_rates.py`.", ""])
    (REPO / "studies" / "learning_rates.md").write_text(text, encoding="utf-8")
    print(text)


def mark_lowest(losses: list[float]) -> list[str]:
    return [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]


if __name__ == "__main__":
    main()
