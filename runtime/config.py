"""Flags: each is declared once, as a field of a frozen dataclass, with everything that is true of it.

    @dataclass(frozen=True)
    class LoopConfig:
        max_iter: int = flag(2_000, "optimizer steps", at_least=1, on_resume="warn", scope="run")
        __post_init__ = check_flags

`runtime/cli.py` makes argparse arguments of the fields. `model.py` needs nothing else of runtime/, so that an exported model
carries no argparse.
"""
import dataclasses
import math
import reprlib
import typing
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

# What a resumed run does with a flag that is given again:
ON_RESUME = {"fixed": "the run keeps its value; another one is refused",
             "warn": "may change, which the run reports, because its numbers change with it",
             "free": "may change: the numbers do not depend on it, or only as they depend on the machine, which is reported",
             "unsaved": "does not belong to the run: the checkpoint does not hold it"}
# Who sets a flag when compare.py starts many runs:
SCOPES = {"arm": "an arm, or all arms alike",
          "shared": "the comparison, for all arms alike",
          "run": "compare.py itself, for each run"}
# What a value of each type is called; bool is a kind of int, so it has to be told apart from both kinds of number.
TYPE_WORDS = {bool: "1 or 0", int: "a whole number", float: "a number", str: "text", Path: "a path"}


class BadInput(ValueError):
    """Something the user gave cannot be used. The message names the flag or file, what was found and what to do."""


@dataclass(frozen=True)
class Flag:
    """What is declared of a flag besides its name, type and default; see `flag`."""
    help: str
    at_least: float | None
    above: float | None
    at_most: float | None
    choices: tuple[str, ...] | None
    bare: object
    auto: bool
    on_resume: str
    scope: str

    def check(self, flag_text: str, value):
        """Raises BadInput, starting with the flag as typed, when a single value is outside the range."""
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{flag_text}: must be finite")
        # `not (value >= limit)` rather than `value < limit`: NaN must fail too
        if self.at_least is not None and not value >= self.at_least:
            raise BadInput(f"{flag_text}: must be at least {self.at_least}")
        if self.above is not None and not value > self.above:
            raise BadInput(f"{flag_text}: must be above {self.above}")
        if self.at_most is not None and not value <= self.at_most:
            raise BadInput(f"{flag_text}: must be at most {self.at_most}")
        if self.choices is not None and value not in self.choices:
            raise BadInput(f"{flag_text}: choose one of {', '.join(self.choices)}")


def flag(default, help: str, *, at_least=None, above=None, at_most=None, choices=None, bare=None, auto=False,
         on_resume: str = "fixed", scope: str = "arm"):
    """A dataclass field that is a command-line flag.

    bare: the value of the flag given without one, where that is allowed (a bool: True). auto: "auto" is a value too, and
    stays text. on_resume, scope: see ON_RESUME and SCOPES. A field of type tuple[X, ...] takes several values, each held to
    the range.
    """
    assert on_resume in ON_RESUME and scope in SCOPES, (on_resume, scope)
    return dataclasses.field(default=default, metadata={
        "flag": Flag(help, at_least, above, at_most, choices, bare, auto, on_resume, scope)})


def declared_flags(*configs: type) -> dict[str, dataclasses.Field]:
    """name -> field of every flag that these dataclasses declare; `field.metadata["flag"]` is its Flag."""
    return {field.name: field for config in configs for field in dataclasses.fields(config) if "flag" in field.metadata}


def redeclare(config: type, name: str, default, **changes):
    """The flag of `config` with another default. changes: of what is declared of it, see runtime.config.Flag."""
    declared = declared_flags(config)[name].metadata["flag"]
    return dataclasses.field(default=default, metadata={"flag": dataclasses.replace(declared, **changes)})


def flag_names(*configs: type, on_resume: str | None = None, scope: str | None = None) -> set[str]:
    """Names of the flags that are declared with this on_resume and this scope, where given."""
    return {name for name, field in declared_flags(*configs).items()
            if on_resume in (None, field.metadata["flag"].on_resume) and scope in (None, field.metadata["flag"].scope)}


def check_flags(config):
    """Raises BadInput for the first field of `config` whose value is not of its type, or outside the range of its flag. Use
    as __post_init__: values come from files too. None is a value where it is the default."""
    for field in dataclasses.fields(config):
        value, declared, kind = getattr(config, field.name), field.metadata.get("flag"), value_type(field)
        is_auto = declared is not None and declared.auto and isinstance(value, str) and value == "auto"
        if kind not in TYPE_WORDS or is_auto or value is None and field.default is None:
            continue
        if takes_several(field) and not isinstance(value, tuple):
            raise BadInput(f"--{field.name}={shorten(value)}: must be a list of several")
        for item in value if takes_several(field) else (value,):
            text = f"--{field.name}={shorten(item)}"
            if not is_of_type(item, kind):
                raise BadInput(f"{text}: must be {TYPE_WORDS[kind]}")
            if kind in (int, float) and isinstance(item, int) and abs(item) >= 2**63:  # int64 in numpy and torch
                raise BadInput(f"{text}: is too large")
            if declared is not None:
                declared.check(text, item)


def refuse_given(config, names: Set[str], reason: str):
    """Raises BadInput, with `reason`, for the first of these flags whose value is not the default: it would go unused."""
    for name, field in declared_flags(type(config)).items():
        if name in names and (value := getattr(config, name)) != field.default:
            raise BadInput(f"--{name}={shorten(value)}: {reason}")


def is_of_type(value, kind: type) -> bool:
    """Whether `value` is of type `kind`; a float may be a whole number."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def shorten(value) -> str:
    """`value` as text for a message, at most about 100 characters of it."""
    text = str(value) if isinstance(value, (str, Path)) else reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def read_flags(config: type, values: dict):
    """The dataclass `config` from those entries of `values` that are its fields. Raises BadInput, see check_flags."""
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
                     if name in names})


def value_type(field) -> type:
    """The type of one value of a flag: `int` for `int`, `int | None` and `tuple[int, ...]`."""
    options = [option for option in typing.get_args(field.type) if option is not type(None)]
    return options[0] if options else field.type


def takes_several(field) -> bool:
    return typing.get_origin(field.type) is tuple
