"""Parameter groups by their effect, Muon against torch's, the schedule by hand, skipped steps and resuming."""
import math

import pytest
import torch

from layers.linear import linear_layers
from model import GPT, GPTConfig
from optimizer import (
    MOMENTUM,
    OPTIMIZERS,
    POLAR_EXPRESS,
    TOTAL_DECAY,
    CombinedOptimizer,
    Muon,
    NorMuon,
    OptimizerConfig,
    RowAdam,
    equal_rows,
    lr_scale,
    make_optimizer,
    newton_schulz,
    polar_express,
    set_rates,
)
from runtime.config import BadInput, read_flags
from train import PRESETS

ARCHITECTURES = {"default": {}, "untied": {"tied": False}, "gpt2": PRESETS["gpt2"], "gpt2 untied":
                 PRESETS["gpt2"] | {"tied": False}, "swiglu": {"mlp": "swiglu", "bias": True, "positions": "learned"},
                 "nanochat": PRESETS["nanochat"] | {"mixer": "SA"},
                 "grkan": {"linear": "grkan", "mixer": "DA"}, "chebkan": {"linear": "chebkan"}, "loops": {"loops": 3}}


def tiny_model(**values) -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 1, "head_size": 4, "block_size": 4, "vocab_size": 11}
    return GPT(read_flags(GPTConfig, values | shape))


@pytest.fixture
def model() -> GPT:
    return tiny_model()


def backward(model: GPT, scale: float = 1.0):
    (scale * model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))).backward()


# -- schedule ---------------------------------------------------------------------------------------------------------

def schedule(n: int, **values) -> list[float]:
    """The fraction of the peak learning rate at each of n steps."""
    config = OptimizerConfig(**values)
    return [lr_scale(step, step / n, config) for step in range(n)]


def test_linear_schedule_by_hand():
    assert schedule(8, warmup_iter=3, cooldown_frac=0.5) == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]


def test_linear_schedule_at_its_edges():
    assert schedule(3, warmup_iter=0, cooldown_frac=0) == [1, 1, 1]
    assert schedule(4, warmup_iter=99, cooldown_frac=1) == [0.01, 0.02, 0.03, 0.04]  # a warmup longer than the run
    assert min(schedule(7, warmup_iter=3, cooldown_frac=1)) > 0


def test_a_cooldown_to_a_fraction_by_hand():
    assert schedule(4, warmup_iter=0, cooldown_frac=1, final_lr_frac=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert schedule(8, warmup_iter=3, cooldown_frac=0.5, final_lr_frac=0.0) == schedule(8, warmup_iter=3, cooldown_frac=0.5)


def test_the_schedule_follows_progress_and_not_steps():
    """For runs that end by tokens or seconds, 3 steps or 3 million may be the same fraction."""
    config = OptimizerConfig(warmup_iter=2, cooldown_frac=0.4)
    assert [lr_scale(step, 0.8, config) for step in (3, 3_000_000)] == pytest.approx([0.5, 0.5])
    assert lr_scale(0, 0.999, config) == pytest.approx(0.0025)  # below the warmup's third


@pytest.mark.parametrize("warmup, n", [(5, 50), (0, 10), (2000, 600_000)])
def test_cosine_schedule_equals_nanogpts(warmup, n):
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


def test_set_rates_by_hand(model):
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=0.02))
    groups = [group for group in optimizer.param_groups if not group.get("is_mix")]
    peaks = [group["peak_lr"] for group in groups]
    momenta = []
    for step in (0, 100, 200, 5000):
        set_rates(optimizer, step, 0.85, OptimizerConfig(warmup_iter=0))
        assert [group["lr"] for group in groups] == pytest.approx([0.25 * peak for peak in peaks])
        momenta += [group["momentum"] for group in optimizer.parts["muon"].param_groups[:1]]
    assert momenta == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert not any("momentum" in group for group in optimizer.parts["adamw"].param_groups)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("rate, n", [(0.02, 100), (0.06, 400)])
def test_auto_weight_decay_fits_the_length_of_the_run(model, optimizer, rate, n):
    """At a constant rate, decay multiplies a matrix by exp(-TOTAL_DECAY) over the run, whatever its length and rate."""
    config = OptimizerConfig(optimizer=optimizer, learning_rate=rate, warmup_iter=0, cooldown_frac=0)
    optimizer = make_optimizer(model, config)
    totals = [0.0] * len(optimizer.param_groups)
    for step in range(n):
        set_rates(optimizer, step, step / n, config)
        totals = [total + group["lr"] * group["weight_decay"] for total, group in zip(totals, optimizer.param_groups)]
    matrices = {layer.weight for layer in linear_layers(model.blocks)}
    for total, group in zip(totals, optimizer.param_groups):
        is_decayed = group["params"][0] in matrices
        assert total == pytest.approx(TOTAL_DECAY * (n - 1) / n if is_decayed else 0.0)  # the first step knows no length yet
        assert group["lr"] * group["weight_decay"] <= 0.05


def test_auto_weight_decay_is_at_most_5_percent_of_a_step(model):
    config = OptimizerConfig(warmup_iter=0, cooldown_frac=0)
    optimizer = make_optimizer(model, config)
    set_rates(optimizer, 1, 0.5, config)
    assert optimizer.param_groups[0]["lr"] * optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.05)


def test_a_given_weight_decay_is_constant(model):
    config = OptimizerConfig(weight_decay=0.25)
    optimizer = make_optimizer(model, config)
    for step, progress in ((0, 0.0), (3, 0.5)):
        set_rates(optimizer, step, progress, config)
        assert [group["weight_decay"] for group in optimizer.parts["muon"].param_groups] == [0.25] * 2


def test_mixes_move_as_far_in_runs_of_any_length(model):
    """By hand: 400 steps at the rate of matrices; at most 4 times and at least a quarter of it; once the length is known,
    and unless the ratio is given. The rates of all other groups do not depend on it."""
    config = OptimizerConfig(warmup_iter=0)
    optimizer = make_optimizer(model, config)
    names = {id(parameter): name.rpartition(".")[2] for name, parameter in model.named_parameters()}
    mixes = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups if group.get("is_mix")]
    assert mixes == [{"shift_coeff", "x0_mix", "value_mix"}]
    for step, n, factor in ((0, 80, 1.0), (7, 400, 1.0), (7, 200, 2.0), (7, 80, 4.0), (7, 500, 0.8), (7, 7000, 0.25)):
        for given, expected in ((config, factor), (OptimizerConfig(warmup_iter=0, mix_lr_ratio=3.0), 3.0)):
            set_rates(optimizer, step, step / n, given)
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(group["peak_lr"] * (expected if group.get("is_mix") else 1.0))


# -- groups -----------------------------------------------------------------------------------------------------------

def roles_of(model: GPT) -> dict[str, list[torch.Tensor]]:
    """The parameters by what they are in the network, not by their names."""
    roles = {"matrix": [layer.weight for layer in linear_layers(model.blocks)],
             "embedding": [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)],
             "head": [] if model.config.tied else [model.head.weight]}
    known = {id(parameter) for parameters in roles.values() for parameter in parameters}
    return roles | {"scalar": [parameter for parameter in model.parameters() if id(parameter) not in known]}


def step_once(model: GPT, config: OptimizerConfig, grad_scale: float) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Random parameters after one step with random gradients: id -> (before, after)."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_()
        parameter.grad = grad_scale * torch.randn_like(parameter)
    before = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    make_optimizer(model, config).step()
    return {id(parameter): (before[id(parameter)], parameter.detach()) for parameter in model.parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_is_in_one_group(optimizer, architecture):
    model = tiny_model(**ARCHITECTURES[architecture])
    groups = make_optimizer(model, OptimizerConfig(optimizer=optimizer)).param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))


# Learning rates at width 4, relative to --learning_rate; None: Muon's
STEP_SIZES = {"muon": {"matrix": None, "embedding": 4.0, "head": 4.0, "scalar": 1.0},
              "adamw": {"matrix": 0.1, "embedding": 4.0, "head": 4.0, "scalar": 1.0},
              "gpt2": {"matrix": 1.0, "embedding": 1.0, "head": 1.0, "scalar": 1.0}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("optimizer", STEP_SIZES)
def test_first_step_of_every_parameter(optimizer, architecture):
    """AdamW's is its learning rate with the sign of the gradient; Muon's has singular values of at most about 1."""
    lr, model = 0.01, tiny_model(**ARCHITECTURES[architecture])
    updates = step_once(model, OptimizerConfig(optimizer=optimizer, learning_rate=lr, weight_decay=0.0), grad_scale=1.0)
    qkv = {id(block.mixer.qkv.weight) for block in model.blocks}
    for role, parameters in roles_of(model).items():
        for parameter in parameters:
            before, after = updates[id(parameter)]
            step, ratio = (after - before) / lr, STEP_SIZES[optimizer][role]
            if ratio is not None:
                assert torch.allclose(step.abs(), torch.tensor(ratio), rtol=1e-3, atol=1e-3)
                continue
            for part in step.chunk(3 if id(parameter) in qkv else 1):
                part = part / max(1.0, part.size(0) / part.size(1)) ** 0.5
                assert 0.6 < torch.linalg.matrix_norm(part, ord=2) < 1.25
                assert part.abs().std() > 0.01  # under AdamW all elements would be of one size


DECAYED = {"muon": {"matrix"}, "adamw": {"matrix"}, "gpt2": {"matrix", "embedding", "head"}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("optimizer", DECAYED)
def test_weight_decay_of_every_parameter(optimizer, architecture):
    """With gradients of zero, decayed parameters shrink and the others stay as they are."""
    lr, decay, model = 0.01, 0.3, tiny_model(**ARCHITECTURES[architecture])
    updates = step_once(model, OptimizerConfig(optimizer=optimizer, learning_rate=lr, weight_decay=decay), grad_scale=0.0)
    for role, parameters in roles_of(model).items():
        ratio = STEP_SIZES[optimizer][role] or 1.0
        expected = 1 - ratio * lr * decay if role in DECAYED[optimizer] else 1.0
        for before, after in (updates[id(parameter)] for parameter in parameters):
            assert torch.allclose(after, expected * before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n_kv_head, n_matrices", [(None, 3), (4, 3), (2, 4), (1, 6)])
def test_muon_orthogonalises_queries_keys_and_values_separately(n_kv_head, n_matrices):
    """With 4 heads and 2 of keys and values, as four matrices of one shape: two of queries, one of keys, one of values."""
    model = GPT(GPTConfig(n_layer=1, n_head=4, head_size=16, n_kv_head=n_kv_head, block_size=4, vocab_size=11))
    updates = step_once(model, OptimizerConfig(learning_rate=0.01, weight_decay=0.0), grad_scale=1.0)
    before, after = updates[id(model.blocks[0].mixer.qkv.weight)]
    for part in ((after - before) / 0.01).chunk(n_matrices):
        singular_values = torch.linalg.svdvals(part)
        assert singular_values.max() < 1.25 and singular_values.median() > 0.65


def test_nanochats_preset_has_its_rates():
    """For its own batch of 2**19 tokens at its own width, and for a quarter of both; the rates as its scripts print them."""
    by_hand = {"embed": (0.3, 0.001), "value_embedding.embed": (0.15, 0.01), "head": (0.008, 0.01), "qkv": (0.02, 0.28),
               "mlp.fc": (0.02, 0.28), "value_gate": (0.02, 0.28), "residual_scale": (0.005, 0.05), "x0_scale": (0.5, 0.0),
               "smear_coeff": (0.2, 0.0), "smear.gate": (0.2, 0.0), "backout_coeff": (0.2, 0.0)}
    for width, tokens, rate, wide in ((768, 2**19, 1.0, 1.0), (192, 2**17, 0.5, 2.0)):
        values = PRESETS["nanochat"] | {"n_layer": 2, "n_head": 2, "head_size": width // 2, "mixer": "SA", "block_size": 8,
                                        "vocab_size": 11}
        model = GPT(read_flags(GPTConfig, values))
        config = read_flags(OptimizerConfig, values)
        optimizer = make_optimizer(model, config, tokens)
        set_rates(optimizer, 100, 0.0, config)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            if matching := [end for end in by_hand if name.removesuffix(".weight").endswith(end)]:
                lr, decay = by_hand[max(matching, key=len)]
                scale = rate * (wide if decay in (0.001, 0.01) else 1.0)
                group = groups[id(parameter)]
                assert (group["lr"], group["weight_decay"]) == (pytest.approx(scale * lr), decay), name
                if "betas" in group:
                    first = 0.96 if "x0_scale" in name else 0.8
                    second = 0.995 if decay in (0.001, 0.01) and "head" not in name else 0.96 if "head" in name else 0.95
                    assert (group["betas"], group["eps"]) == ((first, second), 1e-10), name
    for step, progress, momentum in ((0, 0.0, 0.85), (200, 0.1, 0.91), (400, 0.2, 0.97), (900, 0.675, 0.935)):
        set_rates(optimizer, step, progress, config)
        assert optimizer.parts["normuon"].param_groups[0]["momentum"] == pytest.approx(momentum)
    set_rates(optimizer, 500, 0.5, config)
    assert optimizer.parts["normuon"].param_groups[0]["weight_decay"] == pytest.approx(0.14)  # half of the cosine


def test_auto_learning_rate_grows_with_the_root_of_the_tokens_per_step(model):
    """Up to 8,192. A rate that is given is used as it is."""
    def peaks(step_tokens, **config):
        return [group["peak_lr"] for group in make_optimizer(model, OptimizerConfig(**config), step_tokens).param_groups]
    full = peaks(8192)
    assert full[0] == 0.05 and peaks(65_536) == full
    assert peaks(2048) == pytest.approx([rate / 2 for rate in full])
    assert peaks(2048, learning_rate=0.05) == full
    assert max(peaks(8192, optimizer="gpt2")) == pytest.approx(0.005)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learning_rate_scales_every_group(model, optimizer):
    slow, fast = (make_optimizer(model, OptimizerConfig(optimizer=optimizer, learning_rate=rate)) for rate in (1e-3, 4e-3))
    for each in (slow, fast):
        set_rates(each, 0, 0.0, OptimizerConfig(warmup_iter=1))
    assert [group["lr"] for group in fast.param_groups] == pytest.approx([4 * group["lr"] for group in slow.param_groups])
    assert all(group["lr"] == pytest.approx(0.5 * group["peak_lr"]) for group in slow.param_groups)


def test_gpt2_preset_has_nanogpts_rate_decay_and_betas():
    model = tiny_model(**PRESETS["gpt2"])
    optimizer = make_optimizer(model, read_flags(OptimizerConfig, PRESETS["gpt2"]))
    for group in optimizer.param_groups:
        assert (group["peak_lr"], group["betas"], group["eps"]) == (6e-4, (0.9, 0.95), 1e-8)
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
        assert group["weight_decay"] in (0.0, 0.1)


# -- Muon -------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (7, 5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum_dtype", ["fp32", "bf16"])
def test_muon_equals_torchs(shape, weight_decay, momentum_dtype):
    """Over several steps, with two matrices of one shape and one of another."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(*size)) for size in (shape, shape, (8, 24))]
    reference = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Muon([{"params": ours, "lr": 0.05, "weight_decay": weight_decay, "matrix_rows": None}],
                     OptimizerConfig(momentum_dtype=momentum_dtype), torch.bfloat16)
    oracle = torch.optim.Muon(reference, lr=0.05, weight_decay=weight_decay, momentum=MOMENTUM, nesterov=True, ns_steps=5,
                              adjust_lr_fn="original")
    start = [p.detach().clone() for p in ours]
    for _ in range(4):
        for a, b in zip(ours, reference):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        oracle.step()
    for a, b, before in zip(ours, reference, start):
        assert torch.allclose(a, b, atol=4e-3)  # bf16; without Nesterov it would be 1.5e-2
        assert (a - before).abs().max() > 0.05
        assert optimizer.state[a]["momentum"].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[momentum_dtype]


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_normuon_equals_a_step_by_hand(shape, momentum):
    """Three steps of two matrices, one after the other and in fp64."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(*shape)) for _ in range(2)]
    group = {"params": ours, "lr": 0.05, "weight_decay": 0.3, "matrix_rows": None}
    optimizer = NorMuon([group], OptimizerConfig(momentum_dtype="fp32"), torch.float32)
    optimizer.param_groups[0]["momentum"] = momentum
    expected = [p.detach().double() for p in ours]
    averages, seconds = [torch.zeros(shape).double() for _ in ours], [0.0, 0.0]
    for _ in range(3):
        for i, p in enumerate(ours):
            p.grad = torch.randn_like(p)
            averages[i] = momentum * averages[i] + (1 - momentum) * p.grad
            x = momentum * averages[i] + (1 - momentum) * p.grad
            x = x / x.norm(dim=1, keepdim=True)  # equal rows; a common factor is divided out below
            x = x / (1.01 * x.norm())
            for a, b, c in POLAR_EXPRESS:
                if shape[0] > shape[1]:
                    x = a * x + x @ (b * x.T @ x + c * x.T @ x @ x.T @ x)
                else:
                    x = a * x + (b * x @ x.T + c * x @ x.T @ x @ x.T) @ x
            x = x * min(shape) ** 0.5 / x.norm()
            dim = 1 if shape[0] >= shape[1] else 0
            seconds[i] = 0.9 * seconds[i] + 0.1 * x.square().mean(dim, keepdim=True)
            scaled = x / seconds[i].sqrt()
            x = scaled * x.norm() / scaled.norm()
            decayed = torch.where(x * expected[i] >= 0, expected[i], 0.0)
            lr = 0.05 * max(1.0, shape[0] / shape[1]) ** 0.5
            expected[i] = expected[i] - lr * x - lr * 0.3 * decayed
        optimizer.step()
    for p, wanted in zip(ours, expected):
        assert torch.allclose(p, wanted.float(), atol=2e-5)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polar_express_moves_singular_values_to_about_one(shape, dtype):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(polar_express(torch.randn(4, *shape).to(dtype)).float())
    assert values.min() > 0.85 and values.max() < 1.15
    assert torch.allclose(equal_rows(torch.randn(1, 3, 500) * torch.tensor([[[1.0], [9.0], [0.1]]])).norm(dim=2),
                          torch.tensor(9.06 * 500 ** 0.5 / 3 ** 0.5), rtol=0.1)


def test_row_adam_by_hand():
    """Row 0 is seen in every step, row 1 only in the second: its average has fallen meanwhile."""
    p = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = RowAdam([{"params": [p], "lr": 0.1}], OptimizerConfig(), torch.float32)
    grads = torch.tensor([[[3.0, 4.0], [0, 0], [0, 0]], [[3.0, 4.0], [1.0, 1.0], [0, 0]]])
    expected, second = torch.zeros(3, 2), torch.zeros(3)
    for step, grad in enumerate(grads, 1):
        p.grad = grad.clone()
        optimizer.step(torch.tensor(False))
        second = 0.95 * second + 0.05 * grad.square().sum(1) / 2
        expected -= 0.1 * grad / ((second / (1 - 0.95 ** step)).sqrt() + 1e-8)[:, None]
        assert torch.allclose(p, expected, atol=1e-6) and (p[2] == 0).all()
    assert p[0].tolist() == pytest.approx([-0.2 * 3 / 12.5 ** 0.5, -0.2 * 4 / 12.5 ** 0.5])
    before, state = p.detach().clone(), {name: value.clone() for name, value in optimizer.state[p].items()}
    p.grad = torch.full((3, 2), torch.nan)
    optimizer.step(torch.tensor(True))
    assert torch.equal(p, before) and all(torch.equal(optimizer.state[p][name], value) for name, value in state.items())
    assert optimizer.state[p]["second_moment"].numel() == 3


@pytest.mark.parametrize("n_rows", [3, 50])
def test_rows_of_a_sparse_gradient_are_summed(n_rows):
    """Each row is there once, besides rows of zeros; also where the gradients of several backward passes meet."""
    table = torch.nn.Parameter(torch.zeros(n_rows, 2))
    RowAdam([{"params": [table], "lr": 0.1}], OptimizerConfig(), torch.float32)
    expected = torch.zeros(n_rows, 2)
    for rows in ([2, 1, 2, 2, 1, 2], [0, 2], [0]):
        rows, grads = torch.tensor(rows), torch.randn(len(rows), 2)
        (torch.nn.functional.embedding(rows, table, sparse=True) * grads).sum().backward()
        expected.index_add_(0, rows, grads)
        assert torch.allclose(table.grad.to_dense(), expected, atol=1e-6)
        index, values = table.grad._indices()[0], table.grad._values()
        used = index[(values != 0).any(dim=1)]
        assert len(used) == len(set(used.tolist())) == (expected != 0).any(dim=1).sum() and len(index) <= n_rows


def test_stacked_matrices_are_orthogonalised_separately():
    torch.manual_seed(0)
    whole, parts = torch.nn.Parameter(torch.randn(48, 16)), [torch.nn.Parameter(torch.empty(16, 16)) for _ in range(3)]
    group, precise = {"lr": 0.1, "weight_decay": 0.1}, (OptimizerConfig(momentum_dtype="fp32"), torch.float32)
    as_one = Muon([group | {"params": [whole], "matrix_rows": 16}], *precise)
    as_three = Muon([group | {"params": parts, "matrix_rows": None}], *precise)
    for part, rows in zip(parts, whole.detach().split(16)):
        part.data.copy_(rows)
    for _ in range(3):
        whole.grad = torch.randn_like(whole)
        for part, rows in zip(parts, whole.grad.split(16)):
            part.grad = rows.clone()
        as_one.step()
        as_three.step()
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    unstacked = torch.nn.Parameter(whole.detach().clone())  # as one matrix the step would be another
    unstacked.grad = torch.randn(48, 16)
    whole.grad = unstacked.grad.clone()
    Muon([group | {"params": [unstacked], "matrix_rows": None}], *precise).step()
    Muon([group | {"params": [whole], "matrix_rows": 16}], *precise).step()
    assert (whole - unstacked).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_moves_singular_values_to_about_one(shape, dtype):
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


# -- skipped steps ----------------------------------------------------------------------------------------------------

def snapshot(model: GPT, optimizer: CombinedOptimizer) -> list[torch.Tensor]:
    states = [value for part in optimizer.parts.values() for state in part.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *states]]


STEPS = [CombinedOptimizer.step, CombinedOptimizer.masked_step]  # decided on the host, and on the device


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_a_skipped_step_changes_nothing(model, optimizer, bad, step):
    """Neither weights nor momentum, averages or step counts; and training continues as if the step had not happened."""
    config = OptimizerConfig(optimizer=optimizer, weight_decay=0.5)
    twin = tiny_model()
    a, b = make_optimizer(model, config), make_optimizer(twin, config)
    for each, its_model in ((a, model), (b, twin)):
        backward(its_model)
        step(each, torch.tensor(False))
        each.zero_grad()
    before = snapshot(model, a)
    assert len(before) > len(list(model.parameters()))
    backward(model, bad)
    step(a, torch.tensor(True))
    a.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(snapshot(model, a), before))
    for each, its_model in ((a, model), (b, twin)):
        backward(its_model)
        step(each, torch.tensor(False))
    assert all(torch.equal(x, y) for x, y in zip(snapshot(model, a), snapshot(twin, b)))
    assert not all(torch.equal(x, y) for x, y in zip(snapshot(model, a), before))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_first_step_changes_nothing(model, optimizer, step):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    skipping = make_optimizer(model, OptimizerConfig(optimizer=optimizer, weight_decay=0.5))
    backward(model, math.nan)
    step(skipping, torch.tensor(True))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before))
    for part in skipping.parts.values():
        assert all((value == 0).all() for state in part.state.values() for value in state.values())


# -- state ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", ["muon", "nanochat"])
@pytest.mark.parametrize("momentum_dtype", ["bf16", "fp32"])
def test_loading_restores_averages_and_keeps_the_new_rates(model, momentum_dtype, optimizer):
    given = {"optimizer": optimizer, "momentum_dtype": momentum_dtype}
    old = make_optimizer(model, OptimizerConfig(learning_rate=1e-3, **given))
    backward(model)
    set_rates(old, 0, 0.0, OptimizerConfig())
    old.step()
    new = make_optimizer(model, OptimizerConfig(learning_rate=5e-3, weight_decay=0.125, **given))
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["peak_lr"] == 5e-3 and new.param_groups[0]["weight_decay"] == 0.125
    for name, part in new.parts.items():
        assert part.state.keys() == old.parts[name].state.keys() != set()
        for parameter, state in part.state.items():
            assert all(torch.equal(value, old.parts[name].state[parameter][key]) for key, value in state.items())
            assert all(value.dtype == old.parts[name].state[parameter][key].dtype for key, value in state.items())


def test_loading_casts_the_momentum_to_the_new_dtype(model):
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


def test_the_state_of_another_optimizer_is_refused(model):
    muon, adamw = (make_optimizer(model, OptimizerConfig(optimizer=name)) for name in ("muon", "adamw"))
    backward(model)
    muon.step()
    with pytest.raises(ValueError, match="the state of muon, adamw, not of adamw"):
        adamw.load_state_dict(muon.state_dict())


def test_a_state_of_another_shape_is_refused(model):
    muon = make_optimizer(model, OptimizerConfig())
    backward(model)
    muon.step()
    damaged = muon.state_dict()
    damaged["adamw"]["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="another shape"):
        muon.load_state_dict(damaged)


# -- flags ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, message", [
    ({"learning_rate": -1e-3}, "--learning_rate=-0.001: must be above 0"), ({"learning_rate": 0.0}, "--learning_rate"),
    ({"learning_rate": float("nan")}, "--learning_rate=nan"), ({"weight_decay": -1.0}, "--weight_decay=-1.0"),
    ({"warmup_iter": -1}, "--warmup_iter=-1"), ({"cooldown_frac": 1.5}, "--cooldown_frac=1.5: must be at most 1"),
    ({"optimizer": "sgd"}, "--optimizer=sgd: choose one of muon, normuon, adamw, gpt2, nanochat"),
    ({"schedule": "step"}, "--schedule=step"), ({"final_lr_frac": 2.0}, "--final_lr_frac=2.0: must be at most 1"),
    ({"final_lr_frac": 0.1, "schedule": "cosine"}, "--final_lr_frac=0.1: --schedule=cosine has no linear cooldown"),
    ({"final_lr_frac": 0.1, "cooldown_frac": 0.0}, "--final_lr_frac=0.1: --cooldown_frac=0 has")])
def test_impossible_flags_are_refused(values, message):
    with pytest.raises(BadInput, match=message):
        OptimizerConfig(**values)
