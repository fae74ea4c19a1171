"""Models fetched once per node, however many workers and jobs want them at the same time.

    FOLDER/<entry>/...            complete, every file as its hash says
    FOLDER/<entry>.partial/...    what an interrupted or running fetch has so far; the next one goes on there
    FOLDER/<entry>.lock           held by the process that fetches; the kernel takes it back when that dies

An entry is named by what it is to hold, so nothing in it ever changes; nothing here deletes one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from millijoule.workers.counted import counted
from millijoule.workers.errors import NodeError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.storage.protocol import Store, check_key

log = logging.getLogger(__name__)

#: Names another folder than the user's own cache; `--model-cache` goes before it.
FOLDER_VARIABLE = "MILLIJOULE_CACHE"

#: One ranged read, and how many are under way at once: the latency of one request is not waited for alone.
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4

LOCK_POLL_S = 0.1
#: Between two words about another process that still fetches.
NOTICE_S = 30.0


@dataclass(frozen=True)
class WantedFile:
    """A file of a model.

    Attributes:
        name: relative POSIX path.
        sha256: of its content; empty: whatever it is, it was just listed.
    """

    name: str
    size_bytes: int
    sha256: str = ""


def cache_folder(chosen: str | None) -> Path:
    """The folder of this node's cache: `chosen`, else what `MILLIJOULE_CACHE` names, else the user's own."""
    named = chosen or os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    own = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() / "millijoule" / "models"


def listing_entry(url: str, files: Sequence[tuple[str, int, str]]) -> str:
    """The name of an entry for the files (name, size, tag) that a listing of `url` shows, before their content is known."""
    text = "".join(f"{name}\0{size}\0{tag}\n" for name, size, tag in sorted(files))
    return hashlib.sha256(f"{url}\n{text}".encode()).hexdigest()[:32]


def content_entry(files: Sequence[WantedFile]) -> str:
    """The name of an entry for files whose content is known."""
    text = "".join(f"{f.name}\0{f.sha256}\n" for f in sorted(files, key=lambda f: f.name))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fetch_once(
    folder: Path,
    entry: str,
    files: Sequence[WantedFile],
    store: Store,
    on_part: Callable[[], None] = lambda: None,
) -> Path:
    """The folder with `files`, which lie in `store`; fetched unless this node has them.

    Whoever comes first fetches, the others wait and find what it fetched. A file that is there but is not what its hash says
    is fetched again.

    Raises:
        NodeError: there is no room, no right to write, or what was fetched is not what was wanted.
        StoreError: storage failed.
    """
    for file in files:
        check_key(file.name)
    complete = folder / entry
    try:
        if not _damaged(complete, files):
            return complete
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{entry}.lock", store.url):
            damaged = _damaged(complete, files)
            if damaged:
                _fetch(complete, folder / f"{entry}.partial", damaged, store, on_part)
        return complete
    except OSError as error:
        advice = "check its owner and permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = sum(f.size_bytes for f in files)
            advice = f"free space there ({need:,} bytes in all), or name another folder with --model-cache"
        raise NodeError(
            f"model cache {error.filename or folder}: {error.strerror or error}; {advice}"
        ) from error


def _damaged(complete: Path, files: Sequence[WantedFile]) -> list[WantedFile]:
    """Those of `files` that are not there, or not as they should be."""
    wrong = []
    for file in files:
        path = complete / file.name
        try:
            right = path.stat().st_size == file.size_bytes
        except FileNotFoundError:
            right = False
        if right and file.sha256 and file_sha256(path) != file.sha256:
            log.warning("%s: is not what it should be; fetched again", path)
            right = False
        if not right:
            wrong.append(file)
    return wrong


def _fetch(
    complete: Path,
    partial: Path,
    files: Sequence[WantedFile],
    store: Store,
    on_part: Callable[[], None],
) -> None:
    size = sum(f.size_bytes for f in files)
    log.info(
        "fetching %s: %s, %.1f MB, into %s", store.url, counted(len(files), "file"), size / 1e6, complete
    )
    began = time.monotonic()
    for file in files:
        path = partial / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch_file(path, file, store, on_part)
        if file.sha256 and file_sha256(path) != file.sha256:
            path.unlink()
            raise NodeError(
                f"{store.url}/{file.name}: is not what the job was planned with (its content has changed there, or was "
                "damaged on the way); bring the planned file back, or plan the job anew in another --output"
            )
    if not complete.exists():
        partial.replace(complete)
    else:
        for file in files:
            (complete / file.name).parent.mkdir(parents=True, exist_ok=True)
            (partial / file.name).replace(complete / file.name)
    log.info("fetched %s (%.1f s)", store.url, time.monotonic() - began)


def _fetch_file(path: Path, file: WantedFile, store: Store, on_part: Callable[[], None]) -> None:
    """Make `path` whole, from where an earlier fetch stopped; parts are read ahead and written in order."""
    have = path.stat().st_size if path.exists() else 0
    if have > file.size_bytes:
        path.unlink()
        have = 0
    with path.open("ab") as out, ThreadPoolExecutor(PARTS_AT_ONCE, "model-fetch") as pool:

        def read(start: int) -> bytes:
            length = min(PART_BYTES, file.size_bytes - start)
            with store.open_input(file.name) as source:
                source.seek(start)
                data = source.read(length)
            if len(data) != length:
                raise NodeError(
                    f"{store.url}/{file.name}: ended after {start + len(data)} of {file.size_bytes} bytes; it was changed "
                    "while the job was planned or is damaged"
                )
            return data

        starts = iter(range(have, file.size_bytes, PART_BYTES))
        ahead = deque(pool.submit(read, start) for start in islice(starts, PARTS_AT_ONCE))
        while ahead:
            out.write(ahead.popleft().result())
            on_part()
            ahead.extend(pool.submit(read, start) for start in islice(starts, 1))
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """With the lock of an entry; waits as long as its holder lives."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        waited_since = said = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if (now := time.monotonic()) - said > NOTICE_S:
                    said = now
                    log.info("waiting for another process to fetch %s (%.0f s)", what, now - waited_since)
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(file)
