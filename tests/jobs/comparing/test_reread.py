"""Readings that the verifier did not make are found by reading the images again."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from millijoule.jobs.comparing.reread import reread_images
from millijoule.pipeline.comparison.registration import Arm, Gate, Registration, Request
from millijoule.pipeline.comparison.rows import (
    BLOCK_SCHEMA,
    FEATURE_SCHEMA,
    IMAGE_SCHEMA,
    JUDGEMENT_SCHEMA,
    PIXEL_SCHEMA,
    SCHEMAS,
    Rows,
)
from millijoule.workers.judging.comparison_blocks import hash_pixels
from millijoule.workers.judging.image_judge import load_judge
from millijoule.workers.scenes.prompts import write_prompt
from millijoule.workers.scenes.renderer import render_scenes
from millijoule.workers.scenes.scenes import complete, sample_scene


@pytest.fixture(scope="module", params=[80, 1040])
def world(request):
    """A registration and the rows that re-reading needs: true renders and what the verifier reads in them."""
    rng = np.random.default_rng(1)
    scenes = [sample_scene("colours", rng, held_out=True, nouns=request.param) for _ in range(12)]
    prompts = [write_prompt(s, rng) for s in scenes]
    images = render_scenes([complete(s, i) for i, s in enumerate(scenes)], 1, 2)[:, 0]
    judge = load_judge("icon-scene", request.param)
    plan = Registration(
        factor=2.0,
        registered_wall_ns=0,
        device="cpu",
        width=64,
        height=64,
        a=Arm("a", "a", "a" * 64, 1),
        b=Arm("b", "b", "b" * 64, 1),
        requests=tuple(Request("colours", p, i) for i, p in enumerate(prompts)),
        gate=Gate(judge.name, judge.sha256, nouns=request.param),
    )
    found = judge.judge(images, prompts, ["colours"] * len(prompts))
    judgements = [
        {
            "request": i,
            "sha256": hash_pixels(image),
            "blank": False,
            "accepted": j.accepted,
            "icons": j.icons,
            "score": None,
            "metrics": [],
        }
        for i, (image, j) in enumerate(zip(images, found, strict=True))
    ]
    pixels = [{"sha256": hash_pixels(x), "height": 64, "width": 64, "pixels": x.tobytes()} for x in images]
    tables = {name.removesuffix(".parquet"): schema.empty_table() for name, schema in SCHEMAS.items()} | {
        "blocks": pa.Table.from_pylist(
            [
                {
                    **dict.fromkeys(("images", "accepted", "quadruple", "first_request", "session"), 0),
                    "block_id": arm,
                    "ordinal": i,
                    "kind": "compare",
                    "arm": arm,
                    "side": arm,
                    "telemetry": True,
                    "registration_sha256": plan.sha256,
                    "seconds": 0.0,
                }
                for i, arm in enumerate("AB")
            ],
            BLOCK_SCHEMA,
        ),
        "images": pa.Table.from_pylist(
            [
                {"block_id": arm, "request": j["request"], "sha256": j["sha256"]}
                for arm in "AB"
                for j in judgements
            ],
            IMAGE_SCHEMA,
        ),
        "features": pa.Table.from_pylist(
            [
                {"arm": arm, "request": i, "values": values}
                for arm in "AB"
                for i, values in enumerate(judge.features(images))
            ],
            FEATURE_SCHEMA,
        ),
        "judgements": pa.Table.from_pylist(judgements, JUDGEMENT_SCHEMA),
        "pixels": pa.Table.from_pylist(pixels, PIXEL_SCHEMA),
    }
    return plan, Rows(**tables)


def with_icons(rows, change):
    judgements = rows.judgements.to_pylist()
    icons = json.loads(judgements[3]["icons"])
    judgements[3]["icons"] = json.dumps(change(icons))
    return dataclasses.replace(rows, judgements=pa.Table.from_pylist(judgements, JUDGEMENT_SCHEMA))


def test_its_own_readings_are_confirmed(world):
    assert list(reread_images(*world)) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda icons: [["ghost", *icons[0][1:]], *icons[1:]],
        lambda icons: [[*icons[0][:3], icons[0][3] + 1, icons[0][4]], *icons[1:]],
        lambda icons: icons[1:],
        lambda icons: [*icons, ["cat", "red", "big", 1.0, 1.0]],
    ],
)
def test_another_reading_is_found(world, change):
    plan, rows = world
    (mismatch,) = reread_images(plan, with_icons(rows, change))
    assert rows.judgements["sha256"][3].as_py()[:12] in mismatch


def test_other_features_are_found(world):
    plan, rows = world
    features = rows.features.to_pylist()
    features[17]["values"] = [v + 0.5 for v in features[17]["values"]]
    edited = dataclasses.replace(rows, features=pa.Table.from_pylist(features, FEATURE_SCHEMA))
    (mismatch,) = reread_images(plan, edited)
    assert "arm B, request 5" in mismatch


def test_only_the_registered_verifier_can_read_again(world):
    plan, rows = world
    other = dataclasses.replace(plan, gate=dataclasses.replace(plan.gate, judge_sha256="0" * 64))
    assert "not the registered judge" in next(reread_images(other, rows))
    threshold = dataclasses.replace(plan, gate=dataclasses.replace(plan.gate, rule="threshold"))
    assert "cannot be judged again" in next(reread_images(threshold, rows))
