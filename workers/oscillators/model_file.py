"""The model's file: int8 weights and codes with their multipliers, bits of ink cells, levels of colours."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from millijoule.kernels.oscillator import Coupling
from millijoule.workers.generators.model_files import (
    read_own_header,
    read_settings,
    refusing_damage,
    write_model_file,
)
from millijoule.workers.oscillators.config import SIDES, VARIANTS, OscillatorConfig, layer_shapes
from millijoule.workers.oscillators.draw import Painter
from millijoule.workers.oscillators.file_format import FORMAT, FORMAT_VERSION
from millijoule.workers.oscillators.ink import BITS, InkCells
from millijoule.workers.oscillators.integer_network import IntegerNetwork, Layer
from millijoule.workers.scenes.scenes import BACKGROUNDS, COLOURS

#: Of a coupling's weights, in radians per unit of time for one of their units: with it all sums stay far inside int64.
MAX_SCALE = 100.0

LAYERS = ("read_code", "drive", "near", "enlarge", "near_again", "mix", "share")


def save_model(painter: Painter, path: Path, name: str, extra: dict[str, str] | None = None) -> None:
    """Write a model; `extra` goes into the file's metadata (training steps, seed)."""
    network = painter.network
    tensors = {
        "codes": network.codes,
        "sizes": network.sizes,
        "place": network.place,
        "ink": painter.ink.packed,
        "colours": painter.colours.to(torch.int16),
        "grounds": painter.grounds.to(torch.int16),
    }
    for layer in LAYERS:
        of: Layer = getattr(network, layer)
        tensors[f"{layer}.weights"] = of.weights
        if int(of.multiplier.abs().max()) >= 2**31:
            raise ValueError(f"{layer}: a multiplier does not fit int32")
        tensors[f"{layer}.multiplier"] = of.multiplier.to(torch.int32)
        if of.bias.any():
            tensors[f"{layer}.bias"] = of.bias
    if network.coupling is not None:
        for field in Coupling.__dataclass_fields__:
            value = getattr(network.coupling, field)
            tensors[f"coupling.{field}"] = value if value.dtype == torch.int8 else value.double()
    metadata = {
        **(extra or {}),
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": name,
        "config": json.dumps(asdict(network.config)),
    }
    write_model_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


def load_model(path: Path) -> tuple[Painter, str]:
    """The model at `path`, and its name.

    Raises:
        InputError: the file is not safetensors, not a model this version knows, or damaged.
    """
    metadata = read_own_header(path, "oscillator", FORMAT, FORMAT_VERSION).metadata
    with refusing_damage(path):
        config = read_settings(OscillatorConfig, metadata["config"])
        if config.coupling == "mlp":
            raise ValueError("a model without oscillators has no integer form")
        tensors = load_file(path)

        def take(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if key not in tensors:
                raise ValueError(f"{key} is missing")
            found = tensors.pop(key)
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise ValueError(f"{key} is {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}")
            return found

        layers = {}
        for layer, (outputs, inputs) in layer_shapes(config).items():
            bias = torch.zeros(outputs, dtype=torch.int32)
            if f"{layer}.bias" in tensors:
                bias = take(f"{layer}.bias", (outputs,), torch.int32)
            layers[layer] = Layer(
                take(f"{layer}.weights", (outputs, inputs), torch.int8),
                bias,
                take(f"{layer}.multiplier", (outputs,), torch.int32).to(torch.int64),
            )
        drives = config.cells * 3 * config.channels
        network = IntegerNetwork(
            config=config,
            codes=take("codes", (config.nouns, config.code), torch.int8),
            sizes=take("sizes", (VARIANTS, config.hidden), torch.int32),
            place=take("place", (len(SIDES), drives), torch.int32),
            coupling=_coupling(take, config),
            **layers,
        )
        painter = Painter(
            network,
            InkCells(take("ink", (config.nouns, BITS // 8), torch.uint8)),
            take("colours", (len(COLOURS), 3), torch.int16).to(torch.int64),
            take("grounds", (len(BACKGROUNDS), 3), torch.int16).to(torch.int64),
        )
        if tensors:
            raise ValueError(f"tensors of no use: {', '.join(sorted(tensors))}")
    return painter, metadata.get("name", path.stem)


def _coupling(take, config: OscillatorConfig) -> Coupling | None:  # type: ignore[no-untyped-def]
    if config.coupling == "none":
        return None
    n, c, r = config.oscillators, config.channels, config.rank
    shapes = {"local": (c, 5 * c), "gather": (n, r), "spread": (n, r)}
    scales = {"local_scale": (c,), "gather_scale": (r,), "spread_scale": (n,)}
    found = {field: take(f"coupling.{field}", shape, torch.int8) for field, shape in shapes.items()}
    for field, shape in scales.items():
        found[field] = take(f"coupling.{field}", shape, torch.float64)
        if not bool(((found[field] > 0) & (found[field] <= MAX_SCALE)).all()):
            raise ValueError(f"coupling.{field} has values that are not above 0 and at most {MAX_SCALE}")
    return Coupling(**found)
