"""What rank 0 and the other ranks say to each other, beside tensors: lines of JSON through a socket that no other process has."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from millijoule.workers.diffusion.pipeline_call import OneCall
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.records import decode, encode

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What a rank is for, its first message; `folder` is of the group alone, and ends with it."""

    rank: int
    ranks: int
    model: str
    device: str
    options: GeneratorOptions
    folder: str


@dataclass(frozen=True)
class Order:
    """What a rank is to do next.

    Attributes:
        what: "join" the group that meets in `meeting_point`, "draw" `call`, take the next memory saver ("save memory"), or, whatever it
            is at, "leave" the group.
        threads: to compute with.
    """

    number: int
    what: Literal["join", "draw", "save memory", "leave"]
    meeting_point: str = ""
    call: OneCall | None = None
    threads: int = 1


@dataclass(frozen=True)
class Answer:
    """How an order ended; number 0: loading.

    Attributes:
        outcome: "cut off": another rank has left in the middle of it.
        words: why it failed; of loading, what was done.
        cpu_ns: processor time that the rank has used since it began.
    """

    number: int
    outcome: Literal["done", "called off", "out of memory", "cut off", "failed"]
    words: str = ""
    cpu_ns: int = 0


class Channel:
    """One end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lines = end.makefile("rb")

    def send(self, message: Any) -> None:
        """Raises OSError where nobody is at the other end."""
        self._end.sendall(encode(message) + b"\n")

    def receive(self, kind: type[T]) -> Iterator[T]:
        """Messages as they come, to the end of the process at the other end."""
        try:
            for line in self._lines:
                yield decode(kind, line)
        except OSError:  # it died with something unread
            return

    def close(self) -> None:
        try:
            self._end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._end.close()
