"""Games that a model plays against itself, and the batches that it learns from.

    loader = PlayLoader(game, PlayConfig(), seed=1)
    batch = loader.next_batch(model)            # plays when it is time to
    loss = play_loss(model, batch)

A batch holds whole games, and says for each position which moves would have been right and how the game should end. Where
that comes from is --learn_from: `LEARNERS` at the end. What a loader draws on is in its state_dict: random generator, games,
statistics.
"""
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from players import Expansion, Positions, expand, one_hot, open_positions, predict, softmax
from runtime.config import check_flags, flag
from tasks.games import Game, State, draw_moves


@dataclass(frozen=True)
class PlayConfig:
    """How a model plays against itself, and what it learns from that."""
    games_per_rollout: int = flag(256, "games that are played at a time", at_least=1, at_most=1_000_000)
    updates: int = flag(4, "optimizer steps after each rollout", at_least=1, at_most=10_000)
    replay: int = flag(8, "rollouts that batches are drawn from; older ones are forgotten", at_least=1, at_most=10_000)
    batch_size: int = flag(256, "games in a batch", at_least=1, at_most=1_000_000)
    random_plies: int = flag(8, "random moves, 0 to as many, that a game begins with", at_least=0, at_most=1000)
    target_temperature: float = flag(0.1, "of the softmax that turns values of moves into targets and into moves to play",
                                     above=0)
    outcome_share: float = flag(0.5, "share of the game's own outcome in the target of a position's value; the rest is the "
                                     "value of its best moves", at_least=0, at_most=1)
    symmetries: bool = flag(True, "show each game in a random symmetry of the board")
    __post_init__ = check_flags


# -- games that have been played --------------------------------------------------------------------------------------

class Rollout(NamedTuple):
    """n games in T positions before a move, those that a game did not have included."""
    ids: np.ndarray       # (n, T) int64: START and the moves
    legal: np.ndarray     # (n, T, n_moves) bool
    moves: np.ndarray     # (n, T, n_moves) float32: weight of each move in the loss
    outcomes: np.ndarray  # (n, T, 3) float32: weight of each outcome in the loss; 0 where there is nothing to learn

    @classmethod
    def empty(cls, game: Game, n: int) -> "Rollout":
        T = game.max_plies
        ids = np.full((n, T), game.start_token, np.int64)
        return cls(ids, np.zeros((n, T, game.n_moves), bool), np.zeros((n, T, game.n_moves), np.float32),
                   np.zeros((n, T, 3), np.float32))

    def take(self, rows) -> "Rollout":
        return Rollout(*(part[rows] for part in self))

    def transformed(self, symmetries: np.ndarray) -> "Rollout":
        """Each game in a symmetry of the board. symmetries: (n, n_moves), see Game."""
        n_moves, rows = symmetries.shape[1], np.arange(len(self.ids))
        ids = np.where(self.ids < n_moves, symmetries[rows[:, None], np.minimum(self.ids, n_moves - 1)], self.ids)
        inverse = np.argsort(symmetries, axis=1)[:, None].repeat(self.ids.shape[1], 1)
        return self._replace(ids=ids, legal=np.take_along_axis(self.legal, inverse, 2),
                             moves=np.take_along_axis(self.moves, inverse, 2))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, self))


def play_loss(model: GPT, batch: list[Tensor]) -> Tensor:
    """Mean over positions of the cross-entropy of moves and of outcomes, in nats. batch: the tensors of a Rollout."""
    ids, legal, moves, outcomes = batch
    n_moves, logits = legal.size(2), model(ids)
    move_logprobs = F.log_softmax(logits[..., :n_moves].masked_fill(~legal, -1e9), dim=-1)  # not -inf: 0 * -inf is no number
    outcome_logprobs = F.log_softmax(logits[..., n_moves:n_moves + 3], dim=-1)
    n_positions = (outcomes.sum(-1) > 0).sum().clamp(min=1)
    return -((moves * move_logprobs).sum() + (outcomes * outcome_logprobs).sum()) / n_positions


# -- learning from one move ahead -------------------------------------------------------------------------------------

def play_expanded(model: GPT, game: Game, config: PlayConfig, rng: np.random.Generator) -> Rollout:
    """The targets of a move are a softmax of the values of all moves, and so are the moves that are played. A value is that
    of the position that the move leads to: by the rules if the game is over then, else what the model expects there."""
    n = config.games_per_rollout
    rollout, n_random = Rollout.empty(game, n), rng.integers(0, config.random_plies + 1, n)
    positions, rows, ply, score = open_positions(model, game, n), np.arange(n), 0, np.zeros(n)
    while len(rows):
        ahead, legal = expand(positions), game.legal(positions.state)
        best = softmax(ahead.values / config.target_temperature)
        rollout.legal[rows, ply], rollout.moves[rows, ply] = legal, best
        rollout.outcomes[rows, ply] = (best[..., None] * ahead.outcomes).sum(1)
        moves = draw_moves(np.where((ply < n_random[rows])[:, None], legal, best), rng)
        positions = ahead.children.take(ahead.child_of(moves))
        ply += 1
        if ply < game.max_plies:
            rollout.ids[rows, ply] = moves
        score[rows] = positions.state.score
        going = np.flatnonzero(~positions.state.over)
        positions, rows = positions.take(going), rows[going]
    mix_outcomes(rollout, score, n_random, config.outcome_share)
    return rollout


def mix_outcomes(rollout: Rollout, score: np.ndarray, n_random: np.ndarray, share: float):
    """Mixes how each game ended into the targets of its positions after the random moves. score: (n,), the first player's."""
    T = rollout.ids.shape[1]
    player = np.where(np.arange(T) % 2 == 0, 1, -1)
    ended = one_hot(score[:, None] * player)
    is_own = (rollout.outcomes.sum(2) > 0) & (np.arange(T) >= n_random[:, None])
    mixed = (1 - share) * rollout.outcomes + share * ended
    rollout.outcomes[:] = np.where(is_own[..., None], mixed, rollout.outcomes)


class PlayLoader:
    """Batches of games out of a replay buffer, which it fills as it goes."""

    def __init__(self, game: Game, config: PlayConfig, seed: int, play: Callable = play_expanded):
        self.game, self.config, self.play = game, config, play
        self.rng = np.random.default_rng([2, seed])
        self.replay: deque[Rollout] = deque(maxlen=config.replay)
        self.updates_left = 0
        self.n_games = 0

    def next_batch(self, model: GPT) -> tuple[Tensor, ...]:
        if not self.updates_left:
            with torch.no_grad():
                self.replay.append(self.play(model, self.game, self.config, self.rng))
            self.n_games += self.config.games_per_rollout
            self.updates_left = self.config.updates
        self.updates_left -= 1
        n = self.config.games_per_rollout
        drawn = self.rng.integers(0, n * len(self.replay), self.config.batch_size)
        rollout = Rollout(*(np.stack([self.replay[i // n][k][i % n] for i in drawn]) for k in range(4)))
        if self.config.symmetries:
            symmetries = self.game.symmetries
            rollout = rollout.transformed(symmetries[self.rng.integers(0, len(symmetries), len(drawn))])
        return rollout.tensors()

    def state_dict(self) -> dict:
        return {"rng": json.dumps(self.rng.bit_generator.state), "updates_left": self.updates_left, "n_games": self.n_games,
                "replay": [list(rollout.tensors()) for rollout in self.replay]}

    def load_state_dict(self, state: dict):
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.updates_left, self.n_games = state["updates_left"], state["n_games"]
        self.replay.extend(Rollout(*(part.numpy() for part in rollout)) for rollout in state["replay"])

    def close(self):
        pass
