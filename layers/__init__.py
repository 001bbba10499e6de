"""Parts of a network. An architecture is one class here and one line in a dict below.

Every layer is made from the model's config, of which it reads what it needs (n_embd, n_head, head_size, block_size,
bias …). An MLP works on each position by itself, (B, T, C) -> (B, T, C). A mixer moves information between positions and
owns its part of the cache: `Mixer(config, layer)`, layer counting from 0, `init_cache(batch_size, n_tokens, device,
dtype)`, and

    forward(x, cache=None, first=None) -> (y, value)     x, y: (B, T, C)

where `value` is what the later blocks get as `first` if it is the first block's: see Attention. Both have
`flops_per_token(block_size)`, the floating-point operations of their matrix products in a forward pass, and name the
matrices that write into the residual stream `proj`: the model starts those at zero.
"""
from layers.attention import Attention
from layers.mlp import GELU, ReLU2, SwiGLU
from layers.norm import LayerNorm, RMSNorm

MIXERS = {"attention": Attention}
MLPS = {"relu2": ReLU2, "gelu": GELU, "swiglu": SwiGLU}
NORMS = {"rms": RMSNorm, "layer": LayerNorm}
