"""tasks/poker.py, against the same games written as strings, one at a time, and against equilibria that are known."""
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from tasks.poker import (
    CHANCE,
    Kuhn,
    Leduc,
    Poker,
    PokerState,
    best_response_value,
    build_tree,
    expected_score,
    exploitability,
    information_sets,
    reach_probabilities,
)
from tasks.positions import UNKNOWN, values

GAMES = [Kuhn(), Leduc()]
all_games = pytest.mark.parametrize("game", GAMES, ids=["kuhn", "leduc"])


# -- the same games, slow and obvious ---------------------------------------------------------------------------------

class Spot(NamedTuple):
    """player: 1, -1, CHANCE, or None where the game is over. legal: letters. score: of the first player, or None."""
    player: int | None
    legal: str
    score: int | None


def kuhn_spot(cards: tuple[int, ...], history: str) -> Spot:
    high = 1 if cards[0] > cards[1] else -1
    scores = {"pp": high, "pbp": -1, "pbb": 2 * high, "bp": 1, "bb": 2 * high}
    if history in scores:
        return Spot(None, "", scores[history])
    return Spot(-1 if len(history) == 1 else 1, "pb", None)


def leduc_spot(cards: tuple[int, ...], history: str) -> Spot:
    """history: letters, and the public card's digit between the rounds."""
    paid, rounds = [1, 1], re.split(r"\d", history)
    for raised_by, letters in zip((2, 4), rounds):
        for i, letter in enumerate(letters):
            player, other = i % 2, 1 - i % 2
            if letter == "f":
                return Spot(None, "", [-paid[0], paid[1]][player])
            paid[player] = paid[other] + (raised_by if letter == "r" else 0)
    letters = rounds[-1]
    if letters[-1:] == "c" and len(letters) > 1:
        if len(rounds) == 1:
            return Spot(CHANCE, "", None)
        first, second = ((card == cards[2], card) for card in cards[:2])
        return Spot(None, "", paid[0] * ((first > second) - (first < second)))
    legal = ("f" if letters[-1:] == "r" else "") + "c" + ("r" if letters.count("r") < 2 else "")
    return Spot(-1 if len(letters) % 2 else 1, legal, None)


SPOTS, LETTERS, DECKS = {Kuhn: kuhn_spot, Leduc: leduc_spot}, {Kuhn: "pb", Leduc: "fcr"}, {Kuhn: "012", Leduc: "001122"}


def deals(game: Poker) -> dict[tuple[int, ...], float]:
    """Cards -> probability."""
    cards = [tuple(map(int, dealt)) for dealt in itertools.permutations(DECKS[type(game)], 2 if type(game) is Kuhn else 3)]
    return {dealt: n / len(cards) for dealt, n in Counter(cards).items()}


def walk(game: Poker, cards: tuple[int, ...], history: str = "") -> Iterator[tuple[str, Spot]]:
    """All histories of a deal."""
    spot = SPOTS[type(game)](cards, history)
    yield history, spot
    for letter in str(cards[2]) if spot.player == CHANCE else spot.legal:
        yield from walk(game, cards, history + letter)


@functools.cache
def all_spots(game: Poker) -> dict[tuple, Spot]:
    return {(cards, history): spot for cards in deals(game) for history, spot in walk(game, cards)}


def letters_of(game: Poker, tokens: np.ndarray) -> str:
    """Tokens of moves and of the public card, as in a history."""
    names = {game.card_token(rank): str(rank) for rank in range(3)} | dict(enumerate(LETTERS[type(game)]))
    return "".join(names[token] for token in tokens.tolist())


def spots_of(game: Poker, state: PokerState, histories: list[str]) -> dict[tuple, Spot]:
    legal = game.legal(state)
    return {(tuple(state.cards[i].tolist()), history): Spot(
        None if state.over[i] else int(state.player[i]),
        "".join(letter for letter, is_legal in zip(LETTERS[type(game)], legal[i]) if is_legal),
        int(state.score[i]) if state.over[i] else None) for i, history in enumerate(histories)}


def next_tokens(game: Poker, state: PokerState) -> tuple[np.ndarray, np.ndarray]:
    """All that can come next: rows and tokens."""
    rows, moves = np.nonzero(game.legal(state))
    chance = np.flatnonzero(state.player == CHANCE)
    return np.concatenate((rows, chance)), np.concatenate((moves, game.chance_tokens(state)[chance]))


# -- rules ------------------------------------------------------------------------------------------------------------

@all_games
def test_all_games_are_those_of_the_slow_rules(game):
    state, found, depth = game.start_with(np.array([*deals(game)], np.int8)), {}, 0
    histories = [""] * len(state.player)
    while histories:
        found |= spots_of(game, state, histories)
        rows, tokens = next_tokens(game, state)
        histories = [histories[row] + letters_of(game, tokens[[i]]) for i, row in enumerate(rows)]
        state, depth = game.play(state.take(rows), tokens), depth + 1
    assert found == all_spots(game)
    assert depth - 1 == game.max_plies
    assert max(spot.score for spot in found.values() if spot.player is None) == game.max_score


@all_games
def test_number_of_games_by_hand(game):
    """A betting round of Leduc ends with a fold in 4 ways, with a call in 5, after each of which there is another round."""
    n = sum(spot.player is None for spot in all_spots(game).values())
    assert n == {Kuhn: 6 * 5, Leduc: 24 * (4 + 5 * 9)}[type(game)]


@all_games
def test_random_games_are_those_of_the_slow_rules(game):
    """Games of which some are at a public card while others are at a move, and some are over earlier."""
    rng, n, slow = np.random.default_rng(0), 500, all_spots(game)
    state, histories = game.start(n, rng), [""] * n
    assert spots_of(game, state, histories).items() <= slow.items()
    while len(state.player):
        rows, tokens = next_tokens(game, state)
        order = rng.permutation(len(rows))
        chosen = order[np.unique(rows[order], return_index=True)[1]]  # a random token of each game
        after = game.play(state, tokens[chosen])
        paid, mover = after.chips - state.chips, state.player
        assert (paid >= 0).all() and not paid[mover != 1, 0].any() and not paid[mover != -1, 1].any()
        histories = [history + letters_of(game, tokens[[i]]) for history, i in zip(histories, chosen)]
        assert spots_of(game, after, histories).items() <= slow.items()
        won = abs(after.score)
        assert ((won == 0) | (won == after.chips.min(1)) & after.over).all()  # from what the other has put in
        going = np.flatnonzero(~after.over)
        state, histories = after.take(going), [histories[row] for row in going]


@all_games
def test_deals_are_random_and_without_replacement(game):
    n, expected = 60_000, deals(game)
    counts = Counter(map(tuple, game.start(n, np.random.default_rng(1)).cards.tolist()))
    assert counts.keys() == expected.keys()
    for cards, p in expected.items():
        assert abs(counts[cards] - n * p) < 5 * (n * p * (1 - p)) ** 0.5, cards
    assert sum(build_tree(type(game)).deals) == pytest.approx(1, abs=1e-12)


def test_a_game_of_leduc_by_hand():
    game = Leduc()
    state = game.start_with(np.array([[1, 2, 1]], np.int8))
    assert game.first_tokens(state).tolist() == [[8, 9]]
    for token in (1, 2, 2, 1):  # check, raise to 3, raise to 5, call
        state = game.play(state, np.array([token]))
    assert game.draw(state, shown=(1,)) == "first   Q  5 in the pot\nsecond  ?  5 in the pot"
    assert game.chance_tokens(state).tolist() == [8] and not game.legal(state).any()
    state = game.play(state, np.array([8]))
    assert game.draw(state) == "first   Q  5 in the pot\nsecond  ?  5 in the pot\npublic  Q"
    for token in (2, 1):  # raise to 9, call
        state = game.play(state, np.array([token]))
    assert state.over.all() and state.score.tolist() == state.result().tolist() == [9]
    assert game.draw(state) == "first   Q  9 in the pot\nsecond  K  9 in the pot\npublic  Q"


def test_after_a_fold_the_cards_stay_hidden():
    game = Kuhn()
    state = game.start_with(np.array([[2, 0]], np.int8))
    for move in (0, 1, 0):
        state = game.play(state, np.array([move]))
    assert state.over.all() and state.score.tolist() == [-1] and state.result().tolist() == [1]  # of the second player
    assert game.draw(state) == "first   ?  1 in the pot\nsecond  ?  2 in the pot"
    assert game.draw(state, shown=(1,)) == "first   K  1 in the pot\nsecond  ?  2 in the pot"


@all_games
def test_tokens_are_numbered_without_gaps(game):
    assert [game.start_token, *game.card_token(np.arange(3))] == [*range(game.n_moves + 3, game.vocab_size)]
    assert [game.move_name(move)[0] for move in range(game.n_moves)] == list(LETTERS[type(game)])
    assert game.symmetries.tolist() == [[*range(game.n_moves)]]


@all_games
def test_no_value_is_claimed_where_cards_are_hidden(game):
    assert (values(game, game.start(5, np.random.default_rng(0))) == UNKNOWN).all()


def test_another_public_card_than_the_one_dealt_cannot_be_revealed():
    game, state = Leduc(), Leduc().start_with(np.array([[0, 1, 2]], np.int8))
    for _ in range(2):
        state = game.play(state, np.array([1]))
    with pytest.raises(AssertionError):
        game.play(state, np.array([game.card_token(0)]))


# -- what a player knows ----------------------------------------------------------------------------------------------

@all_games
@pytest.mark.parametrize("player", [1, -1])
def test_what_a_player_sees_is_the_same_whatever_the_others_card(game, player):
    """All deals played at once, by each history of public tokens: where the own card is the same, so is what is shown, and
    what is legal; the score too, if the game ends with a fold."""
    cards, seat = np.array([*deals(game)], np.int8), 0 if player == 1 else 1
    queue, n_shown = [("", game.start_with(cards))], 0
    while queue:
        history, state = queue.pop()
        legal, seen = game.legal(state), {}
        for i, own in enumerate(state.cards[:, seat].tolist()):
            one = state.take([i])
            view = [game.first_tokens(one)[0, seat], one.player[0], one.over[0], legal[i].tolist(), one.chips[0].tolist(),
                    game.draw(one, shown=(player,))]
            if one.player[0] == player and not one.over[0]:
                view.append(game.draw(one))
                n_shown += 1
            if one.chips[0, 0] != one.chips[0, 1]:
                view.append(one.score[0])
            assert seen.setdefault(own, view) == view, history
        rows, tokens = next_tokens(game, state)
        for token in np.unique(tokens):
            chosen = np.flatnonzero(tokens == token)
            after = game.play(state.take(rows[chosen]), tokens[chosen])
            queue.append((history + letters_of(game, tokens[chosen[:1]]), after))
    assert n_shown


@all_games
def test_information_sets_are_those_of_the_slow_rules(game):
    expected = {f"{cards[0 if spot.player == 1 else 1]}{history}": (spot.player, spot.legal)
                for (cards, history), spot in all_spots(game).items() if spot.player in (1, -1)}
    sets, letters = information_sets(game), LETTERS[type(game)]
    found = {name: (int(player), "".join(letter for letter, is_legal in zip(letters, legal) if is_legal))
             for name, player, legal in zip(set_names(game), sets.player, sets.legal)}
    assert found == expected and len(found) == len(sets.player) == {Kuhn: 12, Leduc: 288}[type(game)]
    assert sets.tokens.shape[1] == sets.lengths.max() == game.max_plies
    assert not any(tokens[n:].any() for tokens, n in zip(sets.tokens, sets.lengths))


# -- values of policies -----------------------------------------------------------------------------------------------

def set_names(game: Poker) -> list[str]:
    """The own card and the history of each information set."""
    sets = information_sets(game)
    return [letters_of(game, tokens[:n]) for tokens, n in zip(sets.tokens, sets.lengths)]


def to_dict(game: Poker, policy: np.ndarray) -> dict[str, dict[str, float]]:
    return {name: dict(zip(LETTERS[type(game)], row)) for name, row in zip(set_names(game), policy.tolist())}


def slow_score(game: Poker, first: dict, second: dict, cards: tuple[int, ...], history: str = "") -> float:
    spot = SPOTS[type(game)](cards, history)
    if spot.player is None:
        return spot.score
    if spot.player == CHANCE:
        return slow_score(game, first, second, cards, f"{history}{cards[2]}")
    moves = first[f"{cards[0]}{history}"] if spot.player == 1 else second[f"{cards[1]}{history}"]
    return sum(moves[letter] * slow_score(game, first, second, cards, history + letter) for letter in spot.legal)


def slow_best_response(game: Poker, policy: dict, player: int, reach: dict[tuple, float], history: str = "") -> float:
    """reach: the deals that the player cannot tell apart -> probability that chance and the other player lead there."""
    own, other = (0, 1) if player == 1 else (1, 0)
    spots = {cards: SPOTS[type(game)](cards, history) for cards in reach}
    spot = next(iter(spots.values()))
    if spot.player is None:
        return sum(player * p * spots[cards].score for cards, p in reach.items())
    if spot.player == CHANCE:
        return sum(slow_best_response(game, policy, player, {cards: p for cards, p in reach.items() if cards[2] == public},
                                      f"{history}{public}") for public in {cards[2] for cards in reach})
    if spot.player == player:
        return max(slow_best_response(game, policy, player, reach, history + letter) for letter in spot.legal)
    return sum(slow_best_response(
        game, policy, player, {cards: p * policy[f"{cards[other]}{history}"][letter] for cards, p in reach.items()},
        history + letter) for letter in spot.legal)


def slow_best_response_value(game: Poker, policy: dict, player: int) -> float:
    own = 0 if player == 1 else 1
    return sum(slow_best_response(game, policy, player, {cards: p for cards, p in deals(game).items() if cards[own] == rank})
               for rank in range(3))


def random_policy(game: Poker, seed: int, concentration: float = 0.5) -> np.ndarray:
    legal = information_sets(game).legal
    drawn = np.random.default_rng(seed).standard_gamma(concentration, legal.shape) * legal
    return drawn / drawn.sum(1, keepdims=True)


def uniform_policy(game: Poker) -> np.ndarray:
    legal = information_sets(game).legal
    return legal / legal.sum(1, keepdims=True)


def always(game: Poker, *preference: int) -> np.ndarray:
    """The first of these moves that is legal."""
    legal = information_sets(game).legal
    chosen = np.array(preference)[legal[:, preference].argmax(1)]
    return np.eye(game.n_moves)[chosen]


@all_games
@pytest.mark.parametrize("seed", range(3))
def test_score_of_two_policies_is_that_of_the_slow_rules(game, seed):
    first, second = random_policy(game, seed), random_policy(game, 10 + seed)
    slow = sum(p * slow_score(game, to_dict(game, first), to_dict(game, second), cards) for cards, p in deals(game).items())
    assert expected_score(game, first, second) == pytest.approx(slow, abs=1e-12)
    assert expected_score(game, first) == pytest.approx(expected_score(game, first, first), abs=0)


@all_games
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("concentration", [0.01, 1.0])  # nearly pure, and mixed
@pytest.mark.parametrize("player", [1, -1])
def test_best_response_is_that_of_the_slow_rules(game, seed, concentration, player):
    policy = random_policy(game, seed, concentration)
    slow = slow_best_response_value(game, to_dict(game, policy), player)
    assert best_response_value(game, policy, player) == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_best_response_in_kuhn_is_the_best_of_all_pure_policies(seed):
    game, policy = Kuhn(), random_policy(Kuhn(), seed)
    fixed, scores = to_dict(game, policy), {1: [], -1: []}
    for player, seat in ((1, 0), (-1, 1)):
        mine = [name for name, who in zip(set_names(game), information_sets(game).player) if who == player]
        assert len(mine) == 6
        for choice in itertools.product("pb", repeat=6):
            pure = {name: {letter: float(letter == chosen) for letter in "pb"} for name, chosen in zip(mine, choice)}
            pair = (pure, fixed) if seat == 0 else (fixed, pure)
            scores[player].append(player * sum(p * slow_score(game, *pair, cards) for cards, p in deals(game).items()))
        assert best_response_value(game, policy, player) == pytest.approx(max(scores[player]), abs=1e-12)
    assert exploitability(game, policy) == pytest.approx((max(scores[1]) + max(scores[-1])) / 2, abs=1e-12)


def test_exploitability_by_hand():
    """Who always passes loses the ante to every bet. Who always bets and calls: a jack folds, a queen is as often ahead as
    behind, a king wins 2, so 1/3 on average, in both seats. Who always folds in Leduc loses the ante in the first seat to
    any raise; in the second seat likewise."""
    game = Kuhn()
    assert exploitability(game, always(game, 0)) == pytest.approx(1, abs=1e-12)
    assert exploitability(game, always(game, 1)) == pytest.approx(1 / 3, abs=1e-12)
    assert exploitability(Leduc(), always(Leduc(), 0, 1)) == pytest.approx(1, abs=1e-12)


def test_exploitability_of_the_uniform_policy():
    """As OpenSpiel has it."""
    assert exploitability(Kuhn(), uniform_policy(Kuhn())) == pytest.approx(11 / 24, abs=1e-12)
    assert exploitability(Leduc(), uniform_policy(Leduc())) == pytest.approx(2.373611111111, abs=1e-11)


# -- equilibria -------------------------------------------------------------------------------------------------------

def kuhn_equilibrium(alpha: float) -> np.ndarray:
    """Of each alpha in 0 to 1/3 one. Source: Kuhn 1950, https://en.wikipedia.org/wiki/Kuhn_poker"""
    bets = {"0": alpha, "1": 0, "2": 3 * alpha, "0pb": 0, "1pb": alpha + 1 / 3, "2pb": 1,
            "0p": 1 / 3, "1p": 0, "2p": 1, "0b": 0, "1b": 1 / 3, "2b": 1}
    return np.array([[1 - bets[name], bets[name]] for name in set_names(Kuhn())])


@pytest.mark.parametrize("alpha", [0, 0.1, 1 / 3])
def test_equilibria_of_kuhn_lose_nothing(alpha):
    game, policy = Kuhn(), kuhn_equilibrium(alpha)
    assert exploitability(game, policy) == pytest.approx(0, abs=1e-12)
    assert expected_score(game, policy) == pytest.approx(-1 / 18, abs=1e-12)


def test_what_is_no_equilibrium_of_kuhn_loses():
    assert exploitability(Kuhn(), kuhn_equilibrium(0.4).clip(0, 1)) > 0.01
    for row in range(12):
        policy = kuhn_equilibrium(0.2)
        policy[row] = policy[row, ::-1].copy()
        assert exploitability(Kuhn(), policy) > 0.01, set_names(Kuhn())[row]


def cfr_plus(game: Poker, iterations: int) -> Iterator[np.ndarray]:
    """Average policies. Source: Tammelin 2014, arXiv:1407.5042: regrets that never fall below 0, players in turn, and the
    iteration's number as its weight in the average."""
    tree, sets = build_tree(type(game)), information_sets(game)
    regrets, total = np.zeros(sets.legal.shape), np.zeros(sets.legal.shape)
    for t in range(1, iterations + 1):
        for player in (1, -1):
            policy = normalized(regrets, sets.legal)
            moves = counterfactual_values(tree, policy, player)
            own = (sets.player == player)[:, None] & sets.legal
            regrets = np.maximum(regrets + np.where(own, moves - (moves * policy).sum(1, keepdims=True), 0), 0)
            reach = np.zeros(len(sets.player))  # by the player's own moves, times that of the own card, which cancels out
            pair = (policy, None) if player == 1 else (None, policy)
            for p, level in zip(reach_probabilities(tree, *pair), tree.levels):
                here = (level.player == player) & (level.information_set >= 0)
                np.add.at(reach, level.information_set[here], p[here])
            total += t * reach[:, None] * policy * own
        yield normalized(total, sets.legal)


def normalized(weights: np.ndarray, legal: np.ndarray) -> np.ndarray:
    weights = np.where(weights.sum(1, keepdims=True) > 0, weights, legal)
    return weights / weights.sum(1, keepdims=True)


def counterfactual_values(tree, policy: np.ndarray, player: int) -> np.ndarray:
    """(sets, n_moves) for the player's own sets."""
    reach = reach_probabilities(tree, *((None, policy) if player == 1 else (policy, None)))
    worth, found = [player * p * level.score for p, level in zip(reach, tree.levels)], np.zeros(policy.shape)
    for depth in reversed(range(1, len(tree.levels))):
        above, level = tree.levels[depth - 1], tree.levels[depth]
        own = (above.player[level.parent] == player) & (level.move >= 0)
        cell = above.information_set[level.parent[own]], level.move[own]
        np.add.at(found, cell, worth[depth][own])
        worth[depth][own] *= policy[cell]
        np.add.at(worth[depth - 1], level.parent, worth[depth])
    return found


@all_games
def test_regret_minimisation_approaches_an_equilibrium(game):
    """The values of the games: -1/18 (Kuhn 1950) and -0.0856 (OpenSpiel)."""
    policies = [*cfr_plus(game, 400)]
    losses = [exploitability(game, policies[t - 1]) for t in (1, 20, 400)]
    assert losses[0] > 10 * losses[1] > 100 * losses[2] and losses[2] < 0.01
    value = {Kuhn: -1 / 18, Leduc: -0.0856}[type(game)]
    assert expected_score(game, policies[-1]) == pytest.approx(value, abs=losses[2] + 1e-4)
