"""Any text-to-image pipeline that was saved as a diffusers directory (`pipeline_folder`), behind the `Generator` protocol.

Drawing needs the `diffusers` extra.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from millijoule.workers.diffusion.loading import DENOISERS, LoadedPipeline, load_pipeline
from millijoule.workers.diffusion.noise import seeded
from millijoule.workers.diffusion.operations import count_operations
from millijoule.workers.diffusion.pipeline_folder import ICON_SCENES, PipelineFolder, read_pipeline
from millijoule.workers.errors import InputError, RowError
from millijoule.workers.generators.fixed_size import padded, unused_settings
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo, Rejection
from millijoule.workers.scenes.prompts import parse_prompt, write_caption
from millijoule.workers.scenes.scenes import complete
from millijoule.workers.schemas import ImageRequest

#: The pipeline always sees this many rows; the rest is padding. A GPU is idle most of the time with 16 small images.
BATCH_SIZE, GPU_BATCH_SIZE, GPU_BATCH_SIZE_SMALL = 8, 16, 256

#: Images of at most this many pixels are small.
SMALL_PIXELS = 128 * 128


class DiffusersGenerator:
    """A loaded pipeline. Build with `load`; see `Generator` and `ReportsSteps` for the protocols."""

    def __init__(self, loaded: LoadedPipeline, options: GeneratorOptions) -> None:
        self.pipeline, folder = loaded.pipeline, loaded.folder
        self.loaded = loaded
        self.options = options
        self.on_step: Callable[[], None] = lambda: None
        self.guidance_scale = folder.defaults.guidance_scale
        self.prompts = folder.defaults.prompts
        self.arguments = loaded.arguments
        self.scale = int(getattr(self.pipeline, "vae_scale_factor", 1))
        width, height = _native_size(self.pipeline, folder, self.scale)
        gpu_batch = GPU_BATCH_SIZE_SMALL if width * height <= SMALL_PIXELS else GPU_BATCH_SIZE
        self.info = GeneratorInfo(
            name=folder.name,
            sha256=loaded.sha256,
            width=width,
            height=height,
            num_inference_steps=options.rungs.steps or folder.defaults.num_inference_steps,
            batch_size=1 if loaded.rungs.draws_alone else BATCH_SIZE if loaded.on_cpu else gpu_batch,
        )

    @staticmethod
    def load(
        path: Path,
        *,
        device: str = "cpu",
        options: GeneratorOptions = GeneratorOptions(),  # noqa: B008 (frozen)
    ) -> DiffusersGenerator:
        """Load the pipeline in directory `path` (see `load_pipeline`).

        Raises:
            InputError: diffusers is not installed, or the directory is not a pipeline that can be used (see
                `read_pipeline`).
        """
        return DiffusersGenerator(load_pipeline(read_pipeline(path), device, options), options)

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """See `Generator`; raises RowError for a size this model cannot make."""
        groups: dict[tuple[float | None, bool], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            self._check(request)
            groups[request.guidance_scale, request.negative_prompt is None].append(i)
        images: list[Any] = [None] * len(requests)
        warnings = [self._warnings(r) for r in requests]
        rejected: list[Rejection | None] = [None] * len(requests)
        for rows in groups.values():
            for part, count in padded(len(rows), self.info.batch_size):
                drawn = self._draw([requests[rows[k]] for k in part])
                for k, (image, blocked) in zip(part[:count], drawn, strict=False):
                    images[rows[k]] = image
                    if blocked:
                        rejected[rows[k]] = Rejection("filtered", "the model's safety checker hid this image")
        return GeneratedBatch(np.stack(images), tuple(warnings), tuple(rejected))

    def count_operations(self, num_inference_steps: int | None = None) -> dict[str, int]:
        """Operations per image at the default guidance (`operations.count_operations`)."""
        steps = num_inference_steps or self.info.num_inference_steps
        counted = steps if self.options.rungs.by_step else 1
        request = ImageRequest("", 0, "", 0, num_inference_steps=counted)
        self.loaded.rungs.begin(1)
        return count_operations(self.pipeline, lambda: self.pipeline(**self._call([request])), steps, counted)

    def _draw(self, requests: Sequence[ImageRequest]) -> Iterator[tuple[np.ndarray, bool]]:
        """Images of a batch of requests that agree in all settings, and whether each was blanked."""
        self.loaded.rungs.begin(len(requests))
        with self.loaded.precision():
            result = self.pipeline(**self._call(requests))
        pixels = np.asarray(result.images, dtype=np.float64)
        if not np.isfinite(pixels).all():
            raise RuntimeError("the model made pixels that are not finite numbers")
        blocked = getattr(result, "nsfw_content_detected", None) or [False] * len(requests)
        return zip(np.round(pixels * 255).clip(0, 255).astype(np.uint8), map(bool, blocked), strict=True)

    def _call(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        """Arguments for the pipeline. The noise of every image comes from a generator of its own, on the CPU."""
        first = requests[0]
        guidance = self.guidance_scale if first.guidance_scale is None else first.guidance_scale
        call: dict[str, Any] = {
            "prompt": [self._prompt(r) for r in requests],
            "generator": [seeded(r.seed) for r in requests],
            "num_inference_steps": first.num_inference_steps or self.info.num_inference_steps,
            "output_type": "np",
        }
        if "width" in self.arguments and "height" in self.arguments:
            call |= {"width": first.width or self.info.width, "height": first.height or self.info.height}
        if guidance is not None and "guidance_scale" in self.arguments:
            call["guidance_scale"] = guidance
        if first.negative_prompt is not None and "negative_prompt" in self.arguments:
            call["negative_prompt"] = [r.negative_prompt or "" for r in requests]
        if "callback_on_step_end" in self.arguments:
            call["callback_on_step_end"] = self._after_step
        return call

    def _prompt(self, request: ImageRequest) -> str:
        if self.prompts == ICON_SCENES:
            return write_caption(complete(parse_prompt(request.prompt)[0], request.seed))
        return request.prompt

    def _after_step(self, pipeline: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        self.on_step()
        return kept  # nothing is changed

    def _check(self, request: ImageRequest) -> None:
        width, height = request.width or self.info.width, request.height or self.info.height
        if "width" not in self.arguments and (width, height) != (self.info.width, self.info.height):
            raise RowError(f"{width}x{height}: this model makes {self.info.width}x{self.info.height} pixels")
        if width % self.scale or height % self.scale:
            raise RowError(f"{width}x{height}: this model needs sides that are multiples of {self.scale}")

    def _warnings(self, request: ImageRequest) -> tuple[str, ...]:
        """What of the request the model cannot read or does not use."""
        words: list[str] = []
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        if self.prompts == ICON_SCENES:
            words += parse_prompt(request.prompt)[1]
        elif tokenizer is not None:
            unknown = getattr(tokenizer, "unk_token_id", None)
            for word in dict.fromkeys(request.prompt.split() if unknown is not None else ()):
                if unknown in tokenizer(word, add_special_tokens=False).input_ids:
                    words.append(f"unknown word: {word.strip('.,;:!?()')!r}")
            length, limit = len(tokenizer(request.prompt).input_ids), tokenizer.model_max_length
            if length > limit:
                words.append(f"the prompt is {length} tokens long, this model reads the first {limit}")
        return (*words, *unused_settings(request, self.arguments))


def _native_size(pipeline: Any, folder: PipelineFolder, scale: int) -> tuple[int, int]:
    """Width and height in pixels of what the pipeline makes when not told."""
    configs = [getattr(getattr(pipeline, n, None), "config", None) for n in DENOISERS]
    found = [getattr(config, "sample_size", None) for config in configs]
    for size in (*found, getattr(pipeline, "default_sample_size", None)):
        if isinstance(size, int):
            return size * scale, size * scale
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[1]) * scale, int(size[0]) * scale
    raise InputError(f"{folder.path}: {folder.class_name} does not say what size of image it makes")
