"""Peak memory of a training step, traced without a GPU: no number is computed, every tensor is only accounted for.

    python bench/memory.py --n_layer 12 --n_head 12 --block_size 1024 --vocab_size 32768 --batch_sizes 1 2 4 8

Counts weights, gradients, optimizer states, activations and temporaries under autocast, once the optimizer has its
states. Not counted: the CUDA context (about 0.5 GiB), the allocator's gaps, and the math that fused attention avoids is
traced as the CPU's flash attention. `torch.cuda.max_memory_allocated` on a card is the truth.
"""
import argparse
import sys
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import GPT, GPTConfig  # noqa: E402
from optimizer import OptimizerConfig, make_optimizer  # noqa: E402


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage):
        key = storage._cdata
        if key not in self.seen:
            self.seen.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, n_bytes: int):
        self.seen.discard(key)
        self.now -= n_bytes


def peak_of_step(config: GPTConfig, batch_size: int, dtype: torch.dtype | None) -> int:
    """Bytes. The second step is the one that counts: the optimizer has its states from the first."""
    with FakeTensorMode(), LiveBytes() as live:
        model = GPT(config)
        optimizer = make_optimizer(model, OptimizerConfig())
        for _ in range(2):
            live.peak = live.now
            idx = torch.zeros(batch_size, config.block_size, dtype=torch.int64)
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(idx, idx)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    config = GPTConfig(n_layer=args.n_layer, n_head=args.n_head, block_size=args.block_size, vocab_size=args.vocab_size)
    with torch.device("meta"):
        n_parameters = GPT(config).n_parameters()
    print(f"{args.n_layer} layers x {config.n_embd}, block {args.block_size}, vocabulary {args.vocab_size:,}: "
          f"{n_parameters / 1e6:.1f} M parameters; peak GiB of a step")
    print("batch_size    fp32    bf16 or fp16")
    for batch_size in args.batch_sizes:
        peaks = [peak_of_step(config, batch_size, dtype) / 2**30 for dtype in (None, torch.bfloat16)]
        print(f"{batch_size:>10}  {peaks[0]:6.2f}  {peaks[1]:6.2f}")


if __name__ == "__main__":
    main()
