"""Holds what a job says that it used against what its stand-in boards ran (`support.boards`), to the millijoule.

What the job certifies must be the growth of its boards' counters from the first reading that opened an account to a reading
after all that its workers ever spent and read; or it must be missing, with the workers named whose energy nobody knows.
Several such readings may stand at the end, a millijoule apart: of readers, and of workers that ended before they had an account.
A worker whose account could not be written, and that said so in its last words, may have been counted from its own first reading.
A worker that could not read its device when it opened its account makes the total of the job missing, and nobody asks for the device's.
A host counts the resets of all its boards as one: while a board that was not reset had no account open, its pause may be left out.
The job's own record is asked one thing only: which readings opened accounts; the history shows that they were made, and that
nothing was spent before them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import pyarrow.parquet as pq
from support import boards

from millijoule.workers.layout import STATS_KEY
from millijoule.workers.schemas import WorkerEnvironment


@dataclass
class Verdict:
    """`outcome`: "certified", "missing" or "unfinished"; `problems` in words, none in a run as it should be."""

    outcome: str
    total_mj: int | None = None
    ran_mj: int | None = None
    problems: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def judge(
    output: Path,
    history: Mapping[str, tuple[Sequence[str], list[boards.Record]]],
    names: Mapping[int, str],
    lost_books: Collection[tuple[str, int]] = (),
) -> Verdict:
    """Hold what a job in `output` says against what its boards ran.

    Args:
        history: by the board's UUID, the ids of its host's boots, and its records over all of them.
        names: of the job's processes, by pid.
        lost_books: in which boots the host's counter book was lost or damaged, and when, on the monotonic clock in ns.
    """
    if not (output / STATS_KEY).exists():
        return Verdict("unfinished")
    stats = json.loads((output / STATS_KEY).read_text())
    workers = [WorkerEnvironment.from_json(p.read_bytes()) for p in output.glob("_job/workers/*.json")]
    named = {w.worker_id for w in workers}
    unopened = {p.stem for p in output.glob("_job/closed/*.json")} - named
    verdict = Verdict("missing")
    ran: dict[tuple[str, str], set[int]] = {}
    unbooked: list[str] = []  # false only where a total is certified
    reset = False
    resets: dict[str, list[int]] = defaultdict(list)
    for boots, records in history.values():
        for boot_id, (_, *later) in zip(boots, _split(records, boards.REBOOT), strict=True):
            resets[boot_id] += [r.t_mono_ns for r in later if r.kind == boards.RESET]
    for boot_id, t_mono_ns in lost_books:  # whoever reads next begins another epoch, as after a reset
        resets[boot_id].append(t_mono_ns)
        reset = True
    for uuid, (boots, records) in history.items():
        for boot_id, records_of_boot in zip(boots, _split(records, boards.REBOOT), strict=True):
            found = _ran(
                *(uuid, records_of_boot, workers, unopened, names, resets.get(boot_id, []), unbooked)
            )
            if found is not None:
                ran[boot_id, f"gpu:{uuid}"] = found
        reset = reset or any(r.kind in (boards.RESET, boards.REBOOT) for r in records[1:])
    totals = {0}
    for ends in ran.values():
        totals = _sums(totals, ends)
    verdict.ran_mj = max(totals)
    energy = stats["energy"]
    verdict.total_mj = energy["total_mj"]
    verdict.reasons = [f"{u['worker_id']}: {u['reason']}" for u in energy["unclosed"]]
    says = {
        "complete": energy["complete"],
        "total_mj": energy["total_mj"] is not None,
        "full_mj_per_image": stats["full_mj_per_image"] is not None or not stats["images_ok"],
        "C1": stats["closure"]["C1"] is True,
    }
    if stats["evidence_class"] != "E0" and not all(says.values()):
        verdict.problems.append(f"{stats['evidence_class']} though {says}")
    if energy["complete"] != (energy["total_mj"] is not None):
        verdict.problems.append(f"complete and total disagree: {says}")
    if any((energy["complete"], energy["total_mj"] is not None, stats["full_mj_per_image"] is not None)):
        verdict.outcome = "certified"
        verdict.problems += unbooked
        if energy["total_mj"] not in totals:
            verdict.problems.append(
                f"certified {energy['total_mj']} mJ, the counters ran {sorted(totals)} mJ"
            )
    elif not energy["unclosed"] and not energy["segments_not_measured"] and not reset:
        verdict.problems.append("energy is missing, and nothing says whose")
    blind = _blind(workers)
    if blind and verdict.outcome == "certified":
        verdict.problems.append(f"certified, though workers could not read the counters of {sorted(blind)}")
    for key, total_mj in _device_totals(output).items():
        if key not in blind and total_mj is not None and total_mj not in ran.get(key, {0}):
            verdict.problems.append(
                f"{key}: certified {total_mj} mJ, the counter ran {sorted(ran.get(key, {0}))} mJ"
            )
    return verdict


def _blind(workers: Iterable[WorkerEnvironment]) -> set[tuple[str, str]]:
    """Devices, by boot, with a worker that could not read them when it opened its account: they have no total that is whole."""
    return {
        (w.opened.boot_id, f"gpu:{gpu}")
        for w in workers
        if w.opened is not None
        for gpu in w.gpus
        if f"gpu:{gpu}" not in w.opened.energy_mj
    }


def _sums(some: set[int], others: set[int]) -> set[int]:
    return {a + b for a in some for b in others}


def _split(records: Sequence[boards.Record], kind: int) -> Iterator[list[boards.Record]]:
    part: list[boards.Record] = []
    for record in records:
        if record.kind == kind and part:
            yield part
            part = []
        part.append(record)
    yield part


def _ran(
    uuid: str,
    records: Sequence[boards.Record],
    workers: Sequence[WorkerEnvironment],
    unopened: Collection[str],
    names: Mapping[int, str],
    resets: Sequence[int],
    problems: list[str],
) -> set[int] | None:
    """What the job may say that it ran on a board during one boot; None where it had no worker there.

    `unopened`: names of workers that have last words and no account. `resets`: when any board of the host was reset in that boot, on the monotonic clock.
    """
    opened = {
        w.worker_id: (w.opened.energy_mj[f"gpu:{uuid}"], w.opened.t_mono_ns)
        for w in workers
        if w.opened is not None and f"gpu:{uuid}" in w.opened.energy_mj
    }
    holders = {pid for pid, name in names.items() if name in {w.worker_id for w in workers}}
    totals: set[int] | None = None
    open_before: set[str] = set()  # whose accounts were open at the last reset
    for part in _split(records, boards.RESET):
        readings = {r.value_mj: (i, r.t_mono_ns) for i, r in enumerate(part) if r.kind == boards.READ}
        began = {
            name: readings[value][0]
            for name, (value, t_ns) in opened.items()
            if value in readings and readings[value][1] <= t_ns
        }
        here = {names[r.pid] for r in part if r.pid in holders}
        first = 0 if here & open_before else min(began.values(), default=None)
        open_before |= began.keys()
        spent = [i for i, r in enumerate(part) if r.kind == boards.SPEND]
        if spent and (first is None or spent[0] < first):
            problems.append(f"{uuid}: energy was spent before an account was open")
        last = max((i for i, r in enumerate(part) if r.pid in holders), default=None)
        unheard = [i for i, r in enumerate(part) if r.kind == boards.READ and names.get(r.pid) in unopened]
        if first is None and unheard:  # nobody here could write an account: it may be counted, or not
            held = max(i for i, r in enumerate(part) if names.get(r.pid) in unopened)
            ends = {part[held].value_mj} | {r.value_mj for r in part[held:] if r.kind == boards.READ}
            totals = _sums(totals or {0}, {0} | {end - part[unheard[0]].value_mj for end in ends})
        if first is None or last is None:
            continue
        ends = {part[max(first, last)].value_mj}
        ends |= {r.value_mj for r in part[last:] if r.kind == boards.READ}
        firsts = {part[first].value_mj} | {part[i].value_mj for i in unheard if i < first}
        totals = _sums(totals or {0}, {end - begin for end in ends for begin in firsts})
        for at in (t for t in resets if part[0].t_mono_ns < t < part[-1].t_mono_ns):
            totals = _sums(totals, {0} | {-mj for mj in _pauses(part[first:], began.values(), at, first)})
    return totals


def _pauses(part: Sequence[boards.Record], began: Iterable[int], at_ns: int, first: int) -> set[int]:
    """What may lie between two accounts, the later of which began after `at_ns`: only readings do, nothing is spent."""
    pauses = set()
    for i in (i - first for i in began):
        if i > 0 and part[i].t_mono_ns > at_ns:
            before = takewhile(lambda r: r.kind == boards.READ, reversed(part[:i]))
            pauses |= {part[i].value_mj - r.value_mj for r in before}
    return pauses


def _device_totals(output: Path) -> dict[tuple[str, str], int | None]:
    """From the finished `segment` table: what each device used while the job ran; None where a part is missing."""
    totals: dict[tuple[str, str], int | None] = {}
    for part in output.glob("energy/segment/run_id=*/date=*/part-*.parquet"):
        for row in pq.ParquetFile(part).read().to_pylist():
            if row["segment_class"] == "off" or row["domain"] is None:
                continue
            key = row["boot_id"], row["domain"]
            so_far, mj = totals.get(key, 0), row["energy_mj"]
            totals[key] = None if so_far is None or mj is None else so_far + mj
    return totals
