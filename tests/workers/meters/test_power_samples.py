"""Power samples: both fields apart, once a second for all workers of a host, bounded, carried by commits."""

import gc
import time
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pynvml
import pytest
from support.counters import GPU0, SECOND, UUIDS
from support.local_job import plan, runner

from millijoule.pipeline.output.commits import read_commits
from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.errors import StoreError
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.meters.power_samples import SOURCE, PowerSampler
from millijoule.workers.schemas import Commit, PowerSample


@pytest.fixture
def sampler(open_fake, nvml):
    """Makes samplers of workers that share a host, each with GPU 0 unless said otherwise."""
    return lambda gpus=("0",), **options: PowerSampler(open_fake(gpus, nvml), **options)


def watch(clock, samplers, seconds, each=lambda second: None):
    for second in range(seconds):
        each(second)
        for s in samplers:
            s.look()
        clock.advance(1)


def test_average_and_instantaneous_power_are_two_columns_with_the_boards_own_time(sampler, nvml, clock):
    nvml.power_mw[UUIDS[0]] = (401_000, 655_000)
    nvml.sample_age_ns = 90_000_000
    worker = sampler()
    worker.look()
    (trace,) = worker.take()
    assert (trace.device, trace.boot_id, trace.source) == (UUIDS[0], "boot", SOURCE)
    (sample,) = trace.samples
    assert (sample.power_average_mw, sample.power_instant_mw) == (401_000, 655_000)
    assert clock() - sample.t_mono_ns == pytest.approx(90_000_000, abs=20_000_000)
    assert time.time_ns() - sample.t_wall_ns == pytest.approx(90_000_000, abs=40_000_000)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ((0, 0), (650_000, 700_000)),
        ((pynvml.NVML_ERROR_NOT_SUPPORTED, 0), (None, 700_000)),
        ((0, pynvml.NVML_ERROR_NOT_SUPPORTED), (650_000, None)),
    ],
)
def test_what_a_board_does_not_support_is_null_and_not_the_other_field(sampler, nvml, errors, expected):
    nvml.power_field_errors = errors
    worker = sampler()
    worker.look()
    (sample,) = worker.take()[0].samples
    assert (sample.power_average_mw, sample.power_instant_mw) == expected


@pytest.mark.parametrize("garbage_mw", [0, 0xFFFFFFFF])
def test_power_no_device_can_draw_is_null(sampler, nvml, garbage_mw):
    nvml.power_mw[UUIDS[0]] = (650_000, garbage_mw)
    worker = sampler()
    worker.look()
    assert worker.take()[0].samples[0][2:] == (650_000, None)


@pytest.mark.parametrize("fault", ["unsupported", "raises", "mig"])
def test_where_power_cannot_be_read_there_are_no_samples(sampler, nvml, clock, fault):
    if fault == "unsupported":
        nvml.power_field_errors = (pynvml.NVML_ERROR_NOT_SUPPORTED,) * 2
    elif fault == "raises":
        nvml.power_error = pynvml.NVML_ERROR_GPU_IS_LOST
    else:
        nvml.mig[UUIDS[0]] = [1, 1]
    worker = sampler()
    watch(clock, [worker], 3)
    assert worker.take() == ()


def test_a_board_that_recovers_has_samples_again(sampler, nvml, clock):
    worker = sampler()
    nvml.power_error = pynvml.NVML_ERROR_TIMEOUT
    watch(clock, [worker], 3)
    nvml.power_error = None
    watch(clock, [worker], 2)
    assert len(worker.take()[0].samples) == 2


def test_power_without_a_counter_is_still_power(sampler, nvml):
    nvml.error = pynvml.NVML_ERROR_NOT_SUPPORTED
    worker = sampler()
    worker.look()
    assert worker.meter.method == "missing"
    assert [t.device for t in worker.take()] == [UUIDS[0]]


def test_workers_that_share_a_board_sample_it_once_a_second_between_them(sampler, nvml, clock):
    workers = [sampler() for _ in range(8)]
    watch(clock, workers, 20)
    samples = sorted(s for w in workers for t in w.take() for s in t.samples)
    assert nvml.power_reads == len(samples) == 20
    assert {b.t_mono_ns - a.t_mono_ns for a, b in pairwise(samples)} == {SECOND}


def test_when_the_worker_that_samples_dies_another_goes_on(sampler, clock):
    first, second = sampler(), sampler()
    watch(clock, [first, second], 5)
    watch(clock, [second], 5)
    assert [len(w.take()[0].samples) for w in (first, second)] == [5, 5]


def test_each_board_has_its_own_trace(sampler, nvml, clock):
    nvml.power_mw[UUIDS[1]] = (1_000, 2_000)
    worker = sampler(gpus=("1", "0"))
    watch(clock, [worker], 2)
    traces = {t.device: t.samples for t in worker.take()}
    assert {d: len(s) for d, s in traces.items()} == {UUIDS[0]: 2, UUIDS[1]: 2}
    assert traces[UUIDS[1]][0].power_instant_mw == 2_000


def test_a_full_ring_keeps_the_newest_and_says_so_once(sampler, clock, caplog):
    caplog.set_level("INFO")
    worker = sampler(max_samples=10)
    began = clock()
    watch(clock, [worker], 25)
    (trace,) = worker.take()
    assert [(s.t_mono_ns - began) // SECOND for s in trace.samples] == list(range(15, 25))
    assert caplog.text.count("dropped") == 1


def test_samples_come_back_before_newer_ones_and_within_the_bound(sampler, clock):
    worker = sampler(max_samples=6)
    watch(clock, [worker], 4)
    taken = worker.take()
    watch(clock, [worker], 4)
    worker.restore(taken)
    times = [s.t_mono_ns for s in worker.take()[0].samples]
    assert len(times) == 6
    assert times == sorted(times)


@pytest.mark.long
def test_half_an_hour_of_samples_takes_less_than_a_megabyte(sampler, clock):
    worker = sampler()
    worker.look()
    gc.collect()
    tracemalloc.start()
    try:
        watch(clock, [worker], 2_000)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (trace,) = worker.take()
    assert len(trace.samples) == 1_800
    assert used < 1_000_000


@pytest.mark.long
def test_the_thread_samples_by_itself_and_ends_when_told(tmp_path, nvml):
    meter = open_meter(["0"], nvml=nvml, powercap_root=tmp_path / "no", boot_id="b", book_directory=tmp_path)
    worker = PowerSampler(meter)
    worker.start()
    deadline = time.monotonic() + 20
    while not worker.rings and time.monotonic() < deadline:
        time.sleep(0.02)
    worker.stop()
    assert not worker.thread.is_alive()
    assert worker.take()[0].samples[0].power_instant_mw == 700_000


def test_without_a_device_there_is_no_thread(tmp_path):
    meter = open_meter(powercap_root=tmp_path / "none", boot_id="b", book_directory=tmp_path)
    worker = PowerSampler(meter)
    worker.start()
    assert worker.thread.ident is None
    worker.stop()


# --- with commits -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_shard(tmp_path):
    store, job = plan(tmp_path, ["a", "b", "c"])
    shards = load_job_shards(store, job)
    coordinator = Coordinator(shards, np.zeros(1, bool), 60.0, open_epoch(store, exclusive=True))
    return store, job, coordinator


def sampled_by(attempts, power):
    """`attempts`, whose samples come from `power`."""
    attempts.drawing.power = attempts.finishing.power = power
    return power


def test_samples_ride_with_the_commit_and_survive_its_json(sampler, clock, one_shard):
    store, job, coordinator = one_shard
    attempts = runner(store, job, 1)
    power = sampled_by(attempts, sampler())
    watch(clock, [power], 3)
    assert attempts.run(coordinator.next_lease("w1", 0.0)).outcome == "committed"
    (commit,) = read_commits(store, 1)
    assert [len(t.samples) for t in commit.power] == [3]
    assert isinstance(commit.power[0].samples[0], PowerSample)
    assert Commit.from_json(commit.to_json()) == commit
    assert power.take() == ()


def test_an_attempt_that_lost_or_failed_keeps_its_samples(sampler, clock, one_shard, monkeypatch):
    store, job, coordinator = one_shard
    lease = coordinator.next_lease("w1", 0.0)
    late = runner(store, job, 2, worker="w2")
    power = sampled_by(late, sampler())
    watch(clock, [power], 3)

    def refuse(self, key, body):
        raise StoreError("no")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_exclusive", refuse)
        with pytest.raises(StoreError):
            late.run(lease)
    assert len(power.rings[UUIDS[0]]) == 3
    runner(store, job, 1).run(replace(lease, attempt_id="e000001-first"))
    assert late.run(lease).outcome == "exists"
    assert len(power.take()[0].samples) == 3


def test_the_watch_sees_a_counter_reset_between_two_boundaries(sampler, nvml, clock):
    """Without it a reset would hide once the counter has grown past its old value."""
    worker = sampler()
    before = worker.meter.read()
    clock.advance(1)
    nvml.energy_mj[UUIDS[0]] = 100
    worker.look()
    clock.advance(10_000)
    nvml.energy_mj[UUIDS[0]] = before.energy_mj[GPU0] + 1_000_000
    after = worker.meter.read()
    assert (before.epoch, after.epoch) == (0, 1)
