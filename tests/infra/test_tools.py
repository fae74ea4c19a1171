"""CI gets every program that tests ask for, and says aloud what it could not test."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.manifests.documents import ROOT
from support.tools import SOURCES

RUN = ROOT / ".ci/run"


def test_ci_gets_every_program_that_tests_ask_for():
    script = RUN.read_text()
    assert subprocess.run(["bash", "-n", RUN], check=False).returncode == 0
    assert [
        name for name in SOURCES if f"[{name}]=" not in script and f"command -v {name} " not in script
    ] == []
    for name, source in SOURCES.items():
        package = source.rpartition("apt-get install ")[2]
        assert f"[{name}]={package}" in script or "apt-get" not in source


@pytest.mark.parametrize(("ci", "loud"), [("true", True), ("", False)])
def test_what_was_skipped_on_ci_stands_in_a_section_of_its_own(tmp_path, ci, loud):
    (tmp_path / "conftest.py").write_text(
        "from support.tools import say_what_was_skipped\n"
        "def pytest_terminal_summary(terminalreporter):\n    say_what_was_skipped(terminalreporter)\n"
    )
    (tmp_path / "test_it.py").write_text(
        "from support.tools import SOURCES, missing, needs\n"
        "SOURCES['no-such-program'] = 'nowhere'\n"
        "@needs(missing('no-such-program'))\ndef test_one(): pass\n"
        "@needs(missing('no-such-program'))\ndef test_two(): pass\n"
        "def test_three(): pass\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            "/dev/null",
            "--rootdir",
            tmp_path,
            tmp_path,
        ],
        env={
            **os.environ,
            "CI": ci,
            "PYTHONPATH": str(ROOT / "tests"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("2 skipped: no-such-program is not installed (nowhere)" in done.stdout) is loud
    assert ("NOT TESTED ON THIS CI" in done.stdout) is loud
