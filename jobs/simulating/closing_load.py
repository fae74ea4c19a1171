"""Closing the books of a job of many shards: the product's own ledger, manifest, tables and checks over a made-up output in a bucket.

A thousand workers, four to a node, five counters each, an idle stretch and a drawing one per shard. Commits lie in the driver's
compacted parts, as a driver leaves them, and are listed one by one; of shards with more images than a commit carries, a
hundred tables of rows stand for all, as files of images are read for their rows alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.jobs.measuring.made_up import made_up_commit
from millijoule.jobs.measuring.process import peak_mb
from millijoule.jobs.simulating.counted_s3 import CountedS3Store
from millijoule.jobs.simulating.job import FINGERPRINT, made_up_index, made_up_job
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, MAX_CARRIED_ROWS, ImageRequest, ImageRow

WORKERS, NODES = 1000, 250
#: Seconds of a worker before a shard, and with it.
IDLE_S, SHARD_S = 1, 30
ROW_TABLES = 100
#: Stands beside an output once all of it is made.
MADE = "made"


def make_output(folder: str, shards: int, images: int) -> None:
    """Write plan index, compacted commits and row tables of a job of equal shards below `folder`, unless they are there."""
    from millijoule.pipeline.output.commits import CommitCompactor
    from millijoule.pipeline.output.job import publish_job
    from millijoule.pipeline.planning.plan import PLAN_METADATA, Plan
    from millijoule.workers.images.writers import row_table_options
    from millijoule.workers.layout import plan_index_key
    from millijoule.workers.records import encode

    if Path(folder, MADE).exists():
        return
    store = CountedS3Store(folder)
    job = made_up_job(shards, images)
    n = shards * images
    plan = Plan(FINGERPRINT, n, n, 0, shards, -(-shards // 256))
    index = pa.Table.from_batches([made_up_index(shards, images)])
    sink = pa.BufferOutputStream()
    pq.write_table(index.replace_schema_metadata({PLAN_METADATA: encode(plan)}), sink, compression="zstd")
    store.put(plan_index_key(FINGERPRINT), sink.getvalue().to_pybytes())
    publish_job(store, job)
    tables = [[_row(table, image) for image in range(images)] for table in range(ROW_TABLES)]
    for number, rows in enumerate(tables):
        table = pa.Table.from_pylist([row.as_record() for row in rows], schema=IMAGE_ROW_SCHEMA)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, **row_table_options(table.schema, images)) as writer:
            writer.write_table(table)
        store.put(f"data/{number}.parquet", sink.getvalue().to_pybytes())
    compactor = CommitCompactor(store, 1)
    for shard_id in range(shards):
        turn = shard_id // WORKERS
        commit = made_up_commit(
            *(shard_id, shard_id % WORKERS, turn * (SHARD_S + IDLE_S), (IDLE_S, SHARD_S)),
            nodes=NODES,
            rows_path=f"data/{shard_id % ROW_TABLES}.parquet",
            images=images,
            rows=tables[shard_id % ROW_TABLES] if images <= MAX_CARRIED_ROWS else None,
        )
        compactor.add(shard_id, commit.to_json())
    compactor.flush()
    Path(folder, MADE).touch()


def _row(table: int, image: int) -> ImageRow:
    request = ImageRequest(f"p{table}-{image}", 0, f"a red fox in the snow, number {image}", image)
    sha256 = f"{table * 1000 + image:064x}"
    return ImageRow(request, "ok", 64, 64, 10, f"data/{table}.parquet", sha256, 1000)


def close_books(folder: str, shards: int, images: int, latency_s: float = 0.0) -> dict[str, Any]:
    """Finish the job below `folder`: seconds, memory and requests, and what each stage took and held at most.

    Args:
        latency_s: that an answer of storage takes at least.
    """
    from millijoule.pipeline.closing import finish as product
    from millijoule.pipeline.energy.closure import EXACT_CHECKS
    from millijoule.pipeline.output.job import require_job
    from millijoule.pipeline.planning.retry_rounds import load_job_shards
    from millijoule.workers.layout import ENERGY_PREFIX, MANIFEST_KEY

    stages: list[dict[str, Any]] = []

    def staged(name: str, stage: str) -> None:
        own: Callable[..., Any] = getattr(product, name)

        def call(*arguments: Any, **options: Any) -> Any:
            cpu = time.process_time()
            answer = own(*arguments, **options)
            used = time.process_time() - cpu
            stages.append({"stage": stage, "cpu_s": round(used, 1), "peak_mb": round(peak_mb())})
            return answer

        setattr(product, name, call)

    product.write_preview = lambda *_: None  # there are no pictures
    staged("load_records", "commits and ledger")
    staged("_write_energy", "energy tables")
    store = CountedS3Store(folder, shards, latency_s)
    job, plan = require_job(store), load_job_shards(store, require_job(store))
    before_mb, cpu, began = peak_mb(), time.process_time(), time.monotonic()
    store.s3.requests.clear()
    stats = product.finish_job(store, job, plan)
    cpu_s = time.process_time() - cpu
    exact = {check: stats["closure"][check] for check in EXACT_CHECKS}
    assert all(exact.values()), exact
    assert stats["images_ok"] == shards * images
    tables_mb = sum(item.size_bytes for item in store.list(ENERGY_PREFIX)) / 1e6
    return {
        "shards": shards,
        "images": shards * images,
        "latency_s": latency_s,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_s": round(cpu_s, 1),
        "peak_mb": round(peak_mb()),
        "mb_before": round(before_mb),
        "stages": [
            *stages,
            {"stage": "manifest and the rest", "cpu_s": round(cpu_s - sum(s["cpu_s"] for s in stages), 1)},
        ],
        "requests": store.requests,
        "read_mb": round(store.s3.received_bytes / 1e6, 1),
        "energy_tables_mb": round(tables_mb, 1),
        "manifest_mb": round(store.size(MANIFEST_KEY) / 1e6, 1),
        "exact_checks": exact,
    }
