"""The code on docs/extending.md does what the page says. Its first recipe is trained with in test_house.py."""
import itertools
import re

import numpy as np
import pytest
import test_model
import torch

import optimizer
import selfplay
import text.sources
from conftest import REPO, run_rows
from layers import MIXERS
from model import MIXERS_BY_LETTER
from optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from tasks import games, synthetic
from tasks.positions import enumerate_positions, minimax_table


def run_recipe(first_line: str, namespace: dict) -> dict:
    """Executes the block that starts with this comment in `namespace`, up to where it edits layers/__init__.py."""
    page = (REPO / "docs" / "extending.md").read_text(encoding="utf-8")
    block, = re.findall(rf"```python\n({re.escape(first_line)}\n.*?)```", page, re.DOTALL)
    exec(block.partition("# in layers/__init__.py\n")[0], namespace)
    return namespace


@pytest.fixture
def ema(monkeypatch):
    mixer = run_recipe("# layers/ema.py", {"__name__": "ema"})["EMA"]
    monkeypatch.setitem(MIXERS, "ema", mixer)
    monkeypatch.setitem(MIXERS_BY_LETTER, mixer.letter, mixer)


@pytest.mark.parametrize("mixer", ["ema", "EA", "AE"])
def test_the_mixer_passes_the_tests_of_mixers(ema, mixer):
    idx = torch.randint(test_model.V, (test_model.B, test_model.T), generator=torch.Generator().manual_seed(1))
    make_model = lambda: test_model.random_model(mixer=mixer)
    test_model.test_logits_ignore_the_future(make_model(), idx)
    test_model.test_every_position_sees_the_whole_past(make_model(), idx)
    test_model.test_cached_decoding_equals_the_full_forward(make_model(), idx, [5, 1, 1, 10, 7])
    test_model.test_a_batch_of_different_lengths_decodes_like_each_row_alone(make_model(), idx, [9, 3, 9])
    test_model.test_a_rewound_cache_goes_on_as_if_nothing_had_been_read(make_model(), idx, [3, 1, 4], 6)
    test_model.test_rows_of_a_cache_are_selected_as_beam_search_needs_it(make_model(), idx)
    test_model.test_rows_that_share_a_prompt_decode_like_each_alone(make_model(), idx, [5, 9, 5], [0, 1, 1, 2] * 3)
    test_model.test_packed_documents_do_not_leak(make_model(), idx)
    test_model.test_flops_equal_torchs_counter(make_model(), idx)


def test_the_optimizer_trains_and_skips(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "lion", None)  # so that it is gone afterwards
    run_recipe("# in optimizer.py, before OPTIMIZERS", dict(vars(optimizer)))
    config, model = OptimizerConfig(learning_rate=0.02, weight_decay=0.1), test_model.random_model()
    object.__setattr__(config, "optimizer", "lion")  # the flag's choices were read when it was declared
    lion, idx = make_optimizer(model, config), torch.arange(16).view(2, 8)
    assert list(lion.parts) == ["lion", "adamw"]
    losses = []
    for step in range(10):
        loss = model(idx, idx + 1)
        loss.backward()
        if step == 5:
            before = [parameter.detach().clone() for parameter in model.parameters()]
            for parameter in model.parameters():
                parameter.grad.fill_(torch.nan)
            lion.masked_step(torch.tensor(True))
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        else:
            lion.masked_step(torch.tensor(False))
        lion.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    resumed = make_optimizer(model, config)
    resumed.load_state_dict(lion.state_dict())
    for parameter, state in lion.parts["lion"].state.items():
        assert torch.equal(resumed.parts["lion"].state[parameter]["momentum"], state["momentum"])


def test_the_source_resumes_from_the_state_of_a_chunk():
    read = run_recipe("# in text/sources.py", dict(vars(text.sources)))["read_numbers"]
    first, second = itertools.islice(read(0, (1, 2)), 2)
    assert list(itertools.islice(first.documents.strings(), 3)) == ["1", "3", "5"]
    resumed = next(iter(read(second.state, (1, 2))))
    assert list(resumed.documents.strings()) == list(second.documents.strings())


def test_the_game_is_learnt(monkeypatch, tmp_path):
    monkeypatch.setitem(games.GAMES, "subtraction", None)
    run_recipe("# in tasks/games.py, before GAMES", dict(vars(games)))
    game = games.make_game("subtraction", (6,))
    exact = minimax_table(games.GAMES["subtraction"], (6,))
    for line in enumerate_positions(game, 100):
        going = line.state.take(~line.state.over)
        assert (game.solve(going) == exact.look_up(going)).all()
    path = tmp_path / "run.pt"
    selfplay.main(["--game=subtraction", "--board=6", f"--out_path={path}", "--max_iter=40", "--rollout_games=64",
                   "--batch_size=64", "--val_intervals=40", "--n_layer=1", "--verbose=0", "--threads=0", "--rating_games=0"])
    first, last = run_rows(path)[0], run_rows(path)[-1]
    assert first["optimal_moves"] < last["optimal_moves"]


def test_the_task_by_hand(monkeypatch):
    monkeypatch.setitem(synthetic.TASKS, "max", None)
    run_recipe("# in tasks/synthetic.py, before TASKS", dict(vars(synthetic)))
    task = synthetic.TASKS["max"]
    inputs, targets = task.generate(np.random.default_rng(0), 4, task.length)
    assert inputs.shape == targets.shape == (4, task.length) and targets.max() < task.vocab_size
    assert all(answer == max(row[:t + 1]) for row, answers in zip(inputs, targets) for t, answer in enumerate(answers))
