"""Reading many small objects of an output at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

from millijoule.pipeline.output.commits import READ_THREADS
from millijoule.workers.errors import StoreError
from millijoule.workers.storage.protocol import Store

T = TypeVar("T")


def read_objects(store: Store, prefix: str, parse: Callable[[bytes], T], what: str) -> list[T]:
    """Every object under `prefix`, parsed, in order of their keys.

    Args:
        what: what an object should be, for messages.

    Raises:
        StoreError: storage failed, or `parse` refused an object; the message names it.
    """

    def read(key: str) -> T:
        try:
            return parse(store.get(key))
        except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{store.url}/{key}: not {what}: {error}") from error

    with ThreadPoolExecutor(READ_THREADS) as threads:
        return list(threads.map(read, sorted(item.key for item in store.list(prefix))))
