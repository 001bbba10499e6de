"""`fit` without a command around it: evaluations, early stops, loaders, and what a checkpoint's state holds."""
import copy
import dataclasses
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import assert_same
from dataloader import shard_loader
from model import GPT, GPTConfig
from optimizer import CombinedOptimizer, OptimizerConfig, RowAdam, set_rates
from runtime.checkpoint import CheckpointWriter, load_checkpoint, run_folder
from runtime.device import Machine
from runtime.metrics import MetricsLog, read_rows
from shards import open_data
from tokenizer import SPECIAL_TOKENS, Tokenizer
from trainer import Evaluation, LoopConfig, TrainSetup, TrainState, fit, init_state, next_token_loss, train_step

VOCAB_SIZE, BLOCK_SIZE = 32, 12


class CountingLoader:
    """Sequences that count upwards from a random start, modulo VOCAB_SIZE."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def next_batch(self, model: GPT) -> tuple[Tensor, Tensor]:
        start = torch.randint(VOCAB_SIZE, (4, 1), generator=self.generator)
        ids = (start + torch.arange(BLOCK_SIZE + 1)) % VOCAB_SIZE
        return ids[:, :-1], ids[:, 1:]

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict):
        self.generator.set_state(state["generator"])


class RolloutLoader(CountingLoader):
    """Trains the model on what it generates itself: greedy continuations of random tokens. Keeps the weights it saw."""

    def __init__(self):
        super().__init__()
        self.weights = []

    @torch.no_grad()
    def next_batch(self, model: GPT) -> tuple[Tensor, Tensor]:
        self.weights.append(model.embed.weight.clone())
        ids = torch.randint(VOCAB_SIZE, (4, 1), generator=self.generator)
        for _ in range(BLOCK_SIZE):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
        return ids[:, :-1], ids[:, 1:]


def make_run(loader=None, path: Path | None = None, dtype: str = "fp32", **shape) -> tuple[TrainState, TrainSetup]:
    """A tiny model that has not been trained. path: where checkpoints and metrics go; None: nowhere."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, head_size=8, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE, **shape))
    outputs = {} if path is None else {
        "tokenizer": Tokenizer.train([""], 256 + len(SPECIAL_TOKENS)), "script": "test.py",
        "writer": CheckpointWriter(path, run_folder(path)), "metrics": MetricsLog(run_folder(path), [])}
    setup = TrainSetup(Machine(torch.device("cpu"), dtype), OptimizerConfig(learning_rate=0.02, warmup_iter=0),
                       step_tokens=4 * BLOCK_SIZE, **outputs)
    return init_state(model, loader or CountingLoader(), setup), setup


def loop_of(max_iter: int, val_intervals: int) -> LoopConfig:
    return LoopConfig(max_iter=max_iter, num_batch_accum=1, val_intervals=val_intervals, log_intervals=1, verbose=False)


@torch.no_grad()
def counting_loss(state: TrainState) -> dict:
    ids = torch.arange(2 * BLOCK_SIZE + 1)[None] % VOCAB_SIZE
    return {"val_loss": state.model(ids[:, :BLOCK_SIZE], ids[:, 1:BLOCK_SIZE + 1]).item()}


def scripted(metric: str, *values: float, maximize: bool = False, **others: float) -> Evaluation:
    """An evaluation that returns these values one after the other."""
    remaining = iter(values)
    return Evaluation(lambda state: {metric: next(remaining), **others}, metric, maximize)


def step_of(path: Path) -> int:
    return load_checkpoint(path)["training"]["step"]


# -- sparse gradients -------------------------------------------------------------------------------------------------

class DenseRowAdam(RowAdam):
    """The same rule, on the whole table."""

    @torch.no_grad()
    def step(self, skip: Tensor | None = None):
        if skip is not None and skip:
            return
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p] or {"step": torch.tensor(0.0), "second_moment": torch.zeros(p.size(0), 1)}
                state["step"] += 1
                state["second_moment"] = 0.95 * state["second_moment"] + 0.05 * p.grad.square().mean(dim=1, keepdim=True)
                average = state["second_moment"] / (1 - 0.95 ** state["step"])
                p.sub_(group["lr"] * p.grad / (average.sqrt() + 1e-8))
                self.state[p] = state


@pytest.mark.parametrize("dtype, rows, grad_clip", [("fp32", 200, 0.0), ("fp32", 200, 0.1), ("fp32", 7, 0.1),
                                                    ("fp16", 200, 0.1)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_sparse_gradients_train_as_dense_ones(dtype, rows, grad_clip, is_masked, monkeypatch):
    """Over several batches a step, clipped, under a loss scale, and in steps that are skipped; in tables of more rows than a
    batch has tokens, and of fewer."""
    if is_masked:  # as on a GPU
        monkeypatch.setattr(CombinedOptimizer, "step", CombinedOptimizer.masked_step)
    loop, results = LoopConfig(num_batch_accum=3, grad_clip=grad_clip), []
    for optimizer_class in (RowAdam, DenseRowAdam):
        monkeypatch.setattr("optimizer.RowAdam", optimizer_class)
        state, setup = make_run(dtype=dtype, ngram_rows=rows)
        state.model.ngrams.sparse = optimizer_class is RowAdam
        table, losses = state.model.ngrams.embed.weight, []
        for state.step in range(8):
            set_rates(state.optimizer, state.step, state.step / 8, setup.schedule)
            factor = math.inf if state.step == 3 else 1.0
            loss_fn = lambda model, batch, factor=factor: next_token_loss(model, batch) * factor
            losses.append(train_step(state, loop, loss_fn, setup.machine)[0])
        counts, averages = state.guard.read(), state.optimizer.parts[optimizer_class.__name__.lower()].state[table]
        assert counts["skipped"] == 1 and averages["step"] == 7
        assert rows == 7 or (table == 0).all(dim=1).sum() > 100
        results.append([*losses, table.detach(), averages["second_moment"], torch.tensor(counts["largest_norm"])])
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*results))


# -- writer and metrics are optional ----------------------------------------------------------------------------------

def test_fit_needs_neither_writer_nor_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, setup = make_run()
    rows = []

    def evaluate(state):
        rows.append((state.step, counting_loss(state)["val_loss"]))
        return {"val_loss": rows[-1][1]}
    assert fit(state, loop_of(20, 10), next_token_loss, Evaluation(evaluate), setup) is None
    assert [step for step, _ in rows] == [0, 10, 20]
    assert rows[0][1] == pytest.approx(math.log(VOCAB_SIZE), abs=0.2) and rows[2][1] < 0.7 * rows[0][1]
    assert state.best == min(loss for _, loss in rows)
    assert (state.step, state.tokens) == (20, 20 * 4 * BLOCK_SIZE) and state.seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_outputs_do_not_change_the_weights(tmp_path):
    plain, setup = make_run()
    fit(plain, loop_of(6, 3), next_token_loss, Evaluation(counting_loss), setup)
    written, setup = make_run(path=tmp_path / "gpt.pt")
    fit(written, loop_of(6, 2), next_token_loss, Evaluation(counting_loss), setup)
    assert_same(plain.model.state_dict(), written.model.state_dict())
    assert_same(load_checkpoint(tmp_path / "gpt.pt")["model"], dict(plain.model.state_dict()))


def test_without_a_writer_a_diverged_run_says_that_nothing_was_saved():
    state, setup = make_run()
    with pytest.raises(FloatingPointError, match="accuracy is nan at step 2: .*no checkpoints are written"):
        fit(state, loop_of(6, 2), next_token_loss, scripted("accuracy", 0.5, math.nan), setup)


# -- evaluation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("maximize, values, best", [
    (True, (0.1, 0.9, 0.5, 0.7), 2), (True, (0.8, 0.1, 0.1, 0.1), 0), (True, (0.1, 0.2, 0.2, 0.3), 6),
    (False, (0.5, 0.4, 0.2, 0.3), 4), (False, (-1, -1, -2, -2), 4)])
def test_the_best_checkpoint_is_by_the_metric_of_the_evaluation(tmp_path, maximize, values, best):
    """Another number in the row, val_loss, always says the opposite."""
    path = tmp_path / "gpt.pt"
    state, setup = make_run(path=path)
    remaining = iter(values)

    def evaluate(state):
        value = next(remaining)
        return {"accuracy": value, "val_loss": value if maximize else -value}
    fit(state, loop_of(6, 2), next_token_loss, Evaluation(evaluate, "accuracy", maximize), setup)
    assert step_of(run_folder(path) / "best.pt") == best and step_of(path) == 6
    assert state.best == load_checkpoint(path)["training"]["best"] == (max if maximize else min)(values)
    assert [row["accuracy"] for row in read_rows(run_folder(path) / "metrics.jsonl") if "accuracy" in row] == list(values)


@pytest.mark.parametrize("maximize, value, best, expected", [
    (False, 2.0, None, True), (False, 1.0, 2.0, True), (False, 2.0, 2.0, False), (False, 3.0, 2.0, False),
    (True, 0.0, None, True), (True, 3.0, 2.0, True), (True, 2.0, 2.0, False), (True, 1.0, 2.0, False)])
def test_is_better_by_hand(maximize, value, best, expected):
    assert Evaluation(lambda state: {}, maximize=maximize).is_better(value, best) is expected


# -- early stops ------------------------------------------------------------------------------------------------------

def test_stop_when_ends_the_run_at_its_evaluation(tmp_path):
    path = tmp_path / "gpt.pt"
    state, setup = make_run(path=path)
    seen = []

    def is_solved(state, row):
        seen.append((state.step, row["accuracy"]))
        return row["accuracy"] >= 0.9
    evaluation = scripted("accuracy", 0.1, 0.5, 0.95, 1.0, maximize=True)
    assert fit(state, loop_of(100, 3), next_token_loss, evaluation, setup, is_solved) is None
    assert seen == [(0, 0.1), (3, 0.5), (6, 0.95)] and state.step == 6
    assert step_of(path) == step_of(run_folder(path) / "best.pt") == 6 and step_of(run_folder(path) / "previous.pt") == 3
    last = read_rows(run_folder(path) / "metrics.jsonl")[-1]
    assert (last["step"], last["accuracy"]) == (6, 0.95) and math.isfinite(last["train_loss"])


def test_stop_when_can_end_the_run_before_its_first_step(tmp_path):
    path = tmp_path / "gpt.pt"
    state, setup = make_run(path=path)
    assert fit(state, loop_of(100, 3), next_token_loss, Evaluation(counting_loss), setup, lambda state, row: True) is None
    assert state.step == step_of(path) == 0
    assert [row["step"] for row in read_rows(run_folder(path) / "metrics.jsonl")] == [0]


def test_the_checkpoint_of_an_early_stop_is_on_disk_when_fit_returns(tmp_path, monkeypatch):
    """Though checkpoints between are written by a thread."""
    monkeypatch.setattr(CheckpointWriter, "MAX_PAUSE_SECONDS", -1)
    path = tmp_path / "gpt.pt"
    state, setup = make_run(path=path)
    fit(state, loop_of(100, 3), next_token_loss, Evaluation(counting_loss), setup, lambda state, row: state.step == 6)
    assert setup.writer.thread is None and step_of(path) == 6


def test_fit_returns_the_signal_that_stopped_it():
    state, setup = make_run()

    class Interrupted(CountingLoader):
        def next_batch(self, model):
            if state.step == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().next_batch(model)
    state.loader = Interrupted()
    before = signal.getsignal(signal.SIGTERM)
    assert fit(state, loop_of(100, 50), next_token_loss, Evaluation(counting_loss), setup) == signal.SIGTERM
    assert state.step == 3  # the step is finished
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_fit_continues_with_another_schedule():
    state, setup = make_run()
    evaluated = []

    def evaluate(state):
        evaluated.append(state.step)
        return counting_loss(state)
    fit(state, loop_of(4, 4), next_token_loss, Evaluation(evaluate), setup)
    rate = state.optimizer.param_groups[0]["lr"]
    falling = dataclasses.replace(setup, schedule=dataclasses.replace(setup.schedule, learning_rate=0.01, cooldown_frac=1.0))
    fit(state, loop_of(8, 4), next_token_loss, Evaluation(evaluate), falling)
    assert evaluated == [0, 4, 8]  # the untrained model once
    assert 0 < state.optimizer.param_groups[0]["lr"] < rate


# -- loaders ----------------------------------------------------------------------------------------------------------

def test_a_loader_sees_the_weights_of_each_step():
    loader = RolloutLoader()
    state, setup = make_run(loader)
    initial, losses = state.model.embed.weight.detach().clone(), []

    def loss_fn(model, batch):
        loss = next_token_loss(model, batch)
        losses.append(loss.item())
        return loss
    fit(state, loop_of(8, 8), loss_fn, Evaluation(counting_loss), setup)
    assert len(loader.weights) == 8 and torch.equal(loader.weights[0], initial)
    assert not any(torch.equal(a, b) for a, b in zip(loader.weights, loader.weights[1:]))
    assert losses[-1] < losses[0]  # it becomes more certain of what it generates


def test_gradients_of_accumulated_batches_are_those_of_one_large_batch(data_path):
    data = open_data(data_path)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, head_size=8, block_size=16, vocab_size=512))
    torch.nn.init.normal_(model.head.weight)
    small, large = shard_loader(data, 2, 16, seed=0), shard_loader(data, 6, 16, seed=0)
    for _ in range(3):
        (next_token_loss(model, small.next_batch()) / 3).backward()
    accumulated = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    next_token_loss(model, large.next_batch()).backward()
    for parameter, grad in zip(model.parameters(), accumulated):
        assert torch.allclose(parameter.grad, grad, atol=1e-6)


# -- state ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loader", [CountingLoader, RolloutLoader])
def test_a_loaded_state_continues_bit_for_bit(loader):
    expected, setup = make_run(loader())
    fit(expected, loop_of(6, 3), next_token_loss, Evaluation(counting_loss), setup)
    first, setup = make_run(loader())
    fit(first, loop_of(6, 3), next_token_loss, Evaluation(counting_loss), setup, lambda state, row: state.step == 3)
    weights, saved = copy.deepcopy(first.model.state_dict()), copy.deepcopy(first.state_dict())
    second, setup = make_run(loader())
    second.model.load_state_dict(weights)
    torch.manual_seed(99)  # the generators too come from the saved state
    second.load_state_dict(saved)
    fit(second, loop_of(6, 3), next_token_loss, Evaluation(counting_loss), setup)
    assert_same(second.model.state_dict(), expected.model.state_dict())
    differ = {"seconds"}
    assert_same(*({name: value for name, value in state.state_dict().items() if name not in differ}
                  for state in (second, expected)))


# -- the end of a run -------------------------------------------------------------------------------------------------

def test_progress_by_hand():
    loop = LoopConfig(max_iter=10, max_tokens=1000, max_seconds=5.0)
    assert loop.progress(0, 0, 0.0) == 0 and loop.progress(5, 100, 1.0) == 0.5
    assert loop.progress(1, 800, 1.0) == 0.8 and loop.progress(1, 100, 4.5) == 0.9 and loop.progress(1, 1, 6.0) > 1
    assert LoopConfig(max_seconds=2.0).progress(10**6, 10**9, 1.0) == 0.5


def test_the_default_horizon_is_steps_unless_another_is_given():
    assert LoopConfig().max_iter == 5000 and LoopConfig(max_tokens=9).max_iter is None
    assert LoopConfig().horizon() == "5,000 steps"
    assert LoopConfig(max_tokens=12_345, max_seconds=2.5).horizon() == "12,345 tokens or 2.5 seconds"
