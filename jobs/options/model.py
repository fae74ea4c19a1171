"""The options that say how a model is found, loaded and run: the same for every command that draws."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from millijoule.workers.errors import UsageError
from millijoule.workers.generators.options import GeneratorOptions, LoraChoice, ModelPart
from millijoule.workers.loras.words import split_option
from millijoule.workers.rungs.rungs import (
    AttentionBackend,
    Precision,
    Quantization,
    Rungs,
    Sparsity,
    StepCache,
)

if TYPE_CHECKING:
    from millijoule.workers.sources.obtain import ObtainedModel

#: A scheduler may be given with settings, and is no switch.
_SWITCHES = {f.name for f in fields(Rungs)} - {"scheduler"}


@dataclass(frozen=True)
class ModelOptions:
    """How the model is found, loaded and run."""

    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Most images per call of the model. Default: what suits the model on the device."""

    engine: Literal["deepspeed", "compile", "eager"] = "deepspeed"
    """What runs the networks: DeepSpeed-Inference, torch.compile, or PyTorch as it is. With deepspeed, the packaged oscillator
    generators draw on CPUs by their compiled kernel, where it was built, to the same pixels."""

    cuda_graphs: bool = False
    """Replay the model's calls from CUDA graphs: fewer launches, more memory. On GPUs, with engine deepspeed or compile."""

    fused_modules: bool = False
    """Run the fused forms of norms, modulations and gates, which round differently. With engine deepspeed."""

    offload_weights: bool = False
    """Keep a diffusion pipeline's denoiser in host memory and bring each layer's weights to the device as it runs, for
    models larger than the device. Slow. With engine deepspeed (its ZeRO stage 3)."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="BRANCH|TAG|COMMIT")] = None
    """Of a model on the hub. A job keeps the commit that it began with. Default: the main branch."""

    variant: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Weights of this variant, such as fp16, of a pipeline that holds several. Default: the fullest precision there is."""

    lora: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH[=WEIGHT] ...")] = ()
    """LoRAs of a diffusion pipeline: a .safetensors file, a folder, an s3:// URL or a hub id (also owner/name/FILE.safetensors).
    All of them are used for every image, each with its weight (default 1), but for rows whose column `lora` chooses among
    them by name: style, style=0.5, style+paint=0.3, none."""

    scheduler: Annotated[str | None, tyro.conf.arg(metavar="NAME[:SETTING=VALUE,...]")] = None
    """Another scheduler of diffusers in the place of the pipeline's own, such as
    DPMSolverMultistepScheduler:use_karras_sigmas=true."""

    vae: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Another decoder in the place of the pipeline's own: a folder, a .safetensors file, an s3:// URL or a hub id."""

    config: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """For a checkpoint in one file: a pipeline of the same family (folder, s3:// prefix or hub id) whose configurations and
    vocabularies are used, and whose weights only for what the file lacks."""

    model_cache: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder, on every node, for models that are fetched from buckets. Default: MILLIJOULE_CACHE, else
    ~/.cache/millijoule/models."""

    long_prompts: Literal["truncate", "reject", "chunk"] = "truncate"
    """What happens to a prompt with more tokens than the model's text encoders read: its end is not read, which `warnings`
    says with the lost words; its image is quarantined; or it is read in pieces (Stable Diffusion, SDXL, LCM)."""

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

    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Of a diffusion pipeline's images whose row says no width. Default: the pipeline's own."""

    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Of a diffusion pipeline's images whose row says no height. Default: the pipeline's own."""

    def read(self) -> GeneratorOptions:
        """What these options say, but for the rungs, which depend on the model; raises InputError, which names the option."""
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: at least 1")
        for name in ("width", "height"):
            if (side := getattr(self, name)) is not None and not 8 <= side <= 8192:
                raise UsageError(f"--{name} {side}: from 8 to 8192")
        if self.cuda_graphs and self.engine == "eager":
            raise UsageError("--cuda-graphs: engine eager has none; take --engine deepspeed or compile")
        for name in ("fused_modules", "offload_weights"):
            if getattr(self, name) and self.engine != "deepspeed":
                raise UsageError(
                    f"--{name.replace('_', '-')}: only --engine deepspeed does that, not {self.engine}"
                )
        if self.offload_weights and self.cuda_graphs:
            raise UsageError(
                "--offload-weights: weights that come and go cannot be in a CUDA graph; drop --cuda-graphs"
            )
        return GeneratorOptions(
            engine=self.engine,
            cuda_graphs=self.cuda_graphs,
            fused_modules=self.fused_modules,
            offload_weights=self.offload_weights,
            batch_size=self.batch_size,
            variant=self.variant,
            loras=tuple(map(_lora, self.lora)),
            scheduler=self.scheduler,
            vae=None if self.vae is None else ModelPart(self.vae),
            config=self.config,
            long_prompts=self.long_prompts,
            width=self.width,
            height=self.height,
        )

    def obtain(self, model: str, revision: str | None = None, *, on_gpu: bool | None = None) -> ObtainedModel:
        """The model that the word `model` names, on this machine, with these options and its rungs; see `obtain_model`.

        Args:
            revision: of the hub, where these options give none.
            on_gpu: whether it will run on one; None: not known yet.
        """
        from millijoule.jobs.set_up.model_rungs import with_rungs
        from millijoule.workers.sources.obtain import obtain_model

        obtained = obtain_model(
            model, self.read(), revision=self.revision or revision, cache=self.model_cache
        )
        if self.optimize == "none" and not self._switches:
            return obtained
        return with_rungs(obtained, model, self.optimize, self._switches, on_gpu=on_gpu)

    def optimized(
        self, obtained: ObtainedModel, model: str, optimize: str, *, on_gpu: bool | None
    ) -> GeneratorOptions:
        """How `obtained`, which `obtain` gave for the word `model`, is run with preset or file `optimize` in place of `--optimize`.

        Raises:
            InputError: as `with_rungs`.
        """
        from millijoule.jobs.set_up.model_rungs import with_rungs

        asked = self.read()
        names = ("engine", "batch_size", "cuda_graphs", "fused_modules", "rungs")
        plain = replace(obtained.options, **{name: getattr(asked, name) for name in names})
        if optimize == "none" and not self._switches:
            return plain
        found = with_rungs(replace(obtained, options=plain), model, optimize, self._switches, on_gpu=on_gpu)
        return found.options

    @property
    def _switches(self) -> dict[str, Any]:
        """Single rungs that were given, by name."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: value for name, value in given.items() if name in _SWITCHES}


def _lora(text: str) -> LoraChoice:
    try:
        return LoraChoice(*split_option(text))
    except ValueError as error:
        raise UsageError(f"--lora {text}: {error}") from error
