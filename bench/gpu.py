"""Tests and measures the GPU path with one command that takes a few minutes.

    python bench/gpu.py --rehearse                         every stage at tiny sizes on a CPU, in under two minutes
    python bench/gpu.py --out_path=runs/gpu --text=docs.parquet
    python bench/gpu.py --out_path=runs/gpu --readme       runs nothing: writes the latest results into docs/benchmarks.md

STAGES in bench/gpu_stages.py lists the stages, most important first. Each is a process with a time limit that appends a row
to results.jsonl in --out_path after each measurement; the last 300 lines of its output go to <stage>.txt. So a stage that
fails, hangs or is killed affects no other. Besides torch with CUDA it needs numpy, numba, regex, tqdm, filelock, safetensors
and pytest (and pyarrow, if --text is parquet), and no network.
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

from gpu_stages import STAGES, Task, append_row, forbid_imports, format_row, read_rows

if __name__ == "__main__":
    forbid_imports()
import torch  # noqa: E402
from side_by_side import REPO, write_into_docs  # noqa: E402
from tqdm import tqdm  # noqa: E402

from runtime.cli import command, parse_flags  # noqa: E402
from runtime.config import BadInput, check_flags, flag  # noqa: E402
from runtime.files import check_writable  # noqa: E402
from runtime.signals import StopSignals  # noqa: E402
from shards import open_data  # noqa: E402
from text.folders import find_data_files  # noqa: E402

SCRIPT = REPO / "bench" / "gpu_stages.py"
LEAST = 15    # seconds that must be left to start a stage
LEEWAY = 10   # seconds after its time limit at which a stage is killed
OUTPUT = 300  # last lines of a stage's output that are kept


@dataclass(frozen=True)
class GpuConfig:
    """The run."""
    out_path: Path = flag(Path("runs/gpu"), "folder for results.jsonl, to which every run appends its rows, the stages' "
                                            "output, and a picture")
    minutes: float = flag(8.0, "time limit for all stages together", above=0, at_most=1440)
    only: tuple[str, ...] = flag((), "stages to run, separated by spaces (default: all but "
                                     f"{', '.join(name for name, stage in STAGES.items() if stage.on_request)})",
                                 choices=tuple(STAGES))
    rehearse: bool = flag(False, "run everything at tiny sizes on a CPU, to see that it runs")
    text: Path = flag(None, "parquet, jsonl or txt to train on (default: the built-in text)")
    data_path: Path = flag(None, "a folder that download_data.py filled, instead of --text")
    readme: bool = flag(False, "run nothing: write the latest rows in --out_path into docs/benchmarks.md")

    def __post_init__(self):
        check_flags(self)
        if self.text and self.data_path:
            raise BadInput(f"--text={self.text}: --data_path={self.data_path} is given too: give one of them")
        for name in ("text", "data_path"):
            if (path := getattr(self, name)) and not path.exists():
                raise BadInput(f"--{name}={path}: not found: check the path")


def require_text(path: Path):
    """Raises BadInput when --text cannot be read on this machine."""
    try:
        files = find_data_files(path).files
    except BadInput as error:
        raise BadInput(str(error).replace("--dataset=", "--text=", 1)) from None
    if any(file.suffix.lower() == ".parquet" for file in files) and not importlib.util.find_spec("pyarrow"):
        raise BadInput(f"--text={path}: reading parquet needs pyarrow, which is not installed: give jsonl or txt, or a "
                       f"--data_path that download_data.py filled on another machine")


# -- running ----------------------------------------------------------------------------------------------------------

def time_limit(name: str, seconds_left: float, later_stages: list[str], minutes: float = 8.0) -> float:
    """Seconds that a stage may take: at most its own limit, leaving `at_least` for each later stage. The limits are for 8
    minutes in total and grow in proportion to --minutes."""
    reserved = sum(STAGES[other].at_least for other in later_stages)
    return min(STAGES[name].seconds * max(1.0, minutes / 8), seconds_left - reserved)


def keep_last_lines(stream, path: Path):
    """Writes the last lines of `stream` to `path`, every second: this process may be killed too."""
    lines, written_at = collections.deque(maxlen=OUTPUT), 0.0
    for line in stream:
        lines.append(line.rstrip("\n"))
        if time.monotonic() - written_at > 1:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            written_at = time.monotonic()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def kill(process: subprocess.Popen):
    """Ends the process and everything it has started, which may hang."""
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
                                # empty at first, so that compile times are those of a new machine
                                "TORCHINDUCTOR_CACHE_DIR": str(Path(task.work) / "inductor")}
    if task.rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen([sys.executable, str(SCRIPT), json.dumps(asdict(task))], cwd=REPO, env=environment,
                            stdin=subprocess.DEVNULL, start_new_session=True, **options)  # Ctrl-C reaches only this process


def run_stage(task: Task, seconds: float, stop: StopSignals, bar: tqdm) -> tuple[str, str, list[dict]]:
    """Runs a stage and prints its rows as they come. Returns "passed" or "failed", the reason, and the rows."""
    process = start_process(task, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    log = Path(task.out_path) / f"{task.stage}.txt"
    reader = threading.Thread(target=keep_last_lines, args=(process.stdout, log), daemon=True)
    reader.start()
    start, results, rows = time.monotonic(), Path(task.out_path) / "results.jsonl", []
    position, reason = results.stat().st_size, ""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        has_ended = process.poll() is not None
        position = print_new_rows(results, position, rows)
        bar.n = min(bar.total, time.monotonic() - bar.start)
        bar.refresh()
        if has_ended:
            break
        if stop.signal or time.monotonic() - start > seconds + LEEWAY:
            reason = "interrupted" if stop.signal else f"killed after {seconds + LEEWAY:.0f} s"
            kill(process)
    reader.join(3)  # a process that the stage left behind may hold the pipe
    if not reason and not process.returncode:
        return "passed", "", rows
    return "failed", reason or failure_reason(process.returncode, rows, log), rows


def print_new_rows(results: Path, position: int, rows: list[dict]) -> int:
    """Appends to `rows` those written since byte `position`, and prints them. Returns the new position."""
    with open(results, encoding="utf-8") as file:
        file.seek(position)
        for line in file.readlines():
            if line.endswith("\n"):
                position += len(line.encode())
                rows.append(row := json.loads(line))
                if row.get("outcome") != "passed" and format_row(row):
                    tqdm.write(f"  {row['name']}: {format_row(row)}")
    return position


def failure_reason(code: int, rows: list[dict], log: Path) -> str:
    """Why a stage failed, for people: its signal, its first row with an error, or its last line of output."""
    if code < 0:
        return f"killed by signal {-code}: see {log.name}"
    errors = [f"{row['name']}: {row['error']}" for row in rows if "error" in row]
    lines = [line for line in reversed(log.read_text(encoding="utf-8").splitlines()) if line.strip()]
    return (errors + lines + ["it printed nothing"])[0]


def run_stages(config: GpuConfig, work: Path, stop: StopSignals) -> list[dict]:
    """Runs the stages and returns a row for each: how it ended."""
    start, total = time.monotonic(), 60 * config.minutes
    seconds_left = lambda: total - (time.monotonic() - start)
    results, ends = config.out_path / "results.jsonl", []
    text, data_path = (path and str(path.resolve()) for path in (config.text, config.data_path))
    make_task = lambda name, seconds: Task(name, str(config.out_path.resolve()), str(work), time.time() + seconds,
                                           config.rehearse, text, data_path)
    upcoming = [name for name, stage in STAGES.items()
                if name in (config.only or ([] if stage.on_request and not config.rehearse else STAGES))]
    preparing = None  # prepares text on the CPU while the GPU is busy
    if any(STAGES[name].reads_text for name in upcoming) and not (config.rehearse or data_path):
        preparing = start_process(make_task("text", total), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with tqdm(total=round(total), unit="s", bar_format="{desc} {n:.0f} of {total} s {bar}", leave=False,
                  disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
            bar.start = start
            for name, stage in STAGES.items():
                rows, began, status, reason = [], time.monotonic(), "skipped", "not asked for with --only"
                if name in upcoming:
                    upcoming.remove(name)
                    if stage.reads_text and preparing:
                        while preparing.poll() is None and seconds_left() > stage.at_least and not stop.signal:
                            time.sleep(0.1)
                    seconds = time_limit(name, seconds_left(), upcoming, config.minutes)
                    if stop.signal:
                        reason = "interrupted"
                    elif seconds < LEAST and not config.rehearse:
                        reason = f"no time: {max(0, seconds):.0f} s of --minutes={config.minutes:g} are left for it"
                    else:
                        bar.set_description_str(name)
                        tqdm.write(f"{name}: {stage.description}")
                        seconds = max(seconds, LEAST)
                        status, reason, rows = run_stage(make_task(name, seconds), seconds, stop, bar)
                figure = next((row["figure"] for row in reversed(rows) if "figure" in row), "")
                ends.append({"stage": name, "status": status, "seconds": round(time.monotonic() - began, 1),
                             "reason": reason, "figure": figure,
                             "card": next((row["card"] for row in rows if "card" in row), "")})
                append_row(results, ends[-1])
    finally:
        if preparing and preparing.poll() is None:
            kill(preparing)
    return ends


# -- results ----------------------------------------------------------------------------------------------------------

def summary(ends: list[dict]) -> str:
    """One line per stage, each at most as wide as the terminal."""
    width = shutil.get_terminal_size((100, 24)).columns - 1
    card = next((row["card"] for row in ends if row["card"]), "no GPU was found")
    rows = [("stage", "result", "s", "figure or reason"),
            *((row["stage"], row["status"], f"{row['seconds']:.0f}" if row["status"] != "skipped" else "",
               row["reason"] or row["figure"]) for row in ends)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [card, *("  ".join((f"{a:<{widths[0]}}", f"{b:<{widths[1]}}", f"{c:>{widths[2]}}", d)) for a, b, c, d in rows)]
    return "\n".join(line if len(line) <= width else line[:width - 1] + "…" for line in lines)


def latest_rows(path: Path) -> list[dict]:
    """The latest row of each measurement and stage in results.jsonl, over all runs on the GPU of the last run; rehearsals do
    not count. Raises BadInput when there is none."""
    rows, is_rehearsal = {}, False
    for row in read_rows(path):
        is_rehearsal = row.get("rehearsal", is_rehearsal)
        if not is_rehearsal and "stage" in row and row.get("status") != "skipped":
            key = row["stage"], row.get("name")
            rows.pop(key, None)
            rows[key] = row
    cards = [row["card"] for row in rows.values() if row.get("card")]
    if not cards:
        raise BadInput(f"--readme: {path} holds no rows of a run on a GPU: give the --out_path of one")
    return [row for row in rows.values() if row.get("card") == cards[-1]]


def markdown_table(rows: list[dict]) -> str:
    """The table of docs/benchmarks.md, without what was skipped, and its caption."""
    order = list(STAGES)
    rows = sorted(rows, key=lambda row: order.index(row["stage"]))
    table = ["| stage | measurement | result |", "|---|---|---|"]
    cell = lambda text: " ".join(text.replace("|", "\\|").split())
    table += [f"| {row['stage']} | {cell(row['name'])} | {cell(format_row(row))} |" for row in rows
              if "name" in row and format_row(row) and "skipped" not in row and row["stage"] != "tests"]
    ends = [f"{row['stage']} {row['status']}" + (f" ({row['reason'] or row['figure']})" if row["reason"] or row["figure"]
                                                 else "") for row in rows if "status" in row]
    return "\n".join(table) + f"\n\n{rows[0]['card']}: `python bench/gpu.py`. {'; '.join(ends)}."


@command
def main(argv=None):
    """Tests and measures the GPU path."""
    config, = parse_flags(main.__doc__, argv, GpuConfig)
    results = config.out_path / "results.jsonl"
    if config.readme:
        write_into_docs("bench/gpu.py", markdown_table(latest_rows(results)))
        return
    if config.data_path:
        open_data(config.data_path)
    if config.text:
        require_text(config.text)
    if not config.rehearse and not torch.cuda.is_available():
        raise BadInput("torch finds no GPU: --rehearse runs everything at tiny sizes on the CPU")
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
