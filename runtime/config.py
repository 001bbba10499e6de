"""Flags as fields of frozen dataclasses, held to the ranges they declare; and the error for what a user gets wrong."""
import dataclasses
import math
import typing


class BadInput(ValueError):
    """Something the user gave cannot be used. The message names the flag or file, what was found and what to do."""


def flag(default, help: str, *, at_least=None, above=None, at_most=None, choices=None, bare=None, auto=False):
    """A dataclass field that `--help` explains and `check_flags` holds to its range. bare: what the flag without a
    value means, where it may stand alone (a bool may: True). auto: the text "auto" is a value too, and stays text.
    A field of type tuple[X, ...] takes several values, each within the range."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "choices": choices, "bare": bare, "auto": auto}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def check_flags(config):
    """Raises BadInput for the first field of `config` outside the range its `flag` declares. Use as __post_init__."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if value is None or "help" not in limits or (limits["auto"] and value == "auto"):
            continue
        for item in value if isinstance(value, tuple) else (value,):
            check_value(f"--{field.name}={item}", item, limits)


def check_value(given: str, value, limits: dict):
    """limits: what `flag` declares. Raises BadInput, which begins with the flag as it was given."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{given}: must be a number that ends")
    # `not (value >= limit)` rather than `value < limit`: NaN must fail too
    if limits["at_least"] is not None and not value >= limits["at_least"]:
        raise BadInput(f"{given}: must be at least {limits['at_least']}")
    if limits["above"] is not None and not value > limits["above"]:
        raise BadInput(f"{given}: must be above {limits['above']}")
    if limits["at_most"] is not None and not value <= limits["at_most"]:
        raise BadInput(f"{given}: must be at most {limits['at_most']}")
    if limits["choices"] is not None and value not in limits["choices"]:
        raise BadInput(f"{given}: choose one of {', '.join(limits['choices'])}")


def value_type(field) -> type:
    """The type a flag's text is read as: `int` for `int`, `int | None` and `tuple[int, ...]`."""
    options = [option for option in typing.get_args(field.type) if option is not type(None)]
    return options[0] if options else field.type


def takes_several(field) -> bool:
    return typing.get_origin(field.type) is tuple


def read_flags(config: type, values: dict):
    """The dataclass `config` from the entries of `values` that are its fields. Raises BadInput, see check_flags."""
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
                     if name in names})
