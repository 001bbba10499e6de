"""learner.py: score before the step, forgetting, the update rules by hand, and every architecture."""
import dataclasses

import pytest
import torch
from test_model import ARCHITECTURES, V, random_model

from dataloader import cut_windows
from evaluate import sliding_windows, token_losses
from layers.linear import linear_layers
from learner import ADAPT_OPTIMIZERS, BETAS, EMBED_RATIO, RMS_FLOOR, AdaptConfig, Learner, cut_hops, open_learner
from model import GPT
from runtime.config import BadInput
from runtime.device import Machine
from tokenizer import Tokenizer

CPU = Machine(torch.device("cpu"), "fp32")
IDS = torch.randint(V, (61,), generator=torch.Generator().manual_seed(3))
ALL_SCOPES = [("all", {}), ("last_half_mlps", {}), ("norms", {"norm": "scaled_rms"}), ("lora", {})]


def make_learner(model=None, machine=CPU, **flags) -> Learner:
    return Learner(model or random_model(), AdaptConfig(**{"adapt_hop": 5, "adapt_rate": 0.02} | flags), machine)


def weights(learner: Learner) -> dict:
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def is_equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- hops -------------------------------------------------------------------------------------------------------------

def test_hops_by_hand():
    assert [tuple(hop) for hop in cut_hops(10, 2, 4)] == [(0, 0, 2), (0, 2, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert [tuple(hop) for hop in cut_hops(10, 2, 4, first=7)] == [(5, 7, 9), (7, 9, 10)]
    assert [tuple(hop) for hop in cut_hops(3, 2, 8, first=1)] == [(0, 1, 3)]


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
@pytest.mark.parametrize("first", [0, 3, 40])
def test_hops_read_every_position_once_within_a_block(block_size, first):
    hops = list(cut_hops(50, 3, block_size, first))
    assert [i for hop in hops for i in range(hop.start, hop.stop)] == list(range(first, 50))
    for hop in hops:
        assert 0 < hop.stop - hop.start <= 3 and hop.stop - hop.context_start <= block_size
        assert hop.context_start == 0 or hop.start - hop.context_start >= block_size // 2
    with_stride = list(cut_windows(50, block_size, stride=1))
    assert [stop - start for start, _, stop in with_stride] == [block_size] * (51 - block_size)


# -- reading ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scope, switches", ALL_SCOPES)
@pytest.mark.parametrize("optimizer", ADAPT_OPTIMIZERS)
def test_a_token_changes_no_loss_before_it(scope, switches, optimizer):
    """A step taken before the score, or a look at what is to come, would show."""
    learner = make_learner(random_model(**switches), adapt_scope=scope, adapt_optimizer=optimizer)
    if optimizer == "rms":
        learner.read(IDS)
        learner.state.optimizer.parts["rms"].end_statistics()
    original = learner.read(IDS)
    learner.forget()
    for t in (1, 12, 30):
        changed = IDS.clone()
        changed[t] = (changed[t] + 1) % V
        losses = learner.read(changed)
        learner.forget()
        n_before = sum(hop.stop < t for hop in cut_hops(60, 5, 24))  # hops whose targets end before token t
        assert torch.equal(losses[:n_before], original[:n_before])
        assert (losses[n_before:] != original[n_before:]).all()


@pytest.mark.parametrize("switches", ARCHITECTURES)
def test_every_architecture_learns_and_forgets(switches):
    learner = make_learner(random_model(**switches), adapt_rate=0.003)
    before = weights(learner)
    repeated = torch.cat([IDS[:12]] * 5)
    static = learner.read(repeated, learn=False)
    assert is_equal(weights(learner), before)
    adapted = learner.read(repeated)
    assert not is_equal(weights(learner), before)
    assert adapted[0] == pytest.approx(static[0].item(), rel=1e-5) and adapted[3:].sum() < static[3:].sum()
    learner.forget()
    assert is_equal(weights(learner), before) and torch.equal(learner.read(repeated), adapted)


@pytest.mark.parametrize("switches", ARCHITECTURES)
def test_static_reading_equals_evaluation(switches):
    learner = make_learner(random_model(**switches))
    losses = learner.read(IDS, learn=False)
    windows = list(sliding_windows(IDS.numpy(), 24))
    expected = sum(loss.sum().item() for _, loss in token_losses(learner.model, CPU, windows, 4))
    assert losses.sum().item() == pytest.approx(expected, rel=1e-5)


def test_reading_goes_on_from_a_context():
    """A conversation is read turn by turn, with what came before as context."""
    learner = make_learner()
    whole = learner.read(IDS[:21], learn=False)
    part = learner.read(IDS[:21], first=10, learn=False)
    assert torch.allclose(part, whole[2:], rtol=1e-5)


def test_a_recurrent_state_may_run_through_the_whole_text():
    learner = make_learner(random_model(mixer="gated_delta"), adapt_hop=6)
    windows = learner.read(IDS, learn=False)
    kept = learner.read(IDS, learn=False, keep_state=True)
    model = random_model(mixer="gated_delta", block_size=len(IDS))
    expected = model(IDS[None, :-1], IDS[None, 1:], reduction="none")[0].double()
    assert kept.sum().item() == pytest.approx(expected.sum().item(), rel=1e-4)
    assert torch.allclose(kept[:4], windows[:4], rtol=1e-5) and not torch.allclose(kept[4:], windows[4:], rtol=1e-4)


def test_static_reading_computes_no_gradient(monkeypatch):
    from layers import loss
    wanted = []
    monkeypatch.setattr(loss, "losses_and_logit_grad_torch", lambda logits, targets, softcap, needs_grad: (
        wanted.append(needs_grad) or (logits[:, 0], logits)))
    make_learner().read(IDS, learn=False)
    assert wanted and not any(wanted)


# -- update rules -----------------------------------------------------------------------------------------------------

def test_a_quadratic_by_hand():
    """Loss (w - 3)² / 2 from w = 1 with plain gradient descent at rate 1/4: 2, 9/8, 81/128, and w = 3 - 2 (3/4)^k."""
    model = random_model()
    w = model.blocks[0].mixer.proj.weight
    with torch.no_grad():
        w.fill_(1.0)
    learner = make_learner(model, adapt_optimizer="sgd", adapt_rate=0.25)
    loss_fn = lambda model, batch: (w[0, 0] - 3).square() / 2
    losses = [learner.step((IDS[None],), loss_fn).item() for _ in range(3)]
    assert losses == [2, 9 / 8, 81 / 128] and w[0, 0].item() == 3 - 2 * (3 / 4) ** 3
    learner.forget()
    assert w[0, 0].item() == 1


def gradients(model: GPT, ids: torch.Tensor) -> dict:
    model.zero_grad()
    model(ids[None, :-1], ids[None, 1:]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_one_step_of_each_rule_by_hand():
    ids, rate = IDS[:6], 0.01
    grads = gradients(random_model(), ids)
    name, embedding = "blocks.1.mlp.fc.weight", "embed.weight"
    changes = {
        "sgd": lambda grad: -rate * grad,
        "adamw": lambda grad: -rate * grad / (grad.abs() + 1e-8)}  # both averages are exact after one step
    for optimizer, change in changes.items():
        learner = make_learner(adapt_optimizer=optimizer, adapt_rate=rate)
        before = weights(learner)
        learner.read(ids)
        for parameter, ratio in ((name, 1.0), (embedding, EMBED_RATIO)):
            moved = learner.model.state_dict()[parameter] - before[parameter]
            assert torch.allclose(moved, ratio * change(grads[parameter]), atol=2e-5 if optimizer == "adamw" else 1e-6)
    assert BETAS == (0.8, 0.99)


def test_rms_scaled_steps_by_hand():
    learner = make_learner(adapt_optimizer="rms", adapt_rate=0.01, adapt_pull=0.1)
    before = weights(learner)
    learner.read(IDS[:6])
    learner.read(IDS[10:16])
    assert is_equal(weights(learner), before)  # it only gathers
    rule = learner.state.optimizer.parts["rms"]
    rule.end_statistics()
    first, second = gradients(random_model(), IDS[:6]), gradients(random_model(), IDS[10:16])
    rms = {name: ((first[name].square() + second[name].square()) / 2).sqrt() for name in first}
    mean = torch.cat([value.flatten() for value in rms.values()]).mean()
    name = "blocks.1.mlp.fc.weight"
    learner.read(IDS[:6])
    moved = -0.01 * first[name] / (rms[name] + RMS_FLOOR * mean)
    assert torch.allclose(learner.model.state_dict()[name] - before[name], moved, atol=1e-6)
    after, grads = weights(learner), gradients(learner.model, IDS[10:16])
    learner.model.zero_grad()
    learner.read(IDS[10:16])
    pulled = (before[name] - after[name]) * (0.1 * rms[name] / mean).clamp(max=1) - 0.01 * grads[name] / (
        rms[name] + RMS_FLOOR * mean)
    assert torch.allclose(learner.model.state_dict()[name] - after[name], pulled, atol=1e-6)


def test_rms_statistics_come_from_a_dataset(tmp_path):
    (tmp_path / "other.txt").write_text("some other text " * 20)
    tokenizer = Tokenizer.train(["some text"] * 9, 265)
    config = AdaptConfig(adapt_optimizer="rms", adapt_statistics=str(tmp_path / "other.txt"))
    learner = open_learner(random_model(vocab_size=tokenizer.vocab_size), tokenizer, config, CPU)
    rule = learner.state.optimizer.parts["rms"]
    assert rule.rms is not None and rule.n_gathered >= 5 and learner.state.step == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("switches", [{}, {"linear": "grkan"}, {"mlp": "swiglu"}])
def test_lora_of_full_rank_equals_all_weights_for_one_step(optimizer, switches):
    learners = [make_learner(random_model(**switches), adapt_optimizer=optimizer, **scope)
                for scope in ({"adapt_scope": "all"}, {"adapt_scope": "lora", "adapt_rank": 1000})]
    for learner in learners:
        learner.read(IDS[:6])
    full, lora = (list(linear_layers(learner.model)) for learner in learners)
    assert len(full) == len(lora) > 5
    for first, second in zip(full, lora):
        assert torch.allclose(first.weight, second.weight, atol=1e-6)


@pytest.mark.parametrize("scope, switches", ALL_SCOPES)
def test_a_scope_trains_what_it_says(scope, switches):
    learner = make_learner(random_model(**switches), adapt_scope=scope)
    before = weights(learner)
    learner.read(IDS)
    changed = {name for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])}
    expected = {"all": lambda name: True, "last_half_mlps": lambda name: name.startswith("blocks.1.mlp."),
                "norms": lambda name: "norm." in name, "lora": lambda name: name.endswith(".up")}[scope]
    assert changed == {name for name in before if expected(name)} and changed
    assert learner.n_trained() == sum(before[name].numel() for name in changed - {"head.weight"})  # tied
    averages = 2 * 4 * learner.n_trained()
    assert learner.extra_bytes() - 2 * 4 * learner.n_trained() == pytest.approx(averages, rel=0.05)


def test_a_scope_that_the_model_has_nothing_in():
    with pytest.raises(BadInput, match="--adapt_scope=norms: this model has no parameters there"):
        make_learner(adapt_scope="norms")


# -- what is kept -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scope, switches", ALL_SCOPES)
def test_keep_and_to_checkpoint(scope, switches):
    learner = make_learner(random_model(**switches), adapt_scope=scope)
    learner.read(IDS)
    learner.keep()
    learner.read(IDS)
    learner.forget()
    after = learner.read(IDS, learn=False)
    model = GPT.from_checkpoint(learner.to_checkpoint())
    assert torch.allclose(make_learner(model).read(IDS, learn=False), after, rtol=1e-5)
    assert not torch.allclose(make_learner(random_model(**switches)).read(IDS, learn=False), after, rtol=1e-3)


def test_a_last_step_that_diverges_is_named_when_the_model_is_used():
    learner = make_learner()
    learner.read(IDS[:6])  # a single hop
    with torch.no_grad():
        learner.weights[0][0].fill_(torch.inf)  # as a step of a finite gradient may lead to
    with pytest.raises(FloatingPointError, match="after step 1: lower --adapt_rate, now 0.02"):
        learner.read(IDS, learn=False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rate_that_diverges_is_named_and_forgotten(dtype):
    learner = make_learner(random_model(softcap=0.0), adapt_rate=1e38, adapt_optimizer="sgd",
                           machine=dataclasses.replace(CPU, dtype=dtype))
    before, static = weights(learner), learner.read(IDS, learn=False)
    with pytest.raises(FloatingPointError, match="lower --adapt_rate, now 1e[+]38"):
        for _ in range(20):
            learner.read(IDS)
    learner.forget()
    assert is_equal(weights(learner), before) and torch.equal(learner.read(IDS, learn=False), static)
