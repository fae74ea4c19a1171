"""What a finished job leaves for its readers: manifest, energy tables, stats, and `_SUCCESS` last.

Everything is computed from commits alone, so any driver that finds all shards committed writes the same content, and
a crash in the middle is mended by running again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from millijoule.pipeline.closing.lean_memory import lean_memory
from millijoule.pipeline.closing.pool_counts import count_pools
from millijoule.pipeline.closing.warning_kinds import WarningCounts
from millijoule.pipeline.energy.closure import CHECKS
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.counter_split import MISSING, sum_or_none
from millijoule.pipeline.energy.ledger import Ledger, build_ledger
from millijoule.pipeline.energy.packed_segments import PackedSegments
from millijoule.pipeline.energy.rows import ROW_COLUMNS, ImageSource, commit_blocks, row_tables
from millijoule.pipeline.energy.shard_shares import ShardShares, equal_shares
from millijoule.pipeline.energy.tables import EnergyResult, write_energy_tables
from millijoule.pipeline.energy.uncommitted import Uncommitted, held_devices, read_uncommitted
from millijoule.pipeline.output.commits import parsing_commit, read_commits
from millijoule.pipeline.output.image_rows import RowReader
from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.output.read_objects import OnDamage
from millijoule.pipeline.planning.retry_rounds import JobShards
from millijoule.workers.images.readers import open_small, read_images_to_show
from millijoule.workers.judging.contact_sheet import draw_contact_sheet
from millijoule.workers.layout import MANIFEST_KEY, PREVIEW_KEY, STATS_KEY, SUCCESS_KEY
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, STATUSES, Commit
from millijoule.workers.scratch import scratch_folder
from millijoule.workers.storage.protocol import Store

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

#: Rows of a row group of the manifest.
MANIFEST_GROUP_ROWS = 65_536

#: Rows of the manifest that are looked at together.
MANIFEST_BATCH_ROWS = 16_384

#: How many images `preview.png` shows.
PREVIEW_IMAGES = 32


@dataclass
class Totals:
    """Sums over all commits, for `stats.json` and the last line on the terminal."""

    shards: int = 0
    images_ok: int = 0
    images_filtered: int = 0
    images_quarantined: int = 0
    encoded_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    filter_reasons: Counter[str] = field(default_factory=Counter)
    warnings: WarningCounts = field(default_factory=WarningCounts)
    per_node: Counter[str] = field(default_factory=Counter)
    energy_methods: Counter[str] = field(default_factory=Counter)
    first_start_ns: int | None = None
    last_end_ns: int | None = None

    def add(self, commits: CommitTable, numbers: range, commit: np.ndarray, rows: pa.Table) -> None:
        """Add the rows of the commits `numbers`; `commit` is the number of each row's commit."""
        part = slice(numbers.start, numbers.stop)
        status = rows["status"].combine_chunks()
        ok = pc.equal(status, "ok").to_numpy(zero_copy_only=False)
        made = np.bincount(commit[ok] - numbers.start, minlength=len(numbers))
        self.shards += len(numbers)
        self.images_ok += int(ok.sum())
        filtered = pc.equal(status, "filtered")
        self.images_filtered += pc.sum(filtered).as_py() or 0
        self.images_quarantined += pc.sum(pc.equal(status, "quarantined")).as_py() or 0
        self.encoded_bytes += pc.sum(rows["size_bytes"]).as_py() or 0
        for reasons, of_which in ((self.errors, pc.invert(filtered)), (self.filter_reasons, filtered)):
            reasons.update(e for e in rows["error"].filter(of_which).drop_null().to_pylist() if e)
        self.warnings.add(rows["warnings"])
        codes = [commits.name_codes(name)[part] for name in ("host", "device", "energy_method")]
        kinds, kind = np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)
        images = np.bincount(kind.ravel(), weights=made).astype(int).tolist()
        for named, n in zip(kinds.tolist(), images, strict=True):
            host, device, method = (commits.names[code] for code in named)
            self.per_node[f"{host}/{device}"] += n
            self.energy_methods[method] += n
        started = int(commits.number("t_start_wall_ns")[part].min())
        self.first_start_ns = min(self.first_start_ns or started, started)
        self.last_end_ns = max(self.last_end_ns or 0, int(commits.number("t_end_wall_ns")[part].max()))


@dataclass(frozen=True)
class JobRecords:
    """All that a job recorded, read and parsed once: its commits in shard order, and the ledger over all segments."""

    commits: CommitTable
    ledger: Ledger
    uncommitted: Uncommitted


class RecordReader:
    """Takes commits one by one and makes `JobRecords` of them.

    Args:
        on_damage: called with what is wrong with a record besides the commits; without it that is an error.
    """

    def __init__(self, store: Store, on_damage: OnDamage | None = None) -> None:
        self._store = store
        self._uncommitted = read_uncommitted(store, on_damage)
        self._commits = CommitTable()
        self._segments = PackedSegments(self._uncommitted.segments)

    def add(self, commit: Commit) -> None:
        """Take a commit, in shard order.

        Raises:
            DamagedError: its numbers fit no column; the message names the object.
        """
        with parsing_commit(self._store, commit.shard_id):
            self._segments.extend(commit.segments)
            self._commits.add(commit)

    def records(self) -> JobRecords:
        """Of all commits: no more can be added."""
        uncommitted, commits = self._uncommitted, self._commits
        devices = held_devices(uncommitted.workers, commits.first_of_each("worker_id"))
        ledger = build_ledger(
            self._segments, commits.attempts(), devices, uncommitted.workers, uncommitted.closings
        )
        return JobRecords(commits, ledger, uncommitted)


def load_records(store: Store, n_shards: int) -> JobRecords:
    """Read what commits, drivers and workers recorded."""
    reader = RecordReader(store)
    for commit in read_commits(store, n_shards):
        reader.add(commit)
    return reader.records()


@lean_memory()
def finish_job(store: Store, job: JobSpec, shards: JobShards) -> dict[str, Any]:
    """Write manifest, `energy/`, `stats.json` and `_SUCCESS` of a job whose shards are all committed.

    Returns:
        The content of `stats.json`.
    """
    records, totals = load_records(store, len(shards)), Totals()
    with scratch_folder() as scratch:
        path = Path(scratch, "manifest.parquet")
        with pq.ParquetWriter(path, MANIFEST_SCHEMA, compression="zstd") as writer:
            rows = RowReader(manifest_tables(store, shards, records, totals), MANIFEST_SCHEMA)
            while (group := rows.take(MANIFEST_GROUP_ROWS)).num_rows:
                writer.write_table(group, row_group_size=MANIFEST_GROUP_ROWS)
        store.put_file(MANIFEST_KEY, path)
        energy = _write_energy(store, job, records, ManifestRows(pq.ParquetFile(path)))
        write_preview(store, pq.ParquetFile(path))
    stats = summarise(job, totals, records.ledger, records.commits, energy)
    if pools := count_pools(records.commits, records.uncommitted.workers, records.ledger.entries):
        stats["pools"] = pools
    _put_stats(store, stats)
    success = success_record(job, shards, totals)
    store.put(SUCCESS_KEY, json.dumps(success, sort_keys=True).encode() + b"\n")
    return stats


def success_record(job: JobSpec, shards: JobShards, totals: Totals) -> dict[str, Any]:
    """The content of `_SUCCESS`."""
    counts = {f"images_{status}": getattr(totals, f"images_{status}") for status in STATUSES}
    return {"fingerprint": job.fingerprint, "shards": len(shards), **counts}


def close_again(store: Store, job: JobSpec, records: JobRecords) -> EnergyResult:
    """Write `energy/` of a finished job anew, and its verdicts into `stats.json`: readings of node meters came late."""
    energy = _write_energy(store, job, records)
    _put_stats(store, {**json.loads(store.get(STATS_KEY)), **_verdicts(energy)})
    return energy


def _write_energy(
    store: Store, job: JobSpec, records: JobRecords, images: ImageSource | None = None
) -> EnergyResult:
    ledger, commits = records.ledger, records.commits
    energy = write_energy_tables(store, job, ledger, commits, images, records.uncommitted)
    for row in energy.closure:
        if row.passed is False:
            log.warning("energy ledger: %s", row)
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
    store: Store, shards: JobShards, records: JobRecords, totals: Totals | None = None
) -> Iterator[pa.Table]:
    """The manifest in shard order, some shards at a time: `IMAGE_ROW_SCHEMA` plus energy, as `MANIFEST_SCHEMA`."""
    commits = records.commits
    shard_ids, attempt_ids = commits.number("shard_id"), commits.text("attempt_id")
    measured = commits.shares(records.ledger.entries.shard_energies(commits.attempts()))
    estimated = commits.shares(commits.number("energy_estimate_mj"))

    for block, (commit, rows) in zip(commit_blocks(commits), row_tables(store).blocks(commits), strict=True):
        mj = [_spread(shares, commit, rows) for shares in (measured, estimated)]
        if shards.rounds:
            last = shards.is_last_round(shard_ids[commit], rows)
            commit, rows = commit[last], rows.filter(pa.array(last)).combine_chunks()
            mj = [part[last] for part in mj]
        if totals is not None:
            totals.add(commits, block, commit, rows)
        columns = [
            *rows.columns,
            pa.array(shard_ids[commit]),
            attempt_ids.take(pa.array(commit)),
            *(pa.array(part, mask=part == MISSING) for part in mj),
        ]
        yield pa.table(columns, schema=MANIFEST_SCHEMA)


def write_preview(store: Store, manifest: pq.ParquetFile) -> None:
    """Write `preview.png`: the first images of the job with their prompts."""
    shown: list[tuple[Image.Image, str]] = []
    for batch in manifest.iter_batches(PREVIEW_IMAGES, columns=IMAGE_ROW_SCHEMA.names):
        ok = [row for row in batch.to_pylist() if row["status"] == "ok"][: PREVIEW_IMAGES - len(shown)]
        for row, data in read_images_to_show(store, ok):
            picture = None if data is None else open_small(data)
            if picture is not None:
                shown.append((picture, row["prompt"]))
        if len(shown) >= PREVIEW_IMAGES:
            break
    if shown:
        images, prompts = zip(*shown, strict=True)
        store.put(PREVIEW_KEY, draw_contact_sheet(images, prompts))


def summarise(
    job: JobSpec, totals: Totals, ledger: Ledger, commits: CommitTable, tables: EnergyResult
) -> dict[str, Any]:
    """The content of `stats.json`: counts, speed, and energy with its method; null where nothing was measured."""
    seconds = None
    if totals.first_start_ns is not None and totals.last_end_ns is not None:
        seconds = (totals.last_end_ns - totals.first_start_ns) / 1e9
    energy, ok = ledger.summary(), totals.images_ok
    rejected_mj = _rejected(commits, ledger.entries.shard_energies(commits.attempts()))
    rejected_estimate_mj = _rejected(commits, commits.number("energy_estimate_mj"))
    return {
        "fingerprint": job.fingerprint,
        "model": job.model_name,
        "model_sha256": job.model_sha256,
        "format": job.output_format,
        "shards": totals.shards,
        "images_ok": ok,
        "images_filtered": totals.images_filtered,
        "images_quarantined": totals.images_quarantined,
        "input_rows_rejected": job.bad_rows,
        "encoded_bytes": totals.encoded_bytes,
        "seconds_first_to_last_commit": seconds,
        "images_per_second": ok / seconds if seconds else None,
        "errors": dict(totals.errors.most_common(MAX_ERROR_KINDS)),
        "filter_reasons": dict(totals.filter_reasons.most_common(MAX_ERROR_KINDS)),
        "images_with_warnings": totals.warnings.images,
        "warning_kinds": dict(totals.warnings.kinds.most_common(MAX_ERROR_KINDS)),
        "warnings": dict(totals.warnings.texts.most_common(MAX_ERROR_KINDS)),
        "images_per_node": dict(sorted(totals.per_node.items())),
        "energy_methods": dict(sorted(totals.energy_methods.items())),
        "energy": energy,
        **_verdicts(tables),
        "rejected_mj": rejected_mj,
        "rejected_estimate_mj": rejected_estimate_mj,
        "direct_mj_per_image": _per_image(_accepted(energy.get("shard_mj"), rejected_mj), ok),
        "full_mj_per_image": _per_image(energy.get("total_mj"), ok),
        "direct_estimate_mj_per_image": _per_image(
            _accepted(energy["estimate_mj"].get("shard"), rejected_estimate_mj), ok
        ),
        "full_estimate_mj_per_image": _per_image(energy.get("estimate_total_mj"), ok),
        "millijoule_version": job.millijoule_version,
    }


def _rejected(commits: CommitTable, energy_mj: np.ndarray) -> dict[str, int | None]:
    """What shards used for images that nobody got, by status; None where that of a shard is not known.

    Args:
        energy_mj: of each commit, `MISSING` where it is not known.
    """
    shares = commits.shares(energy_mj)
    parts = {"filtered": shares.filtered_mj, "quarantined": shares.quarantined_mj}
    known = bool(len(energy_mj)) and bool((energy_mj != MISSING).all())
    return {status: int(mj.sum()) if known else None for status, mj in parts.items()}


def _accepted(shard_mj: int | None, rejected_mj: Mapping[str, int | None]) -> int | None:
    """What shards used for the images that were accepted."""
    rejected = sum_or_none(rejected_mj.values())
    return None if shard_mj is None or rejected is None else shard_mj - rejected


def _per_image(total_mj: int | None, images: int) -> float | None:
    return total_mj / images if total_mj is not None and images else None


class ManifestRows:
    """Gives the image table its rows from a manifest in shard order, so that no row table is opened twice.

    The manifest lacks images that a later round makes anew; those have no energy to be told of.
    """

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file

    def blocks(self, commits: CommitTable) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """See `ImageSource`; `commits` are in shard order."""
        shard_ids = commits.number("shard_id")
        held = MANIFEST_SCHEMA.empty_table().select(["shard_id", *ROW_COLUMNS])
        for batch in self._file.iter_batches(MANIFEST_BATCH_ROWS, columns=held.column_names):
            rows = pa.concat_tables([held, pa.Table.from_batches([batch]).select(held.column_names)])
            shard_id = rows["shard_id"].to_numpy()
            whole = int(np.searchsorted(shard_id, shard_id[-1]))  # the last shard may go on
            held = rows.slice(whole)
            if whole:
                yield np.searchsorted(shard_ids, shard_id[:whole]), rows.slice(0, whole)
        if held.num_rows:
            yield np.searchsorted(shard_ids, held["shard_id"].to_numpy()), held


def _spread(shares: ShardShares, commit: np.ndarray, rows: pa.Table) -> np.ndarray:
    """What each row used, accepted or not; `MISSING` where it was not drawn to the end. Equal is also the Shapley value.

    `rows` are all rows of each commit, `commit` the number of each one's.
    """
    mj = np.full(len(commit), MISSING, np.int64)
    status = rows["status"].combine_chunks()
    drawn = rows["width"].combine_chunks().is_valid().to_numpy(zero_copy_only=False)
    of_status = (shares.accepted_mj, shares.filtered_mj, shares.quarantined_mj)
    for name, energy_mj in zip(STATUSES, of_status, strict=True):
        mine = pc.equal(status, name).to_numpy(zero_copy_only=False)
        if name != "ok":
            mine &= drawn
        mj[mine] = equal_shares(energy_mj, commit[mine])
    return mj
