"""The rungs of a model that was found: what the options say of them, against what the model and its device can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import read_pipeline_model
from millijoule.workers.pipeline_parts.scheduler_choice import check_scheduler
from millijoule.workers.rungs.check import check_rungs
from millijoule.workers.rungs.choose import choose_rungs
from millijoule.workers.rungs.rungs import Rungs
from millijoule.workers.sources.obtain import ObtainedModel


def with_rungs(
    obtained: ObtainedModel, model: str, optimize: str, switches: Mapping[str, Any], *, on_gpu: bool | None
) -> ObtainedModel:
    """`obtained` with the rungs of preset or file `optimize`, and `switches` in place of its own.

    Args:
        model: as the user named it, for messages.
        on_gpu: whether it will run on one; None: not known yet.

    Raises:
        InputError: names the option that means nothing here, and why.
    """
    asked, folder = obtained.options, pipeline_of(obtained)
    chosen = choose_rungs(optimize, switches, model, folder, on_gpu=on_gpu)
    rungs = replace(chosen.rungs, scheduler=None) if asked.scheduler else chosen.rungs
    if rungs.scheduler is not None and folder is not None:
        check_scheduler(rungs.scheduler, folder.components.get("scheduler", ("", ""))[1])
    default = GeneratorOptions().engine
    options = replace(
        asked,
        rungs=rungs,
        engine=chosen.engine if chosen.engine is not None and asked.engine == default else asked.engine,
        batch_size=asked.batch_size or chosen.batch_size,
        cuda_graphs=asked.cuda_graphs or chosen.cuda_graphs,
        fused_modules=asked.fused_modules or chosen.fused_modules,
    )
    if options.offload_weights and (rungs.quantize or rungs.sparsity):
        raise InputError(
            "--offload-weights: not with --quantize or --sparsity, whose weights stay on the device"
        )
    changed = [name for name in ("fuse_qkv", "quantize", "sparsity") if getattr(rungs, name)]
    if options.loras and changed:
        raise InputError(
            f"--lora and --{changed[0].replace('_', '-')} exclude each other: a LoRA changes layers that are as they were saved"
        )
    if rungs.step_cache and (options.engine == "compile" or options.cuda_graphs):
        taken = "--cuda-graphs" if options.cuda_graphs else "--engine compile"
        raise InputError(
            f"--step-cache {rungs.step_cache} and {taken} exclude each other: it runs the denoiser as a whole"
        )
    return replace(obtained, options=options)


def pipeline_of(obtained: ObtainedModel) -> PipelineFolder | None:
    """See `read_pipeline_model`."""
    return read_pipeline_model(obtained.model, obtained.options)


def check_device(obtained: ObtainedModel, options: GeneratorOptions | None = None, *, on_gpu: bool) -> None:
    """Raise InputError, which names it, for a rung of `obtained`, run with other `options` if any, that needs another device."""
    rungs = (options or obtained.options).rungs
    if rungs != Rungs() and (folder := pipeline_of(obtained)) is not None:
        check_rungs(rungs, folder, on_gpu=on_gpu)
