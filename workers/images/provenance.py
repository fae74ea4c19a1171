"""What an image says of itself, whatever its format: a text for people and a JSON object for programs.

`parameters` is what every viewer of the A1111 family shows, `record` is exact where that is only readable. Nothing here knows
how a format carries them.
"""

from __future__ import annotations

import json
import math
from json.encoder import encode_basestring_ascii as quote_json
from typing import NamedTuple

import numpy as np

from millijoule.workers.schemas import SCHEMA_VERSION, ImageRequest

#: Of the model hash, as A1111 prints it.
MODEL_HASH_DIGITS = 10


class Provenance(NamedTuple):
    """Of one image.

    Attributes:
        parameters: the A1111 text: prompt, negative prompt, then one line of settings.
        record: a JSON object; ASCII, so NUL and lone surrogates survive as escapes.
    """

    parameters: str
    record: str


class ModelProvenance:
    """Writes the provenance of one model's images. What all of them say is put into words once: millions of small images are the
    normal load, and the text of one would take as long as its pixels.

    Args:
        model_name, model_sha256: as in `GeneratorInfo`.
    """

    def __init__(self, model_name: str, model_sha256: str) -> None:
        self.model_name = model_name
        self._parameters_end = (
            f", Model: {_quote(model_name)}, Model hash: {model_sha256[:MODEL_HASH_DIGITS]}"
        )
        self._record_begin = f'{{"schema_version":{SCHEMA_VERSION},"prompt_id":'
        self._record_end = f',"model":{quote_json(model_name)},"model_sha256":{quote_json(model_sha256)}}}'

    def of(self, image: np.ndarray, request: ImageRequest, steps: int) -> Provenance:
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
                f"from model {self.model_name}, got {image.dtype} {list(image.shape)}"
            )
        height, width, _ = image.shape
        prompt, negative_prompt, scale = request.prompt, request.negative_prompt, request.guidance_scale
        negative = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
        guidance = "" if scale is None else f"CFG scale: {scale:g}, "
        return Provenance(
            f"{prompt}\n{negative}Steps: {steps}, {guidance}Seed: {request.seed}, "
            f"Size: {width}x{height}{self._parameters_end}",
            f'{self._record_begin}{quote_json(request.prompt_id)},"image_index":{request.image_index},'
            f'"seed":{request.seed},"prompt":{quote_json(prompt)},"negative_prompt":'
            f'{"null" if negative_prompt is None else quote_json(negative_prompt)},"width":{width},"height":{height},'
            f'"num_inference_steps":{steps},"guidance_scale":{_number(scale)}{self._record_end}',
        )


def _number(value: float | None) -> str:
    """As JSON; what it has no word for, as `json` spells it."""
    if value is None:
        return "null"
    return repr(value) if type(value) is float and math.isfinite(value) else json.dumps(value)


def _quote(value: str) -> str:
    """A setting's value, quoted as A1111 does where it would read as more than one setting."""
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:"\n') else value
