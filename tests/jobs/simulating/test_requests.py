"""What a shard asks of a bucket, counted on a small real job, and that the bucket that counts is asked what S3 would be."""

from __future__ import annotations

from collections import Counter

import pyarrow.parquet as pq
import pytest
import s3fs
from support.local_job import plan, work

from millijoule.jobs.simulating.counted_s3 import KINDS, CountedS3Store
from millijoule.jobs.simulating.request_load import SHARDS, count_requests, dollars
from millijoule.workers.storage.open import open_store


@pytest.mark.parametrize(
    ("images", "output_format", "puts"),
    [(4, "parquet", 2), (20, "parquet", 2), (20, "webdataset", 4), (20, "files", 20 + 2)],
)
def test_a_shard_takes_four_reads_and_as_many_writes_as_it_has_files_and_a_commit(
    images, output_format, puts
):
    found = count_requests(images, output_format, pixels=8)
    assert found["per_shard"] == {"GET": 2, "HEAD": 2, "PUT": puts}
    assert found["dollars_per_million_shards"] == pytest.approx(1e6 * (puts * 0.005 + 4 * 0.0004) / 1000)
    assert found["stages"]["compacted commits"] == {"PUT": 1}


def test_a_part_takes_two_requests_more_and_its_record_goes_with_the_commit():
    found = count_requests(20, "parquet", pixels=8, in_parts=1)
    assert found["parts"] > 1
    assert found["per_shard"] == {"GET": 2, "HEAD": 2, "PUT": 2 + 2 * found["parts"], "DELETE": 1}


def test_closing_opens_what_commits_do_not_carry_and_nothing_else():
    carried, others, tables = (
        count_requests(*case, pixels=8)["stages"]["closing"]
        for case in ((4, "parquet"), (20, "parquet"), (20, "webdataset"))
    )
    assert Counter(others) - Counter(carried) == {"GET": 2 * SHARDS, "HEAD": SHARDS}
    pictures = {"GET": tables["GET"] - carried["GET"], "HEAD": tables["HEAD"] - carried["HEAD"]}
    assert pictures["HEAD"] <= 0  # row tables by themselves are not asked how long they are


def test_requests_are_priced_by_kind():
    assert dollars({"PUT": 1000, "LIST": 1000, "GET": 1000, "HEAD": 1000, "DELETE": 9}) == pytest.approx(
        0.0108
    )


def test_a_bucket_that_counts_is_asked_what_s3_is(tmp_path, monkeypatch, moto_s3, s3_env):
    asked: Counter[str] = Counter()

    def count_calls_of(name):
        real = getattr(s3fs.S3FileSystem, name)

        def call(self, method, *args, **parameters):
            asked[KINDS[method]] += 1
            return real(self, method, *args, **parameters)

        monkeypatch.setattr(s3fs.S3FileSystem, name, call)

    s3_env(moto_s3)
    for name in ("call_s3", "_call_s3"):  # the first holds the second as it was
        count_calls_of(name)
    stores = [open_store(f"s3://{moto_s3.make_bucket()}/out"), CountedS3Store(tmp_path / "counted")]
    for number, store in enumerate(stores):
        monkeypatch.setattr("support.local_job.open_store", lambda _, store=store: store)
        folder = tmp_path / str(number)
        folder.mkdir()
        planned, job = plan(folder, [f"a picture {i}" for i in range(40)], shard_size=20)
        work(planned, job)
    assert dict(asked) == stores[1].requests
    manifests = [pq.read_table(store.open_input("manifest.parquet"))["sha256"] for store in stores]
    assert manifests[0] == manifests[1]
