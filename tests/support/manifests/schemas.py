"""What Kubernetes' API server would say of a document's shape, field by field.

Ray's and Kueue's kinds: their own definitions (`tests/infra/schemas`), read strictly: a field they do not name is a fault, as with
`kubectl apply --validate=strict`. Kubernetes' own kinds: its published schemas, through kubernetes-validate.
"""

from __future__ import annotations

import copy
import functools
import gzip
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils
import yaml
from jsonschema import Draft202012Validator
from support.manifests.documents import ROOT, Document

SCHEMAS = ROOT / "tests/infra/schemas"
#: The release of Kubernetes whose schemas count: Ray's operator supports it, and clouds still offer it.
RELEASE = "1.33"

# it would read its definitions anew for every document
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)

_NAMES = {"type": "object", "additionalProperties": {"type": "string"}}
#: Definitions leave metadata open, as the API server knows it already.
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _NAMES,
        "annotations": _NAMES,
    },
    "additionalProperties": False,
}


def faults(document: Document) -> list[str]:
    """What is wrong with a document's shape; empty where nothing is."""
    kind = str(document.get("apiVersion")), str(document.get("kind"))
    if kind in (definitions := _definitions()):
        errors = definitions[kind].iter_errors(document)
        return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]
    if not isinstance(document.get("apiVersion"), str) or not isinstance(document.get("kind"), str):
        return ["no kind of an apiVersion"]
    try:
        kubernetes_validate.validate(document, RELEASE, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [str(error)[:200]]
    return []


def _strict(schema: Any) -> Any:
    """A definition's schema as JSON Schema that knows no other fields. A field with a default may be left out."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    schema.pop("format", None)
    if schema.pop("nullable", False) and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    if "properties" in schema:
        properties = {name: _strict(inner) for name, inner in schema["properties"].items()}
        if properties.get("metadata") == {"type": "object"}:
            properties["metadata"] = _METADATA
        schema["properties"] = properties
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        defaulted = {
            name for name, inner in properties.items() if isinstance(inner, dict) and "default" in inner
        }
        if "required" in schema:
            schema["required"] = [name for name in schema["required"] if name not in defaulted]
    for name in ("additionalProperties", "items"):
        if isinstance(schema.get(name), dict):
            schema[name] = _strict(schema[name])
    return schema


@functools.cache
def _definitions() -> dict[tuple[str, str], Draft202012Validator]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {}
    for file in sorted(SCHEMAS.glob("*.yaml.gz")):
        definition = yaml.load(gzip.decompress(file.read_bytes()), loader)["spec"]
        for version in definition["versions"]:
            schema = copy.deepcopy(version["schema"]["openAPIV3Schema"])
            schema["required"] = ["apiVersion", "kind", "metadata", "spec"][
                : 4 if "spec" in schema["properties"] else 3
            ]
            if definition["names"]["kind"] == "ResourceFlavor":
                schema["required"].remove("spec")
            found[f"{definition['group']}/{version['name']}", definition["names"]["kind"]] = (
                Draft202012Validator(_strict(schema))
            )
    return found
