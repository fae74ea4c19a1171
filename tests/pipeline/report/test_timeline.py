"""Lanes over time: nothing is created or lost by binning, and their number does not grow with the job."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ledgers import JOB, SECOND, chain, commit, image_rows, read, segment

from millijoule.pipeline.energy.carbon import Rate, Rates
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.counter_split import MAX_GAP_NS
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.rows import RowTables
from millijoule.pipeline.energy.tables import write_energy_tables
from millijoule.pipeline.report.devices import devices_of_workers
from millijoule.pipeline.report.energy import energy_figures
from millijoule.pipeline.report.tables import read_energy_table
from millijoule.pipeline.report.timeline import (
    MAX_LANES,
    MAX_SPANS,
    STEPS,
    build_timeline,
    read_work,
    spread,
)
from millijoule.workers.schemas import PowerSample, PowerTrace
from millijoule.workers.storage.open import open_store


@pytest.fixture
def timeline(tmp_path):
    """Writes the tables of some segments and commits, and reads them back as (timeline, work)."""

    def build(segments, commits=()):
        store = open_store(str(tmp_path / "out"))
        write_energy_tables(
            store, JOB, build_ledger(segments), CommitTable.of(commits), RowTables(image_rows)
        )
        names = ("segment", "attempt", "counter", "power")
        tables = {t: read_energy_table(store, t, JOB.fingerprint) for t in names}
        work = read_work(tables["segment"])
        places = devices_of_workers(work, tables["attempt"])
        return build_timeline(work, places, tables["attempt"], tables["counter"], tables["power"]), work

    return build


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 90), st.floats(0.001, 10), st.floats(0, 1e6)), min_size=1, max_size=30),
    st.integers(1, 40),
)
def test_spreading_keeps_the_sum(stretches, steps):
    begin, length, amount = (np.array(c) for c in zip(*stretches, strict=True))
    edges = np.linspace(0, 100, steps + 1)
    binned = spread(begin, begin + length, amount, edges)
    assert binned.sum() == pytest.approx(amount.sum(), rel=1e-6, abs=1e-6)
    assert (binned >= 0).all()


def test_spreading_divides_a_stretch_by_overlap_and_drops_what_is_outside():
    edges = np.array([0.0, 1.0, 2.0, 3.0])
    one = spread(np.array([0.5]), np.array([4.5]), np.array([8.0]), edges)
    assert one == pytest.approx([1, 2, 2])
    assert spread(np.array([0.0]), np.array([1.0]), np.array([np.nan]), edges) == pytest.approx([0, 0, 0])


def test_power_follows_the_counter_between_reads(timeline):
    reads = [read(0, 0), read(10, 1_000_000), read(20, 1_000_000), read(40, 7_000_000)]
    made, _ = timeline(chain(reads, ["load", "idle", "shard"]))
    (lane,) = made.power
    watts = np.array(lane.watts)
    assert (lane.device, lane.source) == ("GPU-1", "counter")
    assert watts[: STEPS // 4] == pytest.approx(100)
    assert watts[STEPS // 4 : STEPS // 2] == pytest.approx(0)
    assert watts[STEPS // 2 :] == pytest.approx(300)
    assert made.step_s * made.steps == pytest.approx(40)


def test_power_is_not_known_across_a_reset_or_a_night(timeline):
    night = MAX_GAP_NS / SECOND * 3
    reads = [read(0, 10**9), read(20, 10**9 + 2_000_000)]
    after_reset = [read(40, 5, epoch=1), read(60, 2_000_005, epoch=1)]
    next_day = [read(night, 9_000_005, epoch=1), read(night + 60, 12_000_005, epoch=1)]
    parts = [*chain(reads, ["shard"]), *chain(after_reset, ["load"]), *chain(next_day, ["load"], "w2")]
    made, _ = timeline(parts)
    (lane,) = made.power
    assert lane.watts[0] == pytest.approx(100, rel=0.5)
    assert lane.watts[STEPS // 2] is None
    assert lane.watts[-1] == pytest.approx(50, rel=0.01)
    assert max(w for w in lane.watts if w is not None) < 101


def test_a_failed_read_is_a_hole_not_a_zero(timeline):
    reads = [read(0, 0), read(10, 1_000_000), read(20), read(30)]
    made, work = timeline(chain(reads, ["load", "idle", "idle"]))
    (lane,) = made.power
    assert lane.watts[0] == 100
    assert lane.watts[-1] is None
    assert np.isnan(work.energy_mj).sum() == 2


def test_power_readings_are_preferred_to_counters(timeline):
    samples = tuple(
        PowerSample(i * SECOND, i * SECOND, 70_000 if i < 10 else None, 90_000) for i in range(20)
    )
    segments = chain([read(0, 0), read(20, 2_000_000)], ["shard"])
    traces = (PowerTrace("GPU-1", "boot", "nvml", samples),)
    made, _ = timeline(segments, [replace(commit(1, "a1", 4, segments), power=traces)])
    (lane,) = made.power
    assert (lane.host, lane.device, lane.source) == ("h1", "GPU-1", "power reading")
    seen = [w for w in lane.watts if w is not None]
    assert seen == [70.0] * 10 + [90.0] * 10


def test_a_worker_without_commits_is_placed_by_its_machine(timeline):
    segments = [
        *chain([read(0, 0), read(1, 5)], ["shard"], "w1"),
        *chain([read(0, 0), read(1, 5)], ["load"], "w2"),
        segment(read(0, 1, boot="other-boot"), read(1, 2, boot="other-boot"), "load", "w3"),
    ]
    made, _ = timeline(segments, [commit(1, "a1", 4, segments)])
    assert {lane.worker: (lane.host, lane.device) for lane in made.work} == {
        "w1": ("h1", "GPU-1"),
        "w2": ("h1", "unknown"),
        "w3": ("boot other-bo", "unknown"),
    }


def test_a_long_job_has_no_more_spans_than_a_short_one(timeline):
    reads = [read(i, 10 * i) for i in range(10_001)]
    kinds = ["shard", "idle", "idle", "idle"] * 2_500
    made, work = timeline(chain(reads, kinds))
    (lane,) = made.work
    assert len(work.begin_s) == 10_000
    assert made.work_is_stepped
    assert len(lane.spans) <= STEPS
    assert sum(e - b for b, e, _ in lane.spans) == pytest.approx(10_000)
    assert {c for _, _, c in lane.spans} == {"idle"}  # three quarters of every step


def test_many_workers_are_cut_to_the_lanes_shown_and_counted(timeline):
    reads = [read(i, 10 * i) for i in range(200)]
    segments = [s for w in range(100) for s in chain(reads, ["idle"] * 199, f"w{w:03}")]
    made, _ = timeline(segments)
    assert (len(made.work), made.work_lanes_not_shown) == (MAX_LANES, 100 - MAX_LANES)
    assert sum(len(lane.spans) for lane in made.work) <= MAX_SPANS


def test_short_jobs_are_drawn_exactly(timeline):
    reads = [read(t, int(8 * t)) for t in (0, 1.25, 1.5, 4)]
    made, _ = timeline(chain(reads, ["load", "idle", "shard"]))
    assert made.work[0].spans == ((0, 1.25, "load"), (1.25, 1.5, "idle"), (1.5, 4, "shard"))
    assert not made.work_is_stepped


def test_no_segments_is_no_timeline():
    columns = {
        "segment_id": pa.int64(),
        "worker_id": pa.string(),
        "segment_class": pa.string(),
        "boot_id": pa.string(),
        "t_open_mono_ns": pa.int64(),
        "t_close_mono_ns": pa.int64(),
        "t_open_wall_ns": pa.int64(),
        "domain": pa.string(),
        "energy_mj": pa.int64(),
        "energy_estimate_mj": pa.int64(),
    }
    work = read_work(pa.table({name: pa.array([], kind) for name, kind in columns.items()}))
    assert build_timeline(work, {}, pa.table({}), None, None) is None


def test_energy_between_two_runs_has_no_weight_in_a_mean_over_time(timeline):
    night = MAX_GAP_NS / SECOND * 2
    reads = [read(0, 0), read(10, 1000)]
    later = [read(night, 900_000), read(night + 10, 903_000)]
    gap_after = [read(night + 20, 904_000), read(night + 30, 905_000)]
    parts = [*chain(reads, ["shard"]), *chain(later, ["load"], "w2"), *chain(gap_after, ["load"], "w3")]
    _, work = timeline(parts)
    assert sorted(work.gap_classes) == ["gap", "off"]
    rate = Rate("table", (100.0, 200.0), (-10.0, night - 10), night)
    total = 1000 + 3000 + 1000 + 1000
    stats = {
        "energy_methods": {"rapl": 1},
        "direct_mj_per_image": 1000.0,
        "full_mj_per_image": float(total),
        "energy": {"total_mj": total},
    }
    figures = energy_figures(stats, work, Rates(carbon=rate), measured=True)
    assert figures.direct_gco2e_per_image == pytest.approx(1000 / 3.6e9 * 100)
    assert figures.full_gco2e_per_image == pytest.approx((1000 * 100 + 5000 * 200) / 3.6e9)
