"""What a diffusion model is made of, whichever form it has: a folder, or a checkpoint in one file beside a folder of configurations."""

from __future__ import annotations

from pathlib import Path

from millijoule.workers.diffusion.families import check_long_prompts
from millijoule.workers.diffusion.pipeline_folder import PipelineFolder, read_pipeline
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.pipeline_parts.checkpoint_layout import read_checkpoint_model


def read_model(path: Path, options: GeneratorOptions) -> PipelineFolder:
    """Check the model at `path`, and that it can read prompts as `options` say.

    Raises:
        InputError: as `read_pipeline`, `read_checkpoint_model` and `check_long_prompts`.
    """
    if path.is_dir():
        folder = read_pipeline(path, variant=options.variant, name=options.name)
    else:
        folder = read_checkpoint_model(path, options.config, name=options.name)
    check_long_prompts(folder.class_name, options.long_prompts)
    return folder
