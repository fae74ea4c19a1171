"""Does the ledger close? Six checks, and the evidence class that follows from them.

    C1  per counter (boot, epoch, domain): segments and gaps = the counter's growth           exact
        per account that nobody closed: cannot be made, so it does not hold for the job
    C2  per job: energy of images + everything no image used = segments and gaps              exact
        per job: full energies of all images = everything used while the job ran              exact
    C3  per node: its devices and the declared rest = the node's own meter                    tolerance
    C4  per device: the counter's growth = the integral of its power, block by block          tolerance
    C5  per job: one committed attempt per shard, one segment per such attempt, its images    exact
    C6  per host: the wall clock and the monotonic clock ran alike                            tolerance

A check that cannot be made says so (`passed` None): it is neither passed nor failed. Nothing here does I/O.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import inf

from millijoule.pipeline import evidence
from millijoule.pipeline.apportionment import sum_or_none
from millijoule.pipeline.ledger import Ledger
from millijoule.workers.own_devices import unread_domains
from millijoule.workers.schemas import Commit

CHECKS = ("C1", "C2", "C3", "C4", "C5", "C6")

#: Checks that must hold to the millijoule.
EXACT_CHECKS = ("C1", "C2", "C5")

#: C4: one study of an L4 found 16 %, board makers state 5 %; the smaller is where trust begins.
POWER_TOLERANCE_SHARE = 0.05
#: C4 compares stretches of at least this length: shorter ones say more about sampling than about the sensor.
POWER_BLOCK_NS = 60_000_000_000
#: C4 leaves out stretches in which power was not sampled for longer than this.
MAX_SAMPLE_GAP_NS = 5_000_000_000
#: C4 takes the first sample for so long before it and the last for so long after it: a worker reads its counter just
#: before it begins to sample, and once more when it has stopped, and samples once a second in between.
MAX_EDGE_NS = 2_000_000_000
#: C4 says nothing of a device that was compared for less than this part of the time its counter was followed.
MIN_POWER_COVERAGE_SHARE = 0.90
#: C6: a shard of a second needs its times to about 50 ms.
CLOCK_TOLERANCE_NS = 50_000_000


@dataclass(frozen=True)
class ClosureRow:
    """One check of one thing; a row of the `closure` table. `tolerance_share` 0 means exact."""

    check: str
    scope: str
    expected_mj: int | None
    found_mj: int | None
    tolerance_share: float | None
    passed: bool | None
    note: str
    residual_ns: int | None = None
    tolerance_ns: int | None = None
    tolerance_mj: int | None = None

    @property
    def residual_mj(self) -> int | None:
        return None if self.expected_mj is None or self.found_mj is None else self.found_mj - self.expected_mj

    @property
    def residual_share(self) -> float | None:
        return (
            None if self.residual_mj is None or not self.expected_mj else self.residual_mj / self.expected_mj
        )

    def as_tuple(self) -> tuple:
        """Values in the order of the `closure` table's columns."""
        return (
            *(self.check, self.scope, self.expected_mj, self.found_mj, self.residual_mj, self.residual_share),
            *(self.tolerance_share, self.tolerance_mj, self.residual_ns, self.tolerance_ns),
            *(self.passed, self.note),
        )

    def __str__(self) -> str:
        verdict = {True: "holds", False: "FAILS", None: "not applicable"}[self.passed]
        return f"{self.check} {verdict} for {self.scope}: {self.note}"


#: Per boot and domain the times (CLOCK_MONOTONIC, ns) and values (mW) of power samples, in any order.
PowerSeries = dict[tuple[str, str], tuple["array[int]", "array[int]"]]


@dataclass
class ImageTotals:
    """What the image table holds, gathered while it is written."""

    images: Counter[tuple[int, str]] = field(default_factory=Counter)  # per shard and attempt
    charged: set[tuple[int, str]] = field(default_factory=set)  # attempts whose images have direct energy
    direct_mj: int = 0
    full_mj: int | None = 0  # None once an image has none

    def add(
        self, shard_id: int, attempt_id: str, direct: Sequence[int | None], full: Sequence[int | None]
    ) -> None:
        self.images[shard_id, attempt_id] += len(direct)
        known = sum_or_none(direct)
        if known is not None:
            self.direct_mj += known
            self.charged.add((shard_id, attempt_id))
        if direct:
            whole = sum_or_none(full)
            self.full_mj = None if whole is None or self.full_mj is None else self.full_mj + whole


def close_ledger(
    ledger: Ledger,
    commits: Sequence[Commit],
    images: ImageTotals,
    power: PowerSeries,
    nodes: Sequence[ClosureRow],
) -> list[ClosureRow]:
    """All checks over one job.

    Args:
        ledger: over the segments of all commits and drivers.
        commits: each committed shard once; bodies may be stripped of segments and files.
        images: of the image table.
        power: samples of every device's power.
        nodes: the rows of C3, see `pipeline.node_closure`.
    """
    return [
        *_counters(ledger),
        *_images(ledger, images),
        *nodes,
        *_power(ledger, power),
        _attempts(ledger, commits, images),
        *_clocks(ledger),
    ]


def evidence_class(
    closure: Iterable[ClosureRow],
    commits: Sequence[Commit],
    devices: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """What a job's energy figures rest on, see `pipeline.evidence`.

    Measured is a job whose exact checks hold and whose devices were all read themselves; the second source in the
    device is C4, the node's meter C3.

    Args:
        closure: all checks of the job.
        commits: of all its shards.
        devices: what each worker held, by worker id; of a worker not in it, the device its commits name.
    """
    passed: dict[str, set[bool | None]] = defaultdict(set)
    for row in closure:
        passed[row.check].add(row.passed)
    exact = all(passed[check] == {True} for check in EXACT_CHECKS)
    return evidence.evidence_class(
        measured=exact and not any(_unread(commit, devices or {}) for commit in commits),
        power_agrees=passed["C4"] == {True},
        node_closes=passed["C3"] == {True},
    )


def _unread(commit: Commit, devices: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Counters of the devices that made the shard that were not read themselves."""
    return unread_domains(devices.get(commit.worker_id, (commit.device,)), commit.energy_domains)


def _exact(check: str, scope: str, expected_mj: int | None, found_mj: int | None, note: str) -> ClosureRow:
    comparable = expected_mj is not None and found_mj is not None
    return ClosureRow(
        check, scope, expected_mj, found_mj, 0.0, expected_mj == found_mj if comparable else None, note
    )


def _counters(ledger: Ledger) -> list[ClosureRow]:
    grown: Counter[tuple[str, int, str]] = Counter()
    stretches: Counter[tuple[str, int, str]] = Counter()
    held: Counter[tuple[str, int, str]] = Counter()
    for run in ledger.runs:
        key = (run.boot_id, run.epoch, run.domain)
        grown[key] += run.run.energy_mj
        stretches[key] += 1
    for entry in ledger.entries:
        for domain, mj in entry.energy_mj.items():
            read = entry.segment.open
            held[read.boot_id, read.epoch_of(domain), domain] += mj or 0
    for gap in ledger.gaps:
        held[gap.boot_id, gap.epoch, gap.domain] += gap.energy_mj
    open_ends = [
        ClosureRow("C1", f"{u.worker_id} {device}", None, None, 0.0, None, f"account not closed: {u.reason}")
        for u in ledger.unclosed
        for device in u.devices
    ]
    if not stretches:
        return [ClosureRow("C1", "counter", None, None, 0.0, None, "no counter was read"), *open_ends]
    return open_ends + [
        _exact(
            *("C1", f"{key[2]} boot {key[0]} epoch {key[1]}", grown[key], held[key]),
            f"stretches without a reset: {stretches[key]}"
            if key in stretches
            else "no reading belongs to it",
        )
        for key in sorted(stretches.keys() | {k for k, mj in held.items() if mj})
    ]


def _images(ledger: Ledger, images: ImageTotals) -> list[ClosureRow]:
    measured = sum(e.known_mj for e in ledger.entries) + sum(g.energy_mj for g in ledger.gaps)
    overhead = sum(g.energy_mj for g in ledger.gaps)
    for entry in ledger.entries:
        key = (entry.segment.shard_id, entry.segment.attempt_id)
        if entry.segment_class != "shard" or key not in images.charged:
            overhead += entry.known_mj
    off = sum(g.energy_mj for g in ledger.gaps if g.segment_class == "off")
    n = images.images.total()
    anything = bool(ledger.runs)
    return [
        _exact(
            *(
                "C2",
                "job, direct",
                measured if anything else None,
                images.direct_mj + overhead if anything else None,
            ),
            f"images and overhead against segments and gaps; images: {n}"
            if anything
            else "no counter was read",
        ),
        _exact(
            *("C2", "job, full", measured - off if ledger.complete else None, images.full_mj if n else None),
            "full energies of all images against everything used while the job ran"
            if ledger.complete and images.full_mj is not None and n
            else "something was not measured, or there is no image",
        ),
    ]


def _attempts(ledger: Ledger, commits: Sequence[Commit], images: ImageTotals) -> ClosureRow:
    committed = Counter((c.shard_id, c.attempt_id) for c in commits)
    shards = Counter(c.shard_id for c in commits)
    segments = Counter(
        (e.segment.shard_id, e.segment.attempt_id) for e in ledger.entries if e.segment_class == "shard"
    )
    problems = [f"shard {s} is committed {n} times" for s, n in shards.items() if n != 1]
    problems += [
        f"shard {s}: {segments[s, a]} segments of attempt {a}" for s, a in committed if segments[s, a] != 1
    ]
    problems += [
        f"shard {s}: attempt {a} is charged but not committed" for s, a in segments if (s, a) not in committed
    ]
    problems += [
        f"shard {c.shard_id}: {images.images[c.shard_id, c.attempt_id]} images, the commit says {c.images_ok}"
        for c in commits
        if images.images[c.shard_id, c.attempt_id] != c.images_ok
    ]
    note = f"shards: {len(shards)}, images: {images.images.total()}, violations: {len(problems)}"
    return ClosureRow(
        "C5", "job", None, None, 0.0, not problems, "; ".join([note, *problems[:3]]) if problems else note
    )


def _power(ledger: Ledger, power: PowerSeries) -> list[ClosureRow]:
    if not power:
        return [_unknown_power("device", "power was not sampled")]
    rows = []
    for key, stretches in sorted(_readings(ledger).items()):
        if key[1].startswith("gpu:"):
            samples = sorted(set(zip(*power.get(key, ((), ())), strict=True)))
            rows.append(_power_of(f"{key[1]} boot {key[0]}", stretches, samples))
    return rows or [_unknown_power("device", "no GPU counter was read")]


def _unknown_power(scope: str, note: str) -> ClosureRow:
    return ClosureRow("C4", scope, None, None, POWER_TOLERANCE_SHARE, None, note)


def _readings(ledger: Ledger) -> Mapping[tuple[str, str], list[list[tuple[int, int]]]]:
    """Per boot and domain the (time ns, counter mJ) readings of each stretch without a reset."""
    seen: dict[tuple[str, int, str], set[tuple[int, int]]] = defaultdict(set)
    for entry in ledger.entries:
        for read in (entry.segment.open, entry.segment.close):
            for domain, mj in read.energy_mj.items():
                seen[read.boot_id, read.epoch_of(domain), domain].add((read.t_mono_ns, mj))
    stretches: dict[tuple[str, str], list[list[tuple[int, int]]]] = defaultdict(list)
    for run in ledger.runs:
        first, last = tuple(run.run.first), tuple(run.run.last)
        inside = [r for r in sorted(seen[run.boot_id, run.epoch, run.domain]) if first <= r <= last]
        stretches[run.boot_id, run.domain].append(inside)
    return stretches


def _power_of(
    scope: str, stretches: list[list[tuple[int, int]]], samples: list[tuple[int, int]]
) -> ClosureRow:
    """C4 of one device: each block by itself, because errors of opposite sign would cancel in the sum."""
    curve = _PowerCurve(samples)
    integral_mj, counter_mj, blocks, worst, compared_ns = 0.0, 0, 0, 0.0, 0
    for (t0, mj0), (t1, mj1) in _power_blocks(stretches, curve):
        block_mj = curve.energy_mj(t1) - curve.energy_mj(t0)
        integral_mj, counter_mj, blocks = integral_mj + block_mj, counter_mj + mj1 - mj0, blocks + 1
        worst = max(worst, abs(mj1 - mj0 - block_mj) / block_mj if block_mj else inf)
        compared_ns += t1 - t0
    if not blocks:
        return _unknown_power(scope, "power was not sampled for a minute")
    counted_ns = sum(readings[-1][0] - readings[0][0] for readings in stretches)
    coverage = compared_ns / counted_ns
    passed = worst <= POWER_TOLERANCE_SHARE
    note = (
        f"counter against power (NVML 186); blocks: {blocks}, worst block: {worst:.1%}, "
        f"compared: {coverage:.1%} of the counted time"
    )
    if passed and coverage < MIN_POWER_COVERAGE_SHARE:
        note += f", less than {MIN_POWER_COVERAGE_SHARE:.0%}"
    verdict = None if passed and coverage < MIN_POWER_COVERAGE_SHARE else passed
    return ClosureRow("C4", scope, round(integral_mj), counter_mj, POWER_TOLERANCE_SHARE, verdict, note)


def _power_blocks(
    stretches: list[list[tuple[int, int]]], curve: _PowerCurve
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last reading of each block: consecutive ones of at least `POWER_BLOCK_NS`, power known throughout.

    What remains before a silence or the end joins the last block, so that what was sampled is compared.
    """
    for readings in stretches:
        begin, block = 0, None
        for end in range(1, len(readings)):
            if not curve.is_known(readings[end - 1][0], readings[end][0]):
                if block is not None:
                    yield block[0], readings[end - 1]
                begin, block = end, None
            elif readings[end][0] - readings[begin][0] >= POWER_BLOCK_NS:
                if block is not None:
                    yield block
                begin, block = end, (readings[begin], readings[end])
        if block is not None:
            yield block[0], readings[-1]


class _PowerCurve:
    """A device's power between its samples (ns, mW) by straight lines; held for `MAX_EDGE_NS` before and after them.

    Args:
        samples: in order of time.
    """

    def __init__(self, samples: list[tuple[int, int]]) -> None:
        if samples:
            (first_ns, first_mw), (last_ns, last_mw) = samples[0], samples[-1]
            samples = [(first_ns - MAX_EDGE_NS, first_mw), *samples, (last_ns + MAX_EDGE_NS, last_mw)]
        self._samples = samples
        self._at = [t for t, _ in samples]
        parts = ((b[0] - a[0]) * (a[1] + b[1]) / 2e9 for a, b in pairwise(samples))
        self._energy = [0.0, *accumulate(parts)]
        holes = [(a, b) for a, b in pairwise(self._at) if b - a > MAX_SAMPLE_GAP_NS]
        self._hole_begins, self._hole_ends = [a for a, _ in holes], [b for _, b in holes]

    def is_known(self, t0_ns: int, t1_ns: int) -> bool:
        """Whether no hole, and neither end of the samples, lies between two times."""
        if not self._at or t0_ns < self._at[0] or t1_ns > self._at[-1]:
            return False
        hole = bisect_right(self._hole_ends, t0_ns)
        return hole == len(self._hole_ends) or self._hole_begins[hole] >= t1_ns

    def energy_mj(self, t_ns: int) -> float:
        """Integral up to `t_ns`, a time at which power is known."""
        i = min(max(bisect_left(self._at, t_ns), 1), len(self._at) - 1)
        (t0, p0), (t1, p1) = self._samples[i - 1], self._samples[i]
        p = p0 + (p1 - p0) * (t_ns - t0) / (t1 - t0) if t1 > t0 else p0
        return self._energy[i - 1] + (t_ns - t0) * (p0 + p) / 2e9


def _clocks(ledger: Ledger) -> list[ClosureRow]:
    offsets: dict[str, tuple[int, int]] = {}
    for entry in ledger.entries:
        for read in (entry.segment.open, entry.segment.close):
            offset = read.t_wall_ns - read.t_mono_ns
            low, high = offsets.get(read.boot_id, (offset, offset))
            offsets[read.boot_id] = min(low, offset), max(high, offset)
    return [
        ClosureRow(
            *("C6", f"boot {boot_id}", None, None, None, high - low <= CLOCK_TOLERANCE_NS),
            f"wall clock moved {(high - low) / 1e6:.3f} ms; between hosts it is not known",
            residual_ns=high - low,
            tolerance_ns=CLOCK_TOLERANCE_NS,
        )
        for boot_id, (low, high) in sorted(offsets.items())
    ]
