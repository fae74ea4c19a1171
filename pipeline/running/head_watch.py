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


@contextmanager
def head_watched(address: str, on_lost: Callable[[str], None]) -> Iterator[None]:
    """Look whether the head takes connections, for the length of a `with` block. Calls `on_lost` once, in its own thread.

    Args:
        address: "host:port" of the head's control service.
    """
    end = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, on_lost, end), name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(CONNECT_TIMEOUT_S + LOOK_PERIOD_S)


def _watch(address: str, on_lost: Callable[[str], None], end: threading.Event) -> None:
    host, _, port = address.rpartition(":")
    try:
        away_s = float(os.environ[PATIENCE_VARIABLE])
    except (KeyError, ValueError):
        away_s = HEAD_AWAY_S
    looked = time.monotonic()
    seen: float | None = None  # a head that never answered here cannot be watched from here
    while not end.wait(LOOK_PERIOD_S):
        began = time.monotonic()
        if began - looked > 2 * (CONNECT_TIMEOUT_S + LOOK_PERIOD_S):
            seen = began  # this process itself slept: a suspended machine has not looked
        looked = began
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
            seen = time.monotonic()
        except OSError as error:
            if seen is None:
                return
            if time.monotonic() - seen >= away_s:
                on_lost(f"{address}: {error.strerror or error}")
                return
