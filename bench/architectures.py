"""The cost of an architecture: step time and peak memory of the whole model at equal parameters, against GELU.

    python bench/architectures.py --sides mlp=grkan linear=grkan

Models of four layers at each width, blocks of 256, 2,048 tokens a step, 8,192 ids, random tokens, all cores, compiled by
torch.compile. A step is a forward pass, a backward pass and the optimizer's update. Each measurement of time is a process of
its own, and the sides take turns; peak memory is that of all tensors, traced (bench/memory.py). Writes its table into
docs/benchmarks.md. About a quarter of an hour on two cores.
"""
import argparse
import json
import statistics
import sys
import time

import torch
from memory import peak_of_step
from side_by_side import REPO, run, table, take_turns, write_into_docs

sys.path.insert(0, str(REPO))
from compare import build_meta_model, match_arm  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from runtime.config import read_flags  # noqa: E402
from runtime.device import DeviceConfig, compile_in_place, describe_hardware, open_machine  # noqa: E402
from runtime.memory import disable_malloc_trim  # noqa: E402

BASELINE = "mlp=gelu"
N_LAYER, BATCH_SIZE, BLOCK_SIZE, VOCAB_SIZE, HEAD_SIZE = 4, 8, 256, 8192, 64


def side_config(side: str, width: int) -> GPTConfig:
    """side: a flag of train.py and its value, mlp=grkan. The model has the parameters of the baseline."""
    shape = {"n_layer": N_LAYER, "n_head": width // HEAD_SIZE, "head_size": HEAD_SIZE, "block_size": BLOCK_SIZE}
    baseline, changed = (shape | dict([flag.split("=")]) for flag in (BASELINE, side))
    values = match_arm(changed, build_meta_model(baseline, VOCAB_SIZE).n_parameters(), VOCAB_SIZE)
    return read_flags(GPTConfig, values | {"vocab_size": VOCAB_SIZE})


def step_seconds(side: str, width: int, dtype: str, is_compiled: bool, steps: int) -> float:
    """The median of `steps` training steps on random tokens, after two more."""
    machine = open_machine(DeviceConfig(dtype=dtype))
    if machine.device.type == "cpu":
        disable_malloc_trim()
    torch.manual_seed(0)
    model = GPT(side_config(side, width)).to(machine.device)
    optimizer = make_optimizer(model, OptimizerConfig(), ns_dtype=machine.newton_schulz_dtype())
    idx = torch.randint(VOCAB_SIZE, (BATCH_SIZE, BLOCK_SIZE), device=machine.device)

    def step():
        with machine.autocast():
            loss = model(idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device
    if is_compiled and not compile_in_place(model, step):
        raise SystemExit("torch.compile does not work on this machine: give --eager")
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768], help="multiples of 64")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--sides", nargs="+", default=["mlp=grkan", "linear=grkan"], help="flags of train.py")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--eager", action="store_true", help="time steps that are not compiled")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # one measurement, of the first width, printed as JSON
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(step_seconds(args.arm, args.widths[0], args.dtype, not args.eager, args.steps)))
        return
    rows, how, device = [], "eager" if args.eager else "compiled", open_machine(DeviceConfig(dtype=args.dtype)).device
    sides = [BASELINE, *args.sides]
    for width in args.widths:
        flags = [f"--widths={width}", f"--dtype={args.dtype}", f"--steps={args.steps}", *["--eager"] * args.eager]
        base, *others = take_turns(lambda side, flags=flags: run(__file__, side, flags), sides, args.rounds)
        rows += [(f"{how} step time, width {width}: {side} / {BASELINE}", f"{seconds / base:.2f}", "lower",
                  f"{1e3 * seconds:,.0f} ms", f"{1e3 * base:,.0f} ms") for side, seconds in zip(args.sides, others)]
        dtype = None if args.dtype == "fp32" else torch.bfloat16
        base, *others = (peak_of_step(side_config(side, width), OptimizerConfig(), BATCH_SIZE, dtype) for side in sides)
        rows += [(f"peak memory of a step, width {width}: {side} / {BASELINE}", f"{peak / base:.2f}", "lower",
                  f"{peak / 2**20:,.0f} MiB", f"{base / 2**20:,.0f} MiB") for side, peak in zip(args.sides, others)]
    text = table(rows) + (
        f"\n\n{N_LAYER} layers, blocks of {BLOCK_SIZE}, {BATCH_SIZE * BLOCK_SIZE:,} tokens a step, {VOCAB_SIZE:,} ids, "
        f"equal parameters, {args.dtype}, {describe_hardware(device)}; medians of {args.rounds} processes that took turns: "
        f"`python bench/architectures.py`.")
    print(text)
    write_into_docs("bench/architectures.py", text)


if __name__ == "__main__":
    main()
