"""Fixtures of the storage tests."""

from __future__ import annotations

import pytest
from support.stores import PART_BYTES, open_empty

from millijoule.workers.storage import s3 as s3_storage
from millijoule.workers.storage.protocol import Store


@pytest.fixture(params=["local", "moto", "ceph"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store of every kind that the commit protocol may run on."""
    return open_empty(request, request.param)


@pytest.fixture(params=["local", "moto", "ceph", "rclone"])
def any_store(request: pytest.FixtureRequest) -> Store:
    """`store`, and the S3 server without conditional writes, which must still do everything else."""
    return open_empty(request, request.param)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_storage, "PART_BYTES", PART_BYTES)
