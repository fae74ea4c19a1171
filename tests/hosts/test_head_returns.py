"""A head that loses power and comes back with its state, while workers and a driver on other hosts go on."""

import json
import shutil

import pytest
from support.hosts.host_job import HostJob, undisturbed
from support.hosts.network import missing
from support.hosts.ray_hosts import RayHosts, wait_for
from support.jobs import energy_rows, hashes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

KEEPERS = [
    "rocksdb",
    pytest.param(
        "redis", marks=pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server")
    ),
]


@pytest.mark.parametrize("keeper", KEEPERS)
def test_workers_and_driver_go_on_while_the_head_is_away(tmp_path, keeper):
    with RayHosts(w1=1, w2=2, head_state=keeper, away_s=90) as hosts:
        (tmp_path / "undisturbed").mkdir()
        expected = undisturbed(hosts, tmp_path / "undisturbed")
        job = HostJob(hosts, tmp_path)
        driver = job.start("w2")
        job.wait_for_commits(3)
        hosts.kill_host("head")
        job.wait_for_commits(19)  # leases go straight from driver to worker
        hosts.start_host("head")
        hosts.start_head()
        wait_for(lambda: hosts.nodes_alive() == 3, "the head knows its nodes")
        output = job.finished(driver)
        assert hashes(output) == expected
        assert json.loads((output / "stats.json").read_text())["evidence_class"] == "E1"
        assert "is gone" not in job.said()
        assert len({row["worker_id"] for row in energy_rows(output, "env")}) == 3, "none was started anew"
        # the same cluster takes the next job
        (tmp_path / "next").mkdir()
        following = HostJob(hosts, tmp_path / "next")
        assert hashes(following.finished(following.start())) == expected
