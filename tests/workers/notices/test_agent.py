"""The agent between stand-ins of a cloud (real HTTP) and of a cluster: what it drains, when, and what it says afterwards."""

import json
import logging
import threading
import time
from email.utils import formatdate

import pytest
from support.metadata_services import AwsService, AzureService

from millijoule.workers.errors import NodeError
from millijoule.workers.notices import agent as agent_module
from millijoule.workers.notices.agent import NodeAgent
from millijoule.workers.notices.aws import ACTION_PATH, REBALANCE_PATH, aws_sources
from millijoule.workers.notices.azure import azure_sources
from millijoule.workers.notices.metadata import MetadataService
from millijoule.workers.notices.ray_nodes import RayNode, is_own_address, nodes_here

MINE, OTHER = RayNode("aa" * 28, "127.0.0.1"), RayNode("bb" * 28, "192.0.2.7", {"machine": "m7"})


class Cluster:
    """Nodes that are alive, and what was drained: (id, reason, deadline in ms)."""

    def __init__(self, *nodes):
        self.nodes = list(nodes)
        self.drained = []
        self.away = 0  # so many calls fail

    def alive(self):
        if self.away:
            self.away -= 1
            raise NodeError("the head is away")
        return list(self.nodes)

    def drain(self, node_id, reason, deadline_ms):
        self.drained.append((node_id, reason, deadline_ms))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(agent_module, "TICK_S", 0.02)


class Running:
    """An agent in a thread."""

    def __init__(self, agent):
        self.agent = agent
        self.drained_all = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        self.drained_all = self.agent.run()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.agent.terminate(None)
        self.thread.join(10)
        assert not self.thread.is_alive()


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def made(of, service, cluster, **options):
    return NodeAgent(of(MetadataService(service.url)), cluster, nodes_here, period_s=0.02, **options)


def test_a_spot_notice_drains_the_nodes_of_this_machine_with_its_deadline():
    cluster = Cluster(MINE, OTHER)
    with AwsService() as aws, Running(made(aws_sources, aws, cluster)):
        time.sleep(0.1)
        assert cluster.drained == []
        due = int(time.time()) + 100
        aws.say(
            ACTION_PATH,
            '{{"action":"terminate","time":"{}"}}'.format(
                time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(due))
            ),
        )
        until(lambda: cluster.drained)
        late = RayNode("cc" * 28, "127.0.0.1")
        cluster.nodes.append(late)  # a node that is started there all the same
        until(lambda: len(cluster.drained) == 2)
    assert [(n, d) for n, _, d in cluster.drained] == [(MINE.node_id, due * 1000), (late.node_id, due * 1000)]
    assert all("AWS spot: terminate" in reason for _, reason, _ in cluster.drained)


def spot_action(seconds):
    due = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
    return json.dumps({"action": "terminate", "time": due})


def test_a_node_that_is_started_after_a_notice_was_withdrawn_stays(caplog):
    cluster = Cluster(MINE)
    with AwsService() as aws, Running(made(aws_sources, aws, cluster)):
        aws.say(ACTION_PATH, spot_action(100))
        until(lambda: cluster.drained)
        aws.say(ACTION_PATH, None)
        until(lambda: "was withdrawn" in caplog.text)
        cluster.nodes[:] = [RayNode("cc" * 28, "127.0.0.1")]
        time.sleep(0.2)
        assert len(cluster.drained) == 1
        aws.say(ACTION_PATH, spot_action(100))  # another one counts
        until(lambda: len(cluster.drained) == 2)


@pytest.mark.parametrize("nonsense", ["[" * 100_000, "null", "{}", '{"action": 1}', "<html>"])
def test_an_answer_that_means_nothing_drains_nothing_and_the_next_one_is_heard(nonsense, caplog):
    cluster = Cluster(MINE)
    with AwsService() as aws, Running(made(aws_sources, aws, cluster)):
        aws.say(ACTION_PATH, nonsense)
        until(lambda: "asking again" in caplog.text)
        assert cluster.drained == []
        aws.say(ACTION_PATH, spot_action(100))
        until(lambda: cluster.drained)


@pytest.mark.parametrize("token", ["two\nlines", "t\u00f6k\u20acn"])
def test_a_token_that_is_no_header_is_asked_for_again(token, caplog):
    cluster = Cluster(MINE)
    with AwsService() as aws:
        agent = made(aws_sources, aws, cluster)
        agent.sources[0].session._token, agent.sources[0].session._until = token, time.monotonic() + 0.5
        aws.say(ACTION_PATH, spot_action(100))
        with Running(agent):
            until(lambda: cluster.drained)
    assert "asking again" in caplog.text


@pytest.mark.parametrize("events", [5, {"a": 1}, [{"EventType": "Preempt", "Resources": 5}], [7, None]])
def test_events_of_no_shape_end_nobody_s_watch(events):
    cluster = Cluster(MINE)
    with AzureService() as azure, Running(made(azure_sources, azure, cluster)):
        azure.events = events
        time.sleep(0.1)
        azure.events = []
        azure.schedule("event-1", "Preempt", formatdate(time.time() + 60, usegmt=True))
        until(lambda: cluster.drained)


def test_a_cloud_that_answers_later_than_the_agent_starts_is_watched_all_the_same(monkeypatch):
    monkeypatch.setattr(agent_module, "FIND_PERIOD_S", 0.02)
    cluster, answers = Cluster(MINE), []
    with AwsService() as aws:
        aws.say(ACTION_PATH, spot_action(100))

        def find():
            answers.append(len(answers) >= 2)
            return aws_sources(MetadataService(aws.url)) if answers[-1] else ()

        with Running(NodeAgent((), cluster, nodes_here, period_s=0.02, find_sources=find)):
            until(lambda: cluster.drained)
    assert answers == [False, False, True]


@pytest.mark.parametrize("heeds", [False, True])
def test_an_advice_is_heeded_only_where_that_is_wanted(heeds):
    cluster = Cluster(MINE)
    with AwsService() as aws:
        aws.say(REBALANCE_PATH, '{"noticeTime":"2020-10-27T08:22:00Z"}')
        agent = made(aws_sources, aws, cluster, heeds_advice=heeds, notice_s=50.0)
        assert agent.once() is (True if heeds else None)
    assert [n for n, *_ in cluster.drained] == [MINE.node_id] * heeds


def test_azure_hears_that_the_machine_is_ready_once_its_nodes_have_ended(caplog):
    caplog.set_level(logging.INFO)
    cluster = Cluster(MINE)
    with AzureService() as azure, Running(made(azure_sources, azure, cluster)):
        azure.schedule("event-1", "Preempt", formatdate(time.time() + 60, usegmt=True))
        until(lambda: cluster.drained)
        time.sleep(0.2)
        assert azure.acknowledged == []  # its workers are still at it
        cluster.nodes.clear()
        until(lambda: azure.acknowledged == ["event-1"])
    assert "has ended" in caplog.text


def test_a_head_that_is_away_for_a_moment_is_asked_again():
    cluster = Cluster(MINE)
    cluster.away = 3
    agent = NodeAgent((), cluster, nodes_here)
    with Running(agent) as running:
        agent.terminate(20.0)
        until(lambda: cluster.drained)
        cluster.nodes.clear()
        running.thread.join(10)
    assert running.drained_all is True


def test_a_sigterm_drains_within_the_grace_and_ends_when_the_nodes_have_ended():
    cluster = Cluster(MINE, OTHER)
    agent = NodeAgent((), cluster, nodes_here)
    with Running(agent) as running:
        began = time.time()
        agent.terminate(20.0)
        until(lambda: cluster.drained)
        assert running.thread.is_alive()  # it holds its pod until Ray is done
        cluster.nodes.remove(MINE)
        running.thread.join(10)
    ((node_id, reason, deadline_ms),) = cluster.drained
    assert (node_id, running.drained_all) == (MINE.node_id, True)
    assert "SIGTERM" in reason
    assert began + 19 < deadline_ms / 1000 < time.time() + 20


def test_a_drain_that_nobody_took_note_of_by_the_deadline_is_a_failure():
    cluster = Cluster(MINE)
    cluster.away = 10**6
    agent = NodeAgent((), cluster, nodes_here)
    with Running(agent) as running:
        agent.terminate(1.0)
        running.thread.join(10)
    assert running.drained_all is False
    assert cluster.drained == []


def test_an_agent_that_is_replaced_drains_nothing():
    cluster = Cluster(MINE)
    agent = NodeAgent((), cluster, nodes_here)
    with Running(agent) as running:
        agent.terminate(None)
        running.thread.join(10)
    assert (running.drained_all, cluster.drained) == (True, [])


def test_which_nodes_are_this_machine_s():
    nodes = [MINE, OTHER]
    assert nodes_here(nodes) == [MINE]
    assert nodes_here(nodes, ["192.0.2.7"]) == [OTHER]
    assert nodes_here(nodes, (), {"machine": "m7"}) == [OTHER]
    assert nodes_here(nodes, (), {"machine": "m8"}) == []
    assert is_own_address("127.0.0.1")
    assert not is_own_address("192.0.2.7")


def test_a_notice_that_finds_none_of_its_nodes_says_so_once_and_drains_those_that_come(caplog):
    caplog.set_level(logging.WARNING)
    cluster = Cluster(OTHER)
    with AwsService() as aws:
        aws.say(ACTION_PATH, spot_action(100))
        agent = made(aws_sources, aws, cluster)
        with pytest.raises(NodeError, match=r"AWS spot.*no Ray node of the 1 .*192\.0\.2\.7.*--node-label"):
            agent.once()
        assert cluster.drained == []
        with Running(made(aws_sources, aws, cluster)):
            until(lambda: "--node-address" in caplog.text)
            time.sleep(0.2)
            assert caplog.text.count("--node-address") == 1
            cluster.nodes.append(MINE)
            until(lambda: cluster.drained)
    assert [n for n, *_ in cluster.drained] == [MINE.node_id]
