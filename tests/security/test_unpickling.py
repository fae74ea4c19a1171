"""Nothing in the product unpickles, evaluates or runs what a file or a model says: seen in the whole tree's syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("kernels", "workers", "pipeline", "jobs", "infra")

#: Modules that turn bytes into any object, and what of them is harmless: names of errors, and reading instructions as data.
UNPICKLERS = {
    "pickle": {"UnpicklingError"},
    "cPickle": set(),
    "_pickle": set(),
    "cloudpickle": set(),
    "dill": set(),
    "joblib": set(),
    "marshal": set(),
    "shelve": set(),
    "jsonpickle": set(),
    "pandas": set(),
    "yaml": {"safe_load", "safe_dump", "YAMLError"},
}
#: Calls that load pickles unless one argument says otherwise: what that is, and whether it must be there.
GUARDED = {
    "torch.load": ("weights_only", True, True),
    "np.load": ("allow_pickle", False, False),
    "numpy.load": ("allow_pickle", False, False),
}
RUNNERS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
#: Options that make libraries run code of a model's folder.
TRUST = {"trust_remote_code", "local_files_only_code", "custom_pipeline"}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and what is wrong with it."""
    names: dict[str, str] = {}  # as the file calls it -> what it is
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                module = node.module.partition(".")[0]
                if module in UNPICKLERS and alias.name not in UNPICKLERS[module]:
                    yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            module = names.get(first, "").partition(".")[0]
            if module in UNPICKLERS and rest.partition(".")[0] not in UNPICKLERS[module]:
                yield node.lineno, f"{module}.{rest}"
        if not isinstance(node, ast.Call):
            continue
        said = dotted(node.func)
        first, _, rest = said.partition(".")
        full = ".".join(filter(None, (names.get(first, first), rest)))
        keywords = {k.arg: k.value for k in node.keywords}
        for name, (argument, wanted, needed) in GUARDED.items():
            if name in (said, full):
                value = keywords.get(argument)
                literal = value.value if isinstance(value, ast.Constant) else None
                if (value is not None or needed) and literal is not wanted:
                    yield node.lineno, f"{name} without {argument}={wanted}"
        if full in RUNNERS or said in RUNNERS:
            yield node.lineno, full
        if any(
            k in TRUST and not (isinstance(v, ast.Constant) and v.value in (False, None))
            for k, v in keywords.items()
        ):
            yield node.lineno, "code of a model's folder is trusted"
        if isinstance(keywords.get("shell"), ast.Constant) and keywords["shell"].value:  # type: ignore[union-attr]
            yield node.lineno, "a shell"


def test_the_whole_tree_is_free_of_it() -> None:
    files = [f for layer in LAYERS for f in (ROOT / layer).rglob("*.py") if "typing" not in f.parts]
    assert len(files) > 200
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file in files
        for line, what in dangers(ast.parse(file.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.loads(b'')",
        "import pickle as p\np.load(f)",
        "from pickle import loads",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch as t\nt.load(f, weights_only=x)",
        "from torch import load\nload(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f)",
        "import yaml\nyaml.unsafe_load(f)",
        "import joblib\njoblib.load(f)",
        "eval(x)",
        "import os\nos.system(x)",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "DiffusionPipeline.from_pretrained(x, trust_remote_code=True)",
        "DiffusionPipeline.from_pretrained(x, custom_pipeline='theirs')",
    ],
)
def test_each_way_would_be_seen(code) -> None:
    assert list(dangers(ast.parse(code))) != []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f)",
        "import yaml\nyaml.safe_load(f)",
        "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "import re\nre.compile(x)",
        "model.eval()",
    ],
)
def test_what_is_harmless_is_let_pass(code) -> None:
    assert list(dangers(ast.parse(code))) == []
