"""The product's own generator, for inference: text to drive, integer core, decoder.

In go requests, out come uint8 images. The core is integers throughout. Encoder and decoder are floating point and
run on padded batches of one fixed size, so that an image does not depend on what else is in its batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from millijoule.kernels.oscillator import Coupling, quantize_coupling, quantize_drive, relax, row_multipliers
from millijoule.kernels.phase import AMPLITUDE, TURN, sin_cos, start_phases
from millijoule.workers.errors import InputError
from millijoule.workers.generator import GeneratedBatch, GeneratorInfo, read_safetensors_header
from millijoule.workers.oscillator_model import OscillatorConfig, OscillatorModel, grid_features
from millijoule.workers.scenes import NUM_TOKENS, VOCABULARY, parse_prompt, scene_tokens
from millijoule.workers.schemas import ImageRequest

FORMAT = "millijoule-oscillator"
FORMAT_VERSION = "1"

#: Encoder and decoder always see this many rows; the rest is padding.
FLOAT_BATCH = 16

#: Images per call that the worker sends: large enough for the integer product, small enough to isolate a bad prompt.
BATCH_SIZE = 64

#: Step counts that keep the integer step in range and the model in the regime it was trained for.
MIN_STEPS, MAX_STEPS = 4, 100


class OscillatorGenerator:
    """A loaded oscillator model. Build with `load`; see `Generator` for the protocol."""

    def __init__(
        self, model: OscillatorModel, coupling: Coupling, name: str, sha256: str, device: str
    ) -> None:
        self.model = model.eval()
        self.model.encoder.double()
        self.coupling = coupling
        self.config = model.config
        self.device = device
        self.model.to(device)
        self._weights = coupling.weights.to(device)
        size = self.config.image_size
        self.info = GeneratorInfo(
            name=name,
            sha256=sha256,
            width=size,
            height=size,
            num_inference_steps=self.config.steps,
            batch_size=BATCH_SIZE,
            max_steps=MAX_STEPS,
            sizes=((size, size),),
        )

    @staticmethod
    def load(path: Path | str, *, device: str = "cpu") -> OscillatorGenerator:
        """Load weights written by `save_weights`.

        Raises:
            InputError: the file is not safetensors, or not a model this version knows.
        """
        path = Path(path)
        metadata = read_safetensors_header(path).get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{path}: safetensors, but not an oscillator model (its format is {metadata.get('format')!r})"
            )
        if metadata.get("version") != FORMAT_VERSION:
            raise InputError(
                f"{path}: oscillator format {metadata.get('version')}, this program reads {FORMAT_VERSION}"
            )
        try:
            config = _config_from_json(metadata["config"])
            tensors = load_file(path)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}: damaged model file: {error}") from error
        if (config.vocabulary, config.tokens) != (len(VOCABULARY), NUM_TOKENS):
            raise InputError(
                f"{path}: reads {config.vocabulary} words in {config.tokens} places, this version's vocabulary has "
                f"{len(VOCABULARY)} in {NUM_TOKENS}"
            )
        weights, scale = tensors.pop("coupling.weights", None), tensors.pop("coupling.row_scale", None)
        n = config.oscillators
        if (
            weights is None
            or scale is None
            or weights.dtype != torch.int8
            or weights.shape != (n, n)
            or scale.shape != (n,)
        ):
            raise InputError(f"{path}: no int8 coupling of shape [{n}, {n}] with row scales")
        if not all(bool(torch.isfinite(t).all()) for t in (*tensors.values(), scale)):
            raise InputError(f"{path}: has weights that are not finite numbers")
        model = OscillatorModel(config)  # on no meta device: that would import torch._dynamo, three seconds
        del model.coupling
        try:
            model.load_state_dict({k: v.float() for k, v in tensors.items()})
        except RuntimeError as error:
            raise InputError(
                f"{path}: its tensors are not those of its config: {str(error).splitlines()[-1].strip()}"
            ) from error
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return OscillatorGenerator(
            model, Coupling(weights, scale.double()), metadata.get("name", path.stem), sha256, device
        )

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """Draw one image per request, all of one size and step count.

        Raises:
            InputError: a size or step count this model cannot make.
        """
        self._check(requests)
        scenes, warnings = zip(*(parse_prompt(r.prompt) for r in requests), strict=True)
        phases = self.relax(scene_tokens(scenes), requests)
        images = self._decode(phases)
        return GeneratedBatch(
            images, tuple(words + _unused(r) for words, r in zip(warnings, requests, strict=True))
        )

    @torch.inference_mode()
    def relax(self, tokens: np.ndarray, requests: Sequence[ImageRequest]) -> Tensor:
        """Final phases, int32 `[batch, n]`, for token rows `[batch, tokens]` and the requests' seeds and steps."""
        steps = requests[0].num_inference_steps or self.config.steps
        dt = self.config.horizon / steps
        drive = quantize_drive(self._encode(tokens), dt)
        seeds = np.array([r.seed for r in requests], dtype=np.uint64)
        phases = start_phases(seeds, self.config.oscillators).to(self.device)
        multipliers = row_multipliers(self.coupling.row_scale, dt).to(self.device)
        return relax(phases, self._weights, multipliers, drive, steps)

    def _encode(self, tokens: np.ndarray) -> Tensor:
        """float64 `[batch, 3, n]`. In double precision, so that rounding to integers is the same on every machine
        but for values within 1e-13 of a boundary."""
        unique, inverse = np.unique(tokens, axis=0, return_inverse=True)
        rows = [
            self.model.encoder(torch.from_numpy(part).to(self.device))[:count]
            for part, count in _padded(unique)
        ]
        return torch.cat(rows)[torch.from_numpy(inverse.reshape(-1)).to(self.device)]

    @torch.inference_mode()
    def _decode(self, phases: Tensor) -> np.ndarray:
        """uint8 `[batch, size, size, 3]`."""
        images = []
        for part, count in _padded(phases.cpu().numpy()):
            sin, cos = sin_cos(torch.from_numpy(part).to(self.device))
            features = grid_features(sin.float() / AMPLITUDE, cos.float() / AMPLITUDE, self.config)
            pixels = torch.round((self.model.decoder(features)[:count] + 1) * 127.5).clamp_(0, 255)
            images.append(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(images)

    def _check(self, requests: Sequence[ImageRequest]) -> None:
        size = self.config.image_size
        for r in requests:
            if (r.width or size, r.height or size) != (size, size):
                raise InputError(
                    f"{r.width or size}x{r.height or size}: this model makes {size}x{size} pixels"
                )
            if not MIN_STEPS <= (r.num_inference_steps or self.config.steps) <= MAX_STEPS:
                raise InputError(
                    f"num_inference_steps {r.num_inference_steps}: this model takes {MIN_STEPS} to {MAX_STEPS}"
                )


def save_weights(model: OscillatorModel, path: Path, name: str, extra: dict[str, str] | None = None) -> None:
    """Write the integer form of a trained model: int8 coupling with float32 row scales, the rest in float16.

    `extra` goes into the file's metadata (training steps, seed, what it was trained on).
    """
    coupling = quantize_coupling(model.coupling_matrix().detach())
    tensors = {
        key: value.detach().to(torch.float16).contiguous()
        for key, value in model.state_dict().items()
        if key != "coupling"
    }
    tensors["coupling.weights"] = coupling.weights.contiguous()
    tensors["coupling.row_scale"] = coupling.row_scale.float()
    metadata = {
        **(extra or {}),
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": name,
        "config": json.dumps(asdict(model.config)),
    }
    save_file(tensors, path, metadata)


def _padded(rows: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Slices of exactly `FLOAT_BATCH` rows, the last filled up with its first row, and how many are real."""
    parts = []
    for start in range(0, len(rows), FLOAT_BATCH):
        part = rows[start : start + FLOAT_BATCH]
        filler = np.broadcast_to(part[:1], (FLOAT_BATCH - len(part), *part.shape[1:]))
        parts.append((np.concatenate([part, filler]), len(part)))
    return parts


def _unused(request: ImageRequest) -> tuple[str, ...]:
    """What the request asked for that this model does not do."""
    words = []
    if request.guidance_scale is not None:
        words.append("guidance_scale is not used by this model")
    if request.negative_prompt:
        words.append("negative_prompt is not used by this model")
    return tuple(words)


def _config_from_json(text: str) -> OscillatorConfig:
    raw: dict[str, Any] = json.loads(text)
    names = {f.name for f in fields(OscillatorConfig)}
    if set(raw) != names:
        raise ValueError(f"config has {sorted(raw)}, expected {sorted(names)}")
    config = OscillatorConfig(**{**raw, "widths": tuple(raw["widths"])})
    integers = (config.grid, config.channels, config.hidden, config.token_width, config.steps, *config.widths)
    if not all(isinstance(v, int) and 1 <= v <= 4096 for v in integers) or config.oscillators > TURN:
        raise ValueError(f"sizes out of range: {raw}")
    return config
