"""A model as a player: the cache, looking ahead and search against slow and exact oracles."""
import math

import numpy as np
import pytest
import torch

from conftest import tiny_player
from players import (
    best_moves,
    expand,
    is_best,
    model_player,
    noisy_player,
    one_hot,
    open_positions,
    perfect_player,
    play_games,
    predict,
    read_line,
    search,
    search_player,
    softmax,
)
from tasks.games import ConnectFour, Nim, TicTacToe
from tasks.positions import (
    LOSS,
    WIN,
    draw_moves,
    enumerate_positions,
    move_values,
    play_line,
    random_line,
    start_line,
    values,
)

GAMES = {"tic_tac_toe": TicTacToe(), "connect_four": ConnectFour((4, 5)), "nim": Nim((1, 2, 3))}


@pytest.fixture(params=GAMES)
def game(request):
    return GAMES[request.param]


def solver_values(game):
    """In place of what the model expects: (m, 3), certain of the exact value."""
    return lambda children: one_hot(np.where(children.state.over, 0, values(game, children.state)))


# -- reading ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("mixer", ["attention", "gated_delta"])
def test_cached_play_predicts_what_reading_anew_does(game, mixer):
    model, rng = tiny_player(game, mixer=mixer), np.random.default_rng(0)
    positions = open_positions(model, game, start_line(game, 16))
    for _ in range(4):
        moves = draw_moves(game.legal(positions.state), rng)
        positions = positions.play(np.arange(len(positions)), moves)
        positions = positions.take(rng.permutation(np.flatnonzero(~positions.state.over)))
        anew = read_line(model, game, positions.line)
        cached = predict(game, positions.logits, game.legal(positions.state))
        np.testing.assert_allclose(cached.moves, anew.moves, atol=1e-5)
        np.testing.assert_allclose(cached.outcomes, anew.outcomes, atol=1e-5)


@torch.no_grad()
def test_rows_that_are_played_stay_as_they_were(game):
    model = tiny_player(game)
    positions = open_positions(model, game, start_line(game, 3))
    before = positions.logits.clone(), positions.state.board.copy()
    first, again = (positions.play(np.array([2, 0, 2]), np.array([0, 1, 0])) for _ in range(2))
    assert torch.equal(positions.logits, before[0]) and (positions.state.board == before[1]).all()
    assert torch.equal(first.logits, again.logits) and positions.cache.length == 1
    torch.testing.assert_close(first.logits[0], first.logits[2])


def test_predictions_are_probabilities_of_legal_moves(game):
    line = random_line(game, 32, 2, np.random.default_rng(1))
    prediction = read_line(tiny_player(game), game, line)
    np.testing.assert_allclose(prediction.moves.sum(1), 1)
    np.testing.assert_allclose(prediction.outcomes.sum(1), 1)
    assert ((prediction.moves > 0) == game.legal(line.state)).all()


def test_softmax():
    np.testing.assert_allclose(softmax(np.array([[0.0, math.log(3), -np.inf], [-np.inf] * 3])), [[0.25, 0.75, 0], [0, 0, 0]])


# -- looking one move ahead -------------------------------------------------------------------------------------------

@torch.no_grad()
def test_solver_values_in_place_of_the_models_reproduce_minimax(game):
    """A wrong sign or perspective would learn quietly."""
    model = tiny_player(game)
    for plies in range(4):
        line = random_line(game, 40, plies, np.random.default_rng(plies))
        ahead = expand(open_positions(model, game, line), solver_values(game))
        exact = move_values(game, line.state)
        assert (ahead.values[game.legal(line.state)] == exact[game.legal(line.state)]).all()
        assert np.isneginf(ahead.values[~game.legal(line.state)]).all()
        assert (softmax(ahead.values / 0.01)[~is_best(exact)] < 1e-6).all()


@torch.no_grad()
def test_ends_count_by_the_rules_and_not_as_the_model_expects():
    game = TicTacToe()
    line = start_line(game, 1)
    for move in (0, 3, 1, 4):
        line = play_line(game, line, np.zeros(1, np.int64), np.array([move]))
    ahead = expand(open_positions(tiny_player(game), game, line))
    assert ahead.values[0, 2] == 1 and ahead.outcomes[0, 2].tolist() == [0, 0, 1]
    assert (abs(ahead.values[0, 5:]) < 1).all()
    child = ahead.child_of(np.array([2]))
    assert ahead.moves[child] == [2] and ahead.children.state.over[child].all()


# -- search -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_search_counts_every_simulation_and_no_move_that_is_not_legal(game):
    line = random_line(game, 24, 2, np.random.default_rng(3))
    found = search(open_positions(tiny_player(game), game, line), 20, np.random.default_rng(0))
    assert (found.visits.sum(1) == 20).all() and not found.visits[~game.legal(line.state)].any()
    np.testing.assert_allclose(found.outcomes.sum(1), 1)
    assert np.isnan(found.values[found.visits == 0]).all() and (abs(found.values[found.visits > 0]) <= 1).all()


@torch.no_grad()
def test_search_finds_wins_and_threats_two_moves_ahead():
    """X to move must block O's row, or take a win where there is one."""
    game, model = TicTacToe(), tiny_player(TicTacToe())
    def choose(*moves):
        line = start_line(game, 1)
        for move in moves:
            line = play_line(game, line, np.zeros(1, np.int64), np.array([move]))
        return search_player(model, game, 200)(line).tolist()
    assert choose(0, 3, 8, 4) == [5] and choose(0, 3, 1, 4) == [2]


@torch.no_grad()
def test_a_long_search_reaches_the_exact_value_whatever_the_model():
    game = Nim((1, 2, 2))
    line = enumerate_positions(game, 1000)[1]
    line = line.take(~line.state.over)
    positions = open_positions(tiny_player(game), game, line)
    found = search(positions, 2000)
    exact = move_values(game, line.state)
    assert is_best(exact)[np.arange(len(exact)), best_moves(found)].all()
    value = found.outcomes[:, WIN] - found.outcomes[:, LOSS]
    assert (np.sign(value) == values(game, line.state)).all()


@torch.no_grad()
def test_one_simulation_of_a_search_is_the_move_that_the_prior_prefers(game):
    line = random_line(game, 20, 1, np.random.default_rng(5))
    positions = open_positions(tiny_player(game), game, line)
    found = search(positions, 1)
    assert (found.visits.argmax(1) == model_player(positions.model, game)(line)).all()


@torch.no_grad()
def test_search_of_a_batch_is_that_of_each_game(game):
    model, line = tiny_player(game), random_line(game, 6, 2, np.random.default_rng(2))
    together = search(open_positions(model, game, line), 30)
    for row in range(len(line.history)):
        alone = search(open_positions(model, game, line.take([row])), 30)
        assert (alone.visits[0] == together.visits[row]).all()


# -- players ----------------------------------------------------------------------------------------------------------

def test_perfect_play_of_a_drawn_game_is_a_draw_and_beats_random_play():
    game, rng = TicTacToe(), np.random.default_rng(0)
    perfect = perfect_player(game, rng)
    assert not play_games(game, perfect, perfect, start_line(game, 50)).any()
    scores = play_games(game, perfect, noisy_player(perfect, game, 1.0, rng), start_line(game, 50))
    assert scores.min() >= 0 and scores.mean() > 0.8


def test_a_noisy_player_errs_as_often_as_it_should():
    game = Nim((3, 4, 5))
    player = noisy_player(perfect_player(game, np.random.default_rng(0)), game, 0.4, np.random.default_rng(1))
    line, n = start_line(game, 1), 4000
    best = is_best(move_values(game, line.state))[0]
    expected = 0.6 + 0.4 * best.mean()
    right = best[player(line.take(np.zeros(n, int)))].mean()
    assert abs(right - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
