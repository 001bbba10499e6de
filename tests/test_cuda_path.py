"""What only a GPU runs, on a machine without one: see no_card.py. On a GPU itself tests/test_gpu.py looks."""
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import REPO
from layers import LINEARS, MIXERS, MLPS

CHECKS = ["train_step", "a_wait_is_seen", "copies", "decode", "machine"]
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="takes a CPU build of torch: see no_card.py"),
    pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs Linux and g++")]


def errors_of(*checks: str) -> dict[str, str | None]:
    done = subprocess.run([sys.executable, "tests/no_card.py", *checks], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def errors():
    return errors_of(*CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_card(errors, check):
    assert errors[check] is None, errors[check]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(torch.__version__.split(".")[:2] != ["2", "13"], reason="goes through the insides of torch 2.13")
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("switch", [*(f"mlp={name}" for name in MLPS), *(f"mixer={name}" for name in MIXERS),
                                    *(f"linear={name}" for name in LINEARS)])
def test_what_is_compiled_for_cards(capability, switch):
    """Forward and backward pass become one graph each, and every Triton kernel of them compiles for the card."""
    (error,) = errors_of(f"compiled:{capability}:{switch}").values()
    assert error is None, error
