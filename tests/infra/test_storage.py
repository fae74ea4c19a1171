"""The bucket's policy, field by field; what it lets through on a real store is tested in `tests/security/test_bucket_policy.py`."""

from __future__ import annotations

import importlib.resources
import json

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from support.manifests.documents import ROOT, changed, places, spoilt

pytest.importorskip("cfnlint", reason="cfn-lint, which moto brings, is not installed")
#: With somebody for WORKERS, as whoever applies it puts in.
POLICY = json.loads(
    (ROOT / "infra/storage/bucket-policy.json")
    .read_text()
    .replace("WORKERS", "arn:aws:iam::123456789012:role/a")
)
DATA = importlib.resources.files("cfnlint.data")
ACTIONS = json.loads((DATA / "AdditionalSpecs/Policies.json").read_text())["s3"]["Actions"]
#: Keys of conditions are names that the store knows; one is used.
CONDITION_KEYS = {"s3:x-amz-acl"}


def validator() -> Draft202012Validator:
    """AWS's grammar of a policy on a resource, as CloudFormation's linter has it."""
    folder = DATA / "schemas/other/iam"
    grammar, of_resources = (
        json.loads((folder / f"{n}.json").read_text()) for n in ("policy", "policy_resource")
    )
    registry = Registry().with_resources(
        [
            ("policy", Resource.from_contents(grammar, default_specification=DRAFT202012)),
            ("resource", Resource.from_contents(of_resources, default_specification=DRAFT202012)),
        ]
    )
    return Draft202012Validator(of_resources, registry=registry)


VALID = validator()


def faults(policy) -> list[str]:
    found = [error.message[:100] for error in VALID.iter_errors(policy)]
    if found or set(policy) != {"Version", "Statement"}:
        return found or ["what a policy is made of"]
    for statement in policy["Statement"]:
        if not {"Effect", "Principal", "Action", "Resource"} <= set(statement):
            found.append("what a statement is made of")
            continue
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        found += [a for a in actions if not a.startswith("s3:") or a[3:].lower() not in ACTIONS]
        if set(statement["Principal"]) != {"AWS"}:
            found.append("principal")
        for keys in statement.get("Condition", {}).values():
            found += set(keys) - CONDITION_KEYS
    return found


def test_every_misspelt_field_and_every_wrong_type_is_noticed():
    assert faults(POLICY) == []
    missed = [
        (place, how)
        for place, _ in places(POLICY)
        for how in ("misspelt", "of another type")
        if isinstance(place[-1], str) and not faults(spoilt(POLICY, place, how))
    ]
    assert missed == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("Statement.0.Effect", "Allows"),
        ("Statement.0.Action", ["s3:ListBuckets2"]),
        ("Statement.1.Action", "GetObject"),
        ("Version", "2012-10-18"),
    ],
)
def test_a_value_that_the_store_does_not_know_is_noticed(place, value):
    assert faults(changed(POLICY, place, value)) != []
