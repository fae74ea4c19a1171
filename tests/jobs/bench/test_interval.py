"""The made-up runs have the ratio they say, the interval mostly covers it, and the page quotes the committed file."""

import json
from pathlib import Path

import pytest

from millijoule.jobs.bench.interval import CASES, Case, coverage, drift_effect, make_blocks
from millijoule.pipeline.comparison.registration import Statistics
from millijoule.pipeline.comparison.statistics import energy_ratio

ROOT = Path(__file__).parents[3]
FAST = Statistics(resamples=1000)


@pytest.mark.parametrize("case", CASES)
def test_runs_have_the_true_ratio(case):
    found = energy_ratio(make_blocks(["ABBA", "BAAB"] * 100, case, 0), FAST)
    assert found.ratio == pytest.approx(case.true_ratio, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_the_interval_covers_most_runs_and_not_all(case):
    found = coverage(case, 100, FAST)
    assert 85 <= found["covered"] < 100
    assert found["covered_share"] == found["covered"] / 100


def test_a_wrong_ratio_is_not_covered():
    shifted = Case(10, 0.005, ratio=0.5)
    assert shifted.true_ratio == 2.0
    blocks = make_blocks(["ABBA", "BAAB"] * 5, Case(10, 0.005), 0)
    found = energy_ratio(blocks, FAST)
    assert not found.low <= shifted.true_ratio <= found.high


def test_four_quadruples_give_no_interval_and_cover_nothing():
    assert coverage(Case(4, 0.005), 3, FAST)["covered"] == 0


def test_drift_cancels_in_quadruples_only():
    found = drift_effect()
    assert found["ABBA, BAAB"] == pytest.approx(0.970, abs=0.0002)
    assert found["AA...BB"] < 0.955


def test_the_page_quotes_the_committed_figures():
    result = json.loads((ROOT / "benchmarks/energy/interval.json").read_bytes())
    page = " ".join((ROOT / "docs/verify.md").read_text().split())
    assert f"of {result['options']['runs']} runs each" in page
    for row in result["rows"]:
        assert f"{100 * row['covered_share']:.0f} % ({row['quadruples']} quadruples" in page
    assert f"AA...BB {result['drift']['AA...BB']:.3f}" in page
