"""runtime/threads.py: map() in several threads."""
import threading
import time

import pytest

from runtime.threads import map_ahead, map_in_threads


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n_items", [0, 1, 30])
def test_results_come_in_order(threads, n_items):
    assert list(map_in_threads(lambda item: item * item, range(n_items), threads)) == [n * n for n in range(n_items)]
    results = map_ahead(lambda item: item * item, range(n_items), threads, size=lambda item: 9, ahead=4)
    assert list(results) == [n * n for n in range(n_items)]


@pytest.mark.parametrize("threads", [1, 3])
def test_results_before_a_failed_read_are_yielded(threads):
    def items():
        yield from range(20)
        raise OSError("connection lost")

    results, seen = map_ahead(lambda item: item * item, items(), threads, size=lambda item: 1, ahead=4), []
    with pytest.raises(OSError, match="connection lost"):
        for value in results:
            seen.append(value)
    assert seen == [item * item for item in range(20)]


@pytest.mark.parametrize("mapping", [lambda function, items: map_in_threads(function, items, 2),
                                     lambda function, items: map_ahead(function, items, 2, lambda item: 1, 4)])
def test_an_exception_of_the_function_is_raised_at_its_result(mapping):
    results = mapping(lambda item: 1 // item, [1, 1, 0, 1])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_items_in_progress_are_limited_by_their_total_size():
    read = []

    def items():
        for size in (1, 1, 50, 1, 1, 1):
            read.append(size)
            yield size
    results = map_ahead(lambda size: size, items(), 2, size=lambda size: size, ahead=4)
    assert next(results) == 1 and next(results) == 1 and next(results) == 50
    time.sleep(0.05)
    assert read == [1, 1, 50]  # nothing is read while the large item is in progress
    assert list(results) == [1, 1, 1]


def test_results_do_not_wait_for_the_next_item_and_neither_does_close():
    released = threading.Event()

    def items():
        yield 1
        yield 2
        released.wait(30)  # such as a network

    start = time.monotonic()
    results = map_ahead(lambda item: item, items(), 2, lambda item: 1, 4)
    assert next(results) == 1 and next(results) == 2
    results.close()
    assert time.monotonic() - start < 10
    released.set()
