"""A simulated worker: the actor's methods as a driver calls them, one device that draws one lease after another.

Its commits, segments and counter reads are the product's own records, of the simulated device's counter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from millijoule.jobs.simulating.clocked_ray import EPOCH_S, After, ClockedRay, Promise
from millijoule.jobs.simulating.devices import Fleet
from millijoule.jobs.simulating.devices import Node as SimulatedNode
from millijoule.jobs.simulating.memory_store import MemoryStore, SealedPart
from millijoule.workers.attempts.parts import LEAST_REST_SHARE
from millijoule.workers.layout import worker_key
from millijoule.workers.lease import (
    AccountRead,
    AttemptProgress,
    AttemptResult,
    Lease,
    Node,
    Piece,
    WorkerConfig,
    WorkerStatus,
    WorkerStopped,
)
from millijoule.workers.schemas import Commit, CounterRead, Segment, WorkerEnvironment

#: A shard's files are encoded and stored for so long after the device has done with it.
FINISH_S = 0.5
#: Seconds per image differ from shard to shard by so much (standard deviation, relative).
JITTER = 0.03


@dataclass(eq=False)
class _Held:
    lease: Lease
    promise: Promise
    begun: float | None = None
    called_off: bool = False
    images: int = 0  # that are left of its shard, once begun


class SimulatedWorker:
    """One worker on `node`; the methods are those of `workers.actor.ShardWorker`."""

    def __init__(
        self,
        ray: ClockedRay,
        fleet: Fleet,
        store: MemoryStore,
        node: SimulatedNode,
        worker_id: str,
        config: WorkerConfig,
    ) -> None:
        self.ray, self.fleet, self.store, self.node = ray, fleet, store, node
        self.worker_id, self.config = worker_id, config
        self._line: list[_Held] = []
        self._segments: list[Segment] = []
        self._read: CounterRead | None = None
        self._is_dead = False

    def ended(self) -> None:
        """The process is gone."""
        self._is_dead = True
        self._line.clear()
        self.node.draw(self.node.kind.idle_w if self.node.alive else 0.0, self.ray.now)

    def _at(self, delay_s: float, act: Callable[[], None]) -> None:
        self.ray.at(delay_s, lambda: None if self._is_dead else act())

    # -- what a driver calls -------------------------------------------------------------------------------------

    def locate(self) -> Node:
        return Node(self.node.node_id, self.node.host)

    def start(self) -> Promise:
        opened = self._read = self._counter()
        self.store.put(worker_key(self.worker_id), self._environment(opened).to_json())
        if faults := self.node.kind.faults_per_hour:
            self._at(self.fleet.random.expovariate(faults / 3600), self._die)
        promise = Promise()

        def loaded() -> None:
            self._close("load")
            promise.keep(Node(self.node.node_id, self.node.host))

        self._at(self.node.kind.load_s, loaded)
        return promise

    def run(self, lease: Lease) -> Promise:
        held = _Held(lease, Promise())
        self._line.append(held)
        if len(self._line) == 1:
            self._begin()
        return held.promise

    def status(self) -> Any:
        answer = self._status()
        return After(self.ray.call_s(), answer) if self.ray.driver_takes_time else answer

    def _status(self) -> WorkerStatus:
        now, rate = self.ray.now, self.node.kind.images_per_s
        return WorkerStatus(
            tuple(
                AttemptProgress(held.lease.attempt_id, waits=True)
                if held.begun is None
                else AttemptProgress(
                    held.lease.attempt_id,
                    int((now - held.begun) * rate),
                    int((now - held.begun) * 10),
                    has_begun=True,
                )
                for held in self._line
            )
        )

    def cancel(self, attempt_id: str) -> None:
        for held in self._line:
            if held.lease.attempt_id == attempt_id and held.begun is not None and not held.called_off:
                held.called_off = True
                self._close("loser", held.lease)
                self._next(held)
                held.promise.keep(AttemptResult(held.lease, "cancelled"))
                return
        self.give_back(attempt_id)

    def give_back(self, attempt_id: str) -> bool:
        for held in self._line:
            if held.lease.attempt_id == attempt_id and held.begun is None:
                self._line.remove(held)
                held.promise.keep(AttemptResult(held.lease, "cancelled"))
                return True
        return False

    def stop(self) -> Any:
        if self._line:  # as the work group's threads do: after what is at work
            promise = Promise()
            self._at(1.0, lambda: self._stop_later(promise))
            return promise
        self._close("idle")
        segments, self._segments = tuple(self._segments), []
        return After(0.05, WorkerStopped(self.worker_id, segments))

    def _stop_later(self, promise: Promise) -> None:
        if self._line:
            self._at(1.0, lambda: self._stop_later(promise))
        else:
            promise.keep(self.stop().answer)

    def read_while_loading(self) -> None:
        return None

    def read_for(self, worker: WorkerEnvironment) -> AccountRead:
        """Of a reader on the same node: the counter runs on after a worker's death."""
        assert worker.opened is not None
        if worker.opened.boot_id != self.node.boot_id:
            return AccountRead(None, "the host was started anew since")
        return AccountRead(self._counter())

    # -- the device ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        held, kind = self._line[0], self.node.kind
        held.begun = self.ray.now
        self._close("idle")
        self.node.draw(kind.busy_w, self.ray.now)
        shard_id, most_s = held.lease.shard.shard_id, held.lease.at_most_s
        held.images = held.lease.shard.n_images - sum(part.images for part in self.store.parts[shard_id])
        seconds = held.images / kind.images_per_s * max(0.5, self.fleet.random.gauss(1.0, JITTER))
        if most_s is not None and seconds > most_s * (1 + LEAST_REST_SHARE):
            drawn = max(1, round(held.images * most_s / seconds))
            if drawn < held.images:
                self._at(seconds * drawn / held.images, lambda: self._give_back(held, drawn))
                return
        self._at(seconds, lambda: self._drawn(held))

    def _give_back(self, held: _Held, drawn: int) -> None:
        """The lease's time is over: what was drawn is sealed as a part."""
        if held.called_off:
            return
        lease, shard_id = held.lease, held.lease.shard.shard_id
        self._close("shard", replace(lease, attempt_id=f"{lease.attempt_id}.p0"))
        own = self._segments[-1]

        def sealed() -> None:
            self.store.parts[shard_id].append(SealedPart(f"{lease.attempt_id}.p0", drawn, own))
            seconds = (own.close.t_mono_ns - own.open.t_mono_ns) / 1e9
            held.promise.keep(AttemptResult(lease, "cancelled", piece=Piece(drawn, seconds, self._mj(own))))

        self._at(FINISH_S, sealed)
        self._next(held)

    def _drawn(self, held: _Held) -> None:
        if held.called_off:
            return
        self._close("shard", held.lease)
        own = self._segments[-1]
        self._at(FINISH_S, lambda: self._stored(held, own))
        self._next(held)

    def _next(self, held: _Held) -> None:
        self._line.remove(held)
        if self._line:
            self._begin()
        else:
            self.node.draw(self.node.kind.idle_w, self.ray.now)

    def _stored(self, held: _Held, own: Segment) -> None:
        lease, shard = held.lease, held.lease.shard
        if not self.store.commit(shard.shard_id):
            self._segments = [replace(s, segment_class="loser") if s is own else s for s in self._segments]
            held.promise.keep(AttemptResult(lease, "exists", self._commit(lease, own, ())))
            return
        # what has ended by now travels with this commit
        body = self._commit(lease, own, tuple(self._segments))
        self._segments = []
        held.promise.keep(AttemptResult(lease, "committed", body))

    def _commit(self, lease: Lease, own: Segment, segments: tuple[Segment, ...]) -> bytes:
        shard, node, domain = lease.shard, self.node, f"gpu:{self.node.device}"
        parts = self.store.parts.pop(shard.shard_id, [])
        return Commit(
            shard_id=shard.shard_id,
            attempt_id=lease.attempt_id,
            driver_epoch=self.config.driver_epoch,
            worker_id=self.worker_id,
            node_id=node.node_id,
            host=node.host,
            device=node.device,
            plan_fingerprint=self.config.fingerprint,
            model_sha256=self.config.model_sha256,
            files=(),
            rows_path=f"data/{shard.shard_id:08d}.rows.parquet",
            images_ok=shard.n_images,
            images_quarantined=0,
            errors={},
            t_start_wall_ns=own.open.t_wall_ns,
            t_end_wall_ns=own.close.t_wall_ns,
            energy_mj=self._mj(own) + sum(self._mj(part.segment) for part in parts),
            energy_domains=(domain,),
            energy_estimate_mj=None,
            energy_method="nvml-counter",
            segments=(*(part.segment for part in parts), *segments),
            parts=tuple(part.part_id for part in parts),
            images_by_others={
                name: sum(part.images for part in parts if part.segment.worker_id == name)
                for name in {part.segment.worker_id for part in parts} - {self.worker_id}
            },
            images_drawn=shard.n_images,
        ).to_json()

    @staticmethod
    def _mj(segment: Segment) -> int:
        """Of the worker's only device."""
        return sum(mj - segment.open.energy_mj[domain] for domain, mj in segment.close.energy_mj.items())

    def _counter(self) -> CounterRead:
        node, now = self.node, self.ray.now
        node.draw(node.watts, now)
        # a node's monotonic clock does not start at zero
        t_mono_ns, t_wall_ns = int((now + 1000) * 1e9), int((now + EPOCH_S) * 1e9)
        return CounterRead(node.boot_id, t_mono_ns, t_wall_ns, 1000, {f"gpu:{node.device}": int(node.mj)})

    def _close(self, segment_class: str, lease: Lease | None = None) -> None:
        before, read = self._read, self._counter()
        assert before is not None
        if read.t_mono_ns > before.t_mono_ns:
            shard_id, attempt_id = (lease.shard.shard_id, lease.attempt_id) if lease else (None, None)
            self._segments.append(Segment(self.worker_id, segment_class, before, read, shard_id, attempt_id))
        self._read = read

    def _environment(self, opened: CounterRead) -> WorkerEnvironment:
        node = self.node
        return WorkerEnvironment(
            *(self.worker_id, self.config.driver_epoch, node.node_id, node.host, node.device, (node.device,)),
            *(node.kind.name, None, "3", None, "nvml-counter", opened),
        )

    def _die(self) -> None:
        self.fleet.faults += 1
        self.ray.end_worker(self)
