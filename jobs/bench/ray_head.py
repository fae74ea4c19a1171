"""A Ray cluster of this machine alone, for the length of a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class RayHead:
    """A one-node Ray cluster in a session of its own, for the length of a block; gives its address."""

    def __init__(self, cpus: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mj-"))  # Ray's socket paths must stay short
        self.cpus = cpus

    def __enter__(self) -> str:
        # not the script `ray`: packages in a folder on PYTHONPATH have theirs elsewhere
        ray = (sys.executable, "-m", "ray.scripts.scripts")
        log = self.folder / "head.log"
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ["RAY_AUTH_MODE"] = "disabled"  # the jobs started below must agree with the head
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [
                    *(*ray, "start", "--head", "--block", "--port=0", f"--num-cpus={self.cpus}"),
                    *("--include-dashboard=false", f"--temp-dir={self.folder}"),
                    *("--object-store-memory=100000000", "--disable-usage-stats"),
                ],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (text := log.read_text()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start failed:\n{text[-2000:]}")
            time.sleep(0.1)
        return text.split("--address='")[1].split("'")[0]

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
