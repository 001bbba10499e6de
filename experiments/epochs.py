"""Repeated text: what it costs each arm to pass several times over less text with the same budget."""
from experiments.analysis import SIGNIFICANCE, ArmResults
from experiments.report import Figure, Table
from experiments.scaling_plots import draw_epochs
from experiments.stats import Estimate, holm, p_value

NOTE = """\
Repeated text: every run has the same budget, on the first part of the training text that it passes over so many times. The
runs that choose the learning rate have that same part. Cost of repetition: bits per byte minus those with the fewest epochs,
paired by seed; more than the first arm: the difference between the costs of the two, paired by seed, negative where the arm
bears repetition better. Values ± the half-width of the 95 % interval over seeds (Student's t); p is corrected for all such
differences on this page (Holm)."""


def epoch_rows(results: list[ArmResults]) -> list[dict]:
    """A row for each arm, size and number of epochs, rising: the columns of epochs.csv. The first arm is the reference."""
    outcomes, rows = {}, []
    for arm_results in results:
        arm = arm_results.arm
        outcomes.setdefault((arm.size, arm.name), {})[arm.epochs] = {
            i: run.outcome for i, run in enumerate(arm_results.runs) if run.status == "finished"}
    for (size, name), by_epochs in outcomes.items():
        reference = next(own for (other, _), own in outcomes.items() if other == size)
        fewest = min(by_epochs)
        for epochs, own in sorted(by_epochs.items()):
            row = {"size": size, "arm": name, "epochs": epochs, "runs": len(own)}
            rows.append(row)
            if own:
                row |= columns("bpb", list(own.values()))
            if epochs == fewest:
                continue
            cost, first = (subtract(of[epochs], of[fewest]) for of in (by_epochs, reference))
            if cost:
                row |= columns("cost", list(cost.values()))
            if by_epochs is not reference and (more := list(subtract(cost, first).values())):
                row |= columns("more", more) | {"p": p_value(more)}
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, holm([row["p"] for row in compared])):
        row["p_holm"] = p
    return rows


def subtract(values: dict[int, float], others: dict[int, float]) -> dict[int, float]:
    """Differences of the seeds that both have."""
    return {i: value - others[i] for i, value in values.items() if i in others}


def columns(name: str, values: list[float]) -> dict:
    found = Estimate.from_values(values)
    return {name: found.mean, f"{name}_margin": found.margin}


def describe_cost(row: dict, first: str, fewest: float) -> str:
    """A sentence that claims no more than its intervals support."""
    start = f"{row['size']} {row['arm']}: {row['epochs']:g} epochs".strip()
    if "cost" not in row:
        return f"{start}: no comparable run finished."
    text = f"{start} cost {format_value(row, 'cost', '+.4f')} bits/byte against {fewest:g}"
    if "more" not in row:
        return f"{text}."
    verdict = ("one seed shows nothing" if row["runs"] == 1 else
               f"not shown to differ, p = {row['p_holm']:.3f}" if row["p_holm"] >= SIGNIFICANCE else
               f"bears it {'better' if row['more'] < 0 else 'worse'}, p = {row['p_holm']:.3f}")
    return f"{text}, {format_value(row, 'more', '+.4f')} more than {first} ({verdict})."


def format_value(row: dict, name: str, form: str) -> str:
    """"+0.0123 ± 0.0045"; "" where there is none."""
    if name not in row:
        return ""
    margin = row[f"{name}_margin"]
    return f"{row[name]:{form}}" + (f" ± {margin:.4f}" if margin < float("inf") else "")


def epochs_section(results: list[ArmResults]) -> tuple[list, dict[str, list[dict]], list[str]]:
    """The parts of the page about repeated text, its table for CSV, and the sentences."""
    rows, first = epoch_rows(results), results[0].arm.name
    fewest = min(row["epochs"] for row in rows)
    sentences = [describe_cost(row, first, fewest) for row in rows if row["epochs"] > fewest]
    table = Table(("size", "arm", "epochs", "bits/byte (lower is better)", "cost of repetition (lower is better)",
                   "more than the first arm (negative is better)", "p (Holm)"), [
        (row["size"], row["arm"], f"{row['epochs']:g}", format_value(row, "bpb", ".4f"), format_value(row, "cost", "+.4f"),
         format_value(row, "more", "+.4f"), f"{row['p_holm']:.3f}" if "p_holm" in row else "") for row in rows])
    curves = {}
    for row in rows:
        if "bpb" in row:
            curves.setdefault(f"{row['arm']} {row['size']}".strip(), []).append(row)
    parts = [("h2", "Repeated text"), ("ul", sentences), table, Figure(draw_epochs(curves), "epochs"), ("p", NOTE)]
    return parts, {"epochs": rows}, sentences
