"""DeepSpeed, imported so that nobody else in the process notices: no environment, no logger, no line on stdout.

Without tensor parallelism DeepSpeed-Inference starts no process group, opens no port and reads no rank. What its import
leaves behind is an environment variable and a logger of its own that prints to stdout, with a first line about the device.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from millijoule.workers.errors import InputError

#: DeepSpeed's logger; what it says goes where everybody's logs go.
LOGGER = "DeepSpeed"


def import_deepspeed(device: str) -> ModuleType:
    """DeepSpeed, which looks after a GPU if `device` is one and after CPUs otherwise.

    Raises:
        InputError: it is not installed, or not as this PyTorch needs it.
    """
    kind = "cuda" if device.startswith("cuda") else "cpu"
    if sys.modules.get("deepspeed"):
        import deepspeed
    else:
        with kept_environment(DS_ACCELERATOR=kind):
            try:
                import deepspeed
            except Exception as error:  # it looks at PyTorch, compilers and devices as it is imported
                raise InputError(
                    f"--engine deepspeed: DeepSpeed cannot be imported ({type(error).__name__}: {error}). "
                    "Install it (DS_BUILD_OPS=0 pip install deepspeed), or take --engine eager"
                ) from error
        logger = logging.getLogger(LOGGER)
        logger.handlers.clear()
        logger.propagate = True
    if kind == "cuda" and deepspeed.get_accelerator().device_name() == "cpu":
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        deepspeed.accelerator.set_accelerator(CUDA_Accelerator())
    return deepspeed


@contextmanager
def kept_environment(**values: str) -> Iterator[None]:
    """`values` in the environment, which is put back as it was."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in values.items() if name not in before})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
