"""A text-to-image pipeline as diffusers saves it, checked before anything in it is loaded; needs neither torch nor diffusers.

Its model_index.json may name only classes of diffusers and transformers, weights are read from safetensors files alone,
and code in the directory is never run. Defaults of ours may stand beside it, in millijoule.json.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from millijoule.workers.errors import InputError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.model_files import read_header, refuse_lfs_pointer
from millijoule.workers.pipeline_parts.weight_variants import (
    READ_SUFFIXES,
    WeightChoice,
    choose_weights,
    is_weight_file,
)
from millijoule.workers.records import decode
from millijoule.workers.scratch import scratch_folder

log = logging.getLogger(__name__)

INDEX, DEFAULTS = "model_index.json", "millijoule.json"

#: Files that can run code when they are read. They are never read; a component that has only these is refused.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")

#: How many steps a pipeline takes that is not told, where that is not `USUAL_STEPS`: the default of its `__call__` in diffusers.
#: Written down here so that a job is planned without importing diffusers.
OWN_STEPS: Mapping[str, int] = {
    "AmusedPipeline": 12,
    "BriaFiboPipeline": 30,
    "BriaPipeline": 30,
    "ChromaPipeline": 35,
    "Cosmos2TextToImagePipeline": 35,
    "FluxPipeline": 28,
    "IFPipeline": 100,
    "Kandinsky3Pipeline": 25,
    "KandinskyCombinedPipeline": 100,
    "KandinskyV22CombinedPipeline": 100,
    "LatentConsistencyModelPipeline": 4,
    "Lumina2Pipeline": 30,
    "LuminaPipeline": 30,
    "PRXPipeline": 28,
    "PixArtAlphaPipeline": 20,
    "PixArtSigmaPAGPipeline": 20,
    "PixArtSigmaPipeline": 20,
    "SanaPAGPipeline": 20,
    "SanaPipeline": 20,
    "SanaSprintPipeline": 2,
    "StableCascadeCombinedPipeline": 12,
    "StableDiffusion3PAGPipeline": 28,
    "StableDiffusion3Pipeline": 28,
    "WuerstchenCombinedPipeline": 12,
}
USUAL_STEPS = 50

#: `prompts` in millijoule.json: the pipeline reads captions of icon scenes (`scenes.prompts.write_caption`). Prompts are parsed,
#: and what they leave open is settled from the image's seed, as for the oscillator model.
ICON_SCENES: Literal["icon scenes"] = "icon scenes"


@dataclass(frozen=True)
class PipelineDefaults:
    """What millijoule.json may say of a pipeline."""

    name: Annotated[str, Meta(min_length=1)] | None = None  # None: that of the directory
    num_inference_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None  # None: the pipeline's own default
    guidance_scale: Annotated[float, Meta(ge=0, lt=1e6)] | None = None  # None: the pipeline's own default
    prompts: Literal["icon scenes"] | None = None  # None: the pipeline gets prompts as they are


@dataclass(frozen=True)
class PipelineFolder:
    """A checked directory: what of it is loaded, and nothing else.

    Attributes:
        components: a folder's library and class, by name.
        files: everything that can influence an image.
        shown: every file under the name a loader finds it by, relative to the directory: weights without their variant.
        weights: the safetensors files of each component that has some; for a checkpoint in one file, that file of each.
        variants: which of the weights each component has, None: the files without a variant.
        absent: components that the index says are left out.
        checkpoint: weights of all components in one file, in the layout they were published in.
    """

    path: Path
    class_name: str
    components: dict[str, tuple[str, str]]
    name: str
    defaults: PipelineDefaults
    files: tuple[Path, ...]
    shown: dict[str, Path] = field(default_factory=dict)
    weights: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    variants: dict[str, str | None] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    checkpoint: Path | None = None

    @property
    def num_inference_steps(self) -> int:
        """Steps of a request that does not say: what millijoule.json says, else the pipeline's own default."""
        return self.defaults.num_inference_steps or OWN_STEPS.get(self.class_name, USUAL_STEPS)

    def sha256(self) -> str:
        """The hash over all files, each by relative path and content, and over the steps where no file says them."""
        whole = hashlib.sha256()
        for name, file in sorted((f.relative_to(self.path).as_posix(), f) for f in self.files):
            whole.update(f"{name}\0{file_sha256(file)}\n".encode())
        if self.checkpoint is not None:
            whole.update(f"\0{file_sha256(self.checkpoint)}\n".encode())
        if self.defaults.num_inference_steps is None and self.num_inference_steps != USUAL_STEPS:
            whole.update(f"\0{self.num_inference_steps} steps\n".encode())  # a job keeps those it began with
        return whole.hexdigest()

    def weight_dtypes(self, names: Collection[str]) -> frozenset[str]:
        """The floating-point types, as safetensors names them, in which the components `names` are stored."""
        files = {file for name in names for file in self.weights.get(name, ())}
        stored = frozenset[str]().union(*(read_header(file).dtypes for file in files))
        return frozenset(kind for kind in stored if kind[0] in "FB" and kind != "BOOL")

    @contextmanager
    def shown_alone(self) -> Iterator[Path]:
        """A folder of links to `shown`: a loader finds in it what was checked and hashed, under the usual names."""
        with scratch_folder() as folder:
            for relative, file in self.shown.items():
                link = folder / relative
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
            yield folder


def read_pipeline(
    path: Path,
    *,
    variant: str | None = None,
    weights_elsewhere: Collection[str] = (),
    checkpoint: Path | None = None,
    name: str | None = None,
) -> PipelineFolder:
    """Check a diffusers directory and read what it says of itself.

    Args:
        variant: of the weights; where a component does not have it, and by default, the fullest precision.
        weights_elsewhere: components of which only configurations and vocabularies are read,
        checkpoint: and the file that has their weights.
        name: of the model; default what the directory says.

    Raises:
        InputError: a file is missing or broken, weights are pickled, no component has `variant`, or the directory wants
            code of its own to be run.
    """
    where = path / INDEX
    index = _read_json(where)
    class_name, components, absent = read_index(where, index)
    files, shown = [where], {INDEX: where}
    choices: dict[str, WeightChoice] = {}
    for component, (library, _) in components.items():
        weightless = component in weights_elsewhere
        found, choice = _check_component(path / component, library, variant, weightless=weightless)
        files += found
        shown |= {f"{component}/{file.relative_to(path / component).as_posix()}": file for file in found}
        if choice is not None:
            choices[component] = choice
            for real, usual in zip(choice.files, choice.shown, strict=True):
                shown[f"{component}/{usual}"] = shown.pop(f"{component}/{real}")
    check_variant(f"--variant {variant}: {path}", choices, variant)
    defaults = PipelineDefaults()
    if (path / DEFAULTS).exists():
        files.append(path / DEFAULTS)
        try:
            defaults = decode(PipelineDefaults, (path / DEFAULTS).read_bytes())
        except ValueError as error:
            raise InputError(f"{path / DEFAULTS}: {error}") from error
    weights = {
        component: tuple(path / component / f for f in choice.files if f.endswith(".safetensors"))
        for component, choice in choices.items()
    }
    if checkpoint is not None:
        read_header(checkpoint)
        weights |= {c: (checkpoint,) for c in weights_elsewhere if c in components}
    own = checkpoint.stem if checkpoint is not None else defaults.name or path.resolve().name
    return PipelineFolder(
        path=path,
        class_name=class_name,
        components=components,
        name=name or own,
        defaults=defaults,
        files=tuple(files),
        shown=shown,
        weights=weights,
        variants={component: choice.variant for component, choice in choices.items()},
        absent=absent,
        checkpoint=checkpoint,
    )


def read_component(path: Path, *, variant: str | None = None) -> PipelineFolder:
    """Check a folder that holds one model as diffusers saves it, config.json and weights; `class_name` is the model's.

    Raises:
        InputError: a file is missing or broken, or weights are pickled.
    """
    config = _read_json(path / "config.json")
    class_name = config.get("_class_name")
    if not isinstance(class_name, str) or not class_name.isidentifier():
        raise InputError(
            f"{path / 'config.json'}: _class_name {class_name!r} is not the name of a class of diffusers"
        )
    found, choice = _check_component(path, "diffusers", variant, weightless=False)
    if choice is None:
        raise InputError(f"{path}: has no .safetensors file")
    shown = {file.relative_to(path).as_posix(): file for file in found}
    for real, usual in zip(choice.files, choice.shown, strict=True):
        shown[usual] = shown.pop(real)
    return PipelineFolder(path, class_name, {}, path.name, PipelineDefaults(), tuple(found), shown)


def read_index(
    where: Path | str, index: dict[str, Any]
) -> tuple[str, dict[str, tuple[str, str]], tuple[str, ...]]:
    """Class, components and left-out components of a model_index.json that lies at `where`; raises InputError."""
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or not class_name.isidentifier():
        raise InputError(f"{where}: _class_name {class_name!r} is not the name of a diffusers pipeline")
    components, absent = {}, []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue  # a setting of the pipeline
        if value == [None, None]:
            absent.append(name)
            continue
        if len(value) != 2 or not all(isinstance(v, str) and v.isidentifier() for v in value):
            raise InputError(
                f"{where}: {name} is {value}; only classes of diffusers and transformers are loaded"
            )
        if Path(name).name != name:
            raise InputError(f"{where}: {name!r} is not the name of a folder beside it")
        components[name] = (value[0], value[1])
    if not components:
        raise InputError(f"{where}: names no components")
    return class_name, components, tuple(absent)


def check_variant(where: str, choices: Mapping[str, WeightChoice], variant: str | None) -> None:
    """Raise InputError where no component has `variant`; say what is taken where there was a choice."""
    others = {v for choice in choices.values() for v in (choice.variant, *choice.others)}
    if variant is not None and choices and variant not in others:
        named = ", ".join(sorted(v for v in others if v is not None)) or "none"
        raise InputError(f"{where} has no weights of that variant; its variants: {named}")
    for component, choice in choices.items():
        if variant is not None and choice.variant != variant:
            log.warning("%s: has no variant %s, %s are loaded", component, variant, _words(choice.variant))
        elif choice.others or choice.variant is not None:
            besides = ", ".join(map(_words, choice.others))
            log.info("%s: %s%s", component, _words(choice.variant), f"; besides {besides}" if besides else "")


def _words(variant: str | None) -> str:
    return "weights without a variant" if variant is None else f"weights of variant {variant}"


def _check_component(
    folder: Path, library: str, variant: str | None, *, weightless: bool
) -> tuple[list[Path], WeightChoice | None]:
    """The files of one component that are read, and which its weights are; models have a config and complete safetensors."""
    if not folder.is_dir():
        raise InputError(f"{folder}: missing; {INDEX} names it as a component")
    inside = (p for p in folder.rglob("*") if not any(x.startswith(".") for x in p.relative_to(folder).parts))
    files = sorted(p for p in inside if p.is_file())
    for code in (f for f in files if f.suffix == ".py"):
        raise InputError(f"{code}: code in a model's directory is never run; remove it if it is not needed")
    names = [f.name for f in files if f.parent == folder]
    choice = None if weightless else choose_weights(names, library, variant)
    pickled = [f for f in files if f.suffix in PICKLED]
    config = folder / "config.json"
    if choice is None and not weightless:
        if pickled:
            raise InputError(
                f"{pickled[0]}: a pickled file; loading one can run any code, so it is not read. Save the pipeline with "
                "save_pretrained(DIR, safe_serialization=True) and give that directory"
            )
        if config.is_file():
            raise InputError(f"{folder}: has no .safetensors file")
    if choice is not None and not config.is_file():
        raise InputError(f"{config}: no such file")
    chosen = set(choice.files) if choice is not None else set()
    used = [
        f
        for f in files
        if f.suffix in READ_SUFFIXES
        and (f.name in chosen or f.parent != folder or not is_weight_file(f.name))
    ]
    for file in used:
        with file.open("rb") as opened:
            refuse_lfs_pointer(file, opened.read(64))
        if file.suffix == ".json":
            content = _read_json(file)
            if choice is not None and file.name == choice.index and file.parent == folder:
                _check_shards(file, content)
        elif file.name in chosen and file.parent == folder:
            read_header(file)
    return used, choice


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
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    text = path.read_bytes()
    refuse_lfs_pointer(path, text)
    return json_object(path, text)


def json_object(where: Path | str, text: bytes) -> dict[str, Any]:
    """A JSON object with all that Python reads in one: schedulers have -Infinity among their settings; raises InputError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: not a JSON object")
    return content
