"""What `bench fleet` writes, on the smallest fleets."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from PIL import Image

from millijoule.jobs.bench.fleet import BenchOptions, compare, measure_load, run
from millijoule.jobs.simulating.devices import DeviceKind
from millijoule.jobs.simulating.fleets import least_joules
from millijoule.jobs.simulating.picture import draw_policies
from millijoule.workers.errors import InputError


def test_policies_stand_beside_work_stealing_on_the_same_devices_with_the_same_seed(capsys):
    options = {
        "devices": 8,
        "shards_per_device": 2,
        "deadlines": [2.0],
        "seed": 1,
        "seeds": 2,
        "small_factor": 1.0,
    }
    found = compare("even", False, options)
    by = {(row["prefer"], row.get("times_stealing")): row for row in found["rows"]}
    runs = {(r["prefer"], r.get("times_stealing"), r["seed"]): r for r in found["runs"]}
    assert len(runs) == 2 * len(by) == 12
    assert all(run["complete"] and run["ledger_complete"] for run in runs.values())
    for seed, saved, in_time, most in zip(
        (1, 2),
        *(by["energy", 2.0][n] for n in ("joules_saved_of_each", "in_time", "joules_saved_at_most")),
        strict=True,
    ):
        stealing, energy = runs["work-stealing", None, seed], runs["energy", 2.0, seed]
        assert saved == round(1 - energy["joules"] / stealing["joules"], 4) < most
        assert in_time == (energy["makespan_s"] <= 2 * stealing["makespan_s"])
    mean = sum(by["energy", 2.0]["joules_saved_of_each"]) / 2
    assert by["energy", 2.0]["joules_saved"] == pytest.approx(mean, abs=1e-4)
    assert sum(kind["devices"] for kind in found["kinds"]) == 8
    assert Image.open(io.BytesIO(draw_policies([found, found, found]))).width == 800
    assert len([json.loads(line) for line in capsys.readouterr().err.splitlines()]) == len(runs)


def test_the_least_joules_are_those_of_the_leanest_devices_that_are_enough():
    """Of lean ones 2 images/s for 100 J each, of others 4 for 150 J; ready after 10 s at 20 W."""
    lean = DeviceKind("lean", 2.0, 200.0, 20.0, load_s=4.0, boot_s=6.0)
    other = replace(lean, name="other", images_per_s=4.0, busy_w=600.0)
    kinds = {"other": (other, 3), "lean": (lean, 2)}
    assert least_joules(kinds, 200, 110.0) == pytest.approx(200 * 100 + 200)
    assert least_joules(kinds, 800, 110.0) == pytest.approx(400 * 100 + 400 * 150 + 3 * 200)
    assert least_joules(kinds, 1700, 110.0) == float("inf")


def test_parts_of_an_earlier_result_keep_where_and_how_they_were_measured(tmp_path, monkeypatch, capsys):
    earlier = {"load": [{"devices": 7}], "parts": {"load": {"environment": {"commit": "then"}}}}
    (tmp_path / "before.json").write_text(json.dumps(earlier))
    monkeypatch.setattr("millijoule.jobs.bench.fleet.run_alone", lambda what, *_: what.__name__)
    options = {"mixes": ("even",), "parts": ("policies",), "before": str(tmp_path / "before.json")}
    run(BenchOptions(result=str(tmp_path / "now.json"), **options))
    now = json.loads((tmp_path / "now.json").read_text())
    assert now["load"] == [{"devices": 7}]
    assert now["parts"]["load"] == {"environment": {"commit": "then"}}
    assert now["policies"] == ["compare", "compare"]
    assert now["parts"]["policies"]["environment"]["commit"] != "then"
    assert now["parts"]["policies"]["options"]["mixes"] == ["even"]
    capsys.readouterr()


def test_load_is_the_drivers_processor_time_over_simulated_time(capsys):
    found = measure_load(8, 100)
    assert found["complete"]
    # of a figure that is itself rounded to 0.1 s
    assert found["share_of_a_core"] == pytest.approx(
        found["driver_cpu_s"] / found["makespan_s"], abs=0.06 / found["makespan_s"] + 1e-4
    )
    assert found["calls"]["run"] >= 100
    assert found["peak_mb"] >= found["mb_before_the_run"] > 0
    assert BenchOptions().load == ("1000:1000000", "4000:1000000")


def test_parts_are_measured_alone_and_kept_as_soon_as_they_are_there(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "now.json"

    def measured(what, *arguments):
        if what.__name__ == "resume":
            assert "closing" in json.loads(kept.read_text())
        return {"what": what.__name__, "with": arguments[1:]}

    monkeypatch.setattr("millijoule.jobs.bench.fleet.run_alone", measured)
    run(BenchOptions(str(kept), parts=("resume", "closing"), closing=("100:20",), folder=str(tmp_path)))
    now = json.loads(kept.read_text())
    assert [row["with"][-1] for row in now["closing"]] == [0.0, 0.03]  # without latency, and with it
    assert {tuple(row["with"]) for row in now["resume"]} == {
        (100, capped, seconds) for capped in (False, True) for seconds in (0.0, 0.03)
    }
    assert set(now["parts"]) == {"closing", "resume"}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixes": ("odd",)}, "--mixes odd"),
        ({"devices": 3}, "--devices 3"),
        ({"shards_per_device": 0}, "--shards-per-device 0"),
        ({"deadlines": (1.5, 0.0)}, "--deadlines 0"),
        ({"deadlines": (float("nan"),)}, "--deadlines nan"),
        ({"small_factor": -1.0}, "--small-factor -1"),
        ({"seed": -1}, "--seed -1"),
        ({"load": ("many",)}, "--load many"),
        ({"load": ("1000",)}, "--load 1000"),
        ({"load": ("4:1000",)}, "--load 4:1000"),
        ({"halves": "30:1000"}, "--halves 30:1000"),
        ({"closing": ("0:1",)}, "--closing 0:1"),
        ({"series": "1000"}, "--series 1000"),
    ],
)
def test_a_fleet_that_means_nothing_is_refused_before_anything_is_simulated(changes, words, monkeypatch):
    monkeypatch.setattr("millijoule.jobs.bench.fleet.run_alone", lambda *_: pytest.fail("it was simulated"))
    with pytest.raises(InputError, match=words):
        run(BenchOptions("result.json", **changes))
