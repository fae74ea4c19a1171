"""The simulated fleets and where their figures are from: published ones are cited, the rest is assumed and says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from millijoule.jobs.simulating.devices import DeviceKind
from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.running.demand import PoolOptions

#: Taken back per held hour, and hours until it can be had again. Pooled over the four zones of a trace of one spot V100 on AWS from
#: 2023-04-22, a point every 32 s: 202 losses in 431.2 of 709.7 hours.
SPOT_LOSSES_PER_HOUR = 202 / 431.2
SPOT_OUTAGE_S = (709.7 - 431.2) / 202 * 3600
SPOT_PRICE = 0.35

ASSUMPTIONS: dict[str, str] = {
    "model": "SDXL base, 1024x1024, 25 steps, float16, at its best batch",
    "joules per image, H100 and A100": "738 and 1,023 J, of the GPU alone: ML.ENERGY leaderboard, version 2",
    "joules per image, L4 and T4": "assumed: 1.0 and 2.3 times the A100's; varied by the option --small-factor",
    "power while drawing": "assumed: 0.97 of 700 W (H100), and 400, 72 and 70 W, the boards' limits (A100, L4, T4); the rate follows",
    "power while held and idle": "assumed: 110, 85, 22 and 18 W (a context is loaded)",
    "price per device hour": f"assumed: 4.0, 2.0, 0.8 and 0.5 of any currency; spot at {SPOT_PRICE} of it",
    "start": "assumed: 60 s for a node, 60 s for process and model; a node is held for 60 s after its last worker",
    "spot": "losses and outages are exponential with the means of a trace of single spot V100 on AWS: 0.47 losses per held hour, "
    "1.38 hours until the next one (github.com/skypilot-org/spot-traces, commit 221da1ab, preemption/1-node/aws-04-22-2023, of "
    "the paper Can't Be Late, NSDI 2024). A loss is sudden: no notice is used, the shard at work is lost",
    "faults": "worker processes end once in 1,000 device hours for no reason of the job (assumed; Llama 3 counted one unexpected "
    "interruption in about 50,000 GPU hours, arXiv 2407.21783)",
    "boundary": "the devices' own power while they are held; hosts, network and cooling are not in it",
    "work-stealing": "today's single pool: every device takes the next shard when it is free, all of one size, "
    "idle ones race stragglers at the end",
}

#: Joules per image, power while drawing and idle, price.
_KINDS = {
    "H100": (738.0, 679.0, 110.0, 4.0),
    "A100": (1023.0, 400.0, 85.0, 2.0),
    "L4": (1023.0, 72.0, 22.0, 0.8),
    "T4": (2353.0, 70.0, 18.0, 0.5),
}
#: Devices of each kind in a hundred, by the name of a fleet.
MIXES: dict[str, dict[str, int]] = {
    "even": {"H100": 25, "A100": 25, "L4": 25, "T4": 25},
    "old": {"H100": 10, "A100": 30, "L4": 20, "T4": 40},
    "new": {"H100": 60, "A100": 30, "L4": 10, "T4": 0},
}


def mixed_kinds(
    mix: str, devices: int, *, speed: float = 1.0, spot: bool = False, small_factor: float = 1.0
) -> dict[str, tuple[DeviceKind, int]]:
    """Kinds of devices and how many of each.

    Args:
        speed: images per second times this, joules per image divided by it: of a model with fewer steps.
        spot: half of each kind is spot, as pools of their own.
        small_factor: joules per image of L4 and T4, times this.
    """
    kinds: dict[str, tuple[DeviceKind, int]] = {}
    for name, share in MIXES[mix].items():
        if not share:
            continue
        joules, busy_w, idle_w, price = _KINDS[name]
        joules *= (small_factor if name in ("L4", "T4") else 1.0) / speed
        kind = DeviceKind(name, busy_w / joules, busy_w, idle_w, price, faults_per_hour=1e-3)
        count = devices * share // 100
        if spot:
            kinds[f"{name} spot"] = (
                replace(
                    kind,
                    price=price * SPOT_PRICE,
                    market="spot",
                    preemptions_per_hour=SPOT_LOSSES_PER_HOUR,
                    outage_s=SPOT_OUTAGE_S,
                ),
                count // 2,
            )
            count -= count // 2
        kinds[name] = kind, count
    return kinds


def least_joules(kinds: Mapping[str, tuple[DeviceKind, int]], images: float, seconds: float) -> float:
    """What `images` take in `seconds` where all is known beforehand and no node is lost: the leanest devices, asked for at once.

    Whole devices, spare time, the last shard of each and what is left of a node's time are not counted: no driver comes to it.
    Infinite where all devices together are too slow.
    """
    joules = 0.0
    for kind, count in sorted(kinds.values(), key=lambda each: each[0].j_per_image):
        start_s = kind.boot_s + kind.load_s
        each = kind.images_per_s * max(0.0, seconds - start_s)
        devices = min(count, images / each) if each else 0.0
        joules += devices * (each * kind.j_per_image + start_s * kind.idle_w)
        images -= devices * each
    return joules if images < 1 else math.inf


def pools_of(kinds: Mapping[str, tuple[DeviceKind, int]]) -> list[Pool]:
    """A pool per kind, as `--pool NAME:ray.io/accelerator-type=...,ray.io/market-type=...:workers=0:N` says it."""
    return [
        Pool(
            name.replace(" ", "-"),
            PoolOptions(0, count, gpus_per_worker=1.0, selectors=(dict(kind.labels),)),
            price_per_hour=kind.price,
        )
        for name, (kind, count) in kinds.items()
    ]


def described(kinds: Mapping[str, tuple[DeviceKind, int]]) -> list[dict[str, Any]]:
    """The same for a result file."""
    return [
        {
            "kind": name,
            "devices": count,
            "images_per_s": round(kind.images_per_s, 4),
            "joules_per_image": round(kind.j_per_image, 1),
            "watts": kind.busy_w,
            "idle_watts": kind.idle_w,
            "price_per_hour": kind.price,
            "losses_per_hour": round(kind.preemptions_per_hour, 3),
        }
        for name, (kind, count) in kinds.items()
    ]
