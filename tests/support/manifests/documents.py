"""Kubernetes documents of `infra/`: rendered as kubectl renders them, walked, and spoilt on purpose."""

from __future__ import annotations

import copy
import functools
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from support.tools import missing

ROOT = Path(__file__).parents[3]
KUBERNETES = ROOT / "infra/kubernetes"
OVERLAYS = sorted(folder.name for folder in (KUBERNETES / "overlays").iterdir())
#: Sets that only tests render, so that every component is in one.
MORE = ROOT / "tests/infra/kustomizations"
SETS = [*OVERLAYS, *sorted(folder.name for folder in MORE.iterdir())]

Document = dict[str, Any]
Place = tuple[str | int, ...]


def kubectl_missing() -> str | None:
    """Why overlays cannot be rendered here."""
    return missing("kubectl")


@functools.cache
def _rendered(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(overlay: str) -> list[Document]:
    """The documents of an overlay, or of a set that only tests have."""
    folder = (KUBERNETES / "overlays" if overlay in OVERLAYS else MORE) / overlay
    return list(yaml.load_all(_rendered(folder), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def name_of(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def pod_templates(document: Any, place: Place = ()) -> Iterator[tuple[Place, Document]]:
    """Every pod template (`metadata`, `spec`) in a document, and where it is."""
    if isinstance(document, dict):
        spec = document.get("spec")
        if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
            yield place, document
        else:
            for key, value in document.items():
                yield from pod_templates(value, (*place, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from pod_templates(value, (*place, index))


def clusters(document: Document) -> Iterator[Document]:
    """The RayClusterSpecs in a document."""
    spec = document.get("spec", {})
    if document.get("kind") == "RayCluster":
        yield spec
    for job in (spec, spec.get("jobTemplate", {})):
        if document.get("kind") in ("RayJob", "RayCronJob") and "rayClusterSpec" in job:
            yield job["rayClusterSpec"]


def places(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every key and list item below `value`, and what it holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in items:
        yield (*place, key), held
        yield from places(held, (*place, key))


def spoilt(document: Document, place: Place, how: str) -> Document:
    """A copy that is wrong at `place`: its key misspelt, or what it holds of another type."""
    wrong = copy.deepcopy(document)
    holder: Any = wrong
    for key in place[:-1]:
        holder = holder[key]
    if how == "misspelt":
        holder[f"{place[-1]}x"] = holder.pop(place[-1])
    elif isinstance(holder[place[-1]], dict):
        holder[place[-1]] = ["a list"]
    else:
        holder[place[-1]] = {"a": "mapping"}
    return wrong


def _alike(kind: Any, place: Place) -> Place:
    return (kind, *("*" if isinstance(key, int) else key for key in place))


def distinct_fields(documents: Iterable[Document]) -> Iterator[tuple[Document, Place]]:
    """Every field of all documents, once: items of a list are alike, and so are documents of one kind.

    With each comes the document, without the items of lists that have no field of their own: what is small is soon checked.
    """
    seen: set[Place] = set()
    for document in documents:
        kind = document.get("kind")
        short = _shortened(document, (kind,), set())
        for place, _ in places(short):
            if isinstance(place[-1], str) and (alike := _alike(kind, place)) not in seen:
                seen.add(alike)
                yield short, place


def _shortened(value: Any, where: Place, seen: set[Place]) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(held, (*where, key), seen) for key, held in value.items()}
    if not isinstance(value, list):
        return value
    kept = []
    for item in value:
        fields = {_alike("*", place) for place, _ in places(item)}
        new = {(*where, *field) for field in fields} - seen
        if new or not kept:
            kept.append(_shortened(item, (*where, "*"), seen))
        seen |= new
    return kept


def changed(document: Document, change: str, value: Any = ...) -> Document:
    """A copy with `value` at a path such as `spec.rayClusterSpec.workerGroupSpecs.0.suspend`; without a value it is removed there."""
    wrong = copy.deepcopy(document)
    holder: Any = wrong
    *path, last = [int(key) if key.isdigit() else key.replace("~", ".") for key in change.split(".")]
    for key in path:
        holder = holder[key] if isinstance(holder, list) else holder.setdefault(key, {})
    if value is ...:
        del holder[last]
    elif isinstance(holder, list) and last == len(holder):
        holder.append(value)
    else:
        holder[last] = value
    return wrong
