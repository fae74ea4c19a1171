"""`infra/storage/bucket-policy.json` on Ceph: a whole job needs no more than it grants, and it grants nothing else."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from s3_servers import S3Endpoint
from support.jobs import assert_exactly_once
from support.stand_in_jobs import start_cluster

from millijoule.jobs.check import main as check
from millijoule.jobs.gc import main as collect_garbage
from millijoule.jobs.generate import main as generate
from millijoule.jobs.report import main as report

POLICY = Path(__file__).parents[2] / "infra" / "storage" / "bucket-policy.json"
PLAIN = ("--model", "python:support.models:plain", "--shard-size", "8", "--workers", "1", "--device", "cpu")


class Granted:
    """A bucket of the administrator's, with prompts in it and something private beside them, and a worker's account."""

    def __init__(self, owner: S3Endpoint, worker: S3Endpoint, bucket: str) -> None:
        self.owner, self.worker, self.bucket = owner, worker, bucket

    def grant(self, without: str | None = None) -> None:
        """Set the policy, without one of its actions."""
        text = POLICY.read_text()
        name = self.worker.access_key.removesuffix("-key")
        for word, meaning in (
            ("WORKERS", f"arn:aws:iam:::user/{name}"),
            ("BUCKET", self.bucket),
            ("INPUT", "in"),
            ("OUTPUT", "jobs"),
        ):
            text = text.replace(word, meaning)
        policy = json.loads(text)
        for statement in policy["Statement"]:
            actions = statement["Action"]
            listed = [actions] if isinstance(actions, str) else actions
            allows = statement["Effect"] == "Allow"
            statement["Action"] = [a for a in listed if a != without or not allows]
        policy["Statement"] = [s for s in policy["Statement"] if s["Action"]]
        self.owner.client().put_bucket_policy(Bucket=self.bucket, Policy=json.dumps(policy))


@pytest.fixture(scope="module")
def granted(ceph_gateway) -> Granted:
    owner = ceph_gateway.endpoint
    name = f"worker{secrets.token_hex(4)}"
    place = Granted(owner, ceph_gateway.add_user(name), owner.make_bucket("policy"))
    client = owner.client()
    for key, body in (("in/prompts.txt", b"".join(b"cat %d\n" % i for i in range(20))), ("private/x", b"x")):
        client.put_object(Bucket=place.bucket, Key=key, Body=body)
    return place


@pytest.fixture
def as_worker(granted, s3_env, monkeypatch):
    """This process has the worker's key alone, and a cluster to run on."""
    s3_env(granted.worker)
    granted.grant()
    cluster = start_cluster(monkeypatch)
    cluster.add_node("host-1", CPU=2.0)
    return f"s3://{granted.bucket}"


def refused(call: Any, **parameters: Any) -> str:
    with pytest.raises(ClientError) as error:
        call(**parameters)
    return str(error.value.response["Error"]["Code"])


def test_a_whole_job_its_report_check_and_garbage_need_no_more(granted, as_worker, capsys):
    output = f"{as_worker}/jobs/one"
    arguments = ["--prompts", f"{as_worker}/in/*.txt", "--output", output, *PLAIN]
    assert generate(arguments) == 0, capsys.readouterr().err
    assert generate(arguments) == 0  # resumed: nothing is left to do
    assert report([output]) == 0
    assert check([output]) == 0
    assert collect_garbage([output, "--delete"]) == 0
    assert_exactly_once(output, 20)


def test_a_large_object_goes_up_in_parts_and_a_failed_one_can_be_dropped(granted, as_worker):
    client = granted.worker.client()
    key = {"Bucket": granted.bucket, "Key": "jobs/large"}
    upload = client.create_multipart_upload(**key)["UploadId"]
    client.upload_part(**key, UploadId=upload, PartNumber=1, Body=b"x")
    client.list_multipart_uploads(Bucket=granted.bucket)
    client.abort_multipart_upload(**key, UploadId=upload)


def test_it_grants_nothing_else(granted, as_worker):
    client, bucket = granted.worker.client(), granted.bucket
    elsewhere = granted.owner.make_bucket("other")
    everybody = json.dumps({"Version": "2012-10-17", "Statement": []})
    for call, parameters in (
        (client.get_object, {"Bucket": bucket, "Key": "private/x"}),
        (client.put_object, {"Bucket": bucket, "Key": "private/y", "Body": b"y"}),
        (client.put_object, {"Bucket": bucket, "Key": "in/prompts.txt", "Body": b"y"}),
        (client.delete_object, {"Bucket": bucket, "Key": "in/prompts.txt"}),
        (client.put_object, {"Bucket": bucket, "Key": "jobs2/y", "Body": b"y"}),
        (client.put_object_acl, {"Bucket": bucket, "Key": "jobs/one/_SUCCESS", "ACL": "public-read"}),
        (client.put_object, {"Bucket": bucket, "Key": "jobs/y", "Body": b"y", "ACL": "public-read"}),
        (client.put_bucket_acl, {"Bucket": bucket, "ACL": "public-read"}),
        (client.put_bucket_policy, {"Bucket": bucket, "Policy": everybody}),
        (client.get_bucket_policy, {"Bucket": bucket}),
        (client.delete_bucket_policy, {"Bucket": bucket}),
        (
            client.put_bucket_versioning,
            {"Bucket": bucket, "VersioningConfiguration": {"Status": "Suspended"}},
        ),
        (client.delete_bucket, {"Bucket": bucket}),
        (client.list_objects_v2, {"Bucket": elsewhere}),
        (client.put_object, {"Bucket": elsewhere, "Key": "jobs/x", "Body": b"x"}),
    ):
        assert refused(call, **parameters) in ("AccessDenied", "403"), (call.__name__, parameters)


@pytest.mark.parametrize("action", ["s3:ListBucket", "s3:PutObject", "s3:GetObject"])
def test_without_one_of_its_actions_a_job_says_what_was_refused(granted, as_worker, capsys, action):
    granted.grant(without=action)
    output = f"{as_worker}/jobs/{secrets.token_hex(4)}"
    code = generate(["--prompts", f"{as_worker}/in/prompts.txt", "--output", output, *PLAIN])
    shown = capsys.readouterr().err
    assert code == 1
    assert "403" in shown or "AccessDenied" in shown
    assert "Traceback" not in shown
