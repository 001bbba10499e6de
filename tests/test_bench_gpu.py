"""bench/gpu.py: the rehearsal of every stage, and stages that fail, crash or hang without affecting the others."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import gpu
import pytest
import side_by_side
from gpu_stages import FORBIDDEN, Stage, draw_curves_svg, format_row

import conftest
from conftest import REPO
from runtime.config import BadInput

ROWS = {"tests": 11, "speed": 4, "6gb": 1, "architectures": 3, "curves": 6, "decode": 2, "answer": 6}  # at least


def read_results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stages", [
    pytest.param(list(ROWS), marks=pytest.mark.slow, id="all"),
    # two minutes less: what is compiled, and what the tests marked gpu compute, is tested on CPUs elsewhere
    pytest.param([name for name in ROWS if name not in ("tests", "speed", "6gb")], id="most")])
def test_the_rehearsal(tmp_path, stages):
    """Every stage runs on a CPU without the packages that the GPU's machine may lack; the summary has a line for each."""
    only = ["--only", *stages] if stages != list(ROWS) else []
    done = subprocess.run([sys.executable, "bench/gpu.py", "--rehearse", "--minutes=30", f"--out_path={tmp_path}", *only],
                          cwd=REPO, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-2000:], logs)
    rows, lines = read_results(tmp_path), done.stdout.splitlines()
    assert rows[0]["rehearsal"] and [row["stage"] for row in rows if row.get("status") == "passed"] == stages
    assert list(gpu.STAGES) == list(ROWS)
    for stage in stages:
        n = ROWS[stage]
        stage_rows = [row for row in rows if row.get("stage") == stage]
        assert len(stage_rows) > n and stage_rows[-1]["status"] == "passed", stage_rows
        assert not any("error" in row for row in stage_rows)
        (summary,) = (line for line in lines[-9:] if line.startswith(f"{stage} "))
        assert "passed" in summary and len(summary) < 80
    speeds = [row for row in rows if row.get("stage") == "speed" and "name" in row and "figure" not in row]
    assert bool(speeds) == ("speed" in stages)
    assert all(row[name] > 0 for row in speeds for name in ("tok_per_sec", "mfu", "optimizer_share"))
    assert "TensorBoard is not installed" in logs["curves.txt"]  # it is: stages cannot import it
    assert ET.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.jsonl", "curves.svg", "answer.svg", *(f"{name}.txt" for name in stages)}


@pytest.mark.integration
def test_forbidden_packages_cannot_be_imported():
    """Although they are installed here."""
    program = """
import sys; sys.path.insert(0, "bench")
import gpu_stages; gpu_stages.forbid_imports()
for package in ("datasets", "matplotlib.pyplot", "torch.utils.tensorboard"):
    try:
        __import__(package)
    except ModuleNotFoundError:
        print(package)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.split() == ["datasets", "matplotlib.pyplot", "torch.utils.tensorboard"], done.stderr
    assert {"datasets", "gguf", "matplotlib", "scipy", "tenacity", "tensorboard"} <= set(FORBIDDEN)


STAGE = """
import json, os, signal, sys, time
task = json.loads(sys.argv[1])
def row(**figures):
    with open(task["out_path"] + "/results.jsonl", "a") as file:
        file.write(json.dumps({"stage": task["stage"], "card": "A Card", **figures}) + "\\n")
row(name="first", tok_per_sec=5)
if task["stage"] == "crashes":
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
if task["stage"] == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        time.sleep(600)  # and a child hangs too, which holds its output open
    time.sleep(600)
if task["stage"] == "fails":
    row(name="second", error="ValueError: a bug")
    sys.exit(1)
if task["stage"] == "prints":
    for i in range(3000):
        print("line", i)
row(name="summary", figure="all is well")
"""


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """bench/gpu.py with stages that misbehave, and short time limits."""
    script = tmp_path / "stages.py"
    script.write_text(STAGE)
    monkeypatch.setattr(gpu, "SCRIPT", script)
    monkeypatch.setattr(gpu, "LEEWAY", 0.5)
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    names = "fails", "crashes", "hangs", "prints"
    monkeypatch.setattr(gpu, "STAGES", {name: Stage(None, f"it {name}", 0.5 if name == "hangs" else 30) for name in names})
    return names


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.integration
def test_a_stage_that_fails_crashes_or_hangs_does_not_affect_the_others(stages, tmp_path, capsys):
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--rehearse", f"--out_path={tmp_path / 'out'}"])
    assert stop.value.code == 1 and time.monotonic() - start < 20
    rows = read_results(tmp_path / "out")
    ends = {row["stage"]: (row["status"], row["reason"]) for row in rows if "status" in row}
    assert ends == {"fails": ("failed", "second: ValueError: a bug"),
                    "crashes": ("failed", f"killed by signal {signal.SIGSEGV.value}: see crashes.txt"),
                    "hangs": ("failed", "killed after 1 s"), "prints": ("passed", "")}
    assert [row["stage"] for row in rows if row.get("name") == "first"] == list(stages)
    assert "about to crash" in (tmp_path / "out" / "crashes.txt").read_text()
    kept = (tmp_path / "out" / "prints.txt").read_text().splitlines()
    assert kept == [f"line {i}" for i in range(3000 - gpu.OUTPUT, 3000)]
    assert "all is well" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.integration
def test_an_interrupted_run_prints_its_results(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STAGES", {name: Stage(None, f"it {name}", 30) for name in ("hangs", "prints")})
    wait, interrupted = subprocess.Popen.wait, []

    def interrupt(process, timeout=None):
        if not interrupted and any("name" in row for row in read_results(tmp_path / "out")):
            interrupted.append(True)
            signal.raise_signal(signal.SIGINT)
        return wait(process, timeout)
    monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--rehearse", f"--out_path={tmp_path / 'out'}"])
    assert stop.value.code == 128 + signal.SIGINT
    ends = {row["stage"]: (row["status"], row["reason"]) for row in read_results(tmp_path / "out") if "status" in row}
    assert ends == {"hangs": ("failed", "interrupted"), "prints": ("skipped", "interrupted")}
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("left, compiles, words", [(60, True, None), (20, True, "20 s left, 30 needed"), (20, False, None),
                                                   (-1, False, "0 s left, 5 needed")])
def test_tests_that_would_not_end_in_time_are_skipped(monkeypatch, left, compiles, words):
    monkeypatch.setenv("GPU_TESTS_END", str(time.time() + left + 0.4))
    item = SimpleNamespace(get_closest_marker=lambda name: compiles or None,
                           config=SimpleNamespace(getoption=lambda name: False))
    with pytest.raises(pytest.skip.Exception, match=words) if words else contextlib.nullcontext():
        conftest.pytest_runtest_setup(item)


def test_time_limits_leave_later_stages_their_minimum():
    """Of 8 minutes, where every stage takes all the time it may."""
    left, seconds = 480.0, {}
    names = [name for name, stage in gpu.STAGES.items() if not stage.on_request]
    for i, name in enumerate(names):
        seconds[name] = gpu.time_limit(name, left, names[i + 1:])
        left -= seconds[name]
    assert seconds == {"tests": 90, "speed": 120, "6gb": 40, "architectures": 85, "curves": 120, "decode": 25}
    assert gpu.time_limit("curves", 400, ["decode"]) == 375
    assert gpu.time_limit("decode", 10, []) == 10
    assert gpu.time_limit("tests", 1000, ["curves"], minutes=16) == 180


@pytest.mark.parametrize("flags, words", [
    ([], ["no GPU", "--rehearse"]), (["--only", "speed", "sped"], ["--only=sped", "choose one of tests"]),
    (["--text=nowhere.txt"], ["--text=nowhere.txt", "not found"]), (["--minutes=0"], ["--minutes=0"]),
    (["--rehearse", "--text=pyproject.toml"], ["--text=pyproject.toml", "give parquet"]),
    (["--rehearse", "--data_path=tests"], ["--data_path=tests", "download_data.py"]),
    (["--text=LICENSE", "--data_path=tests"], ["--text=LICENSE", "one of them"]),
    (["--readme"], ["--readme", "results.jsonl", "no rows"])])
def test_a_wrong_command_line_is_refused(refused, monkeypatch, tmp_path, flags, words):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(REPO)
    refused(gpu.main, [*flags, f"--out_path={tmp_path / 'out'}"], *words)
    assert not (tmp_path / "out").exists()


def test_the_table_has_the_latest_row_of_each_measurement(tmp_path, monkeypatch):
    """By hand: of the runs on the GPU of the last run, without rehearsals."""
    path = tmp_path / "results.jsonl"
    speed = {"stage": "speed", "name": "default", "card": "A Card (sm_90, 80 GiB)", "tok_per_sec": 1234.5, "mfu": 0.4321}
    card = {"card": speed["card"]}
    rows = [{"began": "on Monday", "rehearsal": False}, {**speed, "tok_per_sec": 1.0}, {**speed, "name": "old", **card},
            {"stage": "6gb", "name": "other", "tok_per_sec": 9.0, "card": "Another"},
            {"began": "on Tuesday", "rehearsal": False}, speed,
            {"stage": "tests", "name": "a_test", "outcome": "passed", **card},
            {"stage": "speed", "name": "gpt2", "error": "no | idea", **card},
            {"stage": "speed", "name": "nanoGPT", "skipped": "no time", **card},
            {"stage": "speed", "name": "summary", "figure": "fast", **card},
            {"stage": "tests", "status": "failed", "reason": "killed", "figure": "", **card},
            {"stage": "speed", "status": "passed", "reason": "", "figure": "fast", **card},
            {"stage": "6gb", "status": "skipped", "reason": "not in --only", "figure": "", "card": ""},
            {"began": "on Wednesday", "rehearsal": True}, {**speed, "tok_per_sec": 2.0, "card": "A CPU"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut o')
    table = ["| stage | measurement | result |", "|---|---|---|", "| speed | old | 1,234 tok/s, MFU 43.2% |",
             "| speed | default | 1,234 tok/s, MFU 43.2% |", "| speed | gpt2 | FAILED: no \\| idea |", "",
             "A Card (sm_90, 80 GiB): `python bench/gpu.py`. tests failed (killed); speed passed (fast)."]
    assert gpu.markdown_table(gpu.latest_rows(path)).splitlines() == table
    with pytest.raises(BadInput, match="no rows of a run"):
        gpu.latest_rows(tmp_path / "none.jsonl")
    monkeypatch.setattr(side_by_side, "REPO", tmp_path)
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- bench/gpu.py -->\nold\n<!-- end of bench/gpu.py -->\nafter\n")
    for _ in range(2):
        gpu.main(["--readme", f"--out_path={tmp_path}"])
        assert page.read_text().splitlines() == ["before", "<!-- bench/gpu.py -->", *table, "<!-- end of bench/gpu.py -->",
                                                 "after"]


def test_without_markers_in_the_page_the_table_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "REPO", tmp_path)
    with pytest.raises(BadInput, match="benchmarks.md: has no lines <!-- bench/gpu.py -->"):
        side_by_side.write_into_docs("bench/gpu.py", "a table")


def test_curves_by_hand(tmp_path):
    """A lower loss is drawn lower, more seconds or tokens further right; a run with one row is drawn too."""
    runs = {"a": [{"seconds": 0, "tokens": 0, "val_loss": 9.0}, {"seconds": 10, "tokens": 5, "val_loss": 3.0}],
            "b": [{"seconds": 0, "tokens": 0, "val_loss": 9.0}, {"seconds": 8, "tokens": 9, "val_loss": 6.0}]}
    draw_curves_svg(runs, tmp_path / "curves.svg", "A & B")
    root = ET.parse(tmp_path / "curves.svg").getroot()
    lines = [line.get("points").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    ends = [[float(n) for n in line[-1].split(",")] for line in lines]
    assert ends[0][1] > ends[1][1] and ends[0][0] > ends[1][0]           # lower, and further right in seconds
    assert ends[2][1] > ends[3][1] and ends[2][0] < ends[3][0]           # with fewer tokens
    assert lines[0][0] == lines[1][0]
    draw_curves_svg({"a": runs["a"][:1], "b": []}, tmp_path / "curves.svg", "")
    assert format_row({"val_loss": 3.0, "card": "A Card"}) == "val 3.0000 nats/token"
