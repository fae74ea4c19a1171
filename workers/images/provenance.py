"""What an image says of itself, whatever its format: a text for people and a JSON object for programs.

`parameters` is what every viewer of the A1111 family shows, `record` is exact where that is only readable. Nothing here knows
how a format carries them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from millijoule.workers.schemas import SCHEMA_VERSION, ImageRequest

#: Of the model hash, as A1111 prints it.
MODEL_HASH_DIGITS = 10


@dataclass(frozen=True)
class Provenance:
    """Of one image.

    Attributes:
        num_inference_steps: what was really run.
        model_name, model_sha256: as in `GeneratorInfo`.
    """

    request: ImageRequest
    width: int
    height: int
    num_inference_steps: int
    model_name: str
    model_sha256: str

    @cached_property
    def parameters(self) -> str:
        """The A1111 `parameters` text: prompt, negative prompt, then one line of settings."""
        request = self.request
        guidance = "" if request.guidance_scale is None else f"CFG scale: {request.guidance_scale:g}, "
        negative = f"Negative prompt: {request.negative_prompt}\n" if request.negative_prompt else ""
        return (
            f"{request.prompt}\n{negative}Steps: {self.num_inference_steps}, {guidance}Seed: {request.seed}, "
            f"Size: {self.width}x{self.height}, Model: {_quote(self.model_name)}, "
            f"Model hash: {self.model_sha256[:MODEL_HASH_DIGITS]}"
        )

    @cached_property
    def record(self) -> str:
        """A JSON object; ASCII, so NUL and lone surrogates survive as escapes."""
        request = self.request
        return json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "prompt_id": request.prompt_id,
                "image_index": request.image_index,
                "seed": request.seed,
                "prompt": request.prompt,
                "negative_prompt": request.negative_prompt,
                "width": self.width,
                "height": self.height,
                "num_inference_steps": self.num_inference_steps,
                "guidance_scale": request.guidance_scale,
                "model": self.model_name,
                "model_sha256": self.model_sha256,
            },
            separators=(",", ":"),
        )


def provenance_of(
    image: np.ndarray, request: ImageRequest, *, steps: int, model_name: str, model_sha256: str
) -> Provenance:
    """What `image` is.

    Args:
        image: uint8 `[height, width, 3]`.
        request: what was asked for; its prompt may hold any Unicode text.
        steps: the `num_inference_steps` that were really run.

    Raises:
        ValueError: `image` is not such an array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"prompt {request.prompt_id!r}, image {request.image_index}: expected uint8 [height, width, 3] "
            f"from model {model_name}, got {image.dtype} {list(image.shape)}"
        )
    height, width, _ = image.shape
    return Provenance(request, width, height, steps, model_name, model_sha256)


def _quote(value: str) -> str:
    """A setting's value, quoted as A1111 does where it would read as more than one setting."""
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:"\n') else value
