"""How LoRAs are written: the option `--lora PATH[=WEIGHT]`, and the cell of a row that chooses among those declared.

    --lora style.safetensors=0.8 --lora paint/        a row: style, style=0.5, style+paint=0.3, none

A row comes from an untrusted file: it can only name what the command declares, never a path.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping

#: What a row says that wants none of the declared LoRAs.
NONE = "none"

#: A stronger one makes noise of any image; it is a slip of the pen.
MAX_WEIGHT = 100.0

_UNSAYABLE = re.compile(r"[^\w.\-]+")


def split_option(text: str) -> tuple[str, float]:
    """`"a.safetensors=0.8"` -> path and weight. A path that itself ends in `=NUMBER` needs a weight behind it.

    Raises:
        ValueError: there is no path, or the weight is out of range.
    """
    path, equals, weight = text.rpartition("=")
    if not equals or (number := _number(weight)) is None:
        path, number = text, 1.0
    if not path:
        raise ValueError("write PATH or PATH=WEIGHT")
    return path, number


def lora_name(path: str) -> str:
    """What a row's cell calls the LoRA at `path`: its last part without `.safetensors`; what a cell cannot say becomes `_`."""
    last = path.rstrip("/").rpartition("/")[2]
    return _UNSAYABLE.sub("_", last.removesuffix(".safetensors")).strip("_") or "lora"


def read_cell(text: str, declared: Mapping[str, float]) -> str | None:
    """The cell `text` in one form for all that mean the same: names with weights, in the order of declaration.

    Args:
        declared: weight by name; a cell that gives none takes this one.

    Returns:
        None for an empty cell: all declared, each with its own weight.

    Raises:
        ValueError: a name is not declared, or a weight is none.
    """
    text = text.strip()
    if not text:
        return None
    if text.casefold() == NONE and NONE not in declared:
        return NONE
    asked: dict[str, float] = {}
    for part in text.split("+"):
        name, equals, weight = part.partition("=")
        name = name.strip()
        if name not in declared:
            near = difflib.get_close_matches(name, declared, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no LoRA {name!r} was declared; {hint}--lora declares {', '.join(declared)}")
        if name in asked:
            raise ValueError(f"names {name!r} twice")
        number = _number(weight) if equals else declared[name]
        if number is None:
            raise ValueError(f"{weight.strip()!r} is not a weight from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        asked[name] = number
    return "+".join(f"{name}={asked[name]!r}" for name in declared if name in asked)


def mix_of(cell: str | None, declared: Mapping[str, float]) -> dict[str, float]:
    """What `read_cell` gave, as weight by name."""
    if cell is None:
        return dict(declared)
    if cell == NONE and NONE not in declared:
        return {}
    return {name: float(weight) for name, _, weight in (part.partition("=") for part in cell.split("+"))}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= MAX_WEIGHT else None
