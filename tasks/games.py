"""Games for two players as rules on arrays: a batch of positions at a time, and the exact value of a position.

    game = GAMES["connect_four"]((4, 5))
    state = game.start(256)
    state = game.play(state, moves)         # moves: (256,), each allowed by game.legal(state)
    values = move_values(game, state)       # (256, game.n_moves): 1 wins, 0 draws, -1 loses

To a model a move is a token and a game the sequence of its moves, led by START. Three tokens more stand for its outcome, for
the player who is to move. A game is a class here, or in tasks/poker.py, and a line in GAMES.
"""
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

LOSS, DRAW, WIN = range(3)  # outcome tokens, counted from the last move
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
        """(n,) int8: `score` as the player sees it who would be to move."""
        return self.score * self.player


class Game:
    """What games have in common. The players move in turn.

    Its tokens are the moves, three outcomes and START, in this order. n_moves: what legal moves are numbered in. max_plies:
    of the longest game. symmetries: (S, n_moves) int64, in each of which move m becomes symmetries[s, m] throughout a game,
    and nothing else changes; the first is the identity.
    """
    n_moves: int
    max_plies: int
    symmetries: np.ndarray
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
        """(n,) bool: whether `solve` takes no longer than some milliseconds."""
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
    """Positions of games and how they came about, all after as many moves."""
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
    """All positions that can be reached, each once, by the number of moves; None where there are more than `limit`."""
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
    packed = np.concatenate((state.board, state.player[:, None]), axis=1)
    packed = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1])))[:, 0]
    return np.sort(np.unique(packed, return_index=True)[1])


def random_line(game: Game, n: int, plies: int, rng: np.random.Generator) -> Line:
    """Positions after as many random moves, without those of games that ended before; perhaps none."""
    line = start_line(game, n)
    for _ in range(plies):
        line = line.take(~line.state.over)
        line = play_line(game, line, np.arange(len(line.history)), draw_moves(game.legal(line.state), rng))
    return line.take(~line.state.over)


def draw_moves(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, n_moves) weights, which need not sum to 1 -> (n,) int64, a move of each row with a probability in proportion."""
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    return (cumulative <= rng.random(len(weights))[:, None] * cumulative[:, -1:]).sum(1).clip(max=weights.shape[1] - 1)


# -- games whose aim is a line of stones ------------------------------------------------------------------------------

class LineGame(Game):
    """The first with `n_in_line` stones in a row, a column or a diagonal wins; a full board is a draw."""
    n_in_line: int

    def __init__(self, board: tuple[int, ...]):
        self.board, (self.height, self.width) = board, board
        self.n_cells = self.max_plies = self.height * self.width
        self.lines = np.array([*lines_of(self.height, self.width, self.n_in_line)])

    def landing_cells(self, state: State, moves: np.ndarray) -> np.ndarray:
        """(n,) int: where the stone of each move comes to lie."""
        raise NotImplementedError

    def play(self, state: State, moves: np.ndarray) -> State:
        board = state.board.copy()
        board[np.arange(len(board)), self.landing_cells(state, moves)] = state.player
        won = (board[:, self.lines] == state.player[:, None, None]).all(2).any(1)
        return State(board, -state.player, won | (board != 0).all(1), np.where(won, state.player, 0).astype(np.int8))

    def draw(self, state: State) -> str:
        rows = state.board[0].reshape(self.height, self.width)
        return "\n".join(" ".join({1: "X", -1: "O", 0: "."}[int(stone)] for stone in row) for row in rows)


def lines_of(height: int, width: int, n: int) -> Iterator[list[int]]:
    """The cells of each straight line of `n` cells on a board, whose cells are counted row by row from the top."""
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
                if y + (n - 1) * dy < height and 0 <= x + (n - 1) * dx < width:
                    yield [(y + i * dy) * width + x + i * dx for i in range(n)]


class TicTacToe(LineGame):
    """Moves are cells, counted row by row from the top."""
    default_games = 38_400
    default_board = 3, 3
    n_in_line = 3

    def __init__(self, board: tuple[int, ...] = default_board):
        super().__init__(board)
        self.n_moves = self.n_cells
        self.symmetries = square_symmetries(self.height)

    def landing_cells(self, state: State, moves: np.ndarray) -> np.ndarray:
        return moves

    def legal(self, state: State) -> np.ndarray:
        return (state.board == 0) & ~state.over[:, None]

    def solve(self, state: State) -> np.ndarray:
        return look_up(self, state)

    def draw(self, state: State) -> str:
        cells = [{1: "X", -1: "O"}.get(int(stone), str(i + 1)) for i, stone in enumerate(state.board[0])]
        return "\n".join(" ".join(cells[i:i + self.width]) for i in range(0, self.n_cells, self.width))


def square_symmetries(side: int) -> np.ndarray:
    """The rotations and reflections of a square board, (8, cells): where each cell comes to lie."""
    cells, found = np.arange(side * side).reshape(side, side), []
    for turned in (cells, cells[:, ::-1]):
        found += [np.rot90(turned, turns).ravel() for turns in range(4)]
    return np.array([np.argsort(cells) for cells in found])


class ConnectFour(LineGame):
    """A move is a column, in which the stone falls to the lowest empty cell; four in a line win."""
    default_board = 6, 7
    n_in_line = 4

    def __init__(self, board: tuple[int, ...] = default_board):
        super().__init__(board)
        self.n_moves = self.width
        self.symmetries = np.array([np.arange(self.width), np.arange(self.width)[::-1]])

    def landing_cells(self, state: State, moves: np.ndarray) -> np.ndarray:
        stones = (state.board.reshape(-1, self.height, self.width)[np.arange(len(moves)), :, moves] != 0).sum(1)
        return (self.height - 1 - stones) * self.width + moves

    def legal(self, state: State) -> np.ndarray:
        return (state.board[:, :self.width] == 0) & ~state.over[:, None]

    def draw(self, state: State) -> str:
        return "\n".join((super().draw(state), " ".join(str(column + 1) for column in range(self.width))))


# -- Nim --------------------------------------------------------------------------------------------------------------

class Nim(Game):
    """Heaps of matches, of which a move takes any number from one; who takes the last match wins. A move is a heap and a
    number, in the order 1 of the first heap, 2 of it, …"""
    default_board = 3, 4, 5

    def __init__(self, board: tuple[int, ...] = default_board):
        self.board, self.heaps, self.n_cells = board, np.array(board, np.int8), len(board)
        self.moves = np.array([(heap, taken) for heap, n in enumerate(board) for taken in range(1, n + 1)])
        self.n_moves, self.max_plies = len(self.moves), sum(board)
        self.symmetries = self.heap_symmetries(board)

    def heap_symmetries(self, board: tuple[int, ...]) -> np.ndarray:
        """Heaps of the same size change places with the next of that size."""
        number = {tuple(move): i for i, move in enumerate(self.moves.tolist())}
        found = [np.arange(self.n_moves)]
        for a in range(len(board)):
            for b in range(a + 1, len(board)):
                if board[a] == board[b]:
                    swapped = {a: b, b: a}
                    found.append(np.array([number[swapped.get(heap, heap), taken] for heap, taken in self.moves.tolist()]))
        return np.array(found)

    def start(self, n: int) -> State:
        return super().start(n)._replace(board=np.tile(self.heaps, (n, 1)))

    def legal(self, state: State) -> np.ndarray:
        return state.board[:, self.moves[:, 0]] >= self.moves[:, 1]

    def play(self, state: State, moves: np.ndarray) -> State:
        board = state.board.copy()
        board[np.arange(len(board)), self.moves[moves, 0]] -= self.moves[moves, 1].astype(np.int8)
        over = ~board.any(1)
        return State(board, -state.player, over, np.where(over, state.player, 0).astype(np.int8))

    def solve(self, state: State) -> np.ndarray:
        """Won unless the exclusive or of the heaps is 0: Bouton 1901, Annals of Mathematics 3."""
        return np.where(np.bitwise_xor.reduce(state.board, axis=1) == 0, -1, 1).astype(np.int8)

    def move_name(self, move: int) -> str:
        heap, taken = self.moves[move]
        return f"{taken}of{heap + 1}"

    def draw(self, state: State) -> str:
        return "\n".join(f"heap {i + 1}  {'|' * n}".rstrip() for i, n in enumerate(state.board[0].tolist()))


# -- exact values by enumeration --------------------------------------------------------------------------------------

MAX_TABLE = 2_000_000  # positions


@functools.lru_cache(maxsize=4)
def minimax_table(game_class: type, board: tuple[int, ...]) -> dict[bytes, int]:
    """Board and player to move, as bytes -> value, of every position that can be reached. Backward induction."""
    game, table = game_class(board), {}
    levels = enumerate_positions(game, MAX_TABLE)
    for line in reversed(levels):
        legal, state = game.legal(line.state), line.state
        best = np.where(state.over, state.result(), -1).astype(np.int8)
        if legal.any():
            rows, moves = np.nonzero(legal)
            children = game.play(state.take(rows), moves)
            np.maximum.at(best, rows, np.array([-table[key] for key in position_keys(children)], np.int8))
        table |= zip(position_keys(state), best.tolist())
    return table


def position_keys(state: State) -> list[bytes]:
    packed = np.concatenate((state.board, state.player[:, None]), axis=1)
    return [row.tobytes() for row in packed]


def look_up(game: Game, state: State) -> np.ndarray:
    table = minimax_table(type(game), (game.height, game.width))
    return np.array([table[key] for key in position_keys(state)], np.int8)


GAMES: dict[str, type[Game]] = {"tic_tac_toe": TicTacToe, "connect_four": ConnectFour, "nim": Nim}


def make_game(name, board=None):
    game = GAMES[name](*([tuple(map(int, board.split("x")))] if board else []))
    return game
