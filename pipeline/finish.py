"""What a finished job leaves for its readers: manifest, energy tables, stats, and `_SUCCESS` last.

Everything is computed from commits alone, so any driver that finds all shards committed writes the same content, and
a crash in the middle is mended by running again.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
import threading
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from millijoule.pipeline.apportionment import apportion
from millijoule.pipeline.closure import CHECKS
from millijoule.pipeline.commits import READ_THREADS, read_commits
from millijoule.pipeline.energy_tables import EnergyResult, write_energy_tables
from millijoule.pipeline.job import JobSpec
from millijoule.pipeline.layout import (
    MANIFEST_KEY,
    PREVIEW_KEY,
    STATS_KEY,
    SUCCESS_KEY,
)
from millijoule.pipeline.ledger import Ledger, build_ledger
from millijoule.pipeline.packed_segments import PackedSegments
from millijoule.pipeline.retry import JobShards
from millijoule.pipeline.uncommitted import Uncommitted, held_devices, read_uncommitted
from millijoule.workers.contact_sheet import draw_contact_sheet
from millijoule.workers.errors import InputError, StoreError
from millijoule.workers.lease import commit_key
from millijoule.workers.readers import read_images
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, Commit
from millijoule.workers.storage import Store

log = logging.getLogger(__name__)

#: One row per (prompt id, image index): what became of it and what it cost.
MANIFEST_SCHEMA = pa.schema(
    [
        *IMAGE_ROW_SCHEMA,
        pa.field("shard_id", pa.int64(), nullable=False),
        pa.field("attempt_id", pa.string(), nullable=False),
        pa.field("energy_mj", pa.int64(), metadata={b"unit": b"mJ", b"method": b"measured, direct"}),
        pa.field("energy_estimate_mj", pa.int64(), metadata={b"unit": b"mJ", b"method": b"modelled"}),
    ],
    metadata={b"millijoule.schema_version": b"1"},
)

#: How many kinds of error `stats.json` lists.
MAX_ERROR_KINDS = 50

#: Rows that are given their energy at a time: several small shards, each of which costs as much as many rows, but few
#: of their tables, which take 15 kB each however short they are.
MANIFEST_BLOCK_ROWS = 512

#: How many images `preview.png` shows.
PREVIEW_IMAGES = 32


@dataclass
class Totals:
    """Sums over all commits, for `stats.json` and the last line on the terminal."""

    shards: int = 0
    images_ok: int = 0
    images_quarantined: int = 0
    encoded_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    per_node: Counter[str] = field(default_factory=Counter)
    energy_methods: Counter[str] = field(default_factory=Counter)
    first_start_ns: int | None = None
    last_end_ns: int | None = None

    def add(self, commit: Commit, rows: pa.Table) -> None:
        self.shards += 1
        status = Counter(rows["status"].to_pylist())
        self.images_ok += status["ok"]
        self.images_quarantined += status["quarantined"]
        self.encoded_bytes += sum(v or 0 for v in rows["size_bytes"].to_pylist())
        self.errors.update(e for e in rows["error"].to_pylist() if e)
        self.warnings.update(w for words in rows["warnings"].to_pylist() for w in words or ())
        self.per_node[f"{commit.host}/{commit.device}"] += status["ok"]
        self.energy_methods[commit.energy_method] += status["ok"]
        self.first_start_ns = min(self.first_start_ns or commit.t_start_wall_ns, commit.t_start_wall_ns)
        self.last_end_ns = max(self.last_end_ns or 0, commit.t_end_wall_ns)


def finish_job(store: Store, job: JobSpec, shards: JobShards) -> dict[str, Any]:
    """Write manifest, `energy/`, `stats.json` and `_SUCCESS` of a job whose shards are all committed.

    Returns:
        The content of `stats.json`.
    """
    n_shards = len(shards)
    uncommitted = read_uncommitted(store)
    ledger = load_ledger(store, n_shards, uncommitted)
    totals = Totals()
    with tempfile.TemporaryDirectory(prefix="millijoule-") as scratch:
        path = Path(scratch, "manifest.parquet")
        with pq.ParquetWriter(path, MANIFEST_SCHEMA, compression="zstd") as writer:
            for table in merged(manifest_tables(store, shards, ledger, totals)):
                writer.write_table(table, row_group_size=max(1, table.num_rows))
        store.put_file(MANIFEST_KEY, path)
        energy = _write_energy(store, job, n_shards, ledger, uncommitted, ManifestRows(path))
    write_preview(store, shards)
    stats = summarise(job, totals, ledger, energy)
    _put_stats(store, stats)
    success = {"fingerprint": job.fingerprint, "shards": n_shards, "images_ok": totals.images_ok}
    store.put(SUCCESS_KEY, json.dumps(success, sort_keys=True).encode() + b"\n")
    return stats


def require_finished(store: Store) -> None:
    """Raise InputError where the job in `store` has not finished."""
    if not store.exists(SUCCESS_KEY) or not store.exists(STATS_KEY):
        raise InputError(
            f"{store.url}: the job has not finished; run the same `millijoule generate` again first"
        )


def close_again(store: Store, job: JobSpec, shards: JobShards) -> EnergyResult:
    """Write `energy/` of a finished job anew, and its verdicts into `stats.json`: readings of node meters came late."""
    uncommitted = read_uncommitted(store)
    ledger = load_ledger(store, len(shards), uncommitted)
    energy = _write_energy(store, job, len(shards), ledger, uncommitted)
    _put_stats(store, {**json.loads(store.get(STATS_KEY)), **_verdicts(energy)})
    return energy


def _write_energy(
    store: Store,
    job: JobSpec,
    n_shards: int,
    ledger: Ledger,
    uncommitted: Uncommitted,
    read_rows: Callable[[Commit], pa.Table] | None = None,
) -> EnergyResult:
    energy = write_energy_tables(
        store, job, ledger, lambda: read_commits(store, n_shards), read_rows, uncommitted=uncommitted
    )
    for row in energy.closure:
        if row.passed is False:
            log.warning("energy ledger: %s", row)
    for account in ledger.unclosed:
        log.warning("energy ledger: missing from then on: %s", account)
    return energy


def _put_stats(store: Store, stats: dict[str, Any]) -> None:
    store.put(STATS_KEY, json.dumps(stats, indent=2, ensure_ascii=False).encode() + b"\n")


def _verdicts(energy: EnergyResult) -> dict[str, Any]:
    """What `stats.json` says of the closure."""
    return {
        "evidence_class": energy.evidence_class,
        "closure": {check: energy.passed(check) for check in CHECKS},
    }


def manifest_tables(
    store: Store, shards: JobShards, ledger: Ledger, totals: Totals | None = None
) -> Iterator[pa.Table]:
    """The manifest in shard order, some shards at a time: `IMAGE_ROW_SCHEMA` plus energy, as `MANIFEST_SCHEMA`."""

    def load(commit: Commit) -> tuple[Commit, pa.Table]:
        return commit, read_rows(store, commit)

    held: list[tuple[Commit, pa.Table]] = []
    held_rows = 0
    with ThreadPoolExecutor(READ_THREADS) as threads:
        for block in _blocks(read_commits(store, len(shards)), 4 * READ_THREADS):
            for commit, rows in threads.map(load, block):
                rows = shards.keep_last_round(commit.shard_id, rows)
                if totals is not None:
                    totals.add(commit, rows)
                held.append((commit, rows))
                held_rows += rows.num_rows
                if held_rows >= MANIFEST_BLOCK_ROWS:
                    yield _with_energy(held, ledger)
                    held, held_rows = [], 0
    if held:
        yield _with_energy(held, ledger)


def write_preview(store: Store, shards: JobShards) -> None:
    """Write `preview.png`: the first images of the job with their prompts."""
    shown: list[tuple[Image.Image, str]] = []
    for commit in read_commits(store, len(shards)):
        rows = shards.keep_last_round(commit.shard_id, read_rows(store, commit)).to_pylist()
        ok = [row for row in rows if row["status"] == "ok"][: PREVIEW_IMAGES - len(shown)]
        for row, data in read_images(store, ok):
            if data is not None:
                shown.append((Image.open(io.BytesIO(data)), row["prompt"]))
        if len(shown) >= PREVIEW_IMAGES:
            break
    if shown:
        images, prompts = zip(*shown, strict=True)
        store.put(PREVIEW_KEY, draw_contact_sheet(images, prompts))


def read_rows(store: Store, commit: Commit) -> pa.Table:
    """The row table of a committed shard, `IMAGE_ROW_SCHEMA`."""
    with store.open_input(commit.rows_path) as source:
        # one thread: tables are small, and several of them are read at the same time
        rows = pq.ParquetFile(source).read(columns=IMAGE_ROW_SCHEMA.names, use_threads=False)
    rows = rows.select(IMAGE_ROW_SCHEMA.names)
    # a cast that changes nothing takes longer than reading a short table
    return rows if rows.schema.equals(IMAGE_ROW_SCHEMA) else rows.cast(IMAGE_ROW_SCHEMA)


def merged(tables: Iterator[pa.Table], rows: int = 65_536) -> Iterator[pa.Table]:
    """Concatenate small tables into ones of about `rows` rows, the row groups of the manifest."""
    held: list[pa.Table] = []
    held_rows = 0
    for table in tables:
        held.append(table)
        held_rows += table.num_rows
        if held_rows >= rows:
            yield pa.concat_tables(held)
            held, held_rows = [], 0
    if held:
        yield pa.concat_tables(held)


def load_ledger(store: Store, n_shards: int, uncommitted: Uncommitted | None = None) -> Ledger:
    """The energy ledger over all that commits, drivers and workers recorded; `uncommitted` where it was read."""
    uncommitted = uncommitted or read_uncommitted(store)
    segments = PackedSegments(uncommitted.segments)
    devices = held_devices(uncommitted.workers, ())
    winners: dict[int, str] = {}
    for commit in read_commits(store, n_shards):
        try:
            segments.extend(commit.segments)
        except (OverflowError, TypeError) as error:
            key = commit_key(commit.shard_id)
            raise StoreError(f"{store.url}/{key}: a segment has a number that is none: {error}") from error
        winners[commit.shard_id] = commit.attempt_id
        devices.setdefault(commit.worker_id, (commit.device,))
    return build_ledger(segments, winners, devices, uncommitted.workers, uncommitted.closings)


def summarise(job: JobSpec, totals: Totals, ledger: Ledger, tables: EnergyResult) -> dict[str, Any]:
    """The content of `stats.json`: counts, speed, and energy with its method; null where nothing was measured."""
    seconds = None
    if totals.first_start_ns is not None and totals.last_end_ns is not None:
        seconds = (totals.last_end_ns - totals.first_start_ns) / 1e9
    energy = ledger.summary()
    ok = totals.images_ok
    return {
        "fingerprint": job.fingerprint,
        "model": job.model_name,
        "model_sha256": job.model_sha256,
        "format": job.output_format,
        "shards": totals.shards,
        "images_ok": ok,
        "images_quarantined": totals.images_quarantined,
        "input_rows_rejected": job.bad_rows,
        "encoded_bytes": totals.encoded_bytes,
        "seconds_first_to_last_commit": seconds,
        "images_per_second": ok / seconds if seconds else None,
        "errors": dict(totals.errors.most_common(MAX_ERROR_KINDS)),
        "warnings": dict(totals.warnings.most_common(MAX_ERROR_KINDS)),
        "images_per_node": dict(sorted(totals.per_node.items())),
        "energy_methods": dict(sorted(totals.energy_methods.items())),
        "energy": energy,
        **_verdicts(tables),
        "direct_mj_per_image": _per_image(energy.get("shard_mj"), ok),
        "full_mj_per_image": _per_image(energy.get("total_mj"), ok),
        "direct_estimate_mj_per_image": _per_image(energy["estimate_mj"].get("shard"), ok),
        "full_estimate_mj_per_image": _per_image(energy.get("estimate_total_mj"), ok),
        "millijoule_version": job.millijoule_version,
    }


def _per_image(total_mj: int | None, images: int) -> float | None:
    return total_mj / images if total_mj is not None and images else None


def _with_energy(parts: Sequence[tuple[Commit, pa.Table]], ledger: Ledger) -> pa.Table:
    shard_ids: list[int] = []
    attempt_ids: list[str] = []
    measured: list[int | None] = []
    estimated: list[int | None] = []
    for commit, rows in parts:
        ok = [s == "ok" for s in rows["status"].to_pylist()]
        shard_ids += [commit.shard_id] * len(ok)
        attempt_ids += [commit.attempt_id] * len(ok)
        measured += _spread(ledger.shard_energy_mj(commit.shard_id, commit.attempt_id), ok)
        estimated += _spread(commit.energy_estimate_mj, ok)
    columns = [
        *pa.concat_tables(rows for _, rows in parts).combine_chunks().columns,
        pa.array(shard_ids, pa.int64()),
        pa.array(attempt_ids, pa.string()),
        pa.array(measured, pa.int64()),
        pa.array(estimated, pa.int64()),
    ]
    return pa.table(columns, schema=MANIFEST_SCHEMA)


class ManifestRows:
    """Gives the image table its rows from a manifest just written, so that no row table is opened twice.

    The manifest lacks images that a later round makes anew; those have no energy to be told of.

    Args:
        path: of the manifest, in shard order.
    """

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        self._first_shard: list[int] = []  # of each row group that is not empty
        self._number: list[int] = []
        for number in range(self._file.num_row_groups):
            shard_ids = self._file.read_row_group(number, columns=["shard_id"])["shard_id"]
            if len(shard_ids):
                self._first_shard.append(shard_ids[0].as_py())
                self._number.append(number)
        self._groups: dict[int, tuple[pa.Table, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __call__(self, commit: Commit) -> pa.Table:
        """The rows of a commit; callers ask in about the order of shards."""
        first = bisect_left(self._first_shard, commit.shard_id)
        last = bisect_right(self._first_shard, commit.shard_id)
        parts = []
        for number in self._number[max(first - 1, 0) : last]:
            rows, shard_ids = self._group(number)
            begin, end = np.searchsorted(shard_ids, (commit.shard_id, commit.shard_id + 1))
            parts.append(rows.slice(begin, end - begin))
        if not parts:
            return MANIFEST_SCHEMA.empty_table()
        return pa.concat_tables(parts)

    def _group(self, number: int) -> tuple[pa.Table, np.ndarray]:
        with self._lock:
            if number not in self._groups:
                rows = self._file.read_row_group(
                    number, columns=["shard_id", "prompt_id", "image_index", "status", "sha256"]
                )
                self._groups[number] = rows, rows["shard_id"].to_numpy()
                for old in [n for n in self._groups if n < number - 1]:  # few callers are that far behind
                    del self._groups[old]
            return self._groups[number]


def _spread(total_mj: int | None, ok: list[bool]) -> list[int | None]:
    """Equal shares for the images of a shard; they cost the same, so equal is also the Shapley value."""
    if total_mj is None or not any(ok):
        return [None] * len(ok)
    shares = iter(apportion(total_mj, [1] * sum(ok)))
    return [next(shares) if good else None for good in ok]


def _blocks(items: Iterator[Commit], size: int) -> Iterator[list[Commit]]:
    block: list[Commit] = []
    for item in items:
        block.append(item)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
