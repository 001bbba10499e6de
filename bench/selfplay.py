"""Self-play against exact truth: from random weights to play that cannot be beaten, and what each part is worth.

    python bench/selfplay.py --out=runs/selfplay --jobs=2             every stage, about four hours on two cores
    python bench/selfplay.py --out=runs/selfplay --stages tic_tac_toe speed

A stage trains its arms with `selfplay.py` from five seeds each; both sides of a comparison have the same seeds and as many
games. Finished runs are kept, so the same command continues. Writes a table of each stage into docs/benchmarks.md.
"""
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from side_by_side import REPO, estimate, run_stages, train  # noqa: E402

from budget import untrained  # noqa: E402
from experiments.report import Table, markdown  # noqa: E402
from experiments.runner import TrainingJob  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from players import Player, is_best, model_player, search_player, softmax  # noqa: E402
from rollouts import PlayConfig, PlayLoader  # noqa: E402
from runtime.checkpoint import load_checkpoint  # noqa: E402
from strength import make_exam, optimal_rate  # noqa: E402
from tasks.games import make_game  # noqa: E402
from tasks.positions import UNKNOWN, Game  # noqa: E402

SEEDS = range(1, 6)
EPSILON = 0.3                  # of the teacher that errs
THINK = 0, 8, 32, 128          # simulations of a search
LOOP_GAMES = 8                 # of the pure Python loop
CONNECT_FOUR = "--n_layer=4", "--updates=4", "--val_intervals=500", "--max_iter=3000"
# steps at a constant rate after which a model answers about four of ten questions
BRIEFLY_FINETUNED = "--dataset=builtin", "--max_iter=130", "--learning_rate=0.03", "--cooldown_frac=0"
REINFORCE_RATES = 0.0025, 0.005, 0.01, 0.02


# -- runs -------------------------------------------------------------------------------------------------------------

def arm(folder: Path, name: str, *flags: str, after: list[TrainingJob] | None = None,
        script: str = "selfplay.py") -> list[TrainingJob]:
    """A run from each seed. after: those whose models they start from."""
    starts = [(f"--checkpoint_path={job.checkpoint}",) for job in after] if after else [()] * len(SEEDS)
    outcome = ("val_loss",) if script == "finetune.py" else ("entropy",)
    return [TrainingJob(REPO / script, folder / f"{name}-{seed}.pt",
                        (*flags, *start, f"--seed={seed}", "--device=cpu", "--threads=1"), "out_path", outcome,
                        keeps_model=True) for seed, start in zip(SEEDS, starts)]


def game_arm(folder: Path, name: str, *flags: str, after: list[TrainingJob] | None = None) -> list[TrainingJob]:
    return arm(folder, name, *flags, "--rating_games=0", after=after)


def evaluations(job: TrainingJob) -> list[dict]:
    return [row for row in job.rows() if "entropy" in row]


def first(runs: list[TrainingJob], name: str) -> list[float]:
    return [evaluations(run)[0][name] for run in runs]


def last(runs: list[TrainingJob], name: str) -> list[float]:
    return [evaluations(run)[-1][name] for run in runs]


def differences(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b)]


def load(run: TrainingJob) -> GPT:
    return GPT.from_checkpoint(load_checkpoint(run.checkpoint))


# -- stages -----------------------------------------------------------------------------------------------------------

def tic_tac_toe(folder: Path, jobs: int) -> str:
    """Lost lines and optimal moves; what the average of the weights is worth; REINFORCE at the best of several rates as the
    honest baseline."""
    base = "--game=tic_tac_toe", "--val_intervals=50"
    own = game_arm(folder, "tic_tac_toe", *base)
    latest = game_arm(folder, "latest_weights", *base, "--average=0")
    # as many games and, since each of its steps is a rollout, in rollouts of a quarter, as many steps as ours
    tried = {rate: game_arm(folder, f"reinforce_{rate:g}", *base, "--algorithm=reinforce", "--rollout_games=64",
                            f"--learning_rate={rate:g}") for rate in REINFORCE_RATES}
    train(jobs, own, latest, *tried.values())
    rate = max(tried, key=lambda rate: statistics.mean(last(tried[rate], "optimal_moves")))
    rows, baseline = [], f"REINFORCE, role baseline (best of {len(tried)} rates)"
    for name, runs in (("looking one move ahead", own), ("the same, where the latest weights play", latest),
                       (baseline, tried[rate])):
        seconds = [second for run in runs if (second := seconds_to_no_lost_line(run)) is not None]
        reached = f"{len(seconds)} of {len(runs)} seeds" + (f", after {max(seconds):.0f} s at most" if seconds else "")
        lost = [f"{sum(last(runs, f'lost_lines_{side}')):,} of {sum(last(runs, f'lines_{side}')):,}"
                for side in ("first", "second")]
        rows.append((name, f"{last(runs, 'games')[0]:,}", reached, *lost, estimate(last(runs, "optimal_moves"), "{:.4f}"),
                     estimate(last(runs, "value_accuracy"), "{:.4f}")))
    return markdown(Table(("tic-tac-toe", "games", "no lost line any more", "lost lines as first player",
                           "as second", "optimal moves", "right values"), rows))


def seconds_to_no_lost_line(run: TrainingJob) -> float | None:
    """Of training, until the first evaluation from which on none is lost; None where some are at the end."""
    rows = evaluations(run)
    lossy = [i for i, row in enumerate(rows) if row["lost_lines_first"] + row["lost_lines_second"]]
    start = lossy[-1] + 1 if lossy else 0
    return rows[start]["seconds"] if start < len(rows) else None


def connect_four(folder: Path, jobs: int) -> str:
    """Connect Four on 4 x 5, and what a search adds to the trained and to an untrained model."""
    runs = game_arm(folder, "connect_four", "--game=connect_four", "--board=4x5", *CONNECT_FOUR)
    train(jobs, runs)
    game = make_game("connect_four", (4, 5))
    exam = make_exam(game, 400)
    trained = [load(run) for run in runs]
    control = untrained(trained[0])
    unwon = f"{sum(last(runs, 'lost_wins'))} of {sum(last(runs, 'won_openings'))}"
    lines = [("Connect Four 4 x 5", estimate(last(runs, "optimal_moves"), "{:.4f}"),
              estimate(last(runs, "value_accuracy"), "{:.4f}"), estimate(last(runs, "perfect_score")),
              f"{last(runs, 'expected_score')[0]:.3f}", unwon,
              f"{max(last(runs, 'seconds')) / 60:.0f} min at most", f"{last(runs, 'games')[0]:,}")]
    measured = markdown(Table(("game", "optimal moves", "right values", "score against perfect play", "of perfect play",
                                  "won openings not won", "training, one core", "games"), lines))
    searched = [(f"{think} positions read" if think else "at first sight",
                 estimate([optimal_rate(game, player(model, game, think), exam) for model in trained]),
                 f"{optimal_rate(game, player(control, game, think), exam):.3f}") for think in THINK]
    return f"{measured}\n\n{markdown(Table(('before a move', 'optimal moves, trained', 'untrained'), searched))}"


def player(model: GPT, game: Game, think: int) -> Player:
    return search_player(model, game, think) if think else model_player(model, game)


def kuhn(folder: Path, jobs: int) -> str:
    """Exploitability with hidden cards; the plain policy gradient as the control."""
    own = game_arm(folder, "kuhn", "--game=kuhn")
    plain = game_arm(folder, "kuhn_plain", "--game=kuhn", "--regularisation=0")
    train(jobs, own, plain)
    rows = [(name, f"{last(runs, 'games')[0]:,}", estimate(last(runs, "exploitability"), "{:.4f}"),
             f"{max(last(runs, 'exploitability')):.4f}", estimate(last(runs, "first_score"), "{:.4f}"))
            for name, runs in (("regularised policy gradient", own), ("plain policy gradient", plain))]
    return markdown(Table(("Kuhn poker", "games", "exploitability, chips a game", "of the worst seed",
                           "chips of the first player (−0.0556 in equilibrium)"), rows))


def teacher(folder: Path, jobs: int) -> str:
    """A student of a player that errs, and what self-play makes of it."""
    base = "--game=tic_tac_toe", "--val_intervals=50"
    student = game_arm(folder, "student", *base, "--algorithm=imitation", f"--epsilon={EPSILON}", "--games=12_800")
    graduate = game_arm(folder, "graduate", *base, after=student)
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


def answers(folder: Path, jobs: int) -> str:
    """Reinforcement learning of the quick start's model, briefly finetuned, on questions that are built in."""
    pretrained = pretrain(folder)
    before = arm(folder, "finetuned", f"--checkpoint_path={pretrained}", *BRIEFLY_FINETUNED, script="finetune.py")
    after = arm(folder, "answers", "--task=builtin", "--answer_tokens=24", after=before)
    train(jobs, before)
    train(jobs, after)
    rows = []
    for label, name, form in (("exact match, greedy", "exact_match", "{:.3f}"), ("pass@1, sampled", "pass_at_1", "{:.3f}"),
                              ("pass@8, sampled", "pass_at_k", "{:.3f}"), ("tokens in an answer", "mean_length", "{:.2f}"),
                              ("KL divergence from the start, nats/answer", "kl", "{:.2f}")):
        gains = differences(last(after, name), first(after, name))
        rows.append((label, estimate(first(after, name), form), estimate(last(after, name), form),
                     estimate(gains, form.replace(":", ":+"))))
    name = f"built-in questions, held out ({last(after, 'seconds')[0] / 60:.0f} minutes on one core)"
    return markdown(Table((name, "briefly finetuned", "after reinforcement learning", "difference"), rows))


def pretrain(folder: Path) -> Path:
    """The model of README's quick start. Raises SystemExit when a signal stops it or it fails."""
    data = folder / "data"
    job = TrainingJob(REPO / "train.py", folder / "pretrained.pt", ("--preset=quickstart", f"--data_path={data}"),
                      keeps_model=True)
    if not (data / "manifest.json").exists():
        subprocess.run([sys.executable, REPO / "download_data.py", "--dataset=builtin", f"--data_path={data}"], check=True)
    train(1, [job])
    return job.checkpoint


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
    "tic_tac_toe": tic_tac_toe, "teacher": teacher, "speed": speed, "kuhn": kuhn, "connect_four": connect_four,
    "answers": answers}


def main():
    run_stages("bench/selfplay.py", __doc__, STAGES, "Five seeds each, means ± the half-width of their 95 % interval")


if __name__ == "__main__":
    main()
