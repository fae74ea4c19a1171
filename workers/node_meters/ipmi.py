"""Read a node's power from its management controller with `ipmitool`, as root on the node itself."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Sequence

from millijoule.workers.node_meters.meter import MW_PER_W, NodeReading

log = logging.getLogger(__name__)

SOURCE = "ipmi-dcmi-power"
COMMAND = ("ipmitool", "dcmi", "power", "reading")

#: A controller answers in well under a second; one that hangs is missing.
TIMEOUT_S = 10.0

_INSTANT = re.compile(r"^\s*Instantaneous power reading\s*:\s*(\d{1,6})\s*Watts\s*$", re.MULTILINE)
_STATE = re.compile(r"^\s*Power reading state is\s*:\s*(\w+)\s*$", re.MULTILINE)


class IpmiMeter:
    """DCMI's instantaneous power, in whole watts; its average over a period of the controller's choice is not used.

    Args:
        command: prints the reading as `ipmitool dcmi power reading` does.
    """

    def __init__(self, command: Sequence[str] = COMMAND, timeout_s: float = TIMEOUT_S) -> None:
        self.name = " ".join(command)
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self.failure = ""

    def read(self) -> tuple[NodeReading, ...]:
        """See `NodeMeter.read`."""
        began_ns = time.time_ns()
        try:
            watts = _parse(self._run())
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            if not self.failure:
                log.warning("%s: %s; the node's power is missing", self.name, error)
            self.failure = str(error)[:300] or type(error).__name__
            return ()
        self.failure = ""
        took_ns = max(time.time_ns() - began_ns, 0)
        at_ns = began_ns + took_ns // 2
        return (NodeReading(SOURCE, "power", at_ns, watts * MW_PER_W, MW_PER_W, took_ns // 2),)

    def _run(self) -> str:
        done = subprocess.run(
            self._command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=self._timeout_s,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise ValueError(f"exit status {done.returncode}: {said[-1][:200] if said else 'no message'}")
        return done.stdout.decode(errors="replace")


def _parse(text: str) -> int:
    """Watts; raises ValueError where there are none."""
    instant, state = _INSTANT.search(text), _STATE.search(text)
    if instant is None:
        raise ValueError("no instantaneous power in its answer")
    if state is not None and state[1] != "activated":
        raise ValueError(f"power reading is {state[1]}")
    if not int(instant[1]):
        raise ValueError("says 0 watts, which no node that runs draws")
    return int(instant[1])
