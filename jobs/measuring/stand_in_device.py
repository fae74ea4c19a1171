"""A generator whose device is a clock: an image takes its time, and nothing of the host, as on a GPU.

`--model python:MODULE:load`, with the file copied to where the measured code finds it: it uses only what every version has.
It notes for itself when its device is busy, beside all that is measured; and it gives images as a camera would, which take as
long to encode as true ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo

#: Settings: seconds per image, pixels a side, the file that gets a line "begin end" (seconds, monotonic) per image.
SECONDS, PIXELS, LOG = "MILLIJOULE_BENCH_SECONDS", "MILLIJOULE_BENCH_PIXELS", "MILLIJOULE_BENCH_LOG"

BATCH_SIZE = 4
#: Power falls with frequency so steeply in photographs (amplitude as f ** -1.2), and a sensor adds noise.
FALL, CONTRAST, NOISE = 1.2, 55.0, 1.5


class StandInDevice:
    """`seconds` per image; the images are a few that were made before."""

    def __init__(self, seconds: float, pixels: int, log: str) -> None:
        self.seconds = seconds
        self._log = log
        self._images = [photograph(pixels, seed) for seed in range(BATCH_SIZE)]
        self.info = GeneratorInfo("stand-in device", "0" * 64, pixels, pixels, 1, BATCH_SIZE)

    def generate(self, requests: Sequence[Any]) -> GeneratedBatch:
        lines = []
        for request in requests:
            if request.prompt_id != "warm-up":
                began = time.monotonic()
                time.sleep(self.seconds)
                lines.append(f"{began:.6f} {time.monotonic():.6f}\n")
        with open(self._log, "a") as log:
            log.write("".join(lines))
        return GeneratedBatch(np.stack([self._images[i % BATCH_SIZE] for i in range(len(requests))]))


def photograph(pixels: int, seed: int) -> np.ndarray:
    """Noise with a photograph's spectrum, uint8 `[pixels, pixels, 3]`."""
    rng = np.random.default_rng(seed)
    waves = np.fft.rfft2(rng.standard_normal((pixels, pixels, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(pixels)[:, None], np.fft.rfftfreq(pixels)[None])
    frequency[0, 0] = 1.0
    image = np.fft.irfft2(waves / frequency[..., None] ** FALL, s=(pixels, pixels), axes=(0, 1))
    image = (image - image.mean()) / image.std() * CONTRAST + 128
    return np.clip(image + rng.standard_normal(image.shape) * NOISE, 0, 255).astype(np.uint8)


def load(device: str) -> StandInDevice:
    return StandInDevice(float(os.environ[SECONDS]), int(os.environ[PIXELS]), os.environ[LOG])
