"""Accounts of devices: all that a worker's devices use is the job's, from the worker's opening read to its closing one.

A worker states its first counter read before it loads its model (`WorkerEnvironment.opened`). When it is gone, its driver
records a last read (`WorkerClosing`), its own or somebody else's. What lies in between and in no segment becomes a "gap"
segment of the worker. Where nobody read a device afterwards, the account ends in a gap of unknown energy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from millijoule.pipeline.energy.counter_split import MAX_GAP_NS
from millijoule.workers.meters.counter_book import is_plausible
from millijoule.workers.schemas import CounterRead, Segment, WorkerClosing, WorkerEnvironment

#: Why there is no end where no driver recorded any.
NEVER_CLOSED = "it never said its last words and nobody read its devices afterwards"


@dataclass(frozen=True)
class Unclosed:
    """An account without an end: what `devices` (domains) used for the worker since `since_wall_ns` is not known."""

    worker_id: str
    host: str
    devices: tuple[str, ...]
    since_wall_ns: int
    reason: str

    def __str__(self) -> str:
        return f"worker {self.worker_id} on {self.host}, {', '.join(self.devices)}: {self.reason}"

    def as_record(self) -> dict[str, Any]:
        """For `stats.json`."""
        return {
            "worker_id": self.worker_id,
            "host": self.host,
            "devices": list(self.devices),
            "since": utc_text(self.since_wall_ns),
            "reason": self.reason,
        }


def utc_text(t_wall_ns: int) -> str:
    """A time since 1970 to the second."""
    return datetime.fromtimestamp(t_wall_ns // 10**9, UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class AccountGap:
    """A stretch of a worker's account that it did not record; the energy of the domains `unknown` cannot be known."""

    segment: Segment
    unknown: tuple[str, ...] = ()


@dataclass
class Chain:
    """What one worker recorded: its first and last read, the domains it ever read, and stretches without a record."""

    first: CounterRead
    last: CounterRead
    domains: set[str] = field(default_factory=set)
    holes: list[tuple[CounterRead, CounterRead]] = field(default_factory=list)


def account_gaps(
    chains: dict[str, Chain],
    environments: Mapping[str, WorkerEnvironment],
    closings: Mapping[str, WorkerClosing],
) -> tuple[list[AccountGap], tuple[Unclosed, ...]]:
    """What is missing between the segments of each worker, before and after them.

    Args:
        chains: what each worker recorded, by worker id; taken over, and has those afterwards that recorded nothing.
        environments: of the workers; one that states no opening read owes no account beyond what it recorded.
        closings: by worker id.

    Returns:
        The gaps, of each worker in order of time, and the accounts that nobody closed.
    """
    gaps: list[AccountGap] = []
    unclosed: list[Unclosed] = []
    for worker_id in sorted(chains.keys() | environments.keys()):
        own, chain = environments.get(worker_id), chains.get(worker_id)
        opened = own.opened if own is not None else None
        if opened is not None:
            if chain is None:
                chain = chains[worker_id] = Chain(opened, opened)
            elif is_before(opened, chain.first):
                chain.holes.insert(0, (opened, chain.first))
            chain.domains.update(opened.energy_mj)
        if chain is None:
            continue
        gaps += [AccountGap(Segment(worker_id, "gap", *hole)) for hole in chain.holes]
        if own is not None and opened is not None:
            end, without = _end_of(own, chain, closings.get(worker_id))
            gaps += end
            unclosed += without
    return gaps, tuple(unclosed)


def is_before(read: CounterRead, other: CounterRead) -> bool:
    """Whether `read` is the earlier one; False where that cannot be known."""
    return read.boot_id == other.boot_id and read.t_mono_ns < other.t_mono_ns


def _end_of(
    own: WorkerEnvironment, chain: Chain, closing: WorkerClosing | None
) -> tuple[list[AccountGap], list[Unclosed]]:
    """What follows the last read of a worker's own records, and for which of its domains it has no end."""
    last, domains = chain.last, sorted(chain.domains)
    # an estimate is of the process that makes it
    moment = Segment(own.worker_id, "gap", last, replace(last, estimate_mj=None))
    if not domains:  # nothing could be read from the beginning: no account, but its energy is missing
        said = closing.read if closing is not None and closing.by == own.worker_id else None
        if chain.first is not last and said is not None:
            return [], []  # its last words are among its records
        if said is not None and is_before(last, said):  # while it loaded: its estimate is known
            moment = replace(moment, close=replace(said, energy_mj={}))
        return [AccountGap(moment)], []
    read = _closing_read(own, last, closing)
    if isinstance(read, str):
        unknown, end = dict.fromkeys(domains, read), moment
    else:
        unknown = {d: why for d in domains if (why := _broken(last, read, d))}
        kept = {d: mj for d, mj in read.energy_mj.items() if d in chain.domains}
        estimate = read.estimate_mj if closing is not None and closing.by == own.worker_id else None
        end = Segment(own.worker_id, "gap", last, replace(read, energy_mj=kept, estimate_mj=estimate))
        if not unknown and not is_before(last, read) and kept.keys() <= last.energy_mj.keys():
            # nothing to add; but a worker that recorded nothing was there all the same
            return [AccountGap(replace(moment, close=last))] if chain.first is last else [], []
    by_reason: dict[str, list[str]] = defaultdict(list)
    for domain, why in unknown.items():
        by_reason[why].append(domain)
    return [AccountGap(end, tuple(unknown))], [
        Unclosed(own.worker_id, own.host, tuple(devices), last.t_wall_ns, why)
        for why, devices in by_reason.items()
    ]


def _closing_read(
    own: WorkerEnvironment, last: CounterRead, closing: WorkerClosing | None
) -> CounterRead | str:
    """The read that ends the account of a worker, or why there is none."""
    if closing is None:
        return NEVER_CLOSED
    read = closing.read
    if read is None:
        return closing.reason or "nobody could read its devices afterwards"
    if read.boot_id != last.boot_id:
        return "its devices were read again only after its host had started anew"
    later_ns = read.t_mono_ns - last.t_mono_ns
    if later_ns < 0:
        return f"its account was closed {-later_ns / 1e9:.0f} s before its last record: it worked on"
    if closing.driver_epoch != own.driver_epoch and later_ns > MAX_GAP_NS:
        return (
            f"its devices were read again only by a later run of the job, {later_ns / 60e9:.0f} minutes on: how long "
            "it worked is not known"
        )
    return read


def _broken(last: CounterRead, read: CounterRead, domain: str) -> str | None:
    """Why the growth of a counter between two reads of one boot is not known, or None where it is.

    Where `last` lacks the domain, the ledger decides by the reads before it.
    """
    if domain not in read.energy_mj:
        return "the counter could not be read when the others were"
    if domain in last.energy_mj:
        grown_mj = read.energy_mj[domain] - last.energy_mj[domain]
        same_scale = read.epoch_of(domain) == last.epoch_of(domain)
        if not same_scale or not is_plausible(grown_mj, read.t_mono_ns - last.t_mono_ns):
            return "the counter was reset before it was read again"
    return None
