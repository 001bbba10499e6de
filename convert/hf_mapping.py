"""Which of our models are Llama's or GPT-2's, and how parameters are called there."""
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig
from runtime.config import BadInput

# -- shapes that others have ------------------------------------------------------------------------------------------

# What GPTConfig must say for a model to be one of theirs; the rest is size.
PLAIN = {"linear": "linear", "qk_norm": False, "value_residual": False, "x0_residual": False, "token_shift": False,
         "softcap": 0.0}
LLAMA = PLAIN | {"norm": "scaled_rms", "mlp": "swiglu", "positions": "rotary"}
GPT2 = PLAIN | {"norm": "layer", "positions": "learned", "bias": True}
GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def hf_architecture(config: GPTConfig) -> str | None:
    """llama or gpt2, if the model is one."""
    has = lambda wanted: all(getattr(config, name) == value for name, value in wanted.items())
    if any(config.mixer_class(layer).letter != "A" for layer in range(config.n_layer)):
        return None
    if has(LLAMA):
        return "llama"
    is_gpt2 = has(GPT2) and config.mlp in GPT2_ACTIVATIONS.values() and config.n_kv_head in (None, config.n_head)
    return "gpt2" if is_gpt2 else None


def llama_names(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """Our parameters, and theirs that stand one above the other in each."""
    names = {"embed.weight": ("model.embed_tokens.weight",), "norm.weight": ("model.norm.weight",)}
    if not config.tied:
        names["head.weight"] = ("lm_head.weight",)
    matrices = {"mixer.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "mixer.proj": ("self_attn.o_proj",),
                "mlp.gate": ("mlp.gate_proj",), "mlp.fc": ("mlp.up_proj",), "mlp.proj": ("mlp.down_proj",)}
    for i in range(config.n_layer):
        names[f"blocks.{i}.mixer_norm.weight"] = (f"model.layers.{i}.input_layernorm.weight",)
        names[f"blocks.{i}.mlp_norm.weight"] = (f"model.layers.{i}.post_attention_layernorm.weight",)
        for ours, theirs in matrices.items():
            for kind in ("weight", "bias") if config.bias else ("weight",):
                names[f"blocks.{i}.{ours}.{kind}"] = tuple(f"model.layers.{i}.{name}.{kind}" for name in theirs)
    return names


def gpt2_names(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    names = {"embed.weight": ("transformer.wte.weight",), "positions.weight": ("transformer.wpe.weight",)}
    if not config.tied:
        names["head.weight"] = ("lm_head.weight",)
    parts = {"mixer_norm": "ln_1", "mixer.qkv": "attn.c_attn", "mixer.proj": "attn.c_proj", "mlp_norm": "ln_2",
             "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        names[f"norm.{kind}"] = (f"transformer.ln_f.{kind}",)
        for i in range(config.n_layer):
            for ours, theirs in parts.items():
                names[f"blocks.{i}.{ours}.{kind}"] = (f"transformer.h.{i}.{theirs}.{kind}",)
    return names


NAMES = {"llama": llama_names, "gpt2": gpt2_names}


def is_transposed(kind: str, name: str, weight: Tensor) -> bool:
    """GPT-2's matrices in the blocks are inputs by outputs."""
    return kind == "gpt2" and name.startswith("blocks.") and weight.dim() == 2


def write_json(path: Path, blob: dict):
    path.write_text(json.dumps(blob, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def n_hidden(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(dataclasses.replace(config, n_layer=1)).blocks[0].mlp.n_hidden


def read_json(path: Path) -> dict:
    try:
        blob = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}): give a model in Hugging Face's format") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: no JSON ({str(error)[:80]})") from None
    if not isinstance(blob, dict):
        raise BadInput(f"{path}: no JSON object")
    return blob
