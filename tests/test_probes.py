"""The probes: every task against a slow oracle, and the command on tiny arms."""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import probes
from conftest import REPO
from dataloader import IGNORE_INDEX
from probes import SCALES
from tasks import synthetic
from tasks.synthetic import TASKS

NONE = IGNORE_INDEX
TINY = ["--n_layer=1", "--n_head=1", "--head_size=8", "--batch_size=4", "--max_iter=5", "--val_intervals=2", "--seeds=1"]


# -- oracles: the answers again from the inputs alone, one row at a time ----------------------------------------------

def recall(row):
    n = len(row) // 4
    known = dict(zip(row[:2 * n:2], row[1:2 * n:2]))
    assert len(known) == n and sorted(row[2 * n::2]) == sorted(known)
    return [NONE] * 2 * n + [answer for key in row[2 * n::2] for answer in (known[key], NONE)]


def induction(row):
    n, answers = len(row) // 2, []
    assert len(set(row[:n])) == n and sorted(row[:n]) == sorted(row[n:])
    for symbol in row[n:]:
        after = row[:n].index(symbol) + 1
        answers.append(row[after] if after < n else NONE)
    return [NONE] * n + answers


def after_the_sign(row, n, result):
    """A row of n tokens, a sign, and the result but for its last."""
    assert row[n + 1:] == result[:-1]
    return [NONE] * n + result


def selective_copy(row):
    n = len(row) // 4
    copied = [symbol for symbol in row[:3 * n] if symbol != 0]
    assert len(copied) == n and row[3 * n] == 17
    return after_the_sign(row, 3 * n, copied)


def sort(row):
    n = len(row) // 2
    assert row[n] == 64
    return after_the_sign(row, n, sorted(row[:n]))


def parity(row):
    return [row[:t + 1].count(1) % 2 for t in range(len(row))]


def modular(row):
    return [sum(row[:t + 1]) % 5 for t in range(len(row))]


def permute(row):
    """Moves three things, rather than looking up products."""
    moves, things, answers = synthetic.PERMUTATIONS, [0, 1, 2], []
    for symbol in row:
        things = [moves[symbol][thing] for thing in things]
        answers.append(moves.index(tuple(things)))
    return answers


def dyck(row, kinds=8, depth=4):
    """The last answer follows the row's end, so only its place in the stack is known."""
    answers, stack = [], []
    for t, bracket in enumerate(row):
        if bracket < kinds:
            stack.append(bracket)
        else:
            assert stack.pop() == bracket - kinds
        assert len(stack) <= depth
        closes = t + 1 < len(row) and row[t + 1] >= kinds
        answers.append(kinds + stack[-1] if closes else NONE)
    return answers


def automaton(row):
    answers, seen = [], {}
    for t, token in enumerate(row):
        place = t % 15
        assert (token == 0) == (place == 0) and (place == 0 or (1 <= token <= 5) == (place % 2 == 0))
        answers.append(seen.get((row[t - 1], token), NONE) if place % 2 else NONE)
        if place and place % 2 == 0:
            assert seen.setdefault((row[t - 2], row[t - 1]), token) == token
    return answers


ORACLES = {"recall": recall, "recall_many": recall, "induction": induction, "selective_copy": selective_copy, "sort": sort,
           "parity": parity, "modular": modular, "permute": permute, "dyck": dyck, "automaton": automaton}


def made(name, scale=1, n=16, seed=5):
    return TASKS[name].make(np.random.default_rng(seed), n, scale * TASKS[name].length)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TASKS)
def test_answers_are_those_of_a_slow_oracle(name, scale):
    inputs, targets = made(name, scale)
    assert inputs.shape == targets.shape == (16, scale * TASKS[name].length)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.min() >= 0 and max(inputs.max(), targets.max()) < TASKS[name].vocab_size
    for row, answers in zip(inputs.tolist(), targets.tolist()):
        expected = ORACLES[name](row)
        if name == "dyck":  # whether the bracket after the end closes, its row does not say
            assert answers[:-1] == expected[:-1]
        else:
            assert answers == expected


def test_dycks_last_answer_closes_what_is_open():
    inputs, targets = made("dyck", n=64)
    for row, answer in zip(inputs.tolist(), targets[:, -1].tolist()):
        stack = []
        for bracket in row:
            stack = [*stack, bracket] if bracket < 8 else stack[:-1]
        assert answer == NONE or answer == 8 + stack[-1]
    assert 0 < (targets[:, -1] == NONE).sum() < 64


def test_tasks_by_hand():
    assert recall([3, 40, 7, 41, 7, 41, 3, 40]) == [NONE] * 4 + [41, NONE, 40, NONE]
    assert induction([5, 9, 2, 9, 2, 5]) == [NONE] * 3 + [2, NONE, 9]
    assert parity([1, 0, 1, 1]) == [1, 1, 0, 1]
    swap, turn = synthetic.PERMUTATIONS.index((1, 0, 2)), synthetic.PERMUTATIONS.index((1, 2, 0))
    assert synthetic.AFTER[swap, turn] != synthetic.AFTER[turn, swap]  # the order counts
    assert synthetic.AFTER[swap, swap] == synthetic.PERMUTATIONS.index((0, 1, 2))


@pytest.mark.parametrize("name", TASKS)
def test_guessing_is_what_choosing_evenly_scores(name):
    task, rng = TASKS[name], np.random.default_rng(1)
    answers = np.concatenate([targets[targets != NONE] for _, targets in (made(name, n=200, seed=s) for s in range(4))])
    possible = np.unique(answers)
    assert len(possible) == task.n_answers
    right = (rng.choice(possible, size=len(answers)) == answers).mean()
    assert right == pytest.approx(task.guessing, abs=4 * (task.guessing / len(answers)) ** 0.5)


@pytest.mark.parametrize("name", TASKS)
def test_data_depends_on_the_seed_alone(name):
    task = TASKS[name]
    first = lambda seed: next(probes.examples(task, 8, seed))[0]
    assert (first(1) == first(1)).all()
    assert (first(1) != first(2)).any()
    stream = probes.examples(task, 8, 1)
    assert (next(stream)[0] != next(stream)[0]).any()
    validation = task.make(np.random.default_rng([0, 1]), probes.EXAMPLES, task.length)[0]
    seen = {tuple(row) for row in validation.tolist()}
    assert not any(tuple(row) in seen for row in first(0).tolist() + first(1).tolist())


# -- the command ------------------------------------------------------------------------------------------------------

def rows_of(folder):
    with open(folder / "probes.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_all_and_runs_nothing_twice(tmp_path, capsys, monkeypatch):
    flags = [*TINY, "--arms", "mlp=relu2", "mlp=swiglu,positions=learned", "--tasks", "recall", "parity",
             f"--out_path={tmp_path}"]
    probes.main(flags)
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "probes.md").read_text(encoding="utf-8").strip()
    for words in ("| recall | 0.06 | solved 0/1", "| task | guessing | mlp=relu2 | mlp=swiglu,positions=learned |",
                  "1 layers", "at most 5 steps", "1 seeds", "parameters", "python probes.py --n_layer=1"):
        assert words in text, words
    rows = rows_of(tmp_path)
    assert [(row["arm"], row["task"]) for row in rows] == [
        (arm, task) for task in ("recall", "parity") for arm in ("mlp=relu2", "mlp=swiglu,positions=learned")]
    assert {row["status"] for row in rows} == {"unsolved"}
    assert all(0 <= float(row[f"accuracy_{scale}x"]) <= 1 for row in rows for scale in SCALES)
    for kind in ("png", "svg"):
        assert (tmp_path / f"probes.{kind}").stat().st_size > 5000
    assert len(list((tmp_path / "cells").iterdir())) == 4

    trained = []
    monkeypatch.setattr(probes, "train_cell", lambda state, loop, task: trained.append(loop.max_iter) or (None, None))
    probes.main(flags)
    assert not trained and capsys.readouterr().out == text
    probes.main([*flags, "--max_iter=4"])  # other cells
    assert trained == [4] * 4


def test_a_cell_has_the_same_numbers_again(tmp_path):
    cell, = probes.plan(probes.ProbeConfig(tasks=("dyck",), seeds=1), probes.CellConfig(n_layer=1, max_iter=4, batch_size=4))
    a, b = probes.run_cell(cell), probes.run_cell(cell)
    assert a | {"seconds": 0} == b | {"seconds": 0}


def test_an_easy_task_is_solved_and_ends_early(tmp_path, capsys):
    probes.main(["--tasks", "recall", "--n_layer=2", "--seeds=1", "--val_intervals=25", "--max_iter=500",
                 f"--out_path={tmp_path}"])
    row, = rows_of(tmp_path)
    assert row["status"] == "solved" and row["solved"] == "True" and 25 <= int(row["steps"]) <= 300
    assert float(row["accuracy_1x"]) > 0.99 > float(row["accuracy_4x"]) > 0.2
    assert f"solved 1/1, {row['steps']} steps: 1.00" in capsys.readouterr().out


def test_the_rate_falls_from_where_the_task_was_solved(monkeypatch):
    """Solved at step 4 of at most 100: one more fifth of all steps, then it is over."""
    monkeypatch.setattr(probes, "examine", lambda model, task, machine, scale, batch_size: (1.0, float(state.step >= 4)))
    cell, = probes.plan(probes.ProbeConfig(tasks=("parity",), seeds=1),
                        probes.CellConfig(n_layer=1, head_size=8, max_iter=100, val_intervals=4, batch_size=2))
    state, loop = probes.open_cell(cell)
    assert probes.train_cell(state, loop, TASKS["parity"]) == (4, None)
    assert state.step == 5 and state.schedule.cooldown_frac == probes.COOLDOWN


def test_a_cell_that_diverges_is_told_and_not_averaged(tmp_path, capsys):
    flags = [*TINY, "--tasks", "parity", "--arms", "learning_rate=1e9", "mlp=gelu", f"--out_path={tmp_path}",
             "--max_iter=60", "--val_intervals=20"]
    probes.main(flags)
    text = capsys.readouterr().out
    broken, sound = rows_of(tmp_path)
    assert broken["status"] == "diverged" and broken["accuracy_1x"] == "" and "lower --learning_rate" in broken["reason"]
    assert sound["status"] in ("solved", "unsolved")
    assert "solved 0/1, 1 diverged: - - -" in text and "learning_rate=1e9, seed 0: diverged: " in text


def test_a_cell_that_fails_is_told_and_tried_again(tmp_path, capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel\nfor this")
    flags = [*TINY, "--tasks", "parity", f"--out_path={tmp_path}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(probes, "train_cell", broken)
        probes.main(flags)
    told = capsys.readouterr()
    assert stop.value.code == 1 and "1 of 1 cells were not trained" in told.err and "1 failed" in told.out
    assert rows_of(tmp_path)[0]["reason"] == "RuntimeError: no kernel for this"
    probes.main(flags)
    assert rows_of(tmp_path)[0]["status"] == "unsolved"


def test_ctrl_c_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    flags = [*TINY, "--tasks", "parity", "sort", f"--out_path={tmp_path}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        in_step = probes.next_token_loss

        def interrupted(model, batch):
            if model.config.vocab_size == TASKS["sort"].vocab_size:
                signal.raise_signal(signal.SIGINT)
            return in_step(model, batch)
        patch.setattr(probes, "next_token_loss", interrupted)
        probes.main(flags)
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    cell, = (tmp_path / "cells").iterdir()
    assert cell.name.startswith("parity-0-mixer=attention")
    before = cell.stat().st_mtime_ns
    probes.main(flags)
    assert cell.stat().st_mtime_ns == before and len(rows_of(tmp_path)) == 2


def children_of(process) -> list[int]:
    """Workers, without the tracker that multiprocessing starts. -ww: else `ps` cuts lines at the terminal's width."""
    found = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True,
                           text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "spawn_main" in line]


def workers_of(process) -> list[int]:
    end = time.monotonic() + 60
    while not (found := children_of(process)) and time.monotonic() < end:
        time.sleep(0.05)
    assert found, "no worker within a minute"
    return found


def start(*flags):
    return subprocess.Popen([sys.executable, REPO / "probes.py", *TINY, *flags], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_worker_is_told_and_the_others_go_on(tmp_path):
    process = start("--tasks", "parity", "sort", "recall", "--jobs=2", f"--out_path={tmp_path}")
    os.kill(workers_of(process)[0], signal.SIGKILL)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1, error
    assert sorted(row["status"] for row in rows_of(tmp_path)) == ["killed", "unsolved", "unsolved"]
    assert "its process ended by signal 9" in out and "killed, its process ended by signal 9" in error


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_the_workers(tmp_path):
    process = start("--tasks", "parity", "sort", "--jobs=2", "--max_iter=100_000", f"--out_path={tmp_path}")
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error and "the same command goes on" in error, error
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


@pytest.mark.parametrize("flags, words", [
    (["--tasks", "juggling"], ["--tasks=juggling", "choose one of recall, "]),
    (["--arms", "mixer=magic"], ["--arms 'mixer=magic'", "one of attention"]),
    (["--arms", "mixr=attention"], ["--arms 'mixr=attention'", "no such flag"]),
    (["--arms", "block_size=64"], ["block_size is not an arm's to set here"]),
    (["--arms", "batch_size=auto"], ["batch_size=auto: give a number"]),
    (["--arms", "mixer=DDA"], ["--arms 'mixer=DDA'", "the 2 of --n_layer"]),
    (["--arms", "head_size=15"], ["--head_size=15", "even"]),
    (["--seeds=0"], ["--seeds=0", "at least 1"]),
    (["--device=cuda:99"], ["--device=cuda:99", "not on this machine"])])
def test_bad_input_is_refused_in_a_line(refused, tmp_path, flags, words):
    refused(probes.main, [f"--out_path={tmp_path / 'out'}", *flags], *words)
    assert not (tmp_path / "out").exists()


def test_an_out_path_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(probes.main, [f"--out_path={tmp_path / 'file'}", *TINY], "--out_path=", "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_cell_is_trained_again(tmp_path):
    flags = [*TINY, "--tasks", "parity", f"--out_path={tmp_path}"]
    probes.main(flags)
    cell, = (tmp_path / "cells").iterdir()
    whole = json.loads(cell.read_text())
    cell.write_text('{"status": ')
    probes.main(flags)
    assert json.loads(cell.read_text()) | {"seconds": 0} == whole | {"seconds": 0}
