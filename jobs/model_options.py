"""The options that say how a model is loaded and run: the same for every command that draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded and run."""

    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Most images per call of the model. Default: what suits the model on the device."""

    engine: Literal["deepspeed", "compile", "eager"] = "deepspeed"
    """What runs the networks: DeepSpeed-Inference, torch.compile, or PyTorch as it is."""

    long_prompts: Literal["truncate", "reject", "chunk"] = "truncate"
    """What happens to a prompt with more tokens than the model's text encoders read: its end is not read, which `warnings`
    says with the lost words; its image is quarantined; or it is read in pieces (Stable Diffusion, SDXL, LCM)."""

    def read(self) -> GeneratorOptions:
        """What these options say; raises InputError, which names the option."""
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: at least 1")
        return GeneratorOptions(
            engine=self.engine, batch_size=self.batch_size, long_prompts=self.long_prompts
        )
