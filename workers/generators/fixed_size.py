"""What generators of one image size share: batches of a fixed number of rows, and what of a request they cannot do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from millijoule.workers.errors import RowError
from millijoule.workers.generators.protocol import GeneratorInfo
from millijoule.workers.schemas import ImageRequest


def padded(count: int, size: int) -> Iterator[tuple[list[int], int]]:
    """Indices of exactly `size` rows at a time, the last filled up with its first, and how many are real.

    A network that always sees as many rows draws an image the same whatever else is in its batch.
    """
    for start in range(0, count, size):
        rows = list(range(start, min(start + size, count)))
        yield rows + [start] * (size - len(rows)), len(rows)


def check_requests(requests: Sequence[ImageRequest], info: GeneratorInfo, min_steps: int) -> None:
    """Raise RowError for a size or a number of steps that the model of `info` cannot make."""
    asked = dict.fromkeys((r.width, r.height, r.num_inference_steps) for r in requests)  # in order
    for width, height, steps in asked:
        width, height = width or info.width, height or info.height
        if (width, height) != (info.width, info.height):
            raise RowError(f"{width}x{height}: this model makes {info.width}x{info.height} pixels")
        steps = info.num_inference_steps if steps is None else steps
        if not min_steps <= steps <= info.max_steps:
            raise RowError(f"num_inference_steps {steps}: this model takes {min_steps} to {info.max_steps}")


def unused_settings(request: ImageRequest, used: Collection[str] = ()) -> tuple[str, ...]:
    """Words for what the request asks for and a model that takes the settings `used` does not do."""
    if request.guidance_scale is None and not request.negative_prompt:  # of most
        return ()
    asked = {
        "guidance_scale": request.guidance_scale is not None,
        "negative_prompt": bool(request.negative_prompt),
    }
    return tuple(
        f"{name} is not used by this model" for name, is_ in asked.items() if is_ and name not in used
    )
