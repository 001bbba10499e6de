"""What training at inference time gains and costs, in domain and on foreign text.

    python bench/adapt.py --checkpoint_path=checkpoints/quickstart.pt --data=data --text=docs_val.parquet --out=runs/adapt

Runs `adapt.py` on the validation documents of a data folder, and on foreign documents, and writes a table of both into
docs/benchmarks.md. Both read 40 documents twice, static and adapted in the same process; the controls come with them.
Interrupted, the same command continues. About ten minutes on two idle cores.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from side_by_side import REPO, machine, write_into_docs  # noqa: E402

from experiments.adaptation import bits_per_byte, difference, gains, seconds_ratio  # noqa: E402
from experiments.report import Table, markdown  # noqa: E402
from experiments.stats import Estimate  # noqa: E402


def run(checkpoint: Path, dataset: str, out: Path, flags: list[str]) -> dict:
    """What adapt.py writes at its end."""
    subprocess.run([sys.executable, REPO / "adapt.py", f"--checkpoint_path={checkpoint}", f"--dataset={dataset}",
                    f"--out_path={out}", "--device=cpu", *flags], check=True)
    return json.loads((out / "adaptation.json").read_text())


def line(name: str, result: dict) -> tuple[str, ...]:
    rows = [row for row in result["rows"] if "diverged" not in row]
    static = Estimate.from_values([bits_per_byte(row, "static") for row in rows]).mean
    own = gains(rows, "adapted")
    better = f"{sum(gain < 0 for gain in own)} of {len(own)}"
    return (name, str(len(rows)), f"{static:.4f}", f"**{difference(own)}**", better, difference(gains(rows, "other")),
            difference(gains(rows, "overlap")), f"{seconds_ratio(rows):.2f}",
            f"{result['flops']['adapted'] / result['flops']['static']:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, required=True)
    parser.add_argument("--data", required=True, help="folder that the model's data was prepared in")
    parser.add_argument("--text", required=True, help="foreign documents")
    parser.add_argument("--out", type=Path, required=True)
    args, flags = parser.parse_known_args()
    datasets = {"foreign": args.text, "in domain": args.data}
    results = {name: run(args.checkpoint_path, dataset, args.out / name.replace(" ", "_"), flags)
               for name, dataset in datasets.items()}
    table = markdown(Table(
        ("text", "documents", "static, bits/byte", "adapted minus static", "better", "adapted to another document",
         "static, longer overlap", "time / static", "FLOPs / static"),
        [line(name, result) for name, result in results.items()]))
    first = next(iter(results.values()))
    note = (f"Differences in bits per byte against static, means over documents ± the half-width of their 95 % interval; "
            f"lower is better. The quick start's model; {first['adapt_optimizer']} at {first['rate']:g}, hops of "
            f"{first['hop']} tokens, {first['machine']}; foreign: {Path(args.text).name}, in domain: the validation "
            f"documents of the data; {machine()}: `python bench/adapt.py --checkpoint_path=checkpoints/quickstart.pt "
            f"--data=data --text={Path(args.text).name} --out=runs/adapt`.")
    write_into_docs("bench/adapt.py", f"{table}\n\n{note}")
    print(table)


if __name__ == "__main__":
    main()
