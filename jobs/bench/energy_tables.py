"""`millijoule bench energy-tables [RESULT.json]`: size and speed of the energy tables.

At 64 GPUs read ten times a second for an hour: 2.3 million counter rows.

The rows are made up (a power that wanders with noise, reads that come 50 us late or, one in a hundred, up to 5 ms,
a sensor that counts every 100 ms by its own clock); files, encoding and
queries are the product's own. What is timed: writing, the energy per node from raw reads, and the energy per shard by
joining 38,400 shards to the reads before their beginning and end. Needs the extra `report`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro

from millijoule.jobs.entry import COMPLETE, run_command
from millijoule.jobs.environment import environment
from millijoule.pipeline.energy.rows import DAY_NS, LATENCY_STEP_NS, WALL_STEP_NS, DayBlock
from millijoule.pipeline.energy.schemas import ENERGY_SCHEMAS, ROW_GROUP_ROWS, run_id_of
from millijoule.pipeline.energy.tables import table_row_groups, write_row_groups
from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.sql.query import open_tables, run_query
from millijoule.workers.layout import JOB_KEY
from millijoule.workers.storage.local import LocalStore
from millijoule.workers.storage.open import open_store

START_NS = 1_760_000_400_000_000_000  # an hour within one UTC day
SHARD_SECONDS = 6

PER_NODE = """
SELECT host, sum(used)::BIGINT AS energy_mj
FROM (SELECT worker_id, domain, max(energy_mj) - min(energy_mj) AS used FROM counter GROUP BY ALL)
JOIN (SELECT worker_id, any_value(host) AS host FROM env GROUP BY ALL) USING (worker_id)
GROUP BY host ORDER BY host
"""

PER_SHARD = """
WITH shard AS (
    SELECT worker_id, shard_id, t_open_mono_ns, t_close_mono_ns FROM segment WHERE segment_class = 'shard'
), opened AS (
    SELECT shard.*, counter.energy_mj AS open_mj
    FROM shard ASOF JOIN counter ON shard.worker_id = counter.worker_id AND t_open_mono_ns >= counter.t_mono_ns
)
SELECT count(*) AS shards, sum(counter.energy_mj - open_mj)::BIGINT AS energy_mj
FROM opened ASOF JOIN counter ON opened.worker_id = counter.worker_id AND t_close_mono_ns >= counter.t_mono_ns
"""


@dataclass(frozen=True)
class BenchOptions:
    """Measure size and query speed of the energy tables on made-up rows of 64 GPUs."""

    result: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RESULT.json")] = None
    """Where the figures are saved."""

    nodes: int = 8
    gpus_per_node: int = 8
    reads_per_second: int = 10
    seconds: int = 3600
    threads: int = 2
    """Threads DuckDB may use."""

    repeats: int = 5
    """Each query runs this often."""


def counter_blocks(options: BenchOptions, seed: int = 0) -> Iterator[DayBlock]:
    """Reads of all GPUs in order of time, as the ledger gives them, in blocks of a row group."""
    rng = np.random.default_rng(seed)
    gpus = options.nodes * options.gpus_per_node
    n = options.seconds * options.reads_per_second
    period_ns = 1_000_000_000 // options.reads_per_second
    late_ns = np.abs(rng.normal(0, 50_000, (n, gpus)))  # how late a sleeping thread wakes up
    late_ns += rng.integers(0, 5_000_000, (n, gpus)) * (
        rng.random((n, gpus)) < 0.01
    )  # and now and then does not
    mono = (
        np.arange(n)[:, None] * period_ns
        + np.arange(gpus) * 1000
        + late_ns.astype(np.int64)
        + 3_000_000_000_000
    )
    # The sensor counts every 100 ms by a clock of its own, and its timestamps are microseconds.
    sensor_ns = (100_000_000 * (1 + rng.normal(0, 20e-6, gpus))).astype(np.int64)
    phase = rng.integers(0, 100_000_000, gpus)
    latency = 400_000 + (mono - phase) % sensor_ns // 1000 * 1000 + rng.integers(0, 1000, (n, gpus))
    watts = 500 + 100 * np.sin(np.arange(n)[:, None] / 700 + np.arange(gpus)) + rng.normal(0, 15, (n, gpus))
    energy = 10_000_000 + np.cumsum((watts * period_ns / 1e6).astype(np.int64), axis=0)
    wall = mono - 3_000_000_000_000 + START_NS + rng.integers(-40, 40, (n, gpus))
    wall -= wall % WALL_STEP_NS
    latency += -latency % LATENCY_STEP_NS
    names = [(g, f"gpu:GPU-{g:08x}-0000-4000-8000-{g * 7919:012x}") for g in range(gpus)]
    workers = pa.array([f"e000001-w{g:04d}" for g, _ in names]), pa.array([d for _, d in names])
    boots = pa.array([f"{g // options.gpus_per_node:08d}-1111-4222-8333-444444444444" for g, _ in names])
    gpu = np.tile(np.arange(gpus, dtype=np.int32), n)
    for start in range(0, n * gpus, ROW_GROUP_ROWS):
        part = slice(start, start + ROW_GROUP_ROWS)
        which = pa.array(gpu[part])
        columns = [
            *(workers[0].take(which), boots.take(which), pa.array(np.zeros(len(which), np.int32))),
            *(
                workers[1].take(which),
                *(pa.array(v.reshape(-1)[part]) for v in (mono, wall, latency, energy)),
            ),
        ]
        yield START_NS // DAY_NS, pa.table(columns, schema=ENERGY_SCHEMAS["counter"])


def _rows(name: str, **values: Any) -> pa.Table:
    """A table with some columns given and the others null, or empty text or 0 where null is not allowed."""
    n = len(next(iter(values.values())))
    columns = []
    for f in ENERGY_SCHEMAS[name]:
        filler = None if f.nullable else "" if pa.types.is_string(f.type) else 0
        columns.append(pa.array(values.get(f.name, [filler] * n), f.type))
    return pa.table(columns, schema=ENERGY_SCHEMAS[name])


def write_tables(store: LocalStore, options: BenchOptions) -> dict[str, float]:
    """Write counter, segment and env of the made-up job, and the other tables empty; seconds and bytes."""
    job = JobSpec(
        *("b" * 64, "none", "none", "0" * 64, 0, 1, "parquet", 1, "error"),
        *((), 0, 0, 0, 0, START_NS / 1e9, "bench"),
    )
    store.put(JOB_KEY, job.to_json())
    run_id, day = run_id_of(job.fingerprint), START_NS // DAY_NS
    gpus = range(options.nodes * options.gpus_per_node)
    workers = [f"e000001-w{g:04d}" for g in gpus]
    env = _rows("env", worker_id=workers, host=[f"node-{g // options.gpus_per_node}" for g in gpus])
    shards = [(w, at) for at in range(0, options.seconds, SHARD_SECONDS) for w in workers]
    opened = np.array([at for _, at in shards]) * 1_000_000_000 + 3_000_001_000_000
    segment = _rows(
        "segment",
        segment_id=range(len(shards)),
        shard_id=range(len(shards)),
        worker_id=[w for w, _ in shards],
        segment_class=["shard"] * len(shards),
        t_open_mono_ns=opened,
        t_close_mono_ns=opened + SHARD_SECONDS * 1_000_000_000,
        t_open_wall_ns=opened - 3_000_000_000_000 + START_NS,
    )
    made = list(counter_blocks(options))
    began = time.perf_counter()
    keys = write_row_groups(store, table_row_groups("counter", run_id, iter(made), day))
    seconds = time.perf_counter() - began
    given = {"env": env, "segment": segment}
    for name in ENERGY_SCHEMAS:
        if name != "counter":
            blocks = iter([(day, given[name])] if name in given else [])
            write_row_groups(store, table_row_groups(name, run_id, blocks, day))
    rows, size = sum(t.num_rows for _, t in made), sum(store.size(k) for k in keys)
    return {
        "counter_rows": rows,
        "counter_bytes": size,
        "bytes_per_row": size / rows,
        "write_seconds": seconds,
        "shards": len(shards),
    }


def timed(store: LocalStore, sql: str, options: BenchOptions) -> dict[str, Any]:
    """Seconds of each run of `sql`, the tables opened before; and its last rows."""
    seconds = []
    with open_tables([store], options.threads) as connection:
        for _ in range(options.repeats):
            began = time.perf_counter()
            rows = run_query(connection, sql, {})
            seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds,
        "best_s": min(seconds),
        "median_s": statistics.median(seconds),
        "rows": rows.to_pylist(),
    }


def run(options: BenchOptions) -> int:
    import duckdb

    pa.set_cpu_count(options.threads)
    with tempfile.TemporaryDirectory(prefix="millijoule-bench-") as folder:
        store = open_store(folder)
        assert isinstance(store, LocalStore)
        result: dict[str, Any] = {
            "nodes": options.nodes,
            "gpus": options.nodes * options.gpus_per_node,
            "reads_per_second": options.reads_per_second,
            "seconds": options.seconds,
            "threads": options.threads,
            **write_tables(store, options),
            "per_node_sum": timed(store, PER_NODE, options),
            "shard_join": timed(store, PER_SHARD, options),
            "environment": {**environment(), "duckdb": duckdb.__version__},
        }
    text = json.dumps(result, indent=2) + "\n"
    if options.result is not None:
        Path(options.result).write_text(text)
    print(
        f"counter rows: {result['counter_rows']}, {result['bytes_per_row']:.2f} bytes each, "
        f"written in {result['write_seconds']:.2f} s\n"
        f"energy per node: {result['per_node_sum']['best_s']:.3f} s "
        f"(median {result['per_node_sum']['median_s']:.3f} s)\n"
        f"{result['shards']} shards joined: {result['shard_join']['best_s']:.2f} s "
        f"(median {result['shard_join']['median_s']:.2f} s); DuckDB threads: {options.threads}"
    )
    return COMPLETE


def main(argv: list[str] | None = None) -> int:
    return run_command("bench energy-tables", BenchOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
