"""Storing the files that an attempt has written, some at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    with ThreadPoolExecutor(min(FILES_AT_ONCE, max(1, len(files))), "store-files") as pool:
        try:
            for done in [pool.submit(put, file) for file in files]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
