"""What a dry run says of pools: each of them, what one of its workers showed, and what the job takes on the nodes that are there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from millijoule.jobs.set_up.calibration import calibrate_pool, with_calibration
from millijoule.jobs.set_up.pools import choosing, fit_together, pool_words
from millijoule.jobs.set_up.request import JobRequest
from millijoule.pipeline.energy.carbon import MJ_PER_KWH
from millijoule.pipeline.fleet.policy import FleetPolicy
from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.fleet.rates import ShardCost
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.progress import clock, joules
from millijoule.workers.lease import Calibration
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.shard_rows import Shard

MJ_PER_J = 1000


@dataclass(frozen=True)
class Known:
    """A pool with what it states, or what one of its workers showed in `result`; None: no node of it is there."""

    stated: Pool
    result: Calibration | None

    @property
    def pool(self) -> Pool:
        return self.stated if self.result is None else with_calibration(self.stated, self.result)

    @property
    def how(self) -> str:
        """How its joules are known."""
        if self.stated.joules_per_image is not None:
            return "stated"
        measured = self.result is not None and self.result.energy_mj is not None
        return "measured" if measured else "modelled from CPU time, not measured"


@dataclass(frozen=True)
class Part:
    """What a pool does of a job: its workers, what one makes and takes; None: not known, or not stated."""

    name: str
    workers: int
    images_per_s: float
    joules_per_image: float | None
    how: str
    price_per_hour: float | None


@dataclass(frozen=True)
class Alike:
    """`n_images` in `n_shards` shards, as far as choosing workers asks for them."""

    n_images: int
    n_shards: int

    def __len__(self) -> int:
        return self.n_shards

    def __getitem__(self, shard_id: int) -> Shard:
        images = self.n_images // self.n_shards + (shard_id < self.n_images % self.n_shards)
        return Shard(shard_id, "", 0, images, images, None, None, None, "", "")


def pool_lines(
    request: JobRequest, pools: Sequence[Pool], images: list[ImageRequest], n_images: int, n_shards: int
) -> list[str]:
    """Each pool, what one of its workers showed where there is room for one, and what the job takes on the nodes that are there."""
    known = [
        Known(pool, calibrate_pool(request, pool, images) if pool.options.at_once else None) for pool in pools
    ]
    policy = choosing(request, [k.pool for k in known])
    none_yet = np.zeros(n_shards, bool)
    coordinator = Coordinator(Alike(n_images, n_shards), none_yet, request.options.lease_seconds, 1)
    policy.look(coordinator, [], time.monotonic())
    fit, costs = fit_together(policy), policy.shard_costs()
    lines = []
    for k in known:
        name = k.pool.name
        lines += [f"pool        {pool_words(k.pool, fit[name])}", *_known_lines(k, costs[name])]
    lines.append(f"preferred   {policy.prefer}")
    parts = parts_at_work(policy, {k.pool.name: k.how for k in known}, n_shards)
    price = None if request.caps.price is None else request.caps.price.at(time.time())
    lines += total_lines(parts, n_images, price, request.caps.pue)
    if bytes_each := [k.result.encoded_bytes / max(1, k.result.images) for k in known if k.result]:
        about = round(n_images * max(bytes_each))
        lines.append(f"bytes       about {about} of images in {request.options.output}")
    return lines


def parts_at_work(policy: FleetPolicy, how: dict[str, str], n_shards: int) -> list[Part]:
    """The workers that `policy` chooses and nodes that are there have room for; of pools of which nothing is known, none."""
    fit, parts = fit_together(policy, policy.targets), []
    for name in policy.order():
        pool, workers = policy.pools[name], min(fit[name], n_shards)
        n_shards -= workers
        if workers and pool.images_per_s is not None:
            figures = pool.images_per_s, pool.joules_per_image, how[name], pool.price_per_hour
            parts.append(Part(name, workers, *figures))
    return parts


def _known_lines(known: Known, shard: ShardCost) -> list[str]:
    pool, lines = known.pool, []
    if known.result is None:
        lines.append("            not tried: no node of it is there now")
    if pool.images_per_s is not None:
        energy = "energy unknown"
        if pool.joules_per_image is not None:
            energy = f"{joules(pool.joules_per_image * MJ_PER_J)} per image ({known.how})"
        stated = " (stated)" if known.stated.images_per_s else ""
        lines.append(f"            {pool.images_per_s:.3g} images/s on one worker{stated}, {energy}")
        said = [f"{shard.seconds:.3g} s"]
        said += [joules(shard.joules * MJ_PER_J)] if shard.joules is not None else []
        said += [f"{shard.money:.3g} of money"] if shard.money is not None else []
        lines.append(f"            a shard takes it {', '.join(said)}")
    return lines


@dataclass(frozen=True)
class Totals:
    """What `parts` take for a whole job, start-up not counted; None: not known.

    Attributes:
        without_joules, without_price: pools of which nobody knows that, with their share of the images.
    """

    seconds: float
    images_per_s: float
    joules_per_image: float | None
    kwh: float | None
    devices: float | None
    without_joules: dict[str, float]
    without_price: dict[str, float]


def totals_of(parts: Sequence[Part], n_images: int) -> Totals:
    """All `parts` at work until the last image is made: each makes images as its rate is to that of all."""
    rate = sum(part.workers * part.images_per_s for part in parts)
    shares = {part.name: part.workers * part.images_per_s / rate for part in parts}
    seconds = n_images / rate
    without_joules = {p.name: shares[p.name] for p in parts if p.joules_per_image is None}
    without_price = {p.name: shares[p.name] for p in parts if p.price_per_hour is None}
    per_image = devices = None
    if not without_joules:
        per_image = sum(shares[p.name] * (p.joules_per_image or 0.0) for p in parts)
    if not without_price:
        devices = sum(p.workers * (p.price_per_hour or 0.0) for p in parts) * seconds / 3600
    kwh = None if per_image is None else per_image * n_images * MJ_PER_J / MJ_PER_KWH
    return Totals(seconds, rate, per_image, kwh, devices, without_joules, without_price)


def total_lines(parts: Sequence[Part], n_images: int, price_per_kwh: float | None, pue: float) -> list[str]:
    """Time, energy and cost of the whole job, as far as they are known."""
    if not parts:
        none = "none of the workers that are chosen has room now"
        return [f"time        unknown: {none}", "energy      unknown", "cost        unknown"]
    totals = totals_of(parts, n_images)
    workers = ", ".join(f"{part.name} {part.workers}" for part in parts)
    lines = [
        f"time        about {clock(totals.seconds)} at {totals.images_per_s:.3g} images/s",
        f"            by the workers that have room now ({workers}), start-up not counted",
    ]
    if totals.kwh is None:
        nobody = _named(totals.without_joules)
        lines.append(f"energy      unknown: no counter, no estimate and no joules= of {nobody}")
    else:
        how = ", ".join(f"{part.name} {part.how}" for part in parts)
        if len({part.how for part in parts}) == 1:
            how = parts[0].how
        per_image = joules((totals.joules_per_image or 0.0) * MJ_PER_J)
        lines.append(f"energy      about {per_image} per image, {totals.kwh:.3g} kWh in all ({how})")
    electricity = None if price_per_kwh is None or totals.kwh is None else totals.kwh * pue * price_per_kwh
    if electricity is not None:
        now = f"for electricity, at today's price and PUE {pue:g}"
    if len(totals.without_price) == len(parts):  # nobody pays for devices, as far as is said
        if electricity is not None:
            return [*lines, f"cost        about {electricity:.3g} {now}"]
        return [*lines, f"cost        {_no_electricity(price_per_kwh)}"]
    devices = f"unknown for devices: no price= of {_named(totals.without_price)}"
    if totals.devices is not None:
        devices = f"about {totals.devices:.3g} for devices"
    lines.append(f"cost        {devices}")
    lines.append(
        f"            {_no_electricity(price_per_kwh) if electricity is None else f'about {electricity:.3g} {now}'}"
    )
    if electricity is not None and totals.devices is not None:
        lines.append(f"            about {electricity + totals.devices:.3g} together")
    return lines


def _no_electricity(price_per_kwh: float | None) -> str:
    return (
        "give --price-per-kwh for that of electricity"
        if price_per_kwh is None
        else "unknown for electricity, as its energy is"
    )


def _named(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} ({share:.0%} of the images)" for name, share in shares.items())
