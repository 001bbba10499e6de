"""Self-play with hidden cards: what each player reads, what is learnt of it, and how exploitable the result is."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import selfplay
from conftest import tiny_player
from play import CardTable, play_in_terminal
from rollouts import GameDraws, Memory, PlayConfig, WeightAverage, play_hidden, regularised_rollout
from strength import measure_policy, policy_table
from tasks.games import GAMES
from tasks.poker import CHANCE, Kuhn, Leduc, exploitability, information_sets

HIDDEN = [game_class() for game_class in GAMES.values() if game_class.has_hidden_cards]


@pytest.fixture(params=HIDDEN, ids=lambda game: type(game).__name__)
def game(request):
    return request.param


@torch.no_grad()
def deal_and_play(game, n=64, seed=0, model=None):
    return play_hidden(model or tiny_player(game), game, GameDraws.of(game, n, np.random.default_rng(seed)))


def replay(game, hand, i):
    """Plays game i of a hand again from its own record; yields (ply, state before it)."""
    first, second = hand.rollout.ids[2 * i], hand.rollout.ids[2 * i + 1]
    cards = [first[0], second[0]] + [token for token in first[1:] if token >= game.card_token(0)]
    ranks = [int(card) - game.card_token(0) for card in cards]
    ranks += [0] * (game.n_dealt - len(ranks))  # never revealed
    state = game.start_with(np.array([ranks], np.int8))
    for ply in range(game.max_plies):
        if state.over[0]:
            return
        yield ply, state
        moves = [int(hand.moves[row, ply]) for row in (2 * i, 2 * i + 1) if hand.moves[row, ply] >= 0]
        token = int(game.chance_tokens(state)[0]) if state.player[0] == CHANCE else moves[0]
        state = game.play(state, np.array([token]))
    assert state.over[0] and state.score[0] == hand.score[i]


def test_both_players_read_the_same_but_for_their_cards(game):
    hand = deal_and_play(game)
    first, second = hand.rollout.ids[::2], hand.rollout.ids[1::2]
    assert (first[:, 1:] == second[:, 1:]).all() and (first[:, 0] >= game.card_token(0)).all()
    assert (first[:, 0] != second[:, 0]).any()


def test_every_game_is_one_by_the_rules(game):
    hand, n_decisions = deal_and_play(game), 0
    for i in range(64):
        for ply, state in replay(game, hand, i):
            legal = game.legal(state)[0]
            for side, row in ((1, 2 * i), (-1, 2 * i + 1)):
                is_own = bool(legal.any()) and state.player[0] == side
                assert (hand.moves[row, ply] >= 0) == is_own
                if is_own:
                    assert (hand.rollout.legal[row, ply] == legal).all() and legal[hand.moves[row, ply]]
                    n_decisions += 1
    assert n_decisions == (hand.moves >= 0).sum() > 128


@torch.no_grad()
def test_probabilities_of_a_cached_hand_are_those_of_the_training_pass(game):
    model = tiny_player(game)
    hand = deal_and_play(game, model=model)
    logits = model(torch.from_numpy(hand.rollout.ids))[..., :game.n_moves]
    legal, own = torch.from_numpy(hand.rollout.legal), hand.moves >= 0
    logprobs = F.log_softmax(logits.masked_fill(~legal, -1e9), -1).exp().numpy()
    np.testing.assert_allclose(hand.move_probabilities[own], logprobs[own], atol=1e-5)


def test_moves_are_drawn_as_often_as_they_are_probable():
    game, model = Kuhn(), tiny_player(Kuhn())
    hand, n = deal_and_play(game, 4000, model=model), 0
    for row in range(3):
        card = game.card_token(row)
        mine = (hand.rollout.ids[::2, 0] == card)
        p = hand.move_probabilities[::2][mine][0, 0, 1]
        n = mine.sum()
        assert abs((hand.moves[::2][mine][:, 0] == 1).mean() - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-9


# -- what is learnt ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def regularised(game, model, memory, **flags):
    config = PlayConfig(algorithm="regularised", **flags)
    return regularised_rollout(model, game, config, GameDraws.of(game, 16, np.random.default_rng(0)), memory)


def test_without_regularisation_it_is_the_plain_policy_gradient():
    """One-hot moves times chips above what the model expected."""
    game, model = Kuhn(), tiny_player(Kuhn())
    played, hand = regularised(game, model, Memory(None), regularisation=0.0), deal_and_play(game, 16, model=model)
    sides = np.tile([1, -1], 16)
    for row, ply in zip(*np.nonzero(hand.moves >= 0)):
        won = hand.score[row // 2] * sides[row]
        expected = np.zeros(2)
        expected[hand.moves[row, ply]] = won - 2 * hand.values[row, ply]
        np.testing.assert_allclose(played.rollout.moves[row, ply], expected, atol=1e-6)
        win = 0.5 + won / 4
        np.testing.assert_allclose(played.rollout.outcomes[row, ply], [1 - win, 0, win], atol=1e-6)
    assert not played.rollout.moves[hand.moves < 0].any() and not played.rollout.outcomes[hand.moves < 0].any()


def test_a_model_that_is_its_own_reference_pays_nothing(game):
    model = tiny_player(game)
    with_cost, without = (regularised(game, model, Memory(None), regularisation=eta) for eta in (0.5, 0.0))
    np.testing.assert_allclose(with_cost.rollout.moves, without.rollout.moves, atol=1e-6)


def test_straying_from_the_average_is_held_back_by_the_gradient_of_the_divergence():
    """By hand: Kuhn, where the average plays uniformly and the model does not."""
    game, model = Kuhn(), tiny_player(Kuhn())
    memory = Memory(WeightAverage(0.9))
    memory.average.weights = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    played, hand = regularised(game, model, memory, regularisation=0.5), deal_and_play(game, 16, model=model)
    for row, ply in zip(*np.nonzero(hand.moves >= 0)):
        p, side = hand.move_probabilities[row, ply], 1 if row % 2 == 0 else -1
        weights = -0.5 * p * (np.log(2 * p) - p @ np.log(2 * p))  # -0.5 * dKL(p, uniform) / dlogits
        weights[hand.moves[row, ply]] += side * hand.score[row // 2] - 2 * hand.values[row, ply]
        np.testing.assert_allclose(played.rollout.moves[row, ply], weights, atol=1e-5)


# -- how well it plays ------------------------------------------------------------------------------------------------

def test_a_policy_table_is_what_the_model_reads_in_each_set(game):
    model, sets = tiny_player(game), information_sets(game)
    table = policy_table(model, game)
    for i in range(0, len(sets.lengths), 7):
        with torch.no_grad():
            logits = model(torch.from_numpy(sets.tokens[i:i + 1, :sets.lengths[i]]))[0, -1, :game.n_moves]
        expected = logits.masked_fill(~torch.from_numpy(sets.legal[i]), -torch.inf).softmax(0)
        np.testing.assert_allclose(table[i], expected.numpy(), atol=1e-5)
    row = measure_policy(model, game)
    assert row["exploitability"] == exploitability(game, table) > 0


# -- whole runs -------------------------------------------------------------------------------------------------------

TINY = ["--game=kuhn", "--n_layer=1", "--n_head=2", "--head_size=8", "--rollout_games=16", "--val_intervals=3",
        "--log_intervals=1", "--warmup_iter=1", "--verbose=0", "--device=cpu", "--threads=0"]


@pytest.mark.parametrize("flags, words", [
    (["--game=kuhn", "--algorithm=search"], ["--algorithm=search", "cards are hidden", "regularised"]),
    (["--game=nim", "--algorithm=regularised"], ["--algorithm=regularised", "no cards are hidden"]),
    (["--game=kuhn", "--board=3"], ["--board=3", "kuhn has no board"]),
    (["--game=kuhn", "--random_plies=2"], ["--random_plies=2", "no effect"])])
def test_bad_input_is_one_line(refused, tmp_path, flags, words):
    refused(selfplay.main, [*flags, f"--out_path={tmp_path / 'a.pt'}", "--max_iter=1"], *words)


def test_cards_in_the_terminal(game, monkeypatch, capsys):
    table, typed = CardTable(tiny_player(game), game, False, seed=1), iter(["/think", "/back", "?", *["/quit"] * 9])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    play_in_terminal(table)
    shown = capsys.readouterr().out
    assert "you are first" in shown and "in your place, the model expects to win" in shown
    assert "(where cards are hidden, nothing is taken back)" in shown and "second  ?" in shown


def test_leduc_reveals_its_card_to_both(monkeypatch):
    table = CardTable(tiny_player(Leduc()), Leduc(), False, seed=1)
    table.play(1)
    table.play(1)
    assert table.state.round[0] == 1 and table.public[-1] >= Leduc().card_token(0) and "public" in table.draw()
    assert table.state.player[0] == 1 and len(table.public) == 3
