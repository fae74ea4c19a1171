"""Scratch folders: of the living they stay, of the dead they go, whoever killed them."""

import multiprocessing
import os
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millijoule.workers import scratch
from millijoule.workers.errors import NodeError
from millijoule.workers.scratch import remove_abandoned, scratch_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch._remove_abandoned_once.cache_clear()
    return tmp_path


def _fill_and_wait(conn):
    with scratch_folder() as folder:
        (folder / "data").mkdir()
        (folder / "data" / "half.parquet").write_bytes(b"half")
        conn.send(folder)
        conn.recv()


@pytest.fixture
def other():
    """A process that is in its scratch folder, and the folder."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_fill_and_wait, args=(theirs,))
    process.start()
    theirs.close()
    yield process, ours.recv()
    process.kill()
    process.join()


def test_a_folder_goes_when_it_is_left(temporary):
    with scratch_folder() as folder:
        assert folder.parent == temporary
        (folder / "file").touch()
    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next(temporary, other):
    process, left = other
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (left / "data" / "half.parquet").exists()
    with scratch_folder() as folder:
        assert list(temporary.iterdir()) == [folder]


def test_the_folder_of_a_process_that_lives_or_stands_still_is_left_alone(other):
    process, held = other
    assert remove_abandoned(held.parent) == []
    os.kill(process.pid, signal.SIGSTOP)
    assert remove_abandoned(held.parent) == []
    assert (held / "data" / "half.parquet").exists()


def test_folders_of_other_hosts_and_other_things_are_left_alone(temporary, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    with scratch_folder() as folder:
        folder_of_another = temporary / f"{folder.name[:-8]}aaaaaaaa"
    folder_of_another.mkdir()
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (temporary / f"{scratch._prefix()}file").touch()
    (temporary / f"{scratch._prefix()}link").symlink_to(folder_of_another)
    (temporary / "millijoule-model").mkdir()
    assert remove_abandoned(temporary) == []
    assert len(list(temporary.iterdir())) == 4


def test_a_folder_removed_before_it_was_held_is_made_again(temporary, monkeypatch):
    hold, times = scratch._hold, []

    def removed_once(path):
        times.append(path)
        if len(times) == 1:
            assert remove_abandoned(temporary) == [path]
        return hold(path)

    monkeypatch.setattr(scratch, "_hold", removed_once)
    with scratch_folder() as folder:
        assert folder == times[1]
        assert folder.is_dir()


def test_where_folders_cannot_be_locked_they_are_used_and_nobody_removes_them(temporary, monkeypatch):
    def no_locks(file, operation):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with scratch_folder() as folder:
        assert remove_abandoned(temporary) == []
        assert folder.is_dir()
    assert list(temporary.iterdir()) == []


def test_a_disk_that_is_full_is_the_nodes_fault_whoever_writes(temporary):
    """Arrow's own error, of a real full device: it names no file."""
    with ExitStack() as stack:
        told = stack.enter_context(pytest.raises(NodeError))
        folder = stack.enter_context(scratch_folder())
        (folder / "table.parquet").symlink_to("/dev/full")
        pq.write_table(pa.table({"a": range(10_000)}), folder / "table.parquet")
    assert str(told.value) == (
        f"scratch folder {folder}: No space left on device; free space there, or set TMPDIR to another folder on this node"
    )
    assert list(temporary.iterdir()) == []


def test_where_no_folder_is_left_to_write_in_it_is_said_and_errors_of_other_files_stay_what_they_are(
    temporary, monkeypatch
):
    with pytest.raises(FileNotFoundError), scratch_folder():
        Path("/none/prompts.csv").read_text()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(temporary / "none")])
    with pytest.raises(NodeError, match=r"No usable temporary directory .*set TMPDIR"), scratch_folder():
        pass
