"""Attention in blocks of queries against torch's in fp64."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import library

from layers import attention, blocked_attention
from layers.attention import Attention
from layers.attention_metadata import AttentionMetadata
from layers.blocked_attention import attention_backward, blocked_causal_attention, causal_mask
from model import GPTConfig

B, N_HEAD, HEAD_SIZE = 3, 2, 8


def example(T: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output; v is a view of a wider tensor, as in `Attention`."""
    torch.manual_seed(T)
    q, k, grad = (torch.randn(B, N_HEAD, T, HEAD_SIZE).to(dtype) for _ in range(3))
    v = torch.randn(B, T, 3 * N_HEAD, HEAD_SIZE).to(dtype).transpose(1, 2)[:, N_HEAD:2 * N_HEAD]
    return [*(x.detach().requires_grad_() for x in (q, k, v)), grad]


def output_and_grads(attend, q, k, v, grad) -> list[torch.Tensor]:
    y = attend(q, k, v)
    return [y, *torch.autograd.grad(y, (q, k, v), grad)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("T", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("chunk_numel", [1, 2 * N_HEAD * 4 * 8, 10**6])
def test_output_and_gradients_equal_the_oracle(T, dtype, tolerance, chunk_numel, monkeypatch):
    """Lengths around one and two blocks of 4 queries; one text, two and all at a time."""
    monkeypatch.setattr(blocked_attention, "BLOCK", 4)
    monkeypatch.setattr(blocked_attention, "CHUNK_NUMEL", chunk_numel)
    q, k, v, grad = example(T, dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = output_and_grads(partial(F.scaled_dot_product_attention, is_causal=True), *wide, grad.double())
    for found, want in zip(output_and_grads(blocked_causal_attention, q, k, v, grad), expected):
        assert found.dtype == dtype and found.shape == want.shape
        assert (found.double() - want).norm() <= tolerance * max(want.norm(), 1e-3)


def test_the_mask_by_hand():
    inf = torch.inf
    assert causal_mask(2, 3, torch.float32).tolist() == [[0, 0, -inf], [0, 0, 0]]
    assert causal_mask(1, 2, torch.bfloat16).tolist() == [[0, 0]]


def test_a_later_token_changes_nothing_before_it():
    q, k, v, _ = example(6, torch.float32)
    changed = [torch.cat((x[:, :, :5], torch.full_like(x[:, :, 5:], 9.0)), dim=2) for x in (q, k, v)]
    y, other = blocked_causal_attention(q, k, v), blocked_causal_attention(*changed)
    assert torch.equal(y[:, :, :5], other[:, :, :5]) and not torch.equal(y, other)


@pytest.mark.parametrize("n_kv_head, dtype, is_used", [
    (2, torch.bfloat16, True), (1, torch.bfloat16, False), (2, torch.float32, False)])
def test_attention_takes_it_where_it_is_faster(n_kv_head, dtype, is_used, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "blocked_causal_attention",
                        lambda *args: calls.append(1) or blocked_causal_attention(*args))
    config = GPTConfig(n_layer=1, n_head=2, n_kv_head=n_kv_head, head_size=8, block_size=16, vocab_size=5)
    mixer = Attention(config, 0).to(dtype)
    x = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, _ = mixer(x, AttentionMetadata())
    assert bool(calls) == is_used
    masked, _ = mixer(x, AttentionMetadata(mask=torch.ones(16, 16, dtype=torch.bool).tril()[None, None]))
    assert torch.allclose(y, masked, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)
    assert len(calls) == is_used  # not with a mask


def test_the_operations_pass_torchs_checks():
    q, k, v, grad = example(5, torch.bfloat16)
    library.opcheck(blocked_causal_attention, (q, k, v))
    library.opcheck(attention_backward, (grad, q.detach(), k.detach(), v.detach()))
