"""runtime/signals.py: signals and garbage collection do not interrupt a training step."""
import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from runtime.signals import StopSignals, sigint_blocked, without_garbage_collection


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_a_signal_is_recorded_and_a_later_second_one_interrupts(number):
    handler = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.signal is None
        signal.raise_signal(number)
        signal.raise_signal(number)  # immediately: the same Ctrl-C, delivered twice
        assert signals.signal == number
        signals.DEBOUNCE_SECONDS = 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is handler


def test_the_first_signal_is_answered_at_once(capfd):
    with StopSignals(notice="stopping after this step") as signals:
        signals.DEBOUNCE_SECONDS = 100
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "\nstopping after this step\n"
        signal.raise_signal(signal.SIGINT)
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
def test_sighup_stays_ignored_under_nohup():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_blocked_sigint_is_delivered_afterwards_and_not_to_child_processes(when):
    with StopSignals() as signals:
        if when == "before":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            signal.raise_signal(signal.SIGINT)
        with sigint_blocked():
            if when == "inside":
                signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            assert signals.signal is None
            child = subprocess.run([sys.executable, "-c", "import signal; signal.raise_signal(signal.SIGINT); print(5)"],
                                   capture_output=True, text=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        time.sleep(0.01)
        assert signals.signal == signal.SIGINT and child.stdout == "5\n"


def test_a_collection_leaves_out_what_was_there_before():
    gc.unfreeze()  # what conftest.py has frozen
    with without_garbage_collection():
        assert gc.get_freeze_count() > 1000
        with without_garbage_collection():
            pass
        assert gc.get_freeze_count() > 1000
    assert not gc.get_freeze_count()


def test_garbage_collection_is_disabled_and_restored():
    assert gc.isenabled()
    with pytest.raises(ValueError, match="x"), without_garbage_collection():
        assert not gc.isenabled()
        raise ValueError("x")
    assert gc.isenabled()
    gc.disable()
    with without_garbage_collection():
        pass
    assert not gc.isenabled()
    gc.enable()
