"""Sealed parts of shards that nobody has committed yet, as an output has them (`workers.attempts.parts`)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from millijoule.workers.layout import PARTS_PREFIX, shard_of_part_key
from millijoule.workers.storage.protocol import Store


def shards_in_parts(store: Store, committed: np.ndarray) -> Iterator[int]:
    """Shards with sealed parts and without a commit; `committed` is bool `[n_shards]`."""
    for item in store.list(PARTS_PREFIX):
        shard_id = shard_of_part_key(item.key)
        if shard_id is not None and shard_id < len(committed) and not committed[shard_id]:
            yield shard_id
