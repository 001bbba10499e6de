"""Several processes that train one model: what a step costs, what it sends, and what each process holds.

    python bench/distributed.py

Sides take turns, each in fresh processes: one process with all threads, and --nproc processes that share them, with and
without --shard=optimizer, and without adding up gradients, as `torchrun --nproc_per_node` starts them; all take the same
batches of random tokens. Then, by counting, the bytes of a GPU for larger models. Writes its tables into docs/scaling.md.
About ten minutes on two cores.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from side_by_side import REPO, machine, measure_in_turns, table, write_into_docs

sys.path.insert(0, str(REPO))
from model import GPT, GPTConfig, meta_model  # noqa: E402
from optimizer import AdamW, OptimizerConfig, parameter_groups  # noqa: E402
from runtime.device import Machine  # noqa: E402
from runtime.distributed import World, join  # noqa: E402
from runtime.threads import available_cores  # noqa: E402
from trainer import Evaluation, LoopConfig, TrainSetup, fit, init_state, next_token_loss  # noqa: E402

SHAPE = {"n_layer": 4, "n_head": 4, "head_size": 64, "block_size": 256, "vocab_size": 8192}
BATCH_SIZE, N_BATCHES, N_STEPS = 4, 4, 8
SIDES = "one process", "processes", "--shard=optimizer", "processes that add nothing up"
SIZES = {"124M": (12, 12, 64), "350M": (24, 16, 64), "1.3B": (24, 16, 128), "7B": (32, 32, 128)}  # layers, heads, head size
GIB = 2**30


class RandomLoader:
    """The batches of a process among others. Notes when each step begins."""

    def __init__(self, rank: int, n_ranks: int):
        self.rank, self.n_ranks, self.number, self.starts = rank, n_ranks, 0, []

    def next_batch(self, model) -> tuple[torch.Tensor, ...]:
        if self.number % (N_BATCHES // self.n_ranks) == 0:
            self.starts.append(time.perf_counter())
        generator = torch.Generator().manual_seed(self.number * self.n_ranks + self.rank)
        self.number += 1
        ids = torch.randint(SHAPE["vocab_size"], (BATCH_SIZE, SHAPE["block_size"] + 1), generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def count_sent(counts: dict[str, int]):
    """Counts the bytes that each kind of call sends from now on."""
    def counted(name: str, call: Callable) -> Callable:
        def called(tensor, *args):
            counts[name] = counts.get(name, 0) + tensor.numel() * tensor.element_size()
            return call(tensor, *args)
        return called
    for name in ("all_reduce", "broadcast"):
        setattr(dist, name, counted(name, getattr(dist, name)))


def time_sum(n: int) -> float:
    """Seconds in which all processes add up `n` fp32 numbers: the median of ten times."""
    flat, seconds = torch.zeros(n), []
    for _ in range(10):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(flat)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def train_here(side: str):
    """In each process of a side; the first prints its figures as JSON."""
    world, counts, shard = join(), {}, "optimizer" if side == SIDES[2] else "none"
    n_sum = sum(p.numel() for p in GPT(GPTConfig(**SHAPE)).parameters())
    sum_seconds = time_sum(n_sum) if side == SIDES[3] else 0.0
    if side == SIDES[3]:
        World.sum_in_place = lambda world, tensors: None
    torch.manual_seed(0)
    model, loader = GPT(GPTConfig(**SHAPE)), RandomLoader(world.rank, world.size)
    setup = TrainSetup(Machine(torch.device("cpu"), "fp32"), OptimizerConfig(), BATCH_SIZE * N_BATCHES * SHAPE["block_size"],
                       {"shard": shard})
    state = init_state(model, loader, setup)
    count_sent(counts)
    loop = LoopConfig(max_iter=N_STEPS, num_batch_accum=N_BATCHES, val_intervals=N_STEPS, log_intervals=N_STEPS,
                      verbose=False)
    fit(state, loop, next_token_loss, Evaluation(lambda state: {"val_loss": 0.0}), setup)
    durations = [after - before for before, after in zip(loader.starts, loader.starts[1:])]
    if world.is_main:
        print(json.dumps({"seconds": statistics.median(durations[1:]), "state": state.optimizer.state_bytes(),
                          "parameters": 4 * n_sum, "sum_seconds": sum_seconds,
                          "sent": {name: n / N_STEPS for name, n in counts.items()}}))


def measure(side: str, nproc: int) -> dict:
    """A run of `side` in fresh processes."""
    n, threads = (1, available_cores()) if side == SIDES[0] else (nproc, max(1, available_cores() // nproc))
    launcher = [] if n == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    done = subprocess.run([sys.executable, *launcher, str(Path(__file__).resolve()), f"--child={side}"],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_sides(nproc: int, rounds: int) -> str:
    figures = measure_in_turns(lambda side: measure(side, nproc), list(SIDES), rounds)
    one, many, divided, silent = (statistics.median(run["seconds"] for run in figures[side]) for side in SIDES)
    alone, reducing, dividing, _ = (figures[side][0] for side in SIDES)
    sum_seconds = statistics.median(run["sum_seconds"] for run in figures[SIDES[3]])
    link = alone["parameters"] * 2 * (nproc - 1) / nproc / sum_seconds
    tokens, weights = BATCH_SIZE * N_BATCHES * SHAPE["block_size"], alone["parameters"]

    def row_of_bytes(what: str, own: float, peer: float) -> tuple:
        return what, f"{own / peer:.6f}", "lower", f"{own / 1024:,.1f} KiB", f"{peer / 1024:,.1f} KiB"
    step_of = lambda seconds: f"{seconds * 1000:,.0f} ms"
    rows = [(f"tokens per second: {nproc} processes / one with as many threads", f"{one / many:.2f}", "higher",
             f"{tokens / many:,.0f}", f"{tokens / one:,.0f}"),
            ("the same with --shard=optimizer / one", f"{one / divided:.2f}", "higher", f"{tokens / divided:,.0f}",
             f"{tokens / one:,.0f}"),
            (f"step of {nproc} processes: measured / C + {step_of(sum_seconds)}, by the formula below",
             f"{many / (silent + sum_seconds):.2f}", "1", step_of(many), step_of(silent + sum_seconds)),
            row_of_bytes("bytes that a step adds up over all processes / bytes of the parameters",
                         reducing["sent"]["all_reduce"], weights),
            row_of_bytes("bytes of new weights that it sends with --shard=optimizer / bytes of the parameters",
                         dividing["sent"]["broadcast"], weights),
            row_of_bytes("optimizer state of a process with --shard=optimizer / of one process",
                         dividing["state"], alone["state"])]
    return table(rows) + (
        f"\n\n4 layers x 256, block 256, 8,192 ids, {tokens:,} tokens a step in {N_BATCHES} batches, fp32, gloo; "
        f"{machine()}; medians of {rounds} rounds of {N_STEPS} steps: `python bench/distributed.py`. C is a step of "
        f"processes that add nothing up, {step_of(silent)}; L follows from the time in which they add up as many zeros, "
        f"{link / 2**20:,.0f} MiB/s.")


def bytes_of(n_layer: int, n_head: int, head_size: int) -> tuple[int, int, int]:
    """Parameters, bytes of a weight's copy with its gradient, and of the optimizer's state, of the default model."""
    model = meta_model(GPTConfig(n_layer=n_layer, n_head=n_head, head_size=head_size, block_size=1024, vocab_size=50304))
    state = sum(p.numel() * (8 if optimizer is AdamW else 2)  # two averages in fp32, or one in bf16
                for optimizer, groups in parameter_groups(model, OptimizerConfig(), 1).items()
                for group in groups for p in group["params"])
    n = sum(p.numel() for p in model.parameters())
    return n, 8 * n, state


def count_memory(processes: tuple[int, ...] = (2, 4, 8)) -> str:
    header = ["model", "parameters", "`--shard=none`", *(f"`--shard=optimizer`, {n} processes" for n in processes)]
    rows = []
    for name, shape in SIZES.items():
        n, weights, state = bytes_of(*shape)
        rows.append([name, f"{n / 1e6:,.0f} M", *(f"{(weights + state / many) / GIB:,.1f}" for many in (1, *processes))])
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2, help="processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        train_here(args.child)
        return
    text = "\n\n".join((compare_sides(args.nproc, args.rounds), "GiB of weights, gradients and optimizer state of each "
                        "process, counted (default model, 50,304 ids):", count_memory()))
    print(text)
    write_into_docs("bench/distributed.py", text, "scaling.md")


if __name__ == "__main__":
    main()
