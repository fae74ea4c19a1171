"""A pipeline without its weights: networks on PyTorch's "meta" device, which have shapes and nothing else.

It says what the pipeline draws by default and takes as options, and counts operations, in seconds and without memory, also of
models that no device here could hold.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millijoule.workers.diffusion.families import Family, check_long_prompts, describe_family
from millijoule.workers.diffusion.libraries import import_diffusers, quiet_libraries
from millijoule.workers.diffusion.loading import LoadedPipeline, check_text_to_image
from millijoule.workers.diffusion.memory import PipelineMemory
from millijoule.workers.diffusion.operations import count_operations
from millijoule.workers.diffusion.own_classes import component_class
from millijoule.workers.diffusion.pipeline_call import PipelineCall, Row, Settings
from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import read_header
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.pipeline_parts.scheduler_choice import change_scheduler, compatible_schedulers
from millijoule.workers.rungs.apply import ClimbedRungs
from millijoule.workers.rungs.precision import SettledPrecision
from millijoule.workers.rungs.rungs import Rungs

META = "meta"


@dataclass(frozen=True)
class Outline:
    """What is known of a pipeline before its weights are read.

    Attributes:
        guidance_scale: the default; None: the pipeline's own, which it does not say.
        operations: per image at these defaults, two per multiply-accumulate, of text, denoiser and decoder; None: `not_counted`
            says why.
        weight_bytes: in the precision of a GPU.
        image_bytes: an estimate of what one image more takes at the peak of a call.
        schedulers: names of those that can take the place of its own, which is the first.
        takes_loras: whether it can be given LoRAs.
        long_prompts: what can be done with prompts that are too long.
        misfits: words for weights that have other shapes than their configuration says, so that they cannot be loaded.
    """

    family: Family
    num_inference_steps: int
    guidance_scale: float | None
    operations: dict[str, int] | None
    not_counted: str | None
    weight_bytes: int
    image_bytes: int
    schedulers: tuple[str, ...]
    takes_loras: bool
    long_prompts: tuple[str, ...]
    misfits: tuple[str, ...]


def outline(folder: PipelineFolder, options: GeneratorOptions) -> Outline:
    """Describe the pipeline in `folder`.

    Raises:
        InputError: it is not a text-to-image pipeline that can be used, or an option means nothing to it.
    """
    dtype = (
        torch.float16 if folder.weight_dtypes(("unet", "transformer", "prior")) == {"F16"} else torch.bfloat16
    )
    with quiet_libraries():
        pipeline = _on_meta(folder, dtype)
        pipeline.set_progress_bar_config(disable=True)
        check_text_to_image(pipeline, folder)
        own = getattr(pipeline, "scheduler", None)
        if options.scheduler is not None:
            change_scheduler(pipeline, options.scheduler)
        family = describe_family(pipeline, str(folder.path))
        guidance = folder.defaults.guidance_scale
        steps = folder.num_inference_steps
        operations, why = _count(pipeline, folder, family, steps, guidance)
    networks = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    tensors = [t for m in networks for t in (*m.parameters(), *m.buffers())]
    others = (
        [n for n in compatible_schedulers(type(own)) if n != type(own).__name__] if own is not None else []
    )
    return Outline(
        family=family,
        num_inference_steps=steps,
        guidance_scale=family.default_guidance if guidance is None else guidance,
        operations=operations,
        not_counted=why,
        weight_bytes=sum(t.numel() * t.element_size() for t in tensors),
        image_bytes=PipelineMemory(pipeline, "cpu").image_bytes(family.width, family.height),
        schedulers=(type(own).__name__, *others) if own is not None else (),
        takes_loras=hasattr(pipeline, "load_lora_weights"),
        misfits=tuple(_misfits(pipeline, folder)),
        long_prompts=tuple(w for w in ("truncate", "reject", "chunk") if _can(folder.class_name, w)),
    )


def _misfits(pipeline: Any, folder: PipelineFolder) -> Iterator[str]:
    """Of each network of diffusers, the first tensor whose stored shape is not the one that its configuration makes."""
    for name, (library, _) in folder.components.items():
        network = getattr(pipeline, name, None)
        if library != "diffusers" or not isinstance(network, torch.nn.Module):
            continue
        shapes = {key: tuple(t.shape) for key, t in network.state_dict().items()}
        for file in folder.weights.get(name, ()):
            for key, stored in read_header(file).shapes.items() if file != folder.checkpoint else ():
                if key in shapes and shapes[key] != stored:
                    yield f"{file}: {key} is {list(stored)}, config.json makes it {list(shapes[key])}"
                    break


def _can(class_name: str, long_prompts: str) -> bool:
    try:
        check_long_prompts(class_name, long_prompts)
    except InputError:
        return False
    return True


def _on_meta(folder: PipelineFolder, dtype: torch.dtype) -> Any:
    """An instance of the pipeline's class with real tokenizers and schedulers, and networks without numbers."""
    diffusers, _ = import_diffusers()
    kind: Any = getattr(diffusers, folder.class_name, None)
    if kind is None:
        raise InputError(f"{folder.path}: diffusers {diffusers.__version__} has no {folder.class_name}")
    parts: dict[str, Any] = dict.fromkeys(folder.absent)
    with folder.shown_alone() as shown:
        for name in folder.components:
            part = component_class(kind, folder, name)
            try:
                parts[name] = _without_weights(part, shown / name, dtype)
            except Exception as error:  # whatever the libraries make of a configuration
                raise InputError(f"{folder.path / name}: diffusers cannot read it: {error}") from error
    taken, settings = kind._get_signature_keys(kind)
    index = kind.load_config(str(folder.path))
    try:
        return kind(
            **{name: part for name, part in parts.items() if name in taken},
            **{name: index[name] for name in settings if name in index},
        )
    except Exception as error:
        raise InputError(f"{folder.path}: diffusers cannot put it together: {error}") from error


def _without_weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(str(folder), local_files_only=True)
    with torch.device(META):
        if hasattr(kind, "from_config") and not hasattr(kind, "config_class"):
            made = kind.from_config(kind.load_config(str(folder), local_files_only=True))
        else:
            config = kind.config_class.from_pretrained(str(folder), local_files_only=True)
            made = kind(config)
    return made.to(dtype).eval()


def _count(
    pipeline: Any, folder: PipelineFolder, family: Family, steps: int, guidance: float | None
) -> tuple[dict[str, int] | None, str | None]:
    """Operations per image, or why they could not be counted."""
    none = ClimbedRungs(pipeline, Rungs(), SettledPrecision(torch.float32))
    loaded = LoadedPipeline(pipeline, folder, "", META, none)
    call = PipelineCall(loaded, family, lambda: None)
    settings = Settings(family.width, family.height, 1, guidance, 1)
    arguments = call.arguments([Row("", None, 0)], settings) | {"output_type": "pt"}
    arguments.pop("callback_on_step_end", None)
    scheduler = pipeline.scheduler
    try:
        pipeline.scheduler = _passing(scheduler)
        if getattr(pipeline, "safety_checker", None) is not None:
            pipeline.safety_checker = None
        with torch.no_grad(), _MasksUnanswered():
            return count_operations(pipeline, lambda: pipeline(**arguments), steps), None
    except Exception as error:  # a pipeline may look at numbers, and there are none
        return (
            None,
            f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}".rstrip(": "),
        )
    finally:
        pipeline.scheduler = scheduler


class _MasksUnanswered(TorchDispatchMode):
    """Whether a mask hides anything decides how attention is computed, not how much of it there is: "it does" is the answer.

    Any other question about numbers that are not there stays an error.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            (asked,) = args
            if asked.device.type == META and asked.dtype == torch.bool:
                return False
        return func(*args, **(kwargs or {}))


def _passing(scheduler: Any) -> Any:
    """The same scheduler, whose steps hand on what they get: its sums are no products, and look at numbers."""
    passing = copy.copy(scheduler)
    kind = type(scheduler)

    def step(model_output: Any, timestep: Any, sample: Any, *_: Any, **more: Any) -> Any:
        return SimpleNamespace(prev_sample=sample) if more.get("return_dict", True) else (sample, sample)

    def scale_model_input(sample: Any, *_: Any, **__: Any) -> Any:
        return sample

    def set_timesteps(*arguments: Any, device: Any = None, **more: Any) -> None:
        kind.set_timesteps(passing, *arguments, **({"device": "cpu"} | more))
        passing.timesteps = torch.zeros(len(passing.timesteps), device=device or "cpu")

    replaced: dict[str, Callable[..., Any]] = {
        "step": step,
        "scale_model_input": scale_model_input,
        "set_timesteps": set_timesteps,
    }
    for name, function in replaced.items():
        if hasattr(kind, name):
            # pipelines look at what the original takes
            object.__setattr__(passing, name, functools.wraps(getattr(scheduler, name))(function))
    return passing
