"""A second rank without the seconds that a new interpreter takes to import its libraries: a fork of the test's process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress

import pytest

from millijoule.workers.ranks import group, rank_main
from millijoule.workers.ranks.messages import Channel, Task


class ForkedProcess:
    """What `RankGroup` asks of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 60)
        while self.returncode is None:
            with suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
                    break
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 60)
            time.sleep(0.005)
        return self.returncode

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def fork_member(task: Task, ours: socket.socket, theirs: socket.socket):
    pid = os.fork()
    if pid:
        return ForkedProcess(pid)
    try:
        ours.close()
        sys.argv = ["rank_main", str(theirs.detach())]
        rank_main.main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


@pytest.fixture
def forked_ranks(monkeypatch):
    """Ranks are forks of this process."""

    def start(task: Task):
        ours, theirs = socket.socketpair()
        with theirs:
            process = fork_member(task, ours, theirs)
        member = group._Member(task.rank, process, Channel(ours))
        member.channel.send(task)
        return member

    monkeypatch.setattr(group, "_start_member", start)
