import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import library

from conftest import REPO
from kernels.rational import ROWS, backward_by_torch, group_size, rational, rational_backward, rational_by_torch

# rows, channels, groups: one number, groups of uneven size, more rows than a tile, several tiles
SHAPES = [(1, 1, 1), (5, 3, 3), (7, 20, 8), (ROWS + 1, 16, 4), (3 * ROWS, 24, 1)]


def example(rows: int, channels: int, groups: int, dtype=torch.float32):
    torch.manual_seed(0)
    groups = -(-channels // group_size(channels, groups))
    table = 0.3 * torch.randn(groups, 10)
    table[:, 6:].abs_()
    return 3 * torch.randn(rows, channels).to(dtype), torch.randn(rows, channels).to(dtype), table


@pytest.mark.parametrize("shape", SHAPES)
def test_both_passes_equal_autograds(shape):
    x, grad, table = example(*shape)
    assert torch.allclose(rational(x, table), rational_by_torch(x, table), rtol=1e-5, atol=1e-5)
    for got, want in zip(rational_backward(grad, x, table), backward_by_torch(grad, x, table), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-3)


def test_double_precision_says_the_same():
    x, grad, table = example(ROWS, 16, 4)
    got = rational_backward(grad, x, table)
    values, exact = x.double().requires_grad_(), table.double().requires_grad_()
    y = rational_by_torch(values, exact)
    for a, b in zip(got, (y, *torch.autograd.grad(y, (values, exact), grad.double()))):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_what_goes_in_and_out(dtype):
    x, grad, table = example(50, 16, 4, dtype)
    assert torch.equal(rational(x, table), rational(x.float(), table).to(dtype))
    y, x_grad, table_grad = rational_backward(grad, x, table)
    assert y.dtype == x_grad.dtype == dtype and table_grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_change_no_bit(dtype):
    """Of inputs that want gradients, as in training: threads of their own have gradients on."""
    x, grad, table = example(5 * ROWS + 3, 24, 4, dtype)
    x, grad, table = x.requires_grad_(), grad.requires_grad_(), table.requires_grad_()
    with torch.no_grad():
        alone = rational(x, table), *rational_backward(grad, x, table)
        torch.set_num_threads(2)
        try:
            together = rational(x, table), *rational_backward(grad, x, table)
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_work_in_inference_mode_too(dtype):
    """As in decoding, where a long prompt is many rows: a tensor made there may not be changed outside."""
    x, _, table = example(5 * ROWS, 24, 4, dtype)
    want = rational(x, table)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            assert torch.equal(rational(x, table), want)
    finally:
        torch.set_num_threads(1)


def test_rows_that_are_not_contiguous():
    x, grad, table = example(64, 16, 4)
    assert torch.equal(rational(x.T.contiguous().T, table), rational(x, table))
    for a, b in zip(rational_backward(grad.T.contiguous().T, x, table), rational_backward(grad, x, table)):
        assert torch.equal(a, b)


def test_torch_accepts_the_operations():
    """Their shapes without data agree with those with data, and nothing that comes in is changed."""
    x, grad, table = example(20, 16, 4)
    library.opcheck(rational, (x, table))
    library.opcheck(rational_backward, (grad, x, table))


TRITON = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")


def by_python(program: str, **environment: str):
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True,
                          env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]


@TRITON
def test_the_gpus_kernels_in_tritons_interpreter():
    pytest.importorskip("triton")
    by_python("""
import sys; sys.path.insert(0, "tests")
import torch
from kernels import rational_triton
from kernels.rational import backward_by_torch, rational_by_torch
from test_rational import SHAPES, example
for shape in [*SHAPES[:3], (40, 300, 2)]:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x, grad, table = example(*shape, dtype)
        got = rational_triton.forward(x, table), *rational_triton.backward(grad, x, table)
        want = rational_by_torch(x.float(), table).to(dtype), *backward_by_torch(grad, x, table)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype and (a.float() - b.float()).norm() <= tolerance * b.float().norm(), (shape, dtype)
""", TRITON_INTERPRET="1")


@TRITON
def test_the_gpus_kernels_compile_and_add_without_atomics():
    """Without a GPU, to the assembly of the cards that Triton knows."""
    pytest.importorskip("triton", minversion="3.3")  # before, sources were described in another way
    by_python("""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import rational_triton as kernels
for kernel in (kernels.forward_kernel, kernels.backward_kernel):
    for dtype in ("*fp32", "*bf16", "*fp16"):
        types = {name: "constexpr" if name.isupper() else "i32" if not name.endswith("_ptr") else
                 "*fp32" if name in ("table_ptr", "sums_ptr") else dtype for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=types, constexprs={"ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS})
        for capability in (75, 80, 90) if dtype == "*fp16" else (80,):
            assembly = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
            assert "atom" not in assembly and "red.global" not in assembly
""")


@pytest.mark.parametrize("path", ["kernels/rational.py", "layers/gated_delta.py"])
def test_a_copy_of_the_file_leaves_the_operations_alone(path):
    """Such as an exported model's: torch destroys an operation whose name is registered again, and who calls it crashes."""
    spec = importlib.util.spec_from_file_location("a-model.copied", REPO / path)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    original = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert copied.NAMESPACE.isidentifier() and copied.NAMESPACE != original.NAMESPACE
