"""Whether a GPU's own kernels are to draw: only after they drew some images as they should."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


def tried(
    what: str, otherwise: str, build: Callable[[], T | None], draws_alike: Callable[[T], bool]
) -> T | None:
    """What `build` makes, once it drew some images alike. None: it makes nothing, fails or draws others, as the log says.

    Args:
        what: is drawn, and `otherwise` how without these kernels, for the log.
        draws_alike: whether the images it draws are those of another form.
    """
    try:
        made = build()
        if made is None or draws_alike(made):
            return made
    except (
        Exception
    ) as error:  # Triton needs a C compiler on the host; its own errors have no class in common
        log.warning("%s: %s, as the GPU's kernels failed: %s", what, otherwise, error)
        return None
    log.warning("%s: %s, as the GPU's kernels drew other pixels", what, otherwise)
    return None
