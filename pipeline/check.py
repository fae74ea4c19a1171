"""`check`: does an output hold exactly what its plan says, and nothing that its hashes do not vouch for?

It trusts neither the manifest nor the compacted ledger: it reads plan, commit objects, row tables and image bytes, and
reports each difference as one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.account_gaps import utc_text
from millijoule.pipeline.commits import READ_THREADS, list_committed, read_commits
from millijoule.pipeline.energy_tables import compare_energy_tables
from millijoule.pipeline.finish import MANIFEST_SCHEMA, load_ledger, manifest_tables
from millijoule.pipeline.job import JobSpec, require_job
from millijoule.pipeline.layout import MANIFEST_KEY, SUCCESS_KEY
from millijoule.pipeline.ledger import Ledger
from millijoule.pipeline.retry import JobShards, load_job_shards
from millijoule.pipeline.uncommitted import read_uncommitted
from millijoule.workers.errors import NotFoundError
from millijoule.workers.readers import read_images
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, Commit
from millijoule.workers.shard_rows import Shard, read_shard_rows, shard_requests
from millijoule.workers.storage import Store

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
    with ThreadPoolExecutor(READ_THREADS) as threads:

        def one(commit: Commit) -> list[str]:
            return list(_check_shard(store, job, index[commit.shard_id], commit, images=images))

        commits = read_commits(store, len(index), use_compacted=False)
        for checked, problems in enumerate(threads.map(one, commits), 1):
            on_shard(checked, len(index))
            yield from problems
    if done.all():
        uncommitted = read_uncommitted(store)
        ledger = load_ledger(store, len(index), uncommitted)
        for account in ledger.unclosed:
            on_note(f"energy is missing from {utc_text(account.since_wall_ns)} on: {account}")
        yield from _check_manifest(store, job, index, ledger)
        yield from compare_energy_tables(
            store, job, ledger, lambda: read_commits(store, len(index)), uncommitted
        )


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


def _check_manifest(store: Store, job: JobSpec, shards: JobShards, ledger: Ledger) -> Iterator[str]:
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
            manifest = pq.ParquetFile(source).read()
    except NotFoundError:
        yield f"{MANIFEST_KEY}: missing"
        return
    except (pa.ArrowException, OSError) as error:
        yield f"{MANIFEST_KEY}: cannot be read as Parquet: {error}"
        return
    if manifest.schema.names != MANIFEST_SCHEMA.names:
        yield f"{MANIFEST_KEY}: has columns {manifest.schema.names}"
        return
    at = 0
    try:
        for table in manifest_tables(store, shards, ledger):
            part = manifest.slice(at, table.num_rows)
            at += table.num_rows
            for name in MANIFEST_SCHEMA.names:
                if part[name].combine_chunks() != table[name].combine_chunks():
                    rows = f"rows {at - table.num_rows} to {at - 1}"
                    yield f"{MANIFEST_KEY}: {rows}: column {name} is not what the commits say"
    except (pa.ArrowException, OSError, NotFoundError) as error:
        yield f"{MANIFEST_KEY}: cannot be compared, a row table cannot be read: {error}"
        return
    if at != manifest.num_rows:
        yield f"{MANIFEST_KEY}: {manifest.num_rows} rows, the commits make {at}"
