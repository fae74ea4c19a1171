"""The energy of a whole node, from a meter outside its devices: what fans, CPUs, memory and power supplies use too.

A meter gives readings: a cumulative energy, or power now. Readings become a `NodeSeries`, and the series answers one
question: how much between two wall times, and how far off can that be. That is one side of closure check C3; the
devices' counters are the other (`pipeline.energy.node_closure`). The answer is None wherever it would need a guess: before the first reading, after
the last, across a reset, across a silence. Failures never end a job.

`workers.node_meters.redfish` and `workers.node_meters.ipmi` read a management controller, `workers.node_meters.pdu` a power strip's CSV.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal, Protocol

from millijoule.workers.errors import InputError
from millijoule.workers.meters.periodic import PeriodicThread

log = logging.getLogger(__name__)

Quantity = Literal["energy", "power"]

#: Millijoules or milliwatts in the units meters speak.
MJ_PER_KWH = 3_600_000_000
MJ_PER_J = 1_000
MW_PER_W = 1_000

#: A cumulative meter that says more than this (watts, averaged between two readings) is misread. No node draws half.
MAX_NODE_WATTS = 100_000

#: Larger amounts do not fit a table's integer.
_MOST = 1 << 62

#: Management controllers answer slowly and renew their sensors about once a second or less; an hour has 360 of these.
DEFAULT_PERIOD_S = 10.0
#: Power is not integrated across a silence of more than this many periods.
MAX_MISSED_PERIODS = 3
#: A cumulative meter known this well is taken before integrated power, which does not see what it does not sample.
GOOD_TOLERANCE_SHARE = 0.02
#: What a recorder keeps for whoever takes it: more than a day of two readings every ten seconds.
MAX_WAITING = 20_000
#: `NodeRecorder.stop` waits this long for a request in progress; a request that takes longer is abandoned.
STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class NodeReading:
    """What a meter said: `value` in millijoules (energy, cumulative) or milliwatts (power).

    `t_wall_ns` is our clock, right to `t_error_ns` (half the time the answer took). `quantum` is the value of the last
    digit. A source may give readings of both quantities.
    """

    source: str
    quantity: Quantity
    t_wall_ns: int
    value: int
    quantum: int
    t_error_ns: int = 0


@dataclass(frozen=True)
class NodeFailure:
    """A meter began not to answer, or to fail in another way; our wall clock."""

    t_wall_ns: int
    reason: str


class MeterFailure(Exception):
    """A meter could not be read now; the message is the reason and holds no secret."""


class NodeMeter(Protocol):
    """A node's meter. `name` is for messages and holds no secret."""

    name: str

    def read(self) -> tuple[NodeReading, ...]:
        """Read now, at least one reading; may take seconds.

        Raises:
            MeterFailure: it could not be read.
        """


def middle_since(began_ns: int) -> tuple[int, int]:
    """Of a request that began at wall time `began_ns` and ends now: its middle (wall ns), and half its length (ns)."""
    half_ns = max(time.time_ns() - began_ns, 0) // 2
    return began_ns + half_ns, half_ns


@dataclass(frozen=True)
class NodeEnergy:
    """Energy of a node between two wall times. `energy_mj` None: not known, `note` says why.

    The true difference of the meter lies within `tolerance_mj` of `energy_mj`, so far as the series can know: see
    `NodeSeries`.
    """

    source: str
    energy_mj: int | None
    tolerance_mj: int | None
    note: str


@dataclass(frozen=True)
class NodeSeries:
    """Readings of one quantity of one node, in strict order of time.

    Attributes:
        source: for example "redfish-energy", "ipmi-dcmi-power", "pdu-csv-energy".
        values: millijoules or milliwatts, as `quantity` says.
        quantum: the value of the last digit.
        max_gap_ns: power is not integrated across more than this.
        clock_error_ns: how far the meter's times may be from the host's.
        accuracy_share: of the instrument, as its maker or a calibration states it; None: not stated, and then not in
            the tolerance.
    """

    source: str
    quantity: Quantity
    t_wall_ns: Sequence[int]
    values: Sequence[int]
    quantum: int
    max_gap_ns: int
    clock_error_ns: int = 0
    accuracy_share: float | None = None

    def energy_between(self, t_open_wall_ns: int, t_close_wall_ns: int) -> NodeEnergy:
        """Energy from one wall time to a later one.

        A cumulative meter is interpolated linearly at both ends; the readings around each end bound the error, because
        a counter only grows. Power is integrated by trapezoids; its tolerance holds if power went straight up or down
        between two samples, and is too small for a node that did something else in between.
        """
        times = self.t_wall_ns
        if not times or not times[0] <= t_open_wall_ns < t_close_wall_ns <= times[-1]:
            return NodeEnergy(self.source, None, None, "the meter was not read before and after")
        first = bisect_right(times, t_open_wall_ns) - 1
        last = bisect_left(times, t_close_wall_ns)
        between = self._growth if self.quantity == "energy" else self._integral
        found = between(first, last, t_open_wall_ns, t_close_wall_ns)
        if isinstance(found, str):
            return NodeEnergy(self.source, None, None, found)
        energy, tolerance = round(found[0]), found[1]
        note = "instrument's accuracy not stated"
        if self.accuracy_share is not None:
            tolerance += self.accuracy_share * energy
            note = f"instrument's accuracy {self.accuracy_share:g} included"
        return NodeEnergy(self.source, energy, math.ceil(tolerance), note)

    def _growth(self, first: int, last: int, t_open_ns: int, t_close_ns: int) -> tuple[float, float] | str:
        times, values = self.t_wall_ns, self.values
        for i in range(first, last):
            grown_mj, elapsed_ns = values[i + 1] - values[i], times[i + 1] - times[i]
            if grown_mj < 0:
                return "the meter was reset"
            if (grown_mj - self.quantum) * 1_000_000 > MAX_NODE_WATTS * elapsed_ns:
                return "the meter leapt"
        if values[last] == values[first]:
            return "the meter stood still"
        after_open = bisect_left(times, t_open_ns)
        before_close = bisect_right(times, t_close_ns) - 1
        open_mj, open_mw = self._since(first, after_open, t_open_ns)
        close_mj, close_mw = self._since(before_close, last, t_close_ns)
        energy_mj = values[before_close] - values[first] + close_mj - open_mj
        most_mj = values[last] - values[first]
        least_mj = max(values[before_close] - values[after_open], 0)
        bound_mj = max(most_mj - energy_mj, energy_mj - least_mj) + self.quantum
        return energy_mj, bound_mj + (open_mw + close_mw) * self.clock_error_ns / 1e9

    def _since(self, before: int, after: int, t_ns: int) -> tuple[float, float]:
        """Interpolated energy (mJ) from reading `before` to `t_ns`, and the power (mW) there."""
        times, values = self.t_wall_ns, self.values
        other = after
        if before == after:  # exactly at a reading: the slope from its neighbour
            other = before + 1 if before + 1 < len(times) else before - 1
        slope = (values[other] - values[before]) / (times[other] - times[before])
        return slope * (t_ns - times[before]), slope * 1e9

    def _integral(self, first: int, last: int, t_open_ns: int, t_close_ns: int) -> tuple[float, float] | str:
        times, values = self.t_wall_ns, self.values
        energy = tolerance = 0.0  # mW ns
        ends_mw = [0.0, 0.0]
        for i in range(first, last):
            t0, t1, p0, p1 = times[i], times[i + 1], values[i], values[i + 1]
            if t1 - t0 > self.max_gap_ns:
                return f"the meter was silent for {(t1 - t0) / 1e9:.0f} s"
            begin, end = max(t0, t_open_ns), min(t1, t_close_ns)
            at_begin = p0 + (p1 - p0) * (begin - t0) / (t1 - t0)
            at_end = p0 + (p1 - p0) * (end - t0) / (t1 - t0)
            energy += (at_begin + at_end) / 2 * (end - begin)
            tolerance += abs(p1 - p0) / 2 * (end - begin)
            ends_mw[1] = at_end
            if i == first:
                ends_mw[0] = at_begin
        tolerance += self.quantum / 2 * (t_close_ns - t_open_ns) + sum(ends_mw) * self.clock_error_ns
        return energy / 1e9, tolerance / 1e9


def best_energy(series: Sequence[NodeSeries], t_open_wall_ns: int, t_close_wall_ns: int) -> NodeEnergy | None:
    """One answer from all series of a node.

    A cumulative meter is preferred while its tolerance is within `GOOD_TOLERANCE_SHARE`, then the smallest tolerance.
    Without any answer the first series' reason; without series None.
    """
    answers = [(s, s.energy_between(t_open_wall_ns, t_close_wall_ns)) for s in series]
    known = [(s, a) for s, a in answers if a.energy_mj is not None]
    if not known:
        return answers[0][1] if answers else None
    for s, answer in known:
        good_mj = GOOD_TOLERANCE_SHARE * (answer.energy_mj or math.inf)  # nothing has a share of 0
        if s.quantity == "energy" and (answer.tolerance_mj or 0) <= good_mj:
            return answer
    return min((a for _, a in known), key=lambda a: a.tolerance_mj or 0)


def join_series(parts: Sequence[NodeSeries]) -> tuple[NodeSeries, ...]:
    """Series of the same sources that follow each other in time (the files of several days), one per source.

    Raises:
        InputError: two of one source overlap.
    """
    joined: dict[str, NodeSeries] = {}
    for part in sorted(parts, key=lambda s: s.t_wall_ns[0]):
        before = joined.get(part.source)
        if before is None:
            joined[part.source] = part
            continue
        if part.t_wall_ns[0] <= before.t_wall_ns[-1]:
            raise InputError(
                f"{part.source}: two files have readings of the same time: give each reading once"
            )
        joined[part.source] = replace(
            before,
            t_wall_ns=[*before.t_wall_ns, *part.t_wall_ns],
            values=[*before.values, *part.values],
            quantum=min(before.quantum, part.quantum),
            max_gap_ns=max(before.max_gap_ns, part.max_gap_ns),
        )
    return tuple(joined.values())


def parse_amount(number: Decimal | int, units: int) -> tuple[int, int]:
    """`number` times `units` as an integer, and the same of its last digit (at least 1).

    Raises:
        ValueError: negative, not finite, or no number a meter can mean.
    """
    exact = Decimal(number)
    if not exact.is_finite() or exact < 0 or exact.adjusted() > 15 or exact * units > _MOST:
        raise ValueError(f"{str(number)[:40]} is not an amount")
    exponent = max(int(exact.as_tuple().exponent), -18)
    return round(exact * units), max(round(Decimal(1).scaleb(exponent) * units), 1)


class NodeRecorder:
    """Reads a node's meter once per period, in a thread of its own, until stopped.

    What it read waits until it is taken, at most `MAX_WAITING` of it.
    """

    def __init__(self, meter: NodeMeter, period_s: float = DEFAULT_PERIOD_S) -> None:
        self.meter = meter
        self.period_s = period_s
        self._waiting: deque[NodeReading | NodeFailure] = deque(maxlen=MAX_WAITING)
        self._latest_ns: dict[str, int] = {}  # by source
        self._failure = ""
        self._lock = threading.Lock()
        self._next = 0.0  # when to look again, by time.monotonic
        self._thread = PeriodicThread("node-meter", self.look, self._pause_s, last_look=True)

    def start(self) -> None:
        """Read now, then once per period."""
        self._thread.start()

    def stop(self) -> None:
        """Read a last time and end the thread."""
        self._thread.stop(STOP_TIMEOUT_S)

    def look(self) -> None:
        """Read once; what is not later than the last reading (a clock was set back) is left out."""
        self._next = time.monotonic() + self.period_s
        began_ns, failure = time.time_ns(), ""
        readings: tuple[NodeReading, ...] = ()
        try:
            readings = self.meter.read()
        except MeterFailure as error:
            failure = str(error)
        with self._lock:
            for reading in readings:
                if reading.t_wall_ns > self._latest_ns.get(reading.source, -1):
                    self._latest_ns[reading.source] = reading.t_wall_ns
                    self._waiting.append(reading)
            if failure and failure != self._failure:
                log.warning("%s: %s; the node's energy is missing", self.meter.name, failure)
                self._waiting.append(NodeFailure(began_ns, failure))
            self._failure = failure

    def take(self) -> tuple[NodeReading | NodeFailure, ...]:
        """Hand over what was read since the last time, in order; of a failure that goes on only its beginning."""
        with self._lock:
            taken = tuple(self._waiting)
            self._waiting.clear()
        return taken

    def _pause_s(self) -> float:
        return max(self._next - time.monotonic(), 0)
