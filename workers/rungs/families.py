"""Families of pipelines as far as the ladder tells them apart: by the names in a folder's index, without torch."""

from __future__ import annotations

from typing import Literal

from millijoule.workers.diffusion.pipeline_folder import ICON_SCENES, PipelineFolder

Family = Literal["icon-unet", "sd", "sdxl", "sd3", "pixart", "sana", "flux", "qwen-image", "other"]

#: Beginnings of pipelines' class names, longer ones before shorter ones that they begin with.
_BEGINNINGS: tuple[tuple[str, Family], ...] = (
    ("StableDiffusionXL", "sdxl"),
    ("StableDiffusion3", "sd3"),
    ("StableDiffusionPipeline", "sd"),
    ("PixArt", "pixart"),
    ("Sana", "sana"),
    ("Flux", "flux"),
    ("QwenImage", "qwen-image"),
)

#: Components that are evaluated in every step, the last one first: of a pipeline with a prior, the decoder.
DENOISERS = ("transformer", "unet", "decoder", "prior")


def family_of(folder: PipelineFolder) -> Family:
    """The family of the pipeline in `folder`; "icon-unet" is that of the packaged baseline."""
    found: Family = "other"
    for start, family in _BEGINNINGS:
        if folder.class_name.startswith(start):
            found = family
            break
    return "icon-unet" if found == "sd" and folder.defaults.prompts == ICON_SCENES else found


def denoiser_of(folder: PipelineFolder) -> tuple[str, str]:
    """The name of the component that the ladder changes, and its class; ("", "") where there is none."""
    for name in DENOISERS:
        if name in folder.components:
            return name, folder.components[name][1]
    return "", ""


def samples_flow(folder: PipelineFolder) -> bool:
    """Whether the pipeline is of flow matching, for which schedulers of noise prediction do not work."""
    return "FlowMatch" in folder.components.get("scheduler", ("", ""))[1]
