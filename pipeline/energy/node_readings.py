"""What nodes' own meters said, as rows: of a running job's recorders, and of files imported afterwards.

They lie in `_job/node_meters/`: a driver writes its recorders' readings at every flush; an import is one object per node and
meter, and importing again replaces it. A row holds a reading and all that bounds its error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.energy.growing_files import GrowingFiles, put_rows
from millijoule.pipeline.energy.schemas import ENERGY_SCHEMAS, ROW_GROUP_ROWS
from millijoule.pipeline.output.read_objects import OnDamage, read_objects
from millijoule.workers.layout import NODE_METERS_PREFIX
from millijoule.workers.node_meters.config import DeclaredRest
from millijoule.workers.node_meters.meter import NodeFailure, NodeReading, NodeSeries
from millijoule.workers.storage.protocol import Store

TABLE = "node_reading"

#: A driver's object is written anew at each flush until it has been written this often (or fills a row group).
PART_FLUSHES = 60

#: The feed of a meter that measures the whole node.
WHOLE_NODE = "node"

NO_READINGS = ENERGY_SCHEMAS[TABLE].empty_table()


@dataclass(frozen=True)
class MeteredNode:
    """What the readings of one feed of a node's meter have in common.

    Attributes:
        node_id, boot_id: None for an import, which does not know them.
        meter: meters of a node are alternatives, each measures all of it.
        feed: the feeds of a meter, such as the outlets of two power supplies, add up.
        max_gap_ns, accuracy_share: see `NodeSeries`.
        domains: the counters the node should have, see `NodeRecorderReady`; None: not known.
    """

    host: str
    meter: str
    max_gap_ns: int
    accuracy_share: float | None
    rest: DeclaredRest | None
    node_id: str | None = None
    boot_id: str | None = None
    feed: str = WHOLE_NODE
    domains: tuple[str, ...] | None = None

    def row(self, said: NodeReading | NodeFailure) -> tuple:
        """Values in the order of the table's columns."""
        value: tuple[str | int | None, ...]
        if isinstance(said, NodeFailure):
            value = (None, said.t_wall_ns, None, None, None, None, None)
        elif said.quantity == "energy":
            value = (said.source, said.t_wall_ns, said.t_error_ns, said.value, None, said.quantum, None)
        else:
            value = (said.source, said.t_wall_ns, said.t_error_ns, None, said.value, None, said.quantum)
        rest = (self.rest.power_mw, self.rest.tolerance_mw) if self.rest else (None, None)
        return (
            *(self.host, self.node_id, self.boot_id, self.meter, self.feed, *value),
            *(self.max_gap_ns, self.accuracy_share, *rest),
            None if self.domains is None else ",".join(self.domains),
            said.reason if isinstance(said, NodeFailure) else None,
        )

    def rows_of(self, series: NodeSeries) -> list[tuple]:
        """All readings of a series."""
        return [
            self.row(NodeReading(series.source, series.quantity, t, v, series.quantum, series.clock_error_ns))
            for t, v in zip(series.t_wall_ns, series.values, strict=True)
        ]


def node_reading_files(store: Store, epoch: int) -> GrowingFiles:
    """For the readings (of `TABLE`) that one driver has to write; two drivers never write the same object."""

    def key(_: str, part: int) -> str:
        return f"{NODE_METERS_PREFIX}{epoch:06d}-{part:06d}.parquet"

    return GrowingFiles(store, (TABLE,), key, PART_FLUSHES, ROW_GROUP_ROWS)


def store_import(store: Store, host: str, meter: str, rows: Sequence[tuple]) -> str:
    """Put the imported readings of `meter` at `host` in place of an earlier import of it; the object's key."""
    name = hashlib.sha256(f"{host}\0{meter}".encode()).hexdigest()[:16]
    key = f"{NODE_METERS_PREFIX}import-{name}.parquet"
    put_rows(store, key, TABLE, rows)
    return key


def read_node_readings(store: Store, on_damage: OnDamage | None = None) -> pa.Table:
    """All rows of a job, in order of node, meter, feed, source and time.

    Args:
        on_damage: called with what is wrong with an object, which is left out then.

    Raises:
        DamagedError: an object is not what it should be, and nobody asks for those; the message names it.
        StoreError: storage failed.
    """

    def parse(data: bytes) -> pa.Table:
        return pq.read_table(pa.BufferReader(data)).select(NO_READINGS.column_names).cast(NO_READINGS.schema)

    tables = read_objects(store, NODE_METERS_PREFIX, parse, "readings of a node meter", on_damage)
    order = [(name, "ascending") for name in ("host", "boot_id", "meter", "feed", "source", "t_wall_ns")]
    return pa.concat_tables([NO_READINGS, *tables]).sort_by(order)
