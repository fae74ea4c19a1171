"""A registration is one value with one hash, and its schedule is balanced."""

import dataclasses
import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from millijoule.pipeline.comparison.registration import (
    Arm,
    Design,
    Gate,
    Metric,
    Registration,
    Request,
    Systematics,
    canonical_json,
    check_values,
    schedule,
)
from millijoule.workers.errors import InputError


def registration(**changes):
    values = {
        "factor": 100.0,
        "registered_wall_ns": 1,
        "device": "cpu",
        "width": 64,
        "height": 64,
        "a": Arm("default", "a", "0" * 64, 64),
        "b": Arm("baseline", "b", "1" * 64, 8, 50, 7.5),
        "requests": tuple(Request("counting", f"{n} cats", n) for n in range(3)),
        "gate": Gate("icon verifier", "2" * 64, metrics=(Metric("clip", "3" * 64, 0.2),)),
    }
    return Registration(**{**values, **changes})


def test_it_reads_back_as_written():
    original = registration()
    again = Registration.from_json(original.to_json())
    assert again == original
    assert again.sha256 == original.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"factor": 99.0},
        {"requests": (Request("counting", "a cat", 0),)},
        {"design": Design(block_seconds=59)},
        {"gate": Gate("icon verifier", "2" * 64, score_margin=0.021)},
        {"a": Arm("default", "a", "f" * 64, 64)},
    ],
)
def test_any_change_changes_the_hash(change):
    assert registration(**change).sha256 != registration().sha256


def test_the_nouns_stand_there_where_they_are_not_the_first_80():
    """So registrations from before there were more keep their hash."""
    assert "nouns" not in json.loads(registration().to_json())["gate"]
    more = registration(gate=Gate("icon verifier", "2" * 64, nouns=1040))
    assert json.loads(more.to_json())["gate"]["nouns"] == 1040
    assert Registration.from_json(more.to_json()) == more


def edited(change):
    raw = json.loads(registration().to_json())
    change(raw)
    return canonical_json(raw)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(format="other"),
        lambda r: r.update(factor=0),
        lambda r: r.update(factor="100"),
        lambda r: r.update(factor=True),
        lambda r: r.pop("device"),
        lambda r: r.update(surprise=1),
        lambda r: r["gate"].pop("score_margin"),
        lambda r: r["gate"].update(rule="lenient"),
        lambda r: r["gate"].update(nouns=500),
        lambda r: r["gate"].update(nouns=80),
        lambda r: r["gate"].update(score_margin=-0.1),
        lambda r: r["gate"]["metrics"][0].update(margin=-1),
        lambda r: r["statistics"].update(min_quadruples=1),
        lambda r: r["statistics"].update(confidence=1.0),
        lambda r: r["design"].update(block_seconds=0),
        lambda r: r["requests"].append(r["requests"][0]),
        lambda r: r["requests"][0].update(seed=-1),
        lambda r: r.update(requests=[]),
        lambda r: r.update(a=None),
        lambda r: r.update(gate=None),
        lambda r: r["systematics"].update(offset_watts=-1),
        lambda r: r["systematics"].update(declared_rest_watts=100.0),
        lambda r: r["systematics"].update(declared_rest_watts=-1.0, declared_rest_tolerance_watts=0.0),
        lambda r: r["systematics"].update(declared_rest_watts=1.0, declared_rest_tolerance_watts=-1.0),
    ],
)
def test_what_is_not_a_registration_is_refused(change):
    with pytest.raises(InputError, match=r"registration\.json"):
        Registration.from_json(edited(change))


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
def test_numbers_that_are_none_are_refused(number):
    data = registration().to_json().replace(b'"offset_watts":5.0', b'"offset_watts":' + number)
    with pytest.raises(InputError, match=r"JSON is malformed|out of range"):
        Registration.from_json(data)
    with pytest.raises(ValueError, match=r"offset_watts must be at least 0, not nan"):
        check_values(registration(systematics=Systematics(offset_watts=math.nan)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["gate"].update(score_margin="much"), r"Expected .* - at `\$\.gate\.score_margin`"),
        (lambda r: r["requests"][1].pop("seed"), r"`seed` - at `\$\.requests\[1\]`"),
        (lambda r: r["design"].update(blocks=1), r"no field is named 'blocks' - at `\$\.design`"),
        (lambda r: r["gate"].pop("seed"), "all fields"),
    ],
)
def test_a_bad_field_is_named(change, message):
    with pytest.raises(InputError, match=message):
        Registration.from_json(edited(change))


def test_a_registration_written_by_the_first_version_keeps_bytes_and_hash():
    """Whole and fractional numbers, large seeds, letters beyond ASCII, as the hand-written codec of commit 3fc7a2d wrote them."""
    data = (Path(__file__).parent / "registration-1.json").read_bytes()
    read = Registration.from_json(data)
    assert read.to_json() == data
    assert read.sha256 == "f1fbdf4098763912c16d7b075376e1df063b23b964261fc4c62c9be81c797b1e"
    assert repr(read.design.block_seconds) == "60"
    assert read.requests[0] == Request("counting", "zwei grüne Bäume \U0001f333", 2**64 - 1)
    assert read.b.guidance_scale == 7.5


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", json.dumps({"format": 1}).encode()])
def test_what_is_not_json_is_refused(data):
    with pytest.raises(InputError):
        Registration.from_json(data)


def test_other_bytes_of_the_same_content_are_refused():
    spaced = json.dumps(json.loads(registration().to_json())).encode()
    with pytest.raises(InputError, match="canonical"):
        Registration.from_json(spaced)


def test_the_schedule_is_balanced_and_alternates():
    blocks = schedule(registration(design=Design(quadruples=6, control_quadruples=2)))
    assert [b.block_id for b in blocks] == [f"{i:04d}" for i in range(len(blocks))]
    compare = [b for b in blocks if b.kind == "compare"]
    orders = ["".join(b.arm for b in compare[i : i + 4]) for i in range(0, 24, 4)]
    assert set(orders) == {"ABBA", "BAAB"}
    assert all(x != y for x, y in pairwise(orders))
    assert all(b.side == b.arm and b.telemetry for b in compare)
    assert Counter(b.kind for b in blocks) == {"compare": 24, "same": 8, "telemetry": 16, "idle": 3}
    assert {b.arm for b in blocks if b.kind == "same"} == {"A"}
    off = [b for b in blocks if not b.telemetry]
    assert Counter((b.kind, b.arm, b.side) for b in off) == {
        ("telemetry", "A", "B"): 4,
        ("telemetry", "B", "B"): 4,
    }
    assert [i for i, b in enumerate(blocks) if b.kind == "idle"] == [0, 37, 50]


def test_the_seed_decides_which_order_comes_first():
    def first(seed):
        blocks = schedule(registration(design=dataclasses.replace(Design(), order_seed=seed)))
        return next(b.arm for b in blocks if b.kind == "compare")

    assert {first(seed) for seed in range(8)} == {"A", "B"}
