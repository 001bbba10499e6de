"""Exported folders of our own code in the oldest and the newest version of transformers that they work in."""
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import check_exported  # noqa: E402
from exporting import MIXED_TEXT, T, random_model, run_export  # noqa: E402

from conftest import REPO  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

ARCHITECTURES = [{}, {"mixer": "DA"}, {"linear": "grkan", "mlp": "chebkan"},
                 {"norm": "layer", "positions": "learned", "bias": True, "tied": False}]
OLDEST = ["transformers==4.45.2", "tokenizers>=0.20,<0.21", "huggingface_hub>=0.23,<1"]


def export(architecture: dict, english, tmp_path) -> list[str]:
    """The arguments of check_exported.py."""
    tokenizer, model = Tokenizer.train(english[:40], 600), random_model(**architecture)
    idx, path = torch.randint(500, (3, T), generator=torch.Generator().manual_seed(1)), tmp_path / "ref.pt"
    text = MIXED_TEXT[:20]
    with torch.no_grad():
        torch.save({"idx": idx, "logits": model(idx), "text": text, "ids": tokenizer.encode(text)}, path)
    return [str(run_export(model, tokenizer, tmp_path)), str(path)]


@pytest.mark.integration
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_the_installed_version(architecture, english, tmp_path):
    check_exported.main(*export(architecture, english, tmp_path))


@pytest.mark.slow
def test_the_oldest_version(english, tmp_path):
    """In a process of its own, beside the packages that are installed."""
    folder = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}", *OLDEST]
    if subprocess.run(install).returncode:
        pytest.skip("needs a package index")
    for number, architecture in enumerate(ARCHITECTURES):
        (tmp_path / str(number)).mkdir()
        arguments = export(architecture, english, tmp_path / str(number))
        done = subprocess.run([sys.executable, REPO / "tests" / "check_exported.py", *arguments], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0 and "transformers 4.45.2: all well" in done.stdout, done.stderr
