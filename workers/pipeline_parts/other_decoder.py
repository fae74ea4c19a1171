"""`--vae`: another decoder in the place of the pipeline's own: a folder, or one file of weights.

A folder holds config.json and safetensors, as diffusers saves an autoencoder. A file has the pipeline's own configuration, and
its tensors are named as diffusers or as published checkpoints name them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from millijoule.workers.diffusion.libraries import import_diffusers
from millijoule.workers.diffusion.pipeline_folder import PipelineFolder, read_component
from millijoule.workers.errors import InputError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.model_files import read_header

#: How classes of autoencoders are called in diffusers.
_KIND = "Autoencoder"


def decoder_sha256(path: Path) -> str:
    """The hash of a decoder's content, without torch.

    Raises:
        InputError: it is none.
    """
    if path.is_file():
        read_header(path)
        return file_sha256(path)
    part = _read_folder(path)
    whole = hashlib.sha256()
    for name, file in sorted((f.relative_to(path).as_posix(), f) for f in part.files):
        whole.update(f"{name}\0{file_sha256(file)}\n".encode())
    return whole.hexdigest()


def load_decoder(text: str, folder: PipelineFolder, dtype: Any) -> Any:
    """The decoder at `text`, for the pipeline in `folder`; raises InputError where it cannot be loaded."""
    diffusers, _ = import_diffusers()
    path = Path(text)
    if "vae" not in folder.components:
        raise InputError(f"--vae {path}: a {folder.class_name} has no vae that could be replaced")
    try:
        if path.is_file():
            return _load_file(diffusers, path, folder, dtype)
        part = _read_folder(path)
        with part.shown_alone() as shown:
            kind = getattr(diffusers, part.class_name)
            return kind.from_pretrained(
                str(shown), local_files_only=True, use_safetensors=True, torch_dtype=dtype
            )
    except InputError:
        raise
    except Exception as error:  # whatever the library makes of such files
        raise InputError(f"--vae {path}: diffusers cannot load it: {error}") from error


def _read_folder(path: Path) -> PipelineFolder:
    part = read_component(path)
    if not part.class_name.startswith(_KIND):
        raise InputError(f"--vae {path}: is a {part.class_name}, not an autoencoder of diffusers")
    return part


def _load_file(diffusers: Any, path: Path, folder: PipelineFolder, dtype: Any) -> Any:
    config = folder.path / "vae" / "config.json"
    kind = getattr(diffusers, folder.components["vae"][1])
    if any(name.startswith(("decoder.up_blocks.", "decoder.layers.")) for name in read_header(path).shapes):
        from safetensors.torch import load_file

        vae = kind.from_config(kind.load_config(str(config.parent), local_files_only=True)).to(dtype)
        vae.load_state_dict(load_file(path))
        return vae.eval()
    return kind.from_single_file(
        str(path), config=str(config.parent), local_files_only=True, torch_dtype=dtype
    )
