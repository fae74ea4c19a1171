"""From what a user writes for a model to files on this machine, their hashes, and how other nodes come to them.

The driver of a job, and every command that draws on this machine, asks here once. Nothing is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from millijoule.workers import factories
from millijoule.workers.diffusion.pipeline_folder import INDEX, PipelineFolder, json_object
from millijoule.workers.errors import InputError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.model_files import read_header
from millijoule.workers.generators.options import GeneratorOptions, LoraChoice, ModelPart
from millijoule.workers.generators.protocol import ModelIdentity
from millijoule.workers.generators.registry import (
    PACKAGED,
    describe_model,
    is_pipeline,
    model_path,
    read_pipeline_model,
)
from millijoule.workers.loras.files import check_lora
from millijoule.workers.loras.words import lora_name
from millijoule.workers.pipeline_parts.checkpoint_layout import find_layout
from millijoule.workers.pipeline_parts.other_decoder import decoder_sha256
from millijoule.workers.pipeline_parts.scheduler_choice import check_scheduler
from millijoule.workers.sources.bucket import fetch_from_bucket
from millijoule.workers.sources.copies import ModelCopy
from millijoule.workers.sources.hub import fetch_from_hub
from millijoule.workers.sources.node_cache import WantedFile
from millijoule.workers.sources.remote_choice import component_files, lora_file, pipeline_files
from millijoule.workers.sources.words import Place, find_place

log = logging.getLogger(__name__)

#: Given the names of a place's files and a function that reads one: the names of those that are wanted.
Chooser = Callable[[Collection[str], Callable[[str], bytes]], Collection[str]]


@dataclass(frozen=True)
class ObtainedModel:
    """A model on this machine, looked at and not loaded.

    Attributes:
        model: what `load_generator` takes here.
        options: the same, with every file where it is here.
        identity: what tells the model from others.
        copies: what `model` and `options` name, for the workers of other nodes.
        commit: of the hub's repository that the model is from; None: it is not from the hub.
    """

    model: str
    options: GeneratorOptions
    identity: ModelIdentity
    copies: tuple[ModelCopy, ...] = ()
    commit: str | None = None


@dataclass(frozen=True)
class _Found:
    """Files on this machine: the folder they lie in, or the one file of it that was asked for."""

    path: Path
    copy: ModelCopy | None
    commit: str | None = None


def obtain_model(
    model: str,
    options: GeneratorOptions = GeneratorOptions(),  # noqa: B008 (frozen)
    *,
    revision: str | None = None,
    cache: str | None = None,
) -> ObtainedModel:
    """Find, fetch where it is elsewhere, and check the model and what the options put in the place of its parts.

    Args:
        model: what `--model` takes: a packaged name, a path, a hub id, an s3:// URL, "python:MODULE:FACTORY".
        options: as the user wrote them: paths of LoRAs, decoder and configurations may be hub ids and URLs, too.
        revision: of the model on the hub.
        cache: the folder into which buckets' files are fetched; None: this node's own.

    Raises:
        InputError: something is missing, is no model or LoRA or decoder, or may not be read; the message names it.
        NodeError: there is no room here for what has to be fetched.
        StoreError: storage failed.
    """
    if model in PACKAGED or model.startswith(factories.PREFIX):
        _refuse_revision(revision, model)
        return _with_parts(ObtainedModel(model, options, ModelIdentity("", "")), cache)
    place = find_place("--model", model)
    if place.kind != "hub":
        _refuse_revision(revision, model)
    if place.kind == "here":
        return _with_parts(ObtainedModel(model, options, ModelIdentity("", "")), cache)
    if place.file is not None or model.endswith(".safetensors"):
        found = _fetch("--model", place, lambda names, read: [_named(place, names)], revision, cache)
    else:
        choose = _pipeline_chooser(model, options.variant)
        found = _fetch("--model", place, choose, revision, cache)
    name = model.rstrip("/") if found.commit is None else f"{place.word}@{found.commit[:12]}"
    if place.kind == "s3":
        name = name.rpartition("/")[2].removesuffix(".safetensors")
    copies = (found.copy,) if found.copy is not None else ()
    obtained = ObtainedModel(
        str(found.path), replace(options, name=name), ModelIdentity("", ""), copies, found.commit
    )
    return _with_parts(obtained, cache)


def _refuse_revision(revision: str | None, model: str) -> None:
    if revision is not None:
        raise InputError(
            f"--revision {revision}: {model} is not a model of the hub, only those have revisions"
        )


def _with_parts(obtained: ObtainedModel, cache: str | None) -> ObtainedModel:
    """The same with decoder, configurations and LoRAs found, and the whole of it described."""
    options, copies = obtained.options, list(obtained.copies)

    def take(found: _Found) -> Path:
        if found.copy is not None:
            copies.append(found.copy)
        return found.path

    if options.config is not None:
        held = _held_by(obtained.model)
        found = _obtain("--config", options.config, _pipeline_chooser(options.config, None, held), cache)
        options = replace(options, config=str(take(found)))
    folder = read_pipeline_model(obtained.model, options)
    if options.vae is not None:
        path = take(_obtain("--vae", options.vae.path, _one_model, cache))
        options = replace(options, vae=ModelPart(str(path), decoder_sha256(path)))
    loras = [
        _named_lora(choice, take(_obtain("--lora", choice.path, _lora_chooser(choice.path), cache)), folder)
        for choice in options.loras
    ]
    _refuse_two_of_a_name(loras)
    options = replace(options, loras=tuple(loras))
    if options.scheduler is not None and folder is not None:
        check_scheduler(options.scheduler, folder.components.get("scheduler", ("", ""))[1])
    identity = describe_model(obtained.model, options)
    return replace(obtained, options=options, identity=identity, copies=tuple(copies))


def _held_by(model: str) -> tuple[str, ...]:
    """Components whose weights the checkpoint `model` has, so that no folder of configurations needs them."""
    if model.startswith(factories.PREFIX) or not is_pipeline(path := model_path(model)):
        raise InputError(f"--config: {model} is not a diffusion pipeline, only those take it")
    if path.is_dir():
        raise InputError(
            f"--config: {model} is a folder with its own configurations; only a single file takes one"
        )
    names = read_header(path).shapes
    layout = find_layout(path, names)
    held = [part for part, starts in layout.parts.items() if any(n.startswith(starts) for n in names)]
    return ("unet", "transformer", "safety_checker", *held)


def _named_lora(choice: LoraChoice, path: Path, folder: PipelineFolder | None) -> LoraChoice:
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()]
        path = path / lora_file(str(path), names)
    if folder is not None:
        check_lora(path, folder)
    return replace(
        choice, path=str(path), name=choice.name or lora_name(choice.path), sha256=file_sha256(path)
    )


def _refuse_two_of_a_name(loras: list[LoraChoice]) -> None:
    names = [choice.name for choice in loras]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--lora: two are called {name!r} by rows; rename one of the files")


# -- where files are --------------------------------------------------------------------------------------------------


def _obtain(option: str, word: str, choose: Chooser, cache: str | None) -> _Found:
    """What `word` names, on this machine; of a path here its files are listed, so that other nodes can tell theirs."""
    place = find_place(option, word)
    if place.kind != "here":
        if place.file is not None:
            return _fetch(option, place, lambda names, read: [_named(place, names)], None, cache)
        return _fetch(option, place, choose, None, cache)
    path = Path(word).expanduser().absolute()
    if path.is_file():
        return _Found(path, _copy(path.parent, [path.name]))
    names = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()]
    chosen = choose(names, lambda name: (path / name).read_bytes())
    return _Found(path, _copy(path, chosen))


def _fetch(option: str, place: Place, choose: Chooser, revision: str | None, cache: str | None) -> _Found:
    if place.kind == "s3":
        files = fetch_from_bucket(option, place.word, choose, cache)
        copy = _copy(files.folder, files.names, files.url, files.entry, cache)
        return _Found(_one_file(place.word, files.folder, files.names), copy)
    found = fetch_from_hub(
        option, place.repository, revision, lambda names, get: choose(names, lambda n: get(n).read_bytes())
    )
    path = found.folder / place.file if place.file is not None else found.folder
    return _Found(path, _copy(found.folder, found.names, cache=cache), found.commit)


def _one_file(word: str, folder: Path, names: Collection[str]) -> Path:
    return folder / next(iter(names)) if word.endswith(".safetensors") else folder


def _copy(
    folder: Path, names: Collection[str], url: str = "", entry: str = "", cache: str | None = None
) -> ModelCopy:
    files = tuple(
        WantedFile(name, (folder / name).stat().st_size, file_sha256(folder / name)) for name in sorted(names)
    )
    return ModelCopy(str(folder), files, url, entry, cache)


def _named(place: Place, names: Collection[str]) -> str:
    if place.file is None or place.file not in names:
        raise InputError(f"{place.word}: {place.repository} has no file {place.file}")
    return place.file


# -- which files are wanted -------------------------------------------------------------------------------------------


def _pipeline_chooser(where: str, variant: str | None, weights_elsewhere: Collection[str] = ()) -> Chooser:
    def choose(names: Collection[str], read: Callable[[str], bytes]) -> Collection[str]:
        if INDEX not in names:
            single = [name for name in names if name.endswith(".safetensors") and "/" not in name]
            hint = f"; of its files {', '.join(single[:5])} one can be named behind it" if single else ""
            raise InputError(f"{where}: has no {INDEX}: not a pipeline of diffusers{hint}")
        return pipeline_files(
            where, names, json_object(f"{where}/{INDEX}", read(INDEX)), variant, weights_elsewhere
        )

    return choose


def _one_model(names: Collection[str], read: Callable[[str], bytes]) -> Collection[str]:
    """The files of a folder that holds one model."""
    found, choice = component_files("", [n for n in names if "/" not in n], "diffusers", None)
    if choice is None or "config.json" not in found:
        raise InputError(
            f"--vae: has no config.json with weights beside it, but {', '.join(sorted(names)[:10])}"
        )
    return found


def _lora_chooser(where: str) -> Chooser:
    return lambda names, read: [lora_file(where, names)]
