"""Attention in blocks of queries against torch's in fp64."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import library

from layers import attention
from layers import blocked_attention as blocked
from layers.attention import Attention, SlidingAttention
from layers.attention_metadata import AttentionMetadata, sliding_window_mask
from layers.blocked_attention import attention_backward, blocked_attention, causal_mask
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
@pytest.mark.parametrize("window", [0, 1, 3, 5, 20])
@pytest.mark.parametrize("chunk_numel", [1, 2 * N_HEAD * 4 * 8, 10**6])
def test_output_and_gradients_equal_the_oracle(T, dtype, tolerance, chunk_numel, window, monkeypatch):
    """Lengths around one and two blocks of 4 queries; one text, two and all at a time."""
    monkeypatch.setattr(blocked, "BLOCK", 4)
    monkeypatch.setattr(blocked, "CHUNK_NUMEL", chunk_numel)
    q, k, v, grad = example(T, dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    sees = torch.ones(T, T, dtype=torch.bool).tril() & torch.ones(T, T, dtype=torch.bool).triu(-window)
    expected = output_and_grads(partial(F.scaled_dot_product_attention, attn_mask=sees), *wide, grad.double())
    for found, want in zip(output_and_grads(partial(blocked_attention, window=window), q, k, v, grad), expected):
        assert found.dtype == dtype and found.shape == want.shape
        assert (found.double() - want).norm() <= tolerance * max(want.norm(), 1e-3)


def test_the_mask_by_hand():
    inf = torch.inf
    assert causal_mask(2, 3, 3, torch.float32).tolist() == [[0, 0, -inf], [0, 0, 0]]
    assert causal_mask(2, 3, 1, torch.float32).tolist() == [[0, 0, -inf], [-inf, 0, 0]]
    assert causal_mask(1, 2, 2, torch.bfloat16).tolist() == [[0, 0]]


def test_a_later_token_changes_nothing_before_it():
    q, k, v, _ = example(6, torch.float32)
    changed = [torch.cat((x[:, :, :5], torch.full_like(x[:, :, 5:], 9.0)), dim=2) for x in (q, k, v)]
    y, other = blocked_attention(q, k, v, 6), blocked_attention(*changed, 6)
    assert torch.equal(y[:, :, :5], other[:, :, :5]) and not torch.equal(y, other)


@pytest.mark.parametrize("n_kv_head, dtype, is_used", [
    (2, torch.bfloat16, True), (1, torch.bfloat16, False), (2, torch.float32, False)])
def test_attention_takes_it_where_it_is_faster(n_kv_head, dtype, is_used, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "blocked_attention", lambda *args: calls.append(1) or blocked_attention(*args))
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
    library.opcheck(blocked_attention, (q, k, v, 2))
    library.opcheck(attention_backward, (grad, q.detach(), k.detach(), v.detach(), 2))


@pytest.mark.parametrize("T, is_used", [(14, True), (12, False)])  # too short for a block to see less than all
def test_sliding_attention_skips_what_its_window_hides(T, is_used, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 8)
    calls = []
    monkeypatch.setattr(attention, "blocked_attention", lambda *args: calls.append(args[3]) or blocked_attention(*args))
    config = GPTConfig(n_layer=1, n_head=2, head_size=8, block_size=16, vocab_size=5, mixer="S", window=4)
    mixer = SlidingAttention(config, 0)
    x = torch.randn(1, T, 16, generator=torch.Generator().manual_seed(0))
    mask = sliding_window_mask(None, 4, T, 0, x.device)
    y, _ = mixer(x, AttentionMetadata(window_mask=mask))
    assert calls == [4] * is_used
    plain = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    masked, _ = mixer(x, AttentionMetadata(mask=plain, window_mask=plain & mask))  # as with packed documents
    assert torch.allclose(y, masked, atol=1e-5) and calls == [4] * is_used
