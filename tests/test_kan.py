"""KAN layers against their definitions edge by edge, and as the linear layers of a model."""
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from layers import LINEARS, MIXERS, MLPS
from layers.kan import CENTERS, SWISH, BSplineKAN, ChebyshevKAN, RationalKAN
from layers.linear import elementwise_flops, linear_layers, matrix_flops
from layers.norm import rms_norm
from model import DELTA_RULES, GPT, GPTConfig
from optimizer import OptimizerConfig, make_optimizer
from runtime.config import BadInput

KNOTS = 1.5 * torch.arange(-5, 6, dtype=torch.double)
KANS = {kind: layer for kind, layer in LINEARS.items() if kind != "linear"}


def cox_de_boor(x: torch.Tensor, knots: torch.Tensor, order: int) -> torch.Tensor:
    """B-splines of degree `order` at x (...) by their recursive definition: (..., len(knots) - order - 1)."""
    x = x.unsqueeze(-1)
    basis = ((x >= knots[:-1]) & (x < knots[1:])).to(x.dtype)
    for k in range(1, order + 1):
        rise = (x - knots[:-k - 1]) / (knots[k:-1] - knots[:-k - 1])
        fall = (knots[k + 1:] - x) / (knots[k + 1:] - knots[1:-k])
        basis = rise * basis[..., :-1] + fall * basis[..., 1:]
    return basis


def edge_function(layer, i: int, j: int, x: float) -> float:
    """The function on the edge from input i to output j, by its definition."""
    n_in = layer.weight.size(1) // layer.n_basis
    coefficients = layer.weight[j].view(layer.n_basis, n_in)[:, i].tolist()
    if isinstance(layer, RationalKAN):
        group = i // math.ceil(n_in / len(layer.numerator))
        a = (layer.numerator[group] / layer.scales[:6]).tolist()
        b = (layer.denominator[group] / layer.scales[6:]).tolist()
        numerator = sum(c * x**k for k, c in enumerate(a))
        return coefficients[0] * numerator / (1 + sum(abs(c) * abs(x)**k for k, c in enumerate(b, start=1)))
    if isinstance(layer, ChebyshevKAN):
        return sum(c * math.cos(k * math.acos(math.tanh(x))) / k**2 for k, c in enumerate(coefficients, start=1))
    splines = cox_de_boor(torch.tensor(x, dtype=torch.double), KNOTS, 3).tolist()
    return sum(c * value for c, value in zip(coefficients, [x / (1 + math.exp(-x)), *splines]))


def random_layer(kind: str, n_in: int, n_out: int, bias: bool = True, is_hidden: bool = True):
    torch.manual_seed(0)
    layer = KANS[kind](n_in, n_out, bias, is_hidden)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("weight", "bias"):
                parameter.normal_()
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


@pytest.mark.parametrize("kind", KANS)
@pytest.mark.parametrize("n_in", [1, 3, 10, 16])  # fewer channels than groups, groups of several sizes, and of one
@torch.no_grad()
def test_a_layer_is_a_sum_over_edges(kind, n_in):
    layer, x = random_layer(kind, n_in, 4), 2 * torch.randn(2, 5, n_in)
    inputs = x if kind == "grkan" else rms_norm(x)
    expected = [[[layer.bias[j].item() + sum(edge_function(layer, i, j, row[i].item()) for i in range(n_in))
                  for j in range(4)] for row in rows] for rows in inputs]
    assert torch.allclose(layer(x), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KANS)
def test_hand_written_gradients_equal_autograd(kind):
    layer, x = random_layer(kind, 10, 4), torch.randn(3, 5, 10, requires_grad=True)
    parameters = [x, *layer.parameters()]
    if kind == "grkan":
        a, b = ((part / scales).repeat_interleave(2, dim=0) for part, scales in (
            (layer.numerator, layer.scales[:6]), (layer.denominator, layer.scales[6:])))
        basis = sum(a[:, k] * x**k for k in range(6)) / (1 + sum(b[:, k].abs() * x.abs()**(k + 1) for k in range(4)))
    else:
        basis = layer.activation(rms_norm(x))
    expected = F.linear(basis, layer.weight, layer.bias)
    weights = torch.randn_like(expected)
    for got, want in zip(torch.autograd.grad((layer(x) * weights).sum(), parameters),
                         torch.autograd.grad((expected * weights).sum(), parameters)):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
        assert want.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["chebkan", "bspline"])
def test_gradients_equal_finite_differences(kind):
    x = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(random_layer(kind, 3, 2).double(), x)


@torch.no_grad()
def test_closed_form_splines_equal_the_recursion():
    x = torch.linspace(-8, 8, 1001, dtype=torch.double)
    splines = BSplineKAN.activation(x[:, None])[:, 1:]
    assert torch.allclose(splines, cox_de_boor(x, KNOTS, 3), atol=1e-12)
    inside = x.abs() < 3
    assert torch.allclose(splines[inside].sum(dim=1), torch.ones(inside.sum(), dtype=torch.double))
    assert (splines[x.abs() >= 7.5] == 0).all()


@torch.no_grad()
def test_chebyshev_by_hand():
    """T_2 = 2t² - 1, T_3 = 4t³ - 3t, at t = tanh(atanh(1/2)) = 1/2."""
    basis = ChebyshevKAN.activation(torch.tensor([[math.atanh(0.5)]]))[0]
    assert torch.allclose(basis[:3] * torch.tensor([1.0, 4.0, 9.0]), torch.tensor([0.5, -0.5, -1.0]), atol=1e-6)


@pytest.mark.parametrize("kind", ["chebkan", "bspline"])
def test_numpy_basis_equals_torch_basis(kind):
    x = np.linspace(-4, 4, 101)
    assert np.allclose(KANS[kind].basis_numpy(x), KANS[kind].activation(torch.from_numpy(x)[:, None]).numpy(), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("is_hidden, function, tolerance", [(False, lambda x: x, 0.05), (True, F.silu, 0.03)])
def test_rational_functions_start_as_the_identity_and_as_swish(is_hidden, function, tolerance):
    """Nearly: no |b| may be 0."""
    x, layer = torch.linspace(-3, 3, 601)[:, None], RationalKAN(1, 1, False, is_hidden)
    layer.weight.fill_(1)
    assert torch.allclose(layer(x), function(x), atol=tolerance)


def test_swish_coefficients():
    x = np.linspace(-3, 3, 301)
    fit = sum(a * x**k for k, a in enumerate(SWISH[0])) / (1 + sum(abs(b) * abs(x)**k for k, b in enumerate(SWISH[1], 1)))
    assert abs(fit - x / (1 + np.exp(-x))).max() < 1e-4


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("is_hidden", [False, True])
@torch.no_grad()
def test_outputs_have_variance_1_at_unit_std(kind, is_hidden):
    torch.manual_seed(0)
    layer = LINEARS[kind](400, 300, False, is_hidden)
    layer.weight.normal_(std=layer.unit_std)
    assert layer(torch.randn(200, 400)).var().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("kind, max_growth", [("grkan", 2), ("bspline", 2), ("chebkan", 15)])
def test_a_deep_stack_neither_explodes_nor_vanishes(kind, max_growth):
    """Activations and gradients through 12 layers. Steep functions make gradients grow, by at most 1.25 per layer."""
    torch.manual_seed(0)
    x = start = torch.randn(64, 128, requires_grad=True)
    for _ in range(12):
        layer = KANS[kind](128, 128, False)
        torch.nn.init.normal_(layer.weight, std=layer.unit_std)
        x = layer(x)
    assert 0.5 < x.std() / start.std() < 2
    grad, = torch.autograd.grad(x, start, torch.randn_like(x))
    assert 0.2 < grad.std() < max_growth


@pytest.mark.parametrize("is_hidden", [False, True])
def test_every_coefficient_starts_with_a_gradient(is_hidden):
    """The gradient of |b| at 0 is 0, which would freeze a denominator forever."""
    layer, x = RationalKAN(16, 16, False, is_hidden), torch.randn(64, 16)
    torch.nn.init.normal_(layer.weight)
    (layer(x) * torch.randn(64, 16)).sum().backward()
    assert (layer.numerator.grad != 0).all() and (layer.denominator.grad != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KANS)
def test_half_precision_computes_the_basis_in_fp32(kind, dtype):
    """In fp16 x^5 overflows from x = 10 on: 12 % of the outputs were not finite at this size."""
    layer, x = random_layer(kind, 32, 16), (30 * torch.randn(256, 32)).to(dtype)
    expected = layer(x.float())
    expected.square().mean().backward()
    grads = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype and torch.isfinite(y).all()
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    for parameter, grad in zip(layer.parameters(), grads):
        assert torch.isfinite(parameter.grad).all() and (parameter.grad - grad).norm() < 0.05 * grad.norm()


@pytest.mark.parametrize("kind", KANS)
def test_memory_saved_for_backward_does_not_grow_with_the_basis(kind):
    """The input, at most twice (raw and normalised), and not the values of 8 functions of it."""
    layer, x, saved = random_layer(kind, 64, 8), torch.randn(1000, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(x.requires_grad_())
    assert sum(saved) < 2.2 * x.numel() + 2 * layer.weight.numel()


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("mlp", MLPS)
def test_every_feed_forward_layer_learns_with_every_linear_layer(mlp, linear):
    model = GPT(GPTConfig(n_layer=1, n_head=2, head_size=8, block_size=8, vocab_size=32, linear=linear, mlp=mlp))
    optimizer, idx = make_optimizer(model, OptimizerConfig(learning_rate=0.02)), torch.arange(16).view(2, 8)
    losses = []
    for _ in range(8):
        losses.append(model(idx, idx + 1))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mlp", ["auto", *(mlp for mlp in MLPS if mlp not in KANS)])
def test_linear_replaces_every_linear_layer_of_the_blocks(kind, mlp, mixer):
    config = GPTConfig(n_layer=1, n_head=2, head_size=8, block_size=8, vocab_size=32, linear=kind, mlp=mlp, mixer=mixer)
    blocks = GPT(config).blocks
    with_matrix = [layer for layer in blocks.modules() if getattr(layer, "weight", None) is not None]
    assert with_matrix == linear_layers(blocks) and {type(layer) for layer in with_matrix} == {LINEARS[kind]}


@pytest.mark.parametrize("mixer", MIXERS)
def test_linear_scope(mixer):
    """Which layers are of the kind: by hand for each mixer."""
    config = GPTConfig(n_layer=1, n_head=2, head_size=8, block_size=8, vocab_size=32, mixer=mixer, mlp="swiglu")

    def kans(scope):
        block = GPT(dataclasses.replace(config, linear="grkan", linear_scope=scope)).blocks[0]
        return {name for name, layer in block.named_modules() if isinstance(layer, RationalKAN)}
    gates = {"mlp.gate"} | ({"mixer.gate", "mixer.rates"} if mixer in DELTA_RULES else set())
    assert kans("values") == {"mixer.proj"} and kans("gates") == gates


def test_a_linear_scope_that_would_do_nothing_is_refused():
    with pytest.raises(BadInput, match="--linear_scope=values: .* --linear=grkan"):
        GPTConfig(vocab_size=32, linear_scope="values")
    with pytest.raises(BadInput, match="--linear_scope=gates: --mixer=attention and --mlp=gelu have no gates"):
        GPTConfig(vocab_size=32, linear="grkan", linear_scope="gates")


def test_flops_by_hand():
    """16 inputs, 4 outputs. A rational function: 5 multiplications and 5 additions above, an absolute value, 4 of each
    below, a division; the matrix: a multiplication and an addition a number."""
    layer = RationalKAN(16, 4, False)
    assert (matrix_flops(layer), elementwise_flops(layer)) == (2 * 16 * 4, 16 * 20)
    assert matrix_flops(ChebyshevKAN(16, 4, False)) == 2 * 8 * 16 * 4
    assert matrix_flops(BSplineKAN(16, 4, False)) == 2 * (1 + len(CENTERS)) * 16 * 4
