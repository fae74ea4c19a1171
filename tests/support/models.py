"""Generators for tests, used as `--model python:support.models:NAME`.

They draw a deterministic picture from prompt and seed without any model, and some do harm on purpose. Harm happens in
the worker's own process, at the edge: a store call that kills the process is the real store call, one line earlier.
Settings come from the folder named by MILLIJOULE_TEST_DIR: each harm happens once (a marker file says it did).
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from millijoule.workers.errors import RowError
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo, Rejection
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.storage.local import LocalStore

SIZE = 8


class Plain:
    """An 8x8 image of bytes that follow from prompt and seed; `seconds` per image to keep workers busy."""

    def __init__(self, device: str, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.info = GeneratorInfo(
            name="plain", sha256="0" * 64, width=SIZE, height=SIZE, num_inference_steps=1, batch_size=4
        )

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        return GeneratedBatch(np.stack([self.draw(r) for r in requests]))

    def draw(self, request: ImageRequest) -> np.ndarray:
        if self.seconds and request.prompt_id != "warm-up":
            time.sleep(self.seconds)
        seed = hashlib.sha256(f"{request.prompt}\0{request.seed}".encode()).digest()
        return np.frombuffer((seed * 6)[: SIZE * SIZE * 3], np.uint8).reshape(SIZE, SIZE, 3)


def plain(device: str) -> Plain:
    return Plain(device)


def slow(device: str) -> Plain:
    return Plain(device, seconds=0.05)


class _WaitsForLeave(Plain):
    """A prompt with "leave" in it is drawn once there is a file `leave` in the test's folder: the job lasts until then."""

    def draw(self, request: ImageRequest) -> np.ndarray:
        while "leave" in request.prompt and not Path(os.environ["MILLIJOULE_TEST_DIR"], "leave").exists():
            time.sleep(0.05)
        return super().draw(request)


def waits_for_leave(device: str) -> Plain:
    return _WaitsForLeave(device, seconds=0.05)


class _WaitsForCompany(Plain):
    """Draws nothing before a second worker draws, too: both are there when the job ends."""

    def draw(self, request: ImageRequest) -> np.ndarray:
        if request.prompt_id != "warm-up":
            folder = Path(os.environ["MILLIJOULE_TEST_DIR"])
            Path(folder, f"at-work-{os.getpid()}").touch()
            while len(list(folder.glob("at-work-*"))) < 2:
                time.sleep(0.05)
        return super().draw(request)


def waits_for_company(device: str) -> Plain:
    return _WaitsForCompany(device)


class _ManySteps(Plain):
    """Batches of six seconds that report their twelve steps."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.on_step: Callable[[], None] = lambda: None

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        for _ in range(12 if requests[0].prompt_id != "warm-up" else 0):
            time.sleep(0.5)
            self.on_step()
        return super().generate(requests)


def many_steps(device: str) -> Plain:
    return _ManySteps(device)


class _Cramped(Plain):
    """Memory for three images, for one of which a prompt "large" needs all."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.info = replace(self.info, name="cramped", batch_size=8)

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        if sum(3 if "large" in r.prompt else 1 for r in requests) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.17 GiB")
        return super().generate(requests)


def cramped(device: str) -> Plain:
    return _Cramped(device)


class _Poison(Plain):
    def __init__(self, device: str, act: Callable[[], None], seconds: float = 0.0) -> None:
        super().__init__(device, seconds)
        self.act = act

    def draw(self, request: ImageRequest) -> np.ndarray:
        if "poison" in request.prompt:
            self.act()
        return super().draw(request)


def raises_on_poison(device: str) -> Plain:
    def act() -> None:
        raise ValueError("cannot draw poison")

    return _Poison(device, act)


def dies_on_poison(device: str) -> Plain:
    return _Poison(device, lambda: os.kill(os.getpid(), signal.SIGKILL))


def dies_after_poison(device: str) -> Plain:
    """Killed a moment after the request came back, as by the host's out-of-memory killer."""

    def act() -> None:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return _Poison(device, act, seconds=0.2)


def returns_nonsense_on_poison(device: str) -> Plain:
    """One image too few for a batch with poison in it, and floats for poison alone."""

    class Nonsense(Plain):
        def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
            out = super().generate(requests)
            if not any("poison" in r.prompt for r in requests):
                return out
            return GeneratedBatch(out.images[:-1] if len(requests) > 1 else out.images / np.float32("nan"))

    return Nonsense(device)


class Careful(Plain):
    """Has a safety checker, and numbers that overflow: what becomes of an image follows from the words of its prompt.

    "hidden": filtered; "nan": drawn, but no image; "refused": not drawn at all; "strange WORD": drawn, with a warning.

    Args:
        on_image: called for each image it draws.
    """

    def __init__(self, device: str, on_image: Callable[[], None] = lambda: None) -> None:
        super().__init__(device)
        self.on_image = on_image

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        for request in requests:
            if "refused" in request.prompt:
                raise RowError("no such picture")
        images = super().generate(requests).images
        for _ in requests:
            self.on_image()
        return GeneratedBatch(
            images, tuple(map(self.warnings, requests)), tuple(map(self.rejection, requests))
        )

    def warnings(self, request: ImageRequest) -> tuple[str, ...]:
        words = request.prompt.split()
        return tuple(f"unknown word: '{b}'" for a, b in pairwise(words) if a == "strange")

    def rejection(self, request: ImageRequest) -> Rejection | None:
        if "hidden" in request.prompt:
            return Rejection("filtered", "the safety checker hid this image")
        if "nan" in request.prompt:
            return Rejection("quarantined", "its pixels are not finite numbers")
        return None


def careful(device: str) -> Plain:
    return Careful(device)


def _here_is_bad() -> bool:
    return os.environ.get("MILLIJOULE_TEST_NODE") == "bad"


class OnBadNode(Plain):
    """Meets the fault that MILLIJOULE_TEST_FAULT names, on a node that has MILLIJOULE_TEST_NODE=bad.

    Elsewhere it takes its time, so that the bad node's share of the work is not gone before it fails.
    """

    def __init__(self, device: str) -> None:
        self.fault = os.environ["MILLIJOULE_TEST_FAULT"] if _here_is_bad() else ""
        if self.fault == "has no model":
            raise FileNotFoundError("model.safetensors: no such file")
        if self.fault == "dies at start":
            os._exit(1)
        super().__init__(device, seconds=0.0 if self.fault else 0.05)
        self.calls = 0

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        self.calls += 1
        if self.fault == "has a broken driver":
            raise RuntimeError("CUDA error: no device")
        if self.fault == "is sick after its third call" and self.calls > 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.fault == "has memory for one image only" and requests[0].prompt_id != "warm-up":
            raise MemoryError("out of memory")
        return super().generate(requests)


def on_bad_node(device: str) -> Plain:
    return OnBadNode(device)


def hangs_on_poison(device: str) -> Plain:
    return _Poison(device, lambda: time.sleep(3600))


def _die_once(name: str) -> None:
    if first_time(name):
        os.kill(os.getpid(), signal.SIGKILL)


def first_time(name: str) -> bool:
    """True for one caller only, over all processes that share the test's folder."""
    try:
        os.close(os.open(Path(os.environ["MILLIJOULE_TEST_DIR"], name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _wrap(method: str, before: Callable[[str], None] = lambda key: None, after=lambda key: None) -> None:
    original = getattr(LocalStore, method)

    def wrapped(self, key, *args, **kwargs):
        before(key)
        result = original(self, key, *args, **kwargs)
        after(key)
        return result

    setattr(LocalStore, method, wrapped)


def _is_commit(key: str) -> bool:
    return key.startswith("_job/commits/")


def dies_before_upload(device: str) -> Plain:
    _wrap("put_file", before=lambda key: _die_once("before-upload"))
    return Plain(device, seconds=0.01)


def dies_between_uploads(device: str) -> Plain:
    """Killed after the first of an attempt's data files is in place."""
    _wrap("put_file", after=lambda key: _die_once("between-uploads"))
    return Plain(device, seconds=0.01)


def dies_before_commit(device: str) -> Plain:
    _wrap("put_exclusive", before=lambda key: _is_commit(key) and _die_once("before-commit"))
    return Plain(device, seconds=0.01)


def dies_after_commit(device: str) -> Plain:
    """Killed when the commit is in storage but the driver has not heard of it."""
    _wrap("put_exclusive", after=lambda key: _is_commit(key) and _die_once("after-commit"))
    return Plain(device, seconds=0.01)


def stops_before_commit(device: str) -> Plain:
    """The first worker to reach its commit is stopped (SIGSTOP) there; its pid stands in a file."""

    def before(key: str) -> None:
        if _is_commit(key) and first_time("stopped"):
            Path(os.environ["MILLIJOULE_TEST_DIR"], "stopped-pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)

    _wrap("put_exclusive", before=before)
    return Plain(device, seconds=0.01)


class Fussy(Plain):
    """Refuses every prompt with an odd number in it."""

    def draw(self, request):
        if int(request.prompt.split()[1]) % 2:
            raise RowError("no odd pictures")
        return super().draw(request)
