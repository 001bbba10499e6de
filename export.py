"""Models out to Hugging Face's format and in from it.

    python export.py --checkpoint_path=checkpoints/gpt.pt --out_path=exported_gpt       a folder for AutoModelForCausalLM
    python export.py --import_path=openai-community/gpt2 --checkpoint_path=checkpoints/gpt2.pt

A model whose parts are those of Llama or GPT-2 (train.py's presets of these names) becomes one of theirs, which any engine
runs. Every other takes our own layers along, as code that `trust_remote_code` loads.
"""
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import regex
import torch
from torch import Tensor

from layers import LINEARS
from model import GPT, GPTConfig
from runtime.byte_level import as_bytes, as_characters, merges_of
from runtime.checkpoint import load_checkpoint, reading, save_checkpoint
from runtime.device import DTYPES
from runtime.files import require_writable
from runtime.flags import BadInput, check_flags, command, flag, parse_flags
from runtime.hub import hub_failure, is_network_error, short
from tokenizer import CHAT_TEMPLATE, END, PATTERNS, ROLE_TOKENS, SEPARATOR, Tokenizer

REPO = Path(__file__).parent
CHAT_TOKENS = *ROLE_TOKENS.values(), END


@dataclass(frozen=True)
class ExportConfig:
    """What becomes what."""
    checkpoint_path: Path = flag(Path("checkpoints/gpt.pt"), "the model; with --import_path, the file to write")
    out_path: Path = flag(None, "folder to write it into, in Hugging Face's format")
    weights: str = flag("fp32", "dtype of the weights in it", choices=tuple(DTYPES))
    gguf: bool = flag(False, "put model.gguf for llama.cpp beside them; of models of Llama's shape whose vocabulary has the "
                             "pattern\ngpt4 or gpt2, the two that llama.cpp has too")
    import_path: str = flag(None, "the other way: a folder, or a model of the hub by its id, of GPT-2's or Llama's shape, "
                                  "or one that was\nexported here")
    chat_tokens: bool = flag(True, "with --import_path: add tokens for conversations, so that it can be finetuned on them")
    overwrite: bool = flag(False, "replace what is there")

    def __post_init__(self):
        check_flags(self)
        if (self.out_path is None) == (self.import_path is None):
            raise BadInput("give --out_path, a folder to write to, or --import_path, a model to read")


# -- shapes that others have ------------------------------------------------------------------------------------------

# What GPTConfig must say for a model to be one of theirs; the rest is size.
PLAIN = {"linear": "linear", "qk_norm": False, "value_residual": False, "embed_shortcut": False, "token_shift": False,
         "softcap": 0.0}
LLAMA = PLAIN | {"norm": "scaled_rms", "mlp": "swiglu", "positions": "rotary"}
GPT2 = PLAIN | {"norm": "layer", "positions": "learned", "bias": True}
GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def stock_kind(config: GPTConfig) -> str | None:
    """llama or gpt2, if the model is one."""
    has = lambda wanted: all(getattr(config, name) == value for name, value in wanted.items())
    if any(config.mixer_of(layer).letter != "A" for layer in range(config.n_layer)):
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


# -- out --------------------------------------------------------------------------------------------------------------

def export(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: str = "fp32"):
    """Writes what AutoModelForCausalLM and AutoTokenizer load."""
    from safetensors.torch import save_file
    config, kind = model.config, stock_kind(model.config)
    weights = {name: weight.to(DTYPES[dtype]).contiguous() for name, weight in theirs_of(model, kind).items()}
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


# What llama.cpp calls those of its splitters that are ours.
GGUF_SPLITTERS = {PATTERNS["gpt4"]: "llama-bpe", PATTERNS["gpt2"]: "gpt-2"}
GGUF_NAMES = {"embed": "token_embd", "norm": "output_norm", "head": "output", "mixer_norm": "attn_norm",
              "mlp_norm": "ffn_norm", "mixer.proj": "attn_output", "mlp.gate": "ffn_gate", "mlp.fc": "ffn_up",
              "mlp.proj": "ffn_down"}


def require_gguf(model: GPT, tokenizer: Tokenizer):
    """Raises BadInput for what llama.cpp would run otherwise than it is."""
    if stock_kind(model.config) != "llama":
        raise BadInput("--gguf: llama.cpp runs models of --preset=llama, which this is not")
    if tokenizer.pattern not in GGUF_SPLITTERS:
        raise BadInput("--gguf: llama.cpp does not split text as this vocabulary does: train one with --pattern=gpt4 or "
                       "gpt2")


def write_gguf(model: GPT, tokenizer: Tokenizer, path: Path, dtype: str):
    """One file with weights, shape and vocabulary. Norms and biases are fp32. Source: GGUF's specification and llama.cpp's
    converter, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
    import gguf
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(n_hidden(config))
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head or config.n_head)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_layer_norm_rms_eps(config.norm_eps or 1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type({"fp32": gguf.LlamaFileType.ALL_F32, "fp16": gguf.LlamaFileType.MOSTLY_F16,
                          "bf16": gguf.LlamaFileType.MOSTLY_BF16}[dtype])
    special = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(GGUF_SPLITTERS[tokenizer.pattern])
    writer.add_token_list([special.get(i) or as_characters(token) or f"<|unused {i}|>"
                           for i, token in enumerate(tokenizer.tokens)])
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL if token
                            else gguf.TokenType.UNUSED for i, token in enumerate(tokenizer.tokens)])
    writer.add_token_merges([" ".join(map(as_characters, pair)) for pair in merges_of(tokenizer.ranks)])
    writer.add_bos_token_id(tokenizer.separator_id)
    writer.add_eos_token_id(tokenizer.special_tokens.get(END, tokenizer.separator_id))
    writer.add_add_bos_token(True)
    if can_chat(tokenizer):
        writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in gguf_weights(model).items():
        as_it_is = weight.dim() < 2 or dtype == "fp32"
        if dtype == "bf16" and not as_it_is:  # which numpy does not have
            raw = weight.to(torch.bfloat16).view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, (weight if as_it_is else weight.to(DTYPES[dtype])).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_weights(model: GPT) -> dict[str, Tensor]:
    """By their names there. llama.cpp turns channels that are neighbours where ours are half a head apart."""
    config, found = model.config, {}
    n_kv_head = config.n_kv_head or config.n_head
    for name, weight in model.state_dict().items():
        *place, kind = name.split(".")
        block = f"blk.{place[1]}." if place[0] == "blocks" else ""
        part = ".".join(place[2:] if block else place)
        if name == "head.weight" and config.tied:
            continue
        if part != "mixer.qkv":
            found[f"{block}{GGUF_NAMES[part]}.{kind}"] = weight.contiguous()
            continue
        heads = config.n_head, n_kv_head, n_kv_head
        for which, n, rows in zip("qkv", heads, weight.split([n * config.head_size for n in heads])):
            if which != "v":
                rows = rows.unflatten(0, (n, 2, config.head_size // 2)).transpose(1, 2).flatten(0, 2)
            found[f"{block}attn_{which}.{kind}"] = rows.contiguous()
    return found


def write_json(path: Path, blob: dict):
    path.write_text(json.dumps(blob, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def theirs_of(model: GPT, kind: str | None) -> dict[str, Tensor]:
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


def n_hidden(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(dataclasses.replace(config, n_layer=1)).blocks[0].mlp.n_hidden


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
    paths = [*REPO.glob("exported/*.py"), REPO / "model.py", *REPO.glob("layers/*.py"), REPO / "runtime" / "flags.py"]
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


def tokenizer_blob(tokenizer: Tokenizer) -> dict:
    """tokenizer.json as the library `tokenizers` has it."""
    vocab = {as_characters(token): token_id for token, token_id in tokenizer.ranks.items()} | tokenizer.special_tokens
    special = [{"id": token_id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True}
               for name, token_id in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])]
    split = {"type": "Split", "pattern": {"Regex": plain_pattern(tokenizer.pattern)}, "behavior": "Isolated",
             "invert": False}
    as_they_are = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    first, text = {"SpecialToken": {"id": SEPARATOR, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", **as_they_are}]},
            "post_processor": {"type": "TemplateProcessing", "single": [first, text],
                               "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
                               "special_tokens": {SEPARATOR: {"id": SEPARATOR, "ids": [tokenizer.separator_id],
                                                              "tokens": [SEPARATOR]}}},
            "decoder": {"type": "ByteLevel", **as_they_are},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
                      "merges": [[as_characters(part) for part in pair] for pair in merges_of(tokenizer.ranks)]}}


def plain_pattern(pattern: str) -> str:
    """Without possessive quantifiers, where ours are: they only save time, and Oniguruma reads {1,2}+ as something else."""
    return re.sub(r"([?*+}])\+", r"\1", pattern) if pattern in PATTERNS.values() else pattern


@contextmanager
def whole_folder(folder: Path, overwrite: bool):
    """A folder that takes its name only when the block ends well. Raises BadInput when there is one that may not be
    replaced."""
    if folder.exists() and not overwrite:
        raise BadInput(f"--out_path={folder}: exists: choose another folder, or add --overwrite")
    if folder.exists() and not (folder / "config.json").exists():
        raise BadInput(f"--out_path={folder}: holds no exported model, so it is not replaced: choose another folder")
    require_writable(folder / "config.json", f"--out_path={folder}")
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
    weights = ours_of(read_weights(folder), config, {"mistral": "llama"}.get(kind, kind), folder)
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
        return GPT.from_blob({"config": dataclasses.asdict(config), "model": weights}), tokenizer


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


def ours_of(theirs: dict[str, Tensor], config: GPTConfig, kind: str, folder: Path) -> dict[str, Tensor]:
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


# -- vocabularies in --------------------------------------------------------------------------------------------------

# How others write the patterns that have a compiled scanner here.
KNOWN_PATTERNS = {plain_pattern(pattern): name for name, pattern in PATTERNS.items()} | {
    # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "gpt4"}
# GPT-2's between digits that each stand alone, as SmolLM has it
DIGITS_ALONE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s+(?=\p{N})|\s+(?!\S)|\s+"


def read_tokenizer(folder: Path, config: dict) -> Tokenizer:
    """From tokenizer.json, or vocab.json and merges.txt. Raises BadInput for what is no byte-level BPE."""
    path = folder / "tokenizer.json"
    if not path.exists() and (folder / "vocab.json").exists():
        vocab, merges = read_json(folder / "vocab.json"), read_merges(folder / "merges.txt")
        added = {token: token_id for token, token_id in vocab.items() if token == SEPARATOR}
        return made_tokenizer(folder / "vocab.json", vocab, merges, "gpt2", added, config)
    blob = read_json(path)
    with reading(path):
        model = blob["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback") or blob.get("normalizer"):
            raise BadInput("no byte-level BPE, the only kind of vocabulary that can be read")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        added = {token["content"]: token["id"] for token in blob.get("added_tokens", [])}
        return made_tokenizer(path, model["vocab"], merges, pattern_of(blob["pre_tokenizer"]), added, config)


def read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def pattern_of(blob: dict | None) -> str:
    """The pattern that splits as a `pre_tokenizer` does. Raises BadInput."""
    parts = blob["pretokenizers"] if blob and blob["type"] == "Sequence" else [blob]
    kinds = [part and part["type"] for part in parts]
    last = parts[-1]
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        raise BadInput(f"splits text by {', '.join(map(str, kinds))}, which cannot be read")
    by_bytes = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and by_bytes:
        return "gpt2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and by_bytes:
        return DIGITS_ALONE
    if kinds == ["Split", "ByteLevel"] and not by_bytes and "Regex" in parts[0]["pattern"] and \
            parts[0]["behavior"] in ("Isolated", "Removed") and parts[0].get("invert", False) == (
                parts[0]["behavior"] == "Removed"):
        pattern = parts[0]["pattern"]["Regex"]
        return KNOWN_PATTERNS.get(pattern, pattern)
    raise BadInput(f"splits text by {', '.join(map(str, kinds))}, which cannot be read")


def made_tokenizer(path: Path, vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str,
                   added: dict[str, int], config: dict) -> Tokenizer:
    """added: tokens that are not of the vocabulary's making, by name. Raises BadInput when ids would come out otherwise."""
    ranks = {}
    for text, token_id in vocab.items():
        if text not in added:
            if (token := as_bytes(text)) is None:
                raise BadInput(f"{path}: no byte-level vocabulary: it holds {text[:20]!r}")
            ranks[token] = token_id
    if [tuple(map(as_characters, pair)) for pair in merges_of(ranks)] != merges:
        raise BadInput(f"{path}: its merges are not in the order of its ids, so that text would come out as other ids")
    first, ends = config.get("bos_token_id"), config.get("eos_token_id")
    first = first if first is not None else ends[0] if isinstance(ends, list) else ends
    special = {SEPARATOR if token_id == first and SEPARATOR not in added else name: token_id
               for name, token_id in added.items()}
    if SEPARATOR not in special:
        raise BadInput(f"{path}: neither {SEPARATOR} nor the bos_token_id of config.json is among its special tokens")
    return Tokenizer.from_ranks(ranks, pattern, special)


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


# -- the command ------------------------------------------------------------------------------------------------------

@command
def main(argv=None):
    """Writes a model in Hugging Face's format, or reads one into a checkpoint."""
    config, = parse_flags(main.__doc__, argv, ExportConfig)
    path = config.checkpoint_path
    if config.import_path is not None:
        if path.exists() and not config.overwrite:
            raise BadInput(f"--checkpoint_path={path}: exists: choose another path, or add --overwrite")
        require_writable(path, f"--checkpoint_path={path}")
        model, tokenizer = import_model(fetched(config.import_path), config.chat_tokens)
        save_checkpoint(path, model.to_blob() | {"tokenizer": tokenizer.to_json()})
        shape = model.config
        print(f"{path}: {shape.n_layer} layers x {shape.n_embd}, {model.n_parameters() / 1e6:.1f} M parameters, context "
              f"{shape.block_size:,}, vocabulary {shape.vocab_size:,}; `python generate.py --checkpoint_path={path}` "
              f"samples from it, `python finetune.py --checkpoint_path={path}` finetunes it")
        return
    blob = load_checkpoint(path)
    with reading(path):
        model, tokenizer = GPT.from_blob(blob), Tokenizer.from_json(blob["tokenizer"])
        _ = tokenizer.separator_id
    del blob
    if config.gguf:
        require_gguf(model, tokenizer)
    with whole_folder(config.out_path, config.overwrite) as folder:
        export(model, tokenizer, folder, config.weights)
        if config.gguf:
            write_gguf(model, tokenizer, folder / "model.gguf", config.weights)
    kind = {"llama": "a Llama", "gpt2": "a GPT-2", None: "our own code, to be loaded with trust_remote_code"}[
        stock_kind(model.config)]
    size = sum(file.stat().st_size for file in config.out_path.iterdir())
    print(f"{config.out_path}: {kind}, {model.n_parameters() / 1e6:.1f} M parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
