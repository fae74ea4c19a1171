"""Which files of a listing make the model: the hub and buckets hold the same weights several times, and much besides."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from millijoule.workers.diffusion.pipeline_folder import DEFAULTS, INDEX, check_variant, read_index
from millijoule.workers.errors import InputError
from millijoule.workers.pipeline_parts.weight_variants import (
    READ_SUFFIXES,
    WeightChoice,
    choose_weights,
    is_weight_file,
)
from millijoule.workers.sources.words import PICKLED


def pipeline_files(
    where: str,
    names: Collection[str],
    index: dict[str, Any],
    variant: str | None,
    weights_elsewhere: Collection[str] = (),
) -> list[str]:
    """Names of the files of a pipeline that are loaded, of all that lie at `where`.

    Args:
        index: content of its model_index.json.
        weights_elsewhere: components of which only configurations and vocabularies are wanted.

    Raises:
        InputError: a component is not there or has only pickled weights, or no component has `variant`.
    """
    _, components, _ = read_index(f"{where}/{INDEX}", index)
    chosen = [name for name in (INDEX, DEFAULTS) if name in names]
    choices: dict[str, WeightChoice] = {}
    for component, (library, _) in components.items():
        inside = [name for name in names if name.startswith(f"{component}/")]
        if not inside:
            raise InputError(f"{where}/{component}: missing; {INDEX} names it as a component")
        found, choice = component_files(component, inside, library, variant)
        if component in weights_elsewhere:
            found, choice = [n for n in found if not is_weight_file(n)], None
        elif choice is None and (pickled := [n for n in inside if n.endswith(PICKLED)]):
            raise InputError(
                f"{where}/{pickled[0]}: a pickled file; loading one can run any code, so it is not read, and there is no "
                ".safetensors beside it. Choose another revision, or a model that has them"
            )
        chosen += found
        if choice is not None:
            choices[component] = choice
    check_variant(f"--variant {variant}: {where}", choices, variant)
    return chosen


def component_files(
    folder: str, names: Collection[str], library: str, variant: str | None
) -> tuple[list[str], WeightChoice | None]:
    """Of `names`, all in `folder` ("": at the top), those that are read for one component, and its weights among them."""
    start = f"{folder}/" if folder else ""
    direct = [name.removeprefix(start) for name in names if "/" not in name.removeprefix(start)]
    choice = choose_weights(direct, library, variant)
    weights = {start + name for name in choice.files} if choice is not None else set()
    found = [
        name
        for name in names
        if name in weights
        or (
            name.endswith(READ_SUFFIXES) and not is_weight_file(name.rpartition("/")[2]) and not _hidden(name)
        )
    ]
    return sorted(found), choice


def lora_file(where: str, names: Collection[str]) -> str:
    """The LoRA among the files of a folder.

    Raises:
        InputError: there is none, or several and none is called as diffusers calls one.
    """
    usual = "pytorch_lora_weights.safetensors"
    found = sorted(name for name in names if name.endswith(".safetensors") and not _hidden(name))
    if usual in found:
        return usual
    if len(found) == 1:
        return found[0]
    if not found:
        pickled = next((name for name in names if name.endswith(PICKLED)), None)
        why = f"only {pickled}, which is pickled and never read" if pickled else "no .safetensors file"
        raise InputError(f"--lora {where}: has {why}")
    raise InputError(
        f"--lora {where}: has several .safetensors files, name one of them: {', '.join(found[:20])}"
    )


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
