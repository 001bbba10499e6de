"""What the benches share: each measurement in a process of its own, sides that take turns, a table in README.md."""
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))
from experiments.runner import Run, Runner  # noqa: E402
from runtime.device import hardware  # noqa: E402
from runtime.memory import process_peak  # noqa: E402
from runtime.signals import StopSignals  # noqa: E402
from trainer import DIVERGED  # noqa: E402


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
    figures = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, seen in figures.items():
            seen.append(measure(arm))
            print(f"  {arm}: {seen[-1]:.3f}", file=sys.stderr, flush=True)
    return [statistics.median(seen) for seen in figures.values()]


def train_runs(runs: dict[str, list[str]], folder: Path, max_iter: dict[str, int], jobs: int = 2) -> dict[str, list[dict]]:
    """The rows of `train.py` with the flags of each run, `jobs` at a time, which share the cores. Metrics stay in `folder`:
    a run that is finished there is not run again, and one that was cut short goes on."""
    own = {name: Run(REPO / "train.py", folder / f"{name}_{max_iter[name]}.pt",
                     ("--dataloader_num_workers=0", f"--max_iter={max_iter[name]}", *flags)) for name, flags in runs.items()}
    names = list(own)

    def told(i: int, ended: tuple[str, str]) -> str:
        if ended[0] != "finished":
            return f"  {names[i]}: {ended[0]}: {ended[1]}"
        last = own[names[i]].rows()[-1]
        return f"  {names[i]}: {last['val_loss']:.4f} nats/token, {last['val_bpb']:.4f} bits/byte, {last['seconds']:.0f} s"
    with StopSignals() as stop:
        ended = Runner(jobs, stop, DIVERGED).run(list(own.values()), [1.0] * len(own), "runs", told)
    if stop.signal or any(status != "finished" for status, _ in ended):
        raise SystemExit("not all runs were finished: the same command goes on")
    return {name: run.rows() for name, run in own.items()}


def peak_memory() -> float:
    """MB that this process has held at most."""
    return process_peak() / 1e6


def machine() -> str:
    return hardware(torch.device("cpu"))


def table(rows: list[tuple]) -> str:
    """rows: what, ratio, ours, peer, and more that is not shown."""
    return "\n".join(["| what | ratio | ours | peer |", "|---|---|---|---|",
                      *(f"| {what} | {ratio} | {ours} | {peer} |" for what, ratio, ours, peer, *_ in rows)])


def write_into_readme(script: str, text: str):
    """Between the lines that name `script`, such as bench/data.py."""
    readme = REPO / "README.md"
    before, after = f"<!-- {script} -->\n", f"<!-- end of {script} -->"
    head, rest = readme.read_text(encoding="utf-8").split(before)
    readme.write_text(head + before + text + "\n" + after + rest.split(after)[1], encoding="utf-8")
