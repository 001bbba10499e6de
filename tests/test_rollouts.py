"""Games that a model plays against itself: what is learnt of them, and that nothing is lost when a run is."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rollouts
from conftest import assert_same, tiny_player
from players import is_best, one_hot
from rollouts import (
    ALGORITHMS,
    GameDraws,
    Memory,
    PlayConfig,
    Played,
    PlayLoader,
    Rollout,
    join_played,
    measure_variety,
    own_targets,
    play_loss,
    play_out,
)
from tasks.games import Nim, TicTacToe
from tasks.poker import Kuhn
from tasks.positions import move_values, play_line, start_line

GAME = TicTacToe()
OPEN = [name for name, algorithm in ALGORITHMS.items() if not algorithm.hides_cards]  # the others: test_hidden_play.py


def make_loader(game=GAME, seed=1, **flags) -> PlayLoader:
    return PlayLoader(game, PlayConfig(**{"algorithm": "search", "rollout_games": 24, "batch_size": 16} | flags), seed)


def replay_lines(game, rollout: Rollout):
    """(ply, rows, line) of the positions that have weights."""
    for ply in range(rollout.ids.shape[1]):
        rows = np.flatnonzero(rollout.outcomes[:, ply].sum(1) > 0)
        if len(rows):
            line = start_line(game, len(rows))
            for move in rollout.ids[rows, 1:ply + 1].T:
                line = play_line(game, line, np.arange(len(rows)), move)
            yield ply, rows, line


# -- what is played ---------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("algorithm, search", [*((name, "one_ply") for name in ALGORITHMS), ("search", "puct")])
def test_a_game_is_the_same_whatever_is_played_beside_it(algorithm, search):
    """So that several processes can play a part of a rollout each."""
    game = Kuhn() if ALGORITHMS[algorithm].hides_cards else GAME
    config = PlayConfig(algorithm=algorithm, search=search, simulations=4).for_game(game)

    def play(rows: slice) -> Played:
        draws = GameDraws.of(game, 24, np.random.default_rng(3)).take(rows)
        return ALGORITHMS[algorithm].make_rollout(tiny_player(game), game, config, draws, Memory(None))
    whole, joined = play(slice(24)), join_played([play(slice(5)), play(slice(5, 24))])
    assert (joined.moves == whole.moves).all() and (joined.score == whole.score).all() and joined.n_read == whole.n_read
    for part, expected in zip(joined.rollout, whole.rollout):
        np.testing.assert_allclose(part, expected, atol=1e-5)
    assert len(np.unique(whole.moves, axis=0)) > 5


@pytest.mark.parametrize("algorithm", OPEN)
@pytest.mark.parametrize("search", ["one_ply", "puct"])
def test_batches_are_games_by_the_rules(algorithm, search):
    if search == "puct" and algorithm != "search":
        pytest.skip("has no effect")
    loader = make_loader(algorithm=algorithm, search=search, simulations=4, symmetries=False)
    loader.next_batch(tiny_player(GAME))
    rollout = loader.replay
    n_positions = 0
    for ply, rows, line in replay_lines(GAME, rollout):
        assert (rollout.ids[rows, 0] == GAME.start_token).all() and not line.state.over.any()
        assert (rollout.legal[rows, ply] == GAME.legal(line.state)).all()
        assert not rollout.moves[rows, ply][~rollout.legal[rows, ply]].any()
        np.testing.assert_allclose(rollout.outcomes[rows, ply].sum(1), 1, rtol=1e-6)
        n_positions += len(rows)
    assert n_positions > 24 * 2


@pytest.mark.parametrize("algorithm", ["search", "imitation"])
def test_targets_of_moves_are_probabilities(algorithm):
    loader = make_loader(algorithm=algorithm)
    loader.next_batch(tiny_player(GAME))
    total = loader.replay.moves.sum(2)
    assert np.isclose(total[total > 0], 1).all() and (total > 0).sum() > 24 * 2


def test_values_mix_what_was_found_and_how_the_game_ended():
    game, model = Nim((1, 2)), tiny_player(Nim((1, 2)))
    ended, found, mixed = (make_loader(game, outcome_share=share, random_plies=0) for share in (1.0, 0.0, 0.25))
    for loader in (ended, found, mixed):
        loader.play(model)
    last = {row: ply for ply, rows, _ in replay_lines(game, ended.replay) for row in rows}
    for row, ply in last.items():  # who moves last wins, and no end is a draw
        signs = np.where((ply - np.arange(ply + 1)) % 2 == 0, 1, -1)
        assert (ended.replay.outcomes[row, :ply + 1] == one_hot(signs)).all()
    np.testing.assert_allclose(mixed.replay.outcomes, 0.25 * ended.replay.outcomes + 0.75 * found.replay.outcomes, atol=1e-6)


def test_how_a_game_ended_says_nothing_of_positions_before_a_random_move():
    model = tiny_player(GAME)
    with_ends, without = make_loader(outcome_share=1.0), make_loader(outcome_share=0.0)
    for loader in (with_ends, without):
        loader.play(model)
    differs = (with_ends.replay.outcomes != without.replay.outcomes).any(2)
    is_end = (with_ends.replay.outcomes == 1).any(2)
    assert (is_end | ~differs).all() and differs.any() and (~differs & (without.replay.outcomes.sum(2) > 0)).any()


@torch.no_grad()
def test_log_probabilities_of_a_cached_rollout_are_those_of_the_training_pass():
    """In fp32, at temperature 1: a policy gradient differentiates what it sampled from."""
    model, seen = tiny_player(GAME), []

    def think(positions, draws):
        found = own_targets(positions, draws)
        seen.append((positions.line.history.copy(), found.moves))
        return found
    played = play_out(model, GAME, PlayConfig(random_plies=2), GameDraws.of(GAME, 32, np.random.default_rng(0)), think)
    rollout = played.rollout
    logits = model(torch.from_numpy(rollout.ids))
    logprobs = F.log_softmax(logits[..., :9].masked_fill(~torch.from_numpy(rollout.legal), -1e9), -1).numpy()
    n = 0
    for history, moves in seen:
        for line, probabilities in zip(history, moves):
            row = next(i for i, ids in enumerate(rollout.ids) if (ids[1:len(line) + 1] == line).all())
            legal = rollout.legal[row, len(line)]
            np.testing.assert_allclose(np.log(probabilities[legal]), logprobs[row, len(line)][legal], atol=1e-4)
            n += 1
    assert n > 100


# -- the loss ---------------------------------------------------------------------------------------------------------

class Bandit(torch.nn.Module):
    """Two arms: the logits of one position, of two moves, three outcomes and START."""

    def __init__(self, arms):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([*arms, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))

    def forward(self, ids):
        return self.logits.expand(*ids.shape, -1)


def test_the_gradient_of_reinforce_on_a_two_armed_bandit_is_the_analytic_one():
    """d E[reward] / d logit_a = p_a (reward_a - E[reward]), whatever the baseline: over both arms, as often as drawn."""
    rewards, baseline = np.array([1.0, -1.0]), 0.3
    bandit = Bandit([0.4, -0.2])
    p = bandit.logits[:2].softmax(0).detach().numpy()
    moves = np.eye(2) * (rewards - baseline)[:, None] * p[:, None]  # each arm, weighted with its probability
    batch = [torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, 2, dtype=torch.bool), torch.from_numpy(moves)[:, None],
             torch.zeros(2, 1, 3)]
    play_loss(bandit, batch).backward()
    expected = p * (rewards - p @ rewards)
    np.testing.assert_allclose(-bandit.logits.grad[:2].numpy(), expected, atol=1e-7)


def test_reinforce_weighs_what_was_played_by_what_it_won_above_the_running_mean():
    game, memory = Nim((1, 2)), Memory(None, torch.tensor([0.5, -0.5], dtype=torch.float64))
    config, draws = PlayConfig(algorithm="reinforce", random_plies=0), GameDraws.of(game, 16, np.random.default_rng(0))
    with torch.no_grad():
        played = rollouts.reinforce_rollout(tiny_player(game), game, config, draws, memory)
    memory.update(played)
    assert isinstance(played, Played)
    for row in range(16):
        for ply in np.flatnonzero(played.moves[row] >= 0):
            sign = 1 if ply % 2 == 0 else -1
            weights = np.zeros(game.n_moves)
            weights[played.moves[row, ply]] = sign * played.score[row] - sign * 0.5
            np.testing.assert_allclose(played.rollout.moves[row, ply], weights, atol=1e-6)
    mean = played.score.mean()
    np.testing.assert_allclose(memory.baseline, [0.475 + 0.05 * mean, -0.475 - 0.05 * mean])


def test_loss_is_the_mean_cross_entropy_over_positions():
    """By hand: two positions, one of them with a move that is not legal, and a third without weights."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 9.0]]).expand(3, 6)[None]
    legal = torch.tensor([[[True, True], [True, False], [True, True]]])
    moves = torch.tensor([[[0.25, 0.75], [1.0, 0], [0, 0]]])
    outcomes = torch.tensor([[[1.0, 0, 0], [0, 0.5, 0.5], [0, 0, 0]]])
    log = lambda values: torch.tensor(values).log_softmax(0)
    own = -(0.25 * log([0.0, 1.0])[0] + 0.75 * log([0.0, 1.0])[1] + log([2.0, 3.0, 4.0])[0]
            + 0.5 * log([2.0, 3.0, 4.0])[1] + 0.5 * log([2.0, 3.0, 4.0])[2]) / 2
    assert play_loss(lambda ids: logits, [torch.zeros(1, 3), legal, moves, outcomes]).item() == pytest.approx(own.item())


# -- symmetries -------------------------------------------------------------------------------------------------------

def test_a_symmetry_of_a_rollout_is_a_rollout_of_the_same_game():
    loader = make_loader(outcome_share=0.0)
    loader.play(tiny_player(GAME))
    rng = np.random.default_rng(0)
    drawn = GAME.symmetries[rng.integers(0, 8, 24)]
    turned = loader.replay.transform(drawn)
    for ply, rows, line in replay_lines(GAME, turned):
        assert (turned.legal[rows, ply] == GAME.legal(line.state)).all()
        for row in rows:  # the weight of a move is that of the move it came from
            np.testing.assert_array_equal(turned.moves[row, ply][drawn[row]], loader.replay.moves[row, ply])
    assert (turned.outcomes == loader.replay.outcomes).all()
    identity = loader.replay.transform(GAME.symmetries[[0] * 24])
    assert all((a == b).all() for a, b in zip(identity, loader.replay))


# -- the loader -------------------------------------------------------------------------------------------------------

def test_replay_holds_the_latest_rollouts_alone():
    loader, model, kept = make_loader(updates=2, replay=3), tiny_player(GAME), []
    for step in range(12):
        loader.next_batch(model)
        if step % 2 == 0:
            kept.append(loader.replay.ids[-24:])
        assert loader.n_games == 24 * (step // 2 + 1) and len(loader.replay.ids) == min(loader.n_games, 72)
    assert (loader.replay.ids == np.concatenate(kept[-3:])).all()


@pytest.mark.parametrize("algorithm", OPEN)
def test_a_loader_goes_on_bit_for_bit(algorithm):
    model, loader = tiny_player(GAME), make_loader(algorithm=algorithm)
    for _ in range(6):
        loader.next_batch(model)
    saved = loader.state_dict()
    expected = [loader.next_batch(model) for _ in range(6)]
    other = make_loader(algorithm=algorithm, seed=9)
    other.load_state_dict(saved)
    assert_same([list(other.next_batch(model)) for _ in range(6)], [list(batch) for batch in expected])


def test_an_average_of_the_weights_plays(monkeypatch):
    """Not the latest ones, which the model has again afterwards, bit for bit."""
    model, played = tiny_player(GAME), []

    def watched(model, *rest):
        played.append(model.embed.weight.detach().clone())
        return play_out(model, *rest)
    monkeypatch.setattr(rollouts, "play_out", watched)
    loader = make_loader(updates=1, average=0.5)
    values = []
    for _ in range(30):
        values.append(model.embed.weight.detach().clone())
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        loader.next_batch(model)
        assert_same(dict(model.state_dict()), before)
        with torch.no_grad():
            model.embed.weight.add_(0.1 * torch.randn_like(model.embed.weight))
    expected = values[0]
    for value, weights in zip(values, played):
        expected = torch.lerp(expected, value, 0.5)
        torch.testing.assert_close(weights, expected)
    assert len(played) == 30 and not torch.allclose(played[-1], values[-1], atol=0.01)
    assert make_loader(average=0.0).memory.average is None


def test_on_policy_batches_are_the_games_just_played():
    loader, model = make_loader(algorithm="reinforce", symmetries=False), tiny_player(GAME)
    first, second = loader.next_batch(model), loader.next_batch(model)
    assert loader.n_games == 48 and (second[0].numpy() == loader.replay.ids).all() and not torch.equal(first[0], second[0])


def test_statistics_count_since_they_were_taken():
    loader, model = make_loader(updates=1, random_plies=0), tiny_player(GAME)
    assert loader.take_statistics() == {}
    for _ in range(3):
        loader.next_batch(model)
    row = loader.take_statistics()
    assert row["games"] == 72 and 0 < row["distinct_openings"] <= 1 and 0 < row["distinct_games"] <= 1
    assert row["games_per_sec"] > 0 and "games_per_sec" not in loader.take_statistics()


def test_how_much_games_differ_by_hand():
    """Six games of three moves: three begin without a random move, of which two are the same, two with the same one, of
    which no two are; and one that was random to its end."""
    moves = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 4], [5, 6, 7], [5, 8, 7], [9, 9, 9]])
    is_own = np.ones((6, 3), bool)
    is_own[3:5, 0], is_own[5] = False, False
    found = measure_variety(Played(None, moves, is_own, None, 0))
    assert found == {"distinct_openings": 5 / 6, "distinct_games": 2 / 3}  # two begun before, and of the repeats 1 + 1 of 3
    alone = measure_variety(Played(None, moves[3:4], is_own[3:4], None, 0))
    assert alone == {"distinct_openings": 1.0}


def test_a_damaged_state_is_refused():
    loader = make_loader()
    loader.next_batch(tiny_player(GAME))
    saved = loader.state_dict()
    for change in ({"replay": [part[:, :1] for part in saved["replay"]]}, {"updates_left": 7}, {"n_games": -1}):
        with pytest.raises(ValueError):
            make_loader().load_state_dict(saved | change)


def test_imitation_learns_the_moves_of_the_player_that_errs():
    """With epsilon 0 every move is one of the best."""
    loader = make_loader(algorithm="imitation", epsilon=0.0)
    loader.play(tiny_player(GAME))
    for ply, rows, line in replay_lines(GAME, loader.replay):
        chosen = loader.replay.moves[rows, ply].argmax(1)
        assert is_best(move_values(GAME, line.state))[np.arange(len(rows)), chosen].all()
