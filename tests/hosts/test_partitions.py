"""Hosts cut off from the head, from storage, from both. The oracles (`HostJob.copy`) believe files and counters alone."""

import json

import pytest
from support.hosts.host_job import HostJob, undisturbed
from support.hosts.network import missing
from support.hosts.ray_hosts import RayHosts, wait_for
from support.jobs import hashes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def cluster():
    with RayHosts(w1=1, w2=2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def expected(cluster, tmp_path_factory):
    """Hashes of a run in which nothing goes wrong."""
    return undisturbed(cluster, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def hosts(cluster):
    yield cluster
    cluster.heal()
    wait_for(lambda: cluster.nodes_alive() == 3, "all nodes are back")


def stats(output):
    return json.loads((output / "stats.json").read_text())


def w1_is_back(hosts):
    return wait_for(lambda: hosts.nodes_alive() == 3, "w1 is back")


def test_a_worker_that_lost_the_head_commits_nothing_that_another_has_committed(hosts, expected, tmp_path):
    """It goes on with what it has; what it finishes first stands, what another finished first it discards."""
    job = HostJob(hosts, tmp_path)
    driver = job.start()
    job.wait_for_commits(4)
    hosts.cut("w1", "head")
    job.wait_until_said("is gone with shard")
    lost = job.in_hand_of_the_lost()
    job.wait_for_commits(19)
    standing = job.commits()
    assert set(lost) <= set(standing)
    hosts.heal()
    w1_is_back(hosts)
    output = job.finished(driver)
    assert {shard: body for shard, body in job.commits().items() if shard in standing} == standing
    assert hashes(output) == expected
    assert stats(output)["energy"]["complete"], "its account was closed by a reader on its host"
    assert hosts.counters.booked_mj(output, hosts["w1"].boot_id, "gap") > 0


def test_a_zombie_that_reaches_storage_again_is_refused_and_its_joules_are_booked(hosts, expected, tmp_path):
    """Cut off from both; storage comes back first: the zombie, of whose death the driver is sure, tries to commit."""
    job = HostJob(hosts, tmp_path)
    driver = job.start()
    job.wait_for_commits(4)
    hosts.cut("w1", "head", "store")
    job.wait_until_said("is gone with shard")
    lost = job.in_hand_of_the_lost()
    job.wait_for_commits(19)
    standing = job.commits()
    assert set(lost) <= set(standing)
    before = hosts.worker_logs("w1").count("another attempt committed first")
    hosts.heal("w1", "store")
    wait_for(
        lambda: hosts.worker_logs("w1").count("another attempt committed first") > before,
        "the zombie was refused",
    )
    hosts.heal()
    w1_is_back(hosts)
    output = job.finished(driver)
    assert {shard: body for shard, body in job.commits().items() if shard in standing} == standing
    assert hashes(output) == expected
    assert stats(output)["energy"]["complete"]
    assert hosts.counters.booked_mj(output, hosts["w1"].boot_id, "gap") > 0


def test_a_worker_that_lost_storage_goes_on_when_it_is_back_and_nobody_is_blamed(hosts, expected, tmp_path):
    job = HostJob(hosts, tmp_path)
    driver = job.start()
    job.wait_for_commits(4)
    hosts.cut("w1", "store")
    job.wait_for_commits(12)
    hosts.heal()
    output = job.finished(driver)
    assert hashes(output) == expected
    assert "is gone" not in job.said()
    assert "cannot work" not in job.said()
    assert stats(output)["evidence_class"] == "E1"


def test_a_job_ends_without_the_worker_that_alone_does_not_reach_storage(hosts, expected, tmp_path):
    """What it has in hand another makes; nobody waits for it in the end, and its counter is read for it."""
    job = HostJob(hosts, tmp_path)
    driver = job.start()
    job.wait_for_commits(4)
    hosts.cut("w1", "store")
    output = job.finished(driver)
    assert hashes(output) == expected
    assert "it still waits for storage" in job.said()
    assert stats(output)["energy"]["complete"]
    assert hosts.counters.booked_mj(output, hosts["w1"].boot_id, "gap") > 0


def test_a_slow_and_lossy_link_costs_time_only(hosts, expected, tmp_path):
    job = HostJob(hosts, tmp_path)
    driver = job.start()
    job.wait_for_commits(2)
    hosts.delay("w1", "head", 0.1)
    hosts.drop("w1", "store", 0.05)
    output = job.finished(driver)
    assert hashes(output) == expected
    assert stats(output)["evidence_class"] == "E1"


def test_a_host_that_loses_power_takes_its_last_joules_with_it(hosts, expected, tmp_path):
    """Nobody can read its counter: what it used since its last record is missing, and said to be."""
    job = HostJob(hosts, tmp_path)
    driver = job.start()
    job.wait_for_commits(4)
    hosts.kill_host("w1")
    job.wait_until_said("is gone with shard")
    hosts.start_host("w1")
    hosts.start_worker("w1")
    output = job.finished(driver)
    assert hashes(output) == expected
    energy = stats(output)["energy"]
    assert energy["total_mj"] is None
    assert [lost["host"] for lost in energy["unclosed"]] == ["w1"]
