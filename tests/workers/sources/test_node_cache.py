"""One fetch per node, whoever asks and whoever dies; what is in the cache is what its hash says."""

import errno
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from millijoule.workers.errors import NodeError
from millijoule.workers.sources import node_cache
from millijoule.workers.sources.node_cache import WantedFile, cache_folder, fetch_once
from millijoule.workers.storage.local import LocalStore

CONTENT = {"a.json": b"{}", "unet/w.safetensors": os.urandom(300_000)}


class CountingStore(LocalStore):
    """Keeps which keys were opened, in a file: over all processes. May be slow, or die."""

    def __init__(self, root: Path, log: Path, seconds: float = 0.0, die_after: int | None = None) -> None:
        super().__init__(root)
        self.log, self.seconds, self.die_after = log, seconds, die_after

    def open_input(self, key):
        with self.log.open("a") as log:
            log.write(f"{key}\n")
        time.sleep(self.seconds)
        if self.die_after is not None and len(self.log.read_text().splitlines()) > self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open_input(key)

    def opened(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(node_cache, "PART_BYTES", 100_000)
    monkeypatch.setattr(node_cache, "PARTS_AT_ONCE", 1)
    for name, data in CONTENT.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(data)
    return CountingStore(tmp_path / "source", tmp_path / "opened")


def wanted():
    return [WantedFile(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in CONTENT.items()]


def content(folder):
    return {n: (folder / n).read_bytes() for n in CONTENT}


def test_what_is_fetched_once_is_not_fetched_again(source, tmp_path):
    folder = fetch_once(tmp_path / "cache", "entry", wanted(), source)
    assert content(folder) == CONTENT
    assert source.opened() == ["a.json", *["unet/w.safetensors"] * 3]  # three parts
    assert fetch_once(tmp_path / "cache", "entry", wanted(), source) == folder
    assert len(source.opened()) == 4
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["entry", "entry.lock"]


def test_many_processes_fetch_once(source, tmp_path):
    source.seconds = 0.1
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=fetch_once, args=(tmp_path / "cache", "entry", wanted(), source))
        for _ in range(6)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 6
    assert len(source.opened()) == 4
    assert content(tmp_path / "cache/entry") == CONTENT


def test_a_dead_holder_is_followed_and_its_parts_are_kept(source, tmp_path):
    source.die_after = 3  # in the last part of the large file
    dying = multiprocessing.get_context("fork").Process(
        target=fetch_once, args=(tmp_path / "cache", "entry", wanted(), source)
    )
    dying.start()
    dying.join()
    assert dying.exitcode == -signal.SIGKILL
    assert (tmp_path / "cache/entry.partial/a.json").exists()
    source.die_after = None
    before = len(source.opened())
    assert content(fetch_once(tmp_path / "cache", "entry", wanted(), source)) == CONTENT
    assert before + 1 <= len(source.opened()) <= before + 4
    assert source.opened()[before] != "a.json"  # was whole


def test_one_that_waits_finds_what_the_other_fetched(source, tmp_path):
    source.seconds = 0.05
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(fetch_once(tmp_path / "cache", "entry", wanted(), source))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "cache/entry"] * 3
    assert len(source.opened()) == 4


@pytest.mark.parametrize(
    "damage", [lambda f: f.write_bytes(b"x" * 300_000), lambda f: f.unlink(), lambda f: os.truncate(f, 7)]
)
def test_a_damaged_file_alone_is_fetched_again(source, tmp_path, damage):
    folder = fetch_once(tmp_path / "cache", "entry", wanted(), source)
    before = len(source.opened())
    damage(folder / "unet/w.safetensors")
    assert content(fetch_once(tmp_path / "cache", "entry", wanted(), source)) == CONTENT
    assert source.opened()[before:] == ["unet/w.safetensors"] * 3


def test_content_that_is_not_what_was_planned_is_the_nodes_fault_and_is_not_kept(source, tmp_path):
    (tmp_path / "source/unet/w.safetensors").write_bytes(os.urandom(300_000))
    with pytest.raises(NodeError, match=r"w\.safetensors: is not what the job was planned with"):
        fetch_once(tmp_path / "cache", "entry", wanted(), source)
    assert not (tmp_path / "cache/entry").exists()
    (tmp_path / "source/unet/w.safetensors").write_bytes(CONTENT["unet/w.safetensors"])
    assert content(fetch_once(tmp_path / "cache", "entry", wanted(), source)) == CONTENT


def test_a_file_that_became_shorter_is_said(source, tmp_path):
    (tmp_path / "source/unet/w.safetensors").write_bytes(b"short")
    with pytest.raises(NodeError, match=r"w\.safetensors: ended after 5 of 300000 bytes"):
        fetch_once(tmp_path / "cache", "entry", wanted(), source)


def test_a_full_disk_is_the_nodes_fault_and_the_folder_is_named(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "cache/entry.partial/a.json"))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        NodeError, match=r"model cache .*cache/entry.*No space left.*300,002 bytes.*--model-cache"
    ):
        fetch_once(tmp_path / "cache", "entry", wanted(), source)


@pytest.mark.parametrize("name", ["../out.json", "/etc/passwd", "a/../../b"])
def test_names_that_leave_the_folder_are_refused(source, tmp_path, name):
    with pytest.raises(ValueError, match="unusable storage key"):
        fetch_once(tmp_path / "cache", "entry", [WantedFile(name, 1)], source)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MILLIJOULE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == Path("~/.cache/millijoule/models").expanduser()
    monkeypatch.setenv("MILLIJOULE_CACHE", str(tmp_path))
    assert cache_folder(None) == tmp_path
    assert cache_folder("/x") == Path("/x")
