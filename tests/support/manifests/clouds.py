"""What a cloud would say of a machine that a cluster launcher's file asks for, and Ray of the file around it.

AWS: the EC2 service model that botocore brings, request `RunInstances`. GCP: the `Instance` of Compute Engine's discovery document
(`tests/infra/schemas`). Around them: Ray's own validator, and what it leaves open.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

from botocore.loaders import Loader
from botocore.model import ServiceModel, Shape
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from support.manifests.documents import ROOT

#: Fields of `provider` that Ray's documentation names, for each; its schema leaves them open.
_PROVIDER = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips"},
    "gcp": {"type", "region", "availability_zone", "cache_stopped_nodes", "project_id"},
}
_RESOURCES = {"CPU", "GPU", "memory", "object_store_memory"}
_LABELS = {"ray.io/market-type"}
_NUMBERS = {"int32": int, "int64": (int, str), "uint32": int, "uint64": (int, str)}


def faults(config: dict[str, Any]) -> list[str]:
    """What is wrong with a file for `ray up`; empty where nothing is."""
    around = copy.deepcopy(config)
    nodes = around.get("available_node_types")
    for node in nodes.values() if isinstance(nodes, dict) else ():
        if isinstance(node, dict) and isinstance(node.get("node_config"), dict):
            node["node_config"] = {}  # Ray does not look at it
    if (said := _ray(json.dumps(around))) is not None:
        return [f"ray: {said}"]
    provider = config["provider"]
    kind = provider.get("type")
    if kind not in _PROVIDER or set(provider) != _PROVIDER[kind]:
        return ["provider"]
    found = [
        f"provider/{name}"
        for name, value in provider.items()
        if not isinstance(value, bool if name in ("cache_stopped_nodes", "use_internal_ips") else str)
    ]
    if set(config.get("auth", {})) != {"ssh_user"}:
        found.append("auth")
    if config["head_node_type"] not in config["available_node_types"]:
        found.append("head_node_type")
    for name, node in config["available_node_types"].items():
        machine = node["node_config"]
        said = _aws(machine) if kind == "aws" else _gcp(machine)
        said += [f"resources/{key}" for key in set(node["resources"]) - _RESOURCES]
        said += [f"labels/{key}" for key in set(node.get("labels", {})) - _LABELS]
        if not all(type(amount) in (int, float) for amount in node["resources"].values()):
            said.append("resources")
        found += [f"{name}: {fault}" for fault in said]
    return found + list(_mounts(config))


@functools.cache
def _ray(config: str) -> str | None:
    """What Ray's validator says of a configuration."""
    try:
        validate_config(prepare_config(json.loads(config)))
    except Exception as error:  # it and what prepares for it raise many kinds
        return str(error)[:200]
    return None


def _mounts(config: dict[str, Any]) -> Iterator[str]:
    """Files that are brought and that nobody asks for."""
    commands = "\n".join(
        command for key, value in config.items() if key.endswith("_commands") for command in value
    )
    asked = {path.replace("~", "/home/ubuntu") for path in re.findall(r"~/[\w./-]*[\w-]", commands)}
    # Ray reads it itself
    asked.add("/home/ubuntu/.ray/auth_token")
    for there, here in config.get("file_mounts", {}).items():
        if not isinstance(here, str) or not any(
            path == there or path.startswith(f"{there}/") for path in asked
        ):
            yield f"file_mounts/{there}"


@functools.cache
def _run_instances() -> Shape:
    model = ServiceModel(Loader().load_service_model("ec2", "service-2"))
    return model.operation_model("RunInstances").input_shape


def _aws(machine: dict[str, Any]) -> list[str]:
    # Ray adds how many
    report = ParamValidator().validate(machine | {"MinCount": 1, "MaxCount": 1}, _run_instances())
    if report.has_errors():
        return [report.generate_report()]
    return list(_aws_choices(machine, _run_instances()))


def _aws_choices(value: Any, shape: Shape, where: str = "node_config") -> Iterator[str]:
    """Values that are none of those a field may have; botocore leaves them to the cloud."""
    if shape.type_name == "structure":
        for name, held in value.items():
            yield from _aws_choices(held, shape.members[name], f"{where}/{name}")
    elif shape.type_name == "list":
        for held in value:
            yield from _aws_choices(held, shape.member, where)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{where}: {value}"


@functools.cache
def _gcp_schemas() -> dict[str, Any]:
    file = ROOT / "tests/infra/schemas/gcp_compute_v1_instance.json.gz"
    return json.loads(gzip.decompress(file.read_bytes()))["schemas"]


def _gcp(machine: dict[str, Any]) -> list[str]:
    return list(_gcp_faults(machine, {"$ref": "Instance"}))


def _gcp_faults(value: Any, schema: dict[str, Any], where: str = "node_config") -> Iterator[str]:
    schema = _gcp_schemas()[schema["$ref"]] if "$ref" in schema else schema
    if schema.get("readOnly"):
        yield f"{where}: the cloud's to say"
    kind = schema["type"]
    wanted = _NUMBERS.get(schema.get("format", ""))
    if wanted is None:
        wanted = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}.get(
            kind, float
        )
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "boolean"):
        yield f"{where}: no {kind}"
    elif isinstance(value, str) and wanted == (int, str) and not value.isdigit():
        yield f"{where}: no number"
    elif kind == "array":
        for index, held in enumerate(value):
            yield from _gcp_faults(held, schema["items"], f"{where}/{index}")
    elif kind == "object":
        known, more = schema.get("properties", {}), schema.get("additionalProperties")
        for name, held in value.items():
            if name in known or more:
                yield from _gcp_faults(held, known.get(name) or more, f"{where}/{name}")
            else:
                yield f"{where}: no field {name}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value}"
