"""A linear layer with an activation in front, which saves only its input for the backward pass."""
import torch
from torch import Tensor

from kernels.decode import linear


class ActivatedLinear(torch.autograd.Function):
    """linear(activation(x)). Saves x alone; activation(x), which is as large or larger, is recomputed in the backward
    pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, owner: type) -> Tensor:
        """x: (..., in), weight: (out, hidden) -> (..., out). owner: a class with the static methods activation(x),
        (..., in) -> (..., hidden), and activation_backward(grad, x), which takes the gradient of activation(x), may
        overwrite it, and returns the gradient of x."""
        ctx.save_for_backward(x, weight)
        ctx.owner = owner
        return linear(owner.activation(x), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        x_grad = ctx.owner.activation_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        hidden = ctx.owner.activation(x).flatten(0, -2).to(grad.dtype)
        return x_grad, (grad.flatten(0, -2).T @ hidden).to(weight.dtype), None
