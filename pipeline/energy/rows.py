"""A job's ledger and commits as the rows of the energy tables, in blocks that share a UTC day.

Rows are made as columns, some thousand at a time. Equal commits, segments and `job.json` make equal rows.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.energy.closure import (
    ENTRIES_AT_ONCE,
    ClosureRow,
    ImageTotals,
    PowerSeries,
    close_ledger,
    evidence_class,
)
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.counter_split import MISSING, sum_or_none
from millijoule.pipeline.energy.ledger import Ledger, LedgerEntry
from millijoule.pipeline.energy.node_closure import NodePart, close_nodes
from millijoule.pipeline.energy.packed import NONE, padded
from millijoule.pipeline.energy.schemas import ENERGY_SCHEMAS, table_of
from millijoule.pipeline.energy.shard_shares import commit_shares, equal_shares
from millijoule.pipeline.energy.uncommitted import NOTHING, Uncommitted, held_devices
from millijoule.pipeline.output.image_rows import NOT_CARRIED, RowReader, read_row_table
from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.output.read_objects import ITEMS_PER_CALL, READ_THREADS, in_threads
from millijoule.workers.meters.segment_timeline import segment_estimate_mj
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, STATUSES, Commit, CounterRead, PowerTrace
from millijoule.workers.storage.open import is_s3_url
from millijoule.workers.storage.protocol import Store

#: Threads that read row tables from a disk: two are as fast as many, which would only wait for each other.
_DISK_THREADS = 2

#: And from a bucket: as many as it has connections. All but waiting takes a millisecond, an answer thirty, and a table is two or three.
_BUCKET_THREADS = 32

#: Images whose rows are read ahead, about: some twenty MB.
IMAGES_AHEAD = 65_536

DAY_NS = 86_400_000_000_000

#: Measured stretches shorter than this are labelled "short": 100 times the counter's own update period (NVML moves
#: about every 100 ms, RAPL every 1 ms), which keeps the error of one stretch near half a percent.
SHORT_GPU_NS = 10_000_000_000
SHORT_CPU_NS = 100_000_000

#: Counter rows state wall time rounded down and latency rounded up to these: clocks of hosts agree no better, and
#: noise beyond it would be half of a file. The monotonic time stays exact.
WALL_STEP_NS = 1_000_000
LATENCY_STEP_NS = 100_000

#: A table's rows of one UTC day (days since 1970).
DayBlock = tuple[int, pa.Table]

#: The column of a table that says to which day a row belongs.
_TIMES = ("t_wall_ns", "t_open_wall_ns", "t_start_wall_ns", "t_first_wall_ns")

#: What the image table takes over from the rows of a shard.
ROW_COLUMNS = ("prompt_id", "image_index", "status", "sha256")

#: Rows that wait as tuples to become a table: these take ten times the memory of its columns.
BLOCK_ROWS = 8_192

#: Commits, and images in them, whose row tables are looked at together: shards can be as small as one image.
COMMITS_AT_ONCE, IMAGES_AT_ONCE = 1_024, 8_192

_QUALITIES = ("measured", "short", "missing")

#: Columns of an attempt that are those of its commit, in order.
_ATTEMPT_NUMBERS = (
    *("driver_epoch", "t_start_wall_ns", "t_end_wall_ns"),
    *("images_ok", "images_filtered", "images_quarantined"),
)


class ImageSource(Protocol):
    """Where the image table has its rows from."""

    def blocks(self, commits: CommitTable) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """All rows in the order of commits, those of one commit never in two blocks.

        Yields:
            The number of each row's commit, int64 `[n]`, and the rows with at least `ROW_COLUMNS`.
        """
        ...


@dataclass(frozen=True)
class RowTables:
    """The rows that commits carry, and of those that carry none the row tables, `IMAGE_ROW_SCHEMA`.

    `read_rows` reads the row table of a commit; it is called from several threads, ahead of who takes the blocks.
    """

    read_rows: Callable[[Commit], pa.Table]
    threads: int = READ_THREADS

    def blocks(self, commits: CommitTable) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """See `ImageSource`; one for each of `commit_blocks`, all columns, each in one piece."""
        carried, counts = RowReader(commits.rows.tables(), IMAGE_ROW_SCHEMA), commits.rows.counts()
        uncarried = np.flatnonzero(counts == NOT_CARRIED)
        how = self._how(image_counts(commits)[uncarried])
        with closing(in_threads(lambda n: self.read_rows(commits[n]), uncarried.tolist(), *how)) as read:
            for block in commit_blocks(commits):
                numbers, of_each = np.asarray(block, np.int64), counts[block.start : block.stop]
                others = numbers[of_each == NOT_CARRIED]
                tables = list(islice(read, len(others)))
                of_others = np.repeat(others, [t.num_rows for t in tables])
                of_each = np.maximum(of_each, 0)
                if of_each.any() or not tables:
                    tables = [carried.take(int(of_each.sum())), *tables]
                table = pa.concat_tables(tables).combine_chunks()
                commit = np.concatenate([np.repeat(numbers, of_each), of_others])
                if 0 < len(others) < len(block):
                    order = np.argsort(commit, kind="stable")
                    commit, table = commit[order], table.take(pa.array(order))
                yield commit, table

    def _how(self, images: np.ndarray) -> tuple[int, int]:
        """Threads, and tables that one reads in one go, for tables of so many `images`: those ahead stay within `IMAGES_AHEAD`."""
        tables_ahead = IMAGES_AHEAD / max(1.0, float(images.mean()) if len(images) else 1.0)
        threads = min(self.threads, max(1, int(tables_ahead / 2)))
        return threads, min(ITEMS_PER_CALL, max(1, int(tables_ahead / (2 * threads))))


def image_counts(commits: CommitTable) -> np.ndarray:
    """Images of each commit, whatever became of them: int64 `[n]`."""
    return np.sum([commits.number(f"images_{status}") for status in STATUSES], axis=0)


def commit_blocks(commits: CommitTable) -> Iterator[range]:
    """Numbers of commits in order, few enough together that their row tables can be held."""
    rows = np.cumsum(image_counts(commits), dtype=np.int64)
    begin = 0
    while begin < len(commits):
        most = (rows[begin - 1] if begin else 0) + IMAGES_AT_ONCE
        end = max(begin + 1, min(begin + COMMITS_AT_ONCE, int(np.searchsorted(rows, most, "right"))))
        yield range(begin, end)
        begin = end


def row_tables(store: Store) -> RowTables:
    """The rows of a store's commits: carried, or in the Parquet file at the `rows_path` of each."""
    return RowTables(
        partial(read_row_table, store), _BUCKET_THREADS if is_s3_url(store.url) else _DISK_THREADS
    )


class EnergyRows:
    """The rows of all energy tables of one job; iterate `tables` to its end once, then `closure` is there.

    Args:
        ledger: over the segments of all commits and drivers.
        commits: each committed shard once.
        images: the rows of the commits.
        uncommitted: power samples, environments and readings of node meters, which no commit carries.
    """

    def __init__(
        self,
        job: JobSpec,
        ledger: Ledger,
        commits: CommitTable,
        images: ImageSource,
        uncommitted: Uncommitted = NOTHING,
    ) -> None:
        self.job, self.ledger = job, ledger
        self.closure: list[ClosureRow] = []
        self.evidence_class = "E0"
        self.job_day = int(job.created_unix * 1e9) // DAY_NS  # of rows without a time, and of empty tables
        self._commits, self._source, self._uncommitted = commits, images, uncommitted
        self._images = ImageTotals.of(commits)
        self._power: PowerSeries = {}

    def tables(self) -> Iterator[tuple[str, Iterator[DayBlock]]]:
        """Each table's name and blocks, `closure` last. A block is of any size up to some row groups."""
        yield "counter", self._counters()
        yield "segment", self._segments()
        yield "attempt", self._attempts()
        yield "image", self._image_blocks()
        yield "power", self._power_samples()
        yield "env", _blocks("env", self._environments())
        parts, node_closure = self._nodes()
        yield "node_reading", _by_day(self._uncommitted.nodes)
        yield "node_energy", _blocks("node_energy", parts)
        self.closure = close_ledger(self.ledger, self._commits, self._images, self._power, node_closure)
        one_of_each = self._commits.first_of_each("worker_id", "device", "energy_domains")
        self.evidence_class = evidence_class(self.closure, one_of_each, self._devices())
        yield "closure", iter([(self.job_day, table_of("closure", [row.as_tuple() for row in self.closure]))])

    def _counters(self) -> Iterator[DayBlock]:
        """Each read of the entries once: a worker's close read opens its next segment."""
        entries, c = self.ledger.entries, self.ledger.entries.columns
        reads = np.stack([entries.open, entries.close], axis=1).ravel()
        workers = np.repeat(entries.worker, 2)
        by_worker = np.argsort(workers, kind="stable")  # in order of time: a repeated read follows at once
        is_new = np.ones(len(reads), bool)
        keys = (workers, c.boot[reads], c.t_mono_ns[reads])
        is_new[by_worker[1:]] = np.any([np.diff(key[by_worker]) != 0 for key in keys], axis=0)
        reads, workers = reads[is_new], workers[is_new]
        # of each set of domains, in order of their names: the domain, and where its counter stands
        order = [sorted(range(len(names)), key=names.__getitem__) for names in c.domain_sets]
        codes = {domain: code for code, domain in enumerate(entries.domain_names)}
        sets = zip(c.domain_sets, order, strict=True)
        domains = padded([[codes.get(names[i], -1) for i in places] for names, places in sets])
        places = padded(order)
        for begin in range(0, len(reads), ENTRIES_AT_ONCE):
            at, worker = reads[begin : begin + ENTRIES_AT_ONCE], workers[begin : begin + ENTRIES_AT_ONCE]
            domain, place = domains[c.domain_set[at]], places[c.domain_set[at]]
            read, _ = there = np.nonzero(domain >= 0)
            domain, place, r = domain[there], place[there], at[read]
            table = _table(
                "counter",
                self._names(worker[read]),
                self._names(c.boot[r]),
                entries.epoch_of(r, domain),
                self._domain_names(domain),
                c.t_mono_ns[r],
                c.t_wall_ns[r] // WALL_STEP_NS * WALL_STEP_NS,
                -(-c.latency_ns[r] // LATENCY_STEP_NS) * LATENCY_STEP_NS,
                c.energy_mj[c.first[r] + place],
            )
            yield from _by_day(table)

    def _names(self, codes: np.ndarray) -> pa.Array:
        return pa.array(list(self.ledger.entries.names), pa.string()).take(pa.array(codes))

    def _domain_names(self, codes: np.ndarray) -> pa.Array:
        """The domains' names; null where the code is negative."""
        return pa.array(self.ledger.entries.domain_names, pa.string()).take(pa.array(codes, mask=codes < 0))

    def _segments(self) -> Iterator[DayBlock]:
        entries, c = self.ledger.entries, self.ledger.entries.columns
        estimates = entries.estimates()
        is_gpu = np.array([d.startswith("gpu:") for d in entries.domain_names] or [False], bool)
        for begin in range(0, len(entries), ENTRIES_AT_ONCE):
            end = min(begin + ENTRIES_AT_ONCE, len(entries))
            widths = np.diff(entries.first[begin : end + 1])
            rows = np.maximum(widths, 1)  # one without any domain has a row, too
            number = np.repeat(np.arange(begin, end), rows)
            firsts = np.cumsum(rows) - rows
            has_domain = np.repeat(widths > 0, rows)
            domain = np.full(len(number), -1, np.int64)
            domain[has_domain] = entries.domain_codes(begin, end)
            energy = np.full(len(number), MISSING, np.int64)
            energy[has_domain] = entries.shares[entries.first[begin] : entries.first[end]]
            opened, closed = entries.open[number], entries.close[number]
            lasted = c.t_mono_ns[closed] - c.t_mono_ns[opened]
            is_short = lasted < np.where(is_gpu[domain], SHORT_GPU_NS, SHORT_CPU_NS)
            quality = np.where(energy == MISSING, 2, is_short)
            estimate = np.full(len(number), NONE, np.int64)
            estimate[firsts] = estimates[begin:end]
            epoch = np.where(has_domain, entries.epoch_of(opened, np.maximum(domain, 0)), c.epoch[opened])
            table = _table(
                "segment",
                number,
                self._names(entries.worker[number]),
                pa.array(entries.class_names, pa.string()).take(pa.array(entries.segment_class[number])),
                _nullable(entries.shard[number], NONE),
                self._attempts_of(number),
                self._names(c.boot[opened]),
                epoch,
                c.t_mono_ns[opened],
                c.t_mono_ns[closed],
                c.t_wall_ns[opened],
                self._domain_names(domain),
                _nullable(energy, MISSING),
                pa.array(_QUALITIES, pa.string()).take(pa.array(quality)),
                _nullable(estimate, NONE),
            )
            yield from _by_day(table)
        yield from _blocks("segment", self._gaps())

    def _attempts_of(self, at: np.ndarray) -> pa.Array:
        """The attempt ids of entries; a sealed part's segment is of the attempt that was committed with it."""
        attempts, commits = self.ledger.entries.attempts(at), self._commits
        if not commits.parts().any():
            return attempts
        place = commits.attempts().find(self.ledger.entries.shard[at], attempts)
        committed = commits.text("attempt_id").take(pa.array(np.maximum(place, 0)))
        return pc.if_else(pa.array(place >= 0), committed, attempts)

    def _gaps(self) -> Iterator[tuple]:
        clocks = self.ledger.entries.clocks()
        for gap in self.ledger.gaps:
            shortest = SHORT_GPU_NS if gap.domain.startswith("gpu:") else SHORT_CPU_NS
            quality = "short" if gap.t_close_ns - gap.t_open_ns < shortest else "measured"
            t_wall_ns = gap.t_open_ns + clocks[gap.boot_id][0]
            where = (gap.boot_id, gap.epoch, gap.t_open_ns, gap.t_close_ns, t_wall_ns)
            what = (gap.domain, gap.energy_mj, quality, None)
            yield None, None, gap.segment_class, None, None, *where, *what

    def _attempts(self) -> Iterator[DayBlock]:
        commits = self._commits
        attempts = commits.text("attempt_id")
        energy = self.ledger.entries.shard_energies(commits.attempts())
        shares = commits.shares(energy)
        names = pa.array(commits.names, pa.string())
        for begin in range(0, len(commits), ENTRIES_AT_ONCE):
            part = slice(begin, begin + ENTRIES_AT_ONCE)

            def texts(*columns: str) -> list[pa.Array]:
                return [names.take(pa.array(commits.name_codes(c)[part])) for c in columns]  # noqa: B023

            table = _table(
                "attempt",
                commits.number("shard_id")[part],
                attempts[part],
                pa.array(["committed"] * len(energy[part]), pa.string()),
                *texts("worker_id", "node_id", "host", "device"),
                *(commits.number(name)[part] for name in _ATTEMPT_NUMBERS),
                _nullable(commits.number("images_drawn")[part], NONE),
                _nullable(energy[part], MISSING),
                _nullable(shares.filtered_mj[part], MISSING),
                _nullable(shares.quarantined_mj[part], MISSING),
                _nullable(commits.number("energy_estimate_mj")[part], NONE),
                *texts("energy_method", "energy_domains"),
            )
            yield from _by_day(table)
        yield from _blocks("attempt", self._uncommitted_attempts())

    def _uncommitted_attempts(self) -> Iterator[tuple]:
        entries = self.ledger.entries
        at = np.flatnonzero(entries.shard != NONE)
        at = at[self._commits.attempts().find(entries.shard[at], entries.attempts(at)) < 0]
        others: dict[tuple[int, str], list[LedgerEntry]] = defaultdict(list)
        for n, attempt in zip(at.tolist(), entries.attempts(at).to_pylist(), strict=True):
            if attempt is not None:
                others[int(entries.shard[n]), attempt].append(entries[n])
        for (shard_id, attempt_id), mine in sorted(others.items(), key=lambda item: item[0]):
            first, last = mine[0].segment, mine[-1].segment
            outcome = "retry" if last.segment_class == "retry" else "loser"
            domains = {d for e in mine for d in self.ledger.read_domains(e.segment.worker_id)}
            yield (
                *(shard_id, attempt_id, outcome, first.worker_id, None, None, None, None),
                *(first.open.t_wall_ns, last.close.t_wall_ns, None, None, None, None),
                sum_or_none(e.total_mj for e in mine),
                *(None, None),
                sum_or_none(segment_estimate_mj(e.segment) for e in mine),
                *(None, ",".join(sorted(domains))),
            )

    def _image_blocks(self) -> Iterator[DayBlock]:
        commits, made = self._commits, 0
        shard_ids, attempts = commits.number("shard_id"), commits.text("attempt_id")
        ended, estimate = commits.number("t_end_wall_ns"), commits.number("energy_estimate_mj")
        energy = commits.shares(self.ledger.entries.shard_energies(commits.attempts())).accepted_mj
        estimate = commits.shares(estimate).accepted_mj
        overhead = self._overhead_shares(energy)
        for commit, rows in self._source.blocks(commits):
            ok = pc.equal(rows["status"], "ok").combine_chunks().to_numpy(zero_copy_only=False)
            if not ok.all():
                commit, rows = commit[ok], rows.filter(pa.array(ok))
            direct = equal_shares(energy, commit)
            full = np.full(len(commit), MISSING, np.int64)
            if overhead is not None:
                extra = np.arange(made, made + len(commit)) < overhead[1]
                full = np.where(direct == MISSING, MISSING, direct + overhead[0] + extra)
            made += len(commit)
            self._images.add(commit, direct, full)
            table = _table(
                "image",
                rows["prompt_id"],
                rows["image_index"],
                shard_ids[commit],
                attempts.take(pa.array(commit)),
                rows["sha256"],
                _nullable(direct, MISSING),
                _nullable(full, MISSING),
                _nullable(equal_shares(estimate, commit), NONE),
            )
            yield from _by_day(table, ended[commit])

    def _overhead_shares(self, energy: np.ndarray) -> tuple[int, int] | None:
        """Each image's share of all that no accepted image used directly, and how many of the first get 1 mJ more.

        `energy` is what the accepted images of each commit used.
        """
        images = self._commits.number("images_ok")
        total_mj, direct = self.ledger.summary()["total_mj"], energy[images > 0]
        if total_mj is None or not len(direct) or (direct == MISSING).any():
            return None
        return divmod(total_mj - int(direct.sum()), int(images.sum()))

    def _power_samples(self) -> Iterator[DayBlock]:
        """Fills `_power` on the way."""
        spool = self._commits.power
        committed = {c.worker_id: c for c in self._commits.last_of_each_worker()}
        for worker_id, trace in self._uncommitted.power:
            place = self._uncommitted.workers.get(worker_id) or committed.get(worker_id)
            spool.add(trace, place.node_id if place else None, place.host if place else None)
        for samples in spool.tables():
            self._add_power(samples)
            yield from _by_day(_table("power", *(samples[f.name] for f in ENERGY_SCHEMAS["power"])))

    def _add_power(self, samples: pa.Table) -> None:
        known = samples.filter(pc.is_valid(samples["power_instant_mw"]))
        for boot_id, device in {*zip(known["boot_id"].to_pylist(), known["device"].to_pylist(), strict=True)}:
            series = self._power.setdefault((boot_id, f"gpu:{device}"), (array("q"), array("q")))
            is_its = pc.and_(pc.equal(known["boot_id"], boot_id), pc.equal(known["device"], device))
            mine = known.filter(is_its)
            for column, name in zip(series, ("t_mono_ns", "power_instant_mw"), strict=True):
                column.frombytes(mine[name].to_numpy().tobytes())

    def _nodes(self) -> tuple[list[NodePart], list[ClosureRow]]:
        hosts = {c.worker_id: c.host for c in self._commits.last_of_each_worker()}
        hosts |= {worker_id: own.host for worker_id, own in self._uncommitted.workers.items()}
        devices = {
            worker_id: [f"gpu:{uuid}" for uuid in held if uuid != "cpu"]
            for worker_id, held in self._devices().items()
        }
        return close_nodes(self.ledger, hosts, devices, self._uncommitted.nodes)

    def _devices(self) -> dict[str, tuple[str, ...]]:
        return held_devices(self._uncommitted.workers, self._commits.first_of_each("worker_id"))

    def _environments(self) -> Iterator[tuple]:
        entries, job = self.ledger.entries, self.job
        codes, first = np.unique(entries.worker, return_index=True)
        opened = {
            entries.names[c]: entries[n].segment.open
            for c, n in zip(codes.tolist(), first.tolist(), strict=True)
        }
        commits = {commit.worker_id: commit for commit in self._commits.first_of_each("worker_id")}
        model = (job.model_name, job.model_sha256, job.fingerprint, job.millijoule_version)
        for worker_id in sorted(opened.keys() | commits.keys()):
            c, read = commits.get(worker_id), opened.get(worker_id)
            own = self._uncommitted.workers.get(worker_id)
            stated = own or c  # of a worker whose environment is lost, what its commits say
            t_wall_ns = read.t_wall_ns if read else c.t_start_wall_ns if c else 0
            where = (stated.node_id, stated.host, stated.device) if stated else (None,) * 3
            gpus = (",".join(own.gpus), own.device_name) if own else (None, None)
            epoch, method = (stated.driver_epoch, stated.energy_method) if stated else (None, None)
            software = (own.python_version, own.torch_version, own.driver_version) if own else (None,) * 3
            asked = (own.pool, own.engine, own.rungs) if own else (None,) * 3
            sizes = (own.batch_size, own.cpu_threads, own.price_per_hour) if own else (None,) * 3
            boot_id = read.boot_id if read else None
            domains = ",".join(sorted(self.ledger.read_domains(worker_id))) if read else ""
            yield (
                worker_id,
                boot_id,
                *where,
                *gpus,
                epoch,
                t_wall_ns,
                method,
                domains,
                *model,
                *software,
                *asked,
                *sizes,
            )


def _table(name: str, *columns: Any) -> pa.Table:
    """Columns (Arrow or numpy) in the order of a table's schema."""
    schema = ENERGY_SCHEMAS[name]
    pairs = zip(columns, schema, strict=True)
    made = [pa.array(c, f.type) if isinstance(c, np.ndarray) else c for c, f in pairs]
    return pa.table(made, schema=schema)


def _nullable(numbers: np.ndarray, missing: int) -> pa.Array:
    return pa.array(numbers, pa.int64(), mask=numbers == missing)


def _by_day(rows: pa.Table, t_wall_ns: np.ndarray | None = None) -> Iterator[DayBlock]:
    """`rows` divided by day; `t_wall_ns` is when each belongs, by default as the table says itself."""
    if t_wall_ns is None:
        t_wall_ns = rows[next(name for name in rows.column_names if name in _TIMES)].to_numpy()
    days = t_wall_ns // DAY_NS
    every = np.unique(days).tolist()
    for day in every:
        yield day, rows if len(every) == 1 else rows.filter(pa.array(days == day))


def _blocks(name: str, rows: Iterable[tuple]) -> Iterator[DayBlock]:
    """`rows` of a table by day, at most `BLOCK_ROWS` at a time."""
    rest = iter(rows)
    while held := list(islice(rest, BLOCK_ROWS)):
        yield from _by_day(table_of(name, held))


def power_rows(trace: PowerTrace, node_id: str | None, host: str | None) -> Iterator[tuple]:
    """The samples of one device as rows of the power table."""
    for sample in trace.samples:
        yield trace.boot_id, node_id, host, trace.device, *sample, trace.source


def read_rows(worker_id: str, read: CounterRead) -> Iterator[tuple]:
    """One counter row per domain of `read`."""
    t_wall_ns = read.t_wall_ns // WALL_STEP_NS * WALL_STEP_NS
    latency_ns = -(-read.latency_ns // LATENCY_STEP_NS) * LATENCY_STEP_NS
    for domain, energy_mj in sorted(read.energy_mj.items()):
        where = (worker_id, read.boot_id, read.epoch_of(domain), domain)
        yield *where, read.t_mono_ns, t_wall_ns, latency_ns, energy_mj


def committed_attempt(c: Commit, energy_mj: int | None) -> tuple:
    """The attempt row of a commit."""
    _, *rejected_mj = commit_shares(c, energy_mj)
    return (
        *(c.shard_id, c.attempt_id, "committed", c.worker_id, c.node_id, c.host, c.device, c.driver_epoch),
        *(c.t_start_wall_ns, c.t_end_wall_ns, c.images_ok, c.images_filtered, c.images_quarantined),
        *(c.images_drawn, energy_mj, *rejected_mj),
        *(c.energy_estimate_mj, c.energy_method, ",".join(c.energy_domains)),
    )
