"""What the benches share: each measurement in a process of its own, sides that take turns, a table in docs/benchmarks.md."""
import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))
from experiments.runner import JobResult, Runner, TrainingJob  # noqa: E402
from experiments.stats import Estimate  # noqa: E402
from runtime.config import BadInput  # noqa: E402
from runtime.device import describe_hardware  # noqa: E402
from runtime.files import atomic_write  # noqa: E402
from runtime.memory import peak_resident_bytes  # noqa: E402
from runtime.signals import StopSignals  # noqa: E402


def install_peers():
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", REPO / "bench" / "requirements.txt"], check=True)


def run(script: str, arm: str, flags: list[str], **environment: str):
    """What `script --arm=…` prints last, as JSON, from a fresh process."""
    done = subprocess.run([sys.executable, script, f"--arm={arm}", *flags], capture_output=True, text=True,
                          env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(measure: Callable[[str], float], arms: list[str], rounds: int) -> list[float]:
    """The median of each arm's measurements."""
    return [statistics.median(seen) for seen in measure_in_turns(measure, arms, rounds).values()]


def measure_in_turns(measure: Callable[[str], object], arms: list[str], rounds: int) -> dict[str, list]:
    """Each arm's measurements, one of every round."""
    figures = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, seen in figures.items():
            seen.append(measure(arm))
            shown = f"{seen[-1]:.3f}" if isinstance(seen[-1], float) else seen[-1]
            print(f"  {arm}: {shown}", file=sys.stderr, flush=True)
    return figures


def train_runs(runs: dict[str, list[str]], folder: Path, max_iter: dict[str, int], jobs: int = 2) -> dict[str, list[dict]]:
    """The metrics rows of `train.py` with the flags of each run, `jobs` at a time, which share the cores.

    Metrics stay in `folder`: a run that has finished there is not run again, and an interrupted one is resumed.
    """
    training = {name: TrainingJob(REPO / "train.py", folder / f"{name}_{max_iter[name]}.pt",
                                  ("--dataloader_num_workers=0", f"--max_iter={max_iter[name]}", *flags))
                for name, flags in runs.items()}
    names = list(training)

    def print_result(i: int, result: JobResult):
        if result.status != "finished":
            tqdm.write(f"  {names[i]}: {result.status}: {result.reason}")
            return
        last = training[names[i]].rows()[-1]
        tqdm.write(f"  {names[i]}: {last['val_loss']:.4f} nats/token, {last['val_bpb']:.4f} bits/byte, "
                   f"{last['seconds']:.0f} s")
    with StopSignals() as stop:
        results = Runner(jobs, stop).run(list(training.values()), "runs", print_result)
    if any(result.status != "finished" for result in results):
        raise SystemExit("not all runs have finished: the same command continues them")
    return {name: job.rows() for name, job in training.items()}


def train(n_parallel: int, *arms: list[TrainingJob]):
    """Trains arms, each a run from each seed, seed by seed. Raises SystemExit when a signal stops it or a run fails."""
    jobs = [job for seed_jobs in zip(*arms) for job in seed_jobs]
    with StopSignals() as stop:
        results = Runner(n_parallel, stop).run(jobs, "runs", lambda i, result: None)
    for job, result in zip(jobs, results):
        if result.status != "finished":
            raise SystemExit(f"{job.checkpoint}: {result.status} {result.reason}")


def estimate(values: list[float], form: str = "{:.3f}") -> str:
    """The mean and the half-width of its 95 % interval."""
    found = Estimate.from_values(values)
    return f"{form.format(found.mean)} ± {form.replace('+', '').format(found.margin)}"


def peak_memory() -> float:
    """MB that this process has held at most."""
    return peak_resident_bytes() / 1e6


def machine() -> str:
    return describe_hardware(torch.device("cpu"))


def table(rows: list[tuple]) -> str:
    """A Markdown table. rows: what is measured and of what the ratio is, the ratio, its better direction, our figure, the
    peer's."""
    return "\n".join(["| measurement | ratio | better | ours | peer |", "|---|---|---|---|---|",
                      *(f"| {what} | {ratio and f'**{ratio}**'} | {better} | {ours} | {peer} |"
                        for what, ratio, better, ours, peer in rows)])


def run_stages(script: str, description: str, stages: dict[str, Callable[[Path, int], str]], note: str):
    """The command of a bench of several stages, each of which trains its arms and returns a table. Runs those that are
    asked for, and writes all tables that the folder holds by then into docs/benchmarks.md. script: such as bench/data.py;
    note: how to read them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--stages", nargs="+", choices=tuple(stages), default=tuple(stages))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.stages:
        text = stages[name](args.out.resolve(), args.jobs)
        print(f"{text}\n")
        with atomic_write(args.out / f"{name}.md", "w") as file:
            file.write(text + "\n")
    found = [(args.out / f"{name}.md").read_text() for name in stages if (args.out / f"{name}.md").exists()]
    made = f"every run has one thread; {machine()}: `python {script} --out=runs/{Path(script).stem} --jobs=2`."
    write_into_docs(script, "\n".join([*found, f"{note}; {made}"]))


def write_into_docs(script: str, text: str, page: str = "benchmarks.md"):
    """Replaces the text between the markers `<!-- script -->` and `<!-- end of script -->` in a page of docs/.

    script: such as bench/data.py. Raises BadInput when the markers are not there.
    """
    page = REPO / "docs" / page
    start, end = f"<!-- {script} -->\n", f"<!-- end of {script} -->"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    if start not in old or end not in old:
        raise BadInput(f"{page}: has no lines {start.strip()} and {end}: add them where the table should go")
    before, rest = old.split(start)
    page.write_text(before + start + text + "\n" + end + rest.split(end)[1], encoding="utf-8")
