"""The `energy/` tables of a finished job as files: written whole from commits, and compared with them.

`energy/<table>/run_id=<job>/date=<UTC day>/part-*.parquet`, at most `PART_ROW_GROUPS` row groups each. What was
written while the job ran (`live_tables`) is removed once the finished tables are there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.energy.closure import ClosureRow
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.ledger import Ledger
from millijoule.pipeline.energy.rows import DayBlock, EnergyRows, ImageSource, row_tables
from millijoule.pipeline.energy.schemas import (
    ADDED_COLUMNS,
    ENERGY_SCHEMA_VERSION,
    ENERGY_SCHEMAS,
    ROW_GROUP_ROWS,
    open_parquet_writer,
    run_id_of,
)
from millijoule.pipeline.energy.uncommitted import NOTHING, Uncommitted
from millijoule.pipeline.output.job import JobSpec
from millijoule.workers.errors import DamagedError, NotFoundError
from millijoule.workers.layout import ENERGY_PREFIX
from millijoule.workers.scratch import scratch_folder
from millijoule.workers.storage.protocol import Store

#: Row groups per `part-*.parquet`.
PART_ROW_GROUPS = 16

#: What a running job writes lies here; readers of partitioned tables skip folders that begin with "_".
LIVE_PREFIX = f"{ENERGY_PREFIX}_live/"

_PART = re.compile(
    rf"{ENERGY_PREFIX}(?P<table>{'|'.join(ENERGY_SCHEMAS)})/(?:run_id=(?P<run>[^/]+)/date=(?P<date>[0-9-]+)/)?part-\d+\.parquet"
)
_EPOCH_DAY = date(1970, 1, 1)


class RowGroup(NamedTuple):
    """Row group `number` of the file `key` of a table."""

    table: str
    key: str
    number: int
    rows: pa.Table


@dataclass(frozen=True)
class EnergyResult:
    """What became of the ledger: all closure rows, and the evidence class that follows."""

    closure: tuple[ClosureRow, ...]
    evidence_class: str

    def passed(self, check: str) -> bool | None:
        """Whether `check` holds wherever it could be made; None where it could not be made at all.

        C1 must be made everywhere: it is None where an account of devices was not closed.
        """
        verdicts = [r.passed for r in self.closure if r.check == check]
        made = [passed for passed in verdicts if passed is not None]
        if check == "C1" and all(made) and len(made) < len(verdicts):
            return None
        return all(made) if made else None


def parse_part_key(key: str) -> tuple[str, str, date] | None:
    """(table, run id, date) of a finished part's key; None for any other key."""
    match = _PART.fullmatch(key)
    if match is None or not match["run"]:
        return None
    return match["table"], match["run"], date.fromisoformat(match["date"])


def row_groups(rows: EnergyRows) -> Iterator[RowGroup]:
    """All tables of a job as the row groups their files have, `closure` last; at least one group per table."""
    run_id = run_id_of(rows.job.fingerprint)
    for table, day_blocks in rows.tables():
        yield from table_row_groups(table, run_id, day_blocks, rows.job_day)


def table_row_groups(
    table: str, run_id: str, day_blocks: Iterator[DayBlock], empty_day: int
) -> Iterator[RowGroup]:
    """One table's blocks as the row groups of its files; without any rows, one empty group of `empty_day`."""
    written: dict[int, int] = defaultdict(int)
    for day, group in _regrouped(table, day_blocks, empty_day):
        n = written[day]
        written[day] += 1
        folder = f"{ENERGY_PREFIX}{table}/run_id={run_id}/date={_EPOCH_DAY + timedelta(days=day)}"
        yield RowGroup(table, f"{folder}/part-{n // PART_ROW_GROUPS:05d}.parquet", n % PART_ROW_GROUPS, group)


def _regrouped(table: str, day_blocks: Iterator[DayBlock], empty_day: int) -> Iterator[DayBlock]:
    """Blocks put together, and cut, to row groups; one empty group where there are no rows."""
    held: dict[int, list[pa.Table]] = defaultdict(list)
    counts: dict[int, int] = defaultdict(int)
    any_rows = False
    for day, block in day_blocks:
        held[day].append(block)
        counts[day] += block.num_rows
        any_rows = any_rows or block.num_rows > 0
        if counts[day] >= ROW_GROUP_ROWS:
            rows = pa.concat_tables(held[day])
            while rows.num_rows >= ROW_GROUP_ROWS:
                yield day, _sorted(table, rows.slice(0, ROW_GROUP_ROWS))
                rows = rows.slice(ROW_GROUP_ROWS)
            held[day], counts[day] = [rows], rows.num_rows
    if not any_rows:
        yield empty_day, ENERGY_SCHEMAS[table].empty_table()
    for day in sorted(held):
        rows = pa.concat_tables(held[day])
        if rows.num_rows:
            yield day, _sorted(table, rows)


def _sorted(table: str, rows: pa.Table) -> pa.Table:
    """Counter rows one counter after the other: their differences are small, and readers can skip by device."""
    if table != "counter":
        return rows
    return rows.sort_by([(c, "ascending") for c in ("boot_id", "epoch", "domain", "worker_id", "t_mono_ns")])


def write_energy_tables(
    store: Store,
    job: JobSpec,
    ledger: Ledger,
    commits: CommitTable,
    images: ImageSource | None = None,
    uncommitted: Uncommitted = NOTHING,
) -> EnergyResult:
    """Write all energy tables of a job whose shards are committed, then remove parts they replace.

    Args: as `EnergyRows`; by default `images` are at the `rows_path` of each commit in `store`.

    Raises:
        StoreError: storage failed. Writing again replaces the same parts.
    """
    rows = EnergyRows(job, ledger, commits, images or row_tables(store), uncommitted)
    before = {item.key for item in store.list(ENERGY_PREFIX)}
    written = write_row_groups(store, row_groups(rows))
    store.delete(k for k in before - written if k.startswith(LIVE_PREFIX) or _PART.fullmatch(k))
    return EnergyResult(tuple(rows.closure), rows.evidence_class)


def write_row_groups(store: Store, groups: Iterator[RowGroup]) -> set[str]:
    """Write the files of `groups`, each table finished before the next begins; their keys."""
    written: set[str] = set()
    table = ""
    # of each day of the table, by folder of the key
    writers: dict[str, tuple[str, Path, pq.ParquetWriter]] = {}

    def finish(folder: str) -> None:
        key, path, writer = writers.pop(folder)
        writer.close()
        store.put_file(key, path)
        path.unlink()

    with scratch_folder() as scratch:
        for group in groups:
            folder = group.key.rpartition("/")[0]
            if group.table != table or group.number == 0:
                for done in [f for f in writers if f == folder or group.table != table]:
                    finish(done)
                table = group.table
                path = Path(scratch, group.key.replace("/", "-"))
                writers[folder] = group.key, path, open_parquet_writer(path, table)
                written.add(group.key)
            writers[folder][2].write_table(group.rows, row_group_size=ROW_GROUP_ROWS)
        for folder in list(writers):
            finish(folder)
    return written


def compare_energy_tables(
    store: Store,
    job: JobSpec,
    ledger: Ledger,
    commits: CommitTable,
    uncommitted: Uncommitted,
    images: ImageSource | None = None,
) -> Generator[str, None, EnergyResult | None]:
    """Every difference between the stored energy tables and what commits say, and every exact check that fails.

    Returns:
        What became of the ledger; None where it could not be told.
    """
    rows = EnergyRows(job, ledger, commits, images or row_tables(store), uncommitted)
    stored = {item.key for item in store.list(ENERGY_PREFIX) if _PART.fullmatch(item.key)}
    expected: dict[str, int] = {}  # row groups
    try:
        for group in row_groups(rows):
            expected[group.key] = group.number + 1
            if problem := _compare(store, group):
                yield problem
    except (pa.ArrowException, OSError, NotFoundError, DamagedError) as error:
        yield f"{ENERGY_PREFIX}: cannot be compared, a row table cannot be read: {error}"
        return None
    for key in sorted(stored - expected.keys()):
        yield f"{key}: a part that the commits do not make"
    for key in sorted(stored & expected.keys()):
        if (found := _num_row_groups(store, key)) not in (None, expected[key]):
            yield f"{key}: {found} row groups, the commits make {expected[key]}"
    yield from (
        f"energy ledger: {row}" for row in rows.closure if row.passed is False and row.tolerance_share == 0
    )
    return EnergyResult(tuple(rows.closure), rows.evidence_class)


def _compare(store: Store, group: RowGroup) -> str | None:
    try:
        with store.open_input(group.key) as source:
            file = pq.ParquetFile(source)
            version = (file.schema_arrow.metadata or {}).get(b"millijoule.schema_version", b"none").decode()
            if version != str(ENERGY_SCHEMA_VERSION) and version not in ADDED_COLUMNS:
                return f"{group.key}: has schema version {version}; run the job again to write it anew"
            if group.number >= file.num_row_groups:
                return f"{group.key}: has no row group {group.number}"
            found = file.read_row_group(group.number, use_threads=False)  # each thread would keep a heap
    except NotFoundError:
        return f"{group.key}: missing; run the job again to write it"
    except (pa.ArrowException, OSError) as error:
        return f"{group.key}: cannot be read as Parquet: {error}"
    added = ADDED_COLUMNS.get(version, {}).get(group.table, ())
    if found.schema.names != [name for name in group.rows.schema.names if name not in added]:
        return f"{group.key}: has columns {found.schema.names}"
    for name in found.schema.names:
        if found[name].combine_chunks() != group.rows[name].combine_chunks():
            return f"{group.key}: column {name} is not what the commits say"
    return None


def _num_row_groups(store: Store, key: str) -> int | None:
    try:
        with store.open_input(key) as source:
            return int(pq.ParquetFile(source).num_row_groups)
    except (pa.ArrowException, OSError):
        return None  # reported already
