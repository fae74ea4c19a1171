"""What a running job has used so far, and the caps on it: kilowatt-hours, money, grams of CO2e, time.

Fed with the segments that arrive with commits, in any order. Workers that share a counter report overlapping stretches
of it, so growth is counted once per counter, not once per worker. The exact books are the ledger's, made at the end;
this running sum is what leasing stops by. A worker without a counter is counted by its estimate, and that is said.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from millijoule.pipeline.energy.carbon import MJ_PER_KWH, Rate
from millijoule.pipeline.energy.counter_split import MAX_GAP_NS
from millijoule.workers.errors import UsageError
from millijoule.workers.schemas import Segment

_DURATION_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Caps:
    """Limits of a whole job, earlier runs of it included; `deadline_unix` is a point in time. None: no limit.

    `max_kwh` is of the counters (or the estimate), as they read; cost and carbon are that times `pue`.
    """

    max_kwh: float | None = None
    max_cost: float | None = None
    max_gco2: float | None = None
    deadline_unix: float | None = None
    price: Rate | None = None
    carbon: Rate | None = None
    pue: float = 1.0

    @property
    def on_energy(self) -> bool:
        return (self.max_kwh, self.max_cost, self.max_gco2) != (None, None, None)


class Stretch(NamedTuple):
    """A time in which segments claim all that a counter counted: from its first read to its last."""

    t_first_ns: int
    first_mj: int
    t_last_ns: int
    last_mj: int


@dataclass
class CounterUse:
    """One counter of one boot and epoch: the stretches that segments claim, in order, apart from each other."""

    stretches: list[Stretch] = field(default_factory=list)
    total_mj: int = 0
    claimed_mj: int = 0

    def add(self, new: Stretch) -> int:
        """Count a segment's stretch; returns by how much `total_mj` grew."""
        total_before = self.total_mj
        apart = [s for s in self.stretches if s.t_last_ns < new.t_first_ns or new.t_last_ns < s.t_first_ns]
        joined = [s for s in self.stretches if s not in apart] + [new]
        first, last = min(joined), max(joined, key=lambda s: (s.t_last_ns, s.last_mj))
        self.stretches = sorted(
            [*apart, Stretch(first.t_first_ns, first.first_mj, last.t_last_ns, last.last_mj)]
        )
        self.claimed_mj = sum(s.last_mj - s.first_mj for s in self.stretches)
        # a short time that nobody claims belongs to the job, as a worker that died; a long one lies between two runs
        self.total_mj = self.claimed_mj + sum(
            after.first_mj - before.last_mj
            for before, after in pairwise(self.stretches)
            if after.t_first_ns - before.t_last_ns <= MAX_GAP_NS
        )
        return self.total_mj - total_before


@dataclass
class Spending:
    """Running totals of a job. `measured_mj` counts counters, `estimated_mj` the workers that have none.

    `counters` is by boot id, epoch and domain; `seconds` by segment class, of all workers together; `own` has the time of each worker
    (by boot and id), and its estimate, that were counted: what it sealed as a part may arrive twice, in its last words and in the
    commit of whoever went on.
    """

    caps: Caps = field(default_factory=Caps)
    measured_mj: int = 0
    estimated_mj: int = 0
    cost: float = 0.0
    gco2: float = 0.0
    counters: dict[tuple[str, int, str], CounterUse] = field(default_factory=lambda: defaultdict(CounterUse))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    own: dict[tuple[str, str], tuple[CounterUse, CounterUse]] = field(
        default_factory=lambda: defaultdict(lambda: (CounterUse(), CounterUse()))
    )

    @property
    def unclaimed_mj(self) -> int:
        """Counted during the job, but in no segment that arrived (yet): of workers that died, and of those at work."""
        return sum(c.total_mj - c.claimed_mj for c in self.counters.values())

    @property
    def basis(self) -> str:
        """How the millijoules came about: "measured", "estimated", or both."""
        if not self.estimated_mj:
            return "measured"
        return "partly estimated" if self.measured_mj else "estimated"

    def add(self, segments: Iterable[Segment]) -> None:
        """Count what of `segments` was not counted before."""
        for segment in segments:
            before, after = segment.open, segment.close
            time_used, estimate_used = self.own[before.boot_id, segment.worker_id]
            t_first, t_last = before.t_mono_ns, max(before.t_mono_ns, after.t_mono_ns)
            self.seconds[segment.segment_class] += _new(time_used, t_first, t_first, t_last, t_last) / 1e9
            for domain in sorted(before.energy_mj.keys() & after.energy_mj.keys()):
                scale = (before.boot_id, before.epoch_of(domain))
                if scale != (after.boot_id, after.epoch_of(domain)):
                    continue
                stretch = Stretch(
                    before.t_mono_ns, before.energy_mj[domain], after.t_mono_ns, after.energy_mj[domain]
                )
                if stretch.last_mj >= stretch.first_mj and stretch.t_last_ns >= stretch.t_first_ns:
                    grown = self.counters[*scale, domain].add(stretch)
                    self.measured_mj += grown
                    self._pay(grown, after.t_wall_ns)
            if not before.energy_mj and before.estimate_mj is not None and after.estimate_mj is not None:
                last_mj = max(before.estimate_mj, after.estimate_mj)
                grown = _new(estimate_used, t_first, before.estimate_mj, t_last, last_mj)
                self.estimated_mj += grown
                self._pay(grown, after.t_wall_ns)

    def _pay(self, mj: int, t_wall_ns: int) -> None:
        kwh = mj / MJ_PER_KWH * self.caps.pue
        if self.caps.price is not None:
            self.cost += kwh * self.caps.price.at(t_wall_ns / 1e9)
        if self.caps.carbon is not None:
            self.gco2 += kwh * self.caps.carbon.at(t_wall_ns / 1e9)

    def used_shares(self) -> dict[str, float]:
        """How much of each cap on energy is used, by the cap's name; 1 is all of it, and a cap of 0 is used up."""
        return {name: share for name, share, _, _ in self._caps_on_energy()}

    def _caps_on_energy(self) -> Iterator[tuple[str, float, str, str]]:
        """Each cap's name, the share of it that is used, the option as it was given, and what is used in words."""
        caps = self.caps
        for name, option, unit, used, limit in (
            ("kWh", "--max-kwh", " kWh", (self.measured_mj + self.estimated_mj) / MJ_PER_KWH, caps.max_kwh),
            ("cost", "--max-cost", "", self.cost, caps.max_cost),
            ("gCO2e", "--max-gco2", " gCO2e", self.gco2, caps.max_gco2),
        ):
            if limit is not None:
                share = used / limit if limit else 1.0  # nothing may be used: that is reached at once
                words = f"{used:.3g}{unit} used, {self.basis}" if used else "nothing used yet"
                yield name, share, f"{option} {limit:g}", words

    def is_late(self, now_unix: float) -> bool:
        """Whether the deadline has passed."""
        return self.caps.deadline_unix is not None and now_unix >= self.caps.deadline_unix

    def reached(self, now_unix: float, share_at_work: float = 0.0) -> str | None:
        """The cap that is reached, in words, or None.

        Args:
            now_unix: seconds.
            share_at_work: what the leased shards are expected to add, as a share of what was spent so far. Leasing
                stops when they will use up the cap, not when they have overrun it.
        """
        deadline = self.caps.deadline_unix
        if deadline is not None and self.is_late(now_unix):
            when = datetime.fromtimestamp(deadline).astimezone()
            return f"--deadline ({when.isoformat(timespec='seconds')})"
        for _, share, option, used in self._caps_on_energy():
            if share * (1 + share_at_work) >= 1:
                rest = "" if share >= 1 else "; what is at work is expected to use the rest"
                return f"{option} ({used}{rest})"
        return None


def _new(use: CounterUse, *stretch: int) -> int:
    """Count a stretch; returns by how much what is claimed grew."""
    claimed_before = use.claimed_mj
    use.add(Stretch(*stretch))
    return use.claimed_mj - claimed_before


def parse_deadline(text: str, now_unix: float) -> float:
    """`"90m"`, `"2h"` from now, or an ISO time with its zone such as `2026-03-01T18:00+01:00`, to unix seconds.

    Raises:
        InputError: neither of both.
    """
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text):
        return now_unix + float(match[1]) * _DURATION_UNITS[match[2]]
    try:
        when = datetime.fromisoformat(text)
        if when.tzinfo is not None:
            return when.timestamp()
    except ValueError:
        pass
    raise UsageError(
        f"--deadline {text}: a duration such as 90m or 2h, or a time with its zone such as 2026-03-01T18:00+01:00"
    )
