"""`millijoule bench counters` on made-up boards: what it finds is what the board was told to do."""

import json

import pynvml
import pytest

from millijoule.jobs import bench as bench_command
from millijoule.jobs.bench.counters import (
    SHORTEST_STRETCH_S,
    BenchOptions,
    CounterBench,
    Stretch,
    guard_summary,
    integrate,
    seconds_needed,
    stretch_seconds,
)
from millijoule.jobs.gpu.steps import STEPS
from millijoule.jobs.measuring.board import StandInBoard
from millijoule.workers.meters.nvml import MIN_READ_SPACING_NS

SECOND = 1_000_000_000


def bench(**board):
    return CounterBench(StandInBoard(**board), stretch_s=8)


@pytest.mark.parametrize(("period_ms", "quantum_mj"), [(100, 1), (20, 1), (106, 500), (250, 1000)])
def test_period_and_quantum_are_found(period_ms, quantum_mj):
    found = bench(period_ms=period_ms, quantum_mj=quantum_mj, loaded_watts=500).period()["loaded"]
    assert found["period_ms"] == pytest.approx(period_ms, abs=1)
    assert found["quantum_mj"] % quantum_mj == 0
    assert found["went_back"] == 0


def test_a_counter_that_falls_behind_when_it_is_read_often_is_found_out():
    rows = {r["reads_per_second"]: r for r in bench(lost_mj_per_read=400).rates()}
    for rate, row in rows.items():  # 600 W, less 0.4 J at every read
        assert row["over_1_hz"] == pytest.approx((600 - 0.4 * rate) / (600 - 0.4), rel=0.02)
        assert row["counter_over_186"] == pytest.approx((600 - 0.4 * rate) / 600, rel=0.02)
    honest = bench().rates()
    assert [r["over_1_hz"] for r in honest] == pytest.approx([1] * 4, rel=0.01)
    assert all(r["counter_reads"] >= 7 * r["reads_per_second"] for r in honest)


def test_a_wave_as_long_as_the_period_of_power_shows_in_field_186_alone():
    """600 W half the time and 110 W else: 355 W, of which samples at always the same phase see one side."""
    rows = {r["period_ms"]: r for r in bench().waves()}
    for period_ms, row in rows.items():
        true = 600 if period_ms is None else 355
        assert row["counter_watts"] == pytest.approx(true, rel=0.01)
        assert row["field_185_watts"] == pytest.approx(true, rel=0.01)
    assert not 0.5 < rows[100]["counter_over_186"] < 1.5
    assert rows[None]["counter_over_186"] == pytest.approx(1, rel=0.01)


def test_starting_is_split_into_stages_and_idle_states():
    found = bench(idle_watts=70, context_watts=120).start()
    assert found["idle_bare"]["counter_watts"] == pytest.approx(70, rel=0.01)
    assert found["idle_with_context_and_model"]["counter_watts"] == pytest.approx(120, rel=0.01)
    joules = {s["stage"]: s["joules"] for s in found["stages"]}
    assert joules["import torch"] == pytest.approx(70, abs=12)  # of a second, to a tenth of it
    assert joules["load default model"] == pytest.approx(120, abs=12)


def test_the_product_s_meter_agrees_and_its_guard_holds(tmp_path):
    found = bench().meter(60, tmp_path)
    assert found["counter_watts"] == pytest.approx(600, rel=0.01)
    assert found["counter_over_186"] == pytest.approx(1, rel=0.01)
    assert 55 <= found["power_samples"] <= 62
    least, _median = found["guard"]["ms_between_changes_least_and_median"]
    assert least >= MIN_READ_SPACING_NS / 1e6 - 25  # asked every 20 ms, seen up to one asking early
    assert found["guard"]["missing"] == 0


def test_a_guard_that_lets_everything_through_would_be_seen():
    values = [(i * 20_000_000, i * 1000) for i in range(100)]
    assert guard_summary(values)["ms_between_changes_least_and_median"] == [20.0, 20.0]


def test_a_slope_takes_whole_steps_of_the_counter():
    """Steps of 60 J every 100 ms, read every 70 ms from the middle of a step: 600 W, whatever the ends cut."""
    reads = tuple((t, t // 100_000_000 * 60_000) for t in range(50_000_000, 10 * SECOND, 70_000_000))
    assert Stretch(reads, ()).watts() == pytest.approx(600, rel=0.01)
    assert Stretch(reads[:2], ()).watts() is None
    assert Stretch((), ((0, None, None), (SECOND, None, None))).mean_watts(2) is None


def test_trapezoids():
    assert integrate([(0, 0), (SECOND, 2000), (3 * SECOND, 2000)]) == pytest.approx(1000 + 4000)


def test_stretches_fill_the_time_there_is():
    parts = ("start", "waves", "rates", "period")
    assert stretch_seconds(parts, 60) == 4
    assert stretch_seconds(parts, 10_000) == 15
    assert seconds_needed(parts, stretch_seconds(parts, 180)) == pytest.approx(180)


@pytest.mark.long
@pytest.mark.parametrize("part", ["start", "waves", "rates", "period"])
def test_parts_take_as_long_as_is_said(part):
    """By the made-up board's clock; starting up takes it four seconds where 25 are allowed."""
    tried = bench(read_us=100)
    began = tried.board.now_ns()
    getattr(tried, part)()
    took = (tried.board.now_ns() - began) / SECOND
    said = seconds_needed((part,), 8) - (21 if part == "start" else 0)
    assert took == pytest.approx(said, rel=0.05)


def test_the_shortest_time_of_the_queue_s_step_is_enough():
    counter = next(s for s in STEPS if s.name == "counter")
    needed = seconds_needed(BenchOptions().parts, SHORTEST_STRETCH_S)
    assert needed <= counter.seconds[0] - counter.reserve_s - counter.grace_s


def test_the_command_writes_every_part_and_says_that_it_was_a_rehearsal(tmp_path):
    path = tmp_path / "counter.json"
    assert bench_command.main(["counters", str(path), "--stand-in", "--within", "60"]) == 0
    result = json.loads(path.read_text())
    assert result["stand_in"] is True
    assert {"start", "waves", "rates", "period"} <= result.keys()
    assert "meter" not in result


def test_without_a_board_the_message_says_so(capsys, monkeypatch):
    def no_library():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    assert bench_command.main(["counters"]) == 1
    assert "NVML is not here" in capsys.readouterr().err
