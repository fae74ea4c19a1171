"""Which meter a node has, and what a person declares about it: the rest of the node that no counter sees.

`jobs.options.node_meters` reads it from the command line; `workers.node_meters.actor` opens the meter on the node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from millijoule.workers.errors import InputError
from millijoule.workers.node_meters.meter import DEFAULT_PERIOD_S, MAX_NODE_WATTS

#: Kinds of meter that can be read while a job runs.
METERS = ("ipmi", "redfish")
#: A controller renews its sensors about once a second; asking more often gives nothing and slows it down.
MIN_PERIOD_S = 1.0
MAX_PERIOD_S = 600.0
#: In a URL, the node's host name.
HOST = "{host}"

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class DeclaredRest:
    """What a node uses besides the devices that have counters (fans, board, network cards, losses), in milliwatts.

    The truth is within `tolerance_mw` of `power_mw`; that is a person's word, not a measurement.
    """

    power_mw: int
    tolerance_mw: int


@dataclass(frozen=True)
class NodeMeterConfig:
    """The meter of the nodes that `nodes` names; the fields are the keys of a `[[node]]` table.

    Attributes:
        nodes: host names or IP addresses, with `*` and `?` as in a shell.
        meter: one of `METERS`.
        url: Redfish: the chassis that is the node, and no more; `{host}` stands for the node's host name.
        user_variable: environment variable of the node with the user's name; None: no login.
        password_variable: the one with the password.
        ca_file: certificate (PEM) on the node to trust instead of the system's: a controller's own, or a company's
            authority.
        check_hostname: False for a controller's own certificate that does not name it; only with `ca_file`.
        period_s: between two readings.
        accuracy_share: of the instrument, see `NodeSeries`.
        rest_watts: see `DeclaredRest`; None: not declared, and then the node cannot close.
        rest_tolerance_watts: by how much `rest_watts` may be wrong.
    """

    nodes: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...]
    meter: str
    url: str | None = None
    user_variable: str | None = None
    password_variable: str | None = None
    ca_file: str | None = None
    check_hostname: bool = True
    period_s: float = DEFAULT_PERIOD_S
    accuracy_share: float | None = None
    rest_watts: float | None = None
    rest_tolerance_watts: float | None = None

    @property
    def rest(self) -> DeclaredRest | None:
        return declared_rest(self.rest_watts, self.rest_tolerance_watts)

    def name_on(self, host: str) -> str:
        """The meter's name on a node, for messages and tables; no two nodes may have the same chassis."""
        return "ipmi" if self.meter == "ipmi" else f"redfish {self.url_on(host)}"

    def url_on(self, host: str) -> str:
        """The chassis of a node."""
        return (self.url or "").replace(HOST, host)

    def check(self) -> None:
        """Raise InputError where this cannot work on any node."""
        if not self.nodes:
            raise InputError("nodes: name at least one host, or * for all")
        if self.meter not in METERS:
            raise InputError(f"meter {self.meter!r}: one of {', '.join(METERS)}")
        if self.meter == "redfish":
            self._check_redfish()
        elif self.url or self.user_variable or self.password_variable or self.ca_file:
            raise InputError("ipmi is read on the node itself: url, login and certificate have no meaning")
        if not MIN_PERIOD_S <= self.period_s <= MAX_PERIOD_S:
            raise InputError(f"period_s {self.period_s:g}: from {MIN_PERIOD_S:g} to {MAX_PERIOD_S:g} seconds")
        check_accuracy(self.accuracy_share, "accuracy_share")
        declared_rest(self.rest_watts, self.rest_tolerance_watts)

    def _check_redfish(self) -> None:
        if self.url is None:
            raise InputError("redfish needs the url of the chassis: https://HOST/redfish/v1/Chassis/ID")
        name = self.url_on("host")
        try:
            parts = urlsplit(name)
            host = parts.hostname
        except ValueError as error:
            raise InputError(f"a Redfish URL cannot be read: {error}") from error
        if parts.username or parts.password:
            raise InputError("a Redfish URL holds a user or password: name environment variables for them")
        if parts.scheme not in ("https", "http") or not host or not parts.path.startswith("/redfish/"):
            raise InputError(f"{name}: not a chassis, expected https://HOST/redfish/v1/Chassis/ID")
        if parts.scheme == "http" and self.user_variable and host not in _LOOPBACK:
            raise InputError(f"{name}: would send the password in the clear, use https")
        if not self.check_hostname and not self.ca_file:
            raise InputError(f"{name}: without a check of the host's name, name its certificate (ca_file)")
        if bool(self.user_variable) != bool(self.password_variable):
            raise InputError(
                f"{name}: environment variable for user or password is not named: both or neither"
            )


def declared_rest(watts: float | None, tolerance_watts: float | None) -> DeclaredRest | None:
    """A declaration in watts; None where there is none.

    Raises:
        InputError: one number without the other, or no power a node can have.
    """
    if watts is None and tolerance_watts is None:
        return None
    if watts is None or tolerance_watts is None:
        raise InputError(
            "the rest of the node is declared with its tolerance: rest_watts, rest_tolerance_watts"
        )
    for name, value in (("rest_watts", watts), ("rest_tolerance_watts", tolerance_watts)):
        if not 0 <= value <= MAX_NODE_WATTS:
            raise InputError(f"{name} {value!r}: a number of watts, 0 or more")
    return DeclaredRest(round(watts * 1000), math.ceil(tolerance_watts * 1000))


def check_accuracy(share: float | None, name: str) -> None:
    """Raise InputError unless `share` is a part of 1, or not stated."""
    if share is not None and not 0 <= share < 1:
        raise InputError(f"{name} {share!r}: a part of 1, such as 0.01 for 1 %")


def find_node_meter(configs: Sequence[NodeMeterConfig], host: str, ip: str) -> NodeMeterConfig | None:
    """The first of `configs` that names the node."""
    for config in configs:
        if any(fnmatchcase(name, pattern) for pattern in config.nodes for name in (host, ip)):
            return config
    return None
