"""Segments, commits and jobs as short expressions, for tests of the ledger and its tables."""

from __future__ import annotations

from itertools import pairwise

import pyarrow as pa

from millijoule.pipeline.output.job import JobSpec
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, Commit, CounterRead, ImageRequest, ImageRow, Segment

SECOND = 1_000_000_000
GPU = "gpu:GPU-1"

JOB = JobSpec(
    fingerprint="0123456789abcdef" * 4,
    model="plain",
    model_name="plain",
    model_sha256="a" * 64,
    job_seed=0,
    images_per_prompt=1,
    output_format="parquet",
    shard_size=8,
    duplicate_ids="error",
    prompts=("prompts.txt",),
    rows=8,
    images=8,
    shards=1,
    bad_rows=0,
    created_unix=0.0,
    millijoule_version="0",
)


def read(t, mj=None, *, epoch=0, boot="boot", estimate=None, **more):
    """A read at second `t`; `mj` of the GPU, more domains by keyword."""
    energy = ({} if mj is None else {GPU: mj}) | more
    return CounterRead(boot, int(t * SECOND), int(t * SECOND), 1000, energy, estimate, epoch)


def segment(open_, close, kind="shard", worker="w1", shard=1, attempt="a1"):
    if kind in ("load", "warmup", "idle", "gap"):
        shard = attempt = None
    return Segment(worker, kind, open_, close, shard, attempt)


def chain(reads, kinds, worker="w1", shard=1):
    """Segments of the given kinds between consecutive reads."""
    pairs = pairwise(reads)
    return [segment(a, b, kind, worker, shard) for (a, b), kind in zip(pairs, kinds, strict=True)]


def commit(shard, attempt, images_ok, segments=(), *, estimate=None, worker="w1", rows_path="rows", **more):
    fields = {
        "shard_id": shard,
        "attempt_id": attempt,
        "driver_epoch": 1,
        "worker_id": worker,
        "node_id": "n1",
        "host": "h1",
        "device": "GPU-1",
        "plan_fingerprint": JOB.fingerprint,
        "model_sha256": JOB.model_sha256,
        "files": (),
        "rows_path": rows_path,
        "images_ok": images_ok,
        "images_quarantined": 1,
        "errors": {"bad": 1},
        "t_start_wall_ns": 1,
        "t_end_wall_ns": 2,
        "energy_mj": None,
        "energy_domains": (GPU,),
        "energy_estimate_mj": estimate,
        "energy_method": "nvml-counter",
        "segments": tuple(segments),
    }
    return Commit(**(fields | more))


def shard_mj(ledger, shard_id, attempt_id):
    """Direct energy of one attempt's shard, all domains; None where it was not measured in full."""
    mine = [
        e.total_mj
        for e in ledger.entries
        if e.segment_class == "shard" and (e.segment.shard_id, e.segment.attempt_id) == (shard_id, attempt_id)
    ]
    return sum(mine) if mine and None not in mine else None


def image_rows(commit):
    """The row table of a commit: its ok images, its filtered and its quarantined ones."""
    rows = [
        ImageRow(ImageRequest(f"p{commit.shard_id}-{i}", 0, "x", 1), "ok", 8, 8, sha256=f"{i:064x}")
        for i in range(commit.images_ok)
    ]
    rows += [
        ImageRow(ImageRequest(f"p{commit.shard_id}-hid{i}", 0, "x", 1), "filtered", 8, 8, error="hidden")
        for i in range(commit.images_filtered)
    ]
    drawn = (commit.images_drawn or 0) - len(rows)
    rows += [
        ImageRow(
            ImageRequest(f"p{commit.shard_id}-bad{i}", 0, "x", 1),
            "quarantined",
            8 if i < drawn else None,
            8 if i < drawn else None,
            error="bad",
        )
        for i in range(commit.images_quarantined)
    ]
    return pa.Table.from_pylist([r.as_record() for r in rows], schema=IMAGE_ROW_SCHEMA)
