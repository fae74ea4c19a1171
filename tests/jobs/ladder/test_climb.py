"""The climb: what is kept, what is refused, how it goes on after a kill, and what quality means; the drawing is a stand-in."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from millijoule.jobs.ladder import climb as module
from millijoule.jobs.ladder.candidates import Candidate, candidates, choose
from millijoule.jobs.ladder.climb import TOP, Climb, Gate, Ground, passing
from millijoule.jobs.ladder.process import Drawn
from millijoule.jobs.ladder.prompts import file_requests, icon_requests
from millijoule.jobs.ladder.quality import Quality, compare, family_of, psnr_db, score_loss
from millijoule.workers.diffusion.pipeline_folder import read_pipeline
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import PACKAGED
from millijoule.workers.scenes.prompts import parse_prompt

#: CPU seconds per image and levels that pixels are off, by number of steps.
STEPS = {None: (1.0, 0), 30: (0.6, 2), 10: (0.2, 4), 5: (0.1, 90)}


class StandIn:
    """In the place of a `Drawer`: what a combination costs and draws follows from its steps."""

    started: ClassVar[list[GeneratorOptions]] = []

    def __init__(self, model, device, options, threads):
        if options.rungs.quantize:
            raise InputError("--quantize: not here")
        StandIn.started.append(options)
        self.cost, self.off = STEPS[options.rungs.steps]
        self.batch_size = 2

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def close(self):
        pass

    def warm_up(self, requests):
        pass

    def draw(self, requests):
        noise = np.stack([np.random.default_rng(r.seed).integers(90, 160, (64, 64, 3)) for r in requests])
        return Drawn((noise + self.off).astype(np.uint8), 1.0, 1.0, 2**20)

    def draw_for(self, requests, seconds):
        return Drawn(2, 4 * self.cost, 2 * self.cost, 2**20)


@dataclass
class Judge:
    """Accepts an image whose pixels are on average below 130; looks at its mean colour."""

    def judge(self, images, prompts, families):
        return [SimpleNamespace(accepted=bool(i.mean() < 130)) for i in images]

    def features(self, images):
        return images.reshape(len(images), -1, 3).mean(1)


@pytest.fixture
def ground(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Drawer", StandIn)
    StandIn.started = []
    return Ground(
        model="m",
        base=GeneratorOptions(),
        device="cpu",
        requests=icon_requests(12, 0),
        threads=None,
        judge=Judge(),
        scored=False,
        meter=None,
        domains=(),
        block_seconds=0,
        rounds=1,
        first_images=6,
        work=tmp_path,
    )


RUNGS = [
    Candidate("thirty", "", {"steps": 30}),
    Candidate("int8", "", {"quantize": "int8"}),
    Candidate("ten", "", {"steps": 10}),
    Candidate("five", "", {"steps": 5}),
    Candidate("thirty again", "", {"steps": 30}),
]
GATE = Gate(min_psnr_db=30.0, max_score_loss=None)


def climbed(ground, rows, candidates=RUNGS):
    climb = Climb(ground, GATE, rows, lambda: None)
    climb.run(candidates)
    return climb


def test_a_rung_stays_if_it_is_cheaper_and_passes(ground):
    rows = []
    climb = climbed(ground, rows)
    found = {r["rung"]: r for r in rows}
    assert {n: r.get("kept") for n, r in found.items()} == {
        "thirty": True,
        "int8": False,
        "ten": True,
        "five": False,  # its images are not the dense ones
        "thirty again": False,  # dearer than what stands
        "top: ten": None,
    }
    assert climb.standing == replace(GeneratorOptions(), rungs=replace(GeneratorOptions().rungs, steps=10))
    assert "not here" in found["int8"]["refused"]
    assert "PSNR" in found["five"]["failing"]
    assert climb.top == climb.standing
    assert passing(rows)[0]["rung"] in ("ten", "top: ten")


def test_cost_is_that_of_blocks_a_b_b_a_against_the_dense_pipeline(ground):
    rows = []
    climbed(ground, rows, RUNGS[:1])
    row = rows[0]
    assert [b["arm"] for b in row["blocks"]] == list("ABBA")
    assert row["cost_ratio"] == pytest.approx(0.6)
    assert row["per_image"] == {
        "seconds": pytest.approx(1.2),
        "cpu_seconds": pytest.approx(0.6),
        "joules": None,
    }
    assert row["psnr_db"] == pytest.approx(20 * np.log10(255 / 2))


def test_the_top_is_measured_with_all_images(ground):
    rows = []
    climbed(ground, rows)
    assert {r["rung"]: r.get("images") for r in rows}["ten"] == 6
    assert rows[-1]["rung"] == f"{TOP}: ten"
    assert rows[-1]["images"] == 12


def test_a_rung_that_fails_with_all_images_is_climbed_down_from(ground, monkeypatch):
    few = Gate.failing
    monkeypatch.setattr(
        Gate, "failing", lambda gate, q: "too far" if q.images == 12 and q.psnr_db < 40 else few(gate, q)
    )
    rows = []
    climb = climbed(ground, rows)
    assert [r["rung"] for r in rows[-2:]] == ["top: ten", "top: thirty"]
    assert climb.standing.rungs.steps == 10
    assert climb.top.rungs.steps == 30


def test_a_climb_that_was_killed_goes_on_and_comes_to_the_same(ground):
    whole = []
    wanted = climbed(ground, whole).standing
    for done in range(len(whole)):
        rows = json.loads(json.dumps(whole[:done]))
        StandIn.started = []
        assert climbed(ground, rows).standing == wanted
        assert [r["rung"] for r in rows] == [r["rung"] for r in whole]
        measured = [o for o in StandIn.started if o != GeneratorOptions()]
        assert len(measured) == sum("refused" not in r for r in whole[done:])


def test_dense_images_are_kept_for_a_climb_that_goes_on(ground):
    climbed(ground, [])
    kept = np.load(ground.work / "none.npy")
    assert len(kept) == 12
    StandIn.started = []
    assert np.array_equal(Climb(ground, GATE, [], lambda: None)._draw_dense(12), kept)
    assert StandIn.started == []


# -- quality ----------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_mean_squared_error():
    dense = np.zeros((2, 4, 4, 3), np.uint8)
    images = dense.copy()
    images[0] = 10
    assert psnr_db(images, dense) == pytest.approx(10 * np.log10(255**2 / 50))
    assert psnr_db(dense, dense) is None


def test_points_lost_are_paired_and_images_of_a_prompt_stay_together():
    dense = np.array([True] * 100)
    right = dense.copy()
    right[:10] = False
    prompts = [str(i // 2) for i in range(100)]
    lost, low, high = score_loss(right, dense, prompts)
    assert lost == pytest.approx(10)
    assert 0 < low < 10 < high < 25
    assert score_loss(dense, dense, prompts) == (0, 0, 0)


def test_the_distance_of_features_is_a_part_of_that_between_prompts():
    rng = np.random.default_rng(1)
    dense = np.stack([np.full((64, 64, 3), c, np.uint8) for c in rng.integers(0, 255, (8, 3))])
    same = compare(dense, dense, ["a"] * 8, Judge(), scored=False)
    other = compare(np.roll(dense, 1, 0), dense, ["a"] * 8, Judge(), scored=False)
    assert (same.feature_distance, same.score) == (0, None)
    assert other.feature_distance == pytest.approx(1)


def test_the_gate_names_what_fails():
    fine = Quality(4, None, 0.0, 0.9, (0.5, -1.0, 2.0))
    assert Gate(40, 2).failing(fine) is None
    assert "points" in Gate(40, 0.4).failing(fine)
    assert "PSNR" in Gate(40, 2).failing(replace(fine, psnr_db=39.0))


@pytest.mark.parametrize("count", [6, 48])
def test_icon_prompts_are_judged_by_the_rule_of_their_family(count):
    from millijoule.jobs.evaluate import EvaluateOptions, list_items

    options = EvaluateOptions(model="", output="", prompts_per_family=4, images_per_prompt=2)
    items = list_items(options)[:count]
    requests = icon_requests(count, 0)
    assert [(r.prompt, r.seed) for r in requests] == [(i.prompt, i.seed) for i in items]
    assert [family_of(parse_prompt(r.prompt)[0]) for r in requests] == [i.family for i in items]


# -- rungs and prompts ------------------------------------------------------------------------------------------------


def test_rungs_are_those_that_the_pipeline_can_take_on_the_device():
    folder = read_pipeline(PACKAGED["baseline"])
    on_cpu = [c.name for c in candidates(folder, on_gpu=False)]
    on_gpu = [c.name for c in candidates(folder, on_gpu=True)]
    assert {"steps-10", "dpm-10", "guidance-0.6", "deep-2", "half", "int8", "compile", "batch-16"} <= set(
        on_cpu
    )
    assert set(on_gpu) - set(on_cpu) == {"fp8", "2:4", "cudnn", "fused", "graphs"}
    assert "taylorseer-2" not in on_gpu
    assert [c.name for c in choose(candidates(folder, on_gpu=False), ("half", "steps-10"))] == [
        "steps-10",
        "half",
    ]
    with pytest.raises(InputError, match=r"--rungs fp8: .*steps-10"):
        choose(candidates(folder, on_gpu=False), ("fp8",))


def test_prompts_of_a_file_have_two_seeds_each(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt\na cat\na dog\na moon\n")
    requests = file_requests(str(path), 4, 0)
    assert [r.prompt for r in requests] == ["a cat", "a cat", "a dog", "a dog"]
    assert len({r.seed for r in requests}) == 4
    assert len(file_requests(str(path), 100, 0)) == 6
