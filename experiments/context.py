"""Comparisons at several lengths of context: bits per byte by position, and what a context costs in training and decoding.

compare.py --lengths measures; `write_comparison` puts `context_section` on its page and the rows into context.csv and
positions.csv.
"""
import itertools
import math
import re
from typing import NamedTuple

from experiments.analysis import ArmResults, final_columns
from experiments.plots import COLORS, add_legend, make_panels, to_svgs, wrap_label
from experiments.report import Figure, Table, align_columns

CONTEXT_NOTE = """\
Every arm is trained at each length, in steps of as many tokens. ms/step: of training, from the tokens/s above. Cache: what a
model remembers of one text as long as the context while it decodes, all tensors counted. Decoding: one text, the last tokens
of such a context, greedily, the model and its dtype as in generate.py ({machine}); the median of {rounds} rounds in which
the arms take turns. Weights do not matter for speed; they are random. In parentheses: relative to the first arm."""
POSITION_NOTE = """\
On the validation text, which is read in blocks as long as the context: the bits per byte of the tokens that are predicted at
these positions in a block; position 0 has read one token. Bands and differences: 95 % intervals over seeds, differences
paired by seed; not corrected for the number of comparisons."""
LENGTH = re.compile(r"(^|,)block_size=(\d+)$")


class Decoding(NamedTuple):
    """What decoding costs an arm at the end of a context. seconds: per token."""
    cache_bytes: int
    seconds: float


class Contexts(NamedTuple):
    """decoding: (size, arm) -> its cost. machine: that it was measured with, as text. rounds: of the measurement."""
    decoding: dict[tuple[str, str], Decoding]
    machine: str
    rounds: int


def name_length(size: str, length: int) -> str:
    """The name of a size at this length: "n_layer=4" -> "n_layer=4,block_size=512"."""
    return f"{size},block_size={length}".lstrip(",")


def shape_of(size: str) -> str:
    """The inverse: what the lengths of one shape have in common, "" where sizes are not compared."""
    return LENGTH.sub("", size)


def by_length(by_size: list[list[ArmResults]]) -> dict[int, list[list[ArmResults]]]:
    """The groups of each length."""
    lengths = {}
    for group in by_size:
        lengths.setdefault(group[0].arm.batch_shape[1], []).append(group)
    return lengths


# -- rows -------------------------------------------------------------------------------------------------------------

def position_rows(results: list[ArmResults]) -> list[dict]:
    """A row for each arm of one size and each range of positions in a context: the bits per byte there that its finished
    runs end with, and the difference from the first arm, paired by seed. [] where runs have not measured it."""
    rows = []
    for arm_results in results:
        names = arm_results.finished()[-1].rows[-1] if arm_results.finished() else ()
        for name in names:
            prefix, _, positions = name.partition("/")
            if prefix == "val_bpb" and positions:
                first, last = map(int, positions.split("-"))
                rows.append({"size": results[0].arm.size, "context": results[0].arm.batch_shape[1],
                             "arm": arm_results.arm.name, "first_position": first, "last_position": last} | final_columns(
                    arm_results, results[0], name, "bpb"))
    return rows


def context_rows(rows_by_size: list[list[dict]], by_size: list[list[ArmResults]], contexts: Contexts) -> list[dict]:
    """A row for each arm at each length. rows_by_size: the table_rows of by_size."""
    found = []
    for rows, group in zip(rows_by_size, by_size):
        own = []
        for row, arm_results in zip(rows, group):
            arm, decoding = arm_results.arm, contexts.decoding.get((row["size"], row["arm"]))
            own.append({"size": row["size"], "context": arm.batch_shape[1]} | {name: row[name] for name in (
                "arm", "bpb", "bpb_margin", "difference", "difference_margin", "significance") if name in row} | (
                {"step_ms": 1e3 * arm.step_tokens / row["tok_per_sec"]} if "tok_per_sec" in row else {}) | (
                {"cache_bytes": decoding.cache_bytes, "decode_tok_per_sec": 1 / decoding.seconds} if decoding else {}))
        for row in own:
            row |= {f"{name}_ratio": row[name] / own[0][name] for name in ("step_ms", "cache_bytes", "decode_tok_per_sec")
                    if name in row and name in own[0]}
        found += own
    return found


# -- the page ---------------------------------------------------------------------------------------------------------

def context_section(rows: list[dict], positions: list[dict], contexts: Contexts) -> list:
    """The parts of the page about the lengths. rows, positions: of context_rows and position_rows of all sizes."""
    parts = []
    for shape in dict.fromkeys(shape_of(row["size"]) for row in rows):
        own, own_positions = ([row for row in found if shape_of(row["size"]) == shape] for found in (rows, positions))
        title, name = (f": {shape}", f"_{re.sub('[^a-zA-Z0-9]', '_', shape)}") if shape else ("", "")
        parts += [("h2", f"By length of context{title}"), Table(
            ("context, tokens", "arm", "bits/byte (lower is better)", "difference from the first arm (negative is better)",
             "training, ms/step (lower is better)", "cache, KiB (lower is better)",
             "decoding, tokens/s (higher is better)"), [context_cells(row) for row in own]),
            ("p", CONTEXT_NOTE.format(machine=contexts.machine, rounds=contexts.rounds)),
            Figure(draw_contexts(own), f"contexts{name}")]
        if own_positions:
            parts += [("h3", f"By position in the context{title}"), ("p", POSITION_NOTE)]
        for length, group in itertools.groupby(own_positions, key=lambda row: row["context"]):
            parts.append(Figure(draw_positions(list(group), length), f"positions_{length}{name}"))
    return parts


def context_cells(row: dict) -> tuple[str, ...]:
    """Of the table."""
    def cell(name: str, form: str, margin: bool = False, scale: float = 1.0) -> str:
        if name not in row:
            return ""
        text = format(row[name] * scale, form)
        if margin and row[f"{name}_margin"] < math.inf:
            text += f" ± {row[f'{name}_margin']:{form.removeprefix('+')}}"
        return text + (f" ({row[f'{name}_ratio']:.2f} x)" if f"{name}_ratio" in row else "")
    return (f"{row['context']:,}", row["arm"], cell("bpb", ".4f", margin=True), cell("difference", "+.4f", margin=True),
            cell("step_ms", ",.1f"), cell("cache_bytes", ",.1f", scale=2**-10), cell("decode_tok_per_sec", ",.0f"))


def short_contexts(rows: list[dict], width: int = 80) -> list[str]:
    """Lines for a terminal."""
    names = [" ".join(filter(None, (shape_of(row["size"]), row["arm"]))) for row in rows]
    texts = [("arm", "context", "ms/step", "cache, KiB", "decoding tok/s")]
    for name, row in zip(names, rows):
        length, _, _, _, *costs = context_cells(row)
        texts.append((name, length, *(cost.partition(" ")[0] for cost in costs)))
    return [*align_columns(texts, width), ""]


# -- pictures ---------------------------------------------------------------------------------------------------------

def draw_contexts(rows: list[dict]) -> list[str]:
    """Bits per byte, time of a training step, bytes of cache and speed of decoding against the length of the context, a line
    for each arm. Returns panels."""
    quantities = (("bpb", 1.0, "bits per byte", "lower", "linear"),
                  ("step_ms", 1.0, "milliseconds of a training step", "lower", "linear"),
                  ("cache_bytes", 2**-10, "KiB of cache", "lower", "log"),
                  ("decode_tok_per_sec", 1.0, "decoded tokens per second", "higher", "log"))
    axes = make_panels(len(quantities))
    arms, lengths = dict.fromkeys(row["arm"] for row in rows), sorted({row["context"] for row in rows})
    for axis, (name, scale, label, better, y_scale) in zip(axes, quantities):
        for arm, color in zip(arms, COLORS * 9):
            own = [row for row in rows if row["arm"] == arm and name in row]
            margins = [row.get(f"{name}_margin", 0.0) for row in own]
            axis.errorbar([row["context"] for row in own], [row[name] * scale for row in own],
                          yerr=[margin if math.isfinite(margin) else 0.0 for margin in margins], fmt="o-", color=color,
                          capsize=3, linewidth=1.2, label=wrap_label(arm))
        axis.set(xscale="log", yscale=y_scale, xlabel="context, tokens", ylabel=label,
                 title=f"{label.capitalize() if name != 'cache_bytes' else label} by context\n({better} is better)")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        add_legend(axis)
    return to_svgs(axes)


def draw_positions(rows: list[dict], length: int) -> list[str]:
    """Bits per byte against the position in a context of `length` tokens, and the differences from the first arm, a line for
    each arm, with intervals. rows: of position_rows. Returns panels."""
    axes = make_panels(2)
    for arm, color in zip(dict.fromkeys(row["arm"] for row in rows), COLORS * 9):
        for axis, name in zip(axes, ("bpb", "difference")):
            own = [row for row in rows if row["arm"] == arm and name in row]
            x = [(row["first_position"] + row["last_position"] + 1) / 2 for row in own]
            y, margins = ([row[key] for row in own] for key in (name, f"{name}_margin"))
            axis.plot(x, y, ".-", color=color, linewidth=1.3, label=wrap_label(arm) if own else None)
            if all(map(math.isfinite, margins)):
                axis.fill_between(x, [a - b for a, b in zip(y, margins)], [a + b for a, b in zip(y, margins)], color=color,
                                  alpha=0.15, linewidth=0)
    axes[1].axhline(0, linewidth=0.8, color=COLORS[4])
    for axis, label in zip(axes, ("bits per byte", "bits per byte, minus the first arm's")):
        axis.set(xlabel="position in the context, tokens", ylabel=label,
                 title=f"{label[0].upper()}{label[1:]},\nby position in contexts of {length:,} (lower is better)")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.4g}")
        add_legend(axis)
    return to_svgs(axes)
