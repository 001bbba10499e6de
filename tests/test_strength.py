"""Exams, opponents and ratings against slow counts and known values."""
import math

import numpy as np
import pytest

import strength
from conftest import tiny_player
from players import Prediction, is_best, model_player, noisy_player, perfect_player
from strength import (
    ELO_PER_NAT,
    Match,
    Question,
    fit_elo,
    grade,
    lost_lines,
    make_exam,
    optimal_rate,
    play_match,
    score_against_perfect,
    take_exam,
)
from tasks.games import Nim, TicTacToe
from tasks.positions import UNKNOWN, move_values, play_line, start_line, values

GAME = TicTacToe()
RNG = np.random.default_rng(1)
RANDOM_PLAYER = noisy_player(perfect_player(GAME, RNG), GAME, 1.0, RNG)


@pytest.fixture(scope="module")
def exam():
    return make_exam(GAME)


# -- exams ------------------------------------------------------------------------------------------------------------

def test_an_exam_asks_for_every_position_in_which_moves_differ(exam):
    boards = np.concatenate([question.line.state.board for question in exam])
    assert len(np.unique(boards, axis=0)) == len(boards) == 3191
    for line, found in exam:
        assert (found == move_values(GAME, line.state)).all()
        known = [row[row != UNKNOWN] for row in found]
        assert all(row.min() < row.max() for row in known)


def test_an_exam_of_a_larger_game_asks_for_different_positions_and_always_the_same():
    game = Nim((5, 6, 7, 8))
    first, again = make_exam(game, 200), make_exam(game, 200)
    seen = [(i, *board, player) for i, question in enumerate(first)
            for board, player in zip(question.line.state.board.tolist(), question.line.state.player.tolist())]
    assert len(set(seen)) == len(seen) > 150
    assert all((a.line.history == b.line.history).all() for a, b in zip(first, again))


def test_perfect_answers_have_full_marks_and_others_less(exam):
    def answer(question, moves, right):
        outcomes = np.eye(3)[(values(GAME, question.line.state) + (1 if right else 2)) % 3]
        return Prediction(moves / moves.sum(1, keepdims=True), outcomes)
    perfect = grade(exam, [answer(question, is_best(question.values).astype(float), True) for question in exam])
    assert perfect["optimal_moves"] == perfect["value_accuracy"] == 1.0
    worst = [(question.values == question.values.min(1, keepdims=True)).astype(float) for question in exam]
    assert grade(exam, [answer(question, moves, False) for question, moves in zip(exam, worst)]) | {"entropy": 0} == {
        "optimal_moves": 0.0, "value_accuracy": 0.0, "entropy": 0}


def test_the_entropy_of_uniform_moves_is_the_log_of_their_number():
    line = start_line(GAME, 1)
    uniform = Prediction(np.full((1, 9), 1 / 9), np.array([[0.0, 1, 0]]))
    question = Question(line, move_values(GAME, line.state))
    assert grade([question], [uniform])["entropy"] == pytest.approx(math.log(9))


def test_an_exam_grades_a_model_as_the_player_it_is(exam):
    model = tiny_player(GAME)
    rate = optimal_rate(GAME, model_player(model, GAME), exam)
    assert take_exam(model, GAME, exam)["optimal_moves"] == pytest.approx(rate)
    assert optimal_rate(GAME, perfect_player(GAME, np.random.default_rng(0)), exam) == 1.0


# -- opponents --------------------------------------------------------------------------------------------------------

def count_lines(player, side):
    """(lost, all) by a slow recursion over single games."""
    def follow(history):
        line = start_line(GAME, 1)
        for move in history:
            line = play_line(GAME, line, np.zeros(1, np.int64), np.array([move]))
        if line.state.over[0]:
            return int(line.state.score[0] == -side), 1
        if line.state.player[0] == side:
            return follow([*history, int(player(line)[0])])
        counts = [follow([*history, move]) for move in np.flatnonzero(GAME.legal(line.state)[0])]
        return sum(lost for lost, _ in counts), sum(n for _, n in counts)
    return follow([])


@pytest.mark.parametrize("side", [1, -1])
def test_lost_lines_are_those_of_a_slow_recursion(side):
    player = model_player(tiny_player(GAME), GAME)
    assert lost_lines(GAME, player, side) == count_lines(player, side)


def test_a_perfect_player_loses_no_line():
    first_best = lambda line: is_best(move_values(GAME, line.state)).argmax(1)
    for side in (1, -1):
        lost, n = lost_lines(GAME, first_best, side)
        assert lost == 0 and n > 50


def test_games_with_too_many_lines_are_not_counted(monkeypatch):
    player = model_player(tiny_player(GAME), GAME)
    lost, n = lost_lines(GAME, player, 1)
    monkeypatch.setattr(strength, "MAX_LINES", n - 1)
    assert lost_lines(GAME, player, 1) is None
    monkeypatch.setattr(strength, "MAX_LINES", n)
    assert lost_lines(GAME, player, 1) == (lost, n)


def test_perfect_play_against_perfect_play_has_what_it_is_owed():
    row = score_against_perfect(GAME, perfect_player(GAME, np.random.default_rng(1)), 200)
    assert row["perfect_score"] == row["expected_score"] == 0.5 and row["lost_wins"] == 0 < row["won_openings"]
    worse = score_against_perfect(GAME, RANDOM_PLAYER, 200)
    assert worse["perfect_score"] < 0.4 and worse["lost_wins"] > 0


# -- ratings ----------------------------------------------------------------------------------------------------------

def test_a_match_of_a_player_with_itself_is_even():
    player = model_player(tiny_player(GAME), GAME)
    score, n = play_match(GAME, player, player, 60, seed=3)
    assert n >= 40 and score == n / 2


def test_ratings_of_two_players_by_hand():
    """75 of 100 points and one draw more: the odds are 75.5 to 25.5."""
    ratings = fit_elo([Match("a", "b", 25, 100)])
    assert ratings["a"] == (0, 0)
    assert ratings["b"].elo == pytest.approx(ELO_PER_NAT * math.log(75.5 / 25.5), abs=0.5)
    p = 75.5 / 101
    assert ratings["b"].margin == pytest.approx(1.96 * ELO_PER_NAT / math.sqrt(101 * p * (1 - p)), rel=1e-3)


def test_ratings_recover_those_that_made_the_results():
    true, rng = {"a": 0, "b": 120, "c": 250, "d": -80}, np.random.default_rng(0)
    matches = [Match(x, y, rng.binomial(2000, 1 / (1 + 10 ** ((true[y] - true[x]) / 400))), 2000)
               for x in true for y in true if x < y]
    for name, (elo, margin) in fit_elo(matches).items():
        assert abs(elo - true[name]) <= max(2.5 * margin, 1e-6)


def test_a_player_that_never_loses_has_a_finite_rating():
    ratings = fit_elo([Match("a", "b", 0, 50)])
    assert 500 < ratings["b"].elo < 1500 and ratings["b"].margin > 100
