"""Finds the learning rates of the optimizer's groups: trains the same small model at each point of a grid.

    python download_data.py --dataset=builtin --data_path=data/builtin --vocab_size=4096 --val_tokens=100_000
    python bench/learning_rates.py --data_path=data/builtin --learning_rates 1e-3 2e-3 4e-3 --embed_rates 10 30 100

Prints a row per point, best last: validation bits per byte after --max_iter steps with a full cooldown.
"""
import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import optimizer  # noqa: E402
import train  # noqa: E402
from runtime.metrics import read_rows  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="data/builtin")
    parser.add_argument("--max_iter", type=int, default=300, help="steps of 2,048 tokens")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--embed_rates", type=float, nargs="+", default=[optimizer.EMBED_RATE])
    parser.add_argument("--head_rates", type=float, nargs="+", default=[optimizer.HEAD_RATE])
    args = parser.parse_args()
    results = []
    for rate, embed, head in itertools.product(args.learning_rates, args.embed_rates, args.head_rates):
        optimizer.EMBED_RATE, optimizer.HEAD_RATE = embed, head
        with tempfile.TemporaryDirectory() as folder:
            train.main([f"--data_path={args.data_path}", f"--checkpoint_path={folder}/gpt.pt", "--n_layer=4",
                        "--n_head=4", "--head_size=32", "--block_size=128", "--batch_size=16", "--num_batch_accum=1",
                        f"--max_iter={args.max_iter}", f"--val_intervals={args.max_iter}", "--warmup_iter=20",
                        f"--learning_rate={rate}", "--dataloader_num_workers=0", "--verbose=0"])
            row = read_rows(Path(folder) / "gpt" / "metrics.jsonl")[-1]
        results.append((row["val_bpb"], rate, embed, head))
        print(f"{row['val_bpb']:.4f} bits/byte: learning_rate {rate:g}, embed x {embed:g}, head x {head:g}", flush=True)
    print("\n" + "\n".join(f"{bpb:.4f}  {rate:g}  {embed:g}  {head:g}" for bpb, rate, embed, head in sorted(results)[::-1]))


if __name__ == "__main__":
    main()
