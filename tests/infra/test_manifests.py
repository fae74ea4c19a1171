"""Kubernetes manifests: right as rendered, and any misspelt field, wrong type or broken rule is noticed."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import yaml
from support.manifests import ray_rules, safety_rules
from support.manifests.documents import (
    KUBERNETES,
    MORE,
    OVERLAYS,
    ROOT,
    SETS,
    changed,
    distinct_fields,
    kubectl_missing,
    name_of,
    places,
    render,
    spoilt,
)
from support.tools import needs

schemas = pytest.importorskip("support.manifests.schemas", reason="kubernetes-validate is not installed")

pytestmark = [needs(kubectl_missing()), pytest.mark.long]
#: What an operator has to be started with for them, as the runbook says.
GATES = {
    "nightly-nvidia-gke-spot": ray_rules.GATES | {"RayCronJob"},
    "embedded-head": ray_rules.GATES | {"GCSFaultToleranceEmbeddedStorage"},
}


def gates(overlay: str) -> frozenset[str]:
    return GATES.get(overlay, ray_rules.GATES)


def of_ray(overlay: str) -> dict:
    (document,) = (d for d in render(overlay) if d["kind"] in ("RayCluster", "RayJob", "RayCronJob"))
    return document


def faults(document, overlay) -> list[str]:
    return schemas.faults(document) or [
        *safety_rules.faults(document),
        *ray_rules.faults(document, gates(overlay)),
    ]


@pytest.mark.parametrize("overlay", SETS)
def test_an_overlay_is_right_in_every_document_and_as_a_whole(overlay):
    rendered = render(overlay)
    assert {name_of(d): found for d in rendered if (found := faults(d, overlay))} == {}
    assert safety_rules.set_faults(rendered) == []
    assert of_ray(overlay)


def test_a_gate_that_the_operator_needs_stands_in_the_runbook():
    runbook = (ROOT / "infra/README.md").read_text()
    for overlay, needed in GATES.items():
        assert ray_rules.faults(of_ray(overlay)) != []
        for gate in needed - ray_rules.GATES:
            assert f"`{gate}=true`" in runbook


def test_every_misspelt_field_and_every_wrong_type_is_noticed():
    """One at a time, every field of every set. No field is left out: names in free maps are held to those that are used."""
    documents = [document for overlay in SETS for document in render(overlay)]
    tried, missed = 0, []
    for document, place in distinct_fields(documents):
        for how in ("misspelt", "of another type"):
            tried += 1
            wrong = spoilt(document, place, how)
            if not schemas.faults(wrong) and not safety_rules.unknown_names(wrong):
                missed.append((document["kind"], place, how))
    assert missed == []
    assert tried > 1900


def uses(folder) -> set:
    """A kustomization's folder and those it builds on."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    below = [(folder / name).resolve() for name in told.get("resources", []) + told.get("components", [])]
    return {folder}.union(*(uses(inner) for inner in below if inner.is_dir()))


def test_every_kustomization_is_rendered_and_every_misspelt_field_of_one_is_noticed(tmp_path):
    for folder in (KUBERNETES, MORE):
        shutil.copytree(folder, tmp_path / folder.relative_to(ROOT))
    user = {}
    for overlay in SETS:
        folder = (KUBERNETES / "overlays" if overlay in OVERLAYS else MORE) / overlay
        folder = tmp_path / folder.relative_to(ROOT)
        user |= dict.fromkeys(uses(folder) - set(user), folder)
    files = {file: yaml.safe_load(file.read_text()) for file in sorted(tmp_path.rglob("kustomization.yaml"))}
    assert [file for file in files if file.parent not in user] == []

    missed, seen = [], set()
    for file, told in files.items():
        for place, _ in places(told):
            alike = tuple("*" if isinstance(key, int) else key for key in place)
            if not isinstance(place[-1], str) or alike in seen:
                continue
            seen.add(alike)
            right = file.read_text()
            file.write_text(yaml.safe_dump(spoilt(told, place, "misspelt")))
            command = ["kubectl", "kustomize", str(user[file.parent])]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                missed.append((file.parent.name, place))
            file.write_text(right)
    assert missed == []


def test_the_kustomization_of_the_runbook_names_its_images_and_command(tmp_path):
    runbook = (ROOT / "infra/README.md").read_text()
    (block,) = re.findall(r"```yaml\n(resources: .*?)```", runbook, re.DOTALL)
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (tmp_path / "mine").mkdir()
    remote = "github.com/OWNER/millijoule/infra/kubernetes/"
    assert remote in block
    (tmp_path / "mine/kustomization.yaml").write_text(block.replace(remote, "../kubernetes/"))
    command = ["kubectl", "kustomize", str(tmp_path / "mine")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (job,) = (d for d in yaml.safe_load_all(done.stdout) if d["kind"] == "RayJob")
    assert job["spec"]["entrypoint"].startswith("millijoule-job generate --prompts s3://b/in.parquet ")
    assert "image: REGISTRY/millijoule:" in done.stdout
    assert "registry.invalid" not in done.stdout


def test_every_group_of_workers_reads_the_processors_energy_where_it_was_asked_for():
    for overlay, expected in (("measured-eks", 2), ("measured-cpu", 1)):
        document = of_ray(overlay)
        groups = document["spec"].get("rayClusterSpec", document["spec"])["workerGroupSpecs"]
        assert len(groups) == expected
        for group in groups:
            pod = group["template"]["spec"]
            (volume,) = (v for v in pod["volumes"] if "hostPath" in v)
            (mount,) = (m for m in pod["containers"][0]["volumeMounts"] if m["name"] == volume["name"])
            assert volume["hostPath"]["path"] == "/sys/devices/virtual/powercap/intel-rapl"
            assert mount == {"name": volume["name"], "mountPath": "/sys/class/powercap", "readOnly": True}
            assert pod["securityContext"]["supplementalGroups"] == [2718]
            # what was there before stays there
            assert {"/scratch", "/tmp/ray", "/dev/shm"} < {
                m["mountPath"] for m in pod["containers"][0]["volumeMounts"]
            }


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
    (CLUSTER, "metadata.annotations", {"ray.io/ft-enabled": "true"}),
    (CLUSTER, "metadata.annotations", {"ray.io/external-storage-namespace": "a"}),
    (CLUSTER, "spec.headGroupSpec.rayStartParams.redis-username", "a"),
    (CLUSTER, "spec.autoscalerOptions.idleTimeoutSeconds", -1),
    (CLUSTER, "spec.networkPolicy", {}),
    (JOB, "spec.deletionStrategy", {}),
    (JOB, "spec.ttlSecondsAfterFinished", -1),
    ("embedded-head", "spec.gcsFaultToleranceOptions.redisAddress", "a:1"),
    ("embedded-head", "spec.gcsFaultToleranceOptions.storage.claimName", "a"),
    ("embedded-head", "spec.headGroupSpec.template.spec.volumes.0.name", "gcs-storage"),
    ("embedded-head", "spec.headGroupSpec.template.spec.containers.0.env.0.name", "RAY_gcs_storage_path"),
    ("nightly-nvidia-gke-spot", "spec.timeZone", "Etc/UCT+1"),
    ("nightly-nvidia-gke-spot", "spec.schedule", "TZ=UTC 1 0 * * *"),
    ("nightly-nvidia-gke-spot", "metadata.name", "m" * 37),
    ("queued-nvidia", "spec.shutdownAfterJobFinishes", False),
    ("queued-nvidia", "spec.rayClusterSpec.enableInTreeAutoscaling", True),
    ("queued-nvidia", f"spec.rayClusterSpec.{GROUP}.groupName", "head"),
]


@pytest.mark.parametrize(("overlay", "place", "value"), RULES)
def test_what_rays_operator_refuses_is_noticed(overlay, place, value):
    document = of_ray(overlay)
    assert ray_rules.faults(document, gates(overlay)) == []
    assert ray_rules.faults(changed(document, place, value), gates(overlay)) != []


def test_a_head_beside_its_submitter_is_not_started_again():
    document = of_ray(JOB)
    for field in ("submitterPodTemplate", "submitterConfig"):
        document = changed(document, f"spec.{field}")
    document = changed(document, "spec.submissionMode", "SidecarMode")
    # the autoscaler asks for the same, so it is not what this is about
    document = changed(document, "spec.rayClusterSpec.autoscalerOptions.version", "v1")
    for number in (0, 1):
        for field in ("priority", "idleTimeoutSeconds"):
            document = changed(document, f"spec.rayClusterSpec.workerGroupSpecs.{number}.{field}")
    assert ray_rules.faults(document) == []
    policy = "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy"
    assert ray_rules.faults(changed(document, policy, "Never")) == []
    for wrong in ("Always", "OnFailure"):
        assert ray_rules.faults(changed(document, policy, wrong)) == [
            "SidecarMode: restartPolicy of the head"
        ]


DELETIONS = [
    ([("DeleteWorkers", 10), ("DeleteCluster", 20), ("DeleteSelf", 20)], True),
    ([("DeleteCluster", 20), ("DeleteWorkers", 30)], False),
    ([("DeleteSelf", 5), ("DeleteCluster", 6)], False),
    ([("DeleteSelf", 5), ("DeleteSelf", 6)], False),
    ([("DeleteSelf", -1)], False),
]


@pytest.mark.parametrize(("rules", "right"), DELETIONS)
def test_rules_of_deletion_need_their_gate_and_an_order(rules, right):
    document = changed(of_ray("queued-nvidia"), "spec.shutdownAfterJobFinishes")
    for field in (
        "spec.ttlSecondsAfterFinished",
        "spec.suspend",
        "metadata.labels.kueue~x-k8s~io/queue-name",
    ):
        document = changed(document, field)
    listed = [
        {"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": after}}
        for policy, after in rules
    ]
    document = changed(document, "spec.deletionStrategy", {"deletionRules": listed})
    assert schemas.faults(document) == [] or not right
    assert (ray_rules.faults(document) == []) is right
    assert "gate RayJobDeletionPolicy" in ray_rules.faults(document, gates=())


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
    (
        f"{POD}.volumes.0",
        {"name": "scratch", "hostPath": {"path": "/sys/devices/virtual/powercap/intel-rapl"}},
    ),
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


def test_a_namespace_is_open_only_where_a_hosts_folder_is_read():
    for overlay, wrong in ((CLUSTER, "privileged"), ("measured-eks", "restricted")):
        rendered = render(overlay)
        (namespace,) = (d for d in rendered if d["kind"] == "Namespace")
        label = "metadata.labels.pod-security~kubernetes~io/enforce"
        other = changed(namespace, label, wrong)
        assert safety_rules.set_faults([other if d is namespace else d for d in rendered]) != []


def test_spot_pods_of_gke_end_within_what_it_gives_them():
    (cluster,) = (d for d in render(CLUSTER) if d["kind"] == "RayCluster")
    spot, on_demand = cluster["spec"]["workerGroupSpecs"]
    assert spot["template"]["spec"]["terminationGracePeriodSeconds"] <= 25
    assert spot["priority"] > on_demand["priority"]
    assert spot["minReplicas"] == on_demand["minReplicas"] == 0
