"""Notices within seconds that the cluster's head is gone, where Ray itself takes a minute and then says little.

A head that an operator runs with fault tolerance (its state in Redis) comes back; whoever has one sets
`RAY_gcs_rpc_server_reconnect_timeout_s`, as Ray's own documentation says, and that is then how long a head may be away.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

#: Between two looks, and how long one may take.
LOOK_PERIOD_S = 1.0
CONNECT_TIMEOUT_S = 3.0

#: A head that does not take connections for so long is gone.
HEAD_AWAY_S = 8.0

PATIENCE_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"


class HeadWatch:
    """Looks whether the head takes connections, for the length of a `with` block. Calls `on_lost` once, from its own thread.

    Args:
        address: "host:port" of the head's control service.
    """

    def __init__(self, address: str, on_lost: Callable[[str], None]) -> None:
        host, _, port = address.rpartition(":")
        self.address = address
        self._where = (host.strip("[]"), int(port))
        self._on_lost = on_lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="head-watch", daemon=True)

    def __enter__(self) -> HeadWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(CONNECT_TIMEOUT_S + LOOK_PERIOD_S)

    def _watch(self) -> None:
        away_s = _patience_s()
        looked = time.monotonic()
        seen: float | None = None  # a head that never answered here cannot be watched from here
        while not self._stop.wait(LOOK_PERIOD_S):
            began = time.monotonic()
            if began - looked > 2 * (CONNECT_TIMEOUT_S + LOOK_PERIOD_S):
                seen = began  # this process itself slept: a suspended machine has not looked
            looked = began
            try:
                socket.create_connection(self._where, CONNECT_TIMEOUT_S).close()
            except OSError as error:
                if seen is None:
                    return
                if time.monotonic() - seen >= away_s:
                    self._on_lost(f"{self.address}: {error.strerror or error}")
                    return
            else:
                seen = time.monotonic()


def _patience_s() -> float:
    try:
        return float(os.environ[PATIENCE_VARIABLE])
    except (KeyError, ValueError):
        return HEAD_AWAY_S
