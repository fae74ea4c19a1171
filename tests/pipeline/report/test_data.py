"""What the report says is what the output's own files say; what they do not say is missing, never 0."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.report_outputs import GPUS, HOSTILE, change_stats, measured_output, unmeasured_output

from millijoule.pipeline.energy.carbon import Rate, Rates, read_rate
from millijoule.pipeline.report import gallery as report_gallery
from millijoule.pipeline.report.data import collect_job, collect_report
from millijoule.pipeline.report.devices import gpu_models, model_of
from millijoule.pipeline.report.timeline import HostDevice
from millijoule.workers.errors import InputError, MillijouleError
from millijoule.workers.storage.open import open_store

PROMPTS = [*HOSTILE[:3], *(f"prompt {i}" for i in range(41))]
MJ_PER_KWH = 3.6e9


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measured_output(tmp_path_factory.mktemp("measured"), PROMPTS)


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory):
    return unmeasured_output(tmp_path_factory.mktemp("unmeasured"), PROMPTS)


@pytest.fixture
def copy(measured, tmp_path):
    """A measured output to spoil."""
    shutil.copytree(measured.url, tmp_path / "out")
    return open_store(str(tmp_path / "out"))


def stats_of(store):
    return json.loads(store.get("stats.json"))


def flag_names(job):
    return {flag.name for flag in job.flags}


# --- measured ---------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_ledger(measured):
    job, stats = collect_job(measured, Rates()), stats_of(measured)
    assert job.is_measured
    assert job.evidence_class == stats["evidence_class"] == "E1"
    assert job.measured.total_mj == stats["energy"]["total_mj"] > 0
    assert job.measured.direct_mj_per_image == stats["direct_mj_per_image"]
    assert job.measured.full_mj_per_image == pytest.approx(job.measured.total_mj / 44)
    assert job.measured.direct_images_per_kwh == pytest.approx(MJ_PER_KWH / stats["direct_mj_per_image"])
    assert job.measured.method == "measured (nvml-counter+rapl)"
    assert job.estimate.method == "estimate (CPU time x 10 W/core)"
    assert (
        job.estimate.full_mj_per_image
        == stats["full_estimate_mj_per_image"]
        != job.measured.full_mj_per_image
    )
    assert job.measured.direct_gco2e_per_image is None
    assert job.measured.full_cost_per_image is None


def test_grams_and_money_follow_from_joules_and_pue_never_touches_them(measured):
    plain = collect_job(measured, Rates())
    job = collect_job(measured, Rates(Rate("grid", (400.0,)), Rate("tariff", (0.25,)), 1.5))
    assert job.measured.direct_mj_per_image == plain.measured.direct_mj_per_image
    assert job.classes == plain.classes
    kwh = job.measured.full_mj_per_image / MJ_PER_KWH
    assert job.measured.full_gco2e_per_image == pytest.approx(kwh * 400 * 1.5)
    assert job.measured.full_cost_per_image == pytest.approx(kwh * 0.25 * 1.5)
    assert job.measured.total_gco2e == pytest.approx(job.measured.total_mj / MJ_PER_KWH * 400 * 1.5)
    assert job.estimate.direct_gco2e_per_image == pytest.approx(
        job.estimate.direct_mj_per_image / MJ_PER_KWH * 400 * 1.5
    )
    assert job.carbon.fallback
    assert not job.price.fallback
    assert {"carbon intensity: fallback", "PUE declared"} <= flag_names(job)


def test_an_intensity_that_changes_during_the_job_is_weighted_by_its_energy(measured, tmp_path):
    timeline = collect_job(measured, Rates()).timeline
    middle = timeline.start_unix_s + timeline.steps * timeline.step_s / 2
    table = tmp_path / "carbon.csv"
    table.write_text(f"time,value\n{middle - 3600},100\n{middle},300\n")
    job = collect_job(measured, Rates(carbon=read_rate(str(table), "--gco2-per-kwh")))
    assert 100 < job.carbon.mean_per_kwh < 300
    assert (job.carbon.fallback, job.carbon.source) == (False, "carbon.csv")
    assert job.measured.total_gco2e == pytest.approx(
        job.measured.total_mj / MJ_PER_KWH * job.carbon.mean_per_kwh
    )
    table.write_text(f"time,value\n{middle + 7200},100\n{middle + 7260},300\n")
    elsewhere = collect_job(measured, Rates(carbon=read_rate(str(table), "--gco2-per-kwh")))
    assert (elsewhere.carbon.fallback_share, elsewhere.carbon.mean_per_kwh) == (1.0, pytest.approx(100))
    assert "carbon intensity: fallback" in flag_names(elsewhere)


def test_classes_share_all_energy_and_time(measured):
    job = collect_job(measured, Rates())
    classes = {row.segment_class: row for row in job.classes}
    assert {"load", "idle", "shard", "loser"} <= set(classes)
    assert classes["loser"].group == "waste"
    assert sum(row.energy_share for row in job.classes if row.energy_share) == pytest.approx(1)
    assert sum(row.time_share for row in job.classes if row.time_share) == pytest.approx(1)
    assert sum(row.energy_mj or 0 for row in job.classes) == job.measured.total_mj


def test_devices_share_images_and_energy(measured):
    job = collect_job(measured, Rates())
    assert [(r.host, r.device) for r in job.devices] == [
        ("host-a", GPUS[0]),
        ("host-a", GPUS[1]),
        ("host-b", GPUS[2]),
    ]
    assert sum(r.images for r in job.devices) == 44
    direct = sum(r.direct_mj_per_image * r.images for r in job.devices)
    assert direct == pytest.approx(job.measured.direct_mj_per_image * 44)
    full = sum(r.full_mj_per_image * r.images for r in job.devices)
    assert full <= job.measured.total_mj
    assert full == pytest.approx(job.measured.total_mj, rel=0.05)  # the rest is in gaps between workers
    assert job.devices[1].time_shares["waste"] > 0
    assert [(r.host, r.device, r.images) for r in job.nodes] == [
        ("host-a", "2 devices", job.devices[0].images + job.devices[1].images),
        ("host-b", "1 device", job.devices[2].images),
    ]
    assert sum(r.full_mj_per_image * r.images for r in job.nodes) == pytest.approx(full)
    (kind,) = job.models
    assert (kind.model, kind.host, kind.device, kind.images) == (
        "GPU, model not recorded",
        "2 nodes",
        "3 devices",
        44,
    )


def test_power_is_the_watts_the_counters_say(measured):
    lanes = {(p.host, p.device): p for p in collect_job(measured, Rates()).timeline.power}
    expected = {("host-a", GPUS[0]): 100, ("host-a", GPUS[1]): 200, ("host-b", GPUS[2]): 300}
    expected |= {("host-a", "cpu:package-0"): 50, ("host-b", "cpu:package-0"): 50}
    assert set(lanes) == set(expected)
    for place, watts in expected.items():
        seen = [w for w in lanes[place].watts if w is not None]
        assert len(seen) > 20
        assert seen == pytest.approx([watts] * len(seen), rel=0.02)
        assert lanes[place].source == "counter"


def test_slow_shards_are_stragglers_of_their_worker(measured):
    speed = collect_job(measured, Rates()).speed
    assert speed.shards == 11
    assert speed.stragglers >= len(speed.slowest) > 0
    assert {s.worker for s in speed.slowest} == {"w2"}
    assert all(s.times_median > 1.5 for s in speed.slowest)
    assert [s.times_median for s in speed.slowest] == sorted(
        (s.times_median for s in speed.slowest), reverse=True
    )


def test_images_per_second_add_up_to_the_images(measured):
    timeline = collect_job(measured, Rates()).timeline
    assert sum(timeline.images_per_second) * timeline.step_s == pytest.approx(44, rel=0.01)


def test_closure_lists_what_was_recorded(measured):
    closure = collect_job(measured, Rates()).closure
    assert closure.failed == 0
    assert closure.checks == len(closure.rows)
    assert {row["check"] for row in closure.rows} >= {"C1", "C2", "C5"}


def test_samples_are_the_first_images_with_their_prompts(measured):
    samples = collect_job(measured, Rates()).samples
    assert len(samples) == 32
    assert [s.prompt for s in samples[:3]] == PROMPTS[:3]
    assert all(s.picture.startswith("data:image/png;base64,") for s in samples)
    assert samples[0].energy_mj > 0


# --- not measured -----------------------------------------------------------------------------------------------------


def test_without_a_counter_joules_are_missing_and_the_estimate_stands_apart(unmeasured):
    job = collect_job(unmeasured, Rates(Rate("grid", (400.0,))))
    assert not job.is_measured
    assert job.evidence_class == "E0"
    figures = asdict(job.measured)
    assert figures.pop("method") == "not measured"
    assert set(figures.values()) == {None}
    assert job.estimate.full_gco2e_per_image == pytest.approx(
        job.estimate.full_mj_per_image / MJ_PER_KWH * 400
    )
    assert all(row.energy_mj is None and row.energy_share is None for row in job.classes)
    assert sum(row.estimate_share for row in job.classes) == pytest.approx(1)
    assert [r.full_mj_per_image for r in job.devices] == [None]
    assert "energy not measured" in flag_names(job)
    (lane,) = job.timeline.power
    assert lane.source == "estimate"
    known = [w for w in lane.watts if w is not None][5:-10]  # the ends are partly outside the segments
    assert len(known) > 70
    assert known == pytest.approx([10] * len(known), rel=0.1)


def test_json_keeps_missing_apart_from_zero(unmeasured, measured):
    report = json.loads(collect_report([unmeasured, measured], Rates()).to_json())
    assert [job["output"] for job in report["jobs"]] == [unmeasured.url, measured.url]
    assert report["jobs"][0]["measured"]["direct_mj_per_image"] is None
    assert report["jobs"][1]["measured"]["direct_mj_per_image"] > 0
    assert report["schema_version"] == 1


def test_a_part_of_the_energy_is_not_the_energy(copy):
    stats = stats_of(copy)
    energy = stats["energy"] | {"total_mj": None, "complete": False, "segments_not_measured": 3}
    change_stats(copy, energy=energy, full_mj_per_image=None)
    job = collect_job(copy, Rates(Rate("grid", (400.0,))))
    assert job.measured.full_mj_per_image is None
    assert job.measured.full_gco2e_per_image is None
    assert job.measured.direct_mj_per_image is not None
    assert all(row.energy_mj is None for row in job.classes)
    assert "energy measured in part" in flag_names(job)


# --- outputs of all ages ----------------------------------------------------------------------------------------------


def flatten(store):
    """The layout without partition folders."""
    for item in list(store.list("energy/")):
        table, name = item.key.split("/")[1], item.key.split("/")[-1]
        store.put(f"energy/{table}/{name}", store.get(item.key))
        store.delete([item.key])


def test_older_outputs_have_the_same_figures_and_say_what_they_lack(copy):
    before = collect_job(copy, Rates())
    flatten(copy)
    for table in ("closure", "power", "env"):
        store_keys = [item.key for item in copy.list(f"energy/{table}/")]
        copy.delete(store_keys)
    change_stats(copy, "evidence_class")
    job = collect_job(copy, Rates())
    assert job.measured == before.measured
    assert job.devices == before.devices
    assert job.timeline == before.timeline
    assert (job.evidence_class, job.closure.rows) == ("not computed", None)
    assert {"evidence class not computed", "closure not recorded", "power not recorded"} <= flag_names(job)


def test_tables_of_an_earlier_job_are_left_out(copy):
    before = collect_job(copy, Rates())
    for item in list(copy.list("energy/")):
        parts = item.key.split("/")
        copy.put("/".join([*parts[:2], "run_id=ffffffffffff", *parts[3:]]), copy.get(item.key))
    assert collect_job(copy, Rates()).devices == before.devices


def test_a_job_that_has_not_finished_is_refused(copy, tmp_path):
    copy.delete(["stats.json"])
    with pytest.raises(InputError, match=r"has not finished.*unless a run is at work"):
        collect_job(copy, Rates())
    with pytest.raises(InputError, match="no job here"):
        collect_job(open_store(str(tmp_path / "empty")), Rates())


def test_statistics_of_another_kind_are_refused_with_what_is_missing(copy):
    change_stats(copy, "images_ok")
    with pytest.raises(InputError, match=r"stats\.json.*images_ok"):
        collect_job(copy, Rates())


@pytest.mark.parametrize("damage", ["stats.json", "energy/segment", "energy/counter"])
def test_damaged_files_are_named(copy, damage):
    key = next(item.key for item in copy.list(damage))
    Path(copy.url, key).unlink()
    copy.put(key, b"not what it was")
    with pytest.raises(MillijouleError, match=key.split("/")[-1]):
        collect_job(copy, Rates())


def test_images_that_are_gone_leave_their_prompts(copy):
    copy.delete([item.key for item in copy.list("data/")])
    samples = collect_job(copy, Rates()).samples
    assert len(samples) == 32
    assert {s.picture for s in samples} == {None}


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_damaged_images_leave_their_prompts_and_the_report(copy, keep):
    for item in list(copy.list("data/")):
        data = copy.get(item.key)
        Path(copy.url, item.key).unlink()
        copy.put(item.key, data[:keep])
    samples = collect_job(copy, Rates()).samples
    assert [s.prompt for s in samples[:3]] == PROMPTS[:3]
    assert {s.picture for s in samples} == {None}


def test_an_image_that_is_none_is_not_shown(caplog):
    assert report_gallery.data_url(b"\x89PNG\r\n\x1a\n" + bytes(40)) is None
    assert "an image cannot be read, and is not shown" in caplog.text


def test_closure_that_fails_stands_first_and_is_a_problem(copy):
    (key,) = [item.key for item in copy.list("energy/closure/")]
    table = pq.read_table(pa.BufferReader(copy.get(key)))
    passed = [name != "C5" for name in table["check"].to_pylist()]
    place = table.schema.get_field_index("passed")
    sink = pa.BufferOutputStream()
    pq.write_table(table.set_column(place, "passed", pa.array(passed)), sink)
    copy.put(key, sink.getvalue().to_pybytes())
    job = collect_job(copy, Rates())
    assert job.closure.failed == passed.count(False) == 1
    assert job.closure.rows[0]["check"] == "C5"
    assert job.flags[0].name == "closure failed"


def add_gap(store, segment_class, mj):
    """A gap without a worker of so much energy after the segments, which the totals have, too, unless it is "off"."""
    (key,) = [item.key for item in store.list("energy/segment/")]
    table = pq.read_table(pa.BufferReader(store.get(key)))
    end = max(table["t_close_mono_ns"].to_pylist())
    nobodys = ("segment_id", "worker_id", "shard_id", "attempt_id", "energy_estimate_mj")
    gap = table.slice(0, 1).to_pylist()[0] | dict.fromkeys(nobodys)
    gap |= {
        "segment_class": segment_class,
        "energy_mj": mj,
        "t_open_mono_ns": end,
        "t_close_mono_ns": end + 10**9,
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist([gap], table.schema)]), sink)
    store.put(key, sink.getvalue().to_pybytes())
    energy = stats_of(store)["energy"]
    if segment_class == "gap":
        energy["total_mj"] += mj
    change_stats(store, energy=energy)


@pytest.mark.parametrize(
    ("segment_class", "share", "is_flagged"),
    [("gap", 0.25, True), ("gap", 0.02, False), ("off", 0.25, False)],
)
def test_energy_that_is_no_workers_is_flagged_with_its_share(copy, segment_class, share, is_flagged):
    total_mj = stats_of(copy)["energy"]["total_mj"]
    add_gap(copy, segment_class, round(total_mj * share / (1 - share)))
    texts = [flag.text for flag in collect_job(copy, Rates()).flags if flag.name == "energy of nobody"]
    assert len(texts) == is_flagged
    assert all(text.startswith(f"{share:.0%} of the energy is no worker's") for text in texts)


def test_kinds_of_device_come_from_the_environment():
    env = pa.table(
        {
            "host": ["h1", "h2", None],
            "device": ["GPU-1", "GPU-1", "GPU-2"],
            "device_name": ["NVIDIA H200", None, "NVIDIA L4"],
        }
    )
    models = gpu_models(env)
    assert model_of(HostDevice("h1", "GPU-1"), models) == "NVIDIA H200"
    assert model_of(HostDevice("h2", "GPU-1"), models) == "GPU, model not recorded"
    assert model_of(HostDevice("h3", "GPU-2"), models) == "NVIDIA L4"
    assert model_of(HostDevice("h1", "cpu"), models) == "cpu"
