"""Commands in processes of their own that need not import torch again, which takes longer than most of them run.

    done = run(["train.py", "--max_iter=2"])         # as subprocess.run
    process = start(["train.py", "--max_iter=2"])    # as subprocess.Popen

A server, one for each process that runs tests, has imported the scripts and computed nothing. It is forked for each command,
and for what a command starts in turn. Where systems cannot fork, commands start as ever. What depends on the start of an
interpreter (variables that libraries read, what is imported, memory) is tested with `run_from_start`.
"""
import atexit
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import numba

REPO = Path(__file__).parent.parent
SCRIPTS = ("train", "finetune", "think", "selfplay", "chat", "evaluate", "export", "adapt", "compare", "probes", "fewshot",
           "torch.distributed.launcher.api")
CAN_FORK = sys.platform.startswith("linux")
address: str | None = None  # of the server's socket


def run(command: list, input: str | None = None, timeout: float | None = None, **options) -> subprocess.CompletedProcess:
    """As subprocess.run([sys.executable, *command], …), with the text of both streams.

    command: the path of a script, or "-c" or "-m" and what follows them; then flags."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with start(command, **options) as process:
        try:
            out, error = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def run_from_start(command: list, **options) -> subprocess.CompletedProcess:
    """As `run`, by an interpreter that has imported nothing."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)


def start(command: list, **options) -> "Command":
    """What `run` waits for."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return Command([sys.executable, *map(str, command)], text=True, **pipes | options)


class Command(Popen):
    """A process that the server forks, if its first word is sys.executable. Of the options, those of streams, cwd, env and
    start_new_session count; a terminal as stdin of a new session becomes the terminal that sends it signals."""
    connection: socket.socket | None = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                       stdin, our_stdin, our_stdout, stdout, our_stderr, stderr, restore_signals, gid, gids, uid, umask,
                       start_new_session, *more):
        if not CAN_FORK or shell or args[0] != sys.executable:
            super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, stdin,
                our_stdin, our_stdout, stdout, our_stderr, stderr, restore_signals, gid, gids, uid, umask,
                start_new_session, *more)
            return
        request = json.dumps({"args": [os.fspath(word) for word in args[1:]], "cwd": os.path.abspath(cwd or "."),
                              "env": dict(os.environ if env is None else env), "new_session": start_new_session}).encode()
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(server_address())
        streams = [own if given == -1 else given for own, given in enumerate((stdin, stdout, stderr))]
        socket.send_fds(self.connection, [struct.pack("I", len(request))], streams)
        self.connection.sendall(request)
        self.pid, = struct.unpack("i", self.connection.recv(4, socket.MSG_WAITALL))
        self._child_created = True
        self._close_pipe_fds(stdin, our_stdin, our_stdout, stdout, our_stderr, stderr)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """os.waitpid of a process that is the server's child."""
        if self.connection is None:
            return super()._try_wait(wait_flags)
        try:
            status = self.connection.recv(4, socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else socket.MSG_WAITALL)
        except BlockingIOError:
            return 0, 0
        self.connection.close()
        return self.pid, struct.unpack("i", status)[0]

    def _internal_poll(self, *defaults, **more) -> int | None:
        if self.connection is None:
            return super()._internal_poll(*defaults, **more)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


# -- the server ---------------------------------------------------------------------------------------------------------

def server_address() -> str:
    """Of the server of this process, which is started by the first call, and ends with this process."""
    global address
    if address is None:
        folder = tempfile.TemporaryDirectory()
        path = os.path.join(folder.name, "socket")
        server = Popen([sys.executable, "-c", "import commands, sys; commands.serve(sys.argv[1])", path],
                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO, start_new_session=True,
                       env=os.environ | {"PYTHONPATH": os.pathsep.join((str(REPO), str(REPO / "tests")))})
        atexit.register(lambda: (server.kill(), server.wait(), folder.cleanup()))
        assert server.stdout.readline() == b"ready\n"
        address = path
    return address


def serve(path: str):
    """Forks for each request until stdin is closed."""
    global address
    subprocess.Popen = Command  # in the processes that are forked, before anything imports it
    for name in SCRIPTS:
        importlib.import_module(name)
    numba.njit(lambda: None)()  # its first call loads half a second of compiler
    address = path
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # what has been forked leaves nothing to wait for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                answer(connection)
            connection.close()


def answer(connection: socket.socket):
    """In a process of its own: starts the command, and sends its id and how it ends (4 bytes each)."""
    try:
        size, streams, _, _ = socket.recv_fds(connection, 4, 3)
        request = json.loads(connection.recv(*struct.unpack("I", size), socket.MSG_WAITALL))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not (pid := os.fork()):
            connection.close()
            os._exit(execute(streams, **request))
        for stream in streams:
            os.close(stream)
        connection.sendall(struct.pack("i", pid))
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):  # nobody waits any more
            connection.sendall(struct.pack("i", status))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def execute(streams: list[int], args: list[str], cwd: str, env: dict[str, str], new_session: bool) -> int:
    """What an interpreter does that is started with `args`, from the point where it has imported the scripts."""
    if new_session:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    if new_session and os.isatty(0):
        import fcntl
        import termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in signal.SIGHUP, signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
    is_unbuffered = bool(env.get("PYTHONUNBUFFERED")) or args[0] == "-u"
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    out, error = (io.BufferedWriter(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(out, write_through=is_unbuffered,
                                                   line_buffering=is_unbuffered or os.isatty(1))
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(error, errors="backslashreplace", line_buffering=True)
    try:
        run_program(args[1:] if args[0] == "-u" else args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        with suppress(OSError, ValueError):
            stream.flush()
    return code & 255


def run_program(args: list[str]):
    first, *rest = args
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = args, os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")
