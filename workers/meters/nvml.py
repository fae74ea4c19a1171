"""What NVML can say about the energy of a GPU: its counter (field 83) and its power (fields 185 and 186).

Devices are addressed by their full UUID from here on, however CUDA named them. Facts behind the rules:

* Field 83 counts millijoules of the whole board since the driver was loaded and moves about every 100 ms (nvml.h 13;
  Zeus documentation). Reading it more often than a few times a second is reported to make it fall behind on
  workstation cards (Dauner et al.; not known for data-centre boards): see `MIN_READ_SPACING_NS`.
* Field 185 is a one-second average, 186 is instantaneous; `nvmlDeviceGetPowerUsage` is one or the other, depending on
  the chip, and is not used. Both are windows of 25 ms in 100 ms on recent boards: they show the course of power, they
  do not measure energy.
* A MIG instance has neither of its own, the board's would charge one tenant for all: such devices are missing.
* A board draws something whenever it answers: 0 is a broken reading, not an idle device.
* Only calls that read are made. Nothing is enabled, profiled, locked or reset: watching must not change the draw.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from millijoule.workers.meters.counter_book import MAX_DOMAIN_WATTS

log = logging.getLogger(__name__)

#: Shortest time between two reads of one GPU's counter: two of its updates.
MIN_READ_SPACING_NS = 200_000_000
#: A driver that is loaded again resets its counters; seen within a second, little is lost.
WATCH_PERIOD_NS = 1_000_000_000
#: An NVML sample's own timestamp is believed up to this age; older ones mean that clocks were set.
_MAX_SAMPLE_AGE_NS = 60_000_000_000


@dataclass
class GpuCounter:
    """NVML's total energy of one board, millijoules.

    Source: nvml.h 13, `nvmlDeviceGetFieldValues`, `NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION`.
    """

    lib: Any
    handle: Any
    domain: str
    units_per_mj: int = 1
    wraps_at: int | None = None
    min_spacing_ns: int = MIN_READ_SPACING_NS
    watch_period_ns: int = WATCH_PERIOD_NS

    def read(self) -> tuple[int, int]:
        """The counter in its own unit, and how long ago (ns) the device says it sampled it (0: now)."""
        lib = self.lib
        try:
            (value,) = lib.nvmlDeviceGetFieldValues(self.handle, [lib.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION])
            if value.nvmlReturn == lib.NVML_SUCCESS:
                return _number(lib, value), _age_ns(value)
        except lib.NVMLError:
            pass
        return int(
            lib.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        ), 0  # an older driver: without its age


@dataclass
class GpuPower:
    """The power of one board: fields 185 and 186 in one call, for the GPU with its memory (scope 0).

    Source: nvml.h 13, `NVML_FI_DEV_POWER_AVERAGE`, `NVML_FI_DEV_POWER_INSTANT`, `NVML_POWER_SCOPE_GPU`.
    """

    lib: Any
    handle: Any
    uuid: str

    def read(self) -> tuple[int | None, int | None, int]:
        """Average and instantaneous power in milliwatts (None: not supported), and the older one's age in ns."""
        scope = self.lib.NVML_POWER_SCOPE_GPU
        values = self.lib.nvmlDeviceGetFieldValues(
            self.handle,
            [(self.lib.NVML_FI_DEV_POWER_AVERAGE, scope), (self.lib.NVML_FI_DEV_POWER_INSTANT, scope)],
        )
        average_mw, instant_mw = (self._milliwatts(v) for v in values)
        ages = [_age_ns(v) for v, mw in zip(values, (average_mw, instant_mw), strict=True) if mw is not None]
        return average_mw, instant_mw, max(ages, default=0)

    def _milliwatts(self, value: Any) -> int | None:
        if value.nvmlReturn != self.lib.NVML_SUCCESS:
            return None
        power_mw = _number(self.lib, value)
        return power_mw if 0 < power_mw <= MAX_DOMAIN_WATTS * 1000 else None


def _number(lib: Any, value: Any) -> int:
    member = {
        lib.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
        lib.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        lib.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
        lib.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
    }[value.valueType]
    return int(getattr(value.value, member))


def _age_ns(value: Any) -> int:
    """How long ago NVML says it took `value`; 0 where it does not say or cannot be right."""
    age_ns = time.time_ns() - value.timestamp * 1000
    return age_ns if 0 < age_ns < _MAX_SAMPLE_AGE_NS else 0


@dataclass(frozen=True)
class Gpus:
    """The boards found for a worker, in its order. Counters and power may turn out not to be supported."""

    uuids: tuple[str, ...] = ()  # full ("GPU-...")
    counters: tuple[GpuCounter, ...] = ()
    powers: tuple[GpuPower, ...] = ()
    names: tuple[str | None, ...] = ()  # product names; None: the driver does not say
    driver_version: str | None = None
    unreadable: tuple[str, ...] = ()  # left out: by full UUID where that is known, else as they were named
    close: Callable[[], None] = lambda: None


def _start(lib: Any) -> Any:
    """`lib`, or pynvml where it is None, ready to be asked; raises its NVMLError where there is no driver."""
    if lib is None:
        import pynvml  # here: 4 MB that only a process beside a board needs

        lib = pynvml
    lib.nvmlInit()
    return lib


def open_gpus(gpus: Sequence[str], lib: Any = None) -> Gpus:
    """Find `gpus` (as `CUDA_VISIBLE_DEVICES` names them); what has no counter of its own or cannot be found is left out."""
    try:
        lib = _start(lib)
    except Exception as error:  # no driver, no library, no permission
        log.warning("NVML is not available (%s); GPU energy is missing", error)
        return Gpus(unreadable=tuple(gpus))
    found: dict[str, Any] = {}
    unreadable: list[str] = []
    for gpu in gpus:
        name = gpu
        try:
            name, handle = _find_gpu(lib, gpu.strip())
            if _is_partitioned(lib, handle):
                raise ValueError("MIG is on and instances have no energy counter")
        except Exception as error:  # as above: a GPU we cannot find is missing, not fatal
            log.warning("GPU %s: %s; its energy is missing", gpu, error)
            unreadable.append(name)
            continue
        found[name] = handle
    return Gpus(
        tuple(found),
        tuple(GpuCounter(lib, handle, f"gpu:{uuid}") for uuid, handle in found.items()),
        tuple(GpuPower(lib, handle, uuid) for uuid, handle in found.items()),
        tuple(_ask(lib, lib.nvmlDeviceGetName, handle) for handle in found.values()),
        _ask(lib, lib.nvmlSystemGetDriverVersion),
        tuple(unreadable),
        lambda: _shut_down(lib),
    )


def installed_gpus() -> tuple[str, ...]:
    """Full UUIDs of all boards NVML shows on this host; empty where it shows none or is not there."""
    try:
        lib = _start(None)
    except Exception as error:  # as in `open_gpus`
        log.info("NVML is not available (%s)", error)
        return ()
    try:
        handles = [lib.nvmlDeviceGetHandleByIndex(i) for i in range(lib.nvmlDeviceGetCount())]
        return tuple(lib.nvmlDeviceGetUUID(h) for h in handles)
    except lib.NVMLError as error:
        log.warning("NVML cannot list the GPUs: %s", error)
        return ()
    finally:
        _shut_down(lib)


def _ask(lib: Any, question: Callable[..., str], *about: Any) -> str | None:
    """A name that is good to know; None where the driver does not tell it."""
    try:
        return question(*about)
    except lib.NVMLError:
        return None


def _shut_down(lib: Any) -> None:
    try:
        lib.nvmlShutdown()
    except lib.NVMLError as error:  # the process is about to end anyway
        log.info("NVML did not shut down: %s", error)


def _find_gpu(lib: Any, gpu: str) -> tuple[str, Any]:
    """The full UUID and handle of a device named as CUDA names it.

    Raises:
        ValueError: a MIG instance, no such device, or more than one that it could be.
    """
    if gpu.startswith("MIG-"):
        raise ValueError("a MIG instance has no energy counter of its own")
    handles = [lib.nvmlDeviceGetHandleByIndex(i) for i in range(lib.nvmlDeviceGetCount())]
    devices = [(lib.nvmlDeviceGetUUID(h), h) for h in handles]
    if gpu.isdigit():
        # NVML counts in PCI order, CUDA puts faster devices first: the same only among equals
        if len({lib.nvmlDeviceGetName(h) for h in handles}) > 1:
            raise ValueError("an index is ambiguous between unlike GPUs: set CUDA_VISIBLE_DEVICES to UUIDs")
        if int(gpu) >= len(devices):
            raise ValueError(f"this host has {len(devices)} GPUs")
        return devices[int(gpu)]
    if not gpu.startswith("GPU-"):
        raise ValueError("not a GPU's UUID or index")
    found = [d for d in devices if d[0].startswith(gpu)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} of this host's {len(devices)} GPUs have that UUID")
    return found[0]


def _is_partitioned(lib: Any, handle: Any) -> bool:
    try:
        return bool(lib.nvmlDeviceGetMigMode(handle)[0])
    except lib.NVMLError:  # NotSupported: a board without MIG
        return False
