"""Models of Llama's architecture to a GGUF file, which llama.cpp runs.

llama.cpp's own converter recognises vocabularies by a list, which a vocabulary trained here is not on. Source: GGUF's
specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and that converter.
"""
from pathlib import Path

import torch
from torch import Tensor

from convert.hf_mapping import hf_architecture, intermediate_size
from convert.hf_out import to_hf_state_dict
from convert.hf_tokenizer import has_chat_tokens, recover_merges, to_byte_level
from model import GPT, GPTConfig
from runtime.config import BadInput
from runtime.device import DTYPES
from tokenizer import END_OF_MESSAGE, PATTERNS, PLAIN_CHAT_TEMPLATE, Tokenizer

# Our patterns that llama.cpp can split by -> its names for them
GGUF_PATTERNS = {PATTERNS["gpt4"]: "llama-bpe", PATTERNS["gpt2"]: "gpt-2"}


def require_gguf(model: GPT, tokenizer: Tokenizer):
    """Raises BadInput if llama.cpp would compute something else than this model, or split text in another way."""
    if model.config.loops > 1:
        raise BadInput(f"--gguf: llama.cpp runs every block once, this model was trained with --loops={model.config.loops}")
    if hf_architecture(model.config) != "llama":
        raise BadInput("--gguf: llama.cpp runs models trained with --preset=llama, which this one was not")
    if tokenizer.pattern not in GGUF_PATTERNS:
        raise BadInput("--gguf: llama.cpp cannot split text as this vocabulary does: train one with --pattern=gpt4 or gpt2")


def write_gguf(model: GPT, tokenizer: Tokenizer, path: Path, dtype: str):
    """One file with config, vocabulary and weights. dtype: of the matrices; norms and biases are fp32."""
    import gguf
    writer = gguf.GGUFWriter(str(path), "llama")
    add_config(writer, model.config, dtype)
    add_tokenizer(writer, tokenizer)
    for name, weight in to_gguf_state_dict(model).items():
        add_weight(writer, name, weight, dtype if weight.dim() > 1 else "fp32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_config(writer, config: GPTConfig, dtype: str):
    """writer: a gguf.GGUFWriter."""
    import gguf
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(intermediate_size(config))
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head or config.n_head)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_layer_norm_rms_eps(config.norm_eps or 1e-5)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type({"fp32": gguf.LlamaFileType.ALL_F32, "fp16": gguf.LlamaFileType.MOSTLY_F16,
                          "bf16": gguf.LlamaFileType.MOSTLY_BF16}[dtype])


def add_tokenizer(writer, tokenizer: Tokenizer):
    import gguf
    written = {token_id: (name, gguf.TokenType.USER_DEFINED) for name, token_id in tokenizer.added_tokens.items()}
    written |= {token_id: (name, gguf.TokenType.CONTROL) for name, token_id in tokenizer.special_tokens.items()}
    names, types = [], []
    for token_id, token in enumerate(tokenizer.tokens):
        if token_id in written:
            name, token_type = written[token_id]
            names.append(name)
            types.append(token_type)
        elif token:
            names.append(to_byte_level(token))
            types.append(gguf.TokenType.NORMAL)
        else:  # an id that the vocabulary leaves out
            names.append(f"<|unused {token_id}|>")
            types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(GGUF_PATTERNS[tokenizer.pattern])
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(map(to_byte_level, pair)) for pair in recover_merges(tokenizer.ranks)])
    writer.add_bos_token_id(tokenizer.separator_id)
    writer.add_eos_token_id(tokenizer.special_tokens.get(END_OF_MESSAGE, tokenizer.separator_id))
    writer.add_add_bos_token(True)
    if has_chat_tokens(tokenizer):
        writer.add_chat_template(PLAIN_CHAT_TEMPLATE)


def add_weight(writer, name: str, weight: Tensor, dtype: str):
    import gguf
    if dtype == "bf16":  # numpy has no such type
        raw = weight.to(torch.bfloat16).view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, weight.to(DTYPES[dtype]).numpy())


def to_gguf_state_dict(model: GPT) -> dict[str, Tensor]:
    """The weights under llama.cpp's names. Its rotary positions turn pairs of neighbouring channels, ours and Hugging
    Face's channels half a head apart, so the rows of queries and keys are permuted."""
    import gguf
    config = model.config
    n_rotary_heads = {gguf.MODEL_TENSOR.ATTN_Q: config.n_head, gguf.MODEL_TENSOR.ATTN_K: config.n_kv_head or config.n_head}
    tensor_names, weights = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layer), {}
    for hf_name, weight in to_hf_state_dict(model, "llama").items():
        tensor, name = tensor_names.get_type_and_name(hf_name, (".weight", ".bias"))
        if tensor in n_rotary_heads:
            n_head = n_rotary_heads[tensor]
            weight = weight.unflatten(0, (n_head, 2, config.head_size // 2)).transpose(1, 2).flatten(0, 2)
        weights[name] = weight.contiguous()
    return weights
