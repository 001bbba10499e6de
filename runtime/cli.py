"""Command-line flags: each declared once, as a field of a frozen dataclass; what a user gets wrong ends in one line.

    @dataclass(frozen=True)
    class LoopConfig:
        max_iter: int = flag(2_000, "optimizer steps", at_least=1)
        __post_init__ = check_flags

`add_flags` gives argparse the fields, `read_flags` builds the dataclass again, `@command` turns BadInput into one
line on stderr and exit code 2.
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from runtime.config import BadInput, read_flags, takes_several, value_type


def log_line(line: str):
    """A line on stderr; progress bars stay whole."""
    tqdm.write(line, file=sys.stderr)


def parse_bool(text: str) -> bool:
    """'1', 'true', 'yes', 'on' -> True; '0', 'false', 'no', 'off' -> False."""
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")
    return known[text.lower()]


def parse_int(text: str) -> int:
    """'250', '10_000' and '1e9' are whole numbers; '1.5' is not."""
    try:
        value = int(text)
    except ValueError:
        try:
            value = int(float(text)) if float(text).is_integer() else None
        except ValueError:
            value = None
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if abs(value) >= 2**63:  # what numpy and torch count with
        raise argparse.ArgumentTypeError(f"{text!r} is too large")
    return value


def parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def parse_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty, give a path")  # Path("") would be the current folder
    if max((len(os.fsencode(part)) for part in Path(text).parts), default=0) > 255:
        raise argparse.ArgumentTypeError("is longer than file names can be")
    try:
        return Path(text).expanduser()  # a shell does not expand the ~ of --data_path=~/data
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is in the home of a user that does not exist") from None


PARSERS = {bool: parse_bool, int: parse_int, float: parse_float, str: str, Path: parse_path}


def or_auto(parse):
    return lambda text: text if text == "auto" else parse(text)


def shown_default(field):
    if takes_several(field):
        return " ".join(map(str, field.default))
    return int(field.default) if isinstance(field.default, bool) else field.default


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, and suggests the flag that was meant."""

    def __init__(self, description: str | None):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str):
        raise BadInput(message.removeprefix("argument ").replace(": expected one argument", ": give it a value"))

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            if not name.startswith("-"):
                raise BadInput(f"{unknown[0]}: is no flag: give several values as in --flag a b, text with spaces in quotes")
            raise BadInput(f"{unknown[0]}: no such flag" + (f", did you mean {close[0]}?" if close else ", see --help"))
        return found


def add_flags(parser: argparse.ArgumentParser, *configs: type, suppress: bool = False, without: Collection[str] = ()):
    """Declares every field of the `configs` dataclasses on `parser`, but those of `without`; one help line each, with its
    default.

    With `suppress`, a flag that is not given leaves no trace in the namespace.
    """
    for config in configs:
        group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
        for field in dataclasses.fields(config):
            if "help" not in field.metadata or field.name in without:
                continue
            is_bool, parse = value_type(field) is bool, PARSERS[value_type(field)]
            bare = True if is_bool else field.metadata["bare"]
            shown = "" if field.default in (None, "", ()) else f" (default: {shown_default(field)})"
            choices = field.metadata["choices"]
            listed = f": {', '.join(choices)}" if choices else ""
            group.add_argument(
                f"--{field.name}", type=or_auto(parse) if field.metadata["auto"] else parse,
                default=argparse.SUPPRESS if suppress else field.default,
                metavar={bool: "0|1", int: "N", float: "X", Path: "PATH", str: "TEXT"}[value_type(field)],
                help=field.metadata["help"].replace("%", "%%") + listed + shown,
                **({"nargs": "+"} if takes_several(field) else {"nargs": "?", "const": bare} if bare is not None else {}))


def parse_flags(description: str | None, argv, *configs: type) -> list:
    """The usual case: `argv` (None: the command line) read into one instance of each of `configs`."""
    parser = Parser(description)
    add_flags(parser, *configs)
    values = vars(parser.parse_args(argv))
    return [read_flags(config, values) for config in configs]


def command(main):
    """Decorates a script's `main(argv=None)`: what the user can mend ends in one line and exit code 2.

    Exit code 1 is for what went wrong while running (a full disk, a loss that is no longer finite), 130 for Ctrl-C.
    """
    @functools.wraps(main)
    def run(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a young model writes characters that not every terminal has
        code, message = call(main, argv)
        if message:
            name = Path(sys.modules[main.__module__].__file__).name
            print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        if argv is None and "pyarrow" in sys.modules:
            # Its threads may still be reading ahead of a stream that we have left, and would abort the process when the
            # interpreter is taken down under them: https://github.com/apache/arrow/issues/45214
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # a reader that is gone
                    stream.flush()
            os._exit(code)
        if code:
            raise SystemExit(code)
    return run


def call(main, argv) -> tuple[int, str]:
    """Runs `main(argv)`; returns the exit code and the line to end with, if any."""
    try:
        main(argv)
        sys.stdout.flush()
        return 0, ""
    except SystemExit as stop:  # --help, and a run that a signal stopped
        return stop.code or 0, ""
    except BadInput as error:
        return 2, str(error)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    except (OSError, FloatingPointError, MemoryError) as error:
        return 1, str(error) or type(error).__name__
    except KeyboardInterrupt as error:
        return 130, str(error) or "interrupted"
