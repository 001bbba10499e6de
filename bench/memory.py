"""Peak memory of a training step: the default against nanoGPT's model, which materialises all logits and saves both hidden
tensors of GELU for the backward pass.

    python bench/memory.py --n_layer 12 --n_head 12 --block_size 1024 --vocab_size 50257 --batch_sizes 4 8 16

Without a GPU the step is traced: nothing is computed, and the storage of every tensor is counted for as long as it lives.
That covers weights, gradients, optimizer states, activations and temporaries under autocast, in the second step, when the
optimizer has its states, of two or more batches: from the second one on, there are gradients. It leaves out the CUDA context
(about 0.5 GiB) and the allocator's fragmentation, and attention is traced as the CPU's flash attention. With a GPU it
reports `torch.cuda.max_memory_allocated`. Writes its table into docs/benchmarks.md.
"""
import argparse
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from side_by_side import write_into_docs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
from layers import attention, loss  # noqa: E402
from layers.mlp import GELU, MLP  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from runtime.config import read_flags  # noqa: E402
from runtime.device import DTYPES  # noqa: E402
from train import PRESETS  # noqa: E402


class LiveBytes(TorchDispatchMode):
    """Bytes of all live storages that operations have allocated, and their peak."""

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                for part in (leaf._indices(), leaf._values()) if leaf.is_sparse else (leaf,):
                    self.add(part.untyped_storage())
        return out

    def reset_peak(self):
        self.peak = self.current

    def add(self, storage: torch.UntypedStorage):
        key = storage._cdata
        if key not in self.live:
            self.live.add(key)
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self.remove, key, storage.nbytes())

    def remove(self, key: int, n_bytes: int):
        self.live.discard(key)
        self.current -= n_bytes


def peak_of_step(config: GPTConfig, schedule: OptimizerConfig, batch_size: int, dtype: torch.dtype | None = None,
                 all_logits: bool = False, two_hidden: bool = False, gradient_checkpointing: bool = False,
                 device: str = "cpu", for_gpu: bool = False, has_triton: bool = True, n_batches: int = 1) -> int:
    """Peak bytes of a training step of `n_batches`, traced on a CPU, measured on a GPU.

    dtype: of autocast; None without. all_logits: computes (B, T, V) at once. two_hidden: saves input and output of GELU.
    for_gpu: the trace is of what a GPU does. has_triton: it has a kernel for the loss, which otherwise is plain torch.
    """
    def two_steps(reset_peak: Callable):
        """The peak is reset before each step; the second one has the optimizer's states."""
        with torch.device(device):
            model = GPT(config)
        model.gradient_checkpointing = gradient_checkpointing
        optimizer = make_optimizer(model, schedule, ns_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        for _ in range(2):
            reset_peak()
            for _ in range(n_batches):
                idx = torch.zeros(batch_size, config.block_size, dtype=torch.int64, device=device)
                with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    value = F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()) if all_logits else model(idx, idx)
                value.backward()
                del value
            optimizer.step()
            optimizer.zero_grad()

    with mock.patch.object(GELU, "forward", MLP.forward) if two_hidden else nullcontext():
        if device == "cuda":
            two_steps(torch.cuda.reset_peak_memory_stats)
            return torch.cuda.max_memory_allocated()
        as_on_gpu = mock.patch.object(loss, "is_on_gpu", lambda x: True) if for_gpu else nullcontext()
        its_attention = mock.patch.object(attention, "is_blocked", lambda *args: False) if for_gpu else nullcontext()
        # what the operation does there, in place of what fake tensors know of it
        plain = nullcontext() if has_triton else mock.patch.object(
            loss, "losses_and_logit_grad", loss.losses_and_logit_grad._init_fn)
        with as_on_gpu, its_attention, plain, FakeTensorMode(), LiveBytes() as live_bytes:
            two_steps(live_bytes.reset_peak)
        return live_bytes.peak


def preset_configs(preset: str | None, **shape) -> tuple[GPTConfig, OptimizerConfig]:
    """The configs of one of train.py's presets, or of the defaults, at a shape of its own."""
    values = PRESETS.get(preset, {}) | shape
    return read_flags(GPTConfig, values), read_flags(OptimizerConfig, values)


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained. options: of peak_of_step."""
    name: str
    preset: str | None
    options: dict = field(default_factory=dict)


NANOGPT = Arm("nanoGPT: `gpt2` preset, all logits, both hidden tensors", "gpt2", {"all_logits": True, "two_hidden": True})
ARMS = [NANOGPT, Arm("`gpt2` preset, all logits", "gpt2", {"all_logits": True}), Arm("`gpt2` preset", "gpt2"),
        Arm("default", None), Arm("default, `--gradient_checkpointing`", None, {"gradient_checkpointing": True})]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_head", type=int, default=12)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=50_257)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--without_triton", action="store_true", help="trace cards that Triton does not support, and only "
                                                                      "print the table")
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("n_layer", "n_head", "block_size", "vocab_size")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = " | ".join(f"GiB at {batch_size}" for batch_size in args.batch_sizes)
    rows = [f"| model and loss | dtype | ratio to nanoGPT's | better | {sizes} |",
            "|---" * (4 + len(args.batch_sizes)) + "|"]
    for dtype in args.dtypes:
        nanogpt = None  # its peak at the largest batch
        for arm in ARMS:
            peaks = [peak_of_step(*preset_configs(arm.preset, **shape), batch_size,
                                  None if dtype == "fp32" else DTYPES[dtype], **arm.options, device=device, for_gpu=True,
                                  has_triton=not args.without_triton, n_batches=2) / 2**30
                     for batch_size in args.batch_sizes]
            nanogpt = nanogpt or peaks[-1]
            rows.append(f"| {arm.name} | {dtype} | **{peaks[-1] / nanogpt:.2f}** | lower | "
                        + " | ".join(f"{peak:.2f}" for peak in peaks) + " |")
            print(rows[-1], flush=True)
    config, _ = preset_configs(None, **shape)
    how = "traced" if device == "cpu" else f"measured on {torch.cuda.get_device_name()}"
    text = (f"Peak GiB at each batch size, the ratio at the last one. {args.n_layer} layers x {config.n_embd}, block "
            f"{args.block_size:,}, vocabulary {args.vocab_size:,}, {how}: `python bench/memory.py`. Add about 0.5 GiB for "
            f"CUDA itself.")
    if not args.without_triton:
        write_into_docs("bench/memory.py", "\n".join(rows) + "\n\n" + text)


if __name__ == "__main__":
    main()
