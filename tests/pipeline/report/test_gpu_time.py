"""GPU-hours: every second of a GPU that some worker held counts once, and money follows only where it can."""

import html
import io
import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.report_outputs import GPUS, measured_output, unmeasured_output

from millijoule.pipeline.closing.finish import finish_job
from millijoule.pipeline.energy.carbon import Rate, Rates
from millijoule.pipeline.output.job import require_job
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.report.data import collect_job, collect_report
from millijoule.pipeline.report.energy import GROUPS
from millijoule.pipeline.report.gpu_time import GpuPrices, measure_gpu_time, parse_gpu_prices
from millijoule.pipeline.report.page import render_page
from millijoule.pipeline.report.terminal import print_report
from millijoule.pipeline.report.timeline import HostDevice, Work
from millijoule.workers.errors import InputError
from millijoule.workers.layout import worker_key
from millijoule.workers.schemas import WorkerEnvironment
from millijoule.workers.storage.open import open_store

CLASSES = tuple(GROUPS)
ORDER = ("images", "load", "waste", "idle")
H200, A100 = "NVIDIA H200", "NVIDIA A100-SXM4-80GB"


def work_of(segments):
    """`Work` of (worker, class, begin, end) in hours."""
    workers = tuple(dict.fromkeys(w for w, *_ in segments))
    columns = list(zip(*segments, strict=True))
    none = np.full(len(segments), np.nan)
    return Work(
        workers=workers,
        worker=np.array([workers.index(w) for w in columns[0]]),
        classes=CLASSES,
        segment_class=np.array([CLASSES.index(c) for c in columns[1]]),
        begin_s=3600.0 * np.array(columns[2]),
        end_s=3600.0 * np.array(columns[3]),
        energy_mj=none,
        estimate_mj=none,
        boot_of_worker=dict.fromkeys(workers, "boot"),
        clock_offset_s={"boot": 0.0},
        gap_classes=(),
        gap_begin_s=np.zeros(0),
        gap_end_s=np.zeros(0),
        gap_energy_mj=np.zeros(0),
    )


def measure(segments, gpus, images=10, prices=None, models=None):
    """GPU time of `segments` whose workers state that they hold `gpus` (by worker: comma-separated, None: not stated)."""
    work = work_of(segments)
    places = {w: HostDevice("host", (gpus[w] or "unknown").split(",")[0]) for w in work.workers}
    env = pa.table({"worker_id": [*gpus], "gpus": pa.array([*gpus.values()], pa.string())})
    return measure_gpu_time(work, places, env, models or {}, images, prices)


# --- time ---------------------------------------------------------------------------------------------------------------


@st.composite
def chains(draw):
    """Up to four workers on up to three GPUs, in whole hours: [(worker, class, begin, end)], {worker: gpus}."""
    segments, gpus = [], {}
    for n in range(draw(st.integers(1, 4))):
        at = sorted(draw(st.sets(st.integers(0, 12), min_size=2)))
        kinds = st.sampled_from([c for c in CLASSES if c != "gap"])
        segments += [(f"w{n}", draw(kinds), a, b) for a, b in pairwise(at)]
        gpus[f"w{n}"] = ",".join(sorted(draw(st.sets(st.sampled_from("ABC"), min_size=1))))
    return segments, gpus


@settings(deadline=None)
@given(chains())
def test_each_hour_of_a_gpu_counts_once_for_the_first_thing_done_in_it(case):
    segments, gpus = case
    time = measure(segments, gpus)
    doing = {}  # (gpu, hour) -> groups
    for worker, kind, begin, end in segments:
        for gpu in gpus[worker].split(","):
            for hour in range(begin, end):
                doing.setdefault((gpu, hour), set()).add(GROUPS[kind])
    first = [next(g for g in ORDER if g in groups) for groups in doing.values()]
    assert time.hours_by_group == pytest.approx({g: first.count(g) for g in ORDER})
    assert time.hours == pytest.approx(len(doing))
    assert time.direct_hours == pytest.approx(first.count("images"))
    assert time.gpus == len({gpu for gpu, _ in doing})
    assert time.full_seconds_per_image == pytest.approx(360 * len(doing))


def test_time_between_segments_that_were_lost_was_held_too():
    time = measure([("w", "shard", 0, 1), ("w", "shard", 3, 4)], {"w": "A"})
    assert (time.hours, time.direct_hours) == (4, 2)


def test_without_a_gpu_there_is_no_gpu_time():
    assert measure([("w", "shard", 0, 1)], {"w": ""}, prices=GpuPrices(2.0)) is None


# --- money --------------------------------------------------------------------------------------------------------------

TWO = [("a", "load", 0, 1), ("a", "shard", 1, 3), ("b", "shard", 0, 1), ("b", "idle", 1, 5)]
MODELS = {("host", "A"): H200, ("host", "B"): A100}


def test_each_model_has_its_price():
    time = measure(TWO, {"a": "A", "b": "B"}, 10, parse_gpu_prices(["h200=3", "A100=1"]), MODELS)
    assert [(m.model, m.gpus, m.hours, m.price_per_hour) for m in time.models] == [
        (A100, 1, 5, 1),
        (H200, 1, 3, 3),
    ]
    assert time.total_cost == 5 * 1 + 3 * 3
    assert time.full_cost_per_image == pytest.approx(1.4)
    assert time.direct_cost_per_image == pytest.approx((1 * 1 + 2 * 3) / 10)


def test_one_price_is_for_all_and_the_longest_name_wins():
    prices = parse_gpu_prices(["2", "A100=1", "A100-SXM4=1.5"])
    assert [prices.of(model) for model in (H200, A100, "NVIDIA A100-PCIE-40GB")] == [2, 1.5, 1]


def test_a_price_that_is_missing_is_not_zero():
    time = measure(TWO, {"a": "A", "b": "B"}, 10, parse_gpu_prices(["H200=3"]), MODELS)
    assert time.hours == 8
    assert (time.total_cost, time.full_cost_per_image, time.direct_cost_per_image) == (None, None, None)


def test_a_worker_that_did_not_say_what_it_held_leaves_the_cost_missing():
    time = measure(TWO, {"a": "A", "b": None}, 10, GpuPrices(2.0), MODELS)
    assert (time.workers_unknown, time.hours, time.total_cost) == (1, 3, None)
    assert time.full_seconds_per_image is None


def test_no_image_is_no_cost_per_image():
    time = measure(TWO, {"a": "A", "b": "B"}, 0, GpuPrices(2.0))
    assert (time.total_cost, time.full_cost_per_image, time.full_seconds_per_image) == (16, None, None)


@pytest.mark.parametrize("text", ["out/", "H200=", "=3", "H200=cheap", "-1", "nan", "H200=inf", ""])
def test_what_is_no_price_is_named(text):
    with pytest.raises(InputError, match=f"--price-per-gpu-hour {text}"):
        parse_gpu_prices([text])


@pytest.mark.parametrize("texts", [("1", "2"), ("H200=1", "h200=2")])
def test_a_price_given_twice_is_refused(texts):
    with pytest.raises(InputError, match="priced twice"):
        parse_gpu_prices(texts)


# --- in the report ------------------------------------------------------------------------------------------------------

PROMPTS = [f"prompt {i}" for i in range(20)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measured_output(tmp_path_factory.mktemp("measured"), PROMPTS)


def printed(report):
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    return console.file.getvalue()


def test_the_report_shows_gpu_time_beside_electricity(measured):
    report = collect_report([measured], Rates(price=Rate("tariff", (0.25,)), pue=1.5), GpuPrices(3.0))
    (job,) = report.jobs
    spans = {lane.worker: lane.spans for lane in job.timeline.work}
    held = sum(lane[-1][1] - lane[0][0] for lane in spans.values())
    assert job.gpu_time.gpus == 3
    assert job.gpu_time.hours == pytest.approx(held / 3600, rel=0.01)
    assert job.gpu_time.total_cost == pytest.approx(3.0 * job.gpu_time.hours)  # no PUE
    assert job.gpu_time.full_cost_per_image == pytest.approx(job.gpu_time.total_cost / 20)
    assert 0 < job.gpu_time.direct_cost_per_image < job.gpu_time.full_cost_per_image
    assert json.loads(report.to_json())["jobs"][0]["gpu_time"]["total_cost"] == job.gpu_time.total_cost
    shown = printed(report)
    assert "time in which GPUs were held (3 x GPU, model not recorded)" in shown
    assert "GPU time cost per image" in shown
    assert "electricity cost per image" in shown
    page = render_page(report).decode()
    assert "GPU time cost per image" in page
    assert (
        "price per GPU-hour (--price-per-gpu-hour): 3.00 for GPU, model not recorded. PUE plays no part."
        in page
    )


def test_without_a_price_there_is_time_and_no_money(measured):
    job = collect_job(measured, Rates())
    assert job.gpu_time.hours > 0
    assert job.gpu_time.total_cost is None
    assert "GPU price missing" not in {f.name for f in job.flags}


def test_a_price_without_a_gpu_is_missing_and_said(tmp_path):
    store = unmeasured_output(tmp_path, PROMPTS)
    report = collect_report([store], Rates(), GpuPrices(3.0))
    assert report.jobs[0].gpu_time is None
    assert "no GPU time" in {f.name for f in report.jobs[0].flags}
    assert "GPU time cost" not in printed(report)
    assert "no GPU time" not in {f.name for f in collect_job(store, Rates()).flags}


@pytest.mark.parametrize("other_price", [None, 2.0, 5.0])
def test_what_pools_stated_prices_gpus_where_the_report_is_told_nothing(measured, tmp_path, other_price):
    """Two pools; the model of one has a name that is in the other's."""
    shutil.copytree(measured.url, tmp_path / "out")
    store = open_store(str(tmp_path / "out"))
    for worker, host, gpu, model, price in (
        ("w0", "host-a", GPUS[0], "NVIDIA L4", 2.0),
        ("w1", "host-a", GPUS[0], "NVIDIA L4", other_price),
        ("w2", "host-b", GPUS[1], "NVIDIA L40S", None),
    ):
        stated = WorkerEnvironment(
            worker, 1, "node", host, gpu, (gpu,), model, "570.1", "3.11", "2.9", "nvml-counter+rapl"
        )
        store.put(worker_key(worker), replace(stated, pool="p", price_per_hour=price).to_json())
    job = require_job(store)
    finish_job(store, job, load_job_shards(store, job))
    report = collect_report([store], Rates())
    prices = {m.model: m.price_per_hour for m in report.jobs[0].gpu_time.models}
    assert prices == {"NVIDIA L4": None if other_price == 5.0 else 2.0, "NVIDIA L40S": None}
    assert report.jobs[0].gpu_time.total_cost is None
    (flag,) = [f.text for f in report.jobs[0].flags if f.name == "GPU price missing"]
    missing = "NVIDIA L4, NVIDIA L40S" if other_price == 5.0 else "NVIDIA L40S"
    assert flag.startswith(f"price= of the job's pools has no price for {missing}, so the cost is missing.")
    if other_price != 5.0:
        assert "price per GPU-hour (price= of the job's pools): 2.00 for NVIDIA L4. PUE" in html.unescape(
            render_page(report).decode()
        )
    told = collect_job(store, Rates(), GpuPrices(3.0)).gpu_time
    assert {m.price_per_hour for m in told.models} == {3.0}
    assert told.total_cost == pytest.approx(3.0 * told.hours)


def test_what_workers_state_decides_which_gpus_were_held_and_what_they_are(measured, tmp_path):
    """w0 and w1 shared a GPU, w2 held two: as they said at start, whatever their commits name first."""
    shutil.copytree(measured.url, tmp_path / "out")
    store = open_store(str(tmp_path / "out"))
    for worker, host, gpus in (
        ("w0", "host-a", GPUS[:1]),
        ("w1", "host-a", GPUS[:1]),
        ("w2", "host-b", GPUS[1:]),
    ):
        stated = WorkerEnvironment(
            worker, 1, "node", host, gpus[0], gpus, H200, "570.1", "3.11", "2.9", "nvml-counter+rapl"
        )
        store.put(worker_key(worker), stated.to_json())
    job = require_job(store)
    finish_job(store, job, load_job_shards(store, job))
    report = collect_job(store, Rates(), parse_gpu_prices(["H200=3.5", "B200=9"]))
    begin, end = (
        {lane.worker: lane.spans[i][j] for lane in report.timeline.work} for i, j in ((0, 0), (-1, 1))
    )
    shared = max(end["w0"], end["w1"]) - min(begin["w0"], begin["w1"])
    assert report.gpu_time.gpus == 3
    assert 3600 * report.gpu_time.hours == pytest.approx(shared + 2 * (end["w2"] - begin["w2"]), rel=0.01)
    assert [(m.model, m.gpus) for m in report.gpu_time.models] == [(H200, 3)]
    assert report.gpu_time.total_cost == pytest.approx(3.5 * report.gpu_time.hours)
    assert report.software == ({"driver_version": "570.1", "torch_version": "2.9", "python_version": "3.11"},)
    assert {r.model for r in report.devices} == {H200}
    assert [f.text for f in report.flags if f.name == "GPU price not used"] == [
        "No GPU of this job is a B200."
    ]
