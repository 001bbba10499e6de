"""Proves and measures the GPU path with one command, for whoever has a card for some minutes.

    python bench/gpu.py --rehearse                         every stage at tiny sizes on a CPU, in under two minutes
    python bench/gpu.py --out_path=runs/gpu --text=docs.parquet
    python bench/gpu.py --out_path=runs/gpu --readme       runs nothing: writes what was measured last into README.md

STAGES in bench/gpu_stages.py lists the stages in order of worth. Each is a process with a time limit. Its rows go to
results.jsonl in --out_path as soon as they exist, the last 100 lines of its output to a file of its name: one that fails,
hangs or is cut off loses nothing of the others. Beside torch for the card it takes numpy, numba, regex, tqdm, safetensors
and pytest (and pyarrow, if --text is parquet); no network.
"""
import collections
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_stages import STAGES, Task, append_row, forbid_imports, line_of, read_rows

if __name__ == "__main__":
    forbid_imports()
import torch  # noqa: E402
from side_by_side import REPO, write_into_readme  # noqa: E402
from tqdm import tqdm  # noqa: E402

from runtime.cli import command, parse_flags  # noqa: E402
from runtime.config import BadInput, check_flags, flag  # noqa: E402
from runtime.files import check_writable  # noqa: E402
from runtime.signals import StopSignals  # noqa: E402
from shards import open_data  # noqa: E402
from text.sources import find_text_files  # noqa: E402

SCRIPT = REPO / "bench" / "gpu_stages.py"
LEAST = 15    # seconds with which a stage is begun
LEEWAY = 10   # that a stage has to end by itself before it is killed
OUTPUT = 100  # last lines of a stage's output that are kept


@dataclass(frozen=True)
class GpuConfig:
    """The proof."""
    out_path: Path = flag(Path("runs/gpu"), "folder for results.jsonl, to which a further run adds its rows, the stages' "
                                            "output\nand a picture")
    minutes: float = flag(8.0, "for all stages together", above=0, at_most=1440)
    only: tuple[str, ...] = flag((), "stages to run, with spaces between (default: all)", choices=tuple(STAGES))
    rehearse: bool = flag(False, "run everything at tiny sizes on a CPU, to see that it runs")
    text: Path = flag(None, "parquet, jsonl or txt to train on (default: the text that is built in)")
    data_path: Path = flag(None, "a folder that download_data.py filled, in place of --text")
    readme: bool = flag(False, "run nothing: put the newest rows in --out_path into README.md")

    def __post_init__(self):
        check_flags(self)
        if self.text and self.data_path:
            raise BadInput(f"--text={self.text}: --data_path={self.data_path} is given too: give one of them")
        for name in ("text", "data_path"):
            if (path := getattr(self, name)) and not path.exists():
                raise BadInput(f"--{name}={path}: not found: check the path")


def require_text(path: Path):
    """Raises BadInput when it cannot be read here."""
    try:
        files = find_text_files(path)
    except BadInput as error:
        raise BadInput(str(error).replace("--dataset=", "--text=", 1)) from None
    if any(file.suffix.lower() == ".parquet" for file in files) and not importlib.util.find_spec("pyarrow"):
        raise BadInput(f"--text={path}: reading parquet takes pyarrow, which is not installed: give jsonl or txt, or a "
                       f"--data_path that download_data.py filled elsewhere")


# -- running ----------------------------------------------------------------------------------------------------------

def seconds_for(name: str, left: float, to_come: list[str], minutes: float = 8.0) -> float:
    """What a stage may take of the seconds that are left: those `to_come` after it get the least they are to have. Limits
    are for 8 minutes; more --minutes, and they grow alike."""
    reserved = sum(STAGES[other].at_least for other in to_come)
    return min(STAGES[name].seconds * max(1.0, minutes / 8), left - reserved)


def last_lines(stream, path: Path):
    """Keeps the last lines of `stream` in the file, also while it goes on: this process may be killed too."""
    lines, written = collections.deque(maxlen=OUTPUT), 0.0
    for line in stream:
        lines.append(line.rstrip("\n"))
        if time.monotonic() - written > 1:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            written = time.monotonic()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def end(process: subprocess.Popen):
    """The process and all that it has started, which a hang may keep from ending by itself."""
    if os.name == "posix":
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
    process.kill()
    process.wait()


def start_process(task: Task, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                                # empty at first: what is compiled first is compiled as on a new machine
                                "TORCHINDUCTOR_CACHE_DIR": str(Path(task.work) / "inductor")}
    if task.rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen([sys.executable, str(SCRIPT), json.dumps(asdict(task))], cwd=REPO, env=environment,
                            stdin=subprocess.DEVNULL, start_new_session=True, **options)  # a Ctrl-C comes to this one alone


def run_stage(task: Task, seconds: float, stop: StopSignals, bar: tqdm, seen: list[dict]) -> tuple[str, str]:
    """Runs it, shows its rows as they come, and puts them into `seen`. Returns "passed" or "failed", and the reason."""
    process = start_process(task, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    keep = threading.Thread(target=last_lines, args=(process.stdout, Path(task.out_path) / f"{task.stage}.txt"), daemon=True)
    keep.start()
    start, results = time.monotonic(), Path(task.out_path) / "results.jsonl"
    at, reason = results.stat().st_size, ""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        is_over = process.poll() is not None
        with open(results, encoding="utf-8") as file:
            file.seek(at)
            for line in file.readlines():
                if line.endswith("\n"):
                    at += len(line.encode())
                    seen.append(row := json.loads(line))
                    if row.get("outcome") != "passed" and line_of(row):
                        tqdm.write(f"  {row['name']}: {line_of(row)}")
        bar.n = min(bar.total, time.monotonic() - bar.start)
        bar.refresh()
        if is_over:
            break
        if stop.signal or time.monotonic() - start > seconds + LEEWAY:
            reason = "interrupted" if stop.signal else f"cut off after {seconds + LEEWAY:.0f} s"
            end(process)
    keep.join(3)  # what the stage left behind may hold the pipe
    if not reason and not process.returncode:
        return "passed", ""
    if not reason and process.returncode < 0:
        reason = f"killed by signal {-process.returncode}: see {task.stage}.txt"
    if not reason:
        failures = [f"{row['name']}: {row['error']}" for row in seen if "error" in row]
        said = (Path(task.out_path) / f"{task.stage}.txt").read_text(encoding="utf-8").splitlines()
        reason = (failures + [line for line in reversed(said) if line.strip()] + ["it said nothing"])[0]
    return "failed", reason


def run_stages(config: GpuConfig, work: Path, stop: StopSignals) -> list[dict]:
    """The row of each stage that says how it ended."""
    start, total = time.monotonic(), 60 * config.minutes
    left = lambda: total - (time.monotonic() - start)
    results, ends = config.out_path / "results.jsonl", []
    text, data_path = (path and str(path.resolve()) for path in (config.text, config.data_path))
    task_of = lambda name, seconds: Task(name, str(config.out_path.resolve()), str(work), time.time() + seconds,
                                         config.rehearse, text, data_path)
    to_come = [name for name in STAGES if not config.only or name in config.only]
    preparing = None  # text, by the CPU, while the card is busy
    if any(STAGES[name].reads_text for name in to_come) and not (config.rehearse or data_path):
        preparing = start_process(task_of("text", total), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with tqdm(total=round(total), unit="s", bar_format="{desc} {n:.0f} of {total} s {bar}", leave=False,
                  disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
            bar.start = start
            for name, stage in STAGES.items():
                seen, began, status, reason = [], time.monotonic(), "left out", "not in --only"
                if name in to_come:
                    to_come.remove(name)
                    if stage.reads_text and preparing:
                        while preparing.poll() is None and left() > stage.at_least and not stop.signal:
                            time.sleep(0.1)
                    seconds = seconds_for(name, left(), to_come, config.minutes)
                    if stop.signal:
                        reason = "interrupted"
                    elif seconds < LEAST and not config.rehearse:
                        reason = f"no time: {max(0, seconds):.0f} s of --minutes={config.minutes:g} are left for it"
                    else:
                        bar.set_description_str(name)
                        tqdm.write(f"{name}: {stage.what}")
                        seconds = max(seconds, LEAST)
                        status, reason = run_stage(task_of(name, seconds), seconds, stop, bar, seen)
                figure = next((row["figure"] for row in reversed(seen) if "figure" in row), "")
                ends.append({"stage": name, "status": status, "seconds": round(time.monotonic() - began, 1),
                             "reason": reason, "figure": figure,
                             "card": next((row["card"] for row in seen if "card" in row), "")})
                append_row(results, ends[-1])
    finally:
        if preparing and preparing.poll() is None:
            end(preparing)
    return ends


# -- showing ----------------------------------------------------------------------------------------------------------

def summary(ends: list[dict]) -> str:
    """A line a stage, each within the terminal."""
    width = shutil.get_terminal_size((100, 24)).columns - 1
    card = next((row["card"] for row in ends if row["card"]), "no card was seen")
    rows = [("stage", "result", "s", "figure, or why"),
            *((row["stage"], row["status"], f"{row['seconds']:.0f}" if row["status"] != "left out" else "",
               row["reason"] or row["figure"]) for row in ends)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [card, *("  ".join((f"{a:<{widths[0]}}", f"{b:<{widths[1]}}", f"{c:>{widths[2]}}", d)) for a, b, c, d in rows)]
    return "\n".join(line if len(line) <= width else line[:width - 1] + "…" for line in lines)


def proven(path: Path) -> list[dict]:
    """Of all runs in results.jsonl on the card of the last one, rehearsals left out, the newest row of each measurement, and
    of each stage how it ended last. Raises BadInput when there is none."""
    rows, is_rehearsal = {}, False
    for row in read_rows(path):
        is_rehearsal = row.get("rehearsal", is_rehearsal)
        if not is_rehearsal and "stage" in row and row.get("status") != "left out":
            key = row["stage"], row.get("name")
            rows.pop(key, None)
            rows[key] = row
    cards = [row["card"] for row in rows.values() if row.get("card")]
    if not cards:
        raise BadInput(f"--readme: {path} holds no rows of a run on a card: give the --out_path of one")
    return [row for row in rows.values() if row.get("card") == cards[-1]]


def readme_text(rows: list[dict]) -> str:
    """README's table."""
    order = list(STAGES)
    rows = sorted(rows, key=lambda row: order.index(row["stage"]))
    table = ["| stage | what | result |", "|---|---|---|"]
    cell = lambda text: " ".join(text.replace("|", "\\|").split())
    table += [f"| {row['stage']} | {cell(row['name'])} | {cell(line_of(row))} |" for row in rows
              if "name" in row and line_of(row) and row["stage"] != "right"]
    ends = [f"{row['stage']} {row['status']}" + (f" ({row['reason'] or row['figure']})" if row["reason"] or row["figure"]
                                                 else "") for row in rows if "status" in row]
    return "\n".join(table) + f"\n\n{rows[0]['card']}: `python bench/gpu.py`. {'; '.join(ends)}."


@command
def main(argv=None):
    """Proves and measures the GPU path."""
    config, = parse_flags(main.__doc__, argv, GpuConfig)
    results = config.out_path / "results.jsonl"
    if config.readme:
        write_into_readme("bench/gpu.py", readme_text(proven(results)))
        return
    if config.data_path:
        open_data(config.data_path)
    if config.text:
        require_text(config.text)
    if not config.rehearse and not torch.cuda.is_available():
        raise BadInput("no GPU that torch can use is here: --rehearse runs everything at tiny sizes on the CPU")
    config.out_path.mkdir(parents=True, exist_ok=True)
    check_writable(results, f"--out_path={config.out_path}")
    append_row(results, {"began": time.strftime("%Y-%m-%d %H:%M:%S"), "rehearsal": config.rehearse,
                         "minutes": config.minutes, "torch": torch.__version__, "python": sys.version.split()[0]})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work, StopSignals() as stop:
        ends = run_stages(config, Path(work), stop)
    print(summary(ends))
    print(f"rows: {results}")
    if stop.signal:
        raise SystemExit(128 + stop.signal)
    if any(row["status"] == "failed" for row in ends):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
