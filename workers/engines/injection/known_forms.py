"""Whether a library's module still does what our fused form of it does: by the text of its `forward`.

A fused form repeats another's computation, so a new version of that other may leave it wrong without an error. It takes the place of
code that was read, and of no other.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import Any


@functools.cache
def digest_of(function: Any) -> str:
    """Of a function's text without its layout, the same in every version of Python; "" where there is no text to be had."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]
