"""Tiny random LoRAs for the tiny pipelines, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_lora(
    pipeline_folder: Path, path: Path, seed: int, *, parts: tuple[str, ...] = ("unet",), rank: int = 2
) -> Path:
    """A LoRA of the attention layers of `parts` ("unet", "transformer", "text_encoder"), strong enough to be seen, as file `path`."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
    saved: dict[str, Any] = {}
    for part in parts:
        model = getattr(pipeline, part)
        targets = ["q_proj", "v_proj"] if part.startswith("text_encoder") else ["to_q", "to_k", "to_v"]
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        state = get_peft_model_state_dict(model)
        saved[f"{part}_lora_layers"] = (
            convert_state_dict_to_diffusers(state) if part.startswith("text_encoder") else state
        )
    pipeline.save_lora_weights(path.parent, **saved, weight_name=path.name)
    return path
