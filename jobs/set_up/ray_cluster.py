"""Joining a Ray cluster, or starting one on this machine for the length of a job."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray

from millijoule.pipeline.fleet.room import how_many
from millijoule.pipeline.running.cluster import living_nodes
from millijoule.workers.errors import InputError, NodeError

#: Image bytes never cross Ray's object store: it holds leases and commits, a few KB each.
LOCAL_OBJECT_STORE_BYTES = 100 * 2**20
#: How long a cluster's address may take to accept a connection.
CONNECT_TIMEOUT_S = 10.0
#: Ray's reasons are pages long where it explains itself.
REASON_CHARACTERS = 600
#: A head refuses a wrong token in words of its log alone; to the caller it is one that cannot be reached.
TOKEN_HINT = (
    "it and this process need the same RAY_AUTH_MODE and the same token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
    "~/.ray/auth_token)"
)
#: Where Ray's dashboard listens unless told otherwise; Ray tries for minutes to join it as if it were a head.
DASHBOARD_PORT = 8265
JOBS_ADDRESS = "that is where `ray job submit --address` sends jobs; the head that workers and drivers join is at HOST:6379, or auto on its machine"
#: Announces at every start that a local cluster is protected by a token, which is nothing to act on.
_TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster this process is connected to. `own`: started for this job, so that no node will ever join it."""

    name: str
    own: bool


@contextmanager
def connected(address: str | None) -> Iterator[Cluster]:
    """Connect to Ray for the length of a `with` block. A connection that the process has already is used, and left alone.

    Args:
        address: of a cluster; None for the one in RAY_ADDRESS (set inside `ray job submit`), else a new local one
            that ends with the block.

    Raises:
        InputError: no cluster answers at the address, or the process is connected to another one.
    """
    if ray.is_initialized():
        present = head_address()
        if address not in (None, "auto", present):
            raise InputError(
                f"--ray-address {address}: this process is connected to {present} already; leave the address out to "
                "run there, or call ray.shutdown() first"
            )
        yield Cluster(f"the cluster at {present}", own=False)
        return
    where = address or os.environ.get("RAY_ADDRESS") or None  # empty is not set
    said = f"--ray-address {where}" if address else f"environment variable RAY_ADDRESS is {where!r}"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if where is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger(_TOKEN_LOGGER).setLevel(logging.ERROR)
        try:
            ray.init("local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES, **quiet)
        except Exception as error:
            if type(error) not in (
                Exception,
                RuntimeError,
                TimeoutError,
            ):  # a plain Exception is what Ray raises of time-outs
                raise
            reason = (str(error).splitlines() or ["without a reason"])[0]
            raise NodeError(
                f"Ray did not start on this machine ({reason}). If it is busy, run the command again with more time for Ray: "
                "RAY_raylet_start_wait_time_s=240 RAY_agent_register_timeout_ms=240000 in the environment"
            ) from error
    else:
        listening = _check_reachable(where, said)
        try:
            ray.init(address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            # unlike versions are named in lines of their own
            reason = " ".join(str(error).split())[:REASON_CHARACTERS]
            if not listening:
                raise InputError(f"{said}: no Ray cluster answers there ({reason})") from error
            raise InputError(
                f"{said}: something listens there, and this process cannot join it ({reason}); where it is the head of a Ray "
                f"cluster, {TOKEN_HINT}"
            ) from error
    try:
        yield Cluster(f"the cluster at {where}" if where else "this machine", own=where is None)
    finally:
        ray.shutdown()


def _check_reachable(address: str, said: str) -> bool:
    """Ray itself tries for minutes before it gives up on an address where nobody listens.

    Returns:
        True: somebody listens there; False: it is for Ray to resolve, as "auto" and ray://... are.
    """
    if address.startswith(("http://", "https://")):
        raise InputError(f"{said}: {JOBS_ADDRESS}")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in address:
        return False
    try:
        with socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S) as connection:
            if int(port) == DASHBOARD_PORT and _speaks_http(connection):
                raise InputError(f"{said}: {JOBS_ADDRESS}")
    except OSError as error:
        raise InputError(f"{said}: no Ray cluster answers there ({error})") from error
    return True


def _speaks_http(connection: socket.socket) -> bool:
    """Whether a web server listens there; the head's control service does not answer in words."""
    connection.settimeout(CONNECT_TIMEOUT_S)
    with suppress(OSError):
        connection.sendall(b"GET /api/version HTTP/1.0\r\n\r\n")
        return connection.recv(5) == b"HTTP/"
    return False


def head_address() -> str:
    """ "host:port" of the control service of the cluster's head."""
    return str(ray.get_runtime_context().gcs_address)


def room(asked: Mapping[str, float]) -> int:
    """How many workers that ask for `asked` the nodes have room for as they are now, others' work aside."""
    return sum(how_many(node["Resources"], asked) for node in living_nodes())


def gpus() -> float:
    """GPUs that the nodes of the cluster have now."""
    return ray.cluster_resources().get("GPU", 0.0)
