"""A rational function of each number, whose coefficients a group of channels shares: one pass forward, one backward.

    f(x) = (t0 + t1 x + … + t5 x^5) / (1 + t6 |x| + t7 |x|² + t8 |x|³ + t9 |x|⁴)        t6 … t9 >= 0: it has no poles

The backward pass computes f(x) again rather than have it kept, and sums the gradients of the coefficients tile by tile,
without an atomic addition an element (Yang and Wang 2024, section 4.1, arXiv:2409.10594, is what that costs). Numba on a
CPU, Triton on a GPU of NVIDIA, plain torch elsewhere; torch.compile takes both operations as they are. The arithmetic is
fp32 whatever comes in: x^5 overflows fp16 from 10 on.
"""
import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor, library

# Of torch's operations. Each copy of this file, an exported model has one, has a name of its own: a second registration
# under one name destroys the first, and a call to it then reads freed memory.
NAMESPACE = "gpt_workbench_" + "".join(c if c.isalnum() else "_" for c in __name__)
N_NUMERATOR, N_DENOMINATOR = 6, 4
N_COEFFICIENTS = N_NUMERATOR + N_DENOMINATOR
ROWS = 256  # of a tile on a CPU. Sums of tiles are added in their order, so that threads do not change the result


def group_size(channels: int, groups: int) -> int:
    """Channels of a group; the last one may have fewer."""
    return -(-channels // groups)


@library.custom_op(f"{NAMESPACE}::rational", mutates_args=())
def rational(x: Tensor, table: Tensor) -> Tensor:
    """x: (rows, channels); table: (groups, 10) in fp32, t0 … t9 of each group. Returns f(x), of x's dtype."""
    kind, x = x.device.type, x.contiguous()
    if kind == "cuda" and (kernels := triton_kernels(x.device)):
        return kernels.forward(x, table)
    if kind != "cpu":
        return rational_by_torch(x.float(), table).to(x.dtype)
    y, coefficients = torch.empty_like(x), table.contiguous().numpy()
    in_tiles(lambda tile, x, y: forward_tile(x, coefficients, y), [x], [y])
    return y


@rational.register_fake
def _(x: Tensor, table: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@library.custom_op(f"{NAMESPACE}::rational_backward", mutates_args=())
def rational_backward(grad: Tensor, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad: of f(x), (rows, channels). Returns f(x) and the gradient of x, both of x's dtype, and that of the table."""
    kind, x = x.device.type, x.contiguous()
    if kind == "cuda" and (kernels := triton_kernels(x.device)):
        return kernels.backward(grad.contiguous(), x, table)
    if kind != "cpu":
        return backward_by_torch(grad, x, table)
    y, x_grad, coefficients = torch.empty_like(x), torch.empty_like(x), table.contiguous().numpy()
    sums = torch.zeros(-(-len(x) // ROWS), *table.shape)
    in_tiles(lambda tile, x, grad, y, x_grad: backward_tile(x, coefficients, y, grad, x_grad, sums[tile].numpy()),
             [x, grad.contiguous()], [y, x_grad])
    return y, x_grad, sums.sum(dim=0, dtype=torch.float64).float()


@rational_backward.register_fake
def _(grad: Tensor, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    like_x = lambda: torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return like_x(), like_x(), torch.empty_like(table)


# -- CPU --------------------------------------------------------------------------------------------------------------

def in_tiles(kernel: Callable, inputs: list[Tensor], outputs: list[Tensor]):
    """kernel(tile, *inputs, *outputs) with the rows of every tile, by as many threads as torch uses. What is not fp32 is so
    for a tile at a time."""
    infers = torch.is_inference_mode_enabled()  # a mode of the thread that calls, which those of the pool must share

    @torch.inference_mode(infers)
    def work(tile: int):
        rows = slice(tile * ROWS, (tile + 1) * ROWS)
        ins, outs = [x[rows].float() for x in inputs], [y[rows] for y in outputs]
        full = [y if y.dtype == torch.float32 else torch.empty(y.shape) for y in outs]
        kernel(tile, *(x.numpy() for x in ins), *(y.numpy() for y in full))
        for y, values in zip(outs, full):
            if y is not values:
                y.copy_(values)
    inputs = [x.detach() for x in inputs]  # gradients are off in the thread that calls, but not in those of the pool
    tiles, threads = range(-(-len(inputs[0]) // ROWS)), torch.get_num_threads()
    if threads == 1 or len(tiles) == 1:
        for tile in tiles:
            work(tile)
    else:
        list(pool_of(threads).map(work, tiles))


@functools.cache
def pool_of(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


# error_model="numpy": a check for division by zero, which cannot be, would keep the loops from using vector units
compiled = functools.partial(numba.njit, nogil=True, cache=True, fastmath={"reassoc", "contract", "arcp", "nsz"},
                             error_model="numpy")
F = np.float32


@compiled
def forward_tile(x, table, y):
    rows, channels = x.shape
    size = -(-channels // len(table))
    for group in range(len(table)):
        a0, a1, a2, a3, a4, a5, b1, b2, b3, b4 = table[group]
        lo, hi = group * size, min((group + 1) * size, channels)
        for row in range(rows):
            xs, ys = x[row, lo:hi], y[row, lo:hi]
            for c in range(hi - lo):
                v = xs[c]
                w = abs(v)
                p = ((((a5 * v + a4) * v + a3) * v + a2) * v + a1) * v + a0
                ys[c] = p / ((((b4 * w + b3) * w + b2) * w + b1) * w + F(1))


@compiled
def backward_tile(x, table, y, grad, x_grad, sums):
    rows, channels = x.shape
    size = -(-channels // len(table))
    for group in range(len(table)):
        a0, a1, a2, a3, a4, a5, b1, b2, b3, b4 = table[group]
        lo, hi = group * size, min((group + 1) * size, channels)
        for row in range(rows):
            xs, ys, gs, x_gs = x[row, lo:hi], y[row, lo:hi], grad[row, lo:hi], x_grad[row, lo:hi]
            s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = F(0)
            for c in range(hi - lo):
                v = xs[c]
                w = abs(v)
                p = ((((a5 * v + a4) * v + a3) * v + a2) * v + a1) * v + a0
                inverse = F(1) / ((((b4 * w + b3) * w + b2) * w + b1) * w + F(1))
                f = p * inverse
                ys[c] = f
                g = gs[c] * inverse
                slope_p = (((F(5) * a5 * v + F(4) * a4) * v + F(3) * a3) * v + F(2) * a2) * v + a1
                slope_q = ((F(4) * b4 * w + F(3) * b3) * w + F(2) * b2) * w + b1
                x_gs[c] = g * (slope_p - f * np.copysign(slope_q, v))
                s0 += g
                g1 = g * v
                s1 += g1
                g2 = g1 * v
                s2 += g2
                g3 = g2 * v
                s3 += g3
                g4 = g3 * v
                s4 += g4
                s5 += g4 * v
                h1 = g * f * w
                s6 -= h1
                h2 = h1 * w
                s7 -= h2
                h3 = h2 * w
                s8 -= h3
                s9 -= h3 * w
            out = sums[group]
            out[0] += s0
            out[1] += s1
            out[2] += s2
            out[3] += s3
            out[4] += s4
            out[5] += s5
            out[6] += s6
            out[7] += s7
            out[8] += s8
            out[9] += s9


# -- plain torch ------------------------------------------------------------------------------------------------------

def by_channel(table: Tensor, channels: int) -> list[Tensor]:
    """t0 … t9, each (channels,)."""
    return list(table.repeat_interleave(group_size(channels, len(table)), dim=0)[:channels].unbind(dim=1))


def horner(coefficients: list[Tensor], x: Tensor) -> Tensor:
    """c0 + c1 x + c2 x² …"""
    y = coefficients[-1]
    for c in coefficients[-2::-1]:
        y = torch.addcmul(c, y, x)
    return y


def rational_by_torch(x: Tensor, table: Tensor) -> Tensor:
    """x: (rows, channels). Differentiable."""
    t = by_channel(table, x.size(1))
    return horner(t[:N_NUMERATOR], x) / (1 + x.abs() * horner(t[N_NUMERATOR:], x.abs()))


def backward_by_torch(grad: Tensor, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        values, table = x.float().requires_grad_(), table.detach().requires_grad_()
        y = rational_by_torch(values, table)
    x_grad, table_grad = torch.autograd.grad(y, (values, table), grad.float())
    return y.detach().to(x.dtype), x_grad.to(x.dtype), table_grad


@functools.cache
def triton_kernels(device: torch.device):
    """The module of the GPU's kernels; None where Triton does not know the card, or does not work, of which it warns."""
    if torch.cuda.get_device_capability(device) < (7, 0):
        return None
    try:
        from kernels import rational_triton
        x, table = torch.ones(1, 1, device=device), torch.ones(1, N_COEFFICIENTS, device=device)
        rational_triton.backward(x, x, table)
        return rational_triton
    except Exception as error:  # no Triton, no compiler for its launcher, another driver: each its own type
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"rational functions go without Triton, slower and with more memory ({reason[:120]})", stacklevel=2)
        return None
