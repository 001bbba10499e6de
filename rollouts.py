"""Games that a model plays against itself, and the batches that it learns from.

    loader = PlayLoader(game, PlayConfig(), seed=1)
    loss = play_loss(model, loader.next_batch(model))       # plays when it is time to

A batch holds whole games with, for each position, the weights of all moves and outcomes in the loss: the policy target and
the value target, or advantages. --algorithm, a key of ALGORITHMS, says where they come from. The loader's state_dict has all
that later batches depend on: replayed games, the generator, the average of the weights.
"""
import json
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from players import (
    Positions,
    copy_cache,
    expand,
    noisy_player,
    one_hot,
    open_positions,
    perfect_player,
    predict,
    search,
    softmax,
)
from runtime.config import BadInput, check_flags, flag
from runtime.distributed import ALONE, World
from sampling import cache_dtype
from tasks.poker import Poker
from tasks.positions import Game, draw_moves, start_line

SEARCHES = "one_ply", "puct"
DRAWS_PER_PLY = 4     # random numbers for a move, at most: those of imitation
BASELINE_RATE = 0.05  # of the running mean of what a player wins, per rollout


@dataclass(frozen=True)
class PlayConfig:
    """Self-play."""
    algorithm: str = flag("auto", "what a model learns from; search: the moves that looking ahead finds best, and how "
                                  "games end; reinforce: the moves that it tried, by how much more than usual they won; "
                                  "regularised: the same where cards are hidden, held near what the model was; imitation: "
                                  "games of a player that errs, no self-play; auto: search, or regularised where cards are "
                                  "hidden", choices=("auto", "search", "reinforce", "regularised", "imitation"))
    search: str = flag("one_ply", "how --algorithm=search looks ahead; one_ply: over every move, once; puct: AlphaZero's "
                                  "tree search", choices=SEARCHES)
    simulations: int = flag(32, "positions that --search=puct reads before a move", at_least=2, at_most=100_000)
    epsilon: float = flag(0.3, "fraction of random moves of the player that --algorithm=imitation learns from; its other "
                               "moves are perfect", at_least=0, at_most=1)
    games: int = flag(None, "games to play, unless --max_iter, --max_tokens or --max_seconds is given (default: the game's "
                            "own number)", at_least=1, scope="run")
    rollout_games: int = flag(None, "games that are played at a time (default: 256, or 512 where cards are hidden)",
                              at_least=1, at_most=1_000_000)
    updates: int = flag(2, "optimizer steps after each rollout", at_least=1, at_most=10_000)
    replay: int = flag(8, "latest rollouts that batches are drawn from", at_least=1, at_most=10_000)
    batch_size: int = flag(256, "games in a batch", at_least=1, at_most=1_000_000)
    random_plies: int = flag("auto", "highest number of random moves that a game begins with; auto: nine tenths of the "
                                     "longest game", at_least=0, at_most=10_000, auto=True)
    target_temperature: float = flag(0.1, "of the softmax that makes values of moves into what is learnt and played, with "
                                          "--search=one_ply", above=0)
    outcome_share: float = flag(0.5, "share of how the game ended in what is learnt of a position's value; the rest is what "
                                     "looking ahead found", at_least=0, at_most=1)
    average: float = flag(0.98, "decay at each batch of a running average of the weights. With --algorithm=search it plays "
                                "in place of the latest ones, because its values are less noisy; with regularised, moves "
                                "are held near its own. 0: no average", at_least=0, at_most=0.9999)
    regularisation: float = flag(1.0, "with --algorithm=regularised, what a nat of distance from the average's moves costs, "
                                      "in chips; 0: the plain policy gradient", at_least=0)
    symmetries: bool = flag(True, "show each game in a random symmetry of the board")
    __post_init__ = check_flags

    def for_game(self, game: Game) -> "PlayConfig":
        """With what is not given resolved. Raises BadInput where the algorithm is for other games."""
        hidden, name = game.has_hidden_cards, self.algorithm
        if name == "auto":
            name = "regularised" if hidden else "search"
        if ALGORITHMS[name].hides_cards != hidden:
            fitting = [other for other, algorithm in ALGORITHMS.items() if algorithm.hides_cards == hidden]
            raise BadInput(f"--algorithm={name}: {'cards' if hidden else 'no cards'} are hidden in this game: choose "
                           f"{' or '.join(fitting)}")
        random_plies = game.max_plies * 9 // 10 if self.random_plies == "auto" else self.random_plies
        return replace(self, algorithm=name, rollout_games=self.rollout_games or ALGORITHMS[name].rollout_games,
                       random_plies=random_plies)


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


def play_loss(model: GPT, batch: list[Tensor]) -> Tensor:
    """Mean over positions of -sum(weight * log-probability) of moves and of outcomes, in nats. batch: a Rollout's tensors.

    Moves that are not legal have no probability, and outcomes share one among them: the tokens of a game never compete
    with those of another kind.
    """
    ids, legal, moves, outcomes = batch
    n_moves, logits = legal.size(2), model(ids)
    # instead of -inf, whose product with a weight of 0 is NaN
    move_logprobs = F.log_softmax(logits[..., :n_moves].masked_fill(~legal, -1e9), dim=-1)
    outcome_logprobs = F.log_softmax(logits[..., n_moves:n_moves + 3], dim=-1)
    n_positions = (outcomes.sum(-1) > 0).sum().clamp(min=1)
    return -((moves * move_logprobs).sum() + (outcomes * outcome_logprobs).sum()) / n_positions


# -- weights ----------------------------------------------------------------------------------------------------------

def copy_weights(model: GPT) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@contextmanager
def other_weights(model: GPT, weights: dict[str, Tensor]):
    """The model with these weights inside, and with its own again afterwards, bit for bit."""
    own = copy_weights(model)
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(own)


class WeightAverage:
    """A running average of a model's weights, over about 1 / (1 - decay) updates, from the first ones on."""

    def __init__(self, decay: float):
        self.decay, self.weights = decay, {}

    @torch.no_grad()
    def update(self, model: GPT):
        if not self.weights:
            self.weights = copy_weights(model)
        for name, weight in model.state_dict().items():
            own = self.weights[name].to(weight.device)  # those of a checkpoint are on the CPU
            self.weights[name] = own.lerp_(weight, 1 - self.decay)


@dataclass
class Memory:
    """What is kept from rollout to rollout. average: of the weights, or None. baseline: (2,), what the first and the second
    player have won, a running mean."""
    average: WeightAverage | None
    baseline: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def update(self, played: "Played"):
        """After a rollout."""
        baseline, mean = self.baseline.numpy(), played.score.mean()
        self.baseline = torch.from_numpy(baseline + BASELINE_RATE * (np.array([mean, -mean]) - baseline))

    def state_dict(self) -> dict:
        return {"average": self.average and dict(self.average.weights), "baseline": self.baseline}

    def load_state_dict(self, state: dict):
        self.baseline = state["baseline"]
        if self.average:
            self.average.weights = dict(state["average"])


# -- playing ----------------------------------------------------------------------------------------------------------

class GameDraws:
    """What games take in place of a random generator: the numbers of a game are the same whichever games are played beside
    it, in this process or in others. Each call takes the next ones of every game."""

    def __init__(self, numbers: np.ndarray, n_taken: int = 0):
        """numbers: (n, k), of n games, uniform in 0 to 1. n_taken: of each, how many have been."""
        self.numbers, self.n_taken = numbers, n_taken

    @classmethod
    def of(cls, game: Game, n: int, rng: np.random.Generator) -> "GameDraws":
        """As many as a rollout takes with any algorithm."""
        at_start = len(game.deck) if game.has_hidden_cards else 1
        return cls(rng.random((n, at_start + DRAWS_PER_PLY * game.max_plies)))

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, rows) -> "GameDraws":
        """Of some of the games."""
        return GameDraws(self.numbers[rows], self.n_taken)

    def random(self, shape: int | tuple[int, int]) -> np.ndarray:
        """shape: the number of games, and perhaps of numbers for each."""
        n, n_each = shape if isinstance(shape, tuple) else (shape, 1)
        drawn, self.n_taken = self.numbers[:, self.n_taken:self.n_taken + n_each], self.n_taken + n_each
        assert drawn.shape == (n, n_each)
        return drawn if isinstance(shape, tuple) else drawn[:, 0]

    def integers(self, low: int, high: int, n: int) -> np.ndarray:
        return low + (self.random(n) * (high - low)).astype(np.int64)

    def standard_gamma(self, shapes: np.ndarray) -> np.ndarray:
        """shapes: (n, k)."""
        seeds = (self.random(len(shapes)) * 2**53).astype(np.int64)
        return np.array([np.random.default_rng(seed).standard_gamma(row) for seed, row in zip(seeds, shapes)])


class Targets(NamedTuple):
    """Of n positions. moves: (n, n_moves), the policy that plays, and the policy target. outcomes: (n, 3), the value target
    before the result of the game is mixed in. play(moves) -> the positions after them. n_read: positions that the model
    read."""
    moves: np.ndarray
    outcomes: np.ndarray
    play: Callable[[np.ndarray], Positions]
    n_read: int


class Played(NamedTuple):
    """moves: (n, T) int64, those that were played, -1 after the end. is_own: (n, T) bool, whether the position was the
    model's to decide, after the random moves. score: (n,), see State. n_read: positions that the model read. Where cards
    are hidden, moves and is_own are (2n, T), and elsewhere -1 and False, see Hand."""
    rollout: Rollout
    moves: np.ndarray
    is_own: np.ndarray
    score: np.ndarray
    n_read: int


def play_out(model: GPT, game: Game, config: PlayConfig, draws: GameDraws,
             think: Callable[[Positions, GameDraws], Targets]) -> Played:
    n, T = len(draws), game.max_plies
    n_random = draws.integers(0, config.random_plies + 1, n)
    rollout, played, score, n_read = Rollout.empty(game, n), np.full((n, T), -1), np.zeros(n), n
    positions, rows, ply = open_positions(model, game, start_line(game, n)), np.arange(n), 0
    while len(rows):
        legal, found = game.legal(positions.state), think(positions, draws)
        rollout.legal[rows, ply], rollout.moves[rows, ply], rollout.outcomes[rows, ply] = legal, *found[:2]
        moves = draw_moves(np.where((ply < n_random[rows])[:, None], legal, found.moves), draws)
        played[rows, ply] = moves
        ply, n_read = ply + 1, n_read + found.n_read
        if ply < T:
            rollout.ids[rows, ply] = moves
        positions = found.play(moves)
        score[rows] = positions.state.score
        going = np.flatnonzero(~positions.state.over)
        positions, draws, rows = positions.take(going), draws.take(going), rows[going]
    is_own = (played >= 0) & (np.arange(T) >= n_random[:, None])
    return Played(rollout, played, is_own, score, n_read)


def join_played(parts: list[Played]) -> Played:
    """All games of `parts`."""
    rollouts, *arrays, n_read = zip(*parts)
    return Played(Rollout(*map(np.concatenate, zip(*rollouts))), *map(np.concatenate, arrays), sum(n_read))


def results(played: Played) -> np.ndarray:
    """(n, T): how each game ended, for the player who was to move: 1, 0 or -1."""
    return played.score[:, None] * np.where(np.arange(played.moves.shape[1]) % 2 == 0, 1, -1)


def measure_variety(played: Played) -> dict[str, float]:
    """How much games differ. distinct_openings: the fraction of games that differ in their first four moves. distinct_games:
    of the games that begin with the same random moves as an earlier one, the fraction that go on as none of these did; left
    out where there are none. A model that always plays the same has 0."""
    moves, own = played.moves, played.is_own.any(1)
    is_random = (moves >= 0) & ~played.is_own
    n_random = is_random.sum(1, keepdims=True)
    begun, games = (len(np.unique(np.column_stack((n_random, part))[own], axis=0))
                    for part in (np.where(is_random, moves, -1), moves))
    found, n_repeats = {"distinct_openings": len(np.unique(moves[:, :4], axis=0)) / len(moves)}, int(own.sum()) - begun
    return found | ({"distinct_games": (games - begun) / n_repeats} if n_repeats else {})


# -- algorithms -------------------------------------------------------------------------------------------------------

def search_rollout(model: GPT, game: Game, config: PlayConfig, draws: GameDraws, memory: Memory) -> Played:
    """The average of the weights plays, and the policy of looking ahead is both played and learnt. The value target mixes
    what looking ahead found with the result of the game; where a later move was random, it is the former alone."""
    think = partial(search_targets, config=config) if config.search == "puct" else partial(
        one_ply_targets, temperature=config.target_temperature)
    with other_weights(model, memory.average.weights) if memory.average else nullcontext():
        played = play_out(model, game, config, draws, think)
    share = config.outcome_share * played.is_own[..., None]
    played.rollout.outcomes[:] = (1 - share) * played.rollout.outcomes + share * one_hot(results(played))
    return played


def one_ply_targets(positions: Positions, draws: GameDraws, temperature: float) -> Targets:
    """A softmax of the values of all moves. A value is that of the position that the move leads to: by the rules if the game
    is over then, else what the model expects there."""
    ahead = expand(positions)
    moves = softmax(ahead.values / temperature)
    return Targets(moves, (moves[..., None] * ahead.outcomes).sum(1),
                   lambda chosen: ahead.children.take(ahead.child_of(chosen)), len(ahead.rows))


def search_targets(positions: Positions, draws: GameDraws, config: PlayConfig) -> Targets:
    """The share of a search's visits that each move got. Source: Silver et al. 2017, AlphaZero, arXiv:1712.01815."""
    found = search(positions, config.simulations, draws)
    moves = found.visits / found.visits.sum(1, keepdims=True)
    return Targets(moves, found.outcomes, partial(positions.play, np.arange(len(positions))),
                   len(positions) + found.n_read)


def own_targets(positions: Positions, draws: GameDraws) -> Targets:
    """The model's own probabilities."""
    prediction = predict(positions.game, positions.logits, positions.game.legal(positions.state))
    return Targets(prediction.moves, prediction.outcomes, partial(positions.play, np.arange(len(positions))), len(positions))


def reinforce_rollout(model: GPT, game: Game, config: PlayConfig, draws: GameDraws, memory: Memory) -> Played:
    """The policy gradient (Williams 1992, REINFORCE): each move that was drawn from the model's probabilities, times what
    its player won above the running mean of that player, as in SPIRAL (Liu et al. 2025, arXiv:2506.24119)."""
    played = play_out(model, game, config, draws, own_targets)
    baseline = memory.baseline.numpy()
    won, role = results(played), np.arange(played.moves.shape[1]) % 2
    advantages = (won - baseline[role]) * played.is_own
    chosen = np.eye(game.n_moves, dtype=np.float32)[played.moves] * (played.moves >= 0)[..., None]
    played.rollout.moves[:] = chosen * advantages[..., None]
    played.rollout.outcomes[:] = one_hot(won) * played.is_own[..., None]
    return played


def imitation_rollout(model: GPT, game: Game, config: PlayConfig, draws: GameDraws, memory: Memory) -> Played:
    """Moves and ends of games between two players that err."""
    def think(positions: Positions, draws: GameDraws) -> Targets:
        teacher = noisy_player(perfect_player(game, draws), game, config.epsilon, draws)
        moves = np.eye(game.n_moves)[teacher(positions.line)]
        return Targets(moves, np.zeros((len(moves), 3)), partial(positions.play, np.arange(len(positions))), 0)
    played = play_out(model, game, config, draws, think)
    played.rollout.outcomes[:] = one_hot(results(played)) * played.is_own[..., None]
    played.rollout.moves[~played.is_own] = 0
    return played


# -- hidden cards -----------------------------------------------------------------------------------------------------

class Hand(NamedTuple):
    """n games in which each player reads something else, a row of the rollout for each: those of game i are 2i and 2i + 1.
    Of moves, move_probabilities and values, rows have the player's own decisions; elsewhere they are -1, 0 and 0."""
    rollout: Rollout
    moves: np.ndarray               # (2n, T) int64, what was played
    move_probabilities: np.ndarray  # (2n, T, n_moves), from which it was drawn
    values: np.ndarray              # (2n, T), what the model expected, in -1 to 1
    score: np.ndarray               # (n,), chips of the first player
    n_read: int                     # positions that the model read


def play_hidden(model: GPT, game: Poker, draws: GameDraws) -> Hand:
    """Both players draw their moves from the model's probabilities."""
    n, T, n_read = len(draws), game.max_plies, 0
    state = game.start(n, draws)
    rollout = Rollout.empty(game, 2 * n)
    moves, values = np.full((2 * n, T), -1), np.zeros((2 * n, T))
    probabilities, score, games = np.zeros((2 * n, T, game.n_moves)), np.zeros(n), np.arange(n)
    tokens, cache = game.first_tokens(state).reshape(-1), model.init_cache(2 * n, T, cache_dtype(model))
    for ply in range(T):
        seats = np.stack((2 * games, 2 * games + 1), 1).reshape(-1)
        rollout.ids[seats, ply] = tokens
        n_read += len(tokens)
        idx = torch.from_numpy(tokens)[:, None].to(model.embed.weight.device)
        logits = model.eager_forward(idx, cache=cache, logits_to_keep=1)[:, 0]
        legal, mover = game.legal(state), np.where(state.player == -1, 1, 0)
        own = np.arange(len(games)) * 2 + mover
        prediction = predict(game, logits[torch.from_numpy(own)], legal)
        deciding = legal.any(1)
        chosen = game.chance_tokens(state)
        chosen[deciding] = draw_moves(np.where(deciding[:, None], prediction.moves, 1.0), draws)[deciding]
        rows = (2 * games + mover)[deciding]
        rollout.legal[rows, ply], moves[rows, ply] = legal[deciding], chosen[deciding]
        probabilities[rows, ply], values[rows, ply] = prediction.moves[deciding], prediction.value[deciding]
        state = game.play(state, chosen)
        score[games] = state.score
        going = np.flatnonzero(~state.over)
        if not len(going):
            break
        games, state, tokens = games[going], state.take(going), np.repeat(chosen[going], 2)
        draws = draws.take(going)
        if len(going) < len(own):
            cache = copy_cache(model, cache, (2 * going[:, None] + [0, 1]).reshape(-1), T - cache.length)
    return Hand(rollout, moves, probabilities, values, score, n_read)


def regularised_rollout(model: GPT, game: Poker, config: PlayConfig, draws: GameDraws, memory: Memory) -> Played:
    """The policy gradient, and that of the KL divergence from what the average of the weights would play, so that players
    settle instead of chasing each other. The average follows, up to an equilibrium; the plain gradient need not get there.
    Source: magnetic mirror descent with a moving magnet, Sokota et al. 2022, arXiv:2206.05825; R-NaD, Perolat et al. 2021,
    arXiv:2002.08456."""
    hand = play_hidden(model, game, draws)
    rollout, n, T = hand.rollout, len(draws), game.max_plies
    with other_weights(model, memory.average.weights) if memory.average else nullcontext():
        logits = model.eager_forward(torch.from_numpy(rollout.ids).to(model.embed.weight.device))
    reference = predict(game, logits.flatten(0, 1), rollout.legal.reshape(2 * n * T, -1)).moves.reshape(2 * n, T, -1)
    own = hand.moves >= 0
    ratios = np.where(rollout.legal, log_ratio(hand.move_probabilities, reference), 0.0)
    distance = ratios - (hand.move_probabilities * ratios).sum(2, keepdims=True)
    returns = np.repeat(hand.score, 2)[:, None] * np.tile([1, -1], n)[:, None]
    advantages = returns - game.max_score * hand.values
    chosen = np.eye(game.n_moves)[hand.moves] * own[..., None]
    rollout.moves[:] = chosen * advantages[..., None] - config.regularisation * hand.move_probabilities * distance
    share = np.broadcast_to(returns / game.max_score / 2 + 0.5, own.shape)
    rollout.outcomes[:] = np.stack((1 - share, np.zeros_like(share), share), 2) * own[..., None]
    return Played(rollout, hand.moves, own, hand.score, hand.n_read + 2 * n * T)


def log_ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(a, 1e-12)) - np.log(np.maximum(b, 1e-12))


# -- every algorithm -------------------------------------------------------------------------------------------------

class Algorithm(NamedTuple):
    """make_rollout(model, game, config, draws, memory) -> Played, of as many games as `draws` has. name: in words. flags:
    those of PlayConfig that not all algorithms read and this one does. is_on_policy: whether a batch must be the latest
    games. hides_cards: whether it is for games with hidden cards. rollout_games and, of the optimizer, learning_rate (of
    Muon), cooldown_frac and weight_decay: where they are not given."""
    make_rollout: Callable
    name: str
    flags: set[str]
    is_on_policy: bool = False
    hides_cards: bool = False
    rollout_games: int = 256
    learning_rate: float = 0.02
    cooldown_frac: float = 0.6
    weight_decay: float = 0.1


REPLAYED = {"updates", "replay", "batch_size", "random_plies", "symmetries"}
ALGORITHMS = {
    "search": Algorithm(search_rollout, "looking ahead",
                        REPLAYED | {"search", "simulations", "target_temperature", "outcome_share", "average"}),
    "reinforce": Algorithm(reinforce_rollout, "policy gradient", {"random_plies", "symmetries"}, is_on_policy=True),
    "regularised": Algorithm(regularised_rollout, "regularised policy gradient", {"regularisation", "average"},
                             is_on_policy=True, hides_cards=True, rollout_games=512, cooldown_frac=1.0,
                             weight_decay=0.0),
    "imitation": Algorithm(imitation_rollout, "imitation", REPLAYED | {"epsilon"})}


# -- batches ----------------------------------------------------------------------------------------------------------

@dataclass
class PlayStatistics:
    """Of the games since it was made."""
    games: int = 0
    positions: int = 0  # that the model read
    seconds: float = 0.0


class PlayLoader:
    """Batches out of the latest games, which it plays as they are needed. autocast(): the context in which the model plays,
    see Machine. world: whose processes play a part of the games each, and take the batches in turns."""

    def __init__(self, game: Game, config: PlayConfig, seed: int, autocast: Callable = nullcontext, world: World = ALONE):
        self.autocast, self.world = autocast, world
        self.game, self.config = game, config.for_game(game)
        self.algorithm = ALGORITHMS[self.config.algorithm]
        has_average = config.average and "average" in self.algorithm.flags
        self.rng = np.random.default_rng([2, seed])
        self.memory = Memory(WeightAverage(config.average) if has_average else None)
        self.replay = Rollout.empty(game, 0)
        self.updates_left = self.n_games = 0
        self.variety: dict[str, float] = {}
        self.statistics = PlayStatistics()

    @property
    def batch_rows(self) -> int:
        """Of a batch: games, or where cards are hidden, what each of two players reads of them."""
        n = self.config.rollout_games if self.algorithm.is_on_policy else self.config.batch_size
        return n * (1 + self.game.has_hidden_cards)

    @property
    def batches_per_rollout(self) -> int:
        return 1 if self.algorithm.is_on_policy else self.config.updates

    def next_batch(self, model: GPT) -> tuple[Tensor, ...]:
        """That of this process; all of them make as many calls."""
        batches = [self.draw_batch(model) for _ in range(self.world.size)]
        rollout, rows, symmetries = batches[self.world.rank]
        return rollout.take(rows).transform(self.game.symmetries[symmetries]).tensors()

    def draw_batch(self, model: GPT) -> tuple[Rollout, np.ndarray, np.ndarray]:
        """The games to draw from, the numbers of those that are drawn, and of the symmetry to show each in."""
        if self.memory.average:
            self.memory.average.update(model)
        if not self.updates_left:
            self.play(model)
            self.updates_left = self.batches_per_rollout
        self.updates_left -= 1
        n = len(self.replay.ids)
        rows = np.arange(n) if self.algorithm.is_on_policy else self.rng.integers(0, n, self.config.batch_size)
        n_symmetries = len(self.game.symmetries) if self.config.symmetries else 1
        return self.replay, rows, self.rng.integers(0, n_symmetries, len(rows))

    @torch.no_grad()
    def play(self, model: GPT):
        start = time.perf_counter()
        if self.memory.average and not self.memory.average.weights:
            self.memory.average.update(model)
        n, draws = self.config.rollout_games, GameDraws.of(self.game, self.config.rollout_games, self.rng)
        own = slice(*((self.world.rank + i) * n // self.world.size for i in (0, 1)))
        with self.autocast():
            played = self.algorithm.make_rollout(model, self.game, self.config, draws.take(own), self.memory)
        played = join_played(self.world.gather(played))
        self.memory.update(played)
        n_kept = (0 if self.algorithm.is_on_policy else self.config.replay - 1) * self.config.rollout_games
        self.replay = self.replay.take(slice(max(0, len(self.replay.ids) - n_kept), None)).join(played.rollout)
        self.n_games += len(played.score)
        if not self.game.has_hidden_cards:  # there, it is the policy that must vary
            self.variety = measure_variety(played)
        self.statistics.games += len(played.score)
        self.statistics.positions += played.n_read
        self.statistics.seconds += time.perf_counter() - start

    def take_statistics(self) -> dict:
        """Of the games since it was called last, and of the latest rollout: {} before the first."""
        counted, self.statistics = self.statistics, PlayStatistics()
        if not self.n_games:
            return {}
        row = {"games": self.n_games} | self.variety
        if counted.games:
            row |= {"games_per_sec": round(counted.games / counted.seconds, 1),
                    "positions_per_sec": round(counted.positions / counted.seconds, 1)}
        return row

    def state_dict(self) -> dict:
        return {"rng": json.dumps(self.rng.bit_generator.state), "updates_left": self.updates_left, "n_games": self.n_games,
                "replay": list(self.replay.tensors()), "memory": self.memory.state_dict(), "variety": dict(self.variety)}

    def load_state_dict(self, state: dict):
        """Raises ValueError or KeyError when the state is not valid."""
        replay = Rollout(*(part.numpy() for part in state["replay"]))
        for part, like in zip(replay, Rollout.empty(self.game, len(replay.ids))):
            if part.shape != like.shape or part.dtype != like.dtype:
                raise ValueError(f"games of shape {part.shape} {part.dtype} in place of {like.shape} {like.dtype}")
        if not (0 <= state["updates_left"] < max(2, self.batches_per_rollout) and state["n_games"] >= 0):
            raise ValueError(f"updates_left {state['updates_left']!r}, n_games {state['n_games']!r}")
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.updates_left, self.n_games = state["updates_left"], state["n_games"]
        self.replay, self.variety = replay, dict(state["variety"])
        self.memory.load_state_dict(state["memory"])

    def close(self):
        pass
