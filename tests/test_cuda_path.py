"""Code that only a GPU runs, tested without one by tests/no_card.py. On a GPU, tests/test_gpu.py tests it."""
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import REPO
from layers import LINEARS, MIXERS, MLPS

CHECKS = ["train_step", "host_sync_is_detected", "copy_stream_order", "decode", "adapt_step", "machine_setup"]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch: see no_card.py"),
    pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs Linux and g++")]


def run_checks(*checks: str) -> dict[str, str | None]:
    """check -> its traceback; None if it passed."""
    done = subprocess.run([sys.executable, "tests/no_card.py", *checks], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tracebacks():
    return run_checks(*CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_on_a_simulated_gpu(tracebacks, check):
    assert tracebacks[check] is None, tracebacks[check]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(torch.__version__.split(".")[:2] != ["2", "13"], reason="patches internals of torch 2.13")
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("switch", [*(f"mlp={name}" for name in MLPS), *(f"mixer={name}" for name in MIXERS),
                                    *(f"linear={name}" for name in LINEARS)])
def test_every_architecture_compiles_for_every_gpu(capability, switch):
    """The forward and backward pass become one graph each, and every Triton kernel in them compiles."""
    (traceback,) = run_checks(f"compiled:{capability}:{switch}").values()
    assert traceback is None, traceback
