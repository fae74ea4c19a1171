"""Who may reach what, and who may ask Kubernetes for what: network policies and accounts, as rendered."""

from __future__ import annotations

import functools
import json

import pytest
from support.manifests.documents import SETS, changed, kubectl_missing, pod_templates, render
from support.manifests.network import Address, Pod, allowed
from support.tools import needs

pytestmark = [needs(kubectl_missing()), pytest.mark.long]
OURS = {"app.kubernetes.io/part-of": "millijoule"}
RAY = OURS | {"ray.io/is-ray-node": "yes"}


def ours(**labels: str) -> Pod:
    component = {"app.kubernetes.io/component": labels["component"]} if "component" in labels else {}
    node = RAY | {"ray.io/node-type": labels["node"]} if "node" in labels else OURS
    return Pod("millijoule", node | component)


HEAD, WORKER = ours(node="head", component="head"), ours(node="worker", component="worker")
SUBMITTER, AGENT, REDIS = (ours(component=name) for name in ("submitter", "node-agent", "redis"))
CLEANUP = Pod("millijoule", {"ray.io/node-type": "redis-cleanup"})
OPERATOR = Pod("kuberay", {"app.kubernetes.io/name": "kuberay-operator"})
PROMETHEUS = Pod("monitoring", {"app.kubernetes.io/name": "prometheus"})
DNS = Pod("kube-system", {"k8s-app": "kube-dns"})
#: Somebody else's: in another namespace, and one that got into this one; with the labels of a Ray node and without.
STRANGERS = [
    Pod("other", {}),
    Pod("other", RAY | {"ray.io/node-type": "head"}),
    Pod("millijoule", {}),
    Pod("millijoule", {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}),
    Pod("monitoring-of-others", {"app.kubernetes.io/name": "prometheus"}),
]
STORE, METADATA, GKE_METADATA = (
    Address("52.219.170.1"),
    Address("169.254.169.254"),
    Address("169.254.169.252"),
)
GCS, DASHBOARD, CLIENT, METRICS = 6379, 8265, 10001, 8080

EVERYWHERE = [
    # source, target, port, does it get through
    *((HEAD, WORKER, port, True) for port in (GCS, METRICS, 10002, 19999)),
    *((WORKER, HEAD, port, True) for port in (GCS, DASHBOARD, 10002)),
    (WORKER, WORKER, 15000, True),
    *((SUBMITTER, HEAD, port, port == DASHBOARD) for port in (GCS, DASHBOARD, CLIENT, METRICS)),
    (SUBMITTER, WORKER, 10002, False),
    *((OPERATOR, HEAD, port, port == DASHBOARD) for port in (GCS, DASHBOARD, CLIENT, METRICS)),
    (OPERATOR, WORKER, GCS, False),
    *((PROMETHEUS, pod, METRICS, True) for pod in (HEAD, WORKER)),
    *((PROMETHEUS, HEAD, port, False) for port in (GCS, DASHBOARD, CLIENT)),
    *(
        (stranger, pod, port, False)
        for stranger in STRANGERS
        for pod in (HEAD, WORKER)
        for port in (GCS, DASHBOARD, CLIENT, METRICS, 15000)
    ),
    # TLS goes anywhere, as nobody knows the store's addresses; nothing else does
    *(
        (pod, stranger, port, port == 443 and stranger.namespace != "millijoule")
        for stranger in STRANGERS
        for pod in (HEAD, WORKER)
        for port in (22, 80, 443)
    ),
    *(
        (pod, STORE, port, port in (443, 6443))
        for pod in (HEAD, WORKER)
        for port in (22, 80, 443, 6443, 9000)
    ),
    *((pod, DNS, 53, True) for pod in (HEAD, WORKER, SUBMITTER)),
    (WORKER, DNS, 9153, False),
    (STORE, HEAD, DASHBOARD, False),
]


@functools.cache
def surprises(policies: str) -> list:
    """Cases that come out otherwise. Most sets have the same policies."""
    told = json.loads(policies)
    return [case for case in EVERYWHERE if allowed(told, *case[:3]) is not case[3]]


def policies_of(documents) -> str:
    return json.dumps([d for d in documents if d["kind"] == "NetworkPolicy"], sort_keys=True)


@pytest.mark.parametrize("overlay", SETS)
def test_ray_talks_to_itself_and_nobody_else_to_it_but_who_has_to(overlay):
    assert surprises(policies_of(render(overlay))) == []


@pytest.mark.parametrize("overlay", SETS)
def test_the_clouds_identity_of_a_machine_is_out_of_reach_but_where_it_is_the_pods_own(overlay):
    rendered, gke = render(overlay), "gke" in overlay or overlay == "embedded-head"
    for pod in (HEAD, WORKER):
        assert allowed(rendered, pod, METADATA, 80) is gke
        assert allowed(rendered, pod, GKE_METADATA, 988) is gke
        assert not allowed(rendered, pod, METADATA, 443)
    assert not allowed(rendered, SUBMITTER, METADATA, 80)


def test_redis_is_for_the_head_and_for_who_empties_it():
    for overlay in ("cluster-cpu", "cluster-nvidia", "cluster-nvidia-eks-spot", "cluster-nvidia-gke-spot"):
        rendered = render(overlay)
        assert allowed(rendered, HEAD, REDIS, GCS)
        assert allowed(rendered, CLEANUP, REDIS, GCS)
        others = [WORKER, SUBMITTER, AGENT, OPERATOR, PROMETHEUS, STORE, *STRANGERS]
        assert [pod for pod in others if allowed(rendered, pod, REDIS, GCS)] == []
        assert not allowed(rendered, REDIS, Pod("other", {}), 80)


def test_a_node_agent_hears_the_cloud_and_drains_by_the_head_and_nothing_else():
    rendered = render("cluster-nvidia-eks-spot")
    assert allowed(rendered, AGENT, METADATA, 80)
    assert allowed(rendered, AGENT, HEAD, GCS)
    assert not allowed(rendered, AGENT, HEAD, DASHBOARD)
    assert not allowed(rendered, AGENT, WORKER, GCS)
    assert not any(allowed(rendered, pod, AGENT, 80) for pod in (HEAD, WORKER, PROMETHEUS, *STRANGERS))


def test_without_a_policy_strangers_get_in_and_it_is_noticed():
    """What the tests above would say of a set that lacks a policy, or of one that selects more than it should."""
    rendered = render("cluster-nvidia-eks-spot")
    policies = {d["metadata"]["name"]: d for d in rendered if d["kind"] == "NetworkPolicy"}
    seen = {}
    for name, policy in policies.items():
        seen[name] = surprises(policies_of(d for d in rendered if d is not policy))
    of_components = {
        "millijoule-redis",
        "millijoule-redis-clients",
        "millijoule-node-agent",
        "millijoule-head-from-node-agents",
    }
    # the pods of a cluster are closed twice, by the policy of all pods and by their own
    assert {name for name, found in seen.items() if not found} <= of_components | {"millijoule-deny"}
    bare = [d for d in rendered if d["metadata"]["name"] != "millijoule-deny"]
    assert allowed(bare, STRANGERS[0], SUBMITTER, 80)
    assert not allowed(rendered, STRANGERS[0], SUBMITTER, 80)
    for name, place in (
        ("millijoule-ray", "spec.ingress.0.from"),
        ("millijoule-metrics", "spec.ingress.0.ports"),
    ):
        open_ = changed(policies[name], place)
        wider = [open_ if d is policies[name] else d for d in rendered]
        assert [case for case in EVERYWHERE if allowed(wider, *case[:3]) and not case[3]] != []


#: Kinds that a set may have. None of them grants anything: KubeRay makes the head's role itself.
KINDS = {
    *(
        "Namespace",
        "ServiceAccount",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
        "StatefulSet",
        "DaemonSet",
    ),
    *("RayCluster", "RayJob", "RayCronJob", "ClusterQueue", "LocalQueue", "ResourceFlavor"),
}


@pytest.mark.parametrize("overlay", SETS)
def test_only_the_head_may_ask_kubernetes_and_nothing_here_grants_more(overlay):
    rendered = render(overlay)
    assert {d["kind"] for d in rendered} <= KINDS
    accounts = {d["metadata"]["name"]: d for d in rendered if d["kind"] == "ServiceAccount"}
    assert set(accounts) == {"millijoule-head", "millijoule-worker"}
    assert accounts["millijoule-worker"]["automountServiceAccountToken"] is False
    for document in rendered:
        for place, template in pod_templates(document):
            spec = template["spec"]
            head = "headGroupSpec" in place
            assert (spec.get("serviceAccountName") == "millijoule-head") is head
            assert head or spec["automountServiceAccountToken"] is False
            # no token is put in by another way
            assert not any("projected" in volume for volume in spec.get("volumes", []))
