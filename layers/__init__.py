"""Parts of a network. An architecture is one class here and one line in a dict below.

A mixer moves information between positions, (B, T, C) -> (B, T, C), and owns its part of the cache:
`forward(x, cache=None)`, `init_cache(batch_size, n_tokens, device, dtype)`. An MLP works on each position by itself,
(B, T, C) -> (B, T, C). Both have `flops_per_token(block_size)`, the floating-point operations of their matrix products
in a forward pass, and name the matrices that write into the residual stream `proj`: the model starts those at zero.
"""
from layers.attention import Attention
from layers.mlp import GELU, ReLU2, SwiGLU

MIXERS = {"attention": Attention}
MLPS = {"relu2": ReLU2, "gelu": GELU, "swiglu": SwiGLU}
