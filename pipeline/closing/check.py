"""`check`: does an output hold exactly what its plan says, and nothing that its hashes do not vouch for?

It trusts neither the manifest nor the compacted ledger: it reads plan, commit objects, row tables and image bytes, and
reports each difference as one line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.closing.check_plan import check_plan
from millijoule.pipeline.closing.finish import (
    MANIFEST_BATCH_ROWS,
    MANIFEST_SCHEMA,
    JobRecords,
    ManifestRows,
    RecordReader,
    Totals,
    manifest_tables,
    success_record,
    summarise,
)
from millijoule.pipeline.closing.lean_memory import lean_memory
from millijoule.pipeline.energy.account_gaps import utc_text
from millijoule.pipeline.energy.tables import compare_energy_tables
from millijoule.pipeline.output.commits import list_committed, parse_commit
from millijoule.pipeline.output.image_rows import RowReader, read_row_table
from millijoule.pipeline.output.job import JobSpec, require_job
from millijoule.pipeline.output.read_objects import READ_THREADS, in_threads
from millijoule.pipeline.planning.retry_rounds import JobShards, load_job_shards
from millijoule.workers.counted import counted
from millijoule.workers.errors import DamagedError, NotFoundError
from millijoule.workers.images.readers import read_images
from millijoule.workers.layout import DATA_PREFIX, MANIFEST_KEY, STATS_KEY, SUCCESS_KEY, commit_key
from millijoule.workers.schemas import STATUSES, Commit, RowCounts
from millijoule.workers.shard_rows import Shard, ShardRowReader, shard_requests
from millijoule.workers.storage.open import is_s3_url
from millijoule.workers.storage.protocol import Store, check_key

#: Uncommitted shards that are named; the rest is counted.
MAX_LISTED = 20

#: A row table of at most so many bytes is not read a second time after its hash was taken.
_SMALL_TABLE_BYTES = 1 << 20

#: What `stats.json` of earlier versions lacks.
_ADDED_STATS = frozenset(
    {
        *("images_filtered", "filter_reasons", "images_with_warnings", "warning_kinds"),
        *("rejected_mj", "rejected_estimate_mj"),
    }
)

#: Columns that must equal between plan and row table.
_KEY = ("prompt_id", "image_index", "prompt", "seed")


def check_output(
    store: Store,
    *,
    images: bool = True,
    on_shard: Callable[[int], None] = lambda shard_id: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Iterator[str]:
    """Every difference between an output and its plan, as a message; none at all for a sound, complete output.

    Args:
        images: also re-read every data file and image and compare hashes; False trusts sizes.
        on_shard: called with each shard that was checked.
        on_note: called with what is no difference but must be known: whose energy nobody read to the end, and files beside
            those that commits name.

    Raises:
        InputError: there is no job in this output.
    """
    with lean_memory():
        job = require_job(store)
        yield from check_plan(store, job)
        index = load_job_shards(store, job)
        done = list_committed(store, len(index))
        missing = np.flatnonzero(~done).tolist()
        for shard_id in missing[:MAX_LISTED]:
            yield f"shard {shard_id}: not committed"
        if len(missing) > MAX_LISTED:
            yield f"{len(missing) - MAX_LISTED:,} more shards: not committed"
        damaged: list[DamagedError] = []
        records, plan = RecordReader(store, damaged.append), ShardRowReader(store)
        yield from map(str, damaged)

        def check(shard_id: int) -> tuple[int, Commit | None, list[str]]:
            try:
                commit = parse_commit(store, shard_id, store.get(commit_key(shard_id)))
            except DamagedError as error:
                return shard_id, None, [str(error)]
            problems = _check_shard(store, job, index[shard_id], commit, plan, images=images)
            return shard_id, commit, list(problems)

        # a distant store keeps many threads waiting; from a disk more threads than cores only wait for each other
        threads = READ_THREADS if is_s3_url(store.url) else min(READ_THREADS, os.cpu_count() or 1)
        named, is_sound = 0, True  # files of shards, all as their commits say
        whole = not missing and not damaged  # else what is to be compared with them says the same again
        for shard_id, commit, problems in in_threads(check, np.flatnonzero(done).tolist(), threads):
            on_shard(shard_id)
            yield from problems
            if commit is None:
                whole = False
            else:
                records.add(commit)
                named += sum(file.path.startswith(DATA_PREFIX) for file in commit.files)
                is_sound = is_sound and not problems
        if whole:
            if is_sound and (beside := sum(1 for _ in store.list(DATA_PREFIX)) - named) > 0:
                files = counted(beside, "file")
                on_note(
                    f"{files} in {DATA_PREFIX} that no commit names; `millijoule gc` says which, and what may go"
                )
            yield from _check_finished(store, job, index, records.records(), on_note)


def _check_finished(
    store: Store, job: JobSpec, index: JobShards, records: JobRecords, on_note: Callable[[str], None]
) -> Iterator[str]:
    """What must be there once all shards are committed."""
    for account in records.ledger.unclosed:
        on_note(f"energy is missing from {utc_text(account.since_wall_ns)} on: {account}")
    totals = Totals()
    differences = list(_check_manifest(store, job, index, records, totals))
    yield from differences
    with ExitStack() as stack:
        images = None  # a manifest that says what the row tables say saves opening them again
        if not differences:
            images = ManifestRows(pq.ParquetFile(stack.enter_context(store.open_input(MANIFEST_KEY))))
        energy = yield from compare_energy_tables(
            store, job, records.ledger, records.commits, records.uncommitted, images
        )
    if energy is not None and not differences:
        yield from _compare_stats(
            store,
            json.loads(json.dumps(summarise(job, totals, records.ledger, records.commits, energy))),
        )


def _compare_stats(store: Store, expected: dict[str, Any]) -> Iterator[str]:
    try:
        stats = json.loads(store.get(STATS_KEY))
        if not stats.keys() & _ADDED_STATS:  # written before there were any of them
            expected = {name: value for name, value in expected.items() if name not in _ADDED_STATS}
        stored = {name: stats.get(name) for name in expected}
    except NotFoundError:
        yield f"{STATS_KEY}: missing; run the job again to write it"
    except (ValueError, AttributeError) as error:
        yield f"{STATS_KEY}: cannot be read: {error}"
    else:
        for name, value in expected.items():
            if stored[name] != value:
                yield f"{STATS_KEY}: {name} is {stored[name]!r:.200}, the commits make {value!r:.200}"


def _check_shard(
    store: Store, job: JobSpec, shard: Shard, commit: Commit, plan: ShardRowReader, *, images: bool
) -> Iterator[str]:
    where = f"shard {shard.shard_id} (attempt {commit.attempt_id})"
    if commit.plan_fingerprint != job.fingerprint:
        yield f"{where}: committed for another plan, {commit.plan_fingerprint[:12]}"
    if commit.model_sha256 != job.model_sha256:
        yield f"{where}: made by another model, {commit.model_sha256[:12]}"
    for path in (commit.rows_path, *(file.path for file in commit.files)):
        try:
            check_key(path)
        except ValueError as error:
            yield f"{where}: {error}"
            return
    table_bytes: bytes | None = None
    is_whole = True
    for file in commit.files:
        try:
            data = store.get(file.path) if images else None
            size = store.size(file.path) if data is None else len(data)
        except NotFoundError:
            yield f"{file.path}: named by the commit of shard {shard.shard_id}, but missing"
            is_whole = False
            continue
        if size != file.size_bytes:
            yield f"{file.path}: {size} bytes, the commit says {file.size_bytes}"
        elif data is not None and hashlib.sha256(data).hexdigest() != file.sha256:
            yield f"{file.path}: its SHA-256 is not the commit's"
        if file.path == commit.rows_path and size <= _SMALL_TABLE_BYTES:
            table_bytes = data
    if not is_whole:
        return
    try:
        rows = read_row_table(store, commit, table_bytes).to_pylist()
    except (DamagedError, NotFoundError) as error:
        yield str(error)
        return
    named = {file.path for file in commit.files}
    holding = {row["path"].partition("#")[0] for row in rows if row["path"]}
    for path in sorted({commit.rows_path, *holding} - named):
        yield f"{where}: {path} is not among the files of its commit"
    if commit.rows is not None and commit.rows != tuple(tuple(row.values()) for row in rows):
        yield f"{where}: the rows in its commit are not those of {commit.rows_path}"
    planned = {
        (r.prompt_id, r.image_index, r.prompt, r.seed) for r in shard_requests(plan.read(shard), job.job_seed)
    }
    found = [tuple(row[k] for k in _KEY) for row in rows]
    for key in planned.difference(found):
        yield f"{where}: image {key[1]} of prompt {key[0]!r} is planned but has no row"
    for key in set(found).difference(planned):
        yield f"{where}: a row for image {key[1]} of prompt {key[0]!r} that the plan does not have"
    if len(found) != len(set(found)):
        yield f"{where}: {counted(len(found) - len(set(found)), 'row stands', 'rows stand')} twice"
    yield from _check_statuses(where, rows, commit)
    ok = [row for row in rows if row["status"] == "ok"]
    if images:
        try:
            for row, data in read_images(store, ok):
                if data is None or hashlib.sha256(data).hexdigest() != row["sha256"]:
                    yield f"{row['path']}: image {row['image_index']} of prompt {row['prompt_id']!r} is not what was made"
        except (pa.ArrowException, OSError, ValueError) as error:
            yield f"{where}: its images cannot be read: {error}"


def _check_statuses(where: str, rows: list[dict[str, Any]], commit: Commit) -> Iterator[str]:
    counts = RowCounts.of((row["status"], row["width"]) for row in rows)
    said = RowCounts(
        commit.images_ok,
        commit.images_filtered,
        commit.images_quarantined,
        counts.drawn if commit.images_drawn is None else commit.images_drawn,
    )
    if counts != said:
        yield f"{where}: rows say {_count_words(counts)}; the commit says {_count_words(said)}"
    for row in rows:
        image = f"image {row['image_index']} of prompt {row['prompt_id']!r}"
        if row["status"] not in STATUSES:
            yield f"{where}: {image} has status {row['status']!r:.100}"
        elif (row["status"] == "ok") != (row["path"] is not None):
            yield f"{where}: {image} is {row['status']} and has {'a' if row['path'] else 'no'} path"


def _count_words(counts: RowCounts) -> str:
    return ", ".join(f"{n} {name}" for name, n in asdict(counts).items())


def _check_manifest(
    store: Store, job: JobSpec, shards: JobShards, records: JobRecords, totals: Totals
) -> Iterator[str]:
    """Once all shards are committed there must be a manifest, and it must say what the commits say."""
    try:
        success = json.loads(store.get(SUCCESS_KEY))
    except NotFoundError:
        yield f"{SUCCESS_KEY}: missing though every shard is committed; run the job again to finish it"
        return
    except ValueError as error:
        yield f"{SUCCESS_KEY}: {error}"
        return
    if not isinstance(success, dict):
        yield f"{SUCCESS_KEY}: not what a finished job writes: {success!r:.100}"
        return
    is_of_this_state = success.get("fingerprint") == job.fingerprint and success.get("shards") == len(shards)
    if not is_of_this_state:
        yield f"{SUCCESS_KEY}: belongs to another state of the job; run the job again to finish it"
    if not store.exists(MANIFEST_KEY):
        yield f"{MANIFEST_KEY}: missing"
        return
    try:
        with store.open_input(MANIFEST_KEY) as source:
            yield from _compare_manifest(store, shards, records, pq.ParquetFile(source), totals)
    except (pa.ArrowException, OSError, NotFoundError, DamagedError) as error:
        yield f"{MANIFEST_KEY}: it, or a row table to compare it with, cannot be read: {error}"
        return
    if is_of_this_state:
        for name, count in success_record(job, shards, totals).items():
            if success.get(name, count) != count:  # earlier versions lack some
                yield f"{SUCCESS_KEY}: {name} is {success[name]!r:.100}, the commits make {count}"


def _compare_manifest(
    store: Store, shards: JobShards, records: JobRecords, manifest: pq.ParquetFile, totals: Totals
) -> Iterator[str]:
    if manifest.schema_arrow.names != MANIFEST_SCHEMA.names:
        yield f"{MANIFEST_KEY}: has columns {manifest.schema_arrow.names}"
        return
    batches = manifest.iter_batches(MANIFEST_BATCH_ROWS)
    stored, at = RowReader((pa.Table.from_batches([b]) for b in batches), manifest.schema_arrow), 0
    for table in manifest_tables(store, shards, records, totals):
        part = stored.take(table.num_rows)
        at += table.num_rows
        for name in MANIFEST_SCHEMA.names:
            if not part[name].equals(table[name]):
                rows = f"rows {at - table.num_rows} to {at - 1}"
                yield f"{MANIFEST_KEY}: {rows}: column {name} is not what the commits say"
    if at != manifest.metadata.num_rows:
        yield f"{MANIFEST_KEY}: {manifest.metadata.num_rows} rows, the commits make {at}"
