"""The compiled rational functions, numba and Triton, against their readable twins in plain torch."""
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import library

from conftest import REPO
from kernels.rational import ROWS, group_size, rational, rational_backward, rational_backward_torch, rational_torch

# rows, channels, groups: a single number, groups of uneven size, more rows than a tile, several tiles
SHAPES = [(1, 1, 1), (5, 3, 3), (7, 20, 8), (ROWS + 1, 16, 4), (3 * ROWS, 24, 1)]


def example(rows: int, channels: int, groups: int, dtype=torch.float32):
    torch.manual_seed(0)
    groups = -(-channels // group_size(channels, groups))
    coefficients = 0.3 * torch.randn(groups, 10)
    coefficients[:, 6:].abs_()
    return 3 * torch.randn(rows, channels).to(dtype), torch.randn(rows, channels).to(dtype), coefficients


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_torch(shape):
    x, grad, coefficients = example(*shape)
    assert torch.allclose(rational(x, coefficients), rational_torch(x, coefficients), rtol=1e-5, atol=1e-5)
    inputs = grad, x, coefficients
    for got, want in zip(rational_backward(*inputs), rational_backward_torch(*inputs), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)


def test_forward_and_backward_equal_double_precision():
    x, grad, coefficients = example(ROWS, 16, 4)
    got = rational_backward(grad, x, coefficients)
    values, exact = x.double().requires_grad_(), coefficients.double().requires_grad_()
    y = rational_torch(values, exact)
    for a, b in zip(got, (y, *torch.autograd.grad(y, (values, exact), grad.double()))):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_inputs_and_outputs(dtype):
    x, grad, coefficients = example(50, 16, 4, dtype)
    assert torch.equal(rational(x, coefficients), rational(x.float(), coefficients).to(dtype))
    y, x_grad, coefficients_grad = rational_backward(grad, x, coefficients)
    assert y.dtype == x_grad.dtype == dtype and coefficients_grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_change_no_bit(dtype):
    """With inputs that require gradients, as in training: a new thread has gradients enabled."""
    x, grad, coefficients = example(5 * ROWS + 3, 24, 4, dtype)
    x, grad, coefficients = x.requires_grad_(), grad.requires_grad_(), coefficients.requires_grad_()
    with torch.no_grad():
        one_thread = rational(x, coefficients), *rational_backward(grad, x, coefficients)
        torch.set_num_threads(2)
        try:
            two_threads = rational(x, coefficients), *rational_backward(grad, x, coefficients)
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one_thread, two_threads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_work_in_inference_mode_too(dtype):
    """As in decoding a long prompt, which is many rows: an inference tensor may not be modified outside that mode."""
    x, _, coefficients = example(5 * ROWS, 24, 4, dtype)
    want = rational(x, coefficients)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            assert torch.equal(rational(x, coefficients), want)
    finally:
        torch.set_num_threads(1)


def test_inputs_that_are_not_contiguous():
    x, grad, coefficients = example(64, 16, 4)
    assert torch.equal(rational(x.T.contiguous().T, coefficients), rational(x, coefficients))
    for a, b in zip(rational_backward(grad.T.contiguous().T, x, coefficients), rational_backward(grad, x, coefficients)):
        assert torch.equal(a, b)


def test_operations_pass_torchs_checks():
    """Fake tensors get the shapes of real ones, and no input is modified."""
    x, grad, coefficients = example(20, 16, 4)
    library.opcheck(rational, (x, coefficients))
    library.opcheck(rational_backward, (grad, x, coefficients))


NEEDS_TRITON = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton runs on Linux only")


def run_python(program: str, **environment: str):
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True,
                          env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.integration
@NEEDS_TRITON
def test_triton_kernels_in_its_interpreter():
    pytest.importorskip("triton")
    run_python("""
import sys; sys.path.insert(0, "tests")
import torch
from kernels import rational_triton
from kernels.rational import rational_backward_torch, rational_torch
from test_rational import SHAPES, example
for shape in [*SHAPES[:3], (40, 300, 2)]:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x, grad, coefficients = example(*shape, dtype)
        got = rational_triton.forward(x, coefficients), *rational_triton.backward(grad, x, coefficients)
        want = rational_torch(x.float(), coefficients).to(dtype), *rational_backward_torch(grad, x, coefficients)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and (a.float() - b.float()).norm() <= tolerance * b.float().norm(), (shape, dtype)
""", TRITON_INTERPRET="1")


@pytest.mark.integration
@NEEDS_TRITON
def test_triton_kernels_compile_without_atomics():
    """To the assembly of several generations of cards; needs no GPU."""
    pytest.importorskip("triton", minversion="3.3")  # ASTSource has other arguments before
    run_python("""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import rational_triton as kernels
for kernel in (kernels.forward_kernel, kernels.backward_kernel):
    for dtype in ("*fp32", "*bf16", "*fp16"):
        types = {name: "constexpr" if name.isupper() else "i32" if not name.endswith("_ptr") else
                 "*fp32" if name in ("coefficients_ptr", "sums_ptr") else dtype for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=types, constexprs={"ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS})
        for capability in (75, 80, 90) if dtype == "*fp16" else (80,):
            assembly = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
            assert "atom" not in assembly and "red.global" not in assembly
""")


@pytest.mark.parametrize("path", ["kernels/rational.py", "layers/gated_delta.py", "layers/loss.py"])
def test_a_copy_of_the_file_registers_operations_of_its_own(path):
    """As in an exported model: torch destroys an operation whose name is registered again, and calling it then crashes."""
    spec = importlib.util.spec_from_file_location("a-model.copied", REPO / path)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    original = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert copied.NAMESPACE.isidentifier() and copied.NAMESPACE != original.NAMESPACE
