"""Readings of a node's meter that come after the job: a power strip's log becomes rows of a finished output.

Importing again replaces what was imported for the same node under the same meter's name; the tables are written anew
from commits and readings, so twice is once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace

from millijoule.pipeline.closing.finish import JobRecords, close_again, load_records
from millijoule.pipeline.energy.account_gaps import utc_text
from millijoule.pipeline.energy.node_readings import MeteredNode, store_import
from millijoule.pipeline.energy.tables import EnergyResult
from millijoule.pipeline.energy.uncommitted import read_uncommitted
from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.planning.retry_rounds import JobShards
from millijoule.workers.errors import InputError
from millijoule.workers.layout import STATS_KEY, SUCCESS_KEY
from millijoule.workers.node_meters.config import DeclaredRest
from millijoule.workers.node_meters.meter import NodeSeries
from millijoule.workers.storage.protocol import Store

#: Readings kept before and after the job's own time on the node.
MARGIN_READINGS = 3


def import_readings(
    store: Store,
    job: JobSpec,
    shards: JobShards,
    host: str,
    meter: str,
    feeds: Mapping[str, Sequence[NodeSeries]],
    rest: DeclaredRest | None,
) -> EnergyResult:
    """Add the readings of `meter` at node `host` to a finished job, and close its books again.

    Args:
        host: as the job's tables name it.
        feeds: the series of each feed (outlet); together they are the node and nothing else.
        rest: what the node uses besides its counted devices; None: not declared, and then it cannot close.

    Raises:
        InputError: the job has not finished, has no such node, or the readings are not of its time.
        StoreError: storage failed. Importing again replaces the same objects.
    """
    if not store.exists(SUCCESS_KEY) or not store.exists(STATS_KEY):
        raise InputError(
            f"{store.url}: the job has not finished; run the same `millijoule generate` again first"
        )
    records = load_records(store, len(shards))
    times = node_times(records)
    if host not in times:
        raise InputError(
            f"--node {host}: this job ran on {', '.join(sorted(times)) or 'no node'}; name the node as it is there"
        )
    begin_ns, end_ns = times[host]
    rows = []
    for feed, all_series in feeds.items():
        for series in all_series:
            kept = _clipped(series, begin_ns, end_ns)
            if kept is None:
                first, last = (utc_text(series.t_wall_ns[i]) for i in (0, -1))
                raise InputError(
                    f"{series.source} of {feed}: its readings are from {first} to {last}, the job was on {host} from "
                    f"{utc_text(begin_ns)} to {utc_text(end_ns)}"
                )
            node = MeteredNode(host, meter, series.max_gap_ns, series.accuracy_share, rest, feed=feed)
            rows += node.rows_of(kept)
    store_import(store, host, meter, rows)
    return close_again(store, job, replace(records, uncommitted=read_uncommitted(store)))


def node_times(records: JobRecords) -> dict[str, tuple[int, int]]:
    """Wall times (ns) from the first to the last counter read of a job's workers, by host."""
    hosts = {c.worker_id: c.host for c in records.commits.first_of_each("worker_id")}
    hosts |= {worker_id: worker.host for worker_id, worker in records.uncommitted.workers.items()}
    times: dict[str, tuple[int, int]] = {}
    for entry in records.ledger.entries:
        s = entry.segment
        if host := hosts.get(s.worker_id):
            begin, end = times.get(host, (s.open.t_wall_ns, s.close.t_wall_ns))
            times[host] = min(begin, s.open.t_wall_ns), max(end, s.close.t_wall_ns)
    return times


def _clipped(series: NodeSeries, begin_ns: int, end_ns: int) -> NodeSeries | None:
    """The readings around the job; None where the series is of another time."""
    times = series.t_wall_ns
    if times[-1] <= begin_ns or end_ns <= times[0]:
        return None
    first = max(bisect_right(times, begin_ns) - MARGIN_READINGS, 0)
    last = bisect_left(times, end_ns) + MARGIN_READINGS
    return replace(series, t_wall_ns=times[first:last], values=series.values[first:last])
