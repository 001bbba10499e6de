"""Peak memory of a training step. Without a GPU it is traced: no number is computed, every tensor is accounted for.

    python bench/memory.py --n_layer 12 --n_head 12 --block_size 1024 --vocab_size 50257 --batch_sizes 4 8 16

The default beside nanoGPT's way: the gpt2 preset with all logits at once, and what goes into and comes out of GELU both
kept. Writes its table into README.md.

Counts weights, gradients, optimizer states, activations and temporaries under autocast, once the optimizer has its
states. Not counted: the CUDA context (about 0.5 GiB), the allocator's gaps, and the math that fused attention avoids is
traced as the CPU's flash attention. `torch.cuda.max_memory_allocated` on a card is the truth.
"""
import argparse
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from side_by_side import write_into_readme
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
from layers import loss  # noqa: E402
from layers.mlp import GELU, MLP  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from runtime.config import read_flags  # noqa: E402
from runtime.device import DTYPES  # noqa: E402
from train import PRESETS  # noqa: E402


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

    def start_anew(self):
        self.peak = self.now

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


def peak_of_step(config: GPTConfig, schedule: OptimizerConfig, batch_size: int, dtype: torch.dtype | None = None,
                 all_logits: bool = False, two_hidden: bool = False, gradient_checkpointing: bool = False,
                 device: str = "cpu") -> int:
    """Bytes, traced for a CPU, measured on a GPU. dtype: of autocast. two_hidden: what goes into and comes out of GELU both
    kept, as nanoGPT does."""
    def two_steps(start_anew: Callable):
        """The second is the one that counts: the optimizer has its states from the first."""
        with torch.device(device):
            model = GPT(config)
        model.gradient_checkpointing = gradient_checkpointing
        optimizer = make_optimizer(model, schedule, ns_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        for _ in range(2):
            start_anew()
            idx = torch.zeros(batch_size, config.block_size, dtype=torch.int64, device=device)
            with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()) if all_logits else model(idx, idx)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()

    with mock.patch.object(GELU, "forward", MLP.forward) if two_hidden else nullcontext():
        if device == "cuda":
            two_steps(torch.cuda.reset_peak_memory_stats)
            return torch.cuda.max_memory_allocated()
        with FakeTensorMode(), LiveBytes() as live:
            two_steps(live.start_anew)
        return live.peak


def of_preset(name: str | None, **shape) -> tuple[GPTConfig, OptimizerConfig]:
    values = PRESETS.get(name, {}) | shape
    return read_flags(GPTConfig, values), read_flags(OptimizerConfig, values)


ARMS = {  # preset, how it is trained
    "nanoGPT: `gpt2` preset, all logits, both hidden tensors": ("gpt2", {"all_logits": True, "two_hidden": True}),
    "`gpt2` preset, all logits": ("gpt2", {"all_logits": True}),
    "`gpt2` preset": ("gpt2", {}),
    "default": (None, {}),
    "default, `--gradient_checkpointing`": (None, {"gradient_checkpointing": True}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=50_257)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("n_layer", "n_head", "block_size", "vocab_size")}
    loss.CHUNK_BYTES["cpu"] = loss.CHUNK_BYTES["cuda"]  # traced on a CPU, meant for a GPU
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [f"| peak GiB of a step at batch_size | {' | '.join(map(str, args.batch_sizes))} |",
            "|---" * (1 + len(args.batch_sizes)) + "|"]
    for dtype in args.dtypes:
        for arm, (preset, options) in ARMS.items():
            peaks = [peak_of_step(*of_preset(preset, **shape), batch_size, None if dtype == "fp32" else DTYPES[dtype],
                                  **options, device=device) / 2**30 for batch_size in args.batch_sizes]
            rows.append(f"| {arm}, {dtype} | {' | '.join(f'{peak:.2f}' for peak in peaks)} |")
            print(rows[-1], flush=True)
    config, _ = of_preset(None, **shape)
    how = "traced" if device == "cpu" else f"measured on {torch.cuda.get_device_name()}"
    text = (f"{args.n_layer} layers x {config.n_embd}, block {args.block_size:,}, vocabulary {args.vocab_size:,}, {how}: "
            f"`python bench/memory.py`. Add about 0.5 GiB for CUDA itself.")
    write_into_readme("bench/memory.py", "\n".join(rows) + "\n\n" + text)


if __name__ == "__main__":
    main()
