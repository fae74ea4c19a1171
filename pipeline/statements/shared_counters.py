"""Counters that several of the stated jobs read at one time.

A counter counts whoever uses its device, so each of two jobs at once on one device has all that it used: true of either, and
stated twice by both together. Such energy is missing in a statement over both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from millijoule.pipeline.energy.intervals import Interval, common
from millijoule.pipeline.statements.job_energy import Counter, JobEnergy, KindEnergy

#: Other outputs and the nanoseconds counted by both, by counter.
Shared = Mapping[Counter, Sequence[tuple[str, int]]]


def without_shared(jobs: Sequence[JobEnergy]) -> tuple[JobEnergy, ...]:
    """`jobs`, in which energy that another one of them counted as well is missing, with the reason."""
    readers: dict[Counter, list[tuple[int, Sequence[Interval]]]] = defaultdict(list)
    for number, job in enumerate(jobs):
        for kind in job.kinds:
            for counter, times in kind.counters.items():
                readers[counter].append((number, times))
    shared: list[dict[Counter, list[tuple[str, int]]]] = [defaultdict(list) for _ in jobs]
    for counter, of in readers.items():
        for place, (a, times) in enumerate(of):
            for b, others in of[place + 1 :]:
                if ns := sum(end - begin for begin, end in common(times, others)):
                    shared[a][counter].append((jobs[b].output, ns))
                    shared[b][counter].append((jobs[a].output, ns))
    return tuple(_without(job, of) if of else job for job, of in zip(jobs, shared, strict=True))


def _without(job: JobEnergy, shared: Shared) -> JobEnergy:
    kinds = tuple(_kind(kind, shared) for kind in job.kinds)
    reasons = tuple(
        f"{new.kind}: {reason}"
        for old, new in zip(job.kinds, kinds, strict=True)
        for reason in new.missing[len(old.missing) :]
    )
    unknown = replace(job.measured, energy_mj=None, gco2e=None)
    return replace(job, kinds=kinds, measured=unknown, missing=job.missing + reasons)


def _kind(kind: KindEnergy, shared: Shared) -> KindEnergy:
    reasons = tuple(
        f"{output} counted {domain} for {ns / 1e9:.3g} s of the same time, and both together would state that energy twice: state "
        "them apart"
        for (_, domain), others in shared.items()
        if (_, domain) in kind.counters
        for output, ns in others
    )
    if not reasons:
        return kind
    unknown = replace(kind.measured, energy_mj=None, gco2e=None)
    return replace(kind, measured=unknown, missing=kind.missing + reasons)
