"""Read a node's energy or power from its management controller over Redfish.

`EnvironmentMetrics` of the chassis is asked first (`EnergyJoules`, `EnergykWh`, `PowerWatts`), the older `Power`
(`PowerControl[0].PowerConsumedWatts`) where that has nothing. Source: DMTF DSP2046, EnvironmentMetrics 1.3 and Power
1.7. The controller is not trusted: sizes are bounded, redirects are not followed, links must stay on it, and the
password is sent to it alone.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from millijoule.workers.errors import InputError
from millijoule.workers.node_meters.config import NodeMeterConfig
from millijoule.workers.node_meters.meter import (
    MJ_PER_J,
    MJ_PER_KWH,
    MW_PER_W,
    MeterFailure,
    NodeReading,
    Quantity,
    middle_since,
    parse_amount,
)

TIMEOUT_S = 10.0
#: Metrics are a few kilobytes.
MAX_ANSWER_BYTES = 1 << 20


class RedfishMeter:
    """The chassis of the node `host`, with the login that the node's environment holds.

    Args:
        config: checked, see `NodeMeterConfig.check`.

    Raises:
        InputError: a variable or the certificate that `config` names is not on this node.
    """

    def __init__(self, config: NodeMeterConfig, host: str, timeout_s: float = TIMEOUT_S) -> None:
        self.name = config.url_on(host)
        parts = urlsplit(self.name)
        self._base = f"{parts.scheme}://{parts.netloc}"
        self._path = parts.path
        self._timeout_s = timeout_s
        self._headers = {"Accept": "application/json", **_login(self.name, config)}
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),  # a proxy would see the password
            urllib.request.HTTPSHandler(context=_tls(self.name, config)),
            _NoRedirect(),
        )

    def read(self) -> tuple[NodeReading, ...]:
        """See `NodeMeter.read`."""
        try:
            chassis, _, _ = self._get(self._path)
            for name, parse in (("EnvironmentMetrics", _environment), ("Power", _power)):
                path = _link(chassis, name)
                if path is None:
                    continue
                answer, at_ns, error_ns = self._get(path)
                readings = tuple(
                    NodeReading(f"redfish-{quantity}", quantity, at_ns, value, quantum, error_ns)
                    for quantity, value, quantum in parse(answer)
                )
                if readings:
                    return readings
            raise ValueError("no energy or power in EnvironmentMetrics or Power of this chassis")
        except urllib.error.HTTPError as error:
            error.close()
            raise MeterFailure(f"HTTP {error.code}") from error
        except (OSError, ValueError, ArithmeticError, RecursionError, http.client.HTTPException) as error:
            raise MeterFailure(f"{type(error).__name__}: {str(error)[:200]}") from error

    def _get(self, path: str) -> tuple[dict[str, Any], int, int]:
        """The JSON object at `path`, the middle of the request (wall ns) and half its length."""
        request = urllib.request.Request(self._base + path, headers=self._headers)
        began_ns = time.time_ns()
        with self._opener.open(request, timeout=self._timeout_s) as response:
            body = response.read(MAX_ANSWER_BYTES + 1)
        at_ns, half_ns = middle_since(began_ns)
        if len(body) > MAX_ANSWER_BYTES:
            raise ValueError(f"{path}: longer than {MAX_ANSWER_BYTES} bytes")
        answer = json.loads(body, parse_float=Decimal, parse_constant=_refuse)
        if not isinstance(answer, dict):
            raise ValueError(f"{path}: not a JSON object")
        return answer, at_ns, half_ns


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _login(name: str, config: NodeMeterConfig) -> dict[str, str]:
    secrets = []
    for variable in (config.user_variable, config.password_variable):
        if not variable:  # both or neither
            return {}
        if not os.environ.get(variable):
            raise InputError(f"{name}: environment variable {variable} is not set")
        secrets.append(os.environ[variable])
    return {"Authorization": "Basic " + base64.b64encode(":".join(secrets).encode()).decode()}


def _tls(name: str, config: NodeMeterConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise InputError(f"{config.ca_file}: cannot be used as certificate for {name}: {error}") from error
    context.check_hostname = config.check_hostname
    return context


def _link(chassis: dict[str, Any], name: str) -> str | None:
    """The path of the chassis' resource `name`; None where it has none, or one somewhere else."""
    linked = chassis.get(name)
    path = linked.get("@odata.id") if isinstance(linked, dict) else None
    return path if isinstance(path, str) and path.startswith("/redfish/") and path.isprintable() else None


def _environment(answer: dict[str, Any]) -> list[tuple[Quantity, int, int]]:
    """(quantity, value, quantum) of what `EnvironmentMetrics` has; joules before kilowatt-hours, which are coarse."""
    found: list[tuple[Quantity, int, int]] = []
    for name, units in (("EnergyJoules", MJ_PER_J), ("EnergykWh", MJ_PER_KWH)):
        # LifetimeReading, where there is one, is not set back by ResetMetrics
        amount = _amount(answer.get(name), ("LifetimeReading", "Reading"), units)
        if amount is not None:
            found.append(("energy", *amount))
            break
    watts = _amount(answer.get("PowerWatts"), ("Reading",), MW_PER_W)
    return [*found, ("power", *watts)] if watts else found


def _power(answer: dict[str, Any]) -> list[tuple[Quantity, int, int]]:
    controls = answer.get("PowerControl")
    control = controls[0] if isinstance(controls, list) and controls else None
    watts = _amount(control, ("PowerConsumedWatts",), MW_PER_W)
    return [("power", *watts)] if watts else []


def _amount(excerpt: Any, names: tuple[str, ...], units: int) -> tuple[int, int] | None:
    """The first of `names` that is a number above 0: a node that answers has used something."""
    if not isinstance(excerpt, dict):
        return None
    for name in names:
        number = excerpt.get(name)
        if isinstance(number, (int, Decimal)) and not isinstance(number, bool):
            value, quantum = parse_amount(number, units)
            if value > 0:
                return value, quantum
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")
