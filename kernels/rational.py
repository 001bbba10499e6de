"""An elementwise rational function whose coefficients are shared by groups of channels: one pass forward, one backward.

    f(x) = (c0 + c1 x + … + c5 x^5) / (1 + c6 |x| + c7 |x|² + c8 |x|³ + c9 |x|⁴)        c6 … c9 >= 0, so it has no poles

The backward pass recomputes f(x), and sums the gradients of the coefficients tile by tile, without an atomic addition per
element (Yang and Wang 2024, section 4.1, arXiv:2409.10594, measured what those cost). numba on a CPU, Triton on an NVIDIA
GPU (kernels/rational_triton.py), plain torch elsewhere; torch.compile treats both operations as opaque. The arithmetic is
fp32 whatever the dtype of the input: in fp16, x^5 overflows from x = 10 on.

The readable twins of both kernels, and the oracles of tests/test_rational.py, are `rational_torch` and
`rational_backward_torch` at the end of this file.
"""
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numba
import numpy as np
import torch
from torch import Tensor, library

# The namespace of the torch operations. Every copy of this file has its own, and an exported model contains a copy: a second
# registration under the same name destroys the first, and calling that one then reads freed memory.
NAMESPACE = "gpt_workbench_" + "".join(c if c.isalnum() else "_" for c in __name__)
N_NUMERATOR, N_DENOMINATOR = 6, 4
N_COEFFICIENTS = N_NUMERATOR + N_DENOMINATOR
ROWS = 256  # per tile on a CPU. The sums of tiles are added in a fixed order, so that threads do not change the result


def group_size(channels: int, groups: int) -> int:
    """Channels per group; the last group may have fewer."""
    return -(-channels // groups)


@library.custom_op(f"{NAMESPACE}::rational", mutates_args=())
def rational(x: Tensor, coefficients: Tensor) -> Tensor:
    """x: (rows, channels); coefficients: (groups, 10) in fp32, c0 … c9 of each group. Returns f(x) in x's dtype."""
    device, x = x.device.type, x.contiguous()
    if device == "cuda" and (kernels := triton_kernels(x.device)):
        return kernels.forward(x, coefficients)
    if device != "cpu":
        return rational_torch(x.float(), coefficients).to(x.dtype)
    y, c = torch.empty_like(x), coefficients.contiguous().numpy()
    run_tiles(lambda tile, x, y: forward_tile(x, c, y), [x], [y])
    return y


@rational.register_fake
def _(x: Tensor, coefficients: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@library.custom_op(f"{NAMESPACE}::rational_backward", mutates_args=())
def rational_backward(grad: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad: the gradient of f(x), (rows, channels). Returns f(x) and the gradient of x, both in x's dtype, and the gradient
    of the coefficients in fp32."""
    device, x = x.device.type, x.contiguous()
    if device == "cuda" and (kernels := triton_kernels(x.device)):
        return kernels.backward(grad.contiguous(), x, coefficients)
    if device != "cpu":
        return rational_backward_torch(grad, x, coefficients)
    y, x_grad, c = torch.empty_like(x), torch.empty_like(x), coefficients.contiguous().numpy()
    sums = torch.zeros(-(-len(x) // ROWS), *coefficients.shape)
    run_tiles(lambda tile, x, grad, y, x_grad: backward_tile(x, c, y, grad, x_grad, sums[tile].numpy()),
              [x, grad.contiguous()], [y, x_grad])
    return y, x_grad, sums.sum(dim=0, dtype=torch.float64).float()


@rational_backward.register_fake
def _(grad: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = lambda: torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return empty(), empty(), torch.empty_like(coefficients)


# -- GPU --------------------------------------------------------------------------------------------------------------

def triton_kernels(device: torch.device) -> ModuleType | None:
    """The module kernels/rational_triton.py; None where it does not run, and in an exported model."""
    try:
        from kernels import cards
    except ImportError:
        return None
    return cards.triton_kernels("rational_triton", device)


# -- CPU --------------------------------------------------------------------------------------------------------------

def run_tiles(kernel: Callable, inputs: list[Tensor], outputs: list[Tensor]):
    """Calls kernel(tile, *inputs, *outputs) with the rows of every tile, in as many threads as torch uses. Tensors that are
    not fp32 are converted a tile at a time."""
    is_inference = torch.is_inference_mode_enabled()  # the calling thread's mode, which those of the pool must share

    @torch.inference_mode(is_inference)
    def run_tile(tile: int):
        rows = slice(tile * ROWS, (tile + 1) * ROWS)
        ins, outs = [x[rows].float() for x in inputs], [y[rows] for y in outputs]
        fp32_outs = [y if y.dtype == torch.float32 else torch.empty(y.shape) for y in outs]
        kernel(tile, *(x.numpy() for x in ins), *(y.numpy() for y in fp32_outs))
        for y, values in zip(outs, fp32_outs):
            if y is not values:
                y.copy_(values)
    inputs = [x.detach() for x in inputs]  # gradients are off in the calling thread, but not in those of the pool
    tiles, threads = range(-(-len(inputs[0]) // ROWS)), torch.get_num_threads()
    if threads == 1 or len(tiles) == 1:
        for tile in tiles:
            run_tile(tile)
    else:
        list(thread_pool(threads).map(run_tile, tiles))


@functools.cache
def thread_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


# error_model="numpy": a check for division by zero, which cannot happen, would keep the loops from being vectorised
compiled = functools.partial(numba.njit, nogil=True, cache=True, fastmath={"reassoc", "contract", "arcp", "nsz"},
                             error_model="numpy")
F = np.float32


@compiled
def forward_tile(x, coefficients, y):
    rows, channels = x.shape
    size = -(-channels // len(coefficients))
    for group in range(len(coefficients)):
        a0, a1, a2, a3, a4, a5, b1, b2, b3, b4 = coefficients[group]
        lo, hi = group * size, min((group + 1) * size, channels)
        for row in range(rows):
            xs, ys = x[row, lo:hi], y[row, lo:hi]
            for c in range(hi - lo):
                v = xs[c]
                w = abs(v)
                p = ((((a5 * v + a4) * v + a3) * v + a2) * v + a1) * v + a0
                ys[c] = p / ((((b4 * w + b3) * w + b2) * w + b1) * w + F(1))


@compiled
def backward_tile(x, coefficients, y, grad, x_grad, sums):
    rows, channels = x.shape
    size = -(-channels // len(coefficients))
    for group in range(len(coefficients)):
        a0, a1, a2, a3, a4, a5, b1, b2, b3, b4 = coefficients[group]
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


# -- plain torch: the readable twins, and what other devices run -----------------------------------------------------

def rational_torch(x: Tensor, coefficients: Tensor) -> Tensor:
    """f(x), differentiable. x: (rows, channels); coefficients: (groups, 10)."""
    channels = x.size(1)
    by_channel = coefficients.repeat_interleave(group_size(channels, len(coefficients)), dim=0)[:channels]
    c = by_channel.unbind(dim=1)  # c0 … c9, each (channels,)
    return horner(c[:N_NUMERATOR], x) / (1 + x.abs() * horner(c[N_NUMERATOR:], x.abs()))


def rational_backward_torch(grad: Tensor, x: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rational_backward` by autograd."""
    with torch.enable_grad():
        values, coefficients = x.float().requires_grad_(), coefficients.detach().requires_grad_()
        y = rational_torch(values, coefficients)
    x_grad, coefficients_grad = torch.autograd.grad(y, (values, coefficients), grad.float())
    return y.detach().to(x.dtype), x_grad.to(x.dtype), coefficients_grad


def horner(coefficients: Sequence[Tensor], x: Tensor) -> Tensor:
    """c0 + c1 x + c2 x² …"""
    y = coefficients[-1]
    for c in coefficients[-2::-1]:
        y = torch.addcmul(c, y, x)
    return y
