"""`bench memory`: shared pages are counted once, copies as often as they are, and one worker is no comparison."""

import mmap

import pytest

from millijoule.jobs.bench.memory import (
    BenchOptions,
    made_up_pipeline,
    measure_workers,
    pss_mb,
    run,
    weights_bytes,
)
from millijoule.workers.errors import InputError


def test_one_worker_is_no_comparison():
    with pytest.raises(InputError, match="--workers 1: at least 2"):
        run(BenchOptions(workers=1))
    with pytest.raises(InputError, match="--copied-workers 1: at least 2"):
        run(BenchOptions(copied_workers=1))


def test_anonymous_memory_and_that_of_files_are_told_apart(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 32_000_000)
    before = pss_mb()
    held = bytearray(b"x" * 64_000_000)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) > 0
        after = pss_mb()
    assert after["anonymous_mb"] - before["anonymous_mb"] == pytest.approx(64, abs=8)
    assert after["files_mb"] - before["files_mb"] == pytest.approx(32, abs=4)
    assert after["pss_mb"] - before["pss_mb"] == pytest.approx(96, abs=12)
    assert len(held) == 64_000_000


@pytest.mark.slow
def test_two_workers_hold_the_weights_once_unless_they_copy_them(tmp_path):
    pytest.importorskip("diffusers")
    model = str(made_up_pipeline(tmp_path / "model", 0.2))
    weights_mb = weights_bytes(model) / 1e6
    mapped = measure_workers(model, 2, False, "eager")
    copied = measure_workers(model, 2, True, "eager")
    assert sum(w["files_mb"] for w in mapped) == pytest.approx(weights_mb, rel=0.2, abs=60)
    assert sum(w["anonymous_mb"] for w in copied) - sum(w["anonymous_mb"] for w in mapped) == pytest.approx(
        2 * weights_mb, rel=0.2
    )
