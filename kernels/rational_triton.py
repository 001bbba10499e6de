"""kernels/rational.py for GPUs. A program owns a tile of rows of one group, whose coefficients it loads once; its sums for
the coefficients' gradients go to a place of their own, and torch adds them up."""
import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 128  # of a tile: rows a program takes, channels it takes at a time


@triton.jit
def coefficients(t):
    return (tl.load(t), tl.load(t + 1), tl.load(t + 2), tl.load(t + 3), tl.load(t + 4), tl.load(t + 5), tl.load(t + 6),
            tl.load(t + 7), tl.load(t + 8), tl.load(t + 9))


@triton.jit
def numerator(x, t0, t1, t2, t3, t4, t5):
    return ((((t5 * x + t4) * x + t3) * x + t2) * x + t1) * x + t0


@triton.jit
def denominator(w, t6, t7, t8, t9):
    return (((t9 * w + t8) * w + t7) * w + t6) * w + 1


@triton.jit
def forward_kernel(x_ptr, table_ptr, y_ptr, rows, channels, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    group = tl.program_id(1)
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9 = coefficients(table_ptr + group * 10)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    last = tl.minimum(channels, (group + 1) * size)
    for start in range(group * size, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        at, inside = row * channels + column, (row < rows) & (column < last)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = numerator(x, t0, t1, t2, t3, t4, t5) / denominator(tl.abs(x), t6, t7, t8, t9)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad_ptr, x_ptr, table_ptr, y_ptr, x_grad_ptr, sums_ptr, rows, channels, size, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr):
    group = tl.program_id(1)
    t0, t1, t2, t3, t4, t5, t6, t7, t8, t9 = coefficients(table_ptr + group * 10)
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
        inverse = 1 / denominator(w, t6, t7, t8, t9)
        f = numerator(x, t0, t1, t2, t3, t4, t5) * inverse
        slope_p = (((5 * t5 * x + 4 * t4) * x + 3 * t3) * x + 2 * t2) * x + t1
        slope_q = ((4 * t9 * w + 3 * t8) * w + 2 * t7) * w + t6
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


def forward(x: Tensor, table: Tensor) -> Tensor:
    """x: (rows, channels), contiguous; table: (groups, 10) in fp32."""
    y, (rows, channels), table = torch.empty_like(x), x.shape, table.contiguous()
    if y.numel():
        forward_kernel[triton.cdiv(rows, ROWS), len(table)](
            x, table, y, rows, channels, triton.cdiv(channels, len(table)), ROWS, COLUMNS)
    return y


def backward(grad: Tensor, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both contiguous. Returns f(x), the gradient of x, and that of the table."""
    y, x_grad, (rows, channels), table = torch.empty_like(x), torch.empty_like(x), x.shape, table.contiguous()
    sums = table.new_zeros(triton.cdiv(rows, ROWS), *table.shape)
    if y.numel():
        backward_kernel[triton.cdiv(rows, ROWS), len(table)](
            grad, x, table, y, x_grad, sums, rows, channels, triton.cdiv(channels, len(table)), ROWS, COLUMNS)
    return y, x_grad, sums.sum(dim=0)
