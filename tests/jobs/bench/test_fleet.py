"""What `bench fleet` writes, on the smallest fleets."""

from __future__ import annotations

import io
import json

from PIL import Image

from millijoule.jobs.bench.fleet import BenchOptions, compare, measure_load
from millijoule.jobs.simulating.picture import draw_policies


def test_policies_stand_beside_work_stealing_on_the_same_devices(capsys):
    options = {"devices": 8, "shards_per_device": 2, "deadlines": [2.0], "seed": 1, "small_factor": 1.0}
    found = compare("even", False, options)
    by = {(row["prefer"], row.get("times_stealing")): row for row in found["rows"]}
    stealing, energy = by["work-stealing", None], by["energy", 2.0]
    assert all(row["complete"] and row["ledger_complete"] for row in found["rows"])
    assert energy["joules_saved"] == round(1 - energy["joules"] / stealing["joules"], 4)
    assert energy["in_time"] == (energy["makespan_s"] <= 2 * stealing["makespan_s"])
    assert sum(kind["devices"] for kind in found["kinds"]) == 8
    assert Image.open(io.BytesIO(draw_policies([found, found, found]))).width == 800
    assert len([json.loads(line) for line in capsys.readouterr().err.splitlines()]) == len(found["rows"])


def test_load_is_the_drivers_processor_time_over_simulated_time(capsys):
    found = measure_load(8, 100)
    assert found["complete"]
    assert (
        found["share_of_a_core"] == round(found["driver_cpu_s"] / found["makespan_s"], 4)
        or found["driver_cpu_s"] < 1.0
    )
    assert found["calls"]["run"] >= 100
    assert found["peak_mb"] >= found["mb_before_the_run"] > 0
    assert BenchOptions().load == ("1000:1000000",)
