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

    In a copy of the tree without its history, the commit is what `MILLIJOULE_COMMIT` says, and `dirty` unknown (None).
    """
    in_git = _git("rev-parse", "--is-inside-work-tree") == "true"
    return {
        "commit": _git("rev-parse", "HEAD") if in_git else os.environ.get(COMMIT_VARIABLE, "unknown"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if in_git else None,
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
