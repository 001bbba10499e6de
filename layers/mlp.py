"""Feed-forward layers, (B, T, C) -> (B, T, C), each position by itself: the classes in the dict MLPS."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.activated_linear import ActivatedLinear
from layers.linear import LINEARS, Linear, elementwise_flops, linear_class, matrix_flops


class MLP(nn.Module):
    """Linear, `activation`, linear. The hidden layer is four times as wide as the model, unless --n_hidden is given."""
    activation_flops = 0  # per hidden unit

    def __init__(self, config, n_hidden: int | None = None):
        """n_hidden: the default width of the hidden layer."""
        super().__init__()
        self.n_hidden = config.n_hidden or n_hidden or 4 * config.n_embd
        self.fc = linear_class(config, "mlp.fc")(config.n_embd, self.n_hidden, config.bias)
        self.proj = linear_class(config, "mlp.proj")(self.n_hidden, config.n_embd, config.bias)

    def activation(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x)))

    def flops_per_token(self, block_size: int) -> int:
        return 3 * matrix_flops(self)

    def elementwise_flops_per_token(self, block_size: int) -> int:
        return 3 * (self.activation_flops * self.n_hidden + elementwise_flops(self))


class RecomputingMLP(MLP):
    """An MLP that knows the derivative of its activation, and saves one hidden tensor for the backward pass where autograd
    saves two."""

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        """grad: the gradient of activation(x), may be overwritten. Returns the gradient of x."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if type(self.proj) is not Linear:
            return super().forward(x)
        y = ActivatedLinear.apply(self.fc(x), self.proj.weight, type(self))
        return y if self.proj.bias is None else y + self.proj.bias


class ReLU2(RecomputingMLP):
    """relu(x)². Source: So et al. 2021 (Primer), arXiv:2109.08668."""
    activation_flops = 2

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.relu(x).square()

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        return grad.mul_(F.relu(x)).mul_(2)


class GELU(RecomputingMLP):
    """Source: Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    activation_flops = 5

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.gelu(x)

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad, x)


class TanhGELU(RecomputingMLP):
    """GELU's tanh approximation, as in OpenAI's GPT-2."""
    activation_flops = 8

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


class SwiGLU(MLP):
    """proj(silu(gate(x)) * fc(x)). It has three matrices, so its hidden layer is 8/3 times as wide as the model, for the
    parameters of the others. Source: Shazeer 2020, arXiv:2002.05202."""
    activation_flops = 5

    def __init__(self, config):
        super().__init__(config, 8 * config.n_embd // 3)
        self.gate = linear_class(config, "mlp.gate")(config.n_embd, self.n_hidden, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.gate(x)) * self.fc(x))


class KAN(nn.Module):
    """KAN layers in sequence; their functions are the nonlinearity. Where edges share functions: two layers with a hidden
    layer four times as wide as the model. Where every edge has its own: one layer, which has as many parameters; two if
    --n_hidden is given."""

    def __init__(self, config, kind: str):
        super().__init__()
        layer, width = LINEARS[kind], config.n_embd
        n_hidden = config.n_hidden or (4 * width if layer.n_basis == 1 else None)
        self.fc = layer(width, n_hidden, config.bias) if n_hidden else nn.Identity()
        self.proj = layer(n_hidden or width, width, config.bias, is_hidden=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.fc(x))

    def flops_per_token(self, block_size: int) -> int:
        return 3 * matrix_flops(self)

    def elementwise_flops_per_token(self, block_size: int) -> int:
        return 3 * elementwise_flops(self)
