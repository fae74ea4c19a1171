"""A whole submitted job with marked secrets in its nodes' environment: the marks are nowhere but there.

The secrets are in use meanwhile: the storage's key signs requests, the collector's header arrives, so that what is looked for
could have been found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from support.cluster import RayCluster
from support.jobs import assert_exactly_once, write_prompts

from millijoule.workers.layout import JOB_KEY
from millijoule.workers.storage.open import open_store

#: Every secret that the product or its libraries may be given, by the variable that carries it.
MARK = "marked-secret"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": f"{MARK}-of-the-store",
    "AWS_SESSION_TOKEN": f"{MARK}-of-the-session",
    "HF_TOKEN": f"hf_{MARK}_of_the_hub",
    "OTEL_EXPORTER_OTLP_HEADERS": f"x-api-key={MARK}-of-the-collector",
}
MARKS = ("marked-secret", "marked_secret", "hf_marked")
#: `ray job submit` asks the dashboard this often, and nobody has to wait longer.
DEADLINE_S = 200


class Collector(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.keys: list[str] = []


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.keys.append(self.headers["x-api-key"] or "")
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class ArgumentWatch(threading.Thread):
    """Looks at the arguments of every process of the machine until it is stopped; `found` are those with a mark."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.seen: set[str] = set()
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.5):
            for process in psutil.process_iter(["cmdline"]):
                words = " ".join(process.info["cmdline"] or ())
                self.seen |= {name for name in ("millijoule", "ShardWorker") if name in words}
                if any(mark in words for mark in MARKS):
                    self.found.add(words)

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def marked(data: bytes) -> bool:
    return any(mark.encode() in data for mark in MARKS)


@pytest.fixture(scope="module")
def submitted(moto_s3, tmp_path_factory) -> dict:
    """Two jobs on one cluster, one that ends well and one that fails, and everything they left."""
    folder = tmp_path_factory.mktemp("secrets")
    bucket = moto_s3.make_bucket("secrets")
    nodes = moto_s3.env() | SECRETS | {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE"}
    prompts = write_prompts(folder / "prompts.txt", 12)
    with Collector() as collector, RayCluster(head_cpus=2, dashboard=True, env=nodes) as cluster:
        served = threading.Thread(target=collector.serve_forever)
        served.start()
        watch = ArgumentWatch()
        watch.start()
        try:
            outputs = [f"s3://{bucket}/out", f"s3://{bucket}-nowhere/out"]
            address = f"http://127.0.0.1:{collector.server_port}"
            done = [submit(cluster, prompts, output, address) for output in outputs]
            told = [
                urllib.request.urlopen(f"{cluster.dashboard}/{page}", timeout=30).read()
                for page in ("api/jobs/", "api/v0/actors?detail=1", "nodes?view=summary")
            ]
            logs = {
                file: file.read_bytes()
                for file in cluster.folder.rglob("*")
                if file.is_file() and file.stat().st_size < 50 * 2**20 and "sockets" not in file.parts
            }
        finally:
            watch.stop()
            collector.shutdown()
            served.join()
    return {
        "done": done,
        "watch": watch,
        "keys": collector.keys,
        "told": told,
        "logs": logs,
        "output": outputs[0],
        "endpoint": moto_s3,
    }


def submit(
    cluster: RayCluster, prompts: Path, output: str, collector: str
) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as somebody who has no secret: nodes have them."""
    ray = str(Path(sys.executable).parent / "ray")
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH", *SECRETS)}
    job = (
        *("millijoule", "generate", "--prompts", str(prompts), "--output", output, "--otlp", collector),
        *("--model", "python:support.models:plain", "--shard-size", "6", "--workers", "1"),
    )
    return subprocess.run(
        [ray, "job", "submit", "--address", cluster.dashboard, "--", *job],
        env=env | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_the_secrets_were_in_use(submitted, s3_env):
    well, badly = submitted["done"]
    assert well.returncode == 0, well.stdout + well.stderr
    assert badly.returncode != 0
    assert submitted["keys"]
    assert set(submitted["keys"]) == {f"{MARK}-of-the-collector"}
    assert submitted["watch"].seen == {"millijoule", "ShardWorker"}
    s3_env(submitted["endpoint"])
    assert_exactly_once(submitted["output"], 12)


def test_no_process_has_one_in_its_arguments(submitted):
    assert submitted["watch"].found == set()


def test_what_is_printed_and_logged_has_none(submitted):
    for done in submitted["done"]:
        assert not marked((done.stdout + done.stderr).encode())
    assert len(submitted["logs"]) > 10
    assert [str(file) for file, data in submitted["logs"].items() if marked(data)] == []


def test_rays_record_of_jobs_actors_and_nodes_has_none(submitted):
    jobs, *_ = submitted["told"]
    assert "millijoule generate" in json.dumps(json.loads(jobs))
    assert [data[:200] for data in submitted["told"] if marked(data)] == []


def test_the_output_has_none_nor_has_its_report(submitted, s3_env, capsys):
    from millijoule.jobs.report import main

    s3_env(submitted["endpoint"])
    store = open_store(submitted["output"])
    assert main([submitted["output"], "--json", "-"]) == 0
    assert not marked(capsys.readouterr().out.encode())
    keys = [item.key for item in store.list()]
    assert {JOB_KEY, "report.html", "stats.json"} <= set(keys)
    assert any(key.startswith("_job/epochs/") for key in keys)
    assert [key for key in keys if marked(store.get(key))] == []


def test_what_watches_would_see_a_secret():
    """The oracle can fail: a process with a mark in its arguments, and a mark in a file, are seen."""
    watch = ArgumentWatch()
    watch.start()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", MARKS[0]])
    deadline = time.monotonic() + 20
    while not watch.found and time.monotonic() < deadline:
        time.sleep(0.1)
    child.kill()
    child.wait()
    watch.stop()
    assert watch.found
    assert marked(b"..." + MARK.encode())
