"""compare.py --script=selfplay: arms that play as many games, what is said of wrong moves and chips, whole comparisons."""
import csv
import dataclasses
import importlib
import json
import math
import os
import signal

import pytest
from test_analysis import make_result, make_results
from test_report import parse_page

import compare
import experiments.runner
import trainer
from compare import CompareConfig, PlaySchedule, RunEnvironment, build_arms, build_meta_model, load_game, make_cell
from conftest import run_rows
from experiments.analysis import (
    BPB,
    EXPLOITABILITY,
    WRONG_MOVES,
    ArmResults,
    CellResult,
    Metric,
    add_significance,
    describe_best,
    table_rows,
    verdict,
)
from experiments.comparison import make_notes, short_table, size_section, table_of_columns
from experiments.plots import draw_mean_curves, draw_pareto_fronts
from experiments.runner import JobResult
from runtime.config import BadInput

TIC_TAC_TOE = {"game": "tic_tac_toe"}
ENVIRONMENT = RunEnvironment(load_game(TIC_TAC_TOE), "cpu, fp32", "a machine", "0123")
TINY = ["--script=selfplay", "--game=nim", "--board=1x2", "--n_layer=1", "--n_head=2", "--head_size=8", "--rollout_games=8",
        "--batch_size=8", "--warmup_iter=1", "--device=cpu", "--threads=0"]


def play_arms(*arms: str, common: dict = TIC_TAC_TOE, **flags) -> list:
    return build_arms(CompareConfig(script="selfplay", arms=arms, budget="games=40_960", **flags), common, load_game(common))


# -- arms -------------------------------------------------------------------------------------------------------------

def test_arms_are_players_with_the_parameters_of_the_first():
    arms = play_arms("mixer=attention", "mixer=gated_delta", "mlp=grkan", "linear=grkan", "loops=3", "algorithm=reinforce")
    assert {arm.vocab_size for arm in arms} == {9 + 3 + 1} and {arm.batch_shape for arm in arms} == {(256, 10)}
    for arm in arms:
        assert abs(arm.n_parameters - arms[0].n_parameters) <= 0.01 * arms[0].n_parameters, arm.name
        assert arm.n_parameters == build_meta_model(arm.flags, 13).n_parameters()
        assert arm.base_lr == 0.02 and arm.metric == WRONG_MOVES and arm.step_tokens == 256 * 9
    assert arms[0].flags == {"game": "tic_tac_toe", "mixer": "attention", "n_layer": 2, "n_head": 4, "head_size": 16,
                             "block_size": 10, "positions": "learned"}
    wide, = play_arms("block_size=32,n_head=8,learning_rate=0.01", null=True)[:1]
    assert wide.batch_shape[1] == 32 and wide.base_lr == 0.01 and build_meta_model(wide.flags, 13).config.n_embd == 128


def test_games_with_hidden_cards_are_compared_in_chips():
    arms, data = play_arms("mlp=gelu", "mlp=relu2", common={"game": "kuhn"}), load_game({"game": "kuhn"})
    assert {arm.metric for arm in arms} == {EXPLOITABILITY}
    config, environment = CompareConfig(script="selfplay", budget="games=512"), dataclasses.replace(ENVIRONMENT, data=data)
    said = compare.describe_conditions([ArmResults(arm) for arm in arms], config, environment)
    assert "batches of 512 games; the others: as many parameters as the first. 0 games of kuhn; budget games=512" in said
    assert load_game({"game": "kuhn"}).description == "games of kuhn"
    assert load_game({"game": "nim", "board": "1x2"}).description == "games of nim on 1x2"


# -- as many games ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, steps, games, period, step_games", [
    ({}, 8, 1024, 2, 128), ({"updates": 6}, 24, 1024, 6, 256 / 6), ({"algorithm": "reinforce"}, 4, 1024, 1, 256),
    ({"num_batch_accum": 2}, 4, 1024, 1, 256), ({"updates": 3, "num_batch_accum": 2}, 6, 1024, 3, 512 / 3),
    ({"rollout_games": 100}, 22, 1100, 2, 50)])
def test_schedule_of_1024_games_by_hand(flags, steps, games, period, step_games):
    play = PlaySchedule.from_flags(TIC_TAC_TOE | flags)
    assert (play.steps(1024), play.games(steps), play.period) == (steps, games, period)
    assert play.step_games == pytest.approx(step_games)


def test_a_budget_in_games_gives_every_arm_as_many():
    config = CompareConfig(script="selfplay", budget="games=40_960")
    for arm in play_arms("mlp=gelu", "updates=4", "algorithm=reinforce", "num_batch_accum=4,batch_size=64"):
        for stage, games in (("lr_grid", 10_240), ("run", 40_960)):
            cell = make_cell(arm, config, ENVIRONMENT, stage, 2.0, 3)
            n_steps = int(cell.limit[1])
            assert cell.limit[0] == "step" and PlaySchedule.from_flags(arm.flags).games(n_steps) == games
            assert {f"--max_iter={n_steps}", f"--val_intervals={math.ceil(n_steps / 10)}", "--learning_rate=0.04",
                    "--seed=3", "--rating_games=0", "--game=tic_tac_toe"} <= {*cell.job.flags}
            assert cell.job.outcome == ("optimal_moves", "games") and cell.job.script.name == "selfplay.py"


@pytest.mark.parametrize("missing", ["optimal_moves", "games", "tok_per_sec"])
def test_a_run_that_lacks_what_is_compared_is_not_finished(tmp_path, missing):
    arm, = play_arms("mlp=gelu", null=True)[:1]
    config = CompareConfig(script="selfplay", budget="games=4e4", out_path=tmp_path)
    job = make_cell(arm, config, ENVIRONMENT, "run", 1.0, 1).job
    row = {"step": 3, "tokens": 30, "seconds": 3.0, "flops": 90, "tok_per_sec": 10.0, "optimal_moves": 1.0, "games": 8}
    job.folder.mkdir(parents=True)
    (job.folder / "metrics.jsonl").write_text(json.dumps(row))
    assert job.is_complete()
    (job.folder / "metrics.jsonl").write_text(json.dumps({name: value for name, value in row.items() if name != missing}))
    assert job.complete(JobResult("finished")) == JobResult("failed", "its last metrics are missing")


def test_arms_that_would_play_different_numbers_of_games_are_refused():
    with pytest.raises(BadInput, match="'rollout_games=100' would play 41,000 games, 'mlp=gelu' 40,960, as they play 100 "
                                       "and 256 at a time: give a multiple of 6,400"):
        play_arms("mlp=gelu", "rollout_games=100")
    config = CompareConfig(script="selfplay", arms=("mlp=gelu", "rollout_games=100"), budget="tokens=1e6")
    assert len(build_arms(config, TIC_TAC_TOE, load_game(TIC_TAC_TOE))) == 2


def test_a_speed_run_has_whole_rollouts():
    for flags, n_steps in (("mlp=gelu", 5 + 5 * 2), ("updates=4", 5 + 3 * 4), ("algorithm=reinforce", 5 + 10)):
        arm, = play_arms(flags, null=True)[:1]
        flags = make_cell(arm, CompareConfig(script="selfplay", budget="games=4e4"), ENVIRONMENT, "speed", 1.0, 0).job.flags
        assert {f"--max_iter={n_steps}", "--log_intervals=1", f"--val_intervals={n_steps}"} <= {*flags}


def test_cells_of_another_game_or_board_are_others():
    def name(common):
        arm, = play_arms("mlp=gelu", null=True, common=common)[:1]
        cell = make_cell(arm, CompareConfig(script="selfplay", budget="games=4e4"), ENVIRONMENT, "run", 1.0, 1)
        return cell.job.checkpoint.name
    names = [name(common) for common in (TIC_TAC_TOE, {"game": "nim"}, {"game": "nim", "board": "1x2"})]
    assert len({*names}) == 3 and name(TIC_TAC_TOE) == names[0]
    assert play_arms("mlp=gelu", "mlp=relu2", common={"game": "nim"})[1].data_digests == ("nim on 3x4x5",)


# -- what is compared -------------------------------------------------------------------------------------------------

def make_play_results(name: str, wrong: list[float], grid_wrong: float = 0.4, metric: Metric = WRONG_MOVES) -> ArmResults:
    """An arm whose runs of 1,000 games ended with these, its grid run on a quarter of the games with `grid_wrong`."""
    results = make_results(name, wrong)
    results.arm = dataclasses.replace(results.arm, metric=metric, speed_window=2)
    results.grid = [make_result(results.arm, "lr_grid", 1, 0.25, grid_wrong)]
    for stage in ("grid", "runs", "speeds"):
        setattr(results, stage, [to_play(run, results.arm) for run in getattr(results, stage)])
    return results


def to_play(run: CellResult, arm) -> CellResult:
    rows = [row | {"games": row["tokens"] / 10, arm.metric.field: 1 - row["val_bpb"] if arm.metric.is_complement else
                   row["val_bpb"]} for row in run.rows]
    start = {"step": 0, "tokens": 0, "seconds": 0.0, "flops": 0, arm.metric.field: 0.5}
    without = [{name: value for name, value in row.items() if not name.startswith("val_")} for row in rows]
    return dataclasses.replace(run, cell=dataclasses.replace(run.cell, arm=arm), rows=[start, *without])


def test_metrics_by_hand():
    row = {"val_bpb": 1.5, "optimal_moves": 0.75, "exploitability": 0.125}
    assert [metric.of(row) for metric in (BPB, WRONG_MOVES, EXPLOITABILITY)] == [1.5, 0.25, 0.125]
    assert WRONG_MOVES.of({"optimal_moves": 1.0}) == 0.0
    assert BPB.describe(1.5) == "1.5000 bits/byte" and BPB.describe_difference(-0.5, "+") == "-0.5000 bits/byte"
    assert WRONG_MOVES.describe(0.25) == "25.00% wrong moves"
    assert WRONG_MOVES.describe_difference(0.0123) == "1.23% of all moves"
    assert EXPLOITABILITY.describe_difference(0.125, "+") == "+0.1250 chips of exploitability"


def test_table_of_wrong_moves_by_hand():
    """Four times the games take 0.2 off the first arm's; the second is 0.1 better, which twice the games would give."""
    results = [make_play_results("a", [0.2, 0.21, 0.19]), make_play_results("b", [0.1, 0.112, 0.088])]
    first, second = add_significance(table_rows(results))
    assert first["wrong_moves"] == pytest.approx(0.2) and second["difference"] == pytest.approx(-0.1)
    assert second["games_equivalent"] == pytest.approx(1) and (first["games"], first["games_per_sec"]) == (1000, 100)
    assert not {"loss", "bpb", "tok_per_sec", "bytes_per_sec", "steps_equivalent"} & {*first, *second}
    assert verdict(second, first, WRONG_MOVES).startswith(
        "b: better than a by 10.00% of all moves (95 % interval -10.50% to -9.50%, 3 seeds); equivalent to +100% (+9")
    assert verdict(second, first, WRONG_MOVES).endswith(" games of a.")
    table, same = table_of_columns([first, second], WRONG_MOVES)
    assert table.head[:3] == ("arm", "wrong moves (lower is better)", "difference from the first arm (negative is better)")
    assert table.rows[1][1] == "10.00% ± 2.98%" and table.rows[1][2] == "-10.00% ± 0.50%"
    assert "games 1,000" in same and "games/s 100" in same
    lines = short_table(results, [first, second])
    assert lines[0].split("  ")[0] == "arm" and "wrong moves" in lines[0] and lines[2].endswith("better")
    assert results[0].runs[0].describe() == "a, learning rate x 1, seed 1: 20.00% wrong moves, 1 s"


def test_exploitability_is_said_in_chips():
    def rows(**chips):
        return add_significance(table_rows([make_play_results(name, values, metric=EXPLOITABILITY)
                                            for name, values in chips.items()]))
    first, second = rows(a=[0.2, 0.21], b=[0.3, 0.311])
    assert "b: worse than a by 0.1005 chips of exploitability (95 %" in verdict(second, first, EXPLOITABILITY)
    assert first["exploitability"] == pytest.approx(0.205)
    first, second = rows(a=[0.2], b=[0.1])
    assert "b: -0.1000 chips of exploitability against a with one seed" in verdict(second, first, EXPLOITABILITY)
    note = " ".join(make_notes(EXPLOITABILITY, False, True))
    assert "loses, over both seats" in note and "Chips of exploitability at equal seconds" in note and "Bits" not in note


@pytest.mark.integration
def test_perfect_players_are_no_different():
    """No wrong moves in any run, on a part of the games either: no variance, and nothing that more games would gain."""
    results = [make_play_results(name, [0.0] * 3, grid_wrong=0.0) for name in "abc"]
    rows = add_significance(table_rows(results))
    for row in rows[1:]:
        assert (row["difference"], row["difference_margin"], row["p_holm"], row["significance"]) == (0, 0, 1, "none")
        assert "games_equivalent" not in row and row["wrong_moves_equal_seconds"] == 0 and not row["at_grid_edge"]
        assert verdict(row, rows[0], WRONG_MOVES) == (
            f"{row['arm']}: no significant difference from a (95 % interval +0.00% to +0.00%, 3 seeds).")
    assert describe_best(results).startswith("Lowest mean: a; not shown to be worse than it: b, c")
    parts = size_section(results, rows, "conditions")
    assert any("0.00% ± 0.00%" in str(part) for part in parts) and "nan" not in str(parts[:5])


def test_a_rollouts_share_of_the_time_is_in_the_speed():
    """Every second step plays, at a fifth of the speed: 2 / (1 / 100 + 1 / 20)."""
    results = make_play_results("a", [0.2])
    rows = [{"step": step, "tok_per_sec": 20.0 if step % 2 else 100.0} for step in range(1, 5 + 2 * 5 + 1)]
    assert dataclasses.replace(results.speeds[0], rows=rows).speed() == pytest.approx(100 / 3)
    one = dataclasses.replace(results.arm, speed_window=1)
    every = dataclasses.replace(results.speeds[0], rows=rows, cell=dataclasses.replace(results.speeds[0].cell, arm=one))
    assert every.speed() == 60  # the median of five of each


@pytest.mark.integration
def test_pictures_are_of_games(tmp_path):
    results = [make_play_results("a", [0.2, 0.21]), make_play_results("b", [0.0, 0.0])]
    curves = draw_mean_curves({result.arm.name: result.curves() for result in results}, False, WRONG_MOVES)
    fronts = draw_pareto_fronts({row["arm"]: row for row in table_rows(results)}, WRONG_MOVES)
    for words in ("Fraction of wrong moves against games", "Fraction of wrong moves against FLOPs", ">games<",
                  "without those of play", "validation, fraction of wrong moves", "seconds of training"):
        assert words in "".join(curves), words
    assert "Fraction of wrong moves against peak memory" in "".join(fronts)
    assert "byte" not in "".join(curves + fronts).replace("bytes)", "").lower()


# -- whole comparisons ------------------------------------------------------------------------------------------------

class InThisProcess:
    """In place of subprocess.Popen, for runs that take less time than a process needs to import torch."""
    started: list[str] = []
    stop_at: int | None = None

    def __init__(self, command: list[str], **options):
        self.command, self.returncode = command, None

    def communicate(self) -> tuple[str, str]:
        path = next(flag.partition("=")[2] for flag in self.command if flag.startswith("--out_path"))
        if len(self.started) == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
            self.returncode = 130
            return "", ""
        self.started.append(os.path.basename(path))
        try:
            importlib.import_module(os.path.basename(self.command[1]).removesuffix(".py")).main(self.command[2:])
            self.returncode = 0
        except SystemExit as end:
            self.returncode = end.code
        return "", f"its exit code is {self.returncode}"

    def send_signal(self, number: int):
        pass


@pytest.fixture
def runs(monkeypatch):
    """The runs of a comparison are in this process. runs.started: the names of their checkpoints."""
    monkeypatch.setattr(experiments.runner.subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(InThisProcess, "started", [])
    monkeypatch.setattr(InThisProcess, "stop_at", None)
    monkeypatch.setattr(compare, "SPEED_ROUNDS", 1)
    monkeypatch.setattr(compare, "VALIDATIONS", 2)
    monkeypatch.setattr(compare, "query_device", lambda config, cluster: ("cpu, fp32", "a machine"))
    return InThisProcess


@pytest.mark.integration
def test_command_compares_players(runs, tmp_path, capsys):
    """Two arms end to end; the table holds what their runs logged, no word is of text, and nothing is run twice."""
    flags = [*TINY, "--arms", "mlp=gelu", "mixer=gated_delta", "--budget=games=32", "--seeds=2", "--rates=2",
             f"--out_path={tmp_path / 'out'}"]
    compare.main(flags)
    out, folder = capsys.readouterr().out, tmp_path / "out"
    with open(folder / "comparison.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert "wrong_moves" in table[0] and "wrong_moves_margin" in table[0] and "bpb" not in table[0]
    assert abs(int(table[1]["parameters"]) - int(table[0]["parameters"])) <= 0.01 * int(table[0]["parameters"])
    for row in table:
        stem = row["arm"]
        ends = {path.name: run_rows(path.with_suffix(".pt"))[-1] for path in folder.glob(f"runs/{stem}-*")}
        assert {end["games"] for name, end in ends.items() if "-run-" in name} == {32} == {int(float(row["games"]))}
        assert {end["games"] for name, end in ends.items() if "-lr_grid-" in name} == {8}
        wrong = [1 - end["optimal_moves"] for name, end in ends.items() if "-run-2-" in name]
        assert len(wrong) == 2 and float(row["wrong_moves"]) == pytest.approx(sum(wrong) / 2)
        assert float(row["games_per_sec"]) > 0 and row["runs"] == "2"
    page = parse_page(folder / "comparison.html").text
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    for shown in (page, text):
        assert "32 games of nim on 1x2; budget games=32" in shown and "as many parameters as the first" in shown
        assert "Each arm learns from games of its own" in shown and "Wrong moves: the fraction of an exam" in shown
    for shown in (page, text, out, (folder / "comparison.csv").read_text(encoding="utf-8")):
        assert not [word for word in ("byte", "bits", "bpb", "validation text", "choice of text") if word in shown.lower()]
    assert "wrong moves" in out and not list(folder.glob("runs/*.pt")) and not list(folder.glob("runs/*/snapshots"))

    before = list(runs.started)
    assert len(before) == len({*before})
    compare.main(flags)
    assert runs.started == before
    compare.main([*flags, "--seeds=3"])
    assert len(runs.started) == len(before) + 2 and all("-3-" in name for name in runs.started[len(before):])


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_same_command_goes_on_after_ctrl_c(runs, tmp_path, capsys):
    flags = [*TINY, "--arms", "mlp=gelu", "mlp=relu2", "--budget=games=16", "--seeds=1", "--rates=1", "--grid_share=0.5",
             f"--out_path={tmp_path / 'out'}"]
    runs.stop_at = 3
    with pytest.raises(SystemExit) as stop:
        compare.main(flags)
    assert stop.value.code == 130 and "the same command continues" in capsys.readouterr().err and len(runs.started) == 3
    runs.stop_at = None
    compare.main(flags)
    assert len(runs.started) == len({*runs.started}) == 2 * (1 + 1 + 1)
    assert "one seed shows nothing" in capsys.readouterr().out


def test_dry_run_plays_some_games_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare.subprocess, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(trainer, "MAX_TIMING_SECONDS", 0.0)
    compare.main([*TINY, "--arms", "mlp=gelu", "search=puct,simulations=4", "--budget=games=64", "--seeds=2", "--dry_run",
                  f"--out_path={tmp_path / 'out'}"])
    head, *rows, time, memory = capsys.readouterr().out.splitlines()
    assert head.split() == ["arm", "parameters", "memory", "games/s", "runs", "time"]
    for row, name in zip(rows, ["mlp=gelu", "search=puct"], strict=True):
        arm, _, _, unit, speed, runs, *_ = row.split()
        assert arm.startswith(name) and runs == "6" and float(speed.replace(",", "")) > 0 and unit.endswith("iB")
    assert time.startswith("time    about") and "12 processes included, and of 6 that measure speed" in time
    assert not list(tmp_path.iterdir())


def test_the_game_decides_how_much_is_played_by_default():
    config, common = compare.read_command_line(["--script=selfplay", "--game=nim", "--mlp=gelu"])
    assert config.budget == "games=51200" and common == {"game": "nim", "mlp": "gelu"}


# -- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, words", [
    (["--game=chess"], ["--game=chess", "choose one of"]), (["--board=4,5"], ["--board=4,5", "joined by x"]),
    (["--budget=bytes=1e6"], ["runs of selfplay.py have no budget in bytes: give games=N, tokens=N or seconds=N"]),
    (["--budget=flops=1e9"], ["no budget in flops: give games=N"]), (["--budget=cups=2"], ["--budget=cups=2: give games=N"]),
    (["--budget=games=nan"], ["give games=N"]), (["--budget=games=20"], ["0.25 of it", "5 games, fewer than"]),
    (["--budget=tokens=20"], ["less than a step of 24"]), (["--budget=seconds=9", "--jobs=2"], ["only one run at a time"]),
    (["--arms", "mlp=gelu", "game=nim"], ["game is not part of an architecture or recipe"]),
    (["--arms", "mlp=gelu", "board=3x3"], ["board is not part"]),
    (["--arms", "mlp=gelu", "checkpoint_path=a.pt"], ["checkpoint_path is not part"]),
    (["--arms", "mlp=gelu", "games=5"], ["games is not part"]),
    (["--arms", "mlp=gelu", "gated_delta"], ["did you mean mixer=gated_delta?"]),
    (["--arms", "mlp=gelu", "algorithm=reinforce"], ["--batch_size=8: has no effect with --algorithm=reinforce"]),
    (["--arms", "mlp=gelu", "n_layer=3"], ["parameters", "--match=none"]),
    (["--block_size=2"], ["--arms 'mlp=gelu': --block_size=2", "too short for nim on 1x2"]),
    (["--max_iter=5"], ["no such flag"])])
def test_bad_input_is_one_line(refused, tmp_path, more, words):
    flags = [*TINY, "--budget=games=64", f"--out_path={tmp_path / 'out'}"]
    refused(compare.main, [*flags, "--arms", "mlp=gelu", "mlp=relu2", *more], *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [[], ["--budget=games=64"]])
def test_a_game_is_needed(refused, budget):
    refused(compare.main, ["--script=selfplay", *budget], "--game: say which all arms learn, such as --game=tic_tac_toe")


@pytest.mark.parametrize("script, words", [("train", "give tokens=N, bytes=N, flops=N, seconds=N, to_loss=X or to_bpb=X"),
                                           ("finetune", "give tokens=N, flops=N or seconds=N")])
def test_games_are_no_budget_of_text(refused, script, words):
    refused(compare.main, [f"--script={script}", "--budget=games=64"],
            f"--budget=games=64: runs of {script}.py have no budget in games: {words}")
