"""The shape of the product: arrows between files point down, none run in a circle, and no folder is a heap."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: From the bottom up: a file imports from its own layer and from lower ones.
LAYERS = ("kernels", "workers", "pipeline", "jobs")
MOST_FILES = 20


def modules(root: Path) -> dict[str, Path]:
    """Every module of the product by its name below `millijoule`."""
    files = [f for layer in LAYERS for f in sorted((root / layer).rglob("*.py"))]
    names = {f: ".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for f in files}
    return {name: file for file, name in names.items()}


def imports(root: Path) -> dict[str, set[str]]:
    """What each module imports of the product, wherever the import stands: late and type-checking ones count."""
    known = modules(root)
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}:{node.lineno}: a relative import"
                targets = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            for target in (t.removeprefix("millijoule.") for t in targets if t.startswith("millijoule.")):
                if target in known and target != name and not name.startswith(f"{target}."):
                    found[name].add(target)
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    height = {layer: i for i, layer in enumerate(LAYERS)}
    return [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if height[target.split(".")[0]] > height[name.split(".")[0]]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_arrows_between_files_point_down_and_never_in_a_circle() -> None:
    graph = imports(ROOT)
    assert len(graph) > 150
    assert upward(graph) == []
    assert circle(graph) == []


def test_no_folder_of_the_product_is_a_heap() -> None:
    import subprocess

    listed = subprocess.check_output(["git", "ls-files", *LAYERS, "infra"], cwd=ROOT, text=True).split("\n")
    counts = Counter(str(Path(file).parent) for file in listed if file)
    assert counts
    assert {folder: n for folder, n in counts.items() if n > MOST_FILES} == {}


def test_every_room_is_in_the_package() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {str(f.parent.relative_to(ROOT)) for layer in LAYERS for f in (ROOT / layer).rglob("*.py")}
    assert sorted(config["packages"]) == sorted(f"millijoule.{room.replace('/', '.')}" for room in rooms)


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"workers/a.py": "def f():\n    from millijoule.pipeline.b import x\n"}, "workers.a -> pipeline.b"),
        ({"workers/a.py": "import millijoule.pipeline.b\n"}, "workers.a -> pipeline.b"),
        (
            {"kernels/a.py": "from millijoule.workers import c\n", "workers/c.py": ""},
            "kernels.a -> workers.c",
        ),
    ],
)
def test_an_upward_arrow_is_seen(tmp_path: Path, files: dict[str, str], wrong: str) -> None:
    for name, text in {"pipeline/b.py": "", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward(imports(tmp_path)) == [wrong]


def test_a_circle_is_seen_through_late_and_type_checking_imports(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers/a.py").write_text("def f():\n    from millijoule.workers import b\n")
    (tmp_path / "workers/b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from millijoule.workers.a import f\n"
    )
    assert set(circle(imports(tmp_path))) == {"workers.a", "workers.b"}
