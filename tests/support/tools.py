"""Programs that tests need and a plain machine may not have: what is missing is skipped, and said aloud at the end of the run."""

from __future__ import annotations

import shutil

import pytest

#: Where each comes from; `.ci/run` installs all of them but those that a package of Debian or PyPI cannot bring.
SOURCES = {
    "kubectl": "kubectl 1.27 or later (kustomize 5)",
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
