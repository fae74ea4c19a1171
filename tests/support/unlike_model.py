"""A generator that is quick on a GPU and slow on a processor, `--model python:support.unlike_model:load`, for pools of unlike devices.

A GPU's image is spent on its stand-in board (`support.boards`), a processor's on the powercap zone of the same host's folder. What was
asked of it, call by call, is kept in the test's folder: `calls_of` reads it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from support.boards import assigned_board
from support.counters import FakePowercap
from support.models import Plain

from millijoule.workers.generators.protocol import GeneratedBatch
from millijoule.workers.schemas import ImageRequest

#: Millijoules of an image, and seconds unless MILLIJOULE_TEST_SECONDS says other ones, as "cuda cpu".
MJ = {"cuda": 40, "cpu": 70}
SECONDS = "0.02 0.3"
#: A processor's package and its memory. A counter that stands still for seconds counts as broken: they go on, a little.
ZONE, IDLE_ZONE = "intel-rapl:0", "intel-rapl:0:1"
TICK_S, TICK_MJ = 0.5, 1


class Unlike(Plain):
    def __init__(self, device: str) -> None:
        super().__init__(device)
        both = dict(
            zip(MJ, map(float, os.environ.get("MILLIJOULE_TEST_SECONDS", SECONDS).split()), strict=True)
        )
        self.device, self.each_s = device, both[device]
        self.folder = Path(os.environ["MILLIJOULE_TEST_DIR"])
        self.host = Path(os.environ["MILLIJOULE_TEST_BOARDS"])
        self._lock = threading.Lock()
        if device == "cpu":
            threading.Thread(target=self._tick, daemon=True).start()

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        if requests[0].prompt_id != "warm-up":
            self._note(requests)
            self._wait_for_company()
            time.sleep(self.each_s * len(requests))
            self._spend(MJ[self.device] * len(requests))
        return super().generate(requests)

    def _note(self, requests: Sequence[ImageRequest]) -> None:
        said = {"device": self.device, "ids": [r.prompt_id for r in requests]}
        with (self.folder / f"calls-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(said) + "\n")

    def _wait_for_company(self) -> None:
        """The first images of either kind wait for the other's: both are there."""
        (self.folder / f"at-work-{self.device}").touch()
        while len(list(self.folder.glob("at-work-*"))) < len(MJ):
            time.sleep(0.05)

    def _spend(self, energy_mj: int) -> None:
        if self.device == "cuda":
            assigned_board(self.host).spend(energy_mj)
        else:
            self._count(ZONE, energy_mj)

    def _tick(self) -> None:
        while True:
            time.sleep(TICK_S)
            for zone in (ZONE, IDLE_ZONE):
                self._count(zone, TICK_MJ)

    def _count(self, zone: str, energy_mj: int) -> None:
        """Move a counter, which others read meanwhile."""
        file = self.host / "powercap" / zone / "energy_uj"
        with self._lock:
            new = file.with_suffix(".new")
            new.write_text(str(int(file.read_text()) + 1000 * energy_mj))
            new.replace(file)


def load(device: str) -> Unlike:
    return Unlike(device)


def make_processor(host: Path) -> None:
    """A host's folder without boards, whose processor has a counter."""
    (host / "boards").mkdir(parents=True)
    FakePowercap(host / "powercap")


def calls_of(folder: Path) -> list[dict]:
    """All calls of a job: `device`, and `ids` of the prompts."""
    return [
        json.loads(line) for file in folder.glob("calls-*.jsonl") for line in file.read_text().splitlines()
    ]
