"""Work done ahead in background threads while the caller is busy with what came before; in order, and bounded.

Reading photos and drawing panels leave Python's lock for most of their time, as the runtime does, so threads suffice.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import repeat
from typing import Any, TypeVar

Item = TypeVar("Item")
Done = TypeVar("Done")

THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))
_END: Any = object()


def ahead(
    work: Callable[[Item], Done], items: Iterable[Item], *, limit: int, threads: int = THREADS
) -> Generator[Done, None, None]:
    """`work(item)` for each item, in order; while the caller is busy with one, `limit` further ones are done or wait.

    The items are taken in the caller's thread. An error comes at its place: what stands before it is handed out first.
    When the caller stops, what has begun is finished, and nothing else begins.
    """
    source, pending = iter(items), deque[Future[Done]]()
    failure: Exception | None = None
    pool = ThreadPoolExecutor(threads, thread_name_prefix="graphgbp")
    try:
        taking = True
        while taking or pending:
            while taking and len(pending) <= limit:
                try:
                    item = next(source)
                except StopIteration:
                    taking = False
                except Exception as error:
                    failure, taking = error, False
                else:
                    pending.append(pool.submit(work, item))
                    del item
            if pending:
                yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)
        if hasattr(source, "close"):
            source.close()


def taken_ahead(items: Iterable[Item], *, limit: int) -> Iterator[Item]:
    """The items, in order, `limit` of them taken ahead, all by one background thread."""
    source = iter(items)
    with closing(ahead(lambda _: next(source, _END), repeat(None), limit=limit, threads=1)) as taken:
        for item in taken:
            if item is _END:
                return
            yield item
