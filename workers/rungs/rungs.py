"""The switches of the ladder, as one value: which of them a pipeline runs with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from msgspec import Meta

Precision = Literal["float32", "bfloat16", "float16", "half"]
Quantization = Literal["int8-weights", "int8", "int4-weights", "fp8-weights", "fp8"]
Sparsity = Literal["2:4"]
StepCache = Literal["deep", "pyramid", "taylorseer", "first-block"]
AttentionBackend = Literal[
    "native",
    "_native_math",
    "_native_flash",
    "_native_efficient",
    "_native_cudnn",
    "flash",
    "_flash_3",
    "sage",
    "xformers",
]

#: A name of a class, never a path.
SchedulerName = Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9]{0,99}$")]


@dataclass(frozen=True)
class Rungs:
    """Each field is one rung; the default of each changes nothing.

    Attributes:
        precision: of weights and activations; "half" is the device's own half precision: float16 on a GPU where weights are
            stored so, else bfloat16 where the device multiplies it, else float32. None: what suits weights and device.
        channels_last: convolutions see pixels before channels in memory.
        fuse_qkv: one product in place of three for query, key and value.
        attention_backend: diffusers' name of the attention kernel.
        quantize: of the denoiser's linear layers (torchao); "int8" and "fp8" are weights and activations.
        sparsity: two of four neighbouring weights of the denoiser's linear layers become zero.
        step_cache: what of a step is taken from an earlier one. Which steps those are follows from the schedule alone, except
            for "first-block", which looks at the image and therefore draws alone.
        step_cache_interval: every so many steps are computed in full.
        step_cache_threshold: of "first-block": how much the first block's output may have changed.
        scheduler: name of a diffusers class in place of the pipeline's own.
        steps: denoising steps, for requests that do not say.
        guidance_until: guidance ends after this part of the schedule.
    """

    precision: Precision | None = None
    channels_last: bool = False
    fuse_qkv: bool = False
    attention_backend: AttentionBackend | None = None
    quantize: Quantization | None = None
    sparsity: Sparsity | None = None
    step_cache: StepCache | None = None
    step_cache_interval: Annotated[int, Meta(ge=2, le=100)] = 2
    step_cache_threshold: Annotated[float, Meta(gt=0, le=1)] = 0.08
    scheduler: SchedulerName | None = None
    steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance_until: Annotated[float, Meta(ge=0, le=1)] = 1.0

    def identity(self) -> dict[str, Any]:
        """The rungs that are not at their default, by name, as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def by_step(self) -> bool:
        """Whether some steps need less work than others."""
        return self.step_cache is not None or self.guidance_until < 1

    def words(self) -> str:
        """The rungs in one line, as options: `--precision half --guidance-until 0.6`; "none" where there are none."""
        said = []
        for name, value in self.identity().items():
            option = "--" + name.replace("_", "-")
            said.append(option if value is True else f"{option} {value}")
        return " ".join(said) or "none"
