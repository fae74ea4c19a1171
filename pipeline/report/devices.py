"""Who made the images, how fast and at what cost: rows per device and per kind of device, and stragglers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from millijoule.pipeline.energy.counter_split import MISSING
from millijoule.pipeline.energy.packed import NONE
from millijoule.pipeline.energy.shard_shares import shard_shares
from millijoule.pipeline.report.energy import GROUPS
from millijoule.pipeline.report.tables import floats, labels, rows_of_each
from millijoule.pipeline.report.timeline import HostDevice, Work, hosts_of_boots
from millijoule.workers.meters.own_devices import unread_domains

#: A shard this much slower per image than the job's median is a straggler.
STRAGGLER_FACTOR = 1.5
MAX_STRAGGLERS = 20


@dataclass(frozen=True)
class DeviceRow:
    """One device of one node, or (as `model`) all devices of one kind. Energy is that of its workers."""

    host: str
    device: str
    model: str
    workers: int
    images: int
    images_per_worker_second: float | None  # while making images
    time_shares: dict[str, float]  # by group of GROUPS
    direct_mj_per_image: float | None
    full_mj_per_image: float | None
    direct_estimate_mj_per_image: float | None
    full_estimate_mj_per_image: float | None


@dataclass(frozen=True)
class Straggler:
    """A committed shard that took much longer per image than the median."""

    shard_id: int
    worker: str
    host: str
    device: str
    images: int
    seconds: float
    times_median: float


@dataclass(frozen=True)
class Speed:
    images_per_second: float | None
    seconds: float | None
    shards: int
    median_seconds_per_image: float | None
    p95_seconds_per_image: float | None
    slowest_seconds_per_image: float | None
    stragglers: int
    slowest: tuple[Straggler, ...]


def devices_of_workers(work: Work, attempts: pa.Table, env: pa.Table | None = None) -> dict[str, HostDevice]:
    """Where each worker ran: what it or its commits say, else its machine with an unknown device."""
    devices_of = {
        worker: HostDevice(host, device)
        for table in (attempts, env)
        if table is not None
        for worker, host, device in zip(
            *(table[c].to_pylist() for c in ("worker_id", "host", "device")), strict=True
        )
        if host is not None and device is not None
    }
    hosts = hosts_of_boots(work, devices_of)
    for worker in work.workers:
        devices_of.setdefault(worker, HostDevice(hosts[work.boot_of_worker[worker]], "unknown"))
    return devices_of


def unread_devices(env: pa.Table | None) -> tuple[str, ...]:
    """Devices that workers held and never read a counter of, as "device on host"; none where no worker states its own."""
    found: dict[str, None] = {}
    for row in env.to_pylist() if env is not None else ():
        held = (row["gpus"] or row["device"] or "").split(",")
        read = (row["energy_domains"] or "").split(",")
        for domain in unread_domains(filter(None, held), read):
            found[f"{domain.removeprefix('gpu:')} on {row['host'] or 'unknown host'}"] = None
    return tuple(sorted(found))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def model_of(on: HostDevice, models: Mapping[tuple[str, str], str]) -> str:
    """The kind of device it is, as far as the output says."""
    if on.device in ("cpu", "unknown"):
        return on.device
    stated = models.get((on.host, on.device)) or models.get(("", on.device))
    return stated or "GPU, model not recorded"


def device_rows(
    work: Work,
    devices_of: Mapping[str, HostDevice],
    attempts: pa.Table,
    models: Mapping[tuple[str, str], str],
    by: Literal["device", "node", "model"],
) -> list[DeviceRow]:
    """One row per device, node or kind of device, in order of host and device.

    The device of a node says how many it has; host and device of a kind say how many there are.
    """

    def group_of(on: HostDevice) -> HostDevice:
        if by == "model":
            return HostDevice("", model_of(on, models))
        return HostDevice(on.host, "") if by == "node" else on

    def named(group: HostDevice, members: set[HostDevice]) -> tuple[str, str, str]:
        """Host, device and model."""
        if by == "device":
            return group.host, group.device, model_of(group, models)
        nodes, devices = _count(len({p.host for p in members}), "node"), _count(len(members), "device")
        if by == "model":
            return nodes, devices, group.device
        return group.host, devices, ", ".join(sorted({model_of(p, models) for p in members}))

    won = labels(attempts["outcome"]).where(["committed"])
    made = labels(attempts["worker_id"])
    images = floats(attempts["images_ok"])
    direct, direct_estimate = (_accepted_mj(attempts, c) for c in ("energy_mj", "energy_estimate_mj"))
    seconds = work.end_s - work.begin_s
    groups: dict[HostDevice, list[str]] = defaultdict(list)
    for worker in work.workers:
        groups[group_of(devices_of[worker])].append(worker)
    in_order = sorted(groups.items(), key=lambda item: (item[0].host, item[0].device))
    number = {worker: i for i, (_, workers) in enumerate(in_order) for worker in workers}
    of_segment = np.array([number[w] for w in work.workers], np.int64)[work.worker]
    of_attempt = np.array([*(number.get(w, -1) for w in made.names), -1], np.int64)[made.codes]
    rows = []
    for (group, workers), mine, theirs in zip(
        in_order,
        rows_of_each(of_segment, len(in_order)),
        rows_of_each(np.where(won, of_attempt, -1), len(in_order)),
        strict=True,
    ):
        n = int(np.nansum(images[theirs]))
        by_group: dict[str, float] = defaultdict(float)
        classes, lasted = work.segment_class[mine], seconds[mine]
        for c, name in enumerate(work.classes):
            by_group[GROUPS.get(name, name)] += float(lasted[classes == c].sum())
        busy = by_group.get("images", 0.0)
        all_seconds = sum(by_group.values())
        rows.append(
            DeviceRow(
                *named(group, {devices_of[worker] for worker in workers}),
                workers=len(workers),
                images=n,
                images_per_worker_second=n / busy if busy and n else None,
                time_shares={g: s / all_seconds for g, s in by_group.items()} if all_seconds else {},
                direct_mj_per_image=_per_image(direct[theirs], n),
                full_mj_per_image=_per_image(work.energy_mj[mine], n),
                direct_estimate_mj_per_image=_per_image(direct_estimate[theirs], n),
                full_estimate_mj_per_image=_per_image(work.estimate_mj[mine], n),
            )
        )
    return rows


def _accepted_mj(attempts: pa.Table, column: str) -> np.ndarray:
    """Of `column`, what the accepted images of each attempt used, float64 `[n]`; NaN where it is not known."""
    energy, *numbers = (
        np.nan_to_num(floats(attempts[name]), nan=missing).astype(np.int64)
        for name, missing in (
            *((column, MISSING), ("images_ok", 0), ("images_filtered", 0)),
            ("images_drawn", NONE),
        )
    )
    accepted = shard_shares(energy, *numbers).accepted_mj
    return np.where(accepted == MISSING, np.nan, accepted)


def _per_image(energy_mj: np.ndarray, images: int) -> float | None:
    """The sum over images; None where any part of it is missing."""
    if not images or not len(energy_mj) or not np.isfinite(energy_mj).all():
        return None
    return float(energy_mj.sum()) / images


def gpu_models(env: pa.Table | None) -> dict[tuple[str, str], str]:
    """(host, device) -> what kind it is, as far as the environment table says."""
    if env is None:
        return {}
    rows = zip(*(env[c].to_pylist() for c in ("host", "device", "device_name")), strict=True)
    return {(host or "", device): name for host, device, name in rows if device and name}


def measure_speed(
    stats: Mapping[str, Any], devices_of: Mapping[str, HostDevice], attempts: pa.Table
) -> Speed:
    """Throughput, seconds per image drawn of the committed shards, and the slowest of them."""
    images = np.fmax(floats(attempts["images_ok"]), floats(attempts["images_drawn"]))
    rows = np.flatnonzero(labels(attempts["outcome"]).where(["committed"]) & (images > 0))
    seconds = (floats(attempts["t_end_wall_ns"]) - floats(attempts["t_start_wall_ns"]))[rows] / 1e9
    per_image = seconds / images[rows]
    median = float(np.median(per_image)) if len(rows) else None
    slow = np.flatnonzero(per_image > STRAGGLER_FACTOR * median) if median else np.array([], dtype=int)
    slowest = slow[np.argsort(-per_image[slow], kind="stable")][:MAX_STRAGGLERS]
    listed = attempts.take(pa.array(rows[slowest])).to_pylist()
    return Speed(
        images_per_second=stats["images_per_second"],
        seconds=stats["seconds_first_to_last_commit"],
        shards=stats["shards"],
        median_seconds_per_image=median,
        p95_seconds_per_image=float(np.quantile(per_image, 0.95)) if len(rows) else None,
        slowest_seconds_per_image=float(per_image.max()) if len(rows) else None,
        stragglers=len(slow),
        slowest=tuple(
            Straggler(
                shard_id=row["shard_id"],
                worker=row["worker_id"],
                **vars(devices_of[row["worker_id"]]),
                images=row["images_ok"],
                seconds=float(seconds[i]),
                times_median=float(per_image[i]) / (median or 1.0),
            )
            for i, row in zip(slowest.tolist(), listed, strict=True)
        ),
    )
