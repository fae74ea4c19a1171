"""A report of 100,000 images: the page stays below 2 MB and is there within ten seconds."""

import io
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.ledgers import JOB, SECOND, commit, image_rows, segment

from millijoule.pipeline.energy_tables import write_energy_tables
from millijoule.pipeline.finish import MANIFEST_SCHEMA, Totals, summarise
from millijoule.pipeline.job import publish_job
from millijoule.pipeline.ledger import build_ledger
from millijoule.workers.schemas import CounterRead, PowerSample, PowerTrace
from millijoule.workers.storage import open_store

HOSTS, GPUS_PER_HOST, IMAGES_PER_SHARD, IMAGES = 8, 8, 16, 100_000
SHARDS = IMAGES // IMAGES_PER_SHARD
SHARD_S, IDLE_S = 30, 1
MAX_PAGE_BYTES, MAX_SECONDS = 2_000_000, 10.0


def worker_commits(number: int, shard_ids: range):
    """The commits of one worker: load, then shards with a pause before each, read at every change."""
    host = f"host-{number // GPUS_PER_HOST}"
    gpu = f"GPU-{number:08d}-aaaa-bbbb-cccc-0123456789ab"
    watts = 400 + 4 * number

    def read(t):
        energy = {f"gpu:{gpu}": 10**9 + watts * 1000 * t, "cpu:package-0": 10**9 + 200_000 * t}
        return CounterRead(f"boot-{host}", t * SECOND, t * SECOND, 1000, energy, 10_000 * t)

    name, t = f"w{number:04}", 60 + number % 7
    pending = [segment(read(0), read(t), "load", name)]
    for shard_id in shard_ids:
        begin, attempt = t + IDLE_S, f"a{shard_id}"
        end = begin + SHARD_S + (60 if shard_id % 500 == 0 else 0)
        pending.append(segment(read(t), read(begin), "idle", name))
        pending.append(segment(read(begin), read(end), "shard", name, shard_id, attempt))
        samples = tuple(
            PowerSample(s * SECOND, s * SECOND, watts * 1000, watts * 1000) for s in range(t, end)
        )
        made = commit(shard_id, attempt, IMAGES_PER_SHARD, pending, estimate=300_000, worker=name, host=host)
        yield replace(
            made,
            device=gpu,
            images_quarantined=0,
            errors={},
            t_start_wall_ns=begin * SECOND,
            t_end_wall_ns=end * SECOND,
            energy_domains=(f"gpu:{gpu}", "cpu:package-0"),
            power=(PowerTrace(gpu, f"boot-{host}", "nvml", samples),),
        )
        pending, t = [], end


def write_large_output(store) -> None:
    job = publish_job(store, replace(JOB, images=IMAGES, rows=IMAGES, shards=SHARDS))
    workers = HOSTS * GPUS_PER_HOST
    commits = [c for n in range(workers) for c in worker_commits(n, range(n, SHARDS, workers))]
    commits.sort(key=lambda c: c.shard_id)
    ledger = build_ledger(s for c in commits for s in c.segments)
    result = write_energy_tables(store, job, ledger, lambda: commits, image_rows)
    totals = Totals(
        shards=SHARDS,
        images_ok=IMAGES,
        energy_methods=Counter({"nvml-counter+rapl": IMAGES}),
        first_start_ns=min(c.t_start_wall_ns for c in commits),
        last_end_ns=max(c.t_end_wall_ns for c in commits),
    )
    store.put("stats.json", json.dumps(summarise(job, totals, ledger, result)).encode())
    noise = np.random.default_rng(0)
    for i in range(32):  # what compresses worst
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (512, 512, 3), np.uint8)).save(buffer, "PNG", compress_level=0)
        store.put(f"data/{i}.png", buffer.getvalue())
    columns = {
        "prompt_id": [f"p{i}" for i in range(IMAGES)],
        "image_index": [0] * IMAGES,
        "prompt": ["a long prompt " * 40] * IMAGES,
        "seed": list(range(IMAGES)),
        "width": [512] * IMAGES,
        "height": [512] * IMAGES,
        "status": ["ok"] * IMAGES,
        "path": [f"data/{i}.png" for i in range(IMAGES)],
        "shard_id": [i // IMAGES_PER_SHARD for i in range(IMAGES)],
        "attempt_id": ["a"] * IMAGES,
        "energy_mj": [1000] * IMAGES,
    }
    table = pa.table(
        [
            pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(IMAGES, f.type)
            for f in MANIFEST_SCHEMA
        ],
        schema=MANIFEST_SCHEMA,
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    store.put("manifest.parquet", sink.getvalue())


@pytest.mark.slow
def test_a_hundred_thousand_images_make_a_small_page_quickly(tmp_path):
    store = open_store(str(tmp_path / "out"))
    write_large_output(store)
    began = time.monotonic()
    options = ["--json", str(tmp_path / "report.json"), "--gco2-per-kwh", "400"]
    done = subprocess.run(
        [sys.executable, "-m", "millijoule.jobs.report", store.url, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    took_s = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    size = store.size("report.html")
    (job,) = json.loads((tmp_path / "report.json").read_text())["jobs"]
    print(
        f"{took_s:.2f} s, {size / 1e6:.3f} MB, {(tmp_path / 'report.json').stat().st_size / 1e6:.3f} MB of JSON"
    )
    assert job["images_ok"] == IMAGES
    assert job["evidence_class"] == "E2"
    assert len(job["devices"]) == HOSTS * GPUS_PER_HOST
    assert sum(row["images"] for row in job["devices"]) == IMAGES
    assert job["speed"]["stragglers"] == len([s for s in range(SHARDS) if s % 500 == 0])
    watts = job["timeline"]["power"][0]["watts"]
    assert job["timeline"]["power"][0]["source"] == "power reading"
    assert min(w for w in watts[:150] if w is not None) >= 400
    assert all(sample["picture"] for sample in job["samples"])
    assert size < MAX_PAGE_BYTES
    assert took_s < MAX_SECONDS
