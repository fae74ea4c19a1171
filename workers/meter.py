"""Read the energy counters a worker can see: the GPU's own (NVML) and the processor's (RAPL).

A meter gives `CounterRead`s; differences are taken elsewhere. What cannot be read is absent from the read, never 0.
Failures never end a job: `open_meter` always returns a meter, at worst one whose method is "missing".

Facts behind the rules here:

* NVML's total energy (field 83) counts millijoules of the whole board since the driver was loaded and moves about
  every 100 ms (nvml.h 13; Zeus documentation). Reading it more often than a few times a second is reported to make
  it fall behind on workstation cards (Dauner et al.; not known for data-centre boards). So a device is read at most
  every `MIN_READ_SPACING_NS`, by all workers of a host together; in between the last value stands. A boundary
  is therefore up to 200 ms late in what it has seen: what one segment misses the next one gets, and the sum is exact.
* A MIG instance has no counter of its own, the board's would charge one tenant for all: such devices are missing.
* RAPL (powercap, `energy_uj`) counts microjoules and wraps at `max_energy_range_uj`, every two (AMD) to ten (Intel)
  minutes at full load. Some worker of the host has to read more often than that (`SegmentTimeline.touch`); after a
  longer silence the number of wraps is unknown and a new epoch begins. RAPL is readable by root only on most hosts,
  and 0 in most virtual machines. A package contains its cores; DRAM comes on top; "psys" contains both and is left
  out.
* A powered device always draws something: a counter that reads 0 or stands still is broken, not idle.
* The counters are those of whole devices, with all that other jobs do on them.

The estimate (`CounterRead.estimate_mj`) is CPU time at an assumed power and is never mixed with the counters.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from millijoule.workers.counter_book import BookedCounter, BookedState, CounterBook, is_plausible
from millijoule.workers.schemas import CounterRead

log = logging.getLogger(__name__)

#: Shortest time between two reads of one GPU's counter: two of its updates.
MIN_READ_SPACING_NS = 200_000_000
#: A counter that did not move for this long is not working: fifty updates of NVML's.
STALL_AFTER_NS = 5_000_000_000
#: No package draws more for long: how fast a RAPL counter may come round again.
MAX_PACKAGE_WATTS = 600
#: An NVML sample's own timestamp is believed up to this age; older ones mean that clocks were set.
_MAX_SAMPLE_AGE_NS = 60_000_000_000

#: Assumed power of one busy CPU core with its share of caches and memory, for the estimate. An assumption, not a
#: measurement: server cores lie between about 2 and 15 W.
WATTS_PER_CORE = 10
ESTIMATE_METHOD = f"cpu-time x {WATTS_PER_CORE} W/core"

POWERCAP_ROOT = Path("/sys/class/powercap")


class EnergyMeter(Protocol):
    """The counters of one worker.

    Attributes:
        method: "nvml-counter", "rapl", "nvml-counter+rapl" or "missing".
        domains: the domains that could be read when the meter was opened.
    """

    method: str
    domains: tuple[str, ...]

    def read(self) -> CounterRead:
        """Read everything now. Domains that fail are absent; never raises for them."""
        ...

    def close(self) -> None: ...


class Counter(Protocol):
    """One hardware counter. `units_per_mj` units are a millijoule; a counter with `wraps_at` restarts there."""

    domain: str
    units_per_mj: int
    wraps_at: int | None
    min_spacing_ns: int

    def read(self) -> tuple[int, int]:
        """The counter in its own unit, and how long ago (ns) the device says it sampled it (0: now).

        Raises:
            Exception: whatever the device's library raises where the counter cannot be read.
        """
        ...


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

    def read(self) -> tuple[int, int]:
        try:
            value = self.lib.nvmlDeviceGetFieldValues(
                self.handle, [self.lib.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION]
            )[0]
        except self.lib.NVMLError:
            value = None
        if value is None or value.nvmlReturn != self.lib.NVML_SUCCESS:
            return int(self.lib.nvmlDeviceGetTotalEnergyConsumption(self.handle)), 0
        energy_mj = getattr(value.value, self._member(value.valueType))
        age_ns = time.time_ns() - value.timestamp * 1000
        return int(energy_mj), age_ns if 0 < age_ns < _MAX_SAMPLE_AGE_NS else 0

    def _member(self, value_type: int) -> str:
        return {
            self.lib.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
            self.lib.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
            self.lib.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
            self.lib.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
        }[value_type]


@dataclass
class RaplCounter:
    """One powercap zone, microjoules. Source: Linux, Documentation/power/powercap/powercap.rst."""

    zone: Path
    domain: str
    wraps_at: int | None
    units_per_mj: int = 1000
    min_spacing_ns: int = 0

    def read(self) -> tuple[int, int]:
        return int((self.zone / "energy_uj").read_text()), 0


@dataclass
class CounterMeter:
    """An `EnergyMeter` over any counters, all read through the host's `CounterBook`."""

    boot_id: str
    counters: tuple[Counter, ...]
    book: CounterBook
    method: str
    on_close: Callable[[], None] = lambda: None
    clock_ns: Callable[[], int] = time.monotonic_ns
    domains: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.domains = tuple(c.domain for c in self.counters)
        self._lock = threading.Lock()  # the book's lock holds between processes only
        self._last: dict[str, int] = {}
        self._epoch = 0
        self._failing: set[str] = set()

    def read(self) -> CounterRead:
        """Read every counter under the book's lock, from any thread; see `EnergyMeter.read`.

        `t_mono_ns` is taken at the end; the oldest value was sampled at most `latency_ns` before it.
        """
        energy_mj: dict[str, int] = {}
        with self._lock, self.book.locked() as state:
            oldest_ns = self.clock_ns()
            if state is None:
                log.warning("%s: locked by another reader; energy is missing for now", self.book.path)
            else:
                for counter in self.counters:
                    value = self._read_counter(counter, state)
                    if value is not None:
                        energy_mj[counter.domain], sampled_ns = value
                        oldest_ns = min(oldest_ns, sampled_ns)
                self._keep_order(state, energy_mj)
            now_ns = self.clock_ns()  # inside the lock: reads of a host are ordered in time as in value
        return CounterRead(
            boot_id=self.boot_id,
            t_mono_ns=now_ns,
            t_wall_ns=time.time_ns(),
            latency_ns=now_ns - oldest_ns,
            energy_mj=energy_mj,
            estimate_mj=estimate_cpu_mj(),
            epoch=self._epoch,
        )

    def close(self) -> None:
        self.book.close()
        self.on_close()

    def _keep_order(self, state: BookedState, energy_mj: dict[str, int]) -> None:
        """Begin a new epoch where a counter is behind our own last read: the book was lost in between."""
        if state.epoch != self._epoch:
            self._last.clear()
        elif any(mj < self._last.get(domain, 0) for domain, mj in energy_mj.items()):
            state.epoch += 1
            self._last.clear()
        self._epoch = state.epoch
        self._last.update(energy_mj)

    def _read_counter(self, counter: Counter, state: BookedState) -> tuple[int, int] | None:
        """The unwrapped counter in mJ and when it was sampled, or None; brings `state` up to date."""
        booked = state.counters.get(counter.domain)
        now_ns = self.clock_ns()
        if booked is not None and 0 <= now_ns - booked.t_read_ns < counter.min_spacing_ns:
            return booked.total // counter.units_per_mj, booked.t_read_ns
        try:
            raw, age_ns = counter.read()
            if raw <= 0:
                raise ValueError(f"reads {raw}")
        except Exception as error:  # a driver's trouble is a missing number, not a lost job
            self._report_failure(counter.domain, error)
            return None
        now_ns = self.clock_ns()
        if booked is None:
            booked = state.counters[counter.domain] = BookedCounter(raw, raw, now_ns, now_ns)
        elif raw == booked.raw:
            if now_ns - booked.t_changed_ns > STALL_AFTER_NS:
                self._report_failure(counter.domain, ValueError(f"stands still at {raw}"))
                return None
            booked.t_read_ns = now_ns
        else:
            increase, elapsed_ns = raw - booked.raw, now_ns - booked.t_read_ns
            if increase < 0 and counter.wraps_at is not None:
                increase %= counter.wraps_at
            wraps_known = elapsed_ns < _shortest_round_ns(counter)
            if wraps_known and is_plausible(increase // counter.units_per_mj, elapsed_ns):
                total = booked.total + increase
            else:
                log.warning(
                    "%s: from %d to %d in %.1f s: %s; a new epoch begins",
                    counter.domain,
                    booked.raw,
                    raw,
                    elapsed_ns / 1e9,
                    "reset" if wraps_known else "may have wrapped unseen",
                )
                state.epoch += 1
                total = raw
            booked = state.counters[counter.domain] = BookedCounter(raw, total, now_ns, now_ns)
        self._failing.discard(counter.domain)
        return booked.total // counter.units_per_mj, now_ns - age_ns

    def _report_failure(self, domain: str, error: Exception) -> None:
        if domain not in self._failing:
            log.warning("%s: energy counter cannot be read (%s); reported as missing", domain, error)
            self._failing.add(domain)


def open_meter(
    gpus: Sequence[str] | None = None,
    *,
    nvml: Any = None,
    powercap_root: Path = POWERCAP_ROOT,
    boot_id: str | None = None,
    book_directory: Path | None = None,
    clock_ns: Callable[[], int] = time.monotonic_ns,
) -> CounterMeter:
    """A meter over whatever can be read here; never fails.

    Args:
        gpus: the worker's devices as `CUDA_VISIBLE_DEVICES` lists them: UUIDs ("GPU-...", beginnings will do) or
            indices. None or empty on a worker without one.
        nvml: the NVML binding, default `pynvml`.
        powercap_root: default /sys/class/powercap.
        boot_id: of this host, default the kernel's.
        book_directory: where the workers of a host share their counters; see `CounterBook`.
        clock_ns: CLOCK_MONOTONIC in nanoseconds.
    """
    boot_id = boot_id or read_boot_id()
    gpu_counters, shutdown = _open_gpus(gpus, nvml) if gpus else ((), lambda: None)
    rapl_counters = tuple(_usable(c) for c in find_rapl_counters(powercap_root))
    parts = {"nvml-counter": gpu_counters, "rapl": tuple(c for c in rapl_counters if c is not None)}
    return CounterMeter(
        boot_id,
        tuple(c for part in parts.values() for c in part),
        CounterBook(boot_id, book_directory),
        "+".join(name for name, part in parts.items() if part) or "missing",
        on_close=shutdown,
        clock_ns=clock_ns,
    )


def _shortest_round_ns(counter: Counter) -> float:
    """The time in which `counter` cannot have come round to where it was."""
    if counter.wraps_at is None:
        return float("inf")
    return counter.wraps_at / counter.units_per_mj / MAX_PACKAGE_WATTS * 1_000_000


def read_boot_id() -> str:
    """The kernel's id of this boot; CLOCK_MONOTONIC and RAPL are comparable within one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown-{socket.gethostname()}"


def estimate_cpu_mj() -> int:
    """Energy of this process and its finished children by `ESTIMATE_METHOD`, in millijoules since its start."""
    children = os.times()
    cpu_ns = time.process_time_ns() + round((children.children_user + children.children_system) * 1e9)
    return cpu_ns * WATTS_PER_CORE // 1_000_000


def find_rapl_counters(root: Path = POWERCAP_ROOT) -> Iterator[RaplCounter]:
    """The packages under `root` and their DRAM, whether readable or not."""
    # intel-rapl is also AMD's name here; intel-rapl-mmio shows the same packages a second time
    for package in sorted(root.glob("intel-rapl:*")):
        if package.name.count(":") != 1:
            continue
        name = _zone_name(package)
        if name is None or not name.startswith("package"):
            continue
        yield RaplCounter(package, f"cpu:{name}", _wrap_of(package))
        for zone in sorted(root.glob(f"{package.name}:*")) or sorted(package.glob(f"{package.name}:*")):
            if _zone_name(zone) == "dram":
                yield RaplCounter(zone, f"dram:{name}", _wrap_of(zone))


def _zone_name(zone: Path) -> str | None:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return None


def _wrap_of(zone: Path) -> int | None:
    try:
        return int((zone / "max_energy_range_uj").read_text()) or None
    except (OSError, ValueError):
        return None


def _usable(counter: Counter) -> Counter | None:
    """`counter` if it can be read now and gives more than 0."""
    try:
        value, _ = counter.read()
    except Exception as error:  # NVML's errors are its own, a folder's are OSError: all mean missing
        log.info("%s: no energy counter (%s)", counter.domain, error)
        return None
    if value <= 0:
        log.info("%s: its energy counter reads %d; taken as missing", counter.domain, value)
        return None
    return counter


def _open_gpus(gpus: Sequence[str], lib: Any) -> tuple[tuple[Counter, ...], Callable[[], None]]:
    """Counters of `gpus` and what closes the library again."""
    try:
        lib = lib or importlib.import_module("pynvml")
        lib.nvmlInit()
    except Exception as error:  # no driver, no library, no permission
        log.warning("NVML is not available (%s); GPU energy is missing", error)
        return (), lambda: None
    counters: dict[str, Counter] = {}
    for gpu in gpus:
        try:
            uuid, handle = _find_gpu(lib, gpu.strip())
            if _is_partitioned(lib, handle):
                raise ValueError("MIG is on and instances have no energy counter")
        except Exception as error:  # as above: a GPU we cannot find is missing, not fatal
            log.warning("GPU %s: %s; its energy is missing", gpu, error)
            continue
        counter = _usable(GpuCounter(lib, handle, f"gpu:{uuid}"))
        if counter is not None:
            counters[counter.domain] = counter
    return tuple(counters.values()), lambda: _shut_down(lib)


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
    devices = [(_text(lib.nvmlDeviceGetUUID(h)), h) for h in handles]
    if gpu.isdigit():
        # NVML counts in PCI order, CUDA puts faster devices first: the same only among equals
        if len({_text(lib.nvmlDeviceGetName(h)) for h in handles}) > 1:
            raise ValueError("an index is ambiguous between unlike GPUs: set CUDA_VISIBLE_DEVICES to UUIDs")
        if int(gpu) >= len(devices):
            raise ValueError(f"this host has {len(devices)} GPUs")
        return devices[int(gpu)]
    found = [d for d in devices if d[0].startswith(gpu)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} of this host's {len(devices)} GPUs have that UUID")
    return found[0]


def _is_partitioned(lib: Any, handle: Any) -> bool:
    try:
        return bool(lib.nvmlDeviceGetMigMode(handle)[0])
    except lib.NVMLError:  # NotSupported: a board without MIG
        return False


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
