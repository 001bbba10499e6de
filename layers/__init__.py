"""Parts of the network: mathematics on tensors. An architecture is one class here and one line in a dict below.

Every layer is constructed from the model's config, from which it reads what it needs: n_embd, n_head, head_size, bias …
All linear layers inside it are of `linear_class(config, name)` (layers/linear.py). Two names have a meaning: `proj` is the
one that writes into the residual stream, whose matrix the model initialises to zero; the matrix of one named `qkv` is
several of equal shape stacked along its rows (queries, keys and values), which the optimizer updates as separate matrices.

MLP: `MLP(config)`, works on each position by itself.

    forward(x) -> y                                             x, y: (B, T, C)

Mixer: `Mixer(config, layer)`, layer counts from 0; moves information between positions. Its class attribute `letter` stands
for it in a pattern such as --mixer=DDDA; its class attribute `needs_mask` is True if it obeys `metadata.mask`, which is only
built if a mixer of the model needs it. One that does not need the mask reads `metadata.doc_starts` itself.

    forward(x, metadata, cache=None, first_layer_v=None) -> (y, v)
        metadata: layers/attention_metadata.py, shared by all layers. cache: holds the positions before x, and takes x in.
        v: this layer's values, (B, heads of values, T, head_size): n_kv_head for Attention, n_head for a mixer without
        grouped heads. Every later block receives those of the first block as first_layer_v (see Attention).
    init_cache(batch_size, max_len, device, dtype) -> cache
        a RowCache of layers/cache.py

MLPs and mixers both count their cost per training token, forward and backward (twice the forward pass):
`flops_per_token(block_size)` for matrix products, `elementwise_flops_per_token(block_size)` for activations and bases.

Any layer with buffers that are not saved in checkpoints makes them in `init_buffers()`: an exported model calls it again.
"""
from functools import partial

from layers.attention import Attention, SlidingAttention
from layers.gated_delta import DeltaProduct, GatedDelta, RotaryDelta
from layers.linear import LINEAR_SCOPES, LINEARS
from layers.mlp import GELU, KAN, ReLU2, SwiGLU, TanhGELU
from layers.norm import LayerNorm, RMSNorm, ScaledRMSNorm

__all__ = ["LINEAR_SCOPES", "LINEARS", "MIXERS", "MLPS", "NORMS"]

MIXERS = {"attention": Attention, "sliding": SlidingAttention, "gated_delta": GatedDelta, "delta_product": DeltaProduct,
          "rotary_delta": RotaryDelta}
KANS = {kind: partial(KAN, kind=kind) for kind in LINEARS if kind != "linear"}
MLPS = {"relu2": ReLU2, "gelu": GELU, "gelu_tanh": TanhGELU, "swiglu": SwiGLU, **KANS}
NORMS = {"rms": RMSNorm, "scaled_rms": ScaledRMSNorm, "layer": LayerNorm}
