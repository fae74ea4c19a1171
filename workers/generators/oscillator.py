"""The product's own generator, for inference: text to drive, integer core, decoder.

In go requests, out come uint8 images. The core is integers throughout. Encoder and decoder are floating point and
run on padded batches of one fixed size, so that an image does not depend on what else is in its batch. What a prompt
leaves open (a colour, a size, an arrangement) is settled from the image's seed.

A model file holds either the integer form (the product) or the float form it was made from, which is kept to be compared
with, and is also the only form of a control model without oscillators.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from millijoule.kernels.oscillator import Coupling, quantize_coupling, quantize_drive, relax
from millijoule.kernels.phase import AMPLITUDE, TURN, random_phases, sin_cos
from millijoule.workers.errors import InputError, RowError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.oscillator_model import (
    COUPLINGS,
    OscillatorConfig,
    OscillatorModel,
    PromptDrive,
    PromptEncoder,
    PromptTables,
    grid_features,
    noise_size,
    start_phases,
)
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo, read_safetensors_header
from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.scenes import CELL, IMAGE_SIZE, MAX_COUNT, complete, scene_tokens
from millijoule.workers.schemas import ImageRequest

FORMAT = "millijoule-oscillator"
FORMAT_VERSION = "4"

#: Encoder and decoder always see this many rows, on a CPU and on a GPU; the rest is padding.
FLOAT_BATCH, GPU_FLOAT_BATCH = 16, 256

#: Images per call that the worker sends: large enough for the integer product, small enough to isolate a bad prompt.
BATCH_SIZE, GPU_BATCH_SIZE = 64, 1024

#: Step counts that keep the integer step in range and the model in the regime it was trained for.
MIN_STEPS, MAX_STEPS = 4, 100

#: Multiplications, additions, shifts and look-ups per oscillator and step beside the sums; counted from `relax`.
ELEMENTWISE_OPERATIONS = 24

#: Operations per pixel that blend two colours by a share.
BLENDING_OPERATIONS = 9

_COUPLING = {name: f"coupling.{name}" for name in Coupling.__dataclass_fields__}


class OscillatorGenerator:
    """A loaded oscillator model. Build with `load`; see `Generator` for the protocol."""

    def __init__(
        self, model: OscillatorModel, coupling: Coupling | None, name: str, sha256: str, device: str
    ) -> None:
        """`coupling` of the integer form; None runs the float form with the model's own."""
        self.model = model.eval()
        self.model.encoder.double()
        self.config = model.config
        self.device = device
        self.on_gpu = device.startswith("cuda")
        self.float_batch = GPU_FLOAT_BATCH if self.on_gpu else FLOAT_BATCH
        self.model.to(device)
        self.coupling = coupling.to(device) if coupling else None
        size = self.config.image_size
        self.info = GeneratorInfo(
            name=name,
            sha256=sha256,
            width=size,
            height=size,
            num_inference_steps=self.config.steps,
            batch_size=GPU_BATCH_SIZE if self.on_gpu else BATCH_SIZE,
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
            integer = {"integer": True, "float": False}[metadata["arithmetic"]]
            tensors = load_file(path)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}: damaged model file: {error}") from error
        if not all(bool(torch.isfinite(t.float()).all()) for t in tensors.values()):
            raise InputError(f"{path}: has weights that are not finite float32 numbers")
        coupling = _take_coupling(path, tensors, config) if integer else None
        model = OscillatorModel(
            config, tables=integer
        )  # on no meta device: that would import torch._dynamo, three seconds
        if integer:
            del model.coupling
        try:
            model.load_state_dict({k: v.float() for k, v in tensors.items()})
        except RuntimeError as error:
            raise InputError(
                f"{path}: its tensors are not those of its config: {str(error).splitlines()[-1].strip()}"
            ) from error
        name = metadata.get("name", path.stem)
        return OscillatorGenerator(model, coupling, name, file_sha256(path), device)

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """Draw one image per request, all of one size and step count.

        Raises:
            InputError: a size or step count this model cannot make.
        """
        self._check(requests)
        scenes, warnings = zip(*(parse_prompt(r.prompt) for r in requests), strict=True)
        tokens = scene_tokens([complete(s, r.seed) for s, r in zip(scenes, requests, strict=True)])
        if self.coupling is not None:
            phases = self.relax(tokens, requests)
            images = self._decode([x.float() / AMPLITUDE for x in sin_cos(phases)])
        else:
            images = self._decode(self._float_waves(tokens, requests))
        return GeneratedBatch(
            images, tuple(words + _unused(r) for words, r in zip(warnings, requests, strict=True))
        )

    @torch.inference_mode()
    def relax(self, tokens: np.ndarray, requests: Sequence[ImageRequest]) -> Tensor:
        """Final phases of the integer core, int32 `[batch, n]`, for token rows `[batch, tokens]` and the requests' seeds and steps."""
        assert self.coupling is not None
        steps = requests[0].num_inference_steps or self.config.steps
        prompt = self._encode(tokens)
        dt = self.config.horizon / steps
        drive = quantize_drive(prompt.drive, prompt.source_gain, prompt.row_gain, self.coupling, dt)
        return relax(self._start(tokens, requests), self.coupling, drive, steps)

    @torch.inference_mode()
    def _float_waves(self, tokens: np.ndarray, requests: Sequence[ImageRequest]) -> list[Tensor]:
        """sin and cos `[batch, n]` of the float form, from the same start phases."""
        steps = requests[0].num_inference_steps or self.config.steps
        start = self._start(tokens, requests).cpu().numpy()
        waves = []
        size = self.float_batch
        for (part, count), (rows, _) in zip(_padded(start, size), _padded(tokens, size), strict=True):
            phases = torch.from_numpy(part).to(self.device).float() * (2 * torch.pi / TURN)
            prompt = self.model.encoder(torch.from_numpy(rows).to(self.device))
            waves.append([x[:count] for x in self.model.waves(prompt, phases, steps=steps)])
        return [torch.cat(parts) for parts in zip(*waves, strict=True)]

    def _start(self, tokens: np.ndarray, requests: Sequence[ImageRequest]) -> Tensor:
        seeds = np.array([r.seed for r in requests], dtype=np.uint64)
        noise = random_phases(seeds, noise_size(self.config))
        return start_phases(noise, torch.from_numpy(tokens), self.config).to(self.device)

    def _encode(self, tokens: np.ndarray) -> PromptDrive:
        """In double precision, so that rounding to integers is the same on every machine but for values within 1e-13
        of a boundary."""
        unique, inverse = np.unique(tokens, axis=0, return_inverse=True)
        prompts = [
            (self.model.encoder(torch.from_numpy(part).to(self.device), static=self.on_gpu), count)
            for part, count in _padded(unique, self.float_batch)
        ]
        rows = torch.from_numpy(inverse.reshape(-1)).to(self.device)
        return PromptDrive(
            *(
                torch.cat([getattr(p, name)[:count] for p, count in prompts])[rows]
                for name in PromptDrive.__dataclass_fields__
            )
        )

    @torch.inference_mode()
    def _decode(self, waves: Sequence[Tensor]) -> np.ndarray:
        """uint8 `[batch, size, size, 3]` from sin and cos `[batch, n]`."""
        images = []
        sin, cos = (_padded(x.cpu().numpy(), self.float_batch) for x in waves)
        for (s, count), (c, _) in zip(sin, cos, strict=True):
            features = grid_features(torch.from_numpy(s), torch.from_numpy(c), self.config).to(self.device)
            pixels = torch.round((self.model.decoder(features)[:count] + 1) * 127.5).clamp_(0, 255)
            images.append(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(images)

    def count_operations(self, num_inference_steps: int | None = None) -> dict[str, int]:
        """Operations per image, two per multiply-accumulate: of the text, the dynamics and the decoder.

        The text's are those of its most expensive prompts (four icons).
        """
        config = self.config
        encoder = self.model.encoder
        mlp: Any = getattr(self.model, "mlp", None)
        # look up and add drives; add, bound and apply gains
        text = config.cells * (2 * 3 * config.driven + 4 * 2 * config.channels)
        if isinstance(encoder, PromptEncoder):
            layers = [encoder.shape1, encoder.shape2, encoder.half_patch, encoder.gains, encoder.tint]
            text += MAX_COUNT * sum(2 * layer.weight.numel() for layer in layers)
        n, steps = config.oscillators, num_inference_steps or config.steps
        if mlp is not None:
            dynamics = config.cells * 2 * (mlp.hidden.weight.numel() + mlp.output.weight.numel())
        else:
            sums = 0 if config.coupling == "none" else n * (5 * config.channels + 2 * config.rank)
            dynamics = steps * (2 * 2 * sums + ELEMENTWISE_OPERATIONS * n)
        decoder: Any = self.model.decoder
        pixels = config.cells
        decoding = 2 * pixels * (decoder.input.weight.numel() + decoder.colours.weight.numel())
        for layer in decoder.up:
            decoding += 2 * pixels * layer.weight.numel()  # each input pixel meets each of 4 x 4 taps
            pixels *= 4
        decoding += 2 * pixels * (decoder.mix.weight.numel() + decoder.output.weight.numel())
        decoding += BLENDING_OPERATIONS * config.image_size**2
        return {"text": text, "dynamics": dynamics, "decoder": decoding}

    def _check(self, requests: Sequence[ImageRequest]) -> None:
        size = self.config.image_size
        for r in requests:
            if (r.width or size, r.height or size) != (size, size):
                raise RowError(f"{r.width or size}x{r.height or size}: this model makes {size}x{size} pixels")
            if not MIN_STEPS <= (r.num_inference_steps or self.config.steps) <= MAX_STEPS:
                raise RowError(
                    f"num_inference_steps {r.num_inference_steps}: this model takes {MIN_STEPS} to {MAX_STEPS}"
                )


def save_weights(
    model: OscillatorModel,
    path: Path,
    name: str,
    extra: dict[str, str] | None = None,
    *,
    integer: bool = True,
) -> None:
    """Write a trained model: with `integer`, its coupling as int8 with float32 scales, its prompt network as tables and all
    but the coupling in float16; else float32 as it was trained.

    `extra` goes into the file's metadata (training steps, seed, what it was trained on).
    """
    tensors = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    if integer:
        if model.config.coupling not in ("trained", "frozen"):
            raise ValueError(f"a model with coupling {model.config.coupling!r} has no integer form")
        assert isinstance(model.encoder, PromptEncoder)
        tables = {
            f"encoder.{k}": v for k, v in PromptTables.of(deepcopy(model.encoder).cpu()).state_dict().items()
        }
        decoder = {k: v for k, v in tensors.items() if k.startswith("decoder.")}
        tensors = {k: v.detach().to(torch.float16).contiguous() for k, v in (tables | decoder).items()}
        coupling = quantize_coupling(*(w.detach() for w in model.coupling.weights()))
        for field, key in _COUPLING.items():
            value = getattr(coupling, field)
            tensors[key] = value.contiguous() if value.dtype == torch.int8 else value.float()
    metadata = {
        **(extra or {}),
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "arithmetic": "integer" if integer else "float",
        "name": name,
        "config": json.dumps(asdict(model.config)),
    }
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        save_file({k: v.cpu() for k, v in tensors.items()}, temporary, metadata)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
        temporary.replace(path)


def _take_coupling(path: Path, tensors: dict[str, Tensor], config: OscillatorConfig) -> Coupling:
    """The int8 coupling out of `tensors`, checked."""
    n, c, r = config.oscillators, config.channels, config.rank
    shapes = {
        "local": (c, 5 * c), "local_scale": (c,), "gather": (n, r), "gather_scale": (r,), "spread": (n, r),
        "spread_scale": (n,),
    }  # fmt: skip
    found = {}
    for field, key in _COUPLING.items():
        tensor = tensors.pop(key, None)
        dtype = torch.float32 if field.endswith("scale") else torch.int8
        if tensor is None or tensor.shape != shapes[field] or tensor.dtype != dtype:
            raise InputError(f"{path}: no {key} of shape {list(shapes[field])} and type {dtype}")
        found[field] = tensor.double() if field.endswith("scale") else tensor
    return Coupling(**found)


def _padded(rows: np.ndarray, size: int) -> list[tuple[np.ndarray, int]]:
    """Slices of exactly `size` rows, the last filled up with its first row, and how many are real."""
    parts = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        filler = np.broadcast_to(part[:1], (size - len(part), *part.shape[1:]))
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
    sizes = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name not in ("coupling", "horizon", "widths")
    }
    integers = (*sizes.values(), *config.widths)
    if not all(isinstance(v, int) and 1 <= v <= 4096 for v in integers) or config.oscillators > TURN:
        raise ValueError(f"sizes out of range: {raw}")
    if (
        config.coupling not in COUPLINGS
        or config.image_size != IMAGE_SIZE
        or config.grid * CELL != IMAGE_SIZE
    ):
        raise ValueError(f"settings out of range: {raw}")
    if not 0 < config.horizon < 100:
        raise ValueError(f"settings out of range: {raw}")
    return config
