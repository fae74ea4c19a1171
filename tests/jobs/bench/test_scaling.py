"""The ratios of the scaling benchmark, from rows whose answer is known; the machine's own are in the result file."""

import pytest

from millijoule.jobs.bench.scaling import summary


def row(side, processes, pair, rate):
    return {"side": side, "processes": processes, "pair": pair, "images_per_second": rate}


def test_ratios_are_taken_within_a_pair_and_against_the_control_of_the_same_pair():
    rates = {
        ("job", 1): (10, 30, 10),
        ("job", 2): (18, 57, 15),
        ("bare", 1): (20, 40, 20),
        ("bare", 2): (40, 76, 30),
    }
    found = summary([row(*side, pair, rate) for side, of in rates.items() for pair, rate in enumerate(of)])
    assert found["two_workers_of_one"] == {"median": 1.8, "ratios": [1.8, 1.9, 1.5]}
    assert found["two_processes_of_one"] == {"median": 1.9, "ratios": [2.0, 1.9, 1.5]}
    assert found["workers_of_processes"]["median"] == pytest.approx(1.0)
    assert found["workers_of_processes"]["ratios"] == pytest.approx([0.9, 1.0, 1.0])
