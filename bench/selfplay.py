"""Self-play against exact truth: from random weights to play that cannot be beaten, and what each part is worth.

    python bench/selfplay.py --out=runs/selfplay --jobs=2             every stage, about four hours on two cores
    python bench/selfplay.py --out=runs/selfplay --stages tic_tac_toe speed

A stage trains its arms with `selfplay.py` from five seeds each; both sides of a comparison have the same seeds and as many
games. Finished runs are kept, so the same command continues. Writes a table of each stage into docs/benchmarks.md.
"""
import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from side_by_side import REPO, machine, write_into_docs  # noqa: E402

from experiments.report import Table, markdown  # noqa: E402
from experiments.runner import JobResult, Runner  # noqa: E402
from experiments.stats import Estimate  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from players import Player, is_best, model_player, search_player, softmax  # noqa: E402
from rollouts import PlayConfig, PlayLoader  # noqa: E402
from runtime.checkpoint import load_checkpoint, run_folder  # noqa: E402
from runtime.files import atomic_write  # noqa: E402
from runtime.metrics import read_rows  # noqa: E402
from runtime.signals import StopSignals  # noqa: E402
from strength import make_exam, optimal_rate  # noqa: E402
from tasks.games import make_game  # noqa: E402
from tasks.positions import UNKNOWN, Game  # noqa: E402

SEEDS = range(1, 6)
EPSILON = 0.3                  # of the teacher that errs
THINK = 0, 8, 32, 128          # simulations of a search
LOOP_GAMES = 8                 # of the pure Python loop
CONNECT_FOUR = "--n_layer=4", "--val_intervals=250", "--max_iter=2500"
REINFORCE_RATES = 0.0025, 0.005, 0.01, 0.02


# -- runs -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PlayRun:
    """A run of selfplay.py, see experiments/runner.py. after: the run whose model it starts from."""
    folder: Path
    name: str
    seed: int
    flags: tuple[str, ...]
    after: "PlayRun | None" = None
    script: Path = REPO / "selfplay.py"

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}-{self.seed}.pt"

    @property
    def rows(self) -> list[dict]:
        """Of its evaluations."""
        return [row for row in read_rows(run_folder(self.checkpoint) / "metrics.jsonl") if "entropy" in row]

    @property
    def marker(self) -> Path:
        return run_folder(self.checkpoint) / "finished.json"

    def all_flags(self) -> list[str]:
        start = [f"--checkpoint_path={self.after.checkpoint}"] if self.after else []
        return [*self.flags, *start, f"--seed={self.seed}", "--device=cpu", "--threads=1", "--rating_games=0"]

    def previous_result(self) -> JobResult | None:
        if self.marker.exists() and json.loads(self.marker.read_text()) == self.all_flags():
            return JobResult("finished")
        return None

    def command(self) -> list[str]:
        flags = ["--resume_checkpoint"] if self.checkpoint.exists() and not self.marker.exists() else [
            *self.all_flags(), "--overwrite"]
        return [sys.executable, str(self.script), f"--out_path={self.checkpoint}", *flags, "--verbose=0"]

    def complete(self, result: JobResult) -> JobResult:
        if result.status == "finished":
            with atomic_write(self.marker, "w") as file:
                json.dump(self.all_flags(), file)
        return result


def arm(folder: Path, name: str, *flags: str, after: list[PlayRun] | None = None) -> list[PlayRun]:
    """A run from each seed."""
    return [PlayRun(folder, name, seed, flags, after[i] if after else None) for i, seed in enumerate(SEEDS)]


def train(jobs: int, *arms: list[PlayRun]):
    """Raises SystemExit when a signal stops it or a run fails."""
    runs = [run for seed_runs in zip(*arms) for run in seed_runs]
    with StopSignals() as stop:
        results = Runner(jobs, stop).run(runs, "runs", lambda i, result: None)
    for run, result in zip(runs, results):
        if result.status != "finished":
            raise SystemExit(f"{run.name} of seed {run.seed}: {result.status} {result.reason}")


def last(runs: list[PlayRun], name: str) -> list[float]:
    return [run.rows[-1][name] for run in runs]


def estimate(numbers: list[float], form: str = "{:.3f}") -> str:
    found = Estimate.from_values(numbers)
    return f"{form.format(found.mean)} ± {form.format(found.margin)}"


def differences(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def load(run: PlayRun) -> GPT:
    return GPT.from_checkpoint(load_checkpoint(run.checkpoint))


# -- stages -----------------------------------------------------------------------------------------------------------

def tic_tac_toe(folder: Path, jobs: int) -> str:
    """Lost lines and optimal moves; REINFORCE at the best of several rates as the honest baseline."""
    base = "--game=tic_tac_toe", "--val_intervals=50"
    own = arm(folder, "tic_tac_toe", *base)
    # as many games and, since each of its steps is a rollout, in rollouts of a quarter, as many steps as ours
    tried = {rate: arm(folder, f"reinforce_{rate:g}", *base, "--algorithm=reinforce", "--rollout_games=64",
                       f"--learning_rate={rate:g}") for rate in REINFORCE_RATES}
    train(jobs, own, *tried.values())
    rate = max(tried, key=lambda rate: statistics.mean(last(tried[rate], "optimal_moves")))
    rows, baseline = [], f"REINFORCE, role baseline (best of {len(tried)} rates)"
    for name, runs in (("looking one move ahead", own), (baseline, tried[rate])):
        seconds = [seconds_to_no_lost_line(run) for run in runs]
        reached = f"{max(seconds):.0f} s at most, {statistics.mean(seconds):.0f} s on average" if None not in seconds else (
            f"{sum(second is not None for second in seconds)} of {len(seconds)} seeds")
        lost = [f"{sum(last(runs, f'lost_lines_{side}')):,} of {sum(last(runs, f'lines_{side}')):,}"
                for side in ("first", "second")]
        rows.append((name, f"{runs[0].rows[-1]['games']:,}", reached, *lost, estimate(last(runs, "optimal_moves"), "{:.4f}"),
                     estimate(last(runs, "value_accuracy"), "{:.4f}")))
    return markdown(Table(("tic-tac-toe", "games", "first evaluation without a lost line", "lost lines as first player",
                           "as second", "optimal moves", "right values"), rows))


def seconds_to_no_lost_line(run: PlayRun) -> float | None:
    """Of training, until the first evaluation without one."""
    return next((row["seconds"] for row in run.rows if row["lost_lines_first"] + row["lost_lines_second"] == 0), None)


def connect_four(folder: Path, jobs: int) -> str:
    """Connect Four on 4 x 5, and what a search adds to the trained and to an untrained model."""
    runs = arm(folder, "connect_four", "--game=connect_four", "--board=4x5", *CONNECT_FOUR)
    train(jobs, runs)
    game = make_game("connect_four", (4, 5))
    exam = make_exam(game, 400)
    trained = [load(run) for run in runs]
    torch.manual_seed(0)
    untrained = GPT(trained[0].config)
    unwon = f"{sum(last(runs, 'lost_wins'))} of {sum(last(runs, 'won_openings'))}"
    lines = [("Connect Four 4 x 5", estimate(last(runs, "optimal_moves"), "{:.4f}"),
              estimate(last(runs, "value_accuracy"), "{:.4f}"), estimate(last(runs, "perfect_score")),
              f"{last(runs, 'expected_score')[0]:.3f}", unwon,
              f"{max(last(runs, 'seconds')) / 60:.0f} min at most", f"{runs[0].rows[-1]['games']:,}")]
    first = markdown(Table(("game", "optimal moves", "right values", "score against perfect play", "of perfect play",
                            "won openings not won", "training, one core", "games"), lines))
    searched = [(f"{think} positions read" if think else "at first sight",
                 estimate([optimal_rate(game, player(model, game, think), exam) for model in trained]),
                 f"{optimal_rate(game, player(untrained, game, think), exam):.3f}") for think in THINK]
    return f"{first}\n\n{markdown(Table(('before a move', 'optimal moves, trained', 'untrained'), searched))}"


def player(model: GPT, game: Game, think: int) -> Player:
    return search_player(model, game, think) if think else model_player(model, game)


def kuhn(folder: Path, jobs: int) -> str:
    """Exploitability with hidden cards; the plain policy gradient as the control."""
    own = arm(folder, "kuhn", "--game=kuhn")
    plain = arm(folder, "kuhn_plain", "--game=kuhn", "--regularisation=0")
    train(jobs, own, plain)
    rows = [(name, f"{runs[0].rows[-1]['games']:,}", estimate(last(runs, "exploitability"), "{:.4f}"),
             f"{max(last(runs, 'exploitability')):.4f}", estimate(last(runs, "first_score"), "{:.4f}"))
            for name, runs in (("regularised policy gradient", own), ("plain policy gradient", plain))]
    return markdown(Table(("Kuhn poker", "games", "exploitability, chips a game", "of the worst seed",
                           "chips of the first player (−0.0556 in equilibrium)"), rows))


def teacher(folder: Path, jobs: int) -> str:
    """A student of a player that errs, and what self-play makes of it."""
    base = "--game=tic_tac_toe", "--val_intervals=50"
    student = arm(folder, "student", *base, "--algorithm=imitation", f"--epsilon={EPSILON}", "--games=12_800")
    graduate = arm(folder, "graduate", *base, after=student)
    train(jobs, student)
    train(jobs, graduate)
    game = make_game("tic_tac_toe")
    exam = make_exam(game)
    found = np.concatenate([question.values for question in exam])
    best, n_legal = is_best(found), (found != UNKNOWN).sum(1)
    errs = float((1 - EPSILON + EPSILON * best.sum(1) / n_legal).mean())
    gains = differences(last(graduate, "optimal_moves"), [errs] * len(graduate))
    rows = [(f"teacher: a random move with probability {EPSILON}", f"{errs:.4f}", ""),
            ("student, of the teacher's games alone", estimate(last(student, "optimal_moves"), "{:.4f}"), ""),
            ("then self-play", estimate(last(graduate, "optimal_moves"), "{:.4f}"), estimate(gains, "{:+.4f}"))]
    return markdown(Table(("tic-tac-toe", "optimal moves", "minus the teacher's"), rows))


def speed(folder: Path, jobs: int) -> str:
    """Games a second in batches with the cache, against one game at a time in plain Python with the same network."""
    torch.set_num_threads(1)
    rows = []
    for name, board in (("tic_tac_toe", None), ("connect_four", (4, 5))):
        game = make_game(name, board)
        torch.manual_seed(0)
        model = GPT(GPTConfig(n_layer=2, n_head=4, head_size=16, block_size=game.max_plies + 1, vocab_size=game.vocab_size))
        loader = PlayLoader(game, PlayConfig(algorithm="search", random_plies=0), seed=0)
        ours, loop = [], []
        for _ in range(6):
            loader.statistics.games, loader.statistics.seconds = 0, 0.0
            loader.play(model)
            ours.append(loader.statistics.games / loader.statistics.seconds)
            start = time.perf_counter()
            for seed in range(LOOP_GAMES):
                play_in_a_loop(model, game, np.random.default_rng(seed))
            loop.append(LOOP_GAMES / (time.perf_counter() - start))
        ours, loop = statistics.median(ours[1:]), statistics.median(loop[1:])  # the first warms up
        rows.append((name, f"{ours / loop:.1f}", f"{ours:,.0f}", f"{loop:,.1f}"))
    return markdown(Table(("games a second, one core", "ours / loop", "ours", "loop"), rows))


@torch.no_grad()
def play_in_a_loop(model: GPT, game: Game, rng: np.random.Generator):
    """One game, looking one move ahead: every position that a move leads to is read from its start."""
    history, state = [], game.start(1)
    while not state.over[0]:
        moves, found = np.flatnonzero(game.legal(state)[0]).tolist(), []
        for move in moves:
            child = game.play(state, np.array([move]))
            if child.over[0]:
                found.append(-float(child.result()[0]))
                continue
            logits = model.eager_forward(torch.tensor([[game.start_token, *history, move]]), logits_to_keep=1)[0, -1]
            loses, _, wins = logits[game.n_moves:game.n_moves + 3].softmax(0).tolist()
            found.append(loses - wins)
        weights = softmax(np.array(found) / 0.1)
        history.append(moves[int(rng.choice(len(moves), p=weights))])
        state = game.play(state, np.array(history[-1:]))


STAGES: dict[str, Callable[[Path, int], str]] = {
    "tic_tac_toe": tic_tac_toe, "teacher": teacher, "speed": speed, "kuhn": kuhn, "connect_four": connect_four}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=tuple(STAGES))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        text = STAGES[name](args.out, args.jobs)
        print(f"{text}\n")
        with atomic_write(args.out / f"{name}.md", "w") as file:
            file.write(text + "\n")
    found = [(args.out / f"{name}.md").read_text() for name in STAGES if (args.out / f"{name}.md").exists()]
    note = (f"Five seeds each, means ± the half-width of their 95 % interval; every run has one thread; {machine()}: "
            f"`python bench/selfplay.py --out=runs/selfplay --jobs=2`.")
    write_into_docs("bench/selfplay.py", "\n".join([*found, note]))


if __name__ == "__main__":
    main()
