"""Objects of the user's own: "python:MODULE:FACTORY" on the command line names a function that makes one."""

from __future__ import annotations

import importlib
from typing import Any

from millijoule.workers.errors import InputError

PREFIX = "python:"


def find_factory(option: str, name: str) -> Any:
    """The function that `name`, "python:MODULE:FACTORY", is; `option` is what the user gave it to.

    Raises:
        InputError: `name` is written otherwise, or the function cannot be imported.
    """
    module, factory = split_name(option, name)
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{option} {name}: {error}") from error


def split_name(option: str, name: str) -> list[str]:
    """Module and function of `name`, which nothing is imported for; raises InputError where it is written otherwise."""
    parts = name.removeprefix(PREFIX).split(":")
    if not name.startswith(PREFIX) or len(parts) != 2 or not all(parts):
        raise InputError(f"{option} {name}: write python:MODULE:FACTORY")
    return parts
