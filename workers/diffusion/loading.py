"""From a checked directory to a pipeline on its device: which classes may be in it, and in which precision it runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from millijoule.workers.diffusion.libraries import import_diffusers, quiet_libraries
from millijoule.workers.diffusion.own_classes import component_class
from millijoule.workers.diffusion.pipeline_folder import INDEX, PipelineFolder
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.pipeline_parts.open_pipeline import open_pipeline
from millijoule.workers.ranks.parallel import spread_module
from millijoule.workers.rungs.apply import ClimbedRungs
from millijoule.workers.rungs.check import check_rungs
from millijoule.workers.rungs.precision import settle_precision

#: A pipeline with one of these arguments wants more than text, or makes something other than an image.
OTHER_TASKS = ("strength", "mask_image", "num_frames", "audio_length_in_s")

#: Where pipelines keep the network that is evaluated once per step, and the one that turns latents into pixels.
DENOISERS, DECODERS = ("unet", "transformer", "prior", "decoder"), ("vae", "vqvae", "movq", "vqgan")


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline on its device, and what was settled when it was loaded.

    Attributes:
        pipeline: an instance of a class of diffusers.
        folder: where it came from, with its defaults.
        sha256: of its files.
        device: "cpu" or "cuda".
        rungs: what makes it cheaper.
        spread_words: what this rank holds of it, where there are several.
    """

    pipeline: Any
    folder: PipelineFolder
    sha256: str
    device: str
    rungs: ClimbedRungs
    spread_words: str = ""

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on processor cores."""
        return not self.device.startswith("cuda")

    @property
    def mixed_precision(self) -> bool:
        """Whether matrices and convolutions are to be multiplied in bfloat16 by autocast."""
        return self.rungs.precision.mixed

    def precision(self) -> torch.autocast:
        """The context in which it is to be called."""
        return self.rungs.precision.context()


def load_pipeline(
    folder: PipelineFolder, device: str, options: GeneratorOptions, rank: int = 0
) -> LoadedPipeline:
    """Load the pipeline in `folder`. Nothing is downloaded, and no code in it is run.

    Args:
        rank: of `options.ranks`, which of them this process is.

    Raises:
        InputError: diffusers is not installed, the directory is not a text-to-image pipeline that can be used, or a rung
            is asked for that does not work here.
    """
    diffusers, _ = import_diffusers()
    with quiet_libraries():  # the classes are imported as they are looked for
        _check_classes(folder, diffusers)
    check_rungs(options.rungs, folder, on_gpu=device.startswith("cuda"))
    precision = settle_precision(
        options.rungs.precision, device=device, stored_in_float16=_is_stored_in_float16(folder)
    )
    with quiet_libraries():
        pipeline = open_pipeline(folder, options, precision.dtype)
        pipeline.set_progress_bar_config(disable=True)
        check_text_to_image(pipeline, folder)
        words = _spread(pipeline, rank, options.ranks) if options.ranks > 1 else ""
        if not options.offload_weights:  # else the engine says what of it comes to the device
            pipeline.to(device)
        rungs = ClimbedRungs(pipeline, options.rungs, precision)
        rungs.prepare_weights()
    return LoadedPipeline(pipeline, folder, folder.sha256(), device, rungs, words)


def _spread(pipeline: Any, rank: int, ranks: int) -> str:
    """Leave in `pipeline` what this rank computes, before it goes to a device; returns that in words."""
    name, denoiser = next((n, m) for n in DENOISERS if (m := getattr(pipeline, n, None)) is not None)
    spread = spread_module(denoiser, rank, ranks)
    if not spread.spread:
        raise InputError(
            f"--ranks-per-worker {ranks}: nothing of this pipeline's {name} can be cut into so many parts; take 1"
        )
    return f"holds {spread.share:.0%} of the {name}'s {spread.all:,} weights"


def _is_stored_in_float16(folder: PipelineFolder) -> bool:
    """Whether all weights of the denoiser are."""
    return folder.weight_dtypes(DENOISERS) == {"F16"}


def _check_classes(folder: PipelineFolder, diffusers: Any) -> None:
    """Every class must be one that the two libraries have; a component may also name a module of diffusers.pipelines."""
    where, pipeline = folder.path / INDEX, getattr(diffusers, folder.class_name, None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline)):
        raise InputError(f"{where}: diffusers {diffusers.__version__} has no {folder.class_name}")
    for name in folder.components:
        component_class(pipeline, folder, name)


def check_text_to_image(pipeline: Any, folder: PipelineFolder) -> None:
    """Raise InputError unless the arguments the pipeline takes are a text-to-image pipeline's."""
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
