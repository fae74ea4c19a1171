"""Batch sizes are guessed, grown and halved, and what was learnt outlives a worker but not a day, a model or a device."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millijoule.workers.drawing import batch_size
from millijoule.workers.drawing.batch_size import BatchNotes, BatchSizer, size_class
from millijoule.workers.generators.protocol import BatchLimits

SIZE = 512, 512


def sizer(first, most, notes=None):
    return BatchSizer(lambda width, height: BatchLimits(first, most), notes)


def draw(sizer, images, capacity, size=SIZE):
    """Sizes of the calls of a device that holds `capacity` images, in order, and whether each went well."""
    calls = []
    while images:
        rows = min(sizer.rows(size), images)
        calls.append((rows, rows <= capacity))
        if rows <= capacity:
            sizer.fitted(size, rows)
            images -= rows
        else:
            assert rows > 1
            sizer.ran_out(size, rows)
    return calls


def test_it_doubles_while_that_fits_and_halves_where_it_does_not():
    assert draw(sizer(2, 16), 26, capacity=9) == [
        (2, True),
        (4, True),
        (8, True),
        (12, False),
        (6, True),
        (6, True),
    ]
    assert draw(sizer(2, 16), 40, capacity=9)[:5] == [(2, True), (4, True), (8, True), (16, False), (8, True)]


def test_a_batch_that_is_not_full_says_nothing():
    found = sizer(4, 16)
    found.fitted(SIZE, 3)
    assert found.rows(SIZE) == 4


@settings(deadline=None)
@given(
    first=st.integers(1, 300),
    most=st.integers(1, 300),
    capacity=st.integers(1, 300),
    images=st.integers(1, 2000),
)
def test_on_any_device_every_image_is_drawn_and_no_size_is_tried_again_that_failed(
    first, most, capacity, images
):
    calls = draw(sizer(first, most), images, capacity)
    assert sum(rows for rows, ok in calls if ok) == images
    assert max(rows for rows, _ in calls) <= most
    failed = [rows for rows, ok in calls if not ok]
    assert failed == sorted(set(failed), reverse=True)
    assert len(failed) <= math.log2(most) + 1
    for at, (rows, ok) in enumerate(calls):
        if not ok:
            assert all(later < rows for later, _ in calls[at + 1 :])
    # what does not fit is not shrunk further than need be
    if failed and images > 4 * most:
        assert calls[-2][0] > min(failed) // 2 - 1


def test_sizes_of_one_class_share_what_is_learnt_and_others_do_not():
    found = sizer(8, 8)
    found.ran_out((1024, 1024), 8)
    assert found.rows((1024, 1024)) == found.rows((1152, 896)) == 4
    assert found.rows((512, 512)) == 8


@settings(deadline=None)
@given(st.integers(8, 8192), st.integers(8, 8192))
def test_a_class_holds_its_sizes_and_little_more(width, height):
    assert width * height <= size_class(width, height) <= width * height * math.sqrt(2) * 1.001 + 1


def test_native_sizes_are_classes_of_their_own():
    assert [size_class(n, n) for n in (64, 128, 512, 1024)] == [64**2, 128**2, 512**2, 1024**2]


class Clock:
    now = 1e9

    def __call__(self):
        return self.now


@pytest.fixture
def host(tmp_path):
    """Notes of a host whose clock is in the test's hands, by what they are about."""
    clock = Clock()

    def notes(about="model"):
        return BatchNotes(about, tmp_path / "notes", clock)

    notes.clock = clock
    notes.folder = tmp_path / "notes"
    return notes


def test_the_next_worker_of_the_host_starts_with_what_the_last_one_found(host):
    draw(sizer(2, 16, host()), 40, capacity=9)
    assert draw(sizer(2, 16, host()), 40, capacity=9) == [(8, True)] * 5
    assert sizer(2, 16, host("another model")).rows(SIZE) == 2
    assert sizer(2, 16, host()).rows((1024, 1024)) == 2


def test_what_was_found_is_never_more_than_the_limit_of_today(host):
    draw(sizer(2, 16, host()), 40, capacity=100)
    assert sizer(2, 4, host()).rows(SIZE) == 4


def test_savers_are_noted_and_let_batches_grow_again(host):
    found = sizer(4, 4, host())
    for rows in (4, 2, 1):
        found.ran_out(SIZE, rows)
    found.relieved(SIZE)
    assert draw(found, 7, capacity=2) == [(1, True), (2, True), (4, False), (2, True), (2, True)]
    later = sizer(4, 4, host())
    assert (later.rows(SIZE), later.savers(SIZE)) == (2, 1)


def test_notes_are_forgotten_after_a_day(host):
    sizer(8, 8, host()).rows(SIZE)
    found = sizer(8, 8, host())
    found.ran_out(SIZE, 8) if found.rows(SIZE) else None
    host.clock.now += batch_size.NOTES_HOLD_S - 1
    assert sizer(8, 8, host()).rows(SIZE) == 4
    host.clock.now += 2
    assert sizer(8, 8, host()).rows(SIZE) == 8


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_damaged_notes_are_no_notes(tmp_path_factory, damage):
    folder = tmp_path_factory.mktemp("host") / "notes"
    found = sizer(8, 8, BatchNotes("model", folder))
    found.rows(SIZE)
    found.ran_out(SIZE, 8)
    (entry,) = folder.glob("*.json")
    entry.write_bytes(damage)
    assert sizer(8, 8, BatchNotes("model", folder)).rows(SIZE) == 8


@pytest.mark.parametrize("change", [{"rows": 0}, {"rows": -3}, {"savers": -1}, {"key": "x"}, {"rows": "8"}])
def test_notes_that_cannot_be_are_no_notes(host, change):
    found = sizer(8, 8, host())
    found.rows(SIZE)
    found.ran_out(SIZE, 8)
    (entry,) = host.folder.glob("*.json")
    entry.write_text(json.dumps(json.loads(entry.read_text()) | change))
    assert sizer(8, 8, host()).rows(SIZE) == 8


def test_a_folder_of_somebody_else_costs_only_the_memory(tmp_path, caplog):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes").chmod(0o777)
    found = sizer(8, 8, BatchNotes("model", tmp_path / "notes"))
    assert found.rows(SIZE) == 8
    found.ran_out(SIZE, 8)
    assert found.rows(SIZE) == 4
    assert "do not share their batches" in caplog.text
