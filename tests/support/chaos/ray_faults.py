"""The kinds of faults of storms on a real Ray cluster, and what one integer makes of them.

Two of three seeds have every kind, one after another; the third has one kind only, so that what it costs can be told. Kinds that
forked storms have, too, have the same names.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from support.chaos.faults import COUNTER, DEVICE, DRIVER_ENDS

#: Kinds of requests that fail on the way, and how many of them.
NETWORK = {
    "503 storm": ("status", 40),
    "connections reset": ("reset", 6),
    "acknowledgements lost": ("ack_lost", 4),
    "answers truncated": ("truncate", 4),
    "requests cut": ("cut", 4),
    "store slow": ("latency", 20),
}
#: Signals to the command that people run, to what Ray started, and to the server; a head or a server that ended comes back.
SIGNALS = (
    *("worker killed", "worker stopped for a while", "worker terminated"),
    *("raylet killed", "raylet stopped for a while", "raylet terminated"),
    *("head killed", "head stopped for a while", "head terminated"),
    *("store killed", "store stopped for a while", "store terminated"),
    *("driver stopped for a while", *DRIVER_ENDS),
)
HOST = ("counter reset", "counter book lost", "counter book damaged", "signs of life lost")
#: When the job is done: its own check must say so.
AFTER = ("object corrupted", "object missing")

KINDS = (*NETWORK, *SIGNALS, "second driver", *HOST, *DEVICE, *COUNTER)

#: After these a total may be missing, but never false; after others it must be certified.
MAY_HIDE_ENERGY = {
    *("counter reset", "counter book lost", "counter book damaged", "signs of life lost", *COUNTER),
    *("raylet killed", "raylet stopped for a while", "raylet terminated"),
    *("head killed", "head stopped for a while", "head terminated"),
    *("second driver", *DRIVER_ENDS),
}

#: Only a server that keeps its objects elsewhere can be ended and come back.
ENDS_THE_STORE = ("store killed", "store terminated")


@dataclass(frozen=True)
class RayStorm:
    """A job of `images` images, and what strikes it, in this order; each once its first commit is there."""

    seed: int
    images: int
    kinds: tuple[str, ...]
    after: tuple[str, ...] = ()


def storm(seed: int, *, store_may_end: bool = True) -> RayStorm:
    """What `seed` stands for."""
    rng = random.Random(seed)
    kinds = [k for k in KINDS if store_may_end or k not in ENDS_THE_STORE]
    if seed % 3 == 2:
        kind = kinds[seed // 3 % len(kinds)]
        times = 1 if kind in ("second driver", *DRIVER_ENDS) or kind.startswith("head") else 3
        return RayStorm(seed, 320, (kind,) * times)
    rng.shuffle(kinds)
    return RayStorm(seed, 800, tuple(kinds), AFTER)
