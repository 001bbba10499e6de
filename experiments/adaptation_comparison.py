"""Which model adapts best at inference time: the statistics and the report of `compare.py --script=adapt`.

compare.py calls `write_adaptation_comparison` when the cells of experiments/adaptation_cells.py are done; it writes
comparison.md, .csv, .html and a picture.
"""
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.adaptation import (
    QUARTERS,
    READINGS,
    bits_per_byte,
    by_position,
    gains_by_quarter,
    seconds_ratio,
)
from experiments.adaptation_cells import AdaptResults, gain
from experiments.analysis import SIGNIFICANCE
from experiments.plots import draw_adapting_arms
from experiments.report import Figure, Table, align_columns, write_report
from experiments.runner import FINAL_STATUSES
from experiments.stats import Estimate, holm, p_value
from runtime.cli import say
from runtime.forecast import format_bytes

CONTROLS = "other", "overlap", "static_kept", "adapted_kept"  # keys of READINGS
POSITION_TOKENS = 64  # per point of the curves by position
NOTES = """\
Every arm reads the same documents, and all numbers are means over those that every model of every arm has read to their end,
each document counting once, and over the models of an arm. Gain: bits per byte static minus adapted; positive is better. A
model that predicts these documents badly has more to gain, so the bits per byte that it ends with stand beside the gain.
Differences from the first arm are paired by document and seed. Each number has two 95 % intervals (Student's t): over
documents, of the means over seeds, which says how far it holds for other documents of this kind and these models; and over
seeds, of the means over documents, which says how far it holds for other training runs of these architectures on these
documents. A difference is called significant where both exclude 0 and the larger of their two p-values, corrected for all
differences in gain and in adapted bits per byte on this page (Holm), is below 0.05."""
RATE_NOTE = """\
Learning rate: each arm tried the same multiples of --adapt_rate with its first model, on {n} documents that come after those
that count, and further ones while the lowest or highest was the best; those that count are read at the rate with the largest
mean gain. (edge): that was still the lowest or highest tried."""
CONTROL_NOTE = """\
Controls are bits per byte minus those of static reading, with the interval over documents; negative is better than static.
Adapted to another document: scored with the weights that the document before it has led to; were it better than static, part
of the gain would come from the kind of text. Static, longer overlap: windows so close together that a token costs as many
FLOPs as adapting does. State kept: for recurrent models, whose state may run through the whole document; it is a learner of
its own. Seconds were measured in the runs; with --jobs these share the cores. FLOPs are those of matrix products, per scored
token."""
TOKENIZER_NOTE = """\
The arms do not share one tokenizer: bits per byte compare, positions in tokens, hops and contexts do not, for they hold
other amounts of text; with --max_tokens the arms read different amounts of each document."""


# -- statistics -------------------------------------------------------------------------------------------------------

class TwoWay(NamedTuple):
    """A mean over documents and seeds, with its interval over either. p: the larger of the two p-values of its being 0."""
    mean: float
    margin_documents: float
    margin_seeds: float
    p: float

    @classmethod
    def from_values(cls, values: list[list[float]]) -> "TwoWay":
        """values: for each seed, one for each document."""
        by_document = [statistics.mean(column) for column in zip(*values)]
        by_seed = [statistics.mean(row) for row in values]
        return cls(statistics.mean(by_seed), Estimate.from_values(by_document).margin, Estimate.from_values(by_seed).margin,
                   max(p_value(by_document), p_value(by_seed)))

    def columns(self, name: str) -> dict:
        return {name: self.mean, f"{name}_margin_documents": self.margin_documents,
                f"{name}_margin_seeds": self.margin_seeds}


def common_documents(results: list[AdaptResults]) -> list[str]:
    """text_digest of the documents that every finished run of every arm has read to their end, in their order."""
    runs = [run.rows() for arm_results in results for run in arm_results.finished().values()]
    return [digest for digest in runs[0] if all(digest in rows for rows in runs)] if runs else []


def measure(arm_results: AdaptResults, documents: list[str], quantity: Callable[[dict], float]) -> dict[int, list[float]]:
    """seed -> quantity(row) of each of the documents."""
    return {seed: [quantity(rows[digest]) for digest in documents]
            for seed, run in arm_results.finished().items() for rows in [run.rows()]}


def subtract(values: dict[int, list[float]], others: dict[int, list[float]]) -> list[list[float]]:
    """Paired differences, a list for each seed that both have."""
    return [[a - b for a, b in zip(values[seed], others[seed])] for seed in values if seed in others]


QUANTITIES = {"gain": gain, "adapted": lambda row: bits_per_byte(row, "adapted"),
              "static": lambda row: bits_per_byte(row, "static")}
COMPARED = "gain", "adapted"  # whose differences from the first arm are tested


def table_rows(results: list[AdaptResults], documents: list[str]) -> list[dict]:
    """A row per arm, the columns of comparison.csv; the first arm is the reference. Arms without a finished run lack most
    columns."""
    reference, rows = results[0], []
    for arm_results in results:
        arm, finished = arm_results.arm, arm_results.finished()
        row = {"arm": arm.name, "models": len(finished), "models_wanted": len(arm.seeds), "documents": len(documents),
               "parameters": arm.n_parameters, "block_size": arm.block_size, "n_rates": len(arm_results.rates)}
        rows.append(row)
        if not finished or not documents:
            continue
        for name, quantity in QUANTITIES.items():
            values = measure(arm_results, documents, quantity)
            row |= TwoWay.from_values(list(values.values())).columns(name)
            if arm_results is reference or not (pairs := subtract(values, measure(reference, documents, quantity))):
                continue
            difference = TwoWay.from_values(pairs)
            row |= difference.columns(f"{name}_difference") | {"pairs": len(pairs)}
            if name in COMPARED:
                row[f"{name}_p"] = difference.p
        row |= control_columns(arm_results, documents) | cost_columns(arm_results)
    return add_significance(rows)


def control_columns(arm_results: AdaptResults, documents: list[str]) -> dict:
    """Bits per byte of the controls minus static, and the gain by quarter of a document, with intervals over documents."""
    columns = {}
    for reading in CONTROLS:
        values = measure(arm_results, documents, lambda row, reading=reading: math.nan if row.get(reading) is None else
                         bits_per_byte(row, reading) - bits_per_byte(row, "static"))
        by_document = [x for x in map(statistics.mean, zip(*values.values())) if not math.isnan(x)]
        if by_document:
            estimate = Estimate.from_values(by_document)
            columns |= {reading: estimate.mean, f"{reading}_margin_documents": estimate.margin}
    by_seed = [gains_by_quarter([rows[digest] for digest in documents])
               for run in arm_results.finished().values() for rows in [run.rows()]]
    for name, quarters in zip(QUARTERS, zip(*by_seed)):
        if quarters[0]:  # as many documents in each seed
            estimate = Estimate.from_values([-statistics.mean(column) for column in zip(*quarters)])
            columns |= {f"{name}_quarter": estimate.mean, f"{name}_quarter_margin_documents": estimate.margin}
    return columns


def cost_columns(arm_results: AdaptResults) -> dict:
    """What adapting costs: the median over models of seconds, the rest is the same for all."""
    runs = list(arm_results.finished().values())
    rows = [list(run.rows().values()) for run in runs]
    seconds = lambda reading: statistics.median(1000 * sum(row[f"{reading}_seconds"] for row in own)
                                                / sum(row["tokens"] for row in own) for own in rows)
    summary, tried = runs[0].summary, [result.cell.multiple for result in arm_results.rates]
    return {"adapt_rate": summary["rate"], "at_grid_edge": runs[0].cell.multiple in (
                [min(tried), max(tried)] if len(tried) > 1 else []),
            "hop": summary["hop"], "trained_parameters": summary["n_trained"],
            "seconds_ratio": statistics.median(map(seconds_ratio, rows)),
            "static_seconds_per_1000_tokens": seconds("static"),
            "adapted_seconds_per_1000_tokens": seconds("adapted"), "overlap_stride": summary["stride"],
            "static_flops_per_token": summary["flops"]["static"], "adapted_flops_per_token": summary["flops"]["adapted"],
            "extra_bytes": summary["extra_bytes"]}


def add_significance(rows: list[dict]) -> list[dict]:
    """The same rows with corrected p-values, and what each difference shows: "corrected" if it is significant; "uncorrected"
    if it were as the only comparison; "documents" if only the interval over documents excludes 0, so that it holds for these
    models alone; else "none"."""
    compared = [(row, name) for row in rows for name in COMPARED if f"{name}_p" in row]
    for (row, name), p in zip(compared, holm([row[f"{name}_p"] for row, name in compared])):
        size, over_documents, over_seeds = (abs(row[f"{name}_difference"]), row[f"{name}_difference_margin_documents"],
                                            row[f"{name}_difference_margin_seeds"])
        row[f"{name}_p_holm"] = p
        row[f"{name}_significance"] = (
            "none" if size <= over_documents else "documents" if size <= over_seeds else
            "corrected" if p < SIGNIFICANCE else "uncorrected")
    return rows


# -- sentences --------------------------------------------------------------------------------------------------------

def intervals(row: dict, name: str, n_seeds: int) -> str:
    """"95 % interval over 40 documents +0.01 to +0.03, over 3 seeds +0.00 to +0.04"."""
    mean, texts = row[name], []
    for n, what in ((row["documents"], "documents"), (n_seeds, "seeds")):
        margin = row[f"{name}_margin_{what}"]
        texts.append(f"over {n} {what} {mean - margin:+.4f} to {mean + margin:+.4f}" if math.isfinite(margin) else
                     f"none over {what}, there is one")
    return f"95 % interval {texts[0]}, {texts[1]}"


def describe_gain(row: dict) -> str:
    """One sentence about whether an arm gains by adapting, that claims no more than its intervals support."""
    if "gain" not in row:
        return f"{row['arm']}: no run finished."
    lowest = abs(row["gain"]) - row["gain_margin_documents"], abs(row["gain"]) - row["gain_margin_seeds"]
    found = "gains" if row["gain"] > 0 else "loses"
    if lowest[0] <= 0:
        claim = "no significant gain from adapting"
    elif lowest[1] <= 0:
        claim = f"{found} {abs(row['gain']):.4f} bits/byte by adapting in these models; not shown for other seeds"
    else:
        claim = f"{found} {abs(row['gain']):.4f} bits/byte by adapting"
    kind = ""
    if row.get("other", 0) + row.get("other_margin_documents", math.inf) < 0:
        kind = f" Adapted to another document it is better than static too, by {-row['other']:.4f}: a part of the gain " \
               f"comes from the kind of text."
    return f"{row['arm']}: {claim} ({intervals(row, 'gain', row['models'])}).{kind}"


CLAIMS = {"gain": ("gain", "gains more than {base}", "gains less than {base}"),
          "adapted": ("adapted bits/byte", "once adapted it is worse than {base}", "once adapted it is better than {base}")}


def describe_difference(row: dict, base: str, name: str) -> str:
    """A clause about one difference from the first arm, and its intervals."""
    what, above, below = (text.format(base=base) for text in CLAIMS[name])
    value, significance = row[f"{name}_difference"], row[f"{name}_significance"]
    claim = f"{above if value > 0 else below}, by {abs(value):.4f} bits/byte"
    if significance == "none":
        claim = f"no significant difference from {base} in {what}"
    elif significance == "documents":
        claim += ", in these models; not shown for other seeds"
    elif significance == "uncorrected":
        claim += (f", which would be significant as the only comparison, but is not as one of several "
                  f"(p = {row[f'{name}_p_holm']:.3f})")
    return f"{claim} ({intervals(row, f'{name}_difference', row['pairs'])})"


def verdict(row: dict, reference: dict) -> str:
    """One sentence about an arm against the first that claims no more than the intervals support."""
    missing = "".join(f" Of {other['arm']} only {other['models']} of {other['models_wanted']} runs finished; how the others "
                      f"would have ended is unknown." for other in (row, reference)
                      if 0 < other["models"] < other["models_wanted"])
    if "gain_difference" not in row:
        return f"{row['arm']}: no comparable run finished."
    edges = "".join(f" The best learning rate of {other['arm']} was the lowest or highest tried."
                    for other in (row, reference) if other["at_grid_edge"])
    clauses = "; ".join(describe_difference(row, reference["arm"], name) for name in COMPARED)
    return f"{row['arm']}: {clauses}.{missing}{edges}"


SHORT_VERDICTS = {"none": "not significant", "documents": "only these models", "uncorrected": "only by itself"}


def short_verdict(row: dict) -> str:
    """What `verdict` says about the gain, in a few words."""
    if "gain_difference" not in row:
        return "no comparable run"
    return SHORT_VERDICTS.get(row["gain_significance"], "gains more" if row["gain_difference"] > 0 else "gains less")


def describe_best(results: list[AdaptResults], documents: list[str]) -> list[str]:
    """A sentence for each quantity about which arm is best, and which others are not shown to be worse. None where fewer
    than three arms have models of two or more seeds."""
    able = [arm_results for arm_results in results if len(arm_results.finished()) > 1]
    if len(able) < 3 or not documents:
        return []
    sentences = []
    for name, sign, what in (("gain", -1, "Largest mean gain"), ("adapted", 1, "Lowest mean bits/byte when adapted")):
        values = [measure(arm_results, documents, QUANTITIES[name]) for arm_results in able]
        means = [sign * TwoWay.from_values(list(own.values())).mean for own in values]
        best = means.index(min(means))
        others = [i for i in range(len(able)) if i != best]
        pairs = [subtract(values[i], values[best]) for i in others]  # none where they have no seed in common
        p_values = holm([TwoWay.from_values(paired).p if paired else 1.0 for paired in pairs])
        alike = [able[i].arm.name for i, p in zip(others, p_values) if p >= SIGNIFICANCE]
        rest = f"not shown to be worse than it: {', '.join(alike)}" if alike else "all others are worse"
        sentences.append(f"{what}: {able[best].arm.name}; {rest} (p over documents and seeds, corrected for "
                         f"{len(others)} comparisons).")
    return sentences


# -- the report -------------------------------------------------------------------------------------------------------

def number(row: dict, name: str, form: str, scale: float = 1) -> str:
    return "" if row.get(name) is None else format(row[name] * scale, form)


def with_margin(row: dict, name: str, form: str, over: str) -> str:
    """"+0.0123 ± 0.0045"; the half-width is left out where it is infinite."""
    margin = row.get(f"{name}_margin_{over}", math.inf)
    return number(row, name, form) + (f" ± {margin:.4f}" if math.isfinite(margin) else "")


def margins(row: dict, name: str) -> str:
    """"± 0.0045 / 0.0101", the half-widths over documents and over seeds; "-" for one that does not exist."""
    found = [row.get(f"{name}_margin_{over}", math.inf) for over in ("documents", "seeds")]
    return f"± {' / '.join(f'{margin:.4f}' if math.isfinite(margin) else '-' for margin in found)}" if name in row else ""


def result_table(rows: list[dict]) -> Table:
    significant = {"corrected": "yes", "uncorrected": "only by itself", "documents": "only these models", "none": "no"}
    head = ["arm", "static, bits/byte", "adapted (lower is better)", "gain (higher is better)",
            "its interval over documents / seeds"]
    for name in ("gain", "adapted bits/byte"):
        head += [f"difference in {name} from the first arm", "its interval over documents / seeds", "p (Holm)",
                 "significant"]
    lines = []
    for row in rows:
        line = [row["arm"], number(row, "static", ".4f"), number(row, "adapted", ".4f"), number(row, "gain", "+.4f"),
                margins(row, "gain")]
        for name in COMPARED:
            line += [number(row, f"{name}_difference", "+.4f"), margins(row, f"{name}_difference"),
                     number(row, f"{name}_p_holm", ".3f"), significant.get(row.get(f"{name}_significance"), "")]
        lines.append(tuple(line))
    return Table(tuple(head), lines)


def control_table(rows: list[dict]) -> Table:
    shown = [reading for reading in CONTROLS if any(reading in row for row in rows)]
    return Table(("arm, bits/byte minus static", *(READINGS[reading] for reading in shown)),
                 [(row["arm"], *(with_margin(row, reading, "+.4f", "documents") for reading in shown)) for row in rows])


def quarter_table(rows: list[dict]) -> Table:
    return Table(("arm, gain by quarter of a document", *QUARTERS), [
        (row["arm"], *(with_margin(row, f"{name}_quarter", "+.4f", "documents") for name in QUARTERS)) for row in rows])


def cost_table(rows: list[dict]) -> Table:
    head = ("arm", "parameters", "of them trained", "context", "hop", "learning rate", "s per 1,000 tokens, static",
            "adapted", "ratio", "MFLOP/token, static", "adapted", "stride of the longer overlap",
            "memory besides the model", "runs finished")
    return Table(head, [
        (row["arm"], f"{row['parameters']:,}", number(row, "trained_parameters", ","), f"{row['block_size']:,}",
         number(row, "hop", "d"), number(row, "adapt_rate", ".3g") + " (edge)" * row.get("at_grid_edge", False),
         number(row, "static_seconds_per_1000_tokens", ".2f"), number(row, "adapted_seconds_per_1000_tokens", ".2f"),
         number(row, "seconds_ratio", ".2f"), number(row, "static_flops_per_token", ".2f", 1e-6),
         number(row, "adapted_flops_per_token", ".2f", 1e-6), number(row, "overlap_stride", "d"),
         format_bytes(row["extra_bytes"]) if "extra_bytes" in row else "", f"{row['models']} of {row['models_wanted']}")
        for row in rows])


def draw(results: list[AdaptResults], rows: list[dict], documents: list[str]) -> Figure:
    """The curves and gains of the arms that have finished runs."""
    curves, gains = {}, {}
    for arm_results, row in zip(results, rows):
        if "gain" in row:
            read = [rows_of[digest] for run in arm_results.finished().values() for rows_of in [run.rows()]
                    for digest in documents]
            curves[row["arm"]] = by_position(read, max(1, round(POSITION_TOKENS / row["hop"])))
            values = measure(arm_results, documents, gain)
            gains[row["arm"]] = [statistics.mean(column) for column in zip(*values.values())], row["gain_margin_seeds"]
    return Figure(draw_adapting_arms(curves, gains), "adapting")


def write_adaptation_comparison(results: list[AdaptResults], conditions: list[str], command_line: str, out_path: Path):
    """Writes the report into `out_path`, and prints a short table of it. conditions: sentences. Raises OSError, or
    FloatingPointError, when no document has been read by all models."""
    documents = common_documents(results)
    problems = [problem for arm_results in results for problem in arm_results.problems()]
    if not documents:
        have_failed = any(result.status not in FINAL_STATUSES for arm_results in results for result in arm_results.results())
        raise (OSError if have_failed else FloatingPointError)(
            f"no document was read to its end by every model, so that nothing can be compared: {problems[0]}")
    rows = table_rows(results, documents)
    sentences = [describe_gain(row) for row in rows] + [verdict(row, rows[0]) for row in rows[1:]]
    n_read = max(len(run.summary["rows"]) for arm_results in results for run in arm_results.finished().values())
    if n_read > len(documents):
        sentences.append(f"{n_read - len(documents)} of {n_read} documents count for no arm, because not every model has "
                         f"read them to their end.")
    figure = draw(results, rows, documents)
    parts = [("code", command_line), ("p", " ".join(conditions)), ("h2", "Results"), ("ul", sentences),
             *([("ul", best)] if (best := describe_best(results, documents)) else []), result_table(rows), figure,
             ("h2", "Controls"), control_table(rows), quarter_table(rows), ("h2", "Cost"), cost_table(rows)]
    if problems:
        parts += [("h3", "Left out"), ("ul", problems)]
    n_rates = {result.cell.n_documents for arm_results in results for result in arm_results.rates}
    notes = [NOTES, CONTROL_NOTE] + [RATE_NOTE.format(n=n) for n in n_rates]
    if len({arm_results.arm.tokenizer for arm_results in results}) > 1:
        notes.append(TOKENIZER_NOTE)
    parts += [("p", note) for note in notes]
    write_report(out_path, "Which model adapts best at inference time", parts, {"comparison": rows})
    print("\n".join(short_table(rows)))
    for sentence in best:
        say(sentence)
    for problem in problems:
        say(f"left out: {problem}")
    print(out_path / "comparison.html")


def short_table(rows: list[dict], width: int = 80) -> list[str]:
    """Lines for a terminal: arm, bits/byte static and adapted, gain with its interval over seeds, verdict."""
    texts = [("arm", "static", "adapted", "gain", "difference", "verdict")] + [
        (row["arm"], number(row, "static", ".4f"), number(row, "adapted", ".4f"), number(row, "gain", "+.4f"),
         number(row, "gain_difference", "+.4f"), "" if row is rows[0] else short_verdict(row)) for row in rows]
    return [*align_columns(texts, width), ""]
