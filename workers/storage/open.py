"""Opening a store by its URL, and what URLs are understood."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from millijoule.workers.errors import InputError
from millijoule.workers.storage.local import LocalStore
from millijoule.workers.storage.protocol import Store
from millijoule.workers.visible_text import without_secrets

if TYPE_CHECKING:
    from millijoule.workers.storage.s3 import S3Settings


def open_store(url: str, s3: S3Settings | None = None, *, patient: bool = False) -> Store:
    """Open a folder ("out", "/data/out", "file:///data/out") or an S3 prefix ("s3://bucket/prefix").

    Nothing is contacted or created yet. `s3` defaults to what the AWS_* environment variables say. A `patient` store
    repeats what fails in passing for as long as it takes: for a job at work, which has nothing better to do than wait.

    Raises:
        InputError: neither a path nor an s3:// URL.
    """
    if is_s3_url(url):
        # here, since s3fs takes 0.5 s to import
        from millijoule.workers.storage.s3 import S3Settings, S3Store

        bucket, prefix = split_s3_url(url)
        settings = s3 or S3Settings.from_environment()
        if patient:
            settings = replace(settings, repeat_for_s=math.inf)
        return S3Store(bucket, prefix, settings)
    return LocalStore(local_path(url))


def is_s3_url(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def split_s3_url(url: str) -> tuple[str, str]:
    """("bucket", "key/or/prefix") of an s3:// URL, without leading or trailing slashes; raises InputError."""
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket:
        raise InputError(f"{url!r} names no bucket; write s3://bucket/prefix")
    if "@" in bucket:
        raise InputError(
            f"{without_secrets(url)!r} has a login in it, which logs and job.json would repeat; write s3://bucket/prefix, "
            "and give keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
        )
    return bucket, key.strip("/")


def local_path(url: str) -> Path:
    """The path of a plain path or file:// URL; raises InputError for any other scheme."""
    if url.startswith("file://"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"{url!r} names another machine; write file:///folder or a plain path")
        return Path(unquote(parts.path))
    if not url:
        raise InputError("empty path; give a folder, a file or an s3:// URL")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", url):
        scheme = url.partition(":")[0]
        raise InputError(
            f"{without_secrets(url)!r}: cannot read or write {scheme}: URLs; use a local path or s3://bucket/prefix"
        )
    return Path(url).expanduser()
