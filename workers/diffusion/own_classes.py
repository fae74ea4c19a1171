"""Networks that diffusers keeps beside a pipeline and nowhere else, such as Wuerstchen's: its own loader does not find them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from millijoule.workers.diffusion.libraries import import_diffusers
from millijoule.workers.diffusion.pipeline_folder import INDEX, PipelineFolder
from millijoule.workers.errors import InputError


def own_class(pipeline_class: type, library: str, class_name: str) -> Any:
    """The class of that name in the folder of diffusers that `pipeline_class` comes from; None: it has none.

    Args:
        library: as model_index.json names it; it has to be diffusers or that folder.
    """
    package = pipeline_class.__module__.rpartition(".")[0]
    if not package.startswith("diffusers.pipelines.") or package not in sys.modules:
        return None
    diffusers, _ = import_diffusers()
    if library not in ("diffusers", package.rpartition(".")[2]) or hasattr(diffusers, class_name):
        return None
    found = getattr(sys.modules[package], class_name, None)
    return found if isinstance(found, type) and hasattr(found, "from_pretrained") else None


def component_class(pipeline_class: type, folder: PipelineFolder, name: str) -> Any:
    """The class of the component `name`, of diffusers, transformers, or a module of diffusers.pipelines.

    Raises:
        InputError: it is of something else, or not there.
    """
    library, class_name = folder.components[name]
    if (own := own_class(pipeline_class, library, class_name)) is not None:
        return own
    diffusers, transformers = import_diffusers()
    libraries = {"diffusers": diffusers, "transformers": transformers}
    module = libraries.get(library) or getattr(diffusers.pipelines, library, None)
    where = folder.path / INDEX
    if not inspect.ismodule(module) or not module.__name__.startswith(("diffusers", "transformers")):
        raise InputError(
            f"{where}: {name} is of {library}; only classes of diffusers and transformers are loaded"
        )
    if (found := getattr(module, class_name, None)) is None:
        raise InputError(f"{where}: {name} is a {class_name}, which {library} does not have")
    return found


@contextmanager
def own_classes_in_sight(pipeline_class: type, folder: PipelineFolder) -> Iterator[None]:
    """While it lasts, diffusers' loader finds the classes of `folder`'s components that lie beside `pipeline_class`."""
    diffusers, _ = import_diffusers()
    package = sys.modules.get(pipeline_class.__module__.rpartition(".")[0])
    shown = []
    for library, class_name in folder.components.values():
        if (kind := own_class(pipeline_class, library, class_name)) is not None:
            where, name, what = (
                (diffusers, class_name, kind)
                if library == "diffusers"
                else (diffusers.pipelines, library, package)
            )
            if not hasattr(where, name):
                setattr(where, name, what)
                shown.append((where, name))
    try:
        yield
    finally:
        for where, name in shown:
            delattr(where, name)
