"""Softcapped cross-entropy of a linear head, without materialising its logits: a chunk of rows exists at a time.

What is done with a chunk of logits is one kernel on an NVIDIA GPU (kernels/cross_entropy_triton.py) and plain torch
elsewhere, `losses_and_logit_grad_torch`, which is also that kernel's readable twin.
"""
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

from kernels.decode import linear

NAMESPACE = "gpt_workbench_" + "".join(c if c.isalnum() else "_" for c in __name__)  # see kernels/rational.py
# Bytes of one chunk's logits, if they were fp32. With the GPU's kernel, these and their gradient exist at a time, in the
# dtype of the products, and so they do in plain torch, which works on SLICE_BYTES of them in fp32 at a time. GPUs want large
# products, CPUs ones that fit into their caches.
LOGIT_CHUNK_BYTES = {"cuda": 128 * 2**20, "cpu": 16 * 2**20}
MAX_SMALL_SOFTCAP = 30.0  # up to which every probability is far from what fp32 rounds to 0
SLICE_BYTES = {"cuda": 32 * 2**20, "cpu": 2 * 2**20}
TILE = 64  # GPUs are slow at products with sides that are not multiples of it


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, reduction: str) -> Tensor:
    """x: (B, T, C), weight: (V, C), targets: (B, T). Returns the loss in nats/token: a scalar, or (B, T) with
    reduction="none", 0 where the target is negative. Sums and softmax are fp32; under autocast the products are not."""
    device = x.device.type
    rows = rows_within(LOGIT_CHUNK_BYTES, x, len(weight))
    if is_on_gpu(x) and rows > TILE:
        rows -= rows % TILE
    flat, flat_targets = x.flatten(0, 1), targets.flatten()
    if reduction == "mean":
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if not torch.is_grad_enabled():
            flat, weight = flat.detach(), weight.detach()  # else autograd would have the gradients computed all the same
        return ChunkedCrossEntropy.apply(flat, weight, flat_targets, softcap, dtype, rows)

    def row_losses(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(softcap_logits(x, weight, softcap), targets, reduction="none")  # (rows,)
    losses = []
    for x_rows, target in zip(flat.split(rows), flat_targets.split(rows)):
        if torch.is_grad_enabled():  # the gradient of each loss is not known yet: recompute the logits in the backward pass
            losses.append(checkpoint(row_losses, x_rows, target, use_reentrant=False, preserve_rng_state=False))
        else:
            losses.append(row_losses(x_rows, target))
    return torch.cat(losses).view_as(targets)


def is_on_gpu(x: Tensor) -> bool:
    """A function, so that bench/memory.py can trace on a CPU what a GPU would do."""
    return x.is_cuda


def rows_within(n_bytes: dict[str, int], x: Tensor, classes: int) -> int:
    """Rows of `classes` logits in fp32 that fit into as many bytes as x's device is given; at least one."""
    return max(1, n_bytes["cpu" if x.device.type == "cpu" and not is_on_gpu(x) else "cuda"] // (4 * classes))


def softcap_logits(x: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """x: (..., C), weight: (V, C) -> logits (..., V) in fp32: softcap * tanh(logits / softcap); 0 means no cap. Source:
    Gemma Team 2024, section 2, arXiv:2408.00118."""
    logits = linear(x, weight).float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy averaged over the targets that are not negative. The forward pass also computes the gradients, chunk by
    chunk, while it has the logits: the backward pass only scales them, and no product is computed twice.

    With fp16 products the gradients need no loss scale before they are summed: those of the logits are at most 1.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, softcap: float, dtype: torch.dtype, rows: int) -> Tensor:
        """x: (N, C), weight: (V, C), targets: (N,); dtype: of the products; rows: of logits in a chunk -> scalar."""
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        w, classes = weight.to(dtype), len(weight)
        if is_on_gpu(x) and classes % TILE:
            w = F.pad(w, (0, 0, 0, -classes % TILE))
        total = torch.zeros((), device=x.device)
        x_grads, weight_grad = [], None
        for x_rows, target in zip(x.to(dtype).split(rows), targets.split(rows)):
            is_target = target >= 0
            if is_on_gpu(x) or torch.compiler.is_compiling():  # which would compile every chunk again, but not operations
                losses, grad = losses_and_logit_grad(x_rows @ w.T, target.clamp(min=0), classes, softcap, needs_grad)
            else:
                losses, grad = losses_and_logit_grad_torch(x_rows @ w.T, target.clamp(min=0), softcap, needs_grad)
            total = total + (losses * is_target).sum()
            if not needs_grad:
                continue
            x_rows = x_rows * is_target[:, None]
            x_grads.append((grad @ w).mul_(is_target[:, None]))
            if weight_grad is None:
                weight_grad = (grad.T @ x_rows).to(weight.dtype)
            elif dtype == weight.dtype:
                weight_grad.addmm_(grad.T, x_rows)
            else:
                weight_grad += grad.T @ x_rows
            del grad  # or it would be alive while the next chunk's logits are made
        n_targets = (targets >= 0).sum().clamp(min=1)
        if needs_grad:
            ctx.save_for_backward(torch.cat(x_grads), weight_grad[:classes], n_targets)
            ctx.x_dtype = x.dtype
        return total / n_targets

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor):
        x_grad, weight_grad, n_targets = ctx.saved_tensors
        scale = scale / n_targets
        return x_grad.to(ctx.x_dtype) * scale, weight_grad.mul_(scale), None, None, None, None


@library.custom_op(f"{NAMESPACE}::losses_and_logit_grad", mutates_args=())
def losses_and_logit_grad(logits: Tensor, targets: Tensor, classes: int, softcap: float,
                          needs_grad: bool) -> tuple[Tensor, Tensor]:
    """logits: (rows, V or more), before the softcap, of which the first `classes` = V columns count; targets: (rows,), not
    negative. Returns the loss of each row, (rows,) in fp32, and its gradient with respect to the logits in their dtype, 0 in
    further columns; without rows unless `needs_grad`."""
    if logits.is_cuda and (kernels := triton_kernels(logits.device)):
        return kernels.losses_and_logit_grad(logits, targets, classes, softcap, needs_grad)
    losses, grad = losses_and_logit_grad_torch(logits[:, :classes].clone(), targets, softcap, needs_grad)
    if grad is None:
        return losses, logits.new_empty(0, logits.size(1))
    return losses, F.pad(grad, (0, logits.size(1) - classes))


@losses_and_logit_grad.register_fake
def _(logits: Tensor, targets: Tensor, classes: int, softcap: float, needs_grad: bool) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.size(0), dtype=torch.float32)
    return losses, torch.empty_like(logits) if needs_grad else logits.new_empty(0, logits.size(1))


def triton_kernels(device: torch.device) -> ModuleType | None:
    """The module kernels/cross_entropy_triton.py; None where it does not run, and in an exported model."""
    try:
        from kernels import cards
    except ImportError:
        return None
    return cards.triton_kernels("cross_entropy_triton", device)


def losses_and_logit_grad_torch(logits: Tensor, targets: Tensor, softcap: float,
                                needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """`losses_and_logit_grad` of logits (rows, V), which the gradient overwrites."""
    rows = rows_within(SLICE_BYTES, logits, logits.size(1))
    losses = torch.cat([softmax_losses(part, target, softcap, needs_grad)
                        for part, target in zip(logits.split(rows), targets.split(rows))])
    return losses, logits if needs_grad else None


def softmax_losses(logits: Tensor, targets: Tensor, softcap: float, needs_grad: bool) -> Tensor:
    """The losses of these rows, (rows,) in fp32. Their gradient overwrites the logits if `needs_grad`."""
    x, targets = logits.to(torch.float32, copy=True), targets[:, None]
    if softcap:
        # tanh(x) = 2 sigmoid(2x) - 1 costs a third of tanh on a CPU, and softmax ignores the constant
        sigmoid = x.mul_(2 / softcap).sigmoid_()
        x = sigmoid * (2 * softcap)
    if 0 < softcap <= MAX_SMALL_SOFTCAP:
        grad = x.softmax(dim=-1)
        losses = -grad.gather(1, targets)[:, 0].log()
    else:
        logprobs = x.log_softmax(dim=-1)
        losses = -logprobs.gather(1, targets)[:, 0]
        grad = logprobs.exp_() if needs_grad else None
    if needs_grad:  # d loss / d logits = probability, minus 1 at the target
        grad.scatter_add_(1, targets, grad.new_full((1, 1), -1.0).expand_as(targets))
        if softcap:  # the slope of the cap is 4 sigmoid (1 - sigmoid)
            grad = torch.ops.aten.sigmoid_backward(grad, sigmoid).mul_(4)
        logits.copy_(grad)
    return losses
