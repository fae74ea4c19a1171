"""Fencing by epoch: a run of a job that a later one has superseded commits nothing any more (docs/commit-protocol.md)."""

from __future__ import annotations

from millijoule.workers.layout import epoch_key
from millijoule.workers.storage.protocol import Store


def is_superseded(store: Store, epoch: int) -> bool:
    """Whether a later run than `epoch` has begun: runs are numbered without a gap, so one request says it.

    Raises:
        StoreError: storage failed.
    """
    return store.exists(epoch_key(epoch + 1))
