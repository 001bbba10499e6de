"""Parts of a network. An architecture is one class here and one line in a dict below.

Every layer is made from the model's config, of which it reads what it needs (n_embd, n_head, head_size, block_size,
bias …). An MLP works on each position by itself, (B, T, C) -> (B, T, C). A mixer moves information between positions and
owns its part of the cache: `Mixer(config, layer)`, layer counting from 0, `init_cache(batch_size, n_tokens, device,
dtype)`, whose result has `put` (see KVCache), and

    forward(x, metadata, cache=None, first=None) -> (y, value)     x, y: (B, T, C)

where `places` says where the tokens stand (layers/metadata.py), and `value` is what the later blocks get as `first` if it is
the first block's: see Attention. Both have `flops_per_token(block_size)`, the floating-point operations that their matrix
products cost a training token, forward and (as much again, twice) backward, and `elementwise_flops_per_token(block_size)`,
those of activations and bases. Both make their linear layers by LINEARS[config.linear], and name those that write into the
residual stream `proj`: the model starts their matrices at zero. A mixer has a `letter`, by which a pattern of several names
it. Buffers that are not in checkpoints are made by `fill`, which export.py's model calls again.
"""
from functools import partial

from layers.attention import Attention
from layers.gated_delta import GatedDelta
from layers.kan import LINEARS
from layers.mlp import GELU, KAN, ReLU2, SwiGLU, TanhGELU
from layers.norm import LayerNorm, RMSNorm, ScaledRMSNorm

__all__ = ["LINEARS", "MIXERS", "MLPS", "NORMS"]

MIXERS = {"attention": Attention, "gated_delta": GatedDelta}
KANS = {kind: partial(KAN, kind=kind) for kind in LINEARS if kind != "linear"}
MLPS = {"relu2": ReLU2, "gelu": GELU, "gelu_tanh": TanhGELU, "swiglu": SwiGLU, **KANS}
NORMS = {"rms": RMSNorm, "scaled_rms": ScaledRMSNorm, "layer": LayerNorm}
