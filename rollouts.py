"""Games that a model plays against itself, and the batches that it learns from.

    loader = PlayLoader(game, PlayConfig(), seed=1)
    loss = play_loss(model, loader.next_batch(model))       # plays when it is time to

A batch holds whole games and says, for each position, how much to learn of each move and of each outcome. Where that comes
from is --algorithm, the dict ALGORITHMS. What a loader draws on is in its state_dict: games, generator, what the algorithm
remembers.
"""
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from players import (
    Positions,
    expand,
    noisy_player,
    one_hot,
    open_positions,
    perfect_player,
    predict,
    search,
    softmax,
)
from runtime.config import check_flags, flag
from tasks.positions import Game, draw_moves, start_line

SEARCHES = "one_ply", "puct"
BASELINE_RATE = 0.05  # of the running mean of what a player wins, per rollout


@dataclass(frozen=True)
class PlayConfig:
    """Self-play."""
    algorithm: str = flag("auto", "what a model learns from; search: the moves that looking ahead finds best, and how "
                                  "games end; reinforce: the moves that it tried, by how much more than usual they won; "
                                  "imitation: games of a player that errs, no self-play; auto: search",
                          choices=("auto", "search", "reinforce", "imitation"))
    search: str = flag("one_ply", "how --algorithm=search looks ahead; one_ply: over every move, once; puct: AlphaZero's "
                                  "tree search", choices=SEARCHES)
    simulations: int = flag(32, "positions that --search=puct reads before a move", at_least=2, at_most=100_000)
    epsilon: float = flag(0.3, "fraction of random moves of the player that --algorithm=imitation learns from; its other "
                               "moves are perfect", at_least=0, at_most=1)
    games: int = flag(None, "games to play, unless --max_iter, --max_tokens or --max_seconds is given (default: the game's "
                            "own number)", at_least=1, scope="run")
    rollout_games: int = flag(256, "games that are played at a time", at_least=1, at_most=1_000_000)
    updates: int = flag(4, "optimizer steps after each rollout", at_least=1, at_most=10_000)
    replay: int = flag(8, "latest rollouts that batches are drawn from", at_least=1, at_most=10_000)
    batch_size: int = flag(256, "games in a batch", at_least=1, at_most=1_000_000)
    random_plies: int = flag("auto", "a game begins with 0 to as many random moves; auto: up to nine tenths of the longest "
                                     "game", at_least=0, at_most=10_000, auto=True)
    target_temperature: float = flag(0.1, "of the softmax that makes values of moves into what is learnt and played, with "
                                          "--search=one_ply", above=0)
    outcome_share: float = flag(0.5, "share of how the game ended in what is learnt of a position's value; the rest is what "
                                     "looking ahead found", at_least=0, at_most=1)
    symmetries: bool = flag(True, "show each game in a random symmetry of the board")
    __post_init__ = check_flags


# On-policy, so without a replay buffer
ON_POLICY_UNUSED = {"updates", "replay", "batch_size", "target_temperature", "outcome_share", "search", "simulations"}


# -- games that have been played --------------------------------------------------------------------------------------

class Rollout(NamedTuple):
    """n games, as what was known and done at each of T positions. Where there is nothing to learn, all weights are 0."""
    ids: np.ndarray       # (n, T) int64: START and the moves
    legal: np.ndarray     # (n, T, n_moves) bool
    moves: np.ndarray     # (n, T, n_moves) float32: weight of each move in the loss, perhaps negative
    outcomes: np.ndarray  # (n, T, 3) float32: weight of each outcome in the loss

    @classmethod
    def empty(cls, game: Game, n: int) -> "Rollout":
        T, weights = game.max_plies, partial(np.zeros, dtype=np.float32)
        ids = np.full((n, T), game.start_token, np.int64)
        return cls(ids, np.zeros((n, T, game.n_moves), bool), weights((n, T, game.n_moves)), weights((n, T, 3)))

    def take(self, rows) -> "Rollout":
        return Rollout(*(part[rows] for part in self))

    def join(self, other: "Rollout") -> "Rollout":
        return Rollout(*map(np.concatenate, zip(self, other)))

    def transform(self, symmetries: np.ndarray) -> "Rollout":
        """Each game in a symmetry of the board. symmetries: (n, n_moves), see Game."""
        n_moves, rows = symmetries.shape[1], np.arange(len(self.ids))[:, None]
        ids = np.where(self.ids < n_moves, symmetries[rows, np.minimum(self.ids, n_moves - 1)], self.ids)
        inverse = np.argsort(symmetries, axis=1)[:, None]  # (n, 1, n_moves)
        return self._replace(ids=ids, legal=np.take_along_axis(self.legal, inverse, 2),
                             moves=np.take_along_axis(self.moves, inverse, 2))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, self))

    def distinct(self, n_plies: int | None = None) -> float:
        """The fraction of games that differ, in their first moves or at all."""
        moves = self.ids[:, 1:] if n_plies is None else self.ids[:, 1:n_plies + 1]
        return len(np.unique(moves, axis=0)) / len(moves)


def play_loss(model: GPT, batch: list[Tensor]) -> Tensor:
    """Mean over positions of -sum(weight * log-probability) of moves and of outcomes, in nats. batch: a Rollout's tensors.

    Moves that are not legal have no probability, and outcomes share one among them: the tokens of a game never compete
    with those of another kind.
    """
    ids, legal, moves, outcomes = batch
    n_moves, logits = legal.size(2), model(ids)
    # a number instead of -inf, whose product with 0 is none
    move_logprobs = F.log_softmax(logits[..., :n_moves].masked_fill(~legal, -1e9), dim=-1)
    outcome_logprobs = F.log_softmax(logits[..., n_moves:n_moves + 3], dim=-1)
    n_positions = (outcomes.sum(-1) > 0).sum().clamp(min=1)
    return -((moves * move_logprobs).sum() + (outcomes * outcome_logprobs).sum()) / n_positions


# -- playing ----------------------------------------------------------------------------------------------------------

class Thought(NamedTuple):
    """What is made of n positions. moves: (n, n_moves), the probability with which each is played, and what is learnt of
    it. outcomes: (n, 3), what is learnt of them. play(moves) -> the positions after them. n_read: positions that the model
    read."""
    moves: np.ndarray
    outcomes: np.ndarray
    play: Callable[[np.ndarray], Positions]
    n_read: int


class Played(NamedTuple):
    """moves: (n, T) int64, those that were played, -1 after the end. is_own: (n, T) bool, whether the position was the
    model's to decide, after the random moves. score: (n,), see State. n_read: positions that the model read."""
    rollout: Rollout
    moves: np.ndarray
    is_own: np.ndarray
    score: np.ndarray
    n_read: int


def play_out(model: GPT, game: Game, config: PlayConfig, rng: np.random.Generator,
             think: Callable[[Positions], Thought]) -> Played:
    n, T = config.rollout_games, game.max_plies
    n_random = rng.integers(0, random_plies(game, config) + 1, n)
    rollout, played, score, n_read = Rollout.empty(game, n), np.full((n, T), -1), np.zeros(n), n
    positions, rows, ply = open_positions(model, game, start_line(game, n)), np.arange(n), 0
    while len(rows):
        legal, thought = game.legal(positions.state), think(positions)
        rollout.legal[rows, ply], rollout.moves[rows, ply], rollout.outcomes[rows, ply] = legal, *thought[:2]
        moves = draw_moves(np.where((ply < n_random[rows])[:, None], legal, thought.moves), rng)
        played[rows, ply] = moves
        ply, n_read = ply + 1, n_read + thought.n_read
        if ply < T:
            rollout.ids[rows, ply] = moves
        positions = thought.play(moves)
        score[rows] = positions.state.score
        going = np.flatnonzero(~positions.state.over)
        positions, rows = positions.take(going), rows[going]
    is_own = (played >= 0) & (np.arange(T) >= n_random[:, None])
    return Played(rollout, played, is_own, score, n_read)


def random_plies(game: Game, config: PlayConfig) -> int:
    return game.max_plies * 9 // 10 if config.random_plies == "auto" else config.random_plies


def results(played: Played) -> np.ndarray:
    """(n, T): how each game ended, for the player who was to move: 1, 0 or -1."""
    return played.score[:, None] * np.where(np.arange(played.moves.shape[1]) % 2 == 0, 1, -1)


# -- algorithms -------------------------------------------------------------------------------------------------------

def learn_from_search(model: GPT, game: Game, config: PlayConfig, rng: np.random.Generator, memory: dict) -> Played:
    """Moves are played and learnt as looking ahead finds them. The value that is learnt is a mix of what it finds and of how
    the game ended, of the former alone before a random move."""
    think = partial(think_by_search, config=config, rng=rng) if config.search == "puct" else partial(
        think_one_ply, temperature=config.target_temperature)
    played = play_out(model, game, config, rng, think)
    share = config.outcome_share * played.is_own[..., None]
    played.rollout.outcomes[:] = (1 - share) * played.rollout.outcomes + share * one_hot(results(played))
    return played


def think_one_ply(positions: Positions, temperature: float) -> Thought:
    """A softmax of the values of all moves. A value is that of the position that the move leads to: by the rules if the game
    is over then, else what the model expects there."""
    ahead = expand(positions)
    moves = softmax(ahead.values / temperature)
    return Thought(moves, (moves[..., None] * ahead.outcomes).sum(1),
                   lambda chosen: ahead.children.take(ahead.child_of(chosen)), len(ahead.rows))


def think_by_search(positions: Positions, config: PlayConfig, rng: np.random.Generator) -> Thought:
    """The share of a search's visits that each move got. Source: Silver et al. 2017, AlphaZero, arXiv:1712.01815."""
    found = search(positions, config.simulations, rng)
    moves = found.visits / found.visits.sum(1, keepdims=True)
    return Thought(moves, found.outcomes, partial(positions.play, np.arange(len(positions))),
                   len(positions) * (1 + config.simulations))


def think_alone(positions: Positions) -> Thought:
    """The model's own probabilities."""
    prediction = predict(positions.game, positions.logits, positions.game.legal(positions.state))
    return Thought(prediction.moves, prediction.outcomes, partial(positions.play, np.arange(len(positions))), len(positions))


def learn_by_reinforce(model: GPT, game: Game, config: PlayConfig, rng: np.random.Generator, memory: dict) -> Played:
    """The policy gradient (Williams 1992, REINFORCE): each move that was drawn from the model's probabilities, times what
    its player won above the running mean of that player, as in SPIRAL (Liu et al. 2025, arXiv:2506.24119)."""
    played = play_out(model, game, config, rng, think_alone)
    baseline = memory.setdefault("baseline", np.zeros(2))
    won, role = results(played), np.arange(played.moves.shape[1]) % 2
    advantages = (won - baseline[role]) * played.is_own
    chosen = np.eye(game.n_moves, dtype=np.float32)[played.moves] * (played.moves >= 0)[..., None]
    played.rollout.moves[:] = chosen * advantages[..., None]
    played.rollout.outcomes[:] = one_hot(won) * played.is_own[..., None]
    mean = played.score.mean()
    memory["baseline"] = baseline + BASELINE_RATE * (np.array([mean, -mean]) - baseline)
    return played


def learn_by_imitation(model: GPT, game: Game, config: PlayConfig, rng: np.random.Generator, memory: dict) -> Played:
    """Moves and ends of games between two players that err."""
    teacher = noisy_player(perfect_player(game, rng), game, config.epsilon, rng)

    def think(positions: Positions) -> Thought:
        moves = np.eye(game.n_moves)[teacher(positions.line)]
        return Thought(moves, np.zeros((len(moves), 3)), partial(positions.play, np.arange(len(positions))), 0)
    played = play_out(model, game, config, rng, think)
    played.rollout.outcomes[:] = one_hot(results(played)) * played.is_own[..., None]
    played.rollout.moves[~played.is_own] = 0
    return played


class Algorithm(NamedTuple):
    """learn_from(model, game, config, rng, memory) -> Played. is_on_policy: whether a batch must be the latest games."""
    learn_from: Callable
    is_on_policy: bool = False


ALGORITHMS = {"search": Algorithm(learn_from_search), "reinforce": Algorithm(learn_by_reinforce, is_on_policy=True),
              "imitation": Algorithm(learn_by_imitation)}


# -- batches ----------------------------------------------------------------------------------------------------------

@dataclass
class PlayStatistics:
    """Of the games since it was made."""
    games: int = 0
    positions: int = 0  # that the model read
    seconds: float = 0.0


class PlayLoader:
    """Batches out of the latest games, which it plays as they are needed."""

    def __init__(self, game: Game, config: PlayConfig, seed: int):
        self.game, self.config, self.algorithm = game, config, ALGORITHMS[config.algorithm]
        self.rng, self.memory = np.random.default_rng([2, seed]), {}
        self.replay = Rollout.empty(game, 0)
        self.updates_left = self.n_games = 0
        self.statistics = PlayStatistics()

    @property
    def batch_games(self) -> int:
        return self.config.rollout_games if self.algorithm.is_on_policy else self.config.batch_size

    def next_batch(self, model: GPT) -> tuple[Tensor, ...]:
        if not self.updates_left:
            self.play(model)
            self.updates_left = 1 if self.algorithm.is_on_policy else self.config.updates
        self.updates_left -= 1
        batch = self.replay
        if not self.algorithm.is_on_policy:
            batch = batch.take(self.rng.integers(0, len(batch.ids), self.config.batch_size))
        if self.config.symmetries:
            symmetries = self.game.symmetries
            batch = batch.transform(symmetries[self.rng.integers(0, len(symmetries), len(batch.ids))])
        return batch.tensors()

    @torch.no_grad()
    def play(self, model: GPT):
        start = time.perf_counter()
        played = self.algorithm.learn_from(model, self.game, self.config, self.rng, self.memory)
        n_kept = (0 if self.algorithm.is_on_policy else self.config.replay - 1) * self.config.rollout_games
        self.replay = self.replay.take(slice(max(0, len(self.replay.ids) - n_kept), None)).join(played.rollout)
        self.n_games += len(played.score)
        self.statistics.games += len(played.score)
        self.statistics.positions += played.n_read
        self.statistics.seconds += time.perf_counter() - start

    def latest(self) -> Rollout:
        return self.replay.take(slice(-self.config.rollout_games, None))

    def take_statistics(self) -> dict:
        """Of the games since it was called last, and of the latest rollout: {} before the first."""
        counted, self.statistics = self.statistics, PlayStatistics()
        if not self.n_games:
            return {}
        row = {"games": self.n_games, "distinct_games": self.latest().distinct(),
               "distinct_openings": self.latest().distinct(4)}
        if counted.games:
            row |= {"games_per_sec": round(counted.games / counted.seconds, 1),
                    "positions_per_sec": round(counted.positions / counted.seconds, 1)}
        return row

    def state_dict(self) -> dict:
        return {"rng": json.dumps(self.rng.bit_generator.state), "updates_left": self.updates_left, "n_games": self.n_games,
                "replay": list(self.replay.tensors()),
                "memory": {name: torch.from_numpy(value) for name, value in self.memory.items()}}

    def load_state_dict(self, state: dict):
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.updates_left, self.n_games = state["updates_left"], state["n_games"]
        self.replay = Rollout(*(part.numpy() for part in state["replay"]))
        self.memory = {name: value.numpy() for name, value in state["memory"].items()}

    def close(self):
        pass
