"""Storing the files that an attempt has written, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from millijoule.workers.errors import StoreError
from millijoule.workers.schemas import DataFile
from millijoule.workers.storage.protocol import Store

#: Files of an attempt that are stored together: most of the time of one is waiting, for S3 or for the disk to flush.
FILES_AT_ONCE = 8


def store_files(
    store: Store,
    files: Sequence[DataFile],
    folder: Path,
    on_part: Callable[[], None],
    still_wanted: Callable[[], None] = lambda: None,
) -> None:
    """Store `files` of `folder`, some at a time; nothing is under way any more when this returns or raises.

    Where storage refuses one (a full disk), those that arrived are removed again: no commit or part names them yet, and whoever
    makes the shard next would leave as many.

    Args:
        on_part: called, from any thread, whenever a file or a part of one has arrived.
        still_wanted: called before each file; may raise.
    """

    def put(file: DataFile) -> None:
        still_wanted()
        store.put_file(file.path, folder / file.path, on_part)

    if len(files) == 1:
        put(files[0])
        return
    try:
        _put_all(put, files)
    except StoreError as error:
        if not error.transient:
            with suppress(StoreError):
                store.delete([file.path for file in files])
        raise


def _put_all(put: Callable[[DataFile], None], files: Sequence[DataFile]) -> None:
    with ThreadPoolExecutor(min(FILES_AT_ONCE, max(1, len(files))), "store-files") as pool:
        try:
            for done in [pool.submit(put, file) for file in files]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
