"""The Ray actor: one process beside one device that loads a model once and runs leases.

State: a runner (store, generator, meter, attempts at work) built by `start`. `run` is called with at most two leases at a
time, of which one is drawn while the other is finished or waits; `status` answers beside them from a thread of its own. An
actor never restarts by itself: the driver replaces it, and keeps the reason.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import ray

from millijoule.workers.attempts.runner import AttemptRunner, device_thread
from millijoule.workers.drawing.out_of_memory import collect_rarely, release_memory
from millijoule.workers.environment import describe_worker
from millijoule.workers.errors import InputError, MillijouleError, NodeError, NotFoundError
from millijoule.workers.factory_model import check_factory_model
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import Generator, HoldsProcesses, LeavesNoGarbage, NamesKernels
from millijoule.workers.generators.registry import describe_model, load_generator
from millijoule.workers.layout import JOB_KEY, worker_key
from millijoule.workers.lease import (
    MAX_LEASES,
    AccountRead,
    AttemptResult,
    Calibration,
    Lease,
    Node,
    WorkerConfig,
    WorkerStatus,
    WorkerStopped,
)
from millijoule.workers.life import hold_life_lock, is_gone, life_path
from millijoule.workers.meters.meter import CounterMeter, open_meter, read_boot_id
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline
from millijoule.workers.orphan import exit_with_parent
from millijoule.workers.records import decode
from millijoule.workers.schemas import CounterRead, ImageRequest, WorkerEnvironment
from millijoule.workers.sources.copies import at_hand
from millijoule.workers.storage.open import open_store
from millijoule.workers.storage.protocol import Store
from millijoule.workers.storage.trouble import waits_for_store
from millijoule.workers.visible_text import log_to_stderr

#: A killed worker's process has this long to end before it counts as running on.
GONE_TIMEOUT_S = 20.0

log = logging.getLogger(__name__)


class ShardWorker:
    """One worker. Construct through `ray.remote(ShardWorker).options(...)`."""

    def __init__(self, worker_id: str, config: WorkerConfig) -> None:
        log_to_stderr("%(levelname)s %(name)s: %(message)s")
        self.worker_id = worker_id
        self.config = config
        self._runner: AttemptRunner | None = None
        self._timeline: SegmentTimeline | None = None
        self.power: PowerSampler | None = None
        exit_with_parent()

    @ray.method(concurrency_group="work")
    def start(self) -> Node:
        """Open the account of the devices, check the output, load the model, draw one image.

        Raises:
            NodeError: this node cannot work: it does not see the job's output, or the model cannot be loaded or used.
            StoreError: storage failed.
        """
        try:
            return self._start()
        except MillijouleError as error:
            if isinstance(error, InputError):  # what is wrong here may be right on another node
                raise NodeError(str(error)) from error
            raise
        except Exception as error:
            raise NodeError(f"cannot start: {type(error).__name__}: {error}") from error

    def _start(self) -> Node:
        config = self.config
        gpus = _assigned_gpus()
        meter = self.open_own_meter(gpus)
        timeline = self._timeline = SegmentTimeline(self.worker_id, meter)
        opened = timeline.last_read
        self.power = PowerSampler(meter)
        self.power.start()
        store = open_store(config.output_url or ".", patient=True)
        node_id = ray.get_runtime_context().get_node_id()

        def describe(kernels: str | None = None, runner: AttemptRunner | None = None) -> WorkerEnvironment:
            found = describe_worker(
                self.worker_id, config.driver_epoch, node_id, gpus, meter, opened, kernels
            )
            found = replace(
                found,
                pool=config.pool or None,
                price_per_hour=config.price_per_hour,
                cpu_threads=config.cpu_threads,
            )
            return found if runner is None else runner.stated(found)

        worker = describe()
        if config.output_url:  # a calibration has no output
            _check_output_is_shared(store, config)
            # from now on this worker owes an account of its devices, and whoever closes it can tell whether it lives
            try:
                hold_life_lock(life_path(config.output_url, self.worker_id))
            except OSError as error:
                log.warning(
                    "no sign of life can be given (%s): should this worker die, its energy is missing", error
                )
            store.put(worker_key(self.worker_id), worker.to_json())
        model, options = at_hand(config.model, config.options, config.copies)
        device = device_thread()
        loading = device.submit(_load, model, options, "cuda" if gpus else "cpu", config.cpu_threads)
        generator = loading.result()
        if isinstance(generator, HoldsProcesses):
            meter.cpu_ns_elsewhere = lambda: generator.cpu_ns
        _check_model(config, describe_model(model, options).sha256, worker.host)
        if config.output_url:
            check_factory_model(store, config, generator.info.sha256)
        timeline.close("load")
        runner = AttemptRunner(config, store, generator, meter, timeline, worker, self.power, device)
        runner.warm_up(ImageRequest("warm-up", 0, "", seed=0))
        release_memory()  # what only loading needed
        if isinstance(generator, LeavesNoGarbage) and generator.leaves_no_garbage:
            collect_rarely()
        if config.output_url:
            kernels = generator.kernels if isinstance(generator, NamesKernels) else None
            store.put(worker_key(self.worker_id), describe(kernels, runner).to_json())
        timeline.close("warmup")
        self._runner = runner
        return Node(node_id, worker.host)

    def open_own_meter(self, gpus: Sequence[str]) -> CounterMeter:
        """The counters of `gpus`, as `CUDA_VISIBLE_DEVICES` lists them, and of the host; without telemetry none."""
        return open_meter(gpus) if self.config.telemetry else CounterMeter(read_boot_id(), (), None)

    @ray.method(concurrency_group="work")
    def run(self, lease: Lease) -> AttemptResult:
        """Attempt one lease; see `AttemptRunner.run`. A second one may be given meanwhile."""
        assert self._runner is not None
        return self._runner.run(lease)

    @ray.method(concurrency_group="work")
    def calibrate(self, requests: list[ImageRequest]) -> Calibration:
        """Draw and encode `requests` without writing anything; seconds, bytes and energy they took."""
        assert self._runner is not None
        return self._runner.calibrate(requests)

    @ray.method(concurrency_group="status")
    def locate(self) -> Node:
        """The node this worker is on; answers while the model loads."""
        node_id = ray.get_runtime_context().get_node_id()
        return Node(node_id, socket.gethostname())

    @ray.method(concurrency_group="status")
    def status(self) -> WorkerStatus:
        """What the worker is doing now; answers while `run` is busy."""
        if (runner := self._runner) is None:
            return WorkerStatus()
        return WorkerStatus(runner.progress, waits_for_store())

    @ray.method(concurrency_group="status")
    def cancel(self, attempt_id: str) -> None:
        """Call off an attempt after its current batch: another has won the shard, or the job is over."""
        assert self._runner is not None
        self._runner.cancel(attempt_id)

    @ray.method(concurrency_group="status")
    def give_back(self, attempt_id: str) -> bool:
        """Call off an attempt whose drawing has not begun: another worker can begin with it now, or nobody is to. False: it has."""
        assert self._runner is not None
        return self._runner.give_back(attempt_id)

    @ray.method(concurrency_group="status")
    def leave(self) -> None:
        """The worker's node is taken away: end after the current batch, and seal what was made. Leases come back as cancelled."""
        if self._runner is not None:
            self._runner.leave()

    @ray.method(concurrency_group="status")
    def read_while_loading(self) -> CounterRead | None:
        """The estimate of a worker that loads, which is of its process and ends with it.

        None where it has counters, which somebody else reads once it is gone, or has not opened its meter yet.
        """
        timeline = self._timeline
        return None if timeline is None or timeline.last_read.energy_mj else timeline.meter.read()

    @ray.method(concurrency_group="work")
    def stop(self) -> WorkerStopped:
        """Close the books once no attempt is at work; the actor is killed afterwards. Works after a failed start, and beside one, too."""
        if self._runner is not None:
            self._runner.close()
        if self._timeline is None or self.power is None:
            return WorkerStopped(self.worker_id, ())
        self.power.stop()
        self._timeline.close("load" if self._runner is None else "idle", last=True)
        return WorkerStopped(self.worker_id, self._timeline.take(), self.power.take())

    @ray.method(concurrency_group="work")
    def read_for(self, worker: WorkerEnvironment) -> AccountRead:
        """Read the devices of another worker of this host once it is gone, to close its account; without `start`.

        That its driver saw it end, or killed it, says little: a process ends a moment later, or not at all where the
        raylet died with it in hand.
        """
        assert worker.opened is not None
        gone = is_gone(life_path(self.config.output_url, worker.worker_id), GONE_TIMEOUT_S)
        if gone is False:
            return AccountRead(None, "its process still runs")
        if gone is None:
            return AccountRead(None, "whether its process has ended cannot be seen here")
        meter = self.open_own_meter(worker.gpus)
        try:
            if meter.boot_id != worker.opened.boot_id:
                return AccountRead(None, "its host was started anew, or is another one")
            return AccountRead(meter.read_afresh())
        finally:
            meter.close()


def remote_worker_class(worker=ShardWorker):
    """The actor class, with a thread for each lease that it may hold, and one for status."""
    return ray.remote(concurrency_groups={"work": MAX_LEASES, "status": 1}, max_restarts=0)(worker)


def _load(model: str, options: GeneratorOptions, device: str, cpu_threads: int) -> Generator:
    generator = load_generator(model, device=device, options=options)
    if torch := sys.modules.get("torch"):  # a generator that does without PyTorch needs no import
        torch.set_num_threads(max(1, cpu_threads // options.ranks))  # of the CPUs Ray counts for this worker
    return generator


def _assigned_gpus() -> list[str]:
    """UUIDs (or indices) of the GPUs Ray gave this actor, as CUDA sees them; empty on a CPU worker."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [v for v in visible.split(",") if v]


def _check_model(config: WorkerConfig, found: str, host: str) -> None:
    if found != config.model_sha256:
        raise NodeError(
            f"{config.model}: the model on {host} has SHA-256 {found[:16]}, "
            f"the job was planned with {config.model_sha256[:16]}: put the same file on every node"
        )


@dataclass(frozen=True)
class _PlannedJob:
    """Of the job's description what a worker compares."""

    fingerprint: str


def _check_output_is_shared(store: Store, config: WorkerConfig) -> None:
    try:
        job = decode(_PlannedJob, store.get(JOB_KEY))
    except NotFoundError as error:
        raise NodeError(
            f"{store.url}: node {socket.gethostname()} does not see the job's files there. Workers on several "
            "machines need an output they all share: s3://... or a network file system"
        ) from error
    if job.fingerprint != config.fingerprint:
        raise NodeError(f"{store.url}: holds another job ({job.fingerprint[:12]})")
