"""S3 behind a proxy that fails: what must be survived, and what a person is told when it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from s3_servers import FaultProxy, S3Endpoint
from support.stores import PART_BYTES, keys_of

from millijoule.workers.errors import AlreadyExistsError, StoreError
from millijoule.workers.storage import s3 as s3_storage
from millijoule.workers.storage import s3_failures
from millijoule.workers.storage.open import open_store
from millijoule.workers.storage.protocol import Store
from millijoule.workers.storage.s3 import S3Settings


@pytest.fixture(params=["moto", "ceph"])
def faulty(
    request: pytest.FixtureRequest,
    fault_proxy: Callable[[S3Endpoint], FaultProxy],
    s3_env: Callable[[S3Endpoint], None],
) -> tuple[FaultProxy, Store, Store]:
    """The proxy, a store behind it, and the same store reached directly."""
    server: S3Endpoint = request.getfixturevalue({"moto": "moto_s3"}.get(request.param, request.param))
    proxy = fault_proxy(server)
    s3_env(server)
    request.getfixturevalue("monkeypatch").setattr(s3_failures, "BACKOFF_FIRST_S", 0.02)
    url = f"s3://{server.make_bucket()}/out"
    settings = S3Settings(proxy.url, "us-east-1", repeat_for_s=20.0, timeout_s=1.5)
    return proxy, open_store(url, settings), open_store(url)


Faulty = tuple[FaultProxy, Store, Store]


def _impatient(proxy: FaultProxy, store: Store) -> Store:
    """The store behind the proxy, giving up after a second."""
    return open_store(store.url, S3Settings(proxy.url, "us-east-1", repeat_for_s=1.0))


@pytest.mark.long
def test_a_lost_acknowledgement_of_our_own_create_is_success(faulty: Faulty) -> None:
    proxy, store, direct = faulty
    lost = proxy.inject("ack_lost", "PUT .*/commits/1")
    store.put_exclusive("commits/1", b"mine")
    assert len(lost.hits) == 1
    assert sum("PUT" in line for line in proxy.requests) == 2  # the second met our own first
    assert direct.get("commits/1") == b"mine"


@pytest.mark.long
def test_a_lost_acknowledgement_does_not_make_a_foreign_commit_ours(faulty: Faulty) -> None:
    proxy, store, direct = faulty
    direct.put_exclusive("commits/1", b"theirs")
    proxy.inject("ack_lost", "PUT .*/commits/1", times=2)
    with pytest.raises(AlreadyExistsError):
        store.put_exclusive("commits/1", b"mine")
    assert direct.get("commits/1") == b"theirs"


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "status", "code", "times"),
    [
        ("status", 409, "ConditionalRequestConflict", 1),
        ("status", 503, "SlowDown", 2),
        ("status", 500, "InternalError", 1),
        ("reset", 0, "", 2),
        ("cut", 0, "", 1),
        ("hang", 0, "", 1),
    ],
)
def test_a_passing_fault_is_ridden_out(
    faulty: Faulty, mode: str, status: int, code: str, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    proxy, store, direct = faulty
    fault = proxy.inject(mode, "PUT ", times=times, status=status, code=code)
    store.put_exclusive("commits/1", b"x" * 10_000)
    assert len(fault.hits) == times
    assert direct.get("commits/1") == b"x" * 10_000
    if mode == "status":  # aiohttp itself repeats a PUT once when a kept connection breaks
        said = [r.getMessage() for r in caplog.records if r.name.startswith("millijoule")]
        assert len(said) == times
        assert all(f"{status} {code}" in line and "commits/1" in line for line in said)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["truncate", "reset", "status"])
def test_reading_and_listing_ride_out_faults(faulty: Faulty, mode: str) -> None:
    proxy, store, direct = faulty
    data = os.urandom(100_000)
    direct.put("x", data)
    proxy.inject(mode, "GET .*/x", times=2)
    assert store.get("x") == data
    proxy.inject(mode, "GET .*/x", times=2)
    with store.open_input("x") as file:
        assert file.read() == data
    proxy.inject(mode, "GET .*list-type", times=2)
    assert keys_of(store) == ["x"]
    proxy.inject("reset" if mode == "truncate" else mode, "HEAD ", times=2)
    assert store.exists("x")
    proxy.inject(mode, "POST .*delete", times=1)
    store.delete(["x"])
    assert keys_of(direct) == []


@pytest.mark.long
def test_a_server_that_stays_overloaded_is_a_transient_error_in_bounded_time(faulty: Faulty) -> None:
    proxy, store, direct = faulty
    proxy.inject("status", "PUT ", times=float("inf"))
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"503 SlowDown.*try again later") as failure:
        _impatient(proxy, store).put_exclusive("commits/1", b"mine")
    assert 0.3 < time.monotonic() - start < 10.0
    assert failure.value.transient
    assert not isinstance(failure.value, AlreadyExistsError)
    assert keys_of(direct) == []


@pytest.mark.long
def test_after_the_last_time_out_the_object_itself_decides(faulty: Faulty) -> None:
    proxy, store, _ = faulty
    proxy.inject("ack_lost", "PUT ", times=1)
    proxy.inject("reset", "PUT ", times=float("inf"))
    _impatient(proxy, store).put_exclusive("commits/1", b"mine")
    assert store.get("commits/1") == b"mine"


def test_missing_permission_is_said_at_once(faulty: Faulty) -> None:
    proxy, store, _ = faulty
    fault = proxy.inject("status", "PUT |GET ", times=float("inf"), status=403, code="AccessDenied")
    for use in (
        lambda: store.put("x", b""),
        lambda: store.put_exclusive("x", b""),
        lambda: store.get("x"),
        lambda: list(store.list()),
        lambda: store.probe_exclusive_create(),
    ):
        with pytest.raises(StoreError, match=r"s3://.*403 AccessDenied.*credentials") as failure:
            use()
        assert not failure.value.transient
    assert len(fault.hits) == 5  # none was repeated


@pytest.mark.long
def test_a_server_without_conditional_writes_fails_the_probe(faulty: Faulty) -> None:
    proxy, store, direct = faulty
    fault = proxy.inject("status", "PUT ", times=float("inf"), status=501, code="NotImplemented")
    assert not store.probe_exclusive_create()
    with pytest.raises(StoreError, match=r"501 NotImplemented.*does not support"):
        store.put_exclusive("x", b"1")
    assert len(fault.hits) == 2  # not retried
    assert keys_of(direct) == []


def test_a_full_store_is_said(faulty: Faulty) -> None:
    proxy, store, _ = faulty
    proxy.inject("status", "PUT ", status=403, code="QuotaExceeded")
    with pytest.raises(StoreError, match="quota is used up"):
        store.put("x", b"1")


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "large.tar"
    path.write_bytes(os.urandom(2 * PART_BYTES + 1000))
    return path


@pytest.mark.long
@pytest.mark.parametrize("mode", ["reset", "cut", "status"])
def test_a_failed_upload_leaves_nothing(faulty: Faulty, large_file: Path, mode: str) -> None:
    proxy, store, direct = faulty
    proxy.inject(mode, "PUT .*partNumber=2", times=float("inf"))
    with pytest.raises(StoreError, match=r"large\.tar") as failure:
        _impatient(proxy, store).put_file("data/large.tar", large_file)
    assert failure.value.transient
    assert keys_of(direct) == []
    assert list(direct.list_temporary()) == []


@pytest.mark.long
def test_an_interrupted_upload_keeps_the_old_object(
    faulty: Faulty, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store, direct = faulty
    direct.put("data/large.tar", b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(s3_storage.Bucket, "complete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.put_file("data/large.tar", large_file)
    assert direct.get("data/large.tar") == b"old"
    assert list(direct.list_temporary()) == []


@pytest.mark.long
@pytest.mark.parametrize("which", ["uploads", "partNumber=1", "uploadId=[^&]* "])
def test_a_lost_acknowledgement_within_an_upload_is_ridden_out(
    faulty: Faulty, large_file: Path, which: str
) -> None:
    proxy, store, direct = faulty
    lost = proxy.inject("ack_lost", which)
    store.put_file("data/large.tar", large_file)
    assert len(lost.hits) == 1
    assert direct.get("data/large.tar") == large_file.read_bytes()


_UPLOAD = """
import sys
from pathlib import Path
from millijoule.workers.storage import s3 as s3_storage
from millijoule.workers.storage.open import open_store

s3_storage.PART_BYTES = int(sys.argv[3])
open_store(sys.argv[1]).put_file("data/large.tar", Path(sys.argv[2]))
"""


@pytest.mark.long
def test_kill_9_in_the_middle_of_an_upload_leaves_only_a_pending_upload(
    faulty: Faulty, large_file: Path
) -> None:
    proxy, _, direct = faulty
    hang = proxy.inject("hang", "PUT .*partNumber=2", times=float("inf"))
    env = {**os.environ, **proxy.endpoint.env()}
    command = [sys.executable, "-c", _UPLOAD, direct.url, str(large_file), str(PART_BYTES)]
    with subprocess.Popen(command, env=env) as upload:
        while not hang.hits and upload.poll() is None:
            time.sleep(0.02)
        upload.send_signal(signal.SIGKILL)
    assert upload.returncode == -signal.SIGKILL
    assert keys_of(direct) == []
    leftovers = list(direct.list_temporary())
    assert [left.key for left in leftovers] == ["data/large.tar"]
    direct.delete_temporary(leftovers)
    direct.delete_temporary(leftovers)
    assert list(direct.list_temporary()) == []


def test_wrong_credentials_and_buckets_are_explained(
    ceph: S3Endpoint, s3_env: Callable[[S3Endpoint], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = ceph.make_bucket()
    s3_env(ceph)
    with pytest.raises(StoreError, match=r"NoSuchBucket.*create the bucket"):
        open_store("s3://no-such-bucket").put("x", b"1")
    s3_env(replace(ceph, secret_key="wrong"))
    with pytest.raises(StoreError, match=r"SignatureDoesNotMatch.*credentials"):
        open_store(f"s3://{bucket}").put("x", b"1")
    s3_env(replace(ceph, access_key="unknown"))
    with pytest.raises(StoreError, match=r"InvalidAccessKeyId.*credentials"):
        open_store(f"s3://{bucket}").put("x", b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"):
        open_store(f"s3://{bucket}").put("x", b"1")


@pytest.mark.parametrize(("variable", "value"), [("AWS_REGION", "no where"), ("AWS_PROFILE", "nobody")])
def test_settings_that_the_client_refuses_are_looked_for_on_this_machine_and_not_at_the_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str
) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody is asked
    monkeypatch.setenv(variable, value)
    with pytest.raises(StoreError, match=rf"{value}.*settings of S3 on this machine.*{variable}") as failure:
        open_store("s3://bucket").get("x")
    assert not failure.value.transient


@pytest.mark.long
def test_a_server_that_is_not_there_is_a_transient_error_naming_the_endpoint(
    moto_s3: S3Endpoint, s3_env: Callable[[S3Endpoint], None]
) -> None:
    s3_env(moto_s3)
    store = open_store("s3://bucket", S3Settings("http://127.0.0.1:9", "us-east-1", repeat_for_s=0.5))
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:9.*AWS_ENDPOINT_URL") as failure:
        store.get("x")
    assert failure.value.transient
