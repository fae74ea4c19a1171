"""One worker's energy counters, followed together with the other workers of its host.

`workers.meters.nvml` and `workers.meters.rapl` know the devices; here their counters become `CounterRead`s on one scale per host.
Differences are taken elsewhere. What cannot be read is absent from the read, never 0. Failures never end a job:
`open_meter` always returns a meter, at worst one whose method is "missing".

* **Rate.** All workers of a host together read a device's counter at most every `min_spacing_ns` and, by default, at
  boundaries and once a second, RAPL every ten (`watch`); in between the last value stands. A boundary is therefore up
  to 200 ms late in what it has seen: what one segment misses the next one gets, and the sum is exact.
* **Resets and wraps.** The book (`workers.meters.counter_book`) holds each counter's last reading. A counter that went back
  without a wrap, leapt, or was out of sight for so long that it may have wrapped begins a new epoch; nothing is
  subtracted across one.
* A powered device always draws something: a counter that reads 0 or stands still is broken, not idle. An account therefore ends
  with a reading in which each has moved (`read_afresh`).
* The counters are those of whole devices, with all that other jobs do on them.

The estimate (`CounterRead.estimate_mj`) is CPU time at an assumed power and is never mixed with the counters.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from millijoule.workers.meters.counter_book import (
    LOCK_TIMEOUT_S,
    BookedCounter,
    BookedState,
    CounterBook,
    is_plausible,
)
from millijoule.workers.meters.nvml import GpuCounter, GpuPower, Gpus, open_gpus
from millijoule.workers.meters.rapl import MAX_PACKAGE_WATTS, POWERCAP_ROOT, RaplCounter, find_rapl_counters
from millijoule.workers.schemas import CounterRead, PowerSample

log = logging.getLogger(__name__)

#: A counter that did not move for this long is not working: fifty updates of NVML's.
STALL_AFTER_NS = 5_000_000_000
#: How often `watch` looks at a device, whoever of the host's workers comes first in a period.
WATCH_PERIOD_NS = 1_000_000_000
#: Between two tries of `read_afresh`.
FRESH_POLL_S = 0.02
#: Assumed power of one busy CPU core with its share of caches and memory, for the estimate. An assumption, not a
#: measurement: server cores lie between about 2 and 15 W.
WATTS_PER_CORE = 10
ESTIMATE_METHOD = f"cpu-time x {WATTS_PER_CORE} W/core"


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

    def read_afresh(self) -> CounterRead:
        """The same, waiting until every counter has moved since the call, or is found to fail."""

    def close(self) -> None: ...


#: One hardware counter. `units_per_mj` units are a millijoule; one with `wraps_at` restarts there. It is read no more often
#: than every `min_spacing_ns`, and at least every `watch_period_ns`.
Counter = GpuCounter | RaplCounter


@dataclass
class CounterMeter:
    """An `EnergyMeter` over any counters, all read through the host's `CounterBook`."""

    boot_id: str
    counters: tuple[Counter, ...]
    book: CounterBook | None  # None: there is nothing to follow
    boards: Gpus = Gpus()  # noqa: RUF009 (frozen)
    clock_ns: Callable[[], int] = time.monotonic_ns
    cpu_ns_elsewhere: Callable[[], int] = lambda: (
        0
    )  # processor time of living processes that compute for this one
    method: str = field(init=False)
    domains: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # the book's lock holds between processes only
        self._last: dict[str, int] = {}
        self._epoch = 0
        self._wrap_epoch: int | None = None
        self._failing: set[str] = set()
        self.counters = tuple(self._readable(self.counters))
        self.domains = tuple(c.domain for c in self.counters)
        methods = dict.fromkeys("nvml-counter" if d.startswith("gpu:") else "rapl" for d in self.domains)
        self.method = "+".join(methods) or "missing"

    def read(self) -> CounterRead:
        """Read every counter under the book's lock, from any thread; see `EnergyMeter.read`.

        `t_mono_ns` is taken at the end; the oldest value was sampled at most `latency_ns` before it.
        """
        values: dict[str, tuple[int, int]] = {}
        with self._state() as state:
            began_ns = self.clock_ns()
            if state is None:
                assert self.book is not None
                log.warning("%s: locked by another reader; energy is missing for now", self.book.path)
            else:
                values = self._read_counters(self.counters, state)
            now_ns = self.clock_ns()  # inside the lock: reads of a host are ordered in time as in value
        oldest_ns = min((sampled_ns for _, sampled_ns in values.values()), default=began_ns)
        return CounterRead(
            boot_id=self.boot_id,
            t_mono_ns=now_ns,
            t_wall_ns=time.time_ns(),
            latency_ns=now_ns - min(oldest_ns, began_ns),
            energy_mj={domain: mj for domain, (mj, _) in values.items()},
            estimate_mj=estimate_cpu_mj(self.cpu_ns_elsewhere()),
            epoch=self._epoch,
            wrap_epoch=self._wrap_epoch,
        )

    def read_afresh(self) -> CounterRead:
        """A read whose every counter has moved since this call began: for the end of an account, after which nobody reads.

        One that has just frozen cannot be told from one that has nothing new yet, and nobody comes later to see it leap: so a
        counter that stands is waited for, until it moves or is absent like any that fails (`STALL_AFTER_NS`). That it is ahead of
        the last reading before the call says nothing: it may have moved, and frozen, in between. Two readings in the call must differ.
        """
        asked_ns = self.clock_ns()
        # a counter that stands is known to fail by then; what is left is a book that others hold
        deadline_ns = (
            asked_ns + STALL_AFTER_NS + 3 * max((c.min_spacing_ns for c in self.counters), default=0)
        )
        first_ns: dict[str, int] = {}
        while True:
            read = self.read()
            with self._state() as state:
                is_settled = state is not None and self._have_settled(state, asked_ns, first_ns)
            if is_settled:
                return self.read()  # what another process' read has settled is in it, too
            if self.clock_ns() >= deadline_ns:
                return read
            time.sleep(FRESH_POLL_S)

    def _have_settled(self, state: BookedState, asked_ns: int, first_ns: dict[str, int]) -> bool:
        """Whether every counter has moved between two readings since `asked_ns`, or failed; `first_ns`: when each was first read."""
        for domain in (c.domain for c in self.counters):
            if (tried_ns := state.last_try_ns(domain)) >= asked_ns:
                first_ns.setdefault(domain, tried_ns)
        return all(
            c.domain in first_ns and state.has_settled(c.domain, first_ns[c.domain]) for c in self.counters
        )

    def watch(self) -> dict[str, PowerSample]:
        """Look after the devices nobody looked after in their period; call about once per `WATCH_PERIOD_NS`.

        Counters are read so that no wrap or reset stays unseen. Power is sampled by the first worker of the host that
        comes: the samples returned, by GPU UUID, are in nobody else's hands.
        """
        samples: dict[str, PowerSample] = {}
        with self._state() as state:
            if state is None:
                return samples
            now_ns = self.clock_ns()
            due = [
                c
                for c in self.counters
                if state.last_try_ns(c.domain) // c.watch_period_ns < now_ns // c.watch_period_ns
            ]
            self._read_counters(due, state)
            for power in self.boards.powers:
                if state.power_ns.get(power.uuid, -1) // WATCH_PERIOD_NS < now_ns // WATCH_PERIOD_NS:
                    state.power_ns[power.uuid] = self.clock_ns()
                    sample = self._read_power(power)
                    if sample is not None:
                        samples[power.uuid] = sample
        return samples

    def close(self) -> None:
        if self.book is not None:
            self.book.close()
        self.boards.close()

    @contextmanager
    def _state(self) -> Iterator[BookedState | None]:
        """The book's state; None where another thread or process holds it too long."""
        if self.book is None:
            yield BookedState()
            return
        if not self._lock.acquire(timeout=LOCK_TIMEOUT_S):
            yield None
            return
        try:
            with self.book.locked() as state:
                yield state
        finally:
            self._lock.release()

    def _readable(self, counters: Sequence[Counter]) -> Iterator[Counter]:
        """Those of `counters` that can be read and give more than 0."""
        with self._state() as shared:
            state = shared or BookedState()
            for counter in counters:
                known = counter.domain in state.counters and counter.domain not in state.failed_ns
                if known and state.is_fresh(counter.domain, self.clock_ns(), counter.min_spacing_ns):
                    yield counter
                    continue
                sampled = self._sample(counter, state, logging.INFO)
                if sampled is not None:
                    self._follow(counter, state, sampled[0], sampled[1])
                    yield counter

    def _read_counters(self, counters: Iterable[Counter], state: BookedState) -> dict[str, tuple[int, int]]:
        """By domain the unwrapped counter in mJ and when it was sampled; what cannot be read is left out."""
        values = {c.domain: value for c in counters if (value := self._read_counter(c, state)) is not None}
        if state.epoch != self._epoch:
            self._last.clear()
        elif any(mj < self._last.get(domain, 0) for domain, (mj, _) in values.items()):
            state.epoch += 1  # a counter is behind our own last read: the book was lost in between
            self._last.clear()
        self._epoch, self._wrap_epoch = state.epoch, state.wrap_epoch
        self._last.update((domain, mj) for domain, (mj, _) in values.items())
        return values

    def _read_counter(self, counter: Counter, state: BookedState) -> tuple[int, int] | None:
        """The unwrapped counter in mJ and when it was sampled, or None; brings `state` up to date."""
        if not state.is_fresh(counter.domain, self.clock_ns(), counter.min_spacing_ns):
            sampled = self._sample(counter, state)
            if sampled is None or not self._follow(counter, state, *sampled):
                return None
            self._failing.discard(counter.domain)
        booked = state.counters.get(counter.domain)
        if booked is None or counter.domain in state.failed_ns:
            return None
        return booked.total // counter.units_per_mj, booked.t_read_ns - booked.age_ns

    def _sample(
        self, counter: Counter, state: BookedState, level: int = logging.WARNING
    ) -> tuple[int, int] | None:
        """The device's own reading and its age, or None where it has none now."""
        try:
            raw, age_ns = counter.read()
            if raw <= 0:
                raise ValueError(f"reads {raw}")
        except Exception as error:  # a driver's trouble is a missing number, not a lost job
            state.failed_ns[counter.domain] = self.clock_ns()
            self._report_failure(counter.domain, error, level)
            return None
        state.failed_ns.pop(counter.domain, None)
        return raw, age_ns

    def _follow(self, counter: Counter, state: BookedState, raw: int, age_ns: int) -> bool:
        """Book `raw`, in a new epoch where it cannot follow from the last one; False where the counter stands."""
        now_ns = self.clock_ns()
        booked = state.counters.get(counter.domain)
        if booked is None:
            state.counters[counter.domain] = BookedCounter(raw, raw, now_ns, now_ns, age_ns)
            return True
        if raw == booked.raw:
            if now_ns - booked.t_changed_ns > STALL_AFTER_NS:
                state.failed_ns[counter.domain] = now_ns
                self._report_failure(counter.domain, ValueError(f"stands still at {raw}"))
                return False
            booked.t_read_ns, booked.age_ns = now_ns, age_ns
            return True
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
        state.counters[counter.domain] = BookedCounter(raw, total, now_ns, now_ns, age_ns)
        return True

    def _read_power(self, power: GpuPower) -> PowerSample | None:
        try:
            average_mw, instant_mw, age_ns = power.read()
            if average_mw is None and instant_mw is None:
                raise ValueError("neither average nor instantaneous power is supported")
        except Exception as error:  # as for counters
            self._report_failure(f"power of {power.uuid}", error, logging.INFO)
            return None
        return PowerSample(self.clock_ns() - age_ns, time.time_ns() - age_ns, average_mw, instant_mw)

    def _report_failure(self, name: str, error: Exception, level: int = logging.WARNING) -> None:
        if name not in self._failing:
            log.log(level, "%s: cannot be read (%s); reported as missing", name, error)
            self._failing.add(name)


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
        nvml: what has the names of `pynvml`, the default.
    """
    boot_id = boot_id or read_boot_id()
    boards = open_gpus(gpus, nvml) if gpus else Gpus()
    return CounterMeter(
        boot_id,
        (*boards.counters, *find_rapl_counters(powercap_root)),
        CounterBook(boot_id, book_directory),
        boards,
        clock_ns,
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


def estimate_cpu_mj(elsewhere_ns: int = 0) -> int:
    """Energy of this process and its finished children by `ESTIMATE_METHOD`, in millijoules since its start.

    Args:
        elsewhere_ns: processor time of others to count with it.
    """
    children = os.times()
    cpu_ns = time.process_time_ns() + round((children.children_user + children.children_system) * 1e9)
    return (cpu_ns + elsewhere_ns) * WATTS_PER_CORE // 1_000_000
