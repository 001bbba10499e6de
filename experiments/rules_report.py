"""What training at inference time gained on new rules, from the rows of rules: tables, the page and its picture.

fewshot.py calls `write_rules_report` with a row for each base, seed and rule. A row holds the fraction of exact answers of
each arm (a key of ARMS), and FLOPs per question under flops_<arm>.
"""
import math
from dataclasses import dataclass
from pathlib import Path

from experiments.plots import COLORS, make_panels, to_svgs
from experiments.report import Figure, Table, align_columns, csv_table, markdown_page, write_page
from experiments.stats import Estimate
from runtime.cli import say
from runtime.files import atomic_write

# key of a row -> what it is called
ARMS = {"in_context": "in context", "in_context_voting": "in context, voting", "trained": "trained",
        "trained_if_needed": "trained if needed", "trained_voting": "trained, voting",
        "trained_elsewhere": "trained on another rule"}
# (name, arm, the arm it is compared with)
GAINS = (("trained - in context", "trained", "in_context"),
         ("trained - in context, voting", "trained", "in_context_voting"),
         ("trained if needed - in context", "trained_if_needed", "in_context"),
         ("trained, voting - in context, voting", "trained_voting", "in_context_voting"))
SINGLE, COMPOSED = "single rules", "compositions of two"
NOTES = """\
Entries are percent of exact answers, means over rules of their means over seeds; ± is the half-width of the 95 % interval
over rules (Student's t), of differences paired by rule; higher is better. In context: the demonstrations, then the question.
Voting: the most frequent answer over views, which show the demonstrations in other orders and with other names for the
colours. Trained: steps on views of the demonstrations in which every output is asked for given the pairs before it; before
the next rule the weights are put back bit for bit. Trained if needed: not where the model answers every demonstration, shown
the others, in context. Trained on another rule: the weights that another rule of the same family
has led to, in context. The arms that vote or train have the same number of FLOPs: voting alone spends all on views, training
alone on steps, both together a quarter on views. FLOPs are those of matrix products at full context, per question."""


@dataclass(frozen=True)
class RulesStudy:
    """What the rows have in common. flags: of RulesConfig. evaluations: (base, seed) -> rows of its training. diverged: rows
    of the rules that were left out."""
    flags: dict
    evaluations: dict[tuple[str, int], list[dict]]
    conditions: list[str]
    command_line: str
    diverged: list[dict]


# -- numbers ----------------------------------------------------------------------------------------------------------

def by_rule(rows: list[dict], arm: str, baseline: str | None = None) -> list[float]:
    """Percent of each rule, the mean over seeds of an arm, or of its difference to a baseline; rows that lack one are left
    out."""
    values = {}
    for row in rows:
        if arm in row and (baseline is None or baseline in row):
            value = row[arm] - (row[baseline] if baseline else 0.0)
            values.setdefault((row["family"], row["rule"]), []).append(100 * value)
    return [sum(found) / len(found) for found in values.values()]


def kinds(rows: list[dict]) -> dict[str, list[dict]]:
    """All single rules and all compositions, each with its rows, or the name of their family where it is one."""
    found = {}
    for name, is_composed in ((SINGLE, False), (COMPOSED, True)):
        if part := [row for row in rows if ("+" in row["family"]) == is_composed]:
            families = {row["family"] for row in part}
            found[name if len(families) > 1 else families.pop()] = part
    return found


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """Group -> its rows: those of `kinds`, then each family; a group of a single family appears once."""
    families = dict.fromkeys(row["family"] for row in rows)
    several = {name: part for name, part in kinds(rows).items() if name not in families}
    return several | {family: [row for row in rows if row["family"] == family] for family in families}


def show_percent(values: list[float]) -> str:
    return f"{Estimate.from_values(values).mean:.1f}" if values else ""


def show_gain(values: list[float]) -> str:
    if not values:
        return ""
    estimate = Estimate.from_values(values)
    return f"{estimate.mean:+.1f}" + (f" ± {estimate.margin:.1f}" if estimate.margin < math.inf else "")


# -- tables -----------------------------------------------------------------------------------------------------------

def accuracy_table(rows: list[dict]) -> Table:
    """Of one base."""
    arms = [arm for arm in ARMS if any(arm in row for row in rows)]
    lines = [(group, str(len(by_rule(part, "in_context"))), *(show_percent(by_rule(part, arm)) for arm in arms))
             for group, part in groups(rows).items()]
    flops = ("MFLOP per question", "", *(f"{mean([row[f'flops_{arm}'] for row in rows if arm in row]) / 1e6:,.0f}"
                                         for arm in arms))
    return Table(("exact answers, %", "rules", *(ARMS[arm] for arm in arms)), [*lines, flops])


def gain_table(rows: list[dict]) -> Table:
    """Of one base, in percentage points."""
    lines = [(group, *(show_gain(by_rule(part, arm, baseline)) for _, arm, baseline in GAINS))
             for group, part in groups(rows).items()]
    return Table(("percentage points", *(name for name, _, _ in GAINS)), lines)


def base_table(evaluations: dict[tuple[str, int], list[dict]]) -> Table:
    """How far the bases have converged: their loss, and accuracy in context on rules of training, halfway and at the end."""
    lines = []
    for (base, seed), rows in evaluations.items():
        if rows:
            end = rows[-1]
            half = min(rows, key=lambda row: abs(row["step"] - end["step"] / 2))
            lines.append((base, str(seed), f"{end['step']:,}", f"{half['val_loss']:.3f}", f"{end['val_loss']:.3f}",
                          f"{100 * half['accuracy']:.1f}", f"{100 * end['accuracy']:.1f}"))
    return Table(("base", "seed", "steps", "nats/token halfway", "at the end", "exact halfway, %", "at the end, %"), lines)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# -- the report -------------------------------------------------------------------------------------------------------

def short_table(base: str, rows: list[dict]) -> list[str]:
    """Lines for a terminal: the arms of a base, then their differences."""
    found = kinds(rows)
    lines = [(ARMS[arm], *(show_percent(by_rule(part, arm)) for part in found.values())) for arm in ARMS] + [
        (name, *(show_gain(by_rule(part, arm, baseline)) for part in found.values())) for name, arm, baseline in GAINS]
    return align_columns([(f"base: {base}", *found), *(line for line in lines if any(line[1:]))])


def write_rules_report(rows: list[dict], study: RulesStudy, out_path: Path):
    """Writes rules.md, rules.html, rules.csv and rules.svg, and prints a short form."""
    bases, parts = list(dict.fromkeys(row["base"] for row in rows)), []
    for base in bases:
        own = [row for row in rows if row["base"] == base]
        parts += [("h2", f"Base: {base}"), accuracy_table(own), gain_table(own)]
    bases_trained = base_table(study.evaluations)
    if bases_trained.rows:
        parts += [("h2", "Bases, in context on rules of training"), bases_trained]
    figure = Figure(draw_arms({base: [row for row in rows if row["base"] == base] for base in bases}), "arms")
    diverged = [f"{row['base']}, seed {row['seed']}, {row['rule']}: left out, {row['diverged']}" for row in study.diverged]
    seconds = sum(row["seconds"] for row in rows)
    parts = [figure, *parts, ("p", " ".join(NOTES.split("\n"))), *([("ul", diverged)] if diverged else []),
             ("ul", [*study.conditions, f"{study.flags['demonstrations']} demonstrations, {study.flags['seeds']} seeds of a "
                                        f"base; {seconds / 60:,.1f} minutes without training the bases"]),
             ("code", study.command_line)]
    title = "New rules from a few demonstrations"
    for name, content in (("rules.csv", csv_table(rows)), ("rules.md", markdown_page(title, parts)),
                          ("rules.svg", figure.svg)):
        with atomic_write(out_path / name, "w") as file:
            file.write(content)
    write_page(out_path / "rules.html", title, parts)
    print()
    for base in bases:
        print("\n".join(short_table(base, [row for row in rows if row["base"] == base])) + "\n")
    say("Percent of exact answers, and differences in percentage points ± half of their 95 % interval over rules.")
    if diverged:
        say(f"{len(diverged):,} rows were left out, the first: {diverged[0]}")
    print(out_path / "rules.html")


def draw_arms(rows_by_base: dict[str, list[dict]]) -> list[str]:
    """A panel for each base: a line for each group of rules, a dot for each arm."""
    most = max(len(groups(rows)) for rows in rows_by_base.values())
    axes = make_panels(len(rows_by_base), height=1.6 + 0.25 * most)
    markers = dict(zip(ARMS, zip("osDv^x", COLORS)))
    for axis, (base, rows) in zip(axes, rows_by_base.items()):
        names = list(groups(rows))
        for arm, (marker, color) in markers.items():
            found = [(values, y) for y, part in enumerate(groups(rows).values()) if (values := by_rule(part, arm))]
            if found:
                axis.plot([mean(values) for values, _ in found], [y for _, y in found], marker, color=color, label=ARMS[arm],
                          alpha=0.8)
        axis.set(xlim=(-3, 103), ylim=(most - 0.5, -0.5), xlabel="exact answers, % (more is better)", title=f"base: {base}")
        axis.set_yticks(range(len(names)), names)
        axis.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return to_svgs(axes)
