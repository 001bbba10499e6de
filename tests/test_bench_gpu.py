"""bench/gpu.py: the rehearsal of everything, and that no stage can take the others along."""
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import gpu
import pytest
from gpu_stages import FORBIDDEN, Stage, curves_as_svg, line_of

from conftest import REPO
from runtime.config import BadInput

ROWS = {"right": 11, "speed": 4, "six": 1, "architectures": 3, "curves": 6, "decode": 2}  # at least


def rows_in(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_rehearsal(tmp_path):
    """Every stage runs on a CPU, without any package that a card's machine may lack, and says so in a few lines."""
    done = subprocess.run([sys.executable, "bench/gpu.py", "--rehearse", f"--out_path={tmp_path}"], cwd=REPO,
                          capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-2000:], logs)
    rows, lines = rows_in(tmp_path), done.stdout.splitlines()
    assert rows[0]["rehearsal"] and [row["stage"] for row in rows if "status" in row] == list(gpu.STAGES) == list(ROWS)
    for stage, n in ROWS.items():
        of_stage = [row for row in rows if row.get("stage") == stage]
        assert len(of_stage) > n and of_stage[-1]["status"] == "passed", of_stage
        assert not any("error" in row for row in of_stage)
        summary, = (line for line in lines[-8:] if line.startswith(f"{stage} "))
        assert "passed" in summary and len(summary) < 80
    assert all(row["tok_per_sec"] > 0 and row["mfu"] > 0 for row in rows if row.get("stage") == "speed" and "name" in row
               and "figure" not in row)
    assert "TensorBoard is not installed" in logs["curves.txt"]  # which it is here: no stage could import what is forbidden
    assert ET.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "curves.svg", *(f"{name}.txt" for name in ROWS)}


def test_what_a_cards_machine_lacks_is_not_there_for_it():
    """Also where it is installed, as here."""
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
    assert {"datasets", "gguf", "matplotlib", "tensorboard"} <= set(FORBIDDEN)


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
        time.sleep(600)  # and so does what it has started, which holds its output
    time.sleep(600)
if task["stage"] == "fails":
    row(name="second", error="ValueError: of no use")
    sys.exit(1)
if task["stage"] == "talks":
    for i in range(3000):
        print("line", i)
row(name="in short", figure="all is well")
"""


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """bench/gpu.py with stages that misbehave, and little patience."""
    script = tmp_path / "stages.py"
    script.write_text(STAGE)
    monkeypatch.setattr(gpu, "SCRIPT", script)
    monkeypatch.setattr(gpu, "LEEWAY", 0.5)
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    names = "fails", "crashes", "hangs", "talks"
    monkeypatch.setattr(gpu, "STAGES", {name: Stage(None, f"it {name}", 0.5 if name == "hangs" else 30) for name in names})
    return names


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_stage_that_fails_crashes_or_hangs_leaves_the_others_alone(stages, tmp_path, capsys):
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--rehearse", f"--out_path={tmp_path / 'out'}"])
    assert stop.value.code == 1 and time.monotonic() - start < 20
    rows = rows_in(tmp_path / "out")
    ends = {row["stage"]: (row["status"], row["reason"]) for row in rows if "status" in row}
    assert ends == {"fails": ("failed", "second: ValueError: of no use"),
                    "crashes": ("failed", f"killed by signal {signal.SIGSEGV.value}: see crashes.txt"),
                    "hangs": ("failed", "cut off after 1 s"), "talks": ("passed", "")}
    assert [row["stage"] for row in rows if row.get("name") == "first"] == list(stages)
    assert "about to crash" in (tmp_path / "out" / "crashes.txt").read_text()
    assert (tmp_path / "out" / "talks.txt").read_text().splitlines() == [f"line {i}" for i in range(2900, 3000)]
    assert "all is well" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupted_run_tells_what_it_has(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STAGES", {name: Stage(None, f"it {name}", 30) for name in ("hangs", "talks")})
    wait, interrupted = subprocess.Popen.wait, []

    def interrupt(process, timeout=None):
        if not interrupted and any("name" in row for row in rows_in(tmp_path / "out")):
            interrupted.append(True)
            signal.raise_signal(signal.SIGINT)
        return wait(process, timeout)
    monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--rehearse", f"--out_path={tmp_path / 'out'}"])
    assert stop.value.code == 128 + signal.SIGINT
    ends = {row["stage"]: (row["status"], row["reason"]) for row in rows_in(tmp_path / "out") if "status" in row}
    assert ends == {"hangs": ("failed", "interrupted"), "talks": ("left out", "interrupted")}
    assert "left out" in capsys.readouterr().out


def test_each_stage_leaves_the_next_ones_their_least():
    """Of 8 minutes, all of which the stages before take."""
    left, seconds = 480.0, {}
    for i, name in enumerate(gpu.STAGES):
        seconds[name] = gpu.seconds_for(name, left, list(gpu.STAGES)[i + 1:])
        left -= seconds[name]
    assert seconds == {"right": 90, "speed": 120, "six": 60, "architectures": 65, "curves": 120, "decode": 25}
    assert gpu.seconds_for("curves", 400, ["decode"]) == 375
    assert gpu.seconds_for("decode", 10, []) == 10
    assert gpu.seconds_for("right", 1000, ["curves"], minutes=16) == 180


@pytest.mark.parametrize("flags, words", [
    ([], ["no GPU", "--rehearse"]), (["--only", "speed", "sped"], ["--only=sped", "choose one of right"]),
    (["--text=nowhere.txt"], ["--text=nowhere.txt", "not found"]), (["--minutes=0"], ["--minutes=0"]),
    (["--rehearse", "--text=pyproject.toml"], ["--text=pyproject.toml", "give .parquet"]),
    (["--rehearse", "--data_path=tests"], ["--data_path=tests", "download_data.py"]),
    (["--text=LICENSE", "--data_path=tests"], ["--text=LICENSE", "one of them"]),
    (["--readme"], ["--readme", "results.jsonl", "no rows"])])
def test_what_cannot_be_run(refused, monkeypatch, tmp_path, flags, words):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(REPO)
    refused(gpu.main, [*flags, f"--out_path={tmp_path / 'out'}"], *words)
    assert not (tmp_path / "out").exists()


def test_the_readmes_table_by_hand(tmp_path):
    """The newest row of each measurement on the card of the last run; no rehearsal."""
    path = tmp_path / "results.jsonl"
    speed = {"stage": "speed", "name": "default", "card": "A Card (sm_90, 80 GiB)", "tok_per_sec": 1234.5, "mfu": 0.4321}
    card = {"card": speed["card"]}
    rows = [{"began": "on Monday", "rehearsal": False}, {**speed, "tok_per_sec": 1.0}, {**speed, "name": "old", **card},
            {"stage": "six", "name": "other", "tok_per_sec": 9.0, "card": "Another"},
            {"began": "on Tuesday", "rehearsal": False}, speed,
            {"stage": "right", "name": "a_test", "outcome": "passed", **card},
            {"stage": "speed", "name": "gpt2", "skipped": "no | time", **card},
            {"stage": "speed", "name": "in short", "figure": "fast", **card},
            {"stage": "right", "status": "failed", "reason": "cut off", "figure": "", **card},
            {"stage": "speed", "status": "passed", "reason": "", "figure": "fast", **card},
            {"stage": "six", "status": "left out", "reason": "not in --only", "figure": "", "card": ""},
            {"began": "on Wednesday", "rehearsal": True}, {**speed, "tok_per_sec": 2.0, "card": "A CPU"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut o')
    assert gpu.readme_text(gpu.proven(path)).splitlines() == [
        "| stage | what | result |", "|---|---|---|", "| speed | old | 1,234 tok/s, MFU 43.2% |",
        "| speed | default | 1,234 tok/s, MFU 43.2% |", "| speed | gpt2 | left out: no \\| time |", "",
        "A Card (sm_90, 80 GiB): `python bench/gpu.py`. right failed (cut off); speed passed (fast)."]
    with pytest.raises(BadInput, match="no rows of a run"):
        gpu.proven(tmp_path / "none.jsonl")


def test_curves_by_hand(tmp_path):
    """The better side ends lower; of a run that has just begun there is a picture too."""
    runs = {"a": [{"seconds": 0, "tokens": 0, "val_loss": 9.0}, {"seconds": 10, "tokens": 5, "val_loss": 3.0}],
            "b": [{"seconds": 0, "tokens": 0, "val_loss": 9.0}, {"seconds": 8, "tokens": 9, "val_loss": 6.0}]}
    curves_as_svg(runs, tmp_path / "curves.svg", "A & B")
    root = ET.parse(tmp_path / "curves.svg").getroot()
    lines = [line.get("points").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    ends = [[float(n) for n in line[-1].split(",")] for line in lines]
    assert ends[0][1] > ends[1][1] and ends[0][0] > ends[1][0]           # lower, and further right in seconds
    assert ends[2][1] > ends[3][1] and ends[2][0] < ends[3][0]           # with fewer tokens
    assert lines[0][0] == lines[1][0]
    curves_as_svg({"a": runs["a"][:1], "b": []}, tmp_path / "curves.svg", "")
    assert line_of({"val_loss": 3.0, "card": "A Card"}) == "val 3.0000 nats/token"
