"""A folder: the faults it must survive, and what a person is told when it cannot."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.stores import RACERS, keys_of, race

from millijoule.workers.errors import StoreError
from millijoule.workers.storage import local
from millijoule.workers.storage.local import LocalStore
from millijoule.workers.storage.protocol import TemporaryObject


def test_twenty_thousand_commits_are_listed_in_a_moment() -> None:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # quicker to fill, the same to list
    with tempfile.TemporaryDirectory(dir=memory) as root:
        for i in range(100):
            folder = f"{root}/commits/{i:02}"
            os.makedirs(folder)
            for j in range(200):
                os.close(os.open(f"{folder}/{j:06}.json", os.O_CREAT | os.O_WRONLY))
        start = time.process_time()  # not the wall clock: others may share this machine
        assert sum(1 for _ in LocalStore(Path(root)).list("commits/")) == 20_000
        assert time.process_time() - start < 0.8


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
        racing = [pool.submit(race, store, {}, i, ["a", "b", "c"], 0.0) for i in range(RACERS)]
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
    assert keys_of(store) == expected
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
    assert keys_of(store) == []
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
