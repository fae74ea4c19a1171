"""The options that say how a model is loaded and run: the same for every command that draws."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder, read_pipeline
from millijoule.workers.errors import InputError
from millijoule.workers.factories import PREFIX
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import model_path
from millijoule.workers.rungs.choose import choose_rungs
from millijoule.workers.rungs.rungs import (
    AttentionBackend,
    Precision,
    Quantization,
    Rungs,
    Sparsity,
    StepCache,
)

#: A scheduler may be given with settings, and is no switch.
_SWITCHES = {f.name for f in fields(Rungs)} - {"scheduler"}


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded and run."""

    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Most images per call of the model. Default: what suits the model on the device."""

    engine: Literal["deepspeed", "compile", "eager"] = "deepspeed"
    """What runs the networks: DeepSpeed-Inference, torch.compile, or PyTorch as it is."""

    optimize: Annotated[str, tyro.conf.arg(metavar="none|lossless|balanced|max|FILE")] = "none"
    """Of a diffusers pipeline: rungs of the ladder that go together, or a preset file of `millijoule bench ladder`.
    lossless: half precision and layouts, images change by rounding. balanced: fewer steps too. max: as few as a
    family's habits allow, and work left out of them. docs/ladder.md says what was measured; the switches below change one
    rung each, over a preset too."""

    precision: Precision | None = None
    """Number format of the denoiser: changes images by rounding. half: the device's own, float16 or bfloat16, float32 where
    it has none. Default: what suits weights and device."""

    channels_last: bool = False
    """Convolutions with channels last in memory: changes images by rounding, if at all. Faster for U-Nets in half precision."""

    fuse_qkv: bool = False
    """One matrix product for query, key and value in place of three: the same images up to rounding."""

    attention_backend: AttentionBackend | None = None
    """diffusers' attention kernel, such as flash, sage or _native_cudnn: the same images up to rounding (sage: 8 bits)."""

    quantize: Quantization | None = None
    """Linear layers of the denoiser in fewer bits (torchao): int8 and fp8 of weights and activations, -weights of weights
    alone, which saves memory and not always time. Changes images a little to visibly. fp8 and int4 need a GPU."""

    sparsity: Sparsity | None = None
    """Drop the two smaller of every four weights of the denoiser's linear layers, for sparse tensor cores. Changes images
    visibly where the model was not trained for it. Needs a GPU."""

    step_cache: StepCache | None = None
    """Take what changes little from an earlier step. deep: a U-Net's inner blocks; pyramid: attention; taylorseer:
    attention, extrapolated; first-block: all but the first block while that changes little, one image at a time. Changes
    images a little to visibly."""

    step_cache_interval: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """With --step-cache: every N-th step is computed in full, default 2."""

    step_cache_threshold: float | None = None
    """With --step-cache first-block: how much of a change counts, default 0.08."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Denoising steps of rows that do not say. Default: the model's own. Changes images."""

    guidance_until: Annotated[float | None, tyro.conf.arg(metavar="PART")] = None
    """Guidance only in the first part of the steps, 0 to 1; the rest take half the work. Changes images a little to visibly."""

    def read(self, model: str, *, on_gpu: bool | None = None) -> GeneratorOptions:
        """What these options say of `model`, as `--model` takes it, on a GPU or not (None: not known yet).

        Raises:
            InputError: names the option that cannot be, and why.
        """
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: at least 1")
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        switches = {name: value for name, value in given.items() if name in _SWITCHES}
        if self.optimize == "none" and not switches:
            return GeneratorOptions(engine=self.engine, batch_size=self.batch_size)
        chosen = choose_rungs(self.optimize, switches, model, _pipeline(model), on_gpu=on_gpu)
        engine = self.engine if chosen.engine is None or self.engine != "deepspeed" else chosen.engine
        return GeneratorOptions(
            engine=engine, batch_size=self.batch_size or chosen.batch_size, rungs=chosen.rungs
        )


def _pipeline(model: str) -> PipelineFolder | None:
    """The diffusers directory that `model` is; None where it is something else."""
    if model.startswith(PREFIX) or not (path := model_path(model)).is_dir():
        return None
    return read_pipeline(path)
