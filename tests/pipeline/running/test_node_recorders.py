"""Recorders follow the workers: one per machine, restarted when they die, released with the last worker. Ray is stood in for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from millijoule.pipeline.running import node_recorders
from millijoule.pipeline.running.node_recorders import (
    MAX_STARTS,
    RELEASE_AFTER_S,
    TAKE_PERIOD_S,
    NodeRecorders,
)
from millijoule.workers.lease import Node
from millijoule.workers.node_meters.actor import NodeMeterActor, NodeRecorderReady
from millijoule.workers.node_meters.config import NodeMeterConfig
from millijoule.workers.node_meters.meter import NodeFailure, NodeReading

IPMI = NodeMeterConfig(("*",), "ipmi")
ONE_CHASSIS = NodeMeterConfig(("*",), "redfish", "https://bmc/redfish/v1/Chassis/1")


class Call:
    """A future whose answer is known, or comes later."""

    def __init__(self, answer=None, ready=True):
        self.answer, self.ready = answer, ready


class Actor:
    """What `handle.method.remote()` needs; methods answer with what `answers` gives."""

    def __init__(self, **answers):
        self.answers, self.calls, self.killed = answers, [], False

    def __getattr__(self, method):
        def remote():
            self.calls.append(method)
            answer = self.answers[method]
            return answer if isinstance(answer, Call) else Call(answer() if callable(answer) else answer)

        return SimpleNamespace(remote=remote)


def reading(t):
    return NodeReading("ipmi-dcmi-power", "power", t, 500_000, 1000)


class World:
    """A cluster by hand: nodes, workers, a clock; `rows` is what was recorded."""

    def __init__(self, monkeypatch, *configs):
        self.now, self.rows, self.recorders, self.workers, self.boots = 0.0, [], [], {}, {}
        self.ready = lambda node: NodeRecorderReady(self.boots.get(node, f"boot-{node}"), ("cpu:0",))
        self.takes = lambda node: (reading(len(self.rows) + 1),)

        def get(call):
            if isinstance(call.answer, Exception):
                raise call.answer
            return call.answer

        fake = SimpleNamespace(
            wait=lambda calls, num_returns, timeout: ([c for c in calls if c.ready], []),
            get=get,
            kill=lambda actor: setattr(actor, "killed", True),
            nodes=list,
        )
        monkeypatch.setattr(node_recorders, "ray", fake)
        monkeypatch.setattr(node_recorders, "remote_node_recorder", self.start)
        self.tested = NodeRecorders(configs, self.record, lambda: self.now)

    def record(self, rows):
        self.rows += rows

    def start(self, node_id, config):
        actor = Actor(
            start=lambda: self.ready(node_id),
            take=lambda: self.takes(node_id),
            stop=lambda: self.takes(node_id),
        )
        self.recorders.append((node_id, actor))
        return actor

    def worker(self, name, node_id, host=None):
        self.workers[name] = Node(node_id, host or node_id)

    def run(self, seconds=3 * node_recorders.TICK_S):
        end = self.now + seconds
        while self.now < end:
            self.now += node_recorders.TICK_S
            self.tested.tick(self.workers.values())

    def running(self):
        return [node for node, actor in self.recorders if not actor.killed]


@pytest.fixture
def world(monkeypatch):
    return lambda *configs: World(monkeypatch, *(configs or (IPMI,)))


def test_a_node_has_one_recorder_however_many_workers(world):
    w = world()
    w.worker("w1", "n1")
    w.worker("w2", "n1")
    w.run()
    w.worker("w3", "n2")
    w.run(2 * TAKE_PERIOD_S)
    assert w.running() == ["n1", "n2"]
    assert {(r[0], r[1], r[2], r[3]) for r in w.rows} == {
        ("n1", "n1", "boot-n1", "ipmi"),
        ("n2", "n2", "boot-n2", "ipmi"),
    }
    assert len(w.rows) == sum(actor.calls.count("take") for _, actor in w.recorders)


def test_readings_are_taken_at_the_end_too_and_the_last_one_after_all(world):
    w = world()
    w.worker("w1", "n1")
    w.run()
    n = len(w.rows)
    w.tested.close()
    assert len(w.rows) == n + 2
    assert w.recorders[0][1].calls[-2:] == ["take", "stop"]
    assert w.running() == []


def test_an_end_that_must_not_wait_takes_only_what_is_there(world):
    w = world()
    w.worker("w1", "n1")
    w.run()
    w.tested.close(wait=False)
    assert "stop" not in w.recorders[0][1].calls
    assert w.running() == []


def test_a_node_without_workers_is_released_but_not_at_once(world):
    w = world()
    w.worker("w1", "n1")
    w.run()
    del w.workers["w1"]
    w.run(RELEASE_AFTER_S - 5)
    assert w.running() == ["n1"]
    w.run(10)
    assert w.running() == []
    w.worker("w2", "n1")
    w.run()
    assert w.running() == ["n1"]


def test_recorders_started_ahead_are_released_where_nobody_comes(world):
    w = world()
    w.tested.start([Node("n1", "h1"), Node("n2", "h2")])
    w.worker("w1", "n1")
    w.run(RELEASE_AFTER_S + 5)
    assert w.running() == ["n1"]
    assert len(w.recorders) == 2


def test_two_nodes_of_one_machine_have_one_recorder_and_the_other_takes_over(world):
    w = world()
    w.boots = {"pod-a": "b", "pod-b": "b"}
    w.worker("w1", "pod-a")
    w.worker("w2", "pod-b")
    w.run()
    assert w.running() == ["pod-a"]
    del w.workers["w1"]
    w.run(RELEASE_AFTER_S + 5)
    assert w.running() == ["pod-b"]


def test_one_chassis_cannot_be_two_nodes(world, caplog):
    w = world(ONE_CHASSIS)
    w.worker("w1", "n1")
    w.worker("w2", "n2")
    w.run()
    assert w.running() == ["n1"]
    assert caplog.text.count("one chassis cannot be two nodes") == 1
    assert [r[0] for r in w.rows if r[-1]] == ["n2"]


def test_a_recorder_that_dies_is_started_again_a_few_times(world, caplog):
    w = world()
    w.takes = lambda node: RayActorError()
    w.worker("w1", "n1")
    w.run(20 * TAKE_PERIOD_S)
    assert len(w.recorders) == MAX_STARTS
    assert w.running() == []
    assert caplog.text.count("its recorder ended") == 1
    w.tested.close()


def test_a_meter_that_cannot_be_opened_is_a_row_and_one_warning(world, caplog):
    w = world()
    w.ready = lambda node: NodeRecorderReady("boot", (), "environment variable BMC is not set")
    w.worker("w1", "n1")
    w.run(60)
    assert [r[-1] for r in w.rows] == ["environment variable BMC is not set"]
    assert caplog.text.count("BMC is not set") == 1
    assert len(w.recorders) == 1


def test_a_failure_that_goes_on_is_said_once(world, caplog):
    w = world()
    w.takes = lambda node: (NodeFailure(1, "HTTP 500"),)
    w.worker("w1", "n1")
    w.run(60)
    assert caplog.text.count("HTTP 500; its energy is missing") == 1


def test_a_recorder_that_does_not_answer_holds_nothing_up(world):
    w = world()
    hanging = Call(ready=False)
    w.takes = lambda node: (reading(1),)
    w.worker("w1", "n1")
    w.run()
    w.recorders[0][1].answers["take"] = hanging
    w.run(60)
    assert w.recorders[0][1].calls.count("take") == 2  # not one more on top of another
    w.tested.close()
    assert w.running() == []


def test_a_node_without_a_named_meter_is_said_once_and_has_no_recorder(world, caplog):
    w = world(NodeMeterConfig(("gpu-*",), "ipmi"))
    w.worker("w1", "n1", "cpu-1")
    w.worker("w2", "n2", "gpu-1")
    w.run(60)
    assert w.running() == ["n2"]
    assert caplog.text.count("no meter is named for this node") == 1


def test_without_meters_nobody_is_asked_anything(monkeypatch):
    w = World(monkeypatch)
    w.tested.start([Node("n1", "h1")])
    w.worker("w1", "n1")
    w.run()
    w.tested.close()
    assert w.recorders == []


# --- the actor, without Ray --------------------------------------------------------------------------------------------


@pytest.fixture
def actor(monkeypatch):
    monkeypatch.setattr("millijoule.workers.node_meters.actor.exit_with_parent", lambda: None)
    monkeypatch.setattr("millijoule.workers.node_meters.actor.node_domains", lambda: ("cpu:package-0",))
    return NodeMeterActor


def test_an_actor_without_its_password_says_so_and_answers(actor, monkeypatch):
    monkeypatch.delenv("BMC", raising=False)
    made = actor(
        NodeMeterConfig(
            ("*",), "redfish", "https://b/redfish/v1/Chassis/1", user_variable="BMC", password_variable="BMC"
        )
    )
    ready = made.start()
    assert "BMC is not set" in ready.failure
    assert (made.take(), made.stop()) == ((), ())


def test_an_actor_reads_until_it_is_stopped(actor, tmp_path, monkeypatch):
    tool = tmp_path / "ipmitool"
    tool.write_text("#!/bin/sh\necho 'Instantaneous power reading : 655 Watts'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    made = actor(NodeMeterConfig(("*",), "ipmi", period_s=600))
    assert made.start().failure == ""
    readings = [*made.take(), *made.stop()]
    assert [r.value for r in readings] == [655_000] * 2  # the first and the last
