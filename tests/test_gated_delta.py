"""The gated delta rule: its chunked form against the recurrence, and what a head can store, forget and count."""
import math

import pytest
import torch
from torch import library

from layers import MIXERS, gated_delta
from layers.attention_metadata import AttentionMetadata
from layers.convolution import ShortConvolution
from layers.gated_delta import (
    CHUNK_SIZE,
    COUNTING_MEMORY,
    INITIAL_MEMORY,
    GatedDelta,
    RotaryDelta,
    chunked_delta_rule,
    linear_recurrence,
    recurrent_delta_rule,
    running_angles,
)
from model import GPT, GPTConfig

B, H, T, D = 2, 3, 40, 8


def example(n: int = 1) -> list[torch.Tensor]:
    """q, k, v, beta, log_alpha, state, with n corrections a token; keys and queries of length 1."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    q, k = (torch.nn.functional.normalize(random(B, H, size, D), dim=-1) for size in (T, T * n))
    return [q, k, random(B, H, T * n, D), 2 * torch.sigmoid(random(B, H, T * n)), -random(B, H, T).exp() / 5,
            random(B, H, D, D)]


def rule_by_definition(q, k, v, beta, log_alpha, state) -> tuple[torch.Tensor, torch.Tensor]:
    """In fp64, with the matrices of the paper: S <- (I - β k kᵀ) S + β k vᵀ for each correction, after the decay."""
    q, k, v, beta, log_alpha, state = (part.double() for part in (q, k, v, beta, log_alpha, state))
    outputs, n, one = torch.empty(B, H, T, D, dtype=torch.float64), k.size(2) // T, torch.eye(D, dtype=torch.float64)
    state = state.clone()
    for b in range(B):
        for h in range(H):
            for t in range(T):
                S = log_alpha[b, h, t].exp() * state[b, h]
                for i in range(n * t, n * t + n):
                    key, rate = k[b, h, i], beta[b, h, i]
                    S = (one - rate * torch.outer(key, key)) @ S + rate * torch.outer(key, v[b, h, i])
                outputs[b, h, t], state[b, h] = S.T @ q[b, h, t], S
    return outputs.float(), state.float()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_recurrent_rule_is_a_product_of_householder_matrices(n):
    inputs = example(n)
    got, (*_, got_state) = recurrent_delta_rule(*inputs)
    want, want_state = rule_by_definition(*inputs)
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(got_state, want_state, atol=1e-5)


@pytest.mark.parametrize("chunk, n", [(1, 1), (7, 1), (8, 1), (40, 1), (64, 1), (2, 2), (12, 2), (64, 3), (16, 3), (1, 2)])
@pytest.mark.parametrize("with_state", [True, False])
def test_chunked_rule_equals_the_recurrent_one(monkeypatch, chunk, n, with_state):
    """With gradients; 7 does not divide the length."""
    monkeypatch.setattr(gated_delta, "CHUNK_SIZE", chunk)
    inputs = [part.requires_grad_() for part in example(n)]
    zeros = torch.zeros(B, H, D, D)
    want, (*_, want_state) = recurrent_delta_rule(*inputs[:5], inputs[5] if with_state else zeros)
    got, state = chunked_delta_rule(*inputs[:5], inputs[5] if with_state else None)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(state, want_state, atol=1e-5) if with_state else state is None
    used = inputs[:5 + with_state]
    weights = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad((got * weights).sum(), used), torch.autograd.grad((want * weights).sum(), used)):
        assert torch.allclose(a, b, atol=2e-4)


def test_linear_recurrence_by_hand():
    """S_1 = 2 S_0 + 1, S_2 = 3 S_1 + 1."""
    factors, terms = torch.tensor([2.0, 3.0]).view(2, 1, 1, 1, 1), torch.ones(2, 1, 1, 1, 1)
    assert linear_recurrence(factors, terms, torch.full((1, 1, 1, 1), 5.0)).flatten().tolist() == [5, 11, 34]


def test_linear_recurrence_passes_torchs_checks_of_custom_operations():
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    inputs = random(3, 1, 2, 4, 4), random(3, 1, 2, 4, 4), random(1, 2, 4, 4)
    library.opcheck(linear_recurrence, inputs)
    assert torch.autograd.gradcheck(linear_recurrence, inputs)


def test_compiled_graph_does_not_grow_with_the_length():
    """A hundred chunks take as many nodes as two."""
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward
    for n_tokens in (2 * CHUNK_SIZE, 100 * CHUNK_SIZE):
        torch._dynamo.reset()
        qkv, rates = torch.zeros(3, 1, 1, n_tokens, 2), torch.zeros(2, 1, 1, n_tokens)
        torch.compile(chunked_delta_rule, backend=backend)(*qkv, *rates, None)
    assert len(sizes) == 2 and sizes[0] == sizes[1]


def test_a_sequence_can_be_processed_in_two_parts():
    *inputs, state = example()
    whole, final_state = chunked_delta_rule(*inputs, state)
    first, middle_state = chunked_delta_rule(*(part[:, :, :13] for part in inputs), state)
    second, (*_, second_state) = recurrent_delta_rule(*(part[:, :, 13:] for part in inputs), middle_state)
    assert torch.allclose(torch.cat((first, second), dim=2), whole, atol=1e-5)
    assert torch.allclose(final_state, second_state, atol=1e-5)


def test_a_key_returns_its_last_value():
    """Hand example: three orthogonal keys, the second written twice, no decay."""
    keys = torch.eye(4)[[0, 1, 2, 1]]
    values = torch.arange(16.0).view(4, 4)
    _, state = chunked_delta_rule(torch.zeros(1, 1, 4, 4), keys[None, None], values[None, None], torch.ones(1, 1, 4),
                                  torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, 4))
    assert torch.allclose(state[0, 0].T @ torch.eye(4), torch.stack([values[0], values[3], values[2], torch.zeros(4)]).T)


def test_it_counts_modulo_two():
    """β = 2 flips the sign of the stored value at every token, for any length."""
    n = 101
    ones = torch.ones(1, 1, n)
    keys, nothing = torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 2)
    keys[..., 0] = 1
    start = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    y, _ = chunked_delta_rule(keys, keys, nothing, 2 * ones, 0 * ones, start)
    assert torch.allclose(y[0, 0, :, 0], torch.tensor([(-1.0) ** (t + 1) for t in range(n)]))


@pytest.mark.parametrize("modulus", [3, 5])
def test_two_corrections_count_modulo_any_number(modulus):
    """Two reflections are a rotation by twice the angle between their keys."""
    n, angle = 60, math.pi / modulus
    keys = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]).repeat(n, 1)[None, None]
    start = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    query = torch.tensor([1.0, 0.0]).expand(1, 1, n, 2)
    y, _ = chunked_delta_rule(query, keys, torch.zeros(1, 1, 2 * n, 2), 2 * torch.ones(1, 1, 2 * n), torch.zeros(1, 1, n),
                              start)
    want = [math.cos(2 * math.pi * (t + 1) / modulus) for t in range(n)]
    assert torch.allclose(y[0, 0, :, 0], torch.tensor(want), atol=1e-4)


def rotary_layer(**switches) -> RotaryDelta:
    torch.manual_seed(0)
    layer = RotaryDelta(GPTConfig(**{"n_head": 2, "head_size": D, "block_size": T, "vocab_size": 9} | switches), 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("chunk", [7, 64])
def test_a_rotary_layer_turns_its_state_before_each_decay(monkeypatch, chunk):
    """By the definition, in fp64: S <- (I - β k kᵀ) α R(θ)ᵀ S + β k vᵀ, where R turns channels i and i + D/2 by θ_i."""
    monkeypatch.setattr(gated_delta, "CHUNK_SIZE", chunk)
    layer = rotary_layer(value_residual=False)
    x = torch.randn(B, T, 2 * D)
    got, _ = layer(x, AttentionMetadata())
    layer, x = layer.double(), x.double()
    q, k, v = layer.qkv(x).view(B, T, 3, 2, D).unbind(2)
    q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    beta, decay = layer.rates(x).view(B, T, 2, 2).unbind(2)
    beta, alpha = 2 * torch.sigmoid(beta), torch.exp(-torch.nn.functional.softplus(decay + layer.decay))
    cos, sin = (getattr(layer.angles(x).view(B, T, 2, D // 2), name)() for name in ("cos", "sin"))
    y = torch.empty(B, T, 2, D, dtype=torch.float64)
    for b in range(B):
        for h in range(2):
            S = torch.zeros(D, D, dtype=torch.float64)
            for t in range(T):
                turn = torch.cat((torch.cat((cos[b, t, h].diag(), sin[b, t, h].diag()), 1),
                                  torch.cat((-sin[b, t, h].diag(), cos[b, t, h].diag()), 1)))
                key, S = k[b, t, h], alpha[b, t, h] * turn @ S
                S = S + beta[b, t, h] * torch.outer(key, v[b, t, h] - S.T @ key)
                y[b, t, h] = S.T @ q[b, t, h]
    y = y / y.square().mean(-1, keepdim=True).sqrt()
    want = layer.proj(y.view(B, T, -1) * torch.nn.functional.silu(layer.gate(x)))
    assert torch.allclose(got, want.float(), atol=1e-4)


@torch.no_grad()
def test_a_new_rotary_layer_turns_nothing():
    """With no angle it is GatedDelta with other rates."""
    layer, plain = rotary_layer(), GatedDelta(GPTConfig(n_head=2, head_size=D, block_size=T, vocab_size=9), 0)
    torch.nn.init.zeros_(layer.angles.weight)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if not name.startswith("angles")})
    plain.initial_beta_logit = layer.initial_beta_logit
    x = torch.randn(B, T, 2 * D)
    assert torch.allclose(layer(x, AttentionMetadata())[0], plain(x, AttentionMetadata())[0], atol=1e-6)


@pytest.mark.parametrize("length", [1, 5, CHUNK_SIZE, 3 * CHUNK_SIZE + 1])
def test_running_angles_are_sums_less_whole_turns(length):
    angles = 30 * torch.randn(2, length, 3, generator=torch.Generator().manual_seed(0))
    got, want = running_angles(angles), angles.double().cumsum(1)
    assert (got.abs() <= math.pi + 1e-5).all()
    assert torch.allclose(torch.polar(torch.ones_like(got), got), torch.polar(torch.ones_like(want), want).to(torch.cfloat),
                          atol=1e-3)


def test_short_convolution_by_hand():
    """Taps 1, 2, 3 on 1, 2, 3, 4, of which the last two are a document of their own."""
    conv = ShortConvolution(1, 3)
    conv.taps.data[:, 0] = torch.tensor([1.0, 2.0, 3.0])
    x, starts = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1), torch.tensor([[True, False, True, False]])
    silu = torch.nn.functional.silu
    assert torch.allclose(conv(x, AttentionMetadata())[0, :, 0], silu(torch.tensor([1.0, 4.0, 10.0, 16.0])))
    assert torch.allclose(conv(x, AttentionMetadata(doc_starts=starts))[0, :, 0], silu(torch.tensor([1.0, 4.0, 3.0, 10.0])))
    before = torch.tensor([9.0, 5.0, 6.0]).view(1, 3, 1)  # reads the last two
    assert torch.allclose(conv(x, AttentionMetadata(), before)[0, :2, 0], silu(torch.tensor([28.0, 22.0])))


def test_a_new_short_convolution_changes_nothing_but_the_activation():
    x = torch.randn(2, 5, 3)
    assert torch.equal(ShortConvolution(3, 4)(x, AttentionMetadata()), torch.nn.functional.silu(x))


@torch.no_grad()
@pytest.mark.parametrize("layer, memory", [(GatedDelta, INITIAL_MEMORY), (RotaryDelta, COUNTING_MEMORY)])
def test_initial_memory_is_spaced_geometrically(layer, memory):
    """Tokens after which all but 1/e has decayed."""
    shortest, longest = memory
    mixer = layer(GPTConfig(n_head=3, head_size=D, block_size=T, vocab_size=9), 0)
    alpha = torch.exp(-torch.nn.functional.softplus(mixer.decay))
    memory = torch.tensor([shortest, math.sqrt(shortest * longest), longest])
    assert torch.allclose(alpha ** memory, torch.full((3,), math.exp(-1)), rtol=1e-2)


def test_complete_decay_does_not_overflow():
    """Ratios of decay are between 0 and 1, also where everything is forgotten at once."""
    q, k, v, beta, log_alpha, state = (part.requires_grad_() for part in example())
    y, _ = chunked_delta_rule(q, k, v, beta, log_alpha * 1e4, state)
    y.sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(part.grad).all() for part in (q, k, v, beta, log_alpha))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_hard", [False, True])
def test_half_precision_error(dtype, is_hard):
    """Also where keys are nearly equal and every correction flips the sign."""
    inputs = example()
    if is_hard:
        inputs[1] = torch.nn.functional.normalize(torch.ones_like(inputs[1]) + 0.1 * inputs[1], dim=-1)
        inputs[3], inputs[4] = torch.full_like(inputs[3], 1.98), torch.zeros_like(inputs[4])
    want, (*_, want_state) = recurrent_delta_rule(*inputs)
    with torch.autocast("cpu", dtype=dtype):
        got, state = chunked_delta_rule(*inputs)
    assert state.dtype == torch.float32
    tolerance = 0.05 if is_hard else 0.02
    assert (got.float() - want).norm() < tolerance * want.norm()
    assert (state - want_state).norm() < tolerance * want_state.norm()


@pytest.mark.parametrize("mixer", ["gated_delta", "delta_product", "rotary_delta"])
def test_cost_per_token_and_cache_do_not_grow_with_the_length(mixer):
    mixer = MIXERS[mixer](GPTConfig(n_head=2, head_size=D, block_size=4096, vocab_size=9), 0)
    costs = [mixer.flops_per_token(n) for n in (1024, 2048, 4096)]
    assert costs[2] < 1.01 * costs[0]
    caches = [mixer.init_cache(1, n, torch.device("cpu"), torch.float32).states.numel() for n in (16, 4096)]
    assert caches[0] == caches[1] == 2 * D * D


@pytest.mark.parametrize("head_size", [4, 8, 32])
def test_the_size_of_the_state_can_be_chosen(head_size):
    """A number for each channel of the model and each channel of a head, in any layer."""
    model = GPT(GPTConfig(n_layer=2, n_head=4, head_size=8, block_size=T, vocab_size=9, mixer="DP", d_head_size=head_size))
    assert model.init_cache(1, T).blocks[1].mixer.states.numel() == 32 * head_size
