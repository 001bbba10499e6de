import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_script
from dataloader import IGNORE_INDEX
from layers import MIXERS, MLPS
from layers.attention import Rotary
from model import GPT, GPTConfig
from runtime.flags import BadInput

ARCHITECTURES = [pytest.param({"mlp": mlp}, id=mlp) for mlp in MLPS] + [
    pytest.param({"mixer": mixer}, id=mixer) for mixer in MIXERS]
B, T, V = 3, 24, 96


@pytest.fixture(params=ARCHITECTURES)
def model(request) -> GPT:
    """Random weights everywhere: with the zeros a fresh model has, most tests of a block would pass for any block."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, head_size=8, block_size=T, vocab_size=V, **request.param))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
    return model


@pytest.fixture
def idx():
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_ignore_the_future(model, idx):
    logits = model(idx)
    for t in (1, 7, T - 1):
        changed = idx.clone()
        changed[:, t:] = torch.randint(V, (B, T - t))
        assert torch.allclose(model(changed)[:, :t], logits[:, :t], atol=1e-5)
        assert not torch.allclose(model(changed)[:, t], logits[:, t], atol=1e-2)


@torch.no_grad()
def test_every_position_sees_all_of_the_past(model, idx):
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    difference = (model(changed) - model(idx)).abs().amax(dim=(0, 2))
    assert (difference > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("steps", [[T], [1] * T, [5, 1, 1, 10, 7], [T - 1, 1]])
def test_cached_decoding_equals_the_full_forward(model, idx, steps):
    cache = model.init_cache(B, T)
    parts, at = [], 0
    for n in steps:
        parts.append(model(idx[:, at:at + n], cache=cache))
        at += n
    assert torch.allclose(torch.cat(parts, dim=1), model(idx), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initial_loss_is_that_of_a_uniform_guess(architecture, idx):
    fresh = GPT(GPTConfig(n_layer=2, n_head=2, head_size=8, block_size=T, vocab_size=V, **architecture))
    assert fresh(idx, idx).item() == pytest.approx(math.log(V), abs=1e-4)


def test_overfits_one_batch(model, idx):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(idx, idx.roll(-1, dims=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_chunked_loss_equals_the_loss_of_all_logits(model, idx, monkeypatch):
    targets = idx.roll(-1, dims=1).clone()
    targets[0, 3:9] = IGNORE_INDEX
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    expected.backward()
    expected_grads = [parameter.grad.clone() for parameter in model.parameters()]
    for chunk in (1, 7, B * T, 10_000):
        monkeypatch.setattr(model_script, "LOSS_CHUNK", chunk)
        model.zero_grad()
        loss = model(idx, targets)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for parameter, grad in zip(model.parameters(), expected_grads):
            assert torch.allclose(parameter.grad, grad, atol=1e-6)
        with torch.no_grad():
            losses = model(idx, targets, reduction="none")
        assert losses.shape == (B, T) and (losses[0, 3:9] == 0).all()
        assert losses.sum() / (targets != IGNORE_INDEX).sum() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_never_holds_all_logits(model, idx, monkeypatch):
    """No tensor that the forward or backward pass makes has more than a chunk of rows of logits."""
    monkeypatch.setattr(model_script, "LOSS_CHUNK", 8)
    rows = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() and out.size(-1) == V:
                rows.append(out.numel() // V)
            return out

    with Watch():
        model(idx, idx).backward()
    # the gradient of the embedding and head matrices has V in the other place, or as many rows as the width
    assert rows and max(rows) <= max(8, model.config.n_embd)


def test_flops_equal_what_torch_counts(model, idx):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:  # flash attention is not counted on CPU
        F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    assert counted.get_total_flops() == model.flops_per_token() * B * T


def test_rotary_keeps_lengths_and_depends_on_distance_alone():
    rotary = Rotary(8, 64)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    assert torch.allclose(rotary(q, 5).norm(), q.norm())
    products = [(rotary(q, start + 9) * rotary(k, start)).sum() for start in (0, 3, 50)]
    assert torch.allclose(torch.stack(products), products[0])
    assert not torch.allclose((rotary(q, 9) * rotary(k, 1)).sum(), products[0])


def test_rotary_by_hand():
    """Position 1 turns channels (0, 2) by 1 radian and (1, 3) by 1/100."""
    turned = Rotary(4, 2)(torch.tensor([1.0, 0, 0, 1]).view(1, 1, 1, 4), 1).flatten()
    assert torch.allclose(turned, torch.tensor([math.cos(1), -math.sin(0.01), math.sin(1), math.cos(0.01)]))


def test_parameters_of_the_default_shape():
    """12 layers of 12 * width² and two matrices of vocabulary * width."""
    with torch.device("meta"):
        default = GPT(GPTConfig(vocab_size=32_768))
    assert default.n_parameters() == 12 * 12 * 768**2 + 2 * 32_768 * 768


def test_blob_round_trip(model, idx):
    other = GPT.from_blob(model.to_blob())
    assert other.config == model.config
    assert torch.equal(other(idx), model(idx))
    with pytest.raises(BadInput, match="not those of its shape"):
        GPT.from_blob({"config": model.to_blob()["config"] | {"n_layer": 3}, "model": model.state_dict()})


@pytest.mark.parametrize("shape, word", [
    ({"n_layer": 0}, "--n_layer=0"), ({"n_head": 0}, "--n_head=0"), ({"head_size": 7}, "--head_size=7: must be even"),
    ({"block_size": 0}, "--block_size=0"), ({"mlp": "kan?"}, "--mlp=kan?: choose one of relu2"),
    ({"mixer": "rnn"}, "--mixer=rnn"), ({"vocab_size": 0}, "--vocab_size=0")])
def test_shapes_that_cannot_be(shape, word):
    with pytest.raises(BadInput, match=word.replace("?", r"\?")):
        GPTConfig(**{"vocab_size": 10} | shape)
