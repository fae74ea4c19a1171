"""What the product is built of is pinned to the version, so that a list and an audit of it mean what is installed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINNED = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!_-]+)")
#: Never installed from there: what a machine's own compiler needs is as old or new as the machine.
UNPINNED = {"setuptools", "wheel"}


def folded(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "infra/constraints/cpu.txt").read_text().splitlines()
    found = {}
    for line in (line.partition("#")[0].partition(";")[0].strip() for line in lines):
        if line and not line.startswith("--"):
            match = PINNED.fullmatch(line)
            assert match, f"{line!r} pins no version"
            assert folded(match[1]) not in found, f"{line!r} stands twice"
            found[folded(match[1])] = match[2]
    return found


def test_every_version_is_pinned_and_every_direct_dependency_is_among_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(r for group in project["optional-dependencies"].values() for r in group),
    ]
    names = {folded(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in asked}
    assert len(names) > 20
    assert names - UNPINNED - pins().keys() == set()


def test_no_dependency_comes_from_an_address_or_an_index_of_its_own():
    lines = (ROOT / "infra/constraints/cpu.txt").read_text() + (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host|@ (git|https?|file)", lines)
