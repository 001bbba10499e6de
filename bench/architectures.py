"""What an architecture costs: step time and peak memory of the whole model, at equal parameters, against GELU.

    python bench/architectures.py

A model of four layers at each width, blocks of 256, 2,048 tokens a step, 8,192 ids, random tokens, all cores; compiled by
torch.compile. Each side is a process of its own that takes turns with the others. A step is a forward and a
backward pass and the optimizer's part; peak memory is of all its tensors, traced (bench/memory.py). Writes its table into
README.md. About a quarter of an hour on two cores.
"""
import argparse
import json
import sys
import time

import torch
from memory import peak_of_step
from side_by_side import REPO, run, table, take_turns, write_into_readme

sys.path.insert(0, str(REPO))
from compare import matched, model_of  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from runtime.config import read_flags  # noqa: E402
from runtime.device import DeviceConfig, compile_in_place, hardware, open_machine  # noqa: E402
from runtime.memory import disable_malloc_trim  # noqa: E402

SIDES = ["mlp=grkan", "linear=grkan"]
BATCH_SIZE, BLOCK_SIZE, VOCAB_SIZE, HEAD_SIZE = 8, 256, 8192, 64


def config_of(side: str, width: int) -> GPTConfig:
    """With the parameters of the model with GELU."""
    shape = {"n_layer": 4, "n_head": width // HEAD_SIZE, "head_size": HEAD_SIZE, "block_size": BLOCK_SIZE}
    name, value = side.split("=")
    values = matched(shape | {name: value}, model_of(shape | {"mlp": "gelu"}, VOCAB_SIZE).n_parameters(), VOCAB_SIZE)
    return read_flags(GPTConfig, values | {"vocab_size": VOCAB_SIZE})


def step_seconds(side: str, width: int, dtype: str, is_compiled: bool, steps: int) -> float:
    """The median of a few training steps on random tokens."""
    machine = open_machine(DeviceConfig(dtype=dtype))
    if machine.device.type == "cpu":
        disable_malloc_trim()
    torch.manual_seed(0)
    model = GPT(config_of(side, width)).to(machine.device)
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
        raise SystemExit("torch.compile does not work here")
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[steps // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--sides", nargs="+", default=SIDES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="steps that are not compiled")
    parser.add_argument("--arm", help="internal: one measurement, as JSON")
    args = parser.parse_args()
    if args.arm:
        side, width, how = args.arm.split(" ")
        print(json.dumps(step_seconds(side, int(width), args.dtype, how == "compiled", args.steps)))
        return
    rows, how, device = [], "eager" if args.eager else "compiled", open_machine(DeviceConfig(dtype=args.dtype)).device
    for width in args.widths:
        arms = [f"{side} {width} {how}" for side in ("mlp=gelu", *args.sides)]
        flags = [f"--dtype={args.dtype}", f"--steps={args.steps}"]
        base, *others = take_turns(lambda arm, flags=flags: run(__file__, arm, flags), arms, args.rounds)
        rows += [(f"{side}, width {width}: {how} step, times mlp=gelu's", f"**{seconds / base:.2f}**",
                  f"{1e3 * seconds:,.0f} ms", f"{1e3 * base:,.0f} ms") for side, seconds in zip(args.sides, others)]
        dtype = None if args.dtype == "fp32" else torch.bfloat16
        base, *others = (peak_of_step(config_of(side, width), OptimizerConfig(), BATCH_SIZE, dtype)
                         for side in ("mlp=gelu", *args.sides))
        rows += [(f"{side}, width {width}: peak memory, times mlp=gelu's", f"**{peak / base:.2f}**",
                  f"{peak / 2**20:,.0f} MiB", f"{base / 2**20:,.0f} MiB") for side, peak in zip(args.sides, others)]
    text = table(rows) + (
        f"\n\n4 layers, blocks of {BLOCK_SIZE}, {BATCH_SIZE * BLOCK_SIZE:,} tokens a step, {VOCAB_SIZE:,} ids, equal "
        f"parameters, {args.dtype}, {hardware(device)}; medians of {args.rounds} processes that took turns: "
        f"`python bench/architectures.py`.")
    print(text)
    write_into_readme("bench/architectures.py", text)


if __name__ == "__main__":
    main()
