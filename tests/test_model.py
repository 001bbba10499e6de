"""The network: invariants that every architecture must satisfy, its parts by hand, and GPT-2 against transformers."""
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from dataloader import IGNORE_INDEX
from layers import LINEARS, MIXERS, MLPS, gated_delta, loss
from layers.attention import Attention, KVCache, Rotary, WindowCache, rotate
from layers.attention_metadata import AttentionMetadata, doc_position_ids
from layers.linear import linear_layers
from layers.norm import rms_norm
from layers.shift import TokenShift, TokenShiftFunction
from model import GPT, INITIAL_LOGIT_STD, MIXERS_BY_LETTER, GPTConfig, upgrade_config, upgrade_weights
from runtime.config import BadInput, read_flags
from train import PRESETS

GPT2, LLAMA = ({name: value for name, value in PRESETS[preset].items()
                if name in vars(GPTConfig()) and name not in ("n_layer", "n_head", "head_size", "block_size")}
               for preset in ("gpt2", "llama"))
# without its windows, which depend on the depth
NANOCHAT = {name: value for name, value in PRESETS["nanochat"].items() if name in vars(GPTConfig())
            and name not in ("n_layer", "n_head", "head_size", "block_size", "mixer")}
# every layer, and every switch away from its default
SWITCHES = [*({"mlp": mlp} for mlp in MLPS), *({"mixer": mixer} for mixer in MIXERS), {"mixer": "DA"}, {"mixer": "AD"},
            {"mixer": "DA", "d_head_size": 4, "d_conv": 3},
            {"mixer": "AP", "d_head_size": 16, "d_conv": 4, "n_householder": 3},
            {"mixer": "AR", "d_head_size": 4, "d_conv": 3},
            {"mixer": "SD", "window": 3}, {"loops": 3}, {"loops": 2, "mixer": "DA", "sampled_loops": True},
            *({"linear": linear} for linear in LINEARS), {"linear": "grkan", "mlp": "swiglu", "mixer": "gated_delta"},
            {"linear": "grkan", "mlp": "gelu", "bias": True}, {"norm": "layer"},
            {"norm": "scaled_rms"}, {"norm_eps": 1e-3}, {"n_kv_head": 1}, {"rotary_base": 100.0},
            {"positions": "learned"}, {"positions": "none"}, {"qk_scale": 1.2}, {"value_embeddings": True},
            {"ngram_rows": 50}, {"smear": True}, {"backout": True}, {"dense_blocks": 1},
            {"qk_norm": False}, {"value_residual": False}, {"x0_residual": False},
            {"token_shift": False}, {"softcap": 0.0}, {"tied": False}, {"bias": True}, {"init": "gpt2"}]
ARCHITECTURES = [*(pytest.param(switch, id=",".join(f"{name}={value}" for name, value in switch.items()))
                   for switch in SWITCHES), pytest.param(GPT2, id="gpt2"), pytest.param(LLAMA, id="llama"),
                 pytest.param(NANOCHAT | {"mixer": "SA", "n_kv_head": 1}, id="nanochat"),
                 pytest.param({"norm": "layer", "bias": True, "tied": False}, id="layer,bias,untied")]
B, T, V = 3, 24, 96


def tiny_config(**switches) -> GPTConfig:
    return GPTConfig(**{"n_layer": 2, "n_head": 2, "head_size": 8, "block_size": T, "vocab_size": V} | switches)


@torch.no_grad()
def random_model(**switches) -> GPT:
    """Random weights everywhere: with the zeros of a new model, most tests of a block would pass for any block."""
    torch.manual_seed(0)
    model = GPT(tiny_config(**switches))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not name.endswith("weight"):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)  # scalars and norms, around their initial values
        else:
            torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
    return model


def loss_and_grads(model: GPT, idx: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    value = model(idx, idx.roll(-1, dims=1))
    value.backward()
    return value.item(), [parameter.grad.clone() for parameter in model.parameters()]


def set_chunk_rows(monkeypatch, n: int):
    """The loss holds `n` rows of logits at a time."""
    monkeypatch.setitem(loss.LOGIT_CHUNK_BYTES, "cpu", 4 * V * n)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """T tokens are several chunks of the gated delta rule."""
    monkeypatch.setattr(gated_delta, "CHUNK_SIZE", 8)


@pytest.fixture(params=ARCHITECTURES)
def model(request) -> GPT:
    return random_model(**request.param)


@pytest.fixture
def idx():
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("n_layer, mixer", [(4, "SSSA"), (3, "SA"), (1, "attention")])
def test_nanochats_ingredients_equal_an_independent_forward(idx, n_layer, mixer):
    """Written down from nanochat's description, token by token and head by head."""
    model = random_model(**NANOCHAT, n_layer=n_layer, mixer=mixer, window=5 if "S" in mixer else None, n_kv_head=1)
    weights, C, D = model.state_dict(), 16, 8
    norm = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    angles = torch.arange(T)[:, None] * NANOCHAT["rotary_base"] ** (-torch.arange(D // 2) / (D // 2))

    def rotated(x):  # (T, D)
        a, b = x[:, :D // 2], x[:, D // 2:]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=1)
    for row, logits in zip(idx, model(idx)):
        x = norm(weights["embed.weight"][row])
        gate = weights["smear.smear_coeff"] * torch.sigmoid(x @ weights["smear.gate.weight"][0])
        x = x + gate[:, None] * torch.cat((torch.zeros(1, C), x[:-1]))
        x0 = x
        for layer in range(n_layer):
            w = {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items()
                 if name.startswith(f"blocks.{layer}.")}
            x = w["residual_scale"] * x + w["x0_scale"] * x0
            h = norm(x)
            q, k, v = (h @ part.T for part in w["mixer.qkv.weight"].split((2 * D, D, D)))
            if (n_layer - 1 - layer) % 2 == 0:
                gate = 3 * torch.sigmoid(h[:, :12] @ w["mixer.value_embedding.value_gate.weight"][0])
                v = v + gate[:, None] * w["mixer.value_embedding.embed.weight"][row]
            window, heads = T if (mixer * n_layer)[layer] in "aA" else 5, []
            for head in range(2):
                qs, ks = (1.2 * norm(rotated(part)) for part in (q[:, head * D:(head + 1) * D], k))
                outputs = []
                for t in range(T):
                    seen = slice(max(0, t - window), t + 1)
                    outputs.append((ks[seen] @ qs[t] / D ** 0.5).softmax(0) @ v[seen])
                heads.append(torch.stack(outputs))
            x = x + torch.cat(heads, dim=1) @ w["mixer.proj.weight"].T
            x = x + F.relu(norm(x) @ w["mlp.fc.weight"].T).square() @ w["mlp.proj.weight"].T
            if layer == n_layer // 2:
                middle = x
        x = norm(x - weights["backout_coeff"] * middle)
        assert torch.allclose(15 * torch.tanh(x @ weights["head.weight"].T / 15), logits, atol=2e-5)


@torch.no_grad()
def test_logits_ignore_the_future(model, idx):
    logits = model(idx)
    for t in (1, 7, T - 1):
        changed = idx.clone()
        changed[:, t:] = torch.randint(V, (B, T - t))
        assert torch.allclose(model(changed)[:, :t], logits[:, :t], atol=1e-5)
        assert not torch.allclose(model(changed)[:, t], logits[:, t], atol=1e-2)


@torch.no_grad()
def test_every_position_sees_the_whole_past(model, idx):
    if model.config.mixer == "sliding":
        pytest.skip("it sees the past of its window: see test_windows_by_hand")
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    difference = (model(changed) - model(idx)).abs().amax(dim=(0, 2))
    assert (difference > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("n_layer, mixer, reach", [(1, "sliding", 5), (2, "sliding", 10), (2, "SA", T)])
def test_windows_by_hand(idx, n_layer, mixer, reach):
    """A change of the first token reaches the window of 5 positions behind it, in each layer once; in a cache too."""
    model = random_model(n_layer=n_layer, mixer=mixer, window=5, token_shift=False)
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    difference = (model(changed) - model(idx)).abs().amax(dim=(0, 2))
    assert (difference > 1e-6).tolist() == [t <= reach for t in range(T)]
    whole = random_model(n_layer=n_layer, mixer="attention", token_shift=False)
    wide = random_model(n_layer=n_layer, mixer="sliding", window=T - 1, token_shift=False)
    assert torch.equal(wide(idx), whole(idx))
    doc_starts = torch.zeros(B, T, dtype=torch.bool)
    doc_starts[:, 3] = True  # the first document reaches no further than its end
    packed = (model(changed, doc_starts=doc_starts) - model(idx, doc_starts=doc_starts)).abs().amax(dim=(0, 2))
    assert (packed > 1e-6).tolist() == [t < 3 for t in range(T)]


@torch.no_grad()
def test_dense_connections_by_hand(idx):
    """The input of a dense block is the stream plus each earlier block's input times its factor; at first, the factors are
    0."""
    model, inputs, first_v = random_model(n_layer=3, dense_blocks=2), [], None
    for block in model.blocks:
        block.mixer_norm.register_forward_pre_hook(lambda norm, args: inputs.append(args[0]))
        block.x0_mix = None
    streams = [torch.nn.functional.rms_norm(model.embed(idx), (16,))]
    model(idx)
    for layer, block in enumerate(model.blocks):
        x = streams[layer]
        if layer > 0:
            hidden = F.gelu(torch.nn.functional.rms_norm(x, (16,)) @ block.dense.fc.weight.T)
            assert hidden.shape == (B, T, 4 * layer)
            factors = hidden @ block.dense.proj.weight.T + block.dense.dense_mix
            x = x + sum(factors[..., i:i + 1] * streams[i] for i in range(layer))
        assert torch.allclose(inputs[layer], x, atol=1e-5)
        metadata, _ = model.attention_metadata(idx, None, None)
        y, v = block.mixer(block.sublayer_input(0, block.mixer_norm, x, metadata, None), metadata, None, first_v)
        first_v = v if layer == 0 else first_v
        x = x + y
        streams.append(x + block.mlp(block.sublayer_input(1, block.mlp_norm, x, metadata, None)))
    new, without = GPT(tiny_config(n_layer=3, dense_blocks=2)), GPT(tiny_config(n_layer=3))
    new.load_state_dict(without.state_dict(), strict=False)
    assert torch.equal(new(idx), without(idx))
    assert new.flops_per_token() - without.flops_per_token() == 3 * 2 * sum(4 * i * 16 + 4 * i * i for i in (1, 2))
    for wrong in ({"dense_blocks": 2}, {"dense_blocks": 1, "loops": 2}):
        with pytest.raises(BadInput, match="--dense_blocks"):
            tiny_config(**wrong)


@torch.no_grad()
def test_a_memory_of_pairs_by_hand(idx):
    """The vector of each token's pair, times a factor of the block, is added to the stream before each block; at first, none
    of it is seen."""
    model, starts = random_model(ngram_rows=50), torch.zeros(B, T, dtype=torch.bool)
    starts[:, 5] = True
    inputs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: inputs.append(args[2]))
    model(idx, doc_starts=starts)
    for row, tokens in enumerate(idx.tolist()):
        pairs = [None if t in (0, 5) else ((36313 * token) ^ (27191 * tokens[t - 1])) % 49 for t, token in enumerate(tokens)]
        expected = model.ngrams.embed.weight[[49 if pair is None else pair for pair in pairs]]
        assert torch.equal(inputs[0][row], expected) and torch.equal(inputs[1][row], expected)
    torch.manual_seed(0)
    new, without = GPT(tiny_config(ngram_rows=50)), GPT(tiny_config())
    new.load_state_dict(without.state_dict(), strict=False)
    assert torch.equal(new(idx), without(idx)) and all(block.ngram_mix.item() == pytest.approx(0.1) for block in new.blocks)
    new.ngrams.embed.weight[:] = 1
    assert not torch.equal(new(idx), without(idx))


@torch.no_grad()
@pytest.mark.parametrize("n_prompt", [1, 4, 30])
@pytest.mark.parametrize("is_rewound", [False, True])
def test_the_cache_of_a_window_does_not_grow(n_prompt, is_rewound):
    """Over many times its length, token by token or with passes that are partly forgotten; the same as without a cache."""
    model = random_model(mixer="sliding", window=3, block_size=100)
    text = torch.randint(V, (B, 100), generator=torch.Generator().manual_seed(1))
    cache = model.init_cache(B, 100)
    model(text[:, :n_prompt], cache=cache)
    largest, cache.rewindable = 0, is_rewound
    whole = model(text)
    while cache.length < 98:
        start = cache.length
        if is_rewound:
            model(torch.full((B, 2), 7), cache=cache)
            cache.rewind(2)
        logits = model(text[:, start:start + 1 + is_rewound], cache=cache)
        assert torch.allclose(logits[:, 0], whole[:, start], atol=3e-5)
        if is_rewound:
            cache.rewind(1)
        largest = max(largest, cache.blocks[0].mixer.keys.size(2))
    assert largest == WindowCache.capacity(3, 100) == 11


@torch.no_grad()
@pytest.mark.parametrize("steps", [[T], [1] * T, [5, 1, 1, 10, 7], [T - 1, 1]])
def test_cached_decoding_equals_the_full_forward(model, idx, steps):
    cache = model.init_cache(B, T)
    parts = [model(part, cache=cache) for part in idx.split(steps, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(idx), atol=3e-5)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 12, 7], [9, 3, 9]])
def test_a_batch_of_different_lengths_decodes_like_each_row_alone(model, idx, lengths):
    logits, cache = model.prefill([row[:n] for row, n in zip(idx, lengths)], T)
    alone = torch.cat([model(row[None]) for row in idx])
    for step in range(10):
        for row, n in enumerate(lengths):
            assert torch.allclose(logits[row], alone[row, n + step - 1], atol=3e-5)
        new = torch.stack([row[n + step:n + step + 1] for row, n in zip(idx, lengths)])
        logits = model(new, cache=cache)[:, -1]
    two = torch.stack([row[n + 10:n + 12] for row, n in zip(idx, lengths)])
    for row, (n, logit) in enumerate(zip(lengths, model(two, cache=cache, logits_to_keep=1))):
        assert torch.allclose(logit[0], alone[row, n + 11], atol=3e-5)


@torch.no_grad()
def test_rows_of_a_cache_are_selected_as_beam_search_needs_it(model, idx):
    """Of texts of one length and of several; rows may be repeated and dropped."""
    for lengths in ([5, 5, 5], [4, 9, 6]):
        prompts = [row[:n] for row, n in zip(idx, lengths)]
        _, cache = model.prefill(prompts, T)
        model(idx[:, -1:], cache=cache)
        cache.select_rows([2, 0, 0])
        logits = model(idx[:, :1], cache=cache)[:, -1]
        for row, source in enumerate([2, 0, 0]):
            text = torch.cat((prompts[source], idx[source, -1:], idx[row, :1]))
            assert torch.allclose(logits[row], model(text[None])[0, -1], atol=3e-5)


@torch.no_grad()
@pytest.mark.parametrize("passes, n", [([4], 3), ([4], 0), ([1, 1, 1], 2), ([3, 1, 4], 6), ([2, 3], 5)])
def test_a_rewound_cache_goes_on_as_if_nothing_had_been_read(model, idx, passes, n):
    """After a prompt of 9, some forward passes, of whose positions the last n are forgotten; and again from there."""
    _, cache = model.prefill([row[:9] for row in idx], T)
    size = cache.n_bytes()
    cache.rewindable = True
    kept, text = 9, idx[:, :9]
    for _ in range(2):
        new = torch.randint(V, (B, sum(passes)), generator=torch.Generator().manual_seed(kept))
        for part in new.split(passes, dim=1):
            model(part, cache=cache)
        cache.rewind(n)
        text, kept = torch.cat((text, new[:, :sum(passes) - n]), dim=1), kept + sum(passes) - n
        assert cache.length == kept and cache.n_bytes() == size
    cache.rewindable = False
    logits = model(idx[:, :2], cache=cache)
    assert torch.allclose(logits, model(torch.cat((text, idx[:, :2]), dim=1))[:, -2:], atol=3e-5)


@torch.no_grad()
def test_prefill_computes_a_repeated_prompt_once(model, idx, monkeypatch):
    """And afterwards its rows are independent."""
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **options: shapes.append(tuple(idx.shape)) or forward(idx, **options))
    prompts = [idx[0, :7], idx[1, :7], idx[0, :7].clone(), idx[2, :4], idx[2, :4]]
    logits, cache = model.prefill(prompts, T)
    assert sorted(shapes) == [(1, 4), (2, 7)]
    new = torch.tensor([[5], [6], [7], [8], [9]])
    next_logits = forward(new, cache=cache)[:, -1]
    for row, prompt in enumerate(prompts):
        assert torch.allclose(logits[row], forward(prompt[None])[0, -1], atol=3e-5)
        assert torch.allclose(next_logits[row], forward(torch.cat((prompt, new[row]))[None])[0, -1], atol=3e-5)
    _, cache = model.prefill([idx[0, :7]] * 3, T)
    assert cache.left_pad is None  # so that decoding needs no mask


@torch.no_grad()
@pytest.mark.parametrize("lengths, rows", [
    ([7], [0] * 5), ([7, 7], [0] * 4 + [1] * 4), ([5, 9, 5], [2, 0, 1, 1, 0, 0, 1, 2, 1, 0, 0, 0])])
def test_rows_that_share_a_prompt_decode_like_each_alone(model, idx, lengths, rows):
    """Then some of them go on, in another order; then those of one prompt. The prompts are kept once."""
    prompts = [row[:n] for row, n in zip(idx, lengths)]
    logits, cache = model.prefill([prompts[row] for row in rows], T)
    texts, rng = [prompts[row] for row in rows], torch.Generator().manual_seed(0)
    attention = [block.mixer for block in cache.blocks if type(block.mixer) is KVCache]
    assert all(len(part.prefix.keys) == len(lengths) and part.prefix.keys.size(2) == max(lengths) and
               part.keys.size(2) == T - max(lengths) for part in attention)
    for n_new, left in ((1, None), (3, None), (1, [5, 4, 1, 2]), (2, None), (1, [3, 0]), (2, None), (1, None)):
        if left and max(left) < len(texts):
            cache.select_rows(left)
            texts, logits = [texts[row] for row in left], logits[left]
        alone = model(pad_sequence(texts, batch_first=True))  # what follows a text does not change its logits
        for row, text in enumerate(texts):
            assert torch.allclose(logits[row], alone[row, len(text) - 1], atol=3e-5)
        new = torch.randint(V, (len(texts), n_new), generator=rng)
        texts = [torch.cat(pair) for pair in zip(texts, new)]
        logits = model(new, cache=cache)[:, -1]
    assert all(len(part.prefix.keys) <= len(texts) for part in attention)


def test_packed_documents_do_not_leak(model, idx):
    """Losses and gradients equal those of each document by itself."""
    cuts = [[0, 5, 6, T], [0, 1, 2, 20, T], [0, T]]
    doc_starts = torch.zeros(B, T, dtype=torch.bool)
    targets = idx.roll(-1, dims=1)
    total = 0.0
    for row, stops in enumerate(cuts):
        for start, stop in zip(stops, stops[1:]):
            doc_starts[row, start] = True
            total = total + model(idx[row:row + 1, start:stop], targets[row:row + 1, start:stop], reduction="none").sum()
    total.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    losses = model(idx, targets, reduction="none", doc_starts=doc_starts)
    losses.sum().backward()
    assert losses.sum().item() == pytest.approx(total.item(), rel=1e-5)
    for parameter, grad in zip(model.parameters(), expected):
        assert torch.allclose(parameter.grad, grad, rtol=1e-3, atol=2e-4 * max(1.0, grad.abs().max().item()))
    changed = idx.clone()
    changed[0, :5] = (changed[0, :5] + 1) % V
    other = model(changed, targets, reduction="none", doc_starts=doc_starts)
    assert torch.allclose(other[0, 5:], losses[0, 5:], atol=1e-6) and not torch.allclose(other[0, :5], losses[0, :5])


def test_a_new_mixer_that_needs_the_mask_gets_it(idx, monkeypatch):
    class Local(Attention):
        letter = "L"
    monkeypatch.setitem(MIXERS, "local", Local)
    monkeypatch.setitem(MIXERS_BY_LETTER, "L", Local)
    test_packed_documents_do_not_leak(random_model(mixer="local"), idx)
    test_a_batch_of_different_lengths_decodes_like_each_row_alone(random_model(mixer="DL"), idx, [9, 3, 9])


def test_doc_position_ids_by_hand():
    doc_starts = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    assert doc_position_ids(doc_starts).tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]


@torch.no_grad()
def test_cache_size_in_bytes_by_hand():
    """Keys and values of every slot, or a matrix per head; and the last position of each token shift."""
    for n_kv_head, slots in ((2, 10), (1, 10), (2, 300)):
        model = GPT(tiny_config(n_kv_head=n_kv_head))
        expected = 2 * 4 * (2 * B * n_kv_head * slots * 8 + 2 * B * 16)
        assert model.init_cache(B, slots).n_bytes() == expected
        assert model.init_cache(B, slots, torch.bfloat16).n_bytes() == expected / 2
    model = GPT(tiny_config(mixer="gated_delta"))
    assert model.init_cache(B, 10).n_bytes() == model.init_cache(B, 300).n_bytes() == 2 * 4 * (B * 2 * 8 * 8 + 2 * B * 16)
    model = GPT(tiny_config(mixer="sliding", window=20))  # and 8 slots more, so that the window need not move every time
    for slots, kept in ((10, 10), (24, 24), (30, 28), (300, 28)):
        assert model.init_cache(B, slots).n_bytes() == 2 * 4 * (2 * B * 2 * kept * 8 + 2 * B * 16)
    _, cache = GPT(tiny_config(n_kv_head=1)).prefill([torch.arange(7)] * 5, T)  # once before position 7, then for each row
    assert cache.n_bytes() == 2 * 4 * (2 * 1 * 8 * (7 + 5 * (T - 7)) + 2 * 5 * 16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initial_loss_is_log_vocab_size(architecture, idx):
    """Exactly with an untied zero head; a tied head and the other initialisations start with small logits instead."""
    torch.manual_seed(0)
    new = GPT(tiny_config(**architecture))
    is_zero = not new.config.tied and new.config.init == "zero"
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    assert new(idx, targets).item() == pytest.approx(math.log(V), abs=1e-4 if is_zero else 0.1)
    assert new(idx).std() == 0 if is_zero else 0.001 < new(idx).std() < 0.5


def test_overfits_one_batch(model, idx):
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-2)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 4e-2 * (1 - step / 300)
        loss = model(idx, idx.roll(-1, dims=1))
        if loss < 0.1:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the loss ended at {loss.item()}")


def test_chunked_loss_equals_cross_entropy_of_all_logits(model, idx, monkeypatch):
    targets = idx.roll(-1, dims=1).clone()
    targets[0, 3:9] = IGNORE_INDEX
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    expected.backward()
    expected_grads = [parameter.grad.clone() for parameter in model.parameters()]
    for chunk in (1, 7, B * T, 10_000):
        set_chunk_rows(monkeypatch, chunk)
        for reduction in ("mean", "none"):
            model.zero_grad()
            losses = model(idx, targets, reduction=reduction)
            if reduction == "none":
                assert losses.shape == (B, T) and (losses[0, 3:9] == 0).all()
                assert torch.equal(model.requires_grad_(False)(idx, targets, reduction="none"), losses)
                model.requires_grad_(True)
                losses = losses.sum() / (targets != IGNORE_INDEX).sum()
            losses.backward()
            assert losses.item() == pytest.approx(expected.item(), rel=1e-5)
            for parameter, grad in zip(model.parameters(), expected_grads):
                assert torch.allclose(parameter.grad, grad, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_never_holds_all_logits(model, idx, monkeypatch, reduction):
    """No tensor that the forward or backward pass creates has more than one chunk of rows of logits."""
    set_chunk_rows(monkeypatch, 8)
    rows = []

    class RecordRowsOfLogits(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() and out.size(-1) == V:
                rows.append(out.numel() // V)
            return out

    with RecordRowsOfLogits():
        model(idx, idx, reduction=reduction).sum().backward()
    # gradients of embedding and head have V as their first dimension, or as many rows as the model is wide
    assert rows and max(rows) <= max(8, model.config.n_embd)


def test_flops_equal_torchs_counter(model, idx):
    # torch does not count custom operations, nor flash attention on a CPU
    recurrence = lambda factors, *rest, **kwargs: 2 * math.prod(factors) * factors[-1]
    counter = partial(FlopCounterMode, display=False,
                      custom_mapping={getattr(torch.ops, gated_delta.NAMESPACE).linear_recurrence: recurrence})
    with sdpa_kernel(SDPBackend.MATH), counter() as counted:
        F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    hidden = [T - getattr(block.mixer, "n_visible", lambda n: n)(T) for block in model.unrolled_blocks()]
    expected = (model.flops_per_token() + 3 * 4 * model.config.n_embd * sum(hidden)) * B * T  # torch computes what it masks
    assert counted.get_total_flops() == expected
    with sdpa_kernel(SDPBackend.MATH), counter() as counted:
        model(idx, idx).backward()
    # the loss recomputes nothing; the counter misses its in-place addmm_ for the head's gradient
    assert 0.9 * expected < counted.get_total_flops() <= expected


def test_gradient_checkpointing_changes_no_number_and_saves_less(model, idx):
    results, saved_bytes = [], []

    def count(tensor):
        saved_bytes[-1] += tensor.numel() * tensor.element_size()
        return tensor
    for model.gradient_checkpointing in (False, True):
        saved_bytes.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results.append(loss_and_grads(model, idx))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))
    assert saved_bytes[1] < 0.6 * saved_bytes[0]


def test_gradient_checkpointing_does_not_affect_decoding(idx):
    model = random_model()
    model.gradient_checkpointing = True
    cache = model.init_cache(B, T)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in idx.split(7, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(idx), atol=1e-5)


# -- parts ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_value_residual_by_hand():
    """0 is the layer's own values, 1 the first layer's; the first layer has nothing to mix in."""
    model, x = random_model(), torch.randn(B, T, 16)
    first, second = (block.mixer for block in model.blocks)
    assert first.value_mix is None and second.value_mix.shape == ()
    metadata = AttentionMetadata()
    _, values = first(x, metadata)
    own = second.qkv(x).view(B, T, 3, 2, 8)[:, :, 2].transpose(1, 2)
    for mix, expected in ((0.0, own), (1.0, values), (0.25, 0.75 * own + 0.25 * values)):
        second.value_mix.fill_(mix)
        y, value = second(x, metadata, first_layer_v=values)
        assert torch.allclose(value, expected, atol=1e-6)
    second.value_mix.fill_(1.0)
    y, _ = second(x, metadata, first_layer_v=values)
    second.qkv.weight[32:] = 0  # its own values no longer matter
    assert torch.allclose(second(x, metadata, first_layer_v=values)[0], y)


@torch.no_grad()
def test_x0_residual_by_hand():
    model, x, x0 = random_model(), torch.randn(B, T, 16), torch.randn(B, T, 16)
    first, second = model.blocks
    assert first.x0_mix is None and GPT(tiny_config()).blocks[1].x0_mix.tolist() == [1, 0]
    values, metadata = torch.randn(B, 2, T, 8), AttentionMetadata()

    def run(mix: list[float], x, x0):
        second.x0_mix.copy_(torch.tensor(mix))
        return second(x, x0, None, values, metadata)[0]
    assert torch.equal(run([0.0, 1.0], x, x0), run([1.0, 0.0], x0, x))
    assert torch.equal(run([0.5, 0.25], x, x0), run([1.0, 0.0], 0.5 * x + 0.25 * x0, x0))


@torch.no_grad()
def test_softcap_bounds_large_logits_and_keeps_small_ones(idx):
    capped, free = random_model(softcap=15.0), random_model(softcap=0.0)
    for model in (capped, free):
        model.norm.register_forward_hook(lambda layer, args, y: 100 * y)
    assert free(idx).abs().max() > 30
    assert capped(idx).abs().max() <= 15
    assert torch.allclose(capped(idx), 15 * torch.tanh(free(idx) / 15))
    small = random_model(softcap=1e4)(idx), random_model(softcap=0.0)(idx)
    assert torch.allclose(*small, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [True, False])
def test_only_qk_norm_makes_the_scale_of_query_and_key_weights_irrelevant(qk_norm, idx):
    model = random_model(qk_norm=qk_norm)
    before = model(idx)
    for block in model.blocks:
        block.mixer.qkv.weight[:32] *= 8  # queries and keys
    assert torch.allclose(model(idx), before, atol=1e-3) == qk_norm


@pytest.mark.parametrize("name, activation", [("relu2", lambda x: F.relu(x) ** 2), ("gelu", F.gelu),
                                              ("gelu_tanh", partial(F.gelu, approximate="tanh"))])
def test_hand_written_mlp_gradients_equal_autograd(name, activation):
    mlp = MLPS[name](tiny_config(bias=True)).double()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 3, 16, dtype=torch.double, requires_grad=True)
    inputs = [x, *mlp.parameters()]
    expected = F.linear(activation(mlp.fc(x)), mlp.proj.weight, mlp.proj.bias)
    weights = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad((mlp(x) * weights).sum(), inputs),
                    torch.autograd.grad((expected * weights).sum(), inputs)):
        assert torch.allclose(a, b)
    assert torch.allclose(mlp(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_zero_init_every_block_starts_as_the_identity(architecture, idx):
    torch.manual_seed(0)
    new = GPT(tiny_config(**architecture | {"init": "zero"}))
    inputs = []
    for layer in (*new.blocks, new.norm):
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    new(idx)
    assert len(inputs) == 2 * new.loops + 1 and inputs[0].std() > 0
    if new.backout_coeff is not None:  # at the end, 0.2 of the stream in the middle is taken away
        assert torch.allclose(inputs.pop(), 0.8 * inputs[0])
    if new.config.init == "zero":  # nanochat's scales the stream
        assert all(torch.equal(x, inputs[0]) for x in inputs)


@torch.no_grad()
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_with_zero_init_hidden_linear_layers_preserve_the_variance(linear, mixer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=8, head_size=32, block_size=4, vocab_size=8, mlp="swiglu", linear=linear,
                          mixer=mixer, bias=True))
    block = model.blocks[0]
    zeros = block.mixer.proj, block.mlp.proj, getattr(block.mixer, "angles", None)
    layers = [layer for layer in linear_layers(block) if layer not in zeros]
    assert len(layers) == {"attention": 1, "sliding": 1, "gated_delta": 3, "delta_product": 3,
                           "rotary_delta": 3}[mixer] + 2
    for layer in layers:
        assert (layer.bias == 0).all()
        assert layer(torch.randn(1000, 256)).var().item() == pytest.approx(1, rel=0.15)


@torch.no_grad()
@pytest.mark.parametrize("n_embd, tied, norm", [(128, True, "rms"), (256, True, "layer"), (128, False, "layer")])
def test_with_zero_init_embeddings_give_small_logits(n_embd, tied, norm):
    """That is, the tied matrix times a normalised vector; at any width."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=n_embd // 32, head_size=32, block_size=4, vocab_size=512, tied=tied, norm=norm))
    logits = model.embed(torch.arange(512)) @ rms_norm(torch.randn(n_embd, 100).T).T
    assert logits.std().item() == pytest.approx(INITIAL_LOGIT_STD, rel=0.05)


@torch.no_grad()
def test_gpt2_init_by_hand():
    """0.02 for every matrix, and 1/√16 of it for the 2 * 8 layers that add to the residual stream."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, head_size=32, block_size=64, vocab_size=512, init="gpt2", bias=True,
                          norm="layer", positions="learned", tied=False))
    for block in model.blocks:
        for layer in (block.mixer.qkv, block.mlp.fc):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and (layer.bias == 0).all()
        for layer in (block.mixer.proj, block.mlp.proj):
            assert layer.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05) and (layer.bias == 0).all()
        assert (block.mlp_norm.weight == 1).all() and (block.mlp_norm.bias == 0).all()
    for layer in (model.embed, model.positions, model.head):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)


def rotated(rotary: Rotary, x: torch.Tensor, position: int) -> torch.Tensor:
    return rotate(x, rotary(slice(position, position + 1)))


def test_rotary_preserves_lengths_and_depends_only_on_distance():
    rotary = Rotary(8, 64)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    assert torch.allclose(rotated(rotary, q, 5).norm(), q.norm())
    products = [(rotated(rotary, q, start + 9) * rotated(rotary, k, start)).sum() for start in (0, 3, 50)]
    assert torch.allclose(torch.stack(products), products[0])
    assert not torch.allclose((rotated(rotary, q, 9) * rotated(rotary, k, 1)).sum(), products[0])


def test_rotary_by_hand():
    """Position 1 rotates channels (0, 2) by 1 radian and (1, 3) by 1/100, or by 1/10 with a base of 100."""
    x = torch.tensor([1.0, 0, 0, 1]).view(1, 1, 1, 4)
    for base, angle in ((10_000.0, 0.01), (100.0, 0.1)):
        expected = torch.tensor([math.cos(1), -math.sin(angle), math.sin(1), math.cos(angle)])
        assert torch.allclose(rotated(Rotary(4, 2, base), x, 1).flatten(), expected)


def test_parameter_count_of_the_default_shape():
    """12 layers of 12 * width² and two token shifts, a matrix of vocabulary * width; and in 11 layers two numbers of x0_mix,
    one of value_mix."""
    with torch.device("meta"):
        default, untied = GPT(GPTConfig(vocab_size=32_768)), GPT(GPTConfig(vocab_size=32_768, tied=False))
    assert default.n_parameters() == 12 * (12 * 768**2 + 2 * 768) + 32_768 * 768 + 11 * 3
    assert untied.n_parameters() == default.n_parameters() + 32_768 * 768
    assert untied.flops_per_token() == default.flops_per_token()  # tying saves parameters, not products


# -- GPT-2 ------------------------------------------------------------------------------------------------------------

def test_gpt2_parameter_count():
    """124,439,808 with learned positions and a tied head."""
    with torch.device("meta"):
        model = GPT(read_flags(GPTConfig, PRESETS["gpt2"] | {"vocab_size": 50_257}))
    assert model.n_parameters() == 124_439_808


@pytest.fixture
def gpt2_pair():
    """Our gpt2 preset with random weights, and transformers' GPT2LMHeadModel with the same weights."""
    transformers = pytest.importorskip("transformers")
    model = random_model(**GPT2 | {"n_layer": 3})
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=16, n_layer=3, n_head=2, activation_function="gelu", resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    names = {"embed.": "wte.", "positions.": "wpe.", "blocks.": "h.", "mixer_norm.": "ln_1.", "mlp_norm.": "ln_2.",
             "mixer.qkv.": "attn.c_attn.", "mixer.proj.": "attn.c_proj.", "mlp.fc.": "mlp.c_fc.",
             "mlp.proj.": "mlp.c_proj."}
    weights = {}
    for name, weight in model.state_dict().items():
        hf_name = "lm_head.weight" if name == "head.weight" else f"transformer.{name}"
        hf_name = re.sub(r"^transformer\.norm\.", "transformer.ln_f.", hf_name)
        for part, hf_part in names.items():
            hf_name = hf_name.replace(part, hf_part)
        is_conv1d = name.startswith("blocks.") and weight.dim() == 2  # which stores it transposed
        weights[hf_name] = weight.T if is_conv1d else weight
    reference.load_state_dict(weights)
    return model, reference


@pytest.mark.integration
def test_gpt2_equals_transformers(gpt2_pair, idx):
    model, reference = gpt2_pair
    expected = reference(idx, labels=idx)  # it shifts the labels itself
    assert torch.allclose(model(idx), expected.logits, atol=1e-4) and model(idx).std() > 0.5
    targets = F.pad(idx[:, 1:], (0, 1), value=IGNORE_INDEX)
    assert model(idx, targets).item() == pytest.approx(expected.loss.item(), abs=1e-5)


@pytest.mark.integration
def test_gpt2_gradients_equal_transformers(gpt2_pair, idx):
    model, reference = gpt2_pair
    reference(idx, labels=idx).loss.backward()
    model(idx, F.pad(idx[:, 1:], (0, 1), value=IGNORE_INDEX)).backward()
    assert torch.allclose(model.embed.weight.grad, reference.transformer.wte.weight.grad, atol=1e-5)
    assert torch.allclose(model.blocks[1].mlp.fc.weight.grad, reference.transformer.h[1].mlp.c_fc.weight.grad.T, atol=1e-5)


# -- checkpoints and flags --------------------------------------------------------------------------------------------

def test_checkpoint_round_trip(model, idx):
    other = GPT.from_checkpoint(model.to_checkpoint())
    assert other.config == model.config
    assert torch.equal(other(idx), model(idx))
    with pytest.raises(BadInput, match="its config (calls for|does not call for) blocks.*, which is"):
        GPT.from_checkpoint({"config": model.to_checkpoint()["config"] | {"n_layer": 3}, "model": model.state_dict()})


@pytest.mark.parametrize("changes, message", [
    ({"vocab_size": 10**8}, r"embed.weight is \(96, 16\), its config calls for \(100000000, 16\)"),
    ({"n_layer": 1000}, "weights are too few for the 1,000 layers"), ({"vocab_size": None}, "no vocab_size"),
    ({"n_layer": 1}, "its config does not call for blocks.1.*, which is among the weights"),
    ({"head_size": 10_000, "n_head": 10_000, "block_size": 24}, "its config calls for")], ids=str)
def test_weights_that_do_not_fit_the_config_are_refused_before_memory_is_taken(changes, message, monkeypatch):
    checkpoint, build = random_model().to_checkpoint(), GPT.__init__

    def build_on_meta(model, config):
        assert torch.get_default_device().type == "meta"
        build(model, config)
    monkeypatch.setattr(GPT, "__init__", build_on_meta)
    with pytest.raises(BadInput, match=message):
        GPT.from_checkpoint(checkpoint | {"config": checkpoint["config"] | changes})


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_must_be_floating_point_numbers(dtype):
    checkpoint = random_model().to_checkpoint()
    checkpoint["model"]["embed.weight"] = checkpoint["model"]["embed.weight"].to(dtype)
    with pytest.raises(BadInput, match=f"embed.weight is of {dtype}"):
        GPT.from_checkpoint(checkpoint)


def test_the_names_of_format_2_by_hand():
    w = torch.ones(2)
    weights = upgrade_weights({"blocks.0.shifts.1.share": w, "blocks.1.shortcut": w, "embed.weight": w})
    assert list(weights) == ["blocks.0.shifts.1.shift_coeff", "blocks.1.x0_mix", "embed.weight"]
    assert upgrade_config({"embed_shortcut": True, "n_layer": 2}) == {"x0_residual": True, "n_layer": 2}
    checkpoint = random_model().to_checkpoint()  # of the present format
    assert upgrade_config(checkpoint["config"]) == checkpoint["config"]
    assert list(upgrade_weights(checkpoint["model"])) == list(checkpoint["model"])


@pytest.mark.parametrize("values, message", [
    ({"n_layer": 0}, "--n_layer=0"), ({"n_head": 0}, "--n_head=0"), ({"block_size": 0}, "--block_size=0"),
    ({"vocab_size": 0}, "--vocab_size=0"), ({"softcap": -1.0}, "--softcap=-1.0"),
    ({"head_size": 7}, "--head_size=7: must be even"), ({"norm": "batch"}, "--norm=batch: choose one of rms"),
    ({"mlp": "kan?"}, "--mlp=kan?: choose one of auto, relu2"), ({"init": "ones"}, "--init=ones: choose one of zero, gpt2"),
    ({"positions": "no"}, "--positions=no: choose one of rotary, learned, none"),
    ({"mixer": "rnn"}, "--mixer=rnn: choose one of attention"), ({"mixer": "DA", "n_layer": 1}, "at most --n_layer=1"),
    ({"block_size": 10_000_000}, "--block_size=10000000: with --head_size=64, rotary embeddings support at most 2,097,152"),
    ({"n_head": 4, "n_kv_head": 3}, "--n_kv_head=3: must divide --n_head=4"),
    ({"window": 4}, "--window=4: --mixer=attention has no layer of sliding: "), ({"window": 0}, "--window=0"),
    ({"n_householder": 2, "mixer": "DA"}, "--n_householder=2: --mixer=DA has no layer of delta_product: "),
    ({"d_conv": 4, "mixer": "SA"}, "--d_conv=4: --mixer=SA has no layer of gated_delta or delta_product or "
                                   "rotary_delta: leave it out, or give --mixer=gated_delta or a pattern with D"),
    ({"d_head_size": 5, "mixer": "DA"}, "--d_head_size=5: must divide the width, 768"),
    ({"d_head_size": 3, "mixer": "AR"}, "--d_head_size=3: must be even"),
    ({"value_embeddings": True, "mixer": "gated_delta"}, "--value_embeddings: with --mixer=gated_delta, none"),
    ({"qk_scale": 0.0}, "--qk_scale=0.0: must be above 0"),
    ({"mixer": "DA", "n_kv_head": 1}, "--n_kv_head=1: needs attention in every layer")])
def test_impossible_configs_are_refused(values, message):
    with pytest.raises(BadInput, match=re.escape(message)):
        GPTConfig(**{"vocab_size": 10} | values)


# -- norm and token shift ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_of_small_vectors_in_every_dtype(dtype):
    """torch 2.6's rms_norm adds 0.008 to the mean square in bf16."""
    x = torch.full((4, 64), 0.03, dtype=dtype)
    assert torch.allclose(rms_norm(x).float(), torch.ones(4, 64), atol=0.01)


def value_and_gradients(f, *inputs):
    """f(*inputs), and the gradients of a sum in which every output has a different weight."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    return y, *torch.autograd.grad(y.float(), inputs, torch.linspace(-1, 2, y.numel()).view_as(y))


def assert_same_gradients(f, g, *inputs, tolerance=1e-5):
    for a, b in zip(value_and_gradients(f, *inputs), value_and_gradients(g, *inputs), strict=True):
        assert a.dtype == b.dtype and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_rms_norm_equals_torchs():
    """With gradients: large, small and zero vectors, and ones that are not contiguous."""
    x = torch.randn(5, 7, 16) * torch.logspace(-9, 9, 5)[:, None, None]
    x[2, 3] = 0

    def torch_rms_norm(x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=torch.finfo(torch.float32).eps)
    for rows, tolerance in ((x[1:4], 1e-5), (x.transpose(1, 2)[1:4, :, ::2], 1e-5), (x[2:].bfloat16(), 1e-2)):
        for save_input in (False, True):
            assert_same_gradients(partial(rms_norm, save_input=save_input), torch_rms_norm, rows, tolerance=tolerance)
    assert torch.autograd.gradcheck(rms_norm, torch.randn(2, 8, dtype=torch.float64, requires_grad=True))


def test_token_shift_gradients_equal_autograd():
    x, coeff = torch.randn(2, 5, 4), torch.randn(4)
    assert_same_gradients(TokenShiftFunction.apply, lambda x, coeff: x + coeff * F.pad(x[:, :-1], (0, 0, 1, 0)), x, coeff)


def test_token_shift_by_hand():
    shift = TokenShift(GPTConfig(n_head=1, head_size=2, vocab_size=3))
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert torch.equal(shift(x, AttentionMetadata()), x)  # the coefficients start at zero
    torch.nn.init.constant_(shift.shift_coeff[:1], 0.5)
    assert shift(x, AttentionMetadata()).tolist() == [[[1, 2], [3.5, 4], [6.5, 6]]]
