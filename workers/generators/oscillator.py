"""The product's own generator, for inference: text to drive, integer core, decoder.

In go requests, out come uint8 images. The core is integers throughout. Encoder and decoder are floating point and
run on padded batches of one fixed size, so that an image does not depend on what else is in its batch. What a prompt
leaves open (a colour, a size, an arrangement) is settled from the image's seed.

A model file holds either the integer form (the product) or the float form it was made from, which is kept to be compared
with, and is also the only form of a control model without oscillators.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from millijoule.kernels.oscillator import Coupling, Drive, quantize_coupling, quantize_drive, relax
from millijoule.kernels.phase import AMPLITUDE, TURN, random_phases, sin_cos
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.engines.protocol import Engine
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.fixed_size import check_requests, padded, unused_settings
from millijoule.workers.generators.model_files import (
    read_own_header,
    read_settings,
    refusing_damage,
    write_model_file,
)
from millijoule.workers.generators.oscillator_model import (
    OscillatorConfig,
    OscillatorModel,
    PromptDrive,
    PromptEncoder,
    PromptTables,
    grid_features,
    noise_size,
    start_phases,
)
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo
from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.scenes import IMAGE_SIZE, MAX_COUNT, complete, scene_tokens
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
        self,
        model: OscillatorModel,
        coupling: Coupling | None,
        name: str,
        sha256: str,
        device: str,
        engine: Engine | None = None,
    ) -> None:
        """`coupling` of the integer form; None runs the float form with the model's own. `engine`: None runs it plainly."""
        self.model = model.eval()
        self.model.encoder.double()
        self.config = model.config
        self.device = device
        self.on_gpu = device.startswith("cuda")
        self.float_batch = GPU_FLOAT_BATCH if self.on_gpu else FLOAT_BATCH
        self.model.to(device)
        self.coupling = coupling.to(device) if coupling else None
        self.engine = engine or EagerEngine()
        # on a GPU every prompt takes the same way through it, on a CPU only what is there is looked up
        self.engine.prepare(self.model.encoder, "encoder", static=self.on_gpu)
        self.engine.prepare(self.model.decoder, "decoder")
        if self.coupling is not None:
            # compiled, it takes a CPU longer
            self.core = self.engine.prepare(IntegerCore(self.coupling), "core", static=self.on_gpu)
        self.info = GeneratorInfo(
            name=name,
            sha256=sha256,
            width=IMAGE_SIZE,
            height=IMAGE_SIZE,
            num_inference_steps=self.config.steps,
            batch_size=GPU_BATCH_SIZE if self.on_gpu else BATCH_SIZE,
            max_steps=MAX_STEPS,
            sizes=((IMAGE_SIZE, IMAGE_SIZE),),
        )

    @staticmethod
    def load(path: Path, *, device: str = "cpu", engine: Engine | None = None) -> OscillatorGenerator:
        """Load weights written by `save_weights`; `engine` runs them, None: PyTorch as it is.

        Raises:
            InputError: the file is not safetensors, or not a model this version knows.
        """
        metadata = read_own_header(path, "oscillator", FORMAT, FORMAT_VERSION).metadata
        with refusing_damage(path):
            config = read_settings(OscillatorConfig, metadata["config"])
            integer = {"integer": True, "float": False}[metadata["arithmetic"]]
            tensors = load_file(path)
            if not all(bool(torch.isfinite(t.float()).all()) for t in tensors.values()):
                raise ValueError("it has weights that are not finite float32 numbers")
            coupling = _take_coupling(tensors, config) if integer else None
            # on no meta device: that would import torch._dynamo, three seconds
            model = OscillatorModel(config, shipped=integer)
            model.load_state_dict({k: v.float() for k, v in tensors.items()})
        return OscillatorGenerator(
            model, coupling, metadata.get("name", path.stem), file_sha256(path), device, engine
        )

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """See `Generator`; raises RowError for a size or step count this model cannot make."""
        check_requests(requests, self.info, MIN_STEPS)
        scenes, warnings = zip(*(parse_prompt(r.prompt) for r in requests), strict=True)
        tokens = scene_tokens([complete(s, r.seed) for s, r in zip(scenes, requests, strict=True)])
        if self.coupling is not None:
            phases = self.relax(tokens, requests)
            waves = [x.float() / AMPLITUDE for x in sin_cos(phases)]
        else:
            waves = self._float_waves(tokens, requests)
        told = tuple(w + unused_settings(r) for w, r in zip(warnings, requests, strict=True))
        return GeneratedBatch(self._decode(waves), told)

    @torch.inference_mode()
    def relax(self, tokens: np.ndarray, requests: Sequence[ImageRequest]) -> Tensor:
        """Final phases of the integer core, int32 `[batch, n]`, for token rows `[batch, tokens]` and the requests' seeds and steps."""
        assert self.coupling is not None
        steps = requests[0].num_inference_steps or self.config.steps
        drive = quantize_drive(*self._encode(tokens), self.coupling, self.config.horizon / steps)
        step = (getattr(drive, name) for name in Drive.__dataclass_fields__)
        return self.core(self._start(tokens, requests), *step, steps=steps)

    @torch.inference_mode()
    def _float_waves(self, tokens: np.ndarray, requests: Sequence[ImageRequest]) -> list[Tensor]:
        """sin and cos `[batch, n]` of the float form, from the same start phases."""
        steps = requests[0].num_inference_steps or self.config.steps
        start = self._start(tokens, requests).float() * (2 * torch.pi / TURN)
        waves = []
        for rows, count in padded(len(tokens), self.float_batch):
            prompt = self.model.encoder(torch.from_numpy(tokens[rows]).to(self.device))
            waves.append([x[:count] for x in self.model.waves(prompt, start[rows], steps=steps)])
        return [torch.cat(parts) for parts in zip(*waves, strict=True)]

    def _start(self, tokens: np.ndarray, requests: Sequence[ImageRequest]) -> Tensor:
        seeds = np.array([r.seed for r in requests], dtype=np.uint64)
        noise = random_phases(seeds, noise_size(self.config))
        return start_phases(noise, torch.from_numpy(tokens), self.config).to(self.device)

    def _encode(self, tokens: np.ndarray) -> PromptDrive:
        """In double precision, so that rounding to integers is the same on every machine but for values within 1e-13
        of a boundary."""
        unique, inverse = np.unique(tokens, axis=0, return_inverse=True)
        of_request = torch.from_numpy(inverse.reshape(-1)).to(self.device)
        prompts = []
        for rows, count in padded(len(unique), self.float_batch):
            prompt = self.model.encoder(torch.from_numpy(unique[rows]).to(self.device), static=self.on_gpu)
            prompts.append([x[:count] for x in prompt])
        return PromptDrive(*(torch.cat(parts)[of_request] for parts in zip(*prompts, strict=True)))

    @torch.inference_mode()
    def _decode(self, waves: Sequence[Tensor]) -> np.ndarray:
        """uint8 `[batch, size, size, 3]` from sin and cos `[batch, n]`."""
        images = []
        for rows, count in padded(len(waves[0]), self.float_batch):
            features = grid_features(waves[0][rows], waves[1][rows], self.config)
            pixels = torch.round((self.model.decoder(features)[:count] + 1) * 127.5).clamp_(0, 255)
            images.append(pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(images)

    def count_operations(self, num_inference_steps: int | None = None) -> dict[str, int]:
        """Operations per image, two per multiply-accumulate: of the text, the dynamics and the decoder.

        The text's are those of its most expensive prompts (four icons).
        """
        config, encoder = self.config, self.model.encoder
        # look up and add drives; add, bound and apply gains
        text = config.cells * (2 * 3 * config.driven + 4 * 2 * config.channels)
        if isinstance(encoder, PromptEncoder):
            layers = [encoder.shape1, encoder.shape2, encoder.half_patch, encoder.gains, encoder.tint]
            text += MAX_COUNT * sum(2 * layer.weight.numel() for layer in layers)
        n, steps = config.oscillators, num_inference_steps or config.steps
        if config.coupling == "mlp":
            layers = [self.model.mlp.hidden, self.model.mlp.output]
            dynamics = config.cells * sum(2 * layer.weight.numel() for layer in layers)
        else:
            sums = 0 if config.coupling == "none" else n * (5 * config.channels + 2 * config.rank)
            dynamics = steps * (2 * 2 * sums + ELEMENTWISE_OPERATIONS * n)
        with self.engine.plain(), FlopCounterMode(display=False) as counter, torch.inference_mode():
            self.model.decoder(torch.zeros(1, 2 * config.read, config.grid, config.grid, device=self.device))
        decoder = counter.get_total_flops() + BLENDING_OPERATIONS * IMAGE_SIZE**2
        return {"text": text, "dynamics": dynamics, "decoder": decoder}


class IntegerCore(nn.Module):
    """`kernels.oscillator.relax` as a module, which engines can run: tensors in, a tensor out, the same bits in all of them."""

    def __init__(self, coupling: Coupling) -> None:
        super().__init__()
        self._coupling = coupling

    def forward(self, phases: Tensor, *drive: Tensor, steps: int) -> Tensor:
        """Phases int32 `[batch, n]` after `steps` steps; `drive` has the fields of `Drive` in their order."""
        return relax(phases, self._coupling, Drive(*drive), steps)


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
        tables = PromptTables.of(deepcopy(model.encoder).cpu()).state_dict(prefix="encoder.")
        decoder = {k: v for k, v in tensors.items() if k.startswith("decoder.")}
        tensors = {k: v.detach().to(torch.float16).contiguous() for k, v in (tables | decoder).items()}
        coupling = quantize_coupling(*(w.detach() for w in model.coupling.weights()))
        for field, key in _COUPLING.items():
            value = getattr(coupling, field)
            tensors[key] = value if value.dtype == torch.int8 else value.float()
    metadata = {
        **(extra or {}),
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "arithmetic": "integer" if integer else "float",
        "name": name,
        "config": json.dumps(asdict(model.config)),
    }
    write_model_file(tensors, path, metadata)


def _take_coupling(tensors: dict[str, Tensor], config: OscillatorConfig) -> Coupling:
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
            raise ValueError(f"no {key} of shape {list(shapes[field])} and type {dtype}")
        found[field] = tensor.double() if field.endswith("scale") else tensor
    return Coupling(**found)
