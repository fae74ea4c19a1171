"""Rows of tables are taken in order, whatever the tables' sizes."""

import pyarrow as pa
import pytest

from millijoule.pipeline.output.image_rows import RowReader


@pytest.mark.parametrize("n", [1, 2, 3, 5, 100])
def test_tables_of_any_size_are_read_in_portions_of_one_size(n):
    sizes = [1, 0, 4, 2, 0, 0, 3]
    numbers = iter(range(sum(sizes)))
    tables = [pa.table({"i": pa.array([next(numbers) for _ in range(size)], pa.int64())}) for size in sizes]
    reader = RowReader(tables, tables[0].schema)
    portions = []
    while (part := reader.take(n)).num_rows:
        portions.append(part["i"].to_pylist())
    assert portions == [list(range(start, min(start + n, 10))) for start in range(0, 10, n)]
    assert reader.take(n).num_rows == 0
