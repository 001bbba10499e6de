"""A model as a player: it reads the moves of a batch of games with the cache, and looks ahead over them.

    choose = model_player(model, game)
    moves = choose(start_line(game, 256))                   # of 256 games
    choose = search_player(model, game, simulations=64)     # the same after a search in each game

A player is a function from the lines of games, all of one length, to a move in each.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import GPT, Cache
from runtime.checkpoint import explain_damage, load_checkpoint
from runtime.config import BadInput
from sampling import cache_dtype
from tasks.games import board_text, make_game, parse_board
from tasks.positions import DRAW, LOSS, UNKNOWN, WIN, Game, Line, State, draw_moves, move_values, play_line

MAX_ROWS = 4096  # positions that are read at a time


# -- reading ----------------------------------------------------------------------------------------------------------

class Prediction(NamedTuple):
    """What a model expects in n positions, float64."""
    moves: np.ndarray     # (n, n_moves): probability of each move; 0 for those that are not legal
    outcomes: np.ndarray  # (n, 3): probability that the player to move loses, draws, wins

    @property
    def value(self) -> np.ndarray:
        """(n,): in -1 to 1, for the player to move."""
        return self.outcomes[:, WIN] - self.outcomes[:, LOSS]


def predict(game: Game, logits: Tensor, legal: np.ndarray) -> Prediction:
    """logits: (n, V); legal: (n, n_moves) bool. Where none is legal, all moves have probability 0."""
    moves = softmax(np.where(legal, to_numpy(logits[:, :game.n_moves]), -np.inf))
    return Prediction(moves, outcome_probabilities(game, logits))


def outcome_probabilities(game: Game, logits: Tensor) -> np.ndarray:
    """(n, V) -> (n, 3), for the player to move."""
    return softmax(to_numpy(logits[:, game.n_moves:game.n_moves + 3]))


def to_numpy(logits: Tensor) -> np.ndarray:
    return logits.cpu().double().numpy()  # in this order: not every device has float64


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension; 0 where all are -inf."""
    highest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(highest), highest, 0.0))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)


@dataclass
class Positions:
    """Positions of games that a model has read, one game per row: the line that led to each, the logits after it, (n, V),
    and the cache."""
    model: GPT
    game: Game
    line: Line
    logits: Tensor
    cache: Cache

    @property
    def state(self) -> State:
        return self.line.state

    def __len__(self) -> int:
        return len(self.logits)

    def play(self, rows: np.ndarray, moves: np.ndarray) -> "Positions":
        """What a move leads to in each of these rows, (n,) int64 both; rows may repeat, and stay as they are."""
        cache = copy_cache(self.model, self.cache, rows, 1)
        idx = torch.from_numpy(moves)[:, None].to(self.logits.device)
        logits = self.model.eager_forward(idx, cache=cache, logits_to_keep=1)[:, 0]
        return Positions(self.model, self.game, play_line(self.game, self.line, rows, moves), logits, cache)

    def take(self, rows: np.ndarray) -> "Positions":
        if len(rows) == len(self) and (rows == np.arange(len(rows))).all():
            return self
        return Positions(self.model, self.game, self.line.take(rows), self.logits[torch.from_numpy(rows)],
                         copy_cache(self.model, self.cache, rows, 0))


def copy_cache(model: GPT, cache: Cache, rows: np.ndarray, n_new: int) -> Cache:
    """Rows of a cache, with room for `n_new` positions more."""
    copy = model.init_cache(len(rows), cache.length + n_new, cache_dtype(model))
    copy.length = cache.length
    copy.copy_rows_from(slice(None), cache, torch.from_numpy(rows))
    return copy


def open_positions(model: GPT, game: Game, line: Line) -> Positions:
    """The end of each of these lines, read by the model."""
    cache = model.init_cache(len(line.history), 1 + line.history.shape[1], cache_dtype(model))
    logits = model.eager_forward(line_tokens(model, game, line), cache=cache, logits_to_keep=1)[:, 0]
    return Positions(model, game, line, logits, cache)


def line_tokens(model: GPT, game: Game, line: Line) -> Tensor:
    """(n, 1 + plies) int64 on the model's device."""
    ids = np.pad(line.history, ((0, 0), (1, 0)), constant_values=game.start_token)
    return torch.from_numpy(ids).to(model.embed.weight.device)


@torch.no_grad()
def read_line(model: GPT, game: Game, line: Line) -> Prediction:
    """The prediction at the end of each of these lines, without a cache. In parts, for any number of lines."""
    parts = []
    for first in range(0, len(line.history), MAX_ROWS):
        part = line.take(slice(first, first + MAX_ROWS))
        logits = model.eager_forward(line_tokens(model, game, part), logits_to_keep=1)[:, 0]
        parts.append(predict(game, logits, game.legal(part.state)))
    return Prediction(*map(np.concatenate, zip(*parts)))


# -- looking one move ahead -------------------------------------------------------------------------------------------

class Expansion(NamedTuple):
    """All positions that one move leads to. rows, moves: (m,) int64, which move of which position leads to each. children:
    these positions, read by the model. outcomes: (n, n_moves, 3), how the game ends after each move, for the player who
    makes it: by the rules where it is over then, else as the model expects; 0 for moves that are not legal. values: (n,
    n_moves), -inf for these."""
    rows: np.ndarray
    moves: np.ndarray
    children: Positions
    outcomes: np.ndarray
    values: np.ndarray

    def child_of(self, moves: np.ndarray) -> np.ndarray:
        """(n,) int64, a legal move of each position -> the index of what it leads to among the children."""
        index = np.zeros(self.values.shape, np.int64)
        index[self.rows, self.moves] = np.arange(len(self.rows))
        return index[np.arange(len(moves)), moves]


def expand(positions: Positions, evaluate: Callable[[Positions], np.ndarray] | None = None) -> Expansion:
    """evaluate(children) -> (m, 3), the outcomes for the player to move there, in place of the model's own."""
    game, legal = positions.game, positions.game.legal(positions.state)
    rows, moves = np.nonzero(legal)
    children = positions.play(rows, moves)
    expected = evaluate(children) if evaluate else outcome_probabilities(game, children.logits)
    outcomes = np.zeros((*legal.shape, 3))
    # the opponent's loss is a win
    outcomes[rows, moves] = np.where(children.state.over[:, None], one_hot(children.state.result()), expected)[:, ::-1]
    values = np.where(legal, outcomes[..., WIN] - outcomes[..., LOSS], -np.inf)
    return Expansion(rows, moves, children, outcomes, values)


def one_hot(results: np.ndarray) -> np.ndarray:
    """(n,) of -1, 0 and 1 -> (n, 3): LOSS, DRAW, WIN."""
    return np.eye(3)[results.astype(np.int64) + DRAW]


# -- search -----------------------------------------------------------------------------------------------------------

C_PUCT = 1.5             # weight of the prior against the values that were found
NOISE_SHARE = 0.25       # of Dirichlet noise in the prior of the root
NOISE_MOVES = 10.0       # sum of the noise's parameters, about the number of different moves that it tries


class SearchResult(NamedTuple):
    """visits: (n, n_moves) int64. values: (n, n_moves), the mean found for each move, for the player who makes it, NaN where
    it was not visited. outcomes: (n, 3), the mean over all simulations. n_read: positions that the model read."""
    visits: np.ndarray
    values: np.ndarray
    outcomes: np.ndarray
    n_read: int


class Tree:
    """A search tree in each of n games, whose nodes are numbered in the order in which they were added; 0 is the root."""

    def __init__(self, game: Game, state: State, n_nodes: int):
        n, A = len(state.player), game.n_moves
        self.game, self.size = game, 0
        self.board = np.zeros((n, n_nodes, state.board.shape[1]), state.board.dtype)
        self.player, self.score = (np.zeros((n, n_nodes), np.int8) for _ in range(2))
        self.over = np.zeros((n, n_nodes), bool)
        self.prior = np.zeros((n, n_nodes, A))
        self.visits = np.zeros((n, n_nodes, A), np.int64)
        self.totals = np.zeros((n, n_nodes, A, 3))         # of outcomes, for the player to move at the node
        self.child = np.full((n, n_nodes, A), -1)
        self.own = np.zeros((n, n_nodes, 3))               # the outcomes that were expected when the node was added

    def add(self, rows: np.ndarray, state: State, prior: np.ndarray, outcomes: np.ndarray):
        """A node in each of these games, with the number `size`, which the others skip."""
        for name in ("board", "player", "over", "score"):
            getattr(self, name)[rows, self.size] = getattr(state, name)
        self.prior[rows, self.size], self.own[rows, self.size] = prior, outcomes
        self.size += 1

    def state(self, rows: np.ndarray, nodes: np.ndarray) -> State:
        return State(*(getattr(self, name)[rows, nodes] for name in State._fields))

    def select(self, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """The move of each node with the highest value found, plus what its prior adds while it has few visits. A move that
        was never tried counts as the node's own value does. Source: Silver et al. 2017, AlphaZero, arXiv:1712.01815."""
        visits, totals, prior = self.visits[rows, nodes], self.totals[rows, nodes], self.prior[rows, nodes]
        own = self.own[rows, nodes]
        values = np.where(visits > 0, (totals[..., WIN] - totals[..., LOSS]) / np.maximum(visits, 1),
                          (own[:, WIN] - own[:, LOSS])[:, None])
        bonus = C_PUCT * prior * np.sqrt(visits.sum(1, keepdims=True) + 1) / (1 + visits)
        return np.where(prior > 0, values + bonus, -np.inf).argmax(1)


def search(positions: Positions, simulations: int, rng: np.random.Generator | None = None) -> SearchResult:
    """PUCT from each position, none of which is over. rng: adds Dirichlet noise to the priors of the roots, for training."""
    game, n = positions.game, len(positions)
    tree, every, n_read = Tree(game, positions.state, simulations + 1), np.arange(n), 0
    legal = game.legal(positions.state)
    root = predict(game, positions.logits, legal)
    tree.add(every, positions.state, root.moves if rng is None else add_noise(root.moves, legal, rng), root.outcomes)
    for _ in range(simulations):
        nodes, moves, depth = descend(tree, n)
        rows, last = every, depth - 1
        parents, chosen = nodes[rows, last], moves[rows, last]
        ended = tree.child[rows, parents, chosen] >= 0  # a game that is over there was reached again
        new = np.flatnonzero(~ended)
        outcomes = np.zeros((n, 3))
        if len(new):
            n_read += len(new)
            state = game.play(tree.state(new, parents[new]), chosen[new])
            prediction = read_paths(positions, new, moves[new], depth[new], game.legal(state))
            outcomes[new] = np.where(state.over[:, None], one_hot(state.result()), prediction.outcomes)
            tree.child[new, parents[new], chosen[new]] = tree.size
            tree.add(new, state, prediction.moves, outcomes[new])
        again = np.flatnonzero(ended)
        outcomes[again] = tree.own[again, tree.child[again, parents[again], chosen[again]]]
        back_up(tree, nodes, moves, depth, outcomes)
    visits, totals = tree.visits[:, 0], tree.totals[:, 0]
    with np.errstate(invalid="ignore"):
        values = (totals[..., WIN] - totals[..., LOSS]) / visits
    return SearchResult(visits, values, totals.sum(1) / visits.sum(1)[:, None], n_read)


def add_noise(prior: np.ndarray, legal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    drawn = np.where(legal, rng.standard_gamma(np.where(legal, NOISE_MOVES / legal.sum(1, keepdims=True), 1.0)), 0.0)
    return (1 - NOISE_SHARE) * prior + NOISE_SHARE * drawn / drawn.sum(1, keepdims=True)


def descend(tree: Tree, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the root to a move that was not tried or that ends the game. Returns the nodes and the moves of each path,
    (n, length) int64, and its length, (n,)."""
    nodes, moves, depth = [], [], np.zeros(n, np.int64)
    rows, at = np.arange(n), np.zeros(n, np.int64)
    while len(rows):
        chosen = tree.select(rows, at)
        nodes.append(np.zeros(n, np.int64))
        moves.append(np.zeros(n, np.int64))
        nodes[-1][rows], moves[-1][rows] = at, chosen
        depth[rows] += 1
        following = tree.child[rows, at, chosen]
        going = (following >= 0) & ~tree.over[rows, following]
        rows, at = rows[going], following[going]
    return np.stack(nodes, 1), np.stack(moves, 1), depth


def read_paths(positions: Positions, rows: np.ndarray, moves: np.ndarray, depth: np.ndarray,
               legal: np.ndarray) -> Prediction:
    """What the model expects after moves, (n, length), of which the first `depth`, (n,), count, in these rows."""
    cache = copy_cache(positions.model, positions.cache, rows, depth.max())
    idx = torch.from_numpy(moves[:, :depth.max()]).to(positions.logits.device)
    logits = positions.model.eager_forward(idx, cache=cache)
    return predict(positions.game, logits[torch.arange(len(rows)), torch.from_numpy(depth - 1)], legal)


def back_up(tree: Tree, nodes: np.ndarray, moves: np.ndarray, depth: np.ndarray, outcomes: np.ndarray):
    """Adds the outcomes, (n, 3), for the player to move after each path, to all moves of the path."""
    for d in range(nodes.shape[1]):
        rows = np.flatnonzero(depth > d)
        is_opponent = (depth[rows] - d) % 2 == 1
        seen = np.where(is_opponent[:, None], outcomes[rows][:, ::-1], outcomes[rows])
        tree.visits[rows, nodes[rows, d], moves[rows, d]] += 1
        tree.totals[rows, nodes[rows, d], moves[rows, d]] += seen


# -- players ----------------------------------------------------------------------------------------------------------

Player = Callable[[Line], np.ndarray]  # (n, plies) moves and the positions after them -> (n,) int64, a legal move in each


def model_player(model: GPT, game: Game) -> Player:
    """The most probable move."""
    return lambda line: read_line(model, game, line).moves.argmax(1)


def search_player(model: GPT, game: Game, simulations: int) -> Player:
    """The move that a search visits most, of several the one with the highest value."""
    @torch.no_grad()
    def choose(line: Line) -> np.ndarray:
        return best_moves(search(open_positions(model, game, line), simulations))
    return choose


def best_moves(result: SearchResult) -> np.ndarray:
    """(n,) int64: the move with the most visits, of several the one with the highest value."""
    return (result.visits + 0.1 * np.nan_to_num(result.values)).argmax(1)  # values are at most 1


def perfect_player(game: Game, rng: np.random.Generator) -> Player:
    """One of the best moves, at random, of positions that are solved."""
    def choose(line: Line) -> np.ndarray:
        return draw_moves(is_best(move_values(game, line.state)), rng)
    return choose


def noisy_player(player: Player, game: Game, epsilon: float, rng: np.random.Generator) -> Player:
    """Moves at random with a probability of `epsilon`, else as `player` does."""
    def choose(line: Line) -> np.ndarray:
        is_random = rng.random(len(line.history)) < epsilon
        return np.where(is_random, draw_moves(game.legal(line.state), rng), player(line))
    return choose


def is_best(values: np.ndarray) -> np.ndarray:
    """(n, n_moves), see move_values -> bool: the moves with the highest value, none where no move has one."""
    known = np.where(values == UNKNOWN, -UNKNOWN, values)
    return (known == known.max(1, keepdims=True)) & (values != UNKNOWN)


def play_games(game: Game, first: Player, second: Player, line: Line) -> np.ndarray:
    """Plays these lines to their end. Returns the score of each game for the first player, (n,) int8."""
    scores, rows = line.state.score.copy(), np.flatnonzero(~line.state.over)
    line = line.take(rows)
    while len(rows):
        player = first if line.state.player[0] == 1 else second
        line = play_line(game, line, np.arange(len(rows)), player(line))
        scores[rows] = line.state.score
        going = np.flatnonzero(~line.state.over)
        line, rows = line.take(going), rows[going]
    return scores


# -- models that play -------------------------------------------------------------------------------------------------

def open_game(name: str, board: str | None) -> Game:
    """Raises BadInput for a game or a board that does not exist."""
    return make_game(name, None if board is None else parse_board(board))


def context_of(game: Game) -> int:
    """Tokens of the longest game."""
    return game.max_plies + 1


def describe_game(name: str, game: Game) -> dict:
    """What a checkpoint says about the game that its tokens stand for."""
    return {"game": {"name": name, "board": list(game.board)}}


def game_title(name: str, board: Sequence[int]) -> str:
    """"nim on 3x4x5", or "kuhn", which has no board."""
    return f"{name} on {board_text(board)}" if board else name


def game_flags(name: str, board: Sequence[int]) -> str:
    """"--game=nim --board=3x4x5", or "--game=kuhn"."""
    return f"--game={name}" + (f" --board={board_text(board)}" if board else "")


def checkpoint_game(checkpoint: dict, path: Path) -> tuple[str, Game]:
    """The name of the game that a checkpoint plays, and the game. Raises BadInput where it plays none."""
    with explain_damage(path):
        if not isinstance(checkpoint.get("game"), dict):
            raise BadInput("its tokens are not those of a game: give a model that selfplay.py has trained on one")
        name, board = checkpoint["game"]["name"], checkpoint["game"]["board"]
        return name, make_game(name, tuple(int(side) for side in board) or None)


def load_player(path: Path, checkpoint: dict | None, name: str, game: Game) -> GPT:
    """The model of a checkpoint that plays this game. Raises BadInput where it does not."""
    title, flags = game_title(name, game.board), game_flags(name, game.board)
    if not checkpoint and not path.exists():
        raise BadInput(f"{path}: no checkpoint to read: check the path, or train one with `python selfplay.py {flags} "
                       f"--out_path={path}`")
    checkpoint = checkpoint or load_checkpoint(path)
    with explain_damage(path):
        own, wanted = checkpoint.get("game"), describe_game(name, game)["game"]
        if not isinstance(own, dict):
            raise BadInput(f"its tokens are not those of a game: give a model that `python selfplay.py {flags}` has trained")
        if own != wanted:
            own_name, own_board = own["name"], [int(side) for side in own["board"]]
            raise BadInput(f"plays {game_title(own_name, own_board)}, not {title}: give "
                           f"{game_flags(own_name, own_board)}, or another model")
        model = GPT.from_checkpoint(checkpoint)
        if model.config.vocab_size != game.vocab_size:
            raise BadInput(f"has {model.config.vocab_size:,} tokens, {name} {game.vocab_size:,}: use another checkpoint")
        check_context(model.config.block_size, name, game, "its context")
        return model


def check_context(block_size: int, name: str, game: Game, what: str):
    if block_size < context_of(game):
        raise BadInput(f"{what} of {block_size} tokens is too short for {game_title(name, game.board)}, which needs "
                       f"{context_of(game)}")
