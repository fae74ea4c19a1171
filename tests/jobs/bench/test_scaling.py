"""The ratios of the scaling benchmark, from rows whose answer is known; the machine's own are in the result file."""

import os
import subprocess
import sys

import pytest

from millijoule.jobs.bench.scaling import bound_to_cpus, summary
from millijoule.workers.errors import InputError


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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binds no processes to CPUs")
def test_what_is_started_is_bound_to_so_many_cpus_and_nothing_afterwards():
    mine = os.sched_getaffinity(0)
    count = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
    with bound_to_cpus(1):
        assert subprocess.check_output(count) == b"1\n"
    assert os.sched_getaffinity(0) == mine
    with pytest.raises(InputError, match="may be used"), bound_to_cpus(len(mine) + 1):
        pass
