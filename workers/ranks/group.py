"""Rank 0's side of a group of ranks: it starts the others as children of its own, gives them calls to draw along, and ends them.

Rank 0 is the worker's process: it alone has leases, meters and images. The others load the same pipeline, keep their part of its
denoiser, and compute whenever rank 0 does. A rank that ends takes the group with it; one that fails leaves the group, which
forms anew, so that memory that runs out in one rank halves the batches of all.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from millijoule.workers.diffusion.pipeline_call import OneCall
from millijoule.workers.drawing.isolate import AttemptCancelled
from millijoule.workers.drawing.out_of_memory import release_memory
from millijoule.workers.errors import InputError, NodeError, SickWorkerError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.ranks.communicator import Communicator, is_cut_off
from millijoule.workers.ranks.messages import Answer, Channel, Order, Task

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Loading from a slow disk; rank 0 loads the same meanwhile.
LOAD_TIMEOUT_S = 1800.0
#: Ranks end a call within a moment of each other, and change where their weights lie in minutes.
SETTLE_TIMEOUT_S = 300.0
#: A rank whose channel is closed ends at once.
END_TIMEOUT_S = 5.0

_PROGRAM = "millijoule.workers.ranks.rank_main"


@dataclass
class _Member:
    """One of the other ranks."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel
    answers: queue.Queue[Answer | None] = field(default_factory=queue.Queue)  # None: it has ended
    cpu_ns: int = 0


class RankGroup:
    """The other ranks of this process. Build with `start`, then `join` once this process has loaded its own part, too.

    Args:
        members: the other ranks, which load.
        folder: where groups meet, of this group alone.
    """

    def __init__(self, members: list[_Member], folder: Path, device: str) -> None:
        self.ranks = len(members) + 1
        self.members = members
        self.communicator = Communicator(0, self.ranks, device)
        self._folder = folder
        self._number = 0
        self._lost: str | None = None
        self._closing = False
        self._lock = threading.Lock()
        for member in members:
            threading.Thread(
                target=self._listen, args=(member,), name=f"rank-{member.rank}", daemon=True
            ).start()

    @staticmethod
    def start(model: str, device: str, options: GeneratorOptions) -> RankGroup:
        """Start the other ranks of `options.ranks`, which begin to load `model`; see `load_generator`."""
        folder = Path(tempfile.mkdtemp(prefix="millijoule-ranks-"))
        members: list[_Member] = []
        try:
            for rank in range(1, options.ranks):
                members.append(_start_member(Task(rank, options.ranks, model, device, options, str(folder))))
        except BaseException:
            for member in members:
                member.process.kill()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return RankGroup(members, folder, device)

    def join(self) -> None:
        """Wait until the others have loaded, and form the group.

        Raises:
            InputError: a rank says that the model or an option cannot be used.
            NodeError: a rank has ended, or cannot load.
        """
        for member in self.members:
            answer = self._answer(member, 0, LOAD_TIMEOUT_S)
            if answer.outcome != "done":
                raise NodeError(f"{self._name(member)} cannot load the model: {answer.words}")
            log.info("%s: %s", self._name(member), answer.words)
        self._join()

    @contextmanager
    def drawing(self, call: OneCall) -> Iterator[None]:
        """The time in which this process draws `call`; the others do the same.

        Raises:
            MemoryError: memory did not suffice in another rank.
            SickWorkerError: another rank has ended, or fails where this one does not.
        """
        number = self._order("draw", call=call)
        try:
            yield
        except AttemptCancelled:
            self._settle(number, None)
            raise
        except BaseException as error:
            self._settle(number, error)
            raise
        self._settle(number, None)

    def agree(self, step: Callable[[], None]) -> None:
        """Between two steps: all ranks go on, or where `step` raises none does."""
        try:
            step()
        except BaseException:
            self.communicator.tell(1)
            raise
        self.communicator.tell(0)

    def together(self, what: Callable[[], T]) -> T:
        """Take the next memory saver in all ranks, in this one by `what`."""
        number = self._order("save memory")
        done = what()
        self._settle(number, None)
        return done

    @property
    def cpu_ns(self) -> int:
        """Processor time of the other ranks up to their last answers; of those that have ended none, which the system counts."""
        return sum(member.cpu_ns for member in self.members if member.process.returncode is None)

    def close(self) -> None:
        """End the other ranks; nothing is drawn any more."""
        self._closing = True
        for member in self.members:
            member.channel.close()
        for member in self.members:
            try:
                member.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
        self.communicator.leave()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- orders ----------------------------------------------------------------------------------------------------

    def _order(self, what: str, **more: object) -> int:
        if self._lost:
            raise SickWorkerError(self._lost)
        self._number += 1
        order = Order(self._number, what, threads=torch.get_num_threads(), **more)  # type: ignore[arg-type]
        for member in self.members:
            try:
                member.channel.send(order)
            except OSError:
                pass  # it has ended, which whoever waits for its answer is told
        return self._number

    def _join(self) -> None:
        point = self._folder / f"group-{self._number + 1}"
        number = self._order("join", meeting_point=str(point))
        try:
            self.communicator.join(str(point))
        except Exception as error:
            self._give_up(f"ranks cannot form a group: {error}")
            raise SickWorkerError(self._lost) from error
        self._settle(number, None)
        point.unlink(missing_ok=True)

    def _settle(self, number: int, error: BaseException | None) -> None:
        """Hear from all ranks how order `number` ended, which ended in this one with `error`; afterwards a group stands.

        Returns where this process has the last word: it did its part, or has an error of its own.
        """
        if error is not None:
            self.communicator.leave()
            self._cut_off()
        answers = [(member, self._answer(member, number, SETTLE_TIMEOUT_S, error)) for member in self.members]
        failed = [(member, a) for member, a in answers if a.outcome not in ("done", "called off")]
        if not failed and error is None:
            return
        if error is not None:
            release_memory()
        self._join()
        if error is not None and not is_cut_off(error):
            return
        for member, answer in failed:
            if answer.outcome == "out of memory":
                raise MemoryError(f"{self._name(member)}: {answer.words}") from error
        for member, answer in failed:
            if answer.outcome == "failed":
                raise SickWorkerError(
                    f"{self._name(member)} fails where another does not: {answer.words}"
                ) from error
        raise SickWorkerError(f"{self.ranks} ranks lost each other: {error}") from error

    # -- ranks that end --------------------------------------------------------------------------------------------

    def _answer(
        self, member: _Member, number: int, timeout_s: float, error: BaseException | None = None
    ) -> Answer:
        while True:
            try:
                answer = member.answers.get(timeout=timeout_s)
            except queue.Empty:
                self._give_up(f"{self._name(member)} does not answer")
                answer = None
            if answer is None:
                member.answers.put(None)
                raise SickWorkerError(self._lost or f"{self._name(member)} has ended") from error
            if answer.number == number:
                return answer

    def _listen(self, member: _Member) -> None:
        """The thread of one rank's answers; its end is the rank's."""
        for answer in member.channel.receive(Answer):
            member.cpu_ns = answer.cpu_ns
            if answer.outcome not in ("done", "called off"):
                self._cut_off()
            member.answers.put(answer)
        if not self._closing:
            try:
                code: int | None = member.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = None
            self._give_up(f"{self._name(member)} has ended ({_words_of(code)})")
        member.answers.put(None)

    def _give_up(self, why: str) -> None:
        """End all other ranks, so that this process, wherever it waits for them, goes on."""
        with self._lock:
            if self._lost or self._closing:
                return
            self._lost = f"{why}; the group of {self.ranks} ranks is ended"
        log.error("%s", self._lost)
        for member in self.members:
            member.process.kill()
        if not self.communicator.ends_with_a_rank:
            self.communicator.leave()

    def _cut_off(self) -> None:
        """A rank has left: have all others leave, where they would not notice."""
        if self.communicator.ends_with_a_rank:
            return
        self.communicator.leave()
        for member in self.members:
            try:
                member.channel.send(Order(0, "leave"))
            except OSError:
                pass  # it has ended

    def _name(self, member: _Member) -> str:
        return f"rank {member.rank} of {self.ranks}"


def _start_member(task: Task) -> _Member:
    ours, theirs = socket.socketpair()
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # Ray adds to it
    if task.device.startswith("cuda"):
        environment["CUDA_VISIBLE_DEVICES"] = _device_of(task.rank, task.ranks)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__,  # libraries print there, and a worker's own output is not theirs
        )
    member = _Member(task.rank, process, Channel(ours))
    member.channel.send(task)
    return member


def _device_of(rank: int, ranks: int) -> str:
    """The GPU of a rank: those of the worker in their order.

    Raises:
        InputError: the worker has fewer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    if len(names) < ranks:
        raise InputError(
            f"--ranks-per-worker {ranks}: this worker has {len(names)} GPUs; give --gpus-per-worker {ranks}"
        )
    return names[rank]


def _words_of(code: int | None) -> str:
    if code is None:
        return "its channel is closed"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
