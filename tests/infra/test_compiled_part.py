"""The C++ part of the kernels comes with the package: compiled where a compiler is, left out where none is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.tools import missing, needs

ROOT = Path(__file__).parents[2]
BUILT = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "kernels", "workers", "pipeline", "jobs")

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What a wheel is made of, without what was compiled here, and without the weights."""
    copy = tmp_path_factory.mktemp("tree")
    for name in BUILT:
        source = ROOT / name
        if source.is_file():
            shutil.copy(source, copy)
        else:
            shutil.copytree(
                source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "weights")
            )
    return copy


def wheel_of(tree, folder, **environment):
    build = f"import setuptools.build_meta as b; print(b.build_wheel(r'{folder}'))"
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def compiled(names):
    return [name for name in names if name.startswith("millijoule/kernels/native") and name.endswith(".so")]


@needs(missing("g++"))
def test_a_wheel_has_the_compiled_part(tree, tmp_path):
    # nothing of it is run, so it need not be fast: without optimising it is there in a third of the time
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    names = wheel_of(tree, tmp_path, CC=str(compiler), CXX=str(compiler))
    assert len(compiled(names)) == 1


def test_without_a_compiler_the_rest_is_installed_all_the_same(tree, tmp_path):
    shutil.rmtree(tree / "build", ignore_errors=True)
    names = wheel_of(tree, tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert compiled(names) == []
    assert "millijoule/kernels/native_library.py" in names


def test_a_source_distribution_has_what_is_compiled(tree, tmp_path):
    build = f"import setuptools.build_meta as b; b.build_sdist(r'{tmp_path}')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "out")
    (unpacked,) = (tmp_path / "out").iterdir()
    sources = {path.name for path in (ROOT / "kernels" / "cpp").rglob("*")}
    assert {path.name for path in (unpacked / "kernels" / "cpp").rglob("*")} == sources
