"""Work in threads, of which compiled loops and files let several run at a time."""
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

END = object()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_threads(function: Callable, items: Iterable, threads: int) -> Iterator:
    """map(function, items) by several threads, a few items ahead of what is taken."""
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left_over in waiting:
                left_over.cancel()


def map_ahead(function: Callable, items: Iterable, threads: int, size: Callable, ahead: int) -> Iterator:
    """map(function, items), where one thread makes the items and `threads` work on them, while items of less than `ahead`
    together, by `size`, have not been taken.

    What is done is handed on also while the next item is waited for, and before an error in making it is raised. Closed
    early, it does not wait for the thread that makes items, which may be waiting for a network.
    """
    items, reader, pool = iter(items), ThreadPoolExecutor(1), ThreadPoolExecutor(threads)
    waiting, held = deque(), 0
    upcoming, more, failure = None, True, None
    try:
        while more or waiting:
            if more and upcoming is None and held < ahead:
                upcoming = reader.submit(next, items, END)
            if upcoming is not None:
                wait([upcoming, *(future for _, future in itertools.islice(waiting, 1))], return_when=FIRST_COMPLETED)
            if waiting and (upcoming is None or waiting[0][1].done()):
                n, future = waiting.popleft()
                yield future.result()
                held -= n
            else:
                try:
                    item = upcoming.result()
                    more = item is not END
                    if more:
                        waiting.append((size(item), pool.submit(function, item)))
                        held += waiting[-1][0]
                    del item
                except Exception as error:
                    more, failure = False, error
                upcoming = None
        if failure is not None:
            raise failure
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=False, cancel_futures=True)
