"""A second meter raises the evidence class only where it covers every block and agrees."""

import dataclasses

import pyarrow as pa
import pytest
from support.comparisons import ENVIRONMENT, World, registration, run_comparison, small_registration

from millijoule.pipeline.comparison.bundle import write_bundle
from millijoule.pipeline.comparison.bundle_check import check_bundle
from millijoule.pipeline.comparison.registration import Systematics
from millijoule.pipeline.comparison.rows import SECOND_METER_SCHEMA
from millijoule.pipeline.comparison.second_meter import (
    Closure,
    CountedStretch,
    check_closure,
    read_second_meter,
)
from millijoule.workers.errors import InputError

SECOND = 10**9
#: Two blocks of 10 s at 100 W of the device and 150 W of all domains.
STRETCHES = [
    CountedStretch(START * SECOND, (START + 10) * SECOND, 1_000_000, 1_500_000) for START in (100, 120)
]


def meter(watts, source="power", start=90, end=140, step=1):
    rows = [
        {"source": source, "t_wall_ns": t * SECOND, "energy_mj": round(7 + (t - start) * watts * 1000)}
        for t in range(start, end, step)
    ]
    return pa.Table.from_pylist(rows, SECOND_METER_SCHEMA)


def closure(table, source="power", stretches=STRETCHES, rest_watts=0.0, rest_tolerance_watts=0.0):
    limits = Systematics(
        closure_tolerance=0.05,
        declared_rest_watts=rest_watts,
        declared_rest_tolerance_watts=rest_tolerance_watts,
    )
    return check_closure(table, source, stretches, limits)


def test_agreement_within_the_tolerance_closes():
    assert closure(meter(100)).residual == pytest.approx(0.0, abs=1e-9)
    assert closure(meter(104)).closes
    assert not closure(meter(106)).closes


def test_a_node_meter_is_compared_with_all_domains_and_the_declared_rest():
    assert closure(meter(150, "node"), "node").closes
    assert not closure(meter(200, "node"), "node").closes
    assert closure(meter(200, "node"), "node", rest_watts=50.0).residual == pytest.approx(0.0, abs=1e-9)


def test_a_rest_that_is_not_declared_is_not_nothing():
    undeclared = closure(meter(150, "node"), "node", rest_watts=None, rest_tolerance_watts=None)
    assert undeclared == Closure(None, False)
    assert closure(meter(100), rest_watts=None, rest_tolerance_watts=None).closes


def test_a_vague_declaration_closes_less_often():
    exact = closure(meter(204, "node"), "node", rest_watts=50.0)
    vague = closure(meter(204, "node"), "node", rest_watts=50.0, rest_tolerance_watts=10.0)
    assert exact.closes
    assert exact.residual == pytest.approx(4 / 204)
    assert not vague.closes
    assert vague.residual == pytest.approx(14 / 204)


@pytest.mark.parametrize(
    "table",
    [
        meter(100, start=101),
        meter(100, end=125),
        meter(100, step=20),
        meter(0),
        meter(-100),
    ],
)
def test_what_does_not_cover_or_does_not_count_does_not_close(table):
    assert closure(table) == dataclasses.replace(closure(table), residual=None, closes=False)


def test_without_rows_of_a_source_there_is_no_such_meter():
    assert closure(meter(100, "node")) is None
    assert closure(None) is None


def test_a_missing_counter_does_not_close():
    missing = [dataclasses.replace(STRETCHES[0], device_mj=None), STRETCHES[1]]
    assert closure(meter(100), stretches=missing).closes is False


def test_rows_are_read_from_csv(tmp_path):
    path = tmp_path / "meter.csv"
    path.write_text("source,t_wall_ns,energy_mj\npower,5,7\nnode,6,8\n")
    assert read_second_meter(path).to_pylist() == [
        {"source": "power", "t_wall_ns": 5, "energy_mj": 7},
        {"source": "node", "t_wall_ns": 6, "energy_mj": 8},
    ]
    for wrong in ("other,5,7", "power,x,7", "power,5", ""):
        path.write_text(f"source,t_wall_ns,energy_mj\npower,1,1\n{wrong or 'power,,'}\n")
        with pytest.raises(InputError, match="row 2"):
            read_second_meter(path)
    with pytest.raises(InputError):
        read_second_meter(tmp_path / "none.csv")


@pytest.mark.long
def test_the_class_of_a_bundle_follows_from_its_meters(tmp_path):
    """The world's own counter, handed in a second time as integrated power, and as a node with 40 W more."""
    small = small_registration()
    rows = run_comparison(tmp_path / "parts", World(), small)
    reads = rows.reads.to_pylist()
    power = [
        {"source": "power", "t_wall_ns": r["t_wall_ns"], "energy_mj": r["energy"][0]["energy_mj"]}
        for r in reads
    ]
    node = [
        {
            "source": "node",
            "t_wall_ns": r["t_wall_ns"],
            "energy_mj": r["energy"][0]["energy_mj"] + (r["t_wall_ns"] - reads[0]["t_wall_ns"]) * 40 // 10**6,
        }
        for r in reads
    ]
    declared = registration(
        systematics=Systematics(declared_rest_watts=40.0, declared_rest_tolerance_watts=1.0)
    )
    for number, (plan, meters, expected) in enumerate(
        [
            (small, power, "E2"),
            (small, power + node, "E2"),
            (small, node, "E1"),
        ]
    ):
        table = pa.Table.from_pylist(meters, SECOND_METER_SCHEMA)
        folder = tmp_path / str(number)
        result = write_bundle(folder, plan, ENVIRONMENT, dataclasses.replace(rows, second_meter=table))
        assert result["evidence_class"] == expected
        assert check_bundle(folder).mismatches == ()
    rows = run_comparison(tmp_path / "declared", World(), declared)
    table = pa.Table.from_pylist(power + node, SECOND_METER_SCHEMA)
    result = write_bundle(
        tmp_path / "e3", declared, ENVIRONMENT, dataclasses.replace(rows, second_meter=table)
    )
    assert result["evidence_class"] == "E3"
    assert result["second_meters"] == {"node": "handed in", "power": "handed in"}
    assert check_bundle(tmp_path / "e3").mismatches == ()
    assert result["claim"]["outcome"] == "holds"
