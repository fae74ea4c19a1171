"""CLIP score of images for their prompts, from a CLIP model the user supplies (needs `transformers`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from millijoule.workers.errors import InputError
from millijoule.workers.generators.file_hashes import file_sha256

_BATCH = 64


class ClipScore:
    """100 times the cosine of image and text embeddings, 0 at least (Hessel et al. 2021, without their factor 2.5).

    MLPerf Inference gates text-to-image models by the same number. Runs in float32 on the CPU.
    """

    name = "clip score"

    def __init__(self, folder: Path) -> None:
        """Load a folder as `CLIPModel.save_pretrained` and its processor write it; safetensors only.

        Raises:
            InputError: the folder is not there or holds no such model, or `transformers` is missing.
        """
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise InputError(f"--metric clip:{folder}: no model.safetensors there")
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise InputError(
                "--metric clip: needs `transformers`: pip install millijoule[diffusers]"
            ) from error
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._model = model.eval()
            self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--metric clip:{folder}: not a CLIP model: {error}") from error
        self.sha256 = file_sha256(weights)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        import torch

        scores: list[float] = []
        for start in range(0, len(images), _BATCH):
            inputs = self._processor(
                text=list(prompts[start : start + _BATCH]),
                images=list(images[start : start + _BATCH]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            with torch.inference_mode():
                found = self._model(**inputs)
            cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
            scores += (100 * cosine.clamp(min=0)).tolist()
        return scores
