"""export.py: weights and configs to and from transformers, its code in an exported folder, GGUF files, refusals."""
import ast
import json
import os
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from exporting import MIXED_TEXT, T, load_exported, random_model, run_export, run_import  # noqa: E402
from test_model import ARCHITECTURES, GPT2, LLAMA  # noqa: E402

import export  # noqa: E402
from conftest import run_rows  # noqa: E402
from convert import gguf, hf_mapping, hf_out  # noqa: E402
from convert.hf_tokenizer import to_hf_tokenizer  # noqa: E402
from convert.model_card import training_figures  # noqa: E402
from layers import LINEARS, MIXERS, MLPS, NORMS  # noqa: E402
from runtime.checkpoint import run_lock, save_checkpoint  # noqa: E402
from runtime.device import DTYPES  # noqa: E402
from sampling import GREEDY, generate  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(english) -> Tokenizer:
    return Tokenizer.train(english[:40], 600)


@pytest.fixture(scope="module")
def gpt4(english) -> Tokenizer:
    return Tokenizer.train(english[:40], 600, "gpt4")


@pytest.fixture
def idx():
    return torch.randint(500, (3, T), generator=torch.Generator().manual_seed(1))


# -- to transformers --------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exported_logits_equal_ours(architecture, tokenizer, tmp_path, idx):
    """And an export that is imported again is the same model, bit for bit."""
    model = random_model(**architecture)
    folder = run_export(model, tokenizer, tmp_path)
    hf_model = load_exported(folder)
    model_type = "llama" if architecture == LLAMA else "gpt2" if architecture == GPT2 else "gpt_workbench"
    assert hf_model.config.model_type == model_type
    logits = hf_model(idx).logits
    assert (logits - model(idx)).abs().max() < 1e-4 and logits.std() > 0.1
    imported, _ = run_import(folder, tmp_path)
    assert torch.equal(imported(idx), model(idx))


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("architecture", [{}, {"mixer": "DA"}, {"linear": "grkan"}, LLAMA, GPT2, LLAMA | {"loops": 3}],
                         ids=str)
def test_greedy_generation_equals_ours(architecture, use_cache, tokenizer, tmp_path, idx):
    """For prompts of one length, and for left-padded prompts of several."""
    model = random_model(**architecture)
    hf_model = load_exported(run_export(model, tokenizer, tmp_path))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": use_cache}
    expected = torch.stack(list(generate(model, list(idx[:, :8]), 12, GREEDY)), dim=1)
    assert torch.equal(hf_model.generate(idx[:, :8], **options)[:, 8:], expected)
    lengths = [3, 8, 5]
    expected = torch.stack(list(generate(model, [row[:n] for row, n in zip(idx, lengths)], 12, GREEDY)), dim=1)
    mask = torch.tensor([[0] * (8 - n) + [1] * n for n in lengths])
    padded = torch.stack([torch.cat((torch.zeros(8 - n, dtype=torch.int64), row[:n])) for row, n in zip(idx, lengths)])
    assert torch.equal(hf_model.generate(padded, attention_mask=mask, **options)[:, 8:], expected)


def test_our_code_in_transformers_has_loss_and_gradients(tokenizer, tmp_path, idx):
    model = random_model()
    hf_model = load_exported(run_export(model, tokenizer, tmp_path))
    loss = hf_model(idx, labels=idx).loss
    loss.backward()
    assert loss.item() == pytest.approx(model(idx[:, :-1], idx[:, 1:]).item(), rel=1e-5)
    assert hf_model.gpt.embed.weight.grad.abs().sum() > 0 and hf_model.gpt.head.weight is hf_model.gpt.embed.weight


@pytest.mark.integration
def test_transformers_trainer_may_accumulate_gradients(tokenizer, tmp_path, idx):
    """Loss and gradient norm of a step do not depend on how its rows, of different numbers of targets, are divided."""
    pytest.importorskip("accelerate")
    folder = run_export(random_model(), tokenizer, tmp_path)
    idx = idx.repeat(3, 1)[:8]
    rows = [{"input_ids": row, "labels": row.where(torch.arange(T) < 3 + 2 * i, -100)} for i, row in enumerate(idx)]
    logged = []
    for steps in (1, 2, 8):
        arguments = transformers.TrainingArguments(
            str(tmp_path / "trainer"), per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps,
            max_steps=1, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
        trainer = transformers.Trainer(load_exported(folder), arguments, train_dataset=rows)
        trainer.train()
        logged.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert logged[1] == pytest.approx(logged[0], rel=1e-4) and logged[2] == pytest.approx(logged[0], rel=1e-4)


def test_our_code_in_transformers_refuses_more_than_its_context(tokenizer, tmp_path):
    hf_model = load_exported(run_export(random_model(), tokenizer, tmp_path))
    with pytest.raises(ValueError, match="25 tokens exceed the context of 24"):
        hf_model(torch.zeros(1, 25, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("architecture", [
    *({"mixer": mixer} for mixer in MIXERS), *({"mlp": mlp} for mlp in MLPS), *({"linear": linear} for linear in LINEARS),
    *({"norm": norm, "bias": True} for norm in NORMS), {"positions": "learned", "tied": False}], ids=str)
def test_our_code_runs_in_the_dtype_of_the_weights(architecture, dtype, tokenizer, tmp_path, idx):
    """That of config.json, which transformers 5 loads them in: near fp32, with and without the cache."""
    model = random_model(**architecture | {"n_layer": 1})
    folder = run_export(model, tokenizer, tmp_path, f"--weights={dtype}")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    assert hf_model.dtype == DTYPES[dtype]
    logits = hf_model(idx).logits.float()
    assert (logits - model(idx)).square().mean().sqrt() < 0.03 * logits.std()
    ids = hf_model.generate(idx[:, :4], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids.shape == (3, 8)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [{}, LLAMA, GPT2], ids=["ours", "llama", "gpt2"])
def test_the_two_lines_that_export_prints_load_the_folder(architecture, tokenizer, tmp_path, idx, capsys, monkeypatch):
    """They are in the model card too. trust_remote_code is explained where it is needed, and asked for nowhere else."""
    model = random_model(**architecture)
    card = (run_export(model, tokenizer, tmp_path) / "README.md").read_text(encoding="utf-8")
    said, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and card.count("\n".join(lines).replace(str(tmp_path) + "/", "")) == 1
    assert {("trust_remote_code=True" in text) for text in (said, lines[1], card)} == {architecture == {}}
    loaded = {}
    exec("\n".join(lines), loaded)
    assert (loaded["model"].eval()(idx).logits - model(idx)).abs().max() < 1e-4
    assert loaded["tokenizer"](MIXED_TEXT[:20])["input_ids"][-5:] == tokenizer.encode(MIXED_TEXT[:20])[-5:]


def test_the_model_card_has_the_figures_of_the_run(trained, tmp_path):
    """Of the best validation, also where the exported weights are later ones; of an imported model those of the model."""
    export.main([f"--checkpoint_path={trained}", f"--out_path={tmp_path / 'out'}"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    last = run_rows(trained)[-1]
    for figure in ("| parameters | ", "| context | 16 tokens |", "byte-level BPE, 512 ids", "train.py, 3 steps",
                   f"| training tokens | {last['tokens']:,} |", "# license:",
                   f"| best validation | {last['val_bpb']:.4f} bits/byte, {last['val_loss']:.4f} nats/token, at step 3 |"):
        assert figure in card, figure
    assert "these weights" not in card
    rows = [{"step": step, "val_loss": loss, "val_bpb": loss / 2} for step, loss in ((0, 4.0), (3, 2.0), (6, 3.0))]
    training = {"step": 6, "tokens": 5, "best": 2.0, "script": "finetune.py", "settings": {"checkpoint_path": "a/base.pt"}}
    later = training_figures(training, rows)
    assert later["best validation"] == "1.0000 bits/byte, 2.0000 nats/token, at step 3"
    assert later["validation of these weights"] == "1.5000 bits/byte, 3.0000 nats/token, at step 6"
    assert "from `base.pt`" in later["trained by"] and "not counting" in later["training tokens"]
    assert training_figures(training, [])["best validation"] == "2.0000 nats/token"  # of a checkpoint that was moved
    assert training_figures({}, rows) == {}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_an_exported_folder_may_be_read_by_whom_the_umask_says(umask, gpt4, tmp_path):
    before = os.umask(umask)
    try:
        folder = run_export(random_model(**LLAMA), gpt4, tmp_path, "--gguf")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


@torch.no_grad()
def test_weights_in_bf16(tokenizer, tmp_path, idx):
    model = random_model(**LLAMA)
    size = (run_export(model, tokenizer, tmp_path) / "model.safetensors").stat().st_size
    folder = run_export(model, tokenizer, tmp_path, "--weights=bf16", "--overwrite")
    assert (folder / "model.safetensors").stat().st_size < 0.6 * size
    assert transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    assert (load_exported(folder)(idx).logits - model(idx)).abs().max() < 0.3


@pytest.mark.parametrize("switches, packages", [
    ({}, {"torch", "transformers"}), ({"mlp": "grkan"}, {"torch", "transformers", "numpy", "numba"}),
    ({"linear": "chebkan"}, {"torch", "transformers", "numpy", "numba"})], ids=["plain", "grkan", "chebkan"])
def test_an_exported_folder_carries_only_the_code_of_its_model(switches, packages, tokenizer, tmp_path):
    """Of runtime/ only the flags, no argparse, and numba only for KAN layers."""
    folder = run_export(random_model(**switches), tokenizer, tmp_path)
    assert [path.name for path in folder.glob("runtime*.py")] == ["runtime_config.py"]
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert (folder / f"{node.module}.py").exists(), f"{path.name} imports {node.module}"
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    optional = {"kernels"}  # kernels.cards, which layers/loss.py and kernels/rational.py do without
    assert imported - sys.stdlib_module_names - optional == packages
    assert "argparse" not in imported


def test_the_models_own_file_imports_all_others(tokenizer, tmp_path):
    """Older versions of transformers copy only these."""
    folder = run_export(random_model(linear="grkan"), tokenizer, tmp_path)
    tree = ast.parse((folder / "modeling_gpt_workbench.py").read_text(encoding="utf-8"))
    imported = {f"{node.module}.py" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert imported == {path.name for path in folder.glob("*.py")} - {"modeling_gpt_workbench.py"}


def test_a_folder_exported_by_the_previous_version_is_imported(tokenizer, tmp_path, idx):
    """Its config and its weights have other names, see upgrade_weights."""
    from safetensors.torch import load_file, save_file
    model = random_model()
    folder = run_export(model, tokenizer, tmp_path)
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace('"x0_residual"', '"embed_shortcut"'), encoding="utf-8")
    old_name = lambda name: name.replace("shift_coeff", "share").replace("x0_mix", "shortcut")
    weights = {old_name(name): weight for name, weight in load_file(folder / "model.safetensors").items()}
    assert {name.rpartition(".")[2] for name in weights} >= {"share", "shortcut"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    imported, _ = run_import(folder, tmp_path)
    assert torch.equal(imported(idx), model(idx)) and imported.config == model.config


# -- from transformers ------------------------------------------------------------------------------------------------

def hf_llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{
        "vocab_size": 600, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 3e-6, "tie_word_embeddings": False,
        "bos_token_id": 595, "eos_token_id": 595} | changes))


def hf_gpt2(**changes):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{
        "vocab_size": 600, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 595,
        "eos_token_id": 595} | changes))


@torch.no_grad()
def save_hf(hf_model, tokenizer: Tokenizer, folder, **options):
    """A folder of a transformers model, its weights made random everywhere, with our tokenizer's ids."""
    torch.manual_seed(0)
    for parameter in hf_model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    hf_model.eval().save_pretrained(folder, **options)
    to_hf_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("make, changes", [
    (hf_llama, {}), (hf_llama, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    (hf_llama, {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    (hf_gpt2, {}), (hf_gpt2, {"activation_function": "gelu", "n_inner": 100, "layer_norm_epsilon": 1e-3})],
    ids=["llama", "llama-tied", "llama-biases-theta", "gpt2", "gpt2-gelu-wide"])
def test_imported_logits_equal_theirs(make, changes, tokenizer, tmp_path, idx):
    """And exported again, the model is of the class it was."""
    hf_model = make(**changes)
    model, imported = run_import(save_hf(hf_model, tokenizer, tmp_path / "theirs"), tmp_path)
    logits = hf_model(idx).logits
    assert (model(idx) - logits).abs().max() < 1e-4 and logits.std() > 0.1
    assert imported.to_json() == tokenizer.to_json() and model.config.vocab_size == 600
    exported = load_exported(run_export(model, imported, tmp_path))
    assert type(exported) is type(hf_model) and (exported(idx).logits - logits).abs().max() < 1e-4


@torch.no_grad()
def test_chat_tokens_are_added_as_the_mean_of_the_other_rows(tokenizer, tmp_path, idx):
    plain = Tokenizer(tokenizer.ranks, tokenizer.pattern, {"<|endoftext|>": 595})
    hf_model = hf_gpt2()
    folder = save_hf(hf_model, plain, tmp_path / "theirs")  # 600 rows for 596 tokens
    model, imported = run_import(folder, tmp_path)
    assert imported.special_tokens == tokenizer.special_tokens and model.config.vocab_size == 600
    assert (model(idx) - hf_model(idx).logits)[..., :596].abs().max() < 1e-4
    mean = hf_model.transformer.wte.weight[:596].mean(dim=0)
    assert torch.allclose(model.embed.weight[596:], mean.expand(4, -1), atol=1e-6)
    model, imported = run_import(folder, tmp_path, "--chat_tokens=0", "--overwrite")
    assert imported.to_json() == plain.to_json() and model.config.vocab_size == 596


@torch.no_grad()
def test_weights_in_several_files(tokenizer, tmp_path, idx):
    hf_model = hf_llama()
    folder = save_hf(hf_model, tokenizer, tmp_path / "theirs", max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, _ = run_import(folder, tmp_path)
    assert (model(idx) - hf_model(idx).logits).abs().max() < 1e-4


@torch.no_grad()
def test_files_as_openai_published_gpt2(tokenizer, tmp_path, idx):
    """Parameter names lack a prefix, masks are saved as buffers, the vocabulary is vocab.json and merges.txt."""
    from safetensors.torch import load_file, save_file
    hf_model, gpt2 = hf_gpt2(), Tokenizer(tokenizer.ranks, "gpt2", tokenizer.special_tokens)
    folder = save_hf(hf_model, gpt2, tmp_path / "theirs")
    weights = {name.removeprefix("transformer."): weight for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, folder / "model.safetensors", {"format": "pt"})
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    vocab = {token: token_id for token, token_id in saved["vocab"].items() if token_id <= 595}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, saved["merges"])]) + "\n",
                                       encoding="utf-8")
    model, imported = run_import(folder, tmp_path)
    assert (model(idx) - hf_model(idx).logits)[..., :596].abs().max() < 1e-4
    assert imported.encode(MIXED_TEXT) == gpt2.encode(MIXED_TEXT)


# -- refusals ---------------------------------------------------------------------------------------------------------

def test_export_replaces_only_an_exported_folder(tokenizer, tmp_path, refused):
    folder = run_export(random_model(), tokenizer, tmp_path)
    checkpoint = f"--checkpoint_path={tmp_path / 'gpt.pt'}"
    refused(export.main, [checkpoint, f"--out_path={folder}"], f"--out_path={folder}: exists")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    refused(export.main, [checkpoint, f"--out_path={tmp_path / 'mine'}", "--overwrite"], "holds no exported model")
    assert (tmp_path / "mine" / "precious").exists()


def test_export_leaves_other_folders_alone(tokenizer, tmp_path, refused, monkeypatch):
    """One that is named like a temporary one, the current folder, and that of an export at the same time."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "precious").write_text("x")
    folder = run_export(random_model(), tokenizer, tmp_path)
    assert (tmp_path / "out.tmp" / "precious").exists()
    checkpoint = f"--checkpoint_path={tmp_path / 'gpt.pt'}"
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        refused(export.main, [checkpoint, "--out_path=.", "--overwrite"], "--out_path=.: is the current folder")
    (tmp_path / "link").symlink_to(folder)
    (folder / "config.json").write_text("{}")
    export.main([checkpoint, f"--out_path={tmp_path / 'link'}", "--overwrite"])
    assert (tmp_path / "link").is_symlink() and len((folder / "config.json").read_text()) > 2

    def interrupted(model, tokenizer, folder, *args):
        monkeypatch.undo()
        export.main([checkpoint, f"--out_path={tmp_path / 'same'}"])
        (folder / "config.json").write_text("{}")
    monkeypatch.setattr(export, "export_model", interrupted)
    refused(export.main, [checkpoint, f"--out_path={tmp_path / 'same'}"], "same: exists")
    assert len((tmp_path / "same" / "config.json").read_text()) > 2 and not list(tmp_path.glob("same.*"))


def test_export_without_a_checkpoint_leaves_nothing(tmp_path, refused):
    refused(export.main, [f"--checkpoint_path={tmp_path / 'none.pt'}", f"--out_path={tmp_path / 'out'}"], "none.pt")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tokenizer, tmp_path, monkeypatch, capsys):
    """What safetensors raises there is no OSError."""
    import safetensors
    import safetensors.torch

    def full(*args):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SystemExit) as stop:
        run_export(random_model(), tokenizer, tmp_path)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and f"{tmp_path / 'out'}: cannot be written (" in line and "No space left" in line
    assert [path.name for path in tmp_path.iterdir()] == ["gpt.pt"]


@pytest.mark.parametrize("pattern", [r"(?P<a>x)\w+", r"\p{Script=Greek}+"])
def test_a_pattern_that_tokenizers_does_not_support_is_refused(pattern, tokenizer, tmp_path, refused):
    user = Tokenizer(tokenizer.ranks, pattern, tokenizer.special_tokens)
    save_checkpoint(tmp_path / "gpt.pt", random_model().to_checkpoint() | {"tokenizer": user.to_json()})
    refused(export.main, [f"--checkpoint_path={tmp_path / 'gpt.pt'}", f"--out_path={tmp_path / 'new' / 'out'}"],
            "gpt.pt", "the tokenizer's --pattern cannot be exported", "Oniguruma")
    assert [path.name for path in tmp_path.iterdir()] == ["gpt.pt"]


def test_either_out_path_or_import_path(refused):
    refused(export.main, [], "--out_path", "--import_path")
    refused(export.main, ["--out_path=a", "--import_path=b"], "--out_path", "--import_path")


def test_a_failed_export_leaves_the_earlier_one(tokenizer, tmp_path, monkeypatch):
    folder = run_export(random_model(), tokenizer, tmp_path)
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(hf_out, "write_tokenizer", fail)  # after the weights
    with pytest.raises(SystemExit) as stop:
        run_export(random_model(n_layer=1), tokenizer, tmp_path, "--overwrite")
    assert stop.value.code == 1 and (folder / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("source, words", [("./nowhere", ["no such folder"]), ("org/none", ["hub"]), ("org/away", ["hub"])])
def test_a_model_that_cannot_be_found(source, words, tmp_path, refused, hub):
    hub.fail("away", "org/away", times=99)
    flags = [f"--checkpoint_path={tmp_path / 'in.pt'}", f"--import_path={source}"]
    refused(export.main, flags, f"--import_path={source}", *words)


def test_a_model_in_a_folder_that_is_there_is_not_sought_on_the_hub(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/a.pt").touch()
    refused(export.main, ["--import_path=checkpoints/llma"], "no such folder", "not asked")
    refused(export.main, ["--import_path=checkpoints/a.pt"], "is a file")


def test_import_replaces_no_checkpoint(tmp_path, refused):
    (tmp_path / "in.pt").write_bytes(b"precious")
    refused(export.main, [f"--checkpoint_path={tmp_path / 'in.pt'}", "--import_path=org/none"], "in.pt: exists")
    with run_lock(tmp_path / "in.pt", "a training"):
        refused(export.main, [f"--checkpoint_path={tmp_path / 'in.pt'}", "--import_path=org/none", "--overwrite"],
                "another process is writing there")
    assert (tmp_path / "in.pt").read_bytes() == b"precious"


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
    ({"num_hidden_layers": None}, ["config.json"]), ({"vocab_size": None}, ["config.json", "vocab_size"]),
    ({"vocab_size": 10**8}, ["model.safetensors", "(600, 48)", "(100000000, 48)"]),
    ({"vocab_size": 599}, ["model.safetensors", "(599, 48)"]),
    ({"vocab_size": 1.5}, ["config.json", "vocab_size"]), ({"num_attention_heads": 0}, ["config.json"]),
    ({"num_hidden_layers": 999}, ["model.safetensors", "too few for the 999 layers"]),
    ({"max_position_embeddings": 10**9}, ["config.json", "1000000000"]),
    ({"rope_parameters": [1]}, ["config.json"]), ({"rope_parameters": {"rope_theta": "x"}}, ["config.json"]),
    ({"rms_norm_eps": "1e-5"}, ["config.json"]), ({"model_type": ["llama"]}, ["config.json", "model_type"]),
    ({"eos_token_id": "</s>"}, ["config.json", "eos_token_id"]),
    ({"tie_word_embeddings": True}, ["lm_head.weight differs from model.embed_tokens.weight"]),
    ({"model_type": "mistral", "max_position_embeddings": 5000}, ["config.json", "sliding_window = 4096"])], ids=str)
def test_a_config_that_is_unsupported_or_does_not_fit_the_weights(changes, words, tokenizer, tmp_path, refused):
    folder = save_hf(hf_llama(), tokenizer, tmp_path / "theirs")
    hf_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf_config | changes))
    refused(export.main, [f"--import_path={folder}", f"--checkpoint_path={tmp_path / 'in.pt'}"], *words)
    assert not (tmp_path / "in.pt").exists()


@pytest.mark.parametrize("name, content, words", [
    ("config.json", "{", ["config.json", "not JSON"]), ("config.json", None, ["config.json", "cannot be read"]),
    ("model.safetensors", "xxxxxxxxxxxx", ["model.safetensors", "damaged"]),
    ("model.safetensors", None, ["model.safetensors", "missing"]),
    ("generation_config.json", "[]", ["generation_config.json", "not a JSON object"]),
    ("tokenizer.json", "[]", ["tokenizer.json"]), ("tokenizer.json", "{}", ["tokenizer.json"]),
    ("tokenizer.json", '{"model": {"type": "Unigram"}}', ["tokenizer.json", "not a byte-level BPE"])])
def test_a_damaged_file_is_named(name, content, words, tokenizer, tmp_path, refused):
    folder = save_hf(hf_gpt2(), tokenizer, tmp_path / "theirs")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    refused(export.main, [f"--import_path={folder}", f"--checkpoint_path={tmp_path / 'in.pt'}"], *words)


@pytest.mark.parametrize("index, words", [
    ([], "not a JSON object"), ({}, "no weight_map"), ({"weight_map": []}, "no weight_map"),
    ({"weight_map": {}}, "no weight_map"), ({"weight_map": {"a": 7}}, "no weight_map"),
    ({"weight_map": {"a": "none.safetensors"}}, "none.safetensors: missing"),
    ({"weight_map": {"a": "../theirs/model.safetensors"}}, "no safetensors file beside it"),
    ({"weight_map": {"a": "/etc/passwd"}}, "no safetensors file beside it"),
    ({"weight_map": {"a": "config.json"}}, "no safetensors file beside it")], ids=str)
def test_an_index_names_only_files_beside_it(index, words, tokenizer, tmp_path, refused):
    folder = save_hf(hf_gpt2(), tokenizer, tmp_path / "theirs")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(export.main, [f"--import_path={folder}", f"--checkpoint_path={tmp_path / 'in.pt'}"], words)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_must_be_floating_point_numbers(dtype, tokenizer, tmp_path, refused):
    from safetensors.torch import load_file, save_file
    path = save_hf(hf_gpt2(), tokenizer, tmp_path / "theirs") / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"transformer.wpe.weight": weights["transformer.wpe.weight"].to(dtype)}, path, {"format": "pt"})
    refused(export.main, [f"--import_path={path.parent}", f"--checkpoint_path={tmp_path / 'in.pt'}"], str(path),
            "transformer.wpe.weight is of")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer, tmp_path, refused):
    larger = Tokenizer(tokenizer.ranks, tokenizer.pattern, tokenizer.special_tokens | {"<|more|>": 600})
    folder = save_hf(hf_gpt2(), larger, tmp_path / "theirs")
    refused(export.main, [f"--import_path={folder}", f"--checkpoint_path={tmp_path / 'in.pt'}"],
            "its tokenizer has 601 ids, config.json a vocab_size of 600")
    save_checkpoint(tmp_path / "gpt.pt", random_model().to_checkpoint() | {"tokenizer": larger.to_json()})
    refused(export.main, [f"--checkpoint_path={tmp_path / 'gpt.pt'}", f"--out_path={tmp_path / 'out'}"],
            "gpt.pt: its tokenizer has 601 ids, its model 600")
    assert not (tmp_path / "out").exists()


# -- GGUF -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_gguf_file_holds_config_vocabulary_and_weights(dtype, gpt4, tmp_path):
    from gguf import GGUFReader, dequantize
    model = random_model(**LLAMA | {"n_head": 4, "n_kv_head": 2, "tied": False, "rotary_base": 500.0})
    reader = GGUFReader(run_export(model, gpt4, tmp_path, "--gguf", f"--weights={dtype}") / "model.gguf")
    value = lambda name: reader.get_field(name).contents()
    assert value("general.architecture") == "llama" and value("llama.attention.head_count_kv") == 2
    assert value("llama.rope.freq_base") == 500 and value("llama.context_length") == T
    assert value("tokenizer.ggml.pre") == "llama-bpe"
    assert value("tokenizer.ggml.tokens")[595:597] == ["<|endoftext|>", "<|system|>"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 9  # embedding, norm, head; per layer two norms, q, k, v, o and three of the MLP
    down = tensors["blk.1.ffn_down.weight"]
    expected = model.blocks[1].mlp.proj.weight.detach().to(DTYPES[dtype]).float()
    assert torch.equal(torch.from_numpy(dequantize(down.data, down.tensor_type).copy()), expected)


def test_added_tokens_in_a_gguf_file(gpt4, tmp_path):
    """llama.cpp finds tokens of this type in a text before it splits it, as we do."""
    from gguf import GGUFReader, TokenType
    added = Tokenizer(gpt4.ranks, "gpt4", gpt4.special_tokens, {"<think>": 600, "  ": 601})
    reader = GGUFReader(run_export(random_model(602, **LLAMA), added, tmp_path, "--gguf") / "model.gguf")
    assert reader.get_field("tokenizer.ggml.tokens").contents()[599:] == ["<|end|>", "<think>", "  "]
    assert reader.get_field("tokenizer.ggml.token_type").contents()[599:] == [
        TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.USER_DEFINED]


def test_gguf_rotary_channels_by_hand():
    """A head of four channels: ours turn the pairs (0, 2) and (1, 3), which llama.cpp wants side by side."""
    model = random_model(50, **LLAMA | {"n_head": 1, "head_size": 4, "n_layer": 1})
    weights, qkv = gguf.to_gguf_state_dict(model), model.blocks[0].mixer.qkv.weight
    assert torch.equal(weights["blk.0.attn_q.weight"], qkv[[0, 2, 1, 3]])
    assert torch.equal(weights["blk.0.attn_k.weight"], qkv[[4, 6, 5, 7]])
    assert torch.equal(weights["blk.0.attn_v.weight"], qkv[8:])


@pytest.mark.parametrize("switches, pattern, words", [({}, "gpt4", "--preset=llama"),
                                                      (LLAMA, "default", "--pattern=gpt4 or gpt2"),
                                                      (LLAMA | {"loops": 3}, "gpt4", "trained with --loops=3")],
                         ids=["architecture", "pattern", "loops"])
def test_gguf_refuses_what_llama_cpp_would_compute_differently(switches, pattern, words, tokenizer, tmp_path, refused):
    model, vocabulary = random_model(**switches), Tokenizer(tokenizer.ranks, pattern, tokenizer.special_tokens)
    save_checkpoint(tmp_path / "gpt.pt", model.to_checkpoint() | {"tokenizer": vocabulary.to_json()})
    refused(export.main, [f"--checkpoint_path={tmp_path / 'gpt.pt'}", f"--out_path={tmp_path / 'out'}", "--gguf"], words)
    assert not (tmp_path / "out").exists()


def test_every_parameter_has_one_place_in_llama_and_gpt2():
    """The tables cover exactly the parameters of the architecture, with and without biases and a tied head."""
    for architecture, switches in (("llama", LLAMA), ("llama", LLAMA | {"bias": True, "tied": False}), ("gpt2", GPT2)):
        model = random_model(**switches)
        parameters = hf_mapping.hf_parameters(architecture, model.config)
        assert parameters.keys() == dict(model.named_parameters()).keys()
        names = [name for parameter in parameters.values() for name in parameter.names]
        assert len(set(names)) == len(names)
