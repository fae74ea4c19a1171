"""A node that is taken away, for real: a SIGTERM to `ray start`, and the node agent between a metadata service and a raylet."""

import json
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path

import pytest
import ray
from support.cluster import RayCluster
from support.hosts.counters import HostCounters
from support.jobs import TESTS, assert_exactly_once, start, wait_for_log
from support.metadata_services import AwsService, AzureService, GcpService

from millijoule.pipeline.running.cluster import DEATH_BY_PREEMPTION
from millijoule.workers.meters.meter import read_boot_id
from millijoule.workers.notices.aws import ACTION_PATH
from millijoule.workers.notices.gcp import PREEMPTED_PATH

PROMPTS, LEAVE = 96, 60
WATTS = 40
SITE = Path(__file__).parents[1] / "support/fake_powercap"


@pytest.fixture(scope="module")
def cluster():
    """Its schedulers hear of a node that drains after a minute instead of a tenth of a second: until then they put actors there."""
    env = {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "40",
        "RAY_raylet_report_resources_period_milliseconds": "60000",
    }
    with RayCluster(head_cpus=0, env=env) as cluster:
        yield cluster


@pytest.fixture
def counters(tmp_path):
    """The counter of this machine's processor, as the job sees it and as it ran."""
    counters = HostCounters()
    counters.boot(read_boot_id(), tmp_path / "powercap", WATTS)
    counters.start()
    yield counters
    counters.stop()


class Job:
    """One shard of images of 0.05 s, of which a part is sealed every second, for one worker. It stands at the image `LEAVE` until
    the driver knows that the node is taken away, however busy the machine is."""

    def __init__(self, folder, cluster):
        self.folder, self.out = folder, folder / "out"
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"{'leave' if i == LEAVE else 'prompt'} {i}\n" for i in range(PROMPTS)))
        what = ("--prompts", prompts, "--output", self.out, "--shard-size", PROMPTS)
        more = ("--model", "python:support.models:waits_for_leave", "--part-seconds", 1, "--workers", 1)
        seen = {"PYTHONPATH": f"{SITE}:{TESTS}", "MILLIJOULE_TEST_POWERCAP": str(folder / "powercap")}
        self.driver = start(folder, *what, *more, ray=cluster.address, **seen)
        wait_for(lambda: list(self.out.glob("_job/parts/*/*/*.json")), self.driver)

    def finish(self, cluster, counters):
        """The job ends on another node; its first worker said its last words, what that had sealed was not drawn again, and no
        joule that is certified was not run."""
        wait_for_log(self.folder, "worker w0001-0001 leaves: its node", 120.0)
        (self.folder / "leave").touch()
        other = cluster.add_node(2)
        assert self.driver.wait(120) == 0, (self.folder / "driver.log").read_text()
        log = (self.folder / "driver.log").read_text()
        assert "is taken away" in log
        assert "is gone" not in log
        (commit,) = [json.loads(path.read_text()) for path in self.out.glob("_job/commits/*/*.json")]
        assert commit["worker_id"] == "w0001-0002"
        sealed_before = {part for part in commit["parts"] if not part.startswith(commit["attempt_id"])}
        assert len(sealed_before) >= 2, "what it had sealed, and what it had in hand"
        assert_exactly_once(self.out, PROMPTS)
        closings = [json.loads(path.read_text()) for path in self.out.glob("_job/closed/*.json")]
        assert [(c["worker_id"], c["by"]) for c in sorted(closings, key=lambda c: c["worker_id"])] == [
            ("w0001-0001", "w0001-0001"),
            ("w0001-0002", "w0001-0002"),
        ]
        counters.stop()
        assert counters.problems(self.out) == []
        other.stop()


def wait_for(true, *processes, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def agent(cluster):
    """`agent(machine, *arguments, log=...)` starts a process of the agent of the nodes with that label."""
    started = []

    def start_agent(machine, *arguments, log):
        command = [sys.executable, "-m", "millijoule.jobs.node_agent", "--period", "0.2", *arguments]
        command += ["--ray-address", cluster.address, "--node-label", f"machine={machine}"]
        with log.open("w") as out:
            started.append(subprocess.Popen(command, env=cluster.env, stdout=out, stderr=out))
        return started[-1]

    yield start_agent
    for process in started:
        process.kill()
        process.wait()


def test_a_node_that_gets_sigterm_loses_no_work_and_no_joule(tmp_path, cluster, counters):
    node = cluster.add_node(2)  # with room for one more worker
    job = Job(tmp_path, cluster)
    node.process.send_signal(signal.SIGTERM)
    job.finish(cluster, counters)


def test_the_agent_drains_its_node_on_a_spot_notice(tmp_path, cluster, counters, agent):
    log = tmp_path / "agent.log"
    cluster.add_node(2, labels={"machine": "spot"})
    with AwsService() as aws:
        ours = agent("spot", "--endpoint", aws.url, log=log)
        job = Job(tmp_path, cluster)
        due = datetime.now(UTC) + timedelta(seconds=60)
        aws.say(ACTION_PATH, json.dumps({"action": "terminate", "time": f"{due:%Y-%m-%dT%H:%M:%SZ}"}))
        job.finish(cluster, counters)
        wait_for(lambda: "has ended" in log.read_text(), ours)
        ours.send_signal(signal.SIGTERM)
        assert ours.wait(60) == 0, log.read_text()


@pytest.mark.slow  # three nodes more
def test_agents_of_other_clouds_and_one_that_gets_sigterm_drain_their_nodes(tmp_path, cluster, agent):
    """Each as a process of its own, at a raylet of its own that has nothing to do."""
    with GcpService() as gcp, AzureService() as azure:
        asked = {
            "gcp": ("--endpoint", gcp.url),
            "azure": ("--endpoint", azure.url),
            "told": ("--provider", "none", "--grace", "20"),
        }
        for name in asked:
            cluster.add_node(1, labels={"machine": name})
        logs = {name: tmp_path / f"{name}.log" for name in asked}
        agents = {name: agent(name, *asked[name], log=logs[name]) for name in asked}
        wait_for(lambda: all("watching" in log.read_text() for log in logs.values()), *agents.values())
        assert not any("draining" in log.read_text() for log in logs.values()), "nothing was said yet"
        gcp.say(PREEMPTED_PATH, "TRUE")
        azure.schedule("event-1", "Preempt", formatdate(time.time() + 60, usegmt=True))
        agents["told"].send_signal(signal.SIGTERM)
        wait_for(lambda: all("has ended" in log.read_text() for log in logs.values()))
        wait_for(lambda: azure.acknowledged == ["event-1"], agents["azure"])
        for name in ("gcp", "azure"):
            agents[name].send_signal(signal.SIGTERM)
        assert [ours.wait(60) for ours in agents.values()] == [0, 0, 0], [
            p.read_text() for p in logs.values()
        ]
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    reasons = {n["Labels"].get("machine"): n["DeathReason"] for n in ray.nodes() if not n["Alive"]}
    ray.shutdown()
    assert {name: reasons.get(name) for name in asked} == dict.fromkeys(asked, DEATH_BY_PREEMPTION)
