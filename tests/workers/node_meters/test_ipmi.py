"""`ipmitool`, with a stand-in on PATH."""

import os
import sys

import pytest

from millijoule.workers.node_meters.ipmi import IpmiMeter
from millijoule.workers.node_meters.meter import MeterFailure

DCMI = """
    Instantaneous power reading:                   %s Watts
    Minimum during sampling period:                 18 Watts
    Maximum during sampling period:               1318 Watts
    Average power reading over sample period:      402 Watts
    IPMI timestamp:                           Sat Nov 21 12:00:00 2026
    Sampling period:                          00000010 Seconds.
    Power reading state is:                   %s
"""


@pytest.fixture
def ipmitool(tmp_path, monkeypatch):
    """Puts a program named ipmitool on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def made(body):
        path = tmp_path / "ipmitool"
        path.write_text(f"#!{sys.executable} -S\nimport sys, time\n{body}\n")
        path.chmod(0o755)

    return made


def test_the_instantaneous_power_is_read_and_not_the_average(ipmitool):
    ipmitool(f"assert sys.argv[1:] == ['dcmi', 'power', 'reading']; print({DCMI % (655, 'activated')!r})")
    (reading,) = IpmiMeter().read()
    assert (reading.source, reading.quantity) == ("ipmi-dcmi-power", "power")
    assert (reading.value, reading.quantum) == (655_000, 1_000)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"print({DCMI % (655, 'deactivated')!r})", "deactivated"),
        (f"print({DCMI % (0, 'activated')!r})", "0 watts"),
        ("print('DCMI not supported')", "no instantaneous power"),
        ("sys.exit('Could not open device at /dev/ipmi0')", "Could not open device"),
        ("sys.stdout.buffer.write(bytes(range(256)))", "no instantaneous power"),
        ("time.sleep(20)", "timed out"),
    ],
)
def test_a_tool_that_does_not_answer_is_a_failure_that_says_why(ipmitool, body, reason):
    ipmitool(body)
    with pytest.raises(MeterFailure, match=reason):
        IpmiMeter(timeout_s=0.5 if "time" in body else 20).read()


def test_without_the_tool_power_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MeterFailure, match="ipmitool"):
        IpmiMeter().read()
