"""A command that trains: its flags, the checkpoint it writes, and how it goes on with one."""
import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoint import CheckpointWriter, load_last, of_run, reading, run_folder
from runtime.cli import Parser, add_flags, parse_bool
from runtime.config import BadInput, read_flags
from runtime.files import check_writable
from runtime.metrics import read_rows

STOP_FLAGS = {"max_iter", "max_tokens", "max_seconds"}


@dataclass(frozen=True)
class TrainingCommand:
    """What one such command has of its own; all have --resume_checkpoint and --overwrite."""
    script: str
    about: str
    configs: Sequence[type]      # the dataclasses of its flags
    out: str                     # the flag that names the checkpoint it writes
    fixed: set[str]              # flags that a resumed run keeps
    changeable: set[str]         # that it may change, but is then another run
    not_saved: set[str]          # that are no part of a run

    def defaults(self) -> dict:
        return {field.name: field.default for config in self.configs for field in dataclasses.fields(config)}

    def flags_given(self, argv) -> dict:
        """The flags that are given. Raises BadInput."""
        parser = Parser(self.about)
        add_flags(parser, *self.configs, suppress=True)
        given = vars(parser.parse_args(argv))
        for name in ("resume_checkpoint", "plot"):
            if given.get(name) == "":
                raise BadInput(f"--{name}=: is empty: give a path, or the bare flag for that of --{self.out}")
        read_flags(self.configs[0], self.defaults() | given)  # a preset that is none
        return given

    def paths_of(self, given: dict, usual: Path) -> tuple[Path, Path | None]:
        """The checkpoint that the run writes, and the one that it goes on from. usual: where it writes if not told."""
        path, resume = given.get(self.out, usual), given.get("resume_checkpoint")
        try:
            return path, (path if resume is not None and parse_bool(resume) else None)
        except argparse.ArgumentTypeError:  # neither yes nor no: a path
            resumed = Path(resume).expanduser()
            return given.get(self.out) or of_run(resumed) or resumed, resumed

    def read_checkpoint(self, path: Path, given: dict) -> tuple[dict, dict]:
        """The flags that the run of the checkpoint had, and the checkpoint. Raises BadInput when it cannot be gone on with,
        or when a flag is given that such a run keeps."""
        blob, defaults = load_last(path), self.defaults()
        if "training" not in blob:
            raise BadInput(f"--resume_checkpoint={path}: holds a model but no training state to go on with")
        with reading(path):
            training = blob["training"]
            if training["script"] != self.script:
                raise BadInput(f"was written by {training['script']}, which can go on with it")
            if type(training["step"]) is not int or training["step"] < 0:
                raise ValueError(f"step is {training['step']!r}")
            if missing := defaults.keys() - self.not_saved - training["settings"].keys():
                raise BadInput(f"does not say what {min(missing)} its run had: resume it with the version that wrote it")
            saved = {name: Path(value) if isinstance(defaults[name], Path) else value
                     for name, value in training["settings"].items() if name in defaults}
            for config in self.configs:
                read_flags(config, defaults | saved)
        for name in sorted(given.keys() & self.fixed & saved.keys()):
            if given[name] != saved[name]:
                raise BadInput(f"--{name}={given[name]}: {path} was trained with {name}={saved[name]}, which a resumed "
                               f"run keeps: drop the flag, or start a fresh run at another --{self.out}")
        return saved, blob

    def require_place(self, path: Path, resumed: Path | None, overwrite: bool, writer: CheckpointWriter):
        """Raises BadInput when the run would replace what is not its own without having been told to, or cannot write."""
        given, rows_at = f"--{self.out}={path}", run_folder(path) / "metrics.jsonl"
        if path.is_dir():
            raise BadInput(f"{given}: is a folder: give a file, such as {path}.pt")
        if not overwrite:
            if path.exists() and not writer.resumes_in_place:
                if resumed and of_run(resumed) == path:
                    raise BadInput(f"--resume_checkpoint={resumed}: the run would go on in {path}, which exists: let it be "
                                   f"replaced by --overwrite, or choose another --{self.out}")
                raise BadInput(f"{given}: exists: go on with it by --resume_checkpoint, replace it by --overwrite, or "
                               f"choose another path")
            if not resumed and read_rows(rows_at):
                raise BadInput(f"{given}: {run_folder(path)} holds the metrics of an earlier run: replace them by "
                               f"--overwrite, or choose another path")

    def check_writable(self, path: Path):
        """Raises BadInput unless the checkpoint and the metrics beside it can be written."""
        check_writable(path, f"--{self.out}={path}")
        check_writable(run_folder(path) / "metrics.jsonl", f"--{self.out}={path}")

    def settings(self, *parts) -> dict:
        """The flags of a run as a checkpoint holds them. parts: dataclasses."""
        return {name: str(value) if isinstance(value, Path) else value
                for part in parts for name, value in vars(part).items() if name not in self.not_saved}

    def report_changes(self, settings: dict, machine: str, training: dict):
        """Says what makes the rest of a resumed run, or its numbers, differ from what they would have been."""
        for name in sorted(self.changeable):
            before, now = training["settings"][name], settings[name]
            if before != now:
                note = "; the schedule now fits the new one" if name in STOP_FLAGS and now else ""
                print(f"changed on resuming: {name} {before} -> {now}{note}")
        if machine != training.get("machine"):
            print(f"changed on resuming: machine {training.get('machine')} -> {machine}")


def override_horizon(start: dict, given: dict) -> dict:
    """The flags a run begins with, and those given. An end that is given is the only one."""
    values = start | given
    return values | {name: given.get(name) for name in STOP_FLAGS} if given.keys() & STOP_FLAGS else values


def is_finished(loop, training: dict, resumed: Path, verbose: bool) -> bool:
    """Whether nothing is left to do, which it says. Raises BadInput when an end is given that is past.
    loop: has STOP_FLAGS."""
    ends = [(name, limit) for name, now in (("max_iter", "step"), ("max_tokens", "tokens"), ("max_seconds", "seconds"))
            if (limit := getattr(loop, name)) and training[now] >= limit]
    for name, limit in ends:
        if training["settings"][name] != limit:
            raise BadInput(f"--{name}={limit}: the checkpoint is at step {training['step']} already: give more")
        if verbose:
            print(f"{resumed}: finished before at step {training['step']:,}; a larger --{name} trains on")
    return bool(ends)
