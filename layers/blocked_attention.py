"""Causal attention on a CPU, a block of queries at a time, in batched products: these run at the processor's full speed in
bf16, which torch's fused kernel does not, and skip most of the pairs that the mask hides."""
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

BLOCKS = {torch.float32: 64, torch.bfloat16: 256}  # queries in a block: fewer skip more, products of more are faster
FP32_LENGTHS = range(256, 2049)  # where torch's fused kernel is the slower one in fp32; in bf16 it is at any length
CHUNK_NUMEL = 2**18  # scores at a time, which stay in a core's cache with what is computed from them


def is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether BlockedCausalAttention can take the place of torch's kernel, and is faster. torch.compile would unroll it."""
    if q.device.type != "cpu" or q.shape != k.shape or torch.compiler.is_compiling():
        return False
    return q.dtype == torch.bfloat16 or q.dtype == torch.float32 and q.size(2) in FP32_LENGTHS


class BlockedCausalAttention(torch.autograd.Function):
    """softmax(q kᵀ / √head_size + causal mask) v. Saves q, k and v alone: the weights are recomputed in the backward pass
    (Dao et al. 2022, arXiv:2205.14135). In bf16, scores and weights are rounded to bf16, as in attention without a fused
    kernel."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, n_head, T, head_size), of one dtype. Returns the same shape, a view of (B, T, n_head, head_size)."""
        ctx.save_for_backward(q, k, v)
        y = q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)
        for texts, start, stop in chunks(q):
            q_part, k_part, v_part = part(q, texts, start, stop), part(k, texts, 0, stop), part(v, texts, 0, stop)
            weights = attention_weights(q_part, k_part)
            y[texts, :, start:stop] = torch.bmm(weights, v_part).unflatten(0, (-1, q.size(1)))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        q_grad, k_grad, v_grad = (torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
        for texts, start, stop in chunks(q):
            q_part, k_part, v_part = part(q, texts, start, stop), part(k, texts, 0, stop), part(v, texts, 0, stop)
            y_grad, scale = part(grad, texts, start, stop), q.size(-1) ** -0.5
            weights = attention_weights(q_part, k_part)
            score_grad = torch._softmax_backward_data(torch.bmm(y_grad, v_part.transpose(1, 2)), weights, -1, q.dtype)
            q_grad[texts, :, start:stop] = torch.bmm(score_grad, k_part).mul_(scale).unflatten(0, (-1, q.size(1)))
            for total, new in ((k_grad, torch.bmm(score_grad.transpose(1, 2), q_part).mul_(scale)),
                               (v_grad, torch.bmm(weights.transpose(1, 2), y_grad))):
                new = new.unflatten(0, (-1, q.size(1)))
                total[texts, :, :start] += new[:, :, :start]
                total[texts, :, start:stop] = new[:, :, start:]
        return q_grad, k_grad, v_grad


def chunks(q: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Texts and the first and last of their queries, (start, stop): each query once, in ascending order in each text."""
    B, n_head, T, _ = q.shape
    block = min(T, BLOCKS[q.dtype])
    n_texts = max(1, CHUNK_NUMEL // (n_head * block * T))
    for first in range(0, B, n_texts):
        for start in range(0, T, block):
            yield slice(first, first + n_texts), start, min(start + block, T)


def part(x: Tensor, texts: slice, start: int, stop: int) -> Tensor:
    """(B, n_head, T, head_size) -> (texts * n_head, stop - start, head_size)"""
    return x[texts, :, start:stop].flatten(0, 1)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """q: (N, n, head_size), the last n of the positions of k: (N, m, head_size). Returns (N, n, m)."""
    return torch.baddbmm(causal_mask(q.size(1), k.size(1), q.dtype), q, k.transpose(1, 2),
                         alpha=q.size(-1) ** -0.5).softmax(dim=-1)


@lru_cache(maxsize=8)
def causal_mask(n: int, m: int, dtype: torch.dtype) -> Tensor:
    """(n, m): 0 where the i-th of the last n positions sees the j-th of m, else -inf."""
    return torch.full((n, m), -torch.inf, dtype=dtype).triu(diagonal=m - n + 1)
