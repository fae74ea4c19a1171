"""Networks that diffusers keeps beside a pipeline and nowhere else, such as Wuerstchen's: the library itself does not find them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder


def own_class(pipeline_class: type, library: str, class_name: str) -> Any:
    """The class of that name in the folder of diffusers that `pipeline_class` comes from; None: it has none.

    Args:
        library: as model_index.json names it; it has to be diffusers or that folder.
    """
    package = pipeline_class.__module__.rpartition(".")[0]
    module = sys.modules.get(package)
    if module is None or not package.startswith("diffusers.pipelines."):
        return None
    if library not in ("diffusers", package.rpartition(".")[2]) or hasattr(
        sys.modules["diffusers"], class_name
    ):
        return None
    found = getattr(module, class_name, None)
    return found if isinstance(found, type) and hasattr(found, "from_pretrained") else None


def load_own_classes(pipeline_class: type, folder: PipelineFolder, shown: Path, dtype: Any) -> dict[str, Any]:
    """The components of `folder`, whose files lie in `shown`, that are of such classes, by name."""
    loaded = {}
    for name, (library, class_name) in folder.components.items():
        if (kind := own_class(pipeline_class, library, class_name)) is not None:
            loaded[name] = kind.from_pretrained(
                str(shown / name), local_files_only=True, use_safetensors=True, torch_dtype=dtype
            )
    return loaded
