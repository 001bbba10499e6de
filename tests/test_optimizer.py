import itertools
import math

import pytest
import torch

from model import GPT, GPTConfig
from optimizer import (
    MOMENTUM,
    RUN_DECAY,
    Muon,
    MuonAdamW,
    OptimizerConfig,
    lr_scale,
    make_optimizer,
    newton_schulz,
    parameter_groups,
    set_rates,
)
from runtime.config import BadInput, read_flags
from train import PRESETS

OPTIMIZERS = ["muon", "adamw", "gpt2"]
ARCHITECTURES = {"default": {}, "untied": {"tied": False}, "gpt2": PRESETS["gpt2"], "gpt2 untied":
                 PRESETS["gpt2"] | {"tied": False}, "swiglu": {"mlp": "swiglu", "bias": True, "positions": "learned"},
                 "kan": {"linear": "grkan", "mixer": "DA"}}


def model_of(**values) -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 1, "head_size": 4, "block_size": 4, "vocab_size": 11}
    return GPT(read_flags(GPTConfig, values | shape))


@pytest.fixture
def model() -> GPT:
    return model_of()


def backward(model: GPT, scale: float = 1.0):
    (scale * model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))).backward()


# -- schedule ---------------------------------------------------------------------------------------------------------

def scales(n: int, **values) -> list[float]:
    config = OptimizerConfig(**values)
    return [lr_scale(step, step / n, config) for step in range(n)]


def test_schedule_by_hand():
    assert scales(8, warmup_iter=3, cooldown_frac=0.5) == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]


def test_schedules_at_their_edges():
    assert scales(3, warmup_iter=0, cooldown_frac=0) == [1, 1, 1]
    everything = scales(4, warmup_iter=99, cooldown_frac=1)
    assert everything == [0.01, 0.02, 0.03, 0.04]  # a warmup longer than the run is only begun
    assert min(scales(7, warmup_iter=3, cooldown_frac=1)) > 0


def test_the_schedule_follows_progress_not_steps():
    """A run that ends by tokens or seconds: half of it done is half of it done, after 3 steps or 3 million."""
    config = OptimizerConfig(warmup_iter=2, cooldown_frac=0.4)
    assert [lr_scale(step, 0.8, config) for step in (3, 3_000_000)] == pytest.approx([0.5, 0.5])
    assert lr_scale(0, 0.999, config) == pytest.approx(0.0025)  # lower than the warmup's third


@pytest.mark.parametrize("warmup, n", [(5, 50), (0, 10), (2000, 600_000)])
def test_cosine_is_nanogpts(warmup, n):
    """https://github.com/karpathy/nanoGPT/blob/master/train.py, get_lr, with min_lr a tenth of learning_rate."""
    def get_lr(it):
        learning_rate, min_lr = 6e-4, 6e-5
        if it < warmup:
            return learning_rate * (it + 1) / (warmup + 1)
        coefficient = 0.5 * (1 + math.cos(math.pi * (it - warmup) / (n - warmup)))
        return min_lr + coefficient * (learning_rate - min_lr)

    config = OptimizerConfig(schedule="cosine", warmup_iter=warmup, learning_rate=6e-4)
    for step in {*range(min(n, 50)), warmup - 1, warmup, warmup + 1, n // 2, n - 1} - {-1}:
        assert 6e-4 * lr_scale(step, step / n, config) == pytest.approx(get_lr(step), rel=1e-6), step


def test_rates_before_each_step(model):
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=0.02))
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    momenta = []
    for step in (0, 100, 200, 5000):
        set_rates(optimizer, step, 0.85, OptimizerConfig(warmup_iter=0))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25 * peak for peak in peaks])
        momenta += [group["momentum"] for group in optimizer.parts["muon"].param_groups[:1]]
    assert momenta == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert not any("momentum" in group for group in optimizer.parts["adamw"].param_groups)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("rate, n", [(0.02, 100), (0.06, 400)])
def test_weight_decay_fits_the_run(model, optimizer, rate, n):
    """At a constant rate the logarithm of what decay leaves of a matrix is -RUN_DECAY, however long the run, at any rate."""
    config = OptimizerConfig(optimizer=optimizer, learning_rate=rate, warmup_iter=0, cooldown_frac=0)
    optimizer = make_optimizer(model, config)
    sums = [0.0] * len(optimizer.param_groups)
    for step in range(n):
        set_rates(optimizer, step, step / n, config)
        sums = [sum_ + group["lr"] * group["weight_decay"] for sum_, group in zip(sums, optimizer.param_groups)]
    for sum_, group in zip(sums, optimizer.param_groups):
        in_blocks = group["params"][0].dim() == 2 and group["params"][0] is not model.embed.weight
        assert sum_ == pytest.approx(RUN_DECAY * (n - 1) / n if in_blocks else 0.0)  # no length is known at the first step
        assert group["lr"] * group["weight_decay"] <= 0.05
    set_rates(short := make_optimizer(model, config), 1, 0.5, config)
    assert short.param_groups[0]["lr"] * short.param_groups[0]["weight_decay"] == pytest.approx(0.05)
    fixed = make_optimizer(model, OptimizerConfig(weight_decay=0.25))
    set_rates(fixed, 3, 0.5, config)
    assert [group["weight_decay"] for group in fixed.parts["muon"].param_groups] == [0.25] * 2


# -- groups -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer, architecture", itertools.product(OPTIMIZERS, ARCHITECTURES))
def test_every_parameter_is_in_one_group(optimizer, architecture):
    model = model_of(**ARCHITECTURES[architecture])
    groups = make_optimizer(model, OptimizerConfig(optimizer=optimizer, weight_decay=0.3)).param_groups
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    methods = {id(p): group["method"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and name.endswith("weight")
        in_block = is_matrix and name.startswith("blocks.")
        assert decays[id(parameter)] == (0.3 if (is_matrix if optimizer == "gpt2" else in_block) else 0), name
        assert methods[id(parameter)] == ("muon" if in_block and optimizer == "muon" else "adamw"), name


def test_the_default_rate_fits_the_tokens_of_a_step(model):
    """The root of their number, up to 8,192. A rate that is given is taken as it is."""
    def peaks(step_tokens, **config):
        return [group["peak_lr"] for group in make_optimizer(model, OptimizerConfig(**config), step_tokens).param_groups]
    full = peaks(8192)
    assert full[0] == 0.05 and peaks(65_536) == full
    assert peaks(2048) == pytest.approx([rate / 2 for rate in full])
    assert peaks(2048, learning_rate=0.05) == full
    assert max(peaks(8192, optimizer="gpt2")) == pytest.approx(0.005)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learning_rate_scales_all_groups(model, optimizer):
    slow, fast = (make_optimizer(model, OptimizerConfig(optimizer=optimizer, learning_rate=rate)) for rate in (1e-3, 4e-3))
    for each in (slow, fast):
        set_rates(each, 0, 0.0, OptimizerConfig(warmup_iter=1))
    assert [group["lr"] for group in fast.param_groups] == pytest.approx([4 * group["lr"] for group in slow.param_groups])
    assert slow.param_groups[0]["lr"] == pytest.approx(0.5 * (1e-4 if optimizer == "adamw" else 1e-3))


def test_gpt2_has_one_rate_and_nanogpts_averages():
    model = model_of(**PRESETS["gpt2"])
    optimizer = make_optimizer(model, read_flags(OptimizerConfig, PRESETS["gpt2"]))
    for group in optimizer.param_groups:
        assert (group["peak_lr"], group["betas"], group["eps"]) == (6e-4, (0.9, 0.95), 1e-8)
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
        assert group["weight_decay"] in (0.0, 0.1)


# -- Muon -------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (7, 5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
def test_muon_equals_torchs(shape, weight_decay, momentum_dtype):
    """Through several steps, several matrices of a shape at once and one of another beside them."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(*size)) for size in (shape, shape, (8, 24))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Muon([{"params": ours, "lr": 0.05, "weight_decay": weight_decay, "stacked": 1}], torch.bfloat16,
                     momentum_dtype)
    oracle = torch.optim.Muon(theirs, lr=0.05, weight_decay=weight_decay, momentum=MOMENTUM, nesterov=True, ns_steps=5,
                              adjust_lr_fn="original")
    start = [p.detach().clone() for p in ours]
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        oracle.step()
    for a, b, before in zip(ours, theirs, start):
        assert torch.allclose(a, b, atol=4e-3)  # bf16; without Nesterov it would be 1.5e-2
        assert (a - before).abs().max() > 0.05 and optimizer.state[a]["momentum"].dtype == momentum_dtype


def test_stacked_matrices_are_orthogonalised_one_by_one():
    torch.manual_seed(0)
    whole, parts = torch.nn.Parameter(torch.randn(48, 16)), [torch.nn.Parameter(torch.empty(16, 16)) for _ in range(3)]
    group, precise = {"lr": 0.1, "weight_decay": 0.1}, (torch.float32, torch.float32)
    as_one = Muon([group | {"params": [whole], "stacked": 3}], *precise)
    as_three = Muon([group | {"params": parts, "stacked": 1}], *precise)
    for part, rows in zip(parts, whole.detach().split(16)):
        part.data.copy_(rows)
    for _ in range(3):
        whole.grad = torch.randn_like(whole)
        for part, rows in zip(parts, whole.grad.split(16)):
            part.grad = rows.clone()
        as_one.step()
        as_three.step()
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    alone = torch.nn.Parameter(whole.detach().clone())  # as one matrix it would be another step
    alone.grad = torch.randn(48, 16)
    whole.grad = alone.grad.clone()
    before = whole.detach().clone()
    Muon([group | {"params": [alone], "stacked": 1}], *precise).step()
    Muon([group | {"params": [whole], "stacked": 3}], *precise).step()
    assert (whole - alone).abs().max() > 0.01 and not torch.equal(whole, before)


def test_queries_keys_and_values_are_three_matrices(model):
    groups = parameter_groups(model, OptimizerConfig(), 8192)
    stacked = {id(p): group["stacked"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert stacked[id(parameter)] == (3 if name.endswith("mixer.qkv.weight") else 1), name


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_become_about_one(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, *shape) * torch.tensor([1e-4, 1.0, 1e4, 1.0]).view(4, 1, 1)
    update = newton_schulz(x, dtype).float()
    values = torch.linalg.svdvals(update)
    if shape[0] != shape[1]:  # a square random matrix has singular values near 0, which five steps lift only so far
        assert values.min() > 0.6
    assert values.max() < 1.25 and values.median() > 0.65
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    cosine = (update * (u @ v)).sum((1, 2)) / update.norm(dim=(1, 2)) / (u @ v).norm(dim=(1, 2))
    assert cosine.min() > 0.9
    assert torch.equal(newton_schulz(torch.zeros(1, *shape), dtype), torch.zeros(1, *shape, dtype=dtype))


def snapshot(model: GPT, optimizer: MuonAdamW) -> list[torch.Tensor]:
    states = [value for part in optimizer.parts.values() for state in part.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *states]]


STEPS = [MuonAdamW.step, MuonAdamW.masked_step]  # as the host sees to it, and as a GPU does


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_a_skipped_step_changes_nothing(model, optimizer, bad, step):
    """Neither weights nor momentum, averages or step counts; and the run goes on as if the step had not been."""
    config = OptimizerConfig(optimizer=optimizer, weight_decay=0.5)
    twin = model_of()
    a, b = make_optimizer(model, config), make_optimizer(twin, config)
    for each, its in ((a, model), (b, twin)):
        backward(its)
        step(each, torch.tensor(False))
        each.zero_grad()
    before = snapshot(model, a)
    assert len(before) > len(list(model.parameters()))
    backward(model, bad)
    step(a, torch.tensor(True))
    a.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(snapshot(model, a), before))
    for each, its in ((a, model), (b, twin)):
        backward(its)
        step(each, torch.tensor(False))
    assert all(torch.equal(x, y) for x, y in zip(snapshot(model, a), snapshot(twin, b)))
    assert not all(torch.equal(x, y) for x, y in zip(snapshot(model, a), before))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_first_step_that_is_skipped_changes_nothing(model, optimizer, step):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    skipping = make_optimizer(model, OptimizerConfig(optimizer=optimizer, weight_decay=0.5))
    backward(model, math.nan)
    step(skipping, torch.tensor(True))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before))
    for part in skipping.parts.values():
        assert all((value == 0).all() for state in part.state.values() for value in state.values())


# -- state ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("momentum_dtype", ["bf16", "fp32"])
def test_a_loaded_optimizer_keeps_averages_and_obeys_new_rates(model, momentum_dtype):
    old = make_optimizer(model, OptimizerConfig(learning_rate=1e-3, momentum_dtype=momentum_dtype))
    backward(model)
    set_rates(old, 0, 0.0, OptimizerConfig())
    old.step()
    new = make_optimizer(model, OptimizerConfig(learning_rate=5e-3, weight_decay=0.125, momentum_dtype=momentum_dtype))
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["peak_lr"] == 5e-3 and new.param_groups[0]["weight_decay"] == 0.125
    for name, part in new.parts.items():
        assert part.state.keys() == old.parts[name].state.keys() != set()
        for parameter, state in part.state.items():
            assert all(torch.equal(value, old.parts[name].state[parameter][key]) for key, value in state.items())
            assert all(value.dtype == old.parts[name].state[parameter][key].dtype for key, value in state.items())


def test_the_momentum_can_be_another_dtype_from_now_on(model):
    old = make_optimizer(model, OptimizerConfig(momentum_dtype="fp32"))
    backward(model)
    old.step()
    new = make_optimizer(model, OptimizerConfig(momentum_dtype="bf16"))
    new.load_state_dict(old.state_dict())
    for parameter, state in new.parts["muon"].state.items():
        before = old.parts["muon"].state[parameter]["momentum"]
        assert state["momentum"].dtype == torch.bfloat16 and before.dtype == torch.float32
        assert torch.equal(state["momentum"], before.bfloat16())
    new.step()


def test_a_state_of_another_optimizer_is_refused(model):
    muon, adamw = (make_optimizer(model, OptimizerConfig(optimizer=name)) for name in ("muon", "adamw"))
    backward(model)
    muon.step()
    with pytest.raises(ValueError, match="muon"):
        adamw.load_state_dict(muon.state_dict())
    damaged = muon.state_dict()
    damaged["adamw"]["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="another shape"):
        muon.load_state_dict(damaged)


@pytest.mark.parametrize("values, word", [
    ({"learning_rate": -1e-3}, "--learning_rate=-0.001: must be above 0"), ({"learning_rate": 0.0}, "--learning_rate"),
    ({"learning_rate": float("nan")}, "--learning_rate=nan"), ({"weight_decay": -1.0}, "--weight_decay=-1.0"),
    ({"warmup_iter": -1}, "--warmup_iter=-1"), ({"cooldown_frac": 1.5}, "--cooldown_frac=1.5: must be at most 1"),
    ({"optimizer": "sgd"}, "--optimizer=sgd: choose one of muon, adamw, gpt2"), ({"schedule": "step"}, "--schedule=step")])
def test_ranges(values, word):
    with pytest.raises(BadInput, match=word):
        OptimizerConfig(**values)


def test_shared_heads_of_keys_are_matrices_of_their_own():
    """Muon stacks matrices of one shape: with 4 heads and 2 of keys, two of queries, one of keys, one of values."""
    for n_kv_head, stacks, rows in ((None, 3, 8), (4, 3, 8), (2, 4, 4), (1, 6, 2)):
        model = GPT(GPTConfig(n_layer=1, n_head=4, head_size=2, n_kv_head=n_kv_head, block_size=4, vocab_size=11))
        group, = (group for group in parameter_groups(model, OptimizerConfig(), 100) if group["stacked"] > 1)
        weight, = group["params"]
        assert group["stacked"] == stacks and weight.size(0) == stacks * rows and weight is model.blocks[0].mixer.qkv.weight
        backward(model)
        make_optimizer(model, OptimizerConfig()).step()
