"""Models by name or path: which one is meant, what it is without loading it, and loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from millijoule.workers import factories
from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.drawing.out_of_memory import loading
from millijoule.workers.errors import InputError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.load_turn import load_turn
from millijoule.workers.generators.model_files import read_header, read_own_header
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import Generator, ModelIdentity
from millijoule.workers.oscillators.file_format import FORMAT, FORMAT_VERSION
from millijoule.workers.pipeline_parts.model_files import read_model

_WEIGHTS = Path(__file__).parents[1] / "weights"

#: Models that come with the package: the oscillator generator, the same with coupled oscillators, and the conventional diffusion
#: model to compare them with.
PACKAGED = {
    "default": _WEIGHTS / "default.safetensors",
    "coupled": _WEIGHTS / "coupled.safetensors",
    "baseline": _WEIGHTS / "baseline",
}

#: A diffusers directory of more bytes than this is not run on CPUs unless somebody says so. The packaged baseline has 19 MB;
#: those that are published for real use have a gigabyte and more, and would take minutes for an image.
CPU_WEIGHTS_BYTES = 256 * 2**20


#: See `usual_shard_images`.
SHARD_IMAGES, OSCILLATOR_SHARD_IMAGES = 256, 4096

#: What a converted Un-0 checkpoint says that it is.
UN0_FORMAT = "un0"

#: Options that only diffusion pipelines have, by the names a user knows them by.
_OF_PIPELINES = {
    "variant": "--variant",
    "loras": "--lora",
    "scheduler": "--scheduler",
    "vae": "--vae",
    "config": "--config",
    "long_prompts": "--long-prompts",
    "width": "--width",
    "height": "--height",
}


def describe_model(model: str, options: GeneratorOptions = GeneratorOptions()) -> ModelIdentity:  # noqa: B008 (frozen)
    """Identify `model` (see `load_generator`) by its files, without torch; their hashes are found once per host (`file_hashes`).

    Raises:
        InputError: a file is missing, is not safetensors or is no model that this version reads, the factory's name is
            malformed, or an option means nothing to such a model.
    """
    if model.startswith(factories.PREFIX):
        factories.split_name("--model", model)
        _refuse_pipeline_options(model, options)
        return ModelIdentity(model, hashlib.sha256(model.encode()).hexdigest())
    folder, path = read_pipeline_model(model, options), model_path(model)
    if folder is not None:
        return ModelIdentity(folder.name, folder.sha256())
    _refuse_pipeline_options(model, options)
    metadata = read_header(path).metadata
    if metadata["format"] != UN0_FORMAT:
        read_own_header(path, "oscillator", FORMAT, FORMAT_VERSION)
    return ModelIdentity(metadata.get("name", path.stem), file_sha256(path))


@loading()
def load_generator(
    model: str,
    *,
    device: str = "cpu",
    options: GeneratorOptions = GeneratorOptions(),  # noqa: B008 (frozen)
) -> Generator:
    """Load `model`.

    Args:
        model: "default", "coupled" or "baseline" for weights in the package (`PACKAGED`), the path of a `.safetensors` file (one of
            ours, or a checkpoint of a diffusion model with `options.config`) or of a diffusers directory, or
            "python:MODULE:FACTORY", a function of yours that takes the device and returns a `Generator`. What else
            `--model` takes becomes one of these first (`sources.obtain`).
        device: "cpu" or "cuda".
        options: those that mean nothing to a model are refused, unless they are the defaults.

    Raises:
        InputError: the file is missing, is not safetensors (pickled files are never opened), or is not a model
            this version knows; the factory cannot be imported.
    """
    if model.startswith(factories.PREFIX):
        _refuse_pipeline_options(model, options)
        return factories.find_factory("--model", model)(device)
    path = model_path(model)
    if is_pipeline(path):
        from millijoule.workers.diffusion.generator import DiffusersGenerator

        with load_turn(path):
            return DiffusersGenerator.load(path, device=device, options=options)
    _refuse_pipeline_options(model, options)
    from millijoule.workers.engines.open import open_engine

    as_usual = options.engine == "deepspeed" and not (
        options.cuda_graphs or options.fused_modules or options.offload_weights
    )
    if read_header(path).metadata.get("format") == UN0_FORMAT:
        from millijoule.workers.generators.un0 import Un0Generator

        engine = open_engine(options, device)
        return Un0Generator.load(path, device=device, engine=engine, gpu_kernels=as_usual)
    from millijoule.kernels.native_library import usual_form
    from millijoule.workers.oscillators.generator import OscillatorGenerator

    if as_usual and (device.startswith("cuda") or (device == "cpu" and usual_form() is not None)):
        generator = OscillatorGenerator.load(path, device=device)
        if generator.drawing.kernel is not None:
            return generator  # DeepSpeed would have nothing to run
    return OscillatorGenerator.load(path, device=device, engine=open_engine(options, device))


def model_path(model: str) -> Path:
    """The file or diffusers directory behind a model name; raises InputError where there is none."""
    path = PACKAGED.get(model) or Path(model)
    if not path.exists():
        raise InputError(f"--model {model}: no such file or directory")
    return path


def is_pipeline(path: Path) -> bool:
    """Whether the model at `path` is a diffusion pipeline: a directory, or a checkpoint of one in a file.

    Raises:
        InputError: the file is no safetensors file.
    """
    return path.is_dir() or "format" not in (said := read_header(path).metadata) or said["format"] == "pt"


def read_pipeline_model(model: str, options: GeneratorOptions) -> PipelineFolder | None:
    """The diffusion pipeline that `model` is, checked; None: it is something else. Raises InputError as `describe_model`."""
    if model.startswith(factories.PREFIX) or not is_pipeline(path := model_path(model)):
        return None
    return read_model(path, options)


def usual_shard_images(model: str) -> int:
    """How many images of `model` make a shard where nobody says it.

    A shard has a file, a lease and a commit of its own, which take milliseconds: as long as dozens of an oscillator model's images.
    """
    if model.startswith(factories.PREFIX) or is_pipeline(path := model_path(model)):
        return SHARD_IMAGES
    return SHARD_IMAGES if read_header(path).metadata["format"] == UN0_FORMAT else OSCILLATOR_SHARD_IMAGES


def needs_gpu(model: str, options: GeneratorOptions = GeneratorOptions()) -> bool:  # noqa: B008 (frozen)
    """Whether `model` is a diffusion pipeline of more than `CPU_WEIGHTS_BYTES`. Raises InputError as `describe_model`."""
    if (folder := read_pipeline_model(model, options)) is None:
        return False
    files = {*folder.files, *(file for files in folder.weights.values() for file in files)}
    return sum(file.stat().st_size for file in files) > CPU_WEIGHTS_BYTES


def _refuse_pipeline_options(model: str, options: GeneratorOptions) -> None:
    default = GeneratorOptions()
    for name, option in _OF_PIPELINES.items():
        if getattr(options, name) != getattr(default, name):
            raise InputError(f"{option}: {model} is not a diffusion pipeline, only those take it")
