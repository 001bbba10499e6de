"""In each of several processes that torchrun has started: ShardedOptimizer against the optimizer of one process."""
import copy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer, set_rates  # noqa: E402
from runtime.distributed import join  # noqa: E402
from sharding import ShardedOptimizer  # noqa: E402

N_STEPS = 6


def make_model() -> GPT:
    """Matrices and vocabularies that do not divide by 2 or 3, and one that holds most of the weights."""
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=3, n_head=1, head_size=10, block_size=8, vocab_size=301, n_kv_head=1, ngram_rows=17,
                         value_embeddings=True, smear=True, backout=True, mixer="ADA"))


def step(model: GPT, optimizer, number: int, config: OptimizerConfig):
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    set_rates(optimizer, number, number / N_STEPS, config)
    optimizer.step(skip=torch.tensor(number == 2))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def assert_close(a, b, where: str = ""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), (where, a.keys(), b.keys())
        for key in a:
            assert_close(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, parts in enumerate(zip(a, b)):
            assert_close(*parts, f"{where} {i}")
    elif isinstance(a, torch.Tensor):
        tolerance = 1e-2 if a.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")
    else:
        assert a == b, (where, a, b)


def check(name: str):
    world, config = join(), OptimizerConfig(optimizer=name, learning_rate=0.01, weight_decay=0.1, momentum_dtype="fp32")
    whole, sharded = make_model(), make_model()
    one, many = make_optimizer(whole, config), ShardedOptimizer(make_optimizer(sharded, config), world)
    for number in range(4):
        step(whole, one, number, config)
        step(sharded, many, number, config)
    assert_close(sharded.state_dict(), whole.state_dict(), name)
    assert len({str(sums) for sums in world.gather([p.double().sum().item() for p in sharded.parameters()])}) == 1
    saved = many.state_dict()
    if world.is_main:
        assert_close(saved, one.state_dict(), name)
    share = many.state_bytes() / one.state_bytes()
    assert share < 1 / world.size + 0.05, (name, share)
    # what one process has saved, many go on from, and the other way round
    resumed = make_model()
    resumed.load_state_dict(whole.state_dict())
    again = ShardedOptimizer(make_optimizer(resumed, config), world)
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    for number in range(4, N_STEPS):
        step(whole, one, number, config)
        step(resumed, again, number, config)
    assert_close(resumed.state_dict(), whole.state_dict(), name)
    saved = again.state_dict()
    if world.is_main:
        fresh = make_optimizer(make_model(), config)
        fresh.load_state_dict(saved)  # but for the rates, which each optimizer has of its own
        assert_close([part["state"] for part in fresh.state_dict().values()],
                     [part["state"] for part in one.state_dict().values()], name)


torch.set_num_threads(1)
join()
for optimizer_name in OPTIMIZERS:
    check(optimizer_name)
