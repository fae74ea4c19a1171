"""`millijoule train`: train the oscillator generator, the diffusion baseline or the verifier."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millijoule.jobs.entry import COMPLETE, run_command
from millijoule.jobs.recipe import Recipe, load_recipe
from millijoule.jobs.torch_device import torch_device
from millijoule.workers.errors import InputError, UsageError


@dataclass(frozen=True)
class TrainOptions:
    """Train a model on rendered icon scenes, by a recipe.

    Recipes that come with it: icons (the default model), coupled, baseline (a conventional diffusion model),
    baseline-continued, which takes a finished one further on a GPU, verifier, and verifier-1000, of all nouns. Needs the `train` extra for
    the icon font (pip install "millijoule[train]"), the baseline also `diffusers`. Writes checkpoint.pt every minute,
    log.jsonl, the weights (what `millijoule generate --model` takes) and, for icons, sample sheets. SIGTERM ends a run
    as --minutes does: with a checkpoint and the weights.
    """

    output: str
    """Folder for checkpoint, log, weights and samples."""

    recipe: str = "icons"
    """A recipe's name, or the path of a TOML file of your own."""

    steps: int | None = None
    """Training steps, in place of the recipe's; also sets the learning-rate schedule."""

    seed: int | None = None
    """Seed of weights, scenes and noise, in place of the recipe's."""

    minutes: float | None = None
    """Stop after this long at the latest; --resume continues."""

    resume: bool = False
    """Continue from the checkpoint in the output folder, if there is one."""

    start_from: str | None = None
    """Begin a new run with the weights of a finished one: the float.safetensors of an icons run; of a baseline its
    directory, of which the autoencoder is taken, and all else too if the recipe sets text_steps = 0."""

    device: str = "auto"
    """gpu (or one of several: cuda:1), cpu, or auto: a GPU where there is one."""

    threads: int | None = None
    """CPU threads; PyTorch's default if not given."""

    compile: bool = False
    """Compile the networks: minutes to start, then a tenth faster on a CPU, more on a GPU. For the baseline."""

    data_processes: int | None = None
    """Processes that draw training scenes ahead; by default none on a CPU, on a GPU as many as there are cores beside the
    training's own, sixteen at most."""

    sample_every: int = 500
    """Steps between sample sheets (icons only); 0 draws one at the end only."""


def run(options: TrainOptions) -> int:
    import torch

    from millijoule.workers.training.loop import run_training

    for name in ("steps", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch_device(options.device)
    overrides = {k: v for k in ("steps", "seed") if (v := getattr(options, k)) is not None}
    recipe = load_recipe(options.recipe, overrides)
    folder = Path(options.output)
    if not options.resume and (folder / "checkpoint.pt").exists():
        raise InputError(
            f"{folder}: has a checkpoint already; give --resume to continue it, or another --output"
        )
    trainer = _trainer(recipe, options, device)

    def sample(step: int) -> None:
        trainer.export(folder, recipe.name, sheet=f"samples-{step:06d}.png")

    run_training(
        trainer,
        folder,
        minutes=options.minutes,
        resume=options.resume,
        sample=sample,
        sample_every=options.sample_every if recipe.kind == "icons" else 0,
    )
    print(f"{trainer.export(folder, recipe.name)} after {trainer.step} of {recipe.training.steps} steps")
    return COMPLETE


def _trainer(recipe: Recipe, options: TrainOptions, device: str) -> Any:
    if recipe.kind == "verifier":
        for name in ("start_from", "compile", "data_processes"):
            if getattr(options, name):
                raise UsageError(f"--{name.replace('_', '-')} is for generators, not for a verifier")
        return recipe.trainer(recipe.training)
    processes = options.data_processes
    if processes is None:
        processes = min(16, len(os.sched_getaffinity(0)) - 1) if device.startswith("cuda") else 0
    if recipe.kind == "icons":
        if options.compile:
            raise UsageError("--compile is not for icons: their training runs as it is")
        trainer = recipe.trainer(recipe.training, device=device, data_processes=processes)
    else:
        trainer = recipe.trainer(
            recipe.training, device=device, compiled=options.compile, data_processes=processes
        )
    if options.start_from:
        trainer.start_from(Path(options.start_from))
    return trainer


def main(argv: list[str] | None = None) -> int:
    return run_command("train", TrainOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
