"""diffusers and transformers, which only the `diffusers` extra installs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from millijoule.workers.errors import InputError


def import_diffusers() -> tuple[Any, Any]:
    """diffusers and transformers; raises InputError where they are not installed."""
    before = logging.root.manager.disable
    # every call of a pipeline asks, and each change of a level empties what all loggers have cached
    first = not all(sys.modules.get(name) for name in ("diffusers", "transformers"))
    try:
        if first:
            logging.disable(max(before, logging.WARNING))  # of other packages, about what is not installed
        import diffusers
        import transformers
    except ImportError as error:
        words = f"this model needs diffusers: pip install 'millijoule[diffusers]' ({error})"
        raise InputError(words) from error
    finally:
        if first:
            logging.disable(before)
    return diffusers, transformers


#: What the two import, and what logs to every user which of its parts this machine cannot use.
IMPORTED = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While it lasts, diffusers and transformers log errors alone, show no progress and Python's warnings are not shown.

    What they have to say at every load and of every long prompt is said by us, once per image and of that image alone.
    """
    diffusers, transformers = import_diffusers()
    loggers = [library.utils.logging for library in (diffusers, transformers)]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in loggers]
    imported = [(logging.getLogger(name), logging.getLogger(name).level) for name in IMPORTED]
    for logger, _ in imported:
        logger.setLevel(logging.ERROR)
    for log in loggers:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in imported:
            logger.setLevel(level)
        for log, (verbosity, progress) in zip(loggers, before, strict=True):
            log.set_verbosity(verbosity)
            if progress:
                log.enable_progress_bar()
