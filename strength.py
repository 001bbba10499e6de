"""How well a model plays, against exact truth.

    exam = make_exam(game)
    row = take_exam(model, machine, game, exam)
"""
from typing import NamedTuple

import numpy as np
import torch

from model import GPT
from players import Positions, expand, open_positions, predict, read_line, softmax
from tasks.games import UNKNOWN, Game, Line, draw_moves, enumerate_positions, first_of_each, move_values, play_line, random_line

EXAM_SIZE = 2000      # positions, where there are more
ALL_POSITIONS = 10_000
MAX_LINES = 100_000


class Question(NamedTuple):
    """Positions of one length, whose moves differ in value. values: (n, n_moves), see move_values."""
    line: Line
    values: np.ndarray


def make_exam(game: Game, n: int = EXAM_SIZE, seed: int = 0) -> list[Question]:
    """All positions of a small game, else random ones, that are solved and where moves differ."""
    lines = enumerate_positions(game, ALL_POSITIONS)
    if lines is None:
        rng = np.random.default_rng([3, seed])
        each = -(-2 * n // game.max_plies)
        lines = [random_line(game, each, plies, rng) for plies in range(game.max_plies)]
        lines = [line.take(first_of_each(line.state)) for line in lines if len(line.history)]
    exam = []
    for line in lines:
        line = line.take(~line.state.over)
        if not len(line.history):
            continue
        values = move_values(game, line.state)
        legal = game.legal(line.state)
        solved = ~((values == UNKNOWN) & legal).any(1)
        low = np.where(legal, values, 2).min(1)
        high = np.where(legal, values, -2).max(1)
        keep = solved & (low < high)
        if keep.any():
            exam.append(Question(line.take(keep), values[keep]))
    return exam


@torch.no_grad()
def take_exam(model, game, exam) -> dict:
    right = accurate = entropy = n = 0
    for line, values in exam:
        p = read_line(model, game, line)
        best = np.where(values == UNKNOWN, -2, values).max(1)
        chosen = p.moves.argmax(1)
        right += (values[np.arange(len(values)), chosen] == best).sum()
        accurate += (p.outcomes.argmax(1) == best + 1).sum()
        entropy += -(p.moves * np.log(np.maximum(p.moves, 1e-300))).sum()
        n += len(values)
    return {"optimal_moves": right / n, "value_accuracy": accurate / n, "entropy": entropy / n, "n": int(n)}


@torch.no_grad()
def lost_lines(model, game, side: int) -> tuple[int, int]:
    """side 1: the model is the first player."""
    p, lost, total = open_positions(model, game, 1), 0, 0
    while len(p):
        legal = game.legal(p.state)
        if p.state.player[0] == side:
            moves = predict(game, p.logits, legal).moves.argmax(1)
            p = p.play(np.arange(len(p)), moves)
        else:
            p = p.play(*np.nonzero(legal))
        over = p.state.over
        total += over.sum(); lost += (p.state.score[over] == -side).sum()
        p = p.take(np.flatnonzero(~over))
    return int(lost), int(total)
