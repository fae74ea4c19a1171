"""A set of rungs as a file: what `bench ladder` recommends and `--optimize FILE` takes. TOML is for people, JSON is written."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from millijoule.workers.errors import InputError
from millijoule.workers.records import convert, encode
from millijoule.workers.rungs.rungs import Rungs

FORMAT: Literal["millijoule-rungs"] = "millijoule-rungs"
FORMAT_VERSION: Literal[1] = 1

#: A preset has a dozen lines.
MOST_BYTES = 64 * 1024


@dataclass(frozen=True)
class PresetFile:
    """What the file holds.

    Attributes:
        rungs: those that are switched on.
        engine, batch_size, cuda_graphs, fused_modules: as the options of these names; None: nothing is said.
        model: name of the model it was measured on, for people.
        model_sha256: of that model's files; None: of no one in particular. Another model takes the preset with a warning.
        measured: what the measurement said, for people; never read.
    """

    format: Literal["millijoule-rungs"]
    rungs: Rungs
    format_version: Literal[1] = FORMAT_VERSION
    engine: Literal["deepspeed", "compile", "eager"] | None = None
    batch_size: Annotated[int, Meta(ge=1)] | None = None
    cuda_graphs: bool = False
    fused_modules: bool = False
    model: str | None = None
    model_sha256: str | None = None
    measured: dict[str, Any] = field(default_factory=dict)


def read_preset(path: Path) -> PresetFile:
    """The preset in `path`, a .toml or .json file.

    Raises:
        InputError: it cannot be read, is of another format, or has a field that is unknown or of another type or range.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"--optimize {path}: more than {MOST_BYTES} bytes, not a preset")
        text = path.read_bytes().decode()
        raw = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        return convert(PresetFile, raw)
    except OSError as error:
        raise InputError(f"--optimize {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--optimize {path}: not a preset: {error}") from error


def write_preset(path: Path, preset: PresetFile) -> None:
    """Write `preset` as JSON: what is switched on, and where it was measured."""
    raw = {name: value for name, value in json.loads(encode(preset)).items() if value not in (None, False)}
    raw["rungs"] = preset.rungs.identity()
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(raw, indent=2) + "\n")
    unfinished.replace(path)
