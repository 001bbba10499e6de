"""Models in Hugging Face's format to ours: Llama's, Mistral's and GPT-2's architecture, and what `hf_out.py` wrote."""
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from convert.hf_mapping import GPT2, GPT2_ACTIVATIONS, LLAMA, hf_buffers, hf_parameters, read_json
from convert.hf_tokenizer import add_chat_tokens, load_hf_tokenizer
from model import GPT, GPTConfig, upgrade_config, upgrade_weights
from runtime.checkpoint import explain_damage
from runtime.config import BadInput
from tokenizer import Tokenizer


def import_model(folder: Path, chat_tokens: bool) -> tuple[GPT, Tokenizer]:
    """The model in `folder`, in fp32, and its tokenizer. Raises BadInput naming the file that cannot be used.

    chat_tokens: adds the special tokens of conversations that the vocabulary lacks. Their rows of the embedding and the
    head are the mean of the others.
    """
    path = folder / "config.json"
    hf_config = read_json(path)
    model_type = hf_config.get("model_type")
    if model_type not in CONFIG_READERS:
        raise BadInput(f"{path}: model_type is {model_type!r}: only {', '.join(CONFIG_READERS)} can be imported")
    architecture, from_config = CONFIG_READERS[model_type]
    tokenizer = load_hf_tokenizer(folder, hf_config)
    with explain_damage(path):
        config = GPTConfig(**from_config(hf_config) | {"vocab_size": hf_config["vocab_size"]})
    weights = from_hf_state_dict(load_weights(folder), config, architecture, folder / "model.safetensors")
    n_rows = tokenizer.vocab_size  # the files' matrices may have more, which no token uses
    if chat_tokens:
        tokenizer = add_chat_tokens(tokenizer)
    for name in ("embed.weight", "head.weight"):
        rows = weights[name][:n_rows]
        weights[name] = torch.cat([rows, rows.mean(dim=0, keepdim=True).expand(tokenizer.vocab_size - len(rows), -1)])
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    with explain_damage(folder):
        return GPT.from_checkpoint({"config": dataclasses.asdict(config), "model": weights}), tokenizer


# -- configs ----------------------------------------------------------------------------------------------------------

def from_llama_config(hf_config: dict) -> dict:
    """Fields of GPTConfig. Raises BadInput for variants of Llama that our model does not have."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    require_supported(hf_config, {"hidden_act": ["silu"], "sliding_window": [None], "pretraining_tp": [1, None]})
    require_supported({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, {"rope_type": ["default"]})
    n_head, width = hf_config["num_attention_heads"], hf_config["hidden_size"]
    head_size = hf_config.get("head_dim") or width // n_head
    if n_head * head_size != width:
        raise BadInput(f"{n_head} heads of {head_size} channels do not make up its width of {width}, as they must here")
    if hf_config.get("attention_bias", False) != hf_config.get("mlp_bias", False):
        raise BadInput("has biases in some linear layers: only all or none are supported")
    n_kv_head = hf_config.get("num_key_value_heads") or n_head
    return LLAMA | {"n_layer": hf_config["num_hidden_layers"], "n_head": n_head, "head_size": head_size,
                    "n_kv_head": None if n_kv_head == n_head else n_kv_head, "n_hidden": hf_config["intermediate_size"],
                    "block_size": hf_config["max_position_embeddings"], "norm_eps": hf_config["rms_norm_eps"],
                    "rotary_base": float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10_000),
                    "tied": hf_config.get("tie_word_embeddings", False), "bias": hf_config.get("attention_bias", False)}


def from_gpt2_config(hf_config: dict) -> dict:
    """Fields of GPTConfig. Raises BadInput for variants of GPT-2 that our model does not have."""
    require_supported(hf_config, {"activation_function": list(GPT2_ACTIVATIONS), "scale_attn_weights": [True],
                                  "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False]})
    n_head, width = hf_config["n_head"], hf_config["n_embd"]
    return GPT2 | {"n_layer": hf_config["n_layer"], "n_head": n_head, "head_size": width // n_head,
                   "block_size": hf_config["n_positions"], "n_hidden": hf_config.get("n_inner") or 4 * width,
                   "mlp": GPT2_ACTIVATIONS[hf_config.get("activation_function", "gelu_new")], "init": "gpt2",
                   "norm_eps": hf_config.get("layer_norm_epsilon", 1e-5),
                   "tied": hf_config.get("tie_word_embeddings", True)}


def from_workbench_config(hf_config: dict) -> dict:
    """Fields of GPTConfig."""
    return upgrade_config(hf_config["gpt"])


# model_type of config.json -> architecture as in hf_mapping.py, reader of the config
CONFIG_READERS = {"llama": ("llama", from_llama_config), "mistral": ("llama", from_llama_config),
           "gpt2": ("gpt2", from_gpt2_config), "gpt_workbench": (None, from_workbench_config)}


def require_supported(hf_config: dict, supported: dict[str, list]):
    """Raises BadInput for a setting with a value that is not among those supported. An absent one has the default, which
    is."""
    for name, values in supported.items():
        if name in hf_config and hf_config[name] not in values:
            raise BadInput(f"{name} = {hf_config[name]!r} is not supported, only {' or '.join(map(str, values))}")


# -- weights ----------------------------------------------------------------------------------------------------------

def load_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that its index names, in fp32. Raises BadInput naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    weights = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise BadInput(f"{path}: missing: give a model whose weights are in safetensors")
        try:
            weights |= {key: tensor.float() for key, tensor in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path}: damaged, or not safetensors ({str(error)[:80]})") from None
    return weights


def from_hf_state_dict(theirs: dict[str, Tensor], config: GPTConfig, architecture: str | None,
                       file: Path) -> dict[str, Tensor]:
    """Our state_dict from theirs. Raises BadInput naming `file` when it does not hold the model that `config` describes."""
    if architecture is None:
        theirs = upgrade_weights(theirs)
    if architecture == "gpt2" and "wte.weight" in theirs:  # OpenAI's files are of the model without its head
        theirs = {f"transformer.{name}": weight for name, weight in theirs.items()}
    parameters = hf_parameters(architecture, config)
    needed = {name for parameter in parameters.values() for name in parameter.names}
    if missing := [name for name in needed if name not in theirs]:
        raise BadInput(f"{file}: has no {min(missing)}, which config.json calls for")
    ours = {name: parameter.from_hf(theirs) for name, parameter in parameters.items()}
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    for name, weight in ours.items():
        if weight.shape != expected[name].shape:
            raise BadInput(f"{file}: {' + '.join(parameters[name].names)} is {tuple(weight.shape)}, config.json calls for "
                           f"{tuple(expected[name].shape)}: the two files do not belong together")
    if config.tied:
        ours["head.weight"] = ours["embed.weight"]
    ignored = hf_buffers(architecture, config.n_layer) | ({"lm_head.weight"} if config.tied else set())
    if foreign := theirs.keys() - needed - ignored:
        raise BadInput(f"{file}: holds {min(foreign)}, which config.json does not call for: another architecture")
    return ours
