"""What a diffusion model is made of, whichever form it has: a folder, or a checkpoint in one file beside a folder of configurations."""

from __future__ import annotations

from pathlib import Path

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder, read_pipeline
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.pipeline_parts.checkpoint_layout import read_checkpoint_model


def read_model(path: Path, options: GeneratorOptions) -> PipelineFolder:
    """Check the model at `path`; raises InputError as `read_pipeline` and `read_checkpoint_model`."""
    if path.is_dir():
        return read_pipeline(path, variant=options.variant, name=options.name)
    return read_checkpoint_model(path, options.config, name=options.name)
