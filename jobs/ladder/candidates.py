"""The rungs that the climb tries on a pipeline, in order: what saves most first, since all that comes after it is then cheaper to measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions, ModelPart
from millijoule.workers.rungs.check import check_rungs
from millijoule.workers.rungs.families import denoiser_of, samples_flow
from millijoule.workers.rungs.rungs import Rungs

#: Parts of the pipeline's own number of steps, as far as they leave two.
STEPS = (0.5, 0.3, 0.2, 0.16, 0.12)
GUIDANCE = (0.8, 0.6, 0.4)
BATCHES = (1, 4, 16, 32)
#: What only DeepSpeed does, or does its own way.
_OTHERS = {"cuda_graphs": False, "fused_modules": False}


@dataclass(frozen=True)
class Candidate:
    """One rung to try on top of those that have proved themselves.

    Attributes:
        name: for people and `--rungs`.
        what: it changes.
        rungs: fields of `Rungs` to set.
        options: fields of `GeneratorOptions` to set.
    """

    name: str
    what: str
    rungs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def on(self, standing: GeneratorOptions) -> GeneratorOptions:
        """`standing` with this rung."""
        return replace(standing, rungs=replace(standing.rungs, **self.rungs), **self.options)


def candidates(folder: PipelineFolder, *, on_gpu: bool, decoder: ModelPart | None = None) -> list[Candidate]:
    """All rungs that the pipeline in `folder` can take on the device, in the order of the climb.

    `decoder` is a smaller one to try in the place of the pipeline's own.
    """
    steps = folder.num_inference_steps
    fewer = list(dict.fromkeys(max(2, round(steps * part)) for part in STEPS if steps * part >= 1))
    solver = "" if samples_flow(folder) else "DPMSolverMultistepScheduler"
    is_unet = denoiser_of(folder)[1].startswith("UNet")
    found = [
        *(
            Candidate(f"steps-{n}", f"{n} steps in place of {steps}", {"steps": n})
            for n in fewer
            if n < steps
        ),
        *(
            Candidate(f"dpm-{n}", f"{n} steps of DPM-Solver++", {"steps": n, "scheduler": solver})
            for n in fewer
            if solver and n < steps
        ),
        *(
            Candidate(f"guidance-{part:g}", f"guidance in {part:.0%} of the steps", {"guidance_until": part})
            for part in GUIDANCE
        ),
        *(
            Candidate(
                f"{cache}-{n}",
                f"{cache} step cache, one of {n} steps in full",
                {"step_cache": cache, "step_cache_interval": n},
            )
            for cache in ("deep", "pyramid", "taylorseer")
            for n in (2, 3)
        ),
        Candidate("decoder", "another decoder", options={"vae": decoder}),
        Candidate("half", "the device's half precision", {"precision": "half"}),
        Candidate("channels-last", "convolutions with channels last", {"channels_last": is_unet}),
        Candidate("fused-qkv", "query, key and value by one product", {"fuse_qkv": True}),
        Candidate("cudnn", "attention by cuDNN", {"attention_backend": "_native_cudnn" if on_gpu else None}),
        Candidate("int8-weights", "8-bit weights of linear layers", {"quantize": "int8-weights"}),
        Candidate("int8", "8-bit weights and activations of linear layers", {"quantize": "int8"}),
        Candidate("fp8", "8-bit float weights and activations", {"quantize": "fp8"}),
        Candidate("2:4", "two of four weights", {"quantize": None, "sparsity": "2:4"}),
        Candidate("fused", "fused modules", options={"fused_modules": on_gpu}),
        Candidate("graphs", "calls replayed from CUDA graphs", options={"cuda_graphs": on_gpu}),
        Candidate("eager", "PyTorch as it is", options={"engine": "eager", **_OTHERS}),
        Candidate("compile", "torch.compile", options={"engine": "compile", **_OTHERS}),
        *(Candidate(f"batch-{n}", f"{n} images per call", options={"batch_size": n}) for n in BATCHES),
    ]
    return [c for c in found if _changes(c) and _can(c, folder, on_gpu)]


def choose(found: list[Candidate], names: tuple[str, ...]) -> list[Candidate]:
    """Those of `found` that `names` names, in the order of the climb; all for no name.

    Raises:
        InputError: there is none of that name.
    """
    known = {c.name for c in found}
    for name in names:
        if name not in known:
            raise InputError(
                f"--rungs {name}: not a rung for this pipeline here; there are {', '.join(known)}"
            )
    return [c for c in found if not names or c.name in names]


def _changes(candidate: Candidate) -> bool:
    return candidate.on(GeneratorOptions()) != GeneratorOptions()


def _can(candidate: Candidate, folder: PipelineFolder, on_gpu: bool) -> bool:
    try:
        check_rungs(replace(Rungs(), **candidate.rungs), folder, on_gpu=on_gpu)
    except InputError:
        return False
    return True
