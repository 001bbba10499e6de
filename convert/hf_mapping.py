"""Our configs and parameters beside those of Llama and GPT-2 in transformers.

`hf_out.py` applies these tables in one direction, `hf_in.py` in the other.
"""
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from layers import MIXERS
from model import GPTConfig, meta_model
from runtime.config import BadInput
from runtime.files import require_regular_file

# -- architectures ----------------------------------------------------------------------------------------------------

# The settings of GPTConfig that make a model a Llama or a GPT-2; its other fields are sizes.
PLAIN = {"linear": "linear", "qk_norm": False, "value_residual": False, "x0_residual": False, "token_shift": False,
         "softcap": 0.0, "loops": 1, "qk_scale": 1.0, "value_embeddings": False, "smear": False, "backout": False,
         "ngram_rows": None, "dense_blocks": None}
LLAMA = PLAIN | {"norm": "scaled_rms", "mlp": "swiglu", "positions": "rotary"}
GPT2 = PLAIN | {"norm": "layer", "positions": "learned", "bias": True}
GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs: ours


def hf_architecture(config: GPTConfig) -> str | None:
    """"llama" or "gpt2" if that class of transformers computes the same as this model; None if the model needs our code."""
    if any(config.mixer_class(layer) is not MIXERS["attention"] for layer in range(config.n_layer)):
        return None
    if has_settings(config, LLAMA):
        return "llama"
    if has_settings(config, GPT2) and config.mlp in GPT2_ACTIVATIONS.values() and config.n_kv_head in (None, config.n_head):
        return "gpt2"
    return None


def has_settings(config: GPTConfig, settings: dict) -> bool:
    return all(getattr(config, name) == value for name, value in settings.items())


def intermediate_size(config: GPTConfig) -> int:
    """Width of the MLP's hidden layer, which a config may leave to the MLP."""
    return meta_model(dataclasses.replace(config, n_layer=1)).blocks[0].mlp.n_hidden


# -- parameters -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class HFParameter:
    """Where one of our parameters is in a Hugging Face model.

    names: their parameters; ours stacks several of them along dim 0, with rows[i] rows of each.
    transposed: theirs is (in, out), as GPT-2's Conv1D has it.
    """
    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def to_hf(self, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.T if self.transposed else weight
        return dict(zip(self.names, weight.split(self.rows) if self.rows else [weight]))

    def from_hf(self, theirs: Mapping[str, Tensor]) -> Tensor:
        weight = torch.cat([theirs[name] for name in self.names]) if self.rows else theirs[self.names[0]]
        return weight.T.contiguous() if self.transposed else weight


def hf_parameters(architecture: str | None, config: GPTConfig) -> dict[str, HFParameter]:
    """Our parameter name -> where it is in theirs. Leaves out the head of a tied model, which their files leave out too."""
    parameters = {"llama": llama_parameters, "gpt2": gpt2_parameters, None: workbench_parameters}[architecture](config)
    if config.tied:
        del parameters["head.weight"]
    return parameters


def llama_parameters(config: GPTConfig) -> dict[str, HFParameter]:
    n_kv_head = config.n_kv_head or config.n_head
    qkv_rows = tuple(n * config.head_size for n in (config.n_head, n_kv_head, n_kv_head))
    parameters = {"embed.weight": HFParameter(("model.embed_tokens.weight",)),
                  "norm.weight": HFParameter(("model.norm.weight",)), "head.weight": HFParameter(("lm_head.weight",))}
    for i in range(config.n_layer):
        theirs = f"model.layers.{i}"
        for norm, their_norm in (("mixer_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            parameters[f"blocks.{i}.{norm}.weight"] = HFParameter((f"{theirs}.{their_norm}.weight",))
        for kind in ("weight", "bias") if config.bias else ("weight",):
            parameters[f"blocks.{i}.mixer.qkv.{kind}"] = HFParameter(
                tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv"), rows=qkv_rows)
            for linear, their_linear in (("mixer.proj", "self_attn.o_proj"), ("mlp.gate", "mlp.gate_proj"),
                                         ("mlp.fc", "mlp.up_proj"), ("mlp.proj", "mlp.down_proj")):
                parameters[f"blocks.{i}.{linear}.{kind}"] = HFParameter((f"{theirs}.{their_linear}.{kind}",))
    return parameters


def gpt2_parameters(config: GPTConfig) -> dict[str, HFParameter]:
    parameters = {"embed.weight": HFParameter(("transformer.wte.weight",)),
                  "positions.weight": HFParameter(("transformer.wpe.weight",)),
                  "head.weight": HFParameter(("lm_head.weight",))}
    for kind in ("weight", "bias"):
        parameters[f"norm.{kind}"] = HFParameter((f"transformer.ln_f.{kind}",))
        for i in range(config.n_layer):
            theirs = f"transformer.h.{i}"
            for norm, their_norm in (("mixer_norm", "ln_1"), ("mlp_norm", "ln_2")):
                parameters[f"blocks.{i}.{norm}.{kind}"] = HFParameter((f"{theirs}.{their_norm}.{kind}",))
            for linear, their_linear in (("mixer.qkv", "attn.c_attn"), ("mixer.proj", "attn.c_proj"),
                                         ("mlp.fc", "mlp.c_fc"), ("mlp.proj", "mlp.c_proj")):
                parameters[f"blocks.{i}.{linear}.{kind}"] = HFParameter((f"{theirs}.{their_linear}.{kind}",),
                                                                        transposed=kind == "weight")
    return parameters


def workbench_parameters(config: GPTConfig) -> dict[str, HFParameter]:
    """Of `hf_model/modeling_gpt_workbench.py`, which holds our model as `gpt`."""
    return {name: HFParameter((f"gpt.{name}",)) for name in meta_model(config).state_dict()}


def hf_buffers(architecture: str | None, n_layer: int) -> set[str]:
    """Names of masks and rotary frequencies that older files hold. They follow from the config."""
    if architecture == "llama":
        return {"model.rotary_emb.inv_freq", *(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(n_layer))}
    if architecture == "gpt2":
        return {f"transformer.h.{i}.attn.{name}" for i in range(n_layer) for name in ("bias", "masked_bias")}
    return set()


# -- files ------------------------------------------------------------------------------------------------------------

def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises BadInput naming it."""
    require_regular_file(path, str(path))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}): give a model in Hugging Face's format") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object")
    return value
