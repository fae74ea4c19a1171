"""Empty stores of every kind, and writers that race for their keys."""

from __future__ import annotations

import os
import time

import pytest

from millijoule.workers.errors import AlreadyExistsError
from millijoule.workers.storage.open import open_store
from millijoule.workers.storage.protocol import Store

RACERS = 8
PART_BYTES = 5 << 20  # the least S3 allows; several parts then stay quick


def open_empty(request: pytest.FixtureRequest, kind: str) -> Store:
    if kind == "local":
        return open_store(str(request.getfixturevalue("tmp_path") / "out"))
    endpoint = request.getfixturevalue({"moto": "moto_s3", "rclone": "rclone_s3"}.get(kind, kind))
    request.getfixturevalue("s3_env")(endpoint)
    return open_store(f"s3://{endpoint.make_bucket()}/some/prefix/")


def keys_of(store: Store, prefix: str = "") -> list[str]:
    return sorted(found.key for found in store.list(prefix))


def race(store: Store, env: dict[str, str], racer: int, keys: list[str], start_at: float) -> list[str]:
    """Try to create every key; the ones this racer won."""
    os.environ.update(env)
    won = []
    time.sleep(max(0.0, start_at - time.time()))
    for key in keys:
        try:
            store.put_exclusive(key, f"{key} by {racer}".encode())
        except AlreadyExistsError:
            continue
        won.append(key)
    return won
