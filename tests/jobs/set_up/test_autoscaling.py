"""What is made of the things a Ray cluster says about nodes that may come."""

import json

import pytest
from ray.core.generated.autoscaler_pb2 import ClusterConfig, GetClusterStatusReply
from support.ray_stand_in import RayStandIn

from millijoule.jobs.set_up import autoscaling
from millijoule.jobs.set_up.autoscaling import answer, from_node_groups, scales_by_version_1
from millijoule.pipeline.fleet.room import how_many

WORKER = {"CPU": 1.0, "GPU": 1.0}


def status(
    version: int, *, seen: int, pending=(), infeasible=(), launching: dict[str, int] | None = None
) -> GetClusterStatusReply:
    """The cluster's state `version`, and what the autoscaler made of version `seen`."""
    reply = GetClusterStatusReply()
    reply.cluster_resource_state.cluster_resource_state_version = version
    reply.autoscaling_state.last_seen_cluster_resource_state_version = seen
    for bundle in pending:
        entry = reply.cluster_resource_state.pending_resource_requests.add(count=1)
        entry.request.resources_bundle.update(bundle)
    for bundle in infeasible:
        reply.autoscaling_state.infeasible_resource_requests.add().resources_bundle.update(bundle)
    for name, count in (launching or {}).items():
        reply.autoscaling_state.pending_instance_requests.add(ray_node_type_name=name, count=count)
    return reply


@pytest.fixture
def ask(monkeypatch):
    """`ask(*replies)`: what becomes of a request while the cluster says one after another, the last for ever."""
    monkeypatch.setattr(autoscaling, "time", RayStandIn(make=None).time)

    def answered(*replies, placed=lambda: False):
        left = list(replies)
        return answer(lambda: left.pop(0) if len(left) > 1 else left[0], WORKER, placed)

    return answered


def test_only_an_autoscaler_that_has_seen_the_request_has_answered(ask):
    unseen = status(8, seen=6, pending=[WORKER])
    assert ask(status(7, seen=6), unseen).may_come is None
    assert ask(status(7, seen=6), unseen, status(9, seen=8, pending=[WORKER])).may_come is True
    refused = status(9, seen=8, pending=[WORKER], infeasible=[WORKER])
    assert ask(status(7, seen=6), unseen, refused).may_come is False


def test_an_older_refusal_of_something_else_is_not_ours(ask):
    other = {"GPU": 8.0}
    said = ask(status(7, seen=7), status(9, seen=9, pending=[WORKER, other], infeasible=[other]))
    assert said.may_come is True


def test_the_node_type_that_is_started_for_it_is_named(ask):
    before = status(7, seen=7, launching={"cpu-worker": 1})
    after = status(9, seen=9, pending=[WORKER], launching={"cpu-worker": 1, "gpu-spot": 1})
    assert "node type gpu-spot with room for 1 CPU and 1 GPU may come" in ask(before, after).why


def test_a_request_that_found_its_place_needs_no_answer(ask):
    assert ask(status(7, seen=6), placed=lambda: True).may_come is True


def node_groups(*groups: tuple[str, dict[str, int], int], **most: int) -> ClusterConfig:
    config = ClusterConfig(max_resources=most)
    for name, resources, count in groups:
        config.node_group_configs.add(name=name, resources=resources, max_count=count)
    return config


def test_reported_node_groups_say_which_may_come_and_how_many_workers_they_hold():
    head, cpu = ("head", {"CPU": 4}, 1), ("cpu", {"CPU": 8}, 5)
    small, big = ("small", {"CPU": 4, "GPU": 1}, 3), ("big", {"CPU": 16, "GPU": 4}, 2)
    assert from_node_groups(node_groups(head, cpu), WORKER).may_come is False
    both = from_node_groups(node_groups(head, cpu, small, big), WORKER)
    assert (both.may_come, both.most) == (True, 3 * 1 + 2 * 4)
    assert "small" in both.why
    assert "big" in both.why
    assert from_node_groups(node_groups(small, big), {"CPU": 1.0, "GPU": 2.0}).most == 2 * 2
    assert from_node_groups(node_groups(small, big), {"CPU": 16.0, "GPU": 1.0}).most == 2
    assert from_node_groups(node_groups(small, big), {"GPU": 8.0}).may_come is False
    assert from_node_groups(node_groups(small, big, GPU=6), WORKER).most == 6
    assert from_node_groups(node_groups(("any", {"CPU": 4, "GPU": 1}, -1)), WORKER).most is None
    assert from_node_groups(node_groups(("none", {"CPU": 4, "GPU": 1}, 0)), WORKER).may_come is False


def test_version_1_is_told_from_an_onlooker():
    def said(*types: str) -> bytes:
        return json.dumps({"autoscaler_report": {"active_nodes": dict.fromkeys(types, 1)}}).encode()

    assert scales_by_version_1(said("ray.head.default"))
    assert not scales_by_version_1(said("node_7d9b1488", "node_2fea5f08"))
    for nothing in (None, b"", b"{}", b"no json", b"[]", b'{"autoscaler_report": null}'):
        assert not scales_by_version_1(nothing)


def test_workers_that_fit_a_node():
    assert how_many({"CPU": 8, "GPU": 4}, {"CPU": 1, "GPU": 0.5}) == 8
    assert how_many({"CPU": 2, "GPU": 4}, {"CPU": 1, "GPU": 1}) == 2
    assert how_many({"CPU": 8}, {"CPU": 1, "GPU": 1}) == 0
    assert how_many({"CPU": 8}, {"CPU": 1, "GPU": 0}) == 8
