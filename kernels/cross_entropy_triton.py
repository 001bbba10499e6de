"""The loss of a chunk of logits and its gradient, for NVIDIA GPUs: layers/loss.py reads the logits twice and writes their
gradient once, where torch's operations would move them a dozen times in fp32. A program owns a row.

The readable twin is `losses_and_logit_grad_torch` in layers/loss.py; tests/test_loss.py runs this kernel against it in
Triton's interpreter, and tests/test_gpu.py on a card.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # logits of a row that are processed at a time


@triton.jit
def load_logits(pointers, inside, softcap, CAPPED: tl.constexpr):
    """The logits after the softcap, and the slope of the softcap there."""
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        sigmoid = tl.sigmoid(x * (2 / softcap))  # tanh(x) = 2 sigmoid(2x) - 1
        return softcap * (2 * sigmoid - 1), 4 * sigmoid * (1 - sigmoid)
    else:
        return x, 1.0


@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, grad_ptr, stride, classes, softcap, CAPPED: tl.constexpr,
                         NEEDS_GRAD: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    grad_ptr += row * stride
    target = tl.load(targets_ptr + row)
    largest, total = float("-inf"), 0.0  # of exp(logit - largest)
    for start in range(0, classes, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x, _ = load_logits(logits_ptr + column, column < classes, softcap, CAPPED)
        x = tl.where(column < classes, x, float("-inf"))
        largest_yet = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - largest_yet) + tl.sum(tl.exp(x - largest_yet), 0)
        largest = largest_yet
    log_total = largest + tl.log(total)
    target_logit, _ = load_logits(logits_ptr + target, True, softcap, CAPPED)
    tl.store(losses_ptr + row, log_total - target_logit)
    if NEEDS_GRAD:
        for start in range(0, stride, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            x, slope = load_logits(logits_ptr + column, column < classes, softcap, CAPPED)
            grad = (tl.exp(x - log_total) - tl.where(column == target, 1.0, 0.0)) * slope
            grad = tl.where(column < classes, grad, 0.0)  # columns that only pad the matrix
            tl.store(grad_ptr + column, grad.to(grad_ptr.dtype.element_ty), mask=column < stride)


def losses_and_logit_grad(logits: Tensor, targets: Tensor, classes: int, softcap: float,
                          needs_grad: bool) -> tuple[Tensor, Tensor]:
    """As in layers/loss.py, for contiguous logits and targets."""
    losses = torch.empty(len(logits), device=logits.device)
    grad = logits.new_empty(len(logits) * needs_grad, logits.size(1))
    if len(logits):
        cross_entropy_kernel[(len(logits),)](logits, targets, losses, grad, logits.size(1), classes, softcap, softcap != 0,
                                             needs_grad, COLUMNS, num_warps=8)
    return losses, grad


def try_out(device: torch.device):
    """Raises an exception where the kernel does not run."""
    losses_and_logit_grad(torch.ones(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device), 2, 1.0, True)
