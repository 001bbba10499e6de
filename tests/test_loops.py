"""Recurrent depth (--loops): the unrolled network, its cache, drawn depths, and --loops at inference."""
import io
import math
import random

import numpy as np
import pytest
import torch
from test_model import ARCHITECTURES, B, T, V, loss_and_grads, random_model, tiny_config
from test_sampling import BYTES, SHAPE

import chat
import evaluate
import generate
import train
import trainer
from conftest import run_rows
from layers.loss import cross_entropy, softcap_logits
from layers.norm import rms_norm
from model import GPT, MAX_LOOPS_RATIO
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.config import BadInput
from runtime.device import Machine, compile_in_place
from runtime.run import LATER_FLAGS
from sampling import load_model
from selfplay import PlayerModel

CPU = Machine(torch.device("cpu"), "fp32")
LOOPED = [pytest.param({"n_layer": n_layer, "loops": loops, **switches}, id=f"{n_layer}x{loops}" + "".join(
    f",{name}={value}" for name, value in switches.items()))
    for n_layer, loops, switches in ((1, 3, {}), (2, 2, {"mixer": "DA"}), (3, 4, {}), (4, 2, {"mixer": "DA"}),
                                     (5, 3, {"token_shift": False, "x0_residual": False}))]


@pytest.fixture
def idx():
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def unroll(n_layer: int, loops: int) -> list[int]:
    """Which layer runs when."""
    layers = range(n_layer)
    return [*layers] * loops if n_layer < 3 else [0, *[*layers][1:-1] * loops, n_layer - 1]


# -- the network ------------------------------------------------------------------------------------------------------

def test_the_order_of_the_blocks_by_hand():
    assert unroll(1, 3) == [0, 0, 0] and unroll(2, 2) == [0, 1, 0, 1] and unroll(4, 2) == [0, 1, 2, 1, 2, 3]
    for n_layer, loops in ((1, 3), (2, 2), (3, 4), (4, 2), (4, 1)):
        model = GPT(tiny_config(n_layer=n_layer))
        assert model.unrolled_blocks(loops) == [model.blocks[layer] for layer in unroll(n_layer, loops)]
        assert model.unrolled_blocks() == [*model.blocks]


def plain_loss(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The forward pass of a model without loops."""
    metadata, positions = model.attention_metadata(idx, None, None)
    x = model.embed(idx)
    if model.positions is not None:
        x = x + model.positions.weight[positions]
    x = rms_norm(x) if model.config.norm == "rms" else x
    x = x0 = model.smear(x, metadata) if model.smear is not None else x
    ngrams = model.ngrams and model.ngrams(idx, metadata)
    x, first_v = model.blocks[0](x, x0, ngrams, None, metadata)
    stream = [x]
    for block in model.blocks[1:]:
        x, _ = block(x, x0, ngrams, first_v, metadata)
        stream.append(x)
    if model.backout_coeff is not None:
        x = x - model.backout_coeff * stream[len(model.blocks) // 2]
    return cross_entropy(model.norm(x), model.head.weight, targets, model.config.softcap, "mean")


@pytest.mark.parametrize("switches", ARCHITECTURES)
def test_one_loop_is_the_plain_model_bit_for_bit(switches, idx):
    """Loss and gradients; the number of loops may come from the config or be set."""
    switches = {name: value for name, value in switches.items() if "loops" not in name}
    if "dense_blocks" in switches:
        pytest.skip("loops are refused")
    model, targets = random_model(**switches, n_layer=3, loops=1), idx.roll(-1, dims=1)
    loss, grads = loss_and_grads(model, idx)
    model.zero_grad()
    expected = plain_loss(model, idx, targets)
    expected.backward()
    looped = random_model(**switches, n_layer=3, loops=2)
    looped.loops = 1
    assert torch.equal(looped(idx, targets), expected) and not torch.equal(looped(idx, targets, loops=2), expected)
    assert loss == expected.item() and all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads))


@pytest.mark.parametrize("switches", LOOPED)
def test_logits_and_gradients_equal_a_forward_pass_that_is_written_out(switches, idx):
    """With the same weights in every loop, x0 mixed in each time, and the values of the very first block as the first
    layer's. A deep model with copies of the weights has the same sums as gradients."""
    model = random_model(**switches)
    metadata, _ = model.attention_metadata(idx, None, None)
    x = x0 = rms_norm(model.embed(idx))
    values = []
    for layer in unroll(switches["n_layer"], switches["loops"]):
        block = model.blocks[layer]
        if block.x0_mix is not None:
            x = block.x0_mix[0] * x + block.x0_mix[1] * x0
        shift = lambda i, x, block=block: x if block.shifts is None else block.shifts[i](x, metadata)
        y, v = block.mixer(shift(0, block.mixer_norm(x)), metadata, None, values[0] if values else None)
        values.append(v)
        x = x + y
        x = x + block.mlp(shift(1, block.mlp_norm(x)))
    expected = softcap_logits(model.norm(x), model.head.weight, model.config.softcap)
    assert torch.allclose(model(idx), expected, atol=1e-5)
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), idx.roll(-1, dims=1).flatten()).backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    for a, b in zip(loss_and_grads(model, idx)[1], grads):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_more_loops_compute_something_else_with_as_many_parameters(idx):
    plain, looped = random_model(n_layer=3), random_model(n_layer=3, loops=3)
    assert looped.n_parameters() == plain.n_parameters() and plain.state_dict().keys() == looped.state_dict().keys()
    assert not torch.allclose(looped(idx), plain(idx), atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("switches", LOOPED)
@pytest.mark.parametrize("loops", [1, 2, 4])
def test_loops_that_are_set_equal_a_model_of_that_config(switches, loops, idx):
    """Also in its cache and FLOPs; the argument of `forward` holds for one call."""
    model, other = random_model(**switches), random_model(**switches | {"loops": loops})
    assert torch.equal(model(idx, loops=loops), other(idx))
    assert torch.equal(model(idx), random_model(**switches)(idx))
    model.loops = loops
    assert torch.equal(model(idx), other(idx))
    assert model.flops_per_token() == other.flops_per_token()
    assert model.elementwise_flops_per_token() == other.elementwise_flops_per_token()
    assert model.to_checkpoint()["config"]["loops"] == switches["loops"]
    assert GPT.from_checkpoint(model.to_checkpoint()).loops == switches["loops"]
    check_decoding(model, idx)


def check_decoding(model: GPT, idx: torch.Tensor):
    """Prompts of several lengths, decoded with the cache, equal the full forward pass of each row."""
    lengths = [5, 12, 1]
    logits, cache = model.prefill([row[:n] for row, n in zip(idx, lengths)], T)
    assert len(cache.blocks) == len(model.unrolled_blocks())
    for step in range(8):
        for row, n in enumerate(lengths):
            assert torch.allclose(logits[row], model(idx[row:row + 1, :n + step])[0, -1], atol=5e-5)
        new = torch.stack([row[n + step:n + step + 1] for row, n in zip(idx, lengths)])
        logits = model(new, cache=cache)[:, -1]


def test_a_cache_belongs_to_a_number_of_loops(idx):
    model = random_model(n_layer=3, loops=2)
    cache = model.init_cache(B, T)
    model.loops = 3
    with pytest.raises(AssertionError, match="another number of loops"):
        model(idx, cache=cache)


def test_flops_count_every_loop_by_hand():
    counts = [GPT(tiny_config(n_layer=4, loops=loops)).flops_per_token() for loops in (1, 2, 5)]
    layer = (counts[0] - GPT(tiny_config(n_layer=3)).flops_per_token())
    assert [count - counts[0] for count in counts] == [0, 2 * layer, 8 * layer]


@torch.no_grad()
def test_gpt2_init_counts_the_blocks_that_run():
    """8 layers of which 6 run 3 times add 2 * 20 numbers to the residual stream."""
    torch.manual_seed(0)
    model = GPT(tiny_config(n_layer=8, n_head=4, head_size=32, init="gpt2", loops=3))
    for block in model.blocks:
        assert block.mlp.proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(40), rel=0.05)
        assert block.mlp.fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_compiled_model_has_the_gradients_of_an_eager_one(idx, monkeypatch):
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_model(self, backend="aot_eager"))
    model = random_model(n_layer=3, loops=3)
    loss, grads = loss_and_grads(model, idx)
    torch._dynamo.reset()
    assert compile_in_place(model, lambda: loss_and_grads(model, idx))
    compiled_loss, compiled_grads = loss_and_grads(model, idx)
    assert compiled_loss == loss and all(torch.equal(a, b) for a, b in zip(compiled_grads, grads))


# -- drawn numbers of loops -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loops", [2, 4, 16])
def test_drawn_loops_have_the_mean_and_variance_of_their_distribution(loops):
    """Of 1 + Poisson of a log-normal rate with mean r = loops - 1: variance r + r² (e^σ² - 1). 5 sigma bounds."""
    model, n, rate = GPT(tiny_config(loops=loops, sampled_loops=True)), 20_000, loops - 1
    random.seed(0)
    drawn = np.array([model.draw_loops() for _ in range(n)])
    variance = rate + rate**2 * math.expm1(0.25)
    assert abs(drawn.mean() - loops) < 5 * math.sqrt(variance / n) + 0.002 * loops  # the largest are cut off
    assert drawn.var() == pytest.approx(variance, rel=0.1)
    assert drawn.min() == 1 and drawn.max() <= MAX_LOOPS_RATIO * loops == model.config.max_loops
    assert (drawn == 1).mean() == pytest.approx(np.exp(-np.random.lognormal(
        math.log(rate) - 0.125, 0.5, n)).mean(), abs=0.02)


def test_only_training_draws(idx):
    """Losses and logits without gradient, learning at inference and a dry run take exactly --loops, and draw nothing."""
    model = random_model(n_layer=3, loops=3, sampled_loops=True)
    fixed = random_model(n_layer=3, loops=3)
    random.seed(0)
    losses = {trainer.next_token_loss(model, (idx, idx)).item() for _ in range(20)}
    assert len(losses) > 3
    before = random.getstate()
    train.dry_run(model, CPU, 2)
    assert torch.equal(model(idx), fixed(idx)) and model(idx, idx) == fixed(idx, idx)
    assert trainer.next_token_loss(fixed, (idx, idx)) == fixed(idx, idx)
    assert random.getstate() == before and model.sampled_loops
    assert fixed(idx, idx).item() in losses


def test_a_dry_run_takes_the_most_memory_of_a_training_batch(run_train, monkeypatch):
    """That of --batch_size=auto, and the forecast."""
    loops, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args, **options: loops.append(
        options.get("loops") or self.loops) or forward(self, *args, **options))
    run_train("--loops=2", "--sampled_loops", "--batch_size=auto", "--max_iter=1")
    assert loops[0] == 8 and max(loops) == 8
    loops.clear()
    run_train("--loops=2", "--sampled_loops", "--dry_run")
    assert loops[0] == 8 and set(loops[1:]) == {2}


@pytest.mark.parametrize("flags, words", [
    (["--sampled_loops"], ["--sampled_loops: draws around --loops: give 2 or more"]),
    (["--loops=0"], ["--loops=0: must be at least 1"]),
    (["--loops=3", "--sampled_loops", "--compile_model"], ["--compile_model=1: a model with --sampled_loops"])])
def test_flags_that_do_not_fit_are_refused(flags, words, data_path, tmp_path, refused):
    refused(train.main, [f"--data_path={data_path}", f"--checkpoint_path={tmp_path / 'run' / 'gpt.pt'}", "--n_layer=2",
                         "--block_size=16", "--n_head=1", "--head_size=8", *flags], *words)
    assert not (tmp_path / "run").exists()


def test_sampled_loops_are_not_compiled_by_themselves(run_train, monkeypatch):
    called = []
    monkeypatch.setattr(trainer, "can_compile", lambda device: True)
    monkeypatch.setattr(trainer, "compile_where_faster", lambda run: called.append(run.state.model.config.sampled_loops))
    for flags in (["--sampled_loops"], []):
        run_train("--loops=2", *flags, "--max_iter=1", checkpoint=f"{len(flags)}/gpt.pt")
    assert called == [False]


def test_a_player_does_not_draw():
    with pytest.raises(BadInput, match="--sampled_loops: a player learns with the number of loops that it plays with"):
        PlayerModel(loops=2, sampled_loops=True)


# -- checkpoints and commands -----------------------------------------------------------------------------------------

def test_a_checkpoint_from_before_there_were_loops_resumes(run_train):
    """And other flags of models that came later."""
    expected = run_train("--max_iter=3", checkpoint="a/gpt.pt")
    old = run_train("--max_iter=3", checkpoint="b/gpt.pt")
    checkpoint = load_checkpoint(old)
    for name in LATER_FLAGS.keys() & checkpoint["config"].keys():
        assert LATER_FLAGS[name] == checkpoint["config"].pop(name) == checkpoint["training"]["settings"].pop(name)
    save_checkpoint(old, checkpoint)
    for name in "ab":
        run_train("--resume_checkpoint", "--max_iter=5", checkpoint=f"{name}/gpt.pt")
    assert run_rows(old) == run_rows(expected)


def test_a_run_says_that_its_model_is_looped(run_train, capsys):
    run_train("--loops=3", "--sampled_loops", "--max_iter=1", "--verbose=1", "--sample_tokens=0")
    assert "2 layers x 16 looped 3 times on average, attention and gelu" in capsys.readouterr().out


@pytest.fixture
def looped(tmp_path) -> str:
    """The flag with a model of bytes."""
    path = tmp_path / "looped.pt"
    model = random_model(**SHAPE | {"n_layer": 3, "loops": 2})
    save_checkpoint(path, model.to_checkpoint() | {"tokenizer": BYTES.to_json()})
    return f"--checkpoint_path={path}"


@pytest.mark.parametrize("chats", [[], ["--chat"], ["--chat", "--adapt"]], ids=" ".join)
def test_loops_reach_the_model_that_generates(looped, chats, capsys, monkeypatch):
    """generate.py, with --chat what chat.py does too."""
    loops, prefill = [], GPT.prefill
    monkeypatch.setattr(GPT, "prefill", lambda self, *args: loops.append(self.loops) or prefill(self, *args))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    outputs = []
    for more in ([], ["--loops=2"], ["--loops=5"]):
        generate.main([looped, "--prompt=hi", "--max_new_tokens=9", "--temperature=0", "--device=cpu", *chats, *more])
        outputs.append(capsys.readouterr().out)
    assert loops == [2, 2, 5] and outputs[0] == outputs[1] != outputs[2]
    chat.main([looped, "--prompt=hi", "--max_new_tokens=9", "--device=cpu", "--loops=7"])
    assert loops[-1] == 7


def test_evaluate_takes_loops_for_all_models(looped, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some text to score")
    (tmp_path / "copy.pt").write_bytes((tmp_path / "looped.pt").read_bytes())
    paths = [str(tmp_path / name) for name in ("looped.pt", "copy.pt")]

    def scores(*more) -> list[str]:
        evaluate.main(["--checkpoint_path", *paths, f"--dataset={text}", "--device=cpu", "--dtype=fp32", *more])
        out = capsys.readouterr().out
        assert ("with --loops=4" in out) == (more[:1] == ("--loops=4",))
        return next(line for line in out.splitlines() if line.startswith("| bits per byte |")).split(" | ")[2:]
    plain, deeper = scores(), scores("--loops=4")
    assert plain[0] == plain[1].rstrip(" |") != deeper[0] == deeper[1].rstrip(" |")
    assert scores("--loops=4", "--adapt")[0] == deeper[0]
    model, _ = load_model(tmp_path / "looped.pt", CPU, loops=4)
    assert (model.loops, model.config.loops) == (4, 2)


def test_loops_below_one_are_refused(looped, refused):
    refused(generate.main, [looped, "--loops=0"], "--loops=0: must be at least 1")
