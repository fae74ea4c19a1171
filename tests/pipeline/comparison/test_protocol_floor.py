"""A registration may ask less than the protocol does, and then nothing is established with it."""

import dataclasses
import json

import pytest
from support.comparisons import ENVIRONMENT, World, registration, run_comparison

from millijoule.pipeline.comparison.bundle import RESULT, hash_inputs, seal, write_bundle
from millijoule.pipeline.comparison.bundle_check import check_bundle
from millijoule.pipeline.comparison.protocol_floor import find_loosened
from millijoule.pipeline.comparison.registration import canonical_json

LOOSER = [
    ("design", "block_seconds", 59.9),
    ("design", "warmup_cv", 0.051),
    ("design", "warmup_windows", 2),
    ("gate", "min_images", 499),
    ("gate", "score_margin", 0.021),
    ("gate", "frechet_margin", 0.051),
    ("gate", "max_blank", 0.011),
    ("gate", "max_duplicates", 0.011),
    ("gate", "resamples", 100),
    ("gate", "frechet_resamples", 10),
    ("statistics", "confidence", 0.9),
    ("statistics", "resamples", 100),
    ("statistics", "min_quadruples", 4),
    ("statistics", "max_missing", 0.3),
    ("systematics", "counter_delay_s", 0.1),
    ("systematics", "offset_watts", 1.0),
    ("systematics", "max_control", 0.06),
    ("systematics", "closure_tolerance", 0.06),
]
STRICTER = [
    ("design", "block_seconds", 120.0),
    ("design", "warmup_cv", 0.05),
    ("gate", "min_images", 504),
    ("gate", "score_margin", 0.0),
    ("statistics", "confidence", 0.99),
    ("systematics", "counter_delay_s", 0.5),
]


def changed(part, name, value):
    plan = registration()
    return dataclasses.replace(plan, **{part: dataclasses.replace(getattr(plan, part), **{name: value})})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return run_comparison(tmp_path_factory.mktemp("run") / "parts")


def restamped(rows, plan):
    """`rows` as if they had been measured for `plan`."""
    at = rows.blocks.schema.get_field_index("registration_sha256")
    field = rows.blocks.schema.field(at)
    blocks = rows.blocks.set_column(at, field, [[plan.sha256] * len(rows.blocks)])
    return dataclasses.replace(rows, blocks=blocks)


def test_the_default_registration_is_not_loosened():
    assert find_loosened(registration()) == ()


@pytest.mark.parametrize(("part", "name", "value"), LOOSER)
def test_what_is_looser_than_the_protocol_is_named(part, name, value):
    (found,) = find_loosened(changed(part, name, value))
    assert f"{name} {value:g}:" in found


@pytest.mark.parametrize(("part", "name", "value"), STRICTER)
def test_what_is_stricter_is_not(part, name, value):
    assert find_loosened(changed(part, name, value)) == ()


@pytest.mark.parametrize(("part", "name", "value"), LOOSER)
def test_nothing_is_established_with_a_looser_registration(part, name, value, rows, tmp_path):
    """The rows of a run whose claim holds, measured for a registration that asks less."""
    plan = changed(part, name, value)
    result = write_bundle(tmp_path / "bundle", plan, ENVIRONMENT, restamped(rows, plan))
    assert result["claim"]["outcome"] == "not established"
    assert result["claim"]["reasons"] == result["protocol"]["loosened"] == list(find_loosened(plan))


@pytest.mark.parametrize("counters", [True, False])
def test_blocks_of_two_seconds_run_and_show_nothing(counters, tmp_path):
    plan = changed("design", "block_seconds", 2.0)
    rows = run_comparison(tmp_path / "parts", World(counters=counters), plan)
    result = write_bundle(tmp_path / "bundle", plan, ENVIRONMENT, rows)
    assert result["ratio_per_accepted_image"]["low"] > plan.factor
    assert result["claim"]["outcome"] == "not established"
    assert "registered block_seconds 2: the protocol needs at least 60" in result["claim"]["reasons"]


def test_a_departure_that_is_hushed_up_is_noticed(rows, tmp_path):
    plan = changed("gate", "score_margin", 0.4)
    bundle = tmp_path / "bundle"
    written = write_bundle(bundle, plan, ENVIRONMENT, restamped(rows, plan))
    report = check_bundle(bundle)
    assert report.mismatches == ()
    assert report.result["claim"] == written["claim"]
    result = json.loads((bundle / RESULT).read_bytes())
    result["protocol"]["loosened"] = []
    result["claim"].update(outcome="holds", reasons=[], widened_low=12.0)
    result["inputs"] = hash_inputs(bundle)
    (bundle / RESULT).write_bytes(canonical_json(result))
    seal(bundle, None)
    report = check_bundle(bundle)
    assert any("claim.outcome says 'holds', the rows give 'not established'" in m for m in report.mismatches)
    assert any("protocol.loosened" in m for m in report.mismatches)
