"""Positions of games for two players: a batch of them at a time, how they come about, and their exact values.

    line = random_line(game, 100, plies=4, rng=rng)         # positions after four random moves
    found = move_values(game, line.state)                   # (100, game.n_moves): 1 wins, 0 draws, -1 loses, UNKNOWN

The games themselves stand in tasks/games.py and tasks/poker.py. To a model a move is a token and a game the sequence of its
moves, led by START. Three tokens more stand for its outcome, for the player who is to move.
"""
import functools
from typing import NamedTuple

import numpy as np

LOSS, DRAW, WIN = range(3)  # outcome tokens, which follow those of the moves
UNKNOWN = 2                 # in place of a value: the position is not solved, or the move is not legal


class State(NamedTuple):
    """Positions of n games."""
    board: np.ndarray   # (n, cells) int8; of two kinds of stones: 1 the first player's, -1 the second's, 0 none
    player: np.ndarray  # (n,) int8: who is to move, 1 or -1
    over: np.ndarray    # (n,) bool
    score: np.ndarray   # (n,) int8: where it is over, what the first player has: 1, 0 or -1

    def take(self, rows) -> "State":
        return State(*(part[rows] for part in self))

    def result(self) -> np.ndarray:
        """(n,) int8: `score` from the side of the player to move."""
        return self.score * self.player


class Game:
    """What games have in common. The players move in turn. A game defines the fields below, and `legal`, `play`, `solve`
    and `draw`.

    Its tokens are the moves, three outcomes and START, in this order. n_moves: the number of moves. max_plies: an upper
    bound on the moves of a game. n_cells: of State.board. board, default_board: its size, as --board has it. symmetries:
    (S, n_moves) int64, in each of which move m becomes symmetries[s, m] throughout a game, and nothing else changes; the
    first is the identity. default_games: to learn it from.
    """
    n_moves: int
    max_plies: int
    n_cells: int
    board: tuple[int, ...]
    default_board: tuple[int, ...]
    symmetries: np.ndarray
    default_games = 51_200
    has_hidden_cards = False

    @property
    def start_token(self) -> int:
        return self.n_moves + 3

    @property
    def vocab_size(self) -> int:
        return self.n_moves + 4

    def start(self, n: int) -> State:
        board = np.zeros((n, self.n_cells), np.int8)
        return State(board, np.ones(n, np.int8), np.zeros(n, bool), np.zeros(n, np.int8))

    def legal(self, state: State) -> np.ndarray:
        """(n, n_moves) bool; none where the game is over."""
        raise NotImplementedError

    def play(self, state: State, moves: np.ndarray) -> State:
        """The positions after legal moves, (n,) int. None of the games may be over."""
        raise NotImplementedError

    def solvable(self, state: State) -> np.ndarray:
        """(n,) bool: whether `solve` takes no longer than some milliseconds on average; then also after any move."""
        return np.ones(len(state.player), bool)

    def solve(self, state: State) -> np.ndarray:
        """(n,) int8: the value of each position for the player to move, where none is over."""
        raise NotImplementedError

    def move_name(self, move: int) -> str:
        return str(move + 1)

    def draw(self, state: State) -> str:
        """The board of a single game, as text of several lines."""
        raise NotImplementedError


def values(game: Game, state: State) -> np.ndarray:
    """(n,) int8: the value of each position for the player to move, or UNKNOWN where it cannot be solved."""
    found, rows = np.where(state.over, state.result(), UNKNOWN).astype(np.int8), np.flatnonzero(~state.over)
    rows = rows[game.solvable(state.take(rows))]
    if len(rows):
        found[rows] = game.solve(state.take(rows))
    return found


def move_values(game: Game, state: State) -> np.ndarray:
    """(n, n_moves) int8: the value of each legal move for the player who makes it, else UNKNOWN."""
    legal = game.legal(state)
    found, (rows, moves) = np.full(legal.shape, UNKNOWN, np.int8), np.nonzero(legal)
    if len(rows):
        child = values(game, game.play(state.take(rows), moves))
        found[rows, moves] = np.where(child == UNKNOWN, UNKNOWN, -child)
    return found


# -- positions --------------------------------------------------------------------------------------------------------

class Line(NamedTuple):
    """Positions of games and how they came about, all after the same number of moves."""
    history: np.ndarray  # (n, plies) int64
    state: State

    def take(self, rows) -> "Line":
        return Line(self.history[rows], self.state.take(rows))


def start_line(game: Game, n: int) -> Line:
    return Line(np.zeros((n, 0), np.int64), game.start(n))


def play_line(game: Game, line: Line, rows: np.ndarray, moves: np.ndarray) -> Line:
    """What a move leads to in each of these rows, which may repeat."""
    history = np.concatenate((line.history[rows], moves[:, None]), axis=1)
    return Line(history, game.play(line.state.take(rows), moves))


def enumerate_positions(game: Game, limit: int) -> list[Line] | None:
    """All positions that can be reached by each number of moves, each once; None where there are more than `limit`."""
    line = start_line(game, 1)
    levels, n = [line], 1
    while (legal := game.legal(line.state)).any():
        line = play_line(game, line, *np.nonzero(legal))
        line = line.take(first_of_each(line.state))
        levels.append(line)
        n += len(line.history)
        if n > limit:
            return None
    return levels


def first_of_each(state: State) -> np.ndarray:
    """The first row of each different position, in their order."""
    return np.sort(np.unique(position_keys(state), return_index=True)[1])


def position_keys(state: State) -> np.ndarray:
    """(n,) of bytes that are equal where board and player to move are, and can be sorted."""
    packed = np.concatenate((state.board, state.player[:, None]), axis=1)
    return packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]


def random_line(game: Game, n: int, plies: int, rng: np.random.Generator) -> Line:
    """Positions after `plies` random moves, without those of games that ended before; perhaps none."""
    line = start_line(game, n)
    for _ in range(plies):
        line = line.take(~line.state.over)
        line = play_line(game, line, np.arange(len(line.history)), draw_moves(game.legal(line.state), rng))
    return line.take(~line.state.over)


def draw_moves(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, n_moves) weights, which need not sum to 1 -> (n,) int64, a move of each row with a probability in proportion."""
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    assert (cumulative[:, -1] > 0).all(), "a game without a legal move"
    return (cumulative <= rng.random(len(weights))[:, None] * cumulative[:, -1:]).sum(1)


# -- exact values by enumeration --------------------------------------------------------------------------------------

MAX_TABLE = 4_000_000  # positions


class ValueTable(NamedTuple):
    """Values of positions for the player to move."""
    keys: np.ndarray    # see position_keys, sorted
    values: np.ndarray  # (n,) int8

    def look_up(self, state: State) -> np.ndarray:
        """(n,) int8. The positions must be in the table."""
        wanted = position_keys(state)
        found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        assert (self.keys[found] == wanted).all(), "a position that no play leads to"
        return self.values[found]


@functools.lru_cache(maxsize=4)
def minimax_table(game_class: type[Game], board: tuple[int, ...]) -> ValueTable:
    """Every position that can be reached, by backward induction."""
    game = game_class(board)
    levels, tables = enumerate_positions(game, MAX_TABLE), []
    assert levels is not None, f"more than {MAX_TABLE:,} positions"
    for line in reversed(levels):
        state = line.state
        value, (rows, moves) = np.where(state.over, state.result(), -1).astype(np.int8), np.nonzero(game.legal(state))
        if len(rows):
            np.maximum.at(value, rows, -tables[-1].look_up(game.play(state.take(rows), moves)))
        tables.append(sort_table(position_keys(state), value))
    return sort_table(*map(np.concatenate, zip(*tables)))


def sort_table(keys: np.ndarray, values: np.ndarray) -> ValueTable:
    order = np.argsort(keys)
    return ValueTable(keys[order], values[order])
