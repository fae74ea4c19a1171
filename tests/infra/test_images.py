"""Dockerfiles: stages, pinned bases, no root, no compiler at the end; and the two files that go into the images."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.manifests.documents import ROOT

FOLDER = ROOT / "infra/images"
FILES = sorted(FOLDER.glob("*.Dockerfile"))
COMPILERS = re.compile(r"\b(g\+\+|gcc|clang|build-essential|apt-get)\b")


def stages(text: str) -> list[list[tuple[str, str]]]:
    """Instructions of each stage, comments left out, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found: list[list[tuple[str, str]]] = [[]]
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


def faults(text: str) -> list[str]:
    before, *built = stages(text)
    last = built[-1]
    known = {"ARG", "FROM", "SHELL", "RUN", "ENV", "COPY", "USER", "WORKDIR", "CMD"}
    rules = {
        "unknown instruction": any(word not in known for stage in [before, *built] for word, _ in stage),
        "one stage": len(built) < 2,
        "base without a version": not re.fullmatch(
            r"BASE=\S+(:\d+\.\d+\.\d+[-\w]*|@sha256:[0-9a-f]{64})", before[0][1]
        ),
        "root": [rest for word, rest in last if word == "USER"] != ["1000:1000"],
        "compiler at the end": any(COMPILERS.search(rest) for word, rest in last if word == "RUN"),
        "packages without versions": any(
            re.search(r"apt-get install[^&]* (?!-)[\w+.-]+(\s|$)(?!=)", rest)
            for word, rest in built[0]
            if word == "RUN"
        ),
        "kernels may be missing": not any(
            "assert forms_here()" in rest for word, rest in built[0] if word == "RUN"
        ),
        "versions not held": not all(
            "-c /constraints.txt" in rest
            for word, rest in built[0]
            if word == "RUN" and "/pip install" in rest
        ),
    }
    return [rule for rule, broken in rules.items() if broken]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_dockerfile_has_stages_a_pinned_base_and_no_root(file):
    text = file.read_text()
    assert faults(text) == []
    for wrong in (
        text.replace("python:3.11.14-slim-bookworm", "python:latest"),
        text.replace("USER 1000:1000\n", ""),
        text.replace("RUN groupadd", "RUN apt-get install -y gcc && groupadd"),
        text.replace("g++=4:12.2.0-3", "g++"),
        text.replace("WORKDIR", "WORKDIRS", 1),
        text.replace("assert forms_here()", "forms_here()"),
        text.replace("-c /constraints.txt", "", 1),
    ):
        assert wrong != text
        assert faults(wrong) != []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_everything_an_image_copies_is_let_through_and_there(file):
    let = (FOLDER / f"{file.name}.dockerignore").read_text().splitlines()
    assert "*" in let
    for name in re.findall(r"^COPY (?:--chmod=\S+ )?(infra/\S+)", file.read_text(), re.MULTILINE):
        assert (ROOT / name).exists()
        assert any(line[0] == "!" and name.startswith(line[1:]) for line in let)


@pytest.mark.parametrize(("code", "becomes"), [(0, 0), (1, 1), (2, 2), (3, 0), (4, 0), (5, 5), (7, 0)])
def test_a_scheduler_does_not_repeat_what_would_not_change(tmp_path, code, becomes):
    stand_in = tmp_path / "millijoule"
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = "a b" ] && exit {code}\nexit 99\n')
    stand_in.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([FOLDER / "millijoule-job", "a b"], env=env, capture_output=True, check=False)
    assert done.returncode == becomes


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_triton_takes_its_binding_from_the_image_and_needs_no_compiler(tmp_path):
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    script = FOLDER / "triton_binding.py"
    subprocess.run([sys.executable, script, "build", tmp_path / "built"], check=True)
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    compiler.chmod(0o755)
    ask = "from triton.backends.nvidia.driver import CudaUtils; CudaUtils()"
    env = {
        **os.environ,
        "PATH": "/nowhere",
        "CC": str(compiler),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_LIBCUDA_PATH": "/nowhere",
        "MILLIJOULE_TRITON_BINDING": str(tmp_path / "built"),
    }
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=False)
    # without a GPU the driver's own functions are all that is missing
    assert done.returncode == 0 or "undefined symbol: cu" in done.stderr
    assert list((tmp_path / "cache").glob("*/cuda_utils*.so"))
    other = tmp_path / "other.c"
    other.write_text(Path(driver.__file__).with_name("driver.c").read_text() + "\n")
    done = subprocess.run(
        [compiler, other, "-o", tmp_path / "x.so"], env=env, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert not (tmp_path / "x.so").exists()
