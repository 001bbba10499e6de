"""Models out to transformers and in from it: the same ids and the same logits."""
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import ARCHITECTURES, GPT2, LLAMA

import export
from chat import Chat
from conftest import REPO
from convert import gguf as gguf_script
from convert import hf_mapping, hf_out, hf_tokenizer
from convert.hf_tokenizer import as_bytes, as_characters, byte_characters, merges_of
from evaluate import EvaluateConfig, score_choice
from model import GPT, GPTConfig
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.device import Machine
from sampling import GREEDY, generate, generate_texts
from tasks.multiple_choice import choice_of
from tokenizer import PATTERNS, Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
T = 24
MIXED = REPO.parent / "shared" / "data" / "mixed_scripts.parquet"
TEXT = "The numpy array's 3 axes, 12345 and ἀρχή — 文字 🙂\r\n\r\n   it'll\t do\n <|endoftext|> défi  "


@pytest.fixture(scope="module")
def tokenizer(english) -> Tokenizer:
    return Tokenizer.train(english[:40], 600)


@torch.no_grad()
def random_model(vocab_size: int, **switches) -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "head_size": 8, "block_size": T, "vocab_size": vocab_size}
    model = GPT(GPTConfig(**shape | switches))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def exported(model: GPT, tokenizer: Tokenizer, tmp_path, *flags: str):
    """The folder that the command makes of them."""
    save_checkpoint(tmp_path / "gpt.pt", model.to_checkpoint() | {"tokenizer": tokenizer.to_json()})
    export.main([f"--checkpoint_path={tmp_path / 'gpt.pt'}", f"--out_path={tmp_path / 'out'}", *flags])
    return tmp_path / "out"


def imported(folder, tmp_path, *flags: str) -> tuple[GPT, Tokenizer]:
    export.main([f"--import_path={folder}", f"--checkpoint_path={tmp_path / 'in.pt'}", *flags])
    blob = load_checkpoint(tmp_path / "in.pt")
    return GPT.from_checkpoint(blob), Tokenizer.from_json(blob["tokenizer"])


def loaded(folder):
    """The model as a user of transformers gets it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.fixture
def idx():
    return torch.randint(500, (3, T), generator=torch.Generator().manual_seed(1))


# -- logits -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(architecture, tokenizer, tmp_path, idx):
    model = random_model(tokenizer.vocab_size, **architecture)
    folder = exported(model, tokenizer, tmp_path)
    theirs = loaded(folder)
    kind = "llama" if architecture == LLAMA else "gpt2" if architecture == GPT2 else "gpt_workbench"
    assert theirs.config.model_type == kind
    assert hf_mapping.hf_architecture(model.config) == {"gpt_workbench": None}.get(kind, kind)
    logits = theirs(idx).logits
    assert (logits - model(idx)).abs().max() < 1e-4 and logits.std() > 0.1
    back, _ = imported(folder, tmp_path)
    assert torch.equal(back(idx), model(idx))


def hf_llama(**changes):
    """A small Llama of transformers' own making."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{
        "vocab_size": 600, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 3e-6, "tie_word_embeddings": False,
        "bos_token_id": 595, "eos_token_id": 595} | changes))


def hf_gpt2(**changes):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{
        "vocab_size": 600, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 595,
        "eos_token_id": 595} | changes))


@torch.no_grad()
def saved(model, tokenizer: Tokenizer, folder, **how):
    """With random weights everywhere, and our tokenizer beside it."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval().save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_text(json.dumps(hf_tokenizer.tokenizer_blob(tokenizer)), encoding="utf-8")
    return model, folder


MADE = {"llama": hf_llama, "llama, tied": lambda: hf_llama(tie_word_embeddings=True, num_key_value_heads=4),
        "llama, biases, base": lambda: hf_llama(attention_bias=True, mlp_bias=True, rope_parameters={
            "rope_type": "default", "rope_theta": 500.0}),
        "gpt2": hf_gpt2,
        "gpt2, gelu, wide": lambda: hf_gpt2(activation_function="gelu", n_inner=100, layer_norm_epsilon=1e-3)}


@torch.no_grad()
@pytest.mark.parametrize("made", MADE)
def test_models_of_transformers_come_in(made, tokenizer, tmp_path, idx):
    """With the tokens of conversations there already, and without: then the rows of the others stay as they were."""
    theirs, folder = saved(MADE[made](), tokenizer, tmp_path / "theirs")
    model, read = imported(folder, tmp_path)
    logits = theirs(idx).logits
    assert (model(idx) - logits).abs().max() < 1e-4 and logits.std() > 0.1
    assert read.to_json() == tokenizer.to_json() and model.config.vocab_size == 600
    out = exported(model, read, tmp_path)
    assert (loaded(out)(idx).logits - logits).abs().max() < 1e-4
    assert json.loads((out / "config.json").read_text())["model_type"] == made[:5].rstrip(",")


@torch.no_grad()
def test_an_imported_model_gets_the_tokens_of_conversations(tokenizer, tmp_path, idx):
    plain = Tokenizer(tokenizer.ranks, tokenizer.pattern, {"<|endoftext|>": 595})
    theirs, folder = saved(hf_gpt2(), plain, tmp_path / "theirs")  # 600 rows for 596 tokens
    model, read = imported(folder, tmp_path)
    assert read.special_tokens == tokenizer.special_tokens and model.config.vocab_size == 600
    logits = theirs(idx).logits
    assert (model(idx) - logits)[..., :596].abs().max() < 1e-4
    embed = theirs.transformer.wte.weight[:596]
    assert torch.allclose(model.embed.weight[596:], embed.mean(dim=0).expand(4, -1), atol=1e-6)
    model, read = imported(folder, tmp_path, "--chat_tokens=0", "--overwrite")
    assert read.to_json() == plain.to_json() and model.config.vocab_size == 596


@torch.no_grad()
def test_weights_in_several_files_come_in(tokenizer, tmp_path, idx):
    theirs, folder = saved(hf_llama(), tokenizer, tmp_path / "theirs", max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, _ = imported(folder, tmp_path)
    assert (model(idx) - theirs(idx).logits).abs().max() < 1e-4


@torch.no_grad()
def test_the_original_gpt2_file_comes_in(tokenizer, tmp_path, idx):
    """Its names lack a prefix, it holds masks as buffers, and its vocabulary is in vocab.json and merges.txt."""
    from safetensors.torch import load_file, save_file
    theirs, folder = saved(hf_gpt2(), tokenizer, tmp_path / "theirs")
    weights = {name.removeprefix("transformer."): weight for name, weight in load_file(folder / "model.safetensors").items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    gpt2 = Tokenizer(tokenizer.ranks, "gpt2", tokenizer.special_tokens)
    blob = hf_tokenizer.tokenizer_blob(gpt2)
    (folder / "tokenizer.json").unlink()
    vocab = {name: i for name, i in blob["model"]["vocab"].items() if i <= 595}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, blob["model"]["merges"])) + "\n",
                                       encoding="utf-8")
    model, read = imported(folder, tmp_path)
    assert (model(idx) - theirs(idx).logits)[..., :596].abs().max() < 1e-4
    assert read.encode(TEXT) == gpt2.encode(TEXT)


# -- text -------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("architecture", [{}, {"mixer": "DA"}, {"linear": "grkan"}, LLAMA, GPT2], ids=str)
def test_generate_says_what_ours_says(architecture, tokenizer, tmp_path, idx):
    """Greedily, from prompts of one length and of several, filled up on the left; and a cache does not change it."""
    model = random_model(tokenizer.vocab_size, **architecture)
    theirs = loaded(exported(model, tokenizer, tmp_path))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = torch.stack(list(generate(model, list(idx[:, :8]), 12, GREEDY)), dim=1)
    for use_cache in (True, False):
        assert torch.equal(theirs.generate(idx[:, :8], use_cache=use_cache, **options)[:, 8:], ours)
    lengths = [3, 8, 5]
    ours = torch.stack(list(generate(model, [row[:n] for row, n in zip(idx, lengths)], 12, GREEDY)), dim=1)
    mask = torch.tensor([[0] * (8 - n) + [1] * n for n in lengths])
    padded = torch.stack([torch.cat((torch.zeros(8 - n, dtype=torch.int64), row[:n])) for row, n in zip(idx, lengths)])
    for use_cache in (True, False):
        assert torch.equal(theirs.generate(padded, attention_mask=mask, use_cache=use_cache, **options)[:, 8:], ours)


@torch.no_grad()
def test_our_code_in_transformers(tokenizer, tmp_path, idx):
    """Loss, gradients, half precision, saving again."""
    model = random_model(tokenizer.vocab_size)
    theirs = loaded(exported(model, tokenizer, tmp_path))
    with torch.enable_grad():
        loss = theirs(idx, labels=idx).loss
        loss.backward()
    assert loss.item() == pytest.approx(model(idx[:, :-1], idx[:, 1:]).item(), rel=1e-5)
    assert theirs.gpt.embed.weight.grad.abs().sum() > 0 and theirs.gpt.head.weight is theirs.gpt.embed.weight
    theirs.save_pretrained(tmp_path / "again")
    assert torch.allclose(loaded(tmp_path / "again")(idx).logits, theirs(idx).logits)
    with pytest.raises(ValueError, match="more than the context of 24 holds"):
        theirs(torch.zeros(1, 25, dtype=torch.int64))


def test_weights_in_half_precision(tokenizer, tmp_path, idx):
    model = random_model(tokenizer.vocab_size, **LLAMA)
    whole = exported(model, tokenizer, tmp_path)
    size = (whole / "model.safetensors").stat().st_size
    half = exported(model, tokenizer, tmp_path, "--weights=bf16", "--overwrite")
    assert (half / "model.safetensors").stat().st_size < 0.6 * size
    theirs = transformers.AutoModelForCausalLM.from_pretrained(half, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert (loaded(half)(idx).logits - model(idx)).abs().max() < 0.3


# -- ids --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pairs(english, tmp_path_factory) -> dict:
    """For each pattern, our tokenizer and what AutoTokenizer makes of its export, special tokens in text being text."""
    made = {}
    for pattern in PATTERNS:
        ours = Tokenizer.train(english[:40], 600, pattern)
        folder = exported(random_model(600, n_layer=1), ours, tmp_path_factory.mktemp(pattern))
        made[pattern] = ours, transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    return made


def same_ids(pair, text: str):
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.encode(text) == [ours.separator_id, *ids]
    assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_are_those_of_autotokenizer(pattern, pairs, english):
    for text in ["", TEXT, *english[40:60]]:
        same_ids(pairs[pattern], text)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs", "Cn"]), st.sampled_from("'’sStTrReE 01\r\n\t\u017f"))))
def test_ids_of_any_text(pattern, pairs, text):
    same_ids(pairs[pattern], text)


@pytest.mark.skipif(not MIXED.exists(), reason="its text is not part of the repository")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_of_many_scripts(pattern, pairs):
    for text in pyarrow.parquet.read_table(MIXED)["text"].to_pylist():
        same_ids(pairs[pattern], text[:20_000])


def trained_by_tokenizers(english, pre_tokenizer, size=600):
    """A vocabulary that the library `tokenizers` has trained."""
    from tokenizers import Tokenizer as Theirs
    from tokenizers import decoders, models, trainers
    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = sorted(byte_characters())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet,
                                  special_tokens=["<|begin|>", "<|end_of_text|>"])
    theirs.train_from_iterator(english[:40], trainer)
    return theirs


def splitters():
    from tokenizers import Regex, pre_tokenizers
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    only_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = next(pattern for pattern in hf_tokenizer.KNOWN_PATTERNS if pattern.startswith("(?i:"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {"gpt2": byte_level, "smollm": pre_tokenizers.Sequence([digits, byte_level]),
            "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(llama3), "isolated"), only_bytes]),
            "words": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+|\s+"), "isolated"), only_bytes])}


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama3", "words"])
def test_vocabularies_of_tokenizers_come_in(kind, english, tmp_path):
    """Special tokens first, bytes in another order, and a separator of another name."""
    theirs = trained_by_tokenizers(english, splitters()[kind])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = hf_tokenizer.read_tokenizer(tmp_path, {"bos_token_id": 0, "eos_token_id": [1]})
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|end_of_text|>": 1}
    more = " 12  345\n 6a7 ½  ", "x  1", "a\n\n1", "  ", "'S 'll't"
    for text in [TEXT, *more, *english[40:60]]:
        assert ours.encode(text) == theirs.encode(text).ids, text[:50]
    assert (ours.splitter is not None) == (kind in ("gpt2", "llama3"))  # the compiled scanner's work


def test_bytes_as_characters_by_hand():
    assert as_characters(b" the\n") == "ĠtheĊ" and as_bytes("ĠtheĊ") == b" the\n" and as_bytes("▁the") is None
    assert len(set(byte_characters())) == 256


def test_merges_by_hand():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5, b"cab": 6, b"xyz": 7}
    assert merges_of(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"c", b"ab")]


# -- conversations ----------------------------------------------------------------------------------------------------

def test_the_chat_template_makes_our_ids(tokenizer, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(exported(random_model(600), tokenizer, tmp_path))
    messages = [{"role": "system", "content": " be brief\n"}, {"role": "user", "content": TEXT.replace("<|endoftext|>", "")},
                {"role": "assistant", "content": "42"}, {"role": "user", "content": "why?"}]
    for answer in (False, True):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=answer, tokenize=True, return_dict=False)
        assert ids == tokenizer.encode_chat(messages, answer)[0]
    with pytest.raises(Exception, match="unknown role robot"):
        theirs.apply_chat_template([{"role": "robot", "content": "x"}])


# -- what cannot be ---------------------------------------------------------------------------------------------------

def test_bad_input_out(tokenizer, tmp_path, refused):
    folder = exported(random_model(600), tokenizer, tmp_path)
    flags = [f"--checkpoint_path={tmp_path / 'gpt.pt'}", f"--out_path={folder}"]
    refused(export.main, flags, f"--out_path={folder}: exists")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    refused(export.main, [flags[0], f"--out_path={tmp_path / 'mine'}", "--overwrite"], "holds no exported model")
    assert (tmp_path / "mine" / "precious").exists()
    refused(export.main, [], "--out_path", "--import_path")
    refused(export.main, [f"--checkpoint_path={tmp_path / 'none.pt'}", f"--out_path={tmp_path / 'x'}"], "none.pt")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.tmp"))


def test_bad_input_in(tmp_path, refused, hub):
    """Folders and names of the hub that are not there; and nothing is written over."""
    flags = [f"--checkpoint_path={tmp_path / 'in.pt'}"]
    refused(export.main, [*flags, f"--import_path={tmp_path / 'nowhere'}"], "--import_path=", "no such folder")
    refused(export.main, [*flags, "--import_path=org/none"], "--import_path=org/none", "hub")
    hub.fail("away", "org/away", times=99)
    refused(export.main, [*flags, "--import_path=org/away"], "--import_path=org/away", "hub")
    (tmp_path / "in.pt").write_bytes(b"precious")
    refused(export.main, [*flags, "--import_path=org/none"], "in.pt: exists")
    assert (tmp_path / "in.pt").read_bytes() == b"precious"


def test_a_failed_export_leaves_the_one_before(tokenizer, tmp_path, monkeypatch):
    folder = exported(random_model(600), tokenizer, tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(hf_out, "tokenizer_blob", lambda tokenizer: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(SystemExit) as stop:
        exported(random_model(600, n_layer=1), tokenizer, tmp_path, "--overwrite")
    assert stop.value.code == 1 and (folder / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "mamba"}, ["config.json", "'mamba'", "llama"]),
    ({"hidden_act": "gelu"}, ["config.json", "hidden_act = 'gelu'", "silu"]),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_type = 'yarn'"]),
    ({"head_dim": 8}, ["4 heads of 8", "48"]),
    ({"attention_bias": True}, ["biases in some"]),
    ({"attention_bias": True, "mlp_bias": True}, ["model.safetensors", "has no", "bias"]),
    ({"intermediate_size": 96}, ["model.safetensors", "(80, 48)", "(96, 48)"]),
    ({"num_hidden_layers": 2}, ["model.safetensors", "model.layers.2", "another architecture"]),
    ({"num_hidden_layers": 4}, ["model.safetensors", "has no model.layers.3"]),
    ({"num_hidden_layers": None}, ["config.json"])])
def test_a_model_of_another_shape_is_refused(changes, words, tokenizer, tmp_path, refused):
    _, folder = saved(hf_llama(), tokenizer, tmp_path / "theirs")
    blob = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(blob | changes))
    refused(export.main, [f"--import_path={folder}", f"--checkpoint_path={tmp_path / 'in.pt'}"], *words)
    assert not (tmp_path / "in.pt").exists()


@pytest.mark.parametrize("name, text, words", [
    ("config.json", "{", ["config.json", "no JSON"]), ("config.json", None, ["config.json", "cannot be read"]),
    ("model.safetensors", "xxxxxxxxxxxx", ["model.safetensors", "damaged"]),
    ("model.safetensors", None, ["model.safetensors", "missing"]),
    ("tokenizer.json", "[]", ["tokenizer.json"]), ("tokenizer.json", "{}", ["tokenizer.json"]),
    ("tokenizer.json", '{"model": {"type": "Unigram"}}', ["tokenizer.json", "no byte-level BPE"])])
def test_damaged_files_are_named(name, text, words, tokenizer, tmp_path, refused):
    _, folder = saved(hf_gpt2(), tokenizer, tmp_path / "theirs")
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    refused(export.main, [f"--import_path={folder}", f"--checkpoint_path={tmp_path / 'in.pt'}"], *words)


def test_vocabularies_that_would_give_other_ids_are_refused(tokenizer, tmp_path):
    blob = hf_tokenizer.tokenizer_blob(tokenizer)
    merges = blob["model"]["merges"]
    for change, words in (({"merges": merges[::-1]}, "not in the order"), ({"merges": merges[1:]}, "not in the order"),
                          ({"vocab": blob["model"]["vocab"] | {"▁the": 700}}, "no byte-level vocabulary")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(blob | {"model": blob["model"] | change}), encoding="utf-8")
        with pytest.raises(export.BadInput, match=words):
            hf_tokenizer.read_tokenizer(tmp_path, {"bos_token_id": 595})
    (tmp_path / "tokenizer.json").write_text(json.dumps(blob | {"added_tokens": []}), encoding="utf-8")
    with pytest.raises(export.BadInput, match="bos_token_id"):
        hf_tokenizer.read_tokenizer(tmp_path, {"bos_token_id": None, "eos_token_id": None})


# -- GGUF -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def gpt4(english) -> Tokenizer:
    return Tokenizer.train(english[:40], 600, "gpt4")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_gguf_file_holds_shape_vocabulary_and_weights(dtype, gpt4, tmp_path):
    import gguf
    model = random_model(600, **LLAMA | {"n_head": 4, "n_kv_head": 2, "tied": False, "rotary_base": 500.0})
    reader = gguf.GGUFReader(exported(model, gpt4, tmp_path, "--gguf", f"--weights={dtype}") / "model.gguf")
    value = lambda name: reader.get_field(name).contents()
    assert value("general.architecture") == "llama" and value("llama.attention.head_count_kv") == 2
    assert value("llama.rope.freq_base") == 500 and value("llama.context_length") == T
    assert value("tokenizer.ggml.pre") == "llama-bpe" and value("tokenizer.ggml.tokens")[595:597] == [
        "<|endoftext|>", "<|system|>"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 9
    down = gguf.dequantize(tensors["blk.1.ffn_down.weight"].data, tensors["blk.1.ffn_down.weight"].tensor_type)
    kept = model.blocks[1].mlp.proj.weight.detach().to(export.DTYPES[dtype]).float()
    assert torch.equal(torch.from_numpy(down.copy()), kept)


def test_channels_that_turn_together_are_neighbours_in_gguf():
    """By hand: a head of four channels, of which ours turn (0, 2) and (1, 3)."""
    model = random_model(50, **LLAMA | {"n_head": 1, "head_size": 4, "n_layer": 1})
    weights, qkv = gguf_script.gguf_weights(model), model.blocks[0].mixer.qkv.weight
    assert torch.equal(weights["blk.0.attn_q.weight"], qkv[[0, 2, 1, 3]])
    assert torch.equal(weights["blk.0.attn_k.weight"], qkv[[4, 6, 5, 7]])
    assert torch.equal(weights["blk.0.attn_v.weight"], qkv[8:])


def test_what_llama_cpp_would_run_otherwise_is_refused(tokenizer, gpt4, tmp_path, refused):
    for model, vocabulary, words in ((random_model(600), gpt4, "--preset=llama"),
                                     (random_model(600, **LLAMA), tokenizer, "--pattern=gpt4 or gpt2")):
        save_checkpoint(tmp_path / "gpt.pt", model.to_checkpoint() | {"tokenizer": vocabulary.to_json()})
        refused(export.main, [f"--checkpoint_path={tmp_path / 'gpt.pt'}", f"--out_path={tmp_path / 'out'}", "--gguf"], words)
        assert not (tmp_path / "out").exists()


# -- stock engines ----------------------------------------------------------------------------------------------------

OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def lm_eval(folder: Path, tasks: dict[str, dict], rows: list[dict], place: Path) -> tuple[dict, dict[str, list[dict]]]:
    """What lm-eval measures on the rows: its results, and the samples, in the order of the rows, of each task."""
    place.mkdir()
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(place / "rows.jsonl")}},
            "validation_split": "validation", "doc_to_text": "{{ctx}}"}
    for name, task in tasks.items():
        (place / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))  # JSON is YAML
    # not from here: where it looks for Hugging Face's `evaluate` it would find ours
    subprocess.run([sys.executable, "-m", "lm_eval", "--model=hf", "--device=cpu", "--batch_size=4", "--log_samples",
                    f"--model_args=pretrained={folder},trust_remote_code=True,add_bos_token=True",
                    f"--tasks={','.join(tasks)}", f"--include_path={place}", f"--output_path={place / 'out'}"],
                   cwd=place, env=OFFLINE, check=True)
    result, = (place / "out").rglob("results_*.json")
    samples = {}
    for name in tasks:
        path, = (place / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return json.loads(result.read_text())["results"], samples


@pytest.mark.slow
def test_lm_eval_measures_what_evaluate_does(tokenizer, english, tmp_path):
    """Of our own code; some contexts are longer than the model's."""
    pytest.importorskip("lm_eval")
    model, block_size = random_model(tokenizer.vocab_size, block_size=64), 64
    words = iter(word for word in " ".join(english[50:60]).split() if len(word) < 20)
    take = lambda n: " ".join(itertools.islice(words, n))
    rows = [{"ctx": take(i % 40 + 1), "endings": [take(n) for n in (2, 3, 1, 3)], "label": i % 4} for i in range(100)]
    rows.append({"ctx": "naïve café", "endings": ["élan ü", "plain", "文字 🙂", "—"], "label": 1})
    n_tokens = [len(tokenizer.encode(row["ctx"])) for row in rows]
    assert min(n_tokens) < 10 and sum(n > block_size for n in n_tokens) > 10
    results, samples = lm_eval(exported(model, tokenizer, tmp_path), {
        "choice": {"output_type": "multiple_choice", "doc_to_target": "label", "doc_to_choice": "endings",
                   "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")]},
        "answer": {"output_type": "generate_until", "doc_to_target": "{{endings[0]}}",
                   "generation_kwargs": {"until": ["e"], "max_gen_toks": 8, "do_sample": False},
                   "metric_list": [{"metric": "exact_match"}]}}, rows, tmp_path / "lm_eval")
    config = EvaluateConfig(task="choice", dataset="rows")
    measured, ours = score_choice(model, tokenizer, Machine(torch.device("cpu"), "fp32"),
                                  [choice_of(row, "") for row in rows], config)
    for row, sample in zip(ours, samples["choice"], strict=True):
        assert [float(score) for score, _ in sample["filtered_resps"]] == pytest.approx(row["scores"], abs=1e-3)
    assert results["choice"]["acc,none"] == measured["acc"].value
    assert results["choice"]["acc_norm,none"] == measured["acc_norm"].value
    for row, sample in zip(rows, samples["answer"], strict=True):
        ids = [tokenizer.separator_id, *tokenizer.encode(row["ctx"])][8 - block_size:]
        texts = generate_texts(model, tokenizer, [ids], 8, GREEDY, ["e"])
        assert sample["resps"][0][0] == "".join(text for _, text in texts)


@contextmanager
def served(folder: Path, log_path: Path):
    """Where `transformers serve` answers for the model."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with log_path.open("w") as log:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device=cpu"]
        server = subprocess.Popen([*command, "--host=127.0.0.1", f"--port={port}"], env=OFFLINE, stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                    break
                except OSError:
                    assert server.poll() is None, log_path.read_text()
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            server.terminate()
            server.wait(60)


@pytest.mark.slow
def test_transformers_serves_a_chat(tokenizer, tmp_path):
    """It says what ours says, and the token that ends a message ends it."""
    for library in ("transformers.cli.serve", "fastapi", "uvicorn", "openai"):
        pytest.importorskip(library)
    model = random_model(tokenizer.vocab_size, block_size=128, **LLAMA)
    folder = exported(model, tokenizer, tmp_path)

    def answer(messages: list[dict], **options) -> dict:
        body = {"model": str(folder), "messages": messages, "temperature": 0, "max_tokens": 12, **options}
        request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=300) as reply:
            choice, = json.load(reply)["choices"]
        assert choice["message"]["role"] == "assistant"
        return choice

    with served(folder, tmp_path / "log") as url:
        for question in ("What is an array?", " Why — été 🙂?\n"):
            asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
            ours = "".join(Chat(model, tokenizer, GREEDY, 12, system="Be brief.").answer(question))
            assert answer(asked)["message"]["content"] == ours and len(ours) > 10
        asked += [{"role": "assistant", "content": "42."}, {"role": "user", "content": "Why?"}]
        ids = tokenizer.encode_chat(asked, True)[0]
        ours = "".join(text for _, text in generate_texts(model, tokenizer, [ids], 12, GREEDY))
        assert answer(asked)["message"]["content"] == ours and len(ours) > 10
        ended = answer(asked, logit_bias={str(tokenizer.special_tokens[export.END]): 1000.0})
        assert ended["finish_reason"] == "stop" and not ended["message"]["content"]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["gpt4", "gpt2"])
def test_llama_cpp_says_what_ours_says(pattern, english, tmp_path):
    """The same ids and, greedily, the same tokens."""
    xllamacpp = pytest.importorskip("xllamacpp")
    ours = Tokenizer.train(english[:40], 600, pattern)
    model = random_model(600, **LLAMA | {"n_head": 4, "head_size": 16, "n_kv_head": 2, "block_size": 128})
    params = xllamacpp.CommonParams()
    params.model.path = str(exported(model, ours, tmp_path, "--gguf") / "model.gguf")
    params.n_ctx, params.n_gpu_layers = 128, 0
    server = xllamacpp.Server(params)

    def post(path: str, **body) -> dict:
        request = Request(server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.loads(urlopen(request, timeout=60).read())
    for text in (TEXT, *english[40:60]):
        ids = post("/tokenize", content=text[:3000], add_special=False, parse_special=False)["tokens"]
        assert ids == ours.encode(text[:3000])
    for prompt in ("The numpy array", "def f(x):"):
        made = post("/completion", prompt=prompt, n_predict=24, temperature=0, top_k=1, ignore_eos=True, return_tokens=True)
        ids = torch.tensor([ours.separator_id, *ours.encode(prompt)])
        assert made["tokens"] == [int(new) for new in generate(model, [ids], 24, GREEDY)]
