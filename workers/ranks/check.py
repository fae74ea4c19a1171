"""What cannot be spread over ranks, said before a worker starts: models, and options that do not go together with ranks."""

from __future__ import annotations

from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import read_pipeline_model

#: Denoisers that are made of layers that can be spread (`ranks.parallel`), by class; the share of their weights that is spread is most of a large one's.
DENOISERS = frozenset(
    {
        "AuraFlowTransformer2DModel",
        "ChromaTransformer2DModel",
        "FluxTransformer2DModel",
        "HunyuanDiT2DModel",
        "PixArtTransformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "UNet2DConditionModel",
        "ZImageTransformer2DModel",
    }
)

#: Where pipelines keep what is spread.
_COMPONENTS = ("unet", "transformer")


def check_ranks(model: str, options: GeneratorOptions) -> None:
    """Raise InputError, which names it, where `model` cannot be loaded with these options and `options.ranks`."""
    if options.ranks == 1:
        return
    asked = f"--ranks-per-worker {options.ranks}"
    if (folder := read_pipeline_model(model, options)) is None:
        raise InputError(
            f"{asked}: {model} is not a diffusion pipeline, only those are spread over several devices"
        )
    for name, is_given in _not_together(options).items():
        if is_given:
            raise InputError(f"{asked}: not together with {name}")
    found = [folder.components[name][1] for name in _COMPONENTS if name in folder.components]
    if not found or found[0] not in DENOISERS:
        what = f"a {found[0]}" if found else folder.class_name
        raise InputError(
            f"{asked}: {folder.name} draws with {what}, which cannot be spread (these can: {', '.join(sorted(DENOISERS))})"
        )


def _not_together(options: GeneratorOptions) -> dict[str, bool]:
    """Options, as a user knows them, that change layers that are spread, or run them as a whole."""
    rungs = options.rungs
    return {
        "--engine compile": options.engine == "compile",
        "--cuda-graphs": options.cuda_graphs,
        "--fused-modules": options.fused_modules,
        "--offload-weights": options.offload_weights,
        "--lora": bool(options.loras),
        "--quantize": rungs.quantize is not None,
        "--sparsity": rungs.sparsity is not None,
        "--fuse-qkv": rungs.fuse_qkv,
    }
