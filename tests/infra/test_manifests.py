"""Kubernetes manifests: right as rendered, and any misspelt field, wrong type or broken rule is noticed."""

from __future__ import annotations

import random

import pytest
from support.manifests import ray_rules, safety_rules
from support.manifests.documents import (
    OVERLAYS,
    changed,
    kubectl_missing,
    name_of,
    places,
    render,
    spoilt,
)

schemas = pytest.importorskip("support.manifests.schemas", reason="kubernetes-validate is not installed")

pytestmark = [
    pytest.mark.skipif(bool(kubectl_missing()), reason=kubectl_missing() or ""),
    pytest.mark.long,
]
#: Mutants tried of each distinct document; all of them take minutes.
MUTANTS = 100


def faults(document) -> list[str]:
    return schemas.faults(document) or [*safety_rules.faults(document), *ray_rules.faults(document)]


def documents() -> dict[str, dict]:
    """Every distinct document of all overlays, by overlay and name."""
    found: dict[str, dict] = {}
    for overlay in OVERLAYS:
        for document in render(overlay):
            if document not in found.values():
                found[f"{overlay}/{name_of(document)}"] = document
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_right_in_every_document_and_as_a_whole(overlay):
    rendered = render(overlay)
    assert {name_of(d): faults(d) for d in rendered if faults(d)} == {}
    assert safety_rules.set_faults(rendered) == []
    kinds = [d["kind"] for d in rendered]
    assert sum(kind in ("RayCluster", "RayJob", "RayCronJob") for kind in kinds) == 1


def test_a_misspelt_field_or_a_wrong_type_is_noticed_in_every_document():
    missed = []
    for name, document in documents().items():
        everywhere = [place for place, _ in places(document)]
        mutants = [(place, how) for place in everywhere for how in ("misspelt", "of another type")]
        mutants = [(place, how) for place, how in mutants if how != "misspelt" or isinstance(place[-1], str)]
        chosen = random.Random(name).sample(mutants, min(MUTANTS, len(mutants)))
        missed += [
            (name, *mutant)
            for mutant in chosen
            if not schemas.faults(wrong := spoilt(document, *mutant)) and not safety_rules.faults(wrong)
        ]
    assert missed == []


JOB, CLUSTER = "job-nvidia-gke-spot", "cluster-nvidia-gke-spot"
GROUP = "workerGroupSpecs.0"
RULES = [
    (JOB, "metadata.name", "Millijoule"),
    (JOB, "spec.shutdownAfterJobFinishes", False),
    (JOB, "spec.rayClusterSpec", ...),
    (JOB, "spec.submissionMode", "SidecarMode"),
    (JOB, "spec.submissionMode", "InteractiveMode"),
    (JOB, "spec.preRunningDeadlineSeconds", 0),
    (JOB, "spec.backoffLimit", -1),
    (JOB, "spec.runtimeEnvYAML", "- a"),
    (JOB, "spec.clusterSelector", {"ray.io/cluster": "millijoule"}),
    (
        JOB,
        "spec.deletionStrategy",
        {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]},
    ),
    (JOB, "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True),
    (CLUSTER, "spec.rayVersion", "2.51.0"),
    (CLUSTER, "spec.rayVersion", "2.55.0"),
    (CLUSTER, "spec.autoscalerOptions.version", "v1"),
    (CLUSTER, "spec.enableInTreeAutoscaling", False),
    (CLUSTER, "spec.headGroupSpec.resources", {"CPU": "0"}),
    (CLUSTER, "spec.headGroupSpec.rayStartParams.redis-password", "a"),
    (CLUSTER, "spec.headGroupSpec.template.spec.restartPolicy", "Always"),
    (CLUSTER, "spec.headGroupSpec.template.spec.containers.0.env.0.name", "RAY_REDIS_ADDRESS"),
    (CLUSTER, "spec.headGroupSpec.template.spec.containers.0.env.0.name", "RAY_enable_autoscaler_v2"),
    (CLUSTER, "spec.gcsFaultToleranceOptions.backend", "rocksdb"),
    (CLUSTER, "spec.gcsFaultToleranceOptions.storage", {"size": "1Gi"}),
    (CLUSTER, f"spec.{GROUP}.suspend", True),
    (CLUSTER, f"spec.{GROUP}.minReplicas", 65),
    (CLUSTER, f"spec.{GROUP}.rayStartParams.labels", "a=b"),
    (CLUSTER, f"spec.{GROUP}.labels", {"ray.io/market-type": "-spot"}),
    (CLUSTER, f"spec.{GROUP}.template.spec.restartPolicy", "OnFailure"),
    (CLUSTER, f"spec.{GROUP}.idleTimeoutSeconds", -1),
    ("nightly-nvidia-gke-spot", "spec.schedule", "TZ=UTC 1 0 * * *"),
    ("nightly-nvidia-gke-spot", "metadata.name", "m" * 37),
    ("queued-nvidia", "spec.shutdownAfterJobFinishes", False),
    ("queued-nvidia", "spec.rayClusterSpec.enableInTreeAutoscaling", True),
    ("queued-nvidia", f"spec.rayClusterSpec.{GROUP}.groupName", "head"),
]


@pytest.mark.parametrize(("overlay", "place", "value"), RULES)
def test_what_rays_operator_refuses_is_noticed(overlay, place, value):
    (document,) = (d for d in render(overlay) if d["kind"] in ("RayCluster", "RayJob", "RayCronJob"))
    assert ray_rules.faults(document) == []
    assert ray_rules.faults(changed(document, place, value)) != []


POD = "spec.workerGroupSpecs.0.template.spec"
UNSAFE = [
    (f"{POD}.securityContext.runAsNonRoot", False),
    (f"{POD}.securityContext.runAsUser", 0),
    (f"{POD}.securityContext.seccompProfile", {"type": "Unconfined"}),
    (f"{POD}.hostNetwork", True),
    (f"{POD}.terminationGracePeriodSeconds", 10),
    (f"{POD}.automountServiceAccountToken", True),
    (f"{POD}.enableServiceLinks", ...),
    (f"{POD}.volumes.0", {"name": "scratch", "hostPath": {"path": "/"}}),
    (f"{POD}.containers.0.securityContext.readOnlyRootFilesystem", False),
    (f"{POD}.containers.0.securityContext.allowPrivilegeEscalation", True),
    (f"{POD}.containers.0.securityContext.capabilities", {"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
    (f"{POD}.containers.0.resources.limits", ...),
    (f"{POD}.containers.0.resources.requests.memory", "1Ti"),
    (f"{POD}.containers.0.resources.limits.nvidia~com/gpus", "1"),
    (f"{POD}.containers.0.image", "millijoule:latest"),
    (f"{POD}.containers.0.env.0", {"name": "AWS_SECRET_ACCESS_KEY", "value": "a"}),
    (f"{POD}.containers.0.volumeMounts.0.mountPath", "/elsewhere"),
    (f"{POD}.nodeSelector.cloud~google~com/gke-spots", "true"),
    ("spec.workerGroupSpecs.0.rayStartParams.object-store-memori", "1"),
    ("spec.autoscalerOptions.securityContext.readOnlyRootFilesystem", False),
]


@pytest.mark.parametrize(("place", "value"), UNSAFE)
def test_what_an_operator_would_refuse_is_noticed(place, value):
    (document,) = (d for d in render(CLUSTER) if d["kind"] == "RayCluster")
    assert safety_rules.faults(document) == []
    assert safety_rules.faults(changed(document, place, value)) != []


def test_a_selector_that_selects_nothing_and_an_account_that_is_not_there_are_noticed():
    rendered = render(CLUSTER)
    without = [d for d in rendered if d["kind"] != "ServiceAccount"]
    assert safety_rules.set_faults(without) != []
    (budget,) = (d for d in rendered if d["kind"] == "PodDisruptionBudget")
    wrong = changed(budget, "spec.selector.matchLabels", {"ray.io/node-type": "heads"})
    assert safety_rules.set_faults([wrong if d is budget else d for d in rendered]) != []


def test_spot_pods_of_gke_end_within_what_it_gives_them():
    (cluster,) = (d for d in render(CLUSTER) if d["kind"] == "RayCluster")
    spot, on_demand = cluster["spec"]["workerGroupSpecs"]
    assert spot["template"]["spec"]["terminationGracePeriodSeconds"] <= 25
    assert spot["priority"] > on_demand["priority"]
    assert spot["minReplicas"] == on_demand["minReplicas"] == 0
