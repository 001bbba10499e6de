"""Kolmogorov-Arnold layers, (..., in) -> (..., out): each output is a sum over the inputs of learned functions of them.

Every layer here is a set of basis functions of each input, followed by one matrix of coefficients; each can stand wherever a
linear layer can (layers/linear.py). The basis is computed in fp32 also under autocast, and recomputed in the backward pass
rather than saved.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.decode import linear
from kernels.rational import group_size, rational, rational_backward
from layers.activated_linear import ActivatedLinear
from layers.norm import rms_norm

# -- rational functions -----------------------------------------------------------------------------------------------

GROUPS = 8  # groups of channels; those of a group share a rational function
# Numerator and denominator of x, and of swish to within 1e-4 on -3 … 3
IDENTITY = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)
SWISH = (0.0, 0.5, 0.25, 0.05326628, 0.00580303, 0.0002752), (0.0, 0.10652899, 0.0, 0.00055023)
MIN_DENOMINATOR = 1e-4  # least |b|: at 0 its gradient is 0, so it would stay there. At x = 3 it changes the identity by 1 %
# √E[x^2k] for a normal x. Coefficients are learned times this, so that one learning rate suits x and x^5.
MONOMIAL_RMS = [math.prod(range(1, 2 * k, 2)) ** 0.5 for k in range(6)]


class RationalKAN(nn.Module):
    """y_j = Σ_i w_ji f(x_i), with a safe rational f, (Σ_{0..5} a_k x^k) / (1 + Σ_{1..4} |b_k| |x|^k), for each group of
    channels. f is initialised to swish on a hidden layer and to the identity elsewhere. Source: Yang and Wang 2024 (GR-KAN),
    arXiv:2409.10594; Molina et al. 2020 (safe Padé units), arXiv:1907.06732."""
    n_basis = 1

    def __init__(self, n_in: int, n_out: int, bias: bool, is_hidden: bool = False):
        super().__init__()
        groups = -(-n_in // group_size(n_in, min(GROUPS, n_in)))
        numerator, denominator = SWISH if is_hidden else IDENTITY
        denominator = [max(b, MIN_DENOMINATOR) for b in denominator]
        self.init_buffers()
        self.numerator = nn.Parameter(torch.tensor([numerator] * groups) * self.scales[:6])        # (groups, 6)
        self.denominator = nn.Parameter(torch.tensor([denominator] * groups) * self.scales[6:])    # (groups, 4)
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.unit_std = (n_in * second_moment(lambda x: x / (1 + np.exp(-x)) if is_hidden else x)) ** -0.5
        self.elementwise_flops = 20 * n_in  # 10 for the numerator, 9 for the denominator, a division

    def init_buffers(self):
        self.register_buffer("scales", torch.tensor(MONOMIAL_RMS + MONOMIAL_RMS[1:5]), persistent=False)

    def coefficients(self) -> Tensor:
        """a_0 … a_5, |b_1| … |b_4| of each group, (groups, 10)."""
        return torch.cat((self.numerator, self.denominator.abs()), dim=1).float() / self.scales

    def forward(self, x: Tensor) -> Tensor:
        y = RationalLinear.apply(x, self.coefficients(), self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RationalLinear(torch.autograd.Function):
    """linear(f(x)) with rational functions f, which saves x alone for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, coefficients: Tensor, weight: Tensor) -> Tensor:
        """x: (..., in), coefficients: (groups, 10), weight: (out, in) -> (..., out)."""
        ctx.save_for_backward(x, coefficients, weight)
        return linear(rational(x.flatten(0, -2), coefficients).view_as(x), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, coefficients, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        y, x_grad, coefficients_grad = rational_backward(rows @ weight.to(grad.dtype), x.flatten(0, -2), coefficients)
        return x_grad.view_as(x), coefficients_grad, (rows.T @ y.to(grad.dtype)).to(weight.dtype)


# -- fixed basis functions --------------------------------------------------------------------------------------------

# With eight coefficients on every edge, a layer has the parameters of an MLP whose hidden layer is four times as wide.
DEGREE = 8        # degree of the Chebyshev polynomials
KNOT_STEP = 1.5   # distance between the knots of the B-splines, which cover -3 … 3
CENTERS = tuple(KNOT_STEP * i for i in range(-3, 4))


class BasisKAN(nn.Module):
    """y_j = Σ_i Σ_k c_jik φ_k(x_i): all edges share the basis functions φ, each edge has its own coefficients c. The input
    is first scaled to mean square 1, because the basis covers a fixed range. `weight` holds the coefficients, (out,
    n_basis * in)."""
    n_basis: int
    elementwise_per_input: int

    def __init__(self, n_in: int, n_out: int, bias: bool, is_hidden: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, self.n_basis * n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.unit_std = (n_in * second_moment(self.basis_numpy)) ** -0.5
        self.elementwise_flops = self.elementwise_per_input * n_in

    @classmethod
    def basis_numpy(cls, x: np.ndarray) -> np.ndarray:
        """(n,) -> (n, n_basis), without torch: a model on torch's meta device computes nothing."""
        raise NotImplementedError

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        """(..., in) -> (..., n_basis * in), first φ_1 of all inputs, then φ_2 of all."""
        raise NotImplementedError

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        """grad: the gradient of activation(x), (..., n_basis * in). Returns the gradient of x."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = ActivatedLinear.apply(rms_norm(x), self.weight, type(self))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class ChebyshevKAN(BasisKAN):
    """φ_k(x) = T_k(tanh x) / k², k = 1 … 8, with the Chebyshev polynomials T_k; T_0 would be a bias. Without k² they are so
    steep that gradients grow by a factor of 4 in every layer, with it by 1.2. Source: Sidharth et al. 2024,
    arXiv:2405.07200."""
    n_basis = DEGREE
    elementwise_per_input = 3 * DEGREE

    @classmethod
    def basis_numpy(cls, x: np.ndarray) -> np.ndarray:
        k = np.arange(1, DEGREE + 1)
        return np.cos(k * np.arccos(np.tanh(x))[:, None]) / k**2

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        t = torch.tanh(x)
        previous, current, twice = torch.ones_like(t), t, 2 * t
        values = [t]
        for k in range(2, DEGREE + 1):
            previous, current = current, torch.addcmul(-previous, twice, current)  # T_k = 2 t T_{k-1} - T_{k-2}
            values.append(current / k**2)
        return torch.cat(values, dim=-1)

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        t = torch.tanh(x)
        previous, current, twice = torch.zeros_like(t), torch.ones_like(t), 2 * t
        t_grad = torch.zeros_like(t)
        for k, grad_k in enumerate(grad.chunk(DEGREE, dim=-1), start=1):
            t_grad.addcmul_(grad_k, current, value=1 / k)  # dT_k / dt = k U_{k-1}, the polynomials of the second kind
            previous, current = current, torch.addcmul(-previous, twice, current)
        return t_grad * (1 - t * t)


class BSplineKAN(BasisKAN):
    """silu(x), and the seven cubic B-splines with uniform knots that sum to 1 on -3 … 3 and fade to 0 outside. The reference
    for fidelity to Liu et al. 2024 (KAN), arXiv:2404.19756, section 2.2; not made for speed. With uniform knots the splines
    are shifted copies of one function: de Boor 1978."""
    n_basis = 1 + len(CENTERS)
    elementwise_per_input = 4 + 14 * len(CENTERS)

    @classmethod
    def basis_numpy(cls, x: np.ndarray) -> np.ndarray:
        u = abs(x[:, None] - np.array(CENTERS)) / KNOT_STEP
        return np.column_stack((x / (1 + np.exp(-x)), (np.maximum(2 - u, 0)**3 - 4 * np.maximum(1 - u, 0)**3) / 6))

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        values = [F.silu(x)]
        for center in CENTERS:
            u = ((x - center) / KNOT_STEP).abs()
            values.append(((2 - u).relu_()**3 - 4 * (1 - u).relu_()**3) / 6)
        return torch.cat(values, dim=-1)

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        silu_grad, *spline_grads = grad.chunk(1 + len(CENTERS), dim=-1)
        s = torch.sigmoid(x)
        x_grad = silu_grad * s * (1 + x * (1 - s))
        for center, spline_grad in zip(CENTERS, spline_grads):
            u = (x - center) / KNOT_STEP
            wide, narrow = (2 - u.abs()).relu_(), (1 - u.abs()).relu_()
            x_grad.addcmul_(spline_grad, u.sign() * (2 * narrow.square() - 0.5 * wide.square()), value=1 / KNOT_STEP)
        return x_grad


def second_moment(f) -> float:
    """E[f(x)²] for a normal x, summed over the values if f returns several for each x. f: (n,) -> (n,) or (n, values)."""
    x = np.linspace(-8, 8, 4001)
    density = np.exp(-x**2 / 2)
    return float((np.square(f(x)).reshape(len(x), -1).sum(axis=1) * density).sum() / density.sum())
