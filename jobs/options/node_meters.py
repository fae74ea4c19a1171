"""`--node-meter`: which meter each node has, as a word, a URL or a TOML file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.node_meters.config import NodeMeterConfig, declared_rest
from millijoule.workers.records import convert

_REST = re.compile(r"(?P<watts>[0-9]+(?:\.[0-9]+)?)(?:\+-|±)(?P<tolerance>[0-9]+(?:\.[0-9]+)?)")


def parse_node_meters(meter: str | None, rest: str | None) -> tuple[NodeMeterConfig, ...]:
    """The nodes' meters, the first that names a node counts; none where `meter` is None.

    Args:
        meter: "ipmi", "redfish:https://..." (for every node; `{host}` in it is the node's name), or a TOML file.
        rest: watts and tolerance that go with the first two, such as "180+-30".

    Raises:
        InputError: the text or the file cannot be used; the message names option or file, table and key.
    """
    if meter is None:
        if rest is not None:
            raise UsageError(f"--node-rest {rest}: needs --node-meter")
        return ()
    if meter != "ipmi" and not meter.startswith("redfish:"):
        if rest is not None:
            raise InputError(f"--node-rest {rest}: say rest_watts and rest_tolerance_watts in {meter}")
        return _read(Path(meter))
    watts, tolerance = parse_rest(rest, "--node-rest") if rest is not None else (None, None)
    kind, _, url = meter.partition(":")
    config = {"nodes": ["*"], "meter": kind, "url": url or None}
    return (_config(config | {"rest_watts": watts, "rest_tolerance_watts": tolerance}, "--node-meter"),)


def parse_rest(text: str, option: str) -> tuple[float, float]:
    """`"180+-30"` -> (180.0, 30.0) watts; raises InputError naming `option`."""
    match = _REST.fullmatch(text)
    if not match:
        raise UsageError(f"{option} {text}: watts and by how much they may be wrong, such as 180+-30")
    watts, tolerance = float(match["watts"]), float(match["tolerance"])
    try:
        declared_rest(watts, tolerance)
    except InputError as error:
        raise UsageError(f"{option} {text}: {error}") from error
    return watts, tolerance


def _read(path: Path) -> tuple[NodeMeterConfig, ...]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--node-meter {path}: no such file, and neither ipmi nor redfish:URL") from None
    except OSError as error:
        raise InputError(f"--node-meter {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # tomllib's and Unicode's
        raise InputError(f"{path}: {error}") from error
    if table.keys() != {"node"} or not isinstance(table["node"], list) or not table["node"]:
        raise InputError(f"{path}: needs [[node]] tables and nothing else")
    return tuple(_config(raw, f"{path}: [[node]] {n}") for n, raw in enumerate(table["node"], 1))


def _config(raw: Any, where: str) -> NodeMeterConfig:
    try:
        config = convert(NodeMeterConfig, raw)
        config.check()
    except (ValueError, InputError) as error:
        raise InputError(f"{where}: {error}") from error
    return config
