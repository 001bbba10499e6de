"""Models from the format of Hugging Face."""
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import regex
import torch
from torch import Tensor

from convert.hf_mapping import GPT2, GPT2_ACTIVATIONS, LLAMA, NAMES, is_transposed, read_json
from convert.hf_out import CHAT_TOKENS
from convert.hf_tokenizer import read_tokenizer
from model import GPT, GPTConfig
from runtime.checkpoint import reading
from runtime.config import BadInput
from text.hub import hub_failure, is_network_error, short
from tokenizer import Tokenizer

# -- in ---------------------------------------------------------------------------------------------------------------

def import_model(folder: Path, chat_tokens: bool) -> tuple[GPT, Tokenizer]:
    """Raises BadInput naming the file that cannot be used."""
    blob = read_json(folder / "config.json")
    kind = blob.get("model_type")
    shapes: dict[str, Callable] = {"llama": from_llama, "mistral": from_llama, "gpt2": from_gpt2,
                                   "gpt_workbench": lambda blob: blob["gpt"]}
    if kind not in shapes:
        raise BadInput(f"{folder / 'config.json'}: a model of type {kind!r}: only {', '.join(shapes)} can be read")
    tokenizer = read_tokenizer(folder, blob)
    with reading(folder / "config.json"):
        config = GPTConfig(**shapes[kind](blob) | {"vocab_size": blob["vocab_size"]})
    weights = from_hf_state_dict(read_weights(folder), config, {"mistral": "llama"}.get(kind, kind), folder)
    missing = [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens] if chat_tokens else []
    if missing:
        first = tokenizer.vocab_size
        tokenizer = Tokenizer(tokenizer.ranks, tokenizer.pattern,
                              tokenizer.special_tokens | {name: first + i for i, name in enumerate(missing)})
    for name in ("embed.weight", "head.weight"):
        # rows that no token has are of no use; a new token begins as the mean of the others
        rows = weights[name][:tokenizer.vocab_size - len(missing)]
        weights[name] = torch.cat([rows, rows.mean(dim=0, keepdim=True).expand(tokenizer.vocab_size - len(rows), -1)])
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    with reading(folder):
        return GPT.from_checkpoint({"config": dataclasses.asdict(config), "model": weights}), tokenizer


def require(blob: dict, wanted: dict):
    """Raises BadInput for what the model has and ours cannot have. wanted: name -> the values that will do."""
    for name, values in wanted.items():
        if name in blob and blob[name] not in values:
            raise BadInput(f"has {name} = {blob[name]!r}: only {' or '.join(map(str, values))} can be read")


def from_llama(blob: dict) -> dict:
    """GPTConfig's fields."""
    rope = blob.get("rope_parameters") or blob.get("rope_scaling") or {}
    require(blob, {"hidden_act": ["silu"], "sliding_window": [None], "pretraining_tp": [1, None]})
    require({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, {"rope_type": ["default"]})
    n_head = blob["num_attention_heads"]
    head_size = blob.get("head_dim") or blob["hidden_size"] // n_head
    if n_head * head_size != blob["hidden_size"]:
        raise BadInput(f"has {n_head} heads of {head_size}, which are not its width of {blob['hidden_size']}")
    if blob.get("attention_bias", False) != blob.get("mlp_bias", False):
        raise BadInput("has biases in some of its linear layers: only all or none can be read")
    n_kv_head = blob.get("num_key_value_heads") or n_head
    return LLAMA | {"n_layer": blob["num_hidden_layers"], "n_head": n_head, "head_size": head_size,
                    "n_kv_head": None if n_kv_head == n_head else n_kv_head, "n_hidden": blob["intermediate_size"],
                    "block_size": blob["max_position_embeddings"], "norm_eps": blob["rms_norm_eps"],
                    "rotary_base": float(rope.get("rope_theta") or blob.get("rope_theta") or 10_000),
                    "tied": blob.get("tie_word_embeddings", False), "bias": blob.get("attention_bias", False)}


def from_gpt2(blob: dict) -> dict:
    require(blob, {"activation_function": list(GPT2_ACTIVATIONS), "scale_attn_weights": [True],
                   "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False]})
    return GPT2 | {"n_layer": blob["n_layer"], "n_head": blob["n_head"], "head_size": blob["n_embd"] // blob["n_head"],
                   "block_size": blob["n_positions"], "n_hidden": blob.get("n_inner") or 4 * blob["n_embd"],
                   "mlp": GPT2_ACTIVATIONS[blob.get("activation_function", "gelu_new")], "init": "gpt2",
                   "norm_eps": blob.get("layer_norm_epsilon", 1e-5), "tied": blob.get("tie_word_embeddings", True)}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the parts that its index names, in fp32."""
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
            raise BadInput(f"{path}: damaged, or no safetensors ({str(error)[:80]})") from None
    return weights


def from_hf_state_dict(theirs: dict[str, Tensor], config: GPTConfig, kind: str, folder: Path) -> dict[str, Tensor]:
    """Our parameters from theirs. Raises BadInput when the file holds another architecture."""
    file = folder / "model.safetensors"
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in GPT(config).state_dict().items()}
    if kind == "gpt_workbench":
        names = {name: (f"gpt.{name}",) for name in shapes if not (config.tied and name == "head.weight")}
    else:
        names = NAMES[kind](config)
        if kind == "gpt2" and "wte.weight" in theirs:  # the original file's names
            theirs = {f"transformer.{name}": weight for name, weight in theirs.items()}
    ours = {}
    for name, others in names.items():
        if lacking := [other for other in others if other not in theirs]:
            raise BadInput(f"{file}: has no {lacking[0]}, so it is not of the shape that config.json says")
        weight = torch.cat([theirs[other] for other in others]) if len(others) > 1 else theirs[others[0]]
        ours[name] = weight.T.contiguous() if is_transposed(kind, name, weight) else weight
    if config.tied:
        ours["head.weight"] = ours["embed.weight"]
    for name, weight in ours.items():
        if tuple(weight.shape) != shapes[name]:
            raise BadInput(f"{file}: {names.get(name, names['embed.weight'])[0]} is {tuple(weight.shape)}, config.json "
                           f"makes it {shapes[name]}: they do not belong together")
    known = {other for others in names.values() for other in others} | ({"lm_head.weight"} if config.tied else set())
    buffers = r".*\.attn\.(bias|masked_bias)|.*rotary_emb\.inv_freq"  # which follow from the shape
    if foreign := [name for name in theirs if name not in known and not re.fullmatch(buffers, name)]:
        raise BadInput(f"{file}: holds {min(foreign)}, which a model of type {kind} has not: another architecture")
    return ours


def fetched(source: str) -> Path:
    """The folder, or where the model of the hub is kept after it is downloaded. Raises BadInput."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not regex.fullmatch(r"[\w-][\w.-]*/[\w.-]+|[\w-]+", source):
        raise BadInput(f"--import_path={source}: no such folder")
    import huggingface_hub
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=[
            "*.json", "merges.txt", "*.safetensors"]))
    except Exception as error:
        if is_network_error(error):
            raise BadInput(f"--import_path={source}: no such folder, and the hub cannot be reached "
                           f"({short(error)})") from None
        raise hub_failure(error, f"--import_path={source}") from None
