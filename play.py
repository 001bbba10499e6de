"""A game against a model in the terminal; `selfplay.py --play` starts it.

    play_in_terminal(BoardTable(model, game, model_first=False, think=100))
    play_in_terminal(CardTable(model, game, model_first=False))
"""
import contextlib
import sys
from collections.abc import Sequence

import numpy as np
import torch

from experiments.report import align_columns
from model import GPT
from players import Prediction, best_moves, expand, open_positions, predict, search
from tasks.poker import CHANCE, Poker
from tasks.positions import LOSS, WIN, Game, draw_moves, play_line, start_line

HELP = """a move   play it: {moves}
/think   what the model expects of each move
/back    take back your last move
/new     a new game; /new first and /new second say who you are
/quit    or Ctrl-D: leave"""
QUIT = "/quit", "/exit"
NEW_GAMES = {"/new": None, "/new first": False, "/new second": True}  # whether the model moves first; None: as before


class Table:
    """A person's games against a model. state: of the present one. won: what the person has won in each game that is
    finished, 1, 0 or -1, or chips."""

    def __init__(self, model: GPT, game: Game, model_first: bool):
        self.model, self.game, self.model_first = model, game, model_first
        self.won: list[int] = []
        self.reset()

    def reset(self):
        """A new game."""
        raise NotImplementedError

    @property
    def person(self) -> int:
        """1 or -1, as in State."""
        return -1 if self.model_first else 1

    def legal_moves(self) -> dict[str, int]:
        return {self.game.move_name(move): move for move in np.flatnonzero(self.game.legal(self.state)[0]).tolist()}

    def play(self, move: int):
        raise NotImplementedError

    def take_back(self):
        """Back to the person's last move. Raises LookupError that says why where there is none."""
        raise NotImplementedError

    def answer(self) -> int:
        """The model's move."""
        raise NotImplementedError

    def expectations(self) -> list[str]:
        """A table of what the model expects of each move, for the person, who is to move."""
        raise NotImplementedError

    def draw(self) -> str:
        raise NotImplementedError

    def end(self) -> str:
        """Counts the game, which is over, and says who has won."""
        raise NotImplementedError


class BoardTable(Table):
    """think: simulations of the search before each of the model's moves; 0: it plays the move that it finds most probable
    at first sight."""

    def __init__(self, model: GPT, game: Game, model_first: bool, think: int = 0):
        self.think = think
        super().__init__(model, game, model_first)

    def reset(self):
        self.lines = [start_line(self.game, 1)]  # after each move

    @property
    def state(self):
        return self.lines[-1].state

    def play(self, move: int):
        self.lines.append(play_line(self.game, self.lines[-1], np.zeros(1, np.int64), np.array([move])))

    def take_back(self):
        before = [i for i, line in enumerate(self.lines[:-1]) if line.state.player[0] == self.person]
        if not before:
            raise LookupError("there is no move to take back")
        del self.lines[before[-1] + 1:]

    @torch.no_grad()
    def answer(self) -> int:
        positions = open_positions(self.model, self.game, self.lines[-1])
        if self.think:
            return int(best_moves(search(positions, self.think))[0])
        return int(predict(self.game, positions.logits, self.game.legal(self.state)).moves[0].argmax())

    @torch.no_grad()
    def expectations(self) -> list[str]:
        positions = open_positions(self.model, self.game, self.lines[-1])
        moves, ahead = predict(self.game, positions.logits, self.game.legal(self.state)).moves[0], expand(positions)
        columns = [[f"{moves[move]:.1%}", *(f"{p:.1%}" for p in ahead.outcomes[0, move])] for move in range(len(moves))]
        head = "move", "chosen", "loses", "draws", "wins"
        if self.think:
            found, head = search(positions, self.think), (*head, "visits", "search")
            for move, cells in enumerate(columns):
                visits = found.visits[0, move]
                cells += [f"{visits:,}", f"{found.values[0, move]:+.2f}" if visits else "-"]
        best_first = sorted(self.legal_moves().items(), key=lambda named: -ahead.values[0, named[1]])
        return align_columns([head, *((name, *columns[move]) for name, move in best_first)])

    def draw(self) -> str:
        return self.game.draw(self.state)

    def end(self) -> str:
        self.won.append(int(self.state.score[0]) * self.person)
        return {1: "you win", 0: "a draw", -1: "the model wins"}[self.won[-1]]


class CardTable(Table):
    """The model draws its moves from its probabilities: one who always plays the same can be read. seed: None for other
    cards every time."""

    def __init__(self, model: GPT, game: Poker, model_first: bool, seed: int | None = None):
        self.rng = np.random.default_rng(seed)
        super().__init__(model, game, model_first)

    def reset(self):
        self.state = self.game.start(1, self.rng)
        self.public: list[int] = []  # the tokens that both have read

    def play(self, move: int):
        self.read_token(move)
        if not self.state.over[0] and self.state.player[0] == CHANCE:
            self.read_token(int(self.game.chance_tokens(self.state)[0]))

    def read_token(self, token: int):
        self.state = self.game.play(self.state, np.array([token]))
        self.public.append(token)

    def take_back(self):
        raise LookupError("where cards are hidden, nothing is taken back")

    @torch.no_grad()
    def read(self, player: int) -> Prediction:
        """What the model makes of the game in this player's place."""
        own = self.game.first_tokens(self.state)[0, 0 if player == 1 else 1]
        idx = torch.tensor([[int(own), *self.public]], device=self.model.embed.weight.device)
        return predict(self.game, self.model.eager_forward(idx, logits_to_keep=1)[:, 0], self.game.legal(self.state))

    def answer(self) -> int:
        return int(draw_moves(self.read(-self.person).moves, self.rng)[0])

    def expectations(self) -> list[str]:
        prediction = self.read(self.person)
        chosen = prediction.moves[0]
        rows = [("move", "chosen"), *((name, f"{chosen[move]:.1%}") for name, move in self.legal_moves().items())]
        chips = self.game.max_score * (prediction.outcomes[0, WIN] - prediction.outcomes[0, LOSS])
        return [*align_columns(rows), f"in your place, the model expects to win {chips:+.2f} chips"]

    def draw(self) -> str:
        first, second = self.state.chips[0]
        is_showdown = self.state.over[0] and first == second
        return self.game.draw(self.state, (1, -1) if is_showdown else (self.person,))

    def end(self) -> str:
        self.won.append(int(self.state.score[0]) * self.person)
        if not self.won[-1]:
            return "nobody wins"
        n = abs(self.won[-1])
        return f"{'you win' if self.won[-1] > 0 else 'the model wins'} {n} chip{'s' * (n > 1)}"


def play_in_terminal(table: Table):
    """Plays games until the person leaves."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 (arrow keys and history for input())
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print("/help lists commands")
    with contextlib.suppress(EOFError):
        while play_game(table):
            table.reset()
    if table.won:
        n = len(table.won)
        counts = [sum(f(won) for won in table.won) for f in (lambda won: won > 0, lambda won: won == 0, lambda won: won < 0)]
        print("you won {}, drew {} and lost {}".format(*counts) + f" of {n} game{'s' * (n > 1)}")


def play_game(table: Table) -> bool:
    """One game, or less; whether there is to be another. Raises EOFError where the input ends."""
    print(f"you are {'second' if table.model_first else 'first'}\n{table.draw()}")
    while not table.state.over[0]:
        if table.state.player[0] == table.person:
            typed = read_move(table)
            if typed is None or typed in QUIT:
                return typed is None
        else:
            move = table.answer()
            table.play(move)
            print(f"the model plays {table.game.move_name(move)}\n{table.draw()}")
    print(table.end())
    return True


def read_move(table: Table) -> str | None:
    """Reads until the person has moved or taken back a move; returns what was typed, or None for a new game."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip().lower()
        except KeyboardInterrupt:
            print("\n(Ctrl-D quits)")
            continue
        legal = table.legal_moves()
        if text in legal:
            table.play(legal[text])
            print(table.draw())
            return text
        if text in QUIT:
            return text
        if text in NEW_GAMES:
            table.model_first = table.model_first if NEW_GAMES[text] is None else NEW_GAMES[text]
            return None
        run_command(table, text, [*legal])


def run_command(table: Table, text: str, legal: Sequence[str]):
    """Prints what was asked for; anything unknown prints how to move."""
    if text == "/think":
        print("\n".join(table.expectations()))
    elif text == "/help":
        print(HELP.format(moves=" ".join(legal)))
    elif text == "/back":
        try:
            table.take_back()
            print(table.draw())
        except LookupError as error:
            print(f"({error})")
    elif text:
        print(f"({text}: {'no such command: /help lists them' if text.startswith('/') else 'not possible here'}; moves: "
              f"{' '.join(legal)})")
