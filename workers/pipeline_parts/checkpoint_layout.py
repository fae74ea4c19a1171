"""Checkpoints in one safetensors file, as A1111 and ComfyUI keep them: which layout one has, and what it does not hold.

Such a file has weights alone. Configurations and vocabularies come from a folder of a pipeline of the same family (`--config`),
whose own weights are used only for components that the file lacks. diffusers renames the tensors; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from millijoule.workers.diffusion.pipeline_folder import INDEX, PipelineFolder, read_pipeline
from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import read_header

#: Before the names of a denoiser's tensors, where the file has other parts, too.
_DENOISER = "model.diffusion_model."


@dataclass(frozen=True)
class Layout:
    """One of the usual layouts.

    Attributes:
        family: in words.
        marks: tensors that only such files have, `_DENOISER` aside; one of them is enough.
        pipelines: classes that a folder of the family names.
        example: a hub id of the family, whose configurations fit the published sizes.
        parts: what the names of each component's tensors begin with; the denoiser is always there.
    """

    family: str
    marks: tuple[str, ...]
    pipelines: tuple[str, ...]
    example: str
    parts: Mapping[str, tuple[str, ...]]


_VAE = ("first_stage_model.", "vae.")
_FLUX_PARTS = {
    "vae": _VAE,
    "text_encoder": ("text_encoders.clip_l.",),
    "text_encoder_2": ("text_encoders.t5xxl.",),
}

#: The first that fits counts.
LAYOUTS = (
    Layout(
        "Stable Diffusion XL",
        (
            "conditioner.embedders.1.model.positional_embedding",
            "conditioner.embedders.1.model.ln_final.weight",
        ),
        ("StableDiffusionXLPipeline",),
        "stabilityai/stable-diffusion-xl-base-1.0",
        {
            "vae": _VAE,
            "text_encoder": ("conditioner.embedders.0.",),
            "text_encoder_2": ("conditioner.embedders.1.",),
        },
    ),
    Layout(
        "Stable Diffusion 2",
        ("cond_stage_model.model.token_embedding.weight",),
        ("StableDiffusionPipeline",),
        "stabilityai/stable-diffusion-2-1",
        {"vae": _VAE, "text_encoder": ("cond_stage_model.",)},
    ),
    Layout(
        "Stable Diffusion 1",
        (
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            "cond_stage_model.transformer.embeddings.token_embedding.weight",
        ),
        ("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"vae": _VAE, "text_encoder": ("cond_stage_model.",)},
    ),
    Layout(
        "Stable Diffusion 3",
        ("joint_blocks.0.context_block.adaLN_modulation.1.bias",),
        ("StableDiffusion3Pipeline",),
        "stabilityai/stable-diffusion-3-medium-diffusers",
        {
            "vae": _VAE,
            "text_encoder": ("text_encoders.clip_l.",),
            "text_encoder_2": ("text_encoders.clip_g.",),
            "text_encoder_3": ("text_encoders.t5xxl.",),
        },
    ),
    Layout(
        "Chroma",
        ("distilled_guidance_layer.in_proj.bias",),
        ("ChromaPipeline",),
        "lodestones/Chroma1-HD",
        {"vae": _VAE},
    ),
    Layout(
        "FLUX.1",
        ("double_blocks.0.img_attn.norm.key_norm.scale",),
        ("FluxPipeline",),
        "black-forest-labs/FLUX.1-schnell",
        _FLUX_PARTS,
    ),
    Layout(
        "Z-Image",
        ("layers.0.adaLN_modulation.0.weight",),
        ("ZImagePipeline",),
        "Tongyi-MAI/Z-Image-Turbo",
        {"vae": _VAE},
    ),
    Layout(
        "Lumina 2",
        ("cap_embedder.0.weight",),
        ("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
        "Alpha-VLLM/Lumina-Image-2.0",
        {"vae": _VAE},
    ),
    Layout(
        "SANA",
        ("blocks.0.cross_attn.q_linear.weight",),
        ("SanaPipeline",),
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        {"vae": _VAE},
    ),
    Layout(
        "AuraFlow",
        ("double_layers.0.attn.w2q.weight",),
        ("AuraFlowPipeline",),
        "fal/AuraFlow-v0.3",
        {"vae": _VAE},
    ),
)


def find_layout(path: Path, names: Collection[str]) -> Layout:
    """The layout of the checkpoint at `path`, which has tensors of these names; raises InputError where it is none we know."""
    plain = {name.removeprefix(_DENOISER) for name in names}
    if any(name.endswith((".scale_weight", ".scale_input")) for name in names):
        raise InputError(
            f"{path}: weights of 8 bits with scales beside them, which diffusers does not read; give the checkpoint "
            "in 16 bits"
        )
    for layout in LAYOUTS:
        if any(mark in plain for mark in layout.marks):
            return layout
    known = ", ".join(layout.family for layout in LAYOUTS)
    raise InputError(
        f"{path}: no model of ours, and not a checkpoint in one of the usual layouts ({known}). Of a LoRA, give it to "
        "--lora; of one network, give the folder of its pipeline"
    )


def read_checkpoint_model(path: Path, config: str | None, *, name: str | None = None) -> PipelineFolder:
    """The pipeline that the checkpoint at `path` and the folder `config` make together.

    Raises:
        InputError: the file is no checkpoint, there is no folder or it is of another family, or a component has weights in
            neither.
    """
    names = read_header(path).shapes
    layout = find_layout(path, names)
    if config is None:
        raise InputError(
            f"{path}: a checkpoint of {layout.family}: it holds weights alone. Give --config the folder of a pipeline of "
            f"that family (its weights are not needed), or a hub id: --config {layout.example} fetches its "
            "configurations and vocabularies, some megabytes"
        )
    folder = Path(config)
    missing = [part for part, starts in layout.parts.items() if not any(n.startswith(starts) for n in names)]
    held = [part for part in ("unet", "transformer", *layout.parts) if part not in missing]
    try:
        found = read_pipeline(folder, weights_elsewhere=(*held, "safety_checker"), checkpoint=path, name=name)
    except InputError as error:
        lacking = next((part for part in missing if str(error).startswith(f"{folder / part}: has no")), None)
        if lacking is None:
            raise
        raise InputError(
            f"{path}: has no weights of {lacking}, and neither has --config {folder}: give a folder that has them"
        ) from error
    if found.class_name not in layout.pipelines:
        raise InputError(
            f"{folder / INDEX}: a {found.class_name}, but {path} is a checkpoint of {layout.family}; --config takes "
            f"the folder of a {' or '.join(layout.pipelines)}"
        )
    return found
