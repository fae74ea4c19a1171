"""A process of its own for every combination of rungs that is measured: what one changes, no other sees.

The process loads the model and draws what it is sent; its CPU time and memory are those of this combination alone.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from millijoule.workers.errors import InputError, MillijouleError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import every_image
from millijoule.workers.schemas import ImageRequest

#: A process that was asked to end and has not after this long is killed.
END_SECONDS = 10.0
#: Enough that work is left out in some of them.
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Drawn:
    """What drawing gave and took.

    Attributes:
        images: uint8 `[count, height, width, 3]`, or the number of images where pixels were not asked for.
        seconds: of wall-clock time.
        cpu_seconds: of all threads of the process.
        peak_bytes: most memory so far: of the device, or of the process on a CPU.
    """

    images: Any
    seconds: float
    cpu_seconds: float
    peak_bytes: int


class Drawer:
    """The process with a model loaded as `options` say; a context that ends it.

    Raises:
        InputError: the model cannot be loaded so.
    """

    def __init__(self, model: str, device: str, options: GeneratorOptions, threads: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, model, device, options, threads), name="ladder", daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.width, self.height, self.batch_size = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Drawer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def draw(self, requests: Sequence[ImageRequest]) -> Drawn:
        """Draw `requests`, in batches."""
        self._pipe.send(("draw", (list(requests),)))
        return self._answer()

    def warm_up(self, requests: Sequence[ImageRequest]) -> None:
        """Draw a batch in few steps: kernels are loaded, chosen and compiled."""
        few = [replace(r, num_inference_steps=WARM_UP_STEPS) for r in requests[: self.batch_size]]
        self.draw_for(few, 0)

    def draw_for(self, requests: Sequence[ImageRequest], seconds: float) -> Drawn:
        """Draw `requests` in turn, batch after batch, for `seconds`, one batch at least; `images` is their number."""
        self._pipe.send(("draw_for", (list(requests), seconds)))
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # it reads the end of the pipe and returns
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(END_SECONDS)
            raise RuntimeError(f"the process that draws died, exit code {self._process.exitcode}") from error
        if kind == "input":
            raise InputError(value)
        if kind == "error":
            raise RuntimeError(value)
        return value


def _serve(pipe: Connection, model: str, device: str, options: GeneratorOptions, threads: int | None) -> None:
    """The process: load, then answer until the pipe ends."""
    import torch

    from millijoule.workers.generators.registry import load_generator

    if threads:
        torch.set_num_threads(threads)
    try:
        generator = load_generator(model, device=device, options=options)
        size = options.batch_size or generator.info.batch_size
        pipe.send(("ready", (generator.info.width, generator.info.height, size)))
        while True:
            try:
                command, asked = pipe.recv()
            except EOFError:
                return
            work = partial(_draw if command == "draw" else _draw_for, generator, size, *asked)
            pipe.send(("drawn", _measured(work, device)))
    except MillijouleError as error:
        pipe.send(("input", str(error)))
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def _draw(generator: Any, size: int, requests: list[ImageRequest]) -> np.ndarray:
    parts = [requests[i : i + size] for i in range(0, len(requests), size)]
    return np.concatenate([every_image(generator.generate(part), part) for part in parts])


def _draw_for(generator: Any, size: int, requests: list[ImageRequest], seconds: float) -> int:
    began, drawn = time.monotonic(), 0
    while not drawn or time.monotonic() - began < seconds:
        generator.generate([requests[i % len(requests)] for i in range(drawn, drawn + size)])
        drawn += size
    return drawn


def _measured(work: Callable[[], Any], device: str) -> Drawn:
    import torch

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
    began, cpu = time.monotonic(), time.process_time()
    images = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Drawn(images, seconds, cpu, torch.cuda.max_memory_allocated() if on_gpu else peak)
