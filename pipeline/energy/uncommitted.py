"""What no commit carries: last words of workers, lost attempts that a driver had to book, and who the workers were.

A driver collects segments and power samples and writes them to `_job/segments/` at every flush, so that a crash costs
at most one flush interval of them; a worker writes its own environment to `_job/workers/` before it loads its model, and a
driver how its account of its devices ended to `_job/closed/`. With the commits they are all that the energy tables are
made from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import pyarrow as pa

from millijoule.pipeline.energy.node_readings import NO_READINGS, read_node_readings
from millijoule.pipeline.output.commits import READ_THREADS
from millijoule.workers.errors import StoreError
from millijoule.workers.layout import CLOSINGS_PREFIX, SEGMENTS_PREFIX, WORKERS_PREFIX
from millijoule.workers.schemas import (
    Commit,
    CounterRead,
    PowerTrace,
    Segment,
    WorkerClosing,
    WorkerEnvironment,
)
from millijoule.workers.storage.protocol import Store

T = TypeVar("T")


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


class UncommittedWriter:
    """Collects what one driver has to write; two drivers never write the same object."""

    def __init__(self, store: Store, epoch: int) -> None:
        self.store = store
        self.epoch = epoch
        self._segments: list[Segment] = []
        self._power: list[tuple[str, PowerTrace]] = []
        self._parts = 0

    def add(self, worker_id: str, segments: Iterable[Segment], power: Iterable[PowerTrace]) -> None:
        """Take what worker `worker_id` did and sampled."""
        self._segments.extend(segments)
        self._power.extend((worker_id, trace) for trace in power)

    def flush(self) -> None:
        """Write what has been added since the last part, if anything.

        Raises:
            StoreError: storage failed; nothing is lost yet, flush again.
        """
        if not self._segments and not self._power:
            return
        body = {
            "segments": [asdict(s) for s in self._segments],
            "power": [{"worker_id": worker_id, **asdict(trace)} for worker_id, trace in self._power],
        }
        key = f"{SEGMENTS_PREFIX}{self.epoch:06d}-{self._parts:06d}.json"
        self.store.put(key, json.dumps(body, separators=(",", ":")).encode())
        self._parts += 1
        self._segments, self._power = [], []


def read_uncommitted(store: Store) -> Uncommitted:
    """Everything that drivers and workers of a job wrote besides commits.

    Raises:
        StoreError: storage failed, or an object is not what it should be; the message names it.
    """
    segments: list[Segment] = []
    power: list[tuple[str, PowerTrace]] = []
    for more, traces in _read_all(store, SEGMENTS_PREFIX, _parse_part):
        segments += more
        power += traces
    return Uncommitted(
        tuple(segments), tuple(power), read_workers(store), read_node_readings(store), read_closings(store)
    )


def read_workers(store: Store) -> dict[str, WorkerEnvironment]:
    """The environments of a job's workers, by worker id; raises StoreError."""

    def parse(data: bytes) -> WorkerEnvironment:
        environment = WorkerEnvironment.from_json(data)
        _require_numbers(environment.opened)
        return environment

    return {environment.worker_id: environment for environment in _read_all(store, WORKERS_PREFIX, parse)}


def read_closings(store: Store) -> dict[str, WorkerClosing]:
    """How the accounts of a job's workers ended, by worker id; raises StoreError."""

    def parse(data: bytes) -> WorkerClosing:
        closing = WorkerClosing.from_json(data)
        _require_numbers(closing.read)
        return closing

    return {closing.worker_id: closing for closing in _read_all(store, CLOSINGS_PREFIX, parse)}


def _require_numbers(read: CounterRead | None) -> None:
    """Raise ValueError where a read has anything but whole numbers of 64 bits."""
    if read is None:
        return
    numbers = [read.t_mono_ns, read.t_wall_ns, read.latency_ns, read.epoch, *read.energy_mj.values()]
    numbers += [n for n in (read.estimate_mj, read.wrap_epoch) if n is not None]
    if wrong := [n for n in numbers if type(n) is not int or not -(2**63) <= n < 2**63]:
        raise ValueError(f"a counter read has {wrong[0]!r} for a number")


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


def _read_all(store: Store, prefix: str, parse: Callable[[bytes], T]) -> list[T]:
    """The objects under `prefix`, in order of their keys."""

    def read(key: str) -> T:
        try:
            return parse(store.get(key))
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{store.url}/{key}: not what a driver or worker wrote: {error}") from error

    with ThreadPoolExecutor(READ_THREADS) as threads:
        return list(threads.map(read, sorted(item.key for item in store.list(prefix))))


def _parse_part(data: bytes) -> tuple[list[Segment], list[tuple[str, PowerTrace]]]:
    raw = json.loads(data)
    if isinstance(raw, list):  # as written before power was carried
        raw = {"segments": raw, "power": []}
    power = [(trace.pop("worker_id"), PowerTrace.from_dict(trace)) for trace in raw["power"]]
    return [Segment.from_dict(s) for s in raw["segments"]], power
