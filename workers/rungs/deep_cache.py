"""A step cache for U-Nets: in most steps only the outermost blocks are computed, the deep ones are those of an earlier step.

Deep features change little from one step to the next (Ma et al. 2023, "DeepCache", arXiv 2312.00858). Every `interval`-th
step is computed in full; between, everything below the first down block gives what it gave then, and the first down block and
the last up block, which see the new noise, are computed. Which steps are full follows from the schedule alone: an image
does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from millijoule.workers.rungs.position import Position
from millijoule.workers.rungs.tensors import map_tensors


def cache_deep_blocks(unet: Any, position: Position, interval: int) -> None:
    """Change `unet` (an `UNet2DConditionModel`) so that its deep blocks are computed every `interval`-th step only.

    Rows that are gone since the last full step, those without guidance, are left out of what is kept.
    """
    deep = [*unet.down_blocks[1:], *unet.up_blocks[:-1]]
    if unet.mid_block is not None:
        deep.append(unet.mid_block)
    for block in deep:
        block.forward = _cached(block.forward, position, interval)


def _cached(forward: Callable[..., Any], position: Position, interval: int) -> Callable[..., Any]:
    key = object()

    def run(*args: Any, **kwargs: Any) -> Any:
        if position.index % interval == 0:
            position.kept[key] = forward(*args, **kwargs)
            return position.kept[key]
        rows = len(args[0] if args else kwargs["hidden_states"])
        return map_tensors(position.kept[key], lambda x: x[-rows:])

    return run
