"""`ray job submit` from a host without Ray; and once more, while the first driver, or a worker of it, still works somewhere."""

import json
import subprocess

import pytest
from support.hosts.host_job import HostJob
from support.hosts.network import missing
from support.hosts.ray_hosts import BIN, DASHBOARD_PORT, RayHosts, wait_for
from support.jobs import energy_rows, manifest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


def submit(hosts: RayHosts, job: HostJob) -> subprocess.Popen[bytes]:
    """`ray job submit` on the client's host; what driver and command say goes to the job's log."""
    command = [
        *(
            BIN / "ray",
            "job",
            "submit",
            "--address",
            f"http://{hosts['head'].address}:{DASHBOARD_PORT}",
            "--",
        ),
        *("millijoule", "generate", *job.arguments),
    ]
    return hosts["client"].spawn(command, job.log, hosts.env("client"))


def later_epochs(job: HostJob, taken_over: dict[int, bytes]) -> set[int]:
    """Epochs of the commits that were not there when another run had taken the job over."""
    return {
        json.loads(body)["driver_epoch"] for shard, body in job.commits().items() if shard not in taken_over
    }


def test_a_job_submitted_again_takes_over_from_the_driver_that_still_works(tmp_path):
    """The first has a shard at work when the second begins, and seals it."""
    with RayHosts(w1=1, w2=2, dashboard=True) as hosts:
        job = HostJob(hosts, tmp_path)
        first = submit(hosts, job)
        job.wait_for_commits(4)
        again = submit(hosts, job)
        job.wait_until_said("run 1 (this one) stands down")
        taken_over = job.commits()
        job.let_end()
        assert first.wait(90) != 0  # Ray calls a job failed whose command ends with another code than 0
        assert "superseded by run 2 (on " in job.said()
        output = job.finished(again, took_over=True)
        assert later_epochs(job, taken_over) == {2}
        assert {row["attempt_id"].split("-")[0] for row in manifest(output)} == {"e0001", "e0002"}
        assert json.loads((output / "stats.json").read_text())["energy"]["complete"]
        said = job.said()
        assert "is gone" not in said, "workers of a run that stands down end by themselves"


def test_a_job_submitted_again_while_a_worker_of_the_first_driver_still_works(tmp_path):
    with RayHosts(w1=1, w2=2, dashboard=True) as hosts:
        job = HostJob(hosts, tmp_path)
        first = submit(hosts, job)
        job.wait_for_commits(4)
        hosts.cut("w1", "head", "store")
        hosts.kill_drivers("head")
        assert first.wait(60) != 0
        before = job.commits()
        (zombie,) = hosts["w1"].processes("ray::ShardWorker")

        again = submit(hosts, job)
        wait_for(
            lambda: "_job/epochs/000002.json" in hosts.keys(job.output, "_job/epochs/"), "run 2", job.log
        )
        taken_over = job.commits()
        job.wait_for_commits(19)
        assert zombie.is_running(), "nothing shows, unless the first driver's worker outlives it"
        standing = job.commits()
        assert before.items() <= standing.items()
        hosts.heal("w1", "store")
        wait_for(
            lambda: "another attempt committed first" in hosts.worker_logs("w1"), "the zombie was refused"
        )
        assert job.stray_files() == set()
        hosts.heal()
        wait_for(lambda: hosts.nodes_alive() == 3, "w1 is back")
        output = job.finished(again)

        assert standing.items() <= job.commits().items()
        assert later_epochs(job, taken_over) == {2}
        epochs = {row["attempt_id"].split("-")[0] for row in manifest(output)}
        assert epochs == {"e0001", "e0002"}
        fenced = [r for r in energy_rows(output, "env") if r["host"] == "w1" and r["driver_epoch"] == 1]
        assert len(fenced) == 1
        assert json.loads((output / "stats.json").read_text())["energy"]["complete"]
        assert hosts.counters.booked_mj(output, hosts["w1"].boot_id, "gap") > 0
