"""A store as PyArrow's file system: scans of one dataset, at a time, each read their own file."""

import io
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from millijoule.workers.errors import NotFoundError
from millijoule.workers.storage.arrow import arrow_filesystem
from millijoule.workers.storage.open import open_store

ROWS = pa.table({"n": range(20_000), "words": [f"row {n}" for n in range(20_000)]})


class SlowFile(io.BytesIO):
    """Lets others run wherever a thread may be interrupted: after each seek."""

    def seek(self, *args):
        position = super().seek(*args)
        time.sleep(0.001)
        return position


class SlowStore:
    """Of one store, what is read."""

    def __init__(self, store):
        self.store = store

    def open_input(self, key):
        return SlowFile(self.store.get(key))


@pytest.fixture
def store(tmp_path):
    stored = io.BytesIO()
    pq.write_table(ROWS, stored, row_group_size=1000)
    store = open_store(str(tmp_path))
    store.put("part.parquet", stored.getvalue())
    return store


def dataset(store, key="part.parquet"):
    parquet = ds.ParquetFileFormat()
    fragment = parquet.make_fragment(key, arrow_filesystem(store))
    return ds.FileSystemDataset([fragment], ROWS.schema, parquet)


def test_scans_at_a_time_do_not_disturb_each_other(store):
    rows = dataset(SlowStore(store))
    with ThreadPoolExecutor(4) as threads:
        for scanned in threads.map(lambda _: rows.to_table(), range(4)):
            assert scanned.equals(ROWS)


def test_a_local_store_s_own_files_are_read(store):
    assert dataset(store).to_table(columns=["n"]).equals(ROWS.select(["n"]))


def test_a_missing_part_is_named(store):
    with pytest.raises(NotFoundError, match=r"gone\.parquet"):
        dataset(store, "gone.parquet").to_table()


def test_two_views_of_a_store_are_one_file_system(store):
    assert arrow_filesystem(store) == arrow_filesystem(store)
    assert arrow_filesystem(store) != arrow_filesystem(SlowStore(store))
