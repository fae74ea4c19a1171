"""Whether a bundle's rows come from the run that was registered: every scheduled block once, in order, whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from millijoule.pipeline.comparison.registration import (
    ARMS,
    UNSCHEDULED_KINDS,
    Registration,
    schedule,
)
from millijoule.pipeline.comparison.rows import Rows, encode_images, reads_by_block, split_by_block
from millijoule.workers.schemas import CounterRead

#: A wall clock may be set while the monotonic one runs on: how far both may differ over a block.
MAX_CLOCK_DRIFT_NS = 2_000_000_000


@dataclass(frozen=True)
class StatedModel:
    sha256: str


@dataclass(frozen=True)
class StatedEnvironment:
    """What of `environment.json` the registration fixes; the rest of it is for readers."""

    device: str
    judge_sha256: str
    models: dict[str, StatedModel]


def check_protocol(registration: Registration, rows: Rows, environment: StatedEnvironment) -> Iterator[str]:
    """Yield every departure of rows and environment from the registration."""
    blocks = sorted(rows.blocks.to_pylist(), key=lambda b: b["ordinal"])
    reads = reads_by_block(rows.reads)
    yield from _check_environment(registration, environment)
    yield from _check_schedule(registration, blocks)
    yield from _check_read_indices(rows, {b["block_id"] for b in blocks})
    images = encode_images(rows.images)
    by_block = split_by_block(images.block, images.request, len(images.block_ids))
    drawn = dict(zip(images.block_ids, by_block, strict=False))
    n = len(registration.requests)
    position = dict.fromkeys(ARMS, 0)
    last: CounterRead | None = None
    for block in blocks:
        name = f"block {block['block_id']}"
        chain, requests = (
            reads.get(block["block_id"], []),
            drawn.pop(block["block_id"], np.zeros(0, np.int64)),
        )
        if block["registration_sha256"] != registration.sha256:
            yield f"{name}: of another registration"
        yield from _check_chain(name, registration, block, chain, last)
        if chain:
            last = chain[-1]
        if block["arm"] not in ARMS:
            if len(requests):
                yield f"{name}: images of no arm"
            continue
        first = position[block["arm"]] % n
        expected = (first + np.arange(len(requests))) % n
        if block["first_request"] != first or (requests != expected).any():
            yield f"{name}: its images do not go on where the arm's last block ended"
        if not len(requests) or len(requests) % registration.arm(block["arm"]).batch_size:
            yield f"{name}: {len(requests)} images are not whole batches"
        position[block["arm"]] += len(requests)
    for block_id in sorted(drawn):
        yield f"block {block_id!r}: images without a block"


def _check_environment(registration: Registration, stated: StatedEnvironment) -> Iterator[str]:
    for arm in ARMS:
        wanted, model = registration.arm(arm), stated.models.get(arm)
        if model is None or model.sha256 != wanted.sha256:
            yield f"environment.json: model {arm} is not the registered {wanted.sha256}"
    if stated.device != registration.device:
        yield f"environment.json: the device is not the registered {registration.device!r}"
    if stated.judge_sha256 != registration.gate.judge_sha256:
        yield "environment.json: the judge is not the registered one"


def _check_schedule(registration: Registration, blocks: list[dict[str, Any]]) -> Iterator[str]:
    if [b["ordinal"] for b in blocks] != list(range(len(blocks))):
        yield "blocks.parquet: ordinals are not 0, 1, 2, ..."
    if len({b["block_id"] for b in blocks}) != len(blocks):
        yield "blocks.parquet: a block stands there twice"
    if any(a["session"] > b["session"] for a, b in pairwise(blocks)):
        yield "blocks.parquet: sessions are out of order"
    columns = ("block_id", "kind", "arm", "side", "telemetry", "quadruple")
    found = [tuple(b[c] for c in columns) for b in blocks if b["kind"] not in UNSCHEDULED_KINDS]
    wanted = [tuple(getattr(b, c) for c in columns) for b in schedule(registration)]
    if found != wanted:
        differing = next(
            (i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]),
            min(len(found), len(wanted)),
        )
        yield (
            f"blocks.parquet: {len(found)} scheduled blocks, {len(wanted)} registered; they differ from "
            f"number {differing} on"
        )


def _check_read_indices(rows: Rows, known: set[str]) -> Iterator[str]:
    found: dict[str, list[int]] = {}
    for block_id, index in zip(
        rows.reads["block_id"].to_pylist(), rows.reads["read_index"].to_pylist(), strict=True
    ):
        found.setdefault(block_id, []).append(index)
    for block_id, indices in sorted(found.items()):
        if block_id not in known:
            yield f"reads.parquet: block {block_id!r} is not in blocks.parquet"
        if sorted(indices) != list(range(len(indices))):
            yield f"reads.parquet: block {block_id!r}: reads are missing or double"


def _check_chain(
    name: str,
    registration: Registration,
    block: Mapping[str, Any],
    chain: list[CounterRead],
    last: CounterRead | None,
) -> Iterator[str]:
    """Times and counters of a block's reads; `last` is the read that closed the block before."""
    if len(chain) < 2:
        yield f"{name}: fewer than two reads"
        return
    if any(r.t_wall_ns <= registration.registered_wall_ns for r in chain):
        yield f"{name}: read before the registration"
    if any(r.latency_ns < 0 for r in chain):
        yield f"{name}: a read took less than no time"
    if not block["telemetry"] and len(chain) != 2:
        yield f"{name}: telemetry was off, yet it has {len(chain)} reads"
    before = [last] if last is not None else []
    for a, b in pairwise([*before, *chain]):
        if a.boot_id != b.boot_id:
            if a is not last:
                yield f"{name}: the machine was started again within it"
            if a.t_wall_ns >= b.t_wall_ns:
                yield f"{name}: its reads go back in time"
            continue
        if a.t_mono_ns >= b.t_mono_ns:
            yield f"{name}: its reads go back in time"
        if a.epoch == b.epoch and any(b.energy_mj.get(d, mj) < mj for d, mj in a.energy_mj.items()):
            yield f"{name}: a counter goes back"
    for read in chain:
        if len(read.energy_mj) and min(read.energy_mj.values()) < 0:
            yield f"{name}: a counter below 0"
    seconds = (chain[-1].t_mono_ns - chain[0].t_mono_ns) / 1e9
    least = registration.design.block_seconds
    if block["kind"] not in UNSCHEDULED_KINDS and seconds < least:
        yield f"{name}: {seconds:.1f} s are less than the registered {least:g} s"
    wall_ns = chain[-1].t_wall_ns - chain[0].t_wall_ns
    if abs(wall_ns - (chain[-1].t_mono_ns - chain[0].t_mono_ns)) > MAX_CLOCK_DRIFT_NS:
        yield f"{name}: wall and monotonic clock differ"
