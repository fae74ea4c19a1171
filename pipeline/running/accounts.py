"""Who owes an account of which devices, and closing it: what nobody read must end up read, or be known to be missing.

A worker opens an account with its first counter read and closes it with its last words. One that ends without them leaves
it open; counters run on, so somebody on that host reads the same devices once more when the worker is surely gone, and
what lies in between is a gap with energy. Accounts that earlier runs left open are closed the same way. Where nobody can
read, the closing says why, and totals are missing. Nothing here waits in the driver's loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from millijoule.pipeline.output.read_objects import in_threads
from millijoule.pipeline.running.cluster import living_nodes
from millijoule.pipeline.running.record_writer import RecordWriter
from millijoule.workers.errors import NotFoundError
from millijoule.workers.layout import CLOSINGS_PREFIX, WORKERS_PREFIX, closing_key, worker_key
from millijoule.workers.lease import AccountRead, WorkerConfig, WorkerStopped
from millijoule.workers.schemas import CounterRead, WorkerClosing, WorkerEnvironment
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: A reader that dies, or whose node does not answer, is tried this often.
MAX_TRIES = 2
#: At the end of a run the readers have this long: the start of an actor and the end of a killed process.
CLOSE_TIMEOUT_S = 60.0
#: The same where a person or the cluster cuts the run off.
CUT_OFF_TIMEOUT_S = 8.0
#: A process that was killed while it started may still open its account for so long.
LAST_BREATH_S = 1.0
#: Why the account of a worker without counters has no end, once and for all.
NO_COUNTER = "it had no counter that somebody else could read"
#: Between two looks while the end waits.
_POLL_S = 0.05


@dataclass(eq=False)
class _Open:
    """An account without last words."""

    worker_id: str
    environment: WorkerEnvironment | None = None  # None: not looked up yet
    tries: int = 0
    reading: bool = False
    reason: str = ""


class Accounts:
    """The accounts of one driver's run, and those that earlier runs left open.

    Args:
        actor_class: the workers' own; a reader is one that loads nothing and takes no CPU or GPU of its node.
        config: the workers'.
    """

    def __init__(
        self, store: Store, epoch: int, writer: RecordWriter, actor_class: Any, config: WorkerConfig
    ) -> None:
        self.store = store
        self.epoch = epoch
        self.writer = writer
        self.actor_class = actor_class
        self.config = config
        self._open: dict[str, _Open] = {}
        self._while_loading: dict[str, CounterRead] = {}
        self._unopened: dict[str, float] = {}  # workers that had none when they were gone, and when that was
        self._closed = False
        self._readers: dict[str, Any] = {}  # by node id
        self._calls: dict[Any, tuple[_Open, str, Any]] = {}  # with node id and reader
        self._readers_started = 0

    def look_for_open(self) -> None:
        """Find the accounts that earlier runs left open; again at the end, for those of a run that has just been superseded."""

        def found(worker_ids: list[str]) -> None:
            own = f"w{self.epoch:04d}-"
            of_earlier_runs = [w for w in worker_ids if not w.startswith(own) and w not in self._open]
            if of_earlier_runs:
                log.info("accounts of devices that earlier runs left open: %d", len(of_earlier_runs))
            for worker_id in of_earlier_runs:
                self.gone(worker_id)

        self.writer.submit("looking for open accounts", self._list_open, found)

    def stopped(self, stopped: WorkerStopped) -> None:
        """A worker said its last words."""
        if stopped.segments:
            read = stopped.segments[-1].close
            self._close(WorkerClosing(stopped.worker_id, self.epoch, stopped.worker_id, read))

    def loading(self, worker_id: str, read: CounterRead | None) -> None:
        """What a worker's own meter said while it still loaded; it is ended next."""
        if read is not None:
            self._while_loading[worker_id] = read

    def gone(self, worker_id: str) -> None:
        """A worker ended without last words."""
        account = self._open[worker_id] = _Open(worker_id)
        since = time.monotonic()

        def look_up() -> WorkerEnvironment | None:
            try:
                return WorkerEnvironment.from_json(self.store.get(worker_key(worker_id)))
            except (NotFoundError, ValueError):
                return None  # it ended before it opened one

        def found(environment: WorkerEnvironment | None) -> None:
            if self._closed:
                return  # storage answered too late: what is not known by now is given up
            if environment is None or environment.opened is None or not environment.opened.energy_mj:
                del self._open[worker_id]
                if environment is None:
                    self._unopened[worker_id] = since
                elif (
                    environment.opened is not None
                ):  # nobody can read anything for it: it is not looked for again
                    own = self._while_loading.get(worker_id)
                    if own is None or own.energy_mj:
                        self._close(WorkerClosing(worker_id, self.epoch, "", None, NO_COUNTER))
                    else:
                        self._close(WorkerClosing(worker_id, self.epoch, worker_id, own))
                return
            account.environment = environment
            self._try(account)

        self.writer.submit(f"looking up worker {worker_id}", look_up, found)

    def tick(self) -> None:
        """Take what readers have read."""
        if not self._calls:
            return
        ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for call in ready:
            account, node_id, reader = self._calls.pop(call)
            account.reading = False
            try:
                answer: AccountRead = ray.get(call)
            except RayError as error:
                account.reason = f"nobody could read its devices: {' '.join(str(error).split())[:200]}"
                # unless it is the one that another account's next try has started
                if self._readers.get(node_id) is reader:
                    self._end_reader(node_id)
                self._try(account)
                continue
            if answer.read is None:
                account.reason = answer.reason  # may have changed when the run ends
                continue
            del self._open[account.worker_id]
            by = f"a reader on {node_id[:8]}"
            self._close(WorkerClosing(account.worker_id, self.epoch, by, answer.read))
        busy = {node_id for _, node_id, _ in self._calls.values()}
        for node_id in self._readers.keys() - busy:
            self._end_reader(node_id)

    def close(self, *, cut_off: bool = False) -> None:
        """Wait for the readers; what then is still open is written down with the reason."""
        deadline = time.monotonic() + (CUT_OFF_TIMEOUT_S if cut_off else CLOSE_TIMEOUT_S)
        self._wait(lambda: self.writer.idle, deadline)  # every account has been looked up
        if self._unopened:
            newest = max(self._unopened.values())
            self._wait(lambda: time.monotonic() > newest + LAST_BREATH_S, deadline)
            self._look_again()
        for account in self._open.values():
            if account.environment is not None and not account.reading:
                self._try(account)  # a node of its host may have come back, its process may have ended
        self._wait(lambda: not self._calls and self.writer.idle, deadline)
        self._closed = True
        for node_id in list(self._readers):
            self._end_reader(node_id)
        for account in self._open.values():
            if account.reading:
                account.reason = "the one who was to read its devices did not answer in time"
            elif account.environment is None:
                account.reason = "storage did not say in time which devices it had"
            self._give_up(account)
        self._open.clear()

    def _wait(self, done: Callable[[], bool], deadline: float) -> None:
        while not done() and time.monotonic() < deadline:
            self.writer.settle()
            self.tick()
            time.sleep(_POLL_S)

    def _look_again(self) -> None:
        """Whoever was killed while it started may have opened its account after it was looked for."""

        def found(opened: set[str]) -> None:
            for worker_id in self._unopened if not self._closed else ():
                if worker_key(worker_id) in opened:
                    self.gone(worker_id)

        self.writer.submit("looking for accounts opened late", self._opened, found)

    # -- the course of one account -------------------------------------------------------------------------------

    def _try(self, account: _Open) -> None:
        """Have somebody read the devices, where a node of that host is there."""
        if account.tries >= MAX_TRIES:
            return
        environment = account.environment
        assert environment is not None
        node_id = _node_of(environment)
        if node_id is None:
            account.reason = "its node is gone"
            return
        account.tries += 1
        account.reading = True
        reader = self._readers.get(node_id)
        if reader is None:
            self._readers_started += 1
            reader = self._readers[node_id] = self.actor_class.options(
                name=None,
                num_cpus=0,
                num_gpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(f"r{self.epoch:04d}-{self._readers_started:04d}", self.config)
        self._calls[reader.read_for.remote(environment)] = account, node_id, reader

    def _give_up(self, account: _Open) -> None:
        host, held = "?", "its devices"
        if (environment := account.environment) is not None:
            host, held = environment.host, ", ".join(environment.gpus or (environment.device,))
        log.warning(
            "worker %s on %s: what %s used after its last record is missing: %s",
            *(account.worker_id, host, held, account.reason),
        )
        self._close(WorkerClosing(account.worker_id, self.epoch, "", None, account.reason))

    def _close(self, closing: WorkerClosing) -> None:
        key, body = closing_key(closing.worker_id), closing.to_json()

        def write() -> None:
            # another driver that works on this output may have closed it, and a first read is as good as a later one
            if closing.by != closing.worker_id and self.store.exists(key):
                there = WorkerClosing.from_json(self.store.get(key))
                if there.read is not None:
                    return
            self.store.put(key, body)

        self.writer.submit(f"closing the account of {closing.worker_id}", write)

    def _end_reader(self, node_id: str) -> None:
        ray.kill(self._readers.pop(node_id))

    def _list_open(self) -> list[str]:
        """Workers of earlier runs whose account nobody could close."""
        keys = [item.key for item in self.store.list(CLOSINGS_PREFIX)]
        bodies = in_threads(self.store.get, keys, items_per_call=1)
        closings = [WorkerClosing.from_json(body) for body in bodies]
        closed = {
            worker_key(closing.worker_id)
            for closing in closings
            if closing.read is not None or closing.reason == NO_COUNTER
        }
        return sorted(Path(key).stem for key in self._opened() - closed)

    def _opened(self) -> set[str]:
        return {item.key for item in self.store.list(WORKERS_PREFIX)}


def _node_of(environment: WorkerEnvironment) -> str | None:
    """The id of the worker's node, else of another on its host; the reader there makes sure that it is the same boot."""
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in living_nodes()}
    if environment.node_id in nodes:
        return environment.node_id
    return next((node_id for node_id, host in nodes.items() if host == environment.host), None)
