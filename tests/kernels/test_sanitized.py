"""The C++ part reads and writes nothing that is not its own, and does nothing undefined: its tests under GCC's sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Test files of compiled kernels, and what of them is run here: whatever calls the library in the test's own process.
TESTS = {
    "test_dense_coupling.py": "compiled or extreme or batches",
    "test_image.py": "reference_s or saturate or threads or refused",
    "test_jpeg.py": "pillows or survive or sizes",
    "test_png.py": "survive or palette or sizes",
    "test_sparse_coupling.py": "bits or gap or limits or extreme or threads",
    "test_upsampling_decoder.py": "compiled or saturate or another_decoder",
    "test_webp.py": "sizes or bytes",
}

RUN = """
import ctypes, sys
import pytest
from millijoule.kernels import native_library
library = ctypes.CDLL(sys.argv[1])
native_library._load = lambda: library
sys.exit(pytest.main(sys.argv[2:]))
"""


def preloads():
    """The sanitizers' libraries, which have to be there before Python's own."""
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        if not os.path.isabs(found.stdout.strip()):
            pytest.skip(f"GCC has no {name} here")
        paths.append(found.stdout.strip())
    return " ".join(paths)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("there is no g++ here")
    path = tmp_path_factory.mktemp("sanitized") / "native.so"
    sources = sorted(map(str, (ROOT / "kernels" / "cpp").rglob("*.cpp")))
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden"]
    flags += ["-fsanitize=undefined,address", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, *sources, "-o", str(path)], check=True, capture_output=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("file", TESTS)
def test_nothing_is_undefined(library, file):
    environment = {
        **os.environ,
        "LD_PRELOAD": preloads(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", RUN, str(library), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", "not long and not slow", "-k", TESTS[file], str(ROOT / "tests" / "kernels" / file)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert " passed" in done.stdout
