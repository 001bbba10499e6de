"""The plain linear layer, (..., in) -> (..., out), and one with an activation before it that keeps little.

What can take the place of every linear layer is in LINEARS of layers/kan.py. Each is made as `Linear(n_in, n_out, bias,
is_hidden)`, where is_hidden says that its input is the hidden layer of an MLP without an activation of its own. Its matrix,
2-D so that Muon may have it, is `weight`, with `terms` numbers for each input; what else it learns has other names.
`unit_std` is the standard deviation of the matrix at which outputs have variance 1 if inputs are normal with variance 1,
and `elementwise_flops` what one position costs beside the product with the matrix.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    terms, elementwise_flops = 1, 0

    def __init__(self, n_in: int, n_out: int, bias: bool, is_hidden: bool = False):
        super().__init__(n_in, n_out, bias)
        self.unit_std = n_in ** -0.5


def matrix_flops(layer: nn.Module) -> int:
    """Of one position's product with the matrices of all linear layers in `layer`."""
    return 2 * sum(part.weight.numel() for part in linear_layers(layer))


def elementwise_flops(layer: nn.Module) -> int:
    """Of one position in all linear layers in `layer`, beside those products."""
    return sum(part.elementwise_flops for part in linear_layers(layer))


def linear_layers(layer: nn.Module) -> list[nn.Module]:
    return [part for part in layer.modules() if hasattr(part, "unit_std")]


class ActivatedLinear(torch.autograd.Function):
    """activation(x) times a matrix, which keeps x alone for the backward pass: the other, as large or larger, is computed
    again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, owner: type) -> Tensor:
        """x: (..., in), weight: (out, hidden) -> (..., out). owner: has activation(x), (..., in) -> (..., hidden), and
        activation_backward(grad, x), which may overwrite the gradient of activation(x) and returns that of x."""
        ctx.save_for_backward(x, weight)
        ctx.owner = owner
        return F.linear(owner.activation(x), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        x_grad = ctx.owner.activation_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        hidden = ctx.owner.activation(x).flatten(0, -2).to(grad.dtype)
        return x_grad, (grad.flatten(0, -2).T @ hidden).to(weight.dtype), None
