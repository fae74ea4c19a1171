"""`millijoule train`: train the oscillator generator on icon scenes and write its weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from millijoule.jobs.entry import COMPLETE, run_command


@dataclass(frozen=True)
class TrainOptions:
    """Train the default model on rendered icon scenes.

    Needs the `train` extra (pip install "millijoule[train]") for the icon font. Writes a checkpoint every five
    minutes, the weights (model.safetensors, for `millijoule generate --model`) and a sample sheet (samples.png).
    """

    output: str
    """Folder for checkpoint, weights and samples."""

    steps: int = 3400
    """Training steps; also sets the learning-rate schedule."""

    minutes: float | None = None
    """Stop after this long at the latest; --resume continues."""

    resume: bool = False
    """Continue from the checkpoint in the output folder, if there is one."""

    threads: int = 2
    """CPU threads."""

    seed: int = 0
    """Seed of weights, scenes and noise."""

    name: str = "icon-scenes-32"
    """The model's name, as images will carry it."""


def run(options: TrainOptions) -> int:
    import torch

    from millijoule.workers.oscillator import save_weights
    from millijoule.workers.training import TrainingConfig, train, write_sample_sheet

    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    config = TrainingConfig(steps=options.steps, seed=options.seed)
    trainer = train(config, folder, minutes=options.minutes, resume=options.resume)
    made = {"steps": str(trainer.step), "planned_steps": str(config.steps), "seed": str(config.seed)}
    save_weights(trainer.average, folder / "model.safetensors", options.name, made)
    write_sample_sheet(folder / "model.safetensors", folder / "samples.png")
    print(f"{folder / 'model.safetensors'} after {trainer.step} steps; look at {folder / 'samples.png'}")
    return COMPLETE


def main(argv: list[str] | None = None) -> int:
    return run_command("train", TrainOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
