"""Any text-to-image pipeline that was saved as a diffusers directory (`pipeline_folder`), behind the `Generator` protocol.

Drawing needs the `diffusers` extra.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from millijoule.kernels.processor import multiplies_bfloat16
from millijoule.workers.diffusion.engine_modules import DENOISERS, prepare_pipeline
from millijoule.workers.diffusion.libraries import import_diffusers
from millijoule.workers.diffusion.pipeline_folder import ICON_SCENES, INDEX, PipelineFolder, read_pipeline
from millijoule.workers.engines.open import open_engine
from millijoule.workers.engines.protocol import Engine
from millijoule.workers.errors import InputError, RowError
from millijoule.workers.generators.fixed_size import padded, unused_settings
from millijoule.workers.generators.model_files import read_header
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo, Rejection
from millijoule.workers.scenes.prompts import parse_prompt, write_caption
from millijoule.workers.scenes.scenes import complete
from millijoule.workers.schemas import ImageRequest

#: The pipeline always sees this many rows; the rest is padding. A GPU is idle most of the time with 16 small images.
BATCH_SIZE, GPU_BATCH_SIZE, GPU_BATCH_SIZE_SMALL = 8, 16, 256

#: Images of at most this many pixels are small.
SMALL_PIXELS = 128 * 128

#: A pipeline with one of these arguments wants more than text, or makes something other than an image.
OTHER_TASKS = ("strength", "mask_image", "num_frames", "audio_length_in_s")

DECODERS = ("vae", "vqvae", "movq", "vqgan")


class DiffusersGenerator:
    """A loaded pipeline. Build with `load`; see `Generator` and `ReportsSteps` for the protocols."""

    def __init__(
        self, pipeline: Any, folder: PipelineFolder, sha256: str, device: str, engine: Engine
    ) -> None:
        """`engine` runs the modules of `pipeline`."""
        self.pipeline = pipeline
        self.engine = engine
        self.device = device
        self.on_step: Callable[[], None] = lambda: None
        self.guidance_scale = folder.defaults.guidance_scale
        self.prompts = folder.defaults.prompts
        on_cpu = not device.startswith("cuda")
        self.mixed_precision = on_cpu and _is_stored_in_float16(folder) and multiplies_bfloat16()
        self.arguments = _check_signature(pipeline, folder)
        self.scale = int(getattr(pipeline, "vae_scale_factor", 1))
        width, height = _native_size(pipeline, folder, self.scale)
        gpu_batch = GPU_BATCH_SIZE_SMALL if width * height <= SMALL_PIXELS else GPU_BATCH_SIZE
        self.info = GeneratorInfo(
            name=folder.name,
            sha256=sha256,
            width=width,
            height=height,
            num_inference_steps=folder.defaults.num_inference_steps,
            batch_size=BATCH_SIZE if on_cpu else gpu_batch,
        )

    @staticmethod
    def load(
        path: Path,
        *,
        device: str = "cpu",
        options: GeneratorOptions = GeneratorOptions(),  # noqa: B008 (frozen)
    ) -> DiffusersGenerator:
        """Load the pipeline in directory `path`. Nothing is downloaded.

        On a GPU it runs in float16 if its denoiser is stored so, whose rounding is an eighth of bfloat16's; other weights
        may be out of float16's range, and run in bfloat16, or in float32 where the GPU only emulates bfloat16. On a CPU it runs
        in float32, and matrices and convolutions of a denoiser that is stored in float16 are multiplied in bfloat16 where
        the processor does that (half the time).

        Raises:
            InputError: diffusers is not installed, or the directory is not a pipeline that can be used (see
                `read_pipeline`).
        """
        folder = read_pipeline(path)
        diffusers, transformers = import_diffusers()
        _check_classes(folder, diffusers, transformers)
        dtype = torch.float32
        if device.startswith("cuda"):
            wide = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
            dtype = torch.float16 if _is_stored_in_float16(folder) else wide
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(folder.path),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=dtype,
            )
        except Exception as error:  # whatever the libraries make of a directory that is not as they wrote it
            raise InputError(f"{folder.path}: diffusers cannot load it: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        engine = open_engine(options, device)
        prepare_pipeline(pipeline, engine)  # on the host still: what is too large for the device stays there
        return DiffusersGenerator(pipeline.to(device), folder, folder.sha256(), device, engine)

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
        """Operations per image at the default guidance, two per multiply-accumulate, of text, denoiser and decoder.

        One step of the real pipeline is counted and its denoiser multiplied by the schedule's number of evaluations.
        What guidance doubles is doubled in that one step already. Only convolutions, matrix products and attention
        count, as `torch.utils.flop_counter` has it.
        """
        request = ImageRequest("", 0, "", 0, num_inference_steps=1)
        with self.engine.plain(), FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            self.pipeline(**self._call([request]))
        by_class = {kind: sum(counts.values()) for kind, counts in counter.get_flop_counts().items()}
        components = {
            type(model).__name__: name
            for name, model in self.pipeline.components.items()
            if isinstance(model, torch.nn.Module) and name not in DECODERS
        }
        counts = {name: by_class.get(kind, 0) for kind, name in components.items()}
        decoder = by_class["Global"] - sum(counts.values())  # no module's call, and so not counted by class
        text = sum(n for name, n in counts.items() if name.startswith("text_encoder"))
        one_step = sum(n for name, n in counts.items() if name in DENOISERS)
        steps = num_inference_steps or self.info.num_inference_steps
        denoiser = one_step * self._evaluations(steps) // self._evaluations(1)
        return {"text": text, "denoiser": denoiser, "decoder": decoder}

    def _draw(self, requests: Sequence[ImageRequest]) -> Iterator[tuple[np.ndarray, bool]]:
        """Images of a batch of requests that agree in all settings, and whether each was blanked."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision):
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

    def _evaluations(self, steps: int) -> int:
        """How often the scheduler has the denoiser evaluated in `steps` steps; second-order ones do so more often."""
        scheduler = self.pipeline.scheduler
        try:
            scheduler.set_timesteps(steps)
        except (TypeError, ValueError):  # it asks for the image's size; all such are first-order
            return steps
        return len(scheduler.timesteps)

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


def _is_stored_in_float16(folder: PipelineFolder) -> bool:
    """Whether all weights of the denoiser are."""
    files = [f for f in folder.files if f.suffix == ".safetensors" and f.parent.name in DENOISERS]
    return frozenset().union(*(read_header(f).dtypes for f in files)) == {"F16"}


def seeded(seed: int) -> Any:
    """A torch generator on the CPU that depends on all 64 bits of `seed`.

    torch's `manual_seed` drops the upper 32, which would give two of some 65,000 images the same noise. Seeds below
    2**32 mean what they mean everywhere else; the upper half of larger ones is mixed into the generator's state.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if seed >= 2**32:
        state = generator.get_state()
        words = state.numpy()[24 : 24 + 8 * 624].view(np.uint64)  # of the Mersenne twister, 32 bits in each
        words ^= np.random.SeedSequence(seed >> 32).generate_state(624)
        generator.set_state(state)
    return generator


#: torch's counter knows the attention kernels of GPUs only. Its functions take the shapes of query, key and value first.
_CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION = {_CPU_KERNEL: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}


def _check_classes(folder: PipelineFolder, diffusers: Any, transformers: Any) -> None:
    """Every class must be one that the two libraries have; a component may also name a module of diffusers.pipelines."""
    where, pipeline = folder.path / INDEX, getattr(diffusers, folder.class_name, None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline)):
        raise InputError(f"{where}: diffusers {diffusers.__version__} has no {folder.class_name}")
    libraries = {"diffusers": diffusers, "transformers": transformers}
    for name, (library, class_name) in folder.components.items():
        module = libraries.get(library) or getattr(diffusers.pipelines, library, None)
        if not inspect.ismodule(module) or not module.__name__.startswith(("diffusers", "transformers")):
            raise InputError(
                f"{where}: {name} is of {library}; only classes of diffusers and transformers are loaded"
            )
        if not hasattr(module, class_name):
            raise InputError(f"{where}: {name} is a {class_name}, which {library} does not have")


def _check_signature(pipeline: Any, folder: PipelineFolder) -> frozenset[str]:
    """Names of the arguments the pipeline takes, if those are a text-to-image pipeline's."""
    parameters = inspect.signature(pipeline.__call__).parameters
    required = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n != "prompt"
    ]
    needed = ("prompt", "generator", "num_inference_steps", "output_type")
    missing = [n for n in needed if n not in parameters]
    other = required + [n for n in OTHER_TASKS if n in parameters]
    if missing or other:
        where = folder.path / INDEX
        why = f"takes no {missing[0]}" if missing else f"is made for {other[0]}"
        raise InputError(f"{where}: {folder.class_name} {why}; only text-to-image pipelines are used")
    return frozenset(parameters)


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
