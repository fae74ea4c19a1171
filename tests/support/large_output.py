"""The finished job of many images that the report is tried on, as far as the report reads it.

64 GPUs on eight nodes with constant watts and a power sample a second, shards of sixteen images, now and then one that
takes three times as long, pictures of noise that do not compress. Tables, manifest and `stats.json` come from the
product's own writers.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from millijoule.pipeline.closing.finish import MANIFEST_SCHEMA, Totals, summarise
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.rows import RowTables
from millijoule.pipeline.energy.tables import write_energy_tables
from millijoule.pipeline.output.job import JobSpec, publish_job
from millijoule.workers.layout import MANIFEST_KEY, STATS_KEY
from millijoule.workers.schemas import Commit, CounterRead, PowerSample, PowerTrace, Segment
from millijoule.workers.storage.protocol import Store

SECOND_NS = 1_000_000_000
NODES, GPUS_PER_NODE, IMAGES_PER_SHARD = 8, 8, 16
SHARD_S, IDLE_S = 30, 1
#: Every so many shards one takes so much longer.
SLOW_EVERY, SLOW_S = 500, 60
PICTURES, PICTURE_PIXELS = 32, 512


def write_output(store: Store, images: int) -> None:
    """The finished job, as far as the report reads it."""
    shards, workers = images // IMAGES_PER_SHARD, NODES * GPUS_PER_NODE
    spec = JobSpec(
        *("0123456789abcdef" * 4, "none", "made up", "a" * 64, 0, 1, "parquet", IMAGES_PER_SHARD, "error"),
        *(("prompts.txt",), images, images, shards, 0, 0.0, "bench"),
    )
    job = publish_job(store, spec)
    commits = sorted(
        (c for n in range(workers) for c in worker_commits(n, range(n, shards, workers))),
        key=lambda c: c.shard_id,
    )
    ledger = build_ledger(s for c in commits for s in c.segments)
    table = CommitTable.of(commits)
    energy = write_energy_tables(store, job, ledger, table, RowTables(image_rows))
    totals = Totals(
        shards=shards,
        images_ok=images,
        energy_methods=Counter({"nvml-counter+rapl": images}),
        first_start_ns=min(c.t_start_wall_ns for c in commits),
        last_end_ns=max(c.t_end_wall_ns for c in commits),
    )
    store.put(STATS_KEY, json.dumps(summarise(job, totals, ledger, table, energy)).encode())
    noise = np.random.default_rng(0)
    for i in range(PICTURES):
        buffer = io.BytesIO()
        pixels = noise.integers(0, 256, (PICTURE_PIXELS, PICTURE_PIXELS, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
        store.put(f"data/{i}.png", buffer.getvalue())
    sink = io.BytesIO()
    pq.write_table(_manifest(images), sink, compression="zstd")
    store.put(MANIFEST_KEY, sink.getvalue())


def is_slow(shard_id: int) -> bool:
    """Whether this shard took much longer than the others."""
    return shard_id % SLOW_EVERY == 0


def worker_commits(number: int, shard_ids: range) -> Iterator[Commit]:
    """The commits of one worker: load, then shards with a pause before each, read at every change."""
    host = f"host-{number // GPUS_PER_NODE}"
    gpu = f"GPU-{number:08d}-aaaa-bbbb-cccc-0123456789ab"
    domains = (f"gpu:{gpu}", "cpu:package-0")
    watts = 400 + 4 * number

    def read(t: int) -> CounterRead:
        energy = {domains[0]: 10**9 + watts * 1000 * t, domains[1]: 10**9 + 200_000 * t}
        return CounterRead(f"boot-{host}", t * SECOND_NS, t * SECOND_NS, 1000, energy, 10_000 * t)

    name, t = f"w{number:04}", 60 + number % 7
    pending, sampled = [Segment(name, "load", read(0), read(t))], 0
    for shard_id in shard_ids:
        begin, attempt = t + IDLE_S, f"a{shard_id}"
        end = begin + SHARD_S + (SLOW_S if is_slow(shard_id) else 0)
        pending.append(Segment(name, "idle", read(t), read(begin)))
        pending.append(Segment(name, "shard", read(begin), read(end), shard_id, attempt))
        samples = tuple(
            PowerSample(s * SECOND_NS, s * SECOND_NS, watts * 1000, watts * 1000) for s in range(sampled, end)
        )
        yield Commit(
            *(shard_id, attempt, 1, name, f"node-{host}", host, gpu, "f" * 64, "a" * 64, (), "rows"),
            *(IMAGES_PER_SHARD, 0, {}, begin * SECOND_NS, end * SECOND_NS, None, domains, 300_000),
            *("nvml-counter+rapl", tuple(pending), (PowerTrace(gpu, f"boot-{host}", "nvml", samples),)),
        )
        pending, t, sampled = [], end, end


def image_rows(commit: Commit) -> pa.Table:
    """What the image table reads of a commit's row table."""
    n = range(commit.images_ok)
    return pa.table(
        {
            "prompt_id": [f"p{commit.shard_id}-{i}" for i in n],
            "image_index": pa.array([0] * len(n), pa.int32()),
            "status": ["ok"] * len(n),
            "sha256": [f"{commit.shard_id * IMAGES_PER_SHARD + i:064x}" for i in n],
        }
    )


def _manifest(images: int) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "prompt_id": [f"p{i}" for i in range(images)],
        "image_index": [0] * images,
        "prompt": ["a long prompt " * 40] * images,
        "seed": list(range(images)),
        "width": [PICTURE_PIXELS] * images,
        "height": [PICTURE_PIXELS] * images,
        "status": ["ok"] * images,
        "path": [f"data/{i % PICTURES}.png" for i in range(images)],
        "shard_id": [i // IMAGES_PER_SHARD for i in range(images)],
        "attempt_id": ["a"] * images,
        "energy_mj": [1000] * images,
    }
    arrays = [
        pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(images, f.type)
        for f in MANIFEST_SCHEMA
    ]
    return pa.table(arrays, schema=MANIFEST_SCHEMA)
