"""The C++ part of the kernels: found, loaded and told which instructions it may use.

It is compiled when the package is installed, if a compiler is there (`kernels/cpp`), and called through ctypes, which lets other
threads run meanwhile. Where it is missing, or `MILLIJOULE_KERNEL=reference`, callers compute the same bits in PyTorch, and PNG
files of the same pixels with zlib.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

log = logging.getLogger(__name__)

#: Forms of the compiled functions, in the order of `cpp/processor.h`: where one runs, those before it do.
FORMS = ("plain", "avx2", "avx512-vnni")

#: What `MILLIJOULE_KERNEL` may say: nothing for the best there is, or one of these, for comparing and for finding faults.
CHOICES = ("reference", *FORMS)

#: The number that the compiled part has to say: `millijoule_interface` of `cpp/processor.cpp`.
INTERFACE = 2

_FOLDER = Path(__file__).parent

_only: str | None = None


class KernelChoiceError(RuntimeError):
    """`MILLIJOULE_KERNEL` names no form, or one that cannot be had here."""


def native_library() -> ctypes.CDLL | None:
    """The compiled library, None where there is none or none is wanted.

    Raises:
        KernelChoiceError: see there.
    """
    return _chosen(_asked())[0]


def native_form() -> int:
    """The number of the form that compiled functions are to take: the best, or the one that was asked for."""
    return _chosen(_asked())[1]


def usual_form() -> int | None:
    """`native_form`; None where PyTorch computes: no compiled code is there or wanted, or only its plain form runs, which is slower."""
    if native_library() is None:
        return None
    form = native_form()
    return form if form or is_forced() else None


def is_forced() -> bool:
    """Whether somebody said which form to take."""
    return bool(_asked())


@contextmanager
def only(choice: str) -> Iterator[None]:
    """What is loaded in this block takes `choice`, one of `CHOICES`, whatever `MILLIJOULE_KERNEL` says: for comparing forms."""
    global _only
    before, _only = _only, choice
    try:
        yield
    finally:
        _only = before


def forms_here() -> tuple[str, ...]:
    """All of `FORMS` that this processor runs; none where nothing was compiled."""
    library = _load()
    return FORMS[: library.millijoule_best_form() + 1] if library is not None else ()


def check_choice(asked: str | None = None) -> None:
    """Raise KernelChoiceError for a word that names no form; None: the one in `MILLIJOULE_KERNEL`."""
    asked = _asked() if asked is None else asked
    if asked and asked not in CHOICES:
        raise KernelChoiceError(f"MILLIJOULE_KERNEL={asked}: one of {', '.join(CHOICES)}")


def kernel_words() -> str:
    """What computes here, for records and logs: "pytorch", or a form of the compiled functions."""
    form = usual_form()
    return "pytorch" if form is None else FORMS[form]


def _asked() -> str:
    return os.environ.get("MILLIJOULE_KERNEL", "") if _only is None else _only


@cache
def _chosen(asked: str) -> tuple[ctypes.CDLL | None, int]:
    """The library and the form; said in the log, once."""
    check_choice(asked)
    if asked == "reference":
        log.info("kernels: PyTorch's, as MILLIJOULE_KERNEL says")
        return None, 0
    library, here = _load(), forms_here()
    if library is None:
        if asked:
            raise KernelChoiceError(
                f"MILLIJOULE_KERNEL={asked}: the compiled kernels are missing; install a C++ compiler, then the package again"
            )
        log.info("kernels: PyTorch's; no C++ compiler was there when the package was installed")
        return None, 0
    if asked and asked not in here:
        raise KernelChoiceError(f"MILLIJOULE_KERNEL={asked}: this processor runs {here[-1]} at most")
    form = asked or here[-1]
    log.info("kernels: compiled, %s", form)
    return library, FORMS.index(form)


def is_reference_forced() -> bool:
    """Whether `MILLIJOULE_KERNEL` asks for PyTorch's operations."""
    return _asked() == "reference"


@cache
def _load() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = _FOLDER / f"native{suffix}"
        if not path.exists():
            continue
        try:
            if not _is_whole(path):
                raise OSError("it ends before its own end")
            library = ctypes.CDLL(str(path))
            interface = int(library.millijoule_interface())
        except (OSError, AttributeError) as error:
            log.warning(
                "kernels: %s cannot be used (%s): PyTorch's instead; install the package again", path, error
            )
            return None
        if interface != INTERFACE:
            log.warning(
                "kernels: %s was compiled for other code (interface %d, not %d): PyTorch's instead; install the package again",
                *(path, interface, INTERFACE),
            )
            return None
        return library
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file of the ELF format (64 bits) is as long as it says: a processor that maps less of one ends the process."""
    head = path.open("rb").read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return True  # whatever it is, loading it says so
    (sections,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return path.stat().st_size >= sections + size * count
