"""Tables that a driver stores while it runs: a file grows, written anew at each flush, until it is worth one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO

from millijoule.pipeline.energy.schemas import open_parquet_writer, table_of
from millijoule.workers.storage.protocol import Store


class GrowingFiles:
    """One file per table, which begin and end together; rows wait in memory until their file is full.

    Args:
        key: where part number n of a table is stored.
        most_flushes: after so many the next files begin,
        most_rows: or once a table has so many rows.
    """

    def __init__(
        self,
        store: Store,
        tables: Sequence[str],
        key: Callable[[str, int], str],
        most_flushes: int,
        most_rows: int,
    ) -> None:
        self.store, self.key = store, key
        self.most_flushes, self.most_rows = most_flushes, most_rows
        self.rows: dict[str, list[tuple]] = {table: [] for table in tables}
        self._part = self._flushes = 0
        self._is_changed = False

    def add(self, table: str, rows: Iterable[tuple]) -> None:
        before = len(self.rows[table])
        self.rows[table].extend(rows)
        self._is_changed = self._is_changed or len(self.rows[table]) > before

    def flush(self) -> bool:
        """Store all that was added since the current files began; whether the next ones begin now.

        Raises:
            StoreError: storage failed; nothing is lost yet, flush again.
        """
        if not self._is_changed:
            return False
        for table, rows in self.rows.items():
            if rows:
                put_rows(self.store, self.key(table, self._part), table, rows)
        self._is_changed = False
        self._flushes += 1
        if self._flushes < self.most_flushes and max(map(len, self.rows.values())) < self.most_rows:
            return False
        self.rows = {table: [] for table in self.rows}
        self._part, self._flushes = self._part + 1, 0
        return True


def put_rows(store: Store, key: str, table: str, rows: Sequence[tuple]) -> None:
    """Store `rows`, whose values are in the order of the columns, as a file of a table."""
    sink = BytesIO()
    with open_parquet_writer(sink, table) as writer:
        writer.write_table(table_of(table, list(rows)))
    store.put(key, sink.getvalue())
