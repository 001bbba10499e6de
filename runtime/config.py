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
import typing
from dataclasses import dataclass

# What a resumed run does with a flag that is given again:
ON_RESUME = {"fixed": "the run keeps its value; another one is refused",
             "warn": "may change, which the run reports, because its numbers change with it",
             "free": "may change: the numbers do not depend on it, or only as they depend on the machine, which is reported",
             "unsaved": "does not belong to the run: the checkpoint does not hold it"}
# Who sets a flag when compare.py starts many runs:
SCOPES = {"arm": "an arm, or all arms alike",
          "shared": "the comparison, for all arms alike",
          "run": "compare.py itself, for each run"}


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


def flag_names(*configs: type, on_resume: str | None = None, scope: str | None = None) -> set[str]:
    """Names of the flags that are declared with this on_resume and this scope, where given."""
    return {name for name, field in declared_flags(*configs).items()
            if on_resume in (None, field.metadata["flag"].on_resume) and scope in (None, field.metadata["flag"].scope)}


def check_flags(config):
    """Raises BadInput for the first flag of `config` outside its declared range. Use as __post_init__."""
    for name, field in declared_flags(type(config)).items():
        value, declared = getattr(config, name), field.metadata["flag"]
        if value is None or (declared.auto and value == "auto"):
            continue
        for item in value if isinstance(value, tuple) else (value,):
            declared.check(f"--{name}={item}", item)


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
