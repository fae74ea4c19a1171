"""The interval covers, drift cancels, and what is missing is never read as nothing."""

import dataclasses
import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from millijoule.pipeline.comparison.registration import Statistics, Systematics
from millijoule.pipeline.comparison.statistics import (
    MeasuredBlock,
    RatioInterval,
    draw_indices,
    energy_ratio,
    expanded_level,
    judge_claim,
    student_quantile,
    systematic_budget,
    total,
    verdict_line,
)
from millijoule.pipeline.energy.evidence import evidence_class

ROOT = Path(__file__).parents[3]
FAST = Statistics(resamples=1000)


def simulate(orders, *, ratio=0.970, drift=0.0, noise=0.0, seed=0, images=1000):
    """Blocks of 60 s in which A needs `ratio` of B's energy, while everything rises by `drift` over the run."""
    rng = np.random.default_rng(seed)
    sides = [(q, side) for q, order in enumerate(orders) for side in order]
    blocks = []
    for i, (q, side) in enumerate(sides):
        level = 1 + drift * i / (len(sides) - 1)
        energy = 6e6 * level * (ratio if side == "A" else 1) * math.exp(noise * rng.standard_normal())
        blocks.append(MeasuredBlock(q, side, round(energy), images, images, 60.0))
    return blocks


def test_drift_cancels_in_quadruples_and_not_in_halves():
    quadruples = simulate(["ABBA", "BAAB"] * 5, drift=0.04)
    assert 1 / energy_ratio(quadruples, FAST).ratio == pytest.approx(0.970, abs=0.0002)
    halves = simulate(["A" * 20 + "B" * 20], drift=0.04)
    mean = {s: np.mean([b.energy_mj for b in halves if b.side == s]) for s in "AB"}
    assert mean["A"] / mean["B"] < 0.955  # drift passes for a saving: half of it goes to one arm


def test_the_interval_covers_as_often_as_it_says():
    for clusters, noise in ((10, 0.005), (5, 0.05)):
        hits = 0
        for seed in range(300):
            blocks = simulate((["ABBA", "BAAB"] * 5)[:clusters], noise=noise, seed=seed, drift=0.04)
            interval = energy_ratio(blocks, FAST)
            hits += interval.low <= 1 / 0.970 <= interval.high
        assert 0.90 <= hits / 300 <= 0.99, (clusters, hits)
        assert not interval.low <= 2.0 <= interval.high  # a ratio that is far from the true one


def test_it_covers_when_few_images_are_accepted():
    hits = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        blocks = [
            dataclasses.replace(b, accepted=int(rng.binomial(40, 0.2 if b.side == "B" else 0.6)), images=40)
            for b in simulate(["ABBA", "BAAB"] * 5, ratio=0.5, seed=seed)
        ]
        interval = energy_ratio(blocks, FAST)
        hits += interval.low <= 2 * 3 <= interval.high
    assert 0.90 <= hits / 300 <= 0.99, hits


def test_the_page_quotes_the_committed_figures():
    """600 runs of each kind, made by `jobs/bench/interval.py` of the commit that the result names."""
    result = json.loads((ROOT / "benchmarks/energy/interval.json").read_bytes())
    page = " ".join((ROOT / "docs/verify.md").read_text().split())
    assert f"of {result['options']['runs']} runs each" in page
    for row in result["rows"]:
        assert f"{100 * row['covered_share']:.0f} % ({row['quadruples']} quadruples" in page
    assert f"AA...BB {result['drift']['AA...BB']:.3f}" in page


def test_energy_of_rejected_images_counts():
    blocks = simulate(["ABBA"] * 5, ratio=1.0)
    half = [dataclasses.replace(b, accepted=500) if b.side == "A" else b for b in blocks]
    assert energy_ratio(half, FAST).ratio == pytest.approx(0.5, rel=1e-6)
    assert energy_ratio(half, FAST, per="images").ratio == pytest.approx(1.0, rel=1e-6)


def test_one_missing_block_takes_its_quadruple_along():
    blocks = simulate(["ABBA", "BAAB"] * 3)
    blocks[5] = dataclasses.replace(blocks[5], energy_mj=None)
    interval = energy_ratio(blocks, FAST)
    assert interval.quadruples == 5
    assert interval.ratio == pytest.approx(1 / 0.970, rel=1e-6)


def test_too_few_or_too_many_missing_quadruples_give_no_interval():
    few = energy_ratio(simulate(["ABBA"] * 4), FAST)
    assert (few.low, few.high) == (None, None)
    blocks = simulate(["ABBA"] * 20)
    for i in range(0, 20, 4):  # a quarter: whoever may drop blocks may pick them
        blocks[i] = dataclasses.replace(blocks[i], energy_mj=None)
    many = energy_ratio(blocks, FAST)
    assert many.quadruples == 15
    assert many.low is None


def test_nothing_accepted_is_no_ratio():
    blocks = [dataclasses.replace(b, accepted=0) if b.side == "B" else b for b in simulate(["ABBA"] * 6)]
    assert energy_ratio(blocks, FAST) is None
    assert energy_ratio([], FAST) is None


def test_the_same_numbers_give_the_same_interval_in_any_order():
    blocks = simulate(["ABBA", "BAAB"] * 4, noise=0.01)
    assert energy_ratio(blocks, FAST) == energy_ratio(blocks[::-1], FAST)
    other = dataclasses.replace(FAST, seed=9)
    assert energy_ratio(blocks, FAST) != energy_ratio(blocks, other)


def test_indices_are_uniform_and_pinned():
    drawn = draw_indices(2, 3000, 7)
    assert np.bincount(drawn.ravel(), minlength=7) == pytest.approx(3000, rel=0.06)
    assert draw_indices(2, 1, 7).tolist() == [[1, 2, 5, 0, 4, 5, 1]]


@pytest.mark.parametrize(
    ("p", "degrees", "value"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.975, 9, 2.26216), (0.95, 30, 1.69726)],
)
def test_student_quantiles_are_those_of_the_tables(p, degrees, value):
    assert student_quantile(p, degrees) == pytest.approx(value, rel=1e-5)


def test_the_level_is_wider_than_percentile_and_approaches_it():
    assert expanded_level(10, 0.95) < 0.015
    assert expanded_level(5000, 0.95) == pytest.approx(0.025, rel=0.01)


# ---- budget and verdict ------------------------------------------------------------------------------------------


def test_the_budget_names_every_part():
    blocks = simulate(["ABBA"] * 5, ratio=0.5)  # 50 W and 100 W
    budget = systematic_budget(
        blocks, Systematics(), measured=True, controls={"same": -0.01, "telemetry A": 0.002}, prompts=0.03
    )
    assert budget == {
        "offset": pytest.approx(5 * (1 / 50 - 1 / 100)),
        "counter delay": pytest.approx(2 * 0.2 / 60),
        "same": 0.01,
        "telemetry A": 0.002,
        "prompts": 0.03,
    }
    assert total(budget) == pytest.approx(0.05 + 0.4 / 60 + 0.042)


def test_an_unknown_part_leaves_the_whole_unknown():
    budget = systematic_budget(
        simulate(["ABBA"] * 5), Systematics(), measured=False, controls={"same": None}, prompts=0.0
    )
    assert "offset" not in budget
    assert total(budget) is None
    assert total({"same": math.nan}) is None
    empty = systematic_budget([], Systematics(), measured=True, controls={}, prompts=0.0)
    assert total(empty) is None


def test_the_claim_needs_the_widened_lower_end():
    interval = RatioInterval(110.0, 105.0, 115.0, 10)
    assert judge_claim(100, interval, 0.04, "E1", True).outcome == "holds"
    assert judge_claim(100, interval, 0.06, "E1", True).outcome == "does not hold"
    assert judge_claim(100, interval, 0.04, "E1", False).outcome == "does not hold"
    assert judge_claim(100, interval, 0.04, "E0", True).outcome == "holds for the estimate only"


def test_what_is_missing_establishes_nothing():
    interval = RatioInterval(110.0, 105.0, 115.0, 10)
    open_ended = RatioInterval(110.0, None, None, 2)
    for arguments in (
        (None, 0.0, ()),
        (open_ended, 0.0, ()),
        (interval, None, ()),
        (interval, 0.0, ("control",)),
    ):
        claim = judge_claim(2, arguments[0], arguments[1], "E1", True, arguments[2])
        assert claim.outcome == "not established"
        assert len(claim.reasons) == 1
        assert claim.widened_low is None


def test_the_class_is_computed():
    classes = {
        case: evidence_class(measured=case[0], power_agrees=case[1], node_closes=case[2])
        for case in product((False, True), (None, False, True), (None, False, True))
    }
    assert {c for case, c in classes.items() if not case[0]} == {"E0"}
    assert {c for case, c in classes.items() if case[0] and not case[1]} == {"E1"}
    assert classes[True, True, None] == classes[True, True, False] == "E2"
    assert classes[True, True, True] == "E3"


def test_the_verdict_reads_as_a_sentence():
    interval = RatioInterval(123.456, 120.0, 127.0, 10)
    assert verdict_line(interval, 0.95, "GPU board", "E1", True) == (
        "A needs 123.5 times less energy than B per accepted image, 95 % interval [120, 127], boundary GPU board, "
        "evidence class E1 (the devices' own energy counters), quality gate passed"
    )
    line = verdict_line(RatioInterval(2.0, None, None, 1), 0.95, "process CPU time", "E0", False)
    assert "not established" in line
    assert "evidence class E0 (estimate, or" in line
    assert line.endswith("quality gate failed")
    assert "not established" in verdict_line(None, 0.95, "GPU board", "E1", True)
