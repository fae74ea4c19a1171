"""`millijoule bench gpu` without a GPU: clock, counter and models are stood in for."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from support.comparisons import World, painters
from support.counters import UUIDS, FakeNvml

from millijoule.jobs import bench
from millijoule.jobs.bench.gpu import BenchOptions, compare
from millijoule.workers.meters import meter
from millijoule.workers.schemas import ImageRequest

#: Of `support.comparisons.World`, when nothing is drawn.
IDLE_WATTS = 60
REQUESTS = [ImageRequest("", 0, f"prompt {i}", 0) for i in range(5)]


def measure(world, rounds=1):
    models = {"a": painters(world)["A"], "b": painters(world)["B"]}
    options = BenchOptions(seconds=30.0, pause=2.0, rounds=rounds)
    return compare(models, REQUESTS, world, "gpu:GPU-1", options, lambda: None, world.clock, world.sleep)


def test_joules_are_those_of_the_counter():
    """A draws 8 images in 1.5 s at 300 W, B 4 in 7.5 s at 330 W."""
    result = measure(World(), rounds=2)
    assert [block["arm"] for block in result["blocks"]] == list("abbaabba")
    assert result["idle"]["watts"] == pytest.approx(IDLE_WATTS, rel=0.01)
    for arm, watts, seconds_per_image in (("a", 300, 1.5 / 8), ("b", 330, 7.5 / 4)):
        own, model = [b for b in result["blocks"] if b["arm"] == arm], result["models"][arm]
        assert [b["watts"] for b in own] == pytest.approx([watts] * 4, rel=0.01)
        assert [b["joules"] for b in own] == pytest.approx([watts * b["seconds"] for b in own], rel=0.01)
        assert all(30 <= b["seconds"] < 38 for b in own)
        assert model["images"] == sum(b["images"] for b in own)
        assert model["joules_per_image"] == pytest.approx(watts * seconds_per_image, rel=0.01)
        above_idle = (watts - IDLE_WATTS) * seconds_per_image
        assert model["joules_per_image_above_idle"] == pytest.approx(above_idle, rel=0.01)
    assert result["ratio"]["joules_per_image"] == pytest.approx(11, rel=0.01)


def test_a_counter_that_is_lost_or_reset_voids_the_result():
    world = World()
    world.missing_reads = {3}
    with pytest.raises(RuntimeError, match="reset or lost"):
        measure(world)
    world = World()
    plain = world.read
    world.read = lambda: dataclasses.replace(plain(), epoch=world.reads // 4)
    with pytest.raises(RuntimeError, match="reset or lost"):
        measure(world)


def test_a_board_without_a_counter_is_refused(monkeypatch, tmp_path, capsys):
    nvml, real = FakeNvml(), meter.open_meter
    nvml.error = nvml.NVMLError(1)
    monkeypatch.setattr(
        "millijoule.jobs.measuring.one_gpu.open_meter",
        lambda gpus: real(gpus, nvml=nvml, book_directory=tmp_path),
    )
    for name, value in (
        ("is_available", lambda: True),
        ("set_device", lambda index: None),
        ("get_device_name", lambda index: "Stand-in"),
        ("get_device_properties", lambda index: SimpleNamespace(uuid=UUIDS[0].removeprefix("GPU-"))),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    assert bench.main(["gpu", "--seconds", "0.1"]) == 1
    assert f"energy counter of {UUIDS[0]} cannot be read" in capsys.readouterr().err
