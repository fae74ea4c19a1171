"""Files of shards on a real S3 server, stored eight at a time by attempts that overlap."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from support.local_job import MODEL_SHA256, plan, stand_in_worker
from support.models import Plain

from millijoule.pipeline.output.commits import parse_commit
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.workers.attempts.runner import AttemptRunner
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.layout import commit_key
from millijoule.workers.lease import Lease, WorkerConfig
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline
from millijoule.workers.storage.open import open_store


def test_attempts_that_overlap_store_all_files_of_their_commits(tmp_path, moto_s3, s3_env):
    s3_env(moto_s3)
    local, job = plan(tmp_path, [f"p{i}" for i in range(60)], shard_size=20, output_format="files")
    store = open_store(f"s3://{moto_s3.make_bucket('stages')}/out")
    for item in local.list(""):
        store.put(item.key, local.get(item.key))
    config = WorkerConfig(
        *(store.url, job.fingerprint, 0, "files", "plain", MODEL_SHA256, 1),
        image_format=ImageFormat("jpeg", 95),
    )
    meter = open_meter()
    worker = stand_in_worker("w1", "node", "host", "cpu", 1)
    timeline = SegmentTimeline("w1", meter)
    attempts = AttemptRunner(config, store, Plain("cpu"), meter, timeline, worker, PowerSampler(meter))
    leases = [Lease(shard, f"e0001-{shard.shard_id}", "w1") for shard in load_job_shards(store, job)]
    with ThreadPoolExecutor(2) as callers:
        assert [r.outcome for r in callers.map(attempts.run, leases)] == ["committed"] * 3
    attempts.close()
    stored = {item.key for item in store.list("data/")}
    commits = [parse_commit(store, i, store.get(commit_key(i))) for i in range(3)]
    assert stored == {file.path for commit in commits for file in commit.files}
    assert sum(key.endswith(".jpg") for key in stored) == 60
    for commit in commits:
        for file in commit.files:
            assert hashlib.sha256(store.get(file.path)).hexdigest() == file.sha256
