"""Scores with their standard errors, side by side in a table, as evaluate.py prints them.

    str(proportion([True, False, True, False]))      "50.0% ± 28.9%"
"""
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.report import Table
from runtime.metrics import LossSums


@dataclass(frozen=True)
class Score:
    """A number with its standard error, nan where that is unknown. better: which direction is good, "" for neither."""
    value: float
    stderr: float = math.nan
    better: str = ""
    format: str = ".4f"

    def __str__(self) -> str:
        value = format(self.value, self.format)
        return value if math.isnan(self.stderr) else f"{value} ± {format(self.stderr, self.format.lstrip('+'))}"


def count(n: int) -> Score:
    return Score(n, format=",")


def mean_score(values: Sequence[float], better: str = "higher", format: str = ".1%") -> Score:
    """The mean of independent values."""
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Score(statistics.fmean(values), stderr, better, format)


def proportion(hits: Sequence[bool]) -> Score:
    """Fraction of hits; its standard error is that of a mean of zeros and ones, √(p (1 - p) / (n - 1))."""
    return mean_score([float(hit) for hit in hits])


def adapted_proportion(name: str, static: Sequence[bool], adapted: Sequence[bool]) -> dict[str, Score]:
    """Rows of the table: the fraction of hits after learning, and the mean of the paired differences."""
    return {f"{name}, adapted": proportion(adapted),
            f"{name}, adapted minus static": mean_score([b - a for a, b in zip(static, adapted)], format="+.1%")}


def bits_per_byte(documents: Sequence[LossSums]) -> Score:
    """Over all documents together. These differ in length, so the standard error is that of a ratio, linearised. Source:
    Cochran 1977, Sampling Techniques, equation 2.46."""
    bits, n_bytes = [sums.text_nats / math.log(2) for sums in documents], [sums.text_bytes for sums in documents]
    n, total, ratio = len(documents), sum(n_bytes), sum(bits) / sum(n_bytes)
    squares = sum((b - ratio * size) ** 2 for b, size in zip(bits, n_bytes))
    return Score(ratio, math.sqrt(n / (n - 1) * squares) / total if n > 1 else math.nan, "lower")


def adapted_bits_per_byte(documents: Sequence[LossSums], adapted_nats: Sequence[float]) -> dict[str, Score]:
    """Rows of the table. documents: static; adapted_nats: of each, all of text, as a document holds no special tokens."""
    adapted = [replace(sums, text_nats=nats) for sums, nats in zip(documents, adapted_nats)]
    differences = [replace(b, text_nats=b.text_nats - a.text_nats) for a, b in zip(documents, adapted)]
    return {"bits per byte, adapted": bits_per_byte(adapted),
            "bits per byte, adapted minus static": replace(bits_per_byte(differences), format="+.4f")}


def score_table(scores: dict[str, dict[str, Score]]) -> Table:
    """scores: checkpoint -> name -> score. A column for each checkpoint, and one that says which direction is good."""
    better = {name: score.better for column in scores.values() for name, score in column.items()}
    return Table(("metric", "better", *scores), [
        (name, direction, *(str(column.get(name, "")) for column in scores.values())) for name, direction in better.items()])
