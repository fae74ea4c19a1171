"""A pipeline's memory: how many images a call may have on its device, and what can be done where not even one fits.

In the order of what they cost: the engine's graphs are given up; then come diffusers' own savers: the decoder image by image, the
decoder in tiles (which changes pixels near their seams), text encoders in the host's memory, the denoiser in the host's memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from millijoule.workers.diffusion.loading import DECODERS, DENOISERS
from millijoule.workers.drawing.out_of_memory import release_memory
from millijoule.workers.engines.protocol import Engine
from millijoule.workers.generators.protocol import BatchLimits

log = logging.getLogger(__name__)

#: Most images per call. On a CPU more take as long per image; a GPU is idle most of the time with 16 small ones.
MOST_ON_CPU, MOST_ON_GPU, MOST_ON_GPU_SMALL = 8, 16, 256

#: Images of at most this many pixels are small.
SMALL_PIXELS = 128 * 128

#: A decoder's peak, in activations of its last block at full size: 12 for SDXL's (3.2 GB for 1024 by 1024 pixels in float16).
PEAK_ACTIVATIONS = 12

#: Channels of that block where the pipeline does not say.
USUAL_CHANNELS = 128

#: Of the memory that is free, what a first guess may fill.
GUESSED_SHARE = 0.8

#: Where pipelines keep what reads prompts.
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

_CGROUP = Path("/sys/fs/cgroup")


class PipelineMemory:
    """What is known of one loaded pipeline's memory, and the savers it has taken.

    Args:
        pipeline: of diffusers, on its device.
        device: "cpu", "cuda" or "cuda:N".
        engine: what runs the pipeline's modules.
        offload_from: the device whose memory is saved by moving models to the host's; None where they are there already.
    """

    def __init__(
        self, pipeline: Any, device: str, engine: Engine | None = None, *, offload_from: str | None = None
    ) -> None:
        self.pipeline = pipeline
        self.engine = engine
        self.device = device
        self._on_gpu = device.startswith("cuda")
        self._offload_from = offload_from or (device if self._on_gpu else None)
        self._left = self._savers()

    def limits(self, width: int, height: int) -> BatchLimits:
        """How many images of that many pixels a call starts with, and at most has.

        On a GPU memory that runs out is an error that halves the batch, so it may grow. On a host it is the end of a process,
        and the estimate stands.
        """
        small = width * height <= SMALL_PIXELS
        most = (MOST_ON_GPU_SMALL if small else MOST_ON_GPU) if self._on_gpu else MOST_ON_CPU
        free = free_gpu_bytes(self.device) if self._on_gpu else free_host_bytes()
        if free is None:
            return BatchLimits(most, most)
        fits = int(GUESSED_SHARE * free / self.image_bytes(width, height))
        first = min(most, 1 << max(fits, 1).bit_length() - 1)
        return BatchLimits(first, most if self._on_gpu else first)

    def image_bytes(self, width: int, height: int) -> int:
        """An estimate of what one image more takes at the peak of a call, in bytes."""
        decoder = next((m for n in DECODERS if (m := getattr(self.pipeline, n, None)) is not None), None)
        network = decoder or next(
            (m for n in DENOISERS if (m := getattr(self.pipeline, n, None)) is not None), None
        )
        config = getattr(network, "config", None)
        channels = USUAL_CHANNELS
        for name in ("decoder_block_out_channels", "block_out_channels"):
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                channels = value[0]
                break
        number = getattr(network, "dtype", torch.float32).itemsize
        if getattr(config, "force_upcast", False):
            number = max(number, torch.float32.itemsize)
        return PEAK_ACTIVATIONS * width * height * channels * number

    def save(self) -> str | None:
        """Take the next saver; see `SavesMemory`."""
        for name, take in self._left:
            try:
                if take() is False:
                    continue
            except (
                Exception
            ) as error:  # of whatever kind a library's hooks make of modules that others have changed
                log.warning("%s: not possible with this pipeline: %s", name, error)
                continue
            release_memory()
            return name
        return None

    def warnings(self, width: int, height: int) -> tuple[str, ...]:
        """Words about images of that many pixels that look otherwise because memory was saved."""
        for name in DECODERS:
            decoder = getattr(self.pipeline, name, None)
            if getattr(decoder, "use_tiling", False) and max(width, height) > _tile_side(decoder):
                return ("decoded in tiles, to save memory",)
        return ()

    def _savers(self) -> Iterator[tuple[str, Callable[[], bool | None]]]:
        """Names of the savers and what takes each, which returns False where there is nothing to take."""
        if self.engine is not None:
            yield f"the {self.engine.name} engine's graphs are given up", self.engine.release
        decoders = [m for n in DECODERS if (m := getattr(self.pipeline, n, None)) is not None]
        for decoder in decoders:
            if getattr(decoder, "use_slicing", None) is False:
                yield "VAE slicing (images are decoded one by one)", decoder.enable_slicing
        for decoder in decoders:
            if getattr(decoder, "use_tiling", None) is False:
                yield "VAE tiling (images are decoded in tiles)", decoder.enable_tiling
        if self._offload_from is not None:
            for words, names in (("text encoders", TEXT_ENCODERS), ("the denoiser", DENOISERS)):
                models = [
                    m for n in names if isinstance(m := getattr(self.pipeline, n, None), torch.nn.Module)
                ]
                if models:
                    yield (
                        f"offload of {words} to the host's memory",
                        partial(self._offload, models),
                    )

    def _offload(self, models: list[torch.nn.Module]) -> None:
        """Keep `models` in the host's memory; each layer comes to the device for its own call."""
        from diffusers.hooks import apply_group_offloading

        for model in models:
            apply_group_offloading(
                model,
                onload_device=torch.device(self._offload_from or self.device),
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
            )
        if self.engine is not None:
            self.engine.renew()


def free_gpu_bytes(device: str) -> int:
    """Memory of the GPU that nobody uses, with what this process holds and does not need."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_host_bytes() -> int | None:
    """This worker's share of the host's memory that is free: by its threads among the processors; None: not known."""
    free = [b for b in (_available_bytes(), _cgroup_free_bytes()) if b is not None]
    share = min(1.0, torch.get_num_threads() / (os.cpu_count() or 1))
    return int(min(free) * share) if free else None


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_free_bytes(root: Path = _CGROUP) -> int | None:
    """What the container may still take, files that can be dropped not counted; None: it has no limit of its own."""
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))


def _tile_side(decoder: Any) -> int:
    """Pixels of the side from which on a decoder cuts tiles."""
    sides = [getattr(decoder, f"tile_sample_min_{name}", None) for name in ("size", "height", "width")]
    return min((side for side in sides if isinstance(side, int)), default=0)
