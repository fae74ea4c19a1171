"""The compiled part is used only where it belongs to the Python beside it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from millijoule.kernels.native_library import INTERFACE, forms_here

ROOT = Path(__file__).parents[2]
CPP = ROOT / "kernels" / "cpp"

#: Of the exported functions' declarations; whoever changes one raises `INTERFACE` here, there and in cpp/processor.cpp.
DECLARED = (2, "714733ff47648341")

FALLS_BACK = """
import logging, sys
logging.basicConfig()
import millijoule.kernels.native_library as native
native._FOLDER = __import__("pathlib").Path(sys.argv[1])
assert native.native_library() is None
assert native.forms_here() == ()
assert native.usual_form() is None
"""


def declarations():
    text = "".join(path.read_text() for path in sorted(CPP.rglob("*.cpp")))
    found = re.findall(r"^MILLIJOULE_API ([^{;]*)", text, re.MULTILINE)
    return sorted(" ".join(one.removesuffix("try ").split()) for one in found)


def test_the_number_is_raised_with_every_change_of_what_is_exported():
    assert len(declarations()) > 10
    digest = hashlib.sha256("\n".join(declarations()).encode()).hexdigest()[:16]
    assert (INTERFACE, digest) == DECLARED
    said = re.search(r"millijoule_interface\(\) \{ return (\d+); \}", (CPP / "processor.cpp").read_text())
    assert said is not None
    assert int(said[1]) == INTERFACE


def fall_back(folder):
    done = subprocess.run(
        [sys.executable, "-c", FALLS_BACK, str(folder)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.skipif(not forms_here(), reason="the compiled kernels are not built")
def test_a_damaged_library_is_named_and_left_alone(tmp_path):
    (built,) = (ROOT / "kernels").glob("native.cpython-*.so")
    whole = built.read_bytes()
    for damaged in (
        b"",
        b"no library",
        b"\x7fELF" + bytes(100),
        whole[:1000],
        whole[: len(whole) // 2],
        whole[:-1],
    ):
        (tmp_path / built.name).write_bytes(damaged)
        assert "cannot be used" in fall_back(tmp_path)


@pytest.mark.skipif(not shutil.which("gcc") or not forms_here(), reason="there is no compiler here")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("int millijoule_interface() { return 999; }", "interface 999, not"),
        ("int millijoule_best_form() { return 2; }", "cannot be used"),
    ],
)
def test_a_library_of_other_code_is_named_and_left_alone(tmp_path, source, said):
    (built,) = (ROOT / "kernels").glob("native.cpython-*.so")
    (tmp_path / "a.c").write_text(source)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", str(tmp_path / "a.c"), "-o", str(tmp_path / built.name)], check=True
    )
    assert said in fall_back(tmp_path)


def test_without_a_library_nothing_is_said_loudly(tmp_path):
    assert fall_back(tmp_path) == ""
