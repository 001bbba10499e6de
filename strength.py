"""How well a player plays: against exact truth, against any opponent, against others.

    exam = make_exam(game)                      # positions whose moves differ in value, solved
    row = take_exam(model, game, exam)          # optimal_moves, value_accuracy, entropy
    lost, n = lost_lines(game, model_player(model, game), side=1)
    ratings = fit_elo([Match("a", "b", 61.5, 100)])
"""
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from model import GPT
from players import Player, Prediction, is_best, perfect_player, play_games, predict, read_line
from tasks.poker import Poker, expected_score, exploitability, information_sets
from tasks.positions import (
    DRAW,
    UNKNOWN,
    Game,
    Line,
    enumerate_positions,
    first_of_each,
    move_values,
    play_line,
    random_line,
    start_line,
    values,
)

EXAM_SIZE = 2000         # positions in an exam, about, where a game has more
MAX_POSITIONS = 20_000   # of a game whose exam asks for all of them
MAX_LINES = 20_000       # of play that are followed to see whether any is lost
ELO_PER_NAT = 400 / math.log(10)


# -- exams ------------------------------------------------------------------------------------------------------------

class Question(NamedTuple):
    """Positions after the same number of moves, in each of which some move is better than another. values: (n, n_moves),
    see move_values."""
    line: Line
    values: np.ndarray


def make_exam(game: Game, n: int = EXAM_SIZE, seed: int = 0) -> list[Question]:
    """Every position of a small game, else about `n` that random moves lead to, from the ply on from which they are solved;
    always the same ones. A position that several lines lead to is shown after one of them."""
    return [question for line in exam_lines(game, n, seed) if len((question := make_question(game, line)).values)]


def exam_lines(game: Game, n: int, seed: int) -> list[Line]:
    if lines := enumerate_positions(game, MAX_POSITIONS):
        return [line.take(~line.state.over) for line in lines]
    rng, plies = np.random.default_rng([3, seed]), [n for n in range(game.max_plies) if has_solved(game, n)]
    lines = [random_line(game, 2 * -(-n // len(plies)), length, rng) for length in plies]
    return [line.take(first_of_each(line.state)) for line in lines]


def has_solved(game: Game, plies: int) -> bool:
    """Whether positions after so many random moves are solved."""
    return bool(game.solvable(random_line(game, 32, plies, np.random.default_rng(0)).state).any())


def make_question(game: Game, line: Line) -> Question:
    """The lines at whose end all moves are solved and differ."""
    found, legal = move_values(game, line.state), game.legal(line.state)
    is_solved = ((found == UNKNOWN) == ~legal).all(1)
    keep = is_solved & (is_best(found) != legal).any(1)
    return Question(line.take(keep), found[keep])


def take_exam(model: GPT, game: Game, exam: Sequence[Question]) -> dict:
    """optimal_moves, the fraction of positions in which the most probable move is one of the best; value_accuracy, in which
    the most probable outcome is right; entropy, of the moves, in nats."""
    return grade(exam, [read_line(model, game, question.line) for question in exam])


def grade(exam: Sequence[Question], answers: Sequence[Prediction]) -> dict:
    moves, best, outcomes, right = (np.concatenate(parts) for parts in zip(*(
        (answer.moves, is_best(question.values), answer.outcomes, best_values(question.values) + DRAW)
        for question, answer in zip(exam, answers))))
    rows = np.arange(len(moves))
    logs = np.log(np.where(moves > 0, moves, 1.0))
    return {"optimal_moves": float(best[rows, moves.argmax(1)].mean()),
            "value_accuracy": float((outcomes.argmax(1) == right).mean()),
            "entropy": float(-(moves * logs).sum(1).mean())}


def best_values(found: np.ndarray) -> np.ndarray:
    """(n, n_moves), see move_values -> (n,) int64: of the best move."""
    return np.where(found == UNKNOWN, -1, found).max(1).astype(np.int64)


def optimal_rate(game: Game, player: Player, exam: Sequence[Question]) -> float:
    """The fraction of an exam's positions in which a player chooses one of the best moves."""
    right = [is_best(found)[np.arange(len(found)), player(line)] for line, found in exam]
    return float(np.concatenate(right).mean())


# -- hidden cards -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def policy_table(model: GPT, game: Poker) -> np.ndarray:
    """(sets, n_moves): the probability of each move in each information set, see tasks/poker.py."""
    sets = information_sets(game)
    logits = model.eager_forward(torch.from_numpy(sets.tokens).to(model.embed.weight.device))
    return predict(game, logits[torch.arange(len(sets.lengths)), torch.from_numpy(sets.lengths - 1)], sets.legal).moves


def measure_policy(model: GPT, game: Poker) -> dict:
    """exploitability in chips a game; first_score, chips that the first player wins when both play like this; entropy, the
    mean over information sets of that of the moves, in nats."""
    policy = policy_table(model, game)
    entropy = -(policy * np.log(np.where(policy > 0, policy, 1.0))).sum(1).mean()
    return {"exploitability": exploitability(game, policy), "first_score": expected_score(game, policy),
            "entropy": float(entropy)}


# -- opponents --------------------------------------------------------------------------------------------------------

def lost_lines(game: Game, player: Player, side: int) -> tuple[int, int] | None:
    """How many lines the player loses, and how many there are, when the opponent tries every reply to every move. side: 1
    where the player moves first, else -1. None where there are more than MAX_LINES."""
    line, lost, n = start_line(game, 1), 0, 0
    while len(line.history):
        if line.state.player[0] == side:
            line = play_line(game, line, np.arange(len(line.history)), player(line))
        else:
            line = play_line(game, line, *np.nonzero(game.legal(line.state)))
        over = line.state.over
        n, lost = n + int(over.sum()), lost + int((line.state.score[over] == -side).sum())
        line = line.take(~over)
        if n + len(line.history) > MAX_LINES:
            return None
    return lost, n


def score_against_perfect(game: Game, player: Player, n: int, seed: int = 0) -> dict:
    """Games from random openings against a perfect opponent, each opening played with both sides. perfect_score: the mean of
    1 for a win, 0.5 for a draw; expected_score: what a perfect player would have; lost_wins: how many of the openings that
    were won the player did not win, and won_openings: how many there were."""
    rng = np.random.default_rng([4, seed])
    opponent, results, owed = perfect_player(game, rng), [], []
    for line in openings(game, n // 2, rng):
        value = values(game, line.state) * line.state.player  # for the first player
        for side, players in ((1, (player, opponent)), (-1, (opponent, player))):
            results.append(side * play_games(game, *players, line))
            owed.append(side * value)
    results, owed = np.concatenate(results), np.concatenate(owed)
    return {"perfect_score": float((results + 1).mean() / 2), "expected_score": float((owed + 1).mean() / 2),
            "lost_wins": int((results[owed == 1] < 1).sum()), "won_openings": int((owed == 1).sum())}


def openings(game: Game, n: int, rng: np.random.Generator) -> list[Line]:
    """About `n` positions after 0 to half of a game's moves, at random."""
    lengths = range(game.max_plies // 2 + 1)
    lines = [random_line(game, -(-n // len(lengths)), plies, rng) for plies in lengths]
    return [line for line in lines if len(line.history)]


# -- ratings ----------------------------------------------------------------------------------------------------------

class Match(NamedTuple):
    """score: the first one's points in n games, 1 for a win and 0.5 for a draw."""
    first: Hashable
    second: Hashable
    score: float
    n: int


def play_match(game: Game, first: Player, second: Player, n: int, seed: int) -> tuple[float, int]:
    """The first one's points, and of how many games: about `n` from random openings, each once and with both sides, because
    most players would only repeat a game."""
    rng, points, played = np.random.default_rng([5, seed]), 0.0, 0
    for line in openings(game, max(1, n // 2), rng):
        line = line.take(first_of_each(line.state))
        scores = np.concatenate((play_games(game, first, second, line), -play_games(game, second, first, line)))
        points, played = points + float((scores + 1).sum() / 2), played + len(scores)
    return points, played


class Rating(NamedTuple):
    """margin: half of the 95 % interval, which takes draws for half a win and half a loss, and is rather too wide."""
    elo: float
    margin: float


def fit_elo(matches: Sequence[Match]) -> dict[Hashable, Rating]:
    """The most likely Elo ratings, relative to the first name, which has 0. One draw of each with the first is added, or a
    player that never loses would have no finite rating. Source: Bradley and Terry 1952, Biometrika 39."""
    names = list(dict.fromkeys(name for match in matches for name in (match.first, match.second)))
    index = {name: i for i, name in enumerate(names)}
    played = [*matches, *(Match(name, names[0], 0.5, 1) for name in names[1:])]
    a, b = (np.array([index[getattr(match, side)] for match in played]) for side in ("first", "second"))
    points, n = np.array([match.score for match in played]), np.array([match.n for match in played])

    def loss(free: np.ndarray) -> float:
        rating = np.concatenate(([0.0], free))
        ahead = rating[a] - rating[b]
        return float((points * np.logaddexp(0, -ahead) + (n - points) * np.logaddexp(0, ahead)).sum())
    from scipy.optimize import minimize  # half a second that other commands need not wait
    rating = np.concatenate(([0.0], minimize(loss, np.zeros(len(names) - 1)).x))
    expected = 1 / (1 + np.exp(rating[b] - rating[a]))
    information = np.zeros((len(names), len(names)))
    for i, j, weight in zip(a, b, n * expected * (1 - expected)):
        information[[i, j], [i, j]] += weight
        information[[i, j], [j, i]] -= weight
    errors = np.sqrt(np.diag(np.linalg.pinv(information[1:, 1:]))) if len(names) > 1 else np.zeros(0)
    margins = np.concatenate(([0.0], 1.96 * errors))
    return {name: Rating(float(rating[i] * ELO_PER_NAT), float(margins[i] * ELO_PER_NAT)) for name, i in index.items()}
