"""The Ray actor that reads a node's own meter, on that node: no CPU, no device, one thread that waits.

The driver pins one to each node where workers run and takes what it read every few seconds. A meter that cannot be
opened or read is a reason that comes back with the readings, never an error.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from millijoule.workers.errors import InputError
from millijoule.workers.meters import rapl
from millijoule.workers.meters.meter import read_boot_id
from millijoule.workers.meters.nvml import installed_gpus
from millijoule.workers.node_meters.config import NodeMeterConfig
from millijoule.workers.node_meters.ipmi import IpmiMeter
from millijoule.workers.node_meters.meter import NodeFailure, NodeMeter, NodeReading, NodeRecorder
from millijoule.workers.node_meters.redfish import RedfishMeter
from millijoule.workers.orphan import exit_with_parent
from millijoule.workers.visible_text import log_to_stderr


@dataclass(frozen=True)
class NodeRecorderReady:
    """What a recorder found on its node.

    Attributes:
        domains: of the counters that the node's devices should have, readable or not.
        failure: why the meter cannot be opened; empty where it could.
    """

    boot_id: str
    domains: tuple[str, ...]
    failure: str = ""


class NodeMeterActor:
    """One node's recorder. Construct through `remote_node_recorder`."""

    def __init__(self, config: NodeMeterConfig) -> None:
        log_to_stderr("%(levelname)s %(name)s: %(message)s")
        exit_with_parent()
        self.config = config
        self._recorder: NodeRecorder | None = None

    def start(self) -> NodeRecorderReady:
        """Open the meter and begin to read it."""
        try:
            meter = open_node_meter(self.config, socket.gethostname())
        except InputError as error:
            return NodeRecorderReady(read_boot_id(), node_domains(), str(error))
        self._recorder = NodeRecorder(meter, self.config.period_s)
        self._recorder.start()
        return NodeRecorderReady(read_boot_id(), node_domains())

    def take(self) -> tuple[NodeReading | NodeFailure, ...]:
        """What was read since the last time."""
        return self._recorder.take() if self._recorder else ()

    def stop(self) -> tuple[NodeReading | NodeFailure, ...]:
        """Read a last time; all that was not taken yet. The actor is killed afterwards."""
        if self._recorder:
            self._recorder.stop()
        return self.take()


def open_node_meter(config: NodeMeterConfig, host: str) -> NodeMeter:
    """The meter, on its node; raises InputError where it cannot be read whatever it says."""
    return IpmiMeter() if config.meter == "ipmi" else RedfishMeter(config, host)


def remote_node_recorder(node_id: str, config: NodeMeterConfig):
    """Start a recorder on one node; it ends with the driver. Holds none of the node's resources."""
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor_class = ray.remote(num_cpus=0, max_restarts=0)(NodeMeterActor)
    return actor_class.options(scheduling_strategy=pinned).remote(config)


def node_domains() -> tuple[str, ...]:
    """The counters this node's devices should have: its GPUs, packages and DRAM, as far as they can be seen here."""
    gpus = [f"gpu:{uuid}" for uuid in installed_gpus()]
    return tuple(sorted({*gpus, *(c.domain for c in rapl.find_rapl_counters(rapl.POWERCAP_ROOT))}))
