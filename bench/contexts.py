"""Decoding at the end of long contexts: bytes of cache and tokens per second of architectures, against attention.

    python bench/contexts.py --lengths 2048 8192

Models of one width and depth with random weights; one text is decoded, greedily, as generate.py does, after a prompt that
fills the context but for an eighth of it, at most 64 tokens. Sides take turns; medians of --rounds. Writes its table into
docs/benchmarks.md. About two minutes on two cores.
"""
import argparse
import sys

from side_by_side import REPO, table, write_into_docs

sys.path.insert(0, str(REPO))
from compare import Arm, parse_arm, time_decoding  # noqa: E402
from runtime.device import DeviceConfig, describe_hardware, open_machine  # noqa: E402

SIDES = "mixer=attention", "mixer=SSSA", "mixer=DDDA", "mixer=RRRA,positions=none,qk_scale=1.5"
VOCAB_SIZE = 8192


def make_arm(side: str, shape: dict) -> Arm:
    flags = shape | parse_arm(side, "--sides")
    return Arm(side, "", flags, (1,), 1, (1, shape["block_size"]), 0.1, 0, 0, 0, vocab_size=VOCAB_SIZE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], help="contexts, in tokens")
    parser.add_argument("--sides", nargs="+", default=SIDES, help="flags of train.py; the first is the reference")
    parser.add_argument("--n_layer", type=int, default=8)
    parser.add_argument("--n_head", type=int, default=8)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    machine, rows = open_machine(DeviceConfig(dtype=args.dtype)), []
    for length in args.lengths:
        shape = {"n_layer": args.n_layer, "n_head": args.n_head, "head_size": args.head_size, "block_size": length}
        base, *others = time_decoding([make_arm(side, shape) for side in args.sides], machine, args.rounds)
        for side, own in zip(args.sides[1:], others):
            rows += [(f"bytes of cache, {length:,} tokens: {side} / {args.sides[0]}",
                      f"{own.cache_bytes / base.cache_bytes:.3f}", "lower", f"{own.cache_bytes / 2**20:,.1f} MiB",
                      f"{base.cache_bytes / 2**20:,.1f} MiB"),
                     (f"tokens per second at the end of {length:,}: {side} / {args.sides[0]}",
                      f"{base.seconds / own.seconds:.2f}", "higher", f"{1 / own.seconds:,.0f}", f"{1 / base.seconds:,.0f}")]
    text = table(rows) + (
        f"\n\n{args.n_layer} layers x {args.n_head * args.head_size}, {VOCAB_SIZE:,} ids, one text, {args.dtype}, "
        f"{describe_hardware(machine.device)}; medians of {args.rounds} rounds in which the sides took turns: "
        f"`python bench/contexts.py`.")
    print(text)
    write_into_docs("bench/contexts.py", text)


if __name__ == "__main__":
    main()
