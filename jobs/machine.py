"""Machine description: what a result file says about where it was measured.

Imports the standard library only: `make gpu` asks for the commit before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMIT_VARIABLE = "MILLIJOULE_COMMIT"


def find_commit() -> str:
    """The tree's commit, or what `MILLIJOULE_COMMIT` says where the tree is a copy without its history."""
    return os.environ.get(COMMIT_VARIABLE) or _git("rev-parse", "HEAD")


def describe_machine() -> dict[str, Any]:
    """Commit, processor and versions. `dirty` is unknown (None) where the environment says which commit this is."""
    from millijoule.workers.environment import cpu_name

    told = COMMIT_VARIABLE in os.environ
    return {
        "commit": find_commit(),
        "dirty": None if told else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu_name() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("ray", "torch", "pyarrow")},
        "unix_time": time.time(),
    }


def describe_gpu(uuid: str, nvml: Any = None) -> dict[str, Any]:
    """State of one board as NVML (default `pynvml`) tells it; null for what it does not support."""
    nvml = nvml or importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

        def ask(question: Callable[[], Any]) -> Any:
            try:
                answer = question()
            except nvml.NVMLError:
                return None
            return answer.decode() if isinstance(answer, bytes) else answer

        return {
            "name": ask(lambda: nvml.nvmlDeviceGetName(handle)),
            "driver": ask(nvml.nvmlSystemGetDriverVersion),
            "vbios": ask(lambda: nvml.nvmlDeviceGetVbiosVersion(handle)),
            "power_limit_mw": ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle)),
            "sm_clock_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_clock_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "temperature_c": ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "persistence": ask(lambda: nvml.nvmlDeviceGetPersistenceMode(handle)),
            "ecc": ask(lambda: nvml.nvmlDeviceGetEccMode(handle)[0]),
        }
    finally:
        nvml.nvmlShutdown()


def hash_packages() -> str:
    """SHA-256 of "name==version" of every installed package, one per line, sorted."""
    names = sorted({f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()})
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
