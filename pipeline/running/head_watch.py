"""Notices within seconds that the cluster's head is gone, where Ray itself takes a minute and then says little.

A head that an operator runs with fault tolerance (its state in Redis) comes back; whoever has one sets
`RAY_gcs_rpc_server_reconnect_timeout_s`, as Ray's own documentation says, and that is then how long a head may be away.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Between two looks, and how long one may take.
LOOK_PERIOD_S = 1.0
CONNECT_TIMEOUT_S = 3.0
#: A head that does not take connections for so long is gone.
HEAD_AWAY_S = 8.0

PATIENCE_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"


class HeadLoss:
    """Takes the word that the head is gone, and passes it on to who wants to hear it, now or as soon as somebody does.

    Args:
        at_once: hears it first.
    """

    def __init__(self, at_once: Callable[[str], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._hears = at_once
        self._reason: str | None = None

    def __call__(self, reason: str) -> None:
        with self._lock:
            self._reason, hears = reason, self._hears
        if hears is not None:
            hears(reason)

    def tell(self, hears: Callable[[str], None]) -> None:
        """`hears` is called with the reason; unless somebody else is already."""
        with self._lock:
            if self._hears is not None:
                return
            self._hears, reason = hears, self._reason
        if reason is not None:
            hears(reason)


@contextmanager
def head_watched(address: str, on_lost: Callable[[str], None]) -> Iterator[None]:
    """Look whether the head takes connections, for the length of a `with` block, which begins where it has just been joined.

    A head that does not take one then cannot be watched from here (Ray has other ways to it).

    Args:
        address: "host:port" of the head's control service.
        on_lost: called once, in a thread of its own, when the head has been away for too long.
    """
    if _refusal(address) is not None:
        yield
        return
    end = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, on_lost, end), name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(CONNECT_TIMEOUT_S + LOOK_PERIOD_S)


def _refusal(address: str) -> str | None:
    """Why the head takes no connection; None: it does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _watch(address: str, on_lost: Callable[[str], None], end: threading.Event) -> None:
    try:
        away_s = float(os.environ[PATIENCE_VARIABLE])
    except (KeyError, ValueError):
        away_s = HEAD_AWAY_S
    looked = seen = time.monotonic()
    while not end.wait(LOOK_PERIOD_S):
        began = time.monotonic()
        if began - looked > 2 * (CONNECT_TIMEOUT_S + LOOK_PERIOD_S):
            seen = began  # this process itself slept: a suspended machine has not looked
        looked = began
        if (refusal := _refusal(address)) is None:
            seen = time.monotonic()
        elif time.monotonic() - seen >= away_s:
            on_lost(f"{address}: {refusal}")
            return
