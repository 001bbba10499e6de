"""Our models to Hugging Face's format: weights, configs, tokenizer, and our code for models that transformers lacks."""
import dataclasses
import hashlib
import json
import re
from pathlib import Path

from torch import Tensor

from convert.hf_mapping import GPT2_ACTIVATIONS, hf_architecture, hf_parameters, intermediate_size
from convert.hf_tokenizer import has_chat_tokens, to_hf_tokenizer
from layers import LINEARS
from model import GPT, GPTConfig
from runtime.device import DTYPES
from tokenizer import CHAT_TEMPLATE, SEPARATOR, Tokenizer

REPO = Path(__file__).parent.parent
# In place of layers/kan.py for a model without KAN layers, which then does not need numba
NO_KAN = '''"""This model has no KAN layers."""
BSplineKAN = ChebyshevKAN = RationalKAN = None
'''
# In place of kernels/decode.py
NO_KERNELS = '''"""Decoding by torch alone, which needs no numba."""
import torch.nn.functional as F
from torch.nn.functional import linear

__all__ = ["attend", "can_attend", "can_step", "copy_together", "delta_step", "linear", "rms_norm_rows"]
rms_norm_rows = lambda x, eps: F.rms_norm(x, x.shape[-1:], eps=eps)
attend, can_attend = None, lambda q, v, keys: False
delta_step, can_step = None, lambda qkv, state: False
copy_together = lambda tensors, dtype: [tensor.to(dtype) for tensor in tensors]
'''


def export_model(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: str = "fp32", card: str = ""):
    """Writes into `folder` what AutoModelForCausalLM and AutoTokenizer load. dtype: a key of DTYPES, of the weights; card:
    the text of README.md."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    architecture = hf_architecture(model.config)
    weights = to_hf_state_dict(model, architecture)
    try:
        save_file({name: weight.to(DTYPES[dtype]).contiguous() for name, weight in weights.items()},
                  folder / "model.safetensors", {"format": "pt"})
    except SafetensorError as error:  # a full disk; nothing of ours can be wrong with the tensors
        raise OSError(str(error)) from None
    write_configs(model.config, architecture, tokenizer, folder, dtype)
    # safetensors makes files that only their owner may read, whatever the umask
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_tokenizer(tokenizer, folder, model.config.block_size)
    if architecture is None:
        for name, source in bundle_code(model.config).items():
            (folder / name).write_text(source, encoding="utf-8")


def to_hf_state_dict(model: GPT, architecture: str | None) -> dict[str, Tensor]:
    """The weights under the names of transformers' class; None: of our own class."""
    weights, theirs = model.state_dict(), {}
    for name, parameter in hf_parameters(architecture, model.config).items():
        theirs |= parameter.to_hf(weights[name])
    return theirs


def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# -- configs ----------------------------------------------------------------------------------------------------------

def write_configs(config: GPTConfig, architecture: str | None, tokenizer: Tokenizer, folder: Path, dtype: str):
    """config.json and generation_config.json."""
    to_config = {"llama": to_llama_config, "gpt2": to_gpt2_config, None: to_workbench_config}[architecture]
    ids = {"bos_token_id": tokenizer.separator_id, "eos_token_id": tokenizer.separator_id, "pad_token_id": None}
    write_json(folder / "config.json", to_config(config) | ids | {
        "vocab_size": config.vocab_size, "tie_word_embeddings": config.tied,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")})
    write_json(folder / "generation_config.json", ids | {
        "eos_token_id": sorted(tokenizer.end_ids), "do_sample": True, "temperature": 0.8, "top_k": 50,
        "max_length": config.block_size})


def to_llama_config(config: GPTConfig) -> dict:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": config.n_embd,
            "intermediate_size": intermediate_size(config), "num_hidden_layers": config.n_layer, "hidden_act": "silu",
            "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head or config.n_head,
            "head_dim": config.head_size, "max_position_embeddings": config.block_size,
            "rms_norm_eps": config.norm_eps or 1e-5, "rope_theta": config.rotary_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},  # from transformers 5 on
            "attention_bias": config.bias, "mlp_bias": config.bias}


def to_gpt2_config(config: GPTConfig) -> dict:
    activation = next(theirs for theirs, ours in GPT2_ACTIVATIONS.items() if ours == config.mlp)
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": config.n_embd, "n_layer": config.n_layer,
            "n_head": config.n_head, "n_positions": config.block_size, "n_inner": intermediate_size(config),
            "activation_function": activation, "layer_norm_epsilon": config.norm_eps or 1e-5, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def to_workbench_config(config: GPTConfig) -> dict:
    return {"architectures": ["GPTWorkbenchForCausalLM"], "model_type": "gpt_workbench", "gpt": dataclasses.asdict(config),
            "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
            "max_position_embeddings": config.block_size,
            "auto_map": {"AutoConfig": "configuration_gpt_workbench.GPTWorkbenchConfig",
                         "AutoModelForCausalLM": "modeling_gpt_workbench.GPTWorkbenchForCausalLM"}}


# -- tokenizer --------------------------------------------------------------------------------------------------------

def write_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int):
    """tokenizer.json and tokenizer_config.json, and the chat template if the vocabulary has tokens for it."""
    (folder / "tokenizer.json").write_text(to_hf_tokenizer(tokenizer).to_str(pretty=True), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SEPARATOR, "eos_token": SEPARATOR,
              "pad_token": SEPARATOR, "model_max_length": block_size, "clean_up_tokenization_spaces": False,
              "model_input_names": ["input_ids", "attention_mask"]}
    if has_chat_tokens(tokenizer):
        config["chat_template"] = CHAT_TEMPLATE
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)


# -- code -------------------------------------------------------------------------------------------------------------

def bundle_code(config: GPTConfig) -> dict[str, str]:
    """File name -> source of our model, for `trust_remote_code`.

    transformers loads files of one folder and no packages, so layers/kan.py becomes layers_kan.py. Of runtime/ only
    config.py is included.
    """
    has_kan = bool({config.linear, config.mlp} & (LINEARS.keys() - {"linear"}))
    paths = {path.name: path for path in (REPO / "model.py", *REPO.glob("convert/hf_model/*.py"))}
    for path in (*REPO.glob("layers/*.py"), REPO / "runtime" / "config.py", REPO / "kernels" / "rational.py"):
        paths[f"{path.parent.name}_{path.name}".replace("__init__", "init")] = path
    files = {name: flatten_imports(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    files["kernels_decode.py"] = NO_KERNELS
    if not has_kan:
        files["layers_kan.py"] = NO_KAN
        del files["kernels_rational.py"]
    # Of a local folder, transformers before 5.9 copies only the files that the model's own file imports.
    files["modeling_gpt_workbench.py"] += "\n" + "".join(
        f"from .{name.removesuffix('.py')} import __doc__ as _  # noqa: E402, F401\n" for name in sorted(files)
        if name != "modeling_gpt_workbench.py")
    # Within a process transformers takes code with an equal configuration file for the same code.
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:16]
    files["configuration_gpt_workbench.py"] += f"\n# code {digest}\n"
    return files


def flatten_imports(source: str) -> str:
    """`from layers.kan import …` -> `from .layers_kan import …`, `from layers import …` -> `from .layers_init import …`."""
    source = re.sub(r"(?m)^( *)from (layers|runtime|kernels)\.(\w+) import", r"\1from .\2_\3 import", source)
    return re.sub(r"(?m)^( *)from layers import", r"\1from .layers_init import", source)
