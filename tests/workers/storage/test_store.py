"""One contract for every store, the faults each must survive, and what a person is told when it cannot."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
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
from s3_servers import FaultProxy, S3Endpoint

from millijoule.workers.errors import AlreadyExistsError, InputError, NotFoundError, StoreError
from millijoule.workers.storage import local, s3_failures
from millijoule.workers.storage import s3 as s3_storage
from millijoule.workers.storage.inputs import expand_inputs, open_input_file
from millijoule.workers.storage.local import LocalStore
from millijoule.workers.storage.open import open_store
from millijoule.workers.storage.protocol import Store, TemporaryObject, check_key
from millijoule.workers.storage.s3 import S3Settings

RACERS = 8
PART_BYTES = 5 << 20  # the least S3 allows; several parts then stay quick
STRANGE_KEYS = ["ünïcødé/画像 🖼.json", "a b/c+d&e=f%41?#'\".json", "-/~", "q/<x>;:@,!$()*[]{}|\\^`"]


@pytest.fixture(params=["local", "moto", "ceph"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store of every kind that the commit protocol may run on."""
    return _open_empty(request, request.param)


@pytest.fixture(params=["local", "moto", "ceph", "rclone"])
def any_store(request: pytest.FixtureRequest) -> Store:
    """`store`, and the S3 server without conditional writes, which must still do everything else."""
    return _open_empty(request, request.param)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_storage, "PART_BYTES", PART_BYTES)


def _open_empty(request: pytest.FixtureRequest, kind: str) -> Store:
    if kind == "local":
        return open_store(str(request.getfixturevalue("tmp_path") / "out"))
    endpoint = request.getfixturevalue({"moto": "moto_s3", "rclone": "rclone_s3"}.get(kind, kind))
    request.getfixturevalue("s3_env")(endpoint)
    return open_store(f"s3://{endpoint.make_bucket()}/some/prefix/")


def _keys(store: Store, prefix: str = "") -> list[str]:
    return sorted(found.key for found in store.list(prefix))


# --- reading and writing


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
    assert _keys(any_store) == ["data/empty"]
    any_store.delete([])


def test_a_missing_object_is_not_found(any_store: Store) -> None:
    any_store.put("there/x", b"1")
    for key in ("absent", "there/absent", "there"):
        assert not any_store.exists(key)
        with pytest.raises(NotFoundError, match=key):
            any_store.get(key)
        with pytest.raises(NotFoundError, match=key):
            any_store.size(key)
        with pytest.raises(NotFoundError, match=key):
            any_store.open_input(key)


def test_strange_but_valid_keys_survive(any_store: Store) -> None:
    for key in STRANGE_KEYS:
        any_store.put(key, key.encode())
    assert _keys(any_store) == sorted(STRANGE_KEYS)
    for key in STRANGE_KEYS:
        assert any_store.get(key) == key.encode()
    any_store.delete(STRANGE_KEYS)
    assert _keys(any_store) == []


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
    assert _keys(store) == sorted(keys)
    assert _keys(store, "commits/03/") == sorted(k for k in keys if k.startswith("commits/03/"))
    assert _keys(store, "commits/03/0000") == sorted(k for k in keys if k.startswith("commits/03/0000"))
    assert _keys(store, "commits/9") == []
    store.put("commits/99/late", b"")
    assert _keys(store, "commits/9") == ["commits/99/late"]
    store.delete(keys)
    assert _keys(store) == ["commits/99/late"]


def test_a_prefix_does_not_see_its_neighbours(store: Store) -> None:
    inner = open_store(f"{store.url}/job")
    neighbour = open_store(f"{store.url}/job2")
    inner.put("a", b"1")
    neighbour.put("b", b"2")
    assert _keys(inner) == ["a"]
    assert _keys(store) == ["job/a", "job2/b"]


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
    assert _keys(store) == []


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
        for use in (store.get, store.exists, store.size, store.open_input):
            with pytest.raises(ValueError, match="unusable storage key"):
                use(key)
        with pytest.raises(ValueError, match="unusable storage key"):
            store.put(key, b"")
        with pytest.raises(ValueError, match="unusable storage key"):
            store.put_exclusive(key, b"")
        with pytest.raises(ValueError, match="unusable storage key"):
            store.delete([key])
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


def _race(store: Store, env: dict[str, str], racer: int, keys: list[str], start_at: float) -> list[str]:
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


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    context = get_context("forkserver")
    # Imports these once, not eight times.
    context.set_forkserver_preload(["pytest", "hypothesis", "pyarrow.parquet", s3_storage.__name__])
    with ProcessPoolExecutor(RACERS, mp_context=context) as pool:
        yield pool


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
        racing = [pool.submit(_race, store, env, racer, keys, start_at) for racer in range(RACERS)]
        won = [race.result() for race in racing]
    assert sorted(key for keys_won in won for key in keys_won) == keys  # each exactly once
    for racer, keys_won in enumerate(won):
        for key in keys_won:
            assert store.get(key) == f"{key} by {racer}".encode()
    assert list(store.list_temporary()) == []


def test_the_probe_tells_who_really_refuses(store: Store) -> None:
    assert store.probe_exclusive_create()
    assert _keys(store) == []


def test_the_probe_unmasks_a_server_that_silently_overwrites(
    rclone_s3: S3Endpoint, s3_env: Callable[[S3Endpoint], None]
) -> None:
    s3_env(rclone_s3)
    store = open_store(f"s3://{rclone_s3.make_bucket()}/out")
    assert not store.probe_exclusive_create()
    assert _keys(store) == []


# --- the same store elsewhere


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


# --- local trouble


def test_a_hundred_thousand_commits_are_listed_in_two_seconds() -> None:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # quicker to fill, the same to list
    with tempfile.TemporaryDirectory(dir=memory) as root:
        for i in range(100):
            folder = f"{root}/commits/{i:02}"
            os.makedirs(folder)
            for j in range(1000):
                os.close(os.open(f"{folder}/{j:06}.json", os.O_CREAT | os.O_WRONLY))
        start = time.process_time()  # not the wall clock: others may share this machine
        assert sum(1 for _ in LocalStore(Path(root)).list("commits/")) == 100_000
        assert time.process_time() - start < 2.0


@pytest.mark.parametrize("supported", ["renameat2", "nothing"])
def test_without_hard_links_one_writer_still_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: str
) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    if supported == "nothing":
        monkeypatch.setattr(local, "rename_exclusively", lambda *_: False)
    store = LocalStore(tmp_path)
    with ThreadPoolExecutor(RACERS) as pool:
        racing = [pool.submit(_race, store, {}, i, ["a", "b", "c"], 0.0) for i in range(RACERS)]
        won = [key for race in racing for key in race.result()]
    assert sorted(won) == ["a", "b", "c"]
    store.put_exclusive("d", b"1")
    store.put_exclusive("d", b"1")
    source = tmp_path / "source"
    source.write_bytes(b"from a file")
    store.put_file("e", source)
    assert store.get("e") == b"from a file"
    assert list(store.list_temporary()) == []


@pytest.mark.parametrize("size_bytes", [0, 999, 1000, 2500])
def test_a_file_from_another_disk_is_copied_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(local, "COPY_PART_BYTES", 1000)
    store = LocalStore(tmp_path / "out")
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size_bytes))
    there: list[int] = []

    def on_part() -> None:
        files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
        there.append(files[0].stat().st_size)

    store.put_file("data/x", source, on_part)
    assert there == [*range(1000, size_bytes, 1000), *([size_bytes] if size_bytes else []), size_bytes]
    assert store.get("data/x") == source.read_bytes()
    assert list(store.list_temporary()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _assert_nothing_new(store: LocalStore, expected: list[str]) -> None:
    assert _keys(store) == expected
    assert list(store.list_temporary()) == []


def test_a_full_disk_is_said_and_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    store = LocalStore(small_disk)
    store.put("kept", b"k" * 100_000)
    big = b"x" * 2_000_000
    (tmp_path / "big").write_bytes(big)
    for write in (
        lambda: store.put("kept", big),
        lambda: store.put_exclusive("new", big),
        lambda: store.put_file("new", tmp_path / "big"),
    ):
        with pytest.raises(StoreError, match="disk full") as failure:
            write()
        assert not failure.value.transient
        _assert_nothing_new(store, ["kept"])
    assert store.get("kept") == b"k" * 100_000


def test_a_file_size_limit_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(StoreError, match="ulimit -f"):
            store.put_exclusive("new", b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _assert_nothing_new(store, [])


@pytest.mark.parametrize(
    ("code", "says", "transient"),
    [
        (errno.EDQUOT, "quota", False),
        (errno.EROFS, "read-only", False),
        (errno.EACCES, "permissions", False),
        (errno.EIO, "I/O error", False),
        (errno.ESTALE, "NFS", True),
    ],
)
def test_an_error_of_the_disk_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str, transient: bool
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    store = LocalStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError, match=f"a/x.*{says}") as failure:
            store.put_exclusive("a/x", b"1")
        assert failure.value.transient == transient
    _assert_nothing_new(store, [])


def test_a_file_in_the_place_of_a_folder_is_explained(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"1")
    for write in (store.put, store.put_exclusive):
        with pytest.raises(StoreError, match="folder"):
            write("a/b", b"2")
    store.put("c/d", b"1")
    with pytest.raises(StoreError, match="folder"):
        store.put("c", b"2")
    _assert_nothing_new(store, ["a", "c/d"])


_STOP_BEFORE_RENAME = """
import os, sys, time
from pathlib import Path
from millijoule.workers.storage.local import LocalStore

def stop_here(*_):
    print("stopped", flush=True)
    time.sleep(60)

os.replace = stop_here
LocalStore(Path(sys.argv[1])).put_file("data/x.tar", Path(sys.argv[2]))
"""


def test_kill_9_in_the_middle_of_a_local_write_leaves_only_a_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 1_000_000)
    store = LocalStore(tmp_path / "out")
    command = [sys.executable, "-c", _STOP_BEFORE_RENAME, str(store.root), str(tmp_path / "source")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"stopped\n"
        writer.send_signal(signal.SIGKILL)
    assert _keys(store) == []
    assert not store.exists("data/x.tar")
    leftovers = list(store.list_temporary())
    assert len(leftovers) == 1
    assert time.time_ns() - leftovers[0].mtime_ns < 60_000_000_000
    store.delete_temporary(leftovers)
    store.delete_temporary(leftovers)
    assert list(store.list_temporary()) == []


def test_only_temporary_files_are_deleted_as_such(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("data/x", b"1")
    with pytest.raises(ValueError, match="not a temporary file"):
        store.delete_temporary([TemporaryObject("data/x", 0)])
    assert store.exists("data/x")


# --- S3 trouble


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


def test_a_lost_acknowledgement_of_our_own_create_is_success(faulty: Faulty) -> None:
    proxy, store, direct = faulty
    lost = proxy.inject("ack_lost", "PUT .*/commits/1")
    store.put_exclusive("commits/1", b"mine")
    assert len(lost.hits) == 1
    assert sum("PUT" in line for line in proxy.requests) == 2  # the second met our own first
    assert direct.get("commits/1") == b"mine"


def test_a_lost_acknowledgement_does_not_make_a_foreign_commit_ours(faulty: Faulty) -> None:
    proxy, store, direct = faulty
    direct.put_exclusive("commits/1", b"theirs")
    proxy.inject("ack_lost", "PUT .*/commits/1", times=2)
    with pytest.raises(AlreadyExistsError):
        store.put_exclusive("commits/1", b"mine")
    assert direct.get("commits/1") == b"theirs"


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
    assert _keys(store) == ["x"]
    proxy.inject("reset" if mode == "truncate" else mode, "HEAD ", times=2)
    assert store.exists("x")
    proxy.inject(mode, "POST .*delete", times=1)
    store.delete(["x"])
    assert _keys(direct) == []


def test_a_server_that_stays_overloaded_is_a_transient_error_in_bounded_time(faulty: Faulty) -> None:
    proxy, store, direct = faulty
    proxy.inject("status", "PUT ", times=float("inf"))
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"503 SlowDown.*try again later") as failure:
        _impatient(proxy, store).put_exclusive("commits/1", b"mine")
    assert 0.3 < time.monotonic() - start < 10.0
    assert failure.value.transient
    assert not isinstance(failure.value, AlreadyExistsError)
    assert _keys(direct) == []


def test_after_the_last_time_out_the_object_itself_decides(faulty: Faulty) -> None:
    proxy, store, _ = faulty
    proxy.inject("ack_lost", "PUT ", times=1)
    proxy.inject("reset", "PUT ", times=float("inf"))
    _impatient(proxy, store).put_exclusive("commits/1", b"mine")
    assert store.get("commits/1") == b"mine"


def test_missing_permission_is_said_at_once(faulty: Faulty) -> None:
    proxy, store, _ = faulty
    proxy.inject("status", "PUT |GET ", times=float("inf"), status=403, code="AccessDenied")
    start = time.monotonic()
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
    assert time.monotonic() - start < 3.0


def test_a_server_without_conditional_writes_fails_the_probe(faulty: Faulty) -> None:
    proxy, store, direct = faulty
    fault = proxy.inject("status", "PUT ", times=float("inf"), status=501, code="NotImplemented")
    assert not store.probe_exclusive_create()
    with pytest.raises(StoreError, match=r"501 NotImplemented.*does not support"):
        store.put_exclusive("x", b"1")
    assert len(fault.hits) == 2  # not retried
    assert _keys(direct) == []


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


@pytest.mark.parametrize("mode", ["reset", "cut", "status"])
def test_a_failed_upload_leaves_nothing(faulty: Faulty, large_file: Path, mode: str) -> None:
    proxy, store, direct = faulty
    proxy.inject(mode, "PUT .*partNumber=2", times=float("inf"))
    with pytest.raises(StoreError, match=r"large\.tar") as failure:
        _impatient(proxy, store).put_file("data/large.tar", large_file)
    assert failure.value.transient
    assert _keys(direct) == []
    assert list(direct.list_temporary()) == []


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
    assert _keys(direct) == []
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


def test_a_server_that_is_not_there_is_a_transient_error_naming_the_endpoint(
    moto_s3: S3Endpoint, s3_env: Callable[[S3Endpoint], None]
) -> None:
    s3_env(moto_s3)
    store = open_store("s3://bucket", S3Settings("http://127.0.0.1:9", "us-east-1", repeat_for_s=0.5))
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:9.*AWS_ENDPOINT_URL") as failure:
        store.get("x")
    assert failure.value.transient


# --- prompt files


@pytest.fixture(params=["local", "moto", "ceph"])
def prompts(request: pytest.FixtureRequest) -> str:
    """A place with prompt files: its URL."""
    store = _open_empty(request, request.param)
    for key in ("b.csv", "a.csv", "notes.txt", "deep/er/c.csv", "deep/d.csv", "odd[1].csv", "ü 2.csv"):
        store.put(key, key.encode())
    return store.url


def _expand(base: str, *patterns: str) -> list[str]:
    return [f.url.removeprefix(f"{base}/") for f in expand_inputs(f"{base}/{p}" for p in patterns)]


def test_patterns_expand_to_sorted_distinct_files(prompts: str) -> None:
    assert _expand(prompts, "b.csv") == ["b.csv"]
    assert _expand(prompts, "b.csv", "a.csv", "?.csv", "b.csv") == ["a.csv", "b.csv"]
    assert _expand(prompts, "*.csv") == ["a.csv", "b.csv", "odd[1].csv", "ü 2.csv"]
    assert _expand(prompts, "[ab].csv") == ["a.csv", "b.csv"]
    assert _expand(prompts, "deep/*") == ["deep/d.csv"]
    assert _expand(prompts, "deep/**/*.csv") == ["deep/d.csv", "deep/er/c.csv"]
    assert _expand(prompts, "odd[1].csv") == ["odd[1].csv"]


def test_an_input_knows_its_size_and_on_s3_its_etag(prompts: str) -> None:
    (file,) = expand_inputs([f"{prompts}/deep/d.csv"])
    assert file.size_bytes == len("deep/d.csv")
    assert (file.etag is None) == (not prompts.startswith("s3://"))
    assert file == expand_inputs([f"{prompts}/deep/d.*"])[0]
    with open_input_file(file.url) as opened:
        assert opened.read() == b"deep/d.csv"


def test_a_pattern_without_a_match_is_named(prompts: str) -> None:
    for pattern in ("missing.csv", "*.parquet", "missing/*.csv"):
        with pytest.raises(InputError, match="no prompt file matches") as error:
            expand_inputs([f"{prompts}/a.csv", f"{prompts}/{pattern}"])
        assert pattern in str(error.value)


def _fill(url: str, files: dict[str, bytes]) -> None:
    """Put files whose names a store of ours would refuse, too."""
    if url.startswith("s3://"):
        store = open_store(url)
        for name, data in files.items():
            store.put(name, data)
        return
    for name, data in files.items():
        path = Path(url, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_a_folder_stands_for_its_data_files(prompts: str) -> None:
    """As Spark leaves them: markers, checksums, empty parts and what an unfinished job wrote."""
    names = ["part-00000-a.snappy.parquet", "part-00001-a.snappy.parquet", "more/part-00002.parquet"]
    markers = [
        "_SUCCESS",
        ".part-00000-a.snappy.parquet.crc",
        "_temporary/0/part-9.parquet",
        "x.crc",
        "_metadata",
    ]
    files = {f"spark/{name}": b"x" for name in (*names, *markers)}
    _fill(prompts, files | {"spark/part-00003.parquet": b"", "spark/_started": b""})
    found = [f"spark/{name}" for name in sorted(names)]
    assert _expand(prompts, "spark") == _expand(prompts, "spark/") == found
    assert _expand(prompts, "spark/**/*.parquet") == sorted([*found, "spark/part-00003.parquet"])
    assert _expand(prompts, "spark/*") == sorted([*found[1:], "spark/part-00003.parquet"])
    assert _expand(prompts, "spark/_temp*/0/*") == ["spark/_temporary/0/part-9.parquet"]
    assert _expand(prompts, "deep") == ["deep/d.csv", "deep/er/c.csv"]


def test_an_output_among_the_prompts_is_no_prompt(prompts: str) -> None:
    output = ["_job/job.json", "manifest.parquet", "preview.png", "data/x.parquet"]
    _fill(prompts, {f"mine/{name}": b"x" for name in ("p.csv", "outer.csv", *(f"out/{n}" for n in output))})
    assert _expand(prompts, "mine") == ["mine/outer.csv", "mine/p.csv"]


def test_folders_of_partitions_add_columns(prompts: str) -> None:
    names = ["lang=de/style=a%2Fb/p.csv", "lang=__HIVE_DEFAULT_PARTITION__/style=c/p.csv", "_x=1/p.csv"]
    _fill(prompts, {f"hive/{name}": b"x" for name in (*names, "lang=de/_SUCCESS")})

    def columns(pattern: str) -> list[dict[str, str | None]]:
        return [dict(f.columns) for f in expand_inputs([f"{prompts}/{pattern}"])]

    assert columns("hive") == [{"_x": "1"}, {"lang": None, "style": "c"}, {"lang": "de", "style": "a/b"}]
    assert columns("hive/lang=de") == [{"style": "a/b"}]
    assert columns("hive/lang=*/*/*.csv") == columns("hive")[1:]
    assert columns("hive/lang=de/style=a%2Fb/p.csv") == [{}]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["a.csv", "b.jsonl"],
            r"several formats \(csv: a\.csv; jsonl: b\.jsonl\).*example '.*/odd-folder/\*\.csv'",
        ),
        (["a.csv", "README.md"], r"unknown format besides prompt files: README\.md; .*odd-folder/\*\.csv'"),
        (["in/a.csv", "x.png"], r"unknown format .*x\.png; .*odd-folder/\*\*/\*\.csv'"),
        (["x.png", "y.docx"], r"without prompt files \(.*\*\.parquet.*\); it has x\.png, y\.docx"),
        (["_SUCCESS"], r"without prompt files; it has _SUCCESS, which hold no rows"),
        (["_delta_log/0.json", "a.parquet"], "Delta table"),
        ([f"{i}.png" for i in range(9)], r"3\.png, 4\.png and 4 more"),
    ],
)
def test_a_folder_of_something_else_is_refused_by_name(prompts: str, files: list[str], message: str) -> None:
    _fill(prompts, {f"odd-folder/{name}": b"x" for name in files})
    with pytest.raises(InputError, match=message):
        expand_inputs([f"{prompts}/odd-folder"])


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder without prompt files"):
        expand_inputs([str(tmp_path)])


def test_a_missing_prompt_file_is_not_found(prompts: str) -> None:
    with pytest.raises(NotFoundError):
        open_input_file(f"{prompts}/missing.csv")


def test_a_glob_of_another_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="gs: URLs"):
        expand_inputs(["gs://bucket/*.csv"])
