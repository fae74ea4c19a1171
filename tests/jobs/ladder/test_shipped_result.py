"""The shipped measurement is of the presets that are shipped, and meets what the pages say of it."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from millijoule.jobs.ladder.climb import describe
from millijoule.workers.diffusion.pipeline_folder import read_pipeline
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import PACKAGED
from millijoule.workers.rungs.preset_file import read_preset
from millijoule.workers.rungs.presets import preset

ROOT = Path(__file__).parents[3]
RESULT = json.loads((ROOT / "benchmarks/ladder/baseline.json").read_text())
FOLDER = read_pipeline(PACKAGED["baseline"])
ROWS = {row["rung"]: row for row in RESULT["rows"]}


def test_it_is_of_the_shipped_model_and_says_what_was_counted():
    assert RESULT["options"]["model_sha256"] == FOLDER.sha256()
    assert (RESULT["cost"], RESULT["counters"]) == ("cpu_seconds", [])
    assert RESULT["environment"]["commit"]


@pytest.mark.parametrize(("name", "most"), [("balanced", 1 / 2), ("max", 1 / 3)])
def test_presets_are_the_measured_ones_and_meet_their_goals(name, most):
    row = ROWS[f"preset {name}"]
    assert row["options"] == describe(replace(GeneratorOptions(), rungs=preset(name, FOLDER)))
    own, dense = (
        sum(b["cpu_seconds"] for b in row["blocks"] if b["arm"] == arm)
        / sum(b["images"] for b in row["blocks"] if b["arm"] == arm)
        for arm in "BA"
    )
    assert own / dense == pytest.approx(row["cost_ratio"])
    assert row["cost_ratio"] <= most
    lost, _, highest = row["score_loss"]
    assert row["images"] >= 600
    assert lost <= highest <= 2


def test_images_of_max_and_of_none_pair_up_and_no_two_points_are_lost():
    def right(path):
        rows = pq.read_table(ROOT / path, columns=["prompt", "seed", "correct"]).to_pylist()
        return {(r["prompt"], r["seed"]): r["correct"] for r in rows}

    found = right("benchmarks/ladder/baseline-max.parquet")
    dense = right("benchmarks/quality/baseline.parquet")
    assert len(found) == 2400
    assert sum(dense[key] - value for key, value in found.items()) / len(found) <= 0.02


def test_the_recommended_preset_can_be_read():
    found = read_preset(ROOT / "benchmarks/ladder/baseline-preset.json")
    assert found.model_sha256 == FOLDER.sha256()
    assert found.rungs.identity() == {"steps": 6, "guidance_until": 0.6}
