"""Work in threads, of which compiled loops and files let several run at a time."""
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

END = object()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_threads(function: Callable, items: Iterable, threads: int, size: Callable = lambda item: 1,
                   ahead: int | None = None) -> Iterator:
    """map(function, items) by several threads, which work on items of `ahead` together by `size` (default: two a thread)
    beyond what is taken, and on one at least."""
    if threads == 1:
        yield from map(function, items)
        return
    ahead = 2 * threads if ahead is None else ahead
    items, failure = iter(items), None
    with ThreadPoolExecutor(threads) as pool:
        waiting, held = deque(), 0
        try:
            while True:
                try:
                    item = next(items)
                except StopIteration:
                    break
                except Exception as error:  # raised after the results of what was before it
                    failure = error
                    break
                waiting.append((size(item), pool.submit(function, item)))
                held += waiting[-1][0]
                del item
                while held > ahead and waiting:
                    n, future = waiting.popleft()
                    yield future.result()
                    held -= n
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, left_over in waiting:
                left_over.cancel()
    if failure is not None:
        raise failure


def read_ahead(items: Iterable, size: Callable = lambda item: 1, ahead: int = 1) -> Iterator:
    """`items`, of which a thread makes the next one while the last is in use, unless that is larger than `ahead` by `size`.
    When it is closed it does not wait for that thread, which may be waiting for a network."""
    items, reader = iter(items), ThreadPoolExecutor(1)
    try:
        upcoming = reader.submit(next, items, END)
        while (item := upcoming.result()) is not END:
            large = size(item) > ahead
            if not large:
                upcoming = reader.submit(next, items, END)
            yield item
            del item
            if large:
                upcoming = reader.submit(next, items, END)
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
