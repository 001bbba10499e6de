"""Starting and resuming a run: which flags it has, which checkpoint it writes, and what may change when it goes on."""
import argparse
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoint import CheckpointWriter, explain_damage, load_resumable, owning_checkpoint, run_folder
from runtime.cli import Parser, add_flags, parse_bool, read_path, say
from runtime.config import BadInput, declared_flags, flag_names, read_flags, shorten, value_type
from runtime.files import check_writable
from runtime.metrics import is_finite_number, read_rows

# The flags that end a run, and the counter of TrainState that each limits.
STOP_FLAGS = {"max_iter": "step", "max_tokens": "tokens", "max_seconds": "seconds"}
# Flags that were added after checkpoints of this format had been written, with what a run did before there was the flag.
LATER_FLAGS = {"skip_errors": False, "threads": 0, "val_bytes": 400_000, "train_tokens": None, "loops": 1,
               "sampled_loops": False, "d_head_size": None, "d_conv": None, "n_householder": None, "ngram_rows": None,
               "dense_blocks": None, "linear_scope": "all", "shard": "none",
               # of finetune.py's --meta, without which the rest has no effect
               "meta": None, "meta_contexts": 8, "meta_bytes": 10_000_000, "val_documents": 40, "text_column": "text",
               "adapt_rate": "auto", "adapt_hop": 16, "adapt_scope": "all", "adapt_optimizer": "adamw", "adapt_pull": 0.001,
               "adapt_statistics": "builtin", "adapt_rank": 8}


@dataclass(frozen=True)
class TrainingCommand:
    """A command that trains. It has the flags --resume_checkpoint and --overwrite."""
    script: str
    description: str
    configs: type    # a NamedTuple of the dataclasses of its flags
    out_flag: str    # names the checkpoint it writes
    describe_memory: Callable[[dict], str] = lambda values: (
        f"--batch_size={values['batch_size']}" + f" blocks of {values['block_size']} tokens" * ("block_size" in values))
    """describe_memory(values of flags) -> those that decide how much memory a step needs"""

    @property
    def classes(self) -> tuple[type, ...]:
        return tuple(typing.get_type_hints(self.configs).values())

    def read_configs(self, values: dict):
        """`configs` from flag values. Raises BadInput."""
        return self.configs(*(read_flags(config, values) for config in self.classes))

    def defaults(self) -> dict:
        return {name: getattr(config, name) for config in self.classes for name in config.__dataclass_fields__}

    def flags_given(self, argv) -> dict:
        """The flags that are on the command line. Raises BadInput."""
        parser = Parser(self.description)
        add_flags(parser, *self.classes, suppress=True)
        given = vars(parser.parse_args(argv))
        for name, field in declared_flags(*self.classes).items():
            if given.get(name) == "" and field.metadata["flag"].bare is not None:
                raise BadInput(f"--{name}=: is empty: give a path, or the bare flag for that of --{self.out_flag}")
        read_flags(self.classes[0], self.defaults() | given)  # an unknown preset
        return given

    def paths(self, given: dict, default: Path) -> tuple[Path, Path | None]:
        """The checkpoint that the run writes (`default` unless given), and the one that it resumes, if any."""
        path, resume = given.get(self.out_flag, default), given.get("resume_checkpoint")
        try:
            return path, (path if resume is not None and parse_bool(resume) else None)
        except argparse.ArgumentTypeError:  # neither yes nor no: a path
            resumed = read_path(resume, f"--resume_checkpoint={shorten(resume)}")
            return given.get(self.out_flag) or owning_checkpoint(resumed) or resumed, resumed

    def read_checkpoint(self, path: Path, given: dict) -> tuple[dict, dict]:
        """The flags of the checkpoint's run, and the checkpoint. Raises BadInput when it cannot be resumed, or when a flag
        is given that a resumed run keeps."""
        checkpoint, defaults = load_resumable(path), self.defaults()
        if "training" not in checkpoint:
            raise BadInput(f"--resume_checkpoint={path}: holds a model but no training state to resume")
        with explain_damage(path):
            training = checkpoint["training"]
            if "step" not in training:  # chat.py wrote it
                raise BadInput("holds a model but no training state to resume")
            if training["script"] != self.script:
                raise BadInput(f"is a checkpoint of {training['script']}: resume it with that")
            check_counters(training)
            training["settings"] = LATER_FLAGS | training["settings"]
            if missing := defaults.keys() - flag_names(*self.classes, on_resume="unsaved") - training["settings"].keys():
                raise BadInput(f"does not record --{min(missing)}: resume it with the version that wrote it")
            paths = {name for name, field in declared_flags(*self.classes).items() if value_type(field) is Path}
            saved = {name: Path(value) if name in paths and value is not None else value
                     for name, value in training["settings"].items() if name in defaults}
            self.read_configs(defaults | saved)
        for name in sorted(given.keys() & flag_names(*self.classes, on_resume="fixed") & saved.keys()):
            if given[name] != saved[name]:
                raise BadInput(f"--{name}={given[name]}: {path} was trained with {name}={saved[name]}, which a resumed "
                               f"run keeps: drop the flag, or start a new run at another --{self.out_flag}")
        return saved, checkpoint

    def check_output(self, path: Path, resumed: Path | None, overwrite: bool, writer: CheckpointWriter):
        """Raises BadInput when the run would replace another run's files without --overwrite."""
        flag_text, rows_path = f"--{self.out_flag}={path}", run_folder(path) / "metrics.jsonl"
        if path.is_dir():
            raise BadInput(f"{flag_text}: is a folder: give a file, such as {path}.pt")
        if not overwrite:
            if path.exists() and not writer.resumes_in_place:
                if resumed and owning_checkpoint(resumed) == path:
                    raise BadInput(f"--resume_checkpoint={resumed}: the run would continue in {path}, which exists: allow "
                                   f"replacing it with --overwrite, or choose another --{self.out_flag}")
                raise BadInput(f"{flag_text}: exists: continue it with --resume_checkpoint, replace it with --overwrite, or "
                               f"choose another path")
            if not resumed and read_rows(rows_path):
                raise BadInput(f"{flag_text}: {run_folder(path)} holds the metrics of an earlier run: replace them with "
                               f"--overwrite, or choose another path")

    def check_writable(self, path: Path):
        """Raises BadInput unless the checkpoint and the metrics beside it can be written."""
        check_writable(path, f"--{self.out_flag}={path}")
        check_writable(run_folder(path) / "metrics.jsonl", f"--{self.out_flag}={path}")

    def settings(self, *configs) -> dict:
        """The flags of a run as its checkpoint holds them."""
        unsaved = flag_names(*self.classes, on_resume="unsaved")
        return {name: str(value) if isinstance(value, Path) else value
                for config in configs for name, value in vars(config).items() if name not in unsaved}

    def report_changes(self, settings: dict, machine: str, training: dict):
        """Prints what makes the numbers of a resumed run differ from those of an uninterrupted one."""
        for name in sorted(flag_names(*self.classes, on_resume="warn")):
            before, now = training["settings"][name], settings[name]
            if before != now:
                note = "; the schedule now fits the new one" if name in STOP_FLAGS and now else ""
                say(f"changed on resuming: {name} {before} -> {now}{note}")
        if machine != training.get("machine"):
            say(f"changed on resuming: machine {training.get('machine')} -> {machine}")


def check_counters(training: dict):
    """Raises ValueError or KeyError for a counter that is no number, and for what is said of the machine that is no text."""
    for name in ("step", "tokens", "seconds", "best"):
        value = training[name]
        is_valid = value is None if name == "best" and value is None else is_finite_number(value) and (
            name == "best" or 0 <= value < 2**63) and (type(value) is int or name in ("seconds", "best"))
        if not is_valid:
            raise ValueError(f"{name} is {shorten(value)}")
    for name in ("machine", "dtype"):
        if not isinstance(training.get(name, ""), str):
            raise ValueError(f"{name} is {shorten(training[name])}")


def override_horizon(start: dict, given: dict) -> dict:
    """The flag values `start`, overridden by `given`. A stop flag that is given is the only one."""
    values = start | given
    return values | {name: given.get(name) for name in STOP_FLAGS} if given.keys() & STOP_FLAGS.keys() else values


def is_finished(loop, training: dict, resumed: Path) -> bool:
    """Whether the run has reached its end, which is printed. loop: a LoopConfig. Raises BadInput when a stop flag was
    changed to a value that is already passed."""
    reached = [(name, limit) for name, counter in STOP_FLAGS.items()
               if (limit := getattr(loop, name)) and training[counter] >= limit]
    for name, limit in reached:
        if training["settings"][name] != limit:
            raise BadInput(f"--{name}={limit}: the checkpoint is at step {training['step']} already: give more")
        if loop.verbose:
            say(f"{resumed}: already finished at step {training['step']:,}; a larger --{name} trains on")
    return bool(reached)
