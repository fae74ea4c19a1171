"""What KubeRay's operator (and Kueue, for a job in its queue) refuses although the shape is right: KubeRay 1.7, validation.go."""

from __future__ import annotations

import re
from typing import Any

import yaml
from support.manifests.documents import Document, clusters

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}


def faults(document: Document) -> list[str]:
    """What the operator would say; empty for a kind that is not Ray's."""
    if document["kind"] not in _LENGTHS:
        return []
    found, name = [], document["metadata"]["name"]
    if not _LABEL.fullmatch(name) or len(name) > _LENGTHS[document["kind"]]:
        found.append(f"name {name}")
    for cluster in clusters(document):
        found += _cluster(cluster)
    spec = document["spec"]
    if document["kind"] == "RayCronJob":
        if len(spec["schedule"].split()) != 5 or "TZ" in spec["schedule"]:
            found.append("schedule")
        spec = spec.get("jobTemplate", {})
    if document["kind"] != "RayCluster":
        found += _job(spec, document["metadata"].get("labels", {}))
    return found


def _job(spec: dict[str, Any], labels: dict[str, str]) -> list[str]:
    shutdown, mode = spec.get("shutdownAfterJobFinishes", False), spec.get("submissionMode", "K8sJobMode")
    selector, backoff = spec.get("clusterSelector"), spec.get("backoffLimit", 0)
    rules = {
        "ttlSecondsAfterFinished without shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished", 0) > 0
        and not shutdown,
        "suspend without shutdownAfterJobFinishes": spec.get("suspend", False) and not shutdown,
        "deletionRules with shutdownAfterJobFinishes": bool(
            spec.get("deletionStrategy", {}).get("deletionRules")
        )
        and shutdown,
        "no cluster": not selector and "rayClusterSpec" not in spec,
        "backoffLimit with clusterSelector or InteractiveMode": backoff > 0
        and (bool(selector) or mode == "InteractiveMode"),
        "SidecarMode with a submitter": mode == "SidecarMode"
        and bool({"submitterPodTemplate", "submitterConfig"} & set(spec)),
        "deadlines are positive": min(
            spec.get("activeDeadlineSeconds", 1), spec.get("preRunningDeadlineSeconds", 1)
        )
        <= 0,
        "backoffLimit is not negative": backoff < 0,
        "runtimeEnvYAML is no mapping": not isinstance(
            yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict
        ),
    }
    cluster = spec.get("rayClusterSpec", {})
    rules["enableK8sTokenAuth in a RayJob"] = cluster.get("authOptions", {}).get("enableK8sTokenAuth", False)
    if "kueue.x-k8s.io/queue-name" in labels:
        rules["Kueue: shutdownAfterJobFinishes"] = not shutdown
        rules["Kueue: no autoscaling"] = cluster.get("enableInTreeAutoscaling", False)
        rules["Kueue: no group named head"] = any(
            group["groupName"] == "head" for group in cluster.get("workerGroupSpecs", [])
        )
    return [rule for rule, broken in rules.items() if broken]


def _cluster(spec: dict[str, Any]) -> list[str]:
    scales = spec.get("enableInTreeAutoscaling", False)
    second = scales and spec.get("autoscalerOptions", {}).get("version") == "v2"
    version = tuple(int(part) for part in spec.get("rayVersion", "0.0").split(".")[:2])
    head, auth, ft = spec["headGroupSpec"], spec.get("authOptions", {}), spec.get("gcsFaultToleranceOptions")
    env = {entry["name"] for entry in head["template"]["spec"]["containers"][0].get("env", [])}
    rocks = ft is not None and ft.get("backend") == "rocksdb"
    rules = {
        "token needs Ray 2.52": auth.get("mode", "token") == "token" and version < (2, 52),
        "version and RAY_enable_autoscaler_v2": "RAY_enable_autoscaler_v2" in env,
        "RAY_REDIS_ADDRESS, REDIS_PASSWORD, REDIS_USERNAME belong to gcsFaultToleranceOptions": bool(
            {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"} & env
        ),
        "redis-password belongs to gcsFaultToleranceOptions": "redis-password" in head["rayStartParams"],
        "rocksdb with Redis": rocks
        and bool({"redisAddress", "redisPassword", "redisUsername"} & set(ft or {})),
        "storage with Redis": ft is not None and not rocks and "storage" in ft,
        "restartPolicy of the head": second
        and head["template"]["spec"].get("restartPolicy", "Never") != "Never",
    }
    found = [rule for rule, broken in rules.items() if broken]
    for group in [head, *spec.get("workerGroupSpecs", [])]:
        parameters, labels = group["rayStartParams"], group.get("labels", {})
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31)
        worker = group is not head
        rules = {
            "resources twice": bool({"num-cpus", "num-gpus", "memory", "resources"} & set(parameters))
            and bool(group.get("resources")),
            "labels in rayStartParams": "labels" in parameters,
            "label syntax": not all(
                re.fullmatch(r"[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?", v) for v in labels.values()
            ),
            "replicas": worker and not 0 <= least <= most,
            "replicas without autoscaling": worker
            and not scales
            and not {"minReplicas", "maxReplicas"} <= set(group),
            "suspend with autoscaling": scales and group.get("suspend", False),
            "idleTimeoutSeconds": "idleTimeoutSeconds" in group
            and (not second or group["idleTimeoutSeconds"] < 0),
            "priority": group.get("priority", 0) != 0 and (not second or version < (2, 56)),
            "restartPolicy": second and group["template"]["spec"].get("restartPolicy", "Never") != "Never",
        }
        found += [f"{group.get('groupName', 'head')}: {rule}" for rule, broken in rules.items() if broken]
    return found
