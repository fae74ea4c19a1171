"""Which counters a worker must have read before its energy can be said to be measured: those of its own devices.

A worker on a GPU whose counter is silent may still read the host's processors. That is a part of what it used, and a
part of the energy is not the energy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

#: Stands for "a processor's counter" where none of them was read, so its full name is not known.
CPU = "cpu"


def unread_domains(devices: Iterable[str], read: Collection[str]) -> tuple[str, ...]:
    """Domains that are missing in `read`, in the order of the devices.

    Args:
        devices: what a worker holds: UUIDs of GPUs, or "cpu". A processor is read where any "cpu:" domain is.
        read: domains that its counter reads have.
    """
    own = (CPU if device == CPU else f"gpu:{device}" for device in devices)
    return tuple(
        d for d in own if d not in read and not (d == CPU and any(name.startswith("cpu:") for name in read))
    )
