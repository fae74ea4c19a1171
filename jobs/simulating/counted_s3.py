"""The product's own `S3Store` over a bucket that is a local folder and counts its requests, by operation.

What stands in is s3fs alone: every request that the store would send to S3 is one call here, pages of listings, ranges and parts of
uploads included. Commits of a made-up job can be listed without being there: a million small files would only measure the disk.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

from millijoule.workers.layout import COMMITS_PREFIX, commit_key
from millijoule.workers.storage.s3 import Bucket, S3Settings, S3Store

#: Of a listing's page: S3's own limit.
PAGE_KEYS = 1000
#: S3's operations by the word they are priced under; what deletes is free.
KINDS = {
    "put_object": "PUT",
    "create_multipart_upload": "PUT",
    "upload_part": "PUT",
    "complete_multipart_upload": "PUT",
    "get_object": "GET",
    "head_object": "HEAD",
    "list_objects_v2": "LIST",
    "delete_objects": "DELETE",
}

_LONG_AGO = datetime(2024, 1, 1, tzinfo=UTC)
_UPLOADS = ".uploads"


class FolderS3:
    """Answers S3's operations as s3fs does, from files below `root`; `requests` counts them by kind, see `KINDS`.

    Args:
        commits: of so many shards, from 0 on, a commit is listed whether it is there or not.
        latency_s: that an answer takes at least.
    """

    def __init__(self, root: Path, commits: int = 0, latency_s: float = 0.0) -> None:
        self.root, self.commits, self.latency_s = root, commits, latency_s
        self.requests: Counter[str] = Counter()
        self.received_bytes = 0  # by whoever reads
        self._lock = Lock()
        self._pages: dict[str, Iterator[tuple[str, int]]] = {}

    def call_s3(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """One request; raises FileNotFoundError and FileExistsError as s3fs does."""
        self._count(KINDS[operation])
        answer: dict[str, Any] = getattr(self, f"_{operation}")(**parameters)
        return answer

    def cat_file(
        self, path: str, start: int = 0, end: int | None = None, max_concurrency: int | None = None
    ) -> bytes:
        """One request for an object or a range of it; `path` begins with the bucket's name."""
        self._count("GET")
        with open(self.root / path.partition("/")[2], "rb") as file:
            file.seek(start)
            data = file.read(-1 if end is None else end - start)
        with self._lock:
            self.received_bytes += len(data)
        return data

    def _count(self, kind: str) -> None:
        with self._lock:
            self.requests[kind] += 1
        if self.latency_s:
            time.sleep(self.latency_s)

    def _put_object(
        self, Bucket: str, Key: str, Body: bytes, IfNoneMatch: str | None = None
    ) -> dict[str, Any]:
        path = self._make_room(Key)
        with path.open("wb" if IfNoneMatch is None else "xb") as file:
            file.write(Body)
        return {}

    def _create_multipart_upload(self, Bucket: str, Key: str) -> dict[str, Any]:
        return {"UploadId": Key.replace("/", "-")}

    def _upload_part(
        self, Bucket: str, Key: str, UploadId: str, PartNumber: int, Body: bytes
    ) -> dict[str, Any]:
        self._make_room(f"{_UPLOADS}/{UploadId}.{PartNumber}").write_bytes(Body)
        return {"ETag": str(PartNumber)}

    def _complete_multipart_upload(
        self, Bucket: str, Key: str, UploadId: str, MultipartUpload: dict[str, Any]
    ) -> dict[str, Any]:
        with self._make_room(Key).open("wb") as whole:
            for part in MultipartUpload["Parts"]:
                path = self.root / _UPLOADS / f"{UploadId}.{part['PartNumber']}"
                whole.write(path.read_bytes())
                path.unlink()
        return {}

    def _head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        return {"ContentLength": (self.root / Key).stat().st_size}

    def _delete_objects(self, Bucket: str, Delete: dict[str, Any]) -> dict[str, Any]:
        for item in Delete["Objects"]:
            (self.root / item["Key"]).unlink(missing_ok=True)
        return {}

    def _list_objects_v2(
        self, Bucket: str, Prefix: str, ContinuationToken: str | None = None
    ) -> dict[str, Any]:
        left = self._keys(Prefix) if ContinuationToken is None else self._pages.pop(ContinuationToken)
        page = list(islice(left, PAGE_KEYS))
        answer: dict[str, Any] = {
            "Contents": [{"Key": key, "Size": size, "LastModified": _LONG_AGO} for key, size in page]
        }
        if (following := next(left, None)) is not None:
            token = f"after {page[-1][0]}"
            self._pages[token] = chain([following], left)
            answer |= {"IsTruncated": True, "NextContinuationToken": token}
        return answer

    def _keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        made_up = self.commits if prefix == COMMITS_PREFIX else 0
        yield from ((commit_key(shard_id), 0) for shard_id in range(made_up))
        folder = self.root / prefix.rpartition("/")[0]
        for path, _, names in os.walk(folder):
            for name in names:
                file = Path(path, name)
                key = file.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not key.startswith(_UPLOADS):
                    yield key, file.stat().st_size

    def _make_room(self, key: str) -> Path:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _FolderBucket(Bucket):
    def __init__(self, s3: FolderS3) -> None:
        super().__init__("counted", S3Settings())
        self._s3 = s3

    def _filesystem(self) -> Any:
        return self._s3


class CountedS3Store(S3Store):
    """An `S3Store` over `folder`; `s3` counts its requests."""

    def __init__(self, folder: str | Path, commits: int = 0, latency_s: float = 0.0) -> None:
        super().__init__("counted", "", S3Settings())
        self.s3 = FolderS3(Path(folder), commits, latency_s)
        self._bucket = _FolderBucket(self.s3)

    @property
    def requests(self) -> dict[str, int]:
        """So far, by kind."""
        return dict(sorted(self.s3.requests.items()))
