"""A model file is read for its hash once per host, and whenever it may have changed; no damage to what is kept is believed."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from millijoule.workers.generators import file_hashes
from millijoule.workers.generators.file_hashes import FileHashes
from millijoule.workers.generators.registry import PACKAGED


@pytest.fixture
def readings(monkeypatch):
    """Every reading of a file for its hash from here on, and no file counts as changed just now."""
    read = []
    plain = hashlib.file_digest

    def count(file, name):
        read.append(file.name)
        return plain(file, name)

    monkeypatch.setattr(hashlib, "file_digest", count)
    monkeypatch.setattr(file_hashes, "RACY_NS", 0)
    return read


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"weights" * 1000)
    time.sleep(0.05)  # the kernel's clock of files is coarse
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shared"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_process_reads_a_file_once(model, folder, readings):
    hashes = FileHashes(folder)
    assert [hashes.sha256(model) for _ in range(3)] == [digest(model)] * 3
    assert readings == [str(model)]


def test_another_process_of_the_host_does_not_read_it_again(model, folder, readings):
    assert FileHashes(folder).sha256(model) == FileHashes(folder).sha256(model) == digest(model)
    assert len(readings) == 1


def test_a_link_is_its_target(model, folder, readings, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(model)
    assert FileHashes(folder).sha256(link) == FileHashes(folder).sha256(model) == digest(model)
    assert len(readings) == 1


def rewrite(path: Path) -> None:
    """Same size, same inode, and the modification time set back, as rsync and cp -p do."""
    before = path.stat()
    data = path.read_bytes()
    path.write_bytes(b"W" + data[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"W" + path.read_bytes()[1:])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [rewrite, replace, append])
def test_a_changed_file_is_read_anew(model, folder, readings, change):
    hashes = FileHashes(folder)
    old = hashes.sha256(model)
    change(model)
    assert hashes.sha256(model) == FileHashes(folder).sha256(model) == digest(model) != old
    assert len(readings) == 2


def test_a_file_that_changed_just_now_is_not_kept(tmp_path, folder):
    """Its times tick too slowly to show every change; whoever kept a hash here would be wrong in some round."""
    path, hashes = tmp_path / "model", FileHashes(folder)
    for i in range(100):
        path.write_bytes(b"%03d" % i)
        os.utime(path, ns=(0, 0))
        assert hashes.sha256(path) == digest(path)
    assert not list(folder.glob("*.json"))


def test_a_file_that_changes_while_it_is_read_is_not_kept(model, folder, readings, monkeypatch):
    counted = hashlib.file_digest

    def slow(file, name):
        found = counted(file, name)
        if len(readings) == 1:
            rewrite(model)
        return found

    monkeypatch.setattr(hashlib, "file_digest", slow)
    hashes = FileHashes(folder)
    hashes.sha256(model)
    assert hashes.sha256(model) == digest(model)
    assert len(readings) == 2


def entry(folder: Path) -> Path:
    (path,) = folder.glob("*.json")
    return path


def edit(file: Path, /, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def point_elsewhere(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    edit(other, sha256="0" * 64)
    path.unlink()
    path.symlink_to(other)


def be_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "empty": lambda p: p.write_bytes(b""),
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-20]),
    "not text": lambda p: p.write_bytes(b"\xff\xfe\x00" * 50),
    "not an object": lambda p: p.write_text("[1]"),
    "nested": lambda p: p.write_text("[" * 15_000),
    "too long": lambda p: p.write_bytes(p.read_bytes() + b" " * 20_000 + b"{"),
    "no hash": lambda p: edit(p, sha256=None),
    "short hash": lambda p: edit(p, sha256="0" * 63),
    "hash with a line end": lambda p: edit(p, sha256="0" * 64 + "\n"),
    "another field": lambda p: edit(p, more=1),
    "of another path": lambda p: edit(p, path="/elsewhere", sha256="0" * 64),
    "of another size": lambda p: edit(p, size=1, sha256="0" * 64),
    "a link": point_elsewhere,
    "a pipe": be_a_pipe,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_not_believed(model, folder, readings, damage):
    FileHashes(folder).sha256(model)
    damage(entry(folder))
    assert FileHashes(folder).sha256(model) == digest(model)
    assert len(readings) == 2
    assert FileHashes(folder).sha256(model) == digest(model)
    assert len(readings) == 2  # it has been mended


def test_only_its_owner_can_read_or_write_what_is_kept(model, folder, readings):
    FileHashes(folder).sha256(model)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def make_open(folder):
    folder.mkdir()
    folder.chmod(0o777)


def make_link(folder):
    target = folder.with_name("target")
    target.mkdir(mode=0o700)
    folder.symlink_to(target)


@pytest.mark.parametrize("make", [make_open, make_link, Path.touch])
def test_a_folder_that_others_may_have_made_is_not_used(model, folder, readings, make, caplog):
    make(folder)
    hashes = FileHashes(folder)
    assert [hashes.sha256(model) for _ in range(2)] == [digest(model)] * 2
    assert FileHashes(folder).sha256(model) == digest(model)
    assert len(readings) == 2
    assert str(folder) in caplog.text
    assert folder.is_file() or not list(folder.iterdir())


def work(folder, model, start, results):
    file_hashes.RACY_NS = 0
    count = 0
    plain = hashlib.file_digest

    def slow(file, name):
        nonlocal count
        count += 1
        time.sleep(0.5)  # so that all are there while the first one reads
        return plain(file, name)

    hashlib.file_digest = slow
    hashes = FileHashes(folder)
    start.wait()
    results.put((hashes.sha256(model), count))


def test_processes_that_start_together_read_a_file_once(model, folder):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=work, args=(folder, model, start, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert {sha256 for sha256, _ in found} == {digest(model)}
    assert sum(count for _, count in found) == 1


def test_who_waits_too_long_for_another_reads_alone(model, folder, readings, monkeypatch):
    import fcntl

    monkeypatch.setattr(file_hashes, "LOCK_TIMEOUT_S", 0.1)
    FileHashes(folder).sha256(model)
    lock = entry(folder).with_suffix(".lock")
    rewrite(model)
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert FileHashes(folder).sha256(model) == digest(model)


JOB = """
import hashlib, sys
from pathlib import Path
from millijoule.workers.generators import file_hashes
file_hashes.RACY_NS = 0
file_hashes.shared = file_hashes.FileHashes(Path(sys.argv[1]))
plain, read = hashlib.file_digest, []
hashlib.file_digest = lambda file, name: read.append(file.name) or plain(file, name)
from millijoule.workers.generators.registry import describe_model, load_generator
model, steps = sys.argv[2], sys.argv[3].split()
found = {load_generator(model).info.sha256 if s == "load" else describe_model(model).sha256 for s in steps}
print(len(read), len(set(read)), *found)
"""


@pytest.mark.long
@pytest.mark.parametrize("model", PACKAGED)
def test_a_job_reads_its_model_once_on_a_host(tmp_path, model):
    """The driver describes it twice, a worker, which is another process, loads and describes it."""
    pytest.importorskip("diffusers")

    def process(steps):
        command = [sys.executable, "-c", JOB, str(tmp_path / "shared"), model, steps]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    read, distinct, sha256 = process("describe describe")
    assert read == distinct != "0"
    assert process("load describe") == ["0", "0", sha256]
