"""What KubeRay's operator (and Kueue, for a job in its queue) refuses although the shape is right: KubeRay 1.7, validation.go."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Collection
from typing import Any

import yaml
from support.manifests.documents import Document, clusters

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?")
_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
#: Gates of the operator that are on by themselves (beta); the alpha ones an operator is started with.
GATES = frozenset({"RayJobDeletionPolicy"})
#: What ends a job's cluster, from what ends least to what ends most: the later ones may not come before.
_DELETIONS = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def faults(document: Document, gates: Collection[str] = GATES) -> list[str]:
    """What an operator with these feature gates would say; empty for a kind that is not Ray's."""
    if document["kind"] not in _LENGTHS:
        return []
    found, name = [], document["metadata"]["name"]
    if not _LABEL.fullmatch(name) or len(name) > _LENGTHS[document["kind"]]:
        found.append(f"name {name}")
    # a cron job's template has no annotations of its own
    annotations = document["metadata"].get("annotations", {}) if document["kind"] != "RayCronJob" else {}
    for cluster in clusters(document):
        found += _cluster(cluster, annotations, gates)
    spec = document["spec"]
    if document["kind"] == "RayCronJob":
        found += _cron(spec, gates)
        spec = spec.get("jobTemplate", {})
    if document["kind"] != "RayCluster":
        found += _job(spec, document["metadata"].get("labels", {}), gates)
    return found


def _broken(rules: dict[str, bool]) -> list[str]:
    return [rule for rule, broken in rules.items() if broken]


def _cron(spec: dict[str, Any], gates: Collection[str]) -> list[str]:
    rules = {
        "gate RayCronJob": "RayCronJob" not in gates,
        "schedule": len(spec["schedule"].split()) != 5 or "TZ" in spec["schedule"],
        "timeZone": spec.get("timeZone", "Etc/UTC") not in zoneinfo.available_timezones(),
    }
    return _broken(rules)


def _job(spec: dict[str, Any], labels: dict[str, str], gates: Collection[str]) -> list[str]:
    shutdown, mode = spec.get("shutdownAfterJobFinishes", False), spec.get("submissionMode", "K8sJobMode")
    selector, backoff = spec.get("clusterSelector"), spec.get("backoffLimit", 0)
    cluster = spec.get("rayClusterSpec", {})
    sidecar, suspend = mode == "SidecarMode", spec.get("suspend", False)
    head = cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {})
    deadlines = (spec.get("activeDeadlineSeconds", 1), spec.get("preRunningDeadlineSeconds", 1))
    rules = {
        "ttlSecondsAfterFinished without shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished", 0) > 0
        and not shutdown,
        "ttlSecondsAfterFinished is not negative": spec.get("ttlSecondsAfterFinished", 0) < 0,
        "suspend without shutdownAfterJobFinishes": suspend and not shutdown,
        "suspend with clusterSelector": suspend and bool(selector),
        "no cluster": not selector and "rayClusterSpec" not in spec,
        "no name in clusterSelector": bool(selector) and not selector.get("ray.io/cluster"),
        "backoffLimit with clusterSelector or InteractiveMode": backoff > 0
        and (bool(selector) or mode == "InteractiveMode"),
        "SidecarMode with clusterSelector": sidecar and bool(selector),
        "SidecarMode with a submitter": sidecar
        and bool({"submitterPodTemplate", "submitterConfig"} & set(spec)),
        "SidecarMode: restartPolicy of the head": sidecar and head.get("restartPolicy", "Never") != "Never",
        "deadlines are positive": min(deadlines) <= 0,
        "backoffLimit is not negative": backoff < 0,
        "runtimeEnvYAML is no mapping": not isinstance(
            yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict
        ),
        "enableK8sTokenAuth in a RayJob": cluster.get("authOptions", {}).get("enableK8sTokenAuth", False),
    }
    if "kueue.x-k8s.io/queue-name" in labels:
        rules["Kueue: shutdownAfterJobFinishes"] = not shutdown
        rules["Kueue: no autoscaling"] = cluster.get("enableInTreeAutoscaling", False)
        rules["Kueue: no group named head"] = any(
            group["groupName"] == "head" for group in cluster.get("workerGroupSpecs", [])
        )
    return _broken(rules) + _deletion(spec, gates)


def _deletion(spec: dict[str, Any], gates: Collection[str]) -> list[str]:
    if "deletionStrategy" not in spec:
        return []
    strategy, shutdown = spec["deletionStrategy"], spec.get("shutdownAfterJobFinishes", False)
    scales = spec.get("rayClusterSpec", {}).get("enableInTreeAutoscaling", False)
    old = {"onSuccess", "onFailure"} & set(strategy)
    listed = strategy.get("deletionRules", [])
    policies = [strategy[name].get("policy") for name in old] + [rule["policy"] for rule in listed]
    when = [tuple(sorted((k, v) for k, v in r["condition"].items() if k != "ttlSeconds")) for r in listed]
    after = [rule["condition"].get("ttlSeconds", 0) for rule in listed]
    order = {
        condition: [
            t
            for t, p, c in sorted(zip(after, policies[len(old) :], when, strict=True), key=_rank)
            if c == condition
        ]
        for condition in set(when)
    }
    rules = {
        "gate RayJobDeletionPolicy": "RayJobDeletionPolicy" not in gates,
        "deletionRules with shutdownAfterJobFinishes": bool(listed) and shutdown,
        "deletionRules with onSuccess or onFailure": bool(listed) and bool(old),
        "neither both nor rules": not listed and len(old) != 2,
        "no policy": None in policies,
        "workers only, with autoscaling": scales and "DeleteWorkers" in policies,
        "no cluster of its own": bool(spec.get("clusterSelector"))
        and bool({"DeleteCluster", "DeleteWorkers"} & set(policies)),
        "DeleteNone with shutdownAfterJobFinishes": bool(old) and shutdown and "DeleteNone" in policies,
        "condition": any(len(condition) != 1 for condition in when) or min(after, default=0) < 0,
        "the same twice": len(set(zip(when, policies[len(old) :], strict=True))) != len(listed),
        "order": any(times != sorted(times) for times in order.values()),
    }
    return _broken(rules)


def _rank(rule: tuple[int, str, Any]) -> int:
    return _DELETIONS.index(rule[1]) if rule[1] in _DELETIONS else -1


def _cluster(spec: dict[str, Any], annotations: dict[str, str], gates: Collection[str]) -> list[str]:
    scales = spec.get("enableInTreeAutoscaling", False)
    options = spec.get("autoscalerOptions", {})
    second = scales and options.get("version") == "v2"
    version = tuple(int(part) for part in spec.get("rayVersion", "0.0").split(".")[:2])
    head, auth = spec["headGroupSpec"], spec.get("authOptions", {})
    env = _names(head["template"]["spec"]["containers"][0])
    rules = {
        "token needs Ray 2.52": auth.get("mode", "token") == "token" and version < (2, 52),
        "enableK8sTokenAuth": auth.get("enableK8sTokenAuth", False)
        and (auth.get("mode") != "token" or version < (2, 55) or bool(auth.get("secretName"))),
        "version and RAY_enable_autoscaler_v2": "RAY_enable_autoscaler_v2" in env,
        "idleTimeoutSeconds of the autoscaler": options.get("idleTimeoutSeconds", 0) < 0,
        "KUBERAY_GEN_AUTOSCALER_START_CMD": "KUBERAY_GEN_AUTOSCALER_START_CMD" in _names(options),
        "restartPolicy of the head": second
        and head["template"]["spec"].get("restartPolicy", "Never") != "Never",
        "gate RayClusterNetworkPolicy": "networkPolicy" in spec and "RayClusterNetworkPolicy" not in gates,
        "gate RayClusterMTLS": "tlsOptions" in spec and "RayClusterMTLS" not in gates,
        "gate RayClusterHistoryServer": "historyServerOptions" in spec
        and "RayClusterHistoryServer" not in gates,
    }
    found = _broken(rules) + _fault_tolerance(spec, annotations, gates)
    for group in [head, *spec.get("workerGroupSpecs", [])]:
        parameters, labels = group["rayStartParams"], group.get("labels", {})
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31)
        worker = group is not head
        rules = {
            "resources twice": bool({"num-cpus", "num-gpus", "memory", "resources"} & set(parameters))
            and bool(group.get("resources")),
            "labels in rayStartParams": "labels" in parameters,
            "label syntax": not all(_LABEL_VALUE.fullmatch(value) for value in labels.values()),
            "replicas": worker and not 0 <= least <= most,
            "replicas without autoscaling": worker
            and not scales
            and not {"minReplicas", "maxReplicas"} <= set(group),
            "suspend with autoscaling": scales and group.get("suspend", False),
            "gate RayJobDeletionPolicy": group.get("suspend", False) and "RayJobDeletionPolicy" not in gates,
            "idleTimeoutSeconds": "idleTimeoutSeconds" in group
            and (not second or group["idleTimeoutSeconds"] < 0),
            "priority": group.get("priority", 0) != 0 and (not second or version < (2, 56)),
            "restartPolicy": second and group["template"]["spec"].get("restartPolicy", "Never") != "Never",
        }
        found += [f"{group.get('groupName', 'head')}: {rule}" for rule in _broken(rules)]
    return found


def _fault_tolerance(spec: dict[str, Any], annotations: dict[str, str], gates: Collection[str]) -> list[str]:
    """Who keeps the head's state, in one place and said once."""
    head, options = spec["headGroupSpec"], spec.get("gcsFaultToleranceOptions")
    container, parameters = head["template"]["spec"]["containers"][0], head["rayStartParams"]
    env, annotated = _names(container), annotations.get("ray.io/ft-enabled", "")
    rules = {
        "ray.io/ft-enabled beside gcsFaultToleranceOptions": bool(annotated) and options is not None,
        "RAY_REDIS_ADDRESS without fault tolerance": "RAY_REDIS_ADDRESS" in env
        and options is None
        and annotated.lower() != "true",
        "a user of Redis": "REDIS_USERNAME" in env or bool(parameters.get("redis-username")),
    }
    if options is not None:
        storage, embedded = options.get("storage", {}), options.get("backend", "redis") == "rocksdb"
        mounts = container.get("volumeMounts", []) + head["template"]["spec"].get("volumes", [])
        own = {"redisAddress", "redisPassword", "redisUsername", "externalStorageNamespace"}
        rules |= {
            "redis-password belongs to gcsFaultToleranceOptions": bool(parameters.get("redis-password")),
            "REDIS_PASSWORD, RAY_REDIS_ADDRESS belong to it": bool(
                {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & env
            ),
            "its namespace in an annotation": bool(annotations.get("ray.io/external-storage-namespace")),
            "storage with Redis": not embedded and "storage" in options,
            "gate GCSFaultToleranceEmbeddedStorage": embedded
            and "GCSFaultToleranceEmbeddedStorage" not in gates,
            "rocksdb with Redis": embedded and bool(own & set(options)),
            "a claim and what makes one": "claimName" in storage
            and bool({"size", "storageClassName", "accessModes"} & set(storage)),
            "RAY_gcs_storage is the operator's": embedded
            and bool({"RAY_gcs_storage", "RAY_gcs_storage_path"} & env),
            "the operator's volume": embedded
            and any(
                mount["name"] == "gcs-storage" or mount.get("mountPath") == "/data/gcs" for mount in mounts
            ),
        }
    return _broken(rules)


def _names(container: dict[str, Any]) -> set[str]:
    """Names of a container's environment."""
    return {entry["name"] for entry in container.get("env", [])}
