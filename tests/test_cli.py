"""runtime/cli.py: the command line of flags, and the exit code and line of each kind of failure."""
import io
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import write_flags

from conftest import REPO
from runtime.aliases import NOT_HERE, OTHER_NAMES, explain_unknown
from runtime.checkpoint import load_checkpoint
from runtime.cli import (
    BAD_INPUT,
    DIVERGED,
    command,
    explain_failures,
    parse_flags,
    parse_int,
    progress_bar,
    set_postfix,
    wrap,
)
from runtime.config import BadInput, check_flags, declared_flags, flag
from train import PRETRAINING


@dataclass(frozen=True)
class Example:
    """Example flags."""
    size: int = flag(3, "a size", at_least=1)
    rate: float = flag(None, "a rate, 100 % at most", above=0, at_most=1)
    kind: str = flag("a", "a kind", choices=("a", "b"))
    path: Path = flag(Path("x"), "a path")
    fast: bool = flag(False, "be fast")
    resume: str = flag(None, "a file, or the bare flag", bare="1")
    many: int = flag(4, "how many", at_least=1, auto=True)
    quick: bool = flag("auto", "be quick", auto=True)
    steps: tuple[float, ...] = flag((0.5, 1.0), "some steps", above=0)
    large: int = flag(1_000_000, "a large number")
    __post_init__ = check_flags


# -- flags ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, expected", [
    ([], Example()), (["--size=1_000", "--rate", "0.5", "--kind=b"], Example(1000, 0.5, "b")),
    (["--path=y/z"], Example(path=Path("y/z"))), (["--path=~/x"], Example(path=Path.home() / "x")),
    (["--fast"], Example(fast=True)), (["--fast=1"], Example(fast=True)), (["--fast=0"], Example(fast=False)),
    (["--resume"], Example(resume="1")), (["--resume=a.pt"], Example(resume="a.pt")),
    (["--many=auto", "--quick=auto"], Example(many="auto", quick="auto")),
    (["--many=7", "--quick=0"], Example(many=7, quick=False)), (["--quick"], Example(quick=True)),
    (["--steps", "3", "0.25", "--size=2"], Example(2, steps=(3.0, 0.25))), (["--steps=4"], Example(steps=(4.0,))),
    (["--resume=--"], Example(resume="--")), (["--path=--"], Example(path=Path("--"))),
    (["--size=1", "--size=2"], Example(2))],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_flags_are_parsed(argv, expected):
    assert parse_flags("", argv, Example) == [expected]


@pytest.mark.parametrize("text, expected", [("250", 250), ("10_000", 10_000), ("1e9", 10**9), ("-3", -3),
                                            (str(2**63 - 1), 2**63 - 1)])
def test_whole_numbers_are_parsed(text, expected):
    assert parse_int(text) == expected


@pytest.mark.parametrize("argv, message", [
    (["--size=auto"], "'auto' is not a whole number"), (["--many=0"], "--many=0: must be at least 1"),
    (["--many=all"], "'all' is not a whole number"), (["--quick=never"], "neither 1 nor 0"),
    (["--size=0"], "--size=0: must be at least 1"), (["--size=1.5"], "'1.5' is not a whole number"),
    (["--size=1e19"], "'1e19' is too large"), (["--size=inf"], "'inf' is not a whole number"),
    (["--size"], "--size: give it a value"), (["--rate=0"], "--rate=0.0: must be above 0"),
    (["--rate=2"], "--rate=2.0: must be at most 1"), (["--rate=nan"], "--rate=nan: must be finite"),
    (["--rate=inf"], "--rate=inf: must be finite"), (["--rate=x"], "'x' is not a number"),
    (["--kind=c"], "--kind=c: choose one of a, b"), (["--fast=perhaps"], "neither 1 nor 0"),
    (["--path="], "--path: is empty, give a path"), (["--path=" + "x" * 300], "--path: is longer than"),
    (["--path=~nobody_here/x"], "a user that does not exist"), (["--path=" + "x/" * 2000], "--path: is longer than"),
    (["--path=a\0b"], "--path: has a NUL"), (["--kind=a\0b"], "--kind: has a NUL"), (["--kind=\udcff"], "not valid UTF-8"),
    (["--size=١٢"], "'١٢' is not a whole number in the digits 0 to 9"),
    (["--rate=٠.٥"], "'٠.٥' is not a number in the digits"), (["--fast=--"], "neither 1 nor 0"),
    (["--size=--"], "'--' is not a whole number"), (["--steps=--"], "'--' is not a number"), (["--size==3"], "'=3' is not"),
    (["--path=--", "--sise=3"], "--sise=3: no such flag"), (["--=3"], "--=3: no such flag"),
    (["-"], "-: no such flag"), (["-3"], "-3: no such flag"), (["--size="], "'' is not a whole number"),
    (["--size=" + "9" * 5000], "9…' is not a whole number"), (["--size", "3", "4"], "4: not a flag"),
    (["--sise=3"], "--sise=3: no such flag, did you mean --size?"),
    (["--siz=3"], "--siz=3: no such flag, did you mean --size?"),
    (["--zzz"], "--zzz: no such flag, see --help"),
    (["stray"], "stray: not a flag"), (["--steps", "1", "0"], "--steps=0.0: must be above 0"),
    (["--steps", "1", "b"], "'b' is not a number"), (["--steps"], "--steps: expected at least one")],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "")
def test_a_wrong_command_line_is_refused(argv, message):
    with pytest.raises(BadInput) as error:
        parse_flags("", argv, Example)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("argv, message", [
    ("--lr=0.01", "--lr=0.01: no such flag, did you mean --learning_rate?"), ("--max-steps=5", "did you mean --max_iter?"),
    ("--n_embd=384", "the width is --n_head times --head_size"), ("--dropout=0.1", "there is none"),
    ("--depth=6", "did you mean --n_layer?"), ("--optimizer.lr=1", "did you mean --learning_rate?"),
    ("--per_device_train_batch_size=8", "did you mean --batch_size?"), ("--num_train_epochs=3", "the length is --max_iter"),
    ("--output_dir=x", "did you mean --checkpoint_path?"), ("--min_lr=0", "the rate falls to 0"),
    ("--learning-rate=1", "did you mean --learning_rate=1?"), ("\u2014learning_rate=1", "did you mean --learning_rate=1?"),
    ("--gelu", "did you mean --mlp=gelu?"), ("gelu", "gelu: not a flag: give several values"),
    ("max_iter=5", "did you mean --max_iter=5?"), ("folder", "did you mean --data_path=folder?"),
    ("gpt.pt", "did you mean --checkpoint_path=gpt.pt?"), ("text.txt", "text.txt: not a flag: give several values")])
def test_what_other_programs_call_a_flag_is_known(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("gpt.pt", "text.txt"):
        (tmp_path / name).touch()
    with pytest.raises(BadInput) as error:
        PRETRAINING.flags_given([argv])
    assert message in str(error.value)


def test_other_names_lead_to_flags_that_exist():
    ours = set().union(*(declared_flags(*configs) for configs in write_flags.COMMANDS.values()))
    assert OTHER_NAMES.keys() <= ours
    mentioned = {word.strip(":,;")[2:] for words in NOT_HERE for word in words.split() if word.startswith("--")}
    assert mentioned <= ours


@pytest.mark.parametrize("typed, known, ours", [("--data_path=x", ["dataset", "out_path"], "--dataset"),
                                                ("--lr=1", ["learning_rate", "mlp"], "--learning_rate")])
def test_the_usual_names_of_others_are_known(typed, known, ours):
    assert explain_unknown(typed, dict.fromkeys(known, ())).endswith(f"did you mean {ours}?")


@pytest.mark.parametrize("columns, shown, hidden", [(80, ["loss=3.41", "tok/s=1,234"], ["memory"]),
                                                    (120, ["loss=3.41", "tok/s=1,234", "lr=0.025", "memory=1.2"], [])])
def test_the_progress_bar_keeps_room_for_itself(columns, shown, hidden):
    output = io.StringIO()
    with progress_bar(total=500, initial=123, unit="step", file=output, dynamic_ncols=False, ncols=columns) as bar:
        set_postfix(bar, {"loss": "3.412", "tok/s": "1,234", "mfu": "12.3%", "lr": "0.025", "memory": "1.2 GiB"})
        line = str(bar)
    assert len(line) <= columns and line.count("|") == 2 and len(line.split("|")[1]) >= 10
    assert all(part in line for part in shown) and not any(part in line for part in hidden)


def test_lines_are_broken_between_words_on_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    line = "data     " + "some words-with-hyphens " * 5 + "/a/path/that/is/longer/than/the/terminal/has/columns.pt"
    stream = io.StringIO()
    assert wrap(line, stream) == line
    stream.isatty = lambda: True
    wrapped = wrap(line, stream, " " * 9)
    assert wrapped.split() == line.split() and max(map(len, wrapped.splitlines()[:-1])) <= 40
    command = "`python train.py --checkpoint_path=checkpoints/gpt.pt --resume_checkpoint`"
    assert command in wrap(f"stopped at step 5, saved: {command} continues", stream)


@pytest.mark.parametrize("columns", ["60", "120"])
def test_help_is_wrapped_at_the_width_of_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        parse_flags("What the command does.", ["--help"], Example)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < int(columns)
    words = " ".join(text.split())
    for part in ("What the command does.", "Example flags", "--size N a size (default: 3)", "a rate, 100 % at most",
                 "--kind {a,b} a kind (default: a)", "--many N|auto how many", "be fast (default: 0)",
                 "some steps (default: 0.5 1.0)",
                 "a large number (default: 1_000_000)"):
        assert part in words


@pytest.mark.parametrize("typed, known, message", [
    ("--output_dir=x", "checkpoint_path out_path", "did you mean --out_path?"), ("--out=x", "data_path", "--data_path?"),
    ("--max_tokens=9", "tokens_threshold vocab_size val_bytes", "did you mean --tokens_threshold?"),
    ("--val_tokens=9", "max_tokens val_bytes", "did you mean --val_bytes?"),
    ("--data_path=x", "out_path dataset", "did you mean --dataset?"),
    ("--lr=1", "help", "see --help"), ("--max_seq_len=9", "max_seconds", "see --help")])
def test_a_flag_that_is_only_spelled_alike_is_not_suggested(typed, known, message):
    """Where a command writes its output, an input of another meaning; and where it has no such flag, none."""
    assert explain_unknown(typed, dict.fromkeys(known.split(), ())).endswith(message)


@pytest.mark.parametrize("given, message", [
    ("gpt", "gpt: is a folder, did you mean gpt.pt?"), ("odd.run", "odd.run: is a folder, did you mean odd?"),
    ("other", "other: is a folder, did you mean other/best.pt?"), ("empty", "empty: is a folder: give a file that ends in"),
    ("gtp.pt", "gtp.pt: no such file, did you mean gpt.pt?"), ("quickstart.pt", "quickstart.pt: no checkpoint to read"),
    ("gpt.pt,odd", "gpt.pt,odd: are 2 files: give one"), ("gpt.pt,b.pt", "gpt.pt,b.pt: no")])
def test_a_checkpoint_that_is_not_there_is_guessed(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt", "odd.run", "other", "empty"):
        (tmp_path / folder).mkdir()
    for file in ("gpt.pt", "odd", "other/best.pt"):
        (tmp_path / file).touch()
    with pytest.raises(BadInput) as error:
        load_checkpoint(Path(given))
    assert message in str(error.value)


# -- failures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, code, line", [
    (BadInput("--size=0: must be at least 1"), BAD_INPUT, "--size=0: must be at least 1"),
    (FloatingPointError("diverged"), DIVERGED, "diverged"), (OSError("disk\nfull"), 1, "disk full"),
    (MemoryError("too little memory"), 1, "too little memory"), (MemoryError(), 1, "MemoryError"),
    (KeyboardInterrupt(), 130, "interrupted"), (SystemExit(143), 143, None), (SystemExit(0), 0, None)], ids=repr)
def test_a_command_ends_with_one_line_and_an_exit_code(capsys, error, code, line):
    @command
    def main(argv=None):
        raise error
    if code:
        with pytest.raises(SystemExit) as stop:
            main([])
        assert stop.value.code == code
    else:
        main([])
    assert capsys.readouterr().err == (f"test_cli.py: {line}\n" if line else "")


def test_a_bug_keeps_its_traceback():
    @command
    def main(argv=None):
        raise ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main([])


@pytest.mark.integration
def test_a_closed_pipe_ends_a_command_without_a_line(tmp_path):
    (tmp_path / "prints.py").write_text("from runtime.cli import command\n@command\ndef main(argv=None):\n"
                                        "    while True:\n        print('line')\nmain()\n")
    done = subprocess.run(f"{sys.executable} {tmp_path / 'prints.py'} | head -1", shell=True, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    assert (done.stdout, done.stderr) == ("line\n", "")


@pytest.mark.integration
@pytest.mark.parametrize("redirect, code, shown", [(">&-", 2, "line of stderr"), ("2>&-", 2, ""), ("<&- >&- 2>&-", 2, "")])
def test_a_stream_that_is_closed_from_the_start_does_not_matter(tmp_path, redirect, code, shown):
    """Python has None for it, and the next file that is opened gets its number."""
    (tmp_path / "prints.py").write_text(
        "import os, sys\nfrom runtime.cli import command\nfrom runtime.config import BadInput\n@command\n"
        "def main(argv=None):\n    print('line')\n    with open('file', 'w') as file:\n        assert file.fileno() > 2\n"
        "    os.write(1, b'by a library')\n    raise BadInput('line of stderr')\nmain()\n")
    done = subprocess.run(f"{sys.executable} prints.py {redirect}", shell=True, capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    assert done.returncode == code and shown in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried …\nsecond line"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried …")],
    ids=["cuda", "cublas", "mps", "cpu"])
def test_too_little_memory_gives_advice(error):
    with pytest.raises(MemoryError) as caught, explain_failures(lambda: "halve the batch", lambda: "gpt.pt holds step 3"):
        raise error
    message = str(caught.value)
    assert message.startswith("out of memory (peak ") and " GiB): halve the batch (" in message
    assert message.endswith("; gpt.pt holds step 3") and "\n" not in message


@pytest.mark.parametrize("error, kind, message", [
    (OSError("a.pt: cannot be written"), OSError, "a.pt: cannot be written; gpt.pt holds step 3"),
    (MemoryError("not even one block fits"), MemoryError, "not even one block fits; gpt.pt holds step 3"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), OSError,
     "--dataloader_num_workers: a data worker process died (DataLoader worker (pid 7) is killed by signal: Killed. ); 0 "
     "reads in the main process; gpt.pt holds step 3"),
    (FloatingPointError("loss is nan"), FloatingPointError, "loss is nan"), (BadInput("--x=1: no"), BadInput, "--x=1: no"),
    (BrokenPipeError(32, "Broken pipe"), BrokenPipeError, "[Errno 32] Broken pipe"),
    (RuntimeError("a bug\nof two lines"), RuntimeError, "a bug\nof two lines")], ids=repr)
def test_other_failures_keep_their_kind_and_add_what_is_saved(error, kind, message):
    with pytest.raises(kind) as caught, explain_failures(lambda: "", lambda: "gpt.pt holds step 3"):
        raise error
    assert str(caught.value) == message and isinstance(caught.value, BadInput) == (kind is BadInput)


def test_an_operation_that_deterministic_forbids_is_named():
    """With torch's own message for an operation without a deterministic kernel; on a CPU put_ is one."""
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(BadInput, match="^--deterministic: .* of put_: drop the flag"), explain_failures(lambda: ""):
            torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.integration
def test_output_is_not_held_back_where_it_is_unbuffered(tmp_path):
    """As in containers, which set PYTHONUNBUFFERED: what is printed arrives before the process ends."""
    (tmp_path / "prints.py").write_text("from runtime.cli import ignore_output_errors\nignore_output_errors()\n"
                                        "print('first')\nimport sys\nsys.stdin.read()\n")
    with subprocess.Popen([sys.executable, "-u", "prints.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)}) as process:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        process.communicate("\n")
    assert ready
