"""What a result file says about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from typing import Any

from millijoule.workers.environment import cpu_name


def environment() -> dict[str, Any]:
    """Where and on what this was measured."""
    import pyarrow
    import ray
    import torch

    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu_name() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "torch": torch.__version__,
        "pyarrow": pyarrow.__version__,
        "unix_time": time.time(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
