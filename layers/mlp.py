"""Feed-forward layers: one hidden layer applied to each position by itself, (B, T, C) -> (B, T, C)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def matrix_flops(layer: nn.Module) -> int:
    """Of one position's product with every matrix of `layer`."""
    return 2 * sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)


class MLP(nn.Module):
    """Linear, `activation`, linear. The hidden layer is four times as wide as the model."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def activation(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x)))

    def flops_per_token(self, block_size: int) -> int:
        return matrix_flops(self)


class ActivatedLinear(torch.autograd.Function):
    """activation(x) times a matrix, which keeps x alone for the backward pass: the other, as large, is computed again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, mlp: "type[LeanMLP]") -> Tensor:
        """x: (..., in), weight: (out, in) -> (..., out)."""
        ctx.save_for_backward(x, weight)
        ctx.mlp = mlp
        return F.linear(mlp.activation(x), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        x_grad = ctx.mlp.activation_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        hidden = ctx.mlp.activation(x).flatten(0, -2).to(grad.dtype)
        return x_grad, (grad.flatten(0, -2).T @ hidden).to(weight.dtype), None


class LeanMLP(MLP):
    """An MLP that also knows its activation's derivative, and therefore keeps one hidden tensor where autograd keeps two."""

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        """grad: of activation(x), which may be overwritten. Returns that of x."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = ActivatedLinear.apply(self.fc(x), self.proj.weight, type(self))
        return y if self.proj.bias is None else y + self.proj.bias


class ReLU2(LeanMLP):
    """relu(x)². Source: So et al. 2021 (Primer), arXiv:2109.08668."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.relu(x).square_()

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        return grad.mul_(F.relu(x)).mul_(2)


class GELU(LeanMLP):
    """As in GPT-2. Source: Hendrycks and Gimpel 2016, arXiv:1606.08415."""

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.gelu(x)

    @staticmethod
    def activation_backward(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad, x)


class SwiGLU(nn.Module):
    """silu(gate(x)) * fc(x), then linear; three matrices, so the hidden layer is 8/3 times as wide as the model to
    have the parameters of the others. Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config):
        super().__init__()
        n_hidden = 8 * config.n_embd // 3
        self.gate = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.fc = nn.Linear(config.n_embd, n_hidden, bias=config.bias)
        self.proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.gate(x)) * self.fc(x))

    def flops_per_token(self, block_size: int) -> int:
        return matrix_flops(self)
