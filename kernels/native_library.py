"""The C++ part of the kernels: found, loaded and told which instructions it may use.

It is compiled when the package is installed, if a compiler is there (`kernels/cpp`), and called through ctypes, which lets other
threads run meanwhile. Where it is missing, or `MILLIJOULE_KERNEL=reference`, callers compute the same bits in PyTorch.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

log = logging.getLogger(__name__)

#: Forms of the compiled functions, in the order of `cpp/processor.h`: each runs wherever a later one does.
FORMS = ("plain", "avx2", "avx512-vnni")

#: What `MILLIJOULE_KERNEL` may say: nothing for the best there is, or one of these, for comparing and for finding faults.
CHOICES = ("reference", *FORMS)

_FOLDER = Path(__file__).parent


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled library, None where there is none or none is wanted.

    Raises:
        ValueError: `MILLIJOULE_KERNEL` names no form, or one that does not run here.
    """
    asked = os.environ.get("MILLIJOULE_KERNEL", "")
    if asked and asked not in CHOICES:
        raise ValueError(f"MILLIJOULE_KERNEL={asked}: one of {', '.join(CHOICES)}")
    if asked == "reference":
        log.info("kernels: PyTorch's, as MILLIJOULE_KERNEL says")
        return None
    library = _load()
    if library is None:
        if asked:
            raise ValueError(
                f"MILLIJOULE_KERNEL={asked}: the compiled kernels are missing; install a C++ compiler, then the package again"
            )
        log.info("kernels: PyTorch's; no C++ compiler was there when the package was installed")
        return None
    best = FORMS[library.millijoule_best_form()]
    if asked and FORMS.index(asked) > FORMS.index(best):
        raise ValueError(f"MILLIJOULE_KERNEL={asked}: this processor runs {best} at most")
    log.info("kernels: compiled, %s", asked or best)
    return library


def native_form() -> int:
    """The number of the form that compiled functions are to take: the best, or what `MILLIJOULE_KERNEL` says."""
    library = native_library()
    assert library is not None
    asked = os.environ.get("MILLIJOULE_KERNEL", "")
    return FORMS.index(asked) if asked else int(library.millijoule_best_form())


def is_forced() -> bool:
    """Whether `MILLIJOULE_KERNEL` says which form to take."""
    return bool(os.environ.get("MILLIJOULE_KERNEL"))


def is_reference_forced() -> bool:
    """Whether `MILLIJOULE_KERNEL` asks for PyTorch's operations."""
    return os.environ.get("MILLIJOULE_KERNEL") == "reference"


def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = _FOLDER / f"native{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    return None
