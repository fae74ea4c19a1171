"""`check`: does an output hold exactly what its plan says, and nothing that its hashes do not vouch for?

It trusts neither the manifest nor the compacted ledger: it reads plan, commit objects, row tables and image bytes, and
reports each difference as one line.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.account_gaps import utc_text
from millijoule.pipeline.commits import READ_THREADS, list_committed, parse_commit, read_bodies
from millijoule.pipeline.energy_tables import compare_energy_tables
from millijoule.pipeline.finish import (
    MANIFEST_BATCH_ROWS,
    MANIFEST_SCHEMA,
    JobRecords,
    ManifestRows,
    RecordReader,
    manifest_tables,
)
from millijoule.pipeline.job import JobSpec, require_job
from millijoule.pipeline.layout import MANIFEST_KEY, SUCCESS_KEY
from millijoule.pipeline.retry import JobShards, load_job_shards
from millijoule.workers.errors import NotFoundError
from millijoule.workers.readers import read_images
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, Commit
from millijoule.workers.shard_rows import Shard, read_shard_rows, shard_requests
from millijoule.workers.storage import Store

T = TypeVar("T")
R = TypeVar("R")

#: Columns that must equal between plan and row table.
_KEY = ("prompt_id", "image_index", "prompt", "seed")


def check_output(
    store: Store,
    *,
    images: bool = True,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Iterator[str]:
    """Every difference between an output and its plan, as a message; none at all for a sound, complete output.

    Args:
        images: also re-read every data file and image and compare hashes; False trusts sizes.
        on_shard: called with (checked, total) for progress.
        on_note: called with what is no difference but must be known: whose energy nobody read to the end.

    Raises:
        InputError: there is no job in this output.
    """
    job = require_job(store)
    index = load_job_shards(store, job)
    done = list_committed(store, len(index))
    for shard_id in (~done).nonzero()[0].tolist():
        yield f"shard {shard_id}: not committed"
    reader = RecordReader(store)

    def one(commit: tuple[int, bytes]) -> tuple[int, bytes, list[str]]:
        shard_id, body = commit
        parsed = parse_commit(store, shard_id, body)
        return shard_id, body, list(_check_shard(store, job, index[shard_id], parsed, images=images))

    bodies = read_bodies(store, len(index), use_compacted=False)
    for checked, (shard_id, body, problems) in enumerate(in_threads(one, bodies), 1):
        on_shard(checked, len(index))
        yield from problems
        reader.add(shard_id, body)
    if done.all():
        yield from _check_finished(store, job, index, reader.records(), on_note)


def _check_finished(
    store: Store, job: JobSpec, index: JobShards, records: JobRecords, on_note: Callable[[str], None]
) -> Iterator[str]:
    """What must be there once all shards are committed."""
    for account in records.ledger.unclosed:
        on_note(f"energy is missing from {utc_text(account.since_wall_ns)} on: {account}")
    differences = 0
    for problem in _check_manifest(store, job, index, records):
        differences += 1
        yield problem
    with ExitStack() as stack:
        images = None  # a manifest that says what the row tables say saves opening them again
        if not differences:
            images = ManifestRows(pq.ParquetFile(stack.enter_context(store.open_input(MANIFEST_KEY))))
        yield from compare_energy_tables(
            store, job, records.ledger, records.commits, records.uncommitted, images
        )


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of each item, in order, by `READ_THREADS` threads; only few items are taken ahead."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(READ_THREADS) as threads:
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) >= 4 * READ_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check_shard(store: Store, job: JobSpec, shard: Shard, commit: Commit, *, images: bool) -> Iterator[str]:
    where = f"shard {shard.shard_id} (attempt {commit.attempt_id})"
    if commit.plan_fingerprint != job.fingerprint:
        yield f"{where}: committed for another plan, {commit.plan_fingerprint[:12]}"
    if commit.model_sha256 != job.model_sha256:
        yield f"{where}: made by another model, {commit.model_sha256[:12]}"
    for file in commit.files:
        try:
            if (size := store.size(file.path)) != file.size_bytes:
                yield f"{file.path}: {size} bytes, the commit says {file.size_bytes}"
            elif images and hashlib.sha256(store.get(file.path)).hexdigest() != file.sha256:
                yield f"{file.path}: its SHA-256 is not the commit's"
        except NotFoundError:
            yield f"{file.path}: named by the commit of shard {shard.shard_id}, but missing"
            return
    try:
        with store.open_input(commit.rows_path) as source:
            rows = pq.ParquetFile(source).read(columns=IMAGE_ROW_SCHEMA.names).to_pylist()
    except (pa.ArrowException, OSError) as error:
        yield f"{commit.rows_path}: cannot be read as Parquet: {error}"
        return
    planned = {
        (r.prompt_id, r.image_index, r.prompt, r.seed)
        for r in shard_requests(read_shard_rows(store, shard), job.job_seed)
    }
    found = [tuple(row[k] for k in _KEY) for row in rows]
    for key in planned.difference(found):
        yield f"{where}: image {key[1]} of prompt {key[0]!r} is planned but has no row"
    for key in set(found).difference(planned):
        yield f"{where}: a row for image {key[1]} of prompt {key[0]!r} that the plan does not have"
    if len(found) != len(set(found)):
        yield f"{where}: {len(found) - len(set(found))} rows stand twice"
    ok = [row for row in rows if row["status"] == "ok"]
    if (len(ok), len(rows) - len(ok)) != (commit.images_ok, commit.images_quarantined):
        yield f"{where}: rows say {len(ok)} ok of {len(rows)}, the commit says {commit.images_ok}"
    if images:
        try:
            for row, data in read_images(store, ok):
                if data is None or hashlib.sha256(data).hexdigest() != row["sha256"]:
                    yield f"{row['path']}: image {row['image_index']} of prompt {row['prompt_id']!r} is not what was made"
        except (pa.ArrowException, OSError, ValueError) as error:
            yield f"{where}: its images cannot be read: {error}"


def _check_manifest(store: Store, job: JobSpec, shards: JobShards, records: JobRecords) -> Iterator[str]:
    """Once all shards are committed there must be a manifest, and it must say what the commits say."""
    try:
        success = json.loads(store.get(SUCCESS_KEY))
    except NotFoundError:
        yield f"{SUCCESS_KEY}: missing though every shard is committed; run the job again to finish it"
        return
    except ValueError as error:
        yield f"{SUCCESS_KEY}: {error}"
        return
    if success.get("fingerprint") != job.fingerprint or success.get("shards") != len(shards):
        yield f"{SUCCESS_KEY}: belongs to another state of the job; run the job again to finish it"
    try:
        with store.open_input(MANIFEST_KEY) as source:
            yield from _compare_manifest(store, shards, records, pq.ParquetFile(source))
    except NotFoundError:
        yield f"{MANIFEST_KEY}: missing"
    except (pa.ArrowException, OSError) as error:
        yield f"{MANIFEST_KEY}: cannot be read as Parquet: {error}"


def _compare_manifest(
    store: Store, shards: JobShards, records: JobRecords, manifest: pq.ParquetFile
) -> Iterator[str]:
    if manifest.schema_arrow.names != MANIFEST_SCHEMA.names:
        yield f"{MANIFEST_KEY}: has columns {manifest.schema_arrow.names}"
        return
    stored, at = _Rows(manifest), 0
    tables = manifest_tables(store, shards, records)
    while True:
        try:
            table = next(tables, None)
        except (pa.ArrowException, OSError, NotFoundError) as error:
            yield f"{MANIFEST_KEY}: cannot be compared, a row table cannot be read: {error}"
            return
        if table is None:
            break
        part = stored.take(table.num_rows)
        at += table.num_rows
        for name in MANIFEST_SCHEMA.names:
            if not part[name].equals(table[name]):
                rows = f"rows {at - table.num_rows} to {at - 1}"
                yield f"{MANIFEST_KEY}: {rows}: column {name} is not what the commits say"
    if at != manifest.metadata.num_rows:
        yield f"{MANIFEST_KEY}: {manifest.metadata.num_rows} rows, the commits make {at}"


class _Rows:
    """The rows of a Parquet file in order, as many at a time as are asked for."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._batches = file.iter_batches(MANIFEST_BATCH_ROWS)
        self._held = file.schema_arrow.empty_table()

    def take(self, n: int) -> pa.Table:
        """The next `n` rows; fewer at the end."""
        while self._held.num_rows < n and (batch := next(self._batches, None)) is not None:
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([batch])])
        part, self._held = self._held.slice(0, n), self._held.slice(n)
        return part
