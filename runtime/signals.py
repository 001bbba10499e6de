"""What must not interrupt a training step: signals, and Python's garbage collection.

    with StopSignals() as signals, without_garbage_collection():
        while not signals.signal:
            train_step()
"""
import gc
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress


class StopSignals:
    """Lets the current step finish on Ctrl-C, SIGTERM or SIGHUP: `signal` is then the number of the first one received.

    SIGHUP, sent when a terminal closes, stays ignored under nohup. A second signal raises KeyboardInterrupt, unless it
    comes within DEBOUNCE_SECONDS: a terminal and a parent process may both deliver the same Ctrl-C.
    """
    DEBOUNCE_SECONDS = 0.5
    SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __init__(self, notice: str = ""):
        """notice: a line for stderr at the first signal, since what is to finish may take a while."""
        self.signal: int | None = None
        self.received_at = 0.0
        self.notice = notice

    def __enter__(self):
        self.old_handlers = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            handled = [n for n in self.SIGNALS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
            self.old_handlers = {number: signal.signal(number, self.handle) for number in handled}
        return self

    def __exit__(self, *error):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame):
        if not self.signal:
            self.signal, self.received_at = number, time.monotonic()
            if self.notice:
                with suppress(OSError):  # nobody may be left to read it
                    os.write(2, f"\n{self.notice}\n".encode())  # print() may be what the signal interrupts
        elif time.monotonic() - self.received_at >= self.DEBOUNCE_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def without_garbage_collection():
    """Training steps make no reference cycles, and a collection in the middle of one is a pause: `fit` collects after each
    evaluation instead, which does not look at what was there before, such as all that torch has imported."""
    was_enabled, freezes = gc.isenabled(), not gc.get_freeze_count()
    gc.disable()
    if freezes:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def sigint_blocked():
    """Processes started in the block ignore Ctrl-C from their first moment on; this process receives it afterwards."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python does not allow handlers
        yield
        return
    has_masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    if has_masks:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    was_pending = has_masks and signal.SIGINT in signal.sigpending()  # setting SIG_IGN discards pending signals
    old_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old_handler)
        if has_masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if was_pending:
            signal.raise_signal(signal.SIGINT)
