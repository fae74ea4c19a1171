"""What the weights of a pipeline are, by their headers alone: parameters, types and bytes of each part."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.generators.model_files import read_header
from millijoule.workers.pipeline_parts.checkpoint_layout import find_layout

#: Bytes of a number of each type that safetensors names.
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Part:
    """One component.

    Attributes:
        dtype: the type of most of its numbers, as safetensors names it; None: it has no weights.
        variant: of its weights.
    """

    name: str
    class_name: str
    dtype: str | None = None
    parameters: int = 0
    size_bytes: int = 0
    variant: str | None = None


def list_parts(folder: PipelineFolder) -> tuple[Part, ...]:
    """Every component of the pipeline in `folder`, in the order of its index; raises InputError where a file is damaged."""
    held = _held_by_checkpoint(folder)
    parts = []
    for name, (_, class_name) in folder.components.items():
        counted: Counter[str] = Counter()
        for file in folder.weights.get(name, ()):
            header = read_header(file)
            names = held.get(name, ()) if file == folder.checkpoint else header.shapes
            for tensor in names:
                counted[header.dtype_of[tensor]] += math.prod(header.shapes[tensor])
        most = counted.most_common(1)
        parts.append(
            Part(
                name,
                class_name,
                most[0][0] if most else None,
                counted.total(),
                sum(n * _BYTES.get(kind, 1) for kind, n in counted.items()),
                folder.variants.get(name),
            )
        )
    return tuple(parts)


def _held_by_checkpoint(folder: PipelineFolder) -> dict[str, list[str]]:
    """Names of a checkpoint's tensors by component: what belongs to no other part is the denoiser's."""
    if folder.checkpoint is None:
        return {}
    names = read_header(folder.checkpoint).shapes
    layout = find_layout(folder.checkpoint, names)
    found = {part: [n for n in names if n.startswith(starts)] for part, starts in layout.parts.items()}
    taken = {n for of_part in found.values() for n in of_part}
    rest = [n for n in names if n not in taken and not n.startswith("model_ema.")]
    return found | dict.fromkeys(("unet", "transformer"), rest)
