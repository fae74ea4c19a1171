"""From what a command was told to the rungs a model runs with: a preset or a file, and single switches over it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.errors import InputError
from millijoule.workers.records import convert
from millijoule.workers.rungs.check import check_rungs
from millijoule.workers.rungs.preset_file import read_preset
from millijoule.workers.rungs.presets import PRESET_NAMES, preset
from millijoule.workers.rungs.rungs import Rungs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenRungs:
    """The rungs, and what a preset file says of the options of these names (None: nothing)."""

    rungs: Rungs = Rungs()  # noqa: RUF009 (frozen)
    engine: Literal["deepspeed", "compile", "eager"] | None = None
    batch_size: int | None = None
    cuda_graphs: bool = False
    fused_modules: bool = False


def choose_rungs(
    optimize: str,
    switches: Mapping[str, Any],
    model: str,
    folder: PipelineFolder | None,
    *,
    on_gpu: bool | None = None,
) -> ChosenRungs:
    """The rungs of preset or file `optimize`, with `switches` in place of its own.

    Args:
        optimize: a preset's name, or the path of a preset file.
        switches: fields of `Rungs` that somebody gave, by name.
        model: as it was named, for messages.
        folder: its pipeline; None: it is none, and has no rungs.
        on_gpu: as `check_rungs`.

    Raises:
        InputError: a value is out of range, the file is no preset, or the pipeline cannot do what is asked.
    """
    chosen = ChosenRungs()
    if optimize not in PRESET_NAMES:
        path = Path(optimize)
        if not path.is_file():
            raise InputError(f"--optimize {optimize}: neither {', '.join(PRESET_NAMES)} nor a file")
        file = read_preset(path)
        chosen = ChosenRungs(file.rungs, file.engine, file.batch_size, file.cuda_graphs, file.fused_modules)
        if folder is not None and file.model_sha256 not in (None, folder.sha256()):
            log.warning(
                "--optimize %s was measured on %s, whose files are not those of this model: nobody knows what it does here",
                *(optimize, file.model or "another model"),
            )
    elif optimize != "none" and folder is not None:
        chosen = ChosenRungs(preset(optimize, folder))
    for name, value in switches.items():
        try:
            convert(Rungs, {name: value})
        except ValueError as error:
            why = str(error).partition(" - at ")[0]  # where it stands is said already
            raise InputError(f"--{name.replace('_', '-')} {value}: {why}") from error
    chosen = replace(chosen, rungs=replace(chosen.rungs, **switches))
    if folder is None:
        if optimize != "none" or switches:
            option = (
                f"--optimize {optimize}" if optimize != "none" else "--" + min(switches).replace("_", "-")
            )
            raise InputError(f"{option}: {model} is no diffusers pipeline, and only those have rungs")
        return chosen
    check_rungs(chosen.rungs, folder, on_gpu=on_gpu)
    return chosen
