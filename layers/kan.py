"""Kolmogorov-Arnold layers, (..., in) -> (..., out): each output is a sum over the inputs of functions that are learnt.
LINEARS has them, and the plain linear layer, in whose place each of them can stand.

Whatever the functions are made of, a layer is some functions of each input, times one matrix. They are computed in fp32
under autocast too, and again in the backward pass rather than kept.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rational import group_size, rational, rational_backward
from layers.linear import ActivatedLinear, Linear
from layers.norm import rms_norm

GROUPS = 8   # of channels that share a rational function
# With eight terms on every edge, a layer has the parameters of an MLP whose hidden layer is four times as wide as the model.
DEGREE = 8   # of the Chebyshev polynomials
STEP = 1.5   # between the knots of the B-splines, which cover -3 … 3
CENTERS = tuple(STEP * i for i in range(-3, 4))
# Numerator and denominator of x, and of swish to within 1e-4 on -3 … 3
IDENTITY = (0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)
SWISH = (0.0, 0.5, 0.25, 0.05326628, 0.00580303, 0.0002752), (0.0, 0.10652899, 0.0, 0.00055023)
LEAST_DENOMINATOR = 1e-4  # of |b|, whose gradient at 0 is 0: it would stay there. At x = 3 it takes 1 % off what x starts as
# √E[x^2k] for a normal x. Coefficients are learnt times this, so that one learning rate suits the first and the fifth power.
POWERS = [math.prod(range(1, 2 * k, 2)) ** 0.5 for k in range(6)]


def second_moment(f) -> float:
    """E[f(x)²] for a normal x, summed where f returns several values for each x. f: (n,) -> (n,) or (n, values)."""
    x = np.linspace(-8, 8, 4001)
    density = np.exp(-x**2 / 2)
    return float((np.square(f(x)).reshape(len(x), -1).sum(axis=1) * density).sum() / density.sum())


# -- rational functions -----------------------------------------------------------------------------------------------

class RationalLinear(torch.autograd.Function):
    """Rational functions of x times a matrix, which keeps x alone for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, weight: Tensor) -> Tensor:
        """x: (..., in), table: (groups, 10), weight: (out, in) -> (..., out)."""
        ctx.save_for_backward(x, table, weight)
        return F.linear(rational(x.flatten(0, -2), table).view_as(x), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, table, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        y, x_grad, table_grad = rational_backward(rows @ weight.to(grad.dtype), x.flatten(0, -2), table)
        return x_grad.view_as(x), table_grad, (rows.T @ y.to(grad.dtype)).to(weight.dtype)


class RationalKAN(nn.Module):
    """y_j = Σ_i w_ji f(x_i), with a safe rational f, (Σ_{0..5} a_k x^k) / (1 + Σ_{1..4} |b_k| |x|^k), for each group of
    channels. f starts as swish on a hidden layer, elsewhere as the identity. Source: Yang and Wang 2024 (GR-KAN),
    arXiv:2409.10594; Molina et al. 2020 (safe Padé units), arXiv:1907.06732."""
    terms = 1

    def __init__(self, n_in: int, n_out: int, bias: bool, is_hidden: bool = False):
        super().__init__()
        groups = -(-n_in // group_size(n_in, min(GROUPS, n_in)))
        numerator, denominator = SWISH if is_hidden else IDENTITY
        denominator = [max(b, LEAST_DENOMINATOR) for b in denominator]
        self.init_buffers()
        self.numerator = nn.Parameter(torch.tensor([numerator] * groups) * self.sizes[:6])        # (groups, 6)
        self.denominator = nn.Parameter(torch.tensor([denominator] * groups) * self.sizes[6:])    # (groups, 4)
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.unit_std = (n_in * second_moment(lambda x: x / (1 + np.exp(-x)) if is_hidden else x)) ** -0.5
        self.elementwise_flops = 20 * n_in  # 10 for the numerator, 9 for the denominator, a division

    def init_buffers(self):
        self.register_buffer("sizes", torch.tensor(POWERS + POWERS[1:5]), persistent=False)

    def table(self) -> Tensor:
        """a_0 … a_5, |b_1| … |b_4| of each group, (groups, 10)."""
        return torch.cat((self.numerator, self.denominator.abs()), dim=1).float() / self.sizes

    def forward(self, x: Tensor) -> Tensor:
        y = RationalLinear.apply(x, self.table(), self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# -- fixed functions of each input ------------------------------------------------------------------------------------

class BasisKAN(nn.Module):
    """y_j = Σ_i Σ_k c_jik φ_k(x_i): functions φ that all edges share, coefficients that none do. What comes in is scaled to
    mean square 1 first, since the functions cover a fixed range. `weight` has the coefficients, (out, terms * in)."""
    terms: int
    elementwise_per_input: int

    def __init__(self, n_in: int, n_out: int, bias: bool, is_hidden: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, self.terms * n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.unit_std = (n_in * second_moment(self.of_numpy)) ** -0.5
        self.elementwise_flops = self.elementwise_per_input * n_in

    @classmethod
    def of_numpy(cls, x: np.ndarray) -> np.ndarray:
        """(n,) -> (n, terms), without torch: a model may be made on torch's meta device, where nothing is computed."""
        raise NotImplementedError

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        """(..., in) -> (..., terms * in), first φ_1 of all inputs, then φ_2 of all."""
        raise NotImplementedError

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        """grad: (..., terms * in), of activation(x). Returns that of x."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = ActivatedLinear.apply(rms_norm(x), self.weight, type(self))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class ChebyshevKAN(BasisKAN):
    """φ_k(x) = T_k(tanh x) / k², k = 1 … 8, T_k the Chebyshev polynomials; T_0 would add a bias. Without k² they are so
    steep that gradients grow by 4 in every layer, with it by 1.2. Source: Sidharth et al. 2024, arXiv:2405.07200."""
    terms = DEGREE
    elementwise_per_input = 3 * DEGREE

    @classmethod
    def of_numpy(cls, x: np.ndarray) -> np.ndarray:
        k = np.arange(1, DEGREE + 1)
        return np.cos(k * np.arccos(np.tanh(x))[:, None]) / k**2

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        t = torch.tanh(x)
        before, now, twice = torch.ones_like(t), t, 2 * t
        values = [t]
        for k in range(2, DEGREE + 1):
            before, now = now, torch.addcmul(-before, twice, now)  # T_k = 2 t T_{k-1} - T_{k-2}
            values.append(now / k**2)
        return torch.cat(values, dim=-1)

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        t = torch.tanh(x)
        before, now, twice = torch.zeros_like(t), torch.ones_like(t), 2 * t
        total = torch.zeros_like(t)
        for k, part in enumerate(grad.chunk(DEGREE, dim=-1), start=1):
            total.addcmul_(part, now, value=1 / k)  # dT_k / dt = k U_{k-1}, the polynomials of the second kind
            before, now = now, torch.addcmul(-before, twice, now)
        return total * (1 - t * t)


class BSplineKAN(BasisKAN):
    """silu(x), and the seven cubic B-splines of evenly spaced knots that sum to 1 on -3 … 3; they fade to 0 outside. The
    reference for fidelity to Liu et al. 2024 (KAN), arXiv:2404.19756, section 2.2; not made for speed. Of evenly spaced
    knots the splines are one function, shifted: de Boor 1978."""
    terms = 1 + len(CENTERS)
    elementwise_per_input = 4 + 14 * len(CENTERS)

    @classmethod
    def of_numpy(cls, x: np.ndarray) -> np.ndarray:
        u = abs(x[:, None] - np.array(CENTERS)) / STEP
        return np.column_stack((x / (1 + np.exp(-x)), (np.maximum(2 - u, 0)**3 - 4 * np.maximum(1 - u, 0)**3) / 6))

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        values = [F.silu(x)]
        for center in CENTERS:
            u = ((x - center) / STEP).abs()
            values.append(((2 - u).relu_()**3 - 4 * (1 - u).relu_()**3) / 6)
        return torch.cat(values, dim=-1)

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        base, *parts = grad.chunk(1 + len(CENTERS), dim=-1)
        s = torch.sigmoid(x)
        total = base * s * (1 + x * (1 - s))
        for center, part in zip(CENTERS, parts):
            u = (x - center) / STEP
            wide, narrow = (2 - u.abs()).relu_(), (1 - u.abs()).relu_()
            total.addcmul_(part, u.sign() * (2 * narrow.square() - 0.5 * wide.square()), value=1 / STEP)
        return total


LINEARS = {"linear": Linear, "grkan": RationalKAN, "chebkan": ChebyshevKAN, "bspline": BSplineKAN}
