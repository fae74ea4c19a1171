"""What a result file says about where it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from typing import Any

from millijoule.workers.environment import cpu_name

COMMIT_VARIABLE = "MILLIJOULE_COMMIT"


def environment() -> dict[str, Any]:
    """Where and on what this was measured.

    Where the tree is a copy without its history, `MILLIJOULE_COMMIT` says which commit's; `dirty` is unknown (None) then.
    """
    told = os.environ.get(COMMIT_VARIABLE)
    return {
        "commit": told or _git("rev-parse", "HEAD"),
        "dirty": None if told else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu_name() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("ray", "torch", "pyarrow")},
        "unix_time": time.time(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
