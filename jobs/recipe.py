"""Recipes of `millijoule train`: TOML files that name what to train and the settings that differ from the defaults."""

from __future__ import annotations

import importlib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from millijoule.workers.errors import InputError
from millijoule.workers.records import convert

FOLDER = Path(__file__).parent / "recipes"

#: kind of model -> its module in `workers.training`, and there the config that `[training]` fills, and the trainer
KINDS = {
    "icons": ("icons", "IconTrainingConfig", "IconTrainer"),
    "diffusion": ("diffusion", "DiffusionConfig", "DiffusionTrainer"),
    "verifier": ("verifier", "VerifierConfig", "VerifierTrainer"),
}


@dataclass(frozen=True)
class Recipe:
    """`training` is the config dataclass of the recipe's kind, `trainer` the class that takes it."""

    kind: str
    name: str
    training: Any
    trainer: Any


@dataclass(frozen=True)
class _RecipeFile:
    kind: Literal["icons", "diffusion", "verifier"]
    name: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(recipe: str, overrides: dict[str, Any]) -> Recipe:
    """Read a recipe of `recipe_names`, or that in the TOML file at the path `recipe`; `overrides` replace entries of its
    `[training]` table.

    Raises:
        InputError: no such recipe, not TOML, an unknown setting or one of the wrong type.
    """
    path = FOLDER / f"{recipe}.toml" if recipe in recipe_names() else Path(recipe)
    where = str(path)
    try:
        file = convert(_RecipeFile, tomllib.loads(path.read_text()))
        where = f"{path} [training]"
        module_name, config, trainer = KINDS[file.kind]
        module = importlib.import_module(f"millijoule.workers.training.{module_name}")
        training = convert(getattr(module, config), {**file.training, **overrides})
    except FileNotFoundError:
        raise InputError(
            f"--recipe {recipe}: no such file, and not one of {', '.join(recipe_names())}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
    return Recipe(file.kind, file.name or path.stem, training, getattr(module, trainer))
