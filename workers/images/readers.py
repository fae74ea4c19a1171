"""Reading back what `workers.images.writers` wrote: the encoded image of a row, whatever the output format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from millijoule.workers.errors import NotFoundError
from millijoule.workers.storage.protocol import Store


def read_images(
    store: Store, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], bytes | None]]:
    """The encoded image of each row of one shard (records of `IMAGE_ROW_SCHEMA` with status "ok").

    Yields `(row, bytes)` in order, `(row, None)` where the object or the member is not there. Whole files are read
    once, however many images they hold.
    """
    parquet: dict[str, dict[tuple[str, int], bytes]] = {}
    tars: dict[str, tuple[bytes, dict[str, tuple[int, int]]]] = {}
    for row in rows:
        path = row["path"]
        try:
            if path.endswith(".parquet"):
                if path not in parquet:
                    parquet = {path: _parquet_images(store, path)}
                yield row, parquet[path].get((row["prompt_id"], row["image_index"]))
            elif "#" in path:
                tar, member = path.split("#", 1)
                if tar not in tars:
                    index = json.loads(store.get(tar.removesuffix(".tar") + ".index.json"))
                    tars = {tar: (store.get(tar), index)}
                data, index = tars[tar]
                offset, size = index.get(member, (0, 0))
                yield row, data[offset : offset + size] or None
            else:
                yield row, store.get(path)
        except NotFoundError:
            yield row, None


def _parquet_images(store: Store, key: str) -> dict[tuple[str, int], bytes]:
    with store.open_input(key) as source:
        table = pq.ParquetFile(source).read(columns=["prompt_id", "image_index", "image"])
    keys = zip(table["prompt_id"].to_pylist(), table["image_index"].to_pylist(), strict=True)
    return dict(zip(keys, table["image"].to_pylist(), strict=True))
