"""Rungs that go together, per family: data, with the reason beside it.

`lossless` changes an image by rounding only. `balanced` and `max` of "icon-unet", the packaged baseline, follow from a
measurement (benchmarks/ladder/baseline.json, docs/ladder.md). Those of all other families are the field's habits, and
nobody has measured here what they do to quality: `millijoule bench ladder` does that for the model at hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.rungs.families import Family, family_of
from millijoule.workers.rungs.rungs import Rungs

PresetName = Literal["none", "lossless", "balanced", "max"]
PRESET_NAMES: tuple[PresetName, ...] = ("none", "lossless", "balanced", "max")

#: Convolutions in half precision are fastest with channels last on tensor cores.
_UNET = Rungs(precision="half", channels_last=True)
#: Transformers have no convolutions to speak of.
_TRANSFORMER = Rungs(precision="half")

_DPM = "DPMSolverMultistepScheduler"

_LADDERS: dict[Family, tuple[Rungs, Rungs, Rungs]] = {  # lossless, balanced, max
    # Its own DDIM does as well as DPM-Solver++, and channels last gain nothing on a CPU.
    "icon-unet": (
        Rungs(precision="half"),
        Rungs(precision="half", steps=15, guidance_until=0.8),
        Rungs(precision="half", steps=10, guidance_until=0.6),
    ),
    # DPM-Solver++ in 20 to 25 steps is near 50 of DDIM or PNDM (Lu et al. 2022); guidance matters least in the last steps, which
    # settle detail (Kynkaanniemi et al. 2024); deep features of a U-Net change little from step to step (Ma et al. 2023, DeepCache).
    **dict.fromkeys(
        ("sd", "sdxl"),
        (
            _UNET,
            replace(_UNET, scheduler=_DPM, steps=25, guidance_until=0.8),
            replace(_UNET, scheduler=_DPM, steps=20, guidance_until=0.6, step_cache="deep"),
        ),
    ),
    # Flow matching goes on with its own solver: the paths are nearly straight, and fewer steps do.
    "sd3": (
        _TRANSFORMER,
        replace(_TRANSFORMER, steps=24, guidance_until=0.8),
        replace(_TRANSFORMER, steps=20, guidance_until=0.6),
    ),
    **dict.fromkeys(
        ("pixart", "sana"),
        (
            _TRANSFORMER,
            replace(_TRANSFORMER, steps=18, guidance_until=0.8),
            replace(_TRANSFORMER, steps=14, guidance_until=0.6),
        ),
    ),
    # Guidance is distilled into the model: one pass per step. Taylor-expanded features skip by schedule (Liu et al. 2025).
    "flux": (
        _TRANSFORMER,
        replace(_TRANSFORMER, step_cache="taylorseer"),
        replace(_TRANSFORMER, step_cache="taylorseer", step_cache_interval=4),
    ),
    "qwen-image": (
        _TRANSFORMER,
        replace(_TRANSFORMER, steps=30, guidance_until=0.8),
        replace(_TRANSFORMER, steps=24, guidance_until=0.6),
    ),
    "other": (_TRANSFORMER, _TRANSFORMER, _TRANSFORMER),
}


def preset(name: PresetName, folder: PipelineFolder) -> Rungs:
    """The rungs of preset `name` for the pipeline in `folder`; steps are never more than its own."""
    if name == "none":
        return Rungs()
    rungs = _LADDERS[family_of(folder)][PRESET_NAMES.index(name) - 1]
    own = folder.num_inference_steps
    if rungs.steps is not None and own <= rungs.steps:  # made for few steps: its solver is part of it
        rungs = replace(rungs, steps=None, scheduler=None)
    return rungs
