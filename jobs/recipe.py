"""Recipes of `millijoule train`: TOML files that name what to train and the settings that differ from the defaults."""

from __future__ import annotations

import tomllib
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from millijoule.workers.errors import InputError

FOLDER = Path(__file__).parent / "recipes"

#: kind of model -> module and name of the config class its `[training]` table fills
KINDS = {
    "oscillator": ("millijoule.workers.training.oscillator", "OscillatorTrainingConfig"),
    "diffusion": ("millijoule.workers.training.diffusion", "DiffusionConfig"),
    "verifier": ("millijoule.workers.training.verifier", "VerifierConfig"),
}


@dataclass(frozen=True)
class Recipe:
    """`training` is the config dataclass of the recipe's kind."""

    kind: str
    name: str
    training: Any


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(recipe: str, overrides: dict[str, Any]) -> Recipe:
    """Read a recipe that comes with the package, by name, or any other, by path.

    Args:
        recipe: a name out of `recipe_names`, or the path of a TOML file.
        overrides: entries that replace those of the `[training]` table.

    Raises:
        InputError: no such recipe, not TOML, an unknown setting or one of the wrong type.
    """
    import importlib

    path = FOLDER / f"{recipe}.toml" if recipe in recipe_names() else Path(recipe)
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"--recipe {recipe}: no such file, and not one of {', '.join(recipe_names())}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    unknown = sorted(table.keys() - {"kind", "name", "training"})
    if unknown or table.get("kind") not in KINDS:
        raise InputError(
            f"{path}: needs kind (one of {', '.join(KINDS)}), name and [training]"
            + (f"; unknown: {', '.join(unknown)}" if unknown else "")
        )
    module, name = KINDS[table["kind"]]
    config_class = getattr(importlib.import_module(module), name)
    training = fill(config_class, {**table.get("training", {}), **overrides}, f"{path} [training]")
    return Recipe(table["kind"], str(table.get("name", path.stem)), training)


def fill(config_class: type, table: dict[str, Any], where: str) -> Any:
    """A config dataclass from a table: every key must be a field, every value of its type.

    Raises:
        InputError: naming `where` and the key.
    """
    hints = typing.get_type_hints(config_class)
    names = [f.name for f in fields(config_class)]
    values = {}
    for key, value in table.items():
        if key not in names:
            raise InputError(f"{where}: unknown setting {key!r}; there are {', '.join(names)}")
        values[key] = _convert(hints[key], value, f"{where} {key}")
    return config_class(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise InputError(f"{where}: must be a table")
        return fill(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where}: must be a list")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, where) for v in value)
    if origin in (typing.Union, types.UnionType):
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where}: must be {hint.__name__}, not {value!r}")
    return value
