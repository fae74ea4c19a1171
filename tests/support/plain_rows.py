"""Rows of the energy tables made one by one from ledger entries and commits: what the columns are compared with."""

from __future__ import annotations

from support.ledgers import shard_mj
from support.plain_split import shard_energy

from millijoule.pipeline.energy.rows import SHORT_CPU_NS, SHORT_GPU_NS, read_rows
from millijoule.workers.meters.segment_timeline import segment_estimate_mj


def counter_rows(ledger):
    """The reads of all entries, each once: a worker's close read opens its next segment."""
    latest = {}
    for entry in ledger.entries:
        for read in (entry.segment.open, entry.segment.close):
            at = (read.boot_id, read.t_mono_ns)
            if latest.get(entry.segment.worker_id) != at:
                latest[entry.segment.worker_id] = at
                yield from read_rows(entry.segment.worker_id, read)


def segment_rows(ledger):
    """One row per entry and domain; without the gaps that are nobody's."""
    for segment_id, entry in enumerate(ledger.entries):
        s = entry.segment
        who = (segment_id, s.worker_id, entry.segment_class, s.shard_id, s.attempt_id)
        when = (s.open.t_mono_ns, s.close.t_mono_ns, s.open.t_wall_ns)
        estimate_mj = segment_estimate_mj(s)
        for domain, energy_mj in entry.energy_mj.items() or ((None, None),):
            quality = "missing"
            if energy_mj is not None:
                shortest = SHORT_GPU_NS if domain.startswith("gpu:") else SHORT_CPU_NS
                quality = "short" if s.close.t_mono_ns - s.open.t_mono_ns < shortest else "measured"
            scale = (s.open.boot_id, s.open.epoch_of(domain) if domain else s.open.epoch)
            yield (*who, *scale, *when, domain, energy_mj, quality, estimate_mj)
            estimate_mj = None


def attempt_rows(ledger, commits):
    """The committed attempts."""
    for c in commits:
        mj = shard_mj(ledger, c.shard_id, c.attempt_id)
        _, *rejected = shard_energy(mj, c.images_ok, c.images_filtered, c.images_drawn)
        who = (
            c.shard_id,
            c.attempt_id,
            "committed",
            c.worker_id,
            c.node_id,
            c.host,
            c.device,
            c.driver_epoch,
        )
        images = (c.images_ok, c.images_filtered, c.images_quarantined, c.images_drawn)
        how = (c.energy_estimate_mj, c.energy_method, ",".join(c.energy_domains))
        yield (*who, c.t_start_wall_ns, c.t_end_wall_ns, *images, mj, *rejected, *how)


def image_rows_of(ledger, commits, read):
    """The images of all commits with their direct energy and estimate; full energies are not divided here."""
    for c in commits:
        ok = [row for row in read(c).to_pylist() if row["status"] == "ok"]
        counts = (len(ok), c.images_filtered, c.images_drawn)
        direct, *_ = shard_energy(shard_mj(ledger, c.shard_id, c.attempt_id), *counts)
        estimates, *_ = shard_energy(c.energy_estimate_mj, *counts)
        for row, mj, estimate in zip(ok, direct, estimates, strict=True):
            name = (row["prompt_id"], row["image_index"], c.shard_id, c.attempt_id, row["sha256"])
            yield (*name, mj, estimate)
