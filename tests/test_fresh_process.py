"""Every command that reads from the hub works in a process of its own, which has imported nothing else: libraries fill in
some of their modules only when another one has been imported."""
import os
import shutil
import subprocess
import sys

import pytest
from exporting import random_model, run_export

from conftest import HUB, REPO
from tokenizer import Tokenizer

pytestmark = pytest.mark.integration
QUESTIONS = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(30)]
ENDINGS = [{"ctx": f"Row {i} goes", "endings": ["up", "down"], "label": i % 2} for i in range(4)]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, english):
    """On the hub: three datasets, and a model in Hugging Face's format."""
    HUB.add("fresh/text", {"default": [[{"text": text[:3000]} for text in english[:30]]]})
    HUB.add("fresh/questions", {"default": [QUESTIONS]})
    HUB.add("fresh/endings", {"default": [ENDINGS]})
    folder = tmp_path_factory.mktemp("model")
    exported = run_export(random_model(mlp="swiglu", norm="scaled_rms", qk_norm=False, value_residual=False, tied=True,
                                       x0_residual=False, token_shift=False, softcap=0.0, vocab_size=270),
                          Tokenizer.train([b"abcdef" * 9], 270), folder)
    shutil.copytree(exported, HUB.folder / "fresh" / "model", dirs_exist_ok=True)


@pytest.mark.parametrize("command", [
    "download_data.py --dataset=fresh/text --data_path={tmp}/data --vocab_size=300",
    "tokenizer.py --dataset=fresh/text --tokenizer_path={tmp}/tokenizer.json --vocab_size=300",
    "finetune.py --checkpoint_path={trained} --out_path={tmp}/a.pt --dataset=fresh/questions --max_iter=1 --device=cpu "
    "--val_conversations=2",
    "evaluate.py --checkpoint_path={trained} --dataset=fresh/text --limit=2 --device=cpu",
    "evaluate.py --checkpoint_path={trained} --task=choice --dataset=fresh/endings --split=train --device=cpu",
    "evaluate.py --checkpoint_path={trained} --task=answers --dataset=fresh/questions --limit=2 --device=cpu",
    "export.py --import_path=fresh/model --checkpoint_path={tmp}/imported.pt"],
    ids=lambda command: "-".join(word.strip("-") for word in command.split()[:4] if "{" not in word))
def test_a_command_reads_from_the_hub_in_a_fresh_process(repositories, trained, tmp_path, command):
    done = subprocess.run([sys.executable, *command.format(tmp=tmp_path, trained=trained).split()], cwd=REPO,
                          capture_output=True, text=True, timeout=120,
                          env=os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
