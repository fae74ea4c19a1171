"""Which rungs a pipeline can take, said by name before anything is loaded: needs neither torch nor diffusers."""

from __future__ import annotations

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.errors import InputError
from millijoule.workers.rungs.families import denoiser_of, samples_flow
from millijoule.workers.rungs.rungs import Rungs, StepCache

#: Denoisers that get rows without guidance, then rows with it, in one batch.
GUIDED_IN_ONE_BATCH = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
)
#: Denoisers that are called twice a step, first with the prompt, then with the negative one.
GUIDED_BY_TWO_CALLS = ("FluxTransformer2DModel", "QwenImageTransformer2DModel", "ChromaTransformer2DModel")

#: Denoisers whose steps each cache was seen to skip. `pyramid` does not tell two calls of a step apart.
CACHED: dict[StepCache, tuple[str, ...]] = {
    "deep": ("UNet2DConditionModel",),
    "pyramid": GUIDED_IN_ONE_BATCH,
    "taylorseer": ("SD3Transformer2DModel", *GUIDED_BY_TWO_CALLS),
    "first-block": ("PixArtTransformer2DModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"),
}

#: Quantisations without kernels for CPUs, and what they ask of a GPU.
_GPU_ONLY = {
    "fp8": "multiplies 8-bit floats",
    "fp8-weights": "multiplies 8-bit floats",
    "int4-weights": "unpacks 4-bit weights",
}


def check_rungs(rungs: Rungs, folder: PipelineFolder, *, on_gpu: bool | None = None) -> None:
    """Refuse what the pipeline in `folder` cannot do.

    Args:
        rungs: those that are asked for.
        folder: the pipeline.
        on_gpu: what it will run on; None: not known yet, and nothing is refused for it.

    Raises:
        InputError: names the option, and why it does not work here.
    """
    _, denoiser = denoiser_of(folder)
    where = f"{folder.class_name} ({denoiser or 'no denoiser'})"
    if on_gpu is False:
        if rungs.precision == "float16":
            raise InputError(
                "--precision float16: needs a GPU; half is what this device does best, bfloat16 works on CPUs"
            )
        if rungs.quantize in _GPU_ONLY:
            why = _GPU_ONLY[rungs.quantize]
            raise InputError(
                f"--quantize {rungs.quantize}: needs a GPU that {why}; int8 and int8-weights work on CPUs"
            )
        if rungs.sparsity is not None:
            raise InputError(f"--sparsity {rungs.sparsity}: needs a GPU with sparse tensor cores")
    if rungs.sparsity is not None and rungs.quantize is not None:
        raise InputError("--sparsity and --quantize exclude each other: give one of them")
    if rungs.quantize == "fp8" and rungs.precision == "float32":
        raise InputError(
            "--quantize fp8 and --precision float32 exclude each other: give --precision bfloat16"
        )
    if rungs.step_cache is not None and denoiser not in CACHED[rungs.step_cache]:
        others = [name for name, kinds in CACHED.items() if denoiser in kinds]
        raise InputError(
            f"--step-cache {rungs.step_cache}: not for {where}; {' and '.join(others) or 'none'} would be"
        )
    if rungs.guidance_until < 1:
        if denoiser not in (*GUIDED_IN_ONE_BATCH, *GUIDED_BY_TWO_CALLS):
            raise InputError(
                f"--guidance-until {rungs.guidance_until:g}: not known how {where} is guided; "
                f"works for {', '.join((*GUIDED_IN_ONE_BATCH, *GUIDED_BY_TWO_CALLS))}"
            )
        if rungs.step_cache not in (None, "deep") and denoiser in GUIDED_IN_ONE_BATCH:
            raise InputError(
                f"--guidance-until and --step-cache {rungs.step_cache} exclude each other for {where}: "
                "what was kept of guided steps has twice the rows"
            )
    if rungs.scheduler is not None and samples_flow(folder) and not rungs.scheduler.startswith("FlowMatch"):
        raise InputError(
            f"--scheduler {rungs.scheduler}: {where} is of flow matching, which only FlowMatch... schedulers do"
        )
