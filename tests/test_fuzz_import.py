"""Damaged model folders and vocabularies: a message or a working checkpoint, and no code of theirs runs."""
import json
import struct

import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("transformers")

from exporting import MIXED_TEXT, random_model, run_export  # noqa: E402
from fuzzing import FUZZ, damaged_bytes, damaged_json, ends_well, fuzz, json_values  # noqa: E402
from test_export import hf_llama, save_hf  # noqa: E402
from test_model import LLAMA  # noqa: E402

import export  # noqa: E402
from convert import hf_tokenizer  # noqa: E402
from convert.hf_tokenizer import load_hf_tokenizer  # noqa: E402
from runtime.config import BadInput  # noqa: E402
from sampling import load_pretrained  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(english) -> Tokenizer:
    trained = Tokenizer.train(english[:20], 300)
    return Tokenizer(trained.ranks, trained.pattern, trained.special_tokens, {"<think>": 300, "  ": 301}, ["  "], [300])


@pytest.fixture(scope="module", params=["llama", "ours", "theirs"])
def folder(request, tokenizer, tmp_path_factory):
    """An exported Llama, our own code, and what transformers saved, in two files with an index."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "theirs":
        hf_model = hf_llama(vocab_size=302, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
        return save_hf(hf_model, tokenizer, path / "out", max_shard_size="20KB")
    return run_export(random_model(302, **LLAMA if request.param == "llama" else {}), tokenizer, path)


def check_import(folder, tmp_path):
    """Imports the folder; what that writes can be loaded and used."""
    path = tmp_path / "in.pt"
    code = ends_well(export.main, [f"--import_path={folder}", f"--checkpoint_path={path}"], keep=[folder])
    assert path.exists() == (code == 0) and not (tmp_path / "in.pt.tmp").exists()
    if code == 0:
        model, tokenizer, _ = load_pretrained(path)
        ids = torch.tensor([[tokenizer.separator_id, *tokenizer.encode("a  b <think>")]])
        model(ids[:, :model.config.block_size])
        path.unlink()


@pytest.fixture
def damage(folder, tmp_path, monkeypatch):
    """damage(name, content) imports the folder with other content in one file. The check of ids against `tokenizers`, which
    takes a process, is left to the tests of vocabularies."""
    monkeypatch.setattr(hf_tokenizer, "check_same_ids", lambda *args: None)
    (tmp_path / "copy").mkdir()
    for file in folder.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "copy" / "modeling_gpt_workbench.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")

    def check(name: str, content: bytes):
        file = tmp_path / "copy" / name
        intact = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        check_import(tmp_path / "copy", tmp_path)
        file.unlink() if intact is None else file.write_bytes(intact)
        assert not (tmp_path / "executed").exists()
    return check


@FUZZ
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_json_files(n, name, folder, damage):
    path = folder / name
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"weight_map": {"a": "model.safetensors"}}
    if name == "tokenizer.json":
        value["model"]["vocab"] = {token: i for token, i in value["model"]["vocab"].items() if i < 260 or i > 290}
        value["model"]["merges"] = value["model"]["merges"][:4]  # few, so that other parts are drawn as well
    fuzz(n // 2, lambda value: damage(name, json.dumps(value).encode()), value=damaged_json(value))


@FUZZ
def test_weights(n, folder, damage):
    name = next(path.name for path in sorted(folder.glob("*.safetensors")))
    data = (folder / name).read_bytes()
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])

    def with_header(value) -> bytes:
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size:]
    fuzz(n, lambda data: damage(name, data), data=st.one_of(
        damaged_bytes(data), damaged_bytes(data[:8 + size]).map(lambda start: start + data[8 + size:]),
        damaged_json(header).map(with_header)))


@FUZZ
def test_vocabularies_of_tokenizers(n, tokenizer, tmp_path):
    """Each is refused, or has the ids of `tokenizers`, which load_hf_tokenizer checks."""
    saved = json.loads(hf_tokenizer.to_hf_tokenizer(tokenizer).to_str())
    parts = {"added_tokens": saved["added_tokens"], "pre_tokenizer": saved["pre_tokenizer"], "normalizer": None}

    def check(value):
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved | value if isinstance(value, dict) else value))
        try:
            load_hf_tokenizer(tmp_path, {"bos_token_id": tokenizer.separator_id})
        except BadInput as error:
            assert "tokenizer.json: " in str(error) and len(str(error)) < 1000
    fuzz(n // 2, check, value=damaged_json(parts))


@FUZZ
def test_our_tokenizer_json(n, tokenizer, tmp_path):
    """What is read encodes and decodes text, or refuses a byte."""
    text, path = tokenizer.to_json(), tmp_path / "tokenizer.json"
    value = json.loads(text) | {"tokens": json.loads(text)["tokens"][:260]}

    def check(content: bytes):
        path.write_bytes(content)
        try:
            loaded = Tokenizer.load(path)
        except BadInput as error:
            assert str(path) in str(error) and len(str(error)) < 1000
            return
        try:
            ids = loaded.encode(MIXED_TEXT)
        except BadInput:
            return
        assert loaded.decode(ids) == MIXED_TEXT
        assert Tokenizer.from_json(loaded.to_json()).fingerprint() == loaded.fingerprint()
    values = st.one_of(damaged_json(value), json_values())
    fuzz(n * 4, check, content=st.one_of(damaged_bytes(text.encode()), values.map(lambda v: json.dumps(v).encode())))
