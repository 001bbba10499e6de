"""The report of probes: probes.md, probes.csv, and a picture of architectures against tasks.

probes.py calls `write_probe_report` with the rows of its cells.
"""
import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments.plots import draw_accuracy_matrix
from experiments.report import Table, csv_table, markdown
from experiments.stats import Estimate
from runtime.files import atomic_write


@dataclass(frozen=True)
class ProbeStudy:
    """What all cells have in common."""
    lengths: dict[str, int]      # task -> tokens of an example that models are trained on
    scales: tuple[int, ...]      # evaluated lengths, as multiples of the trained one: columns accuracy_1x, …
    loops: tuple[int, ...]       # at inference, of an arm with loops: columns accuracy_1_loops, …
    solved_accuracy: float
    eval_examples: int           # of an evaluation
    flags: dict                  # of probes.py
    hardware: str
    command_line: str


def write_probe_report(rows: list[dict], study: ProbeStudy, out_path: Path) -> str:
    """Writes all files but the cells'. Returns the text of probes.md. rows: one per cell."""
    by_entry = {}
    for row in rows:
        by_entry.setdefault((row["arm"], row["task"]), []).append(row)
    summaries = {entry: summarize_cells(found, study.scales) for entry, found in by_entry.items()}
    text = format_report(rows, summaries, study)
    for name, content in (("probes.csv", csv_table(rows)), ("probes.md", text)):
        with atomic_write(out_path / name, "w") as file:
            file.write(content)
    arms, tasks = list(dict.fromkeys(arm for arm, _ in summaries)), list(dict.fromkeys(task for _, task in summaries))
    draw_accuracy_matrix(
        arms, {task: [f"{scale}x" for scale in study.scales] for task in tasks},
        {entry: words.replace(", ", "\n", 1) for entry, (words, _) in summaries.items()},
        {entry: accuracies for entry, (_, accuracies) in summaries.items()}, chances(rows),
        "Accuracy at 1, 2 and 4 times the trained length", out_path, "probes")
    return text


def summarize_cells(rows: list[dict], scales: tuple[int, ...]) -> tuple[str, list[float | None]]:
    """Of the seeds of an arm and task: "solved 2/3, 400 steps, 1 diverged", with the median step at which it was solved, and
    the mean accuracy at each scale of those that were trained to the end."""
    steps = [row["steps"] for row in rows if row["solved"]]
    words = [f"solved {len(steps)}/{len(rows)}", *([f"{statistics.median(steps):,.0f} steps"] if steps else ())]
    for status in ("diverged", "failed", "killed"):
        if n := sum(row["status"] == status for row in rows):
            words.append(f"{n} {status}")
    ended = [row for row in rows if row["accuracy_1x"] is not None]
    return ", ".join(words), [statistics.mean(row[f"accuracy_{scale}x"] for row in ended) if ended else None
                              for scale in scales]


def chances(rows: list[dict]) -> dict[str, float]:
    """task -> accuracy of guessing."""
    return {row["task"]: row["chance"] for row in rows}


def loops_lines(rows: list[dict], study: ProbeStudy) -> list[str]:
    """What arms with loops reach when these are more or fewer at inference; nothing without such arms."""
    by_entry = {}
    for row in rows:
        if row[f"accuracy_{study.loops[0]}_loops"] is not None:
            by_entry.setdefault((row["task"], row["arm"]), []).append(row)
    if not by_entry:
        return []

    def show(found: list[dict], n: int) -> str:
        estimate = Estimate.from_values([row[f"accuracy_{n}_loops"] for row in found])
        return f"{estimate.mean:.2f}" + (f" ± {estimate.margin:.2f}" if len(found) > 1 else "")
    table = Table(("task", "arm", *(f"{n} loop{'s' * (n > 1)}" for n in study.loops)), [
        (*entry, *(show(found, n) for n in study.loops)) for entry, found in by_entry.items()])
    return [markdown(table), "", "Accuracy at the trained length with more and fewer loops at inference, with its 95 % "
            "interval over seeds: higher is better.", ""]


def format_report(rows: list[dict], summaries: dict, study: ProbeStudy) -> str:
    """probes.md. summaries: (arm, task) -> what summarize_cells returns."""
    arms, flags = list(dict.fromkeys(arm for arm, _ in summaries)), study.flags
    show = lambda words, accuracies: f"{words}: {' '.join('-' if x is None else f'{x:.2f}' for x in accuracies)}"
    matrix = Table(("task", "chance", *arms), [
        (task, f"{chance:.2f}", *(show(*summaries[arm, task]) for arm in arms)) for task, chance in chances(rows).items()])
    sizes = [f"{arm}: {' to '.join(f'{n:,}' for n in sorted({min(found), max(found)}))} parameters" for arm in arms
             if (found := [row["parameters"] for row in rows if row["arm"] == arm and row["parameters"]])]
    return "\n".join([
        "# Probes", "", markdown(matrix), "", *loops_lines(rows, study),
        f"Each entry: how many seeds solved the task ({study.solved_accuracy:.0%} of the answers in {study.eval_examples} "
        f"examples correct at the trained length), the median number of steps they took (lower is better), and the mean "
        f"accuracy at {', '.join(f'{scale}x' for scale in study.scales)} the trained length (higher is better) after the "
        f"learning rate has fallen to zero. Chance: the accuracy of guessing uniformly among the possible answers. Trained "
        f"lengths: {', '.join(f'{task} {length}' for task, length in study.lengths.items())} tokens.", "",
        f"{flags['n_layer']} layers, {flags['n_head']} heads x {flags['head_size']}, batches of {flags['batch_size']} "
        f"examples, at most {flags['max_iter']:,} steps, learning rate {flags['learning_rate']:g}, unless an arm sets them; "
        f"{flags['seeds']} seeds. {'; '.join(sizes)}. {sum(row['seconds'] or 0 for row in rows) / 60:,.1f} minutes in all, "
        f"{flags['jobs']} at a time with one thread each, {study.hardware}: `{study.command_line}`.", "",
        *(f"- {row['task']}, {row['arm']}, seed {row['seed']}: {row['status']}: {row['reason']}" for row in rows
          if row["reason"])]).rstrip() + "\n"
