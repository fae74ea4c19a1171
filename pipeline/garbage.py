"""Files that no commit refers to: what dead and losing attempts leave behind.

An orphan may go when its shard is committed by another attempt, or when its attempt belongs to an older driver and
nothing touched it for a day. Age alone never decides: a slow worker of the running driver must keep its files.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from millijoule.pipeline.commits import list_committed, read_commits
from millijoule.pipeline.job import require_job
from millijoule.pipeline.layout import DATA_PREFIX, EPOCHS_PREFIX
from millijoule.pipeline.retry import load_job_shards
from millijoule.workers.storage import Store, TemporaryObject

#: Files of an older driver's attempts are kept this long in case a cut-off worker still runs.
GRACE_S = 24 * 3600.0

_ATTEMPT = re.compile(rf"{DATA_PREFIX}(?P<shard>\d+)-e(?P<epoch>\d+)-[0-9a-f]+[./]")


@dataclass(frozen=True)
class Orphan:
    """A data object without a commit. `reason` says why it may go, or why it must stay."""

    key: str
    size_bytes: int
    removable: bool
    reason: str


def find_orphans(store: Store, *, now: float | None = None) -> Iterator[Orphan]:
    """Every object under `data/` that no commit names, and every left-over temporary file.

    Raises:
        InputError: there is no job in this output.
    """
    now = time.time() if now is None else now
    job = require_job(store)
    index = load_job_shards(store, job)
    # Listed before the commits are read: a file whose commit comes later is then seen as committed, not as orphan.
    objects = list(store.list(DATA_PREFIX))
    committed = list_committed(store, len(index))
    named = {f.path for c in read_commits(store, len(index)) for f in c.files}
    newest = max(
        (int(i.key[len(EPOCHS_PREFIX) :].split(".")[0]) for i in store.list(EPOCHS_PREFIX)), default=0
    )
    for item in objects:
        if item.key in named:
            continue
        removable, reason = _verdict(item.key, item.mtime_ns / 1e9, committed, newest, now)
        yield Orphan(item.key, item.size_bytes, removable, reason)


def _verdict(key: str, mtime: float, committed, newest: int, now: float) -> tuple[bool, str]:
    match = _ATTEMPT.match(key)
    if match is None:
        return False, "not a name this program gives; left alone"
    shard_id, epoch = int(match["shard"]), int(match["epoch"])
    if shard_id < len(committed) and committed[shard_id]:
        return True, "another attempt of its shard is committed"
    if epoch < newest and now - mtime > GRACE_S:
        return True, "its driver was replaced and it is over a day old"
    return False, "its attempt may still be running, or resume"


def stale_temporaries(store: Store, *, now: float | None = None) -> list[TemporaryObject]:
    """What interrupted writes left, untouched for longer than `GRACE_S`: younger ones may still be written."""
    now = time.time() if now is None else now
    return [t for t in store.list_temporary() if now - t.mtime_ns / 1e9 > GRACE_S]


def remove(store: Store, orphans: list[Orphan]) -> int:
    """Delete the removable ones; the number of bytes freed."""
    doomed = [o for o in orphans if o.removable]
    store.delete([o.key for o in doomed])
    return sum(o.size_bytes for o in doomed)
