"""Objects of the user's own: "python:MODULE:FACTORY" on the command line names a function that makes one."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

from millijoule.workers.errors import InputError, UsageError

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
        raise UsageError(f"{option} {name}: write python:MODULE:FACTORY")
    return parts


def check_importable(option: str, name: str) -> None:
    """Refuse a factory of a module that is nowhere on this machine, and so for none of its workers; other words are fine.

    Nothing of the user's is imported: of a module in a package only the package is looked for. Ray's workers look in the folder
    that the driver was started in, too.

    Raises:
        InputError: it is not found, or `name` is written otherwise.
    """
    if not name.startswith(PREFIX):
        return
    package = split_name(option, name)[0].partition(".")[0]
    if package in sys.modules or find_spec(package) or PathFinder.find_spec(package, [os.getcwd()]):
        return
    raise InputError(
        f"{option} {name}: no module named {package!r} is on Python's path or in this folder; PYTHONPATH may name the one it is in"
    )
