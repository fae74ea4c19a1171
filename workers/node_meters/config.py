"""Which meter a node has, and what a person declares about it: the rest of the node that no counter sees.

`jobs.node_meter_options` reads it from the command line; `workers.node_meters.actor` opens the meter on the node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import msgspec

from millijoule.workers.errors import InputError
from millijoule.workers.node_meters.ipmi import IpmiMeter
from millijoule.workers.node_meters.meter import DEFAULT_PERIOD_S, MAX_NODE_WATTS, NodeMeter
from millijoule.workers.node_meters.redfish import RedfishConfig, RedfishMeter, check_chassis_url

#: Kinds of meter that can be read while a job runs.
METERS = ("ipmi", "redfish")
#: A controller renews its sensors about once a second; asking more often gives nothing and slows it down.
MIN_PERIOD_S = 1.0
MAX_PERIOD_S = 600.0
#: In a URL, the node's host name.
HOST = "{host}"


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
        user_variable, password_variable, ca_file, check_hostname: see `RedfishConfig`; variables and file are those
            of the node.
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
        return "ipmi" if self.meter == "ipmi" else f"redfish {(self.url or '').replace(HOST, host)}"

    def check(self) -> None:
        """Raise InputError where this cannot work on any node."""
        if not self.nodes:
            raise InputError("nodes: name at least one host, or * for all")
        if self.meter not in METERS:
            raise InputError(f"meter {self.meter!r}: one of {', '.join(METERS)}")
        if self.meter == "redfish":
            if self.url is None:
                raise InputError("redfish needs the url of the chassis: https://HOST/redfish/v1/Chassis/ID")
            check_chassis_url(self._redfish("host"))
        elif self.url or self.user_variable or self.password_variable or self.ca_file:
            raise InputError("ipmi is read on the node itself: url, login and certificate have no meaning")
        if not MIN_PERIOD_S <= self.period_s <= MAX_PERIOD_S:
            raise InputError(f"period_s {self.period_s:g}: from {MIN_PERIOD_S:g} to {MAX_PERIOD_S:g} seconds")
        check_accuracy(self.accuracy_share, "accuracy_share")
        declared_rest(self.rest_watts, self.rest_tolerance_watts)

    def open(self, host: str) -> NodeMeter:
        """The meter, on its node.

        Raises:
            InputError: it cannot be read whatever it says, such as a variable that is not set here.
        """
        return IpmiMeter() if self.meter == "ipmi" else RedfishMeter(self._redfish(host))

    def _redfish(self, host: str) -> RedfishConfig:
        return RedfishConfig(
            (self.url or "").replace(HOST, host),
            self.user_variable,
            self.password_variable,
            Path(self.ca_file) if self.ca_file else None,
            self.check_hostname,
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
