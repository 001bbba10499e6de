"""Trains a model by what it finds out itself: games against itself, or answers that can be checked.

    python selfplay.py --game=tic_tac_toe             from random weights to play that cannot be beaten
    python selfplay.py --game=tic_tac_toe --play      plays against the model that this has trained

The loop is trainer.py's; rollouts.py makes the batches, and strength.py measures how well the model plays. The folder named
after the checkpoint holds metrics.jsonl, models of earlier steps with their matches, and at the end selfplay.html.
"""
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments.play_plots import draw_play
from experiments.report import Figure, Table, markdown, write_page
from grpo import AnswerConfig, SelfPlayOptimizer, open_answer_run, report_answers
from model import GPT, GPTConfig
from play import BoardTable, CardTable, play_in_terminal
from players import (
    check_context,
    context_of,
    describe_game,
    game_flags,
    game_title,
    load_player,
    model_player,
    open_game,
)
from rollouts import ALGORITHMS, PlayConfig, PlayLoader, Rollout, play_loss
from runtime.checkpoint import load_checkpoint, run_folder, save_checkpoint
from runtime.cli import command, log_line, say
from runtime.config import BadInput, check_flags, flag, flag_names, read_flags, redeclare
from runtime.device import DeviceConfig, open_machine, seed_everything
from runtime.distributed import join
from runtime.files import atomic_write, read_json_lines
from runtime.metrics import read_rows
from runtime.run import STOP_FLAGS, TrainingCommand, override_horizon
from strength import (
    Match,
    Question,
    fit_elo,
    lost_lines,
    make_exam,
    measure_policy,
    play_match,
    score_against_perfect,
    take_exam,
)
from tasks.games import GAMES, parse_board
from tasks.positions import Game
from trainer import (
    Evaluation,
    LoopConfig,
    Run,
    RunFlags,
    TrainSetup,
    TrainState,
    describe_machine,
    dry_run_step,
    open_output,
    restore_state,
    train_command,
)

WHAT_TO_LEARN = ("--game: say what to learn, such as --game=tic_tac_toe, or --task=builtin for answers that can be checked; "
                 "to resume a run, its --out_path is enough")
ANSWERING_MODEL = Path("checkpoints/gpt_finetuned.pt")
ANSWER_STEPS = 400
MAX_OPPONENTS = 4       # earlier models that one is matched with
MAX_SNAPSHOTS = 16      # of earlier models that are kept
PERFECT_GAMES = 400     # against a perfect opponent
COLLAPSED_GAMES = 0.1   # fraction of games that differ, at or below which play has collapsed
WELL_PLAYED = 0.99      # optimal moves above which it has not: good play may be narrow
COLLAPSED_ENTROPY = 0.02  # of moves, nats, where cards are hidden


@dataclass(frozen=True)
class SelfPlayConfig(RunFlags):
    """The run."""
    game: str = flag(None, f"the game to learn: {', '.join(GAMES)}", scope="shared")
    board: str = flag(None, "its size, sides or heaps joined by x: 4x5 of connect_four is 4 rows of 5 columns, 3x4x5 of nim "
                            "three heaps (default: the game's own)", scope="shared")
    checkpoint_path: Path = flag(None, "the model to start from, or with --play to play against (default: random weights "
                                       "for games, checkpoints/gpt_finetuned.pt for answers; with --play, --out_path)",
                                 scope="run")
    out_path: Path = flag(None, "checkpoint to write; metrics go into the folder of its name (default: the game's name in "
                                "checkpoints; for answers --checkpoint_path with _selfplay added to its name)",
                          on_resume="unsaved", scope="run")
    play: bool = flag(False, "train nothing: play against the model in the terminal", on_resume="unsaved", scope="run")
    model_first: bool = flag(False, "with --play, the model moves first", on_resume="unsaved", scope="run")
    think: int = flag(0, "with --play, positions that the model reads in a search before a move; 0: none", at_least=0,
                      at_most=1_000_000, on_resume="unsaved", scope="run")
    rating_games: int = flag(100, "for Elo ratings, about so many games against each of some earlier models at a "
                                  "validation; 0: none", at_least=0, at_most=100_000, on_resume="free", scope="run")
    seed: int = flag(1337, "random seed of the initial weights, the games and the answers", at_least=0, at_most=2**63 - 1,
                     scope="run")
    __post_init__ = check_flags


@dataclass(frozen=True)
class PlayerModel(GPTConfig):
    """The model, where it starts from random weights."""
    n_layer: int = redeclare(GPTConfig, "n_layer", 2)
    n_head: int = redeclare(GPTConfig, "n_head", 4)
    head_size: int = redeclare(GPTConfig, "head_size", 16)
    # whose stone one is depends on whether its position is odd, which rotary angles hardly show
    positions: str = redeclare(GPTConfig, "positions", "learned")
    block_size: int = redeclare(GPTConfig, "block_size", None, help="context length in tokens, at least one more than the "
                                                                    "longest game has moves (default: just that)")

    def __post_init__(self):
        if self.sampled_loops:
            raise BadInput("--sampled_loops: a player learns with the number of loops that it plays with: leave it out")
        if self.block_size is not None:  # unset where there is no game
            super().__post_init__()


@dataclass(frozen=True)
class SelfPlayLoop(LoopConfig):
    """How long to train and how often to validate."""
    max_iter: int = redeclare(LoopConfig, "max_iter", None, help="optimizer steps; of several limits the first to be "
                                                                 "reached ends the run (default: --games, or for answers "
                                                                 f"{ANSWER_STEPS})")
    num_batch_accum: int = redeclare(LoopConfig, "num_batch_accum", 1)
    val_intervals: int = redeclare(LoopConfig, "val_intervals", 100)
    __post_init__ = check_flags  # unlike LoopConfig's, leaves max_iter unset, for --games to decide


@dataclass(frozen=True)
class SelfPlayDevice(DeviceConfig):
    """The device."""
    dtype: str = redeclare(DeviceConfig, "dtype", "fp32", help="dtype of matrix products; in fp32 what is sampled with the "
                                                               "cache has the probabilities that are trained on; auto: the "
                                                               "fastest that the device supports natively")


class SelfPlayConfigs(NamedTuple):
    """The flags of selfplay.py."""
    run: SelfPlayConfig
    play: PlayConfig
    answers: AnswerConfig
    model: PlayerModel
    optimizer: SelfPlayOptimizer
    loop: SelfPlayLoop
    device: SelfPlayDevice


def describe_memory(values: dict) -> str:
    """See TrainingCommand."""
    if values["task"]:
        return (f"--questions={values['questions']} x --samples={values['samples']} answers of "
                f"--answer_tokens={values['answer_tokens']}")
    searched = f" with --simulations={values['simulations']}" * (values["search"] == "puct")
    return f"--rollout_games={values['rollout_games']}{searched}, --batch_size={values['batch_size']} games"


SELFPLAY = TrainingCommand("selfplay.py", "Trains a model by games against itself, or by answers that can be checked.",
                           SelfPlayConfigs, "out_path", describe_memory)
GAME_FLAGS = flag_names(PlayConfig, PlayerModel) | {"board", "play", "model_first", "think", "rating_games"}
TERMINAL_FLAGS = {"game", "board", "checkpoint_path", "out_path", "play", "model_first", "think", "seed", "device", "dtype",
                  "deterministic"}  # that --play reads


def resolve_flags(start: dict, given: dict) -> dict:
    """The values of all flags. start: {} or the flags of the resumed run. Raises BadInput for one without effect."""
    values = override_horizon(SELFPLAY.defaults() | start, given)
    if values["game"] and values["task"]:
        raise BadInput(f"--task={values['task']}: is no part of --game={values['game']}: give one of the two")
    if values["game"] or values["task"]:
        return (resolve_answer_flags if values["task"] else resolve_game_flags)(values, given)
    raise BadInput(WHAT_TO_LEARN)


def resolve_answer_flags(values: dict, given: dict) -> dict:
    refuse_flags(given, GAME_FLAGS, "has no effect with --task")
    has_end = any(values[name] for name in STOP_FLAGS)
    return values | {"checkpoint_path": values["checkpoint_path"] or ANSWERING_MODEL,
                     "max_iter": values["max_iter"] if has_end else ANSWER_STEPS}


def resolve_game_flags(values: dict, given: dict) -> dict:
    refuse_flags(given, flag_names(AnswerConfig), "has no effect without --task")
    refuse_flags(given, {"think", "model_first"}, "has no effect without --play")
    refuse_flags(given, {"vocab_size"}, "follows from the game")
    game = open_game(values["game"], values["board"])
    play = read_flags(PlayConfig, values).for_game(game)
    name = play.algorithm
    if name == "imitation" and not game.solvable(game.start(1))[0]:
        raise BadInput(f"--algorithm=imitation: needs perfect play to imitate, and {game_title(values['game'], game.board)} "
                       f"is not solved from the start: give a smaller --board, or leave it out")
    algorithm, own = ALGORITHMS[name], set().union(*(other.flags for other in ALGORITHMS.values()))
    refuse_flags(given, own - algorithm.flags, f"has no effect with --algorithm={name}")
    refuse_flags(given, {"simulations"} if values["search"] == "one_ply" else {"target_temperature"},
                 f"has no effect with --search={values['search']}")
    if values["checkpoint_path"]:
        refuse_flags(given, flag_names(PlayerModel), "has no effect with --checkpoint_path, whose model is trained on")
    auto = {"block_size": context_of(game), "optimizer": "muon", "learning_rate": algorithm.learning_rate,
            "cooldown_frac": algorithm.cooldown_frac, "weight_decay": algorithm.weight_decay}
    return values | vars(play) | {flag_name: value for flag_name, value in auto.items()
                                  if values[flag_name] in (None, "auto")}


def refuse_flags(given: dict, names: set[str], reason: str):
    """Raises BadInput for the first of these flags that is given and not the default."""
    defaults = SELFPLAY.defaults()
    for name in sorted(given.keys() & names):
        if given[name] != defaults[name]:
            raise BadInput(f"--{name}={given[name]}: {reason}: leave it out")


# -- how well it plays ------------------------------------------------------------------------------------------------

@dataclass
class Examiner:
    """Measures a model during its run. folder: of the run. resumed: that of the run which it continues, if any. draw(rows):
    called with all rows so far, or None."""
    game: Game
    exam: Sequence[Question]
    contents: dict
    folder: Path
    resumed: Path | None
    rating_games: int
    autocast: Callable
    draw: Callable[[list[dict]], None] | None = None
    has_warned: bool = False
    has_few_lines: bool = True  # until they turn out to be too many to follow

    def examine(self, state: TrainState) -> dict:
        """The row of an evaluation, which the main process makes and all of them get."""
        with join().failing_together():
            row = self.examine_here(state) if join().is_main else {}
        return join().gather(row)[0]

    def examine_here(self, state: TrainState) -> dict:
        """See `measure`; besides, what the loader has counted; elo, elo_margin."""
        row = self.measure(state.model) | state.loader.take_statistics()
        if self.rating_games and not self.game.has_hidden_cards:  # whose policies are measured exactly
            row |= self.rate(state.model, state.step)
        if state.step and not self.has_warned and (collapse := describe_collapse(row)):
            self.has_warned = True
            log_line(f"step {state.step:,}: play has collapsed: {collapse}")
        if self.draw and state.step:
            self.draw([*(old for old in evaluations(self.folder) if old["step"] < state.step), row])
        return row

    def measure(self, model: GPT) -> dict:
        """optimal_moves, value_accuracy and entropy in an exam; against any opponent, in games that are short enough,
        lost_lines_first of lines_first and lost_lines_second of lines_second; perfect_score and more in games that are
        solved. Where cards are hidden, what `measure_policy` does."""
        with self.autocast():
            if self.game.has_hidden_cards:
                return measure_policy(model, self.game)
            game, player = self.game, model_player(model, self.game)
            row = take_exam(model, game, self.exam) if self.exam else {}
            for name, side in (("first", 1), ("second", -1)):
                found = lost_lines(game, player, side) if self.has_few_lines else None
                self.has_few_lines = found is not None
                if found:
                    row[f"lost_lines_{name}"], row[f"lines_{name}"] = found
            if game.solvable(game.start(1))[0]:
                row |= score_against_perfect(game, player, PERFECT_GAMES)
            return row

    # -- ratings ------------------------------------------------------------------------------------------------------

    def rate(self, model: GPT, step: int) -> dict:
        """Matches with models of earlier steps, and the rating that follows, relative to that of the first. {} where no
        earlier model is there. Raises BadInput where that leaves nothing to measure by."""
        self.open_snapshots(step)
        rows, own = [row for row in read_matches(self.folder) if row["step"] < step], model_player(model, self.game)
        earlier = [other for other in self.snapshots() if other < step]
        with self.autocast():
            for opponent in spread(earlier, MAX_OPPONENTS):
                other = GPT.from_checkpoint(load_checkpoint(self.snapshot(opponent))).to(model.embed.weight.device)
                score, n = play_match(self.game, own, model_player(other, self.game), self.rating_games, step)
                rows.append({"step": step, "opponent": opponent, "score": score, "games": n})
        save_checkpoint(self.snapshot(step), model.to_checkpoint() | self.contents)
        if len(kept := self.snapshots()) > MAX_SNAPSHOTS:
            for old in kept[1:-1:2]:
                self.snapshot(old).unlink()
        with atomic_write(self.folder / "matches.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if not step:
            return {"elo": 0.0, "elo_margin": 0.0}
        matches = [Match(row["opponent"], row["step"], row["games"] - row["score"], row["games"]) for row in rows]
        if rating := fit_elo(matches).get(step):
            return {"elo": rating.elo, "elo_margin": rating.margin}
        if not self.exam:
            raise BadInput(f"{self.folder / 'snapshots'}: the models of earlier steps, which ratings compare with, are "
                           f"gone: start a new run")
        return {}

    def open_snapshots(self, step: int):
        """Empties the folder when a run begins, and fills it with those of the run that it continues elsewhere."""
        folder = self.folder / "snapshots"
        if not step:
            shutil.rmtree(folder, ignore_errors=True)
        elif self.resumed and not folder.exists() and (self.resumed / "snapshots").exists():
            shutil.copytree(self.resumed / "snapshots", folder)
            with suppress(OSError):
                shutil.copy(self.resumed / "matches.jsonl", self.folder / "matches.jsonl")
        folder.mkdir(parents=True, exist_ok=True)

    def snapshot(self, step: int) -> Path:
        return self.folder / "snapshots" / f"{step:08d}.pt"

    def snapshots(self) -> list[int]:
        """The steps of those that are there."""
        return sorted(int(path.stem) for path in (self.folder / "snapshots").glob("*.pt") if path.stem.isdigit())


def spread(items: list, n: int) -> list:
    """At most `n` of them, evenly spaced, the first and the last included."""
    if len(items) <= n:
        return items
    return [items[i] for i in sorted({round(i * (len(items) - 1) / (n - 1)) for i in range(n)})]


def read_matches(folder: Path) -> list[dict]:
    with suppress(OSError):
        return [row for row in read_json_lines(folder / "matches.jsonl")
                if all(isinstance(row.get(name), (int, float)) for name in ("step", "opponent", "score", "games"))]
    return []


def describe_collapse(row: dict) -> str:
    """What in an evaluation says that the model plays the same few games again and again, and not because they are the best;
    "" if nothing does."""
    if row.get("distinct_games", 1.0) <= COLLAPSED_GAMES and row.get("optimal_moves", 0.0) < WELL_PLAYED:
        known = f", and only {row['optimal_moves']:.1%} of the moves are right" if "optimal_moves" in row else ""
        return (f"of the games that begin alike, {row['distinct_games']:.1%} differ{known}: try a lower --learning_rate, or "
                f"a higher --target_temperature")
    if "exploitability" in row and row["entropy"] < COLLAPSED_ENTROPY:
        return (f"the moves hold no chance any more (entropy {row['entropy']:.3f} nats), which loses "
                f"{row['exploitability']:.2f} chips a game to an opponent who knows them: try more --regularisation")
    return ""


def evaluations(folder: Path) -> list[dict]:
    """The rows of a run's evaluations."""
    return [row for row in read_rows(folder / "metrics.jsonl") if row.keys() & METRICS.keys()]


# -- the run ----------------------------------------------------------------------------------------------------------

def open_run(configs: SelfPlayConfigs, checkpoint: dict | None, resumed: Path | None) -> Run:
    """Everything a run needs, new or as `checkpoint`, read from `resumed`, left it. Raises BadInput before any file is
    written."""
    open_it = partial(open_answer_run, SELFPLAY) if configs.answers.task else open_game_run
    return open_it(configs, checkpoint, resumed)


def open_game_run(configs: SelfPlayConfigs, checkpoint: dict | None, resumed: Path | None) -> Run:
    """See `open_run`. Resolves --games."""
    run, play, loop = configs.run, configs.play, configs.loop
    game = open_game(run.game, run.board)
    output = open_output(SELFPLAY, run.out_path, resumed, run.overwrite, configs.device, checkpoint)
    machine = output.machine
    seed_everything(run.seed)
    if resumed or run.checkpoint_path:
        model = load_player(resumed or run.checkpoint_path, checkpoint, run.game, game)
    else:
        check_context(configs.model.block_size, run.game, game, f"--block_size={configs.model.block_size}: a context")
        model = GPT(read_flags(GPTConfig, vars(configs.model) | {"vocab_size": game.vocab_size}))
    model.to(machine.device)
    model.gradient_checkpointing = run.gradient_checkpointing
    loader = PlayLoader(game, play, run.seed, machine.autocast, join())
    if (n_games := loader.config.rollout_games) < join().size:
        raise BadInput(f"--rollout_games={n_games}: {join().size} processes cannot play one each: give more")
    configs = configs._replace(loop=resolve_games(loop, loader, play.games or game.default_games))
    contents = describe_game(run.game, game)
    state, setup = restore_state(output, model, None, configs.optimizer, loader,
                                 loader.batch_rows * loop.num_batch_accum * game.max_plies,
                                 SELFPLAY.settings(*configs) | vars(model.config), contents,
                                 period_of(loader, loop.num_batch_accum))
    exam = () if game.has_hidden_cards else make_exam(game)
    examiner = Examiner(game, exam, contents, run_folder(output.writer.path), resumed and run_folder(resumed),
                        run.rating_games, machine.autocast)
    if loop.verbose:
        examiner.draw = partial(write_report, state, setup)
    evaluate = make_evaluation(examiner)
    batch = machine.to_device(Rollout.empty(game, loader.batch_rows).tensors())
    return Run(configs, state, setup, play_loss, evaluate, partial(dry_run_step, model, machine, play_loss, batch),
               partial(describe, state, setup, examiner, configs), partial(time_examination, examiner, model), None)


def period_of(loader: PlayLoader, num_batch_accum: int) -> int:
    """Steps after which play and learning repeat."""
    return loader.batches_per_rollout // math.gcd(loader.batches_per_rollout, num_batch_accum)


def make_evaluation(examiner: Examiner) -> Evaluation:
    """By exact truth, or by its rating where a game has none. Raises BadInput where that is turned off."""
    if examiner.game.has_hidden_cards:
        return Evaluation(examiner.examine, "exploitability", label="exploitability {:.4f}")
    if examiner.exam:
        return Evaluation(examiner.examine, "optimal_moves", maximize=True, label="{:.2%} optimal moves")
    if not examiner.rating_games:
        raise BadInput("--rating_games=0: this game has no solved position whose moves differ, so ratings are all there is: "
                       "give more")
    return Evaluation(examiner.examine, "elo", maximize=True, label="Elo {:.0f}")


def resolve_games(loop: SelfPlayLoop, loader: PlayLoader, n_games: int) -> SelfPlayLoop:
    """`loop`, with an end after about `n_games` where it has none."""
    if loop.max_iter or loop.max_tokens or loop.max_seconds:
        return loop
    n_rollouts = math.ceil(n_games / loader.config.rollout_games)
    return replace(loop, max_iter=max(1, n_rollouts * loader.batches_per_rollout // loop.num_batch_accum))


def time_examination(examiner: Examiner, model: GPT) -> float:
    """Seconds of an evaluation, with as many matches as there are at most; without effect."""
    start = time.perf_counter()
    examiner.measure(model)
    measured, player = time.perf_counter(), model_player(model, examiner.game)
    if not examiner.rating_games or examiner.game.has_hidden_cards:
        return measured - start
    with examiner.autocast():
        play_match(examiner.game, player, player, examiner.rating_games, seed=0)
    return measured - start + MAX_OPPONENTS * (time.perf_counter() - measured)


def describe(state: TrainState, setup: TrainSetup, examiner: Examiner, configs: SelfPlayConfigs) -> list[str]:
    """The lines that a run starts with: model, game and machine."""
    run, play, game, model = configs.run, configs.play, examiner.game, state.model.config
    n_exam = sum(len(question.values) for question in examiner.exam)
    begins = min((question.line.history.shape[1] for question in examiner.exam), default=0)
    started = f"{run.checkpoint_path}: " if run.checkpoint_path else ""
    how = f"{ALGORITHMS[play.algorithm].name}{f' ({play.search})' * (play.algorithm == 'search')}"
    measured = "exact exploitability" if game.has_hidden_cards else (
        f"exam of {n_exam:,} positions" + f" after {begins} moves or more" * (begins > 1))
    return [f"model    {started}{model.describe_shape()}, {model.mixer} and {model.mlp}: "
            f"{state.model.n_parameters() / 1e3:,.0f} k parameters; {configs.optimizer.optimizer} at {setup.peak_lr():.3g}",
            f"game     {game_title(run.game, game.board)}: {how}, {play.rollout_games:,} games at a time; {measured}",
            f"machine  {describe_machine(setup.machine)}; steps of {state.loader.batch_rows:,} rows until "
            f"{configs.loop.horizon()}"]


# -- report -----------------------------------------------------------------------------------------------------------

# metric -> (label, better, format), of the table before and after
METRICS = {"optimal_moves": ("optimal moves", "higher", "{:.2%}"), "value_accuracy": ("right values", "higher", "{:.2%}"),
           "lost_lines_first": ("lost lines as first player", "lower", "{:,}"),
           "lost_lines_second": ("lost lines as second player", "lower", "{:,}"),
           "perfect_score": ("score against perfect play", "higher", "{:.3f}"),
           "expected_score": ("score of perfect play", "", "{:.3f}"),
           "lost_wins": ("won openings not won", "lower", "{:,}"), "elo": ("Elo", "higher", "{:,.0f}"),
           "exploitability": ("exploitability, chips a game", "lower", "{:.4f}"),
           "first_score": ("chips that the first player wins", "", "{:.4f}"),
           "entropy": ("entropy of moves, nats", "", "{:.2f}")}


def compare_rows(first: dict, last: dict) -> Table:
    """What has changed between two rows of metrics.jsonl."""
    return Table(("metric", "better", "before", "after"), [
        (label, better, form.format(first[name]), form.format(last[name]) + margin(name, last))
        for name, (label, better, form) in METRICS.items() if name in first and name in last])


def margin(name: str, row: dict) -> str:
    """What is known about the accuracy of a number."""
    if name == "elo":
        return f" ± {row['elo_margin']:,.0f}"
    if name.startswith("lost_lines"):
        return f" of {row[name.replace('lost_', '')]:,}"
    return f" of {row['won_openings']:,}" if name == "lost_wins" else ""


def write_report(state: TrainState, setup: TrainSetup, rows: list[dict]) -> tuple[Table, Path]:
    """Writes selfplay.html. Returns its table and its path."""
    settings, table = setup.settings, compare_rows(rows[0], rows[-1])
    page = run_folder(setup.writer.path) / "selfplay.html"
    write_page(page, f"Self-play: {settings['game']}", [
        ("p", f"{state.step:,} steps, {rows[-1].get('games', 0):,} games, {state.seconds:,.0f} s on {setup.machine}; "
              f"learning rate {setup.peak_lr():.3g}. Metrics: metrics.jsonl; matches with models of earlier steps: "
              f"matches.jsonl."),
        ("h2", "Before and after"), table, ("h2", "On the way"), Figure(draw_play(rows), "play")])
    return table, page


def report(state: TrainState, setup: TrainSetup):
    """Prints what has changed, and writes selfplay.html."""
    path, settings = setup.writer.path, setup.settings
    table, page = write_report(state, setup, evaluations(run_folder(path)))
    print(markdown(table))
    board = parse_board(settings["board"]) if settings["board"] else ()
    say(f"\nsaved {path} and {page}; `python selfplay.py {game_flags(settings['game'], board)} --play "
        f"--checkpoint_path={path}` plays against it")


# -- the command ------------------------------------------------------------------------------------------------------

def play_against(given: dict, path: Path):
    """--play. Raises BadInput."""
    refuse_flags(given, set(SELFPLAY.defaults()) - TERMINAL_FLAGS, "has no effect with --play")
    values = SELFPLAY.defaults() | given
    run, device = (read_flags(config, values) for config in (SelfPlayConfig, SelfPlayDevice))
    game = open_game(run.game, run.board)
    model = load_player(run.checkpoint_path or path, None, run.game, game).to(open_machine(device).device)
    if not game.has_hidden_cards:
        play_in_terminal(BoardTable(model, game, run.model_first, run.think))
        return
    refuse_flags(given, {"think"}, "there is no search where cards are hidden")
    play_in_terminal(CardTable(model, game, run.model_first, given.get("seed")))


def default_out_path(given: dict) -> Path | None:
    """checkpoints/connect_four_4x5.pt, or checkpoints/gpt_finetuned_selfplay.pt; None where neither is asked for."""
    if "game" in given:
        return Path("checkpoints") / ("_".join(filter(None, (given["game"], given.get("board")))) + ".pt")
    if "task" in given:
        path = given.get("checkpoint_path", ANSWERING_MODEL)
        return path.with_name(f"{path.stem}_selfplay{path.suffix or '.pt'}")
    return None


@command
def main(argv=None):
    given = SELFPLAY.flags_given(argv)
    path, resumed = SELFPLAY.paths(given, default_out_path(given))
    if path is None:
        raise BadInput(WHAT_TO_LEARN)
    if given.get("play"):
        play_against(given, path)
        return
    run = train_command(SELFPLAY, given, path, resumed, resolve_flags, open_run)
    if run and run.configs.loop.verbose:
        (report_answers if run.configs.answers.task else report)(run.state, run.setup)


if __name__ == "__main__":
    main()
