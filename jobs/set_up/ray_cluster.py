"""Joining a Ray cluster, or starting one on this machine for the length of a command."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from millijoule.jobs.set_up.autoscaling import how_many
from millijoule.workers.errors import InputError

log = logging.getLogger(__name__)

#: Image bytes never cross Ray's object store: it holds leases and commits, a few KB each.
LOCAL_OBJECT_STORE_BYTES = 100 * 2**20

#: How long a cluster's address may take to accept a connection.
CONNECT_TIMEOUT_S = 10.0

#: Announces at every start that a local cluster is protected by a token, which is nothing to act on.
_TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray for the length of a `with` block.

    Args:
        address: of a cluster; None for the one in RAY_ADDRESS (set inside `ray job submit`), else a new local one
            that ends with the block.

    Raises:
        InputError: no cluster answers at the address.
    """
    if is_own(address):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger(_TOKEN_LOGGER).setLevel(logging.ERROR)
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    else:
        _check_reachable(address or os.environ["RAY_ADDRESS"])
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = address or os.environ.get("RAY_ADDRESS")
            raise InputError(
                f"--ray-address {where}: no Ray cluster answers there ({str(error).splitlines()[0]})"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def place(address: str | None) -> str:
    """What `cluster(address)` connects to, in words."""
    where = address or os.environ.get("RAY_ADDRESS")
    return f"the cluster at {where}" if where else "this machine"


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes before it gives up on an address where nobody listens."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in address:
        return  # "auto", ray://...: for Ray to resolve
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise InputError(f"--ray-address {address}: no Ray cluster answers there ({error})") from error


def is_own(address: str | None) -> bool:
    """Whether `cluster(address)` starts a Ray of its own: no node will ever join that."""
    return address is None and "RAY_ADDRESS" not in os.environ


def head_address() -> str:
    """ "host:port" of the control service of the cluster's head."""
    return str(ray.get_runtime_context().gcs_address)


def room(resources: Mapping[str, float]) -> int:
    """How many workers that ask for `resources` the nodes have room for as they are now, others' work aside."""
    return sum(how_many(node["Resources"], resources) for node in ray.nodes() if node["Alive"])


def gpus() -> float:
    """GPUs that the nodes of the cluster have now."""
    return ray.cluster_resources().get("GPU", 0.0)
