"""Programs that tests need and a plain machine may not have: what is missing is skipped, and said aloud at the end of the run."""

from __future__ import annotations

import os
import shutil
from collections import Counter

import pytest

#: Where each comes from; `.ci/run` gets them all.
SOURCES = {
    "kubectl": "1.27 or later, with kustomize 5: .ci/kubectl.py",
    "promtool": "apt-get install prometheus",
    "systemd-analyze": "apt-get install systemd",
    "redis-server": "apt-get install redis-server",
    "chromium": "apt-get install chromium",
    "gcc": "apt-get install gcc",
    "g++": "apt-get install g++",
}


def missing(*programs: str) -> str | None:
    """What is not installed, and where it comes from; None where all is there."""
    absent = [program for program in programs if shutil.which(program) is None]
    return "; ".join(f"{name} is not installed ({SOURCES[name]})" for name in absent) or None


def needs(why: str | None) -> pytest.MarkDecorator:
    """A mark that skips for this reason, if there is one."""
    return pytest.mark.skipif(bool(why), reason=why or "")


def say_what_was_skipped(terminal: pytest.TerminalReporter) -> None:
    """On CI, each reason for which tests were skipped and how many: what CI leaves out, nobody runs."""
    if os.environ.get("CI") != "true":
        return
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminal.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminal.section("NOT TESTED ON THIS CI", sep="!", red=True, bold=True)
        for reason, number in reasons.most_common():
            terminal.line(f"{number} skipped: {reason}", red=True)
