"""What the telemetry benchmark concludes from rows, and that what it notes is the product's own work."""

import math
import mmap
import threading
import time
from pathlib import Path

import pytest

from millijoule.jobs.bench.telemetry import answers, interval, judged
from millijoule.jobs.measuring.process import CpuParts, private_mb, thread_cpu_s
from millijoule.jobs.measuring.stand_ins import StandInNvml, board_uuid, stand_in_powercap
from millijoule.jobs.measuring.telemetry_probes import stressed_driver
from millijoule.workers.meters.meter import open_meter


def rows(quadruples, rate_lost=0.0, parts_s=0.0, drift=0.0):
    """Jobs of 1,000 images: 100 a second, 10 ms each; drift is per block and linear."""
    made = []
    for q in range(quadruples):
        for block, side in enumerate(("ABBA", "BAAB")[q % 2]):
            slower = math.exp(drift * (4 * q + block))
            on = side == "A"
            made.append(
                {
                    "quadruple": q,
                    "side": side,
                    "images": 1000,
                    "images_per_second": 100 / slower * (1 - rate_lost * on),
                    "worker_cpu_s": 10.0,
                    "job_cpu_s": 12.0,
                    "worker_parts_cpu_s": {"boundary reads": 0.001 + parts_s * on},
                    "driver_parts_cpu_s": {"running totals": 0.5 + parts_s * on},
                }
            )
    return made


def test_linear_drift_is_not_taken_for_telemetry():
    found = answers(rows(6, drift=0.02))
    assert found["throughput_lost"]["share"]["mean"] == pytest.approx(0, abs=1e-9)
    assert found["throughput_lost"]["goal_met"] is True


def test_a_cost_is_found_where_it_is():
    found = answers(rows(6, rate_lost=0.02, parts_s=0.03))
    assert found["throughput_lost"]["share"]["mean"] == pytest.approx(0.0202, abs=1e-4)
    assert found["throughput_lost"]["goal_met"] is False
    assert found["parts_of_worker_cpu"]["share"]["mean"] == pytest.approx(0.003)
    assert found["parts_of_worker_cpu"]["goal_met"] is True
    assert found["parts_of_job_cpu_while_it_runs"]["share"]["mean"] == pytest.approx(0.06 / 12)
    assert answers(rows(6))["parts_of_job_cpu_while_it_runs"]["share"]["mean"] == pytest.approx(0)


def test_an_interval_that_contains_the_goal_resolves_nothing():
    assert judged({"mean": 0.0, "low": -0.01, "high": 0.01}, 0.005)["resolved"] is False
    assert judged({"mean": 0.0, "low": None, "high": None}, 0.005)["goal_met"] is None
    assert judged({"mean": 0.0, "low": -0.01, "high": 0.004}, 0.005)["goal_met"] is True
    assert judged({"mean": 0.1, "low": 0.006, "high": 0.2}, 0.005)["goal_met"] is False


def test_the_interval_covers_the_mean_and_needs_three_values():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found["low"] < found["mean"] == 3.5 < found["high"]
    assert interval([1.0, 2.0])["low"] is None


def test_cpu_parts_count_work_not_waiting_and_nested_calls_once():
    cpu = CpuParts()
    inner = cpu.timed("inner", lambda: sum(range(200_000)))
    cpu.timed("outer", lambda: (inner(), time.sleep(0.2)))()
    assert cpu.seconds.keys() == {"outer"}
    assert 0 < cpu.seconds["outer"] < 0.15


def test_cpu_time_of_a_thread_is_found_by_its_name():
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin, name="spinner")
    thread.start()
    try:
        while thread_cpu_s("spinner") < 0.02:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join()
    assert thread_cpu_s("spinner") == 0


def test_memory_that_is_used_is_seen():
    before = private_mb()
    with mmap.mmap(
        -1, 20_000_000, flags=mmap.MAP_PRIVATE
    ) as block:  # not what the process once had and holds still
        block.write(bytes([1]) * len(block))
        assert private_mb() - before > 15


def test_the_product_meter_follows_the_stand_ins(tmp_path):
    with stand_in_powercap(Path(tmp_path, "powercap")) as root:
        meter = open_meter(
            [board_uuid(1)], nvml=StandInNvml(2), powercap_root=root, book_directory=tmp_path, boot_id="b"
        )
        assert meter.domains == (
            *(f"gpu:{board_uuid(1)}", "cpu:package-0", "dram:package-0", "cpu:package-1", "dram:package-1"),
        )
        first = meter.read()
        time.sleep(0.5)
        second = meter.read()
        assert all(second.energy_mj[d] > mj for d, mj in first.energy_mj.items())
        assert first.epoch == second.epoch
        (sample,) = meter.watch().values()
        assert sample.power_instant_mw == 500_000


@pytest.mark.long
def test_the_stressed_driver_writes_what_it_received():
    found = stressed_driver(workers=2, hours=1)
    assert found["commits"] == 2 * 59
    assert found["live_bytes"] > 0
