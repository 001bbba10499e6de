"""Exact values of positions in Connect Four and Othello: compiled alpha-beta search on bitboards.

    solve_connect_four(boards, 6, 7)    # (n, 42) int8: 1 the stones of the player to move, -1 the other's, 0 none
    solve_othello(boards, 6)            # (n, 36) int8      -> (n,) int8: 1 the player to move wins, 0 draw, -1 loses

Boards are row by row from the top. Bitboards are int64: `own` the stones of the player to move, `other` the other player's.
The slow, obvious twins of both searches stand in tests/test_games.py.
"""
import functools

import numpy as np
from numba import int64, uint64

from kernels.bpe import compiled, kernel

# What the search holds of a position. ALPHA, BETA: only values between them matter, at most alpha or at least beta a bound
# will do. BEST: the highest value of a move so far. LOW, HIGH: bounds that are known. SLOT, TAG: its place in the table.
ALPHA, BETA, BEST, N_MOVES, NEXT_MOVE, LOW, HIGH, SLOT, TAG = range(9)
N_FIELDS = 9
SCORE, OWN, OTHER = range(3)  # of a move: which to try first, and the position after it
OPEN = 2                      # in place of a value: it takes a search


def make_search(expand):
    """A compiled search(own, other, shape, table, frames, moves): the value for the player to move, by alpha-beta search. It
    is a loop because numba's cache may bring back a recursive function that crashes, numba issue 6061.

    expand(own, other, shape, table, frame, moves) returns the value of a position, or a bound that will do; or OPEN, with
    N_MOVES and the rest of its frame filled, and its moves. frames: (longest game + 1, N_FIELDS); moves: (longest game + 1,
    most moves, 3).
    """
    @compiled
    def search(own, other, shape, table, frames, moves):
        depth = 0
        frames[0, ALPHA], frames[0, BETA] = -1, 1
        value = expand(own, other, shape, table, frames[0], moves[0])
        while depth > 0 or value == OPEN:
            if value != OPEN:
                depth -= 1
                frames[depth, BEST] = max(frames[depth, BEST], -value)
            frame = frames[depth]
            if frame[NEXT_MOVE] < frame[N_MOVES] and frame[BEST] < frame[BETA]:
                move = moves[depth, frame[NEXT_MOVE]]
                frame[NEXT_MOVE] += 1
                depth += 1
                frames[depth, ALPHA], frames[depth, BETA] = -frame[BETA], -max(frame[ALPHA], frame[BEST])
                value = expand(move[OWN], move[OTHER], shape, table, frames[depth], moves[depth])
            else:
                value = frame[BEST]
                store(table, frame)
        return value
    return search


@compiled
def open_frame(frame, n_moves):
    frame[BEST], frame[N_MOVES], frame[NEXT_MOVE] = -1, n_moves, 0
    return OPEN


@compiled
def insert_move(moves, n, score, own, other):
    """Into the first n, which go down by score; a new one comes after its equals."""
    while n > 0 and moves[n - 1, SCORE] < score:
        moves[n, SCORE], moves[n, OWN], moves[n, OTHER] = moves[n - 1, SCORE], moves[n - 1, OWN], moves[n - 1, OTHER]
        n -= 1
    moves[n, SCORE], moves[n, OWN], moves[n, OTHER] = score, own, other


@compiled
def count_bits(bits):
    """LLVM makes one instruction of it."""
    n = 0
    while bits != 0:
        bits &= bits - 1
        n += 1
    return n


@compiled
def shift(bits, n):
    """To the left, or where n < 0 to the right, with zeros coming in."""
    return bits << n if n > 0 else int64(uint64(bits) >> uint64(-n))


# -- the table: bounds of positions, kept from one search to the next -------------------------------------------------

# It changes how long a search takes, never what it finds: an entry tells its position from all others. It is one number, so
# that threads may share a table.
TABLE_BITS = 21  # 2**21 entries, 16 MB


@compiled
def find_slot(key):
    """Where the table would have a key, and what tells it there from all others: a number whose last TABLE_BITS bits are 0.
    To multiply by an odd number is one to one, so that nothing is lost."""
    mixed = key * 0x2545F4914F6CDD1D
    return shift(mixed, TABLE_BITS - 64), mixed << TABLE_BITS


@compiled
def load(table, frame):
    """Whether the table has bounds for this frame."""
    entry = table[frame[SLOT]]
    if entry == 0 or entry >> TABLE_BITS << TABLE_BITS != frame[TAG]:
        return False
    frame[LOW], frame[HIGH] = (entry & 3) - 1, (entry >> 2 & 3) - 2
    return True


@compiled
def store(table, frame):
    if len(table) == 0:
        return
    if frame[BEST] > frame[ALPHA]:
        frame[LOW] = max(frame[LOW], frame[BEST])
    if frame[BEST] < frame[BETA]:
        frame[HIGH] = min(frame[HIGH], frame[BEST])
    table[frame[SLOT]] = frame[TAG] | (frame[HIGH] + 2) << 2 | frame[LOW] + 1


# -- Connect Four -----------------------------------------------------------------------------------------------------

# A column takes height + 1 bits, from its lowest cell up; the highest one is never set, so that no line goes on in the next
# column. This, and which moves are left out, is Pascal Pons', http://blog.gamesolver.org
MAX_CONNECT_FOUR_BITS = 62  # (height + 1) * width: all sums stay positive


def solve_connect_four(boards: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, height * width) int8, games that are not over -> (n,) int8, the values for the player to move."""
    assert (height + 1) * width <= MAX_CONNECT_FOUR_BITS, (height, width)
    is_empty = np.reshape(boards, (-1, height, width)) == 0
    assert not (is_empty[:, 1:] & ~is_empty[:, :-1]).any(), "a stone above an empty cell"
    found = np.empty(len(boards), np.int8)
    solve_connect_four_boards(np.ascontiguousarray(boards, np.int8), height, width, connect_four_table(height, width), found)
    return found


@functools.lru_cache(maxsize=1)  # an entry does not tell the size of the board
def connect_four_table(height: int, width: int) -> np.ndarray:
    return np.zeros(1 << TABLE_BITS, np.int64)


@kernel
def solve_connect_four_boards(boards, height, width, table, found):
    bottom = 0  # the lowest cell of every column
    for column in range(width):
        bottom |= 1 << column * (height + 1)
    shape = height, width, bottom, bottom * ((1 << height) - 1)
    frames, moves = np.empty((height * width, N_FIELDS), np.int64), np.empty((height * width, width, 3), np.int64)
    for i in range(len(boards)):
        own = other = 0
        for row in range(height):
            for column in range(width):
                stone, cell = boards[i, row * width + column], 1 << column * (height + 1) + height - 1 - row
                if stone == 1:
                    own |= cell
                elif stone == -1:
                    other |= cell
        if fourths(own, height) & playable_cells(own | other, shape) != 0:
            found[i] = 1
        else:
            found[i] = search_connect_four(own, other, shape, table, frames, moves)


@compiled
def expand_connect_four(own, other, shape, table, frame, moves):
    """See `search`. The player to move cannot win at once; after no move that is left here can the other one."""
    height, width, _, cells = shape
    stones, playable = own | other, playable_cells(own | other, shape)
    empty = cells & ~stones
    threats = fourths(other, height) & empty
    forced = playable & threats
    if forced != 0:
        if forced & (forced - 1) != 0:
            return -1
        playable = forced
    playable &= ~(threats >> 1)  # a stone right below a threat makes it come true
    if playable == 0:
        return -1
    if count_bits(empty) <= 2:
        return 0
    frame[SLOT], frame[TAG] = find_slot(min(own + stones, mirror(own + stones, height, width)))
    if not load(table, frame):
        frame[HIGH] = 1 if has_four(own | empty, height) else 0
        frame[LOW] = -1 if has_four(other | empty, height) else 0
    if frame[LOW] >= frame[BETA] or frame[LOW] == frame[HIGH]:
        return frame[LOW]
    if frame[HIGH] <= frame[ALPHA]:
        return frame[HIGH]
    frame[ALPHA], frame[BETA] = max(frame[ALPHA], frame[LOW]), min(frame[BETA], frame[HIGH])
    n = 0
    for i in range(width):  # first what makes most cells winning, then what is nearer to the centre
        column = width // 2 + (i + 1) // 2 * (1 - 2 * (i & 1))
        move = playable & ((1 << height) - 1) << column * (height + 1)
        if move != 0:
            insert_move(moves, n, count_bits(fourths(own | move, height) & empty), other, own | move)
            n += 1
    return open_frame(frame, n)


@compiled
def playable_cells(stones, shape):
    """The lowest empty cell of each column."""
    _, _, bottom, cells = shape
    return (stones + bottom) & cells


@compiled
def fourths(own, height):
    """Cells, empty or not, and bits that are none, where another stone would lie in a line with three of `own`."""
    found = (own << 1) & (own << 2) & (own << 3)
    for step in (height, height + 1, height + 2):
        pair = (own << step) & (own << 2 * step)
        found |= pair & ((own << 3 * step) | (own >> step))
        pair = (own >> step) & (own >> 2 * step)
        found |= pair & ((own >> 3 * step) | (own << step))
    return found


@compiled
def has_four(own, height):
    for step in (1, height, height + 1, height + 2):
        pair = own & (own >> step)
        if pair & (pair >> 2 * step) != 0:
            return True
    return False


@compiled
def mirror(key, height, width):
    mirrored = 0
    for _ in range(width):
        mirrored = mirrored << (height + 1) | key & ((1 << (height + 1)) - 1)
        key >>= height + 1
    return mirrored


# -- Othello: a cell is bit 8 * row + column, whatever the side -------------------------------------------------------

def solve_othello(boards: np.ndarray, side: int) -> np.ndarray:
    """(n, side * side) int8, side at most 8 -> (n,) int8, the values for the player to move."""
    assert side <= 8, side
    found = np.empty(len(boards), np.int8)
    solve_othello_boards(np.ascontiguousarray(boards, np.int8), side, np.zeros(0, np.int64), found)
    return found


@kernel
def solve_othello_boards(boards, side, no_table, found):
    cells = inner = 0  # inner: without the first and the last column
    for row in range(side):
        for column in range(side):
            cells |= 1 << 8 * row + column
            if 0 < column < side - 1:
                inner |= 1 << 8 * row + column
    # at most every other move is a pass, and after two the game is over
    frames, moves = np.empty((2 * side * side, N_FIELDS), np.int64), np.empty((2 * side * side, side * side, 3), np.int64)
    for i in range(len(boards)):
        own = other = 0
        for row in range(side):
            for column in range(side):
                stone, cell = boards[i, row * side + column], 1 << 8 * row + column
                if stone == 1:
                    own |= cell
                elif stone == -1:
                    other |= cell
        found[i] = search_othello(own, other, (side, cells, inner), no_table, frames, moves)


@compiled
def expand_othello(own, other, shape, table, frame, moves):
    """See `search`. First come the moves that leave the other player fewest."""
    _, cells, _ = shape
    left, n = placements(own, other, shape), 0
    n_empty = count_bits(cells & ~(own | other))
    if left == 0:
        if placements(other, own, shape) == 0:
            return np.sign(count_bits(own) - count_bits(other))
        insert_move(moves, 0, 0, other, own)
        return open_frame(frame, 1)
    while left != 0:
        cell = left & -left
        left ^= cell
        turned = flips(cell, own, other, shape)
        own_next, other_next = other & ~turned, own | turned | cell
        score = -count_bits(placements(own_next, other_next, shape)) if n_empty > 3 else 0  # with so few it does not pay
        insert_move(moves, n, score, own_next, other_next)
        n += 1
    return open_frame(frame, n)


@compiled
def placements(own, other, shape):
    """The empty cells where a stone would turn another."""
    side, cells, inner = shape
    found = 0
    for step in (1, -1, 7, -7, 8, -8, 9, -9):
        between = other if abs(step) == 8 else other & inner  # a row does not go on in the next
        run = shift(own, step) & between
        for _ in range(side - 3):
            run |= shift(run, step) & between
        found |= shift(run, step)
    return found & cells & ~(own | other)


@compiled
def flips(cell, own, other, shape):
    """What a stone in this cell turns."""
    side, _, inner = shape
    found = 0
    for step in (1, -1, 7, -7, 8, -8, 9, -9):
        between = other if abs(step) == 8 else other & inner
        run = shift(cell, step) & between
        for _ in range(side - 3):
            run |= shift(run, step) & between
        if shift(run, step) & own != 0:
            found |= run
    return found


search_connect_four, search_othello = make_search(expand_connect_four), make_search(expand_othello)
