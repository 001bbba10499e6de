"""What must not come in the middle of a step: signals, and Python's garbage collection."""
import gc
import signal
import threading
import time
from contextlib import contextmanager


class StopSignals:
    """Ctrl-C, SIGTERM and a terminal that closes (SIGHUP, unless nohup has it ignored) let the step under way finish;
    `signal` then says which came. A second one stops at once, unless it comes within half a second: a terminal and a parent
    process may both pass on the same Ctrl-C."""
    AT_ONCE = 0.5
    NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __init__(self):
        self.signal: int | None = None
        self.came = 0.0  # when

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            wanted = [n for n in self.NUMBERS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self.request) for number in wanted}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request(self, number: int, frame):
        if not self.signal:
            self.signal, self.came = number, time.monotonic()
        elif time.monotonic() - self.came >= self.AT_ONCE:
            raise KeyboardInterrupt


@contextmanager
def without_garbage_collection():
    """The loop makes no cycles, and a collection in mid-step is a pause; validations collect."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def no_interrupt():
    """Processes started meanwhile ignore Ctrl-C from their first moment on. One that comes meanwhile waits; none is lost."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python does not allow handlers
        yield
        return
    has_masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    if has_masks:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    came = has_masks and signal.SIGINT in signal.sigpending()  # to ignore a signal forgets those that wait
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if has_masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGINT)
