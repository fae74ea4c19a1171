"""A `Store` in an S3 bucket, through s3fs.

Every request goes through `Bucket`, which alone repeats what fails: botocore and s3fs are told not to, so that one
deadline holds and every repeat is in the log.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import s3fs
from botocore.utils import is_valid_endpoint_url, is_valid_ipv6_endpoint_url

from millijoule.workers.errors import AlreadyExistsError, InputError, NotFoundError, StoreError
from millijoule.workers.storage.protocol import ObjectInfo, Store, TemporaryObject, check_key, check_prefix
from millijoule.workers.storage.s3_failures import Backoff, S3Failure, failure_of
from millijoule.workers.visible_text import without_secrets

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How long a request is repeated: longer than a throttled prefix takes to split, or a gateway to restart.
REPEAT_FOR_S = 60.0
#: A server that is silent this long (seconds) will not answer; single requests carry at most PART_BYTES.
REQUEST_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0

#: Larger objects go up in parts of this size, PARTS_AT_ONCE together: at most 64 MiB of memory per upload.
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
MAX_PARTS = 10_000  # S3's limit; the parts grow for objects above 160 GB
DELETE_BATCH = 1000  # S3's limit per request
READ_BUFFER_BYTES = 1 << 20  # small reads of a Parquet footer or a CSV file become one request per MiB

_UNSUPPORTED_CODES = {"NotImplemented", "InvalidRequest", "InvalidArgument"}


@dataclass(frozen=True)
class S3Settings:
    """How to reach the server; credentials are not here, each process finds its own (environment, profile, role)."""

    endpoint_url: str | None = None  # None: AWS itself, or what the AWS profile says
    region: str | None = None
    repeat_for_s: float = REPEAT_FOR_S
    timeout_s: float = REQUEST_TIMEOUT_S

    @staticmethod
    def from_environment() -> S3Settings:
        """Settings from AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION and AWS_DEFAULT_REGION.

        Raises:
            InputError: the endpoint is no address.
        """
        env = os.environ.get
        endpoint = None
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
            if endpoint := env(name) or None:
                _check_endpoint(name, endpoint)
                break
        region = env("AWS_REGION") or env("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
        return S3Settings(endpoint, region)


def _check_endpoint(variable: str, url: str) -> None:
    """Refuse what botocore would only at the first request, with a plain ValueError."""
    if not url.startswith(("http://", "https://")) or not (
        is_valid_endpoint_url(url) or is_valid_ipv6_endpoint_url(url)
    ):
        raise InputError(
            f"environment variable {variable} is {without_secrets(url)!r}: an address such as http://minio:9000, with a host name of "
            "letters, digits and hyphens"
        )


class Bucket:
    """One S3 bucket under its raw keys. Picklable; the connection is made on first use in each process."""

    def __init__(self, name: str, settings: S3Settings) -> None:
        self.name = name
        self.settings = settings
        self._connection: tuple[int, s3fs.S3FileSystem] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "settings": self.settings, "_connection": None}

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def error(self, failure: S3Failure, action: str, key: str) -> StoreError:
        return failure.as_store_error(action, self.url(key), self.settings.endpoint_url)

    def once(self, function: Callable[[s3fs.S3FileSystem], T]) -> T:
        """Do one request, once. Raises S3Failure."""
        try:
            return function(self._filesystem())
        except Exception as e:
            failure = failure_of(e)
            if failure is None:
                raise
            raise failure from e

    def repeat(self, action: str, key: str, function: Callable[[s3fs.S3FileSystem], T]) -> T:
        """Do a request that may safely be repeated until it succeeds or its time is up. Raises StoreError."""
        backoff = Backoff(f"{action} {self.url(key)}", self.settings.repeat_for_s)
        while True:
            try:
                return self.once(function)
            except S3Failure as failure:
                if not failure.transient or not backoff.wait(failure):
                    raise self.error(failure, action, key) from failure

    def call(self, action: str, operation: str, key: str, **parameters: Any) -> dict[str, Any]:
        """Call the S3 operation ("put_object") on `key`, repeatedly; `action` names it in messages."""
        return self.repeat(
            action, key, lambda fs: fs.call_s3(operation, Bucket=self.name, Key=key, **parameters)
        )

    def call_once(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Call the S3 operation, once. Raises S3Failure."""
        return self.once(lambda fs: fs.call_s3(operation, Bucket=self.name, **parameters))

    def list_objects(self, prefix: str) -> Iterator[dict[str, Any]]:
        """Every entry (Key, Size, ETag, LastModified) under a string prefix, in key order."""
        page: dict[str, Any] = {}
        while True:
            token = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
            page = self.repeat(
                "list",
                prefix,
                lambda fs, token=token: fs.call_s3(  # type: ignore[misc]
                    "list_objects_v2", Bucket=self.name, Prefix=prefix, **token
                ),
            )
            yield from page.get("Contents", ())
            if not page.get("IsTruncated"):
                return

    def head(self, key: str) -> dict[str, Any]:
        """ContentLength, ETag and LastModified of the object; raises NotFoundError."""
        return self.call("read", "head_object", key)

    def get(self, key: str) -> bytes:
        path = f"{self.name}/{key}"
        return self.repeat("read", key, lambda fs: fs.cat_file(path, max_concurrency=1))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of the object, which must be at least `end` bytes long."""
        path = f"{self.name}/{key}"

        def read(fs: s3fs.S3FileSystem) -> bytes:
            data = fs.cat_file(path, start=start, end=end)
            if len(data) != end - start:
                raise ConnectionError(f"got {len(data)} of {end - start} bytes")
            return data

        return self.repeat("read", key, read)

    def open_input(self, key: str) -> BinaryIO:
        return io.BufferedReader(_RangedReader(self, key, self.head(key)["ContentLength"]), READ_BUFFER_BYTES)  # type: ignore[return-value]

    def upload(
        self,
        key: str,
        size_bytes: int,
        read: Callable[[int, int], bytes],
        on_part: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the object from `read(start, end)`; it appears whole or not at all. `on_part`: a part has arrived."""
        if size_bytes <= PART_BYTES:
            self.call("write", "put_object", key, Body=read(0, size_bytes))
            on_part()
            return
        part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))
        starts = range(0, size_bytes, part_bytes)
        upload_id = self.call("write", "create_multipart_upload", key)["UploadId"]

        def send(number: int, start: int) -> dict[str, Any]:
            body = read(start, min(start + part_bytes, size_bytes))
            answer = self.call("write", "upload_part", key, UploadId=upload_id, PartNumber=number, Body=body)
            on_part()
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE, "s3-upload") as pool:
                try:
                    parts = list(pool.map(send, range(1, len(starts) + 1), starts))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            self.complete(key, upload_id, parts, size_bytes)
        except BaseException:
            self.abort(key, upload_id)
            raise

    def complete(self, key: str, upload_id: str, parts: list[dict[str, Any]], size_bytes: int) -> None:
        try:
            upload = {"Parts": parts}
            self.call("write", "complete_multipart_upload", key, UploadId=upload_id, MultipartUpload=upload)
        except NotFoundError as e:
            # The upload is gone: completed by an earlier try whose answer was lost, or cleaned away by someone.
            head = self.head(key)
            if head["ContentLength"] != size_bytes or not head["ETag"].strip('"').endswith(f"-{len(parts)}"):
                raise StoreError(
                    f"cannot write {self.url(key)}: its multipart upload was removed meanwhile; try again",
                    transient=True,
                ) from e

    def abort(self, key: str, upload_id: str) -> None:
        """Drop a pending multipart upload; a failure is logged, since it costs space, not correctness."""
        try:
            self.call_once("abort_multipart_upload", Key=key, UploadId=upload_id)
        except S3Failure as failure:
            if not failure.not_found:
                logger.warning(
                    "multipart upload %s of %s stays pending: %s", upload_id, self.url(key), failure
                )

    def _filesystem(self) -> s3fs.S3FileSystem:
        """This process's connection. Two threads may both make one; the loser's is dropped unused."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = (os.getpid(), self._connect())
        return self._connection[1]

    def _connect(self) -> s3fs.S3FileSystem:
        config: dict[str, Any] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": self.settings.timeout_s,
            "max_pool_connections": 32,
            "tcp_keepalive": True,
            "retries": {"total_max_attempts": 1, "mode": "standard"},  # `repeat` does them
            # Stricter servers (Ceph, rclone) refuse the trailing checksums that are otherwise the default.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        if self.settings.endpoint_url:
            config["s3"] = {"addressing_style": "path"}
        filesystem = s3fs.S3FileSystem(
            endpoint_url=self.settings.endpoint_url,
            client_kwargs={"region_name": self.settings.region} if self.settings.region else {},
            config_kwargs=config,
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        filesystem.retries = 1
        return filesystem


@lru_cache(maxsize=16)
def shared_bucket(name: str, settings: S3Settings) -> Bucket:
    """One connection for all prompt files of a bucket: a new one costs 70 ms and a handshake."""
    return Bucket(name, settings)


class _RangedReader(io.RawIOBase):
    """A seekable file over one object, one ranged request per read."""

    def __init__(self, bucket: Bucket, key: str, size_bytes: int) -> None:
        self._bucket = bucket
        self._key = key
        self._size = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readall(self) -> bytes:
        """The rest in one request; the inherited way would make one for every 8 KiB."""
        return self._next(self._size - self._position)

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, size_bytes: int) -> bytes:
        start = self._position
        end = min(start + size_bytes, self._size)
        if end <= start:
            return b""
        data = self._bucket.get_range(self._key, start, end)
        self._position = end
        return data


class S3Store(Store):
    """A `Store` under a prefix of a bucket. The exclusive create is PutObject with `If-None-Match: *`."""

    def __init__(self, bucket: str, prefix: str, settings: S3Settings) -> None:
        self._bucket = Bucket(bucket, settings)
        self._start = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.url = f"s3://{bucket}/{self._start}".rstrip("/")

    def put_exclusive(self, key: str, data: bytes) -> None:
        bucket, raw = self._bucket, self._raw(key)
        backoff = Backoff(f"create {bucket.url(raw)}", bucket.settings.repeat_for_s)
        while True:
            try:
                bucket.call_once("put_object", Key=raw, Body=data, IfNoneMatch="*")
                return
            except S3Failure as failure:
                if failure.refused_because_present:
                    # Whose it is, only its bytes tell: a lost answer makes our own success look like a defeat.
                    if self._holds(key, data):
                        return
                elif not failure.transient:
                    raise bucket.error(failure, "create", raw) from failure
                if not backoff.wait(failure):
                    if failure.transient and self._holds(key, data):
                        return
                    raise bucket.error(failure, "create", raw) from failure

    def _holds(self, key: str, data: bytes) -> bool:
        """True when the object holds `data`, False when there is none; raises AlreadyExistsError otherwise."""
        try:
            existing = self.get(key)
        except NotFoundError:
            return False
        if existing != data:
            raise AlreadyExistsError(
                f"{self._bucket.url(self._raw(key))} already exists with other content; another writer was first"
            )
        return True

    def put(self, key: str, data: bytes) -> None:
        view = memoryview(data)
        self._bucket.upload(self._raw(key), len(data), lambda start, end: bytes(view[start:end]))

    def put_file(self, key: str, path: Path, on_part: Callable[[], None] = lambda: None) -> None:
        raw = self._raw(key)
        try:
            with open(path, "rb") as file:
                descriptor = file.fileno()
                size_bytes = os.fstat(descriptor).st_size

                def read(start: int, end: int) -> bytes:
                    data = os.pread(descriptor, end - start, start)
                    if len(data) != end - start:
                        raise StoreError(f"{path} shrank while it was uploaded to {self._bucket.url(raw)}")
                    return data

                self._bucket.upload(raw, size_bytes, read, on_part)
        except OSError as e:
            raise StoreError(
                f"cannot read {path} to store it as {self._bucket.url(raw)}: {e.strerror}"
            ) from e

    def get(self, key: str) -> bytes:
        return self._bucket.get(self._raw(key))

    def size(self, key: str) -> int:
        return int(self._bucket.head(self._raw(key))["ContentLength"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for found in self._bucket.list_objects(self._start + check_prefix(prefix)):
            key = found["Key"][len(self._start) :]
            if key and not key.endswith("/"):  # consoles create "folder/" placeholders
                yield ObjectInfo(key, found["Size"], _nanoseconds(found["LastModified"]))

    def delete(self, keys: Iterable[str]) -> None:
        raw = [self._raw(key) for key in keys]
        for i in range(0, len(raw), DELETE_BATCH):
            self._delete_batch(raw[i : i + DELETE_BATCH])

    def _delete_batch(self, keys: Sequence[str]) -> None:
        bucket = self._bucket
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        try:
            answer = bucket.call_once("delete_objects", Delete=request)
            remaining: Sequence[str] = [error["Key"] for error in answer.get("Errors", ())]
        except S3Failure as failure:
            logger.debug("batch delete in %s failed (%s); deleting one by one", bucket.name, failure)
            remaining = keys
        # Some servers know no batches, and a batch reports its failures without a reason we could act on.
        for key in remaining:
            try:
                bucket.call("delete", "delete_object", key)
            except NotFoundError:
                continue

    def open_input(self, key: str) -> BinaryIO:
        return self._bucket.open_input(self._raw(key))

    def probe_exclusive_create(self) -> bool:
        try:
            return super().probe_exclusive_create()
        except StoreError as e:
            cause = e.__cause__
            if isinstance(cause, S3Failure) and cause.code in _UNSUPPORTED_CODES:
                return False
            raise

    def list_temporary(self) -> Iterator[TemporaryObject]:
        markers: dict[str, str] = {}
        while True:
            try:
                page = self._bucket.call_once("list_multipart_uploads", Prefix=self._start, **markers)
            except S3Failure as failure:
                if failure.status in (404, 405, 501) and failure.code != "NoSuchBucket":
                    return  # the server cannot list them
                raise self._bucket.error(failure, "list the uploads of", self._start) from failure
            for upload in page.get("Uploads", ()):
                key = upload["Key"][len(self._start) :]
                yield TemporaryObject(key, _nanoseconds(upload["Initiated"]), upload["UploadId"])
            if not page.get("IsTruncated"):
                return
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def delete_temporary(self, leftovers: Iterable[TemporaryObject]) -> None:
        for leftover in leftovers:
            if leftover.upload_id is None:
                raise ValueError(f"{leftover.key!r} is not a pending upload")
            self._bucket.abort(self._raw(leftover.key), leftover.upload_id)

    def _raw(self, key: str) -> str:
        return self._start + check_key(key)


def _nanoseconds(moment: datetime) -> int:
    """Nanoseconds since the Unix epoch, without the rounding of a float timestamp."""
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return ((delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds) * 1000
