"""Clocks and power limit of a board, changed for a while and put back whatever happens.

A process of its own, the guardian, stands by before anything is changed and holds one end of a pipe. It restores the board
when the other end closes: because the sweep is over, failed, or was killed. It is in a session of its own and ignores
what a terminal sends. Only its own SIGKILL together with the sweep's leaves a board as it is; then `nvidia-smi -rgc` helps.

`python -m millijoule.jobs.ladder.clock_guard BINDING UUID` is the guardian.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millijoule.workers.errors import InputError

#: The binding that speaks to the driver; anything else is the path of a stand-in's state.
DRIVER = "pynvml"
#: The guardian has nothing to do but two calls.
GUARDIAN_SECONDS = 60.0

_REFUSED = (
    "clocks cannot be changed here ({error}). It takes root, or the right to administer the board: run it as root on the "
    "host itself, or in a container with --privileged"
)


def open_binding(binding: str) -> Any:
    """pynvml, or a stand-in with its state in the file `binding`; initialised."""
    if binding == DRIVER:
        lib: Any = importlib.import_module(DRIVER)
    else:
        from millijoule.jobs.ladder.stand_in_clocks import StandInClocks

        lib = StandInClocks(Path(binding))
    lib.nvmlInit()
    return lib


@dataclass
class Clocks:
    """The clocks of one board, while its guardian lives. Made by `guarded_clocks`."""

    lib: Any
    handle: Any
    guardian: subprocess.Popen[str]
    changing: bool = False

    def steps_mhz(self) -> list[int]:
        """SM clocks that the board supports at its highest memory clock, ascending."""
        memory = max(self.lib.nvmlDeviceGetSupportedMemoryClocks(self.handle))
        return sorted(self.lib.nvmlDeviceGetSupportedGraphicsClocks(self.handle, memory))

    def limits_mw(self) -> tuple[int, int]:
        """The lowest and highest power limit that the board takes."""
        low, high = self.lib.nvmlDeviceGetPowerManagementLimitConstraints(self.handle)
        return int(low), int(high)

    def lock(self, sm_mhz: int) -> None:
        """Hold the SM clock at `sm_mhz`."""
        self._change(lambda: self.lib.nvmlDeviceSetGpuLockedClocks(self.handle, sm_mhz, sm_mhz))

    def unlock(self) -> None:
        """Let the board choose its clock."""
        self._change(lambda: self.lib.nvmlDeviceResetGpuLockedClocks(self.handle))

    def limit(self, power_mw: int) -> None:
        """Set the power limit."""
        self._change(lambda: self.lib.nvmlDeviceSetPowerManagementLimit(self.handle, power_mw))

    def _change(self, call: Any) -> None:
        if self.guardian.poll() is not None or self.guardian.stdin is None:
            raise RuntimeError("the guardian of the clocks is gone; nothing more is changed")
        self.guardian.stdin.write("changing\n")
        self.guardian.stdin.flush()
        self.changing = True
        try:
            call()
        except self.lib.NVMLError as error:
            raise InputError(_REFUSED.format(error=error)) from error


@contextmanager
def guarded_clocks(uuid: str, binding: str = DRIVER) -> Iterator[Clocks]:
    """The clocks of board `uuid`, which are as they were when the context ends, however it ends.

    Locks that were set before cannot be read, and are not set again: the board chooses its clock afterwards.

    Raises:
        InputError: there is no such board, it is divided (MIG), or its clocks may not be changed.
    """
    lib = open_binding(binding)
    try:
        handle = lib.nvmlDeviceGetHandleByUUID(uuid)
        limit_mw = int(lib.nvmlDeviceGetPowerManagementLimit(handle))
        _refuse_mig(lib, handle, uuid)
    except lib.NVMLError as error:
        raise InputError(f"{uuid}: its clocks cannot be read ({error})") from error
    guardian = subprocess.Popen(
        [sys.executable, "-m", __name__, binding, uuid],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    clocks = Clocks(lib, handle, guardian)
    assert guardian.stdin is not None
    assert guardian.stdout is not None
    try:
        if guardian.stdout.readline().strip() != "ready":
            raise InputError(f"{uuid}: the guardian of its clocks did not start")
        try:  # what is refused is refused before anything is measured
            restore(lib, handle, limit_mw)
        except lib.NVMLError as error:
            raise InputError(_REFUSED.format(error=error)) from error
        yield clocks
    finally:
        try:
            guardian.stdin.close()
        except BrokenPipeError:
            pass
        guardian.wait(GUARDIAN_SECONDS)
        if clocks.changing and guardian.returncode != 0:  # it was killed, or could not
            restore(lib, handle, limit_mw)
        guardian.stdout.close()


def _refuse_mig(lib: Any, handle: Any, uuid: str) -> None:
    try:
        divided = bool(lib.nvmlDeviceGetMigMode(handle)[0])
    except lib.NVMLError:  # a board without MIG
        return
    if divided:
        raise InputError(f"{uuid}: MIG is on: its clocks are those of other tenants, too")


def restore(lib: Any, handle: Any, limit_mw: int) -> None:
    """Unlock clocks and set the power limit; each is tried whatever the other does. Raises the first error."""
    failed: list[Exception] = []
    for call in (
        lambda: lib.nvmlDeviceResetGpuLockedClocks(handle),
        lambda: lib.nvmlDeviceSetPowerManagementLimit(handle, limit_mw),
    ):
        try:
            call()
        except lib.NVMLError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def main(binding: str, uuid: str) -> int:
    """The guardian: remember the board's power limit, wait for the end of the pipe, restore."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    lib = open_binding(binding)
    handle = lib.nvmlDeviceGetHandleByUUID(uuid)
    limit_mw = int(lib.nvmlDeviceGetPowerManagementLimit(handle))
    print("ready", flush=True)
    changing = False
    while os.read(sys.stdin.fileno(), 4096):
        changing = True
    if not changing:
        return 0
    try:
        restore(lib, handle, limit_mw)
    except lib.NVMLError as error:
        print(f"the clocks of {uuid} could not be restored ({error}): nvidia-smi -rgc", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
