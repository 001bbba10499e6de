"""tasks/games.py and kernels/game_solvers.py: rules against slow rules, values against plain minimax, counts against those
published."""
import functools
import itertools
import re

import numpy as np
import pytest

from kernels.game_solvers import connect_four_table, solve_connect_four, solve_othello
from runtime.config import BadInput
from tasks.games import GAMES, ConnectFour, LineGame, Nim, Othello, TicTacToe, make_game
from tasks.positions import (
    UNKNOWN,
    Game,
    Line,
    State,
    draw_moves,
    enumerate_positions,
    first_of_each,
    minimax_table,
    move_values,
    play_line,
    random_line,
    values,
)

# Boards that are small, odd or not square, besides each game's own. Games with hidden cards have their own tests.
MORE_BOARDS = {"connect_four": [(4, 4), (4, 5), (5, 4), (4, 12)], "othello": [(4, 4), (8, 8)],
               "nim": [(2,), (1, 3, 3), (2, 2, 2, 1)]}
CASES = [pytest.param(name, board, id=f"{name}-{'x'.join(map(str, board))}") for name, game in GAMES.items()
         if not game.has_hidden_cards for board in [game.default_board, *MORE_BOARDS.get(name, [])]]


# -- slow rules: one position at a time, on lists ---------------------------------------------------------------------

@functools.cache
def slow_lines(height: int, width: int, n: int) -> list[list[int]]:
    """The cells of each line of n, by going from every cell in every direction and leaving out what leaves the board."""
    found = []
    for y, x, (dy, dx) in itertools.product(range(height), range(width), [(0, 1), (1, 0), (1, 1), (-1, 1)]):
        line = [(y + i * dy, x + i * dx) for i in range(n)]
        if all(0 <= y < height and 0 <= x < width for y, x in line):
            found.append([y * width + x for y, x in line])
    return found


class SlowLineGame:
    def __init__(self, board: tuple[int, int], n_in_line: int, falls: bool):
        self.board, self.n_in_line, self.falls = board, n_in_line, falls
        self.stones, self.player = [0] * (board[0] * board[1]), 1  # row by row from the top

    def cells(self) -> list[int]:
        return self.stones

    def wins(self, player: int) -> bool:
        return any(all(self.stones[cell] == player for cell in line) for line in slow_lines(*self.board, self.n_in_line))

    def score(self) -> int | None:
        """What the first player has, if it is over."""
        for player in (1, -1):
            if self.wins(player):
                return player
        return None if 0 in self.stones else 0

    def moves(self) -> list[int]:
        """Where it is not over."""
        free = [cell for cell, stone in enumerate(self.stones) if stone == 0]
        below = lambda cell: range(cell + self.board[1], len(self.stones), self.board[1])
        return [cell for cell in free if not (self.falls and any(self.stones[other] == 0 for other in below(cell)))]

    def after(self, move: int) -> "SlowLineGame":
        new = SlowLineGame(self.board, self.n_in_line, self.falls)
        new.stones, new.player = [*self.stones], -self.player
        new.stones[move] = self.player
        return new


class SlowOthello:
    def __init__(self, board: tuple[int, int]):
        self.side, self.player = board[0], 1
        self.stones = dict.fromkeys(itertools.product(range(self.side), repeat=2), 0)  # (row, column) -> player
        low, high = self.side // 2 - 1, self.side // 2
        self.stones |= {(low, low): -1, (high, high): -1, (low, high): 1, (high, low): 1}

    def cells(self) -> list[int]:
        return [*self.stones.values()]

    def turned(self, y: int, x: int, player: int) -> list[tuple[int, int]]:
        found = []
        if self.stones[y, x] == 0:
            for dy, dx in itertools.product((-1, 0, 1), repeat=2):
                line, at = [], (y + dy, x + dx)
                while self.stones.get(at) == -player:
                    line.append(at)
                    at = at[0] + dy, at[1] + dx
                if self.stones.get(at) == player:
                    found += line
        return found

    def placements(self, player: int) -> list[int]:
        return [y * self.side + x for y, x in self.stones if self.turned(y, x, player)]

    def score(self) -> int | None:
        if self.placements(1) or self.placements(-1):
            return None
        black, white = self.cells().count(1), self.cells().count(-1)
        return (black > white) - (black < white)

    def moves(self) -> list[int]:
        """Where it is not over."""
        return self.placements(self.player) or [self.side ** 2]

    def after(self, move: int) -> "SlowOthello":
        new = SlowOthello((self.side, self.side))
        new.stones, new.player = {**self.stones}, -self.player
        if move < self.side ** 2:
            at = divmod(move, self.side)
            new.stones |= dict.fromkeys([at, *self.turned(*at, self.player)], self.player)
        return new


class SlowNim:
    def __init__(self, board: tuple[int, ...]):
        self.board, self.heaps, self.player = board, [*board], 1
        self.numbered = [(heap, n) for heap in range(len(board)) for n in range(1, board[heap] + 1)]

    def cells(self) -> list[int]:
        return self.heaps

    def score(self) -> int | None:
        return None if any(self.heaps) else -self.player

    def moves(self) -> list[int]:
        return [i for i, (heap, n) in enumerate(self.numbered) if n <= self.heaps[heap]]

    def after(self, move: int) -> "SlowNim":
        new, (heap, n) = SlowNim(self.board), self.numbered[move]
        new.heaps, new.player = [*self.heaps], -self.player
        new.heaps[heap] -= n
        return new


SLOW_GAMES = {"tic_tac_toe": lambda board: SlowLineGame(board, 3, falls=False),
              "connect_four": lambda board: SlowLineGame(board, 4, falls=True), "othello": SlowOthello, "nim": SlowNim}


def minimax(slow) -> int:
    """The value for the player to move, without a table and without leaving out a move."""
    score = slow.score()
    return max(-minimax(slow.after(move)) for move in slow.moves()) if score is None else score * slow.player


def replay_slowly(name: str, board: tuple[int, ...], history: np.ndarray):
    slow = SLOW_GAMES[name](board)
    for move in history.tolist():
        slow = slow.after(move)
    return slow


# -- helpers ----------------------------------------------------------------------------------------------------------

def assert_equal(a: State, b: State):
    for name, x, y in zip(State._fields, a, b, strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y), name


def repeat_first(state: State, n: int) -> State:
    return state.take(np.zeros(n, np.int64))


def relative(state: State) -> np.ndarray:
    """The board as solvers take it."""
    return state.board * state.player[:, None]


def random_states(game: Game, n: int, seed: int = 0) -> list[Line]:
    """Lines after 0, 1, 2 … moves of n random games, until the last of them is over."""
    rng, line, found = np.random.default_rng(seed), Line(np.zeros((n, 0), np.int64), game.start(n)), []
    while len(line.history):
        found.append(line)
        line = line.take(~line.state.over)
        line = play_line(game, line, np.arange(len(line.history)), draw_moves(game.legal(line.state), rng))
    return found


def lines_with_empty_cells(game: Game, n: int, n_empty: int) -> list[Line]:
    """Of random games: all positions that are not over and have so many cells left, one game each."""
    found = []
    for line in random_states(game, n):
        rows = np.flatnonzero(~line.state.over & ((line.state.board == 0).sum(1) == n_empty))
        found += [line.take([row]) for row in rows]
    return found


def count_sequences(game: Game, depth: int) -> tuple[list[int], list[int]]:
    """How many sequences of 1, 2, … moves there are, and how many of them end a game."""
    state, lengths, ended = game.start(1), [], []
    for _ in range(depth):
        rows, moves = np.nonzero(game.legal(state))
        state = game.play(state.take(rows), moves)
        lengths.append(len(moves))
        ended.append(int(state.over.sum()))
    return lengths, ended


# -- rules ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, board", CASES)
def test_rules_equal_slow_rules(name, board):
    """At every move of games played at random: board, player, legal moves, the end and the score."""
    game, rng = make_game(name, board), np.random.default_rng(1)
    for _ in range(3 if game.n_cells > 30 else 10):
        state, slow = game.start(1), SLOW_GAMES[name](board)
        for _ in range(game.max_plies + 1):
            score = slow.score()
            moves = slow.moves() if score is None else []
            assert (state.board[0].tolist(), int(state.player[0])) == (slow.cells(), slow.player)
            assert np.flatnonzero(game.legal(state)[0]).tolist() == moves
            assert (bool(state.over[0]), int(state.score[0])) == (score is not None, score or 0)
            if score is not None:
                break
            move = int(rng.choice(moves))
            state, slow = game.play(state, np.array([move])), slow.after(move)
        assert score is not None, f"a game of more than {game.max_plies} moves"


@pytest.mark.parametrize("name, board", CASES)
def test_a_batch_plays_as_single_games_do(name, board):
    game = make_game(name, board)
    lines = random_states(game, 20)
    for line in lines[1::1 + len(lines) // 5]:
        for row in range(len(line.history))[:5]:
            state = game.start(1)
            for move in line.history[row]:
                assert game.legal(state)[0, move]
                state = game.play(state, np.array([move]))
            assert_equal(state, line.state.take([row]))
            assert np.array_equal(game.legal(state)[0], game.legal(line.state)[row])


@pytest.mark.parametrize("name, board", CASES)
def test_playing_changes_no_state(name, board):
    game = make_game(name, board)
    state = game.start(2)
    before = State(*(part.copy() for part in state))
    game.play(state, draw_moves(game.legal(state), np.random.default_rng(0)))
    assert_equal(state, before)


@pytest.mark.parametrize("name, board", CASES)
def test_no_games_are_a_batch_too(name, board):
    game = make_game(name, board)
    state = game.start(0)
    assert game.legal(state).shape == move_values(game, state).shape == (0, game.n_moves)
    assert_equal(game.play(state, np.zeros(0, np.int64)), state)


@pytest.mark.parametrize("name, board", CASES)
def test_tokens(name, board):
    game = make_game(name, board)
    assert (game.start_token, game.vocab_size) == (game.n_moves + 3, game.n_moves + 4)
    for line in random_states(game, 5):  # a name stands for one move at a time
        for moves in game.legal(line.state):
            assert len({game.move_name(move) for move in np.flatnonzero(moves)}) == moves.sum()


@pytest.mark.parametrize("name, board, lengths", [
    ("tic_tac_toe", (3, 3), [9, 72, 504, 3024, 15120, 54720, 148176, 200448, 127872]),
    ("connect_four", (6, 7), [7, 49, 343, 2401, 16807, 117649]),
    ("othello", (8, 8), [4, 12, 56, 244, 1396, 8200, 55092]),
    # 1of1 leaves (1, 1) with 2 moves, 2of1 (0, 1) with 1, 1of2 (2, 0) with 2; then one match is left in 3 cases
    ("nim", (2, 1), [3, 5, 3, 0])])
def test_numbers_of_sequences(name, board, lengths):
    """Of Othello as published: https://aartbik.blogspot.com/2009/02/perft-for-reversi.html."""
    assert count_sequences(make_game(name, board), len(lengths))[0] == lengths


def test_numbers_of_games_of_tic_tac_toe():
    ended = count_sequences(TicTacToe(), 9)[1]
    assert ended == [0, 0, 0, 0, 1440, 5328, 47952, 72576, 127872] and sum(ended) == 255168


def test_sequences_of_othello_equal_slow_rules():
    def count(slow, depth: int) -> int:
        return 1 if depth == 0 else sum(count(slow.after(move), depth - 1) for move in slow.moves())
    assert count_sequences(Othello((6, 6)), 5)[0] == [count(SlowOthello((6, 6)), depth) for depth in range(1, 6)]


@pytest.mark.parametrize("name, board, n", [("tic_tac_toe", (3, 3), 5478), ("connect_four", (4, 4), 161029)])
def test_numbers_of_positions(name, board, n):
    """As published, of Connect Four at https://tromp.github.io/c4/c4.html."""
    game = make_game(name, board)
    levels = enumerate_positions(game, n)
    assert sum(len(line.history) for line in levels) == n
    assert enumerate_positions(game, n - 1) is None
    for plies, line in enumerate(levels):
        assert line.history.shape[1] == plies
        assert len(np.unique(line.state.board, axis=0)) == len(line.history)


def test_numbers_of_positions_of_connect_four_by_moves():
    """As published: https://oeis.org/A212693."""
    game, state, lengths = ConnectFour(), ConnectFour().start(1), []
    for _ in range(8):
        rows, moves = np.nonzero(game.legal(state))
        state = game.play(state.take(rows), moves)
        state = state.take(first_of_each(state))
        lengths.append(len(state.player))
    assert lengths == [7, 49, 238, 1120, 4263, 16422, 54859, 184275]


def test_nim_has_a_position_for_each_choice_of_heaps():
    levels = enumerate_positions(Nim((2, 3)), 100)
    boards = {(*line.state.board[row].tolist(), int(line.state.player[row])) for line in levels
              for row in range(len(line.history))}
    expected = {(a, b, player) for a in range(3) for b in range(4) for player in (1, -1)}
    # one match of each heap at most: this takes a fixed number of moves
    assert boards == expected - {(2, 3, -1), (1, 3, 1), (2, 2, 1), (1, 2, -1)}


def test_passing_in_othello():
    """It is the only move then, keeps the board, and the other player cannot pass too."""
    game, n_passes = Othello((4, 4)), 0
    for line in random_states(game, 200):
        legal = game.legal(line.state)
        rows = np.flatnonzero(legal[:, game.pass_move])
        before, n_passes = line.state.take(rows), n_passes + len(rows)
        after = game.play(before, np.full(len(rows), game.pass_move))
        assert (legal[rows].sum(1) == 1).all()
        assert np.array_equal(after.board, before.board) and np.array_equal(after.player, -before.player)
        assert not after.over.any() and not game.legal(after)[:, game.pass_move].any()
    assert n_passes > 50


@pytest.mark.parametrize("side, moves", [(4, "b1 a2 d3 c4"), (6, "c2 b3 e4 d5"), (8, "d3 c4 f5 e6")])
def test_othello_starts_from_the_usual_position(side, moves):
    game = Othello((side, side))
    state = game.start(1)
    assert " ".join(map(game.move_name, np.flatnonzero(game.legal(state)[0]))) == moves
    assert (state.board == 1).sum() == (state.board == -1).sum() == 2


def test_no_game_of_othello_is_longer_than_it_says():
    """Of all on 4x4; the longest have 17 moves, 5 of which are passes."""
    levels = enumerate_positions(Othello((4, 4)), 10 ** 5)
    assert len(levels) - 1 == 17 <= Othello((4, 4)).max_plies == 23


@pytest.mark.parametrize("name, board, moves, text", [
    ("tic_tac_toe", (3, 3), [4, 0], "O 2 3\n4 X 6\n7 8 9"),
    ("connect_four", (4, 5), [17, 12, 15], ". . . . .\n. . . . .\n. . O . .\nX . X . .\n1 2 3 4 5"),
    ("othello", (4, 4), [1], "  a b c d\n1 . X . .\n2 . X X .\n3 . X O .\n4 . . . ."),
    ("nim", (1, 3), [2], "heap 1  |\nheap 2  |")])
def test_drawings_by_hand(name, board, moves, text):
    game = make_game(name, board)
    state = game.start(1)
    for move in moves:
        state = game.play(state, np.array([move]))
    assert game.draw(state) == text


@pytest.mark.parametrize("name, board, names", [
    ("tic_tac_toe", (3, 3), ["1", "2", "9"]), ("connect_four", (4, 5), ["1", "2", "5"]),
    ("othello", (6, 6), ["a1", "b1", "pass"]), ("nim", (1, 3), ["1of1", "1of2", "3of2"])])
def test_names_of_moves_by_hand(name, board, names):
    game = make_game(name, board)
    assert [game.move_name(move) for move in (0, 1, game.n_moves - 1)] == names


def test_state_by_hand():
    state = State(np.array([[1, 0], [0, -1], [1, -1]], np.int8), np.array([1, -1, -1], np.int8),
                  np.array([False, True, True]), np.array([0, 1, -1], np.int8))
    assert state.result().tolist() == [0, -1, 1]  # seen by who would move
    taken = state.take([2, 0])
    assert taken.board.tolist() == [[1, -1], [1, 0]] and taken.player.tolist() == [-1, 1]
    assert taken.over.tolist() == [True, False] and taken.score.tolist() == [-1, 0]


# -- boards that are refused ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, board, text", [
    ("tic_tac_toe", (4, 4), "4x4"), ("tic_tac_toe", (3,), "3"), ("connect_four", (3, 7), "3x7"),
    ("connect_four", (4, 3), "4x3"), ("connect_four", (7, 8), "7x8"), ("connect_four", (4, 5, 6), "4x5x6"),
    ("connect_four", (-4, 5), "-4x5"), ("othello", (5, 5), "5x5"), ("othello", (2, 2), "2x2"),
    ("othello", (10, 10), "10x10"), ("othello", (4, 6), "4x6"), ("othello", (6,), "6"), ("nim", (), ""),
    ("nim", (0, 3), "0x3"), ("nim", (60, 5), "60x5")])
def test_bad_boards_are_refused_in_one_line(name, board, text):
    with pytest.raises(BadInput, match=rf"\A--board={re.escape(text)}: {name} [^\n]+\Z"):
        make_game(name, board)


@pytest.mark.parametrize("name", GAMES)
def test_the_board_of_a_game_is_its_own_unless_given(name):
    assert make_game(name).n_moves == make_game(name, None).n_moves == make_game(name, GAMES[name].default_board).n_moves


def test_an_unknown_game_is_refused_with_the_choices():
    with pytest.raises(BadInput, match=r"\A--game=chess: choose one of tic_tac_toe, connect_four, [^\n]+\Z"):
        make_game("chess")


# -- symmetries -------------------------------------------------------------------------------------------------------

N_SYMMETRIES = {"tic_tac_toe": 8, "connect_four": 2, "othello": 4}


@pytest.mark.parametrize("name, board", CASES)
def test_symmetries_are_permutations_that_differ(name, board):
    game = make_game(name, board)
    assert np.array_equal(np.sort(game.symmetries, axis=1), np.tile(np.arange(game.n_moves), (len(game.symmetries), 1)))
    assert np.array_equal(game.symmetries[0], np.arange(game.n_moves))
    assert len(np.unique(game.symmetries, axis=0)) == len(game.symmetries)
    if name in N_SYMMETRIES:
        assert len(game.symmetries) == N_SYMMETRIES[name]


@pytest.mark.parametrize("name, board", CASES)
def test_symmetries_change_nothing_but_the_moves(name, board):
    game = make_game(name, board)
    for symmetry in game.symmetries[1:]:
        rng, state, image = np.random.default_rng(0), game.start(6), game.start(6)
        while len(state.player):
            legal = game.legal(state)
            assert np.array_equal(legal, game.legal(image)[:, symmetry])
            solvable = game.solvable(state)
            assert np.array_equal(solvable, game.solvable(image))
            if solvable.all() and (state.board == 0).sum(1).max() <= max(10, game.n_cells / 2):  # others take seconds
                assert np.array_equal(move_values(game, state), move_values(game, image)[:, symmetry])
            moves = draw_moves(legal, rng)
            state, image = game.play(state, moves), game.play(image, symmetry[moves])
            assert np.array_equal(state.over, image.over) and np.array_equal(state.score, image.score)
            state, image = state.take(~state.over), image.take(~image.over)


# -- drawing moves and lines ------------------------------------------------------------------------------------------

class FixedRandom:
    """In place of a generator: always the same number in [0, 1)."""

    def __init__(self, number: float):
        self.number = number

    def random(self, n: int) -> np.ndarray:
        return np.full(n, self.number)


@pytest.mark.parametrize("number", [0.0, 0.3, 0.5, np.nextafter(1, 0)])
@pytest.mark.parametrize("dtype", [bool, np.float32, np.float64])
def test_moves_of_weight_zero_are_never_drawn(number, dtype):
    """At the ends of what a generator gives too, where sums are rounded."""
    rng = np.random.default_rng(0)
    weights = (rng.random((2000, 9)) * rng.choice([1e-30, 1, 1e30], (2000, 1)) * (rng.random((2000, 9)) < 0.4)).astype(dtype)
    weights = weights[weights.any(1)]
    moves = draw_moves(weights, FixedRandom(number))
    assert moves.dtype == np.int64 and (weights[np.arange(len(weights)), moves] > 0).all()
    if number == 0:
        assert np.array_equal(moves, (weights > 0).argmax(1))


def test_moves_are_drawn_in_proportion():
    weights, n = np.array([0.0, 3.0, 1.0, 0.0, 4.0, 0.0]), 40_000
    counts = np.bincount(draw_moves(np.tile(weights, (n, 1)), np.random.default_rng(0)), minlength=6)
    p = weights / weights.sum()
    assert (abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()


def test_a_row_without_weights_is_an_error():
    with pytest.raises(AssertionError):
        draw_moves(np.array([[1.0, 2.0], [0.0, 0.0]]), np.random.default_rng(0))


@pytest.mark.parametrize("name, board", CASES)
def test_random_lines_replay_to_their_positions(name, board):
    game = make_game(name, board)
    for plies in (0, 1, game.max_plies // 3):
        line = random_line(game, 30, plies, np.random.default_rng(plies))
        assert line.history.shape == (len(line.state.player), plies) and not line.state.over.any()
        state = game.start(len(line.history))
        for moves in line.history.T:
            assert game.legal(state)[np.arange(len(moves)), moves].all()
            state = game.play(state, moves)
        assert_equal(state, line.state)
    assert len(random_line(game, 5, game.max_plies, np.random.default_rng(0)).history) == 0


def test_rows_of_a_line_may_repeat():
    game = TicTacToe()
    line = random_line(game, 2, 1, np.random.default_rng(3))
    free = np.flatnonzero(game.legal(line.state)[1])
    child = play_line(game, line, np.ones(8, np.int64), free)
    assert child.history.tolist() == [[int(line.history[1, 0]), int(move)] for move in free]


# -- values -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, board", CASES)
def test_moves_have_a_value_where_they_are_legal_and_solvable(name, board):
    """And the best of them is the position's."""
    game, n_solved = make_game(name, board), 0
    for line in random_states(game, 12):
        found, legal = move_values(game, line.state), game.legal(line.state)
        assert found.dtype == np.int8 and set(np.unique(found)) <= {-1, 0, 1, UNKNOWN}
        assert (found[~legal] == UNKNOWN).all()
        rows = game.solvable(line.state) & ~line.state.over
        assert np.array_equal(found[rows] != UNKNOWN, legal[rows])
        best = np.where(legal, found, -1).max(1)
        assert np.array_equal(best[rows], values(game, line.state)[rows])
        assert np.array_equal(values(game, line.state)[line.state.over], line.state.result()[line.state.over])
        n_solved += rows.sum()
    assert n_solved > 12


def test_what_is_not_solvable_is_unknown():
    state = ConnectFour().start(3)
    assert values(ConnectFour(), state).tolist() == [UNKNOWN] * 3 and (move_values(ConnectFour(), state) == UNKNOWN).all()


@pytest.mark.parametrize("name, board, n_empty", [
    ("connect_four", (4, 4), 7), ("connect_four", (4, 5), 7), ("connect_four", (5, 4), 7),
    ("othello", (4, 4), 6), ("othello", (6, 6), 6), ("othello", (8, 8), 5)])
def test_solvers_equal_plain_minimax(name, board, n_empty):
    game, seen = make_game(name, board), set()
    for line in lines_with_empty_cells(game, 40, n_empty)[:15]:
        slow = minimax(replay_slowly(name, board, line.history[0]))
        assert values(game, line.state).tolist() == [slow]
        seen.add(slow)
    assert len(seen) > 1


def nearly_full_board(board: tuple[int, int], n_empty: int, rng: np.random.Generator) -> SlowLineGame:
    """Without four in a line. Few games played at random get as far on a large board."""
    slow = SLOW_GAMES["connect_four"](board)
    while slow.wins(1) or slow.wins(-1) or not any(slow.stones):
        pattern = np.fromfunction(lambda y, x: 1 - 2 * ((x + y // 2) % 2), board, dtype=int)  # no line of more than two
        rows = pattern * rng.choice([1, -1], board, p=[0.8, 0.2])
        for column in rng.choice(np.repeat(np.arange(board[1]), 3), n_empty, replace=False):
            rows[np.flatnonzero(rows[:, column])[0], column] = 0
        slow.stones = rows.ravel().tolist()
    return slow


@pytest.mark.parametrize("board", [(6, 7), (6, 8), (7, 7), (4, 12), (14, 4)])
def test_connect_four_on_large_boards_equals_plain_minimax(board):
    """Up to 60 bits of at most 62."""
    rng, boards, slow = np.random.default_rng(0), [], []
    for _ in range(15):
        game = nearly_full_board(board, 6, rng)
        boards.append(game.cells())
        slow.append(minimax(game))
    assert solve_connect_four(np.array(boards, np.int8), *board).tolist() == slow and len({*slow}) > 1


@pytest.mark.parametrize("game_class, board, value", [(ConnectFour, (4, 4), 0), (Othello, (4, 4), -1)])
def test_solvers_equal_backward_induction_over_all_positions(game_class, board, value):
    """The second player wins Othello on 4x4, and Connect Four on 4x4 is a draw."""
    game, table = game_class(board), minimax_table(game_class, board)
    assert values(game, game.start(1)).tolist() == table.look_up(game.start(1)).tolist() == [value]
    for line in enumerate_positions(game, len(table.keys)):
        state = line.state.take(~line.state.over)
        assert np.array_equal(game.solve(state), table.look_up(state))


@pytest.mark.slow
def test_connect_four_on_4x5_by_backward_induction():
    """A draw; 3,945,711 positions."""
    game, table = ConnectFour((4, 5)), minimax_table(ConnectFour, (4, 5))
    assert len(table.keys) == 3_945_711 and table.look_up(game.start(1)).tolist() == [0]
    for line in enumerate_positions(game, len(table.keys)):
        state = line.state.take(~line.state.over)
        assert np.array_equal(game.solve(state), table.look_up(state))


@pytest.mark.parametrize("board, value", [((4, 4), 0), ((4, 5), 0), ((4, 6), -1), ((5, 4), 0), ((5, 5), 0), ((6, 4), 0)])
def test_empty_boards_of_connect_four(board, value):
    """As published, for the player who begins: https://tromp.github.io/c4/c4.html."""
    game = ConnectFour(board)
    assert game.solvable(game.start(1)).all() and values(game, game.start(1)).tolist() == [value]


def test_values_of_positions_with_many_moves_left_agree_with_each_other():
    """A position is worth the best of its moves, and its mirror image as much; nothing depends on what the table holds."""
    game = ConnectFour()
    state = random_line(game, 60, 19, np.random.default_rng(0)).state
    legal, found = game.legal(state), values(game, state)
    assert np.array_equal(np.where(legal, move_values(game, state), -1).max(1), found) and {*found.tolist()} >= {-1, 1}
    mirrored = state._replace(board=state.board.reshape(-1, 6, 7)[:, :, ::-1].reshape(-1, 42))
    assert np.array_equal(values(game, mirrored), found)
    connect_four_table.cache_clear()
    assert np.array_equal(values(game, state.take(np.arange(len(found))[::-1])), found[::-1])


def test_boards_of_several_sizes_do_not_mix_in_the_table():
    sizes = [(4, 4), (4, 5), (5, 4), (4, 6)]
    states = {size: random_line(ConnectFour(size), 50, 8, np.random.default_rng(0)).state for size in sizes}
    alone = {}
    for size in sizes:
        connect_four_table.cache_clear()
        alone[size] = values(ConnectFour(size), states[size])
    for size in sizes * 2:
        assert np.array_equal(values(ConnectFour(size), states[size]), alone[size])


def test_a_win_on_the_move_and_a_double_threat_by_hand():
    win = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [-1, -1, 0, 0, 0], [1, 1, 1, 0, -1]], np.int8)
    open_three = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, -1, -1, -1, 0]], np.int8)
    boards = np.array([win.ravel(), open_three.ravel()])
    assert solve_connect_four(boards, 4, 5).tolist() == [1, -1]  # the second: three in a row with both ends open


def test_solvers_take_any_layout_of_the_boards():
    boards = relative(random_line(ConnectFour((4, 5)), 40, 8, np.random.default_rng(0)).state)
    assert np.array_equal(solve_connect_four(np.asfortranarray(boards), 4, 5), solve_connect_four(boards, 4, 5))
    boards = relative(random_line(Othello((4, 4)), 40, 4, np.random.default_rng(0)).state)
    assert np.array_equal(solve_othello(np.asfortranarray(boards), 4), solve_othello(boards, 4))


def test_values_of_tic_tac_toe_equal_a_slow_recursion():
    """Of all 5,478 positions, by a recursion that remembers positions."""
    known = {}

    def value(slow) -> int:
        key = *slow.cells(), slow.player
        if key not in known:
            score = slow.score()
            known[key] = max(-value(slow.after(move)) for move in slow.moves()) if score is None else score * slow.player
        return known[key]
    value(SLOW_GAMES["tic_tac_toe"]((3, 3)))
    for line in enumerate_positions(TicTacToe(), 5478):
        want = [known[(*board, player)] for board, player in zip(line.state.board.tolist(), line.state.player.tolist())]
        assert values(TicTacToe(), line.state).tolist() == want


@pytest.mark.parametrize("board", [(3, 4, 5), (1, 3, 3), (2, 2, 2, 1), (7,)])
def test_values_of_nim_equal_minimax(board):
    game, table = Nim(board), minimax_table(Nim, board)
    for line in enumerate_positions(game, len(table.keys)):
        assert np.array_equal(values(game, line.state), table.look_up(line.state))


def test_values_of_moves_by_hand():
    x, o = 1, -1
    board = np.array([[x, x, 0, o, o, 0, 0, 0, 0]], np.int8)
    state = State(board, np.ones(1, np.int8), np.zeros(1, bool), np.zeros(1, np.int8))
    # 3 wins; 6 blocks and draws at least; all others let O win at 6
    assert move_values(TicTacToe(), state)[0].tolist() == [UNKNOWN, UNKNOWN, 1, UNKNOWN, UNKNOWN, 0, -1, -1, -1]
    game = Nim((1, 3))  # moves 1of1, 1of2, 2of2, 3of2: only equal heaps are lost for who moves
    assert move_values(game, game.start(1))[0].tolist() == [-1, -1, 1, -1]


@pytest.mark.parametrize("game_class", [ConnectFour, TicTacToe])
def test_lines_of_a_board(game_class: type[LineGame]):
    """Each once, of as many different cells; 69 on 6x7, 8 on 3x3."""
    game = game_class()
    lines = {frozenset(line) for line in game.lines.tolist()}
    assert len(lines) == len(game.lines) == {ConnectFour: 69, TicTacToe: 8}[game_class]
    assert {len(line) for line in lines} == {game.n_in_line}


def test_every_open_game_has_slow_rules():
    assert SLOW_GAMES.keys() == {name for name, game in GAMES.items() if not game.has_hidden_cards}
