"""A game against a model in the terminal; `selfplay.py --play` starts it.

    play_in_terminal(model, game, think=100, model_first=False)
"""
import contextlib
import sys

import numpy as np
import torch

from experiments.report import align_columns
from model import GPT
from players import SearchResult, best_moves, expand, open_positions, predict, search
from tasks.positions import Game, Line, play_line, start_line

HELP = """a move   play it: {moves}
/think   what the model expects of each move
/back    take back your last move
/new     a new game; /new first and /new second say who you are
/quit    or Ctrl-D: leave"""
STONES = {1: "X", -1: "O"}


class Quit(Exception):
    """The person leaves."""


class TerminalGame:
    """A person's game against a model. think: simulations of the search before each of its moves; 0: it plays the move that
    it finds most probable at first sight."""

    def __init__(self, model: GPT, game: Game, think: int, model_first: bool):
        self.model, self.game, self.think, self.model_first = model, game, think, model_first
        self.lines: list[Line] = []
        self.results = {1: 0, 0: 0, -1: 0}  # of the person
        self.reset()

    def reset(self):
        self.lines = [start_line(self.game, 1)]  # after each move

    @property
    def line(self) -> Line:
        return self.lines[-1]

    @property
    def person(self) -> int:
        """1 or -1."""
        return -1 if self.model_first else 1

    def is_over(self) -> bool:
        return bool(self.line.state.over[0])

    def play(self, move: int):
        self.lines.append(play_line(self.game, self.line, np.zeros(1, np.int64), np.array([move])))

    def take_back(self) -> bool:
        """Back to the person's last move; False where there is none."""
        before = [i for i, line in enumerate(self.lines[:-1]) if line.state.player[0] == self.person]
        if before:
            del self.lines[before[-1] + 1:]
        return bool(before)

    @torch.no_grad()
    def answer(self) -> int:
        """The model's move."""
        positions = open_positions(self.model, self.game, self.line)
        if self.think:
            return int(best_moves(search(positions, self.think))[0])
        return int(predict(self.game, positions.logits, self.game.legal(self.line.state)).moves[0].argmax())

    @torch.no_grad()
    def expectations(self) -> list[str]:
        """A table of what the model expects of each move, for the player who makes it."""
        positions = open_positions(self.model, self.game, self.line)
        moves = predict(self.game, positions.logits, self.game.legal(self.line.state)).moves[0]
        ahead = expand(positions)
        found = search(positions, self.think) if self.think else None
        rows = [("move", "chosen", "loses", "draws", "wins", *(("visits", "search") if found else ()))]
        for move in np.argsort(-ahead.values[0], kind="stable"):
            if np.isfinite(ahead.values[0, move]):
                rows.append((self.game.move_name(int(move)), f"{moves[move]:.1%}",
                             *(f"{p:.1%}" for p in ahead.outcomes[0, move]), *self.search_columns(found, move)))
        return align_columns(rows)

    def search_columns(self, found: SearchResult | None, move: int) -> tuple[str, ...]:
        if not found:
            return ()
        return f"{found.visits[0, move]:,}", f"{found.values[0, move]:+.2f}" if found.visits[0, move] else ""


def play_in_terminal(model: GPT, game: Game, think: int = 0, model_first: bool = False):
    """Plays games until the person leaves."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 (arrow keys and history for input())
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    table = TerminalGame(model, game, think, model_first)
    print("/help lists commands")
    try:
        while True:
            play_one_game(table)
    except (Quit, EOFError):
        won, drawn, lost = (table.results[result] for result in (1, 0, -1))
        if won + drawn + lost:
            print(f"you won {won}, drew {drawn} and lost {lost}")


def play_one_game(table: TerminalGame):
    """Raises Quit or EOFError where the person leaves."""
    print(f"you are {STONES[table.person]}, and {'second' if table.model_first else 'first'}")
    print(table.game.draw(table.line.state))
    while not table.is_over():
        if table.line.state.player[0] == table.person:
            if not take_turn(table):
                return
        else:
            move = table.answer()
            table.play(move)
            print(f"the model plays {table.game.move_name(move)}\n{table.game.draw(table.line.state)}")
    result = int(table.line.state.score[0]) * table.person
    table.results[result] += 1
    print({1: "you win", 0: "a draw", -1: "the model wins"}[result])
    table.reset()


def take_turn(table: TerminalGame) -> bool:
    """Reads until the person has moved; False where a new game begins."""
    legal = {table.game.move_name(move): move for move in np.flatnonzero(table.game.legal(table.line.state)[0]).tolist()}
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip().lower()
        except KeyboardInterrupt:
            print("\n(Ctrl-D quits)")
            continue
        if text in legal:
            table.play(legal[text])
            print(table.game.draw(table.line.state))
            return True
        if text in ("/quit", "/exit"):
            raise Quit
        if text.split()[:1] == ["/new"]:
            table.model_first = {"first": False, "second": True}.get(text[4:].strip(), table.model_first)
            table.reset()
            return False
        if text == "/back":
            print(table.game.draw(table.line.state) if table.take_back() else "(there is no move to take back)")
            return True
        run_command(table, text, list(legal))


def run_command(table: TerminalGame, text: str, legal: list[str]):
    """Prints what was asked for; anything unknown prints how to move."""
    if text == "/think":
        print("\n".join(table.expectations()))
    elif text == "/help":
        print(HELP.format(moves=" ".join(legal)))
    elif text:
        print(f"({text}: {'no such command: /help lists them' if text.startswith('/') else 'not possible here'}; moves: "
              f"{' '.join(legal)})")
