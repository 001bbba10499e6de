import pytest
import torch

from model import GPT, GPTConfig
from optimizer import OptimizerConfig, load_optimizer, lr_scale, make_optimizer, set_learning_rate
from runtime.flags import BadInput


@pytest.fixture
def model() -> GPT:
    return GPT(GPTConfig(n_layer=1, n_head=1, head_size=4, block_size=4, vocab_size=11))


def test_schedule_by_hand():
    config = OptimizerConfig(warmup_iter=2, cooldown_frac=0.5)
    assert [lr_scale(step, 8, config) for step in range(8)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_schedules_at_their_edges():
    assert [lr_scale(step, 3, OptimizerConfig(warmup_iter=0, cooldown_frac=0)) for step in range(3)] == [1, 1, 1]
    everything = [lr_scale(step, 4, OptimizerConfig(warmup_iter=100, cooldown_frac=1)) for step in range(4)]
    assert everything == [0.01, 0.02, 0.03, 0.04]  # a warmup longer than the run is only begun
    assert min(lr_scale(step, 7, OptimizerConfig(warmup_iter=3, cooldown_frac=1)) for step in range(7)) > 0


def test_every_parameter_is_in_one_group_and_only_matrices_decay(model):
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0, 0]


def test_learning_rate_scales_all_groups(model):
    slow, fast = (make_optimizer(model, OptimizerConfig(learning_rate=rate)) for rate in (1e-3, 4e-3))
    for optimizer in (slow, fast):
        set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in fast.param_groups] == pytest.approx([4 * group["lr"] for group in slow.param_groups])
    assert slow.param_groups[0]["lr"] == 0.5e-3


def test_a_loaded_optimizer_keeps_moments_and_obeys_new_rates(model):
    old = make_optimizer(model, OptimizerConfig(learning_rate=1e-3))
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    set_learning_rate(old, 1.0)
    old.step()
    new = make_optimizer(model, OptimizerConfig(learning_rate=5e-3, weight_decay=0.0))
    load_optimizer(new, old.state_dict())
    assert new.param_groups[0]["peak_lr"] == 5e-3 and new.param_groups[0]["weight_decay"] == 0
    for parameter in model.parameters():
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])


@pytest.mark.parametrize("values, word", [
    ({"learning_rate": -1e-3}, "--learning_rate=-0.001: must be above 0"), ({"learning_rate": 0.0}, "--learning_rate"),
    ({"learning_rate": float("nan")}, "--learning_rate=nan"), ({"weight_decay": -1.0}, "--weight_decay=-1.0"),
    ({"warmup_iter": -1}, "--warmup_iter=-1"), ({"cooldown_frac": 1.5}, "--cooldown_frac=1.5: must be at most 1")])
def test_ranges(values, word):
    with pytest.raises(BadInput, match=word):
        OptimizerConfig(**values)
