"""Models for llama.cpp."""
from pathlib import Path

import torch
from torch import Tensor

from convert.hf_mapping import hf_architecture, n_hidden
from convert.hf_out import can_chat
from convert.hf_tokenizer import as_characters, merges_of
from model import GPT
from runtime.config import BadInput
from runtime.device import DTYPES
from tokenizer import CHAT_TEMPLATE, END, PATTERNS, Tokenizer

# What llama.cpp calls those of its splitters that are ours.
GGUF_SPLITTERS = {PATTERNS["gpt4"]: "llama-bpe", PATTERNS["gpt2"]: "gpt-2"}
GGUF_NAMES = {"embed": "token_embd", "norm": "output_norm", "head": "output", "mixer_norm": "attn_norm",
              "mlp_norm": "ffn_norm", "mixer.proj": "attn_output", "mlp.gate": "ffn_gate", "mlp.fc": "ffn_up",
              "mlp.proj": "ffn_down"}


def require_gguf(model: GPT, tokenizer: Tokenizer):
    """Raises BadInput for what llama.cpp would run otherwise than it is."""
    if hf_architecture(model.config) != "llama":
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
