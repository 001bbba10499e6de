"""What a decoded token costs on a CPU: products of a few rows with a matrix, norms, attention of one query over a cache, and
a step of the gated delta rule.

The time of these products is that of reading the matrix, which torch does at a third of the speed of the memory (measured on
an AMD EPYC with two cores: docs/benchmarks.md). The sums are fp32, and matrices in bf16 are widened as they are read, so no
instructions for bf16 are needed. Attention and the delta rule take one call here in place of twenty and of forty.

The readable twins, and the oracles of tests/test_decode_kernels.py, are F.linear and F.rms_norm; `rotate`,
`KVCache.append` and F.scaled_dot_product_attention in layers/attention.py; and `recurrent_delta_rule` in
layers/gated_delta.py, with what its layer computes for it.
"""
import functools
import os
import platform

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

# Of a product that the kernels here take. With more, torch's are as fast, as they keep what they have read of the matrix.
MAX_ROWS = {torch.float32: 8, torch.bfloat16: 4}
CACHE_LINE = 64  # bytes


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x, (..., in), weight, (out, in), bias, (out,) -> (..., out); in autocast's dtype where that is on."""
    kernel = None if torch.is_grad_enabled() or not x.is_cpu else choose_kernel(x, weight)
    if kernel is None:
        return F.linear(x, weight, bias)
    n_out, n_in = weight.shape
    y = torch.empty((*x.shape[:-1], n_out), dtype=weight.dtype)
    set_threads()
    kernel(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // n_in, n_in, n_out)
    return y if bias is None else y + bias.to(y.dtype)


def choose_kernel(x: Tensor, weight: Tensor):
    """The kernel for this product without a gradient; None where torch's own is to be used."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    n_in = x.size(-1)
    if (dtype != weight.dtype or not 0 < x.numel() <= MAX_ROWS.get(dtype, 0) * n_in or n_in != weight.size(-1)
            or not x.is_contiguous() or not weight.is_contiguous() or is_observed(x)):
        return None
    return KERNELS.get((x.dtype, dtype)) if can_run() else None


def rms_norm_rows(x: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension of x, of a few rows."""
    if torch.is_grad_enabled() or not (x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()) or is_observed(x) \
            or not can_run() or not KERNELS:
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    y = torch.empty(x.shape)
    norm_kernel(x.data_ptr(), y.data_ptr(), x.numel() // x.size(-1), x.size(-1), eps)
    return y


def is_observed(x: Tensor) -> bool:
    """Whether torch has to see the operations on x: to compile them, to count FLOPs, to trace shapes."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or _get_current_dispatch_mode() is not None


def can_attend(q: Tensor, v: Tensor, keys: Tensor) -> bool:
    """Whether `attend` takes queries (B, n_head, T, head_size), values (B, n_kv_head, T, head_size) and cached keys
    (B, n_kv_head, max_len, head_size)."""
    are_known = keys.dtype == torch.float32 and {q.dtype, v.dtype} <= MAX_ROWS.keys()
    return (q.size(2) == 1 and q.is_cpu and not torch.is_grad_enabled() and are_known and keys.is_contiguous()
            and not is_observed(q) and can_run() and bool(KERNELS))


def attend(q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor,
           slot: int, first: int = 0) -> Tensor:
    """Attention of one token, without a mask. q: (B, n_head, 1, head_size); k and v: (B, n_kv_head, 1, head_size), in fp32
    or bf16; q and k are turned by `rotation`, and rounded to v's dtype. rotation: cosines and sines, each (1, head_size)
    fp32, see layers/attention.py. keys, values: the cache, (B, n_kv_head, max_len, head_size) fp32, which takes k and v into
    `slot`; the token sees the slots from `first` to that. Returns (B, 1, n_head * head_size) in fp32."""
    (B, n_head, _, head_size), (_, n_kv_head, max_len, _) = q.shape, keys.shape
    assert first <= slot < max_len and keys.shape == values.shape and q.dtype == k.dtype, (first, slot, keys.shape)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and v.dtype in MAX_ROWS, v.dtype
    cos, sin = rotation or no_rotation(head_size)
    y = torch.empty(B, 1, n_head * head_size)
    set_threads()
    attend_kernel(q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1),
                  v.stride(1), q.dtype == torch.float32, v.dtype == torch.float32, cos.data_ptr(), sin.data_ptr(),
                  keys.data_ptr(), values.data_ptr(), y.data_ptr(), B, n_head, n_kv_head, head_size, max_len, slot,
                  first)
    return y


def can_step(qkv: Tensor, state: Tensor) -> bool:
    """Whether `delta_step` takes queries, keys and values of one token, (B, 1, channels), and a state in fp32."""
    return (qkv.size(1) == 1 and qkv.is_cpu and not torch.is_grad_enabled() and qkv.dtype in MAX_ROWS
            and state.is_contiguous() and not is_observed(qkv) and can_run() and bool(KERNELS))


def delta_step(qkv: Tensor, v: Tensor, rates: Tensor, decay: Tensor, beta_logit: float, state: Tensor,
               turns: Tensor | None = None, angles: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gated delta rule at one token with n corrections. qkv: (B, 1, (1 + 2 n) C), the query, the n keys and the n values
    as they leave their linear layer, but for the value of the last correction, v: (B, n_head, 1, D). rates: (B, 1,
    (1 + n) n_head), the logits of each β, to which `beta_logit` is added, and of α, to which `decay`, (n_head,), is. state:
    (B, n_head, D, D), keys by values. turns: (B, 1, C / 2), by which the state turns, if it does, after it has been turned
    by `angles`, the same shape. Returns the normalised output, (B, 1, C), the next state and the next angles, all in fp32,
    and leaves what it was given as it was."""
    B, n_head, head_size, _ = state.shape
    qkv, v, rates, decay = (part.to(torch.float32).contiguous() for part in (qkv, v, rates, decay))
    new_state, y = torch.empty(state.shape), torch.empty(B, 1, n_head * head_size)
    n_steps = rates.size(-1) // n_head - 1
    assert qkv.size(-1) == (1 + 2 * n_steps) * y.size(-1) and v.numel() == y.numel(), (qkv.shape, v.shape, state.shape)
    pointers = 0, 0, 0
    if turns is not None:
        turns, angles, new_angles = turns.to(torch.float32).contiguous(), angles.contiguous(), torch.empty(angles.shape)
        assert turns.shape == angles.shape and 2 * turns.numel() == y.numel(), (turns.shape, angles.shape)
        pointers = turns.data_ptr(), angles.data_ptr(), new_angles.data_ptr()
    set_threads()
    delta_kernel(qkv.data_ptr(), v.data_ptr(), rates.data_ptr(), decay.data_ptr(), beta_logit, state.data_ptr(), *pointers,
                 new_state.data_ptr(), y.data_ptr(), B, n_head, head_size, n_steps)
    return y, new_state, None if turns is None else new_angles


@functools.cache
def no_rotation(head_size: int) -> tuple[Tensor, Tensor]:
    return torch.ones(head_size), torch.zeros(head_size)


def copy_together(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in `dtype`. On a CPU in one block of memory, for which numpy asks the operating system for pages of 2 MB: with
    pages of 4 KB, reading all of it, as every decoded token does, takes a tenth longer."""
    if not all(tensor.is_cpu for tensor in tensors):
        return [tensor.to(dtype) for tensor in tensors]
    sizes = [-(-tensor.numel() * dtype.itemsize // CACHE_LINE) * CACHE_LINE for tensor in tensors]
    block = torch.from_numpy(np.empty(sum(sizes) + CACHE_LINE, np.uint8))
    parts = block[-block.data_ptr() % CACHE_LINE:][:sum(sizes)].split(sizes)
    return [part[:tensor.numel() * dtype.itemsize].view(dtype).view(tensor.shape).copy_(tensor)
            for part, tensor in zip(parts, tensors)]


def set_threads():
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@functools.cache
def can_run() -> bool:
    """Whether the kernels run here: on processors of the kind on which they have been measured to be faster, and on
    OpenMP's threads, which several callers may use at a time, and which torch's operations use too."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    n_threads = torch.get_num_threads()
    try:
        numba.config.THREADING_LAYER = "omp"
        start_threads(np.zeros(1))
    except Exception:  # no OpenMP, a threading layer that is running already, no folder for machine code …
        return False
    finally:
        torch.set_num_threads(n_threads)  # numba asks OpenMP for all cores, and torch reads its number there
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=KERNELS.clear)  # OpenMP's threads do not survive a fork, and numba would exit
    return True


# -- numba ------------------------------------------------------------------------------------------------------------

FASTMATH = {"reassoc", "contract", "arcp", "nsz"}  # sums in any order, which vectorises them
F0, ONE_F, SIXTEEN, ONE, HALF = np.float32(0), np.float32(1), np.uint32(16), np.uint32(1), np.uint32(0x7FFF)
RMS_EPS = np.finfo(np.float32).eps  # EPS of layers/norm.py
MAGNITUDE, INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)  # of the bits of an fp32 number


def compiled(parallel: bool = False):
    """Decorator: compiled at the first call, once per machine where there is a folder to cache the machine code in."""
    def decorate(function):
        options = {"nogil": True, "parallel": parallel, "fastmath": FASTMATH, "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(**options)(function)
    return decorate


@intrinsic
def bits_to_float(typing_context, bits):
    return types.float32(types.uint32), lambda context, builder, _, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def float_to_bits(typing_context, value):
    return types.uint32(types.float32), lambda context, builder, _, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def fp32_pointer(typing_context, address):
    to = types.CPointer(types.float32)
    return to(types.int64), lambda context, builder, _, args: builder.inttoptr(args[0], context.get_value_type(to))


@intrinsic
def bf16_pointer(typing_context, address):
    to = types.CPointer(types.uint16)
    return to(types.int64), lambda context, builder, _, args: builder.inttoptr(args[0], context.get_value_type(to))


@numba.njit(inline="always")
def widen(bits):
    """bf16, as uint16 -> fp32"""
    return bits_to_float(np.uint32(bits) << SIXTEEN)


@numba.njit(inline="always")
def narrow(value):
    """fp32 -> bf16, as uint16; the nearest, of two the even one"""
    bits = float_to_bits(value)
    if bits & MAGNITUDE > INFINITY:  # NaN, which rounding could turn into another number
        return np.uint16(0x7FC0)
    return np.uint16((bits + HALF + ((bits >> SIXTEEN) & ONE)) >> SIXTEEN)


@compiled()
def normalise(x, y, scale, eps):
    """y = x, with a mean square of scale²; it may be x."""
    total = F0
    for i in range(len(x)):
        total += x[i] * x[i]
    factor = scale / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
    for i in range(len(x)):
        y[i] = factor * x[i]


@compiled()
def norm_kernel(x_address, y_address, rows, n, eps):
    x, y = numba.carray(fp32_pointer(x_address), (rows, n)), numba.carray(fp32_pointer(y_address), (rows, n))
    for row in range(rows):
        normalise(x[row], y[row], ONE_F, eps)


@compiled(parallel=True)
def start_threads(x):
    for i in numba.prange(len(x)):
        x[i] = 0.0


@compiled(parallel=True)
def gemv_fp32(x_address, weight_address, y_address, rows, n_in, n_out):
    x = numba.carray(fp32_pointer(x_address), (rows, n_in))
    weight = numba.carray(fp32_pointer(weight_address), (n_out, n_in))
    y = numba.carray(fp32_pointer(y_address), (rows, n_out))
    for o in numba.prange(n_out):
        for row in range(rows):
            total = F0
            for i in range(n_in):
                total += weight[o, i] * x[row, i]
            y[row, o] = total


@compiled(parallel=True)
def gemv_bf16(x, weight_address, y_address, n_out):
    """x: (rows, in) fp32"""
    rows, n_in = x.shape
    weight = numba.carray(bf16_pointer(weight_address), (n_out, n_in))
    y = numba.carray(bf16_pointer(y_address), (rows, n_out))
    for o in numba.prange(n_out):
        for row in range(rows):
            total = F0
            for i in range(n_in):
                total += widen(weight[o, i]) * x[row, i]
            y[row, o] = narrow(total)


@compiled()
def gemv_bf16_of_bf16(x_address, weight_address, y_address, rows, n_in, n_out):
    bits, x = numba.carray(bf16_pointer(x_address), (rows, n_in)), np.empty((rows, n_in), np.float32)
    for row in range(rows):
        for i in range(n_in):
            x[row, i] = widen(bits[row, i])
    gemv_bf16(x, weight_address, y_address, n_out)


@compiled()
def gemv_bf16_of_fp32(x_address, weight_address, y_address, rows, n_in, n_out):
    """Rounds x to bf16 first, as autocast does: a token's result is then the same in a batch too large for these kernels."""
    values, x = numba.carray(fp32_pointer(x_address), (rows, n_in)), np.empty((rows, n_in), np.float32)
    for row in range(rows):
        for i in range(n_in):
            x[row, i] = widen(narrow(values[row, i]))
    gemv_bf16(x, weight_address, y_address, n_out)


@numba.njit(inline="always")
def exp(x):
    """For x <= 0, to about 1e-7 of the result; loops over it are vectorised. 2^n e^r with |r| <= ln(2) / 2, and Taylor's
    series for e^r."""
    x = max(x, np.float32(-87))
    n = np.rint(x * np.float32(1.4426950408889634))
    r = x - n * np.float32(0.693145751953125) - n * np.float32(1.428606765330187e-06)  # ln 2 in two parts
    p = np.float32(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = p * r + np.float32(c)
    return p * bits_to_float(np.uint32(np.int32(n) + 127) << np.uint32(23))


@numba.njit(inline="always")
def wrap(angle):
    """Less whole turns."""
    n = np.rint(angle * np.float32(1 / (2 * np.pi)))
    return angle - n * np.float32(2 * np.pi)


@compiled()
def copy_head(address, offset, is_fp32, to):
    """The numbers of a head, in fp32 or bf16 from `offset` on."""
    if is_fp32:
        to[:] = numba.carray(fp32_pointer(address), offset + len(to))[offset:]
    else:
        bits = numba.carray(bf16_pointer(address), offset + len(to))
        for i in range(len(to)):
            to[i] = widen(bits[offset + i])


@compiled()
def rotate_head(x, cos, sin, is_bf16):
    """In place. is_bf16: rounds the results."""
    half = len(x) // 2
    for i in range(half):
        a, b = x[i], x[half + i]
        x[i], x[half + i] = a * cos[i] + b * sin[i], b * cos[half + i] + a * sin[half + i]
    if is_bf16:
        for i in range(len(x)):
            x[i] = widen(narrow(x[i]))


@compiled(parallel=True)
def attend_kernel(q_address, k_address, v_address, q_row, k_row, v_row, q_head, k_head, v_head, qk_fp32, v_fp32, cos_address,
                  sin_address, keys_address, values_address, y_address, B, n_head, n_kv_head, head_size, max_len, slot,
                  first):
    cos = numba.carray(fp32_pointer(cos_address), (head_size,))
    sin = numba.carray(fp32_pointer(sin_address), (head_size,))
    keys = numba.carray(fp32_pointer(keys_address), (B, n_kv_head, max_len, head_size))
    values = numba.carray(fp32_pointer(values_address), (B, n_kv_head, max_len, head_size))
    y = numba.carray(fp32_pointer(y_address), (B, n_head, head_size))
    for b in range(B):
        for head in range(n_kv_head):
            copy_head(k_address, b * k_row + head * k_head, qk_fp32, keys[b, head, slot])
            rotate_head(keys[b, head, slot], cos, sin, not v_fp32)
            copy_head(v_address, b * v_row + head * v_head, v_fp32, values[b, head, slot])
    n, scale = slot + 1 - first, np.float32(1 / np.sqrt(head_size))
    for item in numba.prange(B * n_head):
        b, head = item // n_head, item % n_head
        kv_head = head // (n_head // n_kv_head)
        q, weights, out = np.empty(head_size, np.float32), np.empty(n, np.float32), y[b, head]
        copy_head(q_address, b * q_row + head * q_head, qk_fp32, q)
        rotate_head(q, cos, sin, not v_fp32)
        most = -np.float32(np.inf)
        for t in range(n):
            score = F0
            for i in range(head_size):
                score += q[i] * keys[b, kv_head, first + t, i]
            weights[t] = score * scale
            most = max(most, weights[t])
        total = F0
        for t in range(n):
            weights[t] = exp(weights[t] - most)
            total += weights[t]
        out[:] = F0
        for t in range(n):
            weight = weights[t] / total
            for i in range(head_size):
                out[i] += weight * values[b, kv_head, first + t, i]


@numba.njit(inline="always")
def sigmoid(x):
    e = exp(-abs(x))
    return (ONE_F if x > F0 else e) / (ONE_F + e)


@compiled(parallel=True)
def delta_kernel(qkv_address, v_address, rates_address, decay_address, beta_logit, state_address, turns_address,
                 angles_address, new_angles_address, new_state_address, y_address, B, n_head, head_size, n_steps):
    half = head_size // 2
    qkv = numba.carray(fp32_pointer(qkv_address), (B, 1 + 2 * n_steps, n_head, head_size))
    last_value = numba.carray(fp32_pointer(v_address), (B, n_head, head_size))
    rates = numba.carray(fp32_pointer(rates_address), (B, 1 + n_steps, n_head))
    decay = numba.carray(fp32_pointer(decay_address), (n_head,))
    state = numba.carray(fp32_pointer(state_address), (B, n_head, head_size, head_size))
    turns = numba.carray(fp32_pointer(turns_address), (B, n_head, half))
    angles = numba.carray(fp32_pointer(angles_address), (B, n_head, half))
    new_angles = numba.carray(fp32_pointer(new_angles_address), (B, n_head, half))
    new_state = numba.carray(fp32_pointer(new_state_address), (B, n_head, head_size, head_size))
    outputs = numba.carray(fp32_pointer(y_address), (B, n_head, head_size))
    for item in numba.prange(B * n_head):
        b, head = item // n_head, item % n_head
        cos, sin, u = np.empty(head_size, np.float32), np.empty(head_size, np.float32), np.empty(head_size, np.float32)
        if turns_address != 0:
            for i in range(half):
                angle = wrap(angles[b, head, i] + wrap(turns[b, head, i]))
                new_angles[b, head, i] = angle
                cos[i] = cos[half + i] = np.cos(angle)
                sin[half + i] = np.sin(angle)
                sin[i] = -sin[half + i]
        scale = np.float32(1 / np.sqrt(head_size))
        q, k = np.empty(head_size, np.float32), np.empty(head_size, np.float32)
        normalise(qkv[b, 0, head], q, scale, RMS_EPS)
        if turns_address != 0:
            rotate_head(q, cos, sin, False)
        alpha, y, matrix = sigmoid(-rates[b, n_steps, head] - decay[head]), outputs[b, head], new_state[b, head]
        matrix[:] = state[b, head]
        for step in range(n_steps):
            normalise(qkv[b, 1 + step, head], k, scale, RMS_EPS)
            if turns_address != 0:
                rotate_head(k, cos, sin, False)
            u[:] = F0  # what the state returns for the key
            for i in range(head_size):
                for j in range(head_size):
                    u[j] += k[i] * matrix[i, j]
            beta = np.float32(2) * sigmoid(rates[b, step, head] + np.float32(beta_logit))
            for j in range(head_size):
                value = last_value[b, head, j] if step == n_steps - 1 else qkv[b, 1 + n_steps + step, head, j]
                u[j] = beta * (value - alpha * u[j])
            y[:] = F0
            for i in range(head_size):
                for j in range(head_size):
                    matrix[i, j] = alpha * matrix[i, j] + k[i] * u[j]
                    y[j] += q[i] * matrix[i, j]
            alpha = ONE_F
        normalise(y, y, ONE_F, RMS_EPS)


# dtype of x and of the product -> kernel(address of x, of weight, of y, rows, in, out)
KERNELS = {(torch.float32, torch.float32): gemv_fp32, (torch.bfloat16, torch.bfloat16): gemv_bf16_of_bf16,
           (torch.float32, torch.bfloat16): gemv_bf16_of_fp32}
