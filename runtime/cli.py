"""argparse from the flags of runtime/config.py, and what each kind of failure means on the command line.

| what stops a command | raised as | exit code |
|---|---|---|
| what the user gave cannot be used | BadInput | 2 |
| the loss is no longer finite | FloatingPointError | 3 |
| disk, network, memory, a worker process | OSError, MemoryError | 1 |
| Ctrl-C, SIGTERM, SIGHUP | KeyboardInterrupt, SystemExit | 128 + signal |

Each prints one line on stderr. Anything else is a bug and keeps its traceback. Programs read the exit code, never
the line.
"""
import argparse
import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from runtime.aliases import explain_unknown
from runtime.config import BadInput, declared_flags, read_flags, shorten, takes_several, value_type

BAD_INPUT, DIVERGED = 2, 3  # exit codes that other programs here read
MAX_PATH = 3500             # bytes; the limit of Linux, 4096, less what a command appends
MAX_HELP_WIDTH = 110        # columns; longer lines are hard to read
MAX_PLACEHOLDER = 36        # characters
MIN_BAR = 10                # cells of a progress bar, below which numbers beside it are left out
MAX_MESSAGE = 1500          # characters of the line that a command ends with, which may quote a flag of any length


def log_line(line: str):
    """Prints a line on stderr without breaking progress bars."""
    tqdm.write(wrap(line, sys.stderr), file=sys.stderr)


def terminal_width() -> int:
    """Columns of the terminal; 80 where there is none. The environment's COLUMNS counts first."""
    return shutil.get_terminal_size().columns


def wrap(text: str, stream, indent: str = "") -> str:
    """`text` with its lines broken between words at the terminal's width, where `stream` is one, later lines indented; a
    command in backticks stays whole, to be copied. Elsewhere unchanged: a log keeps whole lines."""
    if not stream.isatty():
        return text
    text = re.sub("`.*?`", lambda command: command[0].replace(" ", "\0"), text)
    lines = (textwrap.fill(line, terminal_width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
             for line in text.split("\n"))
    return "\n".join(lines).replace("\0", " ")


def say(text: str, indent: str = ""):
    """Prints `text` on stdout, see `wrap`."""
    print(wrap(text, sys.stdout, indent))


def progress_bar(iterable=None, **options) -> tqdm:
    """tqdm that refreshes often on a terminal, and every half minute in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, **{"dynamic_ncols": True, "mininterval": interval, "maxinterval": max(interval, 10)} | options)


def set_postfix(bar: tqdm, numbers: dict[str, str]):
    """Shows as many of `numbers`, the most important first, beside the bar as leave it MIN_BAR cells of the terminal."""
    columns = None if bar.disable else bar.format_dict["ncols"]  # None: no terminal
    while numbers:
        postfix = ", ".join(f"{name}={value}" for name, value in numbers.items())
        if columns is None or len(tqdm.format_meter(**bar.format_dict | {
                "postfix": postfix, "ncols": None, "bar_format": "{l_bar}{r_bar}"})) + MIN_BAR <= columns:
            break
        numbers = dict(list(numbers.items())[:-1])
    bar.set_postfix(numbers, refresh=False)


# -- values -----------------------------------------------------------------------------------------------------------

def parse_bool(text: str) -> bool:
    """'1', 'true', 'yes', 'on' -> True; '0', 'false', 'no', 'off' -> False."""
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is neither 1 nor 0")
    return known[text.lower()]


def parse_int(text: str) -> int:
    """'250', '10_000' and '1e9' are whole numbers; '1.5' is not."""
    require_ascii(text, "a whole number")
    try:
        value = int(text)
    except ValueError:
        try:
            value = int(float(text)) if float(text).is_integer() else None
        except ValueError:
            value = None
    if value is None:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a whole number")
    if abs(value) >= 2**63:  # int64 in numpy and torch
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is too large")
    return value


def parse_float(text: str) -> float:
    require_ascii(text, "a number")
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a number") from None


def require_ascii(text: str, what: str):
    """Python's int and float also read the digits of other scripts."""
    if not text.isascii():
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not {what} in the digits 0 to 9")


def parse_text(text: str) -> str:
    """Any text that can be written to a file, and that is not part of something binary."""
    if "\0" in text:
        raise argparse.ArgumentTypeError("has a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that Python could not decode arrive as lone surrogates
        encoding = sys.getfilesystemencoding()
        advice = "" if encoding == "utf-8" else ": set PYTHONUTF8=1"
        raise argparse.ArgumentTypeError(f"is not valid {encoding.upper()}{advice}") from None
    return text


def parse_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty, give a path")  # Path("") would be the current folder
    if "\0" in text:
        raise argparse.ArgumentTypeError("has a NUL character, which no path has")
    if len(os.fsencode(text)) > MAX_PATH or any(len(os.fsencode(part)) > 255 for part in Path(text).parts):
        raise argparse.ArgumentTypeError("is longer than file names can be")
    try:
        return Path(text).expanduser()  # a shell does not expand the ~ of --data_path=~/data
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is in the home of a user that does not exist") from None


def read_path(text: str, flag_text: str) -> Path:
    """The path in `text`, which may begin with ~. For flags of type str whose value is sometimes a path. Raises BadInput,
    which starts with `flag_text`, the flag as typed."""
    try:
        return parse_path(text)
    except argparse.ArgumentTypeError as error:
        raise BadInput(f"{flag_text}: {error}") from None


PARSERS = {bool: parse_bool, int: parse_int, float: parse_float, str: parse_text, Path: parse_path}


def or_auto(parse: Callable) -> Callable:
    return lambda text: text if text == "auto" else parse(text)


# -- flags ------------------------------------------------------------------------------------------------------------

class HelpFormatter(argparse.HelpFormatter):
    """Wraps help to the terminal's width, or to MAX_HELP_WIDTH in a wide one, flags in a narrow column."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=min(terminal_width() - 2, MAX_HELP_WIDTH))


class Parser(argparse.ArgumentParser):
    """argparse that reports errors in one line, and suggests the flag that was meant."""

    def __init__(self, description: str | None):
        super().__init__(description=description, usage="%(prog)s [--flag=value ...]", allow_abbrev=False,
                         formatter_class=HelpFormatter)

    def error(self, message: str):
        raise BadInput(message.removeprefix("argument ").replace(": expected one argument", ": give it a value"))

    def _get_values(self, action, arg_strings):
        if arg_strings != ["--"]:
            return super()._get_values(action, arg_strings)
        value = self._get_value(action, "--")  # --flag=--, which argparse takes for the end of flags: python/cpython#59317
        return [value] if action.nargs == "+" else value

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = {action.dest: getattr(action, "flag_choices", None) or () for action in self._actions}
            is_flag = unknown[0].startswith(("-", "\u2013", "\u2014"))
            raise BadInput(explain_unknown(unknown[0], known) if is_flag else explain_stray(unknown[0], known))
        return found


def explain_stray(text: str, known: Collection[str]) -> str:
    """The message for a word on the command line that belongs to no flag. known: names of the command's flags."""
    name, equals, _ = text.partition("=")
    if equals and name in known:
        return f"{text}: not a flag, did you mean --{text}?"
    with contextlib.suppress(OSError, ValueError):
        path = Path(text)
        takes = ("data_path" if path.is_dir() else "checkpoint_path" if path.suffix == ".pt" else "tokenizer_path"
                 if path.name.endswith("tokenizer.json") else "dataset" if path.is_file() else None)
        if path.exists() and (flag := takes if takes in known else "dataset" if "dataset" in known else None):
            return f"{text}: not a flag, did you mean --{flag}={shlex.quote(text)}?"
    return f"{text}: not a flag: give several values as in --flag a b, text with spaces in quotes"


def add_flags(parser: argparse.ArgumentParser, *configs: type, suppress: bool = False, without: Collection[str] = ()):
    """Adds the flags of the dataclasses `configs`, except those named in `without`.

    suppress: a flag that is not given is absent from the namespace, instead of having its default.
    """
    for config in configs:
        group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
        for name, field in declared_flags(config).items():
            if name in without:
                continue
            kind, declared = value_type(field), field.metadata["flag"]
            bare = True if kind is bool else declared.bare
            action = group.add_argument(
                f"--{name}", type=or_auto(PARSERS[kind]) if declared.auto else PARSERS[kind],
                default=argparse.SUPPRESS if suppress else field.default, help=help_text(field).replace("%", "%%"),
                metavar=value_placeholder(field),
                **({"nargs": "+"} if takes_several(field) else {"nargs": "?", "const": bare} if bare is not None else {}))
            action.flag_choices = declared.choices  # argparse's own `choices` would check before `check_flags` explains


def value_placeholder(field) -> str:
    """What stands for the value in --help: N, X|auto, {a,b}; CHOICE where the choices are too many for a column."""
    declared, kind = field.metadata["flag"], value_type(field)
    if declared.choices:
        return braces if len(braces := f"{{{','.join(declared.choices)}}}") <= MAX_PLACEHOLDER else "CHOICE"
    return {bool: "0|1", int: "N", float: "X", Path: "PATH", str: "TEXT"}[kind] + "|auto" * declared.auto


def help_text(field) -> str:
    """What the flag does, its choices unless they stand in its placeholder, and its default, in one line."""
    declared, default = field.metadata["flag"], default_text(field)
    notes = [f"choices: {', '.join(declared.choices)}"] if value_placeholder(field) == "CHOICE" else []
    notes += [f"default: {default}"] if default else []
    return declared.help + (f" ({'; '.join(notes)})" if notes else "")


def default_text(field) -> str:
    """The default as it would be typed; empty where there is none."""
    default = field.default
    if default is None or default == "":
        return ""
    if takes_several(field):
        return " ".join(map(str, default))
    if isinstance(default, bool):
        return str(int(default))
    return f"{default:_}" if isinstance(default, int) and default >= 100_000 else str(default)


def parse_flags(description: str | None, argv, *configs: type) -> list:
    """`argv` (None: the command line) read into one instance of each of `configs`."""
    parser = Parser(description)
    add_flags(parser, *configs)
    values = vars(parser.parse_args(argv))
    return [read_flags(config, values) for config in configs]


def command_line(script: str, argv) -> str:
    """The command as typed, for a report. argv: None for the command line's."""
    text = shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])
    return os.fsencode(text).decode("utf-8", "replace")  # names of files may be in another encoding


# -- failures ---------------------------------------------------------------------------------------------------------

@contextmanager
def explain_failures(oom_advice: Callable[[], str], status: Callable[[], str] = lambda: ""):
    """Turns what goes wrong while a model computes into the exceptions of the table above.

    Out of memory, which torch reports in several ways -> MemoryError with oom_advice(); a dead data worker -> OSError;
    an operation that --deterministic forbids -> BadInput. status(): what has been saved, or ""; appended to errors that the
    user did not cause.
    """
    try:
        yield
    except BrokenPipeError:  # `| head` has read enough
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        from runtime.memory import current_device_peak, is_out_of_memory  # imports torch, which not every command needs
        kept = lambda: f"; {text}" if (text := status()) else ""
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        if is_out_of_memory(error):
            raise MemoryError(f"out of memory (peak {current_device_peak() / 2**30:.2f} GiB): {oom_advice()} "
                              f"({first_line[:200]}){kept()}") from None
        if isinstance(error, (OSError, MemoryError)):
            raise (MemoryError if isinstance(error, MemoryError) else OSError)(f"{error}{kept()}") from None
        if found := re.search(r"(\w+) does not have a deterministic implementation", str(error)):
            raise BadInput(f"--deterministic: torch has no deterministic implementation of {found[1]}: drop the "
                           f"flag") from None
        if "DataLoader worker" in str(error):  # torch raises it wherever the main thread happens to be
            raise OSError(f"--dataloader_num_workers: a data worker process died ({first_line}); 0 reads in the main "
                          f"process{kept()}") from None
        raise


def ignore_output_errors():
    """From now on this process goes on when its output cannot be written: a training of hours does not end because the
    terminal is gone, `| head` has read enough or the disk of its log is full. What nobody can read is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):  # not a test's
            with contextlib.suppress(OSError):
                stream.flush()
            raw = LossyFile(stream.fileno(), "wb", closefd=False)
            buffer = raw if stream.write_through else io.BufferedWriter(raw)  # with PYTHONUNBUFFERED there is none
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors,
                                                line_buffering=stream.line_buffering, write_through=stream.write_through))


class LossyFile(io.FileIO):
    """A file that drops what cannot be written."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def open_missing_streams():
    """Python has None for a stream that was closed before it started, as by `>&-`. Its number goes to the next file that is
    opened, into which a library could then print."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, it stays open
            try:
                os.fstat(number)  # raises OSError where nothing has taken the number yet
            except OSError:
                os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)


def command(main):
    """Decorates a script's `main(argv=None)`: failures end it with one line and the exit code of the table above."""
    @functools.wraps(main)
    def run(argv=None):
        open_missing_streams()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # an untrained model writes characters that not every terminal has
        code, message = run_main(main, argv)
        if message:
            name, message = Path(sys.modules[main.__module__].__file__).name, " ".join(message.split())
            with contextlib.suppress(OSError):  # nobody may be left to read it
                line = f"{name}: {message[:MAX_MESSAGE]}{'…' * (len(message) > MAX_MESSAGE)}"
                print(wrap(line, sys.stderr), file=sys.stderr)
        if argv is None and "pyarrow" in sys.modules:
            # Its threads may still be reading ahead of a stream that we have left, and would abort the process when the
            # interpreter is taken down under them: https://github.com/apache/arrow/issues/45214
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # a closed pipe
                    stream.flush()
            os._exit(code)
        if code:
            raise SystemExit(code)
    return run


def run_main(main: Callable, argv) -> tuple[int, str]:
    """Runs `main(argv)`; returns the exit code and the line to end with, if any."""
    try:
        main(argv)
        sys.stdout.flush()
        return 0, ""
    except SystemExit as stop:  # --help, and a run that a signal stopped
        return stop.code or 0, ""
    except BadInput as error:
        return BAD_INPUT, str(error)
    except FloatingPointError as error:
        return DIVERGED, str(error)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    except (OSError, MemoryError) as error:
        return 1, str(error) or type(error).__name__
    except KeyboardInterrupt as error:
        return 130, str(error) or "interrupted"
