"""A LoRA file beside the model it is for, compared by their headers: no weights are read, and neither torch nor peft is needed.

A LoRA has two thin matrices for each layer it changes, under the layer's name in one of several spellings. What the header of the
model has under the same name must fit; layers under other spellings are left to the library that loads it.
"""

from __future__ import annotations

import re
from pathlib import Path

from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import read_header

#: The thin matrix that reads a layer's input, in diffusers', peft's and kohya's spelling.
_DOWN = re.compile(
    r"(.+?)(?:\.lora_A(?:\.[^.]+)?|\.lora_down|\.lora\.down|_lora\.down|\.lora_linear_layer\.down)\.weight"
)
_OTHER_KINDS = re.compile(r"\.(hada_w1_a|lokr_w1|lokr_w2|oft_blocks|oft_diag)$")
_PREFIX = re.compile(
    r"^(?:base_model\.model\.|lora_unet_|lora_transformer_|lora_te\d?_|unet\.|transformer\.|prior\.|text_encoder(?:_\d)?\.)+"
)


def check_lora(path: Path, folder: PipelineFolder) -> None:
    """Raise InputError where the file at `path` is no LoRA, or cannot be one for the pipeline of `folder`."""
    header = read_header(path)
    down = {m[1]: shape for name, shape in header.shapes.items() if (m := _DOWN.fullmatch(name))}
    if not down:
        other = next((m[1] for name in header.shapes if (m := _OTHER_KINDS.search(name))), None)
        kind = f"another kind of adapter ({other}), which is not applied here" if other else "no LoRA"
        raise InputError(f"--lora {path}: {kind}: it has no pair of thin matrices for any layer")
    widths: dict[str, set[int]] = {}
    for files in folder.weights.values():
        for file in dict.fromkeys(files):
            for name, shape in read_header(file).shapes.items():
                if name.endswith(".weight") and len(shape) >= 2:
                    widths.setdefault(_plain(name.removesuffix(".weight")), set()).add(shape[1])
    for name, shape in down.items():
        there = widths.get(_plain(_PREFIX.sub("", name)))
        if there and len(shape) >= 2 and shape[1] not in there:
            raise InputError(
                f"--lora {path}: was made for another model than this {folder.class_name}: {name} reads {shape[1]} values, "
                f"that layer here {' or '.join(map(str, sorted(there)))}"
            )


def _plain(name: str) -> str:
    return name.replace(".processor", "").replace(".", "_")
