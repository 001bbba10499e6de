"""What a run will take on this machine: memory, speed, time and disk.

    forecast = trainer.measure_run(run)                        times a few steps
    print(forecast_table(forecast), *forecast.warnings(), sep="\\n")
"""
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

DAY = 86_400  # seconds
CHECKPOINTS_KEPT = 3  # the latest, the one before and the best, see runtime/checkpoint.py


@dataclass(frozen=True)
class Forecast:
    """Sizes are in bytes. steps, validations: still to come. available_memory: of the device, with what this process holds;
    peak_memory: 0 where the system does not tell. validation_seconds: of one, with its checkpoint; None if not known.
    epochs: passes over the training data; None if not known. advice: what to do about a run that takes too long."""
    n_parameters: int
    peak_memory: int
    available_memory: int
    step_tokens: int
    step_seconds: float
    steps: int
    validations: int
    validation_seconds: float | None
    epochs: float | None
    disk: int
    free_disk: int
    advice: str

    @property
    def seconds(self) -> float:
        """To the end of the run."""
        return self.steps * self.step_seconds + self.validations * (self.validation_seconds or 0.0)

    @property
    def tok_per_sec(self) -> float:
        return self.step_tokens / self.step_seconds

    def texts(self) -> dict[str, str]:
        """What is forecast -> how much."""
        validations = f"{self.validations:,} validation{'s' * (self.validations != 1)}"
        validations += f" of {format_seconds(self.validation_seconds)}" if self.validation_seconds else ", not counted"
        peak = f"{format_bytes(self.peak_memory)} at the peak of a step, " if self.peak_memory else ""
        return {"parameters": f"{self.n_parameters / 1e6:,.2f} M",
                "memory": f"{peak}{format_bytes(self.available_memory)} available",
                "speed": f"{self.tok_per_sec:,.0f} tokens/s, {format_seconds(self.step_seconds)} a step",
                "time": f"about {format_seconds(self.seconds)}: {self.steps:,} steps and {validations}",
                "data": "" if self.epochs is None else f"{self.epochs:.2f} epochs",
                "disk": f"{format_bytes(self.disk)} for checkpoints, {format_bytes(self.free_disk)} free"}

    def line(self) -> str:
        """All of it in the line that a run prints once its first steps have been timed."""
        texts = self.texts()
        return "forecast " + "; ".join(text for text in (
            texts["time"], texts["speed"], texts["memory"], texts["data"], texts["disk"]) if text)

    def warnings(self) -> list[str]:
        """One line each."""
        lines = []
        if self.seconds > DAY:
            lines.append(f"warning: about {format_seconds(self.seconds)} at the measured speed; {self.advice}")
        if self.disk > self.free_disk:
            lines.append(f"warning: the checkpoints need {format_bytes(self.disk)}, {format_bytes(self.free_disk)} are free")
        if self.peak_memory > self.available_memory:
            lines.append(f"warning: a step needs {format_bytes(self.peak_memory)} of memory, "
                         f"{format_bytes(self.available_memory)} are available")
        return lines


def forecast_table(forecast: Forecast) -> str:
    """A line for each number, names in a column."""
    return "\n".join(f"{name:<12}{text}" for name, text in forecast.texts().items() if text)


def format_seconds(seconds: float) -> str:
    """0.0123 -> "12 ms", 47.1 -> "47 s", 5400 -> "90 min", 1e5 -> "28 hours", 1e6 -> "12 days"."""
    units = (1, 1e-3, "ms"), (100, 1, "s"), (6000, 60, "min"), (2 * DAY, 3600, "hours"), (math.inf, DAY, "days")
    amount, name = next((seconds / unit, name) for limit, unit, name in units if seconds < limit)
    return f"{amount:.1f} {name}" if amount < 10 else f"{amount:,.0f} {name}"


def format_bytes(n: float) -> str:
    """5e6 -> "4.8 MiB", 3e9 -> "2.8 GiB"."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while n >= 1000 and len(units) > 1:
        n, units = n / 1024, units[1:]
    return f"{n:.1f} {units[0]}" if n < 100 and units[0] != "bytes" else f"{n:,.0f} {units[0]}"


def free_disk(path: Path) -> int:
    """Bytes that can still be written where `path` is, or will be."""
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
