"""Exact truth, against that of other programs: BitBully for Connect Four on 6x7, OpenSpiel for poker."""
import numpy as np
import pytest

from tasks.games import ConnectFour
from tasks.poker import Kuhn, Leduc, best_response_value, expected_score, exploitability, information_sets
from tasks.positions import first_of_each, random_line

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("n_empty, n", [(24, 20), (20, 100), (14, 200), (6, 2000)])
def test_values_of_connect_four_on_6x7_are_those_of_bitbully(n_empty, n):
    bitbully = pytest.importorskip("bitbully")
    game, solver = ConnectFour((6, 7)), bitbully.BitBully(opening_book=None)
    line = random_line(game, n, 42 - n_empty, np.random.default_rng(n_empty))
    line = line.take(first_of_each(line.state))
    line = line.take(~line.state.over)
    found = game.solve(line.state)
    for history, value in zip(line.history.tolist(), found):
        board = bitbully.Board([move % 7 for move in history])
        assert np.sign(solver.negamax(board)) == value, history
    assert len(found) > 10 and len({*found.tolist()}) > 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("game, name", [(Kuhn(), "kuhn_poker"), (Leduc(), "leduc_poker")])
def test_what_policies_of_poker_win_is_what_openspiel_says(game, name, seed):
    pyspiel = pytest.importorskip("pyspiel")
    from open_spiel.python.algorithms.best_response import BestResponsePolicy
    from open_spiel.python.algorithms.exploitability import exploitability as openspiel_exploitability
    from open_spiel.python.policy import TabularPolicy
    sets, rng = information_sets(game), np.random.default_rng(seed)
    policy = rng.dirichlet(np.ones(game.n_moves), len(sets.player)) * sets.legal
    policy /= policy.sum(1, keepdims=True)
    row_of = {tuple(tokens[:n].tolist()): row for row, (tokens, n) in enumerate(zip(sets.tokens, sets.lengths))}
    other = pyspiel.load_game(name)
    table = TabularPolicy(other)
    for state, row in zip(table.states, table.action_probability_array):
        row[:] = policy[row_of[what_is_read(game, state)]]
    assert len(table.states) >= len(row_of)
    assert exploitability(game, policy) == pytest.approx(openspiel_exploitability(other, table))
    for seat, player in ((0, 1), (1, -1)):
        response = BestResponsePolicy(other, seat, table)
        assert best_response_value(game, policy, player) == pytest.approx(response.value(other.new_initial_state()))
    assert expected_score(game, policy) == pytest.approx(mean_score(other.new_initial_state(), table))


def what_is_read(game, state) -> tuple[int, ...]:
    """The tokens of the player to move. state: of OpenSpiel, whose first two chance actions are cards of the players."""
    taken = [(step.player, step.action) for step in state.full_history()]
    cards, later = [action for _, action in taken[:2]], taken[2:]
    return (int(game.card_token(cards[state.current_player()] // game.n_suits)),
            *(int(game.card_token(action // game.n_suits)) if player < 0 else action for player, action in later))


def mean_score(state, table) -> float:
    """Of the first player, over all games."""
    if state.is_terminal():
        return state.returns()[0]
    chances = state.chance_outcomes() if state.is_chance_node() else table.action_probabilities(state).items()
    return sum(p * mean_score(state.child(action), table) for action, p in chances if p)
