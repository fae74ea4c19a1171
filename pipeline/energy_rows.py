"""A job's ledger and commits as the rows of the energy tables, in blocks that share a UTC day.

Everything is a function of commits, the drivers' segments and `job.json`: whoever builds the tables builds the same
ones. At most one row group per table and day, and a description of each commit, are held.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.pipeline.apportionment import image_energy, sum_or_none
from millijoule.pipeline.closure import ClosureRow, ImageTotals, PowerSeries, close_ledger, evidence_class
from millijoule.pipeline.energy_schemas import ENERGY_SCHEMAS, table_of
from millijoule.pipeline.job import JobSpec
from millijoule.pipeline.ledger import Ledger, LedgerEntry
from millijoule.pipeline.node_closure import NodeBooks, close_nodes
from millijoule.pipeline.uncommitted import NOTHING, Uncommitted, held_devices
from millijoule.workers.schemas import Commit, CounterRead, PowerTrace, WorkerEnvironment
from millijoule.workers.storage import Store
from millijoule.workers.timeline import segment_estimate_mj

_READ_THREADS = 16

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
_Row = tuple[int, tuple]  # its time (ns since 1970), its values


_ROW_COLUMNS = ["prompt_id", "image_index", "status", "sha256"]

#: Rows that wait as tuples to become a table: these take ten times the memory of its columns.
BLOCK_ROWS = 8_192

#: The image table is made of blocks of at least so many rows: shards can be as small as one image.
_IMAGE_BLOCK_ROWS = 4_096


@dataclass(frozen=True)
class RowReader:
    """Reads what the image table needs of a commit's row table."""

    store: Store

    def __call__(self, commit: Commit) -> pa.Table:
        with self.store.open_input(commit.rows_path) as source:
            return pq.ParquetFile(source).read(columns=_ROW_COLUMNS, use_threads=False)


class EnergyRows:
    """The rows of all energy tables of one job; iterate `tables` to its end once, then `closure` is there.

    Args:
        ledger: over the segments of all commits and drivers.
        commits: gives each committed shard once; bodies are not held, so called again for their power.
        read_rows: gives the `IMAGE_ROW_SCHEMA` rows of a commit. Called from several threads.
        uncommitted: power samples, environments and readings of node meters, which no commit carries.
    """

    def __init__(
        self,
        job: JobSpec,
        ledger: Ledger,
        commits: Callable[[], Iterable[Commit]],
        read_rows: Callable[[Commit], pa.Table],
        uncommitted: Uncommitted = NOTHING,
    ) -> None:
        self.job = job
        self.ledger = ledger
        self.closure: list[ClosureRow] = []
        self.evidence_class = "E0"
        self.job_day = int(job.created_unix * 1e9) // DAY_NS  # of rows without a time, and of empty tables
        self._commits = commits
        self._read_rows = read_rows
        self._uncommitted = uncommitted
        self._shards: list[Commit] = []
        self._images = ImageTotals()
        self._any_power = False
        self._power: PowerSeries = {}

    def tables(self) -> Iterator[tuple[str, Iterator[DayBlock]]]:
        """Each table's name and blocks, `closure` last. A block is of any size up to some row groups."""
        yield "counter", blocks("counter", counter_rows(self.ledger.entries))
        yield "segment", blocks("segment", self._segments())
        yield "attempt", blocks("attempt", self._attempts())
        yield "image", self._image_blocks()
        yield "power", blocks("power", self._power_samples())
        yield "env", blocks("env", self._environments())
        nodes = self._nodes()
        yield "node_reading", reading_blocks(self._uncommitted.nodes)
        yield "node_energy", blocks("node_energy", node_energy_rows(nodes))
        self.closure = close_ledger(self.ledger, self._shards, self._images, self._power, nodes.closure)
        self.evidence_class = evidence_class(self.closure, self._shards, self._devices())
        yield "closure", iter([(self.job_day, table_of("closure", [row.as_tuple() for row in self.closure]))])

    def _segments(self) -> Iterator[_Row]:
        wall_minus_mono: dict[str, int] = {}
        for segment_id, entry in enumerate(self.ledger.entries):
            s = entry.segment
            wall_minus_mono.setdefault(s.open.boot_id, s.open.t_wall_ns - s.open.t_mono_ns)
            who = (segment_id, s.worker_id, entry.segment_class, s.shard_id, s.attempt_id)
            when = (s.open.t_mono_ns, s.close.t_mono_ns, s.open.t_wall_ns)
            duration_ns = s.close.t_mono_ns - s.open.t_mono_ns
            estimate_mj = segment_estimate_mj(s)
            for domain, energy_mj in entry.energy_mj.items() or ((None, None),):
                quality = _quality(domain, energy_mj, duration_ns)
                scale = (s.open.boot_id, s.open.epoch_of(domain) if domain else s.open.epoch)
                yield s.open.t_wall_ns, (*who, *scale, *when, domain, energy_mj, quality, estimate_mj)
                estimate_mj = None
        for gap in self.ledger.gaps:
            quality = _quality(gap.domain, gap.energy_mj, gap.t_close_ns - gap.t_open_ns)
            t_wall_ns = gap.t_open_ns + wall_minus_mono.get(gap.boot_id, 0)
            where = (gap.boot_id, gap.epoch, gap.t_open_ns, gap.t_close_ns, t_wall_ns)
            what = (gap.domain, gap.energy_mj, quality, None)
            yield t_wall_ns, (None, None, gap.segment_class, None, None, *where, *what)

    def _attempts(self) -> Iterator[_Row]:
        """Fills `_shards` on the way, because commits are read once."""
        committed: set[tuple[int, str]] = set()
        for c in self._commits():
            self._any_power = self._any_power or bool(c.power)
            self._shards.append(replace(c, segments=(), files=(), errors={}, power=()))  # the rest is small
            committed.add((c.shard_id, c.attempt_id))
            energy_mj = self.ledger.shard_energy_mj(c.shard_id, c.attempt_id)
            yield c.t_start_wall_ns, committed_attempt(c, energy_mj)
        others: dict[tuple[int, str], list[LedgerEntry]] = defaultdict(list)
        for entry in self.ledger.entries:
            s = entry.segment
            if s.shard_id is None or s.attempt_id is None or (s.shard_id, s.attempt_id) in committed:
                continue
            others[s.shard_id, s.attempt_id].append(entry)
        for (shard_id, attempt_id), entries in sorted(others.items()):
            first, last = entries[0].segment, entries[-1].segment
            outcome = "retry" if last.segment_class == "retry" else "loser"
            domains = ",".join(sorted({d for e in entries for d in self.ledger.read_domains(e)}))
            yield (
                first.open.t_wall_ns,
                (
                    *(shard_id, attempt_id, outcome, first.worker_id),
                    *(None, None, None, None, first.open.t_wall_ns, last.close.t_wall_ns, None, None),
                    sum_or_none(e.total_mj for e in entries),
                    sum_or_none(segment_estimate_mj(e.segment) for e in entries),
                    *(None, domains),
                ),
            )

    def _image_blocks(self) -> Iterator[DayBlock]:
        shards, begin = self._shards, 0
        n_images = sum(s.images_ok for s in shards)
        overhead = self._overhead_shares(n_images)

        def load(shard: Commit) -> tuple[Commit, pa.Table]:
            return shard, self._read_rows(shard)

        def images() -> Iterator[tuple[int, _Images]]:
            nonlocal begin
            with ThreadPoolExecutor(_READ_THREADS) as threads:
                for start in range(0, len(shards), 4 * _READ_THREADS):
                    for commit, rows in threads.map(load, shards[start : start + 4 * _READ_THREADS]):
                        made = rows.select(_ROW_COLUMNS)
                        if commit.images_quarantined or set(made["status"].to_pylist()) != {"ok"}:
                            made = made.filter(pc.equal(made["status"], "ok"))
                        n = made.num_rows
                        direct = image_energy(
                            self.ledger.shard_energy_mj(commit.shard_id, commit.attempt_id), n
                        )
                        full = [
                            None
                            if mj is None or overhead is None
                            else mj + overhead[0] + (begin + i < overhead[1])
                            for i, mj in enumerate(direct)
                        ]
                        begin += n
                        self._images.add(commit.shard_id, commit.attempt_id, direct, full)
                        estimate = image_energy(commit.energy_estimate_mj, n)
                        day = commit.t_end_wall_ns // DAY_NS
                        yield day, _Images(commit.shard_id, commit.attempt_id, made, direct, full, estimate)

        held: dict[int, list[_Images]] = defaultdict(list)
        counts: dict[int, int] = defaultdict(int)
        for day, part in images():
            held[day].append(part)
            counts[day] += part.rows.num_rows
            if counts[day] >= _IMAGE_BLOCK_ROWS:
                yield day, _image_table(held.pop(day))
                del counts[day]
        for day in sorted(held):
            yield day, _image_table(held[day])

    def _overhead_shares(self, n_images: int) -> tuple[int, int] | None:
        """Each image's share of all that no image used directly, and how many of the first get 1 mJ more."""
        total_mj = self.ledger.summary()["total_mj"]
        direct = [self.ledger.shard_energy_mj(s.shard_id, s.attempt_id) for s in self._shards if s.images_ok]
        direct_mj = sum_or_none(direct)
        if total_mj is None or direct_mj is None or not n_images:
            return None
        return divmod(total_mj - direct_mj, n_images)

    def _power_samples(self) -> Iterator[_Row]:
        for c in self._commits() if self._any_power else ():
            for trace in c.power:
                yield from self._trace_rows(trace, c)
        committed = {c.worker_id: c for c in self._shards}
        for worker_id, trace in self._uncommitted.power:
            place = self._uncommitted.workers.get(worker_id) or committed.get(worker_id)
            yield from self._trace_rows(trace, place)

    def _trace_rows(self, trace: PowerTrace, place: Commit | WorkerEnvironment | None) -> Iterator[_Row]:
        """Fills `_power` on the way."""
        series = self._power.setdefault((trace.boot_id, f"gpu:{trace.device}"), (array("q"), array("q")))
        for sample in trace.samples:
            if sample.power_instant_mw is not None:
                series[0].append(sample.t_mono_ns)
                series[1].append(sample.power_instant_mw)
        yield from power_rows(trace, *((place.node_id, place.host) if place else (None, None)))

    def _nodes(self) -> NodeBooks:
        places: dict[str, Commit | WorkerEnvironment] = {c.worker_id: c for c in self._shards}
        places |= self._uncommitted.workers
        devices = {
            worker_id: [f"gpu:{uuid}" for uuid in held if uuid != "cpu"]
            for worker_id, held in self._devices().items()
        }
        hosts = {worker_id: place.host for worker_id, place in places.items()}
        return close_nodes(self.ledger, hosts, devices, self._uncommitted.nodes)

    def _devices(self) -> dict[str, tuple[str, ...]]:
        return held_devices(self._uncommitted.workers, self._shards)

    def _environments(self) -> Iterator[_Row]:
        first: dict[str, CounterRead] = {}
        domains: dict[str, set[str]] = defaultdict(set)
        for entry in self.ledger.entries:
            first.setdefault(entry.segment.worker_id, entry.segment.open)
            domains[entry.segment.worker_id].update(self.ledger.read_domains(entry))
        commits: dict[str, Commit] = {}
        for commit in self._shards:
            commits.setdefault(commit.worker_id, commit)
        job = self.job
        model = (job.model_name, job.model_sha256, job.fingerprint, job.millijoule_version)
        for worker_id in sorted(first.keys() | commits.keys()):
            c, read = commits.get(worker_id), first.get(worker_id)
            own = self._uncommitted.workers.get(worker_id)
            t_wall_ns = read.t_wall_ns if read else c.t_start_wall_ns if c else 0
            stated = own or c  # of a worker whose environment is lost, what its commits say
            where = (stated.node_id, stated.host, stated.device) if stated else (None,) * 3
            gpus = (",".join(own.gpus), own.device_name) if own else (None, None)
            method = (
                (stated.driver_epoch, t_wall_ns, stated.energy_method) if stated else (None, t_wall_ns, None)
            )
            software = (own.python_version, own.torch_version, own.driver_version) if own else (None,) * 3
            who = (worker_id, read.boot_id if read else None)
            read_domains = ",".join(sorted(domains[worker_id]))
            yield t_wall_ns, (*who, *where, *gpus, *method, read_domains, *model, *software)


def reading_blocks(readings: pa.Table) -> Iterator[DayBlock]:
    """The `node_reading` table by day."""
    days = pc.divide(readings["t_wall_ns"], DAY_NS)
    for day in sorted(pc.unique(days).to_pylist()):
        yield day, readings.filter(pc.equal(days, day))


def node_energy_rows(nodes: NodeBooks) -> Iterator[_Row]:
    """The `node_energy` table: what each C3 row is the sum of."""
    for part in nodes.parts:
        yield part.stretch[0] + part.wall_minus_mono_ns, part.as_tuple()


class _Images(NamedTuple):
    """The images of a shard: their rows, and energies in the same order."""

    shard_id: int
    attempt_id: str
    rows: pa.Table
    direct: list[int | None]
    full: list[int | None]
    estimate: list[int | None]


def _image_table(parts: list[_Images]) -> pa.Table:
    rows = pa.concat_tables(p.rows for p in parts).combine_chunks()
    columns = [
        rows["prompt_id"],
        rows["image_index"],
        pa.array([p.shard_id for p in parts for _ in p.direct], pa.int64()),
        pa.array([p.attempt_id for p in parts for _ in p.direct], pa.string()),
        rows["sha256"],
        pa.array([mj for p in parts for mj in p.direct], pa.int64()),
        pa.array([mj for p in parts for mj in p.full], pa.int64()),
        pa.array([mj for p in parts for mj in p.estimate], pa.int64()),
    ]
    return pa.table(columns, schema=ENERGY_SCHEMAS["image"])


def counter_rows(entries: Iterable[LedgerEntry]) -> Iterator[_Row]:
    """The reads of `entries`, each once: a worker's close read opens its next segment."""
    latest: dict[str, tuple[str, int]] = {}  # entries are in order of time: a repeated read follows at once
    for entry in entries:
        for read in (entry.segment.open, entry.segment.close):
            at = (read.boot_id, read.t_mono_ns)
            if latest.get(entry.segment.worker_id) != at:
                latest[entry.segment.worker_id] = at
                yield from read_rows(entry.segment.worker_id, read)


def power_rows(trace: PowerTrace, node_id: str | None, host: str | None) -> Iterator[_Row]:
    """The samples of one device as rows of the power table."""
    for sample in trace.samples:
        yield sample.t_wall_ns, (trace.boot_id, node_id, host, trace.device, *sample, trace.source)


def read_rows(worker_id: str, read: CounterRead) -> Iterator[_Row]:
    """One counter row per domain of `read`."""
    t_wall_ns = read.t_wall_ns // WALL_STEP_NS * WALL_STEP_NS
    latency_ns = -(-read.latency_ns // LATENCY_STEP_NS) * LATENCY_STEP_NS
    for domain, energy_mj in sorted(read.energy_mj.items()):
        where = (worker_id, read.boot_id, read.epoch_of(domain), domain)
        yield read.t_wall_ns, (*where, read.t_mono_ns, t_wall_ns, latency_ns, energy_mj)


def committed_attempt(c: Commit, energy_mj: int | None) -> tuple:
    """The attempt row of a commit."""
    return (
        *(c.shard_id, c.attempt_id, "committed", c.worker_id, c.node_id, c.host, c.device, c.driver_epoch),
        *(c.t_start_wall_ns, c.t_end_wall_ns, c.images_ok, c.images_quarantined, energy_mj),
        *(c.energy_estimate_mj, c.energy_method, ",".join(c.energy_domains)),
    )


def blocks(name: str, rows: Iterable[_Row]) -> Iterator[DayBlock]:
    """`rows` as tables of one day and at most `BLOCK_ROWS` each."""
    held: dict[int, list[tuple]] = defaultdict(list)
    for t_wall_ns, row in rows:
        day = t_wall_ns // DAY_NS
        held[day].append(row)
        if len(held[day]) == BLOCK_ROWS:
            yield day, table_of(name, held.pop(day))
    for day in sorted(held):
        yield day, table_of(name, held[day])


def _quality(domain: str | None, energy_mj: int | None, duration_ns: int) -> str:
    if domain is None or energy_mj is None:
        return "missing"
    shortest = SHORT_GPU_NS if domain.startswith("gpu:") else SHORT_CPU_NS
    return "short" if duration_ns < shortest else "measured"
