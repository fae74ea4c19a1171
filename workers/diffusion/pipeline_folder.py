"""A text-to-image pipeline as diffusers saves it, checked before anything in it is loaded; needs neither torch nor diffusers.

Its model_index.json may name only classes of diffusers and transformers, weights are read from safetensors files alone,
and code in the directory is never run. Defaults of ours may stand beside it, in millijoule.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from millijoule.workers.errors import InputError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.model_files import read_header, refuse_lfs_pointer
from millijoule.workers.records import decode

INDEX, DEFAULTS = "model_index.json", "millijoule.json"

#: Files that can run code when they are read. They are never read; a component that has only these is refused.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")

#: `prompts` in millijoule.json: the pipeline reads captions of icon scenes (`scenes.prompts.write_caption`). Prompts are parsed,
#: and what they leave open is settled from the image's seed, as for the oscillator model.
ICON_SCENES: Literal["icon scenes"] = "icon scenes"


@dataclass(frozen=True)
class PipelineDefaults:
    """What millijoule.json may say of a pipeline."""

    name: Annotated[str, Meta(min_length=1)] | None = None  # None: that of the directory
    num_inference_steps: Annotated[int, Meta(ge=1, le=1000)] = 50
    guidance_scale: Annotated[float, Meta(ge=0, lt=1e6)] | None = None  # None: the pipeline's own default
    prompts: Literal["icon scenes"] | None = None  # None: the pipeline gets prompts as they are


@dataclass(frozen=True)
class PipelineFolder:
    """A checked directory. `components` maps a folder to its library and class."""

    path: Path
    class_name: str
    components: dict[str, tuple[str, str]]
    name: str
    defaults: PipelineDefaults
    files: tuple[Path, ...]  # everything that can influence an image

    def sha256(self) -> str:
        """The hash over all files, each by relative path and content."""
        whole = hashlib.sha256()
        for name, file in sorted((f.relative_to(self.path).as_posix(), f) for f in self.files):
            whole.update(f"{name}\0{file_sha256(file)}\n".encode())
        return whole.hexdigest()


def read_pipeline(path: Path) -> PipelineFolder:
    """Check a diffusers directory and read what it says of itself.

    Raises:
        InputError: a file is missing or broken, weights are pickled, or the directory wants code of its own to be run.
    """
    where = path / INDEX
    index = _read_json(where)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or not class_name.isidentifier():
        raise InputError(f"{where}: _class_name {class_name!r} is not the name of a diffusers pipeline")
    components = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue  # a setting of the pipeline, or an optional component that is left out
        if len(value) != 2 or not all(isinstance(v, str) and v.isidentifier() for v in value):
            raise InputError(
                f"{where}: {name} is {value}; only classes of diffusers and transformers are loaded"
            )
        components[name] = (value[0], value[1])
    if not components:
        raise InputError(f"{where}: names no components")
    files = [where]
    for name in components:
        files += _check_component(path / name)
    defaults = PipelineDefaults()
    if (path / DEFAULTS).exists():
        files.append(path / DEFAULTS)
        try:
            defaults = decode(PipelineDefaults, (path / DEFAULTS).read_bytes())
        except ValueError as error:
            raise InputError(f"{path / DEFAULTS}: {error}") from error
    name = defaults.name or path.resolve().name
    return PipelineFolder(path, class_name, components, name, defaults, tuple(files))


def _check_component(folder: Path) -> list[Path]:
    """The files of one component; models must have a config and complete safetensors."""
    if not folder.is_dir():
        raise InputError(f"{folder}: missing; {INDEX} names it as a component")
    inside = (p for p in folder.rglob("*") if not any(x.startswith(".") for x in p.relative_to(folder).parts))
    files = sorted(p for p in inside if p.is_file())
    for code in (f for f in files if f.suffix == ".py"):
        raise InputError(f"{code}: code in a model's directory is never run; remove it if it is not needed")
    weights = [f for f in files if f.suffix == ".safetensors"]
    pickled = [f for f in files if f.suffix in PICKLED]
    if pickled and not weights:
        raise InputError(
            f"{pickled[0]}: a pickled file; loading one can run any code, so it is not read. Save the pipeline with "
            "save_pretrained(DIR, safe_serialization=True) and give that directory"
        )
    config = folder / "config.json"
    if weights and not config.is_file():
        raise InputError(f"{config}: no such file")
    if config.is_file() and not weights:
        raise InputError(f"{folder}: has no .safetensors file")
    used = [f for f in files if f not in pickled]
    for file in used:
        with file.open("rb") as opened:
            refuse_lfs_pointer(file, opened.read(64))
        if file.suffix == ".json":
            content = _read_json(file)
            if file.name.endswith(".safetensors.index.json"):
                _check_shards(file, content)
    for file in weights:
        read_header(file)
    return used


def _check_shards(file: Path, content: dict[str, Any]) -> None:
    shards = content.get("weight_map")
    if not isinstance(shards, dict):
        raise InputError(f"{file}: has no weight_map")
    for name in sorted({str(v) for v in shards.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{file}: names {name!r}, which is not a safetensors file beside it")
        if not (file.parent / name).is_file():
            raise InputError(f"{file.parent / name}: no such file; {file.name} names it")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object with all that Python reads in one: schedulers have -Infinity among their settings."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    text = path.read_bytes()
    refuse_lfs_pointer(path, text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content
