"""A small world in which a whole comparison runs in no time: a clock, a counter, two generators and a judge.

Generator A needs an eleventh of B's energy. Both draw noise that follows from the seed, B darker; the judge "reads" what
the prompt says from most images, by their bytes, more often for A. Blocks and margins are those of the protocol: a minute
takes A 40 batches and B 8.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
from support.counters import SECOND, FakeNvml

from millijoule.jobs.comparing.run import ComparisonRun, judge_images
from millijoule.pipeline.comparison.parts import PartStore
from millijoule.pipeline.comparison.registration import (
    Arm,
    Design,
    Gate,
    Metric,
    Registration,
    Request,
    Statistics,
)
from millijoule.pipeline.comparison.rows import Rows
from millijoule.workers.errors import InputError
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo
from millijoule.workers.judging.comparison_blocks import MAX_BLOCK_SAMPLES
from millijoule.workers.judging.image_judge import Judgement
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.schemas import CounterRead

SIZE = 8
START_NS = 1_700_000_000_000_000_000
NOUNS = ("cat", "dog", "car", "tree", "fish", "house", "owl", "key")
COLOURS = ("red", "blue", "green", "yellow", "purple", "black", "white", "pink", "brown")
REQUESTS = tuple(
    Request("single object", f"a {colour} {noun}", 100 * i + k)
    for i, (colour, noun) in enumerate((c, n) for c in COLOURS for n in NOUNS)
    for k in range(7)
)


def registration(**changes) -> Registration:
    values = {
        "factor": 5.0,
        "registered_wall_ns": START_NS,
        "device": "cpu",
        "width": SIZE,
        "height": SIZE,
        "a": Arm("fast", "fast", "a" * 64, 8),
        "b": Arm("slow", "slow", "b" * 64, 4),
        "requests": REQUESTS,
        "gate": Gate("stand-in", "c" * 64, metrics=(Metric("brightness", "d" * 64, 40.0),)),
        "design": Design(quadruples=5),
    }
    return Registration(**{**values, **changes})


def small_registration(**changes) -> Registration:
    """A quarter of the prompts and few resamples: every check is made, in a fraction of the time, and nothing is established."""
    gate = Gate(
        "stand-in",
        "c" * 64,
        metrics=(Metric("brightness", "d" * 64, 40.0),),
        min_images=100,
        resamples=200,
        frechet_resamples=10,
    )
    values = {"requests": REQUESTS[:147], "gate": gate, "statistics": Statistics(resamples=500)}
    return registration(**{**values, **changes})


ENVIRONMENT = {
    "device": "cpu",
    "judge_sha256": "c" * 64,
    "models": {"A": {"sha256": "a" * 64}, "B": {"sha256": "b" * 64}},
}


class World:
    """Time passes and energy flows only when something is drawn, rested or read."""

    method = "nvml-counter"

    def __init__(self, *, counters: bool = True) -> None:
        self.ns = 10**9
        self.energy_uj = 5 * 10**9
        self.counters = counters
        self.reads = 0
        self.missing_reads: set[int] = set()
        self.domains = ("gpu:GPU-1",) if counters else ()

    def advance(self, seconds: float, watts: float) -> None:
        self.ns += round(seconds * 1e9)
        self.energy_uj += round(seconds * watts * 1e6)

    def clock(self) -> float:
        return self.ns / 1e9

    def sleep(self, seconds: float) -> None:
        self.advance(seconds, 60.0)

    def read(self) -> CounterRead:
        self.advance(0.001, 100.0)
        energy = {"gpu:GPU-1": self.energy_uj // 1000}
        if not self.counters or self.reads in self.missing_reads:
            energy = {}
        self.reads += 1
        return CounterRead("boot", self.ns, START_NS + self.ns, 1000, energy, self.energy_uj // 2000)

    def close(self) -> None:
        pass


class Board(World):
    """The same world with NVML's stand-in: counter and power fields of one board, read as the product reads them.

    `power_error` is what the power fields show over what is drawn. Samplers look once a second of the made-up clock.
    """

    def __init__(self, folder: Path, *, power_error: float = 1.0) -> None:
        super().__init__()
        self.power_error = power_error
        self.nvml = FakeNvml(("GPU-1",))
        self.sampler: ClockedSampler | None = None
        self._second_began_uj = self.energy_uj
        self._show(60.0)
        self.meter = open_meter(
            ["GPU-1"],
            nvml=self.nvml,
            powercap_root=folder / "none",
            boot_id="boot",
            book_directory=folder,
            clock_ns=lambda: self.ns,
        )

    def advance(self, seconds: float, watts: float) -> None:
        left_ns = round(seconds * 1e9)
        while left_ns > 0:
            step_ns = min(left_ns, SECOND - self.ns % SECOND)
            super().advance(step_ns / 1e9, watts)
            left_ns -= step_ns
            self._show(watts)
            if not self.ns % SECOND and self.sampler is not None:
                self.sampler.look()

    def read(self) -> CounterRead:
        self.advance(0.001, 100.0)
        return dataclasses.replace(self.meter.read(), t_wall_ns=START_NS + self.ns)

    def open_sampler(self) -> ClockedSampler:
        return ClockedSampler(self)

    def _show(self, watts: float) -> None:
        """Set counter, the mean power of the last whole second, and the power now."""
        self.nvml.energy_mj["GPU-1"] = self.energy_uj // 1000
        average_mw = self.nvml.power_mw["GPU-1"][0]
        if not self.ns % SECOND:
            average_mw = round((self.energy_uj - self._second_began_uj) / 1000 * self.power_error)
            self._second_began_uj = self.energy_uj
        self.nvml.power_mw["GPU-1"] = (max(1, average_mw), round(watts * 1000 * self.power_error))


class ClockedSampler(PowerSampler):
    """The product's sampler with the world's clock in place of its thread."""

    def __init__(self, board: Board) -> None:
        super().__init__(board.meter, MAX_BLOCK_SAMPLES)
        self.board = board

    def start(self) -> None:
        assert self.board.sampler is None
        self.board.sampler = self

    def stop(self) -> None:
        self.board.sampler = None


class Painter:
    """Noise from the seed; a batch takes `seconds` at `watts`."""

    def __init__(self, world: World, name: str, batch_size: int, seconds: float, watts: float) -> None:
        self.world, self.seconds, self.watts = world, seconds, watts
        self.info = GeneratorInfo(name, "0" * 64, SIZE, SIZE, num_inference_steps=1, batch_size=batch_size)
        self.calls = 0

    def generate(self, requests):
        self.calls += 1
        wobble = 1 + 0.002 * (self.calls % 7 - 3)
        self.world.advance(self.seconds * wobble, self.watts)
        return GeneratedBatch(np.stack([self.draw(r) for r in requests]))

    def draw(self, request) -> np.ndarray:
        bits = hashlib.shake_256(f"{self.info.name} {request.prompt} {request.seed}".encode())
        image = np.frombuffer(bits.digest(SIZE * SIZE * 3), np.uint8).reshape(SIZE, SIZE, 3)
        if self.info.name == "fast":
            return image
        darker = image // 2
        # what the judge looks at: more of B's are misread
        darker[0, 0, 0] = min(255, int(image[0, 0, 0]) + 40)
        return darker


class Judge:
    """Reads what the prompt says where the image's first byte is low, else an empty image."""

    name, sha256, rule = "stand-in", "c" * 64, "icon-scene"

    def judge(self, images, prompts, families):
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            group = parse_prompt(prompt)[0].groups[0]
            icons = [[group.noun, group.colour, "big", 4.0, 4.0]] if image[0, 0, 0] < 215 else []
            found.append(Judgement(bool(icons), json.dumps(icons)))
        return found

    def features(self, images):
        flat = images.reshape(len(images), -1).astype(np.float32) / 255
        return np.stack([flat[:, k::4].mean(1) for k in range(4)], 1)

    def reference_features(self, prompts, seed):
        rng = np.random.default_rng(seed)
        return rng.normal(0.6, 0.04, (len(prompts), 4)).astype(np.float32)


class Brightness:
    name, sha256 = "brightness", "d" * 64

    def score(self, images, prompts):
        return images.reshape(len(images), -1).mean(1)


def painters(world: World) -> dict[str, Painter]:
    return {
        "A": Painter(world, "fast", 8, 1.5, 300.0),
        "B": Painter(world, "slow", 4, 7.5, 330.0),
    }


def run_comparison(
    folder: Path, world: World | None = None, plan: Registration | None = None, **options
) -> Rows:
    """Run all blocks and judge; `folder` keeps the parts."""
    world, plan = world or World(), plan or registration()
    parts = PartStore(folder)
    open_sampler = world.open_sampler if isinstance(world, Board) else lambda: None
    ComparisonRun(plan, painters(world), world, parts, world.clock, world.sleep, open_sampler).run()
    return judge_images(plan, parts, Judge(), [Brightness()], **options)


# ---- without a made-up clock: factories for the command -----------------------------------------------------------


class Busy(Painter):
    """Draws like `Painter`, and keeps one core busy for `cpu_seconds` per batch."""

    def __init__(self, name: str, cpu_seconds: float) -> None:
        super().__init__(World(), name, 4, 0.0, 0.0)
        self.cpu_seconds = cpu_seconds

    def generate(self, requests):
        until = time.process_time() + self.cpu_seconds
        while time.process_time() < until:
            hashlib.sha256(bytes(10_000))
        return super().generate(requests)


def light(device: str) -> Busy:
    return Busy("fast", 0.002)


def heavy(device: str) -> Busy:
    return Busy("slow", 0.02)


def dies_in_the_middle(device: str) -> Busy:
    """Fails once when eight blocks are done: the marker file MILLIJOULE_TEST_DIR/died says that it did."""
    marker = Path(os.environ["MILLIJOULE_TEST_DIR"], "died")
    parts = marker.with_name("out") / "parts"
    painter = light(device)
    draw = painter.generate

    def generate(requests):
        if not marker.exists() and len(list(parts.glob("*"))) >= 8:
            marker.touch()
            raise InputError("died")
        return draw(requests)

    painter.generate = generate
    return painter


def wide(device: str) -> Busy:
    painter = light(device)
    painter.info = dataclasses.replace(painter.info, width=16)
    return painter


def judge() -> Judge:
    return Judge()


def brightness() -> Brightness:
    return Brightness()
