"""What an operator of a shared cluster would refuse: root, writable roots, no limits, secrets in the clear, names nobody knows."""

from __future__ import annotations

import re
from typing import Any

from ray.scripts.scripts import start
from support.manifests.documents import Document, clusters, name_of, places, pod_templates

#: Names in free maps, which no schema knows.
_RESOURCES = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu", "storage"}
_ANNOTATIONS = {"cluster-autoscaler.kubernetes.io/safe-to-evict", "karpenter.sh/do-not-disrupt"}
_NODE_LABELS = {
    *("cloud.google.com/gke-accelerator", "cloud.google.com/gke-spot"),
    *("karpenter.k8s.aws/instance-gpu-name", "karpenter.sh/capacity-type"),
}
_LABELS = {
    *(
        "app.kubernetes.io/part-of",
        "app.kubernetes.io/component",
        "ray.io/market-type",
        "kueue.x-k8s.io/queue-name",
    ),
    *("pod-security.kubernetes.io/enforce", "pod-security.kubernetes.io/enforce-version"),
    *("pod-security.kubernetes.io/warn", "kubernetes.io/metadata.name", "app.kubernetes.io/name"),
    *("ray.io/node-type", "ray.io/is-ray-node"),
}
_FREE = {
    "limits": _RESOURCES,
    "requests": _RESOURCES,
    "annotations": _ANNOTATIONS,
    "nodeSelector": _NODE_LABELS,
}
_FREE |= {"labels": _LABELS, "matchLabels": _LABELS, "selector": _LABELS | {"matchLabels"}}
_FREE |= {"rayStartParams": {option.lstrip("-") for parameter in start.params for option in parameter.opts}}
_UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    return float(number) * _UNITS[unit]


def unknown_names(document: Document) -> list[str]:
    """Names in free maps, such as labels and limits, that nobody here uses."""
    return [
        f"{'/'.join(map(str, place))}: nobody knows this name"
        for place, _ in places(document)
        if len(place) > 1
        and place[-2] in _FREE
        and isinstance(place[-1], str)
        and place[-1] not in _FREE[place[-2]]
    ]


def faults(document: Document) -> list[str]:
    """What is unsafe or unknown in a document by itself."""
    found = unknown_names(document)
    if document["kind"] == "Secret":
        found.append("a secret in the tree")
    for place, template in pod_templates(document):
        found += [f"{'/'.join(map(str, place))}: {fault}" for fault in _pod(template["spec"])]
    for cluster in clusters(document):
        options = cluster.get("autoscalerOptions")
        if options is not None:
            found += [
                f"autoscaler: {fault}"
                for fault in _container(options | {"name": "autoscaler", "image": "a:1"})
            ]
    return found


def _pod(spec: dict[str, Any]) -> list[str]:
    security, volumes = (
        spec.get("securityContext", {}),
        {volume["name"]: volume for volume in spec.get("volumes", [])},
    )
    rules = {
        "root": not security.get("runAsNonRoot") or security.get("runAsUser", 0) == 0,
        "seccomp": security.get("seccompProfile") != {"type": "RuntimeDefault"},
        "the host's namespaces": any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
        "grace": spec.get("terminationGracePeriodSeconds", 0) <= 0,
        "a host's folder": any(
            "hostPath" in volume and not _counters(volume, spec) for volume in volumes.values()
        ),
        "a token nobody needs": spec.get("serviceAccountName") != "millijoule-head"
        and spec.get("automountServiceAccountToken") is not False,
        "service links": spec.get("enableServiceLinks") is not False,
    }
    found = [rule for rule, broken in rules.items() if broken]
    for container in spec["containers"]:
        found += _container(container)
        env = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
        drain = env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
        if drain is not None and float(drain) + 5 > spec.get("terminationGracePeriodSeconds", 30):
            found.append("killed before it is drained")
        if container["name"].startswith("ray-") and "submitter" not in container["name"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
            if not {"/scratch", "/tmp/ray", "/dev/shm"} <= set(mounts) or env.get("RAY_TMPDIR") != "/tmp":
                found.append("nowhere to write")
    return found


def _counters(volume: dict[str, Any], spec: dict[str, Any]) -> bool:
    """Whether a host's folder is the processor's energy counters, and only read."""
    mounts = [m for c in spec["containers"] for m in c.get("volumeMounts", []) if m["name"] == volume["name"]]
    where = volume["hostPath"].get("path")
    return where == "/sys/devices/virtual/powercap/intel-rapl" and all(m.get("readOnly") for m in mounts)


def _container(container: dict[str, Any]) -> list[str]:
    security, resources = container.get("securityContext", {}), container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    env = container.get("env", [])
    rules = {
        "escalation": security.get("allowPrivilegeEscalation") is not False
        or security.get("privileged", False),
        "writable root": security.get("readOnlyRootFilesystem") is not True,
        "root": security.get("runAsNonRoot") is not True,
        "capabilities": security.get("capabilities") != {"drop": ["ALL"]},
        "limits": not {"cpu", "memory"} <= set(requests) & set(limits),
        "requests above limits": any(
            quantity(requests[k]) > quantity(limits[k]) for k in set(requests) & set(limits)
        ),
        "image without a version": not re.search(r":[^:/]*\d[^:/]*$", container["image"]),
        "a secret in the clear": any(
            re.search("PASSWORD|TOKEN|SECRET|KEY", entry["name"]) and "valueFrom" not in entry
            for entry in env
        ),
    }
    return [f"{container['name']}: {rule}" for rule, broken in rules.items() if broken]


def set_faults(documents: list[Document]) -> list[str]:
    """What does not fit together in a set: accounts that are not there, selectors that select nothing."""
    found = []
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    pods = []
    for document in documents:
        for place, template in pod_templates(document):
            account = template["spec"].get("serviceAccountName")
            if account is not None and account not in accounts:
                found.append(f"{name_of(document)}: no account {account}")
            labels = dict(template.get("metadata", {}).get("labels", {}))
            if "headGroupSpec" in place or "workerGroupSpecs" in place:  # what KubeRay adds
                node = "head" if "headGroupSpec" in place else "worker"
                labels |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": node}
            pods.append(labels)
    hosts = any(name == "hostPath" for document in documents for (*_, name), _ in places(document))
    level = {"privileged"} if hosts else {"restricted"}
    found += [
        f"{name_of(document)}: is {'' if hosts else 'not '}restricted"
        for document in documents
        if document["kind"] == "Namespace"
        and {document["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]} != level
    ]
    for document in documents:
        for place, selector in places(document):
            if place[-1] == "matchLabels" and "namespaceSelector" not in place:
                outside = selector.keys() & {"app.kubernetes.io/name"} or selector == {
                    "ray.io/node-type": "redis-cleanup"
                }
                if not outside and not any(selector.items() <= labels.items() for labels in pods):
                    missing_submitter = selector.get("app.kubernetes.io/component") == "submitter"
                    if not missing_submitter:
                        found.append(f"{name_of(document)}: {'/'.join(map(str, place))} selects nothing")
    return found
