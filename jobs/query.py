"""`millijoule query`: a question by name, or any SQL, over the energy tables of one or many jobs."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from millijoule.jobs.entry import COMPLETE, NamedOutputs, run_command
from millijoule.workers.visible_text import visible, visible_lines

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["table", "csv", "json", "parquet"]


@dataclass(frozen=True)
class QueryOptions:
    """Ask the energy tables of finished or running jobs: a question by name (--list shows them), or SQL for DuckDB.

    The tables counter, power, segment, attempt, image, env, node_reading, node_energy and closure hold the rows of all
    outputs given, told apart by run_id (the job), date (UTC) and output. Needs the extra `report`.
    """

    query: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME|SQL")] = ""
    """Name of a question, or SQL."""

    outputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="OUTPUT ...")] = ()
    """Output folders or s3:// URLs of jobs."""

    named: NamedOutputs = ()
    """The same, as an option."""

    format: Format = "table"
    """How rows are printed; json is one object per line. In csv a text that a spreadsheet would take for a formula begins with an
    apostrophe; json and parquet have every text as it is."""

    param: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Values of the query's $NAME parameters, such as price_per_kwh=0.30."""

    save: str | None = None
    """File to write instead of printing."""

    list: bool = False
    """Show the questions there are, and end."""


def run(options: QueryOptions) -> int:
    from millijoule.pipeline.sql.query import named_queries, open_tables, run_query
    from millijoule.workers.errors import InputError, UsageError
    from millijoule.workers.storage.open import open_store

    if options.list:
        for name, sql in named_queries().items():
            print(f"{name:<28} {sql.partition(chr(10))[0].removeprefix('--').strip()}")
        return COMPLETE
    outputs = (*options.outputs, *options.named)
    if not options.query or not outputs:
        raise UsageError("give a question or SQL, and at least one output folder; --list shows the questions")
    params = parse_params(options.param)
    with open_tables([open_store(url) for url in dict.fromkeys(outputs)]) as connection:
        rows = run_query(connection, options.query, params)
    data = encode(rows, options.format)
    if options.save is not None:
        try:
            Path(options.save).write_bytes(data)
        except OSError as error:
            raise InputError(f"--save {options.save}: {error.strerror}") from error
    else:
        if sys.stdout.isatty() and options.format != "parquet":  # prompts are untrusted
            data = visible_lines(data.decode()).encode()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    return COMPLETE


def parse_params(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("pue=1.2", "host=h1")` -> {"pue": 1.2, "host": "h1"}; raises InputError."""
    from millijoule.workers.errors import UsageError

    params: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise UsageError(f"--param {pair}: NAME=VALUE, such as pue=1.2")
        params[name] = _number_or_text(value)
    return params


def _number_or_text(value: str) -> int | float | str:
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def encode(rows: pa.Table, format: Format) -> bytes:
    """`rows` as the bytes to print."""
    import io

    import pyarrow.csv
    import pyarrow.parquet as pq

    from millijoule.pipeline.statements.csv_cells import safe_table

    sink = io.BytesIO()
    if format == "parquet":
        pq.write_table(rows, sink, compression="zstd")
    elif format == "csv":
        pyarrow.csv.write_csv(safe_table(_flat(rows)), sink)
    elif format == "json":
        for row in rows.to_pylist():
            sink.write(_as_json(row) + b"\n")
    else:
        sink.write(as_text(rows).encode())
    return sink.getvalue()


def _as_json(value: Any) -> bytes:
    """`value` as JSON of any reader: what is no number, as NaN, is null; a half of a surrogate pair becomes "?"."""
    import json

    def finite(part: Any) -> Any:
        if isinstance(part, float) and not math.isfinite(part):
            return None
        if isinstance(part, dict):
            return {str(k): finite(v) for k, v in part.items()}
        return [finite(v) for v in part] if isinstance(part, list | tuple) else part

    text = json.dumps(finite(value), default=str, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace")


def _flat(rows: pa.Table) -> pa.Table:
    """`rows` with columns of lists and records as JSON, for what has cells of text."""
    import pyarrow as pa

    for i, field in enumerate(rows.schema):
        if pa.types.is_nested(field.type):
            texts = [None if v is None else _as_json(v).decode() for v in rows.column(i).to_pylist()]
            rows = rows.set_column(i, field.name, pa.array(texts, pa.string()))
    return rows


def as_text(rows: pa.Table) -> str:
    """`rows` in aligned columns, numbers to the right, missing values as "-"; the number of rows last."""
    columns = []
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        values = column.to_pylist()
        cells = [_cell(v) for v in values]
        width = max(map(len, [name, *cells]))
        right = any(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        columns.append([c.rjust(width) if right else c.ljust(width) for c in [name, *cells]])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    return "\n".join([*lines, f"({rows.num_rows} {'row' if rows.num_rows == 1 else 'rows'})", ""])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return visible(text)  # prompts are untrusted


def main(argv: list[str] | None = None) -> int:
    return run_command("query", QueryOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
