"""kernels/rational.py for NVIDIA GPUs. A program owns a tile of rows of one group, whose coefficients it loads once. It
writes its sums for the gradient of the coefficients to a slot of its own, and torch adds the slots: no atomics.

The readable twins are `rational_torch` and `rational_backward_torch` in kernels/rational.py; tests/test_rational.py runs
these kernels against them in Triton's interpreter, and tests/test_gpu.py on a card.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 128  # size of a tile: rows per program, channels that it processes at a time


@triton.jit
def load_coefficients(c):
    return (tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3), tl.load(c + 4), tl.load(c + 5), tl.load(c + 6),
            tl.load(c + 7), tl.load(c + 8), tl.load(c + 9))


@triton.jit
def numerator(x, c0, c1, c2, c3, c4, c5):
    return ((((c5 * x + c4) * x + c3) * x + c2) * x + c1) * x + c0


@triton.jit
def denominator(w, c6, c7, c8, c9):
    return (((c9 * w + c8) * w + c7) * w + c6) * w + 1


@triton.jit
def forward_kernel(x_ptr, coefficients_ptr, y_ptr, rows, channels, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    group = tl.program_id(1)
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 = load_coefficients(coefficients_ptr + group * 10)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    last = tl.minimum(channels, (group + 1) * size)
    for start in range(group * size, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        at, inside = row * channels + column, (row < rows) & (column < last)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = numerator(x, c0, c1, c2, c3, c4, c5) / denominator(tl.abs(x), c6, c7, c8, c9)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad_ptr, x_ptr, coefficients_ptr, y_ptr, x_grad_ptr, sums_ptr, rows, channels, size, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
    group = tl.program_id(1)
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 = load_coefficients(coefficients_ptr + group * 10)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    last = tl.minimum(channels, (group + 1) * size)
    s0, s1, s2, s3, s4 = 0.0, 0.0, 0.0, 0.0, 0.0
    s5, s6, s7, s8, s9 = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(group * size, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        at, inside = row * channels + column, (row < rows) & (column < last)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)  # 0 outside: it adds nothing to the sums
        w = tl.abs(x)
        inverse = 1 / denominator(w, c6, c7, c8, c9)
        f = numerator(x, c0, c1, c2, c3, c4, c5) * inverse
        slope_p = (((5 * c5 * x + 4 * c4) * x + 3 * c3) * x + 2 * c2) * x + c1
        slope_q = ((4 * c9 * w + 3 * c8) * w + 2 * c7) * w + c6
        g = g * inverse
        x_grad = g * (slope_p - f * tl.where(x < 0, -slope_q, slope_q))
        tl.store(y_ptr + at, f.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(x_grad_ptr + at, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
        x2, w2 = x * x, w * w
        s0 += tl.sum(g)
        s1 += tl.sum(g * x)
        s2 += tl.sum(g * x2)
        s3 += tl.sum(g * x2 * x)
        s4 += tl.sum(g * x2 * x2)
        s5 += tl.sum(g * x2 * x2 * x)
        h = g * f
        s6 -= tl.sum(h * w)
        s7 -= tl.sum(h * w2)
        s8 -= tl.sum(h * w2 * w)
        s9 -= tl.sum(h * w2 * w2)
    s = sums_ptr + (tl.program_id(0) * tl.num_programs(1) + group) * 10
    tl.store(s, s0)
    tl.store(s + 1, s1)
    tl.store(s + 2, s2)
    tl.store(s + 3, s3)
    tl.store(s + 4, s4)
    tl.store(s + 5, s5)
    tl.store(s + 6, s6)
    tl.store(s + 7, s7)
    tl.store(s + 8, s8)
    tl.store(s + 9, s9)


def forward(x: Tensor, coefficients: Tensor) -> Tensor:
    """`rational` for a contiguous x."""
    y, (rows, channels), coefficients = torch.empty_like(x), x.shape, coefficients.contiguous()
    groups = len(coefficients)
    if y.numel():
        forward_kernel[triton.cdiv(rows, ROWS), groups](
            x, coefficients, y, rows, channels, triton.cdiv(channels, groups), ROWS, COLUMNS)
    return y


def backward(grad: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rational_backward` for contiguous grad and x."""
    y, x_grad, (rows, channels), coefficients = torch.empty_like(x), torch.empty_like(x), x.shape, coefficients.contiguous()
    groups, sums = len(coefficients), coefficients.new_zeros(triton.cdiv(rows, ROWS), *coefficients.shape)
    if y.numel():
        backward_kernel[triton.cdiv(rows, ROWS), groups](
            grad, x, coefficients, y, x_grad, sums, rows, channels, triton.cdiv(channels, groups), ROWS, COLUMNS)
    return y, x_grad, sums.sum(dim=0)


def try_out(device: torch.device):
    """Raises an exception where the kernels do not run."""
    x = torch.ones(1, 1, device=device)
    backward(x, x, torch.ones(1, 10, device=device))
