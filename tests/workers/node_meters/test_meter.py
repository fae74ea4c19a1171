"""Node meters: what a series says between two times, amounts, and the recorder."""

import threading
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millijoule.workers.node_meters.meter import (
    MeterFailure,
    NodeReading,
    NodeRecorder,
    NodeSeries,
    best_energy,
    parse_amount,
)

S = 1_000_000_000
KWH = 3_600_000_000


def series(quantity, readings, **options):
    times, values = zip(*readings, strict=True)
    fields = {"quantum": 1, "max_gap_ns": 30 * S, **options}
    return NodeSeries(f"test-{quantity}", quantity, [t * S for t in times], values, **fields)


# --- between two times


def test_a_cumulative_meter_at_its_readings_is_exact_to_the_last_digit():
    found = series("energy", [(0, 1_000), (10, 8_000), (20, 16_000)], quantum=10).energy_between(0, 20 * S)
    assert (found.energy_mj, found.tolerance_mj) == (15_000, 10)


def test_between_readings_it_is_interpolated_and_the_readings_around_bound_the_error():
    found = series("energy", [(0, 0), (10, 10_000), (20, 16_000)], quantum=1).energy_between(5 * S, 15 * S)
    assert found.energy_mj == 8_000  # 5,000 before 10 s and 3,000 after
    assert found.tolerance_mj == 8_001  # nothing between 5 and 15 s, or all of it: and the last digit


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.integers(0, 60_000_000)), min_size=3, max_size=40),
    st.data(),
)
def test_the_true_energy_lies_within_the_tolerance(steps, data):
    """Steps of (ms, mJ); the true counter jumps anywhere inside a step, the meter is read now and then."""
    times, energy = [0], [0]
    for ms, mj in steps:
        times.append(times[-1] + ms * 1_000_000)
        energy.append(energy[-1] + mj * ms // 1000)
    n = len(times)
    kept = sorted({0, n - 1, *data.draw(st.lists(st.integers(0, n - 1), max_size=6))})
    quantum = data.draw(st.sampled_from([1, 1_000, 36_000_000]))
    shown = [energy[i] // quantum * quantum for i in kept]
    meter = NodeSeries("s", "energy", [times[i] for i in kept], shown, quantum, 10**18)
    i, j = sorted(data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=2, unique=True)))
    found = meter.energy_between(times[i], times[j])
    if found.energy_mj is None:
        assert found.note == "the meter stood still"
        return
    assert abs(found.energy_mj - (energy[j] - energy[i])) <= found.tolerance_mj + 1


@pytest.mark.parametrize(
    ("meter", "note"),
    [
        (series("energy", [(5, 0), (20, 9_000)]), "not read before"),
        (series("energy", [(0, 0), (14, 9_000)]), "not read before and after"),
        (series("energy", [(0, 5_000), (10, 9_000), (20, 200)]), "reset"),
        (series("energy", [(0, 5_000), (20, 5_000)]), "stood still"),
        (series("energy", [(0, 0), (20, 10**13)]), "leapt"),
        (series("power", [(0, 700_000), (31, 700_000)]), "silent for 31 s"),
        (NodeSeries("x", "power", [], [], 1, 1), "not read"),
    ],
)
def test_what_would_need_a_guess_is_missing_and_not_zero(meter, note):
    found = meter.energy_between(1 * S, 15 * S)
    assert (found.energy_mj, found.tolerance_mj) == (None, None)
    assert note in found.note


def test_a_reset_elsewhere_does_not_matter():
    meter = series("energy", [(0, 9_000), (10, 100), (20, 4_100), (30, 0)])
    assert meter.energy_between(10 * S, 20 * S).energy_mj == 4_000


def test_power_is_integrated_by_trapezoids():
    found = series("power", [(0, 500_000), (10, 700_000), (20, 700_000)], quantum=1_000).energy_between(
        5 * S, 20 * S
    )
    assert found.energy_mj == 5 * 650_000 + 10 * 700_000
    assert (
        found.tolerance_mj == 5 * 100_000 + 15 * 500
    )  # the rise might have come at once; half a watt throughout


def test_a_clock_that_is_off_and_an_instrument_that_is_off_widen_the_tolerance():
    readings = [(t, 1_000_000 * t) for t in range(0, 101, 10)]  # 1 kW
    exact = series("energy", readings).energy_between(10 * S, 90 * S)
    late = series("energy", readings, clock_error_ns=S).energy_between(10 * S, 90 * S)
    rough = series("energy", readings, accuracy_share=0.01).energy_between(10 * S, 90 * S)
    assert (late.energy_mj, late.tolerance_mj - exact.tolerance_mj) == (exact.energy_mj, 2_000_000)
    assert rough.tolerance_mj - exact.tolerance_mj == 800_000
    assert "not stated" in exact.note
    assert "0.01" in rough.note


def test_a_counter_is_preferred_to_power_unless_it_is_too_coarse():
    fine = series("energy", [(t, 1_000_000 * t) for t in range(101)])
    coarse = series("energy", [(0, 0), (100, 36_000_000 * 3)], quantum=36_000_000)
    power = series("power", [(t, 1_000_000) for t in range(0, 101, 10)])
    assert best_energy([power, fine], 5 * S, 95 * S).source == "test-energy"
    assert best_energy([coarse, power], 5 * S, 95 * S).source == "test-power"
    assert best_energy([coarse, power], 5 * S, 200 * S).energy_mj is None
    assert best_energy([], 0, 1) is None


@pytest.mark.parametrize("amount", ["-1", "NaN", "Infinity", "1e16", "1e18", "999999999999999"])
def test_what_no_meter_can_mean_is_refused(amount):
    with pytest.raises(ValueError, match="not an amount"):
        parse_amount(Decimal(amount), KWH)


def test_an_amount_keeps_its_digits():
    assert parse_amount(Decimal("10433.52"), KWH) == (37_560_672_000_000, 36_000_000)
    assert parse_amount(812, 1000) == (812_000, 1000)


# --- recording


class Scripted:
    """A meter that gives prepared readings, or the reason why there is none; after the last one it is worn out."""

    name = "scripted"

    def __init__(self, *readings):
        self.readings = list(readings)

    def read(self):
        found = self.readings.pop(0) if self.readings else "worn out"
        if isinstance(found, str):
            raise MeterFailure(found)
        return found


def reading(seconds, value, source="redfish-energy", quantity="energy", quantum=100, t_error_ns=0):
    return NodeReading(source, quantity, seconds * S, value, quantum, t_error_ns)


def test_readings_wait_until_they_are_taken_and_are_taken_once():
    power = {"source": "redfish-power", "quantity": "power"}
    both = (reading(0, 100), reading(0, 700_000, **power))
    recorder = NodeRecorder(Scripted(both, (reading(20, 14_000_105),)))
    recorder.look()
    assert recorder.take() == both
    recorder.look()
    assert recorder.take() == (reading(20, 14_000_105),)
    assert recorder.take() == ()


def test_a_failure_is_told_once_and_again_after_it_had_ended(caplog):
    recorder = NodeRecorder(Scripted((reading(0, 1),), "HTTP 500", "HTTP 500", (reading(9, 2),), "HTTP 500"))
    for _ in range(6):
        recorder.look()
    taken = recorder.take()
    assert [getattr(t, "reason", None) for t in taken] == [None, "HTTP 500", None, "HTTP 500", "worn out"]
    assert [t.value for t in taken if isinstance(t, NodeReading)] == [1, 2]
    assert caplog.text.count("scripted: HTTP 500; the node's energy is missing") == 2


def test_a_reading_from_before_the_last_one_is_left_out():
    recorder = NodeRecorder(Scripted((reading(10, 5),), (reading(9, 6),), (reading(11, 7),)))
    for _ in range(3):
        recorder.look()
    assert [r.value for r in recorder.take()] == [5, 7]


def test_a_recorder_nobody_asks_keeps_the_newest(monkeypatch):
    monkeypatch.setattr("millijoule.workers.node_meters.meter.MAX_WAITING", 3)
    recorder = NodeRecorder(Scripted(*[(reading(t, t),) for t in range(9)]))
    for _ in range(9):
        recorder.look()
    assert [r.value for r in recorder.take()] == [6, 7, 8]


def test_the_thread_reads_first_and_last_so_that_a_job_lies_between():
    looked = threading.Event()

    class Counting(Scripted):
        def read(self):
            found = super().read()
            looked.set()
            return found

    recorder = NodeRecorder(Counting((reading(1, 100),), (reading(2, 200),)), period_s=60)
    recorder.start()
    assert looked.wait(20)
    recorder.stop()
    assert [r.value for r in recorder.take()] == [100, 200]
