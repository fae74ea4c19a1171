"""Pipelines of the Stable Diffusion families written as one file, with the names that A1111, ComfyUI and the published ones use.

The renaming is written down here from those names, not taken from the library that reads them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_as_one_file(folder: Path, path: Path) -> Path:
    """Write the pipeline in `folder`, Stable Diffusion 1 or XL, as the checkpoint `path`."""
    tensors: dict[str, torch.Tensor] = {}
    unet, vae = _weights(folder / "unet"), _weights(folder / "vae")
    layers = 1 + max(int(m[1]) for n in unet if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", n)))
    for name, tensor in unet.items():
        tensors["model.diffusion_model." + _unet_name(name, layers, unet)] = tensor
    blocks = 1 + max(int(m[1]) for n in vae if (m := re.match(r"decoder\.up_blocks\.(\d+)", n)))
    for name, tensor in vae.items():
        new = _vae_name(name, blocks)
        wide = ".attn_1." in new and new.endswith("weight") and ".norm." not in new
        tensors["first_stage_model." + new] = tensor[:, :, None, None] if wide else tensor
    first = _text(_weights(folder / "text_encoder"))
    if (folder / "text_encoder_2").is_dir():
        tensors |= {f"conditioner.embedders.0.transformer.{n}": t for n, t in first.items()}
        second = _open_clip(_text(_weights(folder / "text_encoder_2")))
        tensors |= {f"conditioner.embedders.1.model.{n}": t for n, t in second.items()}
    else:
        tensors |= {f"cond_stage_model.transformer.{n}": t for n, t in first.items()}
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, path)
    return path


def _weights(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _text(weights: dict[str, Any]) -> dict[str, Any]:
    """Names as they were before transformers dropped `text_model.`."""
    return {
        n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}": t
        for n, t in weights.items()
    }


def _unet_name(name: str, layers: int, all_names: Any) -> str:
    for ours, theirs in _AROUND.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if m := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        at = 1 + int(m[1]) * (layers + 1) + int(m[3])
        return f"input_blocks.{at}.{_part(m[2], m[4])}"
    if m := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(m[1]) + 1) * (layers + 1)}.0.op.{m[2]}"
    if m := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        at = 2 * int(m[2]) if m[1] == "resnets" else 1
        return f"middle_block.{at}." + _part(m[1], m[3]).split(".", 1)[1]
    if m := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        return f"output_blocks.{int(m[1]) * (layers + 1) + int(m[3])}.{_part(m[2], m[4])}"
    if m := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
        attends = any(n.startswith(f"up_blocks.{m[1]}.attentions.") for n in all_names)
        return f"output_blocks.{int(m[1]) * (layers + 1) + layers}.{2 if attends else 1}.conv.{m[2]}"
    raise ValueError(name)


def _part(kind: str, rest: str) -> str:
    if kind == "attentions":
        return f"1.{rest}"
    layer, _, leaf = rest.partition(".")
    return f"0.{_RESNET[layer]}.{leaf}"


def _vae_name(name: str, blocks: int) -> str:
    name = re.sub(r"(encoder)\.down_blocks\.(\d+)\.resnets\.", r"\1.down.\2.block.", name)
    name = re.sub(r"(encoder)\.down_blocks\.(\d+)\.downsamplers\.0\.", r"\1.down.\2.downsample.", name)
    name = re.sub(
        r"decoder\.up_blocks\.(\d+)\.resnets\.", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.block.", name
    )
    name = re.sub(
        r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.",
        lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.upsample.",
        name,
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
        for ours, theirs in _VAE_ATTENTION.items():
            name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def _open_clip(weights: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, tensor in weights.items():
        plain = name.removeprefix("text_model.")
        if m := re.match(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", plain):
            start = f"text_model.encoder.layers.{m[1]}.self_attn."
            parts = [weights[f"{start}{p}_proj.{m[2]}"] for p in "qkv"]
            out[f"transformer.resblocks.{m[1]}.attn.in_proj_{m[2]}"] = torch.cat(parts)
        elif ".k_proj." in plain or ".v_proj." in plain:
            continue
        elif m := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", plain):
            out[f"transformer.resblocks.{m[1]}.{_CLIP[m[2]]}.{m[3]}"] = tensor
        elif plain == "text_projection.weight":
            out["text_projection"] = tensor.T
        elif plain == "embeddings.token_embedding.weight":
            out["token_embedding.weight"] = tensor
        elif plain == "embeddings.position_embedding.weight":
            out["positional_embedding"] = tensor
        elif m := re.match(r"final_layer_norm\.(weight|bias)", plain):
            out[f"ln_final.{m[1]}"] = tensor
    return out
