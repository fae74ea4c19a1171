"""What a worker says about itself before and once it has started: its node, its device, its software.

Asked of the libraries the worker uses anyway; nothing is imported for it. What they do not say is None.
"""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from millijoule.kernels.native_library import kernel_words
from millijoule.kernels.png import encoder_name
from millijoule.workers.meters.meter import CounterMeter
from millijoule.workers.schemas import CounterRead, WorkerEnvironment


def describe_worker(
    worker_id: str,
    driver_epoch: int,
    node_id: str,
    assigned_gpus: Sequence[str],
    meter: CounterMeter,
    opened: CounterRead,
    kernels: str | None = None,
) -> WorkerEnvironment:
    """The environment of this process; before its model is loaded, what the framework knows is not in it.

    Args:
        assigned_gpus: as `CUDA_VISIBLE_DEVICES` lists them; empty on a CPU worker.
        kernels: what draws, as the generator says once it is loaded; None: what computes on this CPU.
    """
    torch = sys.modules.get("torch")
    # without telemetry as Ray names them
    gpus = (*meter.boards.uuids, *meter.boards.unreadable) or tuple(assigned_gpus)
    name: str | None
    if not assigned_gpus:
        name = cpu_name()
    elif meter.boards.names:
        name = meter.boards.names[0]
    else:  # a MIG instance, or no NVML: the framework may know
        name = str(torch.cuda.get_device_name(0)) if torch and torch.cuda.is_available() else None
    return WorkerEnvironment(
        worker_id=worker_id,
        driver_epoch=driver_epoch,
        node_id=node_id,
        host=socket.gethostname(),
        device=(*gpus, "cpu")[0],
        gpus=gpus,
        device_name=name,
        driver_version=meter.boards.driver_version,
        python_version=platform.python_version(),
        torch_version=str(torch.__version__) if torch else None,
        energy_method=meter.method,
        opened=opened,
        png_encoder=encoder_name(),
        kernels=kernels or kernel_words(),
    )


def cpu_name() -> str | None:
    """The processor's product name as the kernel states it; None where it does not (most ARM machines)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
