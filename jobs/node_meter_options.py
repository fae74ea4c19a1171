"""`--node-meter`: which meter each node has, as a word, a URL or a TOML file."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from millijoule.workers.errors import InputError
from millijoule.workers.node_meters.config import NodeMeterConfig, declared_rest

_REST = re.compile(r"(?P<watts>[0-9]+(?:\.[0-9]+)?)(?:\+-|±)(?P<tolerance>[0-9]+(?:\.[0-9]+)?)")

#: What each key of a [[node]] table takes.
_TYPES: dict[str, tuple[type, ...]] = {
    "nodes": (list,),
    "check_hostname": (bool,),
    **dict.fromkeys(("meter", "url", "user_variable", "password_variable", "ca_file"), (str,)),
    **dict.fromkeys(("period_s", "accuracy_share", "rest_watts", "rest_tolerance_watts"), (int, float)),
}
_WORDS = {list: "a list of strings", bool: "true or false", str: "a string", int: "a number"}


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
            raise InputError(f"--node-rest {rest}: needs --node-meter")
        return ()
    if meter != "ipmi" and not meter.startswith("redfish:"):
        if rest is not None:
            raise InputError(f"--node-rest {rest}: say rest_watts and rest_tolerance_watts in {meter}")
        return _read(Path(meter))
    watts, tolerance = parse_rest(rest, "--node-rest") if rest is not None else (None, None)
    kind, _, url = meter.partition(":")
    config = NodeMeterConfig(("*",), kind, url or None, rest_watts=watts, rest_tolerance_watts=tolerance)
    try:
        config.check()
    except InputError as error:
        raise InputError(f"--node-meter: {error}") from error
    return (config,)


def parse_rest(text: str, option: str) -> tuple[float, float]:
    """`"180+-30"` -> (180.0, 30.0) watts; raises InputError naming `option`."""
    match = _REST.fullmatch(text)
    if not match:
        raise InputError(f"{option} {text}: watts and by how much they may be wrong, such as 180+-30")
    watts, tolerance = float(match["watts"]), float(match["tolerance"])
    try:
        declared_rest(watts, tolerance)
    except InputError as error:
        raise InputError(f"{option} {text}: {error}") from error
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
    if not isinstance(raw, dict):
        raise InputError(f"{where}: must be a table")
    names = [f.name for f in fields(NodeMeterConfig)]
    for key, value in raw.items():
        if key not in names:
            raise InputError(f"{where}: unknown key {key!r}; there are {', '.join(names)}")
        kinds = _TYPES[key]
        good = isinstance(value, kinds) and (bool in kinds) == isinstance(value, bool)
        if not good or (kinds == (list,) and not all(isinstance(v, str) and v for v in value)):
            raise InputError(f"{where}: {key} must be {_WORDS[kinds[0]]}, not {value!r}")
    if missing := [key for key in ("nodes", "meter") if key not in raw]:
        raise InputError(f"{where}: needs {' and '.join(missing)}")
    config = NodeMeterConfig(**{**raw, "nodes": tuple(raw["nodes"])})
    try:
        config.check()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return config
