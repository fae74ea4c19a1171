"""Figures of the report in words, the same on the page and on the terminal. A missing figure says so, never "0"."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

NOT_MEASURED = "not measured"
NOT_GIVEN = "not given"
NOT_KNOWN = "not known"

#: A UUID as GPUs and boots have it, with the prefix of a GPU's: what people read of it is its first group.
_UUID = re.compile(r"(?:GPU-)?\b([0-9a-f]{8})(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", re.IGNORECASE)


def energy(mj: float | None, missing: str = NOT_MEASURED) -> str:
    """Millijoules in a readable unit; kWh from a tenth of one up."""
    if mj is None:
        return missing
    if mj == 0:
        return "0 mJ"  # measured, and nothing
    if mj >= 3.6e8:
        return f"{mj / 3.6e9:,.3g} kWh" if mj < 3.6e12 else f"{mj / 3.6e9:,.0f} kWh"
    return _scaled(mj, ((1e6, "kJ"), (1e3, "J"), (1.0, "mJ"), (1e-3, "µJ")))


def grams(gco2e: float | None, missing: str = NOT_GIVEN) -> str:
    """Grams of CO2 equivalent in a readable unit."""
    if gco2e is None:
        return missing
    return _scaled(gco2e, ((1e6, "t"), (1e3, "kg"), (1.0, "g"), (1e-3, "mg"), (1e-6, "µg"))) + " CO2e"


def money(amount: float | None, missing: str = NOT_GIVEN) -> str:
    """Currency units, three digits, without an exponent."""
    if amount is None:
        return missing
    if abs(amount) >= 100 or amount == 0:
        return f"{amount:,.2f}"
    digits = 2 - math.floor(math.log10(abs(amount)))
    return f"{amount:.{max(2, digits)}f}"


def count(value: float | None, missing: str = NOT_MEASURED) -> str:
    """A large number, to three digits and with separators."""
    if value is None:
        return missing
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(part: float | None, missing: str = "-") -> str:
    """A part of 1 as per cent."""
    if part is None:
        return missing
    return "< 0.1 %" if 0 < part < 0.001 else f"{100 * part:.1f} %"


def signed_share(part: float | None) -> str:
    """A difference as per cent, with its sign."""
    return "-" if part is None else f"{100 * part:+.1f} %"


def seconds(value: float | None, missing: str = "-") -> str:
    """A duration in its largest sensible unit."""
    if value is None:
        return missing
    long = ((172_800, "days", 86_400.0), (7200, "h", 3600.0), (120, "min", 60.0))
    return _scaled(value, (*long, (1, "s", 1.0), (0, "ms", 1e-3)))


def rate(value: float | None) -> str:
    """Images per second."""
    return "-" if value is None else f"{count(value)} images/s"


def residual(mj: int | None, part: float | None, ns: int | None) -> str:
    """A closure check's residual or tolerance, in the units it has: millijoules, share of 1, nanoseconds."""
    parts = [] if mj is None else [f"{mj:,} mJ"]
    if part is not None:
        parts.append(f"{100 * part:.3g} %")
    if ns is not None:
        parts.append(f"{ns / 1e6:,.3g} ms")
    return ", ".join(parts) or "-"


def byte_count(value: int) -> str:
    return _scaled(float(value), ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "bytes", 1.0)))


def moment(unix_s: float) -> str:
    """A time since 1970 as UTC."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def short_device(device: str) -> str:
    """The part of a GPU's UUID that people read; other names whole."""
    return device.removeprefix("GPU-")[:8] if device.startswith("GPU-") else device


def short_scope(scope: str) -> str:
    """What a closure check was made of, for narrow columns: UUIDs of GPUs and boots by their first eight digits."""
    return _UUID.sub(r"\1", scope)


def shortened(text: str, chars: int) -> str:
    """`text`, its end left out where it is longer than `chars`."""
    return text if len(text) <= chars else text[:chars] + " ..."


def _scaled(value: float, units: tuple[tuple, ...]) -> str:
    """`value` in the first unit it reaches: (from, name) or (from, name, size); the last one takes the rest."""
    begin, name, *size = next((unit for unit in units if abs(value) >= unit[0]), units[-1])
    return f"{count(value / (size[0] if size else begin))} {name}"
