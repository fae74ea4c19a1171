"""SQL over the energy tables of one or many jobs, with DuckDB.

Each table of `ENERGY_SCHEMAS` is there under its name, over all outputs given, with three columns more: `run_id`,
`date` (UTC) and `output`. `sql/` holds questions by name. Files are read through our own store and handed to DuckDB
as PyArrow datasets; DuckDB itself may touch no file, network or extension, so a query can only see these tables.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as ds

from millijoule.pipeline.energy.live_tables import live_parts, read_live_tables
from millijoule.pipeline.energy.schemas import ENERGY_SCHEMAS, repeated_strings, run_id_of
from millijoule.pipeline.energy.tables import parse_part_key
from millijoule.pipeline.output.job import JobSpec, require_job
from millijoule.workers.errors import InputError
from millijoule.workers.layout import ENERGY_PREFIX
from millijoule.workers.storage.arrow import arrow_filesystem
from millijoule.workers.storage.protocol import Store

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

#: What every table has beside its own columns: where its rows come from.
PARTITION_SCHEMA = pa.schema([("run_id", pa.string()), ("date", pa.date32()), ("output", pa.string())])

CLOSURE_QUERIES = ("closure_c1", "closure_c2", "closure_c3", "closure_c5")

#: In this order: the last two forbid further settings.
_SETTINGS = {
    "asof_loop_join_threshold": "0",  # DuckDB cannot see how many rows a dataset has, and would take 2 million for 1
    "nested_loop_join_threshold": "0",
    "temp_directory": "",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "python_enable_replacements": "false",  # names of Python variables are no tables
    "enable_external_access": "false",
    "lock_configuration": "true",
}


def named_queries() -> dict[str, str]:
    """The SQL of the questions that come with the program, by name; the first line is a comment that explains it."""
    found = sorted(files("millijoule.pipeline.sql").iterdir(), key=lambda f: f.name)
    return {
        f.name.removesuffix(".sql"): f.read_text(encoding="utf-8") for f in found if f.name.endswith(".sql")
    }


def open_tables(stores: Sequence[Store]) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection that sees the energy tables of these outputs and nothing else.

    An output whose job has not finished yet is seen as of its last flush. Two outputs with the same job have the
    output's URL in their `run_id`.

    Raises:
        InputError: DuckDB is not installed, or an output has no energy tables.
        StoreError: storage failed.
    """
    jobs = [require_job(store) for store in stores]
    same = Counter(job.fingerprint for job in jobs)
    per_table: dict[str, list[ds.Dataset]] = {name: [] for name in ENERGY_SCHEMAS}
    for store, job in zip(stores, jobs, strict=True):
        run_id = run_id_of(job.fingerprint)
        run_id = f"{run_id}@{store.url}" if same[job.fingerprint] > 1 else run_id
        for name, dataset in _datasets(store, job, run_id):
            per_table[name].append(dataset)
    return connect({name: ds.dataset(parts) for name, parts in per_table.items()})


def connect(
    tables: Mapping[str, ds.Dataset | pa.Table], threads: int | None = None
) -> duckdb.DuckDBPyConnection:
    """A locked DuckDB connection over `tables`.

    Raises:
        InputError: DuckDB is not installed.
    """
    try:
        import duckdb
    except ImportError as error:
        raise InputError("queries need DuckDB: pip install 'millijoule[report]'") from error
    connection = duckdb.connect(":memory:")
    for name, table in tables.items():
        connection.register(name, table)
    if threads is not None:
        connection.execute(f"SET threads = {int(threads)}")
    for option, value in _SETTINGS.items():
        connection.execute(f"SET {option} = '{value}'")
    return connection


def run_query(connection: duckdb.DuckDBPyConnection, query: str, params: Mapping[str, Any]) -> pa.Table:
    """Run a question by name, or SQL, with `params` for each `$name` in it; the last statement's rows.

    Raises:
        InputError: no such question, SQL that cannot be run, or a parameter missing or unknown.
    """
    import duckdb

    sql = query
    if query.replace("_", "").replace("-", "").isalnum():
        questions = named_queries()
        if query not in questions:
            near = get_close_matches(query.replace("-", "_"), questions, 1)
            meant = f"did you mean {near[0]}? There" if near else "there"
            raise InputError(f"no question named {query!r}: {meant} are {', '.join(questions)}; or give SQL")
        sql = questions[query]
    try:
        statements = connection.extract_statements(sql)
        wanted = set().union(*(s.named_parameters for s in statements))
        if missing := sorted(wanted - params.keys()):
            raise InputError(f"the query needs {', '.join(f'--param {p}=VALUE' for p in missing)}")
        if unknown := sorted(params.keys() - wanted):
            raise InputError(f"the query has no parameter {', '.join(unknown)}")
        result = pa.table({})
        for statement in statements:
            given = {p: params[p] for p in statement.named_parameters}
            relation = connection.sql(statement, params=given or None)
            if relation is not None:
                result = relation.to_arrow_table()
    except duckdb.Error as error:
        raise InputError(f"the query cannot be run: {error}") from error
    return result


def _datasets(store: Store, job: JobSpec, run_id: str) -> Iterator[tuple[str, ds.Dataset]]:
    finished: dict[str, list[tuple[str, date]]] = {name: [] for name in ENERGY_SCHEMAS}
    for item in store.list(ENERGY_PREFIX):
        part = parse_part_key(item.key)
        if part and part[1] == run_id_of(job.fingerprint):
            finished[part[0]].append((item.key, part[2]))
    if finished["closure"]:  # written last
        for name, parts in finished.items():
            yield name, _stored(store, name, sorted(parts), run_id)
    elif live_parts(store):
        log.warning("%s: the job has not finished: rows as of its last flush, none of images yet", store.url)
        for name, rows in read_live_tables(store, job).items():
            for field, value in zip(PARTITION_SCHEMA, (run_id, None, store.url), strict=True):
                rows = rows.append_column(field, pa.array([value] * rows.num_rows, field.type))
            yield name, ds.dataset(rows.cast(_full_schema(name)))
    else:
        raise InputError(
            f"{store.url}: no energy tables yet; a running job writes them from its first flush on"
        )


def _stored(store: Store, name: str, parts: Sequence[tuple[str, date]], run_id: str) -> ds.Dataset:
    """The parts of a table, by key and day, as one dataset; files are opened when they are scanned."""
    schema = _full_schema(name)
    repeated = [f.name for f in schema if pa.types.is_dictionary(f.type)]
    parquet = ds.ParquetFileFormat(read_options=ds.ParquetReadOptions(dictionary_columns=repeated))
    filesystem = arrow_filesystem(store)
    fragments = []
    for key, day in parts:
        where = (ds.field("run_id") == run_id) & (ds.field("date") == pa.scalar(day, pa.date32()))
        where &= ds.field("output") == store.url
        fragments.append(parquet.make_fragment(key, filesystem, partition_expression=where))
    return ds.FileSystemDataset(fragments, schema, parquet)


def _full_schema(name: str) -> pa.Schema:
    """The columns a query sees; repeated strings stay dictionaries, which DuckDB groups by several times faster."""
    repeated = {f.name: f.with_type(pa.dictionary(pa.int32(), pa.string())) for f in repeated_strings(name)}
    return pa.schema([*(repeated.get(f.name, f) for f in ENERGY_SCHEMAS[name]), *PARTITION_SCHEMA])
