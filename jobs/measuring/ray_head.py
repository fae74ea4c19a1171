"""A Ray cluster of this machine alone, for the length of a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ray_head(cpus: int) -> Iterator[str]:
    """A one-node Ray cluster in a session of its own, for the length of a block; gives its address."""
    folder = tempfile.mkdtemp(prefix="mj-")  # Ray's socket paths must stay short
    log = Path(folder, "head.log")
    # the head and the jobs that are started beside it must agree
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        # not the script `ray`: packages in a folder on PYTHONPATH have theirs elsewhere
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"),
        *(f"--num-cpus={cpus}", f"--temp-dir={folder}", "--include-dashboard=false"),
        *("--object-store-memory=100000000", "--disable-usage-stats"),
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (text := log.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start failed:\n{text[-2000:]}")
            time.sleep(0.1)
        yield text.split("--address='")[1].split("'")[0]
    finally:
        process.terminate()
        process.wait(30)
