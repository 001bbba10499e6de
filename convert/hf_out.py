"""Models in the format of Hugging Face."""
import dataclasses
import hashlib
import re
from pathlib import Path

from torch import Tensor

from convert.hf_mapping import GPT2_ACTIVATIONS, NAMES, hf_architecture, is_transposed, n_hidden, write_json
from convert.hf_tokenizer import tokenizer_blob
from layers import LINEARS
from model import GPT, GPTConfig
from runtime.device import DTYPES
from tokenizer import CHAT_TEMPLATE, END, ROLE_TOKENS, SEPARATOR, Tokenizer

REPO = Path(__file__).parent.parent
CHAT_TOKENS = *ROLE_TOKENS.values(), END


# -- out --------------------------------------------------------------------------------------------------------------

def export(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: str = "fp32"):
    """Writes what AutoModelForCausalLM and AutoTokenizer load."""
    from safetensors.torch import save_file
    config, kind = model.config, hf_architecture(model.config)
    weights = {name: weight.to(DTYPES[dtype]).contiguous() for name, weight in to_hf_state_dict(model, kind).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shape = {"llama": llama_config, "gpt2": gpt2_config, None: own_config}[kind](config)
    ends = [tokenizer.separator_id] + [tokenizer.special_tokens[END]] * (END in tokenizer.special_tokens)
    ids = {"bos_token_id": tokenizer.separator_id, "eos_token_id": tokenizer.separator_id, "pad_token_id": None}
    write_json(folder / "config.json", shape | ids | {
        "vocab_size": config.vocab_size, "tie_word_embeddings": config.tied,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")})
    write_json(folder / "generation_config.json", ids | {
        "eos_token_id": ends, "do_sample": True, "temperature": 0.8, "top_k": 50, "max_length": config.block_size})
    write_json(folder / "tokenizer.json", tokenizer_blob(tokenizer))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SEPARATOR, "eos_token": SEPARATOR, "pad_token": SEPARATOR,
        "model_max_length": config.block_size, "clean_up_tokenization_spaces": False,
        **({"chat_template": CHAT_TEMPLATE} if can_chat(tokenizer) else {})})
    if can_chat(tokenizer):
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    if kind is None:
        for name, source in own_code(config).items():
            (folder / name).write_text(source, encoding="utf-8")


def can_chat(tokenizer: Tokenizer) -> bool:
    return all(name in tokenizer.special_tokens for name in CHAT_TOKENS)


def to_hf_state_dict(model: GPT, kind: str | None) -> dict[str, Tensor]:
    """The weights by their names there."""
    weights = model.state_dict()
    if kind is None:
        return {f"gpt.{name}": weight for name, weight in weights.items()
                if not (model.config.tied and name == "head.weight")}
    n_kv_head, theirs = model.config.n_kv_head or model.config.n_head, {}
    for name, others in NAMES[kind](model.config).items():
        weight = weights[name].T if is_transposed(kind, name, weights[name]) else weights[name]
        rows = [n * model.config.head_size for n in (model.config.n_head, n_kv_head, n_kv_head)]
        theirs |= dict(zip(others, weight.split(rows) if len(others) == 3 else [weight]))
    return theirs


def llama_config(config: GPTConfig) -> dict:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": config.n_embd,
            "intermediate_size": n_hidden(config), "num_hidden_layers": config.n_layer, "hidden_act": "silu",
            "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head or config.n_head,
            "head_dim": config.head_size, "max_position_embeddings": config.block_size,
            "rms_norm_eps": config.norm_eps or 1e-5, "rope_theta": config.rotary_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
            "attention_bias": config.bias, "mlp_bias": config.bias}


def gpt2_config(config: GPTConfig) -> dict:
    activation = next(theirs for theirs, ours in GPT2_ACTIVATIONS.items() if ours == config.mlp)
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": config.n_embd, "n_layer": config.n_layer,
            "n_head": config.n_head, "n_positions": config.block_size, "n_inner": n_hidden(config),
            "activation_function": activation, "layer_norm_epsilon": config.norm_eps or 1e-5, "resid_pdrop": 0.0,
            "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def own_config(config: GPTConfig) -> dict:
    return {"architectures": ["GPTWorkbenchForCausalLM"], "model_type": "gpt_workbench", "gpt": dataclasses.asdict(config),
            "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
            "max_position_embeddings": config.block_size,
            "auto_map": {"AutoConfig": "configuration_gpt_workbench.GPTWorkbenchConfig",
                         "AutoModelForCausalLM": "modeling_gpt_workbench.GPTWorkbenchForCausalLM"}}


def own_code(config: GPTConfig) -> dict[str, str]:
    """Our source, file by file, in one folder: transformers loads no packages. numba, which only rational functions need, is
    asked for only by a model that has some."""
    has_kan = bool({config.linear, config.mlp} & (LINEARS.keys() - {"linear"}))
    paths = [*REPO.glob("convert/hf_model/*.py"), REPO / "model.py", *REPO.glob("layers/*.py"),
             REPO / "runtime" / "config.py"]
    if has_kan:
        paths.append(REPO / "kernels" / "rational.py")
    files = {}
    for path in paths:
        folder = path.parent.name if path.parent.name in ("layers", "runtime", "kernels") else ""
        name = f"{folder}_{path.name}" if folder else path.name
        source = path.read_text(encoding="utf-8")
        source = re.sub(r"(?m)^( *)from (layers|runtime|kernels)\.(\w+) import", r"\1from .\2_\3 import", source)
        files[name.replace("__init__", "init")] = re.sub(r"(?m)^from layers import", "from .layers_init import", source)
    if not has_kan:
        files["layers_kan.py"] = ('"""The linear layers that this model has."""\n'
                                  'from .layers_linear import Linear\n\nLINEARS = {"linear": Linear}\n')
    # A process that has loaded one model takes its code for another whose configuration file is the same.
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:16]
    files["configuration_gpt_workbench.py"] += f"\n# code {digest}\n"
    return files
