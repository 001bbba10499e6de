"""Layers that can replace every linear layer in the blocks, (..., in) -> (..., out): the dict LINEARS.

A class in it is constructed as `Layer(n_in, n_out, bias, is_hidden=False)`; is_hidden: its input is the hidden layer of an
MLP that applies no activation of its own. It has

    weight               its matrix, 2-D so that Muon can take it, with `n_basis` coefficients for each input;
                         its other parameters have other names
    unit_std             the standard deviation of `weight` that maps normal inputs of variance 1 to outputs of variance 1
    elementwise_flops    the operations of one position besides the product with `weight`
"""
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kernels.decode import copy_together, linear
from layers.kan import BSplineKAN, ChebyshevKAN, RationalKAN


class Linear(nn.Linear):
    """The plain linear layer."""
    n_basis, elementwise_flops = 1, 0

    def __init__(self, n_in: int, n_out: int, bias: bool, is_hidden: bool = False):
        super().__init__(n_in, n_out, bias)
        self.unit_std = n_in ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


LINEARS = {"linear": Linear, "grkan": RationalKAN, "chebkan": ChebyshevKAN, "bspline": BSplineKAN}
# --linear_scope: the linear layers of the blocks that are of the kind --linear, by the names in their classes; None: all
LINEAR_SCOPES = {"all": None, "values": ("mixer.proj",), "gates": ("mixer.gate", "mixer.rates", "mlp.gate")}


def linear_class(config, name: str) -> type:
    """The class of the linear layer `name` of the blocks, "mixer.proj"."""
    names = LINEAR_SCOPES[config.linear_scope]
    return LINEARS[config.linear if names is None or name in names else "linear"]


def cast_weights(weights: Iterable[nn.Parameter], dtype: torch.dtype):
    """In place, for inference."""
    weights = list(dict.fromkeys(weights))  # embedding and head may share one
    for weight, copy in zip(weights, copy_together([weight.data for weight in weights], dtype)):
        weight.requires_grad_(False)
        weight.data = copy


def linear_layers(module: nn.Module) -> list[nn.Module]:
    """Every layer in `module` that is of a class in LINEARS."""
    return [layer for layer in module.modules() if hasattr(layer, "unit_std")]


def matrix_flops(module: nn.Module) -> int:
    """FLOPs of one position's matrix products in all linear layers of `module`, forward pass."""
    return 2 * sum(layer.weight.numel() for layer in linear_layers(module))


def elementwise_flops(module: nn.Module) -> int:
    """FLOPs of one position in all linear layers of `module` besides those products, forward pass."""
    return sum(layer.elementwise_flops for layer in linear_layers(module))
