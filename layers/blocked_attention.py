"""Causal and sliding attention on a CPU, a block of queries at a time, in batched products: these run at the processor's
full speed in bf16, which torch's fused kernel does not, and skip most of the pairs that the mask or the window hides."""
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, library

NAMESPACE = "gpt_workbench_" + "".join(c if c.isalnum() else "_" for c in __name__)  # see kernels/rational.py
BLOCK = 256  # queries at a time: fewer skip more, products of more are faster
CHUNK_NUMEL = 2**18  # scores at a time, which stay in a core's cache with what is computed from them


def is_blocked(q: Tensor, k: Tensor, window: int) -> bool:
    """Whether `blocked_attention` can take the place of torch's kernel, and is faster."""
    is_faster = q.dtype == torch.bfloat16 or q.dtype == torch.float32 and window + BLOCK < q.size(2)
    return is_faster and q.device.type == "cpu" and q.shape == k.shape


@library.custom_op(f"{NAMESPACE}::causal_attention", mutates_args=())  # torch.compile would unroll its loop
def blocked_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """softmax(q kᵀ / √head_size + mask) v, all (B, n_head, T, head_size) of one dtype, where a query sees its own position
    and `window` before it; the output is a view of (B, T, n_head, head_size). The backward pass computes the weights again
    (Dao et al. 2022, arXiv:2205.14135). In bf16, scores and weights are rounded to bf16, as without a fused kernel."""
    y = empty_output(q, k, v, window)
    for texts, first, start, stop in chunks(q, window):
        q_part, k_part, v_part = part(q, texts, start, stop), part(k, texts, first, stop), part(v, texts, first, stop)
        weights = attention_weights(q_part, k_part, q.size(2), window)
        y[texts, :, start:stop] = torch.bmm(weights, v_part).unflatten(0, (-1, q.size(1)))
    return y


@blocked_attention.register_fake
def empty_output(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)


@library.custom_op(f"{NAMESPACE}::causal_attention_backward", mutates_args=())
def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """grad: of the output. Returns those of q, k and v."""
    q_grad, k_grad, v_grad = empty_grads(grad, q, k, v, window)
    scale, n_head = q.size(-1) ** -0.5, q.size(1)
    for texts, first, start, stop in chunks(q, window):
        q_part, k_part, v_part = part(q, texts, start, stop), part(k, texts, first, stop), part(v, texts, first, stop)
        y_grad, weights = part(grad, texts, start, stop), attention_weights(q_part, k_part, q.size(2), window)
        score_grad = torch._softmax_backward_data(torch.bmm(y_grad, v_part.transpose(1, 2)), weights, -1, q.dtype)
        q_grad[texts, :, start:stop] = torch.bmm(score_grad, k_part).mul_(scale).unflatten(0, (-1, n_head))
        for total, new in ((k_grad, torch.bmm(score_grad.transpose(1, 2), q_part).mul_(scale)),
                           (v_grad, torch.bmm(weights.transpose(1, 2), y_grad))):
            new = new.unflatten(0, (-1, n_head))
            total[texts, :, first:start] += new[:, :, :start - first]
            total[texts, :, start:stop] = new[:, :, start - first:]
    return q_grad, k_grad, v_grad


@attention_backward.register_fake
def empty_grads(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = (x.new_empty(x.shape) for x in (q, k, v))
    return q_grad, k_grad, v_grad


def save_inputs(ctx, inputs: tuple, output: Tensor):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


blocked_attention.register_autograd(
    lambda ctx, grad: (*attention_backward(grad, *ctx.saved_tensors, ctx.window), None), setup_context=save_inputs)


def chunks(q: Tensor, window: int) -> Iterator[tuple[slice, int, int, int]]:
    """Texts, the first position that their next queries see, and the first and last of these, (first, start, stop): each
    query once, in ascending order in each text."""
    B, n_head, T, _ = q.shape
    block = min(T, BLOCK)
    n_texts = max(1, CHUNK_NUMEL // (n_head * block * min(T, window + block)))
    for text in range(0, B, n_texts):
        for start in range(0, T, block):
            yield slice(text, text + n_texts), max(0, start - window), start, min(start + block, T)


def part(x: Tensor, texts: slice, start: int, stop: int) -> Tensor:
    """(B, n_head, T, head_size) -> (texts * n_head, stop - start, head_size)"""
    return x[texts, :, start:stop].flatten(0, 1)


def attention_weights(q: Tensor, k: Tensor, T: int, window: int) -> Tensor:
    """q: (N, n, head_size), the last n of the positions of k: (N, m, head_size), out of T. Returns (N, n, m)."""
    mask = causal_mask(q.size(1), min(T, window + q.size(1)), window, q.dtype)
    return torch.baddbmm(mask[:, mask.size(1) - k.size(1):], q, k.transpose(1, 2), alpha=q.size(-1) ** -0.5).softmax(dim=-1)


@lru_cache(maxsize=8)
def causal_mask(n: int, m: int, window: int, dtype: torch.dtype) -> Tensor:
    """(n, m): 0 where the i-th of the last n of m positions sees the j-th, itself or one of `window` before it, else -inf.
    Its last columns are the mask of fewer positions."""
    ones = torch.ones(n, m, dtype=torch.bool)
    return torch.zeros(n, m, dtype=dtype).masked_fill(ones.triu(m - n + 1) | ones.tril(m - n - window - 1), -torch.inf)
