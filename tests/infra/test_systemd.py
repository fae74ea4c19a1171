"""systemd's own check takes the units, and notices a misspelt setting; what they start exists."""

from __future__ import annotations

import re
import subprocess

import pytest
from support.manifests.documents import ROOT
from support.tools import missing, needs

UNITS = sorted((ROOT / "infra/systemd").glob("*.service"))
needs_systemd = needs(missing("systemd-analyze"))


def complaints(folder, text: str, name: str) -> list[str]:
    """What systemd says of a unit, but for programs that are not on this machine."""
    for unit in UNITS:
        (folder / unit.name).write_text(unit.read_text())
    (folder / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(folder / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    return [line for line in done.stderr.splitlines() if name in line and "not executable" not in line]


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.stem)
def test_systemd_takes_a_unit_and_no_misspelt_setting_or_section(tmp_path, unit):
    text = unit.read_text()
    assert complaints(tmp_path, text, unit.name) == []
    misspelt = re.sub(r"^(\w+)=", r"\1x=", text, flags=re.MULTILINE)
    # one run tells of every line by itself
    said = "\n".join(complaints(tmp_path, misspelt, unit.name))
    settings = re.findall(r"^(\w+)=", text, re.MULTILINE)
    assert [name for name in settings if f"'{name}x'" not in said] == []
    for section in re.findall(r"^\[(\w+)\]", text, re.MULTILINE):
        assert complaints(tmp_path, text.replace(f"[{section}]", f"[{section}x]"), unit.name), section


def test_the_runbook_makes_every_user_and_group_that_a_unit_names():
    """systemd starts no unit whose group is not there (exit code 216)."""
    text = "\n".join(unit.read_text() for unit in UNITS)
    named = set(re.findall(r"^(?:User|Group|SupplementaryGroups)=(.+)$", text, re.MULTILINE))
    runbook = (ROOT / "infra/README.md").read_text()
    made = set(re.findall(r"groupadd .*?(\w+)(?: &&|$)", runbook, re.MULTILINE))
    made |= set(re.findall(r"useradd .*--user-group .*?(\w+)$", runbook, re.MULTILINE))
    assert named == made


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.stem)
def test_a_unit_is_not_root_and_has_time_to_drain(unit):
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE))
    assert settings["User"] == "millijoule"
    assert settings["NoNewPrivileges"] == "yes"
    drain = re.search(r"DRAIN_TIMEOUT_S=(\d+)|--grace=(\d+)", unit.read_text())
    assert drain
    assert int(next(filter(None, drain.groups()))) + 10 <= int(settings["TimeoutStopSec"])
