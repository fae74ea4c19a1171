"""`millijoule bench engines`: joules by the counter, ratios to the first engine, pixels compared; and a small real run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from support.comparisons import World

from millijoule.jobs import bench
from millijoule.jobs.bench.engines import BenchOptions, compare
from millijoule.workers.generators.protocol import GeneratedBatch
from millijoule.workers.schemas import ImageRequest

REQUESTS = [ImageRequest("", 0, f"prompt {i}", 0) for i in range(5)]


class Brush:
    """Takes `seconds` at `watts` for a batch and paints it in one shade."""

    def __init__(self, world, shade, seconds, watts):
        self.world, self.shade, self.seconds, self.watts = world, shade, seconds, watts
        self.info = SimpleNamespace(batch_size=2)
        self.batches = []

    def generate(self, requests):
        self.batches.append(len(requests))
        self.world.advance(self.seconds, self.watts)
        return GeneratedBatch(np.full((len(requests), 4, 4, 3), self.shade, np.uint8))


def measure(world):
    generators = {"eager": Brush(world, 10, 1.0, 200.0), "deepspeed": Brush(world, 13, 0.5, 300.0)}
    return generators, compare(generators, REQUESTS, BenchOptions(rounds=2), world)


def test_joules_are_the_counter_s_and_ratios_are_to_the_first_engine():
    generators, result = measure(World())
    assert [b["engine"] for b in result["blocks"]] == ["eager", "deepspeed", "deepspeed", "eager"] * 2
    assert generators["eager"].batches == [2, 2, 1] * 5  # once to compare and to warm up, then four blocks
    eager, deepspeed = result["engines"]["eager"], result["engines"]["deepspeed"]
    assert eager["joules_per_image"] == pytest.approx(3 * 1.0 * 200 / 5, rel=0.01)
    assert deepspeed["joules_per_image"] == pytest.approx(3 * 0.5 * 300 / 5, rel=0.01)
    assert result["ratios"]["deepspeed"]["joules_per_image"] == pytest.approx(0.75, rel=0.01)
    assert (eager["largest_pixel_difference"], deepspeed["largest_pixel_difference"]) == (0, 3)
    assert deepspeed["share_of_pixels_that_differ"] == 1.0


def test_without_a_counter_energy_is_missing_and_never_zero():
    _, result = measure(World(counters=False))
    assert result["engines"]["eager"]["joules_per_image"] is None
    assert result["ratios"]["deepspeed"]["joules_per_image"] is None
    assert all(b["joules"] is None for b in result["blocks"])
    assert result["engines"]["eager"]["cpu_s_per_image"] > 0


def test_a_counter_that_is_lost_voids_the_result():
    world = World()
    world.missing_reads = {3}
    with pytest.raises(RuntimeError, match="reset or lost"):
        measure(world)


@pytest.mark.parametrize(
    ("words", "why"), [(["--engines", "eager", "eager"], "each once"), (["--images", "0"], "at least 1")]
)
def test_odd_options_are_refused(words, why, capsys):
    assert bench.main(["engines", *words]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.long
def test_the_default_model_in_two_engines(tmp_path, capsys):
    result = tmp_path / "engines.json"
    words = ["--models", "default", "--engines", "eager", "deepspeed", "--images", "2", "--rounds", "1"]
    assert bench.main(["engines", str(result), *words]) == 0
    told = json.loads(result.read_text())["models"]["default"]
    assert set(told["start"]["deepspeed"]) - set(told["start"]["eager"]) == {"import deepspeed"}
    assert told["engines"]["deepspeed"]["largest_pixel_difference"] == 0
    assert "shapes contained" in told["engines"]["deepspeed"]["did"]
    assert all(part["pss_mb_after"] > 10 for part in told["start"]["eager"].values())
