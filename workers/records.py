"""Frozen dataclasses as JSON and back, with every type checked: the one codec of all records that are stored.

Built on msgspec. What a record may hold is what its class says; how much of a stranger's file is believed is decided here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

T = TypeVar("T")


def encode(record: Any, *, indent: int = 0) -> bytes:
    """`record` as JSON with sorted keys, so that equal records are equal bytes; `indent` > 0 is for people."""
    data = msgspec.json.encode(record, order="sorted")
    return msgspec.json.format(data, indent=indent) + b"\n" if indent else data


def decode(kind: type[T], data: bytes | str) -> T:
    """The record of class `kind` that `data`, JSON, holds. Fields `kind` does not know are passed over: newer writers.

    Raises:
        ValueError: not JSON, or a field is missing or of another type; the message names the field by its path
            (`$.files[0].rows`).
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def convert(kind: type[T], raw: Any) -> T:
    """A person's configuration (parsed TOML or JSON) as `kind`; what `kind` does not know is refused.

    Raises:
        ValueError: as `decode`, or a field is unknown; the message names it by its path.
    """
    refuse_unknown(kind, raw)
    return msgspec.convert(raw, type=kind)


def refuse_unknown(kind: Any, raw: Any, path: str = "$") -> None:
    """Raise ValueError for the first field of `raw` that `kind`, or a dataclass inside it, does not have."""
    if dataclasses.is_dataclass(kind) and isinstance(raw, Mapping):
        types = get_type_hints(kind)
        known = [field.name for field in dataclasses.fields(kind)]
        for name, value in raw.items():
            if name not in known:
                raise ValueError(f"no field is named {name!r} - at `{path}`; there are {', '.join(known)}")
            refuse_unknown(types[name], value, f"{path}.{name}")
        return
    inner = [k for k in get_args(kind) if k is not type(None) and k is not Ellipsis]
    if isinstance(raw, Mapping) and len(inner) == 2:  # a mapping of records
        for name, value in raw.items():
            refuse_unknown(inner[1], value, f"{path}.{name}")
    elif isinstance(raw, list | tuple):
        for i, value in enumerate(raw):
            for k in inner:
                refuse_unknown(k, value, f"{path}[{i}]")
    elif isinstance(raw, Mapping):  # Optional[record]
        for k in inner:
            refuse_unknown(k, raw, path)
