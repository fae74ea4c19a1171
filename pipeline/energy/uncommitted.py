"""What no commit carries: last words of workers, lost attempts that a driver had to book, and who the workers were.

A driver writes segments and power samples to `_job/segments/` at every flush, and to `_job/closed/` how a worker's account of
its devices ended; a worker writes its own environment to `_job/workers/` before it loads its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from millijoule.pipeline.energy.node_readings import NO_READINGS, read_node_readings
from millijoule.pipeline.output.read_objects import OnDamage, read_objects
from millijoule.workers.layout import CLOSINGS_PREFIX, SEGMENTS_PREFIX, WORKERS_PREFIX
from millijoule.workers.records import decode, encode
from millijoule.workers.schemas import Commit, PowerTrace, Segment, WorkerClosing, WorkerEnvironment
from millijoule.workers.storage.protocol import Store

_WHAT = "what a driver or worker wrote"


@dataclass(frozen=True)
class Uncommitted:
    """All of it, of every driver and worker of a job.

    `power` has traces with the id of the worker that sampled them, `workers` environments and `closings` the ends of
    accounts by worker id, `nodes` rows of the `node_reading` table.
    """

    segments: tuple[Segment, ...] = ()
    power: tuple[tuple[str, PowerTrace], ...] = ()
    workers: Mapping[str, WorkerEnvironment] = field(default_factory=dict)
    nodes: pa.Table = field(default_factory=lambda: NO_READINGS)
    closings: Mapping[str, WorkerClosing] = field(default_factory=dict)


NOTHING = Uncommitted()


@dataclass(frozen=True)
class _SampledBy(PowerTrace):
    """A power trace, and the worker that sampled it."""

    worker_id: str


@dataclass(frozen=True)
class _Part:
    """One object of a driver."""

    segments: tuple[Segment, ...]
    power: tuple[_SampledBy, ...]


class UncommittedWriter:
    """Collects what one driver has to write; two drivers never write the same object."""

    def __init__(self, store: Store, epoch: int) -> None:
        self.store, self.epoch = store, epoch
        self._segments: list[Segment] = []
        self._power: list[_SampledBy] = []
        self._parts = 0

    def add(self, worker_id: str, segments: Iterable[Segment], power: Iterable[PowerTrace]) -> None:
        """Take what worker `worker_id` did and sampled."""
        self._segments.extend(segments)
        self._power.extend(_SampledBy(t.device, t.boot_id, t.source, t.samples, worker_id) for t in power)

    def flush(self) -> None:
        """Write what has been added since the last part, if anything.

        Raises:
            StoreError: storage failed; nothing is lost yet, flush again.
        """
        if not self._segments and not self._power:
            return
        key = f"{SEGMENTS_PREFIX}{self.epoch:06d}-{self._parts:06d}.json"
        self.store.put(key, encode(_Part(tuple(self._segments), tuple(self._power))))
        self._parts += 1
        self._segments, self._power = [], []


def read_uncommitted(store: Store, on_damage: OnDamage | None = None) -> Uncommitted:
    """Everything that drivers and workers of a job wrote besides commits.

    Args:
        on_damage: called with what is wrong with an object, which is left out then.

    Raises:
        DamagedError: an object is not what it should be, and nobody asks for those; the message names it.
        StoreError: storage failed.
    """
    parts = read_objects(store, SEGMENTS_PREFIX, _parse_part, _WHAT, on_damage)
    closings = read_objects(store, CLOSINGS_PREFIX, WorkerClosing.from_json, _WHAT, on_damage)
    return Uncommitted(
        tuple(segment for part in parts for segment in part.segments),
        tuple(
            (p.worker_id, PowerTrace(p.device, p.boot_id, p.source, p.samples))
            for part in parts
            for p in part.power
        ),
        read_workers(store, on_damage),
        read_node_readings(store, on_damage),
        {closing.worker_id: closing for closing in closings},
    )


def read_workers(store: Store, on_damage: OnDamage | None = None) -> dict[str, WorkerEnvironment]:
    """The environments of a job's workers, by worker id; as `read_uncommitted`."""
    found = read_objects(store, WORKERS_PREFIX, WorkerEnvironment.from_json, _WHAT, on_damage)
    return {worker.worker_id: worker for worker in found}


def _parse_part(data: bytes) -> _Part:
    if data.lstrip().startswith(b"["):  # as written before power was carried
        return _Part(decode(tuple[Segment, ...], data), ())
    return decode(_Part, data)


def held_devices(
    workers: Mapping[str, WorkerEnvironment], commits: Iterable[Commit]
) -> dict[str, tuple[str, ...]]:
    """What each worker held, by worker id: UUIDs of GPUs, or "cpu".

    A worker whose environment is not there (it was lost, or a version wrote the output that had none) held what its
    commits name, as far as is known.
    """
    devices = {worker_id: own.gpus or (own.device,) for worker_id, own in workers.items()}
    for commit in commits:
        devices.setdefault(commit.worker_id, (commit.device,))
    return devices
