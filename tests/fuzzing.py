"""What the fuzzers share: damaged bytes, damaged JSON, and commands that must end well whatever they read.

    @FUZZ
    def test_metrics_files(n, tmp_path):
        check = lambda data: (path.write_bytes(data), ends_well(train.main, [f"--plot={path}"], keep=[path]))
        fuzz(n, check, data=damaged_bytes(original))
"""
import contextlib
import copy
import io
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conftest import stderr_lines

FUZZ = pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.slow)])
SECONDS = 30          # after which a command hangs; it takes a fraction of a second
MEMORY = 2 * 2 ** 30  # bytes that it may add to the process


def fuzz(n: int, check: Callable, **strategies):
    """Calls check(**values) for n values of `strategies`, the same in every run; shows the smallest that fails."""
    @settings(max_examples=n, deadline=None, database=None, derandomize=True, print_blob=False,
              suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink])
    @given(**strategies)
    def run(**values):
        check(**values)
    run()


# -- values -----------------------------------------------------------------------------------------------------------

def json_values() -> st.SearchStrategy:
    """Values that a careless program, or a hostile one, may have written in place of any other."""
    odd_text = st.sampled_from(["", " ", "\ud83d", "\0", "\n", "../x", "/etc/passwd", "~nosuchuser/x", "$\\foo$", "١٢", "1",
                                "1.5", "nan", "auto", "x" * 300, "<|endoftext|>", "__class__", "é" * 10])
    numbers = st.sampled_from([0, 1, -1, 2, 10 ** 8, 2 ** 31, 2 ** 63, -2 ** 63, 10 ** 400, 0.5, -0.0, 1e308,
                               float("nan"), float("inf")])
    leaves = st.one_of(st.none(), st.booleans(), numbers, odd_text, st.text(max_size=8), st.integers())
    return st.one_of(leaves, st.recursive(leaves, lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=6))


@st.composite
def damaged_json(draw, value):
    """`value`, of JSON, with one to three of its parts replaced, removed, renamed, repeated or added; now and then something
    else altogether. json.dumps writes it."""
    holder = [copy.deepcopy(value)]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        inside = list(places(holder))[1:]
        container, key = draw(st.sampled_from(inside)) if inside and draw(st.integers(0, 19)) else (holder, 0)
        edit = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "repeat"]))
        if edit == "replace" or container is holder:
            container[key] = draw(json_values())
        elif edit == "remove":
            del container[key]
        elif edit == "add" and isinstance(container, dict):
            container[draw(st.text(max_size=8))] = draw(json_values())
        elif edit == "repeat" and isinstance(container, dict):  # under another name
            container[key + draw(st.text(min_size=1, max_size=2))] = container.pop(key)
        else:
            container.insert(key, draw(json_values()) if edit == "add" else copy.deepcopy(container[key]))
    return holder[0]


def places(container):
    """(container, key) of every value below `container`."""
    for key in list(container) if isinstance(container, dict) else range(len(container)):
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from places(container[key])


@st.composite
def damaged_bytes(draw, data: bytes):
    """`data` with one to three bits flipped, or parts overwritten, removed, repeated or inserted, or cut off."""
    damaged = bytearray(data)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at = draw(st.integers(0, max(0, len(damaged) - 1)))
        n = draw(st.sampled_from([1, 2, 8, 64]))
        edit = draw(st.sampled_from(["flip", "flip", "flip", "overwrite", "zero", "remove", "insert", "repeat", "cut"]))
        if edit == "flip" and damaged:
            damaged[at] ^= 1 << draw(st.integers(0, 7))
        elif edit in ("overwrite", "insert"):
            damaged[at:at + n * (edit == "overwrite")] = draw(st.binary(min_size=1, max_size=n))
        elif edit == "zero":
            damaged[at:at + n] = bytes(len(damaged[at:at + n]))
        elif edit == "remove":
            del damaged[at:at + n]
        elif edit == "repeat":
            damaged[at:at] = damaged[at:at + n]
        elif edit == "cut":
            del damaged[at:]
    return bytes(damaged)


# -- commands ---------------------------------------------------------------------------------------------------------

class Hang(BaseException):
    """Not an Exception, which a command could take for a failure of its own."""


def ends_well(main: Callable, argv: list[str], keep: Iterable[Path] = ()) -> int:
    """Runs a command in this process and returns its exit code. Asserts that this is one of runtime/cli.py's, that there was
    no traceback, that it took neither SECONDS nor MEMORY, and that the files `keep`, or all those below a folder, are as
    they were, with no temporary file among them."""
    before, memory = {path: read_tree(path) for path in keep}, peak_memory()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit(SECONDS):
        try:
            main(argv)
            code = 0
        except SystemExit as stop:
            code = stop.code
    lines = stderr_lines(err.getvalue())
    assert code in (0, 1, 2, 3), (code, lines)
    assert "Traceback" not in err.getvalue(), err.getvalue()
    if code == 2:
        assert lines and len(lines[-1]) < 2000, lines
    assert peak_memory() - memory < MEMORY, argv
    for path, content in before.items():
        assert read_tree(path) == content, f"{path} was changed by {argv}"
    return code


def read_tree(path: Path) -> dict[str, bytes]:
    """Relative path -> content of the file `path`, or of all files below that folder, temporary ones included."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file() and file.name != ".lock"}


def peak_memory() -> int:
    """The largest memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def time_limit(seconds: int):
    def stop(number, frame):
        raise Hang(f"still running after {seconds} s")
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
