"""A job on `RayHosts`, and the oracles for what it leaves: all files are read anew from the server, after its end."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from support.hosts.ray_hosts import RayHosts, wait_for
from support.jobs import assert_exactly_once, hashes, manifest

from millijoule.jobs.gc import GcOptions
from millijoule.jobs.gc import run as collect_garbage

IMAGES, SHARD_ROWS = 160, 8
PROMPTS = [*(f"prompt number {i}" for i in range(IMAGES - 1)), "the last one waits for leave"]


class HostJob:
    """160 images of 0.05 s in shards of eight. The last shard is drawn only after `let_end`, and keeps a worker until then.

    Args:
        folder: for the driver's log and the copy of the output.
    """

    def __init__(self, hosts: RayHosts, folder: Path) -> None:
        workers = sum(hosts.worker_cpus.values())
        self.hosts = hosts
        self.folder = folder
        self.url = hosts.bucket()
        self.output = f"{self.url}/out"
        self.log = folder / "driver.log"
        hosts.put(f"{self.url}/prompts.txt", "".join(f"{p}\n" for p in PROMPTS).encode())
        self.arguments = [
            *("--prompts", f"{self.url}/prompts.txt", "--output", self.output, "--workers", workers),
            *("--model", "python:support.models:waits_for_leave", "--shard-size", SHARD_ROWS),
        ]
        self._leave.unlink(missing_ok=True)

    @property
    def _leave(self) -> Path:
        return self.hosts.folder / "harm" / "leave"

    def start(self, name: str = "head") -> subprocess.Popen[bytes]:
        """Start the driver on host `name`."""
        return self.hosts.start(name, self.log, *self.arguments)

    def let_end(self) -> None:
        self._leave.touch()

    def wait_for_commits(self, n: int) -> None:
        """Until there are `n`; 19 are all that can be before `let_end`."""
        wait_for(lambda: len(self.commits()) >= n, f"{n} commits", self.log)

    def wait_until_said(self, words: str) -> None:
        wait_for(lambda: words in self.said(), repr(words), self.log)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def in_hand_of_the_lost(self) -> list[int]:
        """Shards that a worker had in hand when the driver lost it."""
        found = re.search(r"is gone with shards? (\d+)(?: and (\d+))? in hand", self.said())
        assert found, self.said()
        return [int(shard) for shard in found.groups() if shard]

    def commits(self) -> dict[int, bytes]:
        """By shard, the commits there are now, asked of the server."""
        bodies = self.hosts.objects(self.output, "_job/commits/")
        return {int(Path(key).stem): body for key, body in bodies.items()}

    def stray_files(self) -> set[str]:
        """Data files there are now that no commit names."""
        commits = b"".join(self.commits().values())
        return {key for key in self.hosts.keys(self.output, "data/") if key.encode() not in commits}

    def finished(self, driver: subprocess.Popen[bytes], *, took_over: bool = False) -> Path:
        """Let the job end; returns a copy of its output, in which every image is once and every joule was run.

        Args:
            took_over: from a run that still worked. Of a shard that both had begun the other's parts come too late, and stay for `gc`.
        """
        self.let_end()
        assert driver.wait(180) == 0, self.said()
        output = self.hosts.download(self.output, self.folder / "copy")
        assert_exactly_once(output, IMAGES)
        commits = [json.loads(path.read_bytes()) for path in output.glob("_job/commits/*/*.json")]
        named = {file["path"] for commit in commits for file in commit["files"]}
        assert {row["path"] for row in manifest(output)} <= named
        parts = [json.loads(path.read_bytes()) for path in output.glob("_job/parts/*/*/*.json")]
        too_late = {file["path"] for part in parts for file in part["files"]} if took_over else set()
        there = {str(path.relative_to(output)) for path in output.glob("data/*")}
        assert there - too_late == named - too_late, f"not named: {there - named}; not there: {named - there}"
        assert self.hosts.counters.problems(output) == []
        if too_late:
            collect_garbage(GcOptions(output=str(output), delete=True))
            assert {str(path.relative_to(output)) for path in output.glob("data/*")} == named
        return output


def undisturbed(hosts: RayHosts, folder: Path) -> dict[tuple[str, int], str | None]:
    """Hashes of the images of a run in which nothing goes wrong."""
    job = HostJob(hosts, folder)
    return hashes(job.finished(job.start()))
