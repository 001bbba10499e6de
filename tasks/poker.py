"""Kuhn and Leduc poker as rules on arrays: a batch of games at a time, and the exact exploitability of a policy.

    game = Kuhn()
    sets = information_sets(game)
    policy = sets.legal / sets.legal.sum(1, keepdims=True)      # (sets, game.n_moves), here uniform
    chips = exploitability(game, policy)                        # 0.4583 a game

A player reads a game as the token of the own card, followed by what both see: the moves and, in Leduc, the public card.
Where cards are hidden there is no best move to compare with: what counts is how much a policy loses to who knows it.
"""
import functools
import itertools
from typing import NamedTuple

import numpy as np

from tasks.positions import Game

FOLD, CALL, RAISE = range(3)  # checking is to call when there is nothing to call
CHANCE = 0                    # in place of a player: a public card comes next


class PokerState(NamedTuple):
    """n games of poker."""
    cards: np.ndarray   # (n, k) int8: ranks of the first player's card, the second player's and, in Leduc, the public card
    chips: np.ndarray   # (n, 2) int8: what each player has put in
    round: np.ndarray   # (n,) int8: how many public cards lie open
    raises: np.ndarray  # (n,) int8: how many there were in this round
    acted: np.ndarray   # (n,) bool: whether somebody has moved in this round
    player: np.ndarray  # (n,) int8: who is to move, 1 or -1, or CHANCE
    over: np.ndarray    # (n,) bool
    score: np.ndarray   # (n,) int8: where it is over, the chips that the first player has won

    def take(self, rows) -> "PokerState":
        return PokerState(*(part[rows] for part in self))

    def result(self) -> np.ndarray:
        """(n,) int8: `score` as the player sees it who would be to move."""
        return self.score * self.player


class Poker(Game):
    """Betting in rounds, between which a public card is revealed; who has it as a pair wins, else the higher card.

    After the tokens of all games come those of the cards: `card_token`. raise_sizes: chips of a raise in each round.
    max_score: the most chips that a player can win. max_plies: counts public cards like moves, and not the own card.
    """
    raise_sizes: tuple[int, ...]
    max_raises: int
    n_suits: int
    max_score: int
    n_ranks, rank_names = 3, "JQK"
    has_hidden_cards = True
    board = default_board = ()

    def __init__(self):
        self.symmetries = np.arange(self.n_moves)[None]
        n_rounds = len(self.raise_sizes)
        self.max_plies = n_rounds * (self.max_raises + 2) + n_rounds - 1  # check, all raises, call

    @property
    def deck(self) -> np.ndarray:
        """The rank of each card, (cards,) int8."""
        return np.arange(self.n_ranks, dtype=np.int8).repeat(self.n_suits)

    @property
    def n_dealt(self) -> int:
        return len(self.raise_sizes) + 1

    @property
    def vocab_size(self) -> int:
        return self.card_token(self.n_ranks)

    def card_token(self, rank):
        """rank: an int or an array of them."""
        return self.start_token + 1 + rank

    def start(self, n: int, rng: np.random.Generator) -> PokerState:
        """All cards are dealt now, those that are revealed later too."""
        dealt = rng.random((n, len(self.deck))).argsort(1)[:, :self.n_dealt]
        return self.start_with(self.deck[dealt])

    def start_with(self, cards: np.ndarray) -> PokerState:
        """cards: see PokerState."""
        n, (zeros, no) = len(cards), (np.zeros(len(cards), dtype) for dtype in (np.int8, bool))
        return PokerState(cards, np.ones((n, 2), np.int8), zeros, zeros, no, np.ones(n, np.int8), no, zeros)

    def first_tokens(self, state: PokerState) -> np.ndarray:
        """(n, 2) int64: the token of each player's card, with which what this player reads begins."""
        return self.card_token(state.cards[:, :2].astype(np.int64))

    def chance_tokens(self, state: PokerState) -> np.ndarray:
        """(n,) int64: the token of the public card to reveal, where the player is CHANCE; elsewhere without meaning."""
        public = np.minimum(state.round + 2, self.n_dealt - 1)
        return self.card_token(state.cards[np.arange(len(public)), public].astype(np.int64))

    def to_call(self, state: PokerState) -> np.ndarray:
        """(n,) int8: the chips by which the player to move is behind."""
        mover = np.where(state.player == 1, 0, 1)
        return state.chips.max(1) - state.chips[np.arange(len(mover)), mover]

    def actions(self, state: PokerState, moves: np.ndarray) -> np.ndarray:
        """What moves mean: FOLD, CALL or RAISE, (n,) int."""
        raise NotImplementedError

    def play(self, state: PokerState, tokens: np.ndarray) -> PokerState:
        """The games after legal moves or, where the player is CHANCE, after the token of the public card, (n,) int. None of
        the games may be over."""
        chance, to_call = state.player == CHANCE, self.to_call(state)
        assert (tokens == self.chance_tokens(state))[chance].all()
        actions = np.where(chance, -1, self.actions(state, tokens))
        raised, folded = actions == RAISE, actions == FOLD
        paid = np.where(actions == CALL, to_call, 0) + np.where(raised, to_call + np.array(self.raise_sizes)[state.round], 0)
        chips = state.chips + (paid[:, None] * np.stack((state.player == 1, state.player == -1), 1)).astype(np.int8)
        called = (actions == CALL) & state.acted  # which ends the round
        is_last = state.round == len(self.raise_sizes) - 1
        score = np.where(folded, -state.player * chips.min(1), self.better_hand(state.cards) * chips.min(1))
        over = folded | called & is_last
        return PokerState(
            state.cards, chips, (state.round + chance).astype(np.int8),
            np.where(chance, 0, state.raises + raised).astype(np.int8), ~chance,
            np.where(chance, 1, np.where(called & ~is_last, CHANCE, -state.player)).astype(np.int8),
            over, np.where(over, score, 0).astype(np.int8))

    def better_hand(self, cards: np.ndarray) -> np.ndarray:
        """(n,) int: 1 where the first player's is better, -1 where the second's is, else 0."""
        hands, public = cards[:, :2], cards[:, 2:]
        strength = hands + self.n_ranks * (hands[:, :, None] == public[:, None]).any(2)
        return np.sign(strength[:, 0] - strength[:, 1])

    def solvable(self, state: PokerState) -> np.ndarray:
        return np.zeros(len(state.player), bool)

    def draw(self, state: PokerState, shown: tuple[int, ...] | None = None) -> str:
        """A single game, as text of several lines. shown: the players whose cards are shown; None: who is to move,
        after a showdown both, after a fold nobody."""
        chips = state.chips[0].tolist()
        if shown is None:
            is_showdown = state.over[0] and chips[0] == chips[1]
            shown = (1, -1) if is_showdown else () if state.over[0] else (int(state.player[0]),)
        cards = [self.rank_names[rank] for rank in state.cards[0]]
        seats = (("first ", 1), ("second", -1))
        lines = [f"{name}  {card if player in shown else '?'}  {n} in the pot"
                 for (name, player), card, n in zip(seats, cards, chips)]
        return "\n".join(lines + [f"public  {card}" for card in cards[2:2 + state.round[0]]])


class Kuhn(Poker):
    """Three cards, and a single bet: to bet is also to call, and to pass also to fold. Source: Kuhn 1950, A simplified
    two-person poker."""
    raise_sizes, max_raises, n_suits = (1,), 1, 1
    default_games = 1_000_000
    n_moves, max_score = 2, 2

    def legal(self, state: PokerState) -> np.ndarray:
        return (~state.over)[:, None].repeat(2, 1)

    def actions(self, state: PokerState, moves: np.ndarray) -> np.ndarray:
        return moves + (self.to_call(state) == 0)

    def move_name(self, move: int) -> str:
        return ("pass", "bet")[move]


class Leduc(Poker):
    """Two cards of each of three ranks, and two rounds of betting with a public card between them. Moves are FOLD, CALL and
    RAISE. Source: Southey et al. 2005, Bayes' bluff, arXiv:1207.1411; the rules are those of OpenSpiel."""
    raise_sizes, max_raises, n_suits = (2, 4), 2, 2
    default_games = 2_000_000
    n_moves, max_score = 3, 13

    def legal(self, state: PokerState) -> np.ndarray:
        going = ~state.over & (state.player != CHANCE)
        return np.stack((going & (self.to_call(state) > 0), going, going & (state.raises < self.max_raises)), 1)

    def actions(self, state: PokerState, moves: np.ndarray) -> np.ndarray:
        return moves

    def move_name(self, move: int) -> str:
        return ("fold", "call", "raise")[move]


# -- the tree of a game -----------------------------------------------------------------------------------------------

class Level(NamedTuple):
    """All that can come about with the same number of tokens, one node for each deal and each sequence of public tokens."""
    parent: np.ndarray           # (nodes,) int64: the node in the level before
    move: np.ndarray             # (nodes,) int64: what led here from there; -1 where a public card was revealed
    information_set: np.ndarray  # (nodes,) int64: what the player to move knows; -1 where no player is
    player: np.ndarray           # (nodes,) int8
    score: np.ndarray            # (nodes,) float64: chips of the first player where the game is over, else 0


class InformationSets(NamedTuple):
    """What a player to move can have read."""
    tokens: np.ndarray   # (sets, T) int64: the own card and the public tokens; 0 after these
    lengths: np.ndarray  # (sets,) int64
    player: np.ndarray   # (sets,) int8: who is to move
    legal: np.ndarray    # (sets, n_moves) bool


class Tree(NamedTuple):
    """deals: probability of each node of the first level, (deals,); the rest follows from the players' moves alone."""
    deals: np.ndarray
    levels: list[Level]
    sets: InformationSets


def information_sets(game: Poker) -> InformationSets:
    """All of a game's: 12 in Kuhn, 288 in Leduc, where suits are not told apart."""
    return build_tree(type(game)).sets


@functools.cache
def build_tree(game_class: type[Poker]) -> Tree:
    game = game_class()
    in_order = [*itertools.permutations(game.deck, game.n_dealt)]
    cards, counts = np.unique(np.array(in_order), axis=0, return_counts=True)
    state, public = game.start_with(cards), np.zeros((len(cards), 0), np.int64)
    parent, move = np.arange(len(cards)), np.full(len(cards), -1)
    levels, found, n_sets = [], [], 0
    while len(parent):
        sets, information_set = find_information_sets(game, state, public)
        information_set[information_set >= 0] += n_sets
        n_sets += len(sets.player)
        found.append(sets)
        levels.append(Level(parent, move, information_set, state.player, state.score.astype(np.float64)))
        parent, move = np.nonzero(game.legal(state))
        chance = np.flatnonzero(state.player == CHANCE)
        tokens = np.concatenate((move, game.chance_tokens(state)[chance]))
        parent, move = np.concatenate((parent, chance)), np.concatenate((move, np.full(len(chance), -1)))
        state, public = game.play(state.take(parent), tokens), np.column_stack((public[parent], tokens))
    return Tree(counts / len(in_order), levels, InformationSets(*map(np.concatenate, zip(*found))))


def find_information_sets(game: Poker, state: PokerState, public: np.ndarray) -> tuple[InformationSets, np.ndarray]:
    """public: tokens that both have read, (n, t). Returns the sets of these games, and the index of each game's among them,
    (n,) int64, -1 where no player is to move."""
    legal, index = game.legal(state), np.full(len(public), -1)
    rows = np.flatnonzero(legal.any(1))
    own = game.first_tokens(state)[rows, np.where(state.player[rows] == 1, 0, 1)]
    read = np.column_stack((own, public[rows]))
    tokens, first, inverse = np.unique(read, axis=0, return_index=True, return_inverse=True)
    index[rows] = inverse.ravel()
    short = tokens[:, :game.max_plies]  # whoever is to move has read the own card and not the last move
    padded = np.pad(short, ((0, 0), (0, game.max_plies - short.shape[1])))
    return InformationSets(padded, np.full(len(tokens), read.shape[1]), state.player[rows[first]], legal[rows[first]]), index


def reach_probabilities(tree: Tree, first: np.ndarray | None, second: np.ndarray | None) -> list[np.ndarray]:
    """The probability of each node of each level, (nodes,), where chance and the players play as they do, and as if a player
    without a policy always moved there."""
    reach = [tree.deals]
    for above, level in zip(tree.levels, tree.levels[1:]):
        reach.append(reach[-1][level.parent])
        for player, policy in ((1, first), (-1, second)):
            if policy is not None:
                rows = np.flatnonzero((above.player[level.parent] == player) & (level.move >= 0))
                reach[-1][rows] *= policy[above.information_set[level.parent[rows]], level.move[rows]]
    return reach


def expected_score(game: Poker, first: np.ndarray, second: np.ndarray | None = None) -> float:
    """Chips a game that the first player wins. first, second: the players' policies, (sets, n_moves), of which each row is
    that of `information_sets` and sums to 1 over its legal moves; None: both play as the first."""
    tree = build_tree(type(game))
    reach = reach_probabilities(tree, first, first if second is None else second)
    return float(sum(probability @ level.score for probability, level in zip(reach, tree.levels)))


def best_response_value(game: Poker, policy: np.ndarray, player: int) -> float:
    """Chips a game that this player, 1 or -1, wins with the best response to a policy of the other. Exact: one pass from the
    deals on, for the probabilities, and one back, in which the player takes the best move of each information set."""
    tree = build_tree(type(game))
    reach = reach_probabilities(tree, *((None, policy) if player == 1 else (policy, None)))
    worth = [player * probability * level.score for probability, level in zip(reach, tree.levels)]
    for depth in reversed(range(1, len(tree.levels))):
        above, level = tree.levels[depth - 1], tree.levels[depth]
        chosen = best_moves(tree.sets, above, level, worth[depth], player)
        np.add.at(worth[depth - 1], level.parent[chosen], worth[depth][chosen])
    return float(worth[0].sum())


def best_moves(sets: InformationSets, above: Level, level: Level, worth: np.ndarray, player: int) -> np.ndarray:
    """(nodes,) bool: which nodes of a level are played to where the player of the level before maximises `worth`, (nodes,),
    summed over what is the same to this player; all where another is to move."""
    own = (above.player[level.parent] == player) & (level.move >= 0)
    cell = above.information_set[level.parent[own]], level.move[own]
    totals = np.where(sets.legal, 0.0, -np.inf)
    np.add.at(totals, cell, worth[own])
    chosen = ~own
    chosen[own] = totals.argmax(1)[cell[0]] == cell[1]
    return chosen


def exploitability(game: Poker, policy: np.ndarray) -> float:
    """Chips a game that a policy loses, over both seats, to an opponent who knows it and plays as well as can be; 0 for an
    equilibrium alone. NashConv / 2 in OpenSpiel's terms. policy: as in `expected_score`."""
    return (best_response_value(game, policy, 1) + best_response_value(game, policy, -1)) / 2
