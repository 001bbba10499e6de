"""Games for two players as rules on arrays. A game is a class, here or in tasks/poker.py, and a line in GAMES.

    game = make_game("connect_four", (4, 5))
    state = game.start(256)
    state = game.play(state, moves)         # moves: (256,), each allowed by game.legal(state)
"""
import re
from collections.abc import Iterator

import numpy as np

from kernels.game_solvers import MAX_CONNECT_FOUR_BITS, solve_connect_four, solve_othello
from runtime.config import BadInput, shorten
from tasks.poker import Kuhn, Leduc
from tasks.positions import Game, State, minimax_table


def bad_board(board: tuple[int, ...], reason: str) -> BadInput:
    return BadInput(f"--board={shorten(board_text(board))}: {reason}")


def board_text(board: tuple[int, ...]) -> str:
    """(4, 5) -> "4x5"."""
    return "x".join(map(str, board))


# -- games whose aim is a line of stones ------------------------------------------------------------------------------

class LineGame(Game):
    """A move is a cell, counted row by row from the top. The first with `n_in_line` stones in a row, a column or a diagonal
    wins; a full board is a draw."""
    n_in_line: int

    def __init__(self, board: tuple[int, ...]):
        self.board, (self.height, self.width) = board, board
        self.n_cells = self.n_moves = self.max_plies = self.height * self.width
        self.lines = np.array([*lines_of(self.height, self.width, self.n_in_line)])

    def play(self, state: State, moves: np.ndarray) -> State:
        board = state.board.copy()
        board[np.arange(len(board)), moves] = state.player
        # all lines, because those through the new stones differ from game to game
        won = (board[:, self.lines] == state.player[:, None, None]).all(2).any(1)
        return State(board, -state.player, won | (board != 0).all(1), np.where(won, state.player, 0).astype(np.int8))

    def draw(self, state: State) -> str:
        return "\n".join(draw_stones(state.board[0], self.width))


def draw_stones(board: np.ndarray, width: int) -> list[str]:
    """The rows of a board, X the first player's stones."""
    return [" ".join({1: "X", -1: "O", 0: "."}[int(stone)] for stone in row) for row in board.reshape(-1, width)]


def lines_of(height: int, width: int, n: int) -> Iterator[list[int]]:
    """The cells of each straight line of `n` cells on a board, whose cells are counted row by row from the top."""
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
                if y + (n - 1) * dy < height and 0 <= x + (n - 1) * dx < width:
                    yield [(y + i * dy) * width + x + i * dx for i in range(n)]


class TicTacToe(LineGame):
    """Three in a line win."""
    default_games = 76_800
    default_board = 3, 3
    n_in_line = 3

    def __init__(self, board: tuple[int, ...] = default_board):
        if board != self.default_board:
            raise bad_board(board, "tic_tac_toe is played on 3x3 cells")
        super().__init__(board)
        self.symmetries = square_symmetries(self.height)

    def legal(self, state: State) -> np.ndarray:
        return (state.board == 0) & ~state.over[:, None]

    def solve(self, state: State) -> np.ndarray:
        return minimax_table(TicTacToe, self.default_board).look_up(state)

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
    """A stone falls to the lowest empty cell of a column; four in a line win. A move is the cell where it comes to lie: of
    columns as moves, a model would have to count the stones."""
    default_board = 6, 7
    n_in_line = 4

    def __init__(self, board: tuple[int, ...] = default_board):
        if len(board) != 2 or min(board) < 4 or (board[0] + 1) * board[1] > MAX_CONNECT_FOUR_BITS:
            raise bad_board(board, "connect_four needs a height and a width of at least 4, and "
                                   f"(height + 1) x width of at most {MAX_CONNECT_FOUR_BITS}")
        super().__init__(board)
        cells = np.arange(self.n_cells).reshape(board)
        self.symmetries = np.array([cells.ravel(), cells[:, ::-1].ravel()])

    def legal(self, state: State) -> np.ndarray:
        empty = state.board == 0
        is_supported = np.pad(~empty[:, self.width:], ((0, 0), (0, self.width)), constant_values=True)
        return empty & is_supported & ~state.over[:, None]

    def move_name(self, move: int) -> str:
        """The column, of which one cell at most is a legal move."""
        return str(move % self.width + 1)

    def solvable(self, state: State) -> np.ndarray:
        """All up to 5x5, where an empty board takes 0.05 s. Above, all moves of a position take 1 to 10 ms on average; with
        24 empty cells of 4x7, where stones reach the top soon, they would take 0.2 s."""
        return (state.board == 0).sum(1) <= (25 if self.n_cells <= 25 else 24 if self.n_cells >= 36 else 20)

    def solve(self, state: State) -> np.ndarray:
        return solve_connect_four(state.board * state.player[:, None], self.height, self.width)

    def draw(self, state: State) -> str:
        return "\n".join((super().draw(state), " ".join(str(column + 1) for column in range(self.width))))


# -- Othello ----------------------------------------------------------------------------------------------------------

class Othello(Game):
    """Moves are cells, counted row by row from the top; the last one is to pass, which is legal where no other move is and
    the other player has one. A stone turns the other player's stones in straight lines between it and another of its own, at
    least one. The game is over when neither can move, and who has more stones wins. At the start the second player (white)
    has the two middle cells on the diagonal from the top left, the first (black) those on the diagonal from the top right.
    """
    default_board = 6, 6

    def __init__(self, board: tuple[int, ...] = default_board):
        if board not in ((4, 4), (6, 6), (8, 8)):
            raise bad_board(board, "othello is played on 4x4, 6x6 or 8x8 cells")
        self.board, self.side, self.n_cells = board, board[0], board[0] * board[1]
        self.pass_move, self.n_moves = self.n_cells, self.n_cells + 1
        self.max_plies = 2 * (self.n_cells - 4) - 1  # the first move fills a cell, and so does the one after a pass
        self.rays = rays_from_cells(self.side)
        start = self.start(1).board[0]
        self.symmetries = np.array([[*cells, self.pass_move] for cells in square_symmetries(self.side)
                                    if (start[cells] == start).all()])

    def start(self, n: int) -> State:
        state, high = super().start(n), self.side // 2
        grid = state.board.reshape(n, self.side, self.side)
        grid[:, [high - 1, high], [high - 1, high]], grid[:, [high - 1, high], [high, high - 1]] = -1, 1
        return state

    def placements(self, stones: np.ndarray) -> np.ndarray:
        """(n, cells) int8, 1 the player's and -1 the other's -> (n, cells) bool: where the player may place a stone."""
        n, side = len(stones), self.side
        grid = np.zeros((side + 2, side + 2, n), np.int8)  # games last: numpy's inner loops run along them
        grid[1:-1, 1:-1] = stones.T.reshape(side, side, n)
        own, other, run = grid == 1, grid[1:-1, 1:-1] == -1, np.zeros(grid.shape, bool)
        inside, found = run[1:-1, 1:-1], np.zeros((side, side, n), bool)
        for dy, dx in DIRECTIONS:
            neighbours = slice(1 + dy, side + 1 + dy), slice(1 + dx, side + 1 + dx)
            inside[:] = other & own[neighbours]
            for _ in range(side - 3):
                inside |= other & run[neighbours]
            found |= run[neighbours]
        return (found & (grid[1:-1, 1:-1] == 0)).reshape(self.n_cells, n).T

    def legal(self, state: State) -> np.ndarray:
        cells = self.placements(state.board * state.player[:, None])
        return np.column_stack((cells, ~cells.any(1) & ~state.over))

    def play(self, state: State, moves: np.ndarray) -> State:
        board, rows = state.board.copy(), np.flatnonzero(moves != self.pass_move)
        board[rows, moves[rows]] = state.player[rows]
        games, cells = self.turned(state.take(rows), moves[rows])
        board[rows[games], cells] = state.player[rows[games]]
        over = ~(self.placements(board).any(1) | self.placements(-board).any(1))
        return State(board, -state.player, over, np.where(over, np.sign(board.sum(1)), 0).astype(np.int8))

    def turned(self, state: State, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and cells of the stones that are turned by stones in the cells `moves`."""
        stones = np.pad(state.board * state.player[:, None], ((0, 0), (0, 1)))
        rays = self.rays[moves]                                                     # (n, 8, side - 1)
        along = stones[np.arange(len(moves))[:, None, None], rays]
        run = np.logical_and.accumulate(along == -1, axis=2)
        end = np.minimum(run.sum(2, keepdims=True), self.side - 2)
        games, directions, steps = np.nonzero(run & (np.take_along_axis(along, end, 2) == 1))
        return games, rays[games, directions, steps]

    def solvable(self, state: State) -> np.ndarray:
        """At most 12 to 14 empty cells, which take 1 to 2 ms on average and at most 20."""
        return (state.board == 0).sum(1) <= {4: 12, 6: 14, 8: 12}[self.side]

    def solve(self, state: State) -> np.ndarray:
        return solve_othello(state.board * state.player[:, None], self.side)

    def move_name(self, move: int) -> str:
        return "pass" if move == self.pass_move else f"{'abcdefgh'[move % self.side]}{move // self.side + 1}"

    def draw(self, state: State) -> str:
        rows = draw_stones(state.board[0], self.side)
        return "\n".join((f"  {' '.join('abcdefgh'[:self.side])}", *(f"{i + 1} {row}" for i, row in enumerate(rows))))


DIRECTIONS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def rays_from_cells(side: int) -> np.ndarray:
    """(cells, 8, side - 1): the cells that follow each in each direction; outside of the board, the number of cells."""
    cells = np.full((3 * side, 3 * side), side * side)
    cells[side:2 * side, side:2 * side] = np.arange(side * side).reshape(side, side)
    return np.array([[[cells[side + y + i * dy, side + x + i * dx] for i in range(1, side)] for dy, dx in DIRECTIONS]
                     for y in range(side) for x in range(side)])


# -- Nim --------------------------------------------------------------------------------------------------------------

MAX_MATCHES = 64


class Nim(Game):
    """Heaps of matches, of which a move takes any number from one; who takes the last match wins. A move is a heap and a
    number, in the order 1 of the first heap, 2 of it, …"""
    default_board = 3, 4, 5

    def __init__(self, board: tuple[int, ...] = default_board):
        if not board or min(board) < 1 or sum(board) > MAX_MATCHES:
            raise bad_board(board, f"nim needs heaps of at least 1, with at most {MAX_MATCHES} matches in all")
        self.board, self.heaps, self.n_cells = board, np.array(board, np.int8), len(board)
        self.moves = np.array([(heap, taken) for heap, n in enumerate(board) for taken in range(1, n + 1)])
        self.n_moves, self.max_plies = len(self.moves), sum(board)
        self.symmetries = self.heap_symmetries(board)

    def heap_symmetries(self, board: tuple[int, ...]) -> np.ndarray:
        """Any two heaps of the same size change places; of three, no permutation of all."""
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


# -- every game -------------------------------------------------------------------------------------------------------

GAMES: dict[str, type[Game]] = {"tic_tac_toe": TicTacToe, "connect_four": ConnectFour, "othello": Othello, "nim": Nim,
                                "kuhn": Kuhn, "leduc": Leduc}


def make_game(name: str, board: tuple[int, ...] | None = None) -> Game:
    """board: None for the game's own. Raises BadInput naming --game or --board."""
    if name not in GAMES:
        raise BadInput(f"--game={shorten(name)}: choose one of {', '.join(GAMES)}")
    if board in (None, GAMES[name].default_board):
        return GAMES[name]()
    if not GAMES[name].default_board:
        raise bad_board(board, f"{name} has no board: leave it out")
    return GAMES[name](board)


def parse_board(text: str) -> tuple[int, ...]:
    """"4x5" -> (4, 5). Raises BadInput."""
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})*", text):
        raise BadInput(f"--board={shorten(text)}: give sizes joined by x, such as 4x5")
    return tuple(map(int, text.split("x")))
