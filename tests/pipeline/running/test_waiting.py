"""Why workers do not come: what the log says for each state of nodes and autoscaler, in messages of Ray's own."""

from ray.core.generated.autoscaler_pb2 import AutoscalingState

from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.waiting import reason, why_waiting

GPU = PoolOptions(0, 4, cpus_per_worker=1, gpus_per_worker=1)
SPOT = PoolOptions(0, 4, 1, 1, selectors=({"market": "spot"}, {"market": "on-demand"}))


def node(gpus, **labels):
    return {"Resources": {"CPU": 2.0, "GPU": float(gpus)}, "Labels": labels}


def test_nodes_on_their_way_are_counted_by_type():
    scaler = AutoscalingState()
    scaler.pending_instance_requests.add(ray_node_type_name="spot", count=3)
    scaler.pending_instances.add(ray_node_type_name="spot")
    scaler.pending_instances.add(ray_node_type_name="on-demand")
    assert reason(GPU, [], scaler) == "nodes on their way: 1 on-demand, 4 spot"


def test_the_last_node_that_did_not_start_is_named_with_its_reason():
    scaler = AutoscalingState()
    scaler.failed_instance_requests.add(ray_node_type_name="spot", count=1, reason="no capacity", failed_ts=2)
    scaler.failed_instance_requests.add(ray_node_type_name="other", count=1, reason="quota", failed_ts=1)
    assert reason(GPU, [], scaler) == "the cluster's autoscaler could not start spot (no capacity)"


def test_what_no_node_type_has():
    scaler = AutoscalingState()
    scaler.infeasible_resource_requests.add(resources_bundle={"CPU": 1, "GPU": 1})
    assert reason(GPU, [node(0)], scaler) == "the cluster's autoscaler has no node type with 1 CPU and 1 GPU"


def test_nodes_that_others_hold():
    assert (
        reason(GPU, [node(1), node(0)], AutoscalingState()) == "all nodes with 1 CPU and 1 GPU are taken: 1"
    )


def test_no_node_that_fits_by_resources_or_labels():
    expected = "no node has 1 CPU and 1 GPU, and none is on its way"
    assert reason(GPU, [node(0)], AutoscalingState()) == expected
    said = reason(SPOT, [node(1), node(1, market="reserved")], AutoscalingState())
    assert said == "no node has 1 CPU and 1 GPU and market=spot or market=on-demand, and none is on its way"
    assert reason(SPOT, [node(1, market="on-demand")], AutoscalingState()).endswith("are taken: 1")


def test_where_nobody_can_be_asked_nothing_is_said():
    assert why_waiting(GPU) == ""
