"""Read a node's power from its management controller with `ipmitool`, as root on the node itself."""

from __future__ import annotations

import os
import re
import subprocess
import time

from millijoule.workers.node_meters.meter import MW_PER_W, MeterFailure, NodeReading, middle_since

SOURCE = "ipmi-dcmi-power"
COMMAND = ("ipmitool", "dcmi", "power", "reading")

#: A controller answers in well under a second; one that hangs is missing.
TIMEOUT_S = 10.0

_INSTANT = re.compile(r"^\s*Instantaneous power reading\s*:\s*(\d{1,6})\s*Watts\s*$", re.MULTILINE)
_STATE = re.compile(r"^\s*Power reading state is\s*:\s*(\w+)\s*$", re.MULTILINE)


class IpmiMeter:
    """DCMI's instantaneous power, in whole watts; its average over a period of the controller's choice is not used."""

    name = " ".join(COMMAND)

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s

    def read(self) -> tuple[NodeReading, ...]:
        """See `NodeMeter.read`."""
        began_ns = time.time_ns()
        try:
            watts = self._ask()
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise MeterFailure(str(error)[:300] or type(error).__name__) from error
        at_ns, half_ns = middle_since(began_ns)
        return (NodeReading(SOURCE, "power", at_ns, watts * MW_PER_W, MW_PER_W, half_ns),)

    def _ask(self) -> int:
        """Watts; raises ValueError where there are none."""
        done = subprocess.run(
            COMMAND,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=self._timeout_s,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise ValueError(f"exit status {done.returncode}: {said[-1][:200] if said else 'no message'}")
        text = done.stdout.decode(errors="replace")
        instant, state = _INSTANT.search(text), _STATE.search(text)
        if instant is None:
            raise ValueError("no instantaneous power in its answer")
        if state is not None and state[1] != "activated":
            raise ValueError(f"power reading is {state[1]}")
        if not int(instant[1]):
            raise ValueError("says 0 watts, which no node that runs draws")
        return int(instant[1])
