"""What a run measures: bits per byte, non-finite steps, and metrics.jsonl, which plots and tables read.

A run's `metrics.jsonl` holds one JSON object per log or evaluation: step, tokens, seconds, flops, lr, train_loss, val_loss,
val_bpb, val_bpb/0-15 and so on at these positions of the blocks, tok_per_sec, mfu, peak_memory; largest_loss and grad_norm,
the maximum since the previous row; skipped, the number of skipped steps so far. TensorBoard events beside it hold the same
numbers.

    for row in read_rows(Path("checkpoints/gpt/metrics.jsonl")):
        print(row["step"], row.get("val_loss"))
"""
import itertools
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.cli import log_line
from runtime.files import atomic_write, explain_write_failure, read_json_lines


@dataclass
class LossSums:
    """Summed loss, from which nats per token and bits per byte follow.

    Bits per byte = summed nats / (ln 2 * bytes of the predicted text), which compares vocabularies of different sizes.
    Special tokens are not text: they count in neither its nats nor its bytes. Python floats are float64.
    """
    nats: float = 0.0
    tokens: int = 0
    text_nats: float = 0.0
    text_bytes: int = 0

    def add(self, losses: Tensor, targets: Tensor, token_bytes: Tensor):
        """losses: (B, T) nats; targets: (B, T) ids, negative ones ignored; token_bytes: (V,), 0 for special tokens."""
        losses, targets = losses.cpu().double().flatten(), targets.cpu().flatten()
        losses, targets = losses[targets >= 0], targets[targets >= 0]
        n_bytes = token_bytes[targets]
        self.nats += losses.sum().item()
        self.tokens += len(targets)
        self.text_nats += losses[n_bytes > 0].sum().item()
        self.text_bytes += int(n_bytes.sum())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.text_nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan


class PositionSums:
    """Summed loss of text at each position of the blocks that it is read in; special tokens do not count, see LossSums."""

    def __init__(self):
        self.nats, self.n_bytes = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def add(self, losses: Tensor, targets: Tensor, token_bytes: Tensor):
        """See LossSums.add; every batch has blocks of the same length."""
        targets = targets.cpu()
        n_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        self.nats = self.nats + torch.where(n_bytes > 0, losses.cpu().double(), 0.0).sum(dim=0)
        self.n_bytes = self.n_bytes + n_bytes.sum(dim=0)

    def bits_per_byte(self) -> dict[str, float]:
        """"0-15" and so on -> of the tokens that are predicted at these positions. Position 0 has read one token."""
        return {f"{start}-{stop - 1}": self.nats[start:stop].sum().item() / math.log(2) / n_bytes
                for start, stop in position_bins(len(self.nats)) if (n_bytes := int(self.n_bytes[start:stop].sum()))}


def position_bins(n: int) -> list[tuple[int, int]]:
    """Positions 0 to n - 1 in parts, each from a power of two to the next: 40 -> [(0, 16), (16, 32), (32, 40)]."""
    powers = itertools.takewhile(lambda power: power < n, (16 << i for i in itertools.count()))
    return list(itertools.pairwise([0, *powers, n]))


class NonFiniteGuard:
    """Decides which steps to skip because their loss or gradient is not finite. Counts on the device, without a host sync.

    A single skipped step may be an accident; after `limit` in a row the run has diverged. Under fp16 they are normal: the
    loss scale is found that way.
    """

    def __init__(self, device: torch.device, limit: int):
        self.limit = limit
        # skipped in a row; skipped in total; step at which `limit` was reached, or 0; largest loss and largest gradient norm
        # since the last row. A checkpoint holds them.
        self.counts = torch.zeros(5, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)

    def update(self, loss: Tensor, norm: Tensor, step: int) -> Tensor:
        """Counts optimizer step number `step`. loss, norm: scalars. Returns a bool scalar: whether to skip the step."""
        in_row, total, failed_at, largest_loss, largest_norm = self.counts.unbind()
        skip = ~(torch.isfinite(loss) & torch.isfinite(norm))
        in_row.copy_((in_row + 1) * skip)
        total.add_(skip)
        failed_at.copy_(torch.where((in_row == self.limit) & (failed_at == 0), step, failed_at))
        largest_loss.copy_(torch.where(skip, largest_loss, torch.maximum(largest_loss, loss)))
        largest_norm.copy_(torch.where(skip, largest_norm, torch.maximum(largest_norm, norm)))
        return skip

    def read(self) -> dict:
        """The counts as numbers. Waits for the device."""
        _, skipped, failed_at, loss, norm = self.counts.tolist()
        return {"skipped": int(skipped), "failed_at": int(failed_at), "largest_loss": loss, "largest_norm": norm}

    def start_row(self):
        """Restarts the maxima, after a row with them has been written."""
        self.counts[3:] = 0


class MetricsLog:
    """Appends rows to `<folder>/metrics.jsonl` and, where TensorBoard is installed, to event files in `folder`.

    rows: the rows so far of a resumed run, [] for a new one. Files of an earlier run are replaced only when `open` or
    `write` is called, so a run that fails before its first row or checkpoint leaves them as they are.
    """

    def __init__(self, folder: Path, rows: list[dict]):
        self.folder, self.rows = folder, rows
        self.events, self.is_open = None, False

    def open(self):
        """Rewrites the files so that they hold `rows`. Does nothing the second time. Raises OSError naming the file."""
        if self.is_open:
            return
        with atomic_write(self.folder / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.is_open = True
        with explain_write_failure(self.folder):
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
            self.open_events()

    def open_events(self):
        try:
            from torch.utils.tensorboard import SummaryWriter  # 0.2 s to import
        except ImportError:
            log_line(f"TensorBoard is not installed: metrics go only to {self.folder / 'metrics.jsonl'}")
            return
        try:
            self.events = SummaryWriter(self.folder)
        except UnicodeError:
            log_line(f"TensorBoard writes to no path that is not UTF-8: metrics go only to {self.folder / 'metrics.jsonl'}")
            return
        for row in self.rows:
            self.write_events(row)

    def write(self, row: dict):
        """Appends a row, without values that are not finite: JSON has none. Raises OSError naming the file."""
        self.open()
        row = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        path = self.folder / "metrics.jsonl"
        with explain_write_failure(path):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self.events is not None:
                self.write_events(row)
                self.events.flush()

    def write_events(self, row: dict):
        for name, value in row.items():
            if name != "step" and value is not None:
                self.events.add_scalar(name, value, row["step"])

    def close(self):
        if self.events is not None:
            with suppress(OSError):  # a full disk, which `write` has reported
                self.events.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, sorted by step; the last one where a step has several. [] if there is no such file.

    Every value of a row is a finite number: a file may be damaged, or another program's. What is none is left out, as are
    lines that a crash cut off, or that are not rows.
    """
    rows = {}
    for row in read_json_lines(path):
        if type(step := row.get("step")) is int and 0 <= step < 2**63:
            rows[step] = {name: value for name, value in row.items() if is_finite_number(value)}
    return [rows[step] for step in sorted(rows)]


def is_finite_number(value) -> bool:
    """Whether a value read from JSON, which has true, NaN and 10**400 too, is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) < 1e300
