"""From a checked folder to a pipeline of diffusers: with what the options put in the place of its parts.

A loader sees nothing but the files that were checked and hashed (`PipelineFolder.shown_alone`). Nothing is downloaded.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from millijoule.workers.diffusion.libraries import import_diffusers
from millijoule.workers.diffusion.own_classes import component_class, own_classes_in_sight
from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.pipeline_parts.other_decoder import load_decoder
from millijoule.workers.pipeline_parts.scheduler_choice import change_scheduler

log = logging.getLogger(__name__)


def open_pipeline(folder: PipelineFolder, options: GeneratorOptions, dtype: Any) -> Any:
    """The pipeline of `folder` on the CPU, its networks in `dtype`, with the decoder and scheduler of `options`.

    Raises:
        InputError: diffusers cannot load it, or an option means nothing to it.
    """
    diffusers, _ = import_diffusers()
    place = folder.checkpoint or folder.path
    with folder.shown_alone() as shown:
        parts: dict[str, Any] = {}
        if options.vae is not None:
            parts["vae"] = load_decoder(options.vae.path, folder, dtype)
        try:
            kind = getattr(diffusers, folder.class_name)
            parts |= dict.fromkeys(_absent(kind, folder))
            if folder.checkpoint is None:
                parts |= _load_encoders(folder, folder.components.keys() - parts.keys(), shown, dtype)
                with own_classes_in_sight(kind, folder):
                    pipeline = diffusers.DiffusionPipeline.from_pretrained(
                        str(shown),
                        local_files_only=True,
                        use_safetensors=True,
                        trust_remote_code=False,
                        dtype=dtype,
                        **parts,
                    )
            else:
                for name in (
                    folder.variants.keys() - parts.keys()
                ):  # what the file lacks has weights in the folder
                    parts[name] = _load_part(folder, name, shown, dtype)
                pipeline = kind.from_single_file(
                    str(folder.checkpoint), config=str(shown), local_files_only=True, dtype=dtype, **parts
                )
        except InputError:
            raise
        except Exception as error:  # whatever the libraries make of files that are not as they wrote them
            reason = str(error).replace(str(shown), str(folder.path))
            raise InputError(f"{place}: diffusers cannot load it: {reason}") from error
    _check_complete(pipeline, place)
    if options.scheduler is not None:
        change_scheduler(pipeline, options.scheduler)
    return pipeline


def _load_encoders(folder: PipelineFolder, names: Collection[str], shown: Path, dtype: Any) -> dict[str, Any]:
    """Those of the components `names` that transformers loads: it would draw weights that are not there at random."""
    _, transformers = import_diffusers()
    return {
        name: _load_part(folder, name, shown, dtype)
        for name in sorted(names)
        if isinstance(kind := _class_of(folder, name), type)
        and issubclass(kind, transformers.PreTrainedModel)
    }


def _load_part(folder: PipelineFolder, name: str, shown: Path, dtype: Any) -> Any:
    _, transformers = import_diffusers()
    kind = _class_of(folder, name)
    where: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    if not issubclass(kind, transformers.PreTrainedModel):
        return kind.from_pretrained(str(shown / name), torch_dtype=dtype, **where)
    part, info = kind.from_pretrained(str(shown / name), dtype=dtype, output_loading_info=True, **where)
    if missing := sorted(info["missing_keys"]):
        raise _incomplete(folder.path / name, missing)
    return part


def _class_of(folder: PipelineFolder, name: str) -> Any:
    diffusers, _ = import_diffusers()
    return component_class(getattr(diffusers, folder.class_name), folder, name)


def _check_complete(pipeline: Any, place: Path) -> None:
    """Raise InputError where a network of diffusers was left without some of its weights: these stay on the meta device."""
    for name, part in pipeline.components.items():
        parameters = part.named_parameters() if hasattr(part, "named_parameters") else ()
        if missing := [key for key, tensor in parameters if tensor.is_meta]:
            raise _incomplete(place / name if place.is_dir() else place, missing)


def _incomplete(place: Path, missing: list[str]) -> InputError:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return InputError(
        f"{place}: weights are missing: {missing[0]}{more}; save or download the model again, "
        "and see that config.json belongs to the weights"
    )


def _absent(kind: Any, folder: PipelineFolder) -> list[str]:
    """Components of the folder's index that are left out and that the class `kind` wants to be told of."""
    taken = inspect.signature(kind.__init__).parameters
    optional = getattr(kind, "_optional_components", ())
    return [name for name in folder.absent if name in taken and name not in optional]
