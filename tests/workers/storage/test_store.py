"""One contract for every store."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_servers import S3Endpoint
from support.stores import PART_BYTES, RACERS, keys_of, race

from millijoule.workers.errors import AlreadyExistsError, InputError, NotFoundError, StoreError
from millijoule.workers.storage import s3 as s3_storage
from millijoule.workers.storage.local import LocalStore
from millijoule.workers.storage.open import open_store
from millijoule.workers.storage.protocol import Store, check_key
from millijoule.workers.storage.s3 import S3Settings

STRANGE_KEYS = ["ünïcødé/画像 🖼.json", "a b/c+d&e=f%41?#'\".json", "-/~", "q/<x>;:@,!$()*[]{}|\\^`"]


# --- reading and writing


@pytest.mark.long
def test_what_is_put_can_be_read_listed_and_deleted(any_store: Store) -> None:
    before_ns = time.time_ns() - 3_000_000_000
    any_store.put("data/x.bin", b"old")
    any_store.put("data/x.bin", b"longer than before")
    any_store.put("data/empty", b"")
    assert any_store.get("data/x.bin") == b"longer than before"
    assert any_store.get("data/empty") == b""
    assert any_store.size("data/x.bin") == 18
    assert any_store.exists("data/x.bin")
    found = {o.key: o for o in any_store.list()}
    assert {key: o.size_bytes for key, o in found.items()} == {"data/x.bin": 18, "data/empty": 0}
    assert all(before_ns < o.mtime_ns < time.time_ns() + 3_000_000_000 for o in found.values())
    any_store.delete(iter(["data/x.bin", "data/never-was", "never/was"]))
    assert keys_of(any_store) == ["data/empty"]
    any_store.delete([])


def test_a_missing_object_is_not_found(any_store: Store) -> None:
    any_store.put("there/x", b"1")
    for key in ("absent", "there/absent", "there"):
        assert not any_store.exists(key)
        for read in (any_store.get, any_store.size, any_store.open_input):
            with pytest.raises(NotFoundError, match=key):
                read(key)


def test_strange_but_valid_keys_survive(any_store: Store) -> None:
    for key in STRANGE_KEYS:
        any_store.put(key, key.encode())
    assert keys_of(any_store) == sorted(STRANGE_KEYS)
    for key in STRANGE_KEYS:
        assert any_store.get(key) == key.encode()
    any_store.delete(STRANGE_KEYS)
    assert keys_of(any_store) == []


@pytest.mark.long
def test_a_listing_is_complete_and_fresh_beyond_one_page(
    store: Store, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = request.node.callspec.params["store"] == "ceph"
    if not real:
        monkeypatch.setattr(s3_storage, "DELETE_BATCH", 100)
    count = 1100 if real else 230  # Ceph's pages are of 1000, like Amazon's; the mock's are set to 100
    keys = [f"commits/{i % 7:02}/{i:06}.json" for i in range(count)]
    with ThreadPoolExecutor(RACERS) as pool:
        list(pool.map(lambda key: store.put(key, b"{}"), keys))
    assert keys_of(store) == sorted(keys)
    assert keys_of(store, "commits/03/") == sorted(k for k in keys if k.startswith("commits/03/"))
    assert keys_of(store, "commits/03/0000") == sorted(k for k in keys if k.startswith("commits/03/0000"))
    assert keys_of(store, "commits/9") == []
    store.put("commits/99/late", b"")
    assert keys_of(store, "commits/9") == ["commits/99/late"]
    store.delete(keys)
    assert keys_of(store) == ["commits/99/late"]


@pytest.mark.long
def test_a_prefix_does_not_see_its_neighbours(store: Store) -> None:
    inner = open_store(f"{store.url}/job")
    neighbour = open_store(f"{store.url}/job2")
    inner.put("a", b"1")
    neighbour.put("b", b"2")
    assert keys_of(inner) == ["a"]
    assert keys_of(store) == ["job/a", "job2/b"]


@pytest.mark.long
@pytest.mark.parametrize("size_bytes", [0, 1000, PART_BYTES, 2 * PART_BYTES + 12345])
def test_a_file_arrives_whole(any_store: Store, tmp_path: Path, size_bytes: int) -> None:
    source = tmp_path / "source.tar"
    source.write_bytes(os.urandom(size_bytes))
    arrived: list[int] = []
    any_store.put_file("data/x.tar", source, lambda: arrived.append(1))
    assert len(arrived) == (1 if isinstance(any_store, LocalStore) else max(1, -(-size_bytes // PART_BYTES)))
    assert any_store.size("data/x.tar") == size_bytes
    assert any_store.get("data/x.tar") == source.read_bytes()
    assert list(any_store.list_temporary()) == []
    source.unlink()
    assert any_store.size("data/x.tar") == size_bytes


def test_large_bytes_arrive_whole(store: Store) -> None:
    data = os.urandom(PART_BYTES + 1)
    store.put("x", data)
    assert store.get("x") == data


def test_a_missing_source_file_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone\.tar|data/x\.tar"):
        store.put_file("data/x.tar", tmp_path / "gone.tar")
    assert keys_of(store) == []


@pytest.mark.long
def test_parquet_is_read_by_ranges(any_store: Store, tmp_path: Path) -> None:
    table = pa.table({"id": range(300_000), "text": [f"prompt {i}" for i in range(300_000)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=10_000)
    any_store.put_file("t.parquet", tmp_path / "t.parquet")
    with any_store.open_input("t.parquet") as file:
        parquet = pq.ParquetFile(file)
        assert parquet.num_row_groups == 30
        assert parquet.read_row_group(17, ["text"])["text"][5].as_py() == "prompt 170005"
        assert parquet.read().equals(table)


def test_an_input_file_seeks_and_ends_like_a_file(any_store: Store) -> None:
    data = os.urandom(3_000_000)
    any_store.put("x", data)
    with any_store.open_input("x") as file:
        assert file.read(10) == data[:10]
        file.seek(2_500_000)
        assert file.read(1_000_000) == data[2_500_000:]
        assert file.read(10) == b""
        file.seek(0)
        assert file.read() == data


@pytest.mark.long
def test_readers_never_see_a_mixture(store: Store) -> None:
    """Atomic visibility: whole old or whole new bytes, at any moment, with the size that belongs to them."""
    versions = [bytes([65 + i]) * (200_000 + i) for i in range(2)]
    store.put("x", versions[0])
    stop = threading.Event()

    def write() -> None:
        i = 0
        while not stop.is_set():
            store.put("x", versions[i % 2])
            i += 1

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            for _ in range(50):
                assert store.get("x") in versions
        finally:
            stop.set()
        writing.result()


# --- keys


@pytest.mark.parametrize(
    "key",
    [
        *("", "/etc/passwd", "a/../b", "..", "a//b", "a/", ".", "a/./b"),
        *("a\nb", "a\x00b", "a\x7f", "\ud800", "x" * 256, "y/" * 500 + "z"),
        *(".millijoule-tmp-1", "a?versionId=3"),
    ],
)
def test_an_unusable_key_is_refused_before_anything_happens(key: str, tmp_path: Path) -> None:
    s3 = open_store("s3://bucket", S3Settings("http://127.0.0.1:9"))
    for store in (LocalStore(tmp_path), s3):
        reading = [(use, key) for use in (store.get, store.exists, store.size, store.open_input)]
        writing = [(store.put, key, b""), (store.put_exclusive, key, b""), (store.delete, [key])]
        for use, *arguments in (*reading, *writing):
            with pytest.raises(ValueError, match="unusable storage key"):
                use(*arguments)
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=40))
def test_an_accepted_key_stays_inside_the_store(key: str) -> None:
    try:
        check_key(key)
    except ValueError:
        return
    assert os.path.normpath(f"/root/{key}") == f"/root/{key}"
    key.encode()


# --- the exclusive create


@pytest.mark.long
def test_the_second_writer_is_refused_and_the_first_bytes_stand(store: Store) -> None:
    store.put_exclusive("commits/1.json", b"first")
    with pytest.raises(AlreadyExistsError, match=r"commits/1\.json") as refusal:
        store.put_exclusive("commits/1.json", b"second")
    assert not refusal.value.transient
    assert store.get("commits/1.json") == b"first"


def test_creating_the_same_bytes_again_is_success(store: Store) -> None:
    store.put_exclusive("commits/1.json", b"mine")
    store.put_exclusive("commits/1.json", b"mine")
    assert store.get("commits/1.json") == b"mine"
    assert list(store.list_temporary()) == []


def test_after_a_delete_the_key_is_free_again(store: Store) -> None:
    store.put_exclusive("x", b"first")
    store.delete(["x"])
    store.put_exclusive("x", b"second")
    assert store.get("x") == b"second"


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    context = get_context("forkserver")
    # Imports these once, not eight times.
    context.set_forkserver_preload(["pytest", "hypothesis", "pyarrow.parquet", s3_storage.__name__])
    with ProcessPoolExecutor(RACERS, mp_context=context) as pool:
        yield pool


@pytest.mark.long
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_of_eight_racing_writers_exactly_one_wins(
    store: Store, request: pytest.FixtureRequest, kind: str
) -> None:
    keys = [f"race/{i:02}" for i in range(12)]
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with ThreadPoolExecutor(RACERS) as threads:
        pool = threads if kind == "threads" else request.getfixturevalue("processes")
        # Processes import for a while on first use: that must not spread the start.
        list(pool.map(time.sleep, [0.3] * RACERS))
        start_at = time.time() + 0.5
        racing = [pool.submit(race, store, env, racer, keys, start_at) for racer in range(RACERS)]
        won = [race.result() for race in racing]
    assert sorted(key for keys_won in won for key in keys_won) == keys  # each exactly once
    for racer, keys_won in enumerate(won):
        for key in keys_won:
            assert store.get(key) == f"{key} by {racer}".encode()
    assert list(store.list_temporary()) == []


def test_the_probe_tells_who_really_refuses(store: Store) -> None:
    assert store.probe_exclusive_create()
    assert keys_of(store) == []


@pytest.mark.long
def test_the_probe_unmasks_a_server_that_silently_overwrites(
    rclone_s3: S3Endpoint, s3_env: Callable[[S3Endpoint], None]
) -> None:
    s3_env(rclone_s3)
    store = open_store(f"s3://{rclone_s3.make_bucket()}/out")
    assert not store.probe_exclusive_create()
    assert keys_of(store) == []


# --- the same store elsewhere


@pytest.mark.long
def test_a_used_store_can_be_pickled_and_shared_by_threads(store: Store) -> None:
    store.put("x", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.get("x") == b"1"
    assert copy.url == store.url
    with ThreadPoolExecutor(RACERS) as pool:
        assert list(pool.map(copy.get, ["x"] * 40)) == [b"1"] * 40


def test_credentials_do_not_travel_with_a_store(
    moto_s3: S3Endpoint, s3_env: Callable[[S3Endpoint], None]
) -> None:
    s3_env(replace(moto_s3, secret_key="very-secret"))
    store = open_store("s3://bucket")
    store.exists("x")
    assert b"very-secret" not in pickle.dumps(store)
    assert "very-secret" not in repr(store)


def test_settings_come_from_the_usual_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert S3Settings.from_environment() == S3Settings(None, None)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert S3Settings.from_environment() == S3Settings(None, "eu-west-1")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert S3Settings.from_environment() == S3Settings("http://127.0.0.1:1", "eu-north-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:2")
    assert S3Settings.from_environment().endpoint_url == "http://127.0.0.1:2"


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_that_is_no_address_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By whoever opens a store, before anything is asked of it."""
    for good in ("http://minio:9000", "https://s3.example.org/gateway", "http://[::1]:9000"):
        monkeypatch.setenv(name, good)
        assert S3Settings.from_environment().endpoint_url == good
    for wrong in ("localhost:9000", "minio", "ftp://minio:9000", "http://", "http://my_minio:9000"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(
            InputError, match=rf"environment variable {name} is '{wrong}': an address such as http://"
        ):
            open_store("s3://bucket/out")
    monkeypatch.setenv(name, "http://key:very-secret@my_minio:9000")
    with pytest.raises(InputError) as refused:
        open_store("s3://bucket/out")
    assert "very-secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [("s3://b", "s3://b"), ("s3://b/", "s3://b"), ("s3://b/p/q/", "s3://b/p/q"), ("s3a://b/p", "s3://b/p")],
)
def test_an_s3_url_is_normalised(url: str, expected: str) -> None:
    assert open_store(url).url == expected


def test_a_local_url_is_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("out", "./out/", f"{tmp_path}/x/../out", f"file://{tmp_path}/out"):
        assert open_store(url).url == str(tmp_path / "out")


@pytest.mark.parametrize("url", ["", "gs://bucket/x", "https://host/x", "s3://", "s3:///x", "file://host/x"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InputError):
        open_store(url)
