"""`millijoule bench counters [RESULT.json]`: what a board's energy counter and power readings are worth.

Parts, in the order that keeps later ones from spoiling earlier ones (reading the counter often is reported to make it fall behind):

* `start`: the board idle before this process has a CUDA context; energy of importing, context, loading and first batch; idle
  with all of it.
* `waves`: the counter against the integrals of fields 186 and 185, under steady load and under square waves near the periods at
  which power is sampled.
* `meter` (not among the defaults): a loaded minute through the product's own meter and `watch`, and its read-rate guard.
* `rates`: the counter's slope when it is read at 1, 5, 10, 50 and 200 Hz under steady load, each between two stretches at 1 Hz.
* `period`: how often the counter moves and by what least step, read as fast as can be.

A slope is from the first to the last change that was seen. Each end may be late by one update of the counter (a hundredth of a
stretch of ten seconds, at ten updates a second), and where reads always come at the same time of an update, both are alike. The
result is written after every part. `--stand-in` takes a made-up board: a rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.board import CudaBoard, StandInBoard
from millijoule.jobs.measuring.measurement import ResultOptions, describe, save_result, write_result
from millijoule.workers.errors import InputError
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.meters.nvml import MIN_READ_SPACING_NS, open_gpus
from millijoule.workers.schemas import PowerSample

Part = Literal["start", "waves", "meter", "rates", "period"]

RATES_HZ = (5, 10, 50, 200)
REFERENCE_HZ = 1
WAVES_MS = (25, 75, 100, 130)
#: Power is sampled ten times a second beside: as often as boards renew it.
POWER_HZ = 10
#: After a change of load: field 185 looks a second back.
SETTLE_S = 1.5
POLL_S = 3.0
GUARD_HZ, GUARD_S = 50, 6.0
METER_S = 60.0
#: Importing PyTorch, a context, a model and a first batch, on a cold machine.
STARTING_S = 25.0

#: Of each part: how many stretches it has, and the seconds that it takes beside them.
PARTS: dict[Part, tuple[int, float]] = {
    "start": (2, STARTING_S + SETTLE_S),
    "waves": (1 + len(WAVES_MS), SETTLE_S * (1 + len(WAVES_MS))),
    "meter": (0, SETTLE_S + METER_S + GUARD_S),
    "rates": (1 + 2 * len(RATES_HZ), SETTLE_S),
    "period": (0, 2 * POLL_S + SETTLE_S),
}
#: One stretch is never shorter: ten times the update period that boards are said to have, ten times over.
SHORTEST_STRETCH_S, LONGEST_STRETCH_S = 4.0, 15.0


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure the counter and the power readings of one board. The result is saved after every part."""

    parts: tuple[Part, ...] = ("start", "waves", "rates", "period")
    """What to measure; the order is always start, waves, meter, rates, period."""

    within: float = 180.0
    """Seconds for all of it; stretches become longer or shorter, within 4 to 15 s."""

    stand_in: bool = False
    """A made-up board in place of a real one, with a clock of its own: a rehearsal."""


def changes(reads: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of `reads`, (ns, mJ), that saw another value than the one before."""
    return [b for a, b in pairwise(reads) if b[1] != a[1]]


def gaps_ms(reads: Sequence[tuple[int, int]]) -> list[float]:
    """Milliseconds between the changes in `reads`, (ns, mJ)."""
    return [(b[0] - a[0]) / 1e6 for a, b in pairwise(changes(reads))]


@dataclass(frozen=True)
class Stretch:
    """One stretch of time in which counter and power were read. Times are ns, energies mJ, powers mW.

    Attributes:
        counter: (time, reading).
        power: (time, field 185, field 186); None where the board does not support a field.
    """

    counter: tuple[tuple[int, int], ...]
    power: tuple[tuple[int, int | None, int | None], ...]

    def watts(self) -> float | None:
        """The counter's slope from the first to the last change; None with fewer than two."""
        changed = changes(self.counter)
        if len(changed) < 2:
            return None
        (t0, e0), (t1, e1) = changed[0], changed[-1]
        return (e1 - e0) / (t1 - t0) * 1e6

    def mean_watts(self, number: int) -> float | None:
        """The integral of field 185 (`number` 1) or 186 (2) by the trapezoid rule, over its length."""
        samples = [(t, mw) for t, *fields in self.power if (mw := fields[number - 1]) is not None]
        if len(samples) < 2:
            return None
        return integrate(samples) / (samples[-1][0] - samples[0][0]) * 1e6

    def summary(self) -> dict[str, Any]:
        return {
            "seconds": round((self.counter[-1][0] - self.counter[0][0]) / 1e9, 3),
            "counter_reads": len(self.counter),
            **self.compare(self.watts()),
        }

    def compare(self, counter_watts: float | None) -> dict[str, Any]:
        """A counter's slope beside the means of the power fields."""
        average, instant = self.mean_watts(1), self.mean_watts(2)
        return {
            "power_samples": len(self.power),
            "counter_watts": _rounded(counter_watts),
            "field_186_watts": _rounded(instant),
            "field_185_watts": _rounded(average),
            "counter_over_186": _ratio(counter_watts, instant),
            "counter_over_185": _ratio(counter_watts, average),
        }


def integrate(samples: Sequence[tuple[int, int]]) -> float:
    """Trapezoids under (ns, mW), in mJ."""
    return math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2e9 for a, b in pairwise(samples))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _ratio(a: float | None, b: float | None) -> float | None:
    return round(a / b, 5) if a is not None and b else None


class CounterBench:
    """The parts, over one board."""

    def __init__(self, board: CudaBoard | StandInBoard, stretch_s: float) -> None:
        self.board, self.stretch_s = board, stretch_s
        found = open_gpus([board.uuid], board.nvml)
        self.counter, self.power = found.counters[0], found.powers[0]
        try:
            self.counter.read()
        except Exception as error:  # of the library: without a counter there is nothing to measure
            raise InputError(
                f"bench counters: the energy counter of {board.uuid} cannot be read ({error})"
            ) from error

    def observe(self, seconds: float, counter_hz: float) -> Stretch:
        """Read the counter at `counter_hz` and power at `POWER_HZ` for `seconds`; a read that comes late is not made up for."""
        began = self.board.now_ns()
        counter: list[tuple[int, int]] = []
        power: list[tuple[int, int | None, int | None]] = []
        due = {"counter": began, "power": began}
        periods = {"counter": round(1e9 / counter_hz), "power": round(1e9 / POWER_HZ)}
        end = began + round(seconds * 1e9)
        while (at := min(due.values())) <= end:
            self.board.wait_until(at)
            now = self.board.now_ns()
            # both may be due: the counter first, its time matters more
            for kind in ("counter", "power"):
                if due[kind] > now:
                    continue
                if kind == "counter":
                    value, age_ns = self.counter.read()
                    counter.append((self.board.now_ns() - age_ns, value))
                else:
                    average, instant, age_ns = self.power.read()
                    power.append((self.board.now_ns() - age_ns, average, instant))
                late = (self.board.now_ns() - due[kind]) // periods[kind]
                due[kind] += periods[kind] * (1 + late)
        return Stretch(tuple(counter), tuple(power))

    def settle(self) -> None:
        self.board.wait_until(self.board.now_ns() + round(SETTLE_S * 1e9))

    def start(self) -> dict[str, Any]:
        """Idle before, the stages of starting, idle after."""
        bare = self.observe(self.stretch_s, REFERENCE_HZ)
        stages = []
        before, began = self.counter.read()[0], self.board.now_ns()
        for name in self.board.start():
            # what is in the counter when the stage ends belongs to it; its last tenth of a second may fall to the next one
            seconds, after = (self.board.now_ns() - began) / 1e9, self.counter.read()[0]
            stages.append({"stage": name, "seconds": round(seconds, 3), "joules": (after - before) / 1000})
            before, began = after, self.board.now_ns()
        self.settle()
        context = self.observe(self.stretch_s, REFERENCE_HZ)
        return {
            "idle_bare": bare.summary(),
            "stages": stages,
            "idle_with_context_and_model": context.summary(),
        }

    def waves(self) -> list[dict[str, Any]]:
        """Counter and power side by side: steady load first, then each square wave."""
        rows = []
        for period_ms in (None, *WAVES_MS):
            with self.board.load(None if period_ms is None else period_ms / 1000):
                self.settle()
                row = self.observe(self.stretch_s, REFERENCE_HZ).summary()
            rows.append({"period_ms": period_ms, **row})
        return rows

    def rates(self) -> list[dict[str, Any]]:
        """The slope at each rate, over the mean of the 1 Hz stretches before and after it."""
        rows: list[dict[str, Any]] = []
        with self.board.load(None):
            self.settle()
            before = self.observe(self.stretch_s, REFERENCE_HZ)
            for rate in RATES_HZ:
                fast = self.observe(self.stretch_s, rate)
                after = self.observe(self.stretch_s, REFERENCE_HZ)
                references = [w for s in (before, after) if (w := s.watts()) is not None]
                reference = statistics.fmean(references) if references else None
                rows.append(
                    {
                        "reads_per_second": rate,
                        **fast.summary(),
                        "watts_at_1_hz": _rounded(reference),
                        "over_1_hz": _ratio(fast.watts(), reference),
                    }
                )
                before = after
        return rows

    def period(self) -> dict[str, Any]:
        """Update period and step of the counter, idle and under load."""
        idle = self._poll()
        with self.board.load(None):
            self.settle()
            return {"idle": idle, "loaded": self._poll()}

    def _poll(self) -> dict[str, Any]:
        end = self.board.now_ns() + round(POLL_S * 1e9)
        reads = []
        while (now := self.board.now_ns()) < end:
            reads.append((now, self.counter.read()[0]))
        changed, gaps = changes(reads), gaps_ms(reads)
        steps = [b[1] - a[1] for a, b in pairwise(changed)]
        return {
            "reads": len(reads),
            "changes": len(changed),
            "period_ms": _rounded(statistics.median(gaps) if gaps else None),
            "period_ms_least_and_most": [_rounded(min(gaps)), _rounded(max(gaps))] if gaps else None,
            "quantum_mj": math.gcd(*steps) if steps else None,
            "went_back": sum(step < 0 for step in steps),
            "microseconds_per_read": round(POLL_S * 1e6 / len(reads), 1),
        }

    def meter(self, seconds: float, book: Path | None) -> dict[str, Any]:
        """A loaded stretch by the product's meter and watch; and how often its guard lets a read through.

        Args:
            book: where the counters of this host are kept, for `open_meter`.
        """
        board = self.board
        meter = open_meter([board.uuid], nvml=board.nvml, book_directory=book, clock_ns=board.now_ns)
        domain = next((d for d in meter.domains if board.uuid in d), None)
        if domain is None:
            raise InputError(f"bench counters: the meter does not find the counter of {board.uuid}")
        with board.load(None):
            self.settle()
            samples: list[PowerSample] = []
            first = meter.read()
            until = board.now_ns() + round(seconds * 1e9)
            while board.now_ns() < until:
                samples += meter.watch().values()
                board.wait_until(board.now_ns() // 1_000_000_000 * 1_000_000_000 + 1_000_000_000)
            last = meter.read()
            values = []
            began, due = board.now_ns(), board.now_ns()
            while (now := board.now_ns()) < began + round(GUARD_S * 1e9):
                values.append((now, meter.read().energy_mj.get(domain)))
                due += round(1e9 / GUARD_HZ)
                board.wait_until(due)
        epochs = {read.epoch_of(domain) for read in (first, last)}
        meter.close()
        if len(epochs) > 1 or domain not in first.energy_mj or domain not in last.energy_mj:
            raise InputError(
                f"bench counters: the counter of {board.uuid} was reset or lost meanwhile; run it again"
            )
        took_s = (last.t_mono_ns - first.t_mono_ns) / 1e9
        stretch = Stretch((), tuple((s.t_mono_ns, s.power_average_mw, s.power_instant_mw) for s in samples))
        return {
            "seconds": round(took_s, 3),
            **stretch.compare((last.energy_mj[domain] - first.energy_mj[domain]) / 1000 / took_s),
            "guard": guard_summary(values),
        }


def guard_summary(values: Sequence[tuple[int, int | None]]) -> dict[str, Any]:
    """How far apart the values change that a caller sees who asks more often than the guard allows."""
    seen = [(t, mj) for t, mj in values if mj is not None]
    gaps = gaps_ms(seen)
    return {
        "asked_hz": GUARD_HZ,
        "allowed_ms": MIN_READ_SPACING_NS / 1e6,
        "asked": len(values),
        "missing": len(values) - len(seen),
        "changes": len(changes(seen)),
        "ms_between_changes_least_and_median": [_rounded(min(gaps)), _rounded(statistics.median(gaps))]
        if gaps
        else None,
    }


def seconds_needed(parts: Sequence[Part], stretch_s: float) -> float:
    """What `parts` take with stretches of `stretch_s`."""
    return sum(stretches * stretch_s + fixed_s for stretches, fixed_s in (PARTS[p] for p in parts))


def stretch_seconds(parts: Sequence[Part], within_s: float) -> float:
    """The length of one stretch so that `parts` take `within_s` seconds, within the bounds of a stretch."""
    length = (within_s - seconds_needed(parts, 0)) / max(1, sum(PARTS[p][0] for p in parts))
    return min(LONGEST_STRETCH_S, max(SHORTEST_STRETCH_S, length))


def run(options: BenchOptions) -> int:
    board = StandInBoard() if options.stand_in else CudaBoard()
    parts = [part for part in PARTS if part in options.parts]
    bench = CounterBench(board, stretch_seconds(parts, options.within))
    result: dict[str, Any] = {
        **describe("a board's energy counter (NVML field 83) and power readings (fields 186, 185)", options),
        "stand_in": board.stand_in,
        "device": board.name,
        "uuid": board.uuid,
        "driver": board.driver_version,
        "stretch_seconds": round(bench.stretch_s, 2),
    }
    with tempfile.TemporaryDirectory(prefix="millijoule-bench-") as scratch:
        for part in parts:
            if part == "meter":
                seconds = min(METER_S, max(10.0, options.within - GUARD_S - 20))
                # a made-up board's clock is nobody else's: a book of its own
                result[part] = bench.meter(seconds, Path(scratch) if board.stand_in else None)
            else:
                result[part] = getattr(bench, part)()
            save_result(result, options.result)
    write_result(result, options.result)
    return COMPLETE
