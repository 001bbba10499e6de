"""Parts of the network: mathematics on tensors. An architecture is one class here and one line in a dict below.

Every layer is constructed from the model's config, from which it reads what it needs: n_embd, n_head, head_size, bias …
All linear layers inside it are `LINEARS[config.linear]`; the one that writes into the residual stream is named `proj`, and
the model initialises its matrix to zero.

MLP: `MLP(config)`, works on each position by itself.

    forward(x) -> y                                             x, y: (B, T, C)

Mixer: `Mixer(config, layer)`, layer counts from 0; moves information between positions. Its `letter` stands for it in a
pattern such as --mixer=DDDA.

    forward(x, metadata, cache=None, first_layer_v=None) -> (y, v)
        metadata: layers/attention_metadata.py, shared by all layers. cache: holds the positions before x, and takes x in.
        v: this layer's values, (B, n_head, T, head_size); every later block receives those of the first block as
        first_layer_v (see Attention).
    init_cache(batch_size, max_len, device, dtype) -> cache
        with `copy_rows_from(rows, other, other_rows, stop, n)`, see KVCache

MLPs and mixers both count their cost per training token, forward and backward (twice the forward pass):
`flops_per_token(block_size)` for matrix products, `elementwise_flops_per_token(block_size)` for activations and bases.

Any layer with buffers that are not saved in checkpoints makes them in `init_buffers()`: an exported model calls it again.
"""
from functools import partial

from layers.attention import Attention
from layers.gated_delta import GatedDelta
from layers.linear import LINEARS
from layers.mlp import GELU, KAN, ReLU2, SwiGLU, TanhGELU
from layers.norm import LayerNorm, RMSNorm, ScaledRMSNorm

__all__ = ["LINEARS", "MIXERS", "MLPS", "NORMS"]

MIXERS = {"attention": Attention, "gated_delta": GatedDelta}
KANS = {kind: partial(KAN, kind=kind) for kind in LINEARS if kind != "linear"}
MLPS = {"relu2": ReLU2, "gelu": GELU, "gelu_tanh": TanhGELU, "swiglu": SwiGLU, **KANS}
NORMS = {"rms": RMSNorm, "scaled_rms": ScaledRMSNorm, "layer": LayerNorm}
