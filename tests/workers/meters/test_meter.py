import json
import os
import subprocess
import sys
import threading
from itertools import pairwise

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counters import DRAM, GPU0, INTEL_RANGE_UJ, PACKAGE, SECOND, UUIDS, Clock, FakeNvml, FakePowercap

from millijoule.workers.meters import counter_book
from millijoule.workers.meters.counter_book import CounterBook
from millijoule.workers.meters.meter import (
    STALL_AFTER_NS,
    WATTS_PER_CORE,
    CounterMeter,
    estimate_cpu_mj,
    open_meter,
)
from millijoule.workers.meters.segment_timeline import SegmentTimeline, segment_energy_mj, segment_estimate_mj
from millijoule.workers.schemas import CounterRead, Segment

# --- what is there ----------------------------------------------------------------------------------------------------


def test_method_and_domains_say_what_is_measured(open_fake, powercap):
    gpu, cpu = (["0"], FakeNvml()), powercap
    assert (open_fake().method, open_fake().domains) == ("missing", ())
    assert (open_fake(*gpu).method, open_fake(*gpu).domains) == ("nvml-counter", (GPU0,))
    assert (open_fake(powercap=cpu).method, open_fake(powercap=cpu).domains) == ("rapl", (PACKAGE, DRAM))
    assert open_fake(*gpu, cpu).method == "nvml-counter+rapl"
    assert set(open_fake(*gpu, cpu).read().energy_mj) == {GPU0, PACKAGE, DRAM}


def test_without_counters_a_read_has_an_estimate_and_no_energy(open_fake):
    read = open_fake().read()
    assert read.energy_mj == {}
    assert read.estimate_mj > 0
    assert read.boot_id == "boot"


def test_a_host_without_nvidia_driver_is_missing_not_an_error(open_fake):
    class NoDriver(FakeNvml):
        def nvmlInit(self):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    assert open_fake(["0"], NoDriver()).method == "missing"


def test_the_estimate_is_cpu_time_at_a_named_power():
    import time

    before, cpu_before = estimate_cpu_mj(), time.process_time()
    while time.process_time() - cpu_before < 0.05:
        pass
    cpu_s = time.process_time() - cpu_before
    assert estimate_cpu_mj() - before == pytest.approx(cpu_s * WATTS_PER_CORE * 1000, abs=50)


def test_processes_that_compute_for_a_worker_are_in_its_estimate():
    meter = CounterMeter("boot", (), None)
    before = meter.read().estimate_mj
    meter.cpu_ns_elsewhere = lambda: 1_000 * SECOND
    assert meter.read().estimate_mj - before == pytest.approx(1_000_000 * WATTS_PER_CORE, abs=5_000)


# --- which device (CodeCarbon: lstrip drops a device chosen by UUID; Kepler, dcgm: MIG shows the board) ---------------


@pytest.mark.parametrize("gpu", ["1", UUIDS[1], "GPU-122"])
def test_a_gpu_is_found_as_cuda_names_it(open_fake, nvml, gpu):
    nvml.energy_mj[UUIDS[1]] = 77
    meter = open_fake([gpu], nvml)
    assert meter.read().energy_mj == {f"gpu:{UUIDS[1]}": 77}


@pytest.mark.parametrize("gpu", ["GPU-1", "GPU-9", "7", "MIG-11111111-aaaa-bbbb-cccc-000000000000", "x"])
def test_a_device_that_is_not_exactly_one_gpu_is_missing(open_fake, gpu, caplog):
    assert open_fake([gpu], FakeNvml()).method == "missing"
    assert gpu in caplog.text


def test_an_index_between_unlike_gpus_is_refused(open_fake, caplog):
    nvml = FakeNvml(names=["NVIDIA H200", "NVIDIA L4"])
    assert open_fake(["0"], nvml).method == "missing"
    assert "UUID" in caplog.text
    assert open_fake([UUIDS[0]], nvml).method == "nvml-counter"


def test_a_board_in_mig_mode_is_refused(open_fake, nvml):
    nvml.mig[UUIDS[0]] = [1, 1]
    assert open_fake(["0"], nvml).method == "missing"
    nvml.mig[UUIDS[0]] = [0, 0]
    assert open_fake(["0"], nvml).method == "nvml-counter"


# --- GPU faults -------------------------------------------------------------------------------------------------------


def test_a_failed_read_is_absent_and_never_zero(open_fake, nvml, clock):
    meter = open_fake(["0"], nvml)
    assert meter.read().energy_mj == {GPU0: 5_000_000}
    clock.advance(1)
    nvml.error = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert meter.read().energy_mj == {}
    clock.advance(1)
    nvml.error = None
    nvml.energy_mj[UUIDS[0]] += 900
    read = meter.read()
    assert (read.energy_mj, read.epoch) == ({GPU0: 5_000_900}, 0)


def test_a_gpu_without_a_counter_is_not_a_domain(open_fake, nvml):
    nvml.error = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert open_fake(["0"], nvml).method == "missing"


def test_the_plain_call_stands_in_where_the_field_is_not_supported(open_fake, nvml):
    nvml.field_error = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert open_fake(["0"], nvml).read().energy_mj == {GPU0: 5_000_000}


def test_a_counter_that_reads_zero_is_missing(open_fake, nvml):
    nvml.energy_mj[UUIDS[0]] = 0
    assert open_fake(["0"], nvml).method == "missing"


def test_a_counter_that_drops_to_zero_is_missing_too(open_fake, nvml, clock):
    meter = open_fake(["0"], nvml)
    meter.read()
    clock.advance(1)
    nvml.energy_mj[UUIDS[0]] = 0
    assert (meter.read().energy_mj, meter.read().epoch) == ({}, 0)


def test_a_reset_is_seen_by_a_worker_that_came_later(open_fake, nvml, clock):
    open_fake(["0"], nvml).read()
    clock.advance(60)
    nvml.energy_mj[UUIDS[0]] = 40
    assert open_fake(["0"], nvml).read().epoch == 1


def test_a_leap_no_device_can_make_begins_an_epoch(open_fake, nvml, clock):
    meter = open_fake(["0"], nvml)
    meter.read()
    clock.advance(1)
    nvml.energy_mj[UUIDS[0]] += 10**12
    assert meter.read().epoch == 1


def test_a_counter_that_stands_still_is_broken_not_idle(open_fake, nvml, clock):
    meter = open_fake(["0"], nvml)
    meter.read()
    clock.advance(1)
    assert GPU0 in meter.read().energy_mj
    clock.advance(STALL_AFTER_NS / SECOND)
    assert meter.read().energy_mj == {}
    nvml.energy_mj[UUIDS[0]] += 10
    clock.advance(1)
    assert meter.read().energy_mj == {GPU0: 5_000_010}


@pytest.fixture
def waits(monkeypatch, clock):
    """How often a meter has waited; the clock goes on meanwhile, and what is in `then` is done once by its turn."""

    class Waits:
        count, then = 0, {}

        def sleep(self, seconds):
            self.count += 1
            clock.advance(seconds)
            self.then.get(self.count, lambda: None)()

    made = Waits()
    monkeypatch.setattr("millijoule.workers.meters.meter.time.sleep", made.sleep)
    return made


def test_an_account_ends_with_a_reading_that_has_moved(open_fake, nvml, clock, waits):
    timeline = SegmentTimeline("w", open_fake(["0"], nvml))
    clock.advance(1)
    waits.then[5] = lambda: nvml.energy_mj.update({UUIDS[0]: nvml.energy_mj[UUIDS[0]] + 700})
    assert segment_energy_mj(timeline.close("idle", last=True)) == 700
    assert waits.count >= 5


def test_a_counter_that_moved_and_froze_before_the_end_was_asked_for_is_not_believed(
    open_fake, nvml, clock, waits
):
    """It is ahead of the last reading, and yet behind what ran."""
    timeline = SegmentTimeline("w", open_fake(["0"], nvml))
    clock.advance(1)
    nvml.energy_mj[UUIDS[0]] += 700  # and 300 more, which it does not show yet
    waits.then[50] = lambda: nvml.energy_mj.update({UUIDS[0]: nvml.energy_mj[UUIDS[0]] + 300})
    assert segment_energy_mj(timeline.close("idle", last=True)) == 1000


def test_a_counter_that_moved_and_froze_for_good_is_missing(open_fake, nvml, clock, waits):
    timeline = SegmentTimeline("w", open_fake(["0"], nvml))
    clock.advance(1)
    nvml.energy_mj[UUIDS[0]] += 700
    assert timeline.close("idle", last=True).close.energy_mj == {}


def test_a_counter_that_froze_just_before_the_end_of_an_account_is_missing_not_low(
    open_fake, nvml, clock, waits
):
    timeline = SegmentTimeline("w", open_fake(["0"], nvml))
    clock.advance(1)
    nvml.energy_mj[UUIDS[0]] += 700
    shard = timeline.close("shard", 1, "a")
    clock.advance(1)  # it ran on, and its counter did not
    last = timeline.close("idle", last=True)
    assert segment_energy_mj(shard) == 700
    assert segment_energy_mj(last) is None
    assert last.close.energy_mj == {}
    assert clock() - shard.close.t_mono_ns <= STALL_AFTER_NS + 2 * SECOND


def test_the_end_of_an_account_waits_for_no_counter_that_fails(open_fake, nvml, clock, waits):
    timeline = SegmentTimeline("w", open_fake(["0"], nvml))
    clock.advance(1)
    nvml.energy_mj[UUIDS[0]] = 0
    assert timeline.close("idle", last=True).close.energy_mj == {}
    assert waits.count == 0


def test_a_late_sample_shows_as_latency(open_fake, nvml, clock):
    nvml.sample_age_ns = 90_000_000
    meter = open_fake(["0"], nvml)
    assert meter.read().latency_ns == pytest.approx(90_000_000, abs=20_000_000)
    clock.advance(0.1)  # the same sample again, held back by the read-rate guard
    assert meter.read().latency_ns == pytest.approx(190_000_000, abs=20_000_000)


def test_a_slow_driver_shows_as_latency(open_fake, nvml, clock):
    meter = open_fake(["0"], nvml)
    nvml.latency = lambda: clock.advance(1.5)
    clock.advance(1)
    began = clock()
    read = meter.read()
    assert read.latency_ns == 1.5 * SECOND
    assert read.t_mono_ns == began + 1.5 * SECOND


# --- RAPL -------------------------------------------------------------------------------------------------------------


def test_only_packages_and_their_dram_count(open_fake, powercap):
    assert open_fake(powercap=powercap).read().energy_mj == {PACKAGE: 1000, DRAM: 500}


def test_microjoules_are_not_lost_to_rounding(open_fake, powercap, clock):
    timeline = SegmentTimeline("w", open_fake(powercap=powercap))
    for i in range(1, 301):
        clock.advance(0.01)
        powercap.set("intel-rapl:0", 1_000_000 + 333 * i)
        powercap.set("intel-rapl:0:1", 500_000 + i)
        timeline.close("idle")
    assert sum(segment_energy_mj(s) for s in timeline.take()) == (333 * 300) // 1000


@pytest.mark.long
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20_000_000), min_size=1, max_size=40), st.integers(1, INTEL_RANGE_UJ))
def test_unwrapping_follows_any_path(tmp_path_factory, steps, start):
    clock, folder = Clock(), tmp_path_factory.mktemp("host")
    powercap = FakePowercap(folder / "powercap")
    true_uj = start
    powercap.set("intel-rapl:0", start)
    meter = open_meter(powercap_root=powercap.root, boot_id="b", book_directory=folder, clock_ns=clock)
    first = meter.read()
    for step in steps:
        true_uj += step * 1000
        clock.advance(90)
        powercap.set("intel-rapl:0", true_uj % INTEL_RANGE_UJ or 1)
        last = meter.read()
    assert last.epoch == first.epoch
    assert last.energy_mj[PACKAGE] - first.energy_mj[PACKAGE] == pytest.approx(
        (true_uj - start) // 1000, abs=1
    )


def test_a_wrap_is_unwrapped_alike_by_workers_that_began_before_and_after(open_fake, powercap, clock):
    powercap.set("intel-rapl:0", INTEL_RANGE_UJ - 1000)
    early = open_fake(powercap=powercap)
    early.read()
    clock.advance(1)
    powercap.set("intel-rapl:0", 2_000_000)
    late = open_fake(powercap=powercap)
    assert late.read().energy_mj == early.read().energy_mj


def test_a_silence_in_which_it_may_have_wrapped_begins_an_epoch(open_fake, powercap, clock):
    meter = open_fake(powercap=powercap)
    meter.read()
    clock.advance(3600)
    powercap.set("intel-rapl:0", 2_000_000)
    assert meter.read().epoch == 1


def test_the_watch_keeps_wraps_in_sight(open_fake, powercap, clock):
    powercap.set("intel-rapl:0:1", 1_000_000)
    timeline = SegmentTimeline("w", open_fake(powercap=powercap))
    true_uj = 1_000_000
    for _ in range(360):
        clock.advance(10)
        true_uj += 2_500_000_000
        powercap.set("intel-rapl:0", true_uj % INTEL_RANGE_UJ)
        powercap.set("intel-rapl:0:1", true_uj % INTEL_RANGE_UJ)
        timeline.meter.watch()
    assert segment_energy_mj(timeline.close("shard", 1, "a")) == 2 * 3600 * 250_000


def test_no_permission_is_missing(open_fake, powercap):
    for zone in ("intel-rapl:0", "intel-rapl:0:1"):
        (powercap.root / zone / "energy_uj").unlink()
        (powercap.root / zone / "energy_uj").mkdir()  # unreadable even for root, as tests may run
    assert open_fake(powercap=powercap).method == "missing"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_of_root_are_missing(open_fake, powercap):
    for zone in ("intel-rapl:0", "intel-rapl:0:1"):
        (powercap.root / zone / "energy_uj").chmod(0)
    assert open_fake(powercap=powercap).method == "missing"


def test_a_virtual_machine_that_shows_zero_is_missing(open_fake, powercap):
    powercap.set("intel-rapl:0", 0)
    assert open_fake(powercap=powercap).domains == (DRAM,)


def test_a_zone_that_vanishes_is_absent_and_the_others_stay(open_fake, powercap):
    meter = open_fake(powercap=powercap)
    (powercap.root / "intel-rapl:0:1" / "energy_uj").unlink()
    assert meter.read().energy_mj == {PACKAGE: 1000}


# --- the book that workers of a host share ----------------------------------------------------------------------------


def test_reads_of_many_threads_and_meters_are_ordered(tmp_path, powercap):
    meters = [open_meter(powercap_root=powercap.root, boot_id="b", book_directory=tmp_path) for _ in range(3)]
    reads, raw = [], iter(range(1_000_001, 2_000_000))
    write = threading.Lock()

    def work(meter):
        for _ in range(60):
            with write:
                powercap.set("intel-rapl:0:1", next(raw) * 1000)
            reads.append(meter.read())

    threads = [threading.Thread(target=work, args=(m,)) for m in meters for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    seen = sorted((r.t_mono_ns, r.energy_mj[DRAM]) for r in reads)
    assert len(seen) == 360
    assert all(b[1] >= a[1] for a, b in pairwise(seen))
    assert {r.epoch for r in reads} == {0}


def hold_lock(path):
    code = "import fcntl,sys,time; f=open(sys.argv[1],'r+'); fcntl.flock(f,fcntl.LOCK_EX); print('held',flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_a_reader_that_hangs_stops_nobody_and_one_that_dies_even_less(tmp_path, powercap, monkeypatch):
    monkeypatch.setattr(counter_book, "LOCK_TIMEOUT_S", 0.05)
    meter = open_meter(powercap_root=powercap.root, boot_id="b", book_directory=tmp_path)
    holder = hold_lock(meter.book.path)
    try:
        assert meter.read().energy_mj == {}
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert meter.read().energy_mj == {PACKAGE: 1000, DRAM: 500}


def test_a_book_that_was_removed_goes_on(open_fake, powercap, clock):
    powercap.set("intel-rapl:0", INTEL_RANGE_UJ - 1_000_000)
    meter = open_fake(powercap=powercap)
    meter.read()
    clock.advance(1)
    powercap.set("intel-rapl:0", 1_000_000)
    before = meter.read()
    meter.book.path.unlink()
    clock.advance(1)
    after = meter.read()
    assert (after.energy_mj, after.epoch) == (before.energy_mj, 0)
    assert open_fake(powercap=powercap).read().energy_mj == before.energy_mj


def test_a_book_begun_again_by_somebody_else_is_another_epoch(open_fake, powercap, clock):
    powercap.set("intel-rapl:0", INTEL_RANGE_UJ - 1_000_000)
    meter = open_fake(powercap=powercap)
    meter.read()
    clock.advance(1)
    powercap.set("intel-rapl:0", 1_000_000)
    meter.read()  # unwrapped: above the range
    meter.book.path.unlink()
    open_fake(powercap=powercap).read()  # knows nothing of the wrap
    assert meter.read().epoch == 1


def test_a_torn_book_is_another_epoch(open_fake, powercap):
    meter = open_fake(powercap=powercap)
    meter.read()
    meter.book.path.write_text('{"epoch": 0, "coun')
    assert meter.read().epoch == 1
    assert json.loads(meter.book.path.read_text())["epoch"] == 1


def test_without_a_folder_to_share_a_meter_still_reads(tmp_path, powercap):
    meter = open_meter(powercap_root=powercap.root, boot_id="b", book_directory=tmp_path / "gone")
    assert meter.read().energy_mj == {PACKAGE: 1000, DRAM: 500}
    meter.close()


def test_a_link_planted_in_a_shared_folder_is_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("keep me")
    (tmp_path / f"millijoule-{os.getuid()}-b.json").symlink_to(target)
    with CounterBook("b", tmp_path).locked() as state:
        state.epoch = 9
    assert target.read_text() == "keep me"


# --- segments ---------------------------------------------------------------------------------------------------------


def reading(mj=None, *, epoch=0, boot="b", estimate=None):
    return CounterRead(boot, 0, 0, 0, mj or {}, estimate, epoch)


def between(before, after):
    return Segment("w", "shard", before, after, 1, "a")


@pytest.mark.parametrize(
    ("before", "after", "energy_mj"),
    [
        (reading({"a": 1}), reading({"a": 5}), 4),
        (reading({"a": 1, "b": 2}), reading({"a": 5, "b": 2}), 4),
        (reading({"a": 1, "b": 2}), reading({"a": 5}), None),
        (reading({"a": 1}), reading({"a": 5, "b": 7}), 4),
        (reading(), reading({"a": 5}), None),
        (reading({"a": 1}), reading(), None),
        (reading({"a": 1}), reading({"a": 5}, epoch=1), None),
        (reading({"a": 1}), reading({"a": 5}, boot="c"), None),
        (reading({"a": 9}), reading({"a": 5}), None),
    ],
)
def test_energy_is_there_only_where_both_reads_have_it(before, after, energy_mj):
    assert segment_energy_mj(between(before, after)) == energy_mj


def test_an_estimate_is_a_difference_of_estimates():
    assert segment_estimate_mj(between(reading(estimate=3), reading(estimate=10))) == 7
    assert segment_estimate_mj(between(reading(), reading(estimate=10))) is None
    assert segment_estimate_mj(between(reading(estimate=11), reading(estimate=10))) is None


def test_segments_follow_each_other_without_a_gap(open_fake):
    timeline = SegmentTimeline("w", open_fake())
    for kind in ("load", "warmup", "idle"):
        timeline.close(kind)
    timeline.close("shard", 3, "a")
    segments = timeline.take()
    assert all(a.close is b.open for a, b in pairwise(segments))
    assert [(s.segment_class, s.shard_id, s.attempt_id) for s in segments][-2:] == [
        ("idle", None, None),
        ("shard", 3, "a"),
    ]


def test_segments_are_handed_over_once_and_come_back_in_order(open_fake):
    timeline = SegmentTimeline("w", open_fake())
    first = timeline.close("load")
    taken = timeline.take()
    assert timeline.take() == ()
    second = timeline.close("idle")
    timeline.restore(taken)
    assert timeline.take() == (first, second)


def test_a_class_we_do_not_know_is_refused_before_the_read(open_fake):
    timeline = SegmentTimeline("w", open_fake())
    with pytest.raises(ValueError, match="'lunch'"):
        timeline.close("lunch")
    assert timeline.take() == ()
