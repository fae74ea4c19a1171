"""Outputs of many shards are closed and taken up again by the product's own code; what is said of them is theirs."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from millijoule.jobs.measuring.measurement import run_alone
from millijoule.jobs.simulating.closing_load import close_books, make_output
from millijoule.jobs.simulating.counted_s3 import CountedS3Store
from millijoule.jobs.simulating.report_load import report_on
from millijoule.jobs.simulating.resume_load import resume

SHARDS, IMAGES = 120, 20


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("many"))
    make_output(folder, SHARDS, IMAGES)
    return folder


def test_closing_makes_a_row_of_every_image_and_says_what_it_asked_for(output):
    found = run_alone(close_books, output, SHARDS, IMAGES)
    store = CountedS3Store(output)
    assert pq.ParquetFile(store.open_input("manifest.parquet")).metadata.num_rows == SHARDS * IMAGES
    assert all(found["exact_checks"].values())
    assert (
        found["requests"]["HEAD"] == SHARDS + 2
    )  # a file of images for each shard, and parts of commits twice
    assert [stage["stage"] for stage in found["stages"]][:2] == ["commits and ledger", "energy tables"]
    assert found["peak_mb"] >= found["mb_before"]
    told = report_on(output, output)
    assert told["outputs"] == 2
    assert told["page_mb"] > 0


def test_a_second_driver_lists_what_stands_and_reads_it_only_for_a_cap(output):
    listed, capped = (resume(output, SHARDS, capped) for capped in (False, True))
    assert listed["committed"] == SHARDS // 2
    assert capped["requests"]["GET"] > listed["requests"]["GET"]
    assert capped["read_mb"] > listed["read_mb"]


@pytest.mark.parametrize("capped", [False, True])
def test_a_second_driver_lists_each_folder_once(output, monkeypatch, capped):
    """A job of a million shards has a thousand pages of commits."""
    listed: list[str] = []
    list_keys = CountedS3Store.list
    monkeypatch.setattr(CountedS3Store, "list", lambda *args: listed.append(args[1]) or list_keys(*args))
    resume(output, SHARDS, capped)
    assert "_job/commits/" in listed
    assert len(listed) == len(set(listed)), listed


def test_a_listing_has_pages_of_a_thousand_keys(tmp_path):
    store = CountedS3Store(tmp_path, commits=2500)
    assert len({item.key for item in store.list("_job/commits/")}) == 2500
    assert store.requests == {"LIST": 3}
