"""Which nodes get workers: faults cool a node off, repeated ones put it out, work sets it right."""

from millijoule.pipeline.running.node_health import DEATHS_BEFORE_OUT, FAULTS_BEFORE_OUT, NodeHealth
from millijoule.workers.lease import Node


def test_a_node_cools_off_longer_each_time_and_is_out_in_the_end():
    nodes, now, pauses = NodeHealth(), 0.0, []
    for n in range(FAULTS_BEFORE_OUT):
        record = nodes.fault(Node("a", "host"), f"reason {n}", now)
        pauses.append(record.cool_until - now)
        assert nodes.shunned(now) == {"a"}
        assert (nodes.shunned(record.cool_until) == {"a"}) == (n == FAULTS_BEFORE_OUT - 1)
        now = record.cool_until
    assert pauses == [1.0, 2.0, 4.0]
    assert str(nodes.out[0]) == "node host (a): left out for this run: reason 2; reason 1; reason 0"


def test_faults_of_one_wave_count_once():
    nodes = NodeHealth()
    for _ in range(16):
        nodes.fault(Node("a", "host"), "no model", 0.0)
    assert not nodes.out
    assert nodes.faulty[0].faults == 1


def test_work_done_sets_a_node_right_but_its_pauses_go_on_growing():
    nodes, now = NodeHealth(), 0.0
    for n in range(10):
        record = nodes.fault(Node("a", "host"), "one of eight boards", now)
        assert record.cool_until - now == min(60.0, 2.0**n)
        now = record.cool_until
        nodes.worked("a")
    assert not nodes.out
    assert [n.host for n in nodes.faulty] == ["host"]


def test_deaths_are_forgiven_more_often_and_are_no_fault_of_the_node():
    nodes = NodeHealth()
    for _ in range(DEATHS_BEFORE_OUT - 1):
        nodes.death(Node("a", "host"), "killed", 0.0)
    assert not nodes.out
    assert nodes.faulty == []
    nodes.worked("a")
    nodes.death(Node("a", "host"), "killed", 0.0)
    assert not nodes.out


def test_one_bad_node_costs_another_nothing():
    nodes = NodeHealth()
    nodes.fault(Node("a", "host a"), "no model", 0.0)
    nodes.death(Node("b", "host b"), "killed", 0.0)
    assert nodes.shunned(0.1) == {"a", "b"}
    assert nodes.shunned(0.9) == {"a"}
