"""`python -m millijoule.jobs.simulating.from_zero`: what it is given wrongly is said before it simulates for minutes."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: python -m millijoule.jobs.simulating.from_zero RESULT.json [BEFORE.json]"),
        (["result.json", "gone.json"], "gone.json"),
        (["result.json", "no-json"], "from_zero: no-json: not rows of another tree: "),
        (["no-json/result.json"], "the folder of RESULT.json: no-json: nothing can be written there"),
    ],
)
def test_what_is_given_wrongly_is_said_at_once(tmp_path, arguments, words):
    (tmp_path / "no-json").write_text("rows\n")
    command = [sys.executable, "-m", "millijoule.jobs.simulating.from_zero", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert words in line
    assert done.returncode == (1 if arguments else 2)
