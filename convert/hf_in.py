"""Models in Hugging Face's format to ours: Llama's, Mistral's and GPT-2's architecture, and what `hf_out.py` wrote."""
import dataclasses
from collections.abc import Callable, Collection
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from convert.hf_mapping import GPT2, GPT2_ACTIVATIONS, LLAMA, hf_buffers, hf_parameters, read_json
from convert.hf_tokenizer import add_chat_tokens, load_hf_tokenizer
from model import GPT, GPTConfig, meta_model, upgrade_config, upgrade_name
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
    with explain_damage(path):
        architecture, config = read_config(hf_config)
    files = find_weights(folder, config, architecture)
    tokenizer = load_hf_tokenizer(folder, hf_config)
    n_rows = tokenizer.vocab_size  # the files' matrices may have more, which no token uses
    if n_rows > config.vocab_size:
        raise BadInput(f"{folder}: its tokenizer has {n_rows:,} ids, config.json a vocab_size of {config.vocab_size:,}: "
                       f"they do not belong together")
    with explain_damage(folder):
        weights = from_hf_state_dict(load_weights(files), config, architecture)
    if chat_tokens:
        tokenizer = add_chat_tokens(tokenizer)
    for name in ("embed.weight", "head.weight"):
        rows = weights[name][:n_rows]
        weights[name] = torch.cat([rows, rows.mean(dim=0, keepdim=True).expand(tokenizer.vocab_size - len(rows), -1)])
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    with explain_damage(folder):
        return GPT.from_checkpoint({"config": dataclasses.asdict(config), "model": weights}), tokenizer


# -- configs ----------------------------------------------------------------------------------------------------------

def read_config(hf_config: dict) -> tuple[str | None, GPTConfig]:
    """The architecture, as in hf_mapping.py, and our config. Raises BadInput for variants that our model does not have."""
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_READERS:
        raise BadInput(f"model_type is {str(model_type)[:40]!r}: only {', '.join(CONFIG_READERS)} can be imported")
    architecture, from_config = CONFIG_READERS[model_type]
    if hf_config.get("vocab_size") is None:
        raise BadInput("has no vocab_size")
    return architecture, GPTConfig(**from_config(hf_config) | {"vocab_size": hf_config["vocab_size"]})


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


def from_mistral_config(hf_config: dict) -> dict:
    """Fields of GPTConfig, as `from_llama_config`; other values are the default where a setting is absent, and a window that
    holds the whole context is none."""
    hf_config = {"sliding_window": 4096, "num_key_value_heads": 8} | hf_config
    if (hf_config["sliding_window"] or 0) >= hf_config["max_position_embeddings"]:
        hf_config["sliding_window"] = None
    return from_llama_config(hf_config)


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
CONFIG_READERS = {"llama": ("llama", from_llama_config), "mistral": ("llama", from_mistral_config),
           "gpt2": ("gpt2", from_gpt2_config), "gpt_workbench": (None, from_workbench_config)}


def require_supported(hf_config: dict, supported: dict[str, list]):
    """Raises BadInput for a setting with a value that is not among those supported. An absent one has the default, which
    is."""
    for name, values in supported.items():
        if name in hf_config and hf_config[name] not in values:
            raise BadInput(f"{name} = {hf_config[name]!r} is not supported, only {' or '.join(map(str, values))}")


# -- weights ----------------------------------------------------------------------------------------------------------

# safetensors' names of the dtypes that weights may have
WEIGHT_DTYPES = "F64", "F32", "F16", "BF16"
HEAD = "lm_head.weight"  # of Llama and GPT-2; in the files of some tied models too


def find_weights(folder: Path, config: GPTConfig, architecture: str | None) -> dict[Path, list[str]]:
    """The files with the weights of the model, and the names of those that it needs in each. Reads only headers. Raises
    BadInput naming the file that cannot be used, or when the weights are not those that `config` calls for."""
    found, files = {}, {path: [] for path in weight_files(folder)}
    for path, names in files.items():
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
                names.append(name)
    path, rename = folder / "model.safetensors", renaming(found, architecture)
    if config.n_layer > len(found):  # or it would take long to find out
        raise BadInput(f"{path}: {len(found)} weights are too few for the {config.n_layer:,} layers of config.json")
    needed = {HEAD, *check_weights({rename(name): kind for name, kind in found.items()}, config, architecture, path)}
    return {path: [name for name in names if rename(name) in needed] for path, names in files.items()}


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that its index names. Raises BadInput naming a file that is missing."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise BadInput(f"{index}: has no weight_map of parameters to files: give a complete model")
        names = sorted(set(places.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise BadInput(f"{index}: names {name[:80]!r}, which is no safetensors file beside it")
    for name in names:
        if not (folder / name).is_file():
            raise BadInput(f"{folder / name}: missing: give a model whose weights are in safetensors")
    return [folder / name for name in names]


def load_weights(files: dict[Path, list[str]]) -> dict[str, Tensor]:
    """The tensors of these names in each file, in fp32. Raises BadInput naming a file that is damaged."""
    weights = {}
    for path, names in files.items():
        with open_safetensors(path) as file:
            weights |= {name: file.get_tensor(name).float() for name in names}
    return weights


@contextmanager
def open_safetensors(path: Path):
    """Yields a `safetensors.safe_open`. Raises BadInput naming the file when it is damaged."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: damaged, or not safetensors ({' '.join(str(error).split())[:80]})") from None


def renaming(names: Collection[str], architecture: str | None) -> Callable[[str], str]:
    """How the names of a file become those of the present format, and of transformers' class."""
    if architecture is None:
        return upgrade_name
    if architecture == "gpt2" and "wte.weight" in names:  # OpenAI's files are of the model without its head
        return lambda name: f"transformer.{name}"
    return lambda name: name


def check_weights(found: dict[str, tuple[tuple[int, ...], str]], config: GPTConfig, architecture: str | None,
                  file: Path) -> set[str]:
    """The names of the weights that the model calls for. found: name -> shape and dtype. Raises BadInput naming `file` when
    these are not the weights of the model that `config` describes."""
    ours = meta_model(config).state_dict()
    expected = {}
    for name, parameter in hf_parameters(architecture, config).items():
        expected |= {theirs: tuple(weight.shape) for theirs, weight in parameter.to_hf(ours[name]).items()}
    if missing := expected.keys() - found.keys():
        raise BadInput(f"{file}: has no {min(missing)}, which config.json calls for")
    ignored = hf_buffers(architecture, config.n_layer) | ({HEAD} if config.tied else set())
    if foreign := found.keys() - expected.keys() - ignored:
        raise BadInput(f"{file}: holds {min(foreign)}, which config.json does not call for: another architecture")
    for name, shape in expected.items():
        if found[name][0] != shape:
            raise BadInput(f"{file}: {name} is {found[name][0]}, config.json calls for {shape}: the two files do not belong "
                           f"together")
        if found[name][1] not in WEIGHT_DTYPES:
            raise BadInput(f"{file}: {name} is of {found[name][1]}: weights must be of {', '.join(WEIGHT_DTYPES)}")
    return expected.keys()


def from_hf_state_dict(theirs: dict[str, Tensor], config: GPTConfig, architecture: str | None) -> dict[str, Tensor]:
    """Our state_dict from theirs, whose shapes have been checked. Raises BadInput for a tied model with two matrices."""
    rename = renaming(theirs, architecture)
    theirs = {rename(name): weight for name, weight in theirs.items()}
    if config.tied and HEAD in theirs:
        embed, = hf_parameters(architecture, config)["embed.weight"].names
        if not torch.equal(theirs[HEAD], theirs[embed]):
            raise BadInput(f"{HEAD} differs from {embed}, though config.json ties them (tie_word_embeddings)")
    ours = {name: parameter.from_hf(theirs) for name, parameter in hf_parameters(architecture, config).items()}
    if config.tied:
        ours["head.weight"] = ours["embed.weight"]
    return ours
