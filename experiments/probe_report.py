"""The report of probes: probes.md, probes.csv, and a picture of architectures against tasks.

probes.py calls `write_probe_report` with the rows of its cells.
"""
import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments.plots import draw_accuracy_matrix, draw_by_state
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
    entries = {}
    for row in rows:
        entries.setdefault((row["arm"], row["task"]), []).append(row)
    counted = {entry: rows_at_best_rate(found) for entry, found in entries.items()}
    summaries = {entry: summarize_cells(found, study.scales) for entry, found in counted.items()}
    text = format_report(rows, entries, summaries, study)
    for name, content in (("probes.csv", csv_table(rows)), ("probes.md", text)):
        with atomic_write(out_path / name, "w") as file:
            file.write(content)
    arms, tasks = list(dict.fromkeys(arm for arm, _ in summaries)), list(dict.fromkeys(task for _, task in summaries))
    draw_accuracy_matrix(
        arms, {task: [f"{scale}x" for scale in study.scales] for task in tasks},
        {entry: words.replace(", ", "\n", 1) for entry, (words, _) in summaries.items()},
        {entry: accuracies for entry, (_, accuracies) in summaries.items()}, chances(rows),
        f"Accuracy at {', '.join(map(str, study.scales[:-1]))} and {study.scales[-1]} times the trained length", out_path,
        "probes")
    points = {task: {arm: found for arm in arms if (found := [
        (row["state_bytes"], row["accuracy_1x"]) for row in counted[arm, task] if row["accuracy_1x"] is not None])}
        for task in tasks}
    if points := {task: found for task, found in points.items() if found}:
        draw_by_state(points, out_path, "state")
    return text


def best_row(rows: list[dict]) -> dict:
    """Of the cells of an arm, a task and a seed at several learning rates the one that counts: that solved the task first,
    or else that is most accurate at the trained length."""
    return max(rows, key=lambda row: (row["solved"], -row["steps"] if row["solved"] else 0, row["accuracy_1x"] or 0.0))


def rows_at_best_rate(rows: list[dict]) -> list[dict]:
    """Of the cells of an arm and a task those at the learning rate that the first seed found to be best."""
    first = min(row["seed"] for row in rows)
    rate = best_row([row for row in rows if row["seed"] == first])["learning_rate"]
    return [row for row in rows if row["learning_rate"] == rate]


def summarize_cells(rows: list[dict], scales: tuple[int, ...]) -> tuple[str, list[float | None]]:
    """Of the seeds of an arm and task at a learning rate: "solved 2/3, 400 steps, 1 diverged", with the median step at which
    it was solved, or "not found", and the mean accuracy at each scale of those that were trained to the end."""
    steps = [row["steps"] for row in rows if row["solved"]]
    words = ["not found"] if not steps else [f"solved {len(steps)}/{len(rows)}", f"{statistics.median(steps):,.0f} steps"]
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


def rates_table(entries: dict[tuple[str, str], list[dict]]) -> Table:
    """The first seed at all learning rates, and the state of each arm. entries: (arm, task) -> its cells."""
    rates = sorted({row["learning_rate"] for rows in entries.values() for row in rows})

    def show(row: dict) -> str:
        accuracy = "-" if row["accuracy_1x"] is None else f"{row['accuracy_1x']:.2f}"
        words = f"{accuracy}, {row['steps']:,} steps" if row["solved"] else accuracy
        return f"{words}, {row['status']}" if row["status"] in ("diverged", "failed", "killed") else words
    lines = []
    for (arm, task), rows in entries.items():
        at_rate = {row["learning_rate"]: row for row in rows if row["seed"] == min(row["seed"] for row in rows)}
        best = best_row(list(at_rate.values()))["learning_rate"]
        state = next((f"{row['state_bytes']:,}" for row in rows if row["state_bytes"]), "")
        lines.append((task, arm, state, *("" if rate not in at_rate else f"**{show(at_rate[rate])}**" if rate == best
                                          else show(at_rate[rate]) for rate in rates)))
    return Table(("task", "arm", "bytes of state", *(f"{rate:g}" for rate in rates)), lines)


def format_report(rows: list[dict], entries: dict, summaries: dict, study: ProbeStudy) -> str:
    """probes.md. entries: (arm, task) -> its cells; summaries: (arm, task) -> what summarize_cells returns."""
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
        f"learning rate has fallen to zero; at the best of the learning rates below. Not found: no seed solved it, at "
        f"these rates and in so many steps. Chance: the accuracy of guessing uniformly among the possible answers. Trained "
        f"lengths: {', '.join(f'{task} {length}' for task, length in study.lengths.items())} tokens, and about half, a "
        f"quarter and an eighth of them in turn.", "",
        markdown(rates_table(entries)), "",
        "Accuracy at the trained length from the first seed at each learning rate, and the step at which the task was "
        "solved; **bold**: that of the entries above. Bytes of state: what the model remembers of a text of the trained "
        "length.", "",
        f"{flags['n_layer']} layers, {flags['n_head']} heads x {flags['head_size']}, batches of {flags['batch_size']} "
        f"examples, at most {flags['max_iter']:,} steps, unless an arm sets them; "
        f"{flags['seeds']} seeds. {'; '.join(sizes)}. {sum(row['seconds'] or 0 for row in rows) / 60:,.1f} minutes in all, "
        f"{flags['jobs']} at a time with one thread each, {study.hardware}: `{study.command_line}`.", "",
        *(f"- {row['task']}, {row['arm']}, seed {row['seed']}, learning rate {row['learning_rate']:g}: {row['status']}: "
          f"{row['reason']}" for row in rows if row["reason"])]).rstrip() + "\n"
