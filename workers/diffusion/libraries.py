"""diffusers and transformers, which only the `diffusers` extra installs."""

from __future__ import annotations

from typing import Any

from millijoule.workers.errors import InputError


def import_diffusers() -> tuple[Any, Any]:
    """diffusers and transformers; raises InputError where they are not installed."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        words = f"this model needs diffusers: pip install 'millijoule[diffusers]' ({error})"
        raise InputError(words) from error
    return diffusers, transformers
