"""Does the ledger close? Six checks, and the evidence class that follows from them.

    C1  per counter (boot, epoch, domain): segments and gaps = the counter's growth           exact
        per account that nobody closed: cannot be made, so it does not hold for the job
    C2  per job: energy of accepted images + everything else = segments and gaps              exact
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
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

import numpy as np

from millijoule.pipeline.energy import evidence
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.counter_split import MISSING
from millijoule.pipeline.energy.ledger import Ledger
from millijoule.workers.meters.own_devices import unread_domains
from millijoule.workers.schemas import Commit

#: What each check compares.
CHECKS = {
    "C1": "segments and gaps = the counter's growth",
    "C2": "images and overhead = all segments and gaps",
    "C3": "devices and declared rest = node meter",
    "C4": "counter = integral of power",
    "C5": "one attempt and one segment per shard",
    "C6": "wall clock and monotonic clock",
}

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

#: Entries whose domains are looked at together: some megabytes.
ENTRIES_AT_ONCE = 1 << 12


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
        residual_mj = self.residual_mj
        return None if residual_mj is None or not self.expected_mj else residual_mj / self.expected_mj

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
    """What the image table holds, gathered while it is written. Per commit: its images, and whether they have energy."""

    images: np.ndarray
    charged: np.ndarray
    direct_mj: int = 0
    full_mj: int | None = 0  # None once an image has none

    @staticmethod
    def of(commits: CommitTable) -> ImageTotals:
        """No images of `commits` yet."""
        return ImageTotals(np.zeros(len(commits), np.int64), np.zeros(len(commits), bool))

    def add(self, commit: np.ndarray, direct_mj: np.ndarray, full_mj: np.ndarray) -> None:
        """Add images: the number of each one's commit, and its energies (`MISSING`: not known)."""
        np.add.at(self.images, commit, 1)
        known = direct_mj != MISSING
        self.charged[commit[known]] = True
        self.direct_mj += int(direct_mj[known].sum())
        if self.full_mj is not None:
            self.full_mj = None if (full_mj == MISSING).any() else self.full_mj + int(full_mj.sum())


def close_ledger(
    ledger: Ledger, commits: CommitTable, images: ImageTotals, power: PowerSeries, nodes: Sequence[ClosureRow]
) -> list[ClosureRow]:
    """All checks over one job; `nodes` are the rows of C3, see `pipeline.energy.node_closure`."""
    shards, commit = ledger.entries.shards_of(commits.attempts())
    return [
        *_counters(ledger),
        *_images(ledger, commits, images, shards[commit >= 0], commit[commit >= 0]),
        *nodes,
        *_power(ledger, power),
        _attempts(ledger, commits, images, shards, commit),
        *_clocks(ledger),
    ]


def evidence_class(
    closure: Iterable[ClosureRow],
    commits: Iterable[Commit],
    devices: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The evidence class of a job: exact checks hold and every device was read (measured), C4 (power), C3 (node).

    Args:
        closure: all checks of the job.
        commits: of all its shards, or one for each worker, device and set of domains.
        devices: what each worker held, by worker id; of a worker not in it, the device its commits name.
    """
    passed: dict[str, set[bool | None]] = defaultdict(set)
    for row in closure:
        passed[row.check].add(row.passed)
    exact = all(passed[check] == {True} for check in EXACT_CHECKS)
    return evidence.evidence_class(
        # every device that made a shard was read itself
        measured=exact
        and not any(
            unread_domains((devices or {}).get(c.worker_id, (c.device,)), c.energy_domains) for c in commits
        ),
        power_agrees=passed["C4"] == {True},
        node_closes=passed["C3"] == {True},
    )


def _exact(check: str, scope: str, expected_mj: int | None, found_mj: int | None, note: str) -> ClosureRow:
    passed = None if expected_mj is None or found_mj is None else expected_mj == found_mj
    return ClosureRow(check, scope, expected_mj, found_mj, 0.0, passed, note)


def _counters(ledger: Ledger) -> list[ClosureRow]:
    open_ends = [
        ClosureRow("C1", f"{u.worker_id} {device}", None, None, 0.0, None, f"account not closed: {u.reason}")
        for u in ledger.unclosed
        for device in u.devices
    ]
    if not ledger.runs:
        return [ClosureRow("C1", "counter", None, None, 0.0, None, "no counter was read"), *open_ends]
    grown: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for run in ledger.runs:
        grown[run.boot_id, run.epoch, run.domain].append(run.energy_mj)
    held = _held(ledger)
    for gap in ledger.gaps:
        held[gap.boot_id, gap.epoch, gap.domain] += gap.energy_mj
    rows = []
    for key in sorted(grown.keys() | {k for k, mj in held.items() if mj}):
        stretches = grown.get(key, ())
        note = f"stretches without a reset: {len(stretches)}" if stretches else "no reading belongs to it"
        scope = f"{key[2]} boot {key[0]} epoch {key[1]}"
        rows.append(_exact("C1", scope, sum(stretches), held[key], note))
    return open_ends + rows


def _held(ledger: Ledger) -> Counter[tuple[str, int, str]]:
    """What the entries have of each counter (boot, epoch, domain)."""
    entries, held = ledger.entries, Counter[tuple[str, int, str]]()
    for begin in range(0, len(entries), ENTRIES_AT_ONCE):
        end = min(begin + ENTRIES_AT_ONCE, len(entries))
        domain = entries.domain_codes(begin, end)
        reads = np.repeat(entries.open[begin:end], np.diff(entries.first[begin : end + 1]))
        shares = entries.shares[entries.first[begin] : entries.first[end]]
        key = np.stack([entries.columns.boot[reads], domain, entries.epoch_of(reads, domain)], axis=1)
        order = np.lexsort(key.T)  # ten times as fast as np.unique of rows
        key, mj = key[order], np.where(shares == MISSING, 0, shares)[order]
        begins = np.flatnonzero(np.any(np.diff(key, axis=0, prepend=-1), axis=1))[: len(key)]
        totals = np.add.reduceat(mj, begins).tolist() if len(key) else []
        for (boot, code, epoch), total in zip(key[begins].tolist(), totals, strict=True):
            held[entries.names[boot], epoch, entries.domain_names[code]] += total
    return held


def _images(
    ledger: Ledger, commits: CommitTable, images: ImageTotals, shards: np.ndarray, commit: np.ndarray
) -> list[ClosureRow]:
    """C2; `shards` are the entries of committed shards, `commit` the number of each one's commit."""
    entries = ledger.entries
    gaps = sum(g.energy_mj for g in ledger.gaps)
    measured = int(entries.known_mj.sum()) + gaps
    of_images = shards[images.charged[commit]]
    overhead = measured - int(entries.known_mj[of_images].sum())
    # what a shard used for those of its images that nobody got
    shares = commits.shares(entries.shard_energies(commits.attempts()))
    overhead += int((shares.filtered_mj + shares.quarantined_mj)[images.charged].sum())
    off = sum(g.energy_mj for g in ledger.gaps if g.segment_class == "off")
    n = int(images.images.sum())
    direct: tuple[int | None, int | None] = (None, None)
    note = "no counter was read"
    if ledger.runs:
        direct = (measured, images.direct_mj + overhead)
        note = f"images and overhead against segments and gaps; images: {n}"
    full_note = "something was not measured, or there is no image"
    if ledger.complete and images.full_mj is not None and n:
        full_note = "full energies of all images against everything used while the job ran"
    full = (measured - off if ledger.complete else None, images.full_mj if n else None)
    return [_exact("C2", "job, direct", *direct, note), _exact("C2", "job, full", *full, full_note)]


def _attempts(
    ledger: Ledger, commits: CommitTable, images: ImageTotals, shards: np.ndarray, commit: np.ndarray
) -> ClosureRow:
    """C5; `shards` are the entries of shards, `commit` the number of each one's commit, -1 where it has none."""
    entries = ledger.entries
    shard_ids, times = np.unique(commits.number("shard_id"), return_counts=True)
    problems = [
        f"shard {shard_ids[i]} is committed {times[i]} times" for i in np.flatnonzero(times != 1).tolist()
    ]
    segments = np.bincount(commit[commit >= 0], minlength=len(commits))
    # of an attempt that stands twice, the first
    first = commits.attempts().find(commits.number("shard_id"), commits.text("attempt_id"))
    due = 1 + commits.parts()
    for i in np.flatnonzero((segments != due) & (first == np.arange(len(commits)))).tolist():
        c = commits[i]
        problems.append(f"shard {c.shard_id}: {segments[i]} segments of attempt {c.attempt_id}")
    uncommitted = (entries[int(n)].segment for n in shards[commit < 0])
    problems += [
        f"shard {shard}: attempt {attempt} is charged but not committed"
        for shard, attempt in dict.fromkeys((s.shard_id, s.attempt_id) for s in uncommitted)
    ]
    made = images.images[first]
    for i in np.flatnonzero(made != commits.number("images_ok")).tolist():
        c = commits[i]
        problems.append(f"shard {c.shard_id}: {made[i]} images, the commit says {c.images_ok}")
    note = f"shards: {len(shard_ids)}, images: {int(images.images.sum())}, violations: {len(problems)}"
    return ClosureRow("C5", "job", None, None, 0.0, not problems, "; ".join([note, *problems[:3]]))


def _power(ledger: Ledger, power: PowerSeries) -> list[ClosureRow]:
    if not power:
        return [_unknown_power("device", "power was not sampled")]
    # (ns, mJ) readings of each stretch without a reset
    stretches: dict[tuple[str, str], list[list[tuple[int, int]]]] = defaultdict(list)
    for run, readings in ledger.series(r for r in ledger.runs if r.domain.startswith("gpu:")):
        stretches[run.boot_id, run.domain].append([(t_ns, mj) for t_ns, mj, _ in readings.tolist()])
    rows = []
    for key, of_counter in sorted(stretches.items()):
        samples = sorted(set(zip(*power.get(key, ((), ())), strict=True)))
        rows.append(_power_of(f"{key[1]} boot {key[0]}", of_counter, samples))
    return rows or [_unknown_power("device", "no GPU counter was read")]


def _unknown_power(scope: str, note: str) -> ClosureRow:
    return ClosureRow("C4", scope, None, None, POWER_TOLERANCE_SHARE, None, note)


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
    passed: bool | None = worst <= POWER_TOLERANCE_SHARE
    note = (
        f"counter against power (NVML 186); blocks: {blocks}, worst block: {worst:.1%}, "
        f"compared: {coverage:.1%} of the counted time"
    )
    if passed and coverage < MIN_POWER_COVERAGE_SHARE:
        passed, note = None, f"{note}, less than {MIN_POWER_COVERAGE_SHARE:.0%}"
    return ClosureRow("C4", scope, round(integral_mj), counter_mj, POWER_TOLERANCE_SHARE, passed, note)


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
    moved = {boot_id: most - least for boot_id, (_, least, most) in ledger.entries.clocks().items()}
    return [
        ClosureRow(
            *("C6", f"boot {boot_id}", None, None, None, moved_ns <= CLOCK_TOLERANCE_NS),
            f"wall clock moved {moved_ns / 1e6:.3f} ms; between hosts it is not known",
            residual_ns=moved_ns,
            tolerance_ns=CLOCK_TOLERANCE_NS,
        )
        for boot_id, moved_ns in sorted(moved.items())
    ]
