"""kernels/decode.py against what torch computes."""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import REPO
from kernels import decode
from layers import gated_delta
from layers.attention import KVCache, Rotary, rotate
from layers.attention_metadata import AttentionMetadata
from layers.linear import cast_weights
from model import DELTA_RULES, GPT, GPTConfig
from runtime.config import read_flags
from runtime.device import DTYPES, Machine
from sampling import GREEDY, generate
from train import PRESETS

SHAPES = [(1, 1), (3, 5), (40, 64), (129, 33)]  # (out, in)


@pytest.fixture(autouse=True)
def require_kernels():
    if not decode.can_run():
        pytest.skip("the kernels do not run on this machine")


def random_product(rows: int, n_out: int, n_in: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + n_out)
    return (torch.randn(rows, n_in, generator=generator).to(dtype),
            torch.randn(n_out, n_in, generator=generator).to(dtype))


@torch.inference_mode()
def test_by_hand():
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, -1.0], [0.5, 0.25]])
    assert decode.choose_kernel(x, weight) is decode.gemv_fp32
    assert decode.linear(x, weight, torch.tensor([0.0, 10.0, 0.0])).tolist() == [[11.0, 8.0, 1.0]]
    assert decode.linear(x.bfloat16(), weight.bfloat16()).tolist() == [[11.0, -2.0, 1.0]]


@pytest.mark.parametrize("n_out, n_in", SHAPES)
@pytest.mark.parametrize("dtype", decode.MAX_ROWS)
@torch.inference_mode()
def test_every_number_of_rows_equals_torchs(n_out, n_in, dtype):
    for rows in range(1, decode.MAX_ROWS[dtype] + 1):
        x, weight = random_product(rows, n_out, n_in, dtype)
        assert decode.choose_kernel(x, weight)
        y, exact = decode.linear(x, weight), F.linear(x.double(), weight.double())
        assert y.dtype == dtype and y.shape == (rows, n_out)
        torch.testing.assert_close(y.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@torch.inference_mode()
def test_rounding_is_torchs():
    """Halves, the largest numbers, infinities, NaN."""
    infinity, nan = float("inf"), float("nan")
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.39e38, infinity, -infinity, nan, 1e-40])
    for value in values[:, None]:
        with torch.autocast("cpu", torch.bfloat16):
            y = decode.linear(value, torch.ones(1, 1, dtype=torch.bfloat16))
        torch.testing.assert_close(y, value.bfloat16(), rtol=0, atol=0, equal_nan=True)


@torch.inference_mode()
def test_autocast_has_the_dtypes_and_values_of_torchs():
    x, weight = random_product(2, 40, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert decode.choose_kernel(x, weight) is None  # torch converts the matrix
        for rows in (x, x.bfloat16()):
            for bias in (None, torch.ones(40)):
                assert decode.choose_kernel(rows, weight.bfloat16())
                y, peer = decode.linear(rows, weight.bfloat16(), bias), F.linear(rows, weight.bfloat16(), bias)
                assert y.dtype == peer.dtype == torch.bfloat16
                torch.testing.assert_close(y, peer, rtol=2**-7, atol=2**-7)


@torch.inference_mode()
def test_rows_do_not_depend_on_each_other():
    for dtype, rows in decode.MAX_ROWS.items():
        x, weight = random_product(rows, 40, 64, dtype)
        alone = torch.cat([decode.linear(x[row:row + 1], weight) for row in range(rows)])
        assert torch.equal(decode.linear(x, weight), alone)


def test_torch_computes_what_the_kernels_do_not():
    x, weight = random_product(2, 40, 64, torch.float32)
    with torch.inference_mode():
        assert decode.choose_kernel(x, weight)
        many = x[:1].expand(decode.MAX_ROWS[torch.float32] + 1, -1).contiguous()
        for other, matrix in ((many, weight), (x[:, ::2], weight[:, ::2]), (x, weight.T.contiguous().T), (x[:0], weight),
                              (x.half(), weight.half()), (x.double(), weight.double())):
            assert decode.choose_kernel(other, matrix) is None
            torch.testing.assert_close(decode.linear(other, matrix), F.linear(other, matrix))
        with pytest.raises(RuntimeError):
            decode.linear(x[:, :5].contiguous(), weight)
    weight.requires_grad_()
    decode.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(40, -1))


@torch.inference_mode()
def test_flops_are_counted():
    x, weight = random_product(1, 40, 64, torch.float32)
    with FlopCounterMode(display=False) as counter:
        decode.linear(x, weight)
        assert not decode.can_attend(*torch.zeros(2, 1, 2, 1, 8), torch.zeros(1, 2, 9, 8))
    assert counter.get_total_flops() == 2 * 40 * 64 and decode.choose_kernel(x, weight)


def test_other_processors_use_torch(monkeypatch):
    decode.can_run.cache_clear()
    monkeypatch.setattr(decode.platform, "machine", lambda: "aarch64")
    x, weight = random_product(1, 3, 5, torch.float32)
    try:
        with torch.inference_mode():
            assert not decode.can_run() and decode.choose_kernel(x, weight) is None
            assert torch.equal(decode.linear(x, weight), F.linear(x, weight))
    finally:
        decode.can_run.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_torch_keeps_its_threads_and_a_forked_process_computes_the_same():
    program = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from kernels import decode
from layers.attention import KVCache, Rotary, rotate
torch.set_num_threads(1)
assert torch.get_num_threads() == 1  # torch sets OpenMP's number when it is first asked for
with torch.inference_mode():
    x, weight = torch.ones(1, 64), torch.ones(3, 64)
    assert decode.choose_kernel(x, weight) and decode.linear(x, weight).tolist() == [[64.0] * 3]
    assert torch.get_num_threads() == 1
    child = os.fork()
    if child == 0:
        os._exit(0 if decode.choose_kernel(x, weight) is None and decode.linear(x, weight).tolist() == [[64.0] * 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert decode.choose_kernel(x, weight)
"""
    subprocess.run([sys.executable, "-c", program, str(REPO)], check=True)


@torch.inference_mode()
def test_norms_equal_torchs():
    for shape in ((1, 1, 512), (3, 2, 1, 17), (0, 4)):
        x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for eps in (1e-5, 1.0):
            expected = F.rms_norm(x, shape[-1:], eps=eps)
            torch.testing.assert_close(decode.rms_norm_rows(x, eps), expected, rtol=1e-5, atol=1e-6)
    assert decode.rms_norm_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 0.5).tolist() == [
        pytest.approx([3 / 13**0.5, 4 / 13**0.5]), [0.0, 0.0]]
    x = torch.randn(4, 6).double()
    assert torch.equal(decode.rms_norm_rows(x, 1e-5), F.rms_norm(x, (6,), eps=1e-5))


# -- attention --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", decode.MAX_ROWS)
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@torch.inference_mode()
def test_attention_equals_torchs(dtype, n_kv_head):
    """After 0 to 40 positions, with what it adds to the cache."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator)
    B, n_head, head_size, max_len, rotary = 2, 4, 16, 41, Rotary(16, 64)
    cache = KVCache(random(B, n_kv_head, max_len, head_size), random(B, n_kv_head, max_len, head_size))
    for start in (0, 1, 5, 16, 40):
        q, k, v = random(B, 1, n_head + 2 * n_kv_head, head_size).to(dtype).transpose(1, 2).split(
            (n_head, n_kv_head, n_kv_head), dim=1)
        peer = KVCache(cache.keys.clone(), cache.values.clone())
        for rotation in (None, rotary(slice(start, start + 1))):
            assert decode.can_attend(q, v, cache.keys)
            y = decode.attend(q, k, v, rotation, cache.keys, cache.values, start)
            rotated = [q, k] if rotation is None else [rotate(x, rotation).to(dtype) for x in (q, k)]
            keys, values = peer.append(start, rotated[1], v, rewindable=False)
            expected = F.scaled_dot_product_attention(rotated[0].float(), keys, values, enable_gqa=True)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # where rotation rounds another way
            torch.testing.assert_close(y, expected.transpose(1, 2).reshape(B, 1, -1), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(cache.values, peer.values, rtol=0, atol=0)
            first = start // 2  # the same of a window
            expected = F.scaled_dot_product_attention(rotated[0].float(), keys[:, :, first:], values[:, :, first:],
                                                      enable_gqa=True)
            y = decode.attend(q, k, v, rotation, cache.keys, cache.values, start, first)
            torch.testing.assert_close(y, expected.transpose(1, 2).reshape(B, 1, -1), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(cache.keys, peer.keys, rtol=tolerance, atol=tolerance)


@torch.inference_mode()
def test_attention_takes_normalised_queries_and_large_scores():
    """Queries and keys in fp32 and values in bf16, as --qk_norm makes them; scores up to 1000, whose exp overflows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (scale * torch.randn(1, 2, 1, 8, generator=generator) for scale in (200, 10, 1))
    cache = KVCache(*(torch.randn(1, 2, 9, 8, generator=generator) for _ in range(2)))
    peer = KVCache(cache.keys.clone(), cache.values.clone())
    y = decode.attend(q, k, v.bfloat16(), None, cache.keys, cache.values, 8)
    keys, values = peer.append(8, k.bfloat16(), v.bfloat16(), rewindable=False)
    expected = F.scaled_dot_product_attention(q.bfloat16().float(), keys, values)
    torch.testing.assert_close(y, expected.transpose(1, 2).reshape(1, 1, 16), rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_torch_attends_otherwise():
    q, keys = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 9, 8)
    assert decode.can_attend(q, q, keys)
    assert not decode.can_attend(*torch.zeros(2, 1, 2, 2, 8), keys)
    assert not decode.can_attend(q, q, keys.bfloat16())
    assert not decode.can_attend(q.half(), q, keys) and not decode.can_attend(q, q.half(), keys)
    with torch.inference_mode(False):
        assert not decode.can_attend(q, q, keys)


# -- the delta rule ---------------------------------------------------------------------------------------------------

DELTA_LAYERS = {"gated_delta": {}, "delta_product": {"n_householder": 3, "d_head_size": 8}, "rotary_delta": {"d_conv": 4}}


@pytest.mark.parametrize("dtype", decode.MAX_ROWS)
@pytest.mark.parametrize("mixer", DELTA_RULES)
@torch.inference_mode()
def test_a_step_of_the_delta_rule_equals_torchs(mixer, dtype, monkeypatch):
    """The layer's outputs, states and angles, token by token, of a second layer, whose values are mixed with the first's."""
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=2, head_size=16, block_size=64, vocab_size=32, mixer=mixer, **DELTA_LAYERS[mixer])
    layer = GPT(config).blocks[1].mixer
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape) * (0.3 if weight.dim() > 1 else 1))
    cast_weights([module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)], dtype)
    x, first_layer_v = torch.randn(40, 2, 1, 32), torch.randn(40, 2, 2, 1, 16)
    calls = []
    monkeypatch.setattr(gated_delta, "delta_step", lambda *args: calls.append(1) or decode.delta_step(*args))

    def outputs() -> list[torch.Tensor]:
        cache, found = layer.init_cache(2, 64, torch.device("cpu"), torch.float32), []
        for t in range(40):
            before = cache.states
            kept = before.clone()
            with Machine(torch.device("cpu"), {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]).autocast():
                y, v = layer(x[t], AttentionMetadata(start=t), cache, first_layer_v[t].to(dtype))
            assert torch.equal(before, kept)  # another cache may go on from it
            found += [y.float(), v.float(), cache.states] + ([cache.angles] if cache.angles is not None else [])
        return found
    ours = outputs()
    assert len(calls) == 40
    monkeypatch.setattr(gated_delta, "can_step", lambda *args: False)
    for own, peer in zip(ours, outputs(), strict=True):
        assert own.shape == peer.shape
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(own, peer, rtol=tolerance, atol=tolerance)
    assert len(calls) == 40 and ours[-1].abs().max() > 0.1


@torch.inference_mode()
def test_steps_with_extreme_rates():
    """Logits whose exp overflows: α of 0 and 1, β of 0 and 2."""
    q, k, v, states = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 2, 4, 4)
    q[..., 1] = k[..., 0] = 3.0
    step = lambda *rates: decode.delta_step(torch.cat((q, k, v), dim=2).flatten(2), v.transpose(1, 2),
                                            torch.tensor([[rates]]), torch.zeros(2), 0.0, states)[1]
    # no decay and no correction; all decays, and 2 v is stored for the key's channel, which is 1 (D = 4: 2 / sqrt(4))
    kept, replaced = step(-1e4, 1e4, -1e4, 1e4)[0]
    assert torch.equal(kept, torch.ones(4, 4))
    torch.testing.assert_close(replaced, torch.tensor([[2.0] * 4] + [[0.0] * 4] * 3), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_torch_steps_otherwise():
    qkv, states = torch.zeros(1, 1, 24), torch.zeros(1, 2, 4, 4)
    assert decode.can_step(qkv, states)
    assert not decode.can_step(torch.zeros(1, 2, 24), states) and not decode.can_step(qkv.half(), states)
    assert not decode.can_step(qkv, states.mT)
    with FlopCounterMode(display=False):
        assert not decode.can_step(qkv, states)
    with torch.inference_mode(False):
        assert not decode.can_step(qkv, states)


# -- weights ----------------------------------------------------------------------------------------------------------

def test_weights_are_cast_together():
    """Values, shapes and alignment; a matrix that embedding and head share stays one."""
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (1, 1), (40, 64))]
    before = [weight.detach().clone() for weight in weights]
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        cast_weights([*weights, weights[0]], dtype)
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        for weight, old in zip(weights, before):
            assert weight.dtype == dtype and weight.is_contiguous() and not weight.requires_grad
            assert weight.data_ptr() % decode.CACHE_LINE == 0
            torch.testing.assert_close(weight, old.to(torch.bfloat16).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", [{}, PRESETS["llama"]], ids=["default", "llama"])
def test_greedy_tokens_are_those_of_torch(preset, dtype, monkeypatch):
    """Of texts by themselves, and of as many at once as the kernels take, and more."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "head_size": 8, "block_size": 32, "vocab_size": 50}
    model = GPT(read_flags(GPTConfig, preset | shape)).requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):  # zero at first
            torch.nn.init.normal_(weight, std=0.2)
    model.embed.weight.mul_(20)
    model.cast_matrices(DTYPES[dtype])
    prompts = [torch.arange(i, i + 7) for i in range(10)]

    def tokens(*rows: int) -> list[list[int]]:
        with Machine(torch.device("cpu"), dtype).autocast():
            return torch.stack(list(generate(model, [prompts[row] for row in rows], 20, GREEDY)), dim=1).tolist()
    alone = [tokens(row)[0] for row in range(10)]
    assert len(set(map(tuple, alone))) > 5
    assert tokens(0, 1, 2) == alone[:3] and tokens(*range(10)) == alone
    monkeypatch.setattr(decode, "MAX_ROWS", {})
    assert [tokens(row)[0] for row in range(10)] == alone
