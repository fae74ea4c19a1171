"""Scripts for people and builds that are given a path that is not there: a line that names it, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.manifests.documents import ROOT

INFRA = ROOT / "infra"
#: Each script with a path of its own that is not there; all others are as they should be.
CASES = [
    ("audit/audit.py", ["ask", "GONE"]),
    ("audit/audit.py", ["compare", "GONE", "--revision", "r", "--date", "2026-01-01"]),
    ("images/sbom.py", ["--python", "GONE", "--dpkg-status", "FILE", "out.json"]),
    ("images/sbom.py", ["--python", sys.prefix, "--dpkg-status", "GONE", "out.json"]),
    ("images/sbom.py", ["--python", sys.prefix, "--dpkg-status", "FILE", "--os-release", "GONE", "out.json"]),
    ("images/triton_binding.py", ["GONE/x.c", "-o", "x.so"]),
    ("features/efficientnet_lite0.py", ["--wheel", "GONE"]),
    ("features/efficientnet_lite0.py", ["--wheel", "FILE"]),
    ("features/expected_features.py", ["--code", "GONE", "--wheel", "FILE"]),
    ("vocabulary/similar_words.py", ["--wordnet", "GONE", "--encoder", "GONE", "--frequencies", "FILE"]),
]


@pytest.fixture
def run(tmp_path):
    def run(script, arguments, **environment):
        (tmp_path / "a-file").write_text("no wheel\n")
        names = {"GONE": str(tmp_path / "gone"), "FILE": str(tmp_path / "a-file")}
        words = [names.get(word, word.replace("GONE/", f"{names['GONE']}/")) for word in arguments]
        return subprocess.run(
            [sys.executable, INFRA / script, *words],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize(("script", "arguments"), CASES)
def test_a_path_that_is_not_there_is_named_in_one_line(run, tmp_path, script, arguments):
    done = run(script, arguments, MILLIJOULE_TRITON_BINDING=str(tmp_path))
    named = "gone" if any("GONE" in word for word in arguments) else "a-file"
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / named) in line
    assert done.returncode in (1, 2)  # 3 is of an audit that nobody could be asked for
    assert not (tmp_path / "out.json").exists()


def test_every_script_is_tried():
    scripts = {str(p.relative_to(INFRA)) for p in INFRA.rglob("*.py") if "__main__" in p.read_text()}
    assert scripts == {script for script, _ in CASES}


def test_the_binding_without_its_folder_says_which_variable_is_missing(run):
    done = run("images/triton_binding.py", ["x.c", "-o", "x.so"], MILLIJOULE_TRITON_BINDING="")
    assert (done.returncode, done.stderr) == (
        2,
        "triton-binding: MILLIJOULE_TRITON_BINDING is not set: the folder that `build` filled\n",
    )
    done = run("images/triton_binding.py", ["build"])
    assert (done.returncode, done.stderr) == (2, "triton-binding: build FOLDER\n")
