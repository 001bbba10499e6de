"""Softcapped cross-entropy of a linear head, without materialising its logits: a chunk of rows exists at a time."""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Bytes of one chunk's logits in fp32, of which three copies exist at a time. GPUs want large products, CPUs ones that fit
# into their caches.
LOGIT_CHUNK_BYTES = {"cuda": 64 * 2**20, "cpu": 16 * 2**20}


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, reduction: str) -> Tensor:
    """x: (B, T, C), weight: (V, C), targets: (B, T). Returns the loss in nats/token: a scalar, or (B, T) with
    reduction="none", 0 where the target is negative. Sums and softmax are fp32; under autocast the products are not."""
    device = x.device.type
    rows = max(1, LOGIT_CHUNK_BYTES.get(device, LOGIT_CHUNK_BYTES["cuda"]) // (4 * weight.size(0)))
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


def softcap_logits(x: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """x: (..., C), weight: (V, C) -> logits (..., V) in fp32: softcap * tanh(logits / softcap); 0 means no cap. Source:
    Gemma Team 2024, section 2, arXiv:2408.00118."""
    logits = F.linear(x, weight).float()
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
        w = weight.to(dtype)
        total = torch.zeros((), device=x.device)
        x_grads, weight_grad = [], None
        for x_rows, target in zip(x.to(dtype).split(rows), targets.split(rows)):
            is_target = target >= 0
            losses, grad = losses_and_logit_grad((x_rows @ w.T).float(), target.clamp(min=0), softcap, needs_grad)
            total = total + (losses * is_target).sum()
            if not needs_grad:
                continue
            grad, x_rows = grad.to(dtype), x_rows * is_target[:, None]
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
            ctx.save_for_backward(torch.cat(x_grads), weight_grad, n_targets)
            ctx.x_dtype = x.dtype
        return total / n_targets

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor):
        x_grad, weight_grad, n_targets = ctx.saved_tensors
        scale = scale / n_targets
        return x_grad.to(ctx.x_dtype) * scale, weight_grad.mul_(scale), None, None, None, None


def losses_and_logit_grad(logits: Tensor, targets: Tensor, softcap: float, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """logits: (rows, V) in fp32, before the softcap, overwritten; targets: (rows,), not negative. Returns the loss of each
    row, (rows,), and its gradient with respect to the logits, (rows, V)."""
    if softcap:
        # tanh(x) = 2 sigmoid(2x) - 1 costs a third of tanh on a CPU, and softmax ignores the constant
        sigmoid = logits.mul_(2 / softcap).sigmoid_()
        logits = sigmoid * (2 * softcap)
    logprobs = logits.log_softmax(dim=-1)
    del logits
    targets = targets[:, None]
    losses = -logprobs.gather(1, targets)[:, 0]
    if not needs_grad:
        return losses, None
    grad = logprobs.exp_()  # d loss / d logits = probability, minus 1 at the target
    del logprobs
    grad.scatter_add_(1, targets, grad.new_full((1, 1), -1.0).expand_as(targets))
    if softcap:
        grad = torch.ops.aten.sigmoid_backward(grad, sigmoid).mul_(4)  # the slope of the cap is 4 sigmoid (1 - sigmoid)
    return losses, grad
