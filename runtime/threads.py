"""map() with several threads, for work that releases the GIL: compiled loops, and reading files.

    for tokens in map_in_threads(encode, chunks, threads=available_cores()):
        ...
"""
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

END = object()  # what next() returns when the items are exhausted


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_threads(function: Callable, items: Iterable, threads: int) -> Iterator:
    """map(function, items) in `threads` threads, with results in order and at most 2 * threads items in progress."""
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: deque = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def map_ahead(function: Callable, items: Iterable, threads: int, size: Callable, ahead: int) -> Iterator:
    """map(function, items) in `threads` threads, with results in order, while one more thread iterates over `items`.

    size(item), ahead: the next item is read only while those in progress have a total size below `ahead`. Finished results
    are yielded while the next item is still being read, and before an exception raised by `items`. Closing the generator
    early does not wait for the reading thread, which may be waiting for a network.
    """
    items, reader, pool = iter(items), ThreadPoolExecutor(1), ThreadPoolExecutor(threads)
    pending, pending_size = deque(), 0  # (size, future) of each item in progress
    next_item, has_more, error = None, True, None
    try:
        while has_more or pending:
            if has_more and next_item is None and pending_size < ahead:
                next_item = reader.submit(next, items, END)
            if next_item is not None:
                wait([next_item, *(future for _, future in itertools.islice(pending, 1))], return_when=FIRST_COMPLETED)
            if pending and (next_item is None or pending[0][1].done()):
                item_size, future = pending.popleft()
                yield future.result()
                pending_size -= item_size
            else:
                try:
                    item = next_item.result()
                    has_more = item is not END
                    if has_more:
                        pending.append((size(item), pool.submit(function, item)))
                        pending_size += pending[-1][0]
                    del item  # may be large
                except Exception as raised:
                    has_more, error = False, raised
                next_item = None
        if error is not None:
            raise error
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(wait=False, cancel_futures=True)
