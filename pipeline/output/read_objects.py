"""Reading many small objects of an output at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import pyarrow as pa

from millijoule.workers.errors import DamagedError
from millijoule.workers.storage.protocol import Store

T = TypeVar("T")
R = TypeVar("R")

#: Hears what is wrong with an object.
OnDamage = Callable[[DamagedError], None]

#: Concurrent requests when objects are read one by one.
READ_THREADS = 16

#: Items that a thread takes in one go, where a short one takes less time than being handed over.
ITEMS_PER_CALL = 16


def in_threads(
    function: Callable[[T], R],
    items: Iterable[T],
    n_threads: int = READ_THREADS,
    items_per_call: int = ITEMS_PER_CALL,
) -> Generator[R, None, None]:
    """`function` of each item, in order, by some threads; only few items are taken ahead."""

    def some(batch: list[T]) -> list[R]:
        return [function(item) for item in batch]

    rest = iter(items)
    waiting: deque[Future[list[R]]] = deque()
    with ThreadPoolExecutor(n_threads) as threads:
        while batch := list(islice(rest, items_per_call)):
            waiting.append(threads.submit(some, batch))
            if len(waiting) >= 2 * n_threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def read_objects(
    store: Store,
    prefix: str,
    parse: Callable[[bytes], T],
    what: str,
    on_damage: OnDamage | None = None,
) -> list[T]:
    """Every object under `prefix`, parsed, in order of their keys; `what` it should be is for messages.

    Args:
        on_damage: called with what is wrong with an object that `parse` refuses, which is left out then.

    Raises:
        DamagedError: `parse` refused an object, and nobody asks for those; the message names it.
        StoreError: storage failed.
    """

    def read(key: str) -> T | DamagedError:
        try:
            return parse(store.get(key))
        except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
            return DamagedError(f"{store.url}/{key}: not {what}: {error}")

    found = []
    for one in in_threads(read, sorted(item.key for item in store.list(prefix)), items_per_call=1):
        if not isinstance(one, DamagedError):
            found.append(one)
        elif on_damage is None:
            raise one
        else:
            on_damage(one)
    return found
