"""From a checked folder to a pipeline of diffusers: with what the options put in the place of its parts.

A loader sees nothing but the files that were checked and hashed (`PipelineFolder.shown_alone`). Nothing is downloaded.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from millijoule.workers.diffusion.libraries import import_diffusers
from millijoule.workers.diffusion.own_classes import own_classes_in_sight
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
    if options.scheduler is not None:
        change_scheduler(pipeline, options.scheduler)
    return pipeline


def _load_part(folder: PipelineFolder, name: str, shown: Path, dtype: Any) -> Any:
    diffusers, transformers = import_diffusers()
    library, class_name = folder.components[name]
    libraries = {"diffusers": diffusers, "transformers": transformers}
    kind = getattr(libraries.get(library) or getattr(diffusers.pipelines, library), class_name)
    return kind.from_pretrained(
        str(shown / name), local_files_only=True, use_safetensors=True, torch_dtype=dtype
    )


def _absent(kind: Any, folder: PipelineFolder) -> list[str]:
    """Components of the folder's index that are left out and that the class `kind` wants to be told of."""
    taken = inspect.signature(kind.__init__).parameters
    optional = getattr(kind, "_optional_components", ())
    return [name for name in folder.absent if name in taken and name not in optional]


def place_of(folder: PipelineFolder) -> Path:
    """Where a message says that the model lies."""
    return folder.checkpoint or folder.path
