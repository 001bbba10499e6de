"""Feed-forward layers: one hidden layer applied to each position by itself, (B, T, C) -> (B, T, C)."""
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, `activation`, linear. The hidden layer is four times as wide as the model."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def activation(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x)))

    def flops_per_token(self, block_size: int) -> int:
        return 2 * sum(weight.numel() for weight in self.parameters())


class ReLU2(MLP):
    """relu(x)². Source: So et al. 2021 (Primer), arXiv:2109.08668."""

    def activation(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class GELU(MLP):
    """As in GPT-2. Source: Hendrycks and Gimpel 2016, arXiv:1606.08415."""

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class SwiGLU(nn.Module):
    """silu(gate(x)) * fc(x), then linear; three matrices, so the hidden layer is 8/3 times as wide as the model to
    have the parameters of the others. Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, n_embd: int):
        super().__init__()
        n_hidden = 8 * n_embd // 3
        self.gate = nn.Linear(n_embd, n_hidden, bias=False)
        self.fc = nn.Linear(n_embd, n_hidden, bias=False)
        self.proj = nn.Linear(n_hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.gate(x)) * self.fc(x))

    def flops_per_token(self, block_size: int) -> int:
        return 2 * sum(weight.numel() for weight in self.parameters())
