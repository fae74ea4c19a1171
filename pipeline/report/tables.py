"""Reading an output's `energy/` tables for the report, whatever their folders are called.

Parts are found by listing, so `energy/segment/part-0.parquet` and `energy/segment/run_id=.../date=.../part-0.parquet`
both are the segment table. A table or a column that is not there is None or null: an older output has fewer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.pipeline.energy.schemas import ENERGY_SCHEMAS
from millijoule.pipeline.output.read_objects import in_threads
from millijoule.workers.errors import StoreError
from millijoule.workers.layout import ENERGY_PREFIX
from millijoule.workers.storage.protocol import Store

#: The columns of each table the report needs, with the type an absent one gets.
_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    table: {name: ENERGY_SCHEMAS[table].field(name).type for name in names}
    for table, names in {
        "counter": ("worker_id", "boot_id", "epoch", "domain", "t_mono_ns", "energy_mj"),
        "segment": (
            *("segment_id", "worker_id", "segment_class", "boot_id", "t_open_mono_ns", "t_close_mono_ns"),
            *("t_open_wall_ns", "domain", "energy_mj", "quality", "energy_estimate_mj"),
        ),
        "attempt": (
            *("shard_id", "attempt_id", "outcome", "worker_id", "host", "device", "t_start_wall_ns"),
            *("t_end_wall_ns", "images_ok", "images_filtered", "images_drawn"),
            *("energy_mj", "energy_estimate_mj"),
        ),
        "power": ("boot_id", "host", "device", "t_wall_ns", "power_average_mw", "power_instant_mw"),
        "env": (
            *("worker_id", "host", "device", "gpus", "energy_domains", "device_name"),
            *("python_version", "torch_version", "driver_version", "price_per_hour"),
        ),
        "closure": (
            *("check", "scope", "expected_mj", "found_mj", "residual_mj", "residual_share"),
            *("tolerance_share", "residual_ns", "tolerance_ns", "passed", "note"),
        ),
        "node_energy": ("host", "boot_id", "meter", "t_open_mono_ns", "t_close_mono_ns", "part", "energy_mj"),
    }.items()
}


def read_energy_table(store: Store, table: str, run_id: str) -> pa.Table | None:
    """All parts of `energy/<table>/` as one table of the columns the report uses; None where there are none.

    Args:
        run_id: the job's fingerprint; where parts are in `run_id=` folders and one of them is named by its beginning,
            the others (of earlier jobs) are left out.

    Raises:
        StoreError: a part cannot be read.
    """
    listed = store.list(f"{ENERGY_PREFIX}{table}/")
    keys = sorted(item.key for item in listed if item.key.endswith(".parquet"))
    if not keys:
        return None
    ours = [k for k in keys if (m := re.search(r"/run_id=([^/]+)/", k)) and run_id.startswith(m[1])]
    columns = _COLUMNS[table]
    tables = list(in_threads(lambda key: _read_part(store, key, columns), ours or keys, items_per_call=1))
    return pa.concat_tables(tables, promote_options="permissive")


def _read_part(store: Store, key: str, columns: dict[str, pa.DataType]) -> pa.Table:
    try:
        with store.open_input(key) as source:
            file = pq.ParquetFile(source)
            present = file.schema_arrow.names
            found = file.read(columns=[c for c in columns if c in present])
            return pa.table(
                {
                    name: found[name].cast(kind) if name in present else pa.nulls(found.num_rows, kind)
                    for name, kind in columns.items()
                }
            )
    except pa.ArrowException as error:
        raise StoreError(f"{store.url}/{key}: not a readable energy table: {error}") from error


def floats(column: pa.ChunkedArray) -> np.ndarray:
    """An integer column as float64, null as NaN. Millijoules and nanoseconds of a job keep their digits."""
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Labels:
    """A string column as `codes` into `names`; -1 is null."""

    names: tuple[str, ...]
    codes: np.ndarray

    def where(self, names: Sequence[str]) -> np.ndarray:
        """bool `[n]`: rows with one of `names`."""
        wanted = [i for i, name in enumerate(self.names) if name in names]
        return np.isin(self.codes, wanted)


def labels(column: pa.ChunkedArray) -> Labels:
    """`column` with its distinct strings numbered, in order of appearance."""
    encoded = pc.dictionary_encode(column).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = pa.concat_arrays(encoded.chunks) if encoded.num_chunks else pa.array([], encoded.type)
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return Labels(tuple(encoded.dictionary.to_pylist()), codes.astype(np.int64))


def rows_of_each(codes: np.ndarray, n: int) -> list[np.ndarray]:
    """The rows of each of the codes 0 to n - 1, in order; a negative code is none."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.searchsorted(codes[order], np.arange(n + 1)))[1:-1]
