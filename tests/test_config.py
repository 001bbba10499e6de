"""runtime/config.py: what is declared of a flag, and the check of its value."""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime.config import BadInput, check_flags, declared_flags, flag, read_flags, takes_several, value_type


@dataclass(frozen=True)
class Example:
    """Example flags."""
    size: int = flag(3, "a size", at_least=1, on_resume="warn", scope="run")
    rate: float = flag(None, "a rate", above=0, at_most=1)
    kind: str = flag("a", "a kind", choices=("a", "b"))
    many: int = flag(4, "how many", at_least=1, auto=True)
    fractions: tuple[float, ...] = flag((0.5, 1.0), "some fractions", above=0)
    fast: bool = flag(True, "be fast")
    path: Path = flag(Path("a"), "a path")
    derived: int = 0  # not a flag
    __post_init__ = check_flags


@pytest.mark.parametrize("values, message", [
    ({"size": 0}, "--size=0: must be at least 1"), ({"rate": 0.0}, "--rate=0.0: must be above 0"),
    ({"rate": 1.5}, "--rate=1.5: must be at most 1"), ({"rate": math.nan}, "--rate=nan: must be finite"),
    ({"rate": math.inf}, "--rate=inf: must be finite"), ({"kind": "c"}, "--kind=c: choose one of a, b"),
    ({"many": 0}, "--many=0: must be at least 1"), ({"fractions": (1.0, 0.0)}, "--fractions=0.0: must be above 0"),
    ({"rate": True}, "--rate=True: must be a number"), ({"rate": "0.5"}, "--rate=0.5: must be a number"),
    ({"rate": 10**400}, "--rate=100000000000000000...0000000000000000000: is too large"),
    ({"kind": 3}, "--kind=3: must be text"), ({"kind": "x" * 200}, f"--kind={'x' * 100}…: choose one of a, b"),
    ({"many": "all"}, "--many=all: must be a whole number"), ({"fast": 1}, "--fast=1: must be 1 or 0"),
    ({"fractions": ("1",)}, "--fractions=1: must be a number"), ({"path": "a"}, "--path=a: must be a path"),
    ({"fractions": 0.5}, "--fractions=0.5: must be a list of several"),
    ({"derived": "0"}, "--derived=0: must be a whole number"),
    *(({"size": value}, f"--size={text}: must be a whole number") for value, text in (
        (None, None), (1.5, 1.5), (True, True), ("3", 3), ("auto", "auto"), ([[[[[[[[3]]]]]]]], "[[[[[[[...]]]]]]]"),
        ({"a": 1}, "{'a': 1}"), (math.nan, "nan")))])
def test_a_value_outside_its_range_is_refused(values, message):
    with pytest.raises(BadInput) as error:
        Example(**values)
    assert str(error.value) == message


@pytest.mark.parametrize("values", [{"size": 1}, {"rate": 1.0}, {"rate": None}, {"kind": "b"}, {"many": "auto"},
                                    {"fractions": ()}, {"fractions": (1,)}, {"rate": 1},
                                    {"size": 2**63 - 1}])
def test_a_value_at_the_edge_of_its_range_is_accepted(values):
    assert dataclasses.asdict(Example(**values)).items() >= values.items()


def test_a_field_keeps_everything_that_is_declared_of_its_flag():
    fields = declared_flags(Example)
    assert list(fields) == ["size", "rate", "kind", "many", "fractions", "fast", "path"]
    size, rate = (fields[name].metadata["flag"] for name in ("size", "rate"))
    assert (size.on_resume, size.scope, rate.on_resume, rate.scope) == ("warn", "run", "fixed", "arm")
    assert [value_type(field) for field in fields.values()] == [int, float, str, int, float, bool, Path]
    assert [name for name, field in fields.items() if takes_several(field)] == ["fractions"]


@pytest.mark.parametrize("declared", [{"on_resume": "perhaps"}, {"scope": "everywhere"}])
def test_an_unknown_on_resume_or_scope_is_our_bug(declared):
    with pytest.raises(AssertionError):
        flag(1, "help", **declared)


def test_a_dataclass_is_read_from_the_values_of_its_fields():
    values = {"size": 2, "fractions": [0.25], "other": "not a field of Example"}
    assert read_flags(Example, values) == Example(2, fractions=(0.25,))
    with pytest.raises(BadInput, match="--size=0"):
        read_flags(Example, {"size": 0})
