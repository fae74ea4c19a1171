"""Carbon and price over time: means are integrals, and what a table does not cover is said."""

import numpy as np
import pytest

from millijoule.pipeline.energy.carbon import check_pue, mean_rate, read_rate
from millijoule.workers.errors import InputError

HOURLY = "time,value\n2026-01-01T00:00:00Z,100\n2026-01-01T01:00:00Z,300\n2026-01-01T02:00:00Z,500\n"
MIDNIGHT = 1767225600.0


@pytest.fixture
def table(tmp_path):
    def write(text):
        path = tmp_path / "rates.csv"
        path.write_text(text)
        return str(path)

    return write


def mean(rate, *stretches):
    begin, end, energy = (np.array(c, float) for c in zip(*stretches, strict=True))
    return mean_rate(rate, begin + MIDNIGHT, end + MIDNIGHT, energy)


def test_a_number_holds_at_all_times_and_is_flagged_as_a_stand_in():
    rate = read_rate("0.31", "--price-per-kwh")
    found = mean(rate, (0, 10, 5.0))
    assert (found.per_kwh, found.fallback_share) == (0.31, 1.0)
    assert "declared" in rate.source


def test_the_mean_is_weighted_by_energy_and_cuts_stretches_at_the_hour(table):
    rate = read_rate(table(HOURLY), "--gco2-per-kwh")
    assert rate.source == "rates.csv"
    assert mean(rate, (0, 3600, 1.0)).per_kwh == pytest.approx(100)
    assert mean(rate, (1800, 5400, 7.0)).per_kwh == pytest.approx(200)
    assert mean(rate, (0, 3600, 3.0), (3600, 7200, 1.0)).per_kwh == pytest.approx(150)
    assert mean(rate, (0, 10800, 1.0)).fallback_share == 0


def test_times_outside_the_table_use_the_nearest_row_and_count_as_fallback(table):
    rate = read_rate(table(HOURLY), "--gco2-per-kwh")
    late = mean(rate, (9000, 12600, 1.0))
    assert (late.per_kwh, late.fallback_share) == (pytest.approx(500), pytest.approx(0.5))
    early = mean(rate, (-3600, 3600, 1.0))
    assert (early.per_kwh, early.fallback_share) == (pytest.approx(100), pytest.approx(0.5))


def test_a_hole_in_the_table_is_fallback(table):
    rate = read_rate(table(HOURLY.replace("T02", "T06") + "2026-01-01T07:00:00Z,5\n"), "--gco2-per-kwh")
    found = mean(rate, (3600, 6 * 3600, 1.0))
    assert (found.per_kwh, found.fallback_share) == (pytest.approx(300), pytest.approx(0.8))


def test_unknown_energy_has_no_weight_and_no_energy_has_no_mean(table):
    rate = read_rate(table(HOURLY), "--gco2-per-kwh")
    assert mean(rate, (0, 3600, np.nan), (3600, 7200, 2.0)).per_kwh == pytest.approx(300)
    assert mean(rate, (0, 3600, np.nan)) is None


def test_columns_are_found_by_name_and_times_without_offset_are_utc(table):
    text = (
        "Datetime (UTC),Country,Carbon intensity (direct)\n2026-01-01 00:00,FR,20\n2026-01-01 01:00,FR,40\n"
    )
    rate = read_rate(table(text), "--gco2-per-kwh")
    assert rate.times_s == (MIDNIGHT, MIDNIGHT + 3600)
    assert rate.values == (20, 40)
    assert read_rate(table("a,b\n1767225600,7\n"), "--gco2-per-kwh").times_s == (MIDNIGHT,)


def test_prices_may_be_negative_and_intensities_may_not(table):
    assert read_rate(table("time,price\n0,-0.02\n"), "--price-per-kwh", negative=True).values == (-0.02,)
    with pytest.raises(InputError, match="line 2"):
        read_rate(table("time,value\n0,-5\n"), "--gco2-per-kwh")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time,value\n", "at least one row"),
        ("a,b,c\n1,2,3\n", "cannot tell which"),
        ("2026-01-01T00:00Z,20\n2026-01-01T01:00Z,40\n", "line 1 is no header"),
        ("0,20\n3600,40\n", "line 1 is no header"),
        ("time,value\nyesterday,3\n", "line 2"),
        ("time,value\n0,1\n0,2\n", "stands twice"),
        ("time,value\n0,nan\n", "line 2"),
        ("time,value\n0\n", "line 2"),
    ],
)
def test_unusable_tables_are_refused_with_the_place(table, text, words):
    with pytest.raises(InputError, match=words):
        read_rate(table(text), "--gco2-per-kwh")


def test_unusable_options_are_refused(tmp_path):
    for text in ("nan", "-1", "inf", str(tmp_path / "missing.csv"), str(tmp_path)):
        with pytest.raises(InputError, match="--gco2-per-kwh"):
            read_rate(text, "--gco2-per-kwh")
    assert check_pue(1.2) == 1.2
    for pue in (0.9, float("nan"), 1000):
        with pytest.raises(InputError, match="--pue"):
            check_pue(pue)
