"""probes.py: cells in this process, and the command on tiny arms. Tasks: test_synthetic.py, processes: test_runner.py."""
import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import probes
import runtime.cli
from conftest import REPO
from experiments.probe_report import best_row
from layers import MIXERS
from probes import LOOPS, SCALES, CellConfig, ProbeConfig
from tasks.synthetic import TASKS

TINY = ["--n_layer=1", "--n_head=1", "--head_size=8", "--batch_size=4", "--max_iter=5", "--val_intervals=2", "--seeds=1",
        "--rates", "1"]


def build_cell(task: str, arm: str = "mixer=attention", **common) -> probes.ProbeCell:
    cell, = probes.build_cells(ProbeConfig(arms=(arm,), tasks=(task,), rates=(1.0,)), CellConfig(**{
        "n_layer": 1, "max_iter": 4, "batch_size": 4} | common), seed=0)
    return cell


def run_cell(cell: probes.ProbeCell, path) -> dict:
    probes.run_cell(cell, path)
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"}


def read_csv(folder) -> list[dict]:
    with open(folder / "probes.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- cells ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TASKS)
def test_training_data_depends_on_the_seed_alone_and_is_not_evaluated(name):
    task = TASKS[name]
    loader = lambda seed: probes.ExampleLoader(task, 8, seed)
    first = lambda seed: loader(seed).next_batch(None)[0]
    assert (first(1) == first(1)).all() and (first(1) != first(2)).any()
    evaluated = task.generate(np.random.default_rng([0, 1]), probes.EVAL_EXAMPLES, task.length)[0]
    seen, stream = {tuple(row) for row in evaluated.tolist()}, loader(0)
    batches = [stream.next_batch(None)[0] for _ in range(2 * len(task.trained_lengths))]
    assert [tuple(batch.shape) for batch in batches] == 2 * [
        (round(8 * (task.length / length) ** 0.5), length) for length in task.trained_lengths]
    assert (batches[0] != batches[len(task.trained_lengths)]).any()
    assert not any(tuple(row) in seen for batch in batches for row in batch.tolist())


@pytest.mark.integration
def test_cell_is_deterministic(tmp_path):
    a, b = (run_cell(build_cell("dyck"), tmp_path / name) for name in "ab")
    assert a | {"seconds": 0} == b | {"seconds": 0}
    assert a["status"] == "unsolved" and all(0 <= a[f"accuracy_{scale}x"] <= 1 for scale in SCALES)


def test_arm_sets_what_it_may_and_nothing_else():
    """Of model, optimizer, batches and clipping all, except what tasks and schedule fix."""
    cell = build_cell("recall", "mlp=relu2,n_layer=2,learning_rate=0.1,num_batch_accum=3,grad_clip=2")
    gpt, schedule, loop, _ = cell.configs()
    assert (gpt.mlp, gpt.n_layer, schedule.learning_rate, loop.num_batch_accum, loop.grad_clip) == ("relu2", 2, 0.1, 3, 2)
    assert (gpt.vocab_size, gpt.block_size, schedule.cooldown_frac, schedule.warmup_iter) == (80, 256, 0, 20)


def test_cell_name_changes_with_flags_seed_and_code():
    cell = build_cell("recall")
    names = {cell.name("0123"), cell.name("4567"), build_cell("recall", max_iter=3).name("0123"),
             build_cell("sort").name("0123"),
             dataclasses.replace(cell, seed=1).name("0123"), dataclasses.replace(cell, rate=2.0).name("0123")}
    assert len(names) == 6 and build_cell("recall").name("0123") in names


@pytest.mark.parametrize("arm", [*(f"mixer={mixer}" for mixer in MIXERS if mixer != "attention"), "loops=3",
                                 "loops=2,sampled_loops=1"])
def test_every_kind_of_arm_is_trained_and_tested(tmp_path, monkeypatch, arm):
    monkeypatch.setattr(probes, "EVAL_EXAMPLES", 32)
    row, plain = (run_cell(build_cell("parity", name), tmp_path / name) for name in (arm, "mixer=attention"))
    assert row["status"] == "unsolved" and all(0 <= row[f"accuracy_{scale}x"] <= 1 for scale in SCALES)
    assert (row["parameters"] == plain["parameters"]) == ("loops" in arm or "sliding" in arm)
    by_loops = [row[f"accuracy_{n}_loops"] for n in LOOPS]
    assert all(0 <= x <= 1 for x in by_loops) if "loops" in arm else by_loops == [None] * len(LOOPS)
    if arm.startswith("loops=2"):
        assert row["accuracy_2_loops"] == row["accuracy_1x"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_trained_and_tested(tmp_path, monkeypatch, task):
    monkeypatch.setattr(probes, "EVAL_EXAMPLES", 32)
    row = run_cell(build_cell(task, head_size=8, val_intervals=4), tmp_path / task)
    assert row["status"] == "unsolved" and all(0 <= row[f"accuracy_{scale}x"] <= 1 for scale in SCALES)


def test_what_is_read_at_the_end_has_tokens_of_its_own_for_every_position():
    """Of two symbols at three positions: logits 0 and 1 of the last position are those of the first."""
    task = dataclasses.replace(TASKS["compression"], n_answers=2)
    logits = torch.tensor([[[1.0, 2.0, 3.0, 5.0, 0.0, 0.0]]])

    class Model:
        def eager_forward(self, idx, logits_to_keep):
            assert logits_to_keep == 1
            return logits.expand(len(idx), 1, 6)
    batch = torch.zeros(4, 2, dtype=torch.int64), torch.tensor([[0, 1]] * 4)
    assert probes.answer_logits(Model(), batch[0], task).tolist() == [[[1, 2], [3, 5]]] * 4
    expected = (math.log(1 + math.e) + math.log(1 + math.exp(-2))) / 2
    assert probes.answer_loss(Model(), batch, task).item() == pytest.approx(expected)


SMALL = {"n_head": 2, "val_intervals": 20}  # learns in seconds


@pytest.mark.integration
@pytest.mark.parametrize("task, arm, is_solved, common", [
    ("parity", "mixer=gated_delta", True, {"batch_size": 8, "max_iter": 200}),
    ("parity", "mixer=rotary_delta", True, {"batch_size": 8, "max_iter": 500}),
    ("parity", "mixer=attention", False, {"batch_size": 8, "max_iter": 200}),
    ("recall", "mixer=attention", True, {"batch_size": 16, "max_iter": 400, "n_layer": 2}),
    ("recall", "mixer=sliding,window=4", False, {"batch_size": 8, "max_iter": 200, "n_layer": 2})])
def test_what_is_known_of_architectures(task, arm, is_solved, common, tmp_path, monkeypatch):
    """Recurrences with negative eigenvalues count modulo two and attention does not (Grazzi et al. 2024, arXiv:2411.12537);
    attention recalls what it can see."""
    monkeypatch.setattr(probes, "EVAL_EXAMPLES", 64)
    row = run_cell(build_cell(task, arm, **SMALL | common), tmp_path / "row")
    assert row["solved"] == is_solved and row["status"] == ("solved" if is_solved else "unsolved")
    assert row["accuracy_2x"] > 0.6 if is_solved else row["accuracy_1x"] < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("task, arm", [
    *(("recall_many", arm) for arm in ("mixer=attention", "mixer=DA", "mixer=AD")),
    *((task, "mixer=AR,d_head_size=32,positions=none,qk_scale=1.5") for task in (
        "recall_many", "induction", "parity", "modular", "permute"))])
def test_what_probes_have_found(task, arm, tmp_path):
    """Each at a learning rate that finds it; attention and hybrids recall many pairs, rotary_delta with attention all."""
    rate = 0.02 if arm in ("mixer=attention", "mixer=DA", "mixer=AD") else 0.01
    row = run_cell(build_cell(task, f"{arm},learning_rate={rate}", n_layer=2, batch_size=16, max_iter=1200,
                              val_intervals=100), tmp_path / "row")
    assert row["solved"] and row["accuracy_2x"] > (0.9 if "R" in arm else 0.5)


def test_learning_rate_falls_from_where_the_task_was_solved(monkeypatch):
    """Solved at step 4 of at most 100: it falls for one more fifth of all steps."""
    monkeypatch.setattr(probes, "evaluate_task", lambda *args: (1.0, float(state.step >= 4)))
    cell = build_cell("parity", head_size=8, max_iter=100, val_intervals=4, batch_size=2)
    state, setup, loop = probes.open_cell(cell)
    rates, steps = [], state.optimizer.step
    monkeypatch.setattr(state.optimizer, "step", lambda **skip: rates.append(
        state.optimizer.param_groups[0]["lr"]) or steps(**skip))
    assert probes.train_cell(state, setup, loop, TASKS["parity"], 2) == (4, None)
    assert state.step == len(rates) == 5 and rates[3] > rates[2]  # warmup


def test_unsolved_task_falls_at_the_end(monkeypatch):
    monkeypatch.setattr(probes, "evaluate_task", lambda *args: (1.0, 0.5))
    state, setup, loop = probes.open_cell(build_cell("parity", head_size=8, max_iter=10, batch_size=2))
    assert probes.train_cell(state, setup, loop, TASKS["parity"], 2) == (None, None) and state.step == 10


def test_diverged_cell_has_a_row_and_an_exit_code(tmp_path, capsys):
    flags = ["--cell=0", *TINY, "--tasks", "parity", "--arms", "learning_rate=1e9", f"--out_path={tmp_path}",
             "--max_iter=60", "--val_intervals=20"]
    with pytest.raises(SystemExit) as stop:
        probes.main(flags)
    assert stop.value.code == runtime.cli.DIVERGED
    path, = (tmp_path / "cells").iterdir()
    row = json.loads(path.read_text())
    assert row["status"] == "diverged" and row["accuracy_1x"] is None and "lower --learning_rate" in row["reason"]


def test_signal_ends_a_cell_without_a_row(tmp_path, monkeypatch):
    next_token_loss = probes.next_token_loss

    def interrupted(model, batch):
        signal.raise_signal(signal.SIGTERM)
        return next_token_loss(model, batch)
    monkeypatch.setattr(probes, "next_token_loss", interrupted)
    with pytest.raises(SystemExit) as stop:
        probes.run_cell(build_cell("parity"), tmp_path / "row")
    assert stop.value.code == 128 + signal.SIGTERM and not (tmp_path / "row").exists()


# -- the command, with cells that pretend -----------------------------------------------------------------------------

FAKE_CELL = """
import json, os, signal, sys
path, row, mode = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if mode == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "fails":
    print("Traceback …", "RuntimeError: no kernel", sep=chr(10), file=sys.stderr)
    sys.exit(1)
if mode != "vanishes":
    os.makedirs(os.path.dirname(path), exist_ok=True)
    diverged = {"status": "diverged", "solved": False, "steps": None, "reason": "loss is nan"}
    json.dump(row | diverged if mode == "diverges" else row, open(path, "w"))
sys.exit(3 if mode == "diverges" else 0)
"""


@pytest.fixture
def fake_cells(monkeypatch):
    """Cells are FAKE_CELL; fake_cells["mlp=gelu"] = mode of an arm, .ran lists the cells that were started."""
    class Modes(dict):
        ran = []
    modes = Modes()
    Modes.ran = []

    def command(job):
        Modes.ran.append((job.cell.arm, job.cell.task, job.cell.rate, job.cell.seed))
        row = probes.empty_row(job.cell) | {
            "status": "solved", "solved": True, "steps": 100, "parameters": 1000, "seconds": 6.0, "accuracy_1x": 1.0,
            "accuracy_2x": 0.5, "accuracy_4x": 0.25, "accuracy_8x": 0.125, "state_bytes": 512}
        if job.cell.rate != 2:  # at which alone a task is solved
            row |= {"status": "unsolved", "solved": False, "steps": None, "accuracy_1x": 0.9 - job.cell.rate / 10}
        if probes.is_looped(job.cell):
            row |= {f"accuracy_{n}_loops": 0.5 + 0.01 * n + 0.02 * job.cell.seed for n in LOOPS}
        return [sys.executable, "-S", "-c", FAKE_CELL, str(job.path), json.dumps(row), modes.get(job.cell.arm, "")]
    monkeypatch.setattr(probes.CellJob, "command", command)
    return modes


def test_command_writes_its_report_and_runs_no_cell_twice(fake_cells, tmp_path, capsys):
    flags = ["--seeds=2", "--arms", "mlp=relu2", "mlp=swiglu,positions=learned,learning_rate=0.1", "--tasks", "recall",
             "parity", f"--out_path={tmp_path}"]
    probes.main(flags)
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "probes.md").read_text(encoding="utf-8").strip()
    for words in ("| recall | 0.06 | solved 2/2, 100 steps: 1.00 0.50 0.25 0.12 |", "| task | chance | mlp=relu2 | mlp=",
                  "2 layers, 4 heads x 16", "at most 1,200 steps", "2 seeds", "1,000 parameters", "1.6 minutes",
                  "python probes.py --seeds=2", "| task | arm | bytes of state | 0.01 | 0.02 | 0.04 | 0.05 | 0.1 | 0.2 |",
                  "| recall | mlp=relu2 | 512 | 0.85 | 0.80 | **1.00, 100 steps** |  |  |  |"):
        assert words in text, words
    names = ("mlp=relu2", "mlp=swiglu,positions=learned,learning_rate=0.1")
    expected = [(arm, task, str(rate * base), "0") for task in ("recall", "parity") for arm, base in zip(names, (0.02, 0.1))
                for rate in (0.5, 1.0, 2.0)]
    expected += [(arm, task, str(2 * base), "1") for task in ("recall", "parity") for arm, base in zip(names, (0.02, 0.1))]
    assert [(row["arm"], row["task"], row["learning_rate"], row["seed"]) for row in read_csv(tmp_path)] == expected
    for name in ("probes.png", "probes.svg", "state.svg"):
        assert (tmp_path / name).stat().st_size > 5000
    assert len(list((tmp_path / "cells").iterdir())) == len(fake_cells.ran) == 16
    probes.main(flags)
    assert len(fake_cells.ran) == 16 and capsys.readouterr().out == text
    probes.main([*flags, "--max_iter=4"])  # other cells
    assert len(fake_cells.ran) == 32


def test_the_best_learning_rate_counts(fake_cells, tmp_path, capsys):
    """Solved before more accurate, fewer steps before more accurate; and where none solves the task, the most accurate."""
    rows = [{"solved": solved, "steps": steps, "accuracy_1x": accuracy} for solved, steps, accuracy in (
        (False, None, 0.985), (True, 300, 1.0), (True, 200, 0.98), (False, None, None))]
    assert [best_row(rows)["steps"], best_row(rows[:1] + rows[3:])["accuracy_1x"]] == [200, 0.985]
    probes.main(["--seeds=2", "--rates", "0.5", "1", "--tasks", "parity", f"--out_path={tmp_path}"])
    assert "| parity | 0.50 | not found: 0.85 0.50 0.25 0.12 |" in capsys.readouterr().out
    assert [rate for *_, rate, _ in fake_cells.ran] == [0.5, 1.0, 0.5]


def cell_config(arm: str, task: str = "recall_many", state_bytes: int | None = None):
    cell, *_ = probes.build_cells(ProbeConfig(arms=(arm,), tasks=(task,), state_bytes=state_bytes), CellConfig(), seed=0)
    return cell.configs()[0]


@pytest.mark.parametrize("arm, state_bytes", [("mixer=sliding", 40_000), ("mixer=gated_delta", 12_000), ("mixer=SD", 30_000),
                                              ("mixer=DA", 80_000)])
def test_states_are_matched(arm, state_bytes):
    """The largest that fits: the next larger one of the sizes would not."""
    config = cell_config(arm, state_bytes=state_bytes)
    n_bytes = lambda **sizes: probes.state_bytes(dataclasses.replace(config, **sizes), 128)
    assert n_bytes() <= state_bytes
    if config.window:
        assert n_bytes(window=config.window + 1) > state_bytes or config.d_head_size
    if config.d_head_size:
        assert n_bytes(d_head_size=config.d_head_size * 2) > state_bytes


def test_a_window_is_a_quarter_of_the_trained_length_unless_an_arm_sets_it():
    assert [cell_config(arm).window for arm in ("mixer=SA", "mixer=SA,window=7", "mixer=attention")] == [32, 7, None]
    assert cell_config("mixer=sliding,window=7", state_bytes=10 ** 6).window == 7


def test_loops_at_inference_are_reported_for_arms_that_have_them(fake_cells, tmp_path, capsys):
    flags = ["--tasks", "parity", f"--out_path={tmp_path}", "--rates", "2", "--arms", "mlp=gelu"]
    probes.main([*flags, "loops=4", "--seeds=2"])
    out = capsys.readouterr().out
    assert "| parity | loops=4 | 0.52 ± 0.13 | 0.53 ± 0.13 | 0.55" in out and "| parity | mlp=gelu | 0.5" not in out
    probes.main([*flags, "loops=4", "--seeds=1"])
    assert "| parity | loops=4 | 0.51 | 0.52 | 0.54 |" in capsys.readouterr().out
    probes.main([*flags, "--seeds=1"])
    assert "loops at inference" not in capsys.readouterr().out


@pytest.mark.parametrize("mode, status, reason", [
    ("dies", "killed", "by signal 9"), ("fails", "failed", "RuntimeError: no kernel"),
    ("vanishes", "failed", "its row is missing")])
def test_failed_cells_are_reported_and_run_again(fake_cells, tmp_path, capsys, mode, status, reason):
    flags = ["--seeds=1", "--rates", "2", "--tasks", "parity", "--arms", "mlp=gelu", "mlp=relu2", f"--out_path={tmp_path}"]
    fake_cells["mlp=gelu"] = mode
    with pytest.raises(SystemExit) as stop:
        probes.main(flags)
    out, error = capsys.readouterr()
    assert stop.value.code == 1 and "1 of 2 cells were not trained" in error and f"not found, 1 {status}: - - - -" in out
    assert f"parity, mlp=gelu, seed 0, learning rate 0.04: {status}: {reason}" in error
    assert [row["status"] for row in read_csv(tmp_path)] == [status, "solved"]
    fake_cells.clear()
    probes.main(flags)
    assert [row["status"] for row in read_csv(tmp_path)] == ["solved", "solved"] and len(fake_cells.ran) == 3


def test_diverged_cells_are_reported_and_not_run_again(fake_cells, tmp_path, capsys):
    flags = ["--seeds=1", "--rates", "2", "--tasks", "parity", "--arms", "mlp=gelu", "mlp=relu2", f"--out_path={tmp_path}"]
    fake_cells["mlp=gelu"] = "diverges"
    for _ in range(2):
        probes.main(flags)
    assert "- parity, mlp=gelu, seed 0, learning rate 0.04: diverged: loss is nan" in capsys.readouterr().out
    assert len(fake_cells.ran) == 2
    assert read_csv(tmp_path)[0]["status"] == "diverged"


@pytest.mark.parametrize("change", [
    lambda row: None, lambda row: [row], lambda row: row | {"accuracy_1x": "high"}, lambda row: row | {"accuracy_1x": None},
    lambda row: row | {"seconds": math.nan}, lambda row: row | {"steps": None}, lambda row: row | {"steps": 1.5},
    lambda row: row | {"arm": "mlp=gelu"}, lambda row: row | {"chance": 0.9}, lambda row: row | {"solved": False},
    lambda row: row | {"more": 1}, lambda row: row | {"reason": 3}, lambda row: row | {"parameters": [1]},
    lambda row: row | {"learning_rate": 0.02}, lambda row: row | {"state_bytes": None},
    lambda row: row | {"checksum": "0123456789"}, lambda row: {"status": "solved"}])
def test_damaged_row_is_trained_again(fake_cells, tmp_path, change):
    flags = ["--seeds=1", "--rates", "2", "--tasks", "parity", f"--out_path={tmp_path}"]
    probes.main(flags)
    path, = (tmp_path / "cells").iterdir()
    row = json.loads(path.read_text())
    path.write_text(json.dumps(change(row)))
    probes.main(flags)
    assert json.loads(path.read_text()) == row and len(fake_cells.ran) == 2


@pytest.mark.parametrize("flags, words", [
    (["--tasks", "juggling"], ["--tasks=juggling", "choose one of recall, "]),
    (["--arms", "mixer=magic"], ["--arms 'mixer=magic'", "one of attention"]),
    (["--arms", "mixr=attention"], ["--arms 'mixr=attention'", "no such flag"]),
    (["--arms", "block_size=64"], ["block_size cannot be set by an arm"]),
    (["--arms", "cooldown_frac=1"], ["cooldown_frac cannot be set by an arm"]),
    (["--arms", "dtype=bf16"], ["dtype cannot be set by an arm"]),
    (["--arms", "batch_size=auto"], ["batch_size=auto: give a number"]),
    (["--arms", "mixer=DDA"], ["--arms 'mixer=DDA'", "--n_layer=2"]),
    (["--arms", "sampled_loops=1"], ["--sampled_loops", "give 2 or more"]),
    (["--arms", "head_size=15"], ["--head_size=15", "even"]), (["--rates", "0"], ["--rates=0", "above 0"]),
    (["--state_bytes=1000", "--arms", "mixer=SD"], ["--arms 'mixer=SD'", "more than --state_bytes=1,000"]),
    (["--seeds=0"], ["--seeds=0", "at least 1"]),
    (["--device=cuda:99"], ["--device=cuda:99", "not on this machine"])])
def test_bad_input_is_refused_in_a_line(refused, tmp_path, flags, words):
    refused(probes.main, [f"--out_path={tmp_path / 'out'}", *flags], *words)
    assert not (tmp_path / "out").exists()


def test_out_path_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(probes.main, [f"--out_path={tmp_path / 'file'}", *TINY], "--out_path=", "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


# -- the command with real cells --------------------------------------------------------------------------------------

@pytest.mark.integration
def test_command_trains_the_cells_of_its_flags(tmp_path, forked):
    """Each cell's process is given what makes it that cell: its row is what the cell is in this process."""
    probes.main([*TINY, "--learning_rate=0.013", "--tasks", "parity", f"--out_path={tmp_path}"])
    row, = read_csv(tmp_path)
    cell = build_cell("parity", n_head=1, head_size=8, max_iter=5, val_intervals=2, learning_rate=0.013)
    expected = run_cell(cell, tmp_path / "row") | {"seconds": row["seconds"]}
    assert row == {name: "" if value is None else str(value) for name, value in expected.items()}


def children(process) -> list[int]:
    """The ids of its cells' processes."""
    found = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True,
                           text=True).stdout  # -ww: else lines are cut at the terminal's width
    return [int(line.split()[0]) for line in found.splitlines() if "--cell=" in line]


@pytest.mark.integration
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_the_cells(tmp_path):
    process = subprocess.Popen([sys.executable, REPO / "probes.py", *TINY, "--tasks", "parity", "sort", "--jobs=2",
                                "--max_iter=100_000", f"--out_path={tmp_path}"], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 120
    while len(cells := children(process)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(cells) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command continues" in error and "Traceback" not in error, error
    for pid in cells:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_dry_run_counts_what_is_not_finished_and_writes_nothing(tmp_path, capsys):
    arms = ["mlp=gelu", "loops=2,sampled_loops=1"]
    flags = [*TINY, "--arms", *arms, "--tasks", "parity", "--seeds=2", f"--out_path={tmp_path / 'out'}"]
    probes.main([*flags, "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == arms and lines[2].startswith("4 of 4 cells")
    assert not list(tmp_path.iterdir())
    probes.main([*flags, "--arms", "mlp=gelu", "--cell=1"])
    capsys.readouterr()
    probes.main([*flags, "--dry_run"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 of 4 cells")
