"""Failures that other energy tools have had, each as a test of ours.

The devices are stand-ins; meter, book, timeline and ledger are the real ones. Further cases of each are in
test_meter.py and test_power_samples.py.
"""

import json
import os
import random
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
from support.counter_worker import open_shared_meter, segment_from
from support.counters import DRAM, GPU0, INTEL_RANGE_UJ, PACKAGE, SECOND, UUIDS, FakeNvml, FakePowercap
from support.ledgers import shard_mj

from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.meters.nvml import MIN_READ_SPACING_NS
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline, segment_energy_mj
from millijoule.workers.schemas import BOOK_EPOCHS

TESTS = Path(__file__).parents[2]


def draw(nvml, clock, seconds, watts=500, uuid=UUIDS[0]):
    clock.advance(seconds)
    nvml.energy_mj[uuid] += round(seconds * watts * 1000)


# --- RAPL wrap seen late (Zeus 0.16.0: -262,142 J for an interval of 1.3 J, and 1.3 J again 1.5 s later) -------------


def test_a_wrap_seen_late_and_by_one_worker_after_another_is_a_small_positive_difference(
    open_fake, powercap, clock
):
    powercap.set("intel-rapl:0", INTEL_RANGE_UJ - 300_000)
    timelines = [SegmentTimeline(name, open_fake(powercap=powercap)) for name in ("a", "b")]
    clock.advance(1)
    powercap.set("intel-rapl:0", 1_000_000)  # 1.3 J on
    assert segment_energy_mj(timelines[0].close("shard", 0, "x")) == 1300
    clock.advance(1.5)
    powercap.set("intel-rapl:0", 2_300_000)
    powercap.set("intel-rapl:0:1", 500_001)
    assert segment_energy_mj(timelines[0].close("shard", 1, "x")) == 1300
    assert segment_energy_mj(timelines[1].close("shard", 2, "y")) == 2600


# --- a failed read taken as 0, or the counter's lifetime taken as one interval (CodeCarbon) ---------------------------


def test_a_failed_read_makes_its_segments_and_the_total_null(open_fake, nvml, clock):
    timeline = SegmentTimeline("w", open_fake(["0"], nvml))
    draw(nvml, clock, 10)
    timeline.close("shard", 0, "a")
    draw(nvml, clock, 10)
    nvml.error = pynvml.NVML_ERROR_UNKNOWN
    timeline.close("shard", 1, "b")
    segments = timeline.take()
    assert [segment_energy_mj(s) for s in segments] == [5_000_000, None]
    summary = build_ledger(segments).summary()
    assert (summary["complete"], summary["total_mj"], summary["shard_mj"]) == (False, None, None)
    assert summary["segments_not_measured"] == 1


def test_the_first_read_after_a_failure_is_not_the_lifetime_of_the_counter(open_fake, nvml, clock):
    meter = open_fake(["0"], nvml)
    nvml.error = pynvml.NVML_ERROR_UNKNOWN
    clock.advance(1)
    timeline = SegmentTimeline("w", meter)
    nvml.error = None
    draw(nvml, clock, 10)
    assert segment_energy_mj(timeline.close("shard", 0, "a")) is None
    draw(nvml, clock, 10)
    assert segment_energy_mj(timeline.close("shard", 1, "b")) == 5_000_000


# --- a counter reset gives a negative number (Zeus) or 0 (Aitra) ------------------------------------------------------


def test_a_reset_bumps_the_epoch_and_leaves_the_run_incomplete(open_fake, nvml, clock):
    timeline = SegmentTimeline("w", open_fake(["0"], nvml))
    for shard_id in range(3):
        draw(nvml, clock, 10)
        if shard_id == 1:
            nvml.energy_mj[UUIDS[0]] = 700
        timeline.close("shard", shard_id, "a")
    segments = timeline.take()
    assert [s.close.epoch for s in segments] == [0, 1, 1]
    assert [segment_energy_mj(s) for s in segments] == [5_000_000, None, 5_000_000]
    summary = build_ledger(segments).summary()
    assert (summary["complete"], summary["total_mj"], summary["counter_resets"]) == (False, None, 1)
    assert summary["measured_mj"] == {"shard": 10_000_000}


# --- a GPU chosen by its UUID is lost (CodeCarbon 3.3.2 strips characters off it) -------------------------------------


@pytest.mark.parametrize("first", list("0123456789abcdef"))
def test_a_full_uuid_reaches_counter_power_and_device_unchanged(open_fake, first):
    uuid = f"GPU-{first}0e1f2d3-0000-4000-8000-{first * 12}"
    nvml = FakeNvml(uuids=("GPU-ffffffff-aaaa-bbbb-cccc-000000000000", uuid))
    meter = open_fake([uuid], nvml)
    power = PowerSampler(meter)
    power.look()
    assert meter.domains == (f"gpu:{uuid}",)
    assert meter.boards.uuids == (uuid,)
    assert [t.device for t in power.take()] == [uuid]


@pytest.mark.parametrize("name", ["", "GPU", "gpu-1", UUIDS[0][4:], UUIDS[0] + "0"])
def test_what_is_not_a_uuid_finds_nothing_even_where_there_is_one_board_only(open_fake, name):
    assert open_fake([name], FakeNvml(uuids=UUIDS[:1])).method == "missing"


# --- N ranks count the node N times (CodeCarbon #544, #936, #1390) ----------------------------------------------------


@pytest.mark.long
def test_processes_that_share_a_host_add_up_to_its_counters_exactly(tmp_path, powercap):
    true_uj = {"intel-rapl:0": INTEL_RANGE_UJ - 2_000_000, "intel-rapl:0:1": 7_000_000}
    gpu_mj = 5_000_000

    def work(mj):  # the devices work on; the package wraps on its way
        nonlocal gpu_mj
        gpu_mj += mj
        (tmp_path / "next_mj").write_text(str(gpu_mj))
        os.replace(tmp_path / "next_mj", tmp_path / "gpu_mj")
        for zone in true_uj:
            true_uj[zone] += 777 * mj
            powercap.set(zone, true_uj[zone] % INTEL_RANGE_UJ)

    work(0)
    began = {GPU0: gpu_mj, **{d: true_uj[z] // 1000 for d, z in zones()}}
    owner = SegmentTimeline("parent", open_shared_meter(tmp_path))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "support.counter_worker", str(tmp_path), f"w{i}", "6"],
            cwd=TESTS,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    try:
        for w in workers:
            while not select.select([w.stdout], [], [], 0.5)[0]:
                work(
                    1
                )  # on a busy machine a worker takes long to start, and counters that stand still are broken
            assert w.stdout.readline() == "open\n"
        workers.pop().kill()  # its segments are lost, its energy is not
        while any(w.poll() is None for w in workers):
            work(701)
            time.sleep(0.03)
        time.sleep(MIN_READ_SPACING_NS / SECOND)
        work(1_000)
        owner.close("idle")
        segments = [*owner.take(), *(segment_from(line) for w in workers for line in w.stdout)]
    finally:
        for w in workers:
            w.kill()
            w.wait()
            w.stdout.close()

    assert len(segments) == 1 + 3 * 6
    used = {GPU0: gpu_mj, **{d: true_uj[z] // 1000 for d, z in zones()}}
    for domain in used:
        used[domain] -= began[domain]
    assert used[PACKAGE] > 2_000  # it did wrap
    ledger = build_ledger(segments)
    found = Counter()
    for entry in ledger.entries:
        found.update({d: mj for d, mj in entry.energy_mj.items() if mj is not None})
    assert found == used
    assert ledger.complete
    assert ledger.summary()["total_mj"] == sum(used.values())
    naive = sum(segment_energy_mj(s) for s in segments)
    assert naive > 2 * sum(used.values())  # what adding up the workers' own differences would have said


def test_two_containers_that_unwrapped_a_package_apart_are_never_subtracted(tmp_path, clock):
    """One host, one package, two /dev/shm: the second container began 30 wraps later, so its totals are lower.

    On one scale the step from its reading to the first container's was 2,026 kJ that nobody used.
    """
    host = WrappingHost(tmp_path, clock)
    first = SegmentTimeline("a", host.open("container-a"))
    began_mj = host.package_mj, host.gpu_mj
    for _ in range(200):
        host.run(98.3)
        first.meter.watch()
    first.close("idle")
    second = SegmentTimeline("b", host.open("container-b"))
    host.run(1)
    second.close("load")
    for _ in range(6):
        host.run(100)
        first.meter.watch()
        second.meter.watch()
    first.close("shard", 0, "a")
    host.run(1)
    second.close("shard", 1, "b")
    host.run(1)
    first.close("idle")
    segments = [*first.take(), *second.take()]
    used = host.package_mj - began_mj[0] + host.gpu_mj - began_mj[1]

    def on_one_scale(read):
        return replace(read, wrap_epoch=None)

    old = build_ledger(
        replace(s, open=on_one_scale(s.open), close=on_one_scale(s.close)) for s in segments
    ).summary()
    assert old["measured_mj"]["gap"] == 2_026_000_000  # the fiction: 30 wraps, and what was used meanwhile

    ledger = build_ledger(segments)
    summary = ledger.summary()
    assert sum(summary["measured_mj"].values()) == summary["total_mj"] == used  # once, by the first's book
    assert (summary["counter_resets"], summary["domains"]) == (0, [PACKAGE, GPU0])
    shares = {(e.segment.worker_id, e.segment_class): e.energy_mj for e in ledger.entries}
    assert shares["b", "shard"][PACKAGE] is None
    assert shard_mj(ledger, 1, "b") is None  # what the other container's workers used is not known ...
    # ... and nobody else's: half of the time it was there, to the first's reading after that
    assert sum(g.energy_mj for g in ledger.gaps) == 603 * 100_000 // 2
    # the board's counter does not wrap: both containers are on its one scale
    assert sum(e.energy_mj[GPU0] for e in ledger.entries) == host.gpu_mj - began_mj[1]
    assert shares["a", "shard"][GPU0] == pytest.approx(shares["b", "shard"][GPU0], rel=0.02)


def test_a_container_after_another_begins_a_book_and_nothing_is_subtracted_between_them(tmp_path, clock):
    host = WrappingHost(tmp_path, clock)
    segments = []
    for n, name in enumerate(("before", "after")):
        timeline = SegmentTimeline(name, host.open(name))
        for shard_id in range(20):
            host.run(98.3)
            timeline.close("shard", shard_id, f"{name}-{shard_id}")
        segments += timeline.take()
        timeline.meter.close()
        if n == 0:
            host.run(98.3)
    ledger = build_ledger(segments)
    assert {e.energy_mj[PACKAGE] for e in ledger.entries} == {9_830_000}
    assert (ledger.complete, ledger.summary()["counter_resets"]) == (True, 0)
    assert [g.domain for g in ledger.gaps] == [GPU0]  # between the two only the board is on one scale


def test_a_book_of_a_version_without_numbers_is_followed_on(tmp_path, clock):
    host = WrappingHost(tmp_path, clock)
    meter = host.open("c")
    path = meter.book.path
    meter.close()
    old = json.loads(path.read_text())
    del old["book"]
    path.write_text(json.dumps(old))
    host.run(10)
    meters = [host.open("c") for _ in range(2)]
    reads = [m.read() for m in meters]
    assert reads[0].wrap_epoch == reads[1].wrap_epoch > BOOK_EPOCHS
    assert {r.epoch for r in reads} == {0}
    assert json.loads(path.read_text())["book"] == reads[0].wrap_epoch // BOOK_EPOCHS


class WrappingHost:
    """A board of 300 W and a package of 100 W whose counter wraps every eleven minutes, as AMD's do."""

    RANGE_UJ = 65_532_610_987

    def __init__(self, folder, clock):
        self.folder, self.clock, self.nvml = folder, clock, FakeNvml()
        self.powercap = FakePowercap(folder / "powercap")
        shutil.rmtree(self.powercap.root / "intel-rapl:0:1")
        (self.powercap.root / "intel-rapl:0" / "max_energy_range_uj").write_text(f"{self.RANGE_UJ}\n")
        self.package_uj = 1_000_000

    @property
    def package_mj(self):
        return self.package_uj // 1000

    @property
    def gpu_mj(self):
        return self.nvml.energy_mj[UUIDS[0]]

    def open(self, container):
        """A meter in a container of that name, which has its own /dev/shm."""
        book = self.folder / container
        book.mkdir(exist_ok=True)
        options = {"nvml": self.nvml, "powercap_root": self.powercap.root, "clock_ns": self.clock}
        return open_meter(["0"], boot_id="boot", book_directory=book, **options)

    def run(self, seconds):
        draw(self.nvml, self.clock, seconds, watts=300)
        self.package_uj += round(seconds * 100e6)
        self.powercap.set("intel-rapl:0", self.package_uj % self.RANGE_UJ)


def zones():
    return ((PACKAGE, "intel-rapl:0"), (DRAM, "intel-rapl:0:1"))


# --- every MIG slice reports the board (dcgm-exporter #257, #317, #353) ----------------------------------------------


def test_seven_slices_of_one_board_are_missing_not_seven_boards(open_fake, nvml, clock):
    nvml.mig[UUIDS[0]] = [1, 1]
    names = [f"MIG-{i}0000000-aaaa-bbbb-cccc-000000000000" for i in range(6)] + [UUIDS[0]]
    timelines = [SegmentTimeline(name, open_fake([name], nvml)) for name in names]
    draw(nvml, clock, 10)
    segments = [t.close("shard", i, "a") for i, t in enumerate(timelines)]
    assert {t.meter.method for t in timelines} == {"missing"}
    assert [segment_energy_mj(s) for s in segments] == [None] * 7
    assert build_ledger(segments).summary()["total_mj"] is None


def test_a_slice_does_not_hide_that_the_gpu_is_missing_beside_a_measured_processor(open_fake, nvml, powercap):
    meter = open_fake(["MIG-1"], nvml, powercap)
    assert (meter.method, set(meter.read().energy_mj)) == ("rapl", {PACKAGE, DRAM})


# --- the monitor itself costs power (dcgm-exporter #464: idle 50 -> 100 W) -------------------------------------------


class CountedNvml(FakeNvml):
    """Counts every call of the library by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __getattribute__(self, name):
        if name.startswith("nvml"):
            self.calls[name] += 1
        return super().__getattribute__(name)


def test_eight_workers_at_rest_make_two_reading_calls_a_second_and_nothing_else(open_fake, clock):
    nvml = CountedNvml()
    samplers = [PowerSampler(open_fake(["0"], nvml)) for _ in range(8)]
    nvml.calls.clear()
    for _ in range(60):
        draw(nvml, clock, 1)
        for s in samplers:
            s.look()
    assert nvml.calls == {"nvmlDeviceGetFieldValues": 120}


# --- the counter falls behind when it is polled (Dauner et al.: -95 % every 0.5 ms, -1.6 % at 1 s) -------------------


class PolledNvml(FakeNvml):
    """A board that forgets what it used between two reads less than 150 ms apart."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.lost_mj = clock, 0
        self._read_ns, self._true_mj = clock(), self.energy_mj[UUIDS[0]]

    def _fail(self):
        super()._fail()
        now_ns, true_mj = self.clock(), self.energy_mj[UUIDS[0]] + self.lost_mj
        if now_ns - self._read_ns < 150_000_000:
            self.lost_mj += true_mj - self._true_mj
            self.energy_mj[UUIDS[0]] = true_mj - self.lost_mj
        self._read_ns, self._true_mj = now_ns, true_mj


def test_the_stand_in_does_lose_energy_when_polled(clock):
    nvml = PolledNvml(clock)
    for _ in range(100):
        draw(nvml, clock, 0.01)
        nvml.nvmlDeviceGetTotalEnergyConsumption(UUIDS[0])
    assert nvml.lost_mj > 450_000


def test_many_workers_with_many_boundaries_do_not_poll_the_counter(open_fake, clock):
    """Twelve workers, one shard every 0.3 s each, for two minutes: hundreds of boundaries, five reads a second at most."""
    nvml, dice = PolledNvml(clock), random.Random(7)
    timelines = [SegmentTimeline(f"w{i}", open_fake(["0"], nvml)) for i in range(12)]
    samplers = [PowerSampler(t.meter) for t in timelines]
    due = [dice.uniform(0, 0.3) for _ in timelines]
    before, boundaries, began_mj = nvml.reads, 0, nvml.energy_mj[UUIDS[0]]
    for tick in range(12_000):
        draw(nvml, clock, 0.01)
        if tick % 100 == 0:
            for s in samplers:
                s.look()
        for i, t in enumerate(timelines):
            if due[i] <= tick * 0.01:
                t.close("shard", boundaries, "a")
                boundaries += 1
                due[i] += dice.uniform(0.1, 0.5)
    assert boundaries > 4_000
    assert nvml.reads - before <= 120 / (MIN_READ_SPACING_NS / SECOND) + 1
    assert nvml.power_reads == 120
    assert nvml.lost_mj == 0
    assert nvml.energy_mj[UUIDS[0]] - began_mj == 60_000_000


def test_with_long_shards_the_counter_is_read_once_a_second_and_at_boundaries(open_fake, nvml, clock):
    timelines = [SegmentTimeline(f"w{i}", open_fake(["0"], nvml)) for i in range(4)]
    samplers = [PowerSampler(t.meter) for t in timelines]
    before = nvml.reads
    for second in range(300):
        draw(nvml, clock, 0.5)
        if second % 30 == 17:
            timelines[second % 4].close("shard", second, "a")
        draw(nvml, clock, 0.5)
        for s in samplers:
            s.look()
    assert nvml.reads - before == 300 + 10


def test_a_board_that_fails_is_not_hammered_either(open_fake, nvml, clock):
    meters = [open_fake(["0"], nvml) for _ in range(10)]
    nvml.error = pynvml.NVML_ERROR_TIMEOUT
    nvml.field_error = pynvml.NVML_ERROR_TIMEOUT
    clock.advance(1)
    before = nvml.reads
    for _ in range(100):
        clock.advance(0.01)
        assert [m.read().energy_mj for m in meters] == [{}] * 10
    assert nvml.reads - before <= 2 * (
        100 * 0.01 * SECOND / MIN_READ_SPACING_NS + 1
    )  # the field, then the plain call


# --- a one-second mean taken as instantaneous (Kepler's documentation, Ray, carbontracker) ---------------------------


def test_the_ambiguous_power_call_is_never_made(open_fake):
    class Tempting(CountedNvml):
        def nvmlDeviceGetPowerUsage(self, handle):
            return 650_000

    nvml = Tempting()
    nvml.power_field_errors = (pynvml.NVML_ERROR_NOT_SUPPORTED,) * 2
    sampler = PowerSampler(open_fake(["0"], nvml))
    sampler.look()
    assert sampler.take() == ()
    assert "nvmlDeviceGetPowerUsage" not in nvml.calls


# --- an idle baseline, measured somehow, is subtracted (many) ---------------------------------------------------------


def test_idle_draw_is_part_of_a_shard_and_states_are_told_apart(open_fake, nvml, clock):
    timeline = SegmentTimeline("w", open_fake(["0"], nvml))
    for kind, watts in (("load", 90), ("warmup", 300), ("idle", 120), ("shard", 120)):
        draw(nvml, clock, 10, watts)
        timeline.close(kind, *((0, "a") if kind == "shard" else ()))
    summary = build_ledger(timeline.take()).summary()
    assert summary["measured_mj"] == {
        "load": 900_000,
        "warmup": 3_000_000,
        "idle": 1_200_000,
        "shard": 1_200_000,
    }
    assert summary["total_mj"] == 6_300_000


# --- short windows clipped at zero -------------------------------------------------------------------------------------


def test_what_a_short_segment_does_not_see_the_next_one_gets(open_fake, nvml, clock):
    timeline = SegmentTimeline("w", open_fake(["0"], nvml))
    began_mj = nvml.energy_mj[UUIDS[0]]
    for shard_id in range(50):
        draw(nvml, clock, 0.07)
        timeline.close("shard", shard_id, "a")
    draw(nvml, clock, 1)
    timeline.close("idle")
    energy_mj = [segment_energy_mj(s) for s in timeline.take()]
    assert 0 in energy_mj  # measured, too short to see anything
    assert min(energy_mj) == 0
    assert sum(energy_mj) == nvml.energy_mj[UUIDS[0]] - began_mj == 2_250_000
