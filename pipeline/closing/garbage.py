"""Files that no commit refers to: what dead and losing attempts leave behind.

An orphan may go when its shard is committed by another attempt, or when its attempt belongs to an older driver and
nothing touched it for a day. Age alone never decides: a slow worker of the running driver must keep its files.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from millijoule.pipeline.output.commits import CommitBodies, parse_commit
from millijoule.pipeline.output.job import last_epoch, require_job
from millijoule.pipeline.output.read_objects import in_threads
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.workers.attempts.parts import Part
from millijoule.workers.errors import NotFoundError
from millijoule.workers.layout import DATA_PREFIX, PARTS_PREFIX, shard_of_part_key
from millijoule.workers.storage.protocol import Store, TemporaryObject

#: Files of an older driver's attempts are kept this long in case a cut-off worker still runs.
GRACE_S = 24 * 3600.0

#: Objects that are looked at, or deleted, together.
OBJECTS_AT_ONCE = 1_000

_ATTEMPT = re.compile(rf"{DATA_PREFIX}(?P<shard>\d+)-e(?P<epoch>\d+)-[0-9a-f]+[./]")


@dataclass(frozen=True)
class Orphan:
    """A data object without a commit. `reason` says why it may go, or why it must stay."""

    key: str
    size_bytes: int
    removable: bool
    reason: str


def find_orphans(store: Store, *, now: float | None = None) -> Iterator[Orphan]:
    """Every object under `data/` that no commit names, and every record of a sealed part whose shard is committed.

    Raises:
        InputError: there is no job in this output.
    """
    now = time.time() if now is None else now
    job = require_job(store)
    n_shards = len(load_job_shards(store, job))
    newest = last_epoch(store)
    bodies = CommitBodies(store, n_shards)
    sealed = _sealed_files(store)

    def named_files(shard_id: int) -> frozenset[str] | None:
        """The files that a shard's commit names; None where it has none."""
        try:
            body = bodies.get(shard_id)
        except NotFoundError:
            return None
        return frozenset(f.path for f in parse_commit(store, shard_id, body).files)

    objects = store.list(DATA_PREFIX)
    while some := list(islice(objects, OBJECTS_AT_ONCE)):
        # Looked up after they were listed: a file whose commit came in between is seen as committed, not as orphan.
        shards = {int(m["shard"]) for i in some if (m := _ATTEMPT.match(i.key))}
        wanted = sorted(s for s in shards if s < n_shards)
        named = dict(zip(wanted, in_threads(named_files, wanted), strict=True))
        for item in some:
            match = _ATTEMPT.match(item.key)
            files = named.get(int(match["shard"])) if match else None
            if files is None or item.key not in files:
                mtime = item.mtime_ns / 1e9
                removable, reason = _verdict(match, mtime, files is not None, newest, now)
                if files is None and item.key in sealed:
                    removable, reason = False, "sealed: the next attempt at its shard takes it over"
                yield Orphan(item.key, item.size_bytes, removable, reason)
    for item in store.list(PARTS_PREFIX):
        shard_id = shard_of_part_key(item.key)
        if shard_id is not None and shard_id < n_shards and named_files(shard_id) is not None:
            yield Orphan(item.key, item.size_bytes, True, "its shard is committed")


def _sealed_files(store: Store) -> frozenset[str]:
    """Files of sealed parts whose records are there; a shard has such records only until it is committed."""
    found: set[str] = set()
    for item in store.list(PARTS_PREFIX):
        try:
            found.update(file.path for file in Part.from_json(store.get(item.key)).files)
        except (NotFoundError, ValueError):
            continue  # committed meanwhile, or never a record of ours
    return frozenset(found)


def _verdict(
    match: re.Match[str] | None, mtime: float, is_committed: bool, newest: int, now: float
) -> tuple[bool, str]:
    if match is None:
        return False, "not a name this program gives; left alone"
    if is_committed:
        return True, "another attempt of its shard is committed"
    if int(match["epoch"]) < newest and now - mtime > GRACE_S:
        return True, "its driver was replaced and it is over a day old"
    return False, "its attempt may still be running, or resume"


def stale_temporaries(store: Store, *, now: float | None = None) -> list[TemporaryObject]:
    """What interrupted writes left, untouched for longer than `GRACE_S`: younger ones may still be written."""
    now = time.time() if now is None else now
    return [t for t in store.list_temporary() if now - t.mtime_ns / 1e9 > GRACE_S]


def remove(store: Store, orphans: Iterable[Orphan]) -> Iterator[Orphan]:
    """Delete the removable ones, some at a time behind the listing; all of them come out again, in order."""
    doomed: list[str] = []
    for orphan in orphans:
        if orphan.removable:
            doomed.append(orphan.key)
        yield orphan
        if len(doomed) >= OBJECTS_AT_ONCE:
            store.delete(doomed)
            doomed = []
    store.delete(doomed)
