"""Jobs on real S3 servers: strict ones, one without exclusive create, and ones that fail."""

import os
import subprocess
import sys

import pytest
from support.jobs import assert_exactly_once, generate, manifest, write_prompts

PLAIN = ("--model", "python:support.models:plain")


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts.txt", 40)


def bucket(endpoint) -> str:
    return f"s3://{endpoint.make_bucket('job')}"


def test_a_job_from_and_to_a_strict_server(tmp_path, prompts, ray_address, ceph, s3_env):
    s3_env(ceph)
    url = bucket(ceph)
    from millijoule.workers.storage.open import open_store

    open_store(url).put_file("in/prompts.txt", prompts)
    arguments = ("--prompts", f"{url}/in/*.txt", "--output", f"{url}/out", "--shard-size", 8, *PLAIN)
    done = generate(tmp_path, *arguments, ray=ray_address)
    assert done.returncode == 0, done.stderr
    assert_exactly_once(f"{url}/out", 40)
    again = generate(tmp_path, *arguments, ray=ray_address)
    assert again.returncode == 0, again.stderr
    assert_exactly_once(f"{url}/out", 40)


def test_throttling_and_lost_acknowledgements_are_ridden_out(
    tmp_path, prompts, ray_address, ceph, fault_proxy, s3_env
):
    proxy = fault_proxy(ceph)
    s3_env(ceph)
    url = bucket(ceph)
    s3_env(ceph.through(proxy))
    proxy.inject("status", pattern="PUT .*/data/", times=3, status=503)
    proxy.inject("ack_lost", pattern="PUT .*/commits/", times=2)
    arguments = ("--prompts", prompts, "--output", f"{url}/out", "--shard-size", 8, *PLAIN)
    files = ("--format", "files", "--image-format", "jpeg")  # eight of a shard are stored at a time
    done = generate(tmp_path, *arguments, *files, ray=ray_address)
    assert done.returncode == 0, done.stderr
    assert_exactly_once(f"{url}/out", 40)


def test_a_store_without_exclusive_create_is_named_and_still_exactly_once(
    tmp_path, prompts, ray_address, rclone_s3, s3_env
):
    s3_env(rclone_s3)
    url = bucket(rclone_s3)
    arguments = ("--prompts", prompts, "--output", f"{url}/out", "--shard-size", 8, *PLAIN)
    done = generate(tmp_path, *arguments, "--format", "files", "--image-format", "webp", ray=ray_address)
    assert done.returncode == 0, done.stderr
    assert "no exclusive create" in done.stderr
    assert_exactly_once(f"{url}/out", 40)


def test_a_refused_key_is_an_error_that_says_what_to_do(
    tmp_path, prompts, ray_address, ceph, s3_env, monkeypatch
):
    s3_env(ceph)
    url = bucket(ceph)
    monkeypatch.setitem(os.environ, "AWS_SECRET_ACCESS_KEY", "wrong")
    done = generate(tmp_path, "--prompts", prompts, "--output", f"{url}/out", *PLAIN, ray=ray_address)
    assert done.returncode == 1
    assert "403" in done.stderr or "SignatureDoesNotMatch" in done.stderr
    assert "Traceback" not in done.stderr


def test_gc_finds_what_a_dead_attempt_left(tmp_path, prompts, ray_address, moto_s3, s3_env):
    s3_env(moto_s3)
    url = bucket(moto_s3)
    done = generate(
        tmp_path, "--prompts", prompts, "--output", f"{url}/out", "--shard-size", 8, *PLAIN, ray=ray_address
    )
    assert done.returncode == 0, done.stderr
    from millijoule.workers.storage.open import open_store

    store = open_store(f"{url}/out")
    orphan = "data/00000001-e0001-0123456789ab.parquet"
    store.put(orphan, b"half a shard")
    gc = [sys.executable, "-m", "millijoule.jobs.gc", "--output", f"{url}/out"]
    dry = subprocess.run(gc, capture_output=True, text=True, check=True)
    assert orphan in dry.stdout
    assert store.exists(orphan)
    subprocess.run([*gc, "--delete"], capture_output=True, check=True)
    assert not store.exists(orphan)
    assert len(manifest(f"{url}/out")) == 40
    assert_exactly_once(f"{url}/out", 40)
