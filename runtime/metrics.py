"""What a run measures: bits per byte, and rows of numbers on disk that plots and tables read.

A run's rows are `metrics.jsonl`, one JSON object per log or evaluation (step, tokens, seconds, flops, lr, train_loss,
val_loss, val_bpb, tok_per_sec, mfu, peak_memory; largest_loss and grad_norm, the largest since the row before; skipped,
steps left out so far), and the same numbers as TensorBoard events beside it.
"""
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from runtime.cli import log_line
from runtime.files import atomic_write


@dataclass
class LossSums:
    """Loss summed over tokens, and over those that are text, whose bytes are known.

    Bits per byte lets vocabularies of different sizes be compared. Special tokens are no text: they count in neither
    its nats nor its bytes. Sums are Python floats, which are float64.
    """
    nats: float = 0.0
    tokens: int = 0
    text_nats: float = 0.0
    text_bytes: int = 0

    def add(self, losses: Tensor, targets: Tensor, token_bytes: Tensor):
        """losses: (B, T) nats; targets: (B, T), negative ones left out; token_bytes: (V,), 0 for special tokens."""
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


class NonFiniteGuard:
    """What happens in the steps, counted on the device: the host looks when a row is due, and need not wait before.

    A step whose loss or gradient is not finite changes nothing. The first of them may be an accident; at `limit` in a
    row the run has diverged. Under fp16 they are usual: that is how the loss scale is found.
    """

    def __init__(self, device: torch.device, limit: int):
        self.limit = limit
        # skipped in a row, skipped in all, step at which `limit` was reached, largest loss and gradient since the last row
        self.counts = torch.zeros(5, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)

    def update(self, loss: Tensor, norm: Tensor, step: int) -> Tensor:
        """Returns whether the step must be skipped, a bool on the device."""
        in_row, total, failed_at, largest_loss, largest_norm = self.counts.unbind()
        skip = ~(torch.isfinite(loss) & torch.isfinite(norm))
        in_row.copy_((in_row + 1) * skip)
        total.add_(skip)
        failed_at.copy_(torch.where((in_row == self.limit) & (failed_at == 0), step, failed_at))
        largest_loss.copy_(torch.where(skip, largest_loss, torch.maximum(largest_loss, loss)))
        largest_norm.copy_(torch.where(skip, largest_norm, torch.maximum(largest_norm, norm)))
        return skip

    def read(self) -> dict:
        """Waits for the device."""
        _, skipped, failed_at, loss, norm = self.counts.tolist()
        return {"skipped": int(skipped), "failed_at": int(failed_at), "largest_loss": loss, "largest_norm": norm}

    def start_row(self):
        self.counts[3:] = 0


class MetricsLog:
    """Appends rows to `<folder>/metrics.jsonl` and, where TensorBoard is installed, to its events in `folder`.

    rows: what came before, when a run goes on; they replace the files of an earlier run, but not before the first row or
    checkpoint of this one is written.
    """

    def __init__(self, folder: Path, rows: list[dict]):
        self.folder, self.rows = folder, rows
        self.events, self.is_open = None, False

    def open(self):
        """Makes the files hold `rows`. Does nothing the second time. Raises OSError naming the file."""
        if self.is_open:
            return
        with atomic_write(self.folder / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.is_open = True
        try:
            from torch.utils.tensorboard import SummaryWriter  # 0.2 s that other commands need not wait
        except ImportError:
            log_line(f"TensorBoard is not installed: the numbers go to {self.folder / 'metrics.jsonl'} alone")
            return
        self.events = SummaryWriter(self.folder)
        for row in self.rows:
            self._write_events(row)

    def write(self, row: dict):
        """Numbers that are not finite, which JSON does not have, are left out."""
        self.open()
        row = {name: value for name, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self.events is not None:
                self._write_events(row)
                self.events.flush()
        except OSError as error:
            raise OSError(f"{path}: cannot be written ({error.strerror or error})") from None

    def _write_events(self, row: dict):
        for name, value in row.items():
            if name != "step" and value is not None:
                self.events.add_scalar(name, value, row["step"])

    def close(self):
        if self.events is not None:
            with suppress(OSError):  # of a full disk, which `write` has told of
                self.events.close()


def read_rows(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl in order of step; of several rows of a step the last. A line that a crash cut off, or that
    is no row, is left out, and a file that is not there has no rows."""
    rows = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and type(row.get("step")) is int:
                    rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]
