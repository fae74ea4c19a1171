"""One GPU with its energy counter, or, in a rehearsal, a CPU beside a counter that is made up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from millijoule.jobs.measuring.stand_ins import StandInNvml, board_uuid
from millijoule.workers.errors import InputError
from millijoule.workers.meters.meter import CounterMeter, open_meter
from millijoule.workers.schemas import CounterRead


@dataclass(frozen=True)
class OneGpu:
    """What measures and what is measured.

    Attributes:
        device: "cuda", or "cpu" in a rehearsal.
        domain: the counter of this board among those of `meter`.
        synchronize: returns when the device has nothing left to do.
    """

    name: str
    device: str
    meter: CounterMeter
    domain: str
    synchronize: Callable[[], None]


def open_one_gpu(command: str, index: int, *, stand_in: bool) -> OneGpu:
    """The GPU that PyTorch has at `index`; `command` is for messages.

    Raises:
        InputError: there is none, or its counter cannot be read.
    """
    import torch

    if stand_in:
        uuid, name, device = board_uuid(0), "stand-in", "cpu"
        meter = open_meter([uuid], nvml=StandInNvml(1))
    else:
        if not torch.cuda.is_available():
            raise InputError(f"{command}: PyTorch finds no GPU here")
        torch.cuda.set_device(index)
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        name, device = torch.cuda.get_device_name(index), "cuda"
        meter = open_meter([uuid])
    domain = next((d for d in meter.domains if uuid in d), None)
    if domain is None:
        raise InputError(f"{command}: the energy counter of {uuid} cannot be read")
    return OneGpu(name, device, meter, domain, torch.cuda.synchronize if device == "cuda" else lambda: None)


def run_for(gpu: OneGpu, work: Callable[[], object], seconds: float) -> dict[str, Any]:
    """`work` again and again for `seconds`: how often it was done, and what that took."""
    work()
    gpu.synchronize()
    before, began, done = gpu.meter.read(), time.monotonic(), 0
    while not done or time.monotonic() - began < seconds:
        work()
        done += 1
        if done % 8 == 0:
            gpu.synchronize()  # or the queue would grow beyond the block
    gpu.synchronize()
    took, after = time.monotonic() - began, gpu.meter.read()
    joules = joules_between(gpu.domain, before, after)
    return {"calls": done, "seconds": took, "joules": joules, "watts": round(joules / took, 1)}


def joules_between(domain: str, before: CounterRead, after: CounterRead) -> float:
    """What the counter `domain` grew by.

    Raises:
        RuntimeError: it was reset or lost in between.
    """
    read = domain in before.energy_mj and domain in after.energy_mj
    if not read or before.epoch_of(domain) != after.epoch_of(domain):
        raise RuntimeError(f"{domain}: the counter was reset or lost during a block; run it again")
    return (after.energy_mj[domain] - before.energy_mj[domain]) / 1000


def captured(work: Callable[[], object], gpu: OneGpu) -> Callable[[], object]:
    """`work` as a CUDA graph, on a GPU."""
    work()
    if gpu.device != "cuda":
        return work
    import torch

    gpu.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
