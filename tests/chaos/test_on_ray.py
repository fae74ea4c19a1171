"""A short storm on a real Ray cluster; `make chaos` and `make chaos-long` have long ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_job_on_ray_survives_what_strikes_it(tmp_path):
    kinds = "worker killed,device fails once,503 storm,driver killed,raylet terminated,second driver"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "support.chaos.on_ray", tmp_path, "--seed", "1"),
            *("--images", "320", "--quick-store", "--kinds", kinds),
        ],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["problems"] == []
    assert result["outcome"] in ("certified", "missing")
    assert {"worker killed", "driver killed"} <= set(result["faults"])
