"""Who may talk to whom under a set of NetworkPolicies: their selectors, evaluated over pods as Kubernetes documents it.

Traffic goes through when its source may send and its target may receive. A pod that no policy selects in a direction may do all in
it; one that policies select may do what any of them says. Addresses outside the cluster only have the source's side. Whether a
block of addresses means pods, too, is left to the network's driver: here it does, which is the worse case.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Mapping
from typing import Any

from support.manifests.documents import Document

_KNOWN_OPERATORS = {
    "In": lambda labels, key, values: labels.get(key) in values,
    "NotIn": lambda labels, key, values: labels.get(key) not in values,
    "Exists": lambda labels, key, values: key in labels,
    "DoesNotExist": lambda labels, key, values: key not in labels,
}


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod as selectors see it; `namespace_labels` are its namespace's."""

    namespace: str
    labels: Mapping[str, str]
    ip: str = "10.1.2.3"
    namespace_labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def where(self) -> dict[str, str]:
        """Labels of its namespace, with the one that every namespace has."""
        return {"kubernetes.io/metadata.name": self.namespace, **self.namespace_labels}


@dataclasses.dataclass(frozen=True)
class Address:
    """A host outside the cluster."""

    ip: str


def allowed(
    documents: list[Document], source: Pod | Address, target: Pod | Address, port: int, protocol: str = "TCP"
) -> bool:
    """Whether `source` reaches `port` of `target`."""
    policies = [document for document in documents if document["kind"] == "NetworkPolicy"]
    sends = not isinstance(source, Pod) or _one_way(policies, "Egress", source, target, port, protocol)
    return sends and (
        not isinstance(target, Pod) or _one_way(policies, "Ingress", target, source, port, protocol)
    )


def _one_way(policies, direction: str, of: Pod, other: Pod | Address, port: int, protocol: str) -> bool:
    selecting = [
        policy
        for policy in policies
        if direction in _directions(policy["spec"])
        and policy["metadata"].get("namespace", "default") == of.namespace
        and matches(policy["spec"]["podSelector"], of.labels)
    ]
    return not selecting or any(
        _peer(rule, "to" if direction == "Egress" else "from", of, other) and _port(rule, port, protocol)
        for policy in selecting
        for rule in policy["spec"].get(direction.lower(), [])
    )


def _directions(spec: Mapping[str, Any]) -> list[str]:
    return spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]


def _peer(rule: Mapping[str, Any], key: str, of: Pod, other: Pod | Address) -> bool:
    if not rule.get(key):
        return True
    return any(_one_peer(peer, of, other) for peer in rule[key])


def _one_peer(peer: Mapping[str, Any], of: Pod, other: Pod | Address) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return _within(other.ip, block["cidr"]) and not any(
            _within(other.ip, cidr) for cidr in block.get("except", [])
        )
    if not isinstance(other, Pod):
        return False
    here = matches(peer["namespaceSelector"], other.where) if "namespaceSelector" in peer else None
    if here is None:
        here = other.namespace == of.namespace
    return here and matches(peer.get("podSelector", {}), other.labels)


def _within(ip: str, cidr: str) -> bool:
    return ipaddress.ip_address(ip) in ipaddress.ip_network(cidr)


def _port(rule: Mapping[str, Any], port: int, protocol: str) -> bool:
    return not rule.get("ports") or any(
        entry.get("protocol", "TCP") == protocol
        and ("port" not in entry or entry["port"] <= port <= entry.get("endPort", entry["port"]))
        for entry in rule["ports"]
    )


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects; an empty one selects everything."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        _KNOWN_OPERATORS[told["operator"]](labels, told["key"], told.get("values", ()))
        for told in selector.get("matchExpressions", [])
    )
